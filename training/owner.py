"""One process at a time writes into a folder.

The owner holds a lock on `owner.json` in the folder, which says who it is and is touched every BEAT seconds. The system
lets go of the lock when the process ends, however it ends, so a dead owner is no obstacle. Where a shared disk carries
no locks between nodes, an owner on another node is taken for alive as long as its file was touched within STALE
seconds.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path

from training.errors import BadInput, WriteError

NAME = "owner.json"
BEAT, STALE = 10, 60


class Owner:
    """Ownership of a folder that exists, from here until `release`.

    Raises BadInput where another process has it, WriteError where the folder cannot be written.
    """

    def __init__(self, folder):
        self.path = Path(folder) / NAME
        me = dict(pid=os.getpid(), host=socket.gethostname(), since=time.strftime("%Y-%m-%d %H:%M:%S"))
        try:
            self.file = self._locked()
            self.file.truncate(0)
            self.file.write(json.dumps(me) + "\n")
            self.file.flush()
            for left in Path(folder).glob("*.tmp"):  # of a process that was killed while it wrote
                left.unlink()
        except OSError as error:
            raise WriteError(f"{self.path} cannot be written: {error.strerror}") from error
        self.released = threading.Event()
        threading.Thread(target=self._beat, name="owner", daemon=True).start()

    def _locked(self):
        while True:
            file = open(self.path, "a+")  # noqa: SIM115, open until `release`
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EACCES) or lives_here(self.path):
                    file.close()
                    raise BadInput(refusal(self.path)) from None
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(file.fileno()).st_ino == self.path.stat().st_ino:  # not one that its owner just took away
                    if lives_elsewhere(self.path):
                        file.close()
                        raise BadInput(refusal(self.path))
                    return file
            file.close()

    def _beat(self):
        while not self.released.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self.file.fileno())

    def release(self):
        if not self.released.is_set():
            self.released.set()
            self.path.unlink(missing_ok=True)
            self.file.close()


def lives_here(path):
    """Whether the owner is a living process of this node; for disks that know no locks."""
    about = _read(path)
    if about.get("host") != socket.gethostname() or not isinstance(about.get("pid"), int):
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(about["pid"], 0)
        return True
    return False


def lives_elsewhere(path):
    """Whether an owner on another node has touched its file within STALE seconds by the disk's clock."""
    about = _read(path)
    if about.get("host") in (None, socket.gethostname()):
        return False
    probe = path.with_name(f".{NAME}.{socket.gethostname()}.{os.getpid()}")
    try:
        probe.touch()
        now = probe.stat().st_mtime
    except OSError:
        now = time.time()
    finally:
        probe.unlink(missing_ok=True)
    return now - path.stat().st_mtime < STALE


def refusal(path):
    about = _read(path)
    who = "another process"
    if about:
        who = f"process {about.get('pid')} on {about.get('host')}, since {about.get('since')}"
    words = f"{path.parent} belongs to {who}; wait for it, stop it, or choose another folder"
    if started_apart():
        words += "; these tasks do not know of each other: set MASTER_ADDR and MASTER_PORT so that they train together"
    return words


def started_apart(env=os.environ):
    """Whether srun started several tasks that train one by one, since nothing says that they belong together."""
    return int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "MASTER_ADDR" not in env and "WORLD_SIZE" not in env


def _read(path):
    try:
        about = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}
