"""Forecasts of trained forecasters in chosen test windows beside what came, as JSON that plots/ts_forecasts.py draws.

    python forecast_TS.py --out_dir=out/ts_tiny --windows="0|500" --channel=OT --out=forecasts.json
    python forecast_TS.py --out_dir="out/ts_tiny|out/ts_tiny_mlr" --windows=0 --out=forecasts.json

Several runs of one dataset and horizon are kept together. The weights are those of the lowest validation error, the
values standardised by the training part. Window n is the one whose future begins n rows into the test part.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data.series import Windows
from forecasters import name_of
from train_TS import Settings as TrainSettings
from training.checkpoint import load_run, load_weights
from training.configurator import configure, parse_list, restored, setting
from training.errors import BadInput, command, reading
from training.files import check_output, here, replacing

SAME = ("dataset", "horizon")  # what runs in one file share
LOOK = ("forecaster", "token_mixing_struct")  # what a line's colour says


@dataclass
class Settings:
    """Forecasts of trained forecasters. Config files and flags, the later one winning."""

    out_dir: str = setting("out/ts_tiny", "folder of a run of train_TS.py, or several with | between")
    windows: str = setting("0", "test windows, like 0|500")
    channel: str = setting("OT", "a column of the series that the runs predict")
    past: int = setting(0, "steps of the past to keep; 0: as many as of the future")
    data_dir: str = setting("", "where the series is, if not where the run found it")
    out: str = setting("forecasts.json", "JSON file to write")

    def __post_init__(self):
        if self.past < 0:
            raise BadInput(f"past is {self.past}, at least 0")


@dataclass
class Trained:
    """A run with the model of its lowest validation error, its windows, and how it is called."""

    folder: str
    settings: TrainSettings
    model: torch.nn.Module
    data: Windows
    label: str = ""

    @torch.no_grad()
    def forecast(self, row, channel):
        """(horizon,): the forecast of a channel for the future that begins at a row."""
        past, _ = self.data.batch([row])
        return self.model(past)[0, :, self.data.predicted][:, self.data.columns.index(channel)].float()


def load_trained(folder, data_dir=""):
    """The Trained of a folder that train_TS.py made; data_dir: where the series is, if it has moved."""
    saved, path = load_run(folder, "train_TS.py", "forecaster")
    if not saved.get("best_model"):
        raise BadInput(f"{path} was written before the first evaluation; go on with --init_from=resume")
    with reading(path):
        settings = restored(TrainSettings, saved["settings"])
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
    names = [name_of(vars(run.settings)) for run in runs]
    for run, words in zip(runs, names, strict=True):
        run.label = words if names.count(words) == 1 else f"{words} ({Path(run.folder).name})"
    return runs


def check(runs, windows, channel):
    """Raises BadInput for a channel or a window that is not there."""
    for run in runs:
        if channel not in run.data.columns:
            raise BadInput(f"{run.folder} has no channel '{channel}', there are {', '.join(run.data.columns)}")
    count = len(runs[0].data.first["test"])
    for window in windows:
        if not 0 <= window < count:
            raise BadInput(f"there is no test window {window}, they are 0 to {count - 1}")


def recorded(runs, windows, channel, past=0):
    """What a picture shows, in plain types: the truth around every window and what each run predicts."""
    settings, data = runs[0].settings, runs[0].data
    tail = min(past or settings.horizon, max(run.settings.look_back for run in runs))
    panels = []
    for window in windows:
        row = data.first["test"][window]
        truth = data.values[row - tail : row + settings.horizon, data.series.columns.index(channel)]
        forecasts = {run.label: rounded(run.forecast(row, channel)) for run in runs}
        panels.append(dict(window=window, truth=rounded(truth), forecasts=forecasts))
    looks = {run.label: {key: getattr(run.settings, key) for key in LOOK} for run in runs}
    about = dict(dataset=settings.dataset, channel=channel, minutes=data.series.minutes, horizon=settings.horizon)
    return about | dict(runs=looks, panels=panels)


def rounded(values):
    return [round(x, 4) for x in values.tolist()]


@command
def main(argv=None):
    cfg = configure(Settings, argv)
    check_output(cfg.out)
    windows = parse_list(cfg.windows, "windows")
    runs = load_all(parse_list(cfg.out_dir, "out_dir", str), cfg.data_dir)
    check(runs, windows, cfg.channel)
    with replacing(cfg.out) as file:
        file.write((json.dumps(recorded(runs, windows, cfg.channel, cfg.past)) + "\n").encode())
    print(f"{cfg.out}, drawn by: python {here('plots/ts_forecasts.py')} {cfg.out} --out forecasts.png")


if __name__ == "__main__":
    main()
