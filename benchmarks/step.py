"""`bench.py step`: a training step of GPT and InContextRegressor with every scoring function."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch.nn.utils import clip_grad_norm_

from benchmarks.measure import ModelBenchSettings, attempt, median_ms, peak_MiB
from model import GPT, InContextRegressor
from training.configurator import setting
from training.devices import autocast
from training.mup import adamw, initialise

VOCAB_SIZE = 96


@dataclass
class StepSettings(ModelBenchSettings):
    """Time a training step (forward, backward, clip, AdamW) of GPT and InContextRegressor by scoring function."""

    compile: bool = setting(False, "torch.compile the model")
    batch_size: int = setting(2, "sequences of block_size tokens")
    n_layer: int = setting(2, "number of blocks")
    d_model: int = setting(128, "model width")
    block_size: int = setting(128, "sequence length")
    n_dims: int = setting(16, "dimension of x in in-context regression")

    AT_LEAST_1: ClassVar[tuple] = ("repeats", "batch_size", "n_dims")
    ON_CUDA: ClassVar[tuple] = (
        "--dtype=bfloat16", "--batch_size=8", "--n_layer=6", "--d_model=768", "--block_size=1024",
    )  # fmt: skip


def gpt(cfg, model_cfg, device):
    """The model, and its loss on a batch as a function of the (perhaps compiled) model."""
    tokens = torch.randint(VOCAB_SIZE, (cfg.batch_size, cfg.block_size + 1), device=device)
    return GPT(model_cfg, VOCAB_SIZE), lambda network: network(tokens[:, :-1], tokens[:, 1:])[1]


def regressor(cfg, model_cfg, device):
    tokens = torch.randn(cfg.batch_size, cfg.block_size, cfg.n_dims, device=device)
    y = tokens[:, ::2, 0]
    return InContextRegressor(model_cfg, cfg.n_dims), lambda network: (network(tokens).float() - y).square().mean()


MODELS = {"GPT": gpt, "InContextRegressor": regressor}
COLUMNS = {  # key: (width, format)
    "model": (18, "s"), "token_mixing_struct": (29, "s"), "ms": (9, ".2f"), "steps_per_s": (11, ".2f"),
    "tokens_per_s": (12, ",.0f"), "peak_MiB": (9, ",.0f"),
}  # fmt: skip


def rows(cfg, device):
    """One row a model and scoring function."""
    configs = cfg.model_configs()  # refused before anything is timed
    for model, build in MODELS.items():
        for name, model_cfg in configs.items():
            row = dict(model=model, token_mixing_struct=name)
            yield row | attempt(partial(time_step, cfg, device, build, model_cfg), device)


def time_step(cfg, device, build, model_cfg):
    torch.compiler.reset()  # no row inherits another's recompilations
    torch.manual_seed(cfg.seed)
    model, loss = build(cfg, model_cfg, device)
    initialise(model.to(device))
    optimizer = adamw(model, 1e-3, device_type=device.type)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.dtype == "float16")
    network = torch.compile(model) if cfg.compile else model

    def step():
        with autocast(device, cfg.dtype):
            objective = loss(network)
        scaler.scale(objective).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    ms = median_ms(step, device, cfg.repeats)
    tokens = cfg.batch_size * cfg.block_size
    return dict(ms=ms, steps_per_s=1e3 / ms, tokens_per_s=1e3 / ms * tokens, peak_MiB=peak_MiB(step, device))
