"""Grids of runs: their commands, printed or carried out. scripts/README.md says how a grid is asked for.

A grid is {name: script, config files and flags}; the name, with the seed, becomes the run's folder. `launch` prints the
commands, for a shell or for SLURM (submit.sh), or runs them: `run_here` as processes of this machine, `run_together` in
this process, `run_on_ray` on a Ray cluster.
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
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from training.configurator import configure, differences, parse_list, require_at_least, setting
from training.errors import BadInput
from training.signals import say

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class GridSettings:
    out_dir: str = setting("out", "folder of the runs' folders")
    seeds: str = setting("1337", "seed of the runs, or several with | between them; --seed=2 does as well")
    only: str = setting("", "regular expression: the runs whose name it is found in")
    extra: str = setting("", "config files and flags for every run, after the grid's own")
    todo: bool = setting(False, "leave out what is finished and what waits or runs in SLURM's queue")
    run: bool = setting(False, "run here what is left to do, instead of printing it")
    jobs: int = setting(1, "run: how many at a time at most")
    spread: int = setting(0, "run: over so many GPUs, one job on each in turn; 0: all on the one they choose")
    together: bool = setting(False, "run: in one process, whose runs take their steps in turn")
    ray: bool = setting(False, "run what is left to do by Ray, instead of printing it")
    address: str = setting("", "ray: the cluster; empty: that of RAY_ADDRESS, or this machine alone")
    cpus: int = setting(1, "ray: CPU cores of a run")
    gpus: float = setting(0.0, "ray: GPUs of a run; at 0.5 two runs share one")

    ALIASES: ClassVar[dict] = dict(seed="seeds")

    def commands(self, grid):
        """{name: command} of what these settings take from a grid, with every seed."""
        seeds = parse_list(self.seeds, "seeds")
        runs = {f"{name}_seed{seed}": [*run, f"--seed={seed}"] for seed in seeds for name, run in grid.items()}
        return commands(runs, self.out_dir, self.only, self.extra)


def pick(grids, names):
    """The runs of the grids that are named in a string, with | between them."""
    runs = {}
    for name in parse_list(names, "grids", str):
        if name not in grids:
            raise BadInput(f"no grid '{name}', there are {', '.join(grids)}")
        runs |= grids[name]
    return runs


def commands(runs, out_dir, only="", extra=""):
    """{name: command} of the runs whose name `only` is found in; a command begins its run or resumes it."""
    try:
        named = {name: run for name, run in runs.items() if re.search(only, name)}
    except re.error as error:
        raise BadInput(f"only is {only!r}, no regular expression: {error}") from None
    if runs and not named:
        some = ", ".join(list(runs)[:: -(-len(runs) // 3)])
        raise BadInput(f"only is {only!r}, found in no name of the grid's {len(runs)} runs, such as {some}")
    try:
        more = shlex.split(extra)
    except ValueError as error:
        raise BadInput(f"extra is {extra!r}, no flags as a shell reads them: {error}") from None
    return {
        name: shlex.join(["python", *run, *more, f"--out_dir={out_dir}/{name}", "--init_from=auto"])
        for name, run in named.items()
    }


def launch(cfg, named):
    """Print the commands of {name: command}, or carry out those that are left to do."""
    require_at_least(cfg, dict(jobs=1, spread=0, cpus=1, gpus=0))
    if cfg.run and cfg.ray:
        raise BadInput("run and ray exclude each other")
    if cfg.ray and find_spec("ray") is None:
        raise BadInput("no package ray: pip install -r requirements-ray.txt; without --ray the commands are printed")
    if cfg.together and cfg.spread:
        raise BadInput(f"runs in one process share one GPU; give --spread={cfg.spread} without --together")
    if cfg.spread > cfg.jobs:
        raise BadInput(f"--jobs={cfg.jobs} leaves GPUs idle; --spread={cfg.spread} needs --jobs={cfg.spread} or more")
    chosen = list(named.values())
    if cfg.todo or cfg.run or cfg.ray:
        chosen = to_do(chosen, here=cfg.run or cfg.ray)
    if cfg.ray and chosen:
        run_on_ray(chosen, cfg)
    elif cfg.run and cfg.together:
        run_together(chosen, cfg.jobs)
    elif cfg.run:
        run_here(chosen, cfg.jobs, visible(cfg.spread))
    elif not cfg.ray:
        print("".join(f"{command}\n" for command in chosen), end="")


def visible(gpus):
    """The names of the first `gpus` GPUs of those that this process may use; raises BadInput if there are fewer."""
    import torch

    names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
    names = [name for name in names.split(",") if name]
    if len(names) < gpus:
        raise BadInput(f"spread is {gpus}, GPUs that this process may use are {len(names)} ({','.join(names)})")
    return names[:gpus]


def run_here(commands, jobs, gpus=(), cores=None, every=600):
    """Run commands as processes, `jobs` at a time; each says its last line every so many seconds.

    cores: threads of each; None: its share of this machine's. gpus: names as in CUDA_VISIBLE_DEVICES, of which each run
    takes the one that the fewest running ones have; none: any. One that fails does not stop the others, and makes the
    exit status 1. At SIGINT or SIGTERM the running ones are told to save and end, no other is started, and the status
    is 128 + n; the same command resumes.
    """
    waiting, running, failed, asked = list(commands), {}, [], []  # running: {process: (command, GPU)}
    earlier = {s: signal.signal(s, lambda number, _: asked.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    cores, due = cores or max(1, (os.cpu_count() or 1) // jobs), time.monotonic() + every
    try:
        while (running or waiting) and not asked:
            while waiting and len(running) < jobs:
                command, taken = waiting.pop(0), [gpu for _, gpu in running.values()]
                gpu = min(gpus, key=taken.count, default=None)
                running[start(command, cores, gpu)] = command, gpu
                report(command, f"started, {len(commands) - len(waiting)} of {len(commands)}")
            time.sleep(0.2)
            for process in [process for process in running if process.poll() is not None]:
                failed += ended(running.pop(process)[0], process.returncode)
            if time.monotonic() > due:
                due += every
                for command, _ in running.values():
                    report(command, last_line(command))
    finally:
        for process in running:
            process.terminate()
        for process, (command, _) in running.items():
            ended(command, process.wait())
        for number, handler in earlier.items():
            signal.signal(number, handler)
    if asked:
        sys.exit(128 + asked[0])
    exit_if(failed, commands)


def run_together(commands, jobs):
    """As `run_here`, in this process (training/together.py)."""
    from training.together import Plan, fit_together

    def plan(command):
        _, script, *arguments = shlex.split(command)
        module = importlib.import_module(Path(script).stem)
        return Plan(module.training, configure(module.Settings, arguments), [script, *arguments])

    fit_together([plan(command) for command in commands], jobs)


def run_on_ray(commands, cfg):
    """As `run_here`, as many at a time as the cores and GPUs of a Ray cluster hold, each with cfg.cpus and cfg.gpus.

    All nodes of the cluster see this folder and out_dir under the same paths.
    """
    import ray

    patience = {"RAY_kill_child_processes_on_worker_exit": "false"}  # runs end by themselves, having saved
    os.environ.update(patience)
    environment = {"env_vars": {"PYTHONPATH": str(ROOT), **patience}}
    try:
        ray.init(address=cfg.address or None, log_to_driver=False, runtime_env=environment)
    except (ConnectionError, ValueError) as error:
        where = cfg.address or os.environ.get("RAY_ADDRESS")
        raise BadInput(f"no Ray cluster at {where}: {str(error).partition(chr(10))[0]}") from None
    cores, failed = cfg.cpus, []
    status_of = ray.remote(num_cpus=cores, num_gpus=cfg.gpus, max_retries=0)(lambda line: start(line, cores).wait())
    going = {status_of.remote(command): command for command in commands}
    while going:
        (done,), _ = ray.wait(list(going))
        try:
            status = ray.get(done)
        except ray.exceptions.RayError as error:
            status = type(error).__name__
        failed += ended(going.pop(done), status)
    ray.shutdown()
    exit_if(failed, commands)


def start(command, cores, gpu=None):
    """The process of a command, which stops when this one ends; what it prints is added to output.txt in its folder.

    The terminal's Ctrl-C does not reach it. cores: its threads, unless OMP_NUM_THREADS is set. gpu: all that it sees.
    """
    output = ROOT / folder(command) / "output.txt"
    output.parent.mkdir(parents=True, exist_ok=True)
    environment = {"OMP_NUM_THREADS": str(cores)} | os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
    script = [sys.executable, "scripts/until_parent_ends.py", *shlex.split(command)[1:]]
    with open(output, "a") as out:
        return subprocess.Popen(
            script, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip


def ended(command, status):
    """Say how a command ended; a list of it if it failed."""
    report(command, f"ended with status {status}: {last_line(command)}" if status else "finished")
    return [command] if status else []


def exit_if(failed, commands):
    if failed:
        logs = ", ".join(str(folder(command) / "output.txt") for command in failed)
        sys.exit(f"error: {len(failed)} of {len(commands)} runs failed; why is in {logs}")


def report(command, words):
    say(f"{time.strftime('%H:%M:%S')} {folder(command)} {words}")


def last_line(command):
    return ((ROOT / folder(command) / "output.txt").read_text().splitlines() or ["nothing printed"])[-1]


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
    left = [command for command in commands if command not in busy and not finished(command)]
    done = len(commands) - len(waiting) - len(left)
    print(f"runs: {done} finished, {len(waiting)} in the queue, {len(left)} to do", file=sys.stderr)
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
