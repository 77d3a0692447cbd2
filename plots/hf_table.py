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
from training.errors import BadInput, command


def read(path):
    """(kind of model, {attention: (loss at once, loss after fine-tuning)}) of a record."""
    try:
        record = json.loads(path.read_text())
        losses = {row["attention"]: (float(row["at_once"]), float(row["after"])) for row in record["rows"][1:]}
        losses["own"]
        return record["settings"]["kind"], losses
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path} cannot be read as a record of hf_finetune.py ({type(error).__name__})") from None


@command
def main(argv=None):
    parser = plain_arguments(__doc__)
    parser.add_argument("records", nargs="+", type=Path)
    rows = [["model", "attention", "seeds", "at once", "fine-tuned", "behind its own"]]
    for kind, records in grouped(map(read, parser.parse_args(argv).records), lambda record: record[0]).items():
        losses = [losses for _, losses in records]
        for name in losses[0]:
            both = [each[name] for each in losses if name in each]
            mean, low, high, _ = student([each[name][1] - each["own"][1] for each in losses if name in each])
            behind = f"{mean:+.3f} {within(low, high)}" if low is not None else f"{mean:+.3f}"
            means = [f"{statistics.fmean(column):.3f}" for column in zip(*both, strict=True)]
            rows.append([kind, name, len(both), *means, "" if name == "own" else behind])
    show(rows)


if __name__ == "__main__":
    main()
