"""In-context regression: the tables of the README and of results/icl_regression/README.md, in Markdown, from records.

python plots/icl_table.py results/icl_regression              what each structure reached at its best learning rate
python plots/icl_table.py results/icl_regression --ledger     every run: commit, device, steps, time
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plots.icl_examples import baselines
from plots.records import (
    ICL_RATE,
    ICL_SIZES,
    below_table,
    by_kind,
    by_setting,
    markdown,
    read_runs,
    run_arguments,
    tuned,
)
from training.errors import command

ERROR = "error at the last position"


def results(runs):
    """Rows of the best runs: one for every structure, variant and width, by n_dims."""
    rows = [("attention", "n_dims", "D", "lr (tried)", ERROR, "zero", "steps", "seeds", "minutes a run")]
    for n_dims, mine in by_setting(tuned(runs, unnamed=ICL_SIZES), "n_dims").items():
        for curve in (curve for kind in by_kind(mine) for curve in kind):
            tried, zero = " ".join(f"{rate:g}" for rate in curve.tried), baselines(curve.runs)["zero"][-1]
            errors, minutes = zip(*((run.final("eval/last"), run.seconds / 60) for run in curve.runs), strict=True)
            rows.append((
                curve.label, n_dims, curve.d_model, f"{curve.rate:g} ({tried})", spread(errors),
                f"{zero:.3g}", f"{min(map(steps, curve.runs)):,}", " ".join(map(str, curve.seeds)), spread(minutes),
            ))  # fmt: skip
    return rows


def ledger(runs):
    """Rows of all runs: where the numbers come from and what they cost."""
    rows = [("run", "commit", "device", "torch", "steps", "seconds", "lr", "seed", ERROR)]
    for run in runs:
        record, settings = run.record, run.settings
        rows.append((
            f"`{run.folder.name}`", (record.get("commit") or "")[:7], record.get("device", ""),
            record.get("versions", {}).get("torch", ""), f"{steps(run):,}", f"{run.seconds:,.0f}",
            f"{settings[ICL_RATE]:g}", settings["seed"], f"{run.final('eval/last'):.3g}",
        ))  # fmt: skip
    return rows


def steps(run):
    return max(run.series("eval/last"))


def spread(values):
    """The mean, and in brackets the lowest and the highest of several."""
    mean = f"{sum(values) / len(values):.3g}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3g} to {max(values):.3g})"


def in_words(curve):
    return f"{curve.label} at n_dims {curve.settings['n_dims']}, D {curve.d_model}"


@command
def main(argv=None):
    parser = run_arguments(__doc__, "train_ICL.py", unfinished=True, at_step=True)
    parser.add_argument("--ledger", action="store_true", help="every run instead of the best")
    args = parser.parse_args(argv)
    runs = read_runs(args.runs, "train_ICL.py", args.only, args.unfinished, args.at_step)
    print(markdown(*(ledger(runs) if args.ledger else results(runs))))
    curves = tuned(runs, unnamed=ICL_SIZES)
    print("\n" + below_table(runs, curves, in_words, args.at_step))


if __name__ == "__main__":
    main()
