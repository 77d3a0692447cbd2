"""In-context regression: the error at the last position of a prompt against the compute spent on training.

    python plots/icl_compute.py results/icl_regression --out out/figures/icl_compute.png

A panel for each n_dims. Thin: every run. Thick: what a structure reaches with so much compute, the lowest of the means
over seeds of all its widths and learning rates. Dotted: predicting zero, and averaging the examples.
"""

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plots import style
from plots.icl_examples import ERROR, TASK, draw_levels, error_words, panels_of
from plots.names import ICL_RATE, ICL_SIZES, X_AXES
from plots.records import arguments, by_kind, check_same, envelope, learning_curves, runs_of
from plots.tables import final_table
from training.errors import command


def draw(ax, curves, x, lines):
    """One panel: every run thin, the lower envelope of each kind of curve thick and with markers."""
    runs = [run for curve in curves for run in curve.runs]
    check_same(runs, TASK)
    style.log_log(ax, X_AXES[x], error_words(runs))
    for curve in curves:
        for run in curve.runs:
            style.draw_path(ax, run, ERROR, x, lines[curve.variant], linewidth=0.5, alpha=0.35)
    for alike in by_kind(curves):
        spent, error = envelope(alike)
        look = style.structure_style(alike[0].structure) | dict(linestyle=lines[alike[0].variant], linewidth=1.8)
        ax.plot(spent, error, **look, markevery=0.25, label=alike[0].label, zorder=3)
    style.log_ticks(ax.xaxis, ax.yaxis)
    draw_levels(ax, runs)


@command
def main(argv=None):
    parser = arguments(__doc__, "train_ICL.py")
    axes = [x for x in X_AXES if x != "gpu_seconds"]  # prompts grow during training, and with them the pace changes
    parser.add_argument("--x", default="non_emb_compute", choices=axes, help="what the runs are compared at")
    args = parser.parse_args(argv)
    runs = runs_of(args, "train_ICL.py")
    panels = panels_of(runs, curves := learning_curves(runs, ERROR, args.x, unnamed=ICL_SIZES | {ICL_RATE}))
    lines = style.line_styles(curves)
    with style.picture(args.out, [f"n_dims = {n_dims}" for n_dims in panels], columns=2) as axes:
        for ax, mine in zip(axes, panels.values(), strict=True):
            draw(ax, mine, args.x, lines)
        thin = style.line_key("one run", linewidth=0.5, alpha=0.6)
        thick = style.line_key("lowest mean of seeds with so much compute", linewidth=1.8)
        style.legend_below(axes, [*itertools.chain(*style.handles(curves)), thin, thick], 4)
    for n_dims, mine in panels.items():
        named = learning_curves([run for curve in mine for run in curve.runs], ERROR, args.x)
        print(f"n_dims = {n_dims}\n{final_table(named, ERROR, args.x)}")


if __name__ == "__main__":
    main()
