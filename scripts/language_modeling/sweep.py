"""The language models of the paper's comparison, and two of ours beside them; see scripts/README.md.

    python scripts/language_modeling/sweep.py > runs.txt; bash runs.txt              # one after the other
    python scripts/language_modeling/sweep.py --run=True --jobs=2 --spread=2         # here, one on each of two GPUs
    scripts/language_modeling/submit_language_modeling_greene.sh                     # as one SLURM array

`--grids="scaling|levels|context"`: every structure at four widths (the paper's figure), MLR attention with fewer
levels, and a longer context. Learning rates are the paper's best; or `--rates="3e-3|1e-2"` at every point; or
`--rates=best`, for each structure that of its best finished run at the smallest width in out_dir: in µP a good rate is
good at every width.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.grid import GridSettings, launch, pick
from training.configurator import configure, parse_list, setting
from training.errors import command
from training.records import best_of, find_runs, shared_steps

CONFIG = "config/struct_configs"
RATES = {  # structure: {d_model: the best rate in the paper's runs}
    "standard": {256: 3e-3, 384: 3e-3, 512: 1.65e-3, 768: 1.65e-3},
    "mlr": {256: 3e-3, 384: 1.65e-2, 512: 3e-3, 768: 1.65e-2},
    "sliding_window": {256: 3e-3, 384: 3e-3, 512: 3e-3, 768: 3e-3},
    "gswa": {256: 3e-3, 384: 3e-3, 512: 3e-3, 768: 1.65e-2},
    "sequential_gswa": {256: 3e-3, 384: 3e-3, 512: 3e-3, 768: 3e-3},  # not known: the default
}
RANKS = {2: "32|32", 4: "32|16|8|8"}  # by number of levels; one is standard attention, the paper's MLR has eight
LONG = ["--block_size=4096", "--batch_size=1"]  # as many tokens a step as at T 1024
GRIDS = {  # name: {point: (structure, d_model, more flags)}
    "scaling": {f"{s}_d{width}": (s, width, []) for s, rates in RATES.items() for width in rates},
    "levels": {f"mlr_{n}levels_d256": ("mlr", 256, [f"--mlr_rank_list={ranks}"]) for n, ranks in RANKS.items()},
    "context": {f"{s}_T4096_d256": (s, 256, LONG) for s in ("standard", "mlr")},
}


@dataclass
class Settings(GridSettings):
    """Print or run the commands of the language-modelling grids."""

    out_dir: str = setting("out/language_modeling", "folder of the runs' folders")
    grids: str = setting("scaling", "which, with | between them: scaling, levels, context")
    rates: str = setting("", "learning rates of every point, like 3e-3|1e-2, or best; empty: the paper's best for each")


def rates_of_points(cfg):
    """{structure: {d_model: its learning rates}}; without those that have none yet."""
    if cfg.rates != "best":
        given = parse_list(cfg.rates, "rates", float) if cfg.rates else None
        return {s: {width: given or [lr] for width, lr in rates.items()} for s, rates in RATES.items()}
    runs = find_runs([cfg.out_dir]) if Path(cfg.out_dir).is_dir() else []
    best = {structure: best_rate(runs, structure) for structure in RATES}
    if lacking := [structure for structure, lr in best.items() if lr is None]:
        words = f"{cfg.out_dir} has no finished run of the smallest width of {', '.join(lacking)}"
        print(f"{words}, which are left out", file=sys.stderr)
    return {s: {width: [lr] for width in RATES[s]} for s, lr in best.items() if lr is not None}


def best_rate(runs, structure):
    """The rate of the lowest loss at the smallest width, among the longest finished runs of the main grid, or None."""
    name = re.compile(rf"{structure}_d{min(RATES[structure])}_lr[^_]*_seed\d+")
    done = [run for run in runs if name.fullmatch(run.folder.name) and run.status == "finished"]
    if not done:
        return None
    longest = max(run.settings["max_iters"] for run in done)
    same = [run for run in done if run.settings["max_iters"] == longest]
    last = shared_steps(same, "val/loss")[-1]
    best, _ = best_of(same, ["init_lr"], lambda run: run.series("val/loss")[last][1])
    return best[0].settings["init_lr"]


@command
def main(argv=None):
    cfg, grid = configure(Settings, argv), {}
    points, rates = pick(GRIDS, cfg.grids), rates_of_points(cfg)
    for name, (structure, d_model, flags) in points.items():
        own = [] if structure == "standard" else [f"{CONFIG}/{structure}.py"]
        for lr in rates.get(structure, {}).get(d_model, ()):
            run = ["train.py", f"{CONFIG}/train_struct_gpt2.py", *own, *flags]
            grid[f"{name}_lr{lr:g}"] = [*run, f"--d_model={d_model}", f"--init_lr={lr}"]
    launch(cfg, cfg.commands(grid))


if __name__ == "__main__":
    main()
