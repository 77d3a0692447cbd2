"""The one exception for input that cannot work."""


class BadInput(ValueError):
    """The caller gave something that cannot work; the message says what, with the numbers, and what would."""
