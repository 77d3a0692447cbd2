"""Language model: power laws of the last validation loss of all structures, and what follows from them, in Markdown.

    python plots/lm_laws.py results/language_modeling/*_lr0.003_seed[12] --only max_iters=10000 --only block_size=1024

One linear regression fits all structures: log L = log a_s - b_s log C, and where the validation windows were drawn with
the seed an offset for every seed, whose windows are harder or easier than others'. Intervals are of 95%. A law goes
through models of several widths after equally many steps: it says how the loss falls with the width, not how to spend
so much compute best.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import statsmodels.api as sm
from scipy.stats import bootstrap

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plots.records import (
    LM_LOSS,
    LM_RATE,
    RANDOM,
    STRUCTURES,
    check_same,
    markdown,
    prose,
    read_runs,
    run_arguments,
    tuned,
    within,
)
from training.errors import BadInput, command

FEWEST_WIDTHS = 3  # of a power law
BASELINE = "low_rank"
TIMES = ("seconds", "gpu_seconds")
AXES = {"non_emb_compute": "FLOPs", "gpu_seconds": "time"}
RESAMPLED = 9_999  # draws of the bootstrap
ALIKE = ("dataset", "validation", "val_tokens", "block_size", "max_iters")  # what runs of one regression share


@dataclass(frozen=True)
class Laws:
    """The laws L = a_s x^-b_s of several structures: the regression and its points (structure, seed, width, x, loss).

    A loss is that on the validation text of the mean seed, where every seed has its own.
    """

    regression: object
    points: pd.DataFrame

    @cached_property
    def structures(self):
        return [s for s in STRUCTURES if s in set(self.points.structure)]

    @cached_property
    def middle(self):
        return np.log(self.points.x).mean()

    def offset(self, seed):
        """How much harder a seed's validation text is than the mean seed's, in log loss."""
        own = [name for name in self.regression.params.index if name.startswith("seed ")]
        found = {name: self.regression.params[name] for name in own}
        return found.get(f"seed {seed}", -sum(found.values()) if own else 0.0)

    def exponent(self, structure):
        """(b, lowest, highest)."""
        low, high = self.regression.conf_int().loc[f"{structure} log x"]
        return -self.regression.params[f"{structure} log x"], -high, -low

    def loss(self, structure, x):
        """(loss, lowest, highest) at x, arrays."""
        x = np.atleast_1d(np.asarray(x, float))
        points = pd.DataFrame(dict(structure=structure, seed=None, log_x=np.log(x) - self.middle))
        band = self.regression.get_prediction(design(points, self.regression.params.index)).summary_frame()
        return tuple(np.exp(band[name].to_numpy()) for name in ("mean", "mean_ci_lower", "mean_ci_upper"))

    def x_at(self, structure, loss, parameters=None):
        """The x at which a law is at a loss; parameters: (..., n) of the regression, instead of its own."""
        names = list(self.regression.params.index)
        parameters = self.regression.params.to_numpy() if parameters is None else parameters
        height, slope = (parameters[..., names.index(name)] for name in (structure, f"{structure} log x"))
        return np.exp((np.log(loss) - height) / slope + self.middle)

    def share(self, structure, loss):
        """(share, lowest, highest) of standard attention's x that a structure takes for a loss.

        The interval is that of a bootstrap of the residuals, which are drawn anew around the laws.
        """
        exog, fitted = self.regression.model.exog, self.regression.fittedvalues.to_numpy()
        spread = np.sqrt(len(fitted) / self.regression.df_resid)  # of residuals, which the fit has made smaller
        solve = np.linalg.pinv(exog).T

        def share(residuals, axis=-1):
            parameters = (fitted + spread * residuals) @ solve
            return self.x_at(structure, loss, parameters) / self.x_at(BASELINE, loss, parameters)

        drawn = bootstrap(
            (self.regression.resid.to_numpy(),), share, n_resamples=RESAMPLED, batch=1000, method="percentile", rng=0
        )
        now = self.x_at(structure, loss) / self.x_at(BASELINE, loss)
        return float(now), *map(float, drawn.confidence_interval)

    def crossing(self, structure):
        """The x at which the law of a structure meets standard attention's; None where they are parallel."""
        height, slope = (self.regression.params[structure + end] - self.regression.params[BASELINE + end]
                         for end in ("", " log x"))  # fmt: skip
        return float(np.exp(-height / slope + self.middle)) if slope else None

    def common_losses(self, structure):
        """The lowest and the highest loss, in hundredths, that the laws of a structure and standard attention reach."""
        ends = [self.loss(s, self._x(s).agg(["max", "min"]))[0] for s in (structure, BASELINE)]
        low, high = max(end[0] for end in ends), min(end[1] for end in ends)
        return np.ceil(100 * low) / 100, np.floor(100 * high) / 100

    def _x(self, structure):
        return self.points.x[self.points.structure == structure]


def design(points, columns):
    """The regression's matrix: for every structure a height and a slope, for seeds offsets whose sum is zero."""
    matrix = pd.DataFrame(0.0, index=points.index, columns=columns)
    for name in columns:
        kind = name.removesuffix(" log x")
        if name.startswith("seed "):
            own = points.seed.map(lambda seed, name=name: f"seed {seed}" == name)
            named = points.seed.map(lambda seed: f"seed {seed}" in columns or seed is None)
            matrix[name] = own * 1.0 - ~named * 1.0
        else:
            matrix[name] = (points.structure == kind) * (points.log_x if kind != name else 1.0)
    return matrix


def best_runs(runs):
    """The runs at the best rate of each structure and width. BadInput for two kinds of run of one of them."""
    curves = tuned(runs, LM_LOSS, LM_RATE)
    (kind, count), *_ = Counter((c.structure, c.d_model) for c in curves).most_common(1)
    if count > 1:
        raise BadInput(
            f"{STRUCTURES[kind[0]][0]} has {count} curves of width {kind[1]}, a power law takes one; choose with --only"
        )
    return [run for curve in curves for run in curve.runs]


def last_points(runs, x):
    """A table (structure, seed, width, x, loss) of the last evaluation of every run."""
    rows = []
    for run in runs:
        spent, loss = max(run.series(LM_LOSS, x).items())[1]
        rows.append((run.structure, run.settings["seed"], run.settings["d_model"], float(spent), loss))
    return pd.DataFrame(rows, columns=["structure", "seed", "width", "x", "loss"])


def fit_laws(runs, x="non_emb_compute"):
    """The Laws of the structures that have at least 3 widths. Raises BadInput where nothing can be fitted."""
    check_same(runs, ALIKE)
    points = last_points(runs, x)
    widths = points.groupby("structure").width.nunique()
    enough = [s for s in STRUCTURES if widths.get(s, 0) >= FEWEST_WIDTHS]
    if not enough:
        found = ", ".join(f"{STRUCTURES[s][0]} has {n}" for s, n in widths.items())
        raise BadInput(f"a power law needs {FEWEST_WIDTHS} widths, {found}; make more with --d_model")
    points = points[points.structure.isin(enough)].reset_index(drop=True)
    for structure, mine in points.groupby("structure"):
        if np.ptp(mine.x) == 0:
            name = STRUCTURES[structure][0]
            raise BadInput(f"the runs of {name} all end at the same x, a power law needs others; choose another --x")
    return fit_points(points, by_seed=runs[0].settings["validation"] == RANDOM)


def fit_points(points, by_seed):
    """The Laws of a table as `last_points` makes it; by_seed: every seed has validation text of its own."""
    points = points.sort_values(["structure", "seed", "width"], ignore_index=True)  # whatever order they were read in
    structures = [s for s in STRUCTURES if s in set(points.structure)]
    seeds = sorted(set(points.seed)) if by_seed else []
    columns = [f"{s}{end}" for s in structures for end in ("", " log x")] + [f"seed {seed}" for seed in seeds[1:]]
    log_x = np.log(points.x)
    matrix = design(points.assign(log_x=log_x - log_x.mean()), columns)
    return Laws(sm.OLS(np.log(points.loss), matrix).fit(), points)


def comparable(runs, x):
    """(the runs whose x compare, the card they ran on): of times those on the card that most of them ran on."""
    if x not in TIMES:
        return runs, None
    card, _ = Counter(run.record.get("device") for run in runs).most_common(1)[0]
    return [run for run in runs if run.record.get("device") == card], card


def exponents(laws):
    """Rows of the structures: the exponent of each law {x: Laws}, and what it was fitted to."""
    rows = [["attention", "runs", *(f"exponent of {AXES[x]}" for x in laws)]]
    first = next(iter(laws.values()))
    for structure in first.structures:
        found = [law.exponent(structure) if structure in law.structures else None for law in laws.values()]
        cells = [f"{b[0]:.3f} {within(*b[1:])}" if b else "" for b in found]
        rows.append([STRUCTURES[structure][0], int((first.points.structure == structure).sum()), *cells])
    return rows


def shares(laws, structure):
    """Rows of the losses that two laws share: what part of standard attention's x a structure takes."""
    losses = next(iter(laws.values())).common_losses(structure)
    rows = [[f"{STRUCTURES[structure][0]} takes, for a loss of", *(f"of standard attention's {AXES[x]}" for x in laws)]]
    for loss in losses[::-1]:
        cells = [law.share(structure, loss) for law in laws.values()]
        rows.append([f"{loss:.2f}", *(f"{share:.2f} {within(*ends, '.2f')}" for share, *ends in cells)])
    return rows


def crossing_words(law, structure):
    """Where the two laws meet, in words."""
    at, largest = law.crossing(structure), law.points.x.max()
    name = STRUCTURES[structure][0]
    if at is None or at < largest:
        return f"The laws of {name} and of standard attention do not meet beyond the largest run."
    times = f"{at / largest:.1f} times" if at < 100 * largest else "more than 100 times"
    return f"The laws of {name} and of standard attention meet at {times} the FLOPs of the largest run."


def times_words(runs):
    timed, card = comparable(runs, "gpu_seconds")
    return f"Times are those of the {len(timed)} of {len(runs)} runs on one kind of card, {card}."


@command
def main(argv=None):
    parser = run_arguments(__doc__, "train.py", unfinished=True, at_step=True)
    parser.add_argument("--of", default="multi_level_low_rank", choices=STRUCTURES, help="whose shares to print")
    args = parser.parse_args(argv)
    runs = best_runs(read_runs(args.runs, "train.py", args.only, args.unfinished, args.at_step))
    laws = {x: fit_laws(comparable(runs, x)[0], x) for x in AXES}
    print(markdown(*exponents(laws)))
    if all({BASELINE, args.of} <= set(law.structures) for law in laws.values()):
        print(f"\n{markdown(*shares(laws, args.of))}")
        print(prose(f"{crossing_words(laws['non_emb_compute'], args.of)} {times_words(runs)}"))


if __name__ == "__main__":
    main()
