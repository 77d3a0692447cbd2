"""Language model: the validation loss by step of runs of one length, and when each is level with standard attention.

    python plots/lm_curves.py results/language_modeling --only max_iters=100000 --out results/lm_curves.png
    python plots/lm_curves.py results/language_modeling --only max_iters=100000      the table alone, in Markdown

A line for every structure and learning rate, the mean over seeds with the range as a band.
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plots.names import LM_ALIKE, LM_LOSS, LM_RATE, LOSS_WORDS, STANDARD
from plots.records import arguments, check_same, learning_curves, runs_of
from plots.style import draw_curves, legend, log_log, log_ticks, picture
from plots.tables import show
from training.errors import command

LATEST = 10  # evaluations in the mean of the last ones


def curves_of(runs):
    """The Curves of the runs, with their losses; named by what tells those of one structure apart."""
    check_same(runs, (*LM_ALIKE, "d_model"))
    return learning_curves(runs, LM_LOSS, "step")


def draw(ax, curves):
    """Log-log, from a tenth of the last step on: before that the losses tell little."""
    log_log(ax, "steps", LOSS_WORDS)
    draw_curves(ax, curves)
    last = max(curve.x[-1] for curve in curves)
    late = [curve.mean[curve.x >= last / 10] for curve in curves]
    ax.set_xlim(last / 10, last * 1.1)
    ax.set_ylim(0.99 * min(map(min, late)), 1.01 * max(map(max, late)))
    log_ticks(ax.xaxis, ax.yaxis)
    legend(ax, curves)


def rows(curves):
    """A row for every curve: its last loss, the mean of the last ones, and when it passes the best standard's."""
    standard = min((c for c in curves if c.structure == STANDARD), key=lambda c: c.mean[-1], default=None)
    names = ["seeds", "last loss", f"mean of the last {LATEST} evaluations", "step of standard attention's last loss"]
    table = [["attention", "d_model", "steps", "rate", *names]]
    for curve in curves:
        late = statistics.fmean(curve.mean[-LATEST:])
        table.append([
            curve.label, curve.d_model, f"{curve.steps[-1]:,}", f"{curve.settings[LM_RATE]:g}",
            " ".join(map(str, curve.seeds)), f"{curve.mean[-1]:.4f}", f"{late:.4f}", level_words(curve, standard),
        ])  # fmt: skip
    return table


def level_words(curve, standard):
    """The first evaluation at which a curve is at standard attention's last loss or below it."""
    if standard is None or curve is standard:
        return ""
    level = [step for step, loss in zip(curve.steps, curve.mean, strict=True) if loss <= standard.mean[-1]]
    return f"{level[0]:,}" if level else f"not by {curve.steps[-1]:,}"


@command
def main(argv=None):
    parser = arguments(__doc__, "train.py", out=False)
    parser.add_argument("--out", help="picture to write, as PNG and as SVG; without it the table is printed")
    args = parser.parse_args(argv)
    curves = curves_of(runs_of(args, "train.py"))
    if args.out:
        with picture(args.out) as (ax,):
            draw(ax, curves)
    else:
        show(rows(curves))


if __name__ == "__main__":
    main()
