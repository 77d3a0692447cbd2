"""What the paper's grids share: their settings, which of their commands are printed, and running them on one machine.

A run of a grid is a name, which becomes its folder, and the config files and flags that make it.
"""

import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from training.configurator import configure, differences, parse_list, require_at_least, setting
from training.errors import BadInput


@dataclass
class GridSettings:
    out_dir: str = setting("out", "folder of the runs' folders")
    seed: int = setting(1337, "seed of every run")
    only: str = setting("", "regular expression: the runs whose name it is found in")
    extra: str = setting("", "config files and flags for every run, after the grid's own")
    todo: bool = setting(False, "leave out what is finished and what waits or runs in SLURM's queue")
    seeds: str = setting("", "several seeds, like 1|2|3, instead of the one")
    run: bool = setting(False, "run here what is left to do, instead of printing it")
    jobs: int = setting(1, "run: how many at a time at most")
    spread: int = setting(0, "run: over so many GPUs, one job on each in turn; 0: all on the one they choose")
    together: bool = setting(False, "run: in one process, whose runs take their steps in turn")

    def all_seeds(self):
        return parse_list(self.seeds, "seeds") if self.seeds else (self.seed,)


def show(cfg, script, runs):
    """Print the command of every run, a pair (name, config files and flags), or run it.

    With cfg.todo or cfg.run only of the runs that are still to be made. Raises BadInput if cfg.only matches none.
    """
    require_at_least(cfg, dict(jobs=1, spread=0))
    if cfg.together and cfg.spread:
        raise BadInput(f"runs in one process share one GPU; give --spread={cfg.spread} without --together")
    if cfg.spread > cfg.jobs:
        raise BadInput(f"--jobs={cfg.jobs} leaves GPUs idle; --spread={cfg.spread} needs --jobs={cfg.spread} or more")
    commands = []
    for name, flags in runs:
        if re.search(cfg.only, name):
            where = [f"--out_dir={cfg.out_dir}/{name}", "--init_from=auto"]
            commands.append(shlex.join(["python", script, *flags, *shlex.split(cfg.extra), *where]))
    if runs and not commands:
        some = ", ".join(name for name, _ in runs[:: -(-len(runs) // 3)])
        raise BadInput(f"only is {cfg.only!r}, found in no name of the grid's {len(runs)} runs, such as {some}")
    if cfg.todo or cfg.run:
        commands = to_do(commands, here=cfg.run)
    if cfg.run and cfg.together:
        run_together(commands, cfg.jobs)
    elif cfg.run:
        run_here(commands, cfg.jobs, visible(cfg.spread))
    else:
        print("".join(f"{command}\n" for command in commands), end="")


def visible(gpus):
    """The names of the first `gpus` GPUs of those that this process may use; raises BadInput if there are fewer."""
    if not gpus:
        return []
    names, where = os.environ.get("CUDA_VISIBLE_DEVICES"), "CUDA_VISIBLE_DEVICES has"
    if names is None:
        names, where = ",".join(map(str, range(torch.cuda.device_count()))), "this machine has"
    names = [name for name in names.split(",") if name]
    if len(names) < gpus:
        raise BadInput(f"spread is {gpus}, {where} {len(names)} GPUs ({','.join(names)})")
    return names[:gpus]


def run_here(commands, jobs, gpus=()):
    """Run commands as processes, `jobs` at a time; what one prints is added to output.txt in its folder.

    Each takes the one of `gpus`, names as in CUDA_VISIBLE_DEVICES, that the fewest running ones have; none: any.
    One that fails does not stop the others, and makes the exit status 1. At SIGINT or SIGTERM the running ones are told
    to save and end, no other is started, and the status is 128 + n; the same command goes on later.
    """
    waiting, running, failed, asked = list(commands), {}, [], []  # running: {process: (command, GPU)}
    signals = signal.SIGINT, signal.SIGTERM
    earlier = [signal.signal(number, lambda number, _: asked.append(number)) for number in signals]
    try:
        while (running or waiting) and not asked:
            while waiting and len(running) < jobs:
                command, taken = waiting.pop(0), [gpu for _, gpu in running.values()]
                gpu = min(gpus, key=taken.count, default=None)
                running[start(command, jobs, gpu)] = command, gpu
                say(command, f"started, {len(commands) - len(waiting)} of {len(commands)}")
            time.sleep(0.2)
            for process in [process for process in running if process.poll() is not None]:
                command, _ = running.pop(process)
                say(command, f"ended with status {process.returncode}" if process.returncode else "finished")
                failed += [command] if process.returncode else []
    finally:
        for process in running:
            process.terminate()
        for process, (command, _) in running.items():
            say(command, f"ended with status {process.wait()}")
        for number, handler in zip(signals, earlier, strict=True):
            signal.signal(number, handler)
    if asked:
        sys.exit(128 + asked[0])
    if failed:
        logs = ", ".join(str(folder(command) / "output.txt") for command in failed)
        sys.exit(f"error: {len(failed)} of {len(commands)} runs failed; why is in {logs}")


def run_together(commands, jobs):
    """As `run_here`, in this process (training/together.py)."""
    from training.together import Plan, fit_together

    def plan(command):
        _, script, *arguments = shlex.split(command)
        module = importlib.import_module(Path(script).stem)
        return Plan(module.training, configure(module.Settings, arguments), [script, *arguments])

    fit_together([plan(command) for command in commands], jobs)


def say(command, words):
    print(f"{time.strftime('%H:%M:%S')} {folder(command)} {words}", flush=True)


def start(command, jobs, gpu=None):
    """The process of a command, out of reach of the terminal's Ctrl-C, with its share of the processor's cores.

    gpu: the only one it sees.
    """
    where = folder(command)
    where.mkdir(parents=True, exist_ok=True)
    _, *script = shlex.split(command)
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} | os.environ
    environment |= {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
    with open(where / "output.txt", "a") as output:
        return subprocess.Popen(
            [sys.executable, *script], stdout=output, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip


def folder(command):
    """The folder of a command's run."""
    return Path([part for part in shlex.split(command) if part.startswith("--out_dir=")][-1].partition("=")[2])


def to_do(commands, here=False):
    """The commands that are neither finished nor in the queue; the counts go to stderr.

    here: they are to run on this machine, which need not reach a cluster though it has SLURM's programs.
    """
    try:
        busy = queued()
    except BadInput as error:
        if not here:
            raise
        print(f"{error}: nothing is taken to be in a queue", file=sys.stderr)
        busy = set()
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
