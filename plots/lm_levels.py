"""Language model: validation loss against the number of levels of MLR attention.

    python plots/lm_levels.py out/lm --only d_model=256 --only token_mixing_struct=low_rank \\
        --only token_mixing_struct=multi_level_low_rank --out out/figures/lm_levels.png

One level is standard attention, n levels are the n ranks of mlr_rank_list, all else the same. Each point is at the best
of its learning rates: the mean over seeds, and a bar from the lowest to the highest.
"""

import itertools
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plots.names import IGNORED, LM_LOSS, LM_RATE, LOSS_WORDS, MLR, STANDARD, STRUCTURES
from plots.records import arguments, check_same, runs_of, tuned
from plots.style import GREY, draw_ends, legend, log_ticks, picture, structure_style
from plots.tables import final_table
from training.errors import BadInput, command

RANKS = "mlr_rank_list"
FREE = IGNORED | {"token_mixing_struct", LM_RATE, RANKS}  # settings in which the runs may differ


def levels(settings):
    """The number of levels: 1 for standard attention, else that of the ranks."""
    return 1 if settings["token_mixing_struct"] == STANDARD else len(str(settings[RANKS]).split("|"))


def check_alike(runs):
    """Raises BadInput if the runs are of other structures, or differ in more than their ranks, rate and seed."""
    for run in runs:
        if run.structure not in (STANDARD, MLR):
            both = f"--only token_mixing_struct={STANDARD} --only token_mixing_struct={MLR}"
            raise BadInput(f"{run.folder} is a run of {STRUCTURES[run.structure][0]}, which has no levels; add {both}")
    names = sorted({name for run in runs for name in run.settings} - FREE)
    check_same(runs, [name for name in names if not name.startswith("mlr_")])
    check_same([run for run in runs if run.structure == MLR], [name for name in names if name.startswith("mlr_")])


def draw(ax, runs):
    """A point for each number of levels, and a line through them; returns the curves, by levels.

    Raises BadInput if two curves have as many levels, or if the runs differ in what is not in the picture.
    """
    check_alike(runs)
    curves = sorted(tuned(runs, LM_LOSS, LM_RATE), key=lambda curve: levels(curve.settings))
    for curve in curves:
        curve.set_end(LM_LOSS, levels(curve.settings))
    for a, b in itertools.pairwise(curves):
        if a.x[0] == b.x[0]:
            folders = f"{a.runs[0].folder} and {b.runs[0].folder}"
            raise BadInput(f"{folders} both have {a.x[0]:.0f} levels; choose with --only")
    x = [curve.x[0] for curve in curves]
    ax.plot(x, [curve.mean[0] for curve in curves], color=GREY, linewidth=0.9, zorder=1)
    for curve in curves:
        draw_ends(ax, [curve], **structure_style(curve.structure), linestyle="", label=curve.label)
    ax.set(yscale="log", xlabel="number of levels", ylabel=LOSS_WORDS)
    ax.set_xscale("log", base=2)
    ax.set_xticks(x, [f"{n:.0f}" for n in x])
    ax.minorticks_off()
    log_ticks(ax.yaxis)
    return curves


@command
def main(argv=None):
    args = arguments(__doc__, "train.py").parse_args(argv)
    runs = runs_of(args, "train.py")
    with picture(args.out) as (ax,):
        curves = draw(ax, runs)
        ax.set_title(f"D = {curves[0].d_model}")
        legend(ax, [replace(curve, variant="") for curve in curves])
    print(final_table(curves, LM_LOSS, "levels"))


if __name__ == "__main__":
    main()
