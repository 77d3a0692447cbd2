"""Language model: how far each structure is ahead of standard attention, pair by pair, in Markdown.

    python plots/lm_pairs.py results/language_modeling/*_lr0.003_seed[12] --only max_iters=10000 --only block_size=1024
    python plots/lm_pairs.py results/language_modeling --only "validation=whole text" --best

A pair is two runs that differ in the structure alone: one width, learning rate, seed and length, evaluated on the same
text. --best: of every structure and width the runs at its best rate, which may be another than its pair's. The lead is
standard attention's last loss less the other's. Its interval and p are those of Student's t for the mean of the pairs;
how it changes with the width is a linear regression on ln d_model. All intervals are of 95%.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import statsmodels.formula.api as smf
from scipy.stats import ttest_1samp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plots.lm_laws import BASELINE, best_runs
from plots.records import LM_LOSS, RANDOM, STRUCTURES, markdown, read_runs, run_arguments, within
from training.errors import BadInput, command

SAME = (
    "dataset", "validation", "val_tokens", "d_model", "n_layer", "block_size", "max_iters", "warmup_iters", "init_lr",
    "seed",
)  # fmt: skip
FEWEST = 3  # pairs for an interval


def key(run, best=False):
    """What the two runs of a pair have in common; best: but for their learning rates."""
    s = run.settings | (dict(init_lr="best") if best else {})
    sequences = s["batch_size"] * s["gradient_accumulation_steps"]
    windows = s["batch_size"] * s["eval_iters"] if s["validation"] == RANDOM else None
    return *(s[name] for name in SAME), sequences, windows


def pairs(runs, best=False):
    """{structure: table (width, seed, lead) of its pairs with standard attention}, in the order of STRUCTURES.

    best: the runs are those of the best rate of each structure. Raises BadInput for two runs of one structure that
    could both be in a pair.
    """
    found = {structure: {} for structure in STRUCTURES}
    for run in runs:
        mine = found[run.structure]
        if (same := key(run, best)) in mine:
            raise BadInput(f"{mine[same].folder} and {run.folder} have the same settings; give one, or use --only")
        mine[same] = run
    standard, tables = found.pop(BASELINE), {}
    for structure, mine in found.items():
        rows = [
            (run.settings["d_model"], run.settings["seed"], standard[same].final(LM_LOSS) - run.final(LM_LOSS))
            for same, run in mine.items()
            if same in standard
        ]
        if rows:
            tables[structure] = pd.DataFrame(rows, columns=["width", "seed", "lead"]).sort_values(["seed", "width"])
    if not tables:
        raise BadInput("no run differs from one of standard attention in its structure alone")
    return tables


def mean_lead(table):
    """(mean, its standard error, lowest, highest, p); the last four None with too few pairs."""
    leads = table.lead
    if len(leads) < FEWEST:
        return leads.mean(), None, None, None, None
    test = ttest_1samp(leads, 0)
    return leads.mean(), leads.sem(), *test.confidence_interval(), test.pvalue


def trend(table):
    """(slope of the lead on ln d_model, lowest, highest), or None with too few pairs or widths."""
    if len(table) < FEWEST or table.width.nunique() < 2:
        return None
    line = smf.ols("lead ~ log_width", table.assign(log_width=np.log(table.width))).fit()
    return line.params["log_width"], *line.conf_int().loc["log_width"]


def rows(tables):
    """A row for every structure."""
    names = ["lower loss in", "mean lead (nats)", "p", "lead per unit of ln d_model"]
    found = [["compared with standard attention", *names]]
    for structure, table in tables.items():
        mean, _, low, high, p = mean_lead(table)
        lead = f"{mean:+.4f}" + (f" {within(low, high, '+.4f')}" if low is not None else "")
        slope = trend(table)
        found.append([
            STRUCTURES[structure][0], f"{(table.lead > 0).sum()} of {len(table)} pairs", lead,
            "" if p is None else f"{p:.2g}", f"{slope[0]:+.3f} {within(*slope[1:], '+.3f')}" if slope else "",
        ])  # fmt: skip
    return found


@command
def main(argv=None):
    parser = run_arguments(__doc__, "train.py", unfinished=True, at_step=True)
    parser.add_argument("--best", action="store_true", help="compare each structure at its best learning rate")
    args = parser.parse_args(argv)
    runs = read_runs(args.runs, "train.py", args.only, args.unfinished, args.at_step)
    print(markdown(*rows(pairs(best_runs(runs) if args.best else runs, args.best))))


if __name__ == "__main__":
    main()
