"""Time series: what trained forecasters predict in chosen test windows, beside what came.

    python plots/ts_forecasts.py --out_dir=out/ts_tiny --windows="0|500" --channel=OT --out out/figures/forecasts.png
    python plots/ts_forecasts.py --out_dir="out/ts_tiny|out/ts_tiny_mlr" --windows=0 --out out/figures/forecasts.png

Several runs of one dataset and horizon are drawn together. The weights are those of the lowest validation error, the
values standardised by the training part. Window n is the one whose future begins n rows into the test part.
"""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.ett import COLUMNS
from plots.style import GREY, LINES, picture
from plots.ts_horizon import look, name
from train_TS import Settings as TrainSettings
from train_TS import Windows
from training.configurator import parse_list
from training.errors import BadInput, command
from training.run import load_checkpoint, load_weights

SAME = ("dataset", "horizon")  # what runs in one picture share


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


def draw(ax, runs, window, channel, tail):
    """One panel: `tail` steps of the past, the future and each run's forecast. Returns {label: MSE}."""
    data, horizon = runs[0].data, runs[0].settings.horizon
    row = data.first["test"][window]
    truth = data.values[row - tail : row + horizon, runs[0].columns.index(channel)]
    steps, errors = range(1, horizon + 1), {}
    ax.plot(range(1 - tail, horizon + 1), truth, color=GREY, linewidth=1.6, alpha=0.8, label="truth")
    for run, line in zip(runs, LINES, strict=False):
        forecast = run.forecast(row, channel)
        errors[run.label] = (forecast - truth[tail:]).square().mean().item()
        colour = look(vars(run.settings))["color"]
        ax.plot(steps, forecast, color=colour, linewidth=1.1, linestyle=line, label=run.label)
    ax.axvline(0.5, color=GREY, linewidth=0.8, linestyle=(0, (4, 2)))
    unit = {60: "hours", 15: "quarters of an hour"}.get(24 * 60 // data.steps_a_day, "steps")
    ax.set(xlabel=f"{unit} ahead", ylabel=f"{channel}, standardised")
    ax.set_title(f"test window {window}", fontsize=8)
    ax.margins(x=0.02)
    return errors


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_dir", required=True, help="folder of a run of train_TS.py, or several with | between")
    parser.add_argument("--windows", default="0", help="test windows, like 0|500: a panel each")
    parser.add_argument("--channel", default="OT", help=f"one of {', '.join(COLUMNS)}")
    parser.add_argument("--past", type=int, default=0, help="steps of the past to show; 0: as many as of the future")
    parser.add_argument("--data_dir", default="", help="where the series is, if not where the run found it")
    parser.add_argument("--out", required=True, help="picture to write, as PNG and as SVG")
    args = parser.parse_args(argv)
    windows = parse_list(args.windows, "windows")
    runs = load_all(parse_list(args.out_dir, "out_dir", str), args.data_dir)
    check(runs, windows, args.channel)
    settings = runs[0].settings
    tail = min(args.past or settings.horizon, max(run.settings.look_back for run in runs))
    if tail < 1:
        raise BadInput(f"past is {args.past}, at least 0")
    errors = {}
    with picture(args.out, panels=len(windows), columns=2) as axes:
        for ax, window in zip(axes, windows, strict=True):
            errors[window] = draw(ax, runs, window, args.channel, tail)
        handles, labels = axes[0].get_legend_handles_labels()
        wide = sum(map(len, labels)) > 40 * min(2, len(windows))
        axes[0].get_figure(root=True).legend(
            handles, labels, ncols=min(2, len(windows)) if wide else len(labels), loc="outside lower center",
            handlelength=2.6, columnspacing=1.2, labelspacing=0.35,
        )  # fmt: skip
    for window, found in errors.items():
        for label, error in found.items():
            print(f"window {window}, {args.channel}: mse {error:.4f}  {label}")


if __name__ == "__main__":
    main()
