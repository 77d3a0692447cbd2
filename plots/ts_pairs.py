"""Time series: how the error of a scoring function differs from standard attention's, seed by seed, in Markdown.

    python plots/ts_pairs.py results/time_series results/chronos

A pair is two runs that differ in the scoring function alone. Differences are the function's test error less standard
attention's, so that negative ones are better; the mean of the pairs, the 95% interval and p of Student's t. A run is
read at its evaluation of lowest validation error, the paper's encoder also where its 200 and 1,000 iterations end.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plots.names import STANDARD, STRUCTURES
from plots.records import arguments, grouped
from plots.tables import show, student, within
from plots.ts_kinds import ITERATIONS, kinds_of, read_both
from training.errors import command

CHRONOS_ERRORS = {"test/mse": "MSE of the median", "test/mae": "MAE", "test/wql": "weighted quantile loss"}


def with_standard(kinds):
    """[(standard attention's Kind, another Kind of its layout)], every one that has its like in standard attention."""
    standard = [kind for kind in kinds if kind.structure == STANDARD]
    others = [kind for kind in kinds if kind.structure != STANDARD]
    return [(kind, other) for kind in standard for other in others if kind.layout == other.layout]


def lowest_validation(run):
    return run.final("best/test_mse")


def after(iterations):
    return lambda run: run.series("test/mse").get(iterations, (None, None))[1]


def differences(runs, standards, read):
    """The difference for every seed that both have, ascending; read(run): the error, None where it is not known."""
    mine, theirs = (
        {run.settings["seed"]: error for run in each if (error := read(run)) is not None} for each in (runs, standards)
    )
    return [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]


def words(values):
    """The mean difference, with its interval and p where there are enough."""
    if not values:
        return ""
    mean, low, high, p = student(values)
    return f"{mean:+.3f} ({len(values)} pairs)" if p is None else f"{mean:+.3f} {within(low, high, '+.3f')}, p {p:.2g}"


def paired(kinds, read=lowest_validation):
    """{(label, horizon): differences, one a seed} of every function beside standard attention."""
    return {
        (other.label, horizon): values
        for base, other in with_standard(kinds)
        for horizon, runs in other.runs.items()
        if (values := differences(runs, base.runs.get(horizon, []), read))
    }


def rows(kinds):
    """A row for every function beside standard attention and place where its runs are read; a column a horizon."""
    pairs = with_standard(kinds)
    horizons = sorted({horizon for _, other in pairs for horizon in other.runs})
    table = [["test MSE less that of standard attention", "read at", *horizons]]
    for base, other in pairs:
        places = {"lowest validation error": lowest_validation}
        if other.settings["forecaster"] == "encoder":
            places |= {f"{n:,} iterations": after(n) for n in ITERATIONS}
        for place, read in places.items():
            found = paired([base, other], read)
            table.append([other.label, place, *(words(found.get((other.label, h))) for h in horizons)])
    return table


def chronos_pairs(runs):
    """{structure: {metric: differences from T5's attention, one a seed}} of Chronos runs."""
    groups = grouped(runs, lambda run: run.structure)
    base = groups.pop(STANDARD, [])
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
    return run.evaluated["val/wql"][min(run.series("val/wql").items(), key=lambda item: item[1][1])[0]]


@command
def main(argv=None):
    others, of_chronos = read_both(arguments(__doc__, "train_TS.py", out=False).parse_args(argv))
    tables = [rows(kinds_of(others))] if others else []
    show(*tables, *([chronos_rows(of_chronos)] if of_chronos else []))


if __name__ == "__main__":
    main()
