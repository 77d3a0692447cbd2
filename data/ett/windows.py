"""A series as training and evaluation read it: windows of past and future."""

import hashlib
from pathlib import Path

import torch

from data.ett import SPLITS, load_ett
from training.distributed import World
from training.errors import BadInput

ALONE = World()  # one process


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
    """A standardised series as pairs of past and future: `first[split]` has the row at which each future begins."""

    def __init__(self, cfg):
        series = load_ett(Path(cfg.data_dir) / cfg.dataset)
        values = series.values if cfg.features == "M" else series.values[:, [series.columns.index("OT")]]
        self.look_back, self.horizon, self.eval_batch_size = cfg.look_back, cfg.horizon, cfg.eval_batch_size
        self.first = first_targets(series.borders, cfg.look_back, cfg.horizon)
        self.steps_a_day = 24 * 60 // series.minutes
        self.channels, self.sha256 = values.shape[1], hashlib.sha256(values.tobytes()).hexdigest()
        self.values = torch.from_numpy(values)

    def to(self, device):
        self.values = self.values.to(device)
        return self

    def batch(self, rows):
        """The past (B, look_back, channels) and the future (B, horizon, channels) of windows given by first target."""
        steps = torch.arange(-self.look_back, self.horizon)
        windows = self.values[(torch.as_tensor(rows)[:, None] + steps).to(self.values.device)]
        return windows[:, : self.look_back], windows[:, self.look_back :]

    def errors(self, forecast, split, world=ALONE):
        """(MSE, MAE) of forecast(past) over every window, step and channel of a split.

        Each process of `world` computes a part of it.
        """
        rows, size = self.first[split], self.eval_batch_size
        firsts = range(0, len(rows), size)
        sums = torch.zeros(len(firsts), 2, dtype=torch.float64)
        for i in world.part(len(firsts)):
            past, future = self.batch(rows[firsts[i] : firsts[i] + size])
            error = (forecast(past).float() - future).cpu().double()  # not every device has float64
            sums[i] = torch.stack([error.square().sum(), error.abs().sum()])
        return (world.collect(sums).sum(0) / (len(rows) * self.horizon * self.channels)).tolist()

    def evaluate(self, forecast, world=ALONE):
        val_mse, _ = self.errors(forecast, "val", world)
        test_mse, test_mae = self.errors(forecast, "test", world)
        return {"val/mse": val_mse, "test/mse": test_mse, "test/mae": test_mae}
