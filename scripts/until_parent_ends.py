"""Run a script until it ends or the process that started it does.

    python scripts/until_parent_ends.py SCRIPT FLAGS

The parent holds the other end of our stdin. When that closes, however the parent ended, the script is sent SIGTERM: a
training run saves and stops.
"""

import os
import runpy
import signal
import sys
import threading


def watch():
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=watch, daemon=True).start()
    sys.path[0] = os.getcwd()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
