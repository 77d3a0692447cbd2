"""The ETT time series (electricity transformer temperature), as prepare.py leaves them in data/ett/<name>/."""

import json
from pathlib import Path

import numpy as np

from training.errors import BadInput

COLUMNS = ["HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT"]
SPLITS = ("train", "val", "test")
DTYPE = np.dtype("<f4")


def load_ett(folder):
    """(values, borders, columns) of a prepared series.

    values: (rows, columns) float32, train, val and test rows in order, standardised by the training rows' mean and
    standard deviation. borders: rows before train, val, test and the end, as (0, 8640, 11520, 14400); a val or test
    window may look back across its border. BadInput if files are missing, cut short or damaged.
    """
    folder = Path(folder)
    again = f"make it with: python data/ett/prepare.py --names {folder.name}"
    try:
        meta = json.loads((folder / "meta.json").read_text())
        rows = [meta["rows"][split] for split in SPLITS]
        mean, std = (np.reshape(meta[key], len(COLUMNS)).astype(float) for key in ("mean", "std"))
        parts = [np.fromfile(folder / f"{split}.bin", DTYPE) for split in SPLITS]
    except OSError as error:
        raise BadInput(f"{error.filename} is missing; {again}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{folder / 'meta.json'} is damaged ({error!r}); {again}") from error
    for split, part, count in zip(SPLITS, parts, rows, strict=True):
        if part.size != count * len(COLUMNS) or not count:
            found = f"{part.size:,} values, not {count:,} rows of {len(COLUMNS)}"
            raise BadInput(f"{folder / split}.bin has {found}; {again}")
    values = np.concatenate(parts).reshape(-1, len(COLUMNS))
    borders = tuple(int(row) for row in np.cumsum([0, *rows]))
    return ((values - mean) / std).astype(np.float32), borders, list(COLUMNS)
