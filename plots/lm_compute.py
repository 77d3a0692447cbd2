"""Language model: validation loss against the compute spent on training, with power laws.

    python plots/lm_compute.py out/lm --out out/figures/lm_compute.png
    python plots/lm_compute.py out/lm --fit --x=non_emb_compute --x=gpu_seconds --out out/lm_scaling.png

A curve for each structure and width at the best of its learning rates, --x given several times a panel for each.
--fit: instead of the curves the last point of every run, and through those of a structure the law of plots/lm_laws.py
with the band of its 95% interval; where the validation windows differ from seed to seed the points are moved by their
seed's offset, to where they would be on the windows of the mean seed. Beside them a panel for each width, with every
run as it trains. Losses far above the last ones are cut off: the first steps say nothing about where the curves end.

Times are those of one card: the one that most of the runs ran on.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plots import style
from plots.lm_laws import best_runs, fit_laws
from plots.names import LM_LOSS, LM_RATE, LOSS_WORDS, STRUCTURES, X_AXES
from plots.records import arguments, by_setting, check_same, comparable, runs_of, trace, tuned
from plots.tables import final_table
from training.errors import command

HEADROOM = 1.2  # the highest loss shown, in units of the largest last one
MARGIN = 0.04  # of the length of an axis, beside and below what is drawn
CLOSE = 1.06  # the highest loss in a panel of one width, in units of the largest last one
SYMBOLS = {"seconds": "t", "gpu_seconds": "t", "step": "n"}  # of x in a law; the others are C


def draw(ax, runs, x="non_emb_compute"):
    """One curve per structure and width, log-log; returns the curves. Times are of the runs on one card.

    Raises BadInput if the datasets differ.
    """
    check_same(runs, ["dataset", "validation", "val_tokens"])
    runs, card = comparable(runs, x)
    curves = trace(tuned(runs, LM_LOSS, LM_RATE), LM_LOSS, x)
    style.log_log(ax, axis_words(x, card), LOSS_WORDS)
    style.draw_curves(ax, curves)
    show_the_end(ax, curves)
    return curves


def axis_words(x, card):
    return X_AXES[x] if card is None else f"{X_AXES[x]}, {card}"


def draw_laws(ax, runs, x):
    """The last point of every run, and the law of each structure behind its points; returns the Laws."""
    runs, card = comparable(runs, x)
    laws = fit_laws(runs, x)
    style.log_log(ax, axis_words(x, card), LOSS_WORDS)
    for structure in laws.structures:
        mine = laws.points[laws.points.structure == structure]
        colour = STRUCTURES[structure][1]
        spent = np.geomspace(mine.x.min() / 1.15, mine.x.max() * 1.15, 50)
        loss, low, high = laws.loss(structure, spent)
        ax.plot(spent, loss, color=colour, linewidth=1.1, zorder=2)
        ax.fill_between(spent, low, high, color=colour, alpha=0.12, linewidth=0, zorder=1)
        moved = mine.value / np.exp(mine.seed.map(laws.offset))
        ax.plot(mine.x, moved, **style.structure_style(structure), linestyle="", zorder=3)
    for i, (width, mine) in enumerate(laws.points.groupby("d_model")):
        middle, words = np.exp(np.log(mine.x).mean()), str(width) if i else f"D = {width}"
        style.small_words(ax, middle, 1.02, words, transform=ax.get_xaxis_transform(), ha="center")
    style.log_ticks(ax.xaxis, ax.yaxis)
    return laws


def draw_width(ax, runs, lines):
    """Every run of one width as it trains, its seed as the line's style: lines {seed: style}."""
    x, ends = "non_emb_compute", []
    for run in sorted(runs, key=lambda run: list(STRUCTURES).index(run.structure)):
        ends.append(style.draw_path(ax, run, LM_LOSS, x, lines[run.settings["seed"]], linewidth=1))
    spent, losses = np.transpose(ends)
    style.log_log(ax, X_AXES[x], LOSS_WORDS)
    ax.set_xlim(spent.min() / 6, spent.max() * 1.08)
    ax.set_ylim(losses.min() / 1.01, losses.max() * CLOSE)
    style.log_ticks(ax.xaxis, ax.yaxis)


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
    style.log_ticks(ax.xaxis, ax.yaxis)


def laws_legend(axes, laws, lines):
    """Below all panels: each structure with its exponents, of {x: Laws}, and every seed of {seed: line style}."""
    shown = []
    for s, (name, _, _) in STRUCTURES.items():
        found = [(SYMBOLS.get(x, "C"), law.exponent(s)) for x, law in laws.items() if s in law.structures]
        texts = [f"${x}^{{-{b:.3f} \\pm {(high - low) / 2:.3f}}}$" for x, (b, low, high) in found]
        shown += [style.structure_key(s, linestyle="-", label=f"{name}: {', '.join(texts)}")] if texts else []
    shown += [style.line_key(f"seed {seed}", linestyle=line) for seed, line in lines.items()]
    style.legend_below(axes, shown, axes[0].get_gridspec().ncols)


def draw_fit(out, runs, xs):
    """The picture of --fit: a panel for each of xs, and for each width."""
    runs = best_runs(runs)
    widths = by_setting(runs, "d_model")
    lines = dict(zip(sorted({run.settings["seed"] for run in runs}), style.LINES, strict=False))
    with style.picture(out, [*[""] * len(xs), *(f"D = {width}" for width in widths)], columns=2) as axes:
        laws = {x: draw_laws(ax, runs, x) for ax, x in zip(axes, xs, strict=False)}
        for ax, mine in zip(axes[len(xs) :], widths.values(), strict=True):
            draw_width(ax, mine, lines)
        laws_legend(axes, laws, lines)


@command
def main(argv=None):
    parser = arguments(__doc__, "train.py")
    words = "what the runs are compared at, a panel for each; default non_emb_compute"
    parser.add_argument("--x", action="append", choices=X_AXES, help=words)
    parser.add_argument("--fit", action="store_true", help="last points, the power law of each structure, and widths")
    args = parser.parse_args(argv)
    runs = runs_of(args, "train.py")
    xs = dict.fromkeys(args.x or ["non_emb_compute"])
    if args.fit:
        draw_fit(args.out, runs, xs)
    else:
        with style.picture(args.out, panels=len(xs)) as axes:
            drawn = {x: draw(ax, runs, x) for ax, x in zip(axes, xs, strict=True)}
            style.shared_legend(axes, max(drawn.values(), key=len))  # of times there are those of one card only
        for x, curves in drawn.items():
            print(final_table(curves, LM_LOSS, x))
    for x in xs:
        if left := len(runs) - len(comparable(runs, x)[0]):
            print(f"{x}: {left} of {len(runs)} runs left out, which ran on another card")


if __name__ == "__main__":
    main()
