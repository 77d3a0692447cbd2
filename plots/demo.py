"""The demo's two pictures and its tables: noisy recall, and language modeling, from one seed or from several.

python plots/demo.py out/demo --out out/demo     the pictures, and what was reached
python plots/demo.py results/demo                tables in Markdown: every seed and the simple methods
"""

import itertools
import statistics
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plots import lm_compute, style
from plots.icl_examples import ERROR, TASK, baselines
from plots.icl_width import head_width
from plots.names import LM_LOSS, STANDARD, STRUCTURES
from plots.records import check_same, grouped, learning_curves, plain_arguments, read_runs
from plots.tables import columns, show
from training.errors import BadInput, command
from training.files import here

BASELINES = {  # key in the record: words; those that the picture shows
    "zero": "zero",
    "averaging": "averaging",
    "nearest_neighbour": "nearest\nneighbour",
}
LINES = ["-", (0, (4, 1.5))]  # of standard attention with the narrowest and the widest heads


def draw(recall, lm, folder):
    """Write recall and language_modeling, as PNG and SVG, into the folder."""
    check_same(recall, (*TASK, "eval_prompts", "d_model"))
    with style.picture(folder / "recall.png", panels=2) as (left, right):
        draw_steps(left, recall)
        draw_heads(right, recall)
    with style.picture(folder / "language_modeling.png", ["at equal steps", "at equal time"]) as (left, right):
        curves = lm_compute.draw(left, lm, x="step")
        lm_compute.draw(right, lm, x="seconds")
        left.set(xlabel="training steps", ylabel="validation loss (nats a character)")
        right.set(xlabel="training time on one CPU core (s)", ylabel="")
        style.shared_legend([left, right], curves)


def draw_steps(ax, runs):
    """Error against steps of the narrowest and the widest standard heads and of the bilinear forms."""
    widths = sorted(head_width(run.settings) for run in runs)
    shown = [r for r in runs if r.structure != STANDARD or head_width(r.settings) in (widths[0], widths[-1])]
    curves = learning_curves(shown, ERROR, "step")
    lines = style.line_styles(curves, LINES)
    style.draw_curves(ax, curves, lines)
    draw_baselines(ax, runs)
    ax.set(xlabel="training steps", ylabel="squared error at the query")
    ax.locator_params(axis="x", nbins=5)
    keys = [style.structure_key(c.structure, linestyle=lines[c.variant], label=name(c)) for c in curves]
    ax.get_figure(root=True).legend(handles=keys, ncols=2, loc="outside lower center", handlelength=2.6)


def name(curve):
    """standard, 8 heads of 4."""
    settings = curve.settings
    n, kind = settings["n_head"], "value head" if curve.structure.startswith("bilinear") else "head"
    return f"{STRUCTURES[curve.structure][0]}, {n} {kind}{'s' if n > 1 else ''} of {head_width(settings)}"


def draw_heads(ax, runs):
    """Error at the last step against the width of a head: a line through standard attention's, the others as points."""
    curves, n_dims = learning_curves(runs, ERROR, "step"), runs[0].settings["n_dims"]
    for curve in curves:
        curve.set_end(ERROR, head_width(curve.settings))
    for structure, mine in grouped(curves, lambda curve: curve.structure).items():
        style.draw_ends(ax, mine, **style.structure_style(structure))
    draw_baselines(ax, runs)
    for key, words in BASELINES.items():
        style.small_words(ax, 1.02, baselines(runs)[key][-1], words, transform=ax.get_yaxis_transform(), va="center")
    ax.axvline(n_dims, color=style.GREY, linewidth=0.8, linestyle=(0, (1, 2)))
    style.small_words(ax, n_dims, 1.02, "as wide as x", transform=ax.get_xaxis_transform(), ha="center")
    widths = sorted({head_width(run.settings) for run in runs})
    ax.set(xscale="log", xlabel="width of a head (BTT, MLR: of a value head)")
    ax.set_xticks(widths, map(str, widths))
    ax.minorticks_off()


def draw_baselines(ax, runs):
    for key in BASELINES:
        ax.axhline(baselines(runs)[key][-1], color=style.GREY, linewidth=0.6, zorder=0)
    ax.set_ylim(-0.03, 1.1)


def recall_rows(runs):
    """A row for every kind of model, then for every simple method: mean, the seeds in order, parameters."""
    curves = learning_curves(runs, ERROR, "step")
    rows = [[f"squared error at the query, {curves[0].steps[-1]:,} steps", "mean", "every seed", "parameters"]]
    for curve in curves:
        errors = [run.final(ERROR) for run in curve.runs]
        parameters = f"{curve.runs[0].record['parameters']['total']:,}"
        rows.append([name(curve), f"{statistics.fmean(errors):.3f}", ", ".join(f"{e:.3f}" for e in errors), parameters])
    return rows + [[key.replace("_", " "), f"{errors[-1]:.3f}", "", ""] for key, errors in baselines(runs).items()]


def lm_rows(runs):
    """Rows of the structures after equal steps, half the time that all runs of a seed had, and all of it."""
    curves = learning_curves(runs, LM_LOSS, "step")
    steps = min(c.steps[-1] for c in curves)
    by_seed = grouped(runs, lambda run: run.settings["seed"])  # which trained side by side, other seeds at another pace
    seconds = {seed: min(run.seconds for run in same) for seed, same in by_seed.items()}
    ends = sorted({min(seconds.values()), max(seconds.values())})
    moments = [
        ("step", dict.fromkeys(seconds, steps), f"{steps:,} steps"),
        ("seconds", {seed: t / 2 for seed, t in seconds.items()}, "half the time"),
        ("seconds", seconds, f"{' to '.join(f'{t:.0f}' for t in ends)} s"),
    ]
    rows = [["validation loss, nats a character", "mean", "range"]]
    for (x, at, words), curve in itertools.product(moments, curves):
        losses = losses_at(curve.runs, x, at)
        span = f"{min(losses):.3f} to {max(losses):.3f}" if len(losses) > 1 else ""
        rows.append([f"{STRUCTURES[curve.structure][0]} after {words}", f"{np.mean(losses):.3f}", span])
    return rows


def losses_at(runs, x, at):
    """Loss of every run where its x is at[seed], on the straight line between two evaluations."""
    pairs = [(at[run.settings["seed"]], sorted(run.series(LM_LOSS, x).values())) for run in runs]
    return [float(np.interp(where, *zip(*series, strict=True))) for where, series in pairs]


def find(folder):
    """The runs of noisy recall and of language models in a folder of the demo, or in several such folders of one."""
    found = [sorted(folder.rglob(f"{kind}_*/run.json")) for kind in ("recall", "lm")]
    if not all(found):
        raise BadInput(f"no runs recall_* and lm_* in {folder}; make them with: python {here('scripts/demo.py')}")
    recall, lm = ([record.parent for record in records] for records in found)
    return read_runs(recall, "train_ICL.py"), read_runs(lm, "train.py")


@command
def main(argv=None):
    parser = plain_arguments(__doc__)
    parser.add_argument("folder", type=Path, help="what scripts/demo.py made, or a folder of several such folders")
    parser.add_argument("--out", type=Path, help="folder of the pictures; without it tables are printed in Markdown")
    args = parser.parse_args(argv)
    recall, lm = find(args.folder)
    tables = recall_rows(recall), lm_rows(lm)
    if args.out:
        print("\n\n".join(columns(*table) for table in tables), "\n\npictures:")
        draw(recall, lm, args.out)
    else:
        show(*tables)


if __name__ == "__main__":
    main()
