"""Files written whole or not at all."""

import contextlib
import os
from pathlib import Path

from training.errors import BadInput


@contextlib.contextmanager
def replacing(path):
    """A file to write next to `path`, flushed to disk and renamed: a kill leaves the old one or the new, never half."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def linked(old, new):
    """Make `new` another name of the file `old`, in place of what it named; False where the disk cannot do that."""
    temporary = Path(f"{new}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        os.link(old, temporary)
        os.replace(temporary, new)
    except OSError:
        temporary.unlink(missing_ok=True)
        return False
    return True


def check_output(path):
    """BadInput, before the work, for a file that could not be written after it."""
    path = Path(path)
    if path.is_dir():
        raise BadInput(f"'{path}' is a folder; name a file to write")
    if not path.parent.is_dir():
        raise BadInput(f"no folder {path.parent} to write {path.name} into")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise BadInput(f"{path} cannot be written; choose another place")
