"""The grid of in-context regression, over dimensions, widths, structures and learning rates; see scripts/README.md.

    python scripts/icl_regression/sweep.py > runs.txt; bash runs.txt     # one after the other
    python scripts/icl_regression/sweep.py --run=True --jobs=4           # here, four at a time on one device
    scripts/icl_regression/submit_icl_regression.sh                      # as one SLURM array

Eight heads of standard attention are each as wide as x at d_model = 8 n_dims; below that they are the bottleneck.
Rates, the scale of standard attention's scores and MLR's ranks at n_dims 64 are those of the paper's released scripts
and plots (rates 1e-3 to 2.5e-5, mostly 1e-4 and 5e-5, for 500,000 steps); the widths are a part of its 16 to 1024.
"""

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.grid import GridSettings, launch
from training.configurator import configure, parse_list, setting
from training.errors import command

CONFIG = "config/icl_configs"
N_HEAD = 8
WIDTHS = {  # n_dims: d_model
    16: (32, 64, 128, 256), 32: (64, 128, 256, 512), 64: (128, 256, 512), 128: (256, 512, 1024),
}  # fmt: skip
RATES = (1e-4, 5e-5)
STRUCTURES = {  # name: (config files and flags on top of the paper's, number of heads)
    "standard": ([f"{CONFIG}/standard.py"], N_HEAD),
    "standard_1head": ([f"{CONFIG}/standard.py"], 1),
    "bilinear_mlr": ([f"{CONFIG}/bilinear_mlr.py"], N_HEAD),
    "bilinear_btt": ([f"{CONFIG}/bilinear_btt.py"], N_HEAD),
}
PAPER_RANKS = {  # (n_dims, d_model): the lists that the paper tried there
    (64, 256): ("8|4|4|16", "8|8|8|8", "16|8|4|4"),
    (64, 512): ("16|16|12|8|8|4", "20|16|8|8|8|4", "24|12|8|8|8|4"),
}


def mlr_ranks(d_head, n_dims):
    """8|4|2|2, the default, scaled to the head width, or 0|8|4|4 where the form's rank would be below n_dims."""
    ranks = []
    while len(ranks) < 3 and d_head - sum(ranks) > 1:
        ranks.append((d_head - sum(ranks)) // 2)
    ranks.append(d_head - sum(ranks))
    if sum(r * 2**level for level, r in enumerate(ranks)) < n_dims:
        ranks = [0, d_head // 2, d_head // 4, d_head // 4]
    return "|".join(map(str, ranks))


def variants(n_dims, d_model):
    """(name, config files and flags) of every structure at a size; MLR with other ranks is another."""
    for name, (configs, n_head) in STRUCTURES.items():
        heads = [*configs, f"--n_head={n_head}"]
        if name != "bilinear_mlr":
            yield name, heads
            continue
        paper = PAPER_RANKS.get((n_dims, d_model), ())
        for ranks in paper or [mlr_ranks(d_model // n_head, n_dims)]:
            yield name + ("_" + ranks.replace("|", "-") if paper else ""), [*heads, f"--mlr_rank_list={ranks}"]


@dataclass
class Settings(GridSettings):
    """Print or run the commands of the in-context regression grid."""

    out_dir: str = setting("out/icl_regression", "folder of the runs' folders")
    rates: str = setting("|".join(map(str, RATES)), "learning rates of every point")


@command
def main(argv=None):
    cfg, runs = configure(Settings, argv), {}
    sizes = [(n_dims, d_model) for n_dims, widths in WIDTHS.items() for d_model in widths]
    for seed, (n_dims, d_model) in itertools.product(parse_list(cfg.seeds, "seeds"), sizes):
        for (name, flags), lr in itertools.product(variants(n_dims, d_model), parse_list(cfg.rates, "rates", float)):
            own = [f"--n_dims={n_dims}", f"--d_model={d_model}", f"--training_learning_rate={lr}", f"--seed={seed}"]
            run = ["train_ICL.py", f"{CONFIG}/paper.py", *flags, *own]
            runs[f"{name}_n{n_dims}_d{d_model}_lr{lr:g}_seed{seed}"] = run
    launch(cfg, runs)


if __name__ == "__main__":
    main()
