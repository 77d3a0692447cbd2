"""In-context regression: the error at the last position of a prompt against the compute spent on training.

    python plots/icl_compute.py out/icl --out out/figures/icl_compute.png
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plots.records import X_AXES, arguments, check_same, final_table, learning_curves, read_runs
from plots.style import draw_curves, legend, log_ticks, picture
from training.errors import command

TASK = ("n_dims", "n_positions", "training_task", "noise_std", "task_sparsity", "task_hidden", "task_depth")


def draw(ax, runs, x="non_emb_compute", with_legend=True):
    """One curve per structure and width, log-log; returns the curves drawn. Raises BadInput if the tasks differ."""
    check_same(runs, TASK)
    curves = learning_curves(runs, "eval/last", x)
    points = len(runs[0].last("eval_pointwise/loss")[1])
    ax.set(xscale="log", yscale="log", xlabel=X_AXES[x], ylabel=f"mean squared error\nafter {points - 1} examples")
    draw_curves(ax, curves, markers=lambda n: [n - 1])
    log_ticks(ax.xaxis)
    log_ticks(ax.yaxis)
    if with_legend:
        legend(ax, curves)
    return curves


@command
def main(argv=None):
    parser = arguments(__doc__, "train_ICL.py")
    parser.add_argument("--x", default="non_emb_compute", choices=X_AXES, help="what the runs are compared at")
    args = parser.parse_args(argv)
    runs = read_runs(args.runs, "train_ICL.py", args.only)
    with picture(args.out) as (ax,):
        curves = draw(ax, runs, args.x)
    print(final_table(curves, "eval/last", args.x))


if __name__ == "__main__":
    main()
