"""In-context regression: tables of what runs reached and when, in Markdown, from records.

    python plots/icl_table.py results/icl_regression --steps="25000|50000|100000"    the error at given steps
    python plots/icl_table.py results/icl_regression --errors="0.1|0.02"             when an error is reached
    python plots/icl_table.py results/icl_regression --ledger                        every run: commit, device, time

The error is that at the last position of a prompt. By steps: the median and in brackets every seed's, at each learning
rate. By errors: the steps and the training FLOPs of the first evaluation at the error or below it, the median over the
seeds at the best rate. A run that has not got there says only that it takes longer than its last evaluation, and how
many those are stands beside the median, which is that of Kaplan and Meier. A median that is not known is "not by" the
last evaluation of any run.
"""

import statistics
import sys
from pathlib import Path

import numpy as np
from statsmodels.duration.survfunc import SurvfuncRight

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plots.icl_examples import BASELINES, ERROR, baselines
from plots.names import ICL_RATE, ICL_SIZES
from plots.records import arguments, by_setting, group, grouped, runs_of
from plots.tables import hours_words, show
from training.configurator import parse_list
from training.errors import command


def kinds(runs):
    """The Curves of one structure, size and learning rate, in the order of the tables."""
    curves = group(runs, ICL_SIZES | {ICL_RATE})
    return sorted(curves, key=lambda curve: (curve.settings["n_dims"], curve.d_model))


def about(curve):
    """The first cells of a curve's row: n_dims, width, attention, rate, runs."""
    return [curve.settings["n_dims"], curve.d_model, curve.label, f"{curve.settings[ICL_RATE]:g}", len(curve.runs)]


def by_steps(runs, steps):
    """Rows of every kind and rate: the errors of the seeds at each of the steps, the median and the range."""
    rows = [["n_dims", "D", "attention", "rate", "seeds", *(f"{step:,} steps" for step in steps)]]
    for curve in kinds(runs):
        found = [run.series(ERROR) for run in curve.runs]
        rows.append(about(curve) + [with_seeds([s[step][1] for s in found if step in s]) for step in steps])
    return rows


def by_errors(runs, errors):
    """Rows of every kind at its best rate: the median steps and FLOPs to each error."""
    header = ["n_dims", "D", "attention", "rate", "runs"]
    rows = [header + [f"{what} to {error:g}" for error in errors for what in ("steps", "FLOPs")]]
    for same in of_one_kind(kinds(runs)):
        curve = min(same, key=lambda c: rank(c.runs, errors))
        cells = [time_words(curve.runs, error, x) for error in errors for x in ("step", "non_emb_compute")]
        rows.append(about(curve) + cells)
    return rows


def of_one_kind(curves):
    """Lists of the curves that differ in their learning rate alone."""
    return list(grouped(curves, lambda curve: (curve.settings["n_dims"], curve.d_model, curve.label)).values())


def rank(runs, errors):
    """What the best of several rates has the least of: median steps to the lowest error, to the next, last error."""
    medians = [np.nan_to_num(time_to(runs, error)[0], nan=np.inf) for error in sorted(errors)]
    return *medians, statistics.fmean(run.final(ERROR) for run in runs)


def time_to(runs, error, x="step"):
    """(the median x of the first evaluation at an error or below it, the last x of any run, how many got not there).

    The median is that of Kaplan and Meier, NaN where fewer than half are known to have got there.
    """
    ends = []
    for run in runs:
        path = [pair for _, pair in sorted(run.series(ERROR, x).items())]
        ends.append(next(((spent, True) for spent, value in path if value <= error), (path[-1][0], False)))
    times, reached = map(np.array, zip(*ends, strict=True))
    return SurvfuncRight(times, reached).quantile(0.5), times.max(), (~reached).sum()


def time_words(runs, error, x):
    """The median, and how many runs have not got there."""
    (middle, last, late), form = time_to(runs, error, x), ",.0f" if x == "step" else ".2g"
    words = f"not by {last:{form}}" if np.isnan(middle) else f"{middle:{form}}"
    return words + (f" ({late} of {len(runs)} not)" if late else "")


def ledger(runs):
    """Rows of all runs: where the numbers come from and what they cost."""
    rows = [("run", "commit", "device", "torch", "steps", "minutes", "rate", "seed", "error at the last position")]
    for run in runs:
        record, settings = run.record, run.settings
        rows.append((
            f"`{run.folder.name}`", (record.get("commit") or "")[:7], record.get("device", ""),
            record.get("versions", {}).get("torch", ""), f"{max(run.series(ERROR)):,}", f"{run.seconds / 60:,.1f}",
            f"{settings[ICL_RATE]:g}", settings["seed"], f"{run.final(ERROR):.3g}",
        ))  # fmt: skip
    return rows


def with_seeds(values):
    """The median, and in brackets all of several."""
    if not values:
        return ""
    middle = f"{statistics.median(values):.3g}"
    return middle if len(values) == 1 else f"{middle} ({', '.join(f'{value:.2g}' for value in values)})"


def baseline_words(runs):
    """What simple methods cost at the last position, for every n_dims."""
    told = []
    for n_dims, curves in by_setting(kinds(runs), "n_dims").items():
        found = baselines(curves[0].runs)
        costs = [f"{BASELINES.get(name, name.replace('_', ' '))} {errors[-1]:.2g}" for name, errors in found.items()]
        told += [f"Simple methods have errors of, at n_dims {n_dims}: {', '.join(costs)}."] if costs else []
    return " ".join(told)


@command
def main(argv=None):
    parser = arguments(__doc__, "train_ICL.py", out=False)
    parser.add_argument("--steps", metavar="A|B", help="the error at these steps")
    parser.add_argument("--errors", metavar="A|B", help="when these errors are reached")
    parser.add_argument("--ledger", action="store_true", help="every run")
    args = parser.parse_args(argv)
    runs = runs_of(args, "train_ICL.py")
    if not (args.steps or args.errors or args.ledger):
        parser.error("give --steps, --errors or --ledger")
    tables = [by_steps(runs, parse_list(args.steps, "steps"))] if args.steps else []
    tables += [by_errors(runs, parse_list(args.errors, "errors", float))] if args.errors else []
    tables += [ledger(runs)] if args.ledger else []
    show(*tables, words=f"{hours_words(runs)} {baseline_words(runs)}")


if __name__ == "__main__":
    main()
