"""Language model: the last loss at every learning rate, and the lead at each structure's best, in Markdown.

    python plots/lm_rates.py results/language_modeling --only seed=1 --only max_iters=10000 --only block_size=1024

A cell has all runs of that rate, those made again too: how far they are apart is what one run is worth. The best rate
is that of the lowest mean.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plots.names import LM_ALIKE, LM_LOSS, LM_RATE, MLR, STANDARD, STRUCTURES
from plots.records import arguments, check_same, frame, runs_of
from plots.tables import show
from training.errors import command


def losses(runs):
    """The last losses, grouped by width, structure and rate."""
    check_same(runs, (*LM_ALIKE, "seed"))
    return frame(runs, LM_LOSS).groupby(["d_model", "structure", LM_RATE], observed=True).value


def rows(found):
    """A row for every width and structure with several rates; the best rate in bold."""
    cells = found.agg(lambda values: ", ".join(f"{loss:.4f}" for loss in sorted(values)))
    best = found.mean().groupby(level=[0, 1], observed=True).idxmin()
    cells[best] = "**" + cells[best] + "**"
    wide = cells.unstack(LM_RATE)
    header = ["d_model", "attention", *(f"{rate:g}" for rate in wide)]
    wide = wide[wide.notna().sum(axis=1) > 1].fillna("")
    return [header, *([width, STRUCTURES[name][0], *texts] for (width, name), texts in wide.T.to_dict("list").items())]


def lead_words(found):
    """MLR's lead with each structure at the best of several rates, by width."""
    means = found.mean().unstack(LM_RATE)
    best = means.min(axis=1)[means.notna().sum(axis=1) > 1].unstack("structure").reindex(columns=[STANDARD, MLR])
    leads = [f"{lead:.3f} nats at d_model {width}" for width, lead in (best[STANDARD] - best[MLR]).dropna().items()]
    words = "With each structure at its best rate (one seed) MLR attention leads standard attention by"
    return f"{words} {' and '.join(leads)}." if leads else ""


def repeat_words(found):
    """How far the same command's runs are apart."""
    apart = (found.max() - found.min())[found.size() > 1]
    return f"Runs of one command are up to {apart.max():.3f} nats apart." if len(apart) else ""


@command
def main(argv=None):
    args = arguments(__doc__, "train.py", out=False).parse_args(argv)
    found = losses(runs_of(args, "train.py"))
    show(rows(found), words=" ".join(filter(None, (lead_words(found), repeat_words(found)))))


if __name__ == "__main__":
    main()
