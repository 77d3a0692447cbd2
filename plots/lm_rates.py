"""Language model: the last loss at every learning rate, and the lead at each structure's best, in Markdown.

    python plots/lm_rates.py results/language_modeling --only seed=1 --only max_iters=10000 --only block_size=1024

A cell has all runs of that rate, those made again too: how far they are apart is what one run is worth. The best rate
is that of the lowest mean.
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plots.lm_laws import BASELINE
from plots.records import (
    LM_LOSS,
    LM_RATE,
    STRUCTURES,
    check_same,
    listed,
    markdown,
    prose,
    read_runs,
    run_arguments,
)
from training.errors import command

MLR = "multi_level_low_rank"
ALIKE = ("dataset", "validation", "val_tokens", "block_size", "max_iters", "seed")


def losses(runs):
    """{width: {structure: {rate: last losses}}}, all ascending but the structures, in the order of STRUCTURES."""
    check_same(runs, ALIKE)
    place = list(STRUCTURES).index
    found = {}
    for run in sorted(runs, key=lambda r: (r.settings["d_model"], place(r.structure), r.settings[LM_RATE])):
        rates = found.setdefault(run.settings["d_model"], {}).setdefault(run.structure, {})
        rates.setdefault(run.settings[LM_RATE], []).append(run.final(LM_LOSS))
    return {
        width: {s: {rate: sorted(values) for rate, values in rates.items()} for s, rates in mine.items()}
        for width, mine in found.items()
    }


def best(rates):
    """(rate, its mean loss): the lowest."""
    means = {rate: statistics.fmean(values) for rate, values in rates.items()}
    return min(means.items(), key=lambda item: item[1])


def rows(found):
    """A row for every width and structure with several rates; the best rate in bold."""
    rates = sorted({rate for mine in found.values() for tried in mine.values() for rate in tried})
    table = [["d_model", "attention", *(f"{rate:g}" for rate in rates)]]
    for width, mine in found.items():
        for structure, tried in mine.items():
            if len(tried) > 1:
                texts = {rate: ", ".join(f"{loss:.4f}" for loss in values) for rate, values in tried.items()}
                texts[best(tried)[0]] = f"**{texts[best(tried)[0]]}**"
                table.append([width, STRUCTURES[structure][0], *(texts.get(rate, "") for rate in rates)])
    return table


def lead_words(found):
    """MLR's lead with each structure at the best of several rates, by width."""
    leads = {}
    for width, mine in found.items():
        if all(len(mine.get(s, ())) > 1 for s in (BASELINE, MLR)):
            leads[width] = best(mine[BASELINE])[1] - best(mine[MLR])[1]
    if not leads:
        return ""
    told = listed([f"{lead:.3f} nats at d_model {width}" for width, lead in leads.items()])
    return f"With each structure at its best rate (one seed) MLR attention leads standard attention by {told}."


def repeat_words(found):
    """How far the same command's runs are apart."""
    every = [values for mine in found.values() for tried in mine.values() for values in tried.values()]
    apart = [values[-1] - values[0] for values in every if len(values) > 1]
    return f"Runs of one command are up to {max(apart):.3f} nats apart." if apart else ""


@command
def main(argv=None):
    parser = run_arguments(__doc__, "train.py", unfinished=True, at_step=True)
    args = parser.parse_args(argv)
    found = losses(read_runs(args.runs, "train.py", args.only, args.unfinished, args.at_step))
    print(markdown(*rows(found)))
    if said := " ".join(filter(None, (lead_words(found), repeat_words(found)))):
        print(prose(said))


if __name__ == "__main__":
    main()
