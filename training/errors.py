"""How a command ends when something is wrong: one line on stderr and an exit status, no traceback."""

import functools
import sys

from structured.errors import BadInput
from training.launched import place

__all__ = ["BadInput", "WriteError", "command", "fail"]


class WriteError(OSError):
    """A file of a run cannot be written, as on a full disk."""


def fail(message, status):
    """End the process; among the processes of a node, the first says why."""
    if place().local_rank == 0:
        print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def command(main):
    """Make `main` the body of a script: bad input ends it with its message and exit status 2, a full disk with 1."""

    @functools.wraps(main)
    def run(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except BadInput as error:
            fail(error, 2)
        except WriteError as error:
            fail(error, 1)

    return run
