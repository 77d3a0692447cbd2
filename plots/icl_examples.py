"""In-context regression: the error of trained models against the number of examples they see, beside simple methods.

    python plots/icl_examples.py out/icl --out out/figures/icl_examples.png
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.ticker import MaxNLocator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plots.icl_compute import TASK
from plots.records import arguments, check_same, final_table, group, read_runs
from plots.style import GREY, draw_curves, label_ends, legend, log_ticks, picture
from training.errors import command

BASELINES = {  # key in the record: (words, line style)
    "least_squares": ("least squares", (0, (1, 1))),
    "ridge": ("ridge", (0, (4, 1, 1, 1))),
    "averaging": ("averaging", (0, (6, 2))),
    "nearest_neighbours": ("3 nearest", (0, (3, 1.5))),
    "zero": ("zero", "-"),
}


def draw(ax, runs, with_legend=True):
    """The last evaluation of every structure and width, and the baselines in grey; returns the curves."""
    check_same(runs, (*TASK, "eval_prompts", "ridge_alpha"))
    curves = group(runs)
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
    draw_curves(ax, curves, markers=lambda n: np.unique(np.linspace(0, n - 1, min(n, 6)).round().astype(int)).tolist())
    ax.set_ylim(0.6 * min(c.low.min() for c in curves), 1.6 * max(1.0, *(c.high.max() for c in curves)))
    ax.margins(x=0.02)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    log_ticks(ax.yaxis)
    label_ends(ax, ends)
    if with_legend:
        legend(ax, curves)
    return curves


def baselines(runs):
    """{name: errors by examples seen}; every run of a task records the same ones."""
    step, _ = runs[0].last("eval_pointwise/loss")
    return runs[0].evaluated["eval_pointwise/loss"][step].get("baselines", {})


@command
def main(argv=None):
    args = arguments(__doc__, "train_ICL.py").parse_args(argv)
    runs = read_runs(args.runs, "train_ICL.py", args.only)
    with picture(args.out) as (ax,):
        curves = draw(ax, runs)
    print(final_table(curves, f"error after {len(curves[0].x) - 1}"))
    print("baselines:", ", ".join(f"{BASELINES[name][0]} {errors[-1]:.3g}" for name, errors in baselines(runs).items()))


if __name__ == "__main__":
    main()
