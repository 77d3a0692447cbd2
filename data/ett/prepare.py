"""The ETT time series, checked and split into 12, 4 and 4 months: `python data/ett/prepare.py`, a second a series."""

import argparse
import csv
import hashlib
import math
import sys
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.ett import COLUMNS
from data.files import decode, download, output_folder, read_bytes
from data.series import write_series
from training.errors import BadInput, command

URL = "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/{}.csv"
SERIES = {  # name: (minutes between rows, rows)
    "ETTh1": (60, 17420),
    "ETTh2": (60, 17420),
    "ETTm1": (15, 69680),
    "ETTm2": (15, 69680),
}
SHA256 = {  # of the published files, where known
    "ETTh1": "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066",
    "ETTh2": "a3dc2c597b9218c7ce1cd55eb77b283fd459a1d09d753063f944967dd6b9218b",
}
MONTHS = {"train": 12, "val": 4, "test": 4}  # Informer's split, months of 30 days; what follows is not used


def read_series(text, where, minutes, rows):
    """(first timestamp, (rows, columns) values) of a CSV; BadInput names the line that is not as it must be."""
    lines = csv.reader(text.splitlines())
    header = next(lines, [])
    if [name.strip().lower() for name in header] != [name.lower() for name in ["date", *COLUMNS]]:
        raise BadInput(f"{where}: the header is {','.join(header)!a}; it must be date,{','.join(COLUMNS)}")
    start, values = None, []
    for number, fields in enumerate(lines, 2):
        if len(fields) != len(header):
            raise BadInput(f"{where}, line {number}: {len(fields)} columns instead of {len(header)}")
        time = read_time(fields[0], f"{where}, line {number}")
        start = start or time
        due = start + len(values) * timedelta(minutes=minutes)
        if time != due:
            problem = "a gap" if time > due else "a row twice or out of order"
            raise BadInput(f"{where}, line {number}: {problem}: {time}, where {due} is due")
        values.append([read_value(*pair, f"{where}, line {number}") for pair in zip(fields[1:], COLUMNS, strict=True)])
    if len(values) != rows:
        raise BadInput(f"{where}: {len(values):,} rows; the published file has {rows:,}")
    return start, np.array(values)


def read_time(field, where):
    try:
        return datetime.strptime(field, "%Y-%m-%d %H:%M:%S")
    except ValueError as error:
        raise BadInput(f"{where}: {field!r} is not a time such as 2016-07-01 00:00:00") from error


def read_value(field, column, where):
    try:
        value = float(field)
    except ValueError as error:
        raise BadInput(f"{where}: {column} is {field!r}, not a number") from error
    if not math.isfinite(value):
        raise BadInput(f"{where}: {column} is {field!r}; a missing value cannot be used")
    return value


def check_published(name, text, where):
    """BadInput where the text, lines ending in "\n", is known not to be the published file's."""
    found = hashlib.sha256(text.encode()).hexdigest()
    if SHA256.get(name, found) != found:
        problem = f"the values are not those of the published {name} (sha256 {found[:12]}.., not {SHA256[name][:12]}..)"
        raise BadInput(f"{where}: {problem}; --changed takes them as they are")


def check_varies(train, where):
    """BadInput for a channel that has no deviation to be standardised by. train: (rows, columns)."""
    for column, values in zip(COLUMNS, train.T, strict=True):
        if values.min() == values.max():
            constant = f"{column} is {values[0]:g} in all {len(values):,} training rows"
            raise BadInput(f"{where}: {constant}; a constant cannot be standardised")


def prepare(folder, name, content, where, changed=False):
    """Check the bytes of a CSV, then write the series that they hold."""
    minutes, rows = SERIES[name]
    text = decode(content, where)
    start, values = read_series(text, where, minutes, rows)
    counts = {split: months * 30 * 24 * 60 // minutes for split, months in MONTHS.items()}
    check_varies(values[: counts["train"]], where)
    if not changed:
        check_published(name, text, where)
    source = {"rows": rows, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write_series(folder, values, counts, columns=COLUMNS, start=str(start), minutes=minutes, source=source)
    shares = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    print(f"{folder}: {shares} rows; source sha256 {source['sha256']}")


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--names", nargs="+", choices=SERIES, default=["ETTh1", "ETTh2"], help="series to download")
    parser.add_argument("--input", metavar="PATH", nargs="+", help="local files instead, called ETTh1.csv and so on")
    parser.add_argument("--out", metavar="DIR", default=Path(__file__).parent, help="where the folders go")
    parser.add_argument("--changed", action="store_true", help="accept values other than the published ones")
    args = parser.parse_args(argv)
    out = output_folder(args.out)

    for path in args.input or []:
        if Path(path).stem not in SERIES:
            raise BadInput(f"{path}: the file's name must say which series it is: {', '.join(SERIES)}")
    for source in args.input or args.names:
        name = Path(source).stem
        content = read_bytes(source) if args.input else download(URL.format(name))
        prepare(out / name, name, content, source if args.input else URL.format(name), args.changed)


if __name__ == "__main__":
    main()
