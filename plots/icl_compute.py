"""In-context regression: the error at the last position of a prompt against the compute spent on training.

    python plots/icl_compute.py results/icl_regression --out out/figures/icl_compute.png

A panel for each n_dims. Thin: every run. Thick: what a structure reaches with so much compute, the lowest of the means
over seeds of all its widths and learning rates.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plots.records import (
    ICL_RATE,
    ICL_SIZES,
    STRUCTURES,
    X_AXES,
    arguments,
    by_kind,
    by_setting,
    check_same,
    envelope,
    final_table,
    learning_curves,
    read_runs,
)
from plots.style import draw_curves, legend, line_styles, log_ticks, picture, shared_legend, structure_style
from training.errors import command

TASK = (
    "n_dims", "n_positions", "training_task", "noise_std", "task_sparsity", "task_hidden", "task_depth",
    "task_query_noise",
)  # fmt: skip


def draw(ax, runs, x="non_emb_compute", with_legend=True):
    """One curve per structure and width, log-log; returns the curves drawn. Raises BadInput if the tasks differ."""
    check_same(runs, TASK)
    curves = learning_curves(runs, "eval/last", x)
    log_axes(ax, runs, x)
    draw_curves(ax, curves, markers=lambda n: [n - 1])
    log_ticks(ax.xaxis)
    log_ticks(ax.yaxis)
    if with_legend:
        legend(ax, curves)
    return curves


def log_axes(ax, runs, x):
    ax.set(xscale="log", yscale="log", xlabel=X_AXES[x], ylabel=error_words(runs))


def error_words(runs):
    settings = runs[0].settings
    points = 2 * settings["n_dims"] if settings["n_positions"] == -1 else settings["n_positions"]
    return f"mean squared error\nafter {points - 1} examples"


def draw_envelopes(ax, curves, x, lines):
    """One panel: every run thin, the lower envelope of each kind of curve thick and with markers."""
    runs = [run for curve in curves for run in curve.runs]
    check_same(runs, TASK)
    log_axes(ax, runs, x)
    for curve in curves:
        for run in curve.runs:
            path = [pair for step, pair in sorted(run.series("eval/last", x).items()) if step > 0]
            look = dict(color=STRUCTURES[curve.structure][1], linestyle=lines[curve.variant])
            ax.plot(*zip(*path, strict=True), **look, linewidth=0.5, alpha=0.35)
    for alike in by_kind(curves):
        spent, error = envelope(alike)
        look = structure_style(alike[0].structure) | dict(linestyle=lines[alike[0].variant], linewidth=1.8)
        ax.plot(spent, error, **look, markevery=0.25, label=alike[0].label, zorder=3)
    log_ticks(ax.xaxis)
    log_ticks(ax.yaxis)


@command
def main(argv=None):
    parser = arguments(__doc__, "train_ICL.py", unfinished=True)
    axes = [x for x in X_AXES if x != "gpu_seconds"]  # prompts grow during training, and with them the pace changes
    parser.add_argument("--x", default="non_emb_compute", choices=axes, help="what the runs are compared at")
    args = parser.parse_args(argv)
    runs = read_runs(args.runs, "train_ICL.py", args.only, args.unfinished)
    check_same(runs, [name for name in TASK if name not in ICL_SIZES])
    curves = learning_curves(runs, "eval/last", args.x, unnamed=ICL_SIZES | {ICL_RATE})
    lines, panels = line_styles(curves), by_setting(curves, "n_dims")
    with picture(args.out, panels=len(panels), columns=2) as axes:
        for ax, (n_dims, mine) in zip(axes, panels.items(), strict=True):
            draw_envelopes(ax, mine, args.x, lines)
            ax.set_title(f"n_dims = {n_dims}", fontsize=8)
        shared_legend(axes, curves)
    for n_dims, mine in panels.items():
        named = learning_curves([run for curve in mine for run in curve.runs], "eval/last", args.x)
        print(f"n_dims = {n_dims}\n{final_table(named, 'eval/last', args.x)}")


if __name__ == "__main__":
    main()
