"""The ETT time series (electricity transformer temperature), as prepare.py leaves them in data/ett/<name>/."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.files import at_home
from training.errors import BadInput
from training.files import here

COLUMNS = ["HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT"]
SPLITS = ("train", "val", "test")
DTYPE = np.dtype("<f4")


class Series(NamedTuple):
    """A prepared series.

    values: (rows, columns) float32, train, val and test rows in order, standardised by the training rows' mean and
    standard deviation. borders: rows before train, val, test and the end, as (0, 8640, 11520, 14400); a val or test
    window may look back across its border. columns: their names. minutes: between two rows.
    """

    values: np.ndarray
    borders: tuple[int, ...]
    columns: list[str]
    minutes: int


def load_ett(folder):
    """The Series that prepare.py left in a folder. BadInput if files are missing, cut short or damaged."""
    folder = Path(folder)
    where = "" if at_home(folder, Path(__file__).parent) else f" --out {folder.parent}"
    again = f"make it with: python {here('data/ett/prepare.py')} --names {folder.name}{where}"
    try:
        meta = json.loads((folder / "meta.json").read_text())
        rows, minutes = [meta["rows"][split] for split in SPLITS], int(meta["minutes"])
        mean, std = (np.reshape(meta[key], len(COLUMNS)).astype(float) for key in ("mean", "std"))
        parts = [np.fromfile(folder / f"{split}.bin", DTYPE) for split in SPLITS]
    except OSError as error:
        raise BadInput(f"{error.filename} is missing; {again}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{folder / 'meta.json'} is damaged ({error!r}); {again}") from error
    if not (np.isfinite([mean, std]).all() and (std > 0).all()):
        numbers = f"means {mean.tolist()}, standard deviations {std.tolist()}"
        raise BadInput(f"{folder / 'meta.json'} is damaged ({numbers}); {again}")
    for split, part, count in zip(SPLITS, parts, rows, strict=True):
        if part.size != count * len(COLUMNS) or not count:
            found = f"{part.size:,} values, not {count:,} rows of {len(COLUMNS)}"
            raise BadInput(f"{folder / split}.bin has {found}; {again}")
        if not np.isfinite(part).all():
            row, column = divmod(int(np.isfinite(part).argmin()), len(COLUMNS))
            raise BadInput(f"{folder / split}.bin, row {row:,}: {COLUMNS[column]} is no finite number; {again}")
    values = np.concatenate(parts).reshape(-1, len(COLUMNS))
    borders = tuple(int(row) for row in np.cumsum([0, *rows]))
    return Series(((values - mean) / std).astype(np.float32), borders, list(COLUMNS), minutes)
