"""In-context regression: the error at the last position of a prompt against the width of a head.

    python plots/icl_width.py out/icl_regression --out out/figures/icl_width.png
    python plots/icl_width.py results/icl_regression --at-step=50000 --only d_model=64 --only d_model=128 --out a.png

A panel for each n_dims, every point at the best of its learning rates. Left of the vertical line a head is narrower
than x: standard attention's scores then have a rank below n_dims, the bilinear ones do not. --at-step compares runs,
and their learning rates, at one step of a common schedule instead of at their ends, which they need not have reached.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plots.icl_compute import TASK, error_words
from plots.icl_examples import baselines
from plots.records import (
    ICL_SIZES,
    arguments,
    by_kind,
    by_setting,
    check_same,
    final_table,
    read_runs,
    step_words,
    tuned,
)
from plots.style import GREY, label_ends, line_styles, log_ticks, picture, shared_legend, structure_style
from training.errors import BadInput, command
from training.settings import DEFAULT_HEAD


def head_width(settings):
    """r = d_model / n_head."""
    if settings["n_head"] == -1:
        return DEFAULT_HEAD if settings["d_head"] == -1 else settings["d_head"]
    return settings["d_model"] // settings["n_head"]


def draw(ax, curves, lines):
    """One panel: a line through the widths of each kind of curve, the range of its seeds as a bar at every point."""
    runs = [run for curve in curves for run in curve.runs]
    check_same(runs, (*TASK, "eval_prompts"))
    for curve in curves:
        curve.steps = [min(max(run.series("eval/last")) for run in curve.runs)]
        curve.set([head_width(curve.settings)], [[run.final("eval/last")] for run in curve.runs])
    for alike in by_kind(curves):
        numbers = ("x", "mean", "low", "high")
        x, mean, low, high = (np.concatenate([getattr(c, name) for c in alike]) for name in numbers)
        if len(set(x)) < len(x):
            folders = " and ".join(str(c.runs[0].folder) for c in alike)
            raise BadInput(f"two points of one kind and head width among {folders}; choose with --only")
        look = structure_style(alike[0].structure) | dict(linestyle=lines[alike[0].variant], label=alike[0].label)
        ax.errorbar(x, mean, yerr=[mean - low, high - mean], **look, capsize=1.5, elinewidth=0.7, capthick=0.7)
    ax.set(xscale="log", yscale="log", xlabel="width of a head, r", ylabel=error_words(runs))
    n_dims, zero = runs[0].settings["n_dims"], baselines(runs)["zero"][-1]
    ax.axvline(n_dims, color=GREY, linewidth=0.8, linestyle=(0, (4, 2)))
    ax.text(n_dims, 1.02, "r = n_dims", transform=ax.get_xaxis_transform(), color="#555555", fontsize=6.5, ha="center")
    ax.axhline(zero, color=GREY, linewidth=0.8)
    widths = sorted({int(c.x[0]) for c in curves} | {n_dims})
    ax.set_xticks(widths, map(str, widths))
    ax.minorticks_off()
    log_ticks(ax.yaxis)
    label_ends(ax, {"zero": zero})


@command
def main(argv=None):
    args = arguments(__doc__, "train_ICL.py", at_step=True).parse_args(argv)
    runs = read_runs(args.runs, "train_ICL.py", args.only, at_step=args.at_step)
    check_same(runs, [name for name in TASK if name not in ICL_SIZES])
    curves = tuned(runs, unnamed=ICL_SIZES)
    lines, panels = line_styles(curves), by_setting(curves, "n_dims")
    with picture(args.out, panels=len(panels), columns=2) as axes:
        for ax, (n_dims, mine) in zip(axes, panels.items(), strict=True):
            draw(ax, mine, lines)
            ax.set_title(f"n_dims = {n_dims}{step_words(args.at_step)}", fontsize=8, pad=12)
        shared_legend(axes, curves)
    for n_dims, mine in panels.items():
        in_lines = [curve for alike in by_kind(mine) for curve in alike]
        print(f"n_dims = {n_dims}{step_words(args.at_step)}\n{final_table(in_lines, 'eval/last', 'r')}")


if __name__ == "__main__":
    main()
