"""The training time behind the records of results/, by folder and device, in Markdown.

    python plots/ledger.py results/language_modeling results/time_series

Training time is the sum of the runs' own, evaluations and what was not recorded apart; runs that shared a device count
each with theirs.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plots.records import frame, plain_arguments
from plots.tables import show
from training.errors import command
from training.records import find_runs


def rows(folders):
    """A row for every folder and device: runs, hours in all, minutes of the median run, torch."""
    table = [["records", "device", "torch", "runs", "hours of training", "minutes, median run"]]
    for folder in folders:
        runs = frame(found := find_runs([folder]))
        runs["device"] = runs.device.fillna("not known")
        runs["torch"] = [run.record.get("versions", {}).get("torch", "").partition("+")[0] for run in found]
        runs["hours"] = [run.seconds / 3600 for run in found]
        for kind, hours in runs.groupby(["device", "torch"]).hours:
            numbers = len(hours), f"{hours.sum():.2f}", f"{60 * hours.median():.1f}"
            table.append([f"`{Path(folder).name}/`", *kind, *numbers])
    return table


@command
def main(argv=None):
    parser = plain_arguments(__doc__)
    parser.add_argument("folders", nargs="+", help="folders of runs")
    show(rows(parser.parse_args(argv).folders))


if __name__ == "__main__":
    main()
