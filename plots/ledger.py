"""The training time behind the records of results/, by folder and device, in Markdown.

    python plots/ledger.py results/language_modeling results/time_series

Training time is the sum of the runs' own, evaluations and what was not recorded apart; runs that shared a device count
each with theirs.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plots.records import find_runs, markdown
from training.errors import command


def rows(folders):
    """A row for every folder and device: runs, hours in all, minutes of the median run, torch."""
    table = [["records", "device", "torch", "runs", "hours of training", "minutes, median run"]]
    for folder in folders:
        by_device = {}
        for run in find_runs([folder]):
            version = run.record.get("versions", {}).get("torch", "").partition("+")[0]
            by_device.setdefault((run.record.get("device") or "not known", version), []).append(run.seconds)
        for (device, version), seconds in sorted(by_device.items()):
            hours, minutes = sum(seconds) / 3600, statistics.median(seconds) / 60
            table.append([f"`{Path(folder).name}/`", device, version, len(seconds), f"{hours:.2f}", f"{minutes:.1f}"])
    return table


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="folders of runs")
    print(markdown(*rows(parser.parse_args(argv).folders)))


if __name__ == "__main__":
    main()
