"""The demo's tables in Markdown: noisy recall with every seed and the simple methods, and the language models.

    python plots/demo_table.py results/demo
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plots.demo import find, heads, lm_rows
from plots.icl_examples import baselines
from plots.records import STRUCTURES, learning_curves, markdown
from training.errors import command


def recall_rows(runs):
    """A row for every kind of model, then for every simple method: mean, the seeds in order, parameters."""
    curves = learning_curves(runs, "eval/last", "step")
    rows = [[f"squared error at the query, {curves[0].steps[-1]:,} steps", "mean", "every seed", "parameters"]]
    for curve in curves:
        errors = [run.final("eval/last") for run in sorted(curve.runs, key=lambda run: run.settings["seed"])]
        seeds = ", ".join(f"{error:.3f}" for error in errors)
        total = curve.runs[0].record["parameters"]["total"]
        rows.append([name(curve), f"{statistics.fmean(errors):.3f}", seeds, f"{total:,}"])
    for method, errors in baselines(runs).items():
        rows.append([method.replace("_", " "), f"{errors[-1]:.3f}", "", ""])
    return rows


def name(curve):
    """standard, 8 heads of 4."""
    return f"{STRUCTURES[curve.structure][0]}, {heads(curve.settings)}"


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what scripts/demo.py made, or a folder of several such folders")
    recall, lm = find(parser.parse_args(argv).folder)
    print(markdown(*recall_rows(recall)))
    print()
    print(markdown(["validation loss, nats a character", "mean", "range"], *lm_rows(lm)))


if __name__ == "__main__":
    main()
