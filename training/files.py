"""Files written whole or not at all."""

import contextlib
import os
from pathlib import Path


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
