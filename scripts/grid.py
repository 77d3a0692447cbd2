"""What the paper's grids share: their settings, and which of their commands are printed.

A run of a grid is a name, which becomes its folder, and the config files and flags that make it.
"""

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from training.configurator import configure, differences, setting
from training.errors import BadInput


@dataclass
class GridSettings:
    out_dir: str = setting("out", "folder of the runs' folders")
    seed: int = setting(1337, "seed of every run")
    only: str = setting("", "regular expression: the runs whose name it is found in")
    extra: str = setting("", "config files and flags for every run, after the grid's own")
    todo: bool = setting(False, "leave out what is finished and what waits or runs in SLURM's queue")


def show(cfg, script, runs):
    """Print the command of every run, a pair (name, config files and flags); with cfg.todo only of those to be made."""
    commands = []
    for name, flags in runs:
        if re.search(cfg.only, name):
            where = [f"--out_dir={cfg.out_dir}/{name}", "--init_from=auto"]
            commands.append(shlex.join(["python", script, *flags, *shlex.split(cfg.extra), *where]))
    if cfg.todo:
        commands = to_do(commands)
    print("".join(f"{command}\n" for command in commands), end="")


def to_do(commands):
    """The commands that are neither finished nor in the queue; the counts go to stderr."""
    busy = queued()
    waiting = [command for command in commands if command in busy]
    done = [command for command in commands if command not in busy and finished(command)]
    left = [command for command in commands if command not in {*waiting, *done}]
    print(f"runs: {len(done)} finished, {len(waiting)} in the queue, {len(left)} to do", file=sys.stderr)
    return left


def finished(command):
    """Whether the folder of a command holds its run, with the same settings and at least as many steps, finished."""
    _, script, *argv = shlex.split(command)
    cfg = configure(importlib.import_module(Path(script).stem).Settings, argv)
    try:
        record = json.loads((Path(cfg.out_dir) / "run.json").read_text())
    except (OSError, ValueError):
        return False
    saved = record["settings"]
    return record["status"] == "finished" and not differences(cfg, saved) and saved["max_iters"] >= cfg.max_iters


def queued():
    """The commands of our array tasks that wait or run: line TASK of the file that the array's script was given.

    Raises BadInput where SLURM does not answer: two tasks in one run's folder would spoil it.
    """
    if shutil.which("squeue") is None:
        return set()
    squeue = ["squeue", "--me", "--noheader", "--array", "--format=%K %o"]  # task, script and its arguments
    answer = subprocess.run(squeue, capture_output=True, text=True)
    if answer.returncode:
        raise BadInput(f"squeue does not answer: {(answer.stderr.strip() or 'no reason given').splitlines()[0]}")
    commands = set()
    for task, _, script in (row.partition(" ") for row in answer.stdout.splitlines()):
        runs = Path(script.partition(".sh ")[2].strip())
        if task.isdecimal() and runs.name == "runs.txt" and runs.is_file():
            commands.add(runs.read_text().splitlines()[int(task) - 1])
    return commands
