"""Time series: the test error of scoring functions less that of standard attention, at every horizon, seed by seed.

    python plots/ts_horizon.py results/time_series --out results/ts_horizon.png

A panel for each layout that has runs of standard attention: small points are seeds, large ones their mean, the bar is
the 95% interval of the mean (of three seeds or more). Left of the line a function is better than standard attention.
Hollow: what a paper reports for its standard attention in this layout, less the mean of ours. A run counts with its
evaluation of lowest validation error. Numbers: plots/ts_pairs.py and plots/ts_table.py.
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from plots.records import arguments, grouped, runs_of
from plots.style import GREY, legend_below, picture, structure_key
from plots.tables import student
from plots.ts_kinds import kinds_of, look, published
from plots.ts_pairs import paired, with_standard
from training.errors import BadInput, command

NAMES = {"encoder": "the paper's encoder", "patch": "patches"}
APART = 0.22  # rows between the functions of one horizon


def panels_of(kinds):
    """{layout: [(standard attention's Kind, another), ..]}. BadInput if no function has its like to compare with."""
    found = grouped(with_standard(kinds), lambda pair: pair[0].layout)
    if not found:
        raise BadInput("no run has its like of standard attention to compare with")
    return found


def draw(ax, pairs):
    """One panel: horizons as rows, the shortest above, the functions of one row below each other."""
    horizons = sorted({horizon for base, _ in pairs for horizon in base.runs})
    for place, (base, other) in enumerate(pairs):
        aside = APART * (place - (len(pairs) - 1) / 2)
        for row, horizon in enumerate(horizons):
            if values := paired([base, other]).get((other.label, horizon)):
                draw_seeds(ax, values, row + aside, look(other.settings))
    draw_published(ax, pairs[0][0], horizons)
    settings = pairs[0][0].settings
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.axvline(0, color=GREY, linewidth=0.8, zorder=0)
    ax.set_yticks(range(len(horizons)), [f"{h} h" for h in horizons])
    ax.set_ylim(len(horizons) - 0.4, -0.6)
    ax.set_xlabel("test MSE less that of standard attention")
    ax.set_title(f"{NAMES[settings['forecaster']]}, {settings['look_back']} hours read")


def draw_seeds(ax, values, y, look):
    """The pairs of one function and horizon: seeds, mean, interval."""
    colour, (mean, low, high, _) = look["color"], student(values)
    ax.plot(values, [y] * len(values), linestyle="", marker=look["marker"], markersize=3, color=colour, alpha=0.5)
    ax.plot([mean], [y], **look | dict(markersize=7), linestyle="", zorder=3)
    if low is not None:
        ax.plot([low, high], [y, y], color=colour, linewidth=1)


def draw_published(ax, base, horizons):
    """What a paper reports for the same layout, less the mean of ours."""
    for peer in published(base.settings):
        if peer.is_of(base.settings):
            ours = {h: statistics.fmean(base.errors("mse")[h]) for h in horizons if h in base.runs and h in peer.errors}
            less = [peer.errors[h][0] - mean for h, mean in ours.items()]
            rows = [horizons.index(h) for h in ours]
            hollow = dict(markerfacecolor="none", markeredgecolor="black", markeredgewidth=0.8, markersize=6, zorder=4)
            ax.plot(less, rows, linestyle="", marker=peer.marker, **hollow, label=f"{peer.name}, published")


def legend(axes, panels):
    """Below all panels: the functions, and the papers in order of appearance."""
    structures = dict.fromkeys(other.structure for pairs in panels.values() for _, other in pairs)
    shown = [structure_key(structure, linestyle="") for structure in structures]
    shown += [Line2D([], [], color=GREY, linestyle="", marker="o", markersize=3, label="one seed")]
    for ax in axes:
        shown += ax.get_legend_handles_labels()[0]
    legend_below(axes, shown, 3)


@command
def main(argv=None):
    args = arguments(__doc__, "train_TS.py").parse_args(argv)
    panels = panels_of(kinds_of(runs_of(args, "train_TS.py")))
    with picture(args.out, panels=len(panels), columns=2) as axes:
        for ax, pairs in zip(axes, panels.values(), strict=True):
            draw(ax, pairs)
        legend(axes, panels)


if __name__ == "__main__":
    main()
