"""MLR attention given to trained models of transformers: a table from the records of scripts/hf_finetune.py.

    python plots/hf_table.py results/hf/*.json

Validation losses in nats a character, means over seeds, directly after the attention was changed and after fine-tuning;
then how much higher that is than where the model kept its own attention, paired by seed, with an interval of 95%.
"""

import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plots.records import grouped, plain_arguments
from plots.tables import show, student, within
from training.errors import command


@command
def main(argv=None):
    parser = plain_arguments(__doc__)
    parser.add_argument("records", nargs="+", type=Path)
    records = [json.loads(path.read_text()) for path in parser.parse_args(argv).records]
    rows = [["model", "attention", "seeds", "at once", "fine-tuned", "behind its own"]]
    for kind, of_kind in grouped(records, lambda record: record["settings"]["kind"]).items():
        losses = [{row["attention"]: row for row in record["rows"][1:]} for record in of_kind]
        for name in losses[0]:
            at_once, after = ([each[name][when] for each in losses] for when in ("at_once", "after"))
            behind = [each[name]["after"] - each["own"]["after"] for each in losses]
            mean, low, high, _ = student(behind)
            behind = f"{mean:+.3f} {within(low, high)}" if low is not None else f"{mean:+.3f}"
            means = [f"{statistics.fmean(x):.3f}" for x in (at_once, after)]
            rows.append([kind, name, len(losses), *means, "" if name == "own" else behind])
    show(rows)


if __name__ == "__main__":
    main()
