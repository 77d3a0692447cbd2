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

from plots.records import STRUCTURES, check_finished, find_runs, markdown, run_arguments, within
from plots.ts_kinds import is_rule, kinds_of
from scripts.time_series.sweep import ITERATIONS
from training.errors import command

CHRONOS = "train_chronos.py"
STANDARD = "low_rank"
FEWEST = 3  # pairs for an interval
CHRONOS_ERRORS = {"test/mse": "MSE of the median", "test/mae": "MAE", "test/wql": "weighted quantile loss"}


def with_standard(kinds):
    """[(standard attention's Kind, another Kind of its layout)], every one that has its like in standard attention."""
    found = []
    for kind in kinds:
        for other in kinds:
            if standard(kind.settings) and not standard(other.settings) and layout(kind) == layout(other):
                found.append((kind, other))
    return found


def standard(settings):
    return settings["token_mixing_struct"] == STANDARD


def layout(kind):
    """What kinds that differ in their scoring function share; DLinear and the rules have none."""
    settings = kind.settings
    has_none = is_rule(settings) or settings["forecaster"] == "dlinear"
    return id(kind) if has_none else (settings["forecaster"], settings["look_back"])


def by_seed(runs, read):
    return {run.settings["seed"]: read(run) for run in runs}


def lowest_validation(run, metric="best/test_mse"):
    return run.final(metric)


def after(run, iterations):
    return run.evaluated["test/mse"][iterations]["test/mse"]


def differences(runs, standards, read):
    """{seed: difference} on the seeds that both have; read(run): the error."""
    mine, theirs = by_seed(runs, read), by_seed(standards, read)
    return {seed: mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())}


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
            values = differences(other.runs[horizon], base.runs[horizon], read)
            if values:
                found[other.label, horizon] = list(values.values())
    return found


def rows(kinds):
    """A row for every function beside standard attention and place where its runs are read; a column a horizon."""
    pairs = with_standard(kinds)
    horizons = sorted({horizon for _, other in pairs for horizon in other.runs})
    table = [["test MSE less that of standard attention", "read at", *(str(horizon) for horizon in horizons)]]
    for base, other in pairs:
        places = {"lowest validation error": lowest_validation}
        if other.settings["forecaster"] == "encoder":
            places |= {f"{n:,} iterations": lambda run, n=n: after(run, n) for n in ITERATIONS}
        for place, read in places.items():
            found = paired([base, other], read)
            cells = [words(found[other.label, h]) if (other.label, h) in found else "" for h in horizons]
            table.append([other.label, place, *cells])
    return table


def chronos_pairs(runs):
    """{structure: {metric: differences from T5's attention, one a seed}} of Chronos runs."""
    groups = {}
    for run in runs:
        groups.setdefault(run.structure, []).append(run)
    base = groups.pop(STANDARD)
    return {
        structure: {m: list(differences(mine, base, lambda r, m=m: best_line(r)[m]).values()) for m in CHRONOS_ERRORS}
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
    args = run_arguments(__doc__, "train_TS.py").parse_args(argv)
    runs = find_runs(args.runs, "train_TS.py")
    of_chronos = [run for run in runs if run.record["command"] == CHRONOS]
    others = [run for run in runs if run not in of_chronos]
    check_finished(of_chronos, CHRONOS)
    check_finished(others, "train_TS.py")
    tables = [rows(kinds_of(others))] if others else []
    tables += [chronos_rows(of_chronos)] if of_chronos else []
    print("\n\n".join(markdown(*table) for table in tables))


if __name__ == "__main__":
    main()
