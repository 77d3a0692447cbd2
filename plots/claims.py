"""The README's first table: what the paper claims and what the records here say of it, in Markdown.

    python plots/claims.py

Each claim stands with its interval (of 95%) and the number of its runs; the sections below it have the tables.
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plots.demo import find, name
from plots.icl_examples import ERROR, baselines
from plots.icl_table import kinds, of_one_kind
from plots.lm_curves import curves_of
from plots.lm_laws import fit_laws
from plots.lm_pairs import pairs, trend
from plots.lm_rates import lead_words, losses
from plots.names import MLR, STANDARD
from plots.records import grouped, learning_curves, plain_arguments, read_runs
from plots.speed_table import FLASH, PASSES, read, span
from plots.tables import show, student, within
from plots.ts_kinds import kinds_of
from plots.ts_pairs import CHRONOS_ERRORS, chronos_pairs, paired
from training.errors import command
from training.records import find_runs, shared_steps

RESULTS = Path(__file__).resolve().parents[1] / "results"
EIGHT_LEVELS = ("mlr_rank_list=32|8|6|4|4|4|4|2", "block_size=1024", "validation=random windows")


def in_context():
    """The error of each kind of run at the last step that all runs of a size have been evaluated at."""
    runs = read_runs([RESULTS / "icl_regression"], "train_ICL.py", unfinished=True)
    sizes = grouped(kinds(runs), lambda curve: (curve.settings["n_dims"], curve.d_model))
    words = [f"n_dims {n_dims}, d_model {d_model}: {standing(found)}" for (n_dims, d_model), found in sizes.items()]
    open_words = f"{len(runs)} runs of the original's protocol so far, none of its full length; {'; '.join(words)}"
    return f"**open** on the paper's task: {open_words}. **Seen** on another, noisy recall: {recall()}"


def recall():
    """The demo's mean errors."""
    runs, _ = find(RESULTS / "demo")
    curves = learning_curves(runs, ERROR, "step")
    words = [f"{name(curve)} ({curve.mean[-1]:.2f})" for curve in curves]
    return f"{', '.join(words)}, averaging ({baselines(runs)['averaging'][-1]:.2f}); {len(curves[0].runs)} seeds"


def standing(curves):
    """What curves of one size had come to at the last step that they share, each kind at its best rate."""
    step = shared_steps([run for curve in curves for run in curve.runs], ERROR)[-1]
    words = []
    for same in of_one_kind(curves):
        errors = min(([run.series(ERROR)[step][1] for run in curve.runs] for curve in same), key=statistics.median)
        words.append(f"{same[0].label} {statistics.median(errors):.2f} ({len(errors)} seed{'s' * (len(errors) > 1)})")
    return f"after {step:,} steps {', '.join(words)}"


def language():
    """The paired lead, its trend, the best rates, the long runs and the exponents."""
    at_one_rate = sorted((RESULTS / "language_modeling").glob("*_lr0.003_seed[12]"))
    runs = read_runs(at_one_rate, "train.py", ["max_iters=10000", *EIGHT_LEVELS])
    table = pairs(runs)[MLR]
    (mean, low, high, _), (slope, *ends) = student(table.lead), trend(table)
    tried = read_runs([RESULTS / "language_modeling"], "train.py", ["max_iters=10000", "seed=1", *EIGHT_LEVELS])
    long = read_runs([RESULTS / "language_modeling"], "train.py", ["max_iters=100000", EIGHT_LEVELS[2]])
    last = {curve.structure: curve.mean[-1] for curve in curves_of(long)}
    laws = fit_laws(runs)
    standard, mlr = (f"{b:.3f} {within(*ends)}" for b, *ends in map(laws.exponent, (STANDARD, MLR)))
    return (
        f"**seen** at equal steps: after 10,000 steps at rate 3e-3 MLR attention has the lower loss in "
        f"{(table.lead > 0).sum()} of {len(table)} pairs of runs, by {mean:.4f} nats a character "
        f"{within(low, high, '.4f')}; the lead shrinks with the width ({slope:+.3f} {within(*ends, '+.3f')} per unit "
        f"of ln d_model). {lead_words(losses(tried))} After 100,000 steps (d_model 256, one seed) the losses are "
        f"{last[MLR]:.3f} and {last[STANDARD]:.3f}. **Not seen**: a larger exponent ({mlr} against {standard})"
    )


def series():
    """Whether any difference between MLR and standard attention is one beyond seeds."""
    found = paired(kinds_of(read_runs([RESULTS / "time_series"], "train_TS.py")))
    values = [student(seeds)[3] for (label, _), seeds in found.items() if "MLR" in label and len(seeds) > 2]
    chronos = chronos_pairs(find_runs([RESULTS / "chronos"], "train_chronos.py"))[MLR]
    words = [f"{CHRONOS_ERRORS[name]} p {student(seeds)[3]:.2g}" for name, seeds in chronos.items()]
    ahead = all(value < 0 for name in ("test/mse", "test/wql") for value in chronos[name])
    return (
        f"**not seen** on ETTh1: over {len(values)} comparisons of three seeds the differences from standard attention "
        f"have p of {min(values):.2g} or more. A small Chronos is {'' if ahead else 'not '}ahead with MLR in all "
        f"{len(chronos['test/mse'])} pairs ({', '.join(words)})"
    )


def speed():
    """How the fused kernel compares with PyTorch's default attention, which comes first, and FlashAttention-2."""
    record = read(RESULTS / "bench" / "attention_h200.json")
    forward, both = (span(record, key) for key in PASSES.values())
    flash, memory = span(record, "both_ms", FLASH), span(record, "extra_MiB")
    card, slower = record["device"].removeprefix("NVIDIA "), " to ".join(f"{100 * (ratio - 1):.0f}" for ratio in both)
    return (
        f"on one {card} MLR attention trains {slower}% slower than PyTorch's default attention (cuDNN); forward it "
        f"takes {forward[0]:.2f} to {forward[1]:.2f} of its time, and {memory[0]:.2f} to {memory[1]:.2f} of its "
        f"memory; forward and backward it takes {flash[0]:.2f} to {flash[1]:.2f} of FlashAttention-2's time"
    )


CLAIMS = {  # what the paper says: (what the records say, where)
    "standard attention cannot regress in context where its heads are narrower than the input; bilinear BTT and MLR "
    "can": (in_context, "[In-context regression](results/icl_regression/README.md)"),
    "MLR attention scales better in language modeling than standard and sliding-window attention": (
        language, "[Language modeling](results/language_modeling/README.md)"
    ),
    "MLR attention helps long-range forecasting": (series, "[Time series](results/time_series/README.md)"),
    "": (speed, "[Speed](results/bench/README.md)"),
}  # fmt: skip


@command
def main(argv=None):
    plain_arguments(__doc__).parse_args(argv)
    show([["the paper", "here", ""], *([paper, here(), link] for paper, (here, link) in CLAIMS.items())])


if __name__ == "__main__":
    main()
