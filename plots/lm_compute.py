"""Language model: validation loss against the compute spent on training, and its power laws.

    python plots/lm_compute.py out/lm --fit --out out/figures/lm_compute.png
    python plots/lm_compute.py out/lm --fit --x=non_emb_compute --x=gpu_seconds --out out/figures/lm_scaling.png

A curve for each structure and width at the best of its learning rates, --x given several times a panel for each.
--fit: through the last point of every run of a structure, all widths and seeds, goes L = a C^-b, or L = a C^-b + c if
that has the lower AICc; b with its 95% confidence interval (plots/power_law.py). What is above 1.2 times the largest
last loss is cut off: the first steps say nothing about where the curves end. A structure of fewer than 3 widths has
no law. Below the numbers: what each structure needs of standard attention's x for the losses that both laws reached.

Times are those of one card: the one that most of the runs ran on.
"""

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plots import power_law
from plots.records import (
    LM_LOSS,
    LM_RATE,
    STRUCTURES,
    X_AXES,
    arguments,
    by_setting,
    check_same,
    final_table,
    read_runs,
    trace,
    tuned,
)
from plots.style import draw_curves, legend, line_styles, log_ticks, picture, shared_legend
from training.errors import BadInput, command

FEWEST_WIDTHS = 3  # of a power law
HEADROOM = 1.2  # the highest loss shown, in units of the largest last one
MARGIN = 0.04  # of the length of an axis, beside and below what is drawn
TIMES = ("seconds", "gpu_seconds")
BASELINE = "low_rank"
SYMBOLS = {"seconds": "t", "gpu_seconds": "t", "step": "n"}  # of x in a law; the others are C


def draw(ax, runs, x="non_emb_compute", fit=False, with_legend=True):
    """One curve per structure and width, log-log; returns the curves and their power laws, {structure: PowerLaw}.

    With `fit`, curves are faint and a line for each structure shows its law; widths then stand above the last points
    and not in the legend. Times are of the runs on one card. Raises BadInput if the datasets differ, or if there is
    nothing to fit.
    """
    check_same(runs, ["dataset"])
    runs, where = comparable(runs, x)
    curves = trace(tuned(runs, LM_LOSS, LM_RATE), LM_LOSS, x)
    laws = fit_laws(curves, x) if fit else {}
    ax.set(xscale="log", yscale="log", xlabel=where, ylabel="validation loss (nats per token)")
    solid = dict.fromkeys(line_styles(curves), "-")
    draw_curves(ax, curves, markers=lambda n: [n - 1], faint=fit, lines=solid if fit else None)
    for structure, law in laws.items():
        last = [c.x[-1] for c in curves if c.structure == structure]
        C = np.geomspace(min(last) / 1.3, max(last) * 1.3, 50)
        ax.plot(C, law(C), color=STRUCTURES[structure][1], linewidth=1.3, zorder=2.5)
    show_the_end(ax, curves)
    if fit:
        name_widths(ax, curves)
    if with_legend:
        show_legend([ax], curves, {x: laws})
    return curves, laws


def comparable(runs, x):
    """(the runs whose x compare, the words of the axis): of times those on the card that most of them ran on."""
    if x not in TIMES:
        return runs, X_AXES[x]
    card, _ = Counter(run.record.get("device") for run in runs).most_common(1)[0]
    return [run for run in runs if run.record.get("device") == card], f"{X_AXES[x]}, {card or 'card not known'}"


def show_the_end(ax, curves):
    """Limits and ticks: losses up to HEADROOM times the largest last one, from where the first curve is below that."""
    top = min(HEADROOM * max(c.mean[-1] for c in curves), ax.get_ylim()[1])
    starts = []
    for c in curves:
        below = np.argmax(c.mean <= top)
        near = slice(max(below - 1, 0), below + 1)  # the points on both sides of the crossing
        starts.append(np.interp(-np.log(top), -np.log(c.mean[near]), np.log(c.x[near])))
    (_, right), (low, _) = ax.dataLim.intervalx, ax.dataLim.intervaly
    left = np.exp(min(starts))
    if right / left > 1 + 1e-9:  # else every curve is one point
        ax.set_xlim(left / (right / left) ** MARGIN, right * (right / left) ** MARGIN)
    ax.set_ylim(low / (top / low) ** MARGIN, top)
    log_ticks(ax.xaxis)
    log_ticks(ax.yaxis)


def name_widths(ax, curves):
    """The widths above the axes, each over the middle of the last points of its curves."""
    for i, (width, mine) in enumerate(by_setting(curves, "d_model").items()):
        middle = np.exp(np.mean([np.log(c.x[-1]) for c in mine]))
        place = dict(transform=ax.get_xaxis_transform(), ha="center", fontsize=6.5, color="#555555")
        ax.text(middle, 1.02, str(width) if i else f"D = {width}", **place)


def show_legend(axes, curves, laws):
    """Below the axes: the structures with their exponents, {x: {structure: PowerLaw}}, and without laws the widths."""
    notes = {}
    for x, found in laws.items():
        for structure, law in found.items():
            text = law_words(law, SYMBOLS.get(x, "C"))
            notes[structure] = f"{notes[structure]}, {text}" if structure in notes else f": {text}"
    shown = [replace(curve, variant="") for curve in curves] if notes else curves
    if len(axes) == 1:
        legend(axes[0], shown, notes)
    else:
        shared_legend(axes, shown, notes)


def fit_laws(curves, x):
    """{structure: PowerLaw} through the last points of all runs of its curves, one curve for each of at least 3 widths.

    A structure of fewer widths has none; raises BadInput if that is every one of them.
    """
    laws, too_few = {}, []
    for structure in dict.fromkeys(c.structure for c in curves):
        name, mine = STRUCTURES[structure][0], [c for c in curves if c.structure == structure]
        width, count = Counter(c.d_model for c in mine).most_common(1)[0]
        if count > 1:
            raise BadInput(f"{name} has {count} curves of width {width}, a power law takes one; choose with --only")
        if len(mine) < FEWEST_WIDTHS:
            too_few.append(f"{name} has {len(mine)} (D = {', '.join(str(c.d_model) for c in mine)})")
            continue
        spent, losses = last_points(mine, x)
        if np.ptp(spent) == 0:
            raise BadInput(f"the runs of {name} all end at the same x, a power law needs others; choose another --x")
        laws[structure] = power_law.fit(spent, losses)
    if not laws:
        raise BadInput(f"a power law needs {FEWEST_WIDTHS} widths, {', '.join(too_few)}; make more with --d_model")
    return laws


def last_points(curves, x):
    """(x, loss) at the last evaluation of every run, two arrays."""
    return np.array([max(run.series(LM_LOSS, x).items())[1] for curve in curves for run in curve.runs], float).T


def law_words(law, symbol):
    """The exponent with its 95% confidence interval, in mathtext."""
    exponent = f"{symbol}^{{{-law.b:.3f} \\pm {law.half_width:.3f}}}"
    return f"${exponent} + {law.c:.2f}$" if law.c else f"${exponent}$"


def law_lines(curves, laws, x):
    """A line of text for every law: its numbers, what it was fitted to, and how well."""
    lines = []
    for structure, law in laws.items():
        mine = [c for c in curves if c.structure == structure]
        off, (low, high) = law.largest_deviation(*last_points(mine, x)), law.interval
        formula = f"L = {law.a:.4g} C^{-law.b:.4f}" + (f" + {law.c:.4g}" if law.c else "")
        lines.append(
            f"{STRUCTURES[structure][0]}: {formula} with C = {x}, b from {low:.4f} to {high:.4f} (95%); "
            f"{law.n} runs of {len(mine)} widths, off by at most {off:.2%}"
        )
    return lines


def share_lines(curves, laws, x):
    """What each structure needs of standard attention's x, by the two laws, at the ends of the losses they share."""
    if BASELINE not in laws:
        return []
    reached = {}  # structure: (lowest, highest) loss of its law where it was measured
    for structure, law in laws.items():
        spent, _ = last_points([c for c in curves if c.structure == structure], x)
        reached[structure] = law(max(spent)), law(min(spent))
    lines = []
    for structure, law in laws.items():
        (lowest, highest), (least, most) = reached[structure], reached[BASELINE]
        low, high = max(lowest, least), min(highest, most)
        if structure != BASELINE and low < high:
            shares = sorted(float(law.inverse(y) / laws[BASELINE].inverse(y)) for y in (low, high))
            lines.append(
                f"{STRUCTURES[structure][0]}: {shares[0]:.0%} to {shares[1]:.0%} of the {x} of standard attention for "
                f"the same loss, {low:.3f} to {high:.3f}, by the two laws"
            )
    return lines


@command
def main(argv=None):
    parser = arguments(__doc__, "train.py", unfinished=True, at_step=True)
    words = "what the runs are compared at, a panel for each; default non_emb_compute"
    parser.add_argument("--x", action="append", choices=X_AXES, help=words)
    parser.add_argument("--fit", action="store_true", help="fit a power law to the last points of each structure")
    args = parser.parse_args(argv)
    runs = read_runs(args.runs, "train.py", args.only, args.unfinished, args.at_step)
    panels = dict.fromkeys(args.x or ["non_emb_compute"])
    with picture(args.out, panels=len(panels)) as axes:
        for ax, x in zip(axes, panels, strict=True):
            panels[x] = draw(ax, runs, x, args.fit, with_legend=False)
        for ax in axes[1:]:
            ax.set_ylabel("")
        every = max((curves for curves, _ in panels.values()), key=len)  # of times there are those of one card only
        show_legend(axes, every, {x: laws for x, (_, laws) in panels.items()})
    for x, (curves, laws) in panels.items():
        told = [final_table(curves, LM_LOSS, x), *law_lines(curves, laws, x), *share_lines(curves, laws, x)]
        print("\n".join(told))
        if left := len(runs) - len(comparable(runs, x)[0]):
            print(f"{x}: {left} of {len(runs)} runs left out, which ran on another card")


if __name__ == "__main__":
    main()
