"""In-context regression: the error of trained models against the number of examples they see, beside simple methods.

    python plots/icl_examples.py results/icl_regression --out out/figures/icl_examples.png

A panel for each n_dims, with the largest width that all its structures were trained at (--only d_model=.. for another),
at the best of their learning rates.
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.ticker import MaxNLocator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.icl_regression.tasks import QUERY_TASKS
from plots.icl_compute import TASK
from plots.records import ICL_SIZES, arguments, by_kind, by_setting, check_same, final_table, read_runs, tuned
from plots.style import GREY, draw_curves, label_ends, legend, line_styles, log_ticks, picture, shared_legend
from training.errors import BadInput, command

BASELINES = {  # key in the record: (words, line style)
    "least_squares": ("least squares", (0, (1, 1))),
    "ridge": ("ridge", (0, (4, 1, 1, 1))),
    "averaging": ("averaging", (0, (6, 2))),
    "nearest_neighbours": ("3 nearest", (0, (3, 1.5))),
    "zero": ("zero", "-"),
}


def draw(ax, curves, lines=None, with_legend=True):
    """The last evaluation of every curve, and the baselines in grey."""
    runs = [run for curve in curves for run in curve.runs]
    check_same(runs, (*TASK, "eval_prompts", "ridge_alpha"))
    if (task := runs[0].settings["training_task"]) in QUERY_TASKS:
        raise BadInput(f"{task} is measured at its query alone; plots/icl_compute.py and plots/icl_width.py draw it")
    for curve in curves:
        steps, errors = zip(*(run.last("eval_pointwise/loss") for run in curve.runs), strict=True)
        curve.steps = [min(steps)]
        curve.set(np.arange(len(errors[0])), errors)
    ax.set(yscale="log", xlabel="in-context examples seen", ylabel="mean squared error")
    ends = {}
    for name, errors in baselines(runs).items():
        words, dashes = BASELINES[name]
        ax.plot(errors, color=GREY, linewidth=0.8, linestyle=dashes, label=words)
        ends[words] = errors[-1]
    draw_curves(ax, curves, six_of, lines=lines)
    ax.set_ylim(0.6 * min(c.low.min() for c in curves), 1.6 * max(1.0, *(c.high.max() for c in curves)))
    ax.margins(x=0.02)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    log_ticks(ax.yaxis)
    label_ends(ax, ends)
    if with_legend:
        legend(ax, curves)


def six_of(n):
    """At most six places of n, evenly spread, both ends among them."""
    return np.unique(np.linspace(0, n - 1, min(n, 6)).round().astype(int)).tolist()


def baselines(runs):
    """{name: errors by examples seen}; every evaluation of a task has the same ones, that a record keeps once."""
    return next((line["baselines"] for line in reversed(runs[0].metrics) if "baselines" in line), {})


def widest(curves):
    """The curves of the largest width that every structure and variant has."""
    widths = [{curve.d_model for curve in alike} for alike in by_kind(curves)]
    common = set.intersection(*widths)
    if not common:
        raise BadInput(f"no width is in all of {widths} at n_dims = {curves[0].settings['n_dims']}; choose with --only")
    return [curve for curve in curves if curve.d_model == max(common)]


@command
def main(argv=None):
    args = arguments(__doc__, "train_ICL.py", unfinished=True).parse_args(argv)
    runs = read_runs(args.runs, "train_ICL.py", args.only, args.unfinished)
    check_same(runs, [name for name in TASK if name not in ICL_SIZES])
    curves = tuned(runs, unnamed=ICL_SIZES)
    lines = line_styles(curves)
    panels = {n_dims: widest(mine) for n_dims, mine in by_setting(curves, "n_dims").items()}
    with picture(args.out, panels=len(panels), columns=2) as axes:
        for ax, (n_dims, mine) in zip(axes, panels.items(), strict=True):
            draw(ax, mine, lines, with_legend=False)
            ax.set_title(f"n_dims = {n_dims}, D = {mine[0].d_model}", fontsize=8)
        shared_legend(axes, curves)
    for n_dims, mine in panels.items():
        print(f"n_dims = {n_dims}, D = {mine[0].d_model}")
        print(final_table(mine, f"error after {len(mine[0].x) - 1}"))
        found = baselines(mine[0].runs).items()
        print("baselines:", ", ".join(f"{BASELINES[name][0]} {errors[-1]:.3g}" for name, errors in found))


if __name__ == "__main__":
    main()
