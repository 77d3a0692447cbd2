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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plots.records import check_finished, find_runs, group, markdown, parse_wanted, run_arguments, select
from plots.ts_kinds import is_rule, kinds_of, order, published
from scripts.time_series.sweep import ITERATIONS
from training.errors import command

CHRONOS = "train_chronos.py"
ERRORS = ("mse", "mae")


def forecasters(kinds):
    """Rows of the kinds, behind each what the papers report for it; at the end the papers that no kind belongs to."""
    horizons = sorted({horizon for kind in kinds for horizon in kind.runs})
    header = ["forecaster", *(f"{e.upper()} at {h}" for e in ERRORS for h in horizons), "rate", "seeds"]
    rows, left = [header], list(published(kinds[0].settings))
    for kind in kinds:
        found = [kind.errors(error) for error in ERRORS]
        cells = [spread(errors[h]) if h in errors else "" for errors in found for h in horizons]
        rates = [f"{kind.runs[h][0].settings['init_lr']:g}" for h in sorted(kind.runs)]
        seeds = [" ".join(str(run.settings["seed"]) for run in kind.runs[h]) for h in sorted(kind.runs)]
        how = [", ".join(same if len(set(same)) > 1 else same[:1]) for same in (rates, seeds)]
        rows.append([kind.label, *cells, *(["", ""] if is_rule(kind.settings) else how)])
        theirs = [peer for peer in left if peer.ours and peer.ours.items() <= kind.settings.items()]
        rows += [reported(peer, horizons) for peer in theirs]
        left = [peer for peer in left if peer not in theirs]
    return rows + [reported(peer, horizons) for peer in left]


def short(kinds):
    """Rows of the kinds and the papers, for each horizon MSE / MAE, the mean of seeds."""
    horizons = sorted({horizon for kind in kinds for horizon in kind.runs})
    rows, left = (
        [["test MSE / MAE at horizon", *(str(h) for h in horizons), "seeds"]],
        list(published(kinds[0].settings)),
    )
    for kind in kinds:
        mse, mae = (kind.errors(error) for error in ERRORS)
        cells = [
            f"{statistics.fmean(mse[h]):.3f} / {statistics.fmean(mae[h]):.3f}" if h in mse else "" for h in horizons
        ]
        counts = {len(same) for same in kind.runs.values()}
        seeds = "" if is_rule(kind.settings) else " to ".join(str(n) for n in sorted(counts))
        rows.append([kind.label, *cells, seeds])
        theirs = [peer for peer in left if peer.ours and peer.ours.items() <= kind.settings.items()]
        rows += [in_short(peer, horizons) for peer in theirs]
        left = [peer for peer in left if peer not in theirs]
    return rows + [in_short(peer, horizons) for peer in left]


def in_short(peer, horizons):
    cells = [" / ".join(f"{error:.3f}" for error in peer.errors[h]) if h in peer.errors else "" for h in horizons]
    return [f"*{peer.name}, published*", *cells, ""]


def reported(peer, horizons):
    numbers = [f"{peer.errors[h][i]:.3f}" if h in peer.errors else "" for i in range(len(ERRORS)) for h in horizons]
    return [f"*{peer.name}, published*", *numbers, "", ""]


def paper_grid(runs):
    """Rows of the encoders: one for each structure, rate and number of iterations, if there are several."""
    tried = {}  # structure: {horizon: {(rate, iterations): {seed: line}}}
    for run in sorted(runs, key=lambda run: order(run.settings)):
        s, lines = run.settings, run.evaluated.get("val/mse", {})
        if s["forecaster"] == "encoder":
            for n in (n for n in ITERATIONS if n in lines and n <= s["max_iters"]):
                cells = tried.setdefault(kinds_of([run])[0].label, {}).setdefault(s["horizon"], {})
                cells.setdefault((s["init_lr"], n), {})[s["seed"]] = lines[n]
    horizons = sorted({horizon for found in tried.values() for horizon in found})
    rows = [["encoder", "rate", "iterations", *(f"{e.upper()} at {h}" for e in ERRORS for h in horizons)]]
    for label, found in tried.items():
        best = {horizon: lowest(cells) for horizon, cells in found.items()}
        for rate, n in sorted({key for cells in found.values() for key in cells}):
            row = [label, f"{rate:g}", f"{n:,}"]
            for error in ERRORS:
                for horizon in horizons:
                    lines = found.get(horizon, {}).get((rate, n), {}).values()
                    text = spread([line[f"test/{error}"] for line in lines]) if lines else ""
                    row.append(f"**{text}**" if best.get(horizon) == (rate, n) else text)
            rows.append(row)
    return rows if len({tuple(row[1:3]) for row in rows[1:]}) > 1 else []


def lowest(cells):
    """The (rate, iterations) of lowest mean val/mse on the seeds that all have; None without such a seed."""
    common = set.intersection(*map(set, cells.values()))
    means = {key: statistics.fmean(lines[seed]["val/mse"] for seed in common) for key, lines in cells.items() if common}
    return min(means, key=means.get, default=None)


def chronos(runs):
    """Rows of Chronos runs, read at the evaluation of lowest validation quantile loss."""
    names = {"test/mse": "MSE of the median", "test/mae": "MAE", "test/wql": "weighted quantile loss"}
    rows = [["Chronos' self-attention", *names.values(), "steps", "seeds"]]
    for curve in group(runs):
        best = [min(run.evaluated["val/wql"].values(), key=lambda line: line["val/wql"]) for run in curve.runs]
        errors = [spread([line[name] for line in best]) for name in names]
        rows.append([curve.label, *errors, f"{curve.settings['max_iters']:,}", " ".join(map(str, curve.seeds))])
    return rows


def spread(values):
    """The mean with the standard deviation between seeds, if there are several."""
    mean = f"{statistics.fmean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


@command
def main(argv=None):
    parser = run_arguments(__doc__, "train_TS.py")
    parser.add_argument("--short", action="store_true", help="the first table only, MSE / MAE in one cell, no spread")
    args = parser.parse_args(argv)
    runs = select(find_runs(args.runs, "train_TS.py"), parse_wanted(args.only))
    of_chronos = [run for run in runs if run.record["command"] == CHRONOS]
    others = [run for run in runs if run not in of_chronos]
    check_finished(of_chronos, CHRONOS)
    check_finished(others, "train_TS.py")
    if args.short:
        print(markdown(*short(kinds_of(others))))
        return
    tables = [forecasters(kinds_of(others)), paper_grid(others)] if others else []
    tables += [chronos(of_chronos)] if of_chronos else []
    print("\n\n".join(markdown(*rows) for rows in tables if rows))


if __name__ == "__main__":
    main()
