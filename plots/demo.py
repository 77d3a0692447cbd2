"""The demo's two pictures: in-context regression, and language modelling, from one seed or from several.

    python plots/demo.py out/demo --out out/demo
    python plots/demo.py results/demo --out results
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plots import icl_compute, icl_examples, lm_compute
from plots.records import read_runs, tuned
from plots.style import picture
from training.errors import BadInput, command


def draw(icl, lm, folder):
    """Write in_context_regression and language_modelling, as PNG and SVG, into the folder."""
    with picture(folder / "in_context_regression.png", panels=2) as (left, right):
        icl_compute.draw(left, icl, x="step", with_legend=False)
        icl_examples.draw(right, tuned(icl))
    with picture(folder / "language_modelling.png", panels=2) as (left, right):
        lm_compute.draw(left, lm, x="non_emb_compute", with_legend=False)
        lm_compute.draw(right, lm, x="seconds")


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what scripts/demo.py made, or a folder of several such folders")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    args = parser.parse_args(argv)
    found = {kind: sorted(args.folder.rglob(f"{kind}_*/run.json")) for kind in ("icl", "lm")}
    for kind, records in found.items():
        if not records:
            raise BadInput(f"no run {kind}_* in {args.folder}; make them with: python scripts/demo.py")
    icl, lm = ([str(record.parent) for record in found[kind]] for kind in ("icl", "lm"))
    draw(read_runs(icl, "train_ICL.py"), read_runs(lm, "train.py"), args.out)


if __name__ == "__main__":
    main()
