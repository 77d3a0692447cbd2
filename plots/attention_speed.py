"""Time of attention against the sequence length, relative to PyTorch's default, from a record of `bench.py attention`.

    python bench.py attention --out=results/bench/attention_h200.json
    python plots/attention_speed.py results/bench/attention_h200.json --out results/attention_speed.png

A panel for forward and one for forward and backward. Below the line at 1 a row is faster than PyTorch's default
attention in the same record, which on a Hopper card is cuDNN's. The numbers, and memory: plots/speed_table.py.
"""

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plots.names import MLR, STRUCTURES
from plots.records import plain_arguments
from plots.speed_table import DEFAULT, FLASH, PASSES, by_length, read
from plots.style import DARK_GREY, GREY, legend_below, line_key, picture
from training.errors import BadInput, command, reading

CURVES = {  # (structure, backend) of a row: (name, look)
    ("MLR", "triton"): ("MLR attention, fused", dict(color=STRUCTURES[MLR][1], marker="D", linestyle="-")),
    FLASH: ("FlashAttention-2", dict(color="#00609A", marker="s", linestyle="--")),
    ("FlexAttention", "standard"): ("FlexAttention", dict(color="#777777", marker="v", linestyle=":")),
}
HOW = "python bench.py attention --out="


def check_complete(path, lengths):
    """Raises BadInput naming every row or number that a curve lacks."""
    lacking = []
    for (T, rows), curve in itertools.product(lengths.items(), (*CURVES, DEFAULT)):
        row = rows.get(curve, dict(note="no such row"))
        if lacks := [key for key in PASSES.values() if row.get(key) is None]:
            lacking.append(f"{' '.join(curve)} at T = {T} has no {', '.join(lacks)} ({row.get('note', 'no value')})")
    if lacking:
        raise BadInput(f"{path}: {'; '.join(lacking)}; make it again, on CUDA, with: {HOW}{path}")


def draw(axes, lengths):
    """A panel for each of PASSES, in units of the time of PyTorch's default."""
    for ax, (name, key) in zip(axes, PASSES.items(), strict=True):
        for curve, (_, look) in CURVES.items():
            times = [rows[curve][key] / rows[DEFAULT][key] for rows in lengths.values()]
            ax.plot(list(lengths), times, **look, linewidth=1.6, label=" ".join(curve))
        ax.axhline(1, color="black", linewidth=1.2, zorder=0)
        ax.text(0.02, 0.985, "PyTorch's default", transform=ax.get_yaxis_transform(), va="top", fontsize=7)
        ax.set(xscale="log", xlabel="sequence length T", ylabel="time / PyTorch's default")
        ax.set_title(name, fontsize=9)
        ax.set_xticks(list(lengths), [f"{T // 1024}k" if T % 1024 == 0 else str(T) for T in lengths])
        ax.minorticks_off()
        ax.grid(axis="y", color=GREY, alpha=0.2, linewidth=0.5)
    low, high = zip(*(ax.get_ylim() for ax in axes), strict=True)
    for ax in axes:
        ax.set_ylim(min(0.5, *low), max(high))
    legend_below(axes, [line_key(name, **look, markersize=4.5) for name, look in CURVES.values()], len(CURVES))


@command
def main(argv=None):
    parser = plain_arguments(__doc__)
    parser.add_argument("record", help="JSON file that bench.py attention --out wrote")
    parser.add_argument("--out", required=True, help="picture to write, as PNG and as SVG")
    args = parser.parse_args(argv)
    record = read(args.record)
    if record.get("command") != "attention":
        raise BadInput(f"{args.record} holds no rows of bench.py attention; make it with: {HOW}{args.record}")
    with reading(args.record), picture(args.out, panels=len(PASSES)) as axes:
        lengths = by_length(record)
        check_complete(args.record, lengths)
        draw(axes, lengths)
        axes[0].get_figure(root=True).suptitle(record["device"], fontsize=8, color=DARK_GREY)


if __name__ == "__main__":
    main()
