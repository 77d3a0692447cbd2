"""In-context regression: the error of trained models against the number of examples they see, beside simple methods.

    python plots/icl_examples.py results/icl_regression --out out/figures/icl_examples.png

A panel for each n_dims and width (some of them: --only d_model=..), every curve at the best of its learning rates.
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.ticker import MaxNLocator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.icl_regression.tasks import QUERY_TASKS
from plots.names import ICL_SIZES
from plots.records import arguments, by_setting, check_same, runs_of, tuned
from plots.style import GREY, draw_curves, label_ends, line_styles, log_ticks, picture, shared_legend
from plots.tables import final_table
from training.errors import BadInput, command, reading

ERROR = "eval/last"  # the error at the last position of a prompt
TASK = (
    "n_dims", "n_positions", "training_task", "noise_std", "task_sparsity", "task_hidden", "task_depth",
    "task_query_noise",
)  # fmt: skip
BASELINES = {  # key in the record: words
    "least_squares": "least squares",
    "ridge": "ridge",
    "averaging": "averaging",
    "nearest_neighbours": "3 nearest",
    "zero": "zero",
}
LEVELS = ("zero", "averaging")  # baselines that other figures draw as lines at their last error
DOTS = dict(color=GREY, linewidth=0.9, linestyle=(0, (1, 1.2)))  # of every baseline; their names stand at their ends


def draw(ax, curves, lines=None):
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
    found = {BASELINES[name]: errors for name, errors in baselines(runs).items()}
    for name, errors in found.items():
        ax.plot(errors, **DOTS, label=name)
    draw_curves(ax, curves, lines, markers=lambda n: np.unique(np.linspace(0, n - 1, 6).round().astype(int)))
    ax.set_ylim(0.6 * min(c.low.min() for c in curves), 1.6 * max(1.0, *(c.high.max() for c in curves)))
    ax.margins(x=0.02)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    log_ticks(ax.yaxis)
    label_ends(ax, {name: errors[-1] for name, errors in found.items()})


def draw_levels(ax, runs):
    """Horizontal lines at the last errors of predicting zero and of averaging the examples, named at the right."""
    found = baselines(runs)
    levels = {BASELINES[name]: found[name][-1] for name in LEVELS if name in found}
    for error in levels.values():
        ax.axhline(error, **DOTS, zorder=0)
    label_ends(ax, levels)


def error_words(runs):
    """The label of an axis of ERROR."""
    settings = runs[0].settings
    points = 2 * settings["n_dims"] if settings["n_positions"] == -1 else settings["n_positions"]
    return f"mean squared error\nafter {points - 1} examples"


def panels_of(runs, curves):
    """{n_dims: curves}, ascending. Raises BadInput if the tasks differ in more."""
    check_same(runs, [name for name in TASK if name not in ICL_SIZES])
    return by_setting(curves, "n_dims")


def baselines(runs):
    """{name: errors by examples seen}; every evaluation of a task has the same ones, that a record keeps once."""
    with reading(runs[0].folder / "metrics.jsonl"):
        kept = next((line["baselines"] for line in reversed(runs[0].metrics) if "baselines" in line), {})
        return {name: [float(error) for error in errors] for name, errors in kept.items()}


@command
def main(argv=None):
    args = arguments(__doc__, "train_ICL.py").parse_args(argv)
    runs = runs_of(args, "train_ICL.py")
    panels = panels_of(runs, curves := tuned(runs, unnamed=ICL_SIZES))
    panels = {
        f"n_dims = {n_dims}, D = {d_model}": alike
        for n_dims, mine in panels.items() for d_model, alike in by_setting(mine, "d_model").items()
    }  # fmt: skip
    with picture(args.out, panels=len(panels), columns=min(3, len(panels))) as axes:
        for ax, (title, mine) in zip(axes, panels.items(), strict=True):
            draw(ax, mine, line_styles(curves))
            steps = sorted({curve.steps[-1] for curve in mine})
            words = f"step {steps[0]:,}" if len(steps) == 1 else f"steps {steps[0]:,} to {steps[-1]:,}"
            ax.set_title(f"{title}\n{words}")
        shared_legend(axes, curves)
    for title, mine in panels.items():
        print(f"{title}\n{final_table(mine, f'error after {len(mine[0].x) - 1}')}")
        found = baselines(mine[0].runs).items()
        print("baselines:", ", ".join(f"{BASELINES[name]} {errors[-1]:.3g}" for name, errors in found))


if __name__ == "__main__":
    main()
