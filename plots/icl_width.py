"""In-context regression: the error at the last position of a prompt against the width of a head.

    python plots/icl_width.py out/icl_regression --out out/figures/icl_width.png

A panel for each n_dims, every point at the best of its learning rates. Left of the vertical line a head is narrower
than x: standard attention's scores then have a rank below n_dims, the bilinear ones do not. Hollow: the second of two
kinds of one structure, as one head beside eight. Dotted: predicting zero, and averaging the examples.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plots import style
from plots.icl_examples import ERROR, TASK, draw_levels, error_words, panels_of
from plots.names import ICL_SIZES
from plots.records import arguments, by_kind, check_same, runs_of, tuned
from plots.tables import final_table
from training.errors import BadInput, command
from training.settings import DEFAULT_HEAD


def head_width(settings):
    """r = d_model / n_head."""
    if settings["n_head"] == -1:
        return DEFAULT_HEAD if settings["d_head"] == -1 else settings["d_head"]
    return settings["d_model"] // settings["n_head"]


def face(variant, lines, colour="black"):
    """The markers of a variant: filled for the first of several, hollow for the others."""
    filled = variant in ("", *list(lines)[:1])
    return {} if filled else dict(markerfacecolor="white", markeredgewidth=1, markeredgecolor=colour)


def draw(ax, curves, lines):
    """One panel: a line through the widths of each kind of curve, the range of its seeds as a bar at every point."""
    runs = [run for curve in curves for run in curve.runs]
    check_same(runs, (*TASK, "eval_prompts"))
    for curve in curves:
        curve.set_end(ERROR, head_width(curve.settings))
    for alike in by_kind(curves):
        if len({curve.x[0] for curve in alike}) < len(alike):
            folders = " and ".join(str(c.runs[0].folder) for c in alike)
            raise BadInput(f"two points of one kind and head width among {folders}; choose with --only")
        look = style.structure_style(alike[0].structure)
        look |= face(alike[0].variant, lines, look["color"])
        style.draw_ends(ax, alike, **look, linestyle=lines[alike[0].variant], label=alike[0].label)
    ax.set(xscale="log", yscale="log", xlabel="width of a head, r", ylabel=error_words(runs))
    n_dims = runs[0].settings["n_dims"]
    ax.axvline(n_dims, color=style.GREY, linewidth=0.8, linestyle=(0, (4, 2)))
    style.small_words(ax, n_dims, 1.02, "r = n_dims", transform=ax.get_xaxis_transform(), ha="center")
    widths = sorted({int(c.x[0]) for c in curves} | {n_dims})
    ax.set_xticks(widths, map(str, widths))
    ax.minorticks_off()
    style.log_ticks(ax.yaxis)
    draw_levels(ax, runs)


def width_legend(axes, curves, lines):
    """Below all panels: structures, then the variants with their markers, and a line where one is drawn."""
    structures, _ = style.handles(curves)
    variants = []
    for variant in dict.fromkeys(curve.variant for curve in curves if curve.variant):
        drawn = any(len(kind) > 1 for kind in by_kind(curves) if kind[0].variant == variant)
        marker = dict(marker="o", markersize=4.5) | face(variant, lines)
        variants.append(style.line_key(variant, linestyle=lines[variant] if drawn else "", **marker))
    style.legend_below(axes, [*structures, *variants], 5)


@command
def main(argv=None):
    args = arguments(__doc__, "train_ICL.py").parse_args(argv)
    runs = runs_of(args, "train_ICL.py")
    panels = panels_of(runs, curves := tuned(runs, unnamed=ICL_SIZES))
    lines = style.line_styles(curves)
    with style.picture(args.out, panels=len(panels), columns=2) as axes:
        for ax, (n_dims, mine) in zip(axes, panels.items(), strict=True):
            draw(ax, mine, lines)
            ax.set_title(f"n_dims = {n_dims}", pad=12)
        width_legend(axes, curves, lines)
    for n_dims, mine in panels.items():
        in_lines = [curve for alike in by_kind(mine) for curve in alike]
        print(f"n_dims = {n_dims}\n{final_table(in_lines, ERROR, 'r')}")


if __name__ == "__main__":
    main()
