"""Language model: validation loss against the compute spent on training, with power laws.

    python plots/lm_compute.py out/lm --out out/figures/lm_compute.png
    python plots/lm_compute.py out/lm --fit --x=non_emb_compute --x=gpu_seconds --widths --out out/lm_scaling.png

A curve for each structure and width at the best of its learning rates, --x given several times a panel for each.
--fit: instead of the curves the last point of every run, and through those of a structure the law of plots/lm_laws.py
with the band of its 95% interval; where the validation windows differ from seed to seed the points are moved by their
seed's offset, to where they would be on the windows of the mean seed. --widths: beside them a panel for each width,
with every run as it trains. Losses far above the last ones are cut off: the first steps say nothing about where the
curves end.

Times are those of one card: the one that most of the runs ran on.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plots.lm_laws import best_runs, comparable, fit_laws
from plots.records import (
    LM_LOSS,
    LM_RATE,
    STRUCTURES,
    X_AXES,
    arguments,
    check_same,
    final_table,
    read_runs,
    trace,
    tuned,
)
from plots.style import (
    LINES,
    draw_curves,
    legend,
    legend_below,
    line_key,
    log_ticks,
    picture,
    shared_legend,
    structure_key,
    structure_style,
)
from training.errors import command

HEADROOM = 1.2  # the highest loss shown, in units of the largest last one
MARGIN = 0.04  # of the length of an axis, beside and below what is drawn
CLOSE = 1.06  # the highest loss in a panel of one width, in units of the largest last one
LOSS_WORDS = "validation loss (nats per token)"
SYMBOLS = {"seconds": "t", "gpu_seconds": "t", "step": "n"}  # of x in a law; the others are C


def draw(ax, runs, x="non_emb_compute", with_legend=True):
    """One curve per structure and width, log-log; returns the curves. Times are of the runs on one card.

    Raises BadInput if the datasets differ.
    """
    check_same(runs, ["dataset", "validation", "val_tokens"])
    runs, card = comparable(runs, x)
    curves = trace(tuned(runs, LM_LOSS, LM_RATE), LM_LOSS, x)
    ax.set(xscale="log", yscale="log", xlabel=axis_words(x, card), ylabel=LOSS_WORDS)
    draw_curves(ax, curves, markers=lambda n: [n - 1])
    show_the_end(ax, curves)
    if with_legend:
        legend(ax, curves)
    return curves


def axis_words(x, card):
    return X_AXES[x] if card is None else f"{X_AXES[x]}, {card}"


def draw_laws(ax, runs, x):
    """The last point of every run, and the law of each structure behind its points; returns the Laws."""
    runs, card = comparable(runs, x)
    laws = fit_laws(runs, x)
    ax.set(xscale="log", yscale="log", xlabel=axis_words(x, card), ylabel=LOSS_WORDS)
    for structure in laws.structures:
        mine = laws.points[laws.points.structure == structure]
        colour = STRUCTURES[structure][1]
        spent = np.geomspace(mine.x.min() / 1.15, mine.x.max() * 1.15, 50)
        loss, low, high = laws.loss(structure, spent)
        ax.plot(spent, loss, color=colour, linewidth=1.1, zorder=2)
        ax.fill_between(spent, low, high, color=colour, alpha=0.12, linewidth=0, zorder=1)
        moved = mine.loss / np.exp(mine.seed.map(laws.offset))
        ax.plot(mine.x, moved, **structure_style(structure), linestyle="", zorder=3)
    for i, (width, mine) in enumerate(laws.points.groupby("width")):
        middle, place = np.exp(np.log(mine.x).mean()), dict(transform=ax.get_xaxis_transform(), ha="center")
        ax.text(middle, 1.02, str(width) if i else f"D = {width}", **place, fontsize=6.5, color="#555555")
    log_ticks(ax.xaxis)
    log_ticks(ax.yaxis)
    return laws


def draw_width(ax, runs, lines):
    """Every run of one width as it trains, its seed as the line's style: lines {seed: style}."""
    ends = []
    for run in sorted(runs, key=lambda run: list(STRUCTURES).index(run.structure)):
        path = [pair for step, pair in sorted(run.series(LM_LOSS, "non_emb_compute").items()) if step > 0]
        look = dict(color=STRUCTURES[run.structure][1], linestyle=lines[run.settings["seed"]])
        ax.plot(*zip(*path, strict=True), **look, linewidth=1)
        ends.append(path[-1])
    spent, losses = np.transpose(ends)
    ax.set(xscale="log", yscale="log", xlabel=X_AXES["non_emb_compute"], ylabel=LOSS_WORDS)
    ax.set_xlim(spent.min() / 6, spent.max() * 1.08)
    ax.set_ylim(losses.min() / 1.01, losses.max() * CLOSE)
    ax.set_title(f"D = {runs[0].settings['d_model']}", fontsize=8)
    log_ticks(ax.xaxis)
    log_ticks(ax.yaxis)


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


def laws_legend(axes, laws, lines):
    """Below all panels: each structure with its exponents, of {x: Laws}, and every seed of {seed: line style}."""
    notes = {}
    for x, found in laws.items():
        for structure in found.structures:
            b, low, high = found.exponent(structure)
            text = f"${SYMBOLS.get(x, 'C')}^{{-{b:.3f} \\pm {(high - low) / 2:.3f}}}$"
            notes[structure] = f"{notes[structure]}, {text}" if structure in notes else f": {text}"
    shown = [structure_key(s, notes[s], linestyle="-") for s in STRUCTURES if s in notes]
    shown += [line_key(f"seed {seed}", linestyle=style) for seed, style in lines.items()]
    legend_below(axes, shown, axes[0].get_gridspec().ncols)


def draw_fit(args, runs):
    """The picture of --fit: a panel for each --x and, with --widths, for each width."""
    xs = dict.fromkeys(args.x or ["non_emb_compute"])
    runs = best_runs(runs)
    widths = {}
    for run in sorted(runs, key=lambda run: run.settings["d_model"]) if args.widths else ():
        widths.setdefault(run.settings["d_model"], []).append(run)
    lines = dict(zip(sorted({run.settings["seed"] for run in runs}), LINES, strict=False)) if widths else {}
    with picture(args.out, panels=len(xs) + len(widths), columns=2 if widths else None) as axes:
        laws = {x: draw_laws(ax, runs, x) for ax, x in zip(axes, xs, strict=False)}
        for ax, mine in zip(axes[len(xs) :], widths.values(), strict=True):
            draw_width(ax, mine, lines)
        laws_legend(axes, laws, lines)


@command
def main(argv=None):
    parser = arguments(__doc__, "train.py", unfinished=True, at_step=True)
    words = "what the runs are compared at, a panel for each; default non_emb_compute"
    parser.add_argument("--x", action="append", choices=X_AXES, help=words)
    parser.add_argument("--fit", action="store_true", help="the last points and a power law of each structure")
    parser.add_argument("--widths", action="store_true", help="with --fit: also a panel for each width")
    args = parser.parse_args(argv)
    runs = read_runs(args.runs, "train.py", args.only, args.unfinished, args.at_step)
    xs = dict.fromkeys(args.x or ["non_emb_compute"])
    if args.fit:
        draw_fit(args, runs)
    else:
        with picture(args.out, panels=len(xs)) as axes:
            drawn = {x: draw(ax, runs, x, with_legend=False) for ax, x in zip(axes, xs, strict=True)}
            every = max(drawn.values(), key=len)  # of times there are those of one card only
            shared_legend(axes, every) if len(axes) > 1 else legend(axes[0], every)
        for x, curves in drawn.items():
            print(final_table(curves, LM_LOSS, x))
    for x in xs:
        if left := len(runs) - len(comparable(runs, x)[0]):
            print(f"{x}: {left} of {len(runs)} runs left out, which ran on another card")


if __name__ == "__main__":
    main()
