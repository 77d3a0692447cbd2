"""A time series as people have it, a CSV or a data frame: its times found, its values checked, written for train_TS.py.

What cannot be used ends in a BadInput that names the line of the file, or the label of the data frame's row.
"""

import csv
import io
import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from data.documents import read_text
from data.series import DTYPE, SPLITS, write_series
from training.configurator import parse_list
from training.errors import BadInput

DATES = ("%m/%d/%Y", "%d/%m/%Y", "%d.%m.%Y", "%d-%m-%Y", "%m-%d-%Y", "%m/%d/%y", "%d/%m/%y", "%d.%m.%y")
CLOCKS = ("", " %H:%M", " %H:%M:%S", " %I:%M %p", " %I:%M:%S %p")
TIME_FORMATS = ("ISO8601", *map("".join, itertools.product(DATES, CLOCKS)))
FILLS = {  # rule: what it makes of a frame with missing values
    "forward": lambda frame: frame.ffill(),
    "interpolate": lambda frame: frame.interpolate(limit_direction="both"),
    "zero": lambda frame: frame.fillna(0.0),
    "drop": lambda frame: frame.dropna(),
}
SHARES = "0.7|0.1|0.2"  # of the literature on forecasting, apart from ETT
PERIODS = [pd.Timedelta(days=days) for days in (1, 7, 365.25)]  # that a series may repeat itself after


class Tidy(NamedTuple):
    """A series that can be used.

    frame: finite float64, its index the times, or row numbers from 1. time: the name of the times, frequency: what is
    between two, both "" where there are none. filled: how many values and whole rows were missing.
    """

    frame: pd.DataFrame
    time: str
    frequency: str
    filled: tuple[int, int]


def read_csv(sources, path):
    """The Inputs (data/documents.py) of a path, one CSV, as a frame whose index has the numbers of the lines.

    Commas, semicolons or tabs separate the columns; where it is not commas, one in a number is its decimal point. A
    first line of numbers and times alone is no header: the columns are then called 1, 2 and so on. What is no number
    stays text.
    """
    if [source.form for source in sources] != ["text"]:
        raise BadInput(f"{path} is {', '.join(source.form for source in sources)}; a CSV is one file of text")
    text = "".join(read_text(sources)).rstrip("\n")
    first, _, rest = text.partition("\n")
    separator = next((mark for mark in ";\t" if mark in first), ",")
    header = _is_header(first, separator)
    if separator != ",":
        text = f"{first if header else first.replace(',', '.')}\n{rest.replace(',', '.')}"
    rows = csv.reader(io.StringIO(text), delimiter=separator, skipinitialspace=True)
    lines, width = [], 0
    try:
        for fields in rows:
            width = width or len(fields)
            if max(1, len(fields)) != width:
                raise BadInput(f"{path}, line {rows.line_num}: {len(fields)} columns instead of {width}")
            lines.append(rows.line_num)
    except csv.Error as error:
        raise BadInput(f"{path}, line {rows.line_num}: {error}") from error
    names = _names(first, separator, path) if header else [str(i) for i in range(1, width + 1)]
    try:
        frame = pd.read_csv(
            io.StringIO(text), sep=separator, header=None, names=range(width), skiprows=int(header), index_col=False,
            skip_blank_lines=False, skipinitialspace=True, low_memory=False,
        )  # fmt: skip
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise BadInput(f"{path}: {str(error).strip().splitlines()[0]}") from error
    return frame.set_axis(pd.Index(lines[header:], name="line")).set_axis(names, axis=1)


def _names(line, separator, path):
    names = [name.strip() for name in next(csv.reader([line], delimiter=separator, skipinitialspace=True))]
    names[0] = names[0] or "time"
    if "" in names:
        raise BadInput(f"{path}, line 1: column {names.index('') + 1} has no name")
    return names


def _is_header(line, separator):
    """Whether the first line of a CSV names its columns: something in it is neither a number nor a time."""
    fields = next(csv.reader([line], delimiter=separator, skipinitialspace=True), [])
    return not all(_is_number(field.replace(",", ".")) or _is_time(field) for field in fields)


def _is_number(field):
    try:
        float(field)
    except ValueError:
        return False
    return True


def _is_time(field):
    return any(_parse_times(pd.Series([field]), how) is not None for how in TIME_FORMATS)


def _parse_times(column, how, errors="raise"):
    try:
        parsed = pd.to_datetime(column, format=how, utc=True, errors=errors)  # of several offsets, one time
    except (ValueError, OverflowError):
        return None
    return pd.DatetimeIndex(parsed).tz_localize(None)


def tidy(frame, where, time="", frequency="", missing=""):
    """The Tidy of a data frame; `where` names it in the BadInput that ends what cannot be used.

    time: the column of the times; "": the index if it has times, else the first column that is no number and begins
    with a time, if there is one; "none": such columns are left out. The other columns must be numbers. Times must be
    evenly apart, by what pandas infers or by `frequency`; rows that are not there and values that are missing are
    filled by the rule `missing`, one of FILLS. drop leaves out rows with missing values and takes the others as
    consecutive.
    """
    if missing and missing not in FILLS:
        raise BadInput(f"missing is '{missing}', there are {', '.join(FILLS)}")
    frame = frame.set_axis([str(name) for name in frame.columns], axis=1)
    if twice := sorted(frame.columns[frame.columns.duplicated()]):
        raise BadInput(f"{where}: two columns are called '{twice[0]}'")
    labels, kind = frame.index, frame.index.name or "row"

    def at(row):
        return f"{where}, {kind} {labels[row]}"

    name, times, frame = _times(frame, where, at, time)
    if not len(frame.columns) or len(frame) < 3:
        size = f"{len(frame)} rows and {len(frame.columns)} columns that are not times"
        raise BadInput(f"{where} has {size}; 3 rows and 1 column are the least")
    frame = pd.DataFrame({column: _numbers(frame[column], at) for column in frame.columns})
    holes = frame.isna().to_numpy()
    if holes.any() and not missing:
        row, column = np.argwhere(holes)[0]
        count = f"{holes.sum():,} missing values in all" if holes.sum() > 1 else "the only missing value"
        raise BadInput(f"{at(row)}: {frame.columns[column]} is missing ({count}); --missing={'|'.join(FILLS)} fills it")
    frame.index = pd.RangeIndex(1, len(frame) + 1) if times is None else times
    rows = len(frame)
    if times is not None:
        frequency = _evenly(times, at, frequency, missing)
        frame = frame.reindex(pd.date_range(times[0], times[-1], freq=frequency))
    elif frequency:
        raise BadInput(f"{where} has no times; --frequency={frequency} is for a series that has them")
    filled = int(holes.sum()), len(frame) - rows
    if missing:
        frame = FILLS[missing](frame)
        if (left := frame.isna().to_numpy()).any():
            row, column = np.argwhere(left)[0]
            before = f"{where}: {frame.columns[column]} is missing at {frame.index[row]}"
            raise BadInput(f"{before}, with nothing that --missing={missing} could fill it with")
    return Tidy(frame, name, frequency, filled)


def _times(frame, where, at, time):
    """(name of the times, the times or None, the other columns)."""
    if isinstance(frame.index, pd.DatetimeIndex) and not time:
        index = frame.index
        return index.name or "date", index.tz_convert(None) if index.tz else index, frame
    if time not in ("", "none", *frame.columns):
        raise BadInput(f"{where} has no column '{time}' for --time, there are {', '.join(frame.columns[:8])}")
    texts = [column for column in frame.columns if not pd.api.types.is_numeric_dtype(frame[column])]
    found = [column for column in texts if _begins_with_time(frame[column])]
    if time == "none" or not (time or found):
        return "", None, frame.drop(columns=found)
    name = time or found[0]
    column = frame[name].astype("string")
    if column.isna().any():
        raise BadInput(f"{at(int(column.isna().argmax()))}: {name} is missing; every row needs its time")
    return name, _even_reading(column, name, at), frame.drop(columns=name)


def _begins_with_time(column):
    first = str(column.dropna().iloc[0]) if column.notna().any() else ""
    return not _is_number(first) and _is_time(first)


def _even_reading(column, name, at):
    """The times of a column of text. 1/2/2018 is the day, of two, that makes them evenly apart."""
    column, readings = column.astype(object), []
    for how in TIME_FORMATS:
        times = _parse_times(column, how)
        if times is not None and _inferred(times):
            return times
        readings += [times] if times is not None else []
    if readings:
        return readings[0]
    how = next((how for how in TIME_FORMATS if _parse_times(column[:1], how) is not None), "ISO8601")
    row = int(_parse_times(column, how, "coerce").isna().argmax())
    raise BadInput(f"{at(row)}: {name} is '{column.iloc[row]}', not a time such as 2018-01-31 or 2018-01-31 23:00:00")


def _inferred(times):
    """The frequency of times that are evenly apart, as pandas calls it, else ""."""
    if len(times) < 3 or not (times.is_monotonic_increasing and times.is_unique):
        return ""
    found = pd.DatetimeIndex(times, freq="infer").freq
    return found.freqstr if found is not None else ""


def _evenly(times, at, frequency, missing):
    """The frequency of times; BadInput for the first row that is out of order, twice, off the grid or after a gap."""
    steps = np.diff(times)
    if len(wrong := np.flatnonzero(steps <= np.timedelta64(0))):
        row = wrong[0] + 1
        problem = f"{times[row]} after {times[row - 1]}, a row twice or out of order"
        raise BadInput(f"{at(row)}: {problem}; put it right, or take the rows as they stand with --time=none")
    found = frequency or _inferred(times)
    guess = found or _inferred(times[:10]) or _inferred(times[-10:]) or _offset(pd.Series(steps).mode()[0]).freqstr
    try:
        step = times[0] + (offset := _offset(guess)) - times[0]
    except ValueError as error:
        raise BadInput(f"frequency is '{guess}'; pandas knows such as 10min, h, D, B, W-SUN, MS, ME, QS, YS") from error
    if step * 100 * len(times) < times[-1] - times[0]:
        raise BadInput(f"--frequency={guess} has more than 100 rows for each of the {len(times):,} that there are")
    grid = pd.date_range(times[0], times[-1], freq=offset)
    rest = f"--frequency={guess} and --missing={'|'.join(FILLS)} fill the gaps"
    if not times.isin(grid).all():
        row = int((~times.isin(grid)).argmax())
        raise BadInput(f"{at(row)}: {times[row]} is none of the times that are {guess} apart, from {times[0]} on")
    if len(grid) > len(times) and not (frequency and missing):
        row = int((grid[: len(times)] != times).argmax())
        raise BadInput(f"{at(row)}: a gap: {times[row]}, where {grid[row]} is due; {rest}")
    return guess


def _offset(frequency):
    return pd.tseries.frequencies.to_offset(frequency)


def _numbers(column, at):
    """A column as float64, NaN where it is missing; BadInput for text and for what float32 cannot hold."""
    if not pd.api.types.is_numeric_dtype(column):
        column = column.astype("string")
    values = pd.to_numeric(column, errors="coerce").to_numpy(float, na_value=np.nan)
    with np.errstate(over="ignore"):
        wrong = (np.isnan(values) & column.notna().to_numpy()) | np.isinf(values.astype(DTYPE))
    if wrong.any():
        row = int(wrong.argmax())
        problem = "too large" if np.isfinite(values[row]) else "not a number"
        raise BadInput(f"{at(row)}: {column.name} is {str(column.iloc[row])!r}, {problem}")
    return pd.Series(values, name=column.name)


def season_of(frequency):
    """Rows of a day, of a week where a day is one row, else of a year; 1 where no whole number of rows fits."""
    if not frequency:
        return 1
    times = pd.date_range("2001-01-01", periods=101, freq=frequency)
    for period in PERIODS:
        ratio = period / ((times[-1] - times[0]) / 100)
        if round(ratio) > 1 and abs(ratio / round(ratio) - 1) < 0.01:
            return round(ratio)
    return 1


def split_rows(splits, index, where):
    """{split: rows} of "0.7|0.1|0.2", shares, or of "2018-01-01|2018-07-01", the first times of val and of test."""
    words, rows = parse_list(splits, "splits", str), len(index)
    days = _parse_times(pd.Series(words), "ISO8601")
    if len(words) == 3:
        shares = parse_list(splits, "splits", float)
        if min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
            raise BadInput(f"splits is '{splits}', three shares above 0 that add up to 1, as {SHARES}")
        train, test = int(rows * shares[0]), int(rows * shares[2])
    elif len(words) == 2 and days is not None:
        if not isinstance(index, pd.DatetimeIndex):
            raise BadInput(f"splits is '{splits}', but {where} has no times; give shares, as {SHARES}")
        train, end = index.searchsorted(days)
        test = rows - end
    else:
        raise BadInput(f"splits is '{splits}'; give shares, as {SHARES}, or two times, as 2018-01-01|2018-07-01")
    counts = dict(zip(SPLITS, map(int, (train, rows - train - test, test)), strict=True))
    if min(counts.values()) < 1:
        parts = ", ".join(f"{split} {count}" for split, count in counts.items())
        raise BadInput(f"splits is '{splits}': of the {rows:,} rows, {index[0]} to {index[-1]}, that leaves {parts}")
    return counts


def write_frame(
    frame, folder, *, time="", frequency="", missing="", splits=SHARES, where="the data frame", source=None
):
    """Prepare a data frame for train_TS.py: its Tidy, split, in a folder; returns (Tidy, {split: rows}).

    time, frequency and missing are those of `tidy`, splits is that of `split_rows`; source is what meta.json says of
    where the values come from. Raises BadInput, before anything is written.
    """
    found = tidy(frame, where, time, frequency, missing)
    index = found.frame.index
    rows = split_rows(splits, index, where)
    start, end, minutes = "", "", 0
    if found.frequency:
        steps = np.unique(np.diff(pd.date_range(index[0], periods=30, freq=found.frequency)))
        start, end = str(index[0]), str(index[-1])
        minutes = int(steps[0] / np.timedelta64(1, "m")) if len(steps) == 1 else 0
    write_series(
        Path(folder), found.frame.to_numpy(), rows, columns=[*found.frame.columns], time=found.time, start=start,
        end=end, frequency=found.frequency, minutes=minutes, season=season_of(found.frequency), missing=missing,
        source=source or {},
    )  # fmt: skip
    return found, rows
