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
from training.errors import BadInput, command, reading

DEFAULT, FLASH = ("SDPA", "default"), ("SDPA", "flash")
FUSED = ("triton", "blockwise")  # MLR's fast paths: on a GPU, on a CPU
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
    for backend in FUSED:
        if rows.get(("MLR", backend), {}).get("forward_ms"):
            return rows["MLR", backend]
    raise BadInput(f"a length has no times of MLR attention, {' or '.join(FUSED)}; make the record again")


def span(record, key, beside=DEFAULT):
    """The lowest and the highest of MLR attention's time or memory over that of another row, over all T."""
    found = [fused(rows)[key] / rows[beside][key] for rows in by_length(record).values()]
    return min(found), max(found)


def attention(record):
    """Rows by T, and a sentence: how MLR attention's time compares with PyTorch's default."""
    on_gpu = not record["device"].endswith("threads")
    others = [DEFAULT, FLASH if on_gpu else ("MLR", "dense")]
    names = ["of PyTorch's default", "of FlashAttention-2" if on_gpu else "of T x T scores"]
    header = ["T", *(words for name in PASSES for words in (f"{name}, ms", *names))]
    table = [[*header, *(["memory, of the default"] if on_gpu else [])]]
    for T, rows in by_length(record).items():
        own, numbers = fused(rows), []
        for key in PASSES.values():
            numbers += [own[key], *(own[key] / rows[other][key] for other in others)]
        numbers += [own["extra_MiB"] / rows[DEFAULT]["extra_MiB"]] if on_gpu else []
        table.append([T, *(f"{number:.2f}" for number in numbers)])
    forward, both = (f"{low:.2f} to {high:.2f}" for low, high in (span(record, key) for key in PASSES.values()))
    words = f"MLR attention takes {forward} of the time of PyTorch's default attention forward, and {both} forward and"
    return table, f"{device_words(record)}. {words} backward."


def device_words(record):
    return f"{record['device']}, torch {record['torch']}, {record['dtype']}"


def step(*records):
    """Rows by device, width and batch: nanoGPT's model and ours, tokens a second and the share of its speed."""
    table = [["card", "d_model, batch", "nanoGPT", *(STRUCTURES[s][0] for s in ORDER)]]
    for record in records:
        for (width, batch), found in grouped(record["rows"], lambda row: (row["d_model"], row["batch"])).items():
            rows = {row["token_mixing_struct"]: row for row in found}
            peer = rows["peer"]
            busy = f", card busy {peer['kernel_ms'] / peer['ms']:.0%}" if "kernel_ms" in peer else ""
            card = record["device"].removeprefix("NVIDIA ").split()[0]
            cells = [step_cell(rows[s], peer) if s in rows else "" for s in ORDER]
            table.append([card, f"{width}, {batch.replace('x', ' x ')}", f"{millions(peer)}{busy}", *cells])
    return table, ""


def step_cell(row, peer):
    """Tokens a second in millions, of nanoGPT's, and the same by the time of the kernels alone."""
    kernels = f"; {peer['kernel_ms'] / row['kernel_ms']:.2f}" if "kernel_ms" in row else ""
    return f"{millions(row)} ({row['times_peer']:.2f}{kernels})"


def millions(row):
    return f"{row['tokens_per_s'] / 1e6:.2f}"


def icl(record):
    """Rows by structure: steps a second of train_ICL.py, of our plain loop and of the original's code."""
    table = [["attention", "steps/s", "our plain loop", "times that", "the original's loop", "times that"]]
    rows = {(row["token_mixing_struct"], row["loop"]): row["steps_per_s"] for row in record["rows"]}
    for structure, theirs in ORIGINAL.items():
        for loop in ("train_ICL", "reference"):
            if (structure, loop) not in rows:
                how = "make one that has it with: python bench.py icl --sizes=16x128 --out=FILE"
                raise BadInput(f"the record of bench.py icl has no row {structure} {loop}; {how}")
        ours, plain = rows[structure, "train_ICL"], rows[structure, "reference"]
        numbers = [f"{number:.0f}" for number in (ours, plain, ours / plain, theirs, ours / theirs)]
        table.append([STRUCTURES[structure][0], *numbers])
    return table, f"{device_words(record)}."


def decode(record):
    """Rows by ranks: microseconds of the kernel at the last position that was timed."""
    last = max(row["position"] for row in record["rows"])
    rows = [row for row in record["rows"] if row["position"] == last and DECODED.items() <= row.items()]
    table = [["keys kept with ranks", f"us at position {last:,}"], *([r["ranks"], f"{r['us']:.0f}"] for r in rows)]
    return table, f"{device_words(record)}, batch {record['batch']}."


KINDS = dict(attention=attention, step=step, icl=icl, decode=decode)  # the record's command: its table


@command
def main(argv=None):
    parser = plain_arguments(__doc__)
    parser.add_argument("records", nargs="+", help="JSON files that bench.py --out wrote, of one kind")
    paths = parser.parse_args(argv).records
    records = [read(path) for path in paths]
    kind, *others = {str(record.get("command", "decode")) for record in records}
    if others or kind not in KINDS or (kind != "step" and len(records) > 1):
        raise BadInput(f"one record of {', '.join(map(str, KINDS))}, or several of step, please; not {' '.join(paths)}")
    with reading(" ".join(paths)):
        table, words = KINDS[kind](*records)
    show(table, words=words)


if __name__ == "__main__":
    main()
