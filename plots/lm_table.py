"""Language model: a table of what each structure reached, in Markdown, from records.

python plots/lm_table.py results/language_modeling                 at its best learning rate
python plots/lm_table.py results/language_modeling --all-rates     at every rate
python plots/lm_table.py results/language_modeling --by-width      every seed's last loss, a column a width
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plots.lm_laws import comparable
from plots.records import (
    FEWEST_PACES,
    LM_LOSS,
    LM_RATE,
    STRUCTURES,
    below_table,
    by_kind,
    check_same,
    group,
    markdown,
    read_runs,
    run_arguments,
    tuned,
)
from training.errors import command

COLUMNS = {"d_model", "block_size", "val_tokens", "max_iters", "mlr_rank_list"}  # what is not named besides
MLR = "multi_level_low_rank"


def rows(curves):
    """A row for every curve; the pace is left empty where a run has too few progress lines for one."""
    names = ["attention", "ranks", "D", "T", "steps", "lr (tried)", "seeds", "validation loss", "tokens/s"]
    found = [[*names, "FLOPs without embeddings"]]
    for curve in curves:
        settings, last = curve.settings, [max(run.series(LM_LOSS, "non_emb_compute").items()) for run in curve.runs]
        flops, losses = zip(*(pair for _, pair in last), strict=True)
        found.append((
            curve.label, ranks(curve), curve.d_model, settings["block_size"], f"{min(step for step, _ in last):,}",
            rate_words(curve), " ".join(map(str, curve.seeds)), each(losses), pace_words(curve),
            f"{statistics.fmean(flops):.3g}",
        ))  # fmt: skip
    return found


def by_width(runs):
    """A row for every structure, a column for every width: the last loss of each seed; below them the time of a run."""
    check_same(runs, ("dataset", "validation", "val_tokens", "block_size", "max_iters", LM_RATE))
    widths, seeds = (sorted({run.settings[name] for run in runs}) for name in ("d_model", "seed"))
    losses = {(run.structure, run.settings["d_model"], run.settings["seed"]): run.final(LM_LOSS) for run in runs}
    head = f"last loss, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    table = [[head, *(f"d_model {width}" for width in widths)]]
    for structure in (s for s in STRUCTURES if s in {run.structure for run in runs}):
        cells = []
        for width in widths:
            found = [losses.get((structure, width, seed)) for seed in seeds]
            cells.append(", ".join("-" if loss is None else f"{loss:.3f}" for loss in found))
        table.append([STRUCTURES[structure][0], *cells])
    timed, card = comparable(runs, "gpu_seconds")
    times = [[run.final("tokens") / run.pace for run in timed if run.settings["d_model"] == width] for width in widths]
    return [*table, [f"seconds a run, {card}", *(f"{min(t):.0f} to {max(t):.0f}" if t else "" for t in times)]]


def order(curve):
    """By the columns: width, T, steps, ranks (few first), rate."""
    settings, text = curve.settings, ranks(curve)
    return *(settings[name] for name in ("d_model", "block_size", "max_iters")), len(text), text, settings[LM_RATE]


def ranks(curve):
    return curve.settings["mlr_rank_list"] if curve.structure == MLR else ""


def rate_words(curve):
    """The rate, behind it those it was chosen from if it was."""
    rate = f"{curve.settings[LM_RATE]:g}"
    return f"{rate} ({' '.join(f'{r:g}' for r in curve.tried)})" if curve.tried else rate


def each(values):
    """The mean, and in brackets all of several."""
    mean = f"{statistics.fmean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ({' '.join(f'{value:.4f}' for value in values)})"


def pace_words(curve):
    """The mean over seeds of the median pace."""
    if min(len(run.paces) for run in curve.runs) < FEWEST_PACES:
        return ""
    return f"{statistics.fmean(run.pace for run in curve.runs):,.0f}"


def in_words(curve):
    return " ".join(filter(None, (curve.label, ranks(curve), f"at D {curve.d_model}")))


@command
def main(argv=None):
    parser = run_arguments(__doc__, "train.py", unfinished=True, at_step=True)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--all-rates", action="store_true", help="every learning rate instead of the best")
    how.add_argument("--by-width", action="store_true", help="the last losses, a row a structure and a column a width")
    args = parser.parse_args(argv)
    runs = read_runs(args.runs, "train.py", args.only, args.unfinished, args.at_step)
    if args.by_width:
        print(markdown(*by_width(runs)))
        return
    curves = group(runs, COLUMNS | {LM_RATE}) if args.all_rates else tuned(runs, LM_LOSS, LM_RATE, COLUMNS)
    print(markdown(*rows([curve for kind in by_kind(curves) for curve in sorted(kind, key=order)])))
    print("\n" + below_table(runs, curves, in_words, args.at_step))


if __name__ == "__main__":
    main()
