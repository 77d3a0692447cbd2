"""A time series of yours, any CSV: `python data/csv/prepare.py --input sales.csv` writes data/csv/sales."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.documents import describe, opened
from data.files import output_folder
from data.frames import FILLS, SHARES, read_csv, write_frame
from training.errors import command
from training.files import here


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", metavar="PATH", required=True, help="CSV, also .gz, .xz, .zst; - for standard input")
    parser.add_argument("--out", metavar="NAME", help="a folder, or a name in data/csv; default: the file's name")
    parser.add_argument("--time", default="", help="column of the times, or none; default: the first that has times")
    parser.add_argument("--frequency", default="", help="between two rows, as 10min, h, D, B, MS; default: inferred")
    parser.add_argument("--missing", default="", choices=FILLS, help="what becomes of missing values and rows")
    parser.add_argument("--splits", default=SHARES, help=f"shares, {SHARES}, or when val and test start, DATE|DATE")
    args = parser.parse_args(argv)
    name = args.out or ("series" if args.input == "-" else Path(args.input).name.partition(".")[0])
    home = Path(__file__).parent
    folder = output_folder(name if Path(name).name != name else home / name)

    with opened([args.input], folder, folders=False) as sources:
        frame, source = read_csv(sources, args.input), describe(sources)[0]
    tidy, rows = write_frame(
        frame, folder, time=args.time, frequency=args.frequency, missing=args.missing, splits=args.splits,
        where=args.input, source=source,
    )  # fmt: skip
    index, shares = tidy.frame.index, ", ".join(f"{split} {count:,}" for split, count in rows.items())
    every = f"every {tidy.frequency}, {index[0]} to {index[-1]}" if tidy.frequency else "without times"
    print(f"{folder}: {shares} rows, columns: {len(tidy.frame.columns)}, {every}")
    if any(tidy.filled):
        print("missing: {:,} values and {:,} rows, {}".format(*tidy.filled, args.missing))
    where = "" if folder.parent.resolve() == home.resolve() else f" --data_dir={folder.parent}"
    print(f"forecast it: python {here('scripts/own_series.py')} --dataset={folder.name}{where}")


if __name__ == "__main__":
    main()
