"""The demo's two pictures and its table: noisy recall, and language modelling, from one seed or from several.

    python plots/demo.py out/demo --out out/demo
    python plots/demo.py results/demo --out results
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from matplotlib.lines import Line2D

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plots import lm_compute
from plots.icl_examples import TASK, baselines
from plots.icl_width import head_width
from plots.records import LM_LOSS, STRUCTURES, check_same, learning_curves, read_runs, table
from plots.style import GREY, draw_curves, picture, shared_legend, structure_style
from training.errors import BadInput, command

BASELINES = {  # key in the record: words; those that the picture shows
    "zero": "zero",
    "averaging": "averaging",
    "nearest_neighbour": "nearest\nneighbour",
}
LINES = ["-", (0, (4, 1.5))]  # of standard attention with the narrowest and the widest heads


def draw(recall, lm, folder):
    """Write recall and language_modelling, as PNG and SVG, into the folder."""
    check_same(recall, (*TASK, "eval_prompts", "d_model"))
    with picture(folder / "recall.png", panels=2) as (left, right):
        draw_steps(left, recall)
        draw_heads(right, recall)
    with picture(folder / "language_modelling.png", panels=2) as (left, right):
        curves = lm_compute.draw(left, lm, x="step", with_legend=False)
        lm_compute.draw(right, lm, x="seconds", with_legend=False)
        left.set(xlabel="training steps", ylabel="validation loss (nats a character)")
        right.set(xlabel="training time on one CPU core (s)", ylabel="")
        for ax, words in ((left, "at equal steps"), (right, "at equal time")):
            ax.set_title(words, fontsize=8)
        shared_legend([left, right], curves)


def draw_steps(ax, runs):
    """Error against steps of the narrowest and the widest standard heads and of the bilinear forms."""
    widths = {head_width(run.settings) for run in runs}
    ends = min(widths), max(widths)
    shown = [run for run in runs if run.structure != "low_rank" or head_width(run.settings) in ends]
    curves = learning_curves(shown, "eval/last", "step")
    lines = dict(zip(dict.fromkeys(curve.variant for curve in curves if curve.variant), LINES, strict=False))
    draw_curves(ax, curves, markers=lambda n: [n - 1], lines=lines | {"": "-"})
    draw_baselines(ax, runs)
    ax.set(xlabel="training steps", ylabel="squared error at the query")
    ax.locator_params(axis="x", nbins=5)
    ax.get_figure(root=True).legend(
        handles=[look_of(curve, lines) for curve in curves], ncols=2, loc="outside lower center", handlelength=2.6
    )


def look_of(curve, lines):
    look = structure_style(curve.structure) | dict(linestyle=lines.get(curve.variant, "-"))
    return Line2D([], [], **look, label=f"{STRUCTURES[curve.structure][0]}, {heads(curve.settings)}")


def heads(settings):
    """8 heads of 4."""
    n, kind = settings["n_head"], "value head" if settings["token_mixing_struct"].startswith("bilinear") else "head"
    return f"{n} {kind}{'s' if n > 1 else ''} of {head_width(settings)}"


def draw_heads(ax, runs):
    """Error at the last step against the width of a head: a line through standard attention's, the others as points."""
    curves, n_dims = learning_curves(runs, "eval/last", "step"), runs[0].settings["n_dims"]
    for structure in dict.fromkeys(curve.structure for curve in curves):
        mine = [curve for curve in curves if curve.structure == structure]
        x = [head_width(curve.settings) for curve in mine]
        mean, low, high = (np.array([getattr(c, name)[-1] for c in mine]) for name in ("mean", "low", "high"))
        bars = dict(yerr=[mean - low, high - mean], capsize=1.5, elinewidth=0.7, capthick=0.7)
        ax.errorbar(x, mean, **structure_style(structure), **bars)
    draw_baselines(ax, runs)
    for name, words in BASELINES.items():
        level = baselines(runs)[name][-1]
        ax.text(1.02, level, words, transform=ax.get_yaxis_transform(), va="center", fontsize=6.5, color="#555555")
    ax.axvline(n_dims, color=GREY, linewidth=0.8, linestyle=(0, (1, 2)))
    top = dict(transform=ax.get_xaxis_transform(), ha="center", fontsize=6.5, color="#555555")
    ax.text(n_dims, 1.02, "as wide as x", **top)
    widths = sorted({head_width(run.settings) for run in runs})
    ax.set(xscale="log", xlabel="width of a head (BTT, MLR: of a value head)")
    ax.set_xticks(widths, map(str, widths))
    ax.minorticks_off()


def draw_baselines(ax, runs):
    for name in BASELINES:
        ax.axhline(baselines(runs)[name][-1], color=GREY, linewidth=0.6, zorder=0)
    ax.set_ylim(-0.03, 1.1)


def summary(recall, lm):
    """The two tables: every method of the recall task; the language models at equal steps and at equal time."""
    first = table(["noisy recall: squared error", "mean", "range", "steps", "seconds"], recall_rows(recall))
    return f"{first}\n\n{table(['language model: validation loss', 'mean', 'range'], lm_rows(lm))}"


def recall_rows(runs):
    simple = reversed(baselines(runs).items())
    rows = [[name.replace("_", " "), f"{errors[-1]:.3f}", "", "", ""] for name, errors in simple]
    for curve in learning_curves(runs, "eval/last", "step"):
        name = f"{STRUCTURES[curve.structure][0]}, {heads(curve.settings)}"
        rows.append([name, *reached([run.final("eval/last") for run in curve.runs]), *cost(curve)])
    return rows


def lm_rows(runs):
    curves = learning_curves(runs, LM_LOSS, "step")
    steps, seconds = min(c.steps[-1] for c in curves), common_seconds(runs)
    all_of_it = " to ".join(f"{t:.0f}" for t in sorted({min(seconds.values()), max(seconds.values())}))
    moments = [
        ("step", dict.fromkeys(seconds, steps), f"{steps:,} steps"),
        ("seconds", {seed: t / 2 for seed, t in seconds.items()}, "half the time"),
        ("seconds", seconds, f"{all_of_it} s"),
    ]
    return [
        [f"{STRUCTURES[curve.structure][0]} after {words}", *reached(losses_at(curve.runs, x, at))]
        for x, at, words in moments
        for curve in curves
    ]


def reached(values):
    """Mean and range; one value has no range."""
    low, high = (f"{f(values):.3f}" for f in (min, max))
    return [f"{np.mean(values):.3f}", f"{low} to {high}" if len(values) > 1 else ""]


def cost(curve):
    return [f"{curve.steps[-1]:,}", f"{np.mean([run.seconds for run in curve.runs]):.0f}"]


def common_seconds(runs):
    """{seed: the training time that all its runs had}: they trained side by side, other seeds at another pace."""
    seeds = {run.settings["seed"] for run in runs}
    return {seed: min(run.seconds for run in runs if run.settings["seed"] == seed) for seed in seeds}


def losses_at(runs, x, at):
    """Loss of every run where its x is at[seed], on the straight line between two evaluations."""
    pairs = [(at[run.settings["seed"]], sorted(run.series(LM_LOSS, x).values())) for run in runs]
    return [float(np.interp(where, *zip(*series, strict=True))) for where, series in pairs]


def find(folder):
    """The runs of noisy recall and of language models in a folder of the demo, or in several such folders of one."""
    found = {kind: sorted(folder.rglob(f"{kind}_*/run.json")) for kind in ("recall", "lm")}
    for kind, records in found.items():
        if not records:
            raise BadInput(f"no run {kind}_* in {folder}; make them with: python scripts/demo.py")
    recall, lm = ([str(record.parent) for record in found[kind]] for kind in ("recall", "lm"))
    return read_runs(recall, "train_ICL.py"), read_runs(lm, "train.py")


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what scripts/demo.py made, or a folder of several such folders")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    args = parser.parse_args(argv)
    recall, lm = find(args.folder)
    print(summary(recall, lm))
    draw(recall, lm, args.out)


if __name__ == "__main__":
    main()
