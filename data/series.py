"""A prepared time series in a folder, as the prepare scripts write it, and as training and evaluation read it."""

import contextlib
import hashlib
import json
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data.ett import NAMES
from data.files import at_home, json_bytes, make_folder, writing
from training.distributed import World
from training.errors import BadInput
from training.files import ROOT, here, replacing

SPLITS = ("train", "val", "test")
DTYPE = np.dtype("<f4")
ALONE = World()  # one process


class Series(NamedTuple):
    """A prepared series.

    values: (rows, columns) float32, train, val and test rows in order, standardised by mean and std, those of the
    training rows. borders: rows before train, val, test and the end, as (0, 8640, 11520, 14400); a val or test window
    may look back across its border. columns: their names. time: the name of their times, which are one `frequency`
    apart, a name of pandas such as "60min" or "ME", the last being `end`; both are "" where there are no times.
    minutes: the same as a number, 0 where months and the like differ in length. season: rows after which the series
    may repeat itself, as those of a day. missing: the rule that filled what was missing, or "".
    """

    values: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    borders: tuple[int, ...]
    columns: list[str]
    time: str
    frequency: str
    minutes: int
    season: int
    end: str
    missing: str

    def only(self, names):
        """The Series of some of its columns."""
        keep = [self.columns.index(name) for name in names]
        return self._replace(
            values=self.values[:, keep], mean=self.mean[keep], std=self.std[keep], columns=list(names)
        )


def load_series(folder):
    """The Series that a prepare.py left in a folder. BadInput if files are missing, cut short or damaged."""
    folder = Path(folder)
    again = f"make it with: python {_command(folder)}"
    try:
        meta = json.loads((folder / "meta.json").read_text())
        rows, columns = [meta["rows"][split] for split in SPLITS], [str(name) for name in meta["columns"]]
        mean, std = (np.reshape(meta[key], len(columns)).astype(float) for key in ("mean", "std"))
        if "frequency" not in meta:  # ETT's: every so many minutes from a start
            minutes, last = int(meta["minutes"]), timedelta(minutes=meta["minutes"]) * (sum(rows) - 1)
            meta |= dict(frequency=f"{minutes}min", season=24 * 60 // minutes, time="date", missing="")
            meta |= dict(end=str(datetime.fromisoformat(meta["start"]) + last))
        words = {key: str(meta[key]) for key in ("time", "frequency", "end", "missing")}
        numbers = {key: int(meta[key]) for key in ("minutes", "season")}
        parts = [np.fromfile(folder / f"{split}.bin", DTYPE) for split in SPLITS]
    except OSError as error:
        raise BadInput(f"{error.filename} is missing; {again}") from error
    except (ValueError, KeyError, TypeError, ArithmeticError) as error:
        raise BadInput(f"{folder / 'meta.json'} is damaged ({error!r}); {again}") from error
    if not (np.isfinite([mean, std]).all() and (std > 0).all()):
        values = f"means {mean.tolist()}, standard deviations {std.tolist()}"
        raise BadInput(f"{folder / 'meta.json'} is damaged ({values}); {again}")
    for split, part, count in zip(SPLITS, parts, rows, strict=True):
        if part.size != count * len(columns) or not count:
            found = f"{part.size:,} values, not {count:,} rows of {len(columns)}"
            raise BadInput(f"{folder / split}.bin has {found}; {again}")
        if not np.isfinite(part).all():
            row, column = divmod(int(np.isfinite(part).argmin()), len(columns))
            raise BadInput(f"{folder / split}.bin, row {row:,}: {columns[column]} is no finite number; {again}")
    values = np.concatenate(parts).reshape(-1, len(columns))
    borders = tuple(int(row) for row in np.cumsum([0, *rows]))
    return Series(((values - mean) / std).astype(np.float32), mean, std, borders, columns, **words, **numbers)


def _command(folder):
    """How a missing series is made."""
    kind, given = ("ett", f"--names {folder.name}") if folder.name in NAMES else ("csv", f"--input {folder.name}.csv")
    home = at_home(folder, ROOT / "data" / kind)
    where = "" if home else f" --out {folder.parent if kind == 'ett' else folder}"
    return f"{here(f'data/{kind}/prepare.py')} {given}{where}"


def write_series(folder, values, rows, **about):
    """Write train.bin, val.bin, test.bin and, last, meta.json, of values (rows, columns) in float64; returns the meta.

    rows: {split: how many}, in order; what follows them is left out. about: what meta.json says besides. A column that
    is constant in the training part has the deviation 1.
    """
    borders = [0, *(int(row) for row in np.cumsum(list(rows.values())))]
    train = values[: rows["train"]]
    std = np.where(train.min(0) == train.max(0), 1, train.std(0))
    spans = zip(SPLITS, borders[:-1], borders[1:], strict=True)
    parts = {split: values[start:end].astype(DTYPE).tobytes() for split, start, end in spans}
    meta = {"name": Path(folder).name, "dtype": "float32", "rows": rows, "borders": borders}
    meta |= {**about, "mean": train.mean(0).tolist(), "std": std.tolist()}
    meta["sha256"] = {split: hashlib.sha256(part).hexdigest() for split, part in parts.items()}
    make_folder(folder)
    files = {"meta.json": json_bytes(meta), **{f"{split}.bin": part for split, part in parts.items()}}
    with writing(folder), contextlib.ExitStack() as stack:  # the last to be opened is the first to be put in place
        for file, part in files.items():
            stack.enter_context(replacing(folder / file)).write(part)
        (folder / "meta.json").unlink(missing_ok=True)
    return meta


def first_targets(borders, look_back, horizon):
    """{split: range of the rows at which a window's future begins}, every row once.

    A window of row t reads the look_back rows before t, those of the split before too, and predicts rows t to
    t + horizon - 1, all in its split. BadInput where a split has no window.
    """
    windows = {}
    for split, start, end in zip(SPLITS, borders[:-1], borders[1:], strict=True):
        windows[split] = range(max(start, look_back), end - horizon + 1)
        if not windows[split]:
            need = f"look_back {look_back} and horizon {horizon}" if start < look_back else f"horizon {horizon}"
            raise BadInput(f"the {split} part has {end - start:,} rows, too few for {need}")
    return windows


class Windows:
    """A standardised series as pairs of past and future: `first[split]` has the row at which each future begins.

    Of the settings `features` and `target` follow series (the columns that are read), channels (their number),
    columns (the names of those that are predicted) and predicted (which of the channels they are).
    """

    def __init__(self, cfg):
        self.series = load_series(Path(cfg.data_dir) / cfg.dataset)
        names, target = self.series.columns, cfg.target or self.series.columns[-1]
        if target not in names:
            some = ", ".join(names if len(names) <= 8 else [*names[:6], "..", names[-1]])
            raise BadInput(f"target is '{target}', the columns of {cfg.data_dir}/{cfg.dataset} are {some}")
        if cfg.features == "S":
            self.series = self.series.only([target])
        self.columns = names if cfg.features == "M" else [target]
        self.predicted = slice(None)
        if cfg.features == "MS":
            self.predicted = slice(names.index(target), names.index(target) + 1)
        self.look_back, self.horizon, self.eval_batch_size = cfg.look_back, cfg.horizon, cfg.eval_batch_size
        self.first = first_targets(self.series.borders, cfg.look_back, cfg.horizon)
        values = self.series.values
        self.channels, self.sha256 = values.shape[1], hashlib.sha256(values.tobytes()).hexdigest()
        self.values = torch.from_numpy(values)

    def to(self, device):
        self.values = self.values.to(device)
        return self

    def batch(self, rows):
        """The past (B, look_back, channels) and the future (B, horizon, predicted) of windows given by first target."""
        steps = torch.arange(-self.look_back, self.horizon)
        windows = self.values[(torch.as_tensor(rows)[:, None] + steps).to(self.values.device)]
        return windows[:, : self.look_back], windows[:, self.look_back :, self.predicted]

    def errors(self, forecast, split, world=ALONE):
        """(MSE, MAE) of forecast(past) over every window, step and predicted channel of a split.

        Each process of `world` computes a part of it.
        """
        rows, size = self.first[split], self.eval_batch_size
        firsts = range(0, len(rows), size)
        sums = torch.zeros(len(firsts), 2, dtype=torch.float64)
        for i in world.part(len(firsts)):
            past, future = self.batch(rows[firsts[i] : firsts[i] + size])
            error = forecast(past)[..., self.predicted].float() - future
            error = error.cpu().double()  # not every device has float64
            sums[i] = torch.stack([error.square().sum(), error.abs().sum()])
        return (world.collect(sums).sum(0) / (len(rows) * self.horizon * len(self.columns))).tolist()

    def evaluate(self, forecast, world=ALONE):
        val_mse, _ = self.errors(forecast, "val", world)
        test_mse, test_mae = self.errors(forecast, "test", world)
        return {"val/mse": val_mse, "test/mse": test_mse, "test/mae": test_mae}
