"""The grid of in-context regression, over dimensions, widths, structures and learning rates: printed, or run.

    python scripts/icl_regression/sweep.py > runs.txt; bash runs.txt     # one after the other
    python scripts/icl_regression/sweep.py --run=True --jobs=4           # here, four at a time on one device
    scripts/icl_regression/submit_icl_regression.sh                      # as one SLURM array

Part of it: `--only=n16_`. More seeds: `--seed=2`, or `--seeds="1|2|3"`. Shorter: `--extra=--max_iters=50000`. A command
given again goes on where its run stopped, and does nothing if that is finished; `--todo=True` leaves finished runs out.

Eight heads of standard attention are each as wide as x at d_model = 8 n_dims; below that they are the bottleneck. The
widths here are half of that, that, and twice that, up to 1024. Widths and rates are our choice, not the paper's list.
"""

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.grid import GridSettings, show
from training.configurator import configure, setting
from training.errors import command

CONFIG = "config/icl_configs"
N_HEAD = 8
WIDTHS = {16: (64, 128, 256), 32: (128, 256, 512), 64: (256, 512, 1024), 128: (512, 1024)}  # n_dims: d_model
RATES = (1e-3, 3e-3)
STRUCTURES = {  # name: (config files on top of the paper's, number of heads)
    "standard": ([], N_HEAD),
    "standard_1head": ([], 1),
    "bilinear_mlr": ([f"{CONFIG}/bilinear_mlr.py"], N_HEAD),
    "bilinear_btt": ([f"{CONFIG}/bilinear_btt.py"], N_HEAD),
}


def mlr_ranks(d_head):
    """8|4|2|2, the default, scaled to the head width: the form has rank 2.5 d_head, above n_dims at every width."""
    return "|".join(str(d_head // share) for share in (2, 4, 8, 8))


@dataclass
class Settings(GridSettings):
    """Print or run the commands of the in-context regression grid."""

    out_dir: str = setting("out/icl_regression", "folder of the runs' folders")


@command
def main(argv=None):
    cfg, runs = configure(Settings, argv), []
    sizes = [(n_dims, d_model) for n_dims, widths in WIDTHS.items() for d_model in widths]
    grid = itertools.product(cfg.all_seeds(), sizes, STRUCTURES.items(), RATES)
    for seed, (n_dims, d_model), (name, (configs, n_head)), lr in grid:
        flags = [f"--n_dims={n_dims}", f"--d_model={d_model}", f"--n_head={n_head}"]
        flags += [f"--mlr_rank_list={mlr_ranks(d_model // n_head)}"] if name == "bilinear_mlr" else []
        flags += [f"--training_learning_rate={lr}", f"--seed={seed}"]
        run = f"{name}_n{n_dims}_d{d_model}_lr{lr:g}_seed{seed}"
        runs.append((run, [f"{CONFIG}/paper.py", *configs, *flags]))
    show(cfg, "train_ICL.py", runs)


if __name__ == "__main__":
    main()
