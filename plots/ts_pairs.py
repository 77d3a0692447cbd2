"""Time series: how the error of a scoring function differs from standard attention's, seed by seed, in Markdown.

    python plots/ts_pairs.py results/time_series results/chronos

A pair is two runs that differ in the scoring function alone. Differences are the function's test error less standard
attention's, so that negative ones are better; the mean of the pairs, the 95% interval and p of Student's t. A run is
read at its evaluation of lowest validation error, the paper's encoder also where its 200 and 1,000 iterations end.
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scipy.stats import ttest_1samp

from plots.names import STANDARD, STRUCTURES
from plots.records import arguments, grouped
from plots.tables import show, within
from plots.ts_kinds import ITERATIONS, is_rule, kinds_of, read_both
from training.errors import command

FEWEST = 3  # pairs for an interval
CHRONOS_ERRORS = {"test/mse": "MSE of the median", "test/mae": "MAE", "test/wql": "weighted quantile loss"}


def with_standard(kinds):
    """[(standard attention's Kind, another Kind of its layout)], every one that has its like in standard attention."""
    standard, others = (
        [kind for kind in kinds if (kind.settings["token_mixing_struct"] == STANDARD) == is_standard]
        for is_standard in (True, False)
    )
    return [(kind, other) for kind in standard for other in others if layout(kind) == layout(other)]


def layout(kind):
    """What kinds that differ in their scoring function share; DLinear and the rules have none."""
    settings = kind.settings
    has_none = is_rule(settings) or settings["forecaster"] == "dlinear"
    return id(kind) if has_none else (settings["forecaster"], settings["look_back"])


def lowest_validation(run):
    return run.final("best/test_mse")


def after(iterations):
    return lambda run: run.evaluated["test/mse"][iterations]["test/mse"]


def differences(runs, standards, read):
    """The difference for every seed that both have, ascending; read(run): the error."""
    mine, theirs = ({run.settings["seed"]: read(run) for run in each} for each in (runs, standards))
    return [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]


def p_value(values):
    return ttest_1samp(values, 0).pvalue


def words(values):
    """The mean difference, with its interval and p where there are enough."""
    mean = f"{statistics.fmean(values):+.3f}"
    if len(values) < FEWEST:
        return f"{mean} ({len(values)} pairs)"
    return f"{mean} {within(*ttest_1samp(values, 0).confidence_interval(), '+.3f')}, p {p_value(values):.2g}"


def paired(kinds, read):
    """{(label, horizon): differences, one a seed} of every function beside standard attention."""
    found = {}
    for base, other in with_standard(kinds):
        for horizon in sorted(base.runs.keys() & other.runs.keys()):
            if values := differences(other.runs[horizon], base.runs[horizon], read):
                found[other.label, horizon] = values
    return found


def rows(kinds):
    """A row for every function beside standard attention and place where its runs are read; a column a horizon."""
    pairs = with_standard(kinds)
    horizons = sorted({horizon for _, other in pairs for horizon in other.runs})
    table = [["test MSE less that of standard attention", "read at", *(str(horizon) for horizon in horizons)]]
    for base, other in pairs:
        places = {"lowest validation error": lowest_validation}
        if other.settings["forecaster"] == "encoder":
            places |= {f"{n:,} iterations": after(n) for n in ITERATIONS}
        for place, read in places.items():
            found = paired([base, other], read)
            cells = [words(found[other.label, h]) if (other.label, h) in found else "" for h in horizons]
            table.append([other.label, place, *cells])
    return table


def chronos_pairs(runs):
    """{structure: {metric: differences from T5's attention, one a seed}} of Chronos runs."""
    groups = grouped(runs, lambda run: run.structure)
    base = groups.pop(STANDARD)
    return {
        structure: {m: differences(mine, base, lambda run, m=m: best_line(run)[m]) for m in CHRONOS_ERRORS}
        for structure, mine in groups.items()
    }


def chronos_rows(runs):
    """The same of Chronos runs, a column for every error."""
    table = [["Chronos: error less that with T5's attention", *CHRONOS_ERRORS.values()]]
    for structure, found in chronos_pairs(runs).items():
        table.append([STRUCTURES[structure][0], *(words(values) for values in found.values())])
    return table


def best_line(run):
    """The evaluation of lowest validation quantile loss of a Chronos run."""
    return min(run.evaluated["val/wql"].values(), key=lambda line: line["val/wql"])


@command
def main(argv=None):
    others, of_chronos = read_both(arguments(__doc__, "train_TS.py", out=False).parse_args(argv))
    tables = [rows(kinds_of(others))] if others else []
    show(*tables, *([chronos_rows(of_chronos)] if of_chronos else []))


if __name__ == "__main__":
    main()
