"""The grids of time-series forecasting: printed, or run.

    --grid=paper      the paper's: structures, horizons, learning rates and SGD iterations, an encoder of 96 hours
    --grid=patch      PatchTST's layout with three scoring functions, by horizon; three seeds are --seeds="1|2|3"
    --grid=chronos    a small Chronos with its own self-attention and with MLR attention

    python scripts/time_series/sweep.py > runs.txt; bash runs.txt     # one after the other
    python scripts/time_series/sweep.py --run=True --jobs=4           # here, four at a time on one device
    python scripts/time_series/sweep.py --ray=True                    # by Ray Tune: requirements-ray.txt
    python scripts/time_series/sweep.py --best=True                   # what validation chooses, of the finished runs

Ray runs as many at a time as this machine's cores and GPUs hold (--cpus and --gpus are those of one run), or those of
the cluster at --address or RAY_ADDRESS, whose nodes all see this folder and out_dir under the same paths. A run is a
process of train_TS.py with a folder of its own. A sweep that was stopped or killed is given again: finished runs are
left out, started ones go on where they stopped.

Part of it: `--only=h96_`. More seeds: `--seed=2`, or `--seeds="1|2|3"`. `--todo=True` leaves finished runs out.
The paper's rate is constant, so that runs of 1,000 iterations (`--only=_it1000_`) hold those of 200, bit for bit.
"""

import contextlib
import io
import itertools
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.grid import GridSettings, finished, folder, show
from training.configurator import configure, setting
from training.errors import BadInput, command
from training.records import read_metrics

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "config/ts_configs"
MLR = f"{CONFIG}/mlr.py"
STRUCTURES = {"standard": [], "mlr": [MLR]}  # name: config files and flags on top of the setting's
PATCH_STRUCTURES = {
    "standard": [],
    "window": ["--token_mixing_struct=low_rank_with_sliding_window", "--sliding_block_size=5"],
    "mlr": [MLR, "--mlr_rank_list=2|1|1", "--mha_SP_attn_logits_scaling=False"],
}  # of 42 patches: 5 on either side; blocks of 42, 22 and 11
HORIZONS = (96, 192, 336)
RATES = (2e-4, 5e-3, 1e-5)
ITERATIONS = (200, 1_000)


@dataclass
class Settings(GridSettings):
    """Print or run the commands of the time-series grid, or print its best runs."""

    grid: str = setting("paper", "which one: paper, patch or chronos")
    out_dir: str = setting("out/time_series", "folder of the runs' folders")
    ray: bool = setting(False, "run what is not finished by Ray Tune")
    address: str = setting("", "Ray cluster; empty: that of RAY_ADDRESS, or this machine alone")
    cpus: int = setting(1, "Ray: CPU cores of a run")
    gpus: float = setting(0.0, "Ray: GPUs of a run; at 0.5 two runs share one")
    best: bool = setting(False, "print the finished run of lowest validation error of every structure and horizon")

    def __post_init__(self):
        if self.grid not in GRIDS:
            raise BadInput(f"grid is '{self.grid}', there are {', '.join(GRIDS)}")
        if self.cpus < 1 or self.gpus < 0:
            raise BadInput(f"cpus is {self.cpus}, at least 1; gpus is {self.gpus}, at least 0")
        if self.run + self.ray + self.best > 1:
            raise BadInput("run, ray and best exclude each other")


def paper(seeds):
    """(name, config files and flags) of every run."""
    for lr, seed, structure, horizon, iterations in itertools.product(RATES, seeds, STRUCTURES, HORIZONS, ITERATIONS):
        flags = [f"--horizon={horizon}", f"--init_lr={lr}", f"--max_iters={iterations}", f"--seed={seed}"]
        name = f"{structure}_h{horizon}_lr{lr:g}_it{iterations}_seed{seed}"
        yield name, [f"{CONFIG}/etth1.py", *STRUCTURES[structure], *flags]


def patch(seeds):
    for seed, horizon, structure in itertools.product(seeds, HORIZONS, PATCH_STRUCTURES):
        flags = [f"--horizon={horizon}", f"--seed={seed}"]
        yield f"patch_{structure}_h{horizon}_seed{seed}", [f"{CONFIG}/patch.py", *PATCH_STRUCTURES[structure], *flags]


def chronos(seeds):
    for seed, structure in itertools.product(seeds, STRUCTURES):
        yield f"chronos_{structure}_seed{seed}", [f"{CONFIG}/chronos.py", *STRUCTURES[structure], f"--seed={seed}"]


GRIDS = {"paper": ("train_TS.py", paper), "patch": ("train_TS.py", patch), "chronos": ("train_chronos.py", chronos)}


def commands(cfg, script, runs):
    """{name: command} of what the grid would print."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        show(cfg, script, runs)
    return {folder(line).name: line for line in printed.getvalue().splitlines()}


def outcome(path):
    """The evaluation of lowest validation error in a run's folder; the test errors have no say."""
    evaluations = [line for line in read_metrics(path) if "val/mse" in line]
    return min(evaluations, key=error)


def error(line):
    """What validation compares: Chronos' quantile loss, or the MSE."""
    return line.get("val/wql", line["val/mse"])


def print_best(runs):
    """The finished run of lowest validation error of every structure and horizon; runs: {name: command}."""
    done = {name: outcome(folder(line)) for name, line in runs.items() if finished(line)}
    for kind in sorted({kind_of(name) for name in done}, key=[kind_of(name) for name in runs].index):
        name = min((name for name in done if kind_of(name) == kind), key=lambda name: error(done[name]))
        errors = ", ".join(f"{key} {done[name][key]:.4f}" for key in ("val/mse", "test/mse", "test/mae"))
        print(f"{kind}: {errors} ({name}, step {done[name]['step']})")
    print(f"{len(done)} of {len(runs)} runs finished")


def kind_of(name):
    """Structure and horizon of a run's name."""
    return name.partition("_seed")[0].partition("_lr")[0].replace("_", " ")


def tune_runs(cfg, runs):
    """Run {name: command} by Ray Tune. Ends the process with status 1 if a run did not finish."""
    import ray
    from ray import tune

    patience = {"RAY_kill_child_processes_on_worker_exit": "false"}  # runs end by themselves, having saved
    os.environ.update(patience)
    environment = {"env_vars": {"PYTHONPATH": str(ROOT), **patience}}
    try:
        ray.init(address=cfg.address or None, log_to_driver=False, runtime_env=environment)
    except (ConnectionError, ValueError) as error:
        where = cfg.address or os.environ.get("RAY_ADDRESS")
        raise BadInput(f"no Ray cluster at {where}: {str(error).partition(chr(10))[0]}") from None
    run = tune.with_parameters(trial, runs=runs)
    tuner = tune.Tuner(
        tune.with_resources(run, {"cpu": cfg.cpus, "gpu": cfg.gpus}),
        param_space={"name": tune.grid_search(list(runs))},
        tune_config=tune.TuneConfig(metric="val/mse", mode="min"),
        run_config=tune.RunConfig(storage_path=str((ROOT / cfg.out_dir).resolve() / "ray"), verbose=1),
    )
    tuner.fit()
    ray.shutdown()
    left = [name for name, line in runs.items() if not finished(line)]
    if left:
        where = folder(runs[left[0]]) / "output.txt"
        sys.exit(f"error: {len(left)} of {len(runs)} runs did not finish, see {where}; the same command goes on")


def trial(config, runs):
    """One run in a process of its own, which ends with this one; the report is of its best validation."""
    import fcntl

    from ray import tune

    line = runs[config["name"]]
    where = ROOT / folder(line)  # Ray starts its processes elsewhere
    where.mkdir(parents=True, exist_ok=True)
    with open(where / "lock", "w") as lock, open(where / "output.txt", "a") as output:
        fcntl.flock(lock, fcntl.LOCK_EX)  # which a run of a killed sweep holds while it still saves
        _, *script = shlex.split(line)
        python = [sys.executable, "scripts/until_parent_ends.py", *script]
        streams = dict(stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, pass_fds=[lock.fileno()])
        with subprocess.Popen(python, cwd=ROOT, **streams) as process:
            status = process.wait()
    if status:
        raise RuntimeError(f"{config['name']} ended with status {status}: {where / 'output.txt'}")
    tune.report({key: outcome(where)[key] for key in ("step", "val/mse", "test/mse", "test/mae")})


@command
def main(argv=None):
    cfg = configure(Settings, argv)
    script, runs_of = GRIDS[cfg.grid]
    runs = list(runs_of(cfg.all_seeds()))
    if cfg.ray and find_spec("ray") is None:
        raise BadInput("no package ray: pip install -r requirements-ray.txt; without --ray the commands are printed")
    if cfg.ray and (left := commands(replace(cfg, todo=True), script, runs)):
        tune_runs(cfg, left)
    if cfg.ray or cfg.best:
        print_best(commands(replace(cfg, todo=False), script, runs))
    else:
        show(cfg, script, runs)


if __name__ == "__main__":
    main()
