"""How a command ends when its input is wrong: one line on stderr, exit status 2, no traceback."""

import functools
import sys

from structured.errors import BadInput

__all__ = ["BadInput", "command"]


def command(main):
    """Make `main` the body of a script: bad input ends it with its message and exit status 2."""

    @functools.wraps(main)
    def run(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except BadInput as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    return run
