"""Language model: power laws of the last validation loss of all structures, and what follows from them, in Markdown.

    python plots/lm_laws.py results/language_modeling/*_lr0.003_seed[12] --only max_iters=10000 --only block_size=1024

One linear regression fits all structures: log L = log a_s - b_s log C, and where the validation windows were drawn with
the seed an offset for every seed, whose windows are harder or easier than others'. Intervals are of 95%. A law goes
through models of several widths after equally many steps: it says how the loss falls with the width, not how to spend
so much compute best.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import statsmodels.api as sm
from scipy.stats import bootstrap

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plots.names import LM_ALIKE, LM_LOSS, LM_RATE, MLR, STANDARD, STRUCTURES
from plots.records import arguments, check_same, comparable, frame, grouped, runs_of, tuned
from plots.tables import show, within
from training.errors import BadInput, command
from training.records import RANDOM

FEWEST_WIDTHS = 3  # of a power law
AXES = {"non_emb_compute": "FLOPs", "gpu_seconds": "time"}
RESAMPLED = 9_999  # draws of the bootstrap


@dataclass(frozen=True)
class Laws:
    """The laws L = a_s x^-b_s of structures: the regression and its points (structure, seed, d_model, x, value).

    A loss is that on the validation text of the mean seed, where every seed has its own.
    """

    regression: object
    points: pd.DataFrame

    @property
    def structures(self):
        return [s for s in STRUCTURES if s in set(self.points.structure)]

    @property
    def middle(self):
        return np.log(self.points.x).mean()

    def offset(self, seed):
        """How much harder a seed's validation text is than the mean seed's, in log loss."""
        found = self.regression.params.filter(like="seed ")
        return found.get(f"seed {seed}", -found.sum())

    def exponent(self, structure):
        """(b, lowest, highest)."""
        low, high = self.regression.conf_int().loc[f"{structure} log x"]
        return -self.regression.params[f"{structure} log x"], -high, -low

    def loss(self, structure, x):
        """(loss, lowest, highest) at x, arrays."""
        points = pd.DataFrame({structure: 1.0, f"{structure} log x": np.log(x) - self.middle})
        points = points.reindex(columns=self.regression.params.index, fill_value=0.0)
        band = self.regression.get_prediction(points).summary_frame()
        return tuple(np.exp(band[name].to_numpy()) for name in ("mean", "mean_ci_lower", "mean_ci_upper"))

    def share(self, structure, loss):
        """(share, lowest, highest) of standard attention's x that a structure takes for a loss.

        The interval is that of a bootstrap of the residuals, which are drawn anew around the laws.
        """
        fit, names = self.regression, list(self.regression.params.index)
        fitted, residuals = fit.fittedvalues.to_numpy(), fit.resid.to_numpy()
        spread = np.sqrt(len(fitted) / fit.df_resid)  # of residuals, which the fit has made smaller
        solve = np.linalg.pinv(fit.model.exog).T

        def share(residuals, axis=-1):
            found = dict(zip(names, np.moveaxis((fitted + spread * residuals) @ solve, -1, 0), strict=True))
            mine, theirs = ((np.log(loss) - found[s]) / found[f"{s} log x"] for s in (structure, STANDARD))
            return np.exp(mine - theirs)

        drawn = bootstrap((residuals,), share, n_resamples=RESAMPLED, batch=1000, method="percentile", rng=0)
        return float(share(0 * residuals)), *map(float, drawn.confidence_interval)


def best_runs(runs):
    """The runs at the best rate of each structure and width. BadInput for two kinds of run of one of them."""
    curves = tuned(runs, LM_LOSS, LM_RATE)
    for (structure, width), same in grouped(curves, lambda curve: (curve.structure, curve.d_model)).items():
        if len(same) > 1:
            several = f"{STRUCTURES[structure][0]} has {len(same)} curves of width {width}"
            raise BadInput(f"{several}, a power law takes one; choose with --only")
    return [run for curve in curves for run in curve.runs]


def fit_laws(runs, x="non_emb_compute"):
    """The Laws of the structures that have at least 3 widths. Raises BadInput where nothing can be fitted."""
    check_same(runs, LM_ALIKE)
    points = frame(runs, LM_LOSS, x)[["structure", "seed", "d_model", "x", "value"]]
    by_structure = points.groupby("structure", observed=True)
    enough = by_structure.filter(lambda mine: mine.d_model.nunique() >= FEWEST_WIDTHS)
    if enough.empty:
        found = ", ".join(f"{STRUCTURES[s][0]} has {n}" for s, n in by_structure.d_model.nunique().items())
        raise BadInput(f"a power law needs {FEWEST_WIDTHS} widths, {found}; make more with --d_model")
    ends = enough.groupby("structure", observed=True).x.nunique()
    if ends.min() == 1:
        name = STRUCTURES[ends.idxmin()][0]
        raise BadInput(f"the runs of {name} all end at the same x, a power law needs others; choose another --x")
    return fit_points(enough, by_seed=runs[0].settings["validation"] == RANDOM)


def fit_points(points, by_seed):
    """The Laws of a table (structure, seed, d_model, x, value); by_seed: every seed has validation text of its own.

    The regression has a height and a slope for every structure, and offsets of seeds whose sum is zero.
    """
    points = points.astype(dict(structure=str)).sort_values(["structure", "seed", "d_model"], ignore_index=True)
    log_x = np.log(points.x)
    heights, seeds = (pd.get_dummies(points[name], dtype=float) for name in ("structure", "seed"))
    design = {}
    for structure in (s for s in STRUCTURES if s in heights):
        design[structure] = heights[structure]
        design[f"{structure} log x"] = heights[structure] * (log_x - log_x.mean())
    for seed in seeds.columns[1:] if by_seed else ():
        design[f"seed {seed}"] = seeds[seed] - seeds.iloc[:, 0]
    return Laws(sm.OLS(np.log(points.value), pd.DataFrame(design)).fit(), points)


def exponents(laws):
    """Rows of the structures: the exponent of each law {x: Laws}, and what it was fitted to."""
    rows = [["attention", "runs", *(f"exponent of {AXES[x]}" for x in laws)]]
    first = next(iter(laws.values()))
    for structure in first.structures:
        found = [law.exponent(structure) if structure in law.structures else None for law in laws.values()]
        cells = [f"{b[0]:.3f} {within(*b[1:])}" if b else "" for b in found]
        rows.append([STRUCTURES[structure][0], (first.points.structure == structure).sum(), *cells])
    return rows


def shares(laws):
    """Rows of losses, in hundredths: what part of standard attention's x MLR attention takes.

    They are the lowest and the highest that the first of the laws {x: Laws} of both reach.
    """
    first = next(iter(laws.values()))
    x = first.points.groupby("structure", observed=True).x.agg(["min", "max"])
    high, low = np.transpose([first.loss(s, x.loc[s])[0] for s in (MLR, STANDARD)])
    rows = [["MLR takes, for a loss of", *(f"of standard attention's {AXES[x]}" for x in laws)]]
    for loss in np.floor(100 * min(high)) / 100, np.ceil(100 * max(low)) / 100:
        cells = [law.share(MLR, loss) for law in laws.values()]
        rows.append([f"{loss:.2f}", *(f"{share:.2f} {within(*ends, '.2f')}" for share, *ends in cells)])
    return rows


def crossing_words(law):
    """Where the laws of MLR and of standard attention meet, in words."""
    fit = law.regression.params
    height, slope = (fit[MLR + end] - fit[STANDARD + end] for end in ("", " log x"))
    times = np.exp(-height / slope + law.middle) / law.points.x.max()
    if not times >= 1:
        return "The laws of MLR and of standard attention do not meet beyond the largest run."
    words = f"{times:.1f} times" if times < 100 else "more than 100 times"
    return f"The laws of MLR and of standard attention meet at {words} the FLOPs of the largest run."


@command
def main(argv=None):
    runs = best_runs(runs_of(arguments(__doc__, "train.py", out=False).parse_args(argv), "train.py"))
    timed, card = comparable(runs, "gpu_seconds")
    laws = {x: fit_laws(comparable(runs, x)[0], x) for x in AXES}
    if not all({STANDARD, MLR} <= set(law.structures) for law in laws.values()):
        return show(exponents(laws))
    times = f"Times are those of the {len(timed)} of {len(runs)} runs on one kind of card, {card}."
    show(exponents(laws), shares(laws), words=f"{crossing_words(laws['non_emb_compute'])} {times}")


if __name__ == "__main__":
    main()
