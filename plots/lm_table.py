"""Language model: a table of what each structure reached, in Markdown, from records.

python plots/lm_table.py results/language_modeling                 at its best learning rate
python plots/lm_table.py results/language_modeling --all-rates     at every rate
python plots/lm_table.py results/language_modeling --by-width      every seed's last loss, a column a width
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plots.names import LM_ALIKE, LM_LOSS, LM_RATE, MLR, STRUCTURES
from plots.records import arguments, by_kind, check_same, comparable, frame, group, runs_of, tuned
from plots.tables import hours_words, show, wrapped
from training.errors import command
from training.records import FEWEST_PACES

COLUMNS = {"d_model", "block_size", "val_tokens", "max_iters", "mlr_rank_list"}  # what is not named besides


def rows(curves):
    """A row for every curve; the pace is left empty where a run has too few progress lines for one."""
    names = ["attention", "ranks", "D", "T", "steps", "lr (tried)", "seeds", "validation loss", "tokens/s"]
    found = [[*names, "FLOPs without embeddings"]]
    for curve in curves:
        flops, losses = zip(*(run.end(LM_LOSS, "non_emb_compute") for run in curve.runs), strict=True)
        steps = min(max(run.series(LM_LOSS, "non_emb_compute")) for run in curve.runs)
        timed = all(len(run.paces) >= FEWEST_PACES for run in curve.runs)
        found.append([
            curve.label, ranks(curve), curve.d_model, curve.settings["block_size"], f"{steps:,}",
            f"{curve.settings[LM_RATE]:g}" + (f" ({' '.join(f'{r:g}' for r in curve.tried)})" if curve.tried else ""),
            " ".join(map(str, curve.seeds)), each(losses),
            f"{statistics.fmean(run.pace for run in curve.runs):,.0f}" if timed else "",
            f"{statistics.fmean(flops):.3g}",
        ])  # fmt: skip
    return found


def by_width(runs):
    """A row for every structure, a column for every width: the last loss of each seed; below them the time of a run."""
    check_same(runs, (*LM_ALIKE, LM_RATE))
    found = frame(runs, LM_LOSS)
    widths, seeds = (sorted(set(found[name])) for name in ("d_model", "seed"))
    head = f"last loss, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    table = [[head, *(f"d_model {width}" for width in widths)]]
    for structure, mine in found.groupby("structure", observed=True):
        losses = mine.set_index(["d_model", "seed"]).value.map("{:.3f}".format).to_dict()
        texts = [", ".join(losses.get((width, seed), "-") for seed in seeds) for width in widths]
        table.append([STRUCTURES[structure][0], *texts])
    timed, card = comparable(runs, "gpu_seconds")
    times = frame(timed, LM_LOSS, "gpu_seconds").groupby("d_model").x
    spans = times.agg(lambda t: f"{t.min():.0f} to {t.max():.0f}").reindex(widths, fill_value="")
    return [*table, [f"seconds a run, {card}", *spans]]


def order(curve):
    """By the columns: width, T, steps, ranks (few first), rate."""
    settings, text = curve.settings, ranks(curve)
    return *(settings[name] for name in ("d_model", "block_size", "max_iters")), len(text), text, settings[LM_RATE]


def ranks(curve):
    return curve.settings["mlr_rank_list"] if curve.structure == MLR else ""


def each(values):
    """The mean, and in brackets all of several."""
    mean = f"{statistics.fmean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ({' '.join(f'{value:.4f}' for value in values)})"


def one_rate_words(curves):
    """Which curves had one learning rate alone; empty if all had several, or if none was to be chosen."""
    few = [curve for curve in curves if curve.tried and len(curve.tried) < 2]
    names = [" ".join(filter(None, (c.label, ranks(c), f"at D {c.d_model}"))) for c in few]
    which = f": {'; '.join(names)}" if len(few) < len(curves) else ""
    return wrapped(f"One learning rate only, so none was chosen{which}.") if few else ""


@command
def main(argv=None):
    parser = arguments(__doc__, "train.py", out=False)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--all-rates", action="store_true", help="every learning rate instead of the best")
    how.add_argument("--by-width", action="store_true", help="the last losses, a row a structure and a column a width")
    args = parser.parse_args(argv)
    runs = runs_of(args, "train.py")
    if args.by_width:
        return show(by_width(runs))
    curves = group(runs, COLUMNS | {LM_RATE}) if args.all_rates else tuned(runs, LM_LOSS, LM_RATE, COLUMNS)
    show(rows([curve for kind in by_kind(curves) for curve in sorted(kind, key=order)]))
    print("\n".join(filter(None, ("\n" + hours_words(runs), one_rate_words(curves)))))


if __name__ == "__main__":
    main()
