"""How every figure looks: one column wide, no pyplot, the same bytes for the same numbers."""

import itertools
import math
from contextlib import contextmanager
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from matplotlib.transforms import ScaledTranslation

from plots.names import STRUCTURES
from training.errors import BadInput
from training.files import check_folder

COLUMN, PANEL = 3.3, 2.55  # inches: width of a panel, and its height without the legend
MARGIN = 0.1  # inches above a legend that several panels share
LINES = ["-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3))]  # one for every variant of the structures
MARKER_SIZES = {"P": 6, "X": 6, "*": 8}  # the others 4.5
GREY, DARK_GREY = "#777777", "#555555"  # of lines, of small words
KEYS = dict(handlelength=2.6, columnspacing=1.2, labelspacing=0.35)  # of every legend
TICKS = [(1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)]  # of a log axis; the first with three
RC = {
    "font.size": 8, "axes.labelsize": 8, "axes.titlesize": 8, "legend.fontsize": 7,
    "xtick.labelsize": 7, "ytick.labelsize": 7,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6, "lines.linewidth": 1.3,
    "legend.frameon": False, "savefig.dpi": 300, "svg.hashsalt": "structured-attention",
}  # fmt: skip


@contextmanager
def picture(out, panels=1, columns=None):
    """Gives the axes of `panels` panels, or of a list of their titles; saves them as PNG and SVG and prints the paths.

    The panels stand side by side, or in rows of `columns`. Nothing is written if the body raises. Raises BadInput for
    an `out` that is not a .png or .svg path.
    """
    titles = [""] * panels if isinstance(panels, int) else panels
    out = Path(out)
    if out.suffix not in ("", ".png", ".svg"):
        raise BadInput(f"--out {out}: the picture is written as PNG and SVG, give a name that ends in .png")
    check_folder(out.parent, "--out")
    with matplotlib.style.context(["default", RC]):
        columns = min(len(titles), columns or len(titles))
        rows = math.ceil(len(titles) / columns)
        figure = Figure(figsize=(COLUMN * columns, PANEL * rows), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08)  # inches beside every panel
        for i, title in enumerate(titles, 1):
            figure.add_subplot(rows, columns, i, title=title)
        yield figure.axes
        figure.draw_without_rendering()  # places the legends
        legends = [*filter(None, (ax.get_legend() for ax in figure.axes)), *figure.legends]
        heights = [legend.get_window_extent().height / figure.dpi for legend in legends]
        figure.set_figheight(PANEL * rows + max(heights, default=0) + (MARGIN if figure.legends else 0))
        out.parent.mkdir(parents=True, exist_ok=True)
        for suffix, metadata in {".png": {}, ".svg": {"Date": None}}.items():
            figure.savefig(out.with_suffix(suffix), metadata=metadata)
            print(out.with_suffix(suffix))


def draw_curves(ax, curves, lines=None, markers=lambda n: [n - 1]):
    """A line for every curve, a band from the lowest seed to the highest, a marker at the points `markers(n)`.

    lines: {variant: line style}, if not only of these curves.
    """
    lines = lines or line_styles(curves)
    for curve in curves:
        look, at = structure_style(curve.structure), markers(len(curve.x))
        line = dict(color=look["color"], linestyle=lines[curve.variant], linewidth=1.3 if len(curves) <= 8 else 0.9)
        ax.plot(curve.x, curve.mean, **line, label=curve.label)
        ax.plot(curve.x[at], curve.mean[at], **look, linestyle="", zorder=3)
        if len(curve.runs) > 1:
            ax.fill_between(curve.x, curve.low, curve.high, color=look["color"], alpha=0.2, linewidth=0)


def draw_path(ax, run, metric, x, linestyle, **look):
    """A thin line of one run as it trains, from its first step on; returns its last point."""
    path = [pair for step, pair in sorted(run.series(metric, x).items()) if step > 0]
    ax.plot(*zip(*path, strict=True), color=STRUCTURES[run.structure][1], linestyle=linestyle, **look)
    return path[-1]


def draw_ends(ax, curves, **look):
    """The last mean of every curve at its last x, and a bar from the lowest seed to the highest."""
    x, mean, low, high = (np.array([getattr(c, n)[-1] for c in curves]) for n in ("x", "mean", "low", "high"))
    bars = np.maximum([mean - low, high - mean], 0)  # a mean of equal numbers may be off by a rounding
    ax.errorbar(x, mean, yerr=bars, **look, capsize=1.5, elinewidth=0.7, capthick=0.7)


def small_words(ax, x, y, text, **place):
    ax.text(x, y, text, fontsize=6.5, color=DARK_GREY, **place)


def structure_style(structure):
    """Keywords of a line in a structure's colour with its marker."""
    _, colour, marker = STRUCTURES[structure]
    size = MARKER_SIZES.get(marker, 4.5)
    return dict(color=colour, marker=marker, markersize=size, markeredgecolor="white", markeredgewidth=0.4)


def line_styles(curves, lines=LINES):
    """{variant: line style}; raises BadInput if there are more variants than styles to tell them apart."""
    variants = list(dict.fromkeys(c.variant for c in curves if c.variant))
    if len(variants) > len(lines):
        several = f"{len(variants)} kinds of run per structure are too many for one picture ({'; '.join(variants)})"
        raise BadInput(f"{several}; choose with --only NAME=VALUE")
    return dict(zip(variants, lines, strict=False)) | {"": "-"}


def legend(ax, curves):
    """Below the axes: colour and marker of every structure, then the line of every variant."""
    both = structures, variants = handles(curves)
    columns = 2 if len(shown := structures + variants) > 1 and max(len(h.get_label()) for h in shown) <= 26 else 1
    if columns == 2 and variants:  # a column each
        rows = itertools.zip_longest(*both, fillvalue=line_key(" ", linestyle=""))
        shown = [*itertools.chain(*zip(*rows, strict=True))]
    below = ax.transAxes + ScaledTranslation(0, -0.42, ax.get_figure(root=True).dpi_scale_trans)
    place = dict(loc="upper center", bbox_to_anchor=(0.45, 0), bbox_transform=below, borderaxespad=0)
    ax.legend(handles=shown, ncols=columns, **place, **KEYS)


def shared_legend(axes, curves):
    """The same below all the panels of a figure."""
    shown = list(itertools.chain(*handles(curves)))
    legend_below(axes, shown, 5 * axes[0].get_gridspec().ncols // 2)


def legend_below(axes, shown, ncols):
    """These handles below all the panels of a figure, in at most so many columns, fewer where the figure is narrow."""
    figure = axes[0].get_figure(root=True)
    for columns in range(min(ncols, len(shown)), 0, -1):
        legend = figure.legend(handles=shown, ncols=columns, loc="outside lower center", **KEYS)
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


def handles(curves):
    """What a legend shows: a colour and marker for every structure, a line for every variant."""
    lines = line_styles(curves)
    structures = [structure_key(structure) for structure in dict.fromkeys(c.structure for c in curves)]
    variants = [line_key(v, linestyle=lines[v]) for v in dict.fromkeys(c.variant for c in curves if c.variant)]
    return structures, variants


def structure_key(structure, **look):
    """The handle of a structure in a legend, labelled with its name unless said otherwise."""
    return Line2D([], [], **dict(structure_style(structure), label=STRUCTURES[structure][0]) | look)


def line_key(label, **look):
    """The handle of a line in a legend, black unless said otherwise."""
    return Line2D([], [], **dict(color="black", linewidth=1) | look, label=label)


def log_log(ax, xlabel, ylabel):
    ax.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel)


def log_ticks(*axes):
    """Ticks of log axes that can be read over a tenth of a decade as well as over ten. Call it when all is drawn."""
    for axis in axes:
        low, high = sorted(axis.get_view_interval())
        for mantissas in TICKS:
            powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            if sum(low <= m * 10.0**p <= high for m in mantissas for p in powers) >= 3:
                axis.set_major_locator(LogLocator(subs=mantissas))
                break
        else:
            axis.set_major_locator(MaxNLocator(4 if axis.axis_name == "x" else 7, steps=[1, 2, 2.5, 5, 10]))
            axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: tick_text(value)))
        axis.set_minor_formatter(NullFormatter())


def tick_text(value):
    """0.05 -> 0.05, 20000 -> 2 x 10^4 in mathtext."""
    if value <= 0:
        return ""
    if 1e-3 <= value < 1e4:
        return f"{value:g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    power = f"10^{{{int(exponent)}}}"
    return f"${power}$" if float(mantissa) == 1 else f"${float(mantissa):g}\\times{power}$"


def label_ends(ax, ends):
    """Grey words right of the axes at heights ends = {text: y > 0}, moved apart where they would overlap.

    Call it when the scale and the limits stand; what ends above or below them gets an arrow.
    """
    gap = 0.06  # of the height of the axes
    low, high = (math.log(y) for y in ax.get_ylim())
    places = sorted([(math.log(y) - low) / (high - low), text] for text, y in ends.items())
    for place in places:
        place[1] += " \u2193" if place[0] < 0 else " \u2191" if place[0] > 1 else ""
        place[0] = min(max(place[0], 0.0), 1.0)
    for _ in range(100):
        for a, b in itertools.pairwise(places):
            push = max(0.0, gap - (b[0] - a[0])) / 2
            a[0], b[0] = a[0] - push, b[0] + push
    for place, text in places:
        small_words(ax, 1.02, place, text, transform=ax.transAxes, va="center")
