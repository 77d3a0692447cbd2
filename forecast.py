"""What comes after the end of a series, by a run of train_TS.py: a CSV in the series' own units, and a picture.

    python forecast.py --out_dir=out/ts_sales
    python forecast.py --out_dir=out/ts_sales --input=newer.csv --out=next.csv

It begins after the last row of the prepared series, or of newer data with the same columns. `forecast` is the same for
data frames. The weights are those of the lowest validation error.
"""

from dataclasses import dataclass
from pathlib import Path

import matplotlib.dates
import pandas as pd
import torch

from data.documents import opened
from data.frames import read_csv, tidy
from forecast_TS import load_trained
from forecasters import name_of, repeat_last, seasonal_naive
from plots.style import DARK_GREY, GREY, KEYS, picture
from plots.ts_kinds import look
from training.configurator import configure, parse_list, setting
from training.errors import BadInput, command
from training.files import check_output, replacing

PANELS = 4  # columns that a picture shows if it is not told which


@dataclass
class Settings:
    """What comes after the end of a series. Config files and flags, the later one winning."""

    out_dir: str = setting("out/ts_csv", "folder of a run of train_TS.py")
    input: str = setting("", "newer data, a CSV with the series' columns; empty: forecast from the series' end")
    data_dir: str = setting("", "where the series is, if not where the run found it")
    out: str = setting("forecast.csv", "CSV to write; the picture stands beside it, as PNG and SVG")
    columns: str = setting("", f"columns in the picture, with | between; empty: the last {PANELS}")
    past: int = setting(0, "steps of the past in the picture; 0: two horizons, or two seasons if they are longer")


def forecast(run_folder, frame=None, data_dir=""):
    """What comes after the last row of a data frame, or of the series the run was trained on: a data frame.

    frame: rows in the series' own units, at least look_back, with its columns by name, others are not looked at; its
    times are a column of the series' name for them, or the index. data_dir: where the prepared series is, if it has
    moved. Returns horizon rows, their index the times that follow (row numbers, where there are none), and a column
    for each that the run predicts. Raises BadInput.
    """
    run = load_trained(run_folder, data_dir)
    return predict(run, known(run, frame))


def known(run, frame=None, where="the data frame"):
    """The series so far in its own units, float64: what was prepared, or the newer rows of a data frame."""
    series = run.data.series
    if frame is None:
        times = dict(end=pd.Timestamp(series.end), freq=series.frequency) if series.frequency else None
        n = len(series.values)
        index = pd.date_range(periods=n, **times) if times else pd.RangeIndex(1, n + 1)
        return pd.DataFrame(series.values * series.std + series.mean, index, series.columns)
    frame = frame.set_axis([str(name) for name in frame.columns], axis=1)
    in_index = series.frequency and isinstance(frame.index, pd.DatetimeIndex)
    time = series.time if series.frequency and not in_index else "" if in_index else "none"
    wanted = [*series.columns, *([time] if time not in ("", "none") else [])]
    if lacking := [name for name in wanted if name not in frame.columns]:
        raise BadInput(f"{where} has no column '{lacking[0]}'; {run.folder} needs {len(wanted)} of the series' columns")
    past = tidy(frame[wanted], where, time, series.frequency, series.missing).frame[series.columns]
    if len(past) < run.settings.look_back:
        raise BadInput(f"{where} has {len(past)} rows; {run.folder} reads the last {run.settings.look_back}")
    return past


@torch.no_grad()
def predict(run, past):
    """The forecast, as `forecast` returns it, of a Trained for what comes after a frame of `known`."""
    series, which = run.data.series, run.data.predicted
    window = (past.to_numpy()[-run.settings.look_back :] - series.mean) / series.std
    values = run.model(torch.from_numpy(window).float()[None])[0, :, which].double().numpy()
    return after(past, values * series.std[which] + series.mean[which], run)


def after(past, values, run):
    """A data frame of values (horizon, predicted columns) with the times, or row numbers, that follow the past's."""
    series, last, horizon = run.data.series, past.index[-1], run.settings.horizon
    if series.frequency:
        index = pd.date_range(last, periods=horizon + 1, freq=series.frequency)[1:]
    else:
        index = pd.RangeIndex(last + 1, last + 1 + horizon)
    return pd.DataFrame(values, index.rename(series.time or "row"), run.data.columns)


def naive(run, past):
    """{words: frame} of the forecasts to compare with: the last row repeated, and the last season if there is one."""
    horizon, season = run.settings.horizon, run.data.series.season
    values = torch.tensor(past[run.data.columns].to_numpy())[None]
    found = {"last row repeated": repeat_last(values, horizon)}
    if 1 < season <= len(past):
        found[f"last {season} rows repeated"] = seasonal_naive(values, horizon, season)
    return {words: after(past, forecasts[0].numpy(), run) for words, forecasts in found.items()}


def draw(run, past, future, columns, out):
    """The picture: a panel for each of some columns, with the last rows of the past."""
    settings = vars(run.settings)
    with picture(out, [column.replace("$", r"\$") for column in columns], columns=2) as axes:
        for ax, column in zip(axes, columns, strict=True):
            ax.plot(past.index, past[column], color=GREY, linewidth=1.4, label="series")
            for (words, values), line in zip(naive(run, past).items(), (":", "--"), strict=False):
                ax.plot(values.index, values[column], color=DARK_GREY, linewidth=0.8, linestyle=line, label=words)
            ax.plot(future.index, future[column], color=look(settings)["color"], label=name_of(settings))
            ax.axvline(past.index[-1], color=GREY, linewidth=0.6, linestyle=(0, (4, 2)))
            ax.margins(x=0.02)
            if run.data.series.frequency:
                ax.xaxis.set_major_locator(ticks := matplotlib.dates.AutoDateLocator(minticks=3, maxticks=7))
                ax.xaxis.set_major_formatter(matplotlib.dates.ConciseDateFormatter(ticks))
            else:
                ax.set(xlabel="row")
        keys = axes[0].get_legend_handles_labels()
        axes[0].get_figure(root=True).legend(*keys, ncols=min(2, len(columns)), loc="outside lower center", **KEYS)


@command
def main(argv=None):
    cfg = configure(Settings, argv)
    out = Path(cfg.out)
    if out.suffix != ".csv" or cfg.past < 0:
        raise BadInput(f"out is '{out}', past is {cfg.past}; out must end in .csv, past is at least 0")
    check_output(out)
    run, frame = load_trained(cfg.out_dir, cfg.data_dir), None
    if cfg.input:
        with opened([cfg.input], out.parent, folders=False) as sources:
            frame = read_csv(sources, cfg.input)
    columns = parse_list(cfg.columns, "columns", str) if cfg.columns else tuple(run.data.columns[-PANELS:])
    if wrong := [column for column in columns if column not in run.data.columns]:
        raise BadInput(f"columns has '{wrong[0]}'; {cfg.out_dir} predicts {', '.join(run.data.columns[:8])}")
    past = known(run, frame, cfg.input)
    future = predict(run, past)
    with replacing(out) as file:
        file.write(future.to_csv(float_format="%.7g", lineterminator="\n").encode())
    shown = cfg.past or 2 * max(run.settings.horizon, run.data.series.season)
    draw(run, past[-shown:], future, list(columns), out.with_suffix(".png"))
    print(f"{out}: {len(future)} rows, {future.index[0]} to {future.index[-1]}, columns: {len(future.columns)}")


if __name__ == "__main__":
    main()
