"""Tables of speed, in Markdown, from the records of bench.py: attention, step, icl, and the decode kernel's.

    python plots/speed_table.py results/bench/attention_h200.json
    python plots/speed_table.py results/bench/step_256_h200.json results/bench/step_256_h100.json

Records of one kind make one table. PyTorch's default attention on a Hopper card is cuDNN's; "FlashAttention-2" is what
PyTorch calls its flash backend.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plots.names import STRUCTURES
from plots.records import grouped, plain_arguments
from plots.tables import show
from training.errors import BadInput, command

DEFAULT, FLASH = ("SDPA", "default"), ("SDPA", "flash")
FUSED = ("triton", "blockwise")  # MLR's fast paths: on a GPU, on a CPU
BESIDE = {  # on a GPU or not: {what MLR attention is compared with: (structure, backend) of its row}
    True: {"PyTorch's default": DEFAULT, "FlashAttention-2": FLASH},
    False: {"PyTorch's default": DEFAULT, "T x T scores": ("MLR", "dense")},
}
PASSES = {"forward": "forward_ms", "forward and backward": "both_ms"}
ORIGINAL = {"low_rank": 36, "bilinear_MLR": 11, "bilinear_BTT": 26}  # steps/s of the original's loop: dev/LOG.md
DECODED = dict(programs=528, chunk=64, stages=2, warps=4)  # how structured/kernels/decode.py launches its kernel
ORDER = ("low_rank", "multi_level_low_rank", "low_rank_with_sliding_window", "low_rank_with_gswa",
         "low_rank_with_sequential_gswa")  # fmt: skip


def read(path):
    """A record that bench.py --out wrote, or that of the decode kernel."""
    try:
        record = json.loads(Path(path).read_text())
        record["rows"][0]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise BadInput(f"{path} cannot be read as a record of bench.py ({type(error).__name__})") from None
    return record


def by_length(record):
    """{T: {(structure, backend): row}} of an attention record, T ascending."""
    found = grouped(sorted(record["rows"], key=lambda row: row["T"]), lambda row: row["T"])
    return {T: {(row["structure"], row["backend"]): row for row in rows} for T, rows in found.items()}


def fused(rows):
    return next(rows["MLR", backend] for backend in FUSED if rows.get(("MLR", backend), {}).get("forward_ms"))


def ratios(record, key, beside=DEFAULT):
    """MLR attention's time or memory over that of another row, by T."""
    return {T: fused(rows)[key] / rows[beside][key] for T, rows in by_length(record).items()}


def attention(records):
    """Rows by T, and a sentence: how MLR attention's time compares with PyTorch's default."""
    (record,) = records
    on_gpu = not record["device"].endswith("threads")
    header = ["T"]
    for name in PASSES:
        header += [f"{name}, ms", *(f"of {words}" for words in BESIDE[on_gpu])]
    table = [[*header, *(["memory, of the default"] if on_gpu else [])]]
    for T, rows in by_length(record).items():
        line = [T]
        for key in PASSES.values():
            own = fused(rows)[key]
            line += [f"{own:.2f}", *(f"{own / rows[other][key]:.2f}" for other in BESIDE[on_gpu].values())]
        table.append(line + ([f"{fused(rows)['extra_MiB'] / rows[DEFAULT]['extra_MiB']:.2f}"] if on_gpu else []))
    return table, f"{device_words(record)}. {default_words(record)}."


def default_words(record):
    """How MLR attention's time compares with PyTorch's default, over all T."""
    (low, high), (least, most) = (span(ratios(record, key)) for key in PASSES.values())
    return (
        f"MLR attention takes {low:.2f} to {high:.2f} of the time of PyTorch's default attention forward, and "
        f"{least:.2f} to {most:.2f} forward and backward"
    )


def span(found):
    return min(found.values()), max(found.values())


def device_words(record):
    return f"{record['device']}, torch {record['torch']}, {record['dtype']}"


def step(records):
    """Rows by device, width and batch: nanoGPT's model and ours, tokens a second and the share of its speed."""
    table = [["card", "d_model, batch", "nanoGPT", *(STRUCTURES[s][0] for s in ORDER)]]
    for record in records:
        for (width, batch), found in grouped(record["rows"], lambda row: (row["d_model"], row["batch"])).items():
            rows = {row["token_mixing_struct"]: row for row in found}
            cells = [step_cell(rows[s], rows["peer"]) if s in rows else "" for s in ORDER]
            peer = rows["peer"]
            busy = f", card busy {peer['kernel_ms'] / peer['ms']:.0%}" if "kernel_ms" in peer else ""
            card = record["device"].removeprefix("NVIDIA ").split()[0]
            table.append([card, f"{width}, {batch.replace('x', ' x ')}", f"{millions(peer)}{busy}", *cells])
    return table, ""


def step_cell(row, peer):
    """Tokens a second in millions, of nanoGPT's, and the same by the time of the kernels alone."""
    kernels = f"; {peer['kernel_ms'] / row['kernel_ms']:.2f}" if "kernel_ms" in row else ""
    return f"{millions(row)} ({row['times_peer']:.2f}{kernels})"


def millions(row):
    return f"{row['tokens_per_s'] / 1e6:.2f}"


def icl(records):
    """Rows by structure: steps a second of train_ICL.py, of our plain loop and of the original's code."""
    table = [["attention", "steps/s", "our plain loop", "times that", "the original's loop", "times that"]]
    (record,) = records
    rows = {(row["token_mixing_struct"], row["loop"]): row["steps_per_s"] for row in record["rows"]}
    for structure, theirs in ORIGINAL.items():
        for loop in ("train_ICL", "reference"):
            if (structure, loop) not in rows:
                how = "make one that has it with: python bench.py icl --sizes=16x128 --out=FILE"
                raise BadInput(f"the record of bench.py icl has no row {structure} {loop}; {how}")
        ours, plain = rows[structure, "train_ICL"], rows[structure, "reference"]
        numbers = [f"{ours:.0f}", f"{plain:.0f}", f"{ours / plain:.0f}", theirs, f"{ours / theirs:.0f}"]
        table.append([STRUCTURES[structure][0], *numbers])
    return table, f"{device_words(record)}."


def decode(records):
    """Rows by ranks: microseconds of the kernel at the last position that was timed."""
    (record,) = records
    last = max(row["position"] for row in record["rows"])
    table = [["keys kept with ranks", f"us at position {last:,}"]]
    for row in record["rows"]:
        if row["position"] == last and DECODED.items() <= row.items():
            table.append([row["ranks"], f"{row['us']:.0f}"])
    return table, f"{record['device']}, torch {record['torch']}, {record['dtype']}, batch {record['batch']}."


KINDS = {"attention": attention, "step": step, "icl": icl, None: decode}  # the record's command: its table


@command
def main(argv=None):
    parser = plain_arguments(__doc__)
    parser.add_argument("records", nargs="+", help="JSON files that bench.py --out wrote, of one kind")
    records = [read(path) for path in parser.parse_args(argv).records]
    kinds = {record.get("command") for record in records}
    if len(kinds) > 1 or not kinds <= KINDS.keys():
        known, there = (", ".join(map(str, names)) for names in (KINDS, kinds))
        raise BadInput(f"records of one of {known}, please; there are {there}")
    table, words = KINDS[kinds.pop()](records)
    show(table, words=words)


if __name__ == "__main__":
    main()
