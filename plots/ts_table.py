"""Time series: the tables of results/time_series/README.md, in Markdown, from records.

    python plots/ts_table.py results/time_series results/chronos

Test errors on standardised values, mean ± standard deviation over seeds. First every kind of forecaster at its
evaluation of lowest validation error, at the learning rate and number of steps with the lowest on average (rates and
seeds of each horizon where they differ), published errors beside. Then the paper's grid, every rate and number of SGD
iterations read where that many steps end, in bold what validation chooses: the rate is constant, so that a run of 1,000
steps holds that of 200. Then Chronos.
"""

import statistics
import sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plots.records import arguments, group
from plots.tables import show
from plots.ts_kinds import ITERATIONS, is_rule, kinds_of, name, order, published, read_both
from plots.ts_pairs import CHRONOS_ERRORS, best_line
from training.errors import command

ERRORS = ("mse", "mae")


def forecasters(kinds, short=False):
    """Rows of the kinds, behind each what the papers report for it; at the end the papers that no kind belongs to.

    short: for each horizon MSE / MAE, the mean of seeds.
    """
    horizons = sorted({horizon for kind in kinds for horizon in kind.runs})
    own, reported = (short_row, short_reported) if short else (row, row_reported)
    if short:
        rows = [["test MSE / MAE at horizon", *(str(h) for h in horizons), "seeds"]]
    else:
        rows = [["forecaster", *(f"{e.upper()} at {h}" for e in ERRORS for h in horizons), "rate", "seeds"]]
    left = list(published(kinds[0].settings))
    for kind in kinds:
        theirs = [peer for peer in left if peer.is_of(kind.settings)]
        rows += [own(kind, horizons), *(reported(peer, horizons) for peer in theirs)]
        left = [peer for peer in left if peer not in theirs]
    return rows + [reported(peer, horizons) for peer in left]


def row(kind, horizons):
    found = [kind.errors(error) for error in ERRORS]
    cells = [spread(errors[h]) if h in errors else "" for errors in found for h in horizons]
    rates = [f"{kind.runs[h][0].settings['init_lr']:g}" for h in sorted(kind.runs)]
    seeds = [" ".join(str(run.settings["seed"]) for run in kind.runs[h]) for h in sorted(kind.runs)]
    how = [", ".join(same if len(set(same)) > 1 else same[:1]) for same in (rates, seeds)]
    return [kind.label, *cells, *(["", ""] if is_rule(kind.settings) else how)]


def row_reported(peer, horizons):
    numbers = [f"{peer.errors[h][i]:.3f}" if h in peer.errors else "" for i in range(len(ERRORS)) for h in horizons]
    return [f"*{peer.name}, published*", *numbers, "", ""]


def short_row(kind, horizons):
    mse, mae = (kind.errors(error) for error in ERRORS)
    cells = [f"{statistics.fmean(mse[h]):.3f} / {statistics.fmean(mae[h]):.3f}" if h in mse else "" for h in horizons]
    counts = sorted({len(same) for same in kind.runs.values()})
    return [kind.label, *cells, "" if is_rule(kind.settings) else " to ".join(map(str, counts))]


def short_reported(peer, horizons):
    cells = [" / ".join(f"{error:.3f}" for error in peer.errors[h]) if h in peer.errors else "" for h in horizons]
    return [f"*{peer.name}, published*", *cells, ""]


def paper_grid(runs):
    """Rows of the encoders: one for each structure, rate and number of iterations, if there are several."""
    about, lines = ["encoder", "rate", "iterations", "horizon"], []
    for run in sorted(runs, key=lambda run: order(run.settings)):
        s, evaluated = run.settings, run.evaluated.get("val/mse", {})
        for n in ITERATIONS if s["forecaster"] == "encoder" else ():
            if n in evaluated and n <= s["max_iters"]:
                key = dict(zip(about, (name(s), s["init_lr"], n, s["horizon"]), strict=True))
                lines.append(key | dict(seed=s["seed"]) | evaluated[n])
    if len({(line["rate"], line["iterations"]) for line in lines}) < 2:
        return []
    grid = pd.DataFrame(lines).drop_duplicates([*about, "seed"], keep="last")
    cells = grid.groupby(about)[[f"test/{error}" for error in ERRORS]].agg(spread)
    for (encoder, horizon), same in grid.groupby(["encoder", "horizon"]):
        val = same.pivot(index="seed", columns=["rate", "iterations"], values="val/mse").dropna()
        if len(val):  # on the seeds that all rates and iterations have
            best = encoder, *val.mean().idxmin(), horizon
            cells.loc[best] = "**" + cells.loc[best] + "**"
    wide = cells.unstack("horizon", fill_value="")
    rows = [
        ["encoder", "rate", "iterations", *(f"{e.upper()} at {h}" for e in ERRORS for h in sorted(set(grid.horizon)))]
    ]
    for encoder in dict.fromkeys(grid.encoder):
        rows += [[encoder, f"{rate:g}", f"{n:,}", *texts] for (rate, n), texts in wide.loc[encoder].iterrows()]
    return rows


def chronos(runs):
    """Rows of Chronos runs, read at the evaluation of lowest validation quantile loss."""
    rows = [["Chronos' self-attention", *CHRONOS_ERRORS.values(), "steps", "seeds"]]
    for curve in group(runs):
        errors = [spread([best_line(run)[error] for run in curve.runs]) for error in CHRONOS_ERRORS]
        rows.append([curve.label, *errors, f"{curve.settings['max_iters']:,}", " ".join(map(str, curve.seeds))])
    return rows


def spread(values):
    """The mean with the standard deviation between seeds, if there are several."""
    mean = f"{statistics.fmean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


@command
def main(argv=None):
    parser = arguments(__doc__, "train_TS.py", out=False)
    parser.add_argument("--short", action="store_true", help="the first table only, MSE / MAE in one cell, no spread")
    args = parser.parse_args(argv)
    others, of_chronos = read_both(args)
    if args.short:
        return show(forecasters(kinds_of(others), short=True))
    tables = [forecasters(kinds_of(others)), paper_grid(others)] if others else []
    show(*tables, *([chronos(of_chronos)] if of_chronos else []))


if __name__ == "__main__":
    main()
