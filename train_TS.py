"""Train a transformer encoder to forecast a time series, with any scoring function.

    python train_TS.py config/ts_configs/tiny.py
    python train_TS.py config/ts_configs/etth1.py config/ts_configs/mlr.py --horizon=192

The model reads look_back hours and predicts the next horizon hours. From top to bottom: the settings, which windows a
split has, what a loss and an evaluation are. The series comes from data/ett, the loop is training/loop.py.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from data.ett import SPLITS, load_ett
from model import Forecaster
from training.configurator import configure, setting
from training.errors import BadInput, command
from training.loop import Experiment
from training.schedule import lr_factor
from training.settings import RunSettings, StructureSettings


@dataclass
class Settings(RunSettings, StructureSettings):
    """Train a transformer on time-series forecasting. Config files and flags, the later one winning."""

    dataset: str = setting("ETTh1", "folder in data_dir that data/ett/prepare.py made")
    data_dir: str = setting("data/ett", "where the prepared series are", free=True)
    features: str = setting("M", "channels, read and predicted: M, all of them, or S, the oil temperature OT alone")
    look_back: int = setting(96, "steps of the past that the model reads")
    horizon: int = setting(96, "steps of the future that it predicts")
    block_size: int = setting(-1, "length of the model's input; -1: look_back, and nothing else fits")
    n_layer: int = setting(2, "number of blocks")
    d_model: int = setting(512, "model width")
    n_head: int = setting(8, "number of heads; -1: d_model / d_head")
    mlr_rank_list: str = setting("32|16|8|8", "rank of every level, coarse to fine; they add up to the head width")
    sliding_block_size: int = setting(48, "window W: a step sees itself and the W on either side")
    sequential_GSWA_layer_list: str = setting("MHA|SWA", "kind of every layer, MHA or SWA")
    batch_size: int = setting(32, "windows in a step")
    max_iters: int = setting(1_000, "steps to train for", free=True)
    init_lr: float = setting(2e-4, "peak learning rate at fan-in 768; other widths follow by µP")
    warmup_iters: int = setting(20, "steps of linear warm-up; constant after it")
    eval_interval: int = setting(100, "steps between two evaluations, each followed by a checkpoint", free=True)
    eval_batch_size: int = setting(256, "windows the evaluation takes at a time; changes no result", free=True)

    ALIASES: ClassVar[dict] = dict(n_embd="d_model", learning_rate="init_lr")
    POSITIVE: ClassVar[tuple] = ("init_lr",)
    AT_LEAST: ClassVar[dict] = dict(
        look_back=1, horizon=1, batch_size=1, max_iters=0, warmup_iters=0, eval_interval=1, eval_batch_size=1
    )

    def __post_init__(self):
        super().__post_init__()
        if self.features not in ("M", "S"):
            raise BadInput(f"features is '{self.features}', there are M (all channels) and S (OT alone)")
        if self.block_size not in (-1, self.look_back):
            raise BadInput(f"block_size is {self.block_size}, the model reads look_back = {self.look_back} steps")


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


class Forecasting(Experiment):
    """Mean squared error of standardised values over the horizon; predicting zero costs 1 in the training part."""

    def __init__(self, cfg):
        model_cfg = cfg.model_config(block_size=cfg.look_back, causal=False)
        values, borders, columns = load_ett(Path(cfg.data_dir) / cfg.dataset)
        if cfg.features == "S":
            values = values[:, [columns.index("OT")]]
        self.windows = first_targets(borders, cfg.look_back, cfg.horizon)
        self.channels, self.sha256 = values.shape[1], hashlib.sha256(values.tobytes()).hexdigest()
        super().__init__(cfg, "train_TS.py", lambda: Forecaster(model_cfg, self.channels, cfg.horizon), cfg.init_lr)
        if self.run.saved and self.run.saved["sha256"] != self.sha256:
            raise BadInput(f"{cfg.data_dir}/{cfg.dataset} is not the series that {self.run.folder} was trained on")
        self.values = torch.from_numpy(values).to(self.device)

    def batch(self, rows):
        """The past (B, look_back, channels) and the future (B, horizon, channels) of windows given by first target."""
        steps = torch.arange(-self.cfg.look_back, self.cfg.horizon)
        windows = self.values[(torch.as_tensor(rows)[:, None] + steps).to(self.device)]
        return windows[:, : self.cfg.look_back], windows[:, self.cfg.look_back :]

    def training_rows(self, step):
        """First targets of a step's windows, a pure function of (seed, step).

        Every epoch takes each training window once, in an order keyed by (seed, epoch); a batch may straddle two.
        """
        cfg, windows = self.cfg, self.windows["train"]
        epochs, places = np.divmod(step * cfg.batch_size + np.arange(cfg.batch_size), len(windows))
        rows = []
        for epoch in np.unique(epochs):
            rng = np.random.Generator(np.random.Philox(key=cfg.seed, counter=[0, 0, 0, int(epoch)]))
            rows.append(windows.start + rng.permutation(len(windows))[places[epochs == epoch]])
        return np.concatenate(rows)

    def loss(self, step, micro):
        past, future = self.batch(self.training_rows(step))
        return {"train/mse": (self.network(past).float() - future).square().mean()}

    def errors(self, split):
        """(MSE, MAE) over every window, hour and channel of a split."""
        rows, size = self.windows[split], self.cfg.eval_batch_size
        squared = absolute = 0.0
        for first in range(0, len(rows), size):
            past, future = self.batch(rows[first : first + size])
            with self.context():
                error = (self.network(past).float() - future).cpu().double()  # not every device has float64
            squared += error.square().sum().item()
            absolute += error.abs().sum().item()
        count = len(rows) * self.cfg.horizon * self.channels
        return squared / count, absolute / count

    def evaluate(self):
        val_mse, _ = self.errors("val")
        test_mse, test_mae = self.errors("test")
        return {"val/mse": val_mse, "test/mse": test_mse, "test/mae": test_mae}

    def headline(self, metrics):
        words = f"val mse {metrics['val/mse']:.4f}, test mse {metrics['test/mse']:.4f}, mae {metrics['test/mae']:.4f}"
        return words, metrics["val/mse"]

    def summary(self, means):
        return means

    def lr_factor(self, step):
        return lr_factor(step, self.cfg.warmup_iters)

    def step_cost(self, step):
        B, cost = self.cfg.batch_size, self.cost(self.cfg.look_back)
        return Counter(
            tokens=B * self.cfg.look_back,
            compute=6 * B * cost.macs,
            non_emb_compute=6 * B * cost.non_emb,
            paper_compute=B * cost.paper,
        )

    def state(self):
        return dict(super().state(), sha256=self.sha256)  # of the series: a resume must find the same


@command
def main(argv=None):
    Forecasting(configure(Settings, argv)).fit()


if __name__ == "__main__":
    main()
