"""Language model: validation loss against the compute spent on training, and its power laws.

    python plots/lm_compute.py out/lm --fit --out out/figures/lm_compute.png
"""

import sys
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plots.records import (
    STRUCTURES,
    X_AXES,
    arguments,
    check_same,
    final_table,
    fit_power_law,
    learning_curves,
    read_runs,
)
from plots.style import draw_curves, legend, log_ticks, picture
from training.errors import BadInput, command

FEWEST_WIDTHS = 3  # of a power law


def draw(ax, runs, x="non_emb_compute", fit=False, with_legend=True):
    """One curve per structure and width, log-log; returns the curves and their power laws, {structure: (a, b)}.

    With `fit`, a thin line L = a C^-b for each structure through the last points of its widths. Raises BadInput if the
    datasets differ, or if there is nothing to fit.
    """
    check_same(runs, ["dataset"])
    curves = learning_curves(runs, "val/loss", x)
    laws = fit_laws(curves) if fit else {}
    ax.set(xscale="log", yscale="log", xlabel=X_AXES[x], ylabel="validation loss (nats per token)")
    draw_curves(ax, curves, markers=lambda n: [n - 1], faint=fit)
    for structure, (a, b) in laws.items():
        last = [c.x[-1] for c in curves if c.structure == structure]
        C = np.geomspace(min(last) / 1.3, max(last) * 1.3, 20)
        ax.plot(C, a * C**-b, color=STRUCTURES[structure][1], linewidth=1)
    log_ticks(ax.xaxis)
    log_ticks(ax.yaxis)
    if with_legend:
        legend(ax, curves, {structure: f": $C^{{{-b:.3f}}}$" for structure, (_, b) in laws.items()})
    return curves, laws


def fit_laws(curves):
    """{structure: (a, b)} of L = a C^-b through the last points of its curves, one for each of at least 3 widths."""
    laws = {}
    for structure in dict.fromkeys(c.structure for c in curves):
        name, mine = STRUCTURES[structure][0], [c for c in curves if c.structure == structure]
        width, count = Counter(c.d_model for c in mine).most_common(1)[0]
        if count > 1:
            raise BadInput(f"{name} has {count} curves of width {width}, a power law takes one; choose with --only")
        if len(mine) < FEWEST_WIDTHS:
            widths = f"{len(mine)} (D = {', '.join(str(c.d_model) for c in mine)})"
            raise BadInput(f"a power law needs {FEWEST_WIDTHS} widths, {name} has {widths}; make more with --d_model")
        last = np.array([(c.x[-1], c.mean[-1]) for c in mine])
        if np.ptp(last[:, 0]) == 0:
            raise BadInput(f"the runs of {name} all end at the same x, a power law needs others; choose another --x")
        laws[structure] = fit_power_law(*last.T)
    return laws


@command
def main(argv=None):
    parser = arguments(__doc__, "train.py")
    parser.add_argument("--x", default="non_emb_compute", choices=X_AXES, help="what the runs are compared at")
    parser.add_argument("--fit", action="store_true", help="fit a power law to the last points of each structure")
    args = parser.parse_args(argv)
    runs = read_runs(args.runs, "train.py", args.only)
    with picture(args.out) as (ax,):
        curves, laws = draw(ax, runs, args.x, args.fit)
    print(final_table(curves, "val/loss", args.x))
    for structure, (a, b) in laws.items():
        mine = [c for c in curves if c.structure == structure]
        off = max(abs(c.mean[-1] / (a * c.x[-1] ** -b) - 1) for c in mine)
        name, points = STRUCTURES[structure][0], f"{len(mine)} widths, off by at most {off:.2%}"
        print(f"{name}: L = {a:.4g} C^{-b:.4f} with C = {args.x}; {points}")


if __name__ == "__main__":
    main()
