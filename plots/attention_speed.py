"""Speed and memory of attention against the sequence length, from the records of `bench.py attention`.

    python bench.py attention --out=results/bench/attention_h100.json
    python plots/attention_speed.py results/bench/attention_h100.json --out results/attention_speed.png

Times are relative to those of SDPA's flash backend in the same record; cuDNN is SDPA's, too. Several records are drawn
together if they were made on the same device with the same sizes and hold different lengths.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from matplotlib.transforms import ScaledTranslation

from plots.records import STRUCTURES, table
from plots.style import MARKER_SIZES, log_ticks, picture
from training.errors import BadInput, command

FLASH = ("SDPA", "flash")
CURVES = {  # (structure, backend) of a row: (name, colour, marker, line)
    FLASH: ("flash", STRUCTURES["low_rank"][1], "o", "-"),
    ("SDPA", "cudnn"): ("cuDNN", "#00609A", "X", "--"),
    ("FlexAttention", "standard"): ("FlexAttention", "#A69100", "v", "-."),
    ("MLR", "triton"): ("MLR, fused", STRUCTURES["multi_level_low_rank"][1], "D", "-"),
    ("window", "flex"): ("sliding window", STRUCTURES["low_rank_with_sliding_window"][1], "s", ":"),
}
PANELS = {  # key of a row: (words of the y axis, whether relative to flash)
    "forward_ms": ("forward: time / flash's", True),
    "both_ms": ("forward + backward: time / flash's", True),
    "extra_MiB": ("forward + backward: memory (MiB)", False),
}
FREE = {"lengths", "structures", "repeats", "seed", "out", "dense_up_to", "check_up_to"}  # may differ among records


def read(paths):
    """{T: {(structure, backend): row}} of all records, T ascending, every row that is drawn complete.

    Raises BadInput for records that do not belong together, that hold the same T, or that lack a row or a number.
    """
    found, first = {}, None
    for path in paths:
        record = read_record(path)
        about = {k: v for k, v in record["settings"].items() if k not in FREE} | {"device": record["device"]}
        first = first or about
        for name in about:
            if about[name] != first.get(name):
                raise BadInput(f"{path}: {name} is {about[name]}, in {paths[0]} it is {first.get(name)}")
        mine = {}
        for row in record["rows"]:
            mine.setdefault(row["T"], {})[row["structure"], row["backend"]] = row
        if twice := sorted(found.keys() & mine.keys()):
            raise BadInput(f"{path}: T = {twice[0]} is in another record, too; give each length once")
        check_complete(path, mine)
        found |= mine
    return dict(sorted(found.items()))


def read_record(path):
    """What `bench.py attention --out` wrote."""
    how = f"make it with: python bench.py attention --out={path}"
    try:
        record = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read ({type(error).__name__}); {how}") from None
    if record.get("command") != "attention" or not record.get("rows"):
        raise BadInput(f"{path} holds no rows of bench.py attention; {how}")
    return record


def check_complete(path, lengths):
    """Raises BadInput naming every row or number that a curve lacks."""
    lacking = []
    for T, rows in lengths.items():
        for curve in CURVES:
            row = rows.get(curve, dict(note="no such row"))
            lacks = [key for key in PANELS if row.get(key) is None]
            if lacks:
                why = row.get("note", "no value")
                lacking.append(f"{' '.join(curve)} at T = {T} has no {', '.join(lacks)} ({why})")
    if lacking:
        how = f"make it again, on CUDA, with: python bench.py attention --out={path}"
        raise BadInput(f"{path}: {'; '.join(lacking)}; {how}")


def curve_values(lengths, curve, key):
    """A curve's numbers in the panel of `key`, one a length."""
    relative = PANELS[key][1]
    return [rows[curve][key] / (rows[FLASH][key] if relative else 1) for rows in lengths.values()]


def draw(axes, lengths):
    """A panel for each of PANELS, ratios on a log axis; the legend stands below the middle one."""
    for ax, (key, (words, relative)) in zip(axes, PANELS.items(), strict=True):
        ax.set(xscale="log", yscale="log" if relative else "linear", xlabel="sequence length T", ylabel=words)
        for curve, (name, colour, marker, line) in CURVES.items():
            ax.plot(
                list(lengths), curve_values(lengths, curve, key), color=colour, linestyle=line, label=name,
                marker=marker, markersize=MARKER_SIZES.get(marker, 4.5), markeredgecolor="white", markeredgewidth=0.4,
            )  # fmt: skip
        ax.set_xticks(list(lengths), [tick(T) for T in lengths])
        ax.minorticks_off()
        if relative:
            log_ticks(ax.yaxis)
        else:
            ax.set_ylim(bottom=0)
    middle = axes[len(axes) // 2]
    below = ScaledTranslation(0, -0.42, middle.get_figure(root=True).dpi_scale_trans)
    middle.legend(
        ncols=3, loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=middle.transAxes + below,
        handlelength=2.6, columnspacing=1.2, labelspacing=0.35, borderaxespad=0,
    )  # fmt: skip


def tick(T):
    """4096 -> 4k."""
    return f"{T // 1024}k" if T % 1024 == 0 else str(T)


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", help="JSON files that bench.py attention --out wrote")
    parser.add_argument("--out", required=True, help="picture to write, as PNG and as SVG")
    args = parser.parse_args(argv)
    lengths = read(args.records)
    with picture(args.out, panels=len(PANELS)) as axes:
        draw(axes, lengths)
    for key, (words, _) in PANELS.items():
        rows = [[CURVES[curve][0], *(f"{x:.4g}" for x in curve_values(lengths, curve, key))] for curve in CURVES]
        print(table([words, *map(tick, lengths)], rows))


if __name__ == "__main__":
    main()
