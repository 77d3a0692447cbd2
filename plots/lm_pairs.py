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
import statsmodels.formula.api as smf

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plots.lm_laws import best_runs
from plots.names import LM_ALIKE, LM_LOSS, LM_RATE, STANDARD, STRUCTURES
from plots.records import arguments, frame, runs_of
from plots.tables import show, student, within
from training.errors import BadInput, command
from training.records import RANDOM

SAME = [*LM_ALIKE, "d_model", "n_layer", "warmup_iters", "seed", "sequences", "windows", LM_RATE]


def pairs(runs, best=False):
    """{structure: table (d_model, seed, lead) of its pairs with standard attention}, in the order of STRUCTURES.

    best: the runs are those of the best rate of each structure. Raises BadInput for two runs of one structure that
    could both be in a pair.
    """
    table, same = frame(runs, LM_LOSS), SAME[:-1] if best else SAME
    table["sequences"] = table.batch_size * table.gradient_accumulation_steps  # a step
    table["windows"] = (table.batch_size * table.eval_iters).where(table.validation == RANDOM)  # an evaluation
    twice = table[table.duplicated(["structure", *same], keep=False)]
    if len(twice):
        a, b, *_ = next(iter(twice.groupby(["structure", *same], dropna=False, observed=True).run))[1]
        raise BadInput(f"{a.folder} and {b.folder} have the same settings; give one, or use --only")
    is_standard = table.structure == STANDARD
    found = table[~is_standard].merge(table.loc[is_standard, [*same, "value"]], on=same, suffixes=("", "_standard"))
    if found.empty:
        raise BadInput("no run differs from one of standard attention in its structure alone")
    found["lead"] = found.value_standard - found.value
    found = found.sort_values(["seed", "d_model"])[["structure", "d_model", "seed", "lead"]]
    return dict(iter(found.groupby("structure", observed=True)))


def trend(table):
    """(slope of the lead on ln d_model, lowest, highest), or None with too few pairs or widths."""
    if len(table) < 3 or table.d_model.nunique() < 2:
        return None
    line = smf.ols("lead ~ log_width", table.assign(log_width=np.log(table.d_model))).fit()
    return line.params["log_width"], *line.conf_int().loc["log_width"]


def rows(tables):
    """A row for every structure."""
    names = ["lower loss in", "mean lead (nats)", "p", "lead per unit of ln d_model"]
    found = [["compared with standard attention", *names]]
    for structure, table in tables.items():
        mean, low, high, p = student(table.lead)
        lead = f"{mean:+.4f}" + (f" {within(low, high, '+.4f')}" if p is not None else "")
        slope = trend(table)
        found.append([
            STRUCTURES[structure][0], f"{(table.lead > 0).sum()} of {len(table)} pairs", lead,
            "" if p is None else f"{p:.2g}", f"{slope[0]:+.3f} {within(*slope[1:], '+.3f')}" if slope else "",
        ])  # fmt: skip
    return found


@command
def main(argv=None):
    parser = arguments(__doc__, "train.py", out=False)
    parser.add_argument("--best", action="store_true", help="compare each structure at its best learning rate")
    args = parser.parse_args(argv)
    runs = runs_of(args, "train.py")
    show(rows(pairs(best_runs(runs) if args.best else runs, args.best)))


if __name__ == "__main__":
    main()
