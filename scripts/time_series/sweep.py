"""The grids of time-series forecasting; see scripts/README.md.

    --grids=paper     the paper's: structures, horizons, learning rates and SGD iterations, an encoder of 96 hours
    --grids=patch     PatchTST's layout with three scoring functions, by horizon
    --grids=chronos   a small Chronos with its own self-attention and with MLR attention

    python scripts/time_series/sweep.py > runs.txt; bash runs.txt     # one after the other
    python scripts/time_series/sweep.py --run=True --jobs=4           # here, four at a time on one device
    python scripts/time_series/sweep.py --best=True                   # what validation chooses, of the finished runs

The paper's rate is constant, so that runs of 1,000 iterations (`--only=_it1000_`) hold those of 200, bit for bit.
"""

import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.grid import GridSettings, finished, folder, launch, pick
from training.configurator import configure, setting
from training.errors import command
from training.records import read_metrics

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


GRIDS = {
    "paper": {
        f"{name}_h{horizon}_lr{lr:g}_it{n}": [
            "train_TS.py", f"{CONFIG}/etth1.py", *own, f"--horizon={horizon}", f"--init_lr={lr}", f"--max_iters={n}"
        ]
        for lr, (name, own), horizon, n in product(RATES, STRUCTURES.items(), HORIZONS, ITERATIONS)
    },
    "patch": {
        f"patch_{name}_h{horizon}": ["train_TS.py", f"{CONFIG}/patch.py", *own, f"--horizon={horizon}"]
        for horizon, (name, own) in product(HORIZONS, PATCH_STRUCTURES.items())
    },
    "chronos": {
        f"chronos_{name}": ["train_chronos.py", f"{CONFIG}/chronos.py", *own] for name, own in STRUCTURES.items()
    },
}  # fmt: skip


@dataclass
class Settings(GridSettings):
    """Print or run the commands of the time-series grids, or print their best runs."""

    out_dir: str = setting("out/time_series", "folder of the runs' folders")
    grids: str = setting("paper", "which, with | between them: paper, patch, chronos; --grid=patch does as well")
    dataset: str = setting("ETTh1", "the series, in data/ett; one other than ETTh1 begins the names of its runs")
    best: bool = setting(False, "print the finished run of lowest validation error of every structure and horizon")

    ALIASES: ClassVar[dict] = GridSettings.ALIASES | dict(grid="grids")


def error(line):
    """What validation compares: Chronos' quantile loss, or the MSE."""
    return line.get("val/wql", line["val/mse"])


def print_best(runs):
    """The finished run of lowest validation error of every structure and horizon; runs: {name: command}.

    A run counts with its evaluation of lowest validation error; the test errors have no say.
    """
    done = {}
    for name, run in runs.items():
        if finished(run):
            line = min((line for line in read_metrics(folder(run)) if "val/mse" in line), key=error)
            kind = name.partition("_seed")[0].partition("_lr")[0].replace("_", " ")
            done.setdefault(kind, []).append((error(line), name, line))
    for kind, outcomes in done.items():
        _, name, line = min(outcomes)
        errors = ", ".join(f"{key} {line[key]:.4f}" for key in ("val/mse", "test/mse", "test/mae"))
        print(f"{kind}: {errors} ({name}, step {line['step']})")
    print(f"{sum(map(len, done.values()))} of {len(runs)} runs finished")


@command
def main(argv=None):
    cfg = configure(Settings, argv)
    runs = pick(GRIDS, cfg.grids)
    if cfg.dataset != "ETTh1":
        runs = {f"{cfg.dataset}_{name}": [*run, f"--dataset={cfg.dataset}"] for name, run in runs.items()}
    named = cfg.commands(runs)
    if cfg.run or cfg.ray or not cfg.best:
        launch(cfg, named)
    if cfg.best or cfg.ray:
        print_best(named)


if __name__ == "__main__":
    main()
