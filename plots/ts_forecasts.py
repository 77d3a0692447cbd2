"""Time series: what trained forecasters predict in chosen test windows, beside what came.

    python forecast_TS.py --out_dir=out/ts_tiny --windows="0|500" --channel=OT --out=forecasts.json
    python plots/ts_forecasts.py forecasts.json --out out/figures/forecasts.png

A panel for every window. The record holds all that is drawn: neither checkpoints nor the series are needed.
"""

import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plots.records import plain_arguments
from plots.style import GREY, KEYS, LINES, picture
from plots.ts_kinds import look
from training.errors import BadInput, command, reading


def read_record(path):
    """The record that forecast_TS.py wrote; BadInput for another file."""
    try:
        record = json.loads(Path(path).read_text())
        counts = [len(panel["forecasts"]) for panel in record["panels"] if panel["truth"] and "window" in panel]
        lacking = {"channel", "minutes", "horizon", "runs"} - record.keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{path} cannot be read as forecasts of forecast_TS.py ({type(error).__name__})") from None
    if lacking or not counts:
        raise BadInput(f"{path} cannot be read as forecasts of forecast_TS.py (no {sorted(lacking) or 'panels'})")
    if max(counts) > len(LINES):
        raise BadInput(f"{max(counts)} runs are too many for one picture, {len(LINES)} at most")
    return record


def draw(ax, record, panel):
    """One panel: the past, the future and each run's forecast. Returns {label: MSE}."""
    horizon, truth = record["horizon"], panel["truth"]
    steps, errors = range(1, horizon + 1), {}
    ax.plot(range(1 + horizon - len(truth), horizon + 1), truth, color=GREY, linewidth=1.6, alpha=0.8, label="truth")
    for (label, forecast), line in zip(panel["forecasts"].items(), LINES, strict=False):
        errors[label] = statistics.fmean((f - t) ** 2 for f, t in zip(forecast, truth[-horizon:], strict=True))
        colour = look(record["runs"][label])["color"]
        ax.plot(steps, forecast, color=colour, linewidth=1.1, linestyle=line, label=label)
    ax.axvline(0.5, color=GREY, linewidth=0.8, linestyle=(0, (4, 2)))
    unit = {60: "hours", 15: "quarters of an hour"}.get(record["minutes"], "steps")
    ax.set(xlabel=f"{unit} ahead", ylabel=f"{record['channel']}, standardised")
    ax.margins(x=0.02)
    return errors


def draw_panels(record, out):
    """The picture, a panel for each window; returns the lines that say the errors."""
    panels, said = record["panels"], []
    with picture(out, [f"test window {panel['window']}" for panel in panels], columns=2) as axes:
        for ax, panel in zip(axes, panels, strict=True):
            for label, error in draw(ax, record, panel).items():
                said.append(f"window {panel['window']}, {record['channel']}: mse {error:.4f}  {label}")
        keys, labels = axes[0].get_legend_handles_labels()
        wide = sum(map(len, labels)) > 40 * min(2, len(panels))
        columns = min(2, len(panels)) if wide else len(labels)
        axes[0].get_figure(root=True).legend(keys, labels, ncols=columns, loc="outside lower center", **KEYS)
    return said


@command
def main(argv=None):
    parser = plain_arguments(__doc__)
    parser.add_argument("record", help="JSON file that forecast_TS.py wrote")
    parser.add_argument("--out", required=True, help="picture to write, as PNG and as SVG")
    args = parser.parse_args(argv)
    record = read_record(args.record)
    with reading(args.record):
        said = draw_panels(record, args.out)
    print("\n".join(said))


if __name__ == "__main__":
    main()
