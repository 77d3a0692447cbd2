"""Files written whole or not at all."""

import contextlib
import os
import tempfile
from pathlib import Path

from training.errors import BadInput

ROOT = Path(__file__).resolve().parents[1]


@contextlib.contextmanager
def replacing(path):
    """A file to write next to `path`, flushed to disk and renamed: a kill leaves the old one or the new, never half."""
    temporary = beside(path)
    try:
        with open(temporary, "xb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def beside(path):
    """The name of a temporary file of this process next to `path`, which nothing has, a link neither."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    return temporary


def linked(old, new):
    """Make `new` another name of the file `old`, in place of what it named; False where the disk cannot do that."""
    temporary = beside(new)
    try:
        os.link(old, temporary)
        os.replace(temporary, new)
    except OSError:
        temporary.unlink(missing_ok=True)
        return False
    return True


def check_folder(folder, name):
    """BadInput, before the work, where no file can be put into a folder; it need not exist. name: its setting."""
    folder = Path(folder)
    if "\0" in str(folder):
        raise BadInput(f"{name} {str(folder)!r} has a zero byte, which no file's name has")
    try:
        there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"x")
    except OSError as error:
        raise BadInput(f"{name} {folder} cannot be written: {error.strerror}; choose another folder") from error


def check_output(path):
    """BadInput, before the work, for a file that could not be written after it."""
    path = Path(path)
    if path.is_dir():
        raise BadInput(f"'{path}' is a folder; name a file to write")
    if not path.parent.is_dir():
        raise BadInput(f"no folder {path.parent} to write {path.name} into")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise BadInput(f"{path} cannot be written; choose another place")


def here(script):
    """A script of this repository as it is called from the working folder."""
    return str(ROOT / script if os.path.relpath(ROOT).startswith("..") else Path(os.path.relpath(ROOT / script)))
