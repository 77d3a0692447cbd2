"""Train a forecaster of a time series: a transformer encoder with any scoring function, or one to compare it with.

    python train_TS.py config/ts_configs/tiny.py
    python train_TS.py config/ts_configs/etth1.py config/ts_configs/mlr.py --horizon=192
    python train_TS.py config/ts_configs/dlinear.py

The model reads look_back steps and predicts the next horizon steps. From top to bottom: the settings, which windows a
split has and their errors, the loss, and the run: its series (data/series.py), model, optimizer, step, evaluation and
loop. What is due around a step (records, checkpoints, resumes, stops) is in training/loop.py.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from data.series import ALONE, Windows
from forecasters import (
    RULES,
    TRAINED,
    DLinear,
    InstanceNorm,
    PatchForecaster,
    number_of_patches,
    repeat_last,
    seasonal_naive,
)
from model import Compute, Forecaster
from structured import default_block_sizes
from training.configurator import configure, parse_list, setting
from training.devices import pick_device
from training.distributed import World
from training.errors import BadInput, command
from training.loop import Loop, LossMeter, counted
from training.optimizer import Optimizer
from training.process import Process
from training.run import Run
from training.schedule import lr_factor
from training.settings import RunSettings, StructureSettings
from training.signals import say

SCHEDULES = {  # share of the peak rate in epoch 0, 1, ..; the names are those of DLinear's and PatchTST's code
    "constant": lambda epoch: 1.0,
    "type1": lambda epoch: 0.5 ** max(0, epoch - 1),
    "type3": lambda epoch: 0.9 ** max(0, epoch - 3),
}
FEATURES = "M: all channels; S: the target alone; MS: all are read, loss and errors are the target's"


@dataclass
class Settings(RunSettings, StructureSettings):
    """Train a forecaster of a time series. Config files and flags, the later one winning."""

    dataset: str = setting("ETTh1", "folder in data_dir that data/ett/prepare.py or data/csv/prepare.py made")
    data_dir: str = setting("data/ett", "where the prepared series are", free=True)
    features: str = setting("M", f"{FEATURES} (patch, dlinear: no channel sees another, MS is as S)")
    target: str = setting("", "features S and MS: the column to predict; empty: the last", before="")
    forecaster: str = setting("encoder", "encoder, patch (PatchTST), dlinear; untrained: repeat_last, seasonal_naive")
    instance_norm: bool = setting(False, "reversible: standardise each window by itself (PatchTST has it)")
    look_back: int = setting(96, "steps of the past that the model reads")
    horizon: int = setting(96, "steps of the future that it predicts")
    block_size: int = setting(-1, "length of the model's input; -1: look_back, and nothing else fits")
    n_layer: int = setting(2, "number of blocks")
    d_model: int = setting(512, "model width")
    n_head: int = setting(8, "number of heads; -1: d_model / d_head")
    mlr_rank_list: str = setting("32|16|8|8", "rank of every level, coarse to fine; they add up to the head width")
    sliding_block_size: int = setting(48, "window W: a step sees itself and the W on either side")
    sequential_GSWA_layer_list: str = setting("MHA|SWA", "kind of every layer, MHA or SWA")
    batch_size: int = setting(32, "windows in a step, of all processes together")
    max_iters: int = setting(1_000, "steps to train for", free=True)
    init_lr: float = setting(2e-4, "peak learning rate at fan-in 768; other widths follow by µP")
    one_rate: bool = setting(False, "every weight learns at init_lr, as in PatchTST's code, not by µP")
    warmup_iters: int = setting(20, "steps of linear warm-up")
    lr_schedule: str = setting("constant", "after it: constant, type1 (halved each epoch after the 2nd), type3 (x 0.9)")
    eval_interval: int = setting(100, "steps between two evaluations, each followed by a checkpoint", free=True)
    patience: int = setting(0, "end after so many evaluations in a row without a lower val/mse; 0: never", free=True)
    eval_batch_size: int = setting(256, "windows the evaluation takes at a time; changes no result", free=True)

    ALIASES: ClassVar[dict] = dict(n_embd="d_model", learning_rate="init_lr")
    POSITIVE: ClassVar[tuple] = ("init_lr",)
    AT_LEAST: ClassVar[dict] = dict(
        look_back=1, horizon=1, batch_size=1, max_iters=0, warmup_iters=0, eval_interval=1, patience=0,
        eval_batch_size=1,
    )  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        choices = dict(features=("M", "S", "MS"), forecaster=(*TRAINED, *RULES), lr_schedule=SCHEDULES)
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise BadInput(f"{name} is '{getattr(self, name)}', there are {', '.join(known)}")
        if self.features == "M" and self.target:
            raise BadInput(f"target is '{self.target}', features M predicts every column; give --features=MS or S")
        if self.block_size not in (-1, self.look_back):
            raise BadInput(f"block_size is {self.block_size}, the model reads look_back = {self.look_back} steps")

    def trunk(self, length):
        """The encoder's configuration for sequences of any length.

        MLR's default blocks are those of the next length that halves often enough, cut at the length there is: 42
        steps on 4 levels have the blocks of 48, which are 48 (all 42), 24, 12 and 6.
        """
        if self.token_mixing_struct != "multi_level_low_rank" or self.mlr_block_size_list != "default":
            return self.model_config(block_size=length, causal=False)
        finest = 2 ** (len(parse_list(self.mlr_rank_list, "mlr_rank_list")) - 1)
        padded = math.ceil(length / finest) * finest
        cfg = self.model_config(block_size=padded, causal=False)
        blocks = tuple(min(b, length) for b in default_block_sizes(padded, len(cfg.scoring.ranks)))
        return replace(cfg, scoring=replace(cfg.scoring, block_size=length, block_sizes=blocks))

    def build(self, channels):
        """The trained forecaster; BadInput for one that cannot be."""
        if self.forecaster == "encoder":
            model = Forecaster(self.trunk(self.look_back), channels, self.horizon)
        elif self.forecaster == "patch":
            trunk = self.trunk(number_of_patches(self.look_back))
            model = PatchForecaster(trunk, channels, self.look_back, self.horizon)
        else:
            model = DLinear(channels, self.look_back, self.horizon)
        return InstanceNorm(model) if self.instance_norm else model


def training_rows(first, cfg, step):
    """First targets, out of the range `first`, of a step's windows: a pure function of (seed, step).

    Every epoch takes each training window once, in an order keyed by (seed, epoch); a batch may straddle two.
    """
    epochs, places = np.divmod(step * cfg.batch_size + np.arange(cfg.batch_size), len(first))
    rows = []
    for epoch in np.unique(epochs):
        rng = np.random.Generator(np.random.Philox(key=cfg.seed, counter=[0, 0, 0, int(epoch)]))
        rows.append(first.start + rng.permutation(len(first))[places[epochs == epoch]])
    return np.concatenate(rows)


def losses(network, past, future, predicted):
    """Mean squared error of the standardised channels `predicted`; zero costs 1 in the training part."""
    return {"train/mse": (network(past)[..., predicted].float() - future).square().mean()}


def rate_factor(cfg, windows_an_epoch, step):
    """Share of the peak learning rate at a step."""
    epoch = step * cfg.batch_size // windows_an_epoch
    return lr_factor(step, cfg.warmup_iters) * SCHEDULES[cfg.lr_schedule](epoch)


class Best:
    """The evaluation of lowest val/mse, a run's result: its `line`, its `model`, and how many have `waited` since.

    Its step and test errors are in every line of the record as best/.., its weights in the checkpoint as best_model.
    """

    def __init__(self, saved):
        saved = saved or {}
        self.line, self.model = saved.get("best_line", {}), saved.get("best_model", {})
        self.waited, self.val_mse = saved.get("waited", 0), saved.get("best", math.inf)

    def add(self, step, metrics, model):
        self.waited += 1
        if metrics["val/mse"] < self.val_mse or not self.line:
            self.waited, self.val_mse = 0, metrics["val/mse"]
            self.line = {"best/step": step} | {f"best/test_{kind}": metrics[f"test/{kind}"] for kind in ("mse", "mae")}
            self.model = {name: value.clone() for name, value in model.state_dict().items()}

    def state(self):
        return dict(best_line=self.line, best_model=self.model, waited=self.waited)


def headline(metrics):
    words = f"val mse {metrics['val/mse']:.4f}, test mse {metrics['test/mse']:.4f}, mae {metrics['test/mae']:.4f}"
    best = f"{metrics['best/test_mse']:.4f}, {metrics['best/test_mae']:.4f}"
    return f"{words} (where val was lowest, step {metrics['best/step']}: {best})", metrics["val/mse"]


def training(cfg, **one_of_several):
    """The run that the settings ask for, step by step: it yields before each, so that several can take turns.

    one_of_several: what training/together.py passes to `Run` then.
    """
    data = Windows(cfg)
    if cfg.forecaster == "patch" and World.from_environment().size > 1:
        raise BadInput("forecaster patch trains in one process: its BatchNorm needs the whole batch")
    process = Process(cfg, attention_backend=cfg.attention_backend)
    run = Run(cfg, "train_TS.py", process.world, **one_of_several)
    process.join()
    model = process.initialised(lambda: cfg.build(data.channels), cfg.mup)
    network = process.network(model)
    optimizer = Optimizer(model, cfg.init_lr, cfg, process.device, one_rate=cfg.one_rate, mup=cfg.mup)
    meter = LossMeter(process.world, overflows=cfg.dtype == "float16")
    first = data.to(process.device).first["train"]

    def train_step(step, past, future):
        with process.micro_batch(network, step, 0):
            with process.autocast():
                found = losses(network, past, future, data.predicted)
            optimizer.backward(found["train/mse"])
        meter.add(found, step, 1)
        meter.add_gradient_norm(optimizer.clip(cfg.grad_clip), step)
        optimizer.step()

    def evaluate():
        with process.autocast():
            return data.evaluate(network, process.world)

    def line(metrics):
        best.add(loop.step, metrics, model)
        return metrics | best.line

    best, cost = Best(run.saved), model.compute(cfg.look_back)
    loop = Loop(
        cfg, process, run, model, optimizer, meter, evaluate=evaluate, headline=headline, line=line,
        cost=lambda step: counted(cost, cfg.batch_size, cfg.look_back),
        state=lambda: dict(sha256=data.sha256, **best.state()),  # a resume must find the same series
    )  # fmt: skip
    if run.saved and run.saved["sha256"] != data.sha256:
        raise BadInput(f"{cfg.data_dir}/{cfg.dataset} is not the series that {run.folder} was trained on")
    with loop:
        for step in loop:
            yield
            if 0 < cfg.patience <= best.waited:
                say(f"no lower val mse in {best.waited} evaluations: ends at step {step}")
                break
            optimizer.set_rate(rate_factor(cfg, len(first), step))
            train_step(step, *data.batch(training_rows(first, cfg, step)[process.share.rows]))


def evaluate_rule(cfg):
    """The record of a forecaster that is not trained: one line, with its error on the training windows too."""
    device = pick_device(cfg.device)
    data = Windows(cfg).to(device)
    season = data.series.season
    if cfg.forecaster == "seasonal_naive" and cfg.look_back < season:
        raise BadInput(f"seasonal_naive repeats the last {season} steps, a season; look_back is {cfg.look_back}")

    def forecast(past):
        if cfg.forecaster == "repeat_last":
            return repeat_last(past, cfg.horizon)
        return seasonal_naive(past, cfg.horizon, season)

    run = Run(cfg, "train_TS.py", ALONE)
    run.start(device=device, parameters=(0, 0), per_token=Compute(0, 0, 0))
    nothing = dict.fromkeys(("step", "seconds", "tokens", "compute", "non_emb_compute", "paper_compute"), 0)
    metrics = {"train/mse": data.errors(forecast, "train")[0], **data.evaluate(forecast)}
    run.log(**nothing, **metrics)
    run.finish("finished")
    print(", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))


@command
def main(argv=None):
    cfg = configure(Settings, argv)
    if cfg.forecaster in RULES:
        evaluate_rule(cfg)
    else:
        for _ in training(cfg):
            pass


if __name__ == "__main__":
    main()
