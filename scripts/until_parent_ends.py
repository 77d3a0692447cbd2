"""Run a script until it ends or the process that started it does.

    python scripts/until_parent_ends.py SCRIPT FLAGS

The parent holds the other end of our stdin. When that closes, however the parent ended, the script is sent SIGTERM: a
training run saves and stops. A run of the same folder that is still doing so, its parent killed, is waited for.
"""

import fcntl
import os
import runpy
import signal
import sys
import threading
import time
from contextlib import suppress


def watch():
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)


def wait_for_owner(folder):
    """Until nobody holds the lock of the folder (training/owner.py), or for a minute: the script then says who does."""
    with suppress(FileNotFoundError), open(f"{folder}/owner.json") as file:
        for _ in range(600):
            with suppress(BlockingIOError):
                return fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            time.sleep(0.1)


if __name__ == "__main__":
    threading.Thread(target=watch, daemon=True).start()
    sys.path[0] = os.getcwd()
    sys.argv = sys.argv[1:]
    wait_for_owner([flag.partition("=")[2] for flag in sys.argv if flag.startswith("--out_dir=")][-1])
    runpy.run_path(sys.argv[0], run_name="__main__")
