"""Time series: what trained forecasters predict in chosen test windows, beside what came.

    python plots/ts_forecasts.py --out_dir=out/ts_tiny --windows="0|500" --channel=OT --out out/figures/forecasts.png
    python plots/ts_forecasts.py --out_dir="out/ts_tiny|out/ts_tiny_mlr" --windows=0 --out out/figures/forecasts.png
    python plots/ts_forecasts.py --out_dir=out/ts_tiny --save=forecasts.json --out out/figures/forecasts.png
    python plots/ts_forecasts.py --record=forecasts.json --out out/figures/forecasts.png

Several runs of one dataset and horizon are drawn together. The weights are those of the lowest validation error, the
values standardised by the training part. Window n is the one whose future begins n rows into the test part. --save
keeps what is drawn, a few KiB, and --record draws it again: without the checkpoints and the series, the same picture.
"""

import argparse
import json
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.ett import COLUMNS
from plots.style import GREY, LINES, picture
from plots.ts_kinds import look, name
from train_TS import Settings as TrainSettings
from train_TS import Windows
from training.checkpoint import load_checkpoint, load_weights
from training.configurator import parse_list
from training.errors import BadInput, command
from training.files import replacing

SAME = ("dataset", "horizon")  # what runs in one picture share
LOOK = ("forecaster", "token_mixing_struct")  # what a line's colour says


@dataclass
class Trained:
    """A run with the model of its lowest validation error, its windows, and how it is called."""

    folder: str
    settings: TrainSettings
    model: torch.nn.Module
    data: Windows
    label: str = ""

    @property
    def columns(self):
        return COLUMNS if self.settings.features == "M" else ["OT"]

    @torch.no_grad()
    def forecast(self, row, channel):
        """(horizon,): the forecast of a channel for the future that begins at a row."""
        past, _ = self.data.batch([row])
        return self.model(past)[0, :, self.columns.index(channel)].float()


def load_trained(folder, data_dir=""):
    """The Trained of a folder that train_TS.py made; data_dir: where the series is, if it has moved."""
    path = Path(folder) / "ckpt.pt"
    saved = load_checkpoint(path)
    if "forecaster" not in saved["settings"]:
        raise BadInput(f"{path} is no run of train_TS.py: its settings name no forecaster")
    if not saved.get("best_model"):
        raise BadInput(f"{path} was written before the first evaluation; go on with --init_from=resume")
    settings = TrainSettings(**saved["settings"])
    settings = replace(settings, data_dir=data_dir or settings.data_dir)
    data = Windows(settings)
    if data.sha256 != saved["sha256"]:
        raise BadInput(f"{settings.data_dir}/{settings.dataset} is not the series that {folder} was trained on")
    model = settings.build(data.channels)
    load_weights(model, saved["best_model"], path)
    return Trained(folder, settings, model.eval(), data)


def load_all(folders, data_dir=""):
    """Trained models that can share a picture, called by their kind, and by their folder where that is not enough."""
    runs = [load_trained(folder, data_dir) for folder in folders]
    for other in runs[1:]:
        for key in SAME:
            a, b = (getattr(run.settings, key) for run in (runs[0], other))
            if a != b:
                raise BadInput(f"{runs[0].folder} has {key} = {a}, {other.folder} has {b}; one picture takes one")
        if other.data.first["test"] != runs[0].data.first["test"]:
            raise BadInput(f"the test windows of {runs[0].folder} and {other.folder} differ: look_back is too long")
    if len(runs) > len(LINES):
        raise BadInput(f"{len(runs)} runs are too many for one picture, {len(LINES)} at most")
    names = [name(vars(run.settings)) for run in runs]
    for run, words in zip(runs, names, strict=True):
        run.label = words if names.count(words) == 1 else f"{words} ({Path(run.folder).name})"
    return runs


def check(runs, windows, channel):
    """Raises BadInput for a channel or a window that is not there."""
    for run in runs:
        if channel not in run.columns:
            raise BadInput(f"{run.folder} has no channel '{channel}', there are {', '.join(run.columns)}")
    count = len(runs[0].data.first["test"])
    for window in windows:
        if not 0 <= window < count:
            raise BadInput(f"there is no test window {window}, they are 0 to {count - 1}")


def recorded(runs, windows, channel, past):
    """What a picture shows, in plain types: the truth around every window and what each run predicts."""
    settings, data = runs[0].settings, runs[0].data
    tail = min(past or settings.horizon, max(run.settings.look_back for run in runs))
    panels = []
    for window in windows:
        row = data.first["test"][window]
        truth = data.values[row - tail : row + settings.horizon, runs[0].columns.index(channel)]
        forecasts = {run.label: rounded(run.forecast(row, channel)) for run in runs}
        panels.append(dict(window=window, truth=rounded(truth), forecasts=forecasts))
    looks = {run.label: {key: getattr(run.settings, key) for key in LOOK} for run in runs}
    minutes = 24 * 60 // data.steps_a_day
    return dict(
        dataset=settings.dataset, channel=channel, minutes=minutes, horizon=settings.horizon, runs=looks, panels=panels
    )


def rounded(values):
    return [round(x, 4) for x in values.tolist()]


def read_record(path):
    """The record that --save wrote; BadInput for another file."""
    try:
        record = json.loads(Path(path).read_text())
        named = [(panel["window"], panel["truth"], panel["forecasts"]) for panel in record["panels"]]
        lacking = {"channel", "minutes", "horizon", "runs"} - record.keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{path} cannot be read as forecasts that --save wrote ({type(error).__name__})") from None
    if lacking or not named:
        raise BadInput(f"{path} cannot be read as forecasts that --save wrote (it lacks {sorted(lacking) or 'panels'})")
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
    ax.set_title(f"test window {panel['window']}", fontsize=8)
    ax.margins(x=0.02)
    return errors


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--out_dir", help="folder of a run of train_TS.py, or several with | between")
    source.add_argument("--record", help="file that --save wrote; it has its windows and its channel")
    parser.add_argument("--windows", default="0", help="test windows, like 0|500: a panel each")
    parser.add_argument("--channel", default="OT", help=f"one of {', '.join(COLUMNS)}")
    parser.add_argument("--past", type=int, default=0, help="steps of the past to show; 0: as many as of the future")
    parser.add_argument("--data_dir", default="", help="where the series is, if not where the run found it")
    parser.add_argument("--save", metavar="FILE", help="keep what is drawn as JSON")
    parser.add_argument("--out", required=True, help="picture to write, as PNG and as SVG")
    args = parser.parse_args(argv)
    if args.record:
        record = read_record(args.record)
    else:
        windows = parse_list(args.windows, "windows")
        runs = load_all(parse_list(args.out_dir, "out_dir", str), args.data_dir)
        check(runs, windows, args.channel)
        if args.past < 0:
            raise BadInput(f"past is {args.past}, at least 0")
        record = recorded(runs, windows, args.channel, args.past)
    errors, panels = {}, record["panels"]
    with picture(args.out, panels=len(panels), columns=2) as axes:
        for ax, panel in zip(axes, panels, strict=True):
            errors[panel["window"]] = draw(ax, record, panel)
        handles, labels = axes[0].get_legend_handles_labels()
        wide = sum(map(len, labels)) > 40 * min(2, len(panels))
        axes[0].get_figure(root=True).legend(
            handles, labels, ncols=min(2, len(panels)) if wide else len(labels), loc="outside lower center",
            handlelength=2.6, columnspacing=1.2, labelspacing=0.35,
        )  # fmt: skip
    if args.save:
        with replacing(args.save) as file:
            file.write((json.dumps(record) + "\n").encode())
    for window, found in errors.items():
        for label, error in found.items():
            print(f"window {window}, {record['channel']}: mse {error:.4f}  {label}")


if __name__ == "__main__":
    main()
