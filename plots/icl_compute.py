"""In-context regression: the error at the last position of a prompt against the compute spent on training.

    python plots/icl_compute.py out/icl --out out/figures/icl_compute.png
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plots.records import X_AXES, check_same, final_table, learning_curves, read_runs
from plots.style import draw_curves, legend, log_ticks, picture
from training.errors import command

TASK = ("n_dims", "training_task", "noise_std", "n_positions", "task_sparsity", "task_hidden", "task_depth")  # of the error


def draw(ax, runs, x="non_emb_compute", with_legend=True):
    """One curve per structure and width, log-log; returns the curves drawn. Raises BadInput if the tasks differ."""
    check_same(runs, TASK)
    curves = learning_curves(runs, "eval/last", x)
    points = len(runs[0].last("eval_pointwise/loss")[1])
    ax.set(xscale="log", yscale="log", xlabel=X_AXES[x], ylabel=f"mean squared error after {points - 1} examples")
    draw_curves(ax, curves, markers=lambda n: [n - 1])
    log_ticks(ax.xaxis)
    log_ticks(ax.yaxis)
    if with_legend:
        legend(ax, curves)
    return curves


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders of runs of train_ICL.py, or folders that hold such folders")
    parser.add_argument("--out", required=True, help="picture to write, as PNG and as SVG")
    parser.add_argument("--x", default="non_emb_compute", choices=X_AXES, help="what the runs are compared at")
    parser.add_argument("--only", action="append", default=[], metavar="NAME=VALUE", help="draw only runs with this setting")
    args = parser.parse_args(argv)
    runs = read_runs(args.runs, "train_ICL.py", args.only)
    with picture(args.out) as (ax,):
        curves = draw(ax, runs, args.x)
    print(final_table(curves, "eval/last", args.x))


if __name__ == "__main__":
    main()
