"""Time series: the tables of results/time_series/README.md, in Markdown, from records.

    python plots/ts_table.py results/time_series results/chronos

Test errors on standardised values, mean ± standard deviation over seeds. First every kind of forecaster at its
evaluation of lowest validation error, at the learning rate and number of steps with the lowest on average (rates and
seeds of each horizon where they differ), published errors beside. Then the paper's grid, every rate and number of SGD
iterations read where that many steps end, in bold what validation chooses: the rate is constant, so that a run of 1,000
steps holds that of 200. Then Chronos.
"""

import itertools
import statistics
import sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from forecasters import name_of
from plots.records import arguments, group
from plots.tables import show
from plots.ts_kinds import ITERATIONS, is_rule, kinds_of, order, published, read_both
from plots.ts_pairs import CHRONOS_ERRORS, best_line
from training.errors import command

ERRORS = ("mse", "mae")


def forecasters(kinds, short=False):
    """Rows of the kinds, behind each what the papers report for it; at the end the papers that no kind belongs to.

    short: for each horizon MSE / MAE, the mean of seeds.
    """
    horizons, left = sorted({horizon for kind in kinds for horizon in kind.runs}), list(published(kinds[0].settings))

    def reported(peer):
        errors = {horizon: [both] for horizon, both in peer.errors.items()}
        return [f"*{peer.name}, published*", *cells(errors, horizons, short), *([""] if short else ["", ""])]

    names = ["test MSE / MAE at horizon", *horizons] if short else ["forecaster", *columns(horizons), "rate"]
    rows = [[*names, "seeds"]]
    for kind in kinds:
        both = [kind.errors(error) for error in ERRORS]
        errors = {h: list(zip(*(each[h] for each in both), strict=True)) for h in kind.runs}
        theirs = [peer for peer in left if peer.is_of(kind.settings)]
        rows += [[kind.label, *cells(errors, horizons, short), *how(kind, short)], *map(reported, theirs)]
        left = [peer for peer in left if peer not in theirs]
    return [*rows, *map(reported, left)]


def columns(horizons):
    """The heads of columns."""
    return [f"{error.upper()} at {horizon}" for error in ERRORS for horizon in horizons]


def cells(errors, horizons, short):
    """The texts of errors {horizon: [(MSE, MAE), ..]}, one a seed."""
    texts = [[spread(v) for v in zip(*errors[h], strict=True)] if h in errors else ["", ""] for h in horizons]
    if short:
        return [" / ".join(text.partition(" ")[0] for text in both).strip(" /") for both in texts]
    return itertools.chain(*zip(*texts, strict=True))


def how(kind, short):
    """Rates and seeds of a kind, of each horizon where they differ; short: how many seeds."""
    runs = [kind.runs[horizon] for horizon in sorted(kind.runs)]
    if short:
        texts = [" to ".join(map(str, sorted({len(same) for same in runs})))]
    else:
        rates = [f"{same[0].settings['init_lr']:g}" for same in runs]
        seeds = [" ".join(str(run.settings["seed"]) for run in same) for same in runs]
        texts = [", ".join(each if len(set(each)) > 1 else each[:1]) for each in (rates, seeds)]
    return [""] * len(texts) if is_rule(kind.settings) else texts


def paper_grid(runs):
    """Rows of the encoders: one for each structure, rate and number of iterations, if there are several."""
    about, lines = ["encoder", "rate", "iterations", "horizon"], []
    for run in sorted(runs, key=lambda run: order(run.settings)):
        s, evaluated = run.settings, run.evaluated.get("val/mse", {})
        for n in ITERATIONS if s["forecaster"] == "encoder" else ():
            if n in evaluated and n <= s["max_iters"]:
                key = dict(zip(about, (name_of(s), s["init_lr"], n, s["horizon"]), strict=True))
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
    rows = [[*about[:3], *columns(sorted(set(grid.horizon)))]]
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
