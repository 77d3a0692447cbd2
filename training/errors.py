"""How a command ends when something is wrong: one line on stderr and an exit status, no traceback."""

import contextlib
import errno
import functools
import sys

from structured.errors import BadInput
from training.launched import place

__all__ = ["BadInput", "WriteError", "command", "fail", "reading"]


class WriteError(OSError):
    """A file of a run cannot be written, as on a full disk."""


def fail(message, status):
    """End the process; among the processes of a node, the first says why, in one line."""
    if place().local_rank == 0:
        print("error:", *str(message).splitlines(), file=sys.stderr)
    sys.exit(status)


def out_of_memory(error):
    """Whether the memory of the host or of a GPU was too small; PyTorch has no type of its own for the host's."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "DefaultCPUAllocator" in str(error)


@contextlib.contextmanager
def reading(path):
    """Where a file is taken apart: BadInput if something in it is missing or of another type."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        if isinstance(error, BadInput):
            raise
        why = ": ".join(filter(None, [type(error).__name__, str(error).partition("\n")[0]]))
        raise BadInput(f"{path} is not whole, or of another version of this project ({why})") from error


def command(main):
    """Make `main` the body of a script: bad input ends it with its message and exit status 2, a full disk,
    a file that cannot be opened or too little memory with 1.
    """

    @functools.wraps(main)
    def run(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except BadInput as error:
            fail(error, 2)
        except WriteError as error:
            fail(error, 1)
        except OSError as error:
            if error.filename is None:
                raise
            fail(f"{error.filename}: {error.strerror}", 2 if error.errno == errno.ENAMETOOLONG else 1)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            fail(f"out of memory ({str(error).partition(chr(10))[0]}); fewer or smaller sizes need less", 1)

    return run
