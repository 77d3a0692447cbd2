"""`bench.py decode`: generating one token at a time with a key cache, with every scoring function.

What a step costs depends on where in the context it is, not on what the cache holds: the caches are filled with random
numbers, not with the keys of a prompt. On CUDA the steps of a timing are one CUDA graph, so that what is timed is the
card's work. No time is given before a prompt and a few steps through the cache, at a short length, end where the model
in float64 does with the whole sequence: as near as the model in the same precision does, or nearly.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

import torch

from benchmarks.measure import ModelBenchSettings, attempt, median_ms, parse_lengths
from model import GPT
from training.capture import WARM_UP, StaticStep
from training.configurator import setting
from training.devices import DTYPES

VOCAB_SIZE = 96
POSITIONS = 8  # of the steps that are averaged, evenly spread
CHECK_LENGTH, CHECK_STEPS = 256, 9
TOLERANCE = {"float32": 1e-4, "float16": 3e-3, "bfloat16": 2e-2}  # largest relative error of the logits
AS_FAR_AS_UNCACHED = 2  # times the error without a cache is allowed, too


@dataclass
class Settings(ModelBenchSettings):
    """Time a step of generation with a key cache, and count the cache's bytes, by scoring function.

    last_ms: a step at the end of the context; mean_ms, tokens_per_s: on average over the context, from its first eighth
    on. key_MiB, value_MiB: what the caches of all layers hold for keys, or for what stands in for them, and for values.
    tokens/standard, cache/standard: tokens_per_s and key_MiB + value_MiB relative to standard attention's.
    """

    lengths: str = setting("256|512|1024|2048", "context lengths T; also the models' block_size")
    batch_size: int = setting(1, "sequences")
    n_layer: int = setting(2, "number of blocks")
    d_model: int = setting(256, "model width")
    sliding_block_size: int = setting(512, "window W, T / 2 where that is less")
    steps: int = setting(8, "consecutive tokens in one timing")

    ON_CUDA: ClassVar[tuple] = (
        "--dtype=bfloat16", "--lengths=1024|2048|4096|8192|16384|32768|65536", "--n_layer=6", "--d_model=768",
        "--steps=32",
    )  # fmt: skip

    def at_length(self, T):
        """{structure: typed configuration} for contexts of T tokens, standard attention first."""
        variants = self.variants(block_size=T, sliding_block_size=min(self.sliding_block_size, T // 2))
        return {name: variants[name].model_config() for name in sorted(variants, key=lambda name: name != "low_rank")}


COLUMNS = {  # key: format; Settings says what they are
    "token_mixing_struct": "29s", "T": "d", "last_ms": ".3f", "mean_ms": ".3f", "tokens_per_s": ",.1f",
    "tokens/standard": ".2f", "key_MiB": ",.3f", "value_MiB": ",.3f", "cache/standard": ".3f",
}  # fmt: skip


def rows(cfg, device):
    """One row a T and scoring function. First None: the settings are good."""
    configs = {T: cfg.at_length(T) for T in parse_lengths(cfg, least=2)}
    short = cfg.at_length(CHECK_LENGTH)
    yield
    check = cache(lambda name: cached_errors(cfg, short[name], device))
    for T, models in configs.items():
        standard = {}
        for name, model_cfg in models.items():
            row = attempt(check_and_time, cfg, model_cfg, device, check, name)
            standard = standard or (row if name == "low_rank" else {})
            if "mean_ms" in row and "mean_ms" in standard:
                size, of_standard = (each["key_MiB"] + each["value_MiB"] for each in (row, standard))
                row["tokens/standard"] = row["tokens_per_s"] / standard["tokens_per_s"]
                row["cache/standard"] = size / of_standard
            yield dict(token_mixing_struct=name, T=T) | row


@torch.no_grad()
def check_and_time(cfg, model_cfg, device, check, name):
    error, allowed = check(name)
    if not error <= allowed:  # NaN is not
        return dict(note=f"WRONG, not timed: the logits are off by {error:.1e}, allowed {allowed:.1e}")
    T, B = model_cfg.scoring.block_size, cfg.batch_size
    model = make_model(cfg, model_cfg, device)
    caches = model.trunk.new_cache(B, T)
    for layer in caches.layers:
        for slots in (*layer.keys, layer.values):
            slots.rows.normal_()
    positions = sorted({max(1, T * i // POSITIONS - 1) for i in range(1, POSITIONS + 1)})
    times = [step_ms(cfg, model, caches, position, device) for position in positions]
    mean = sum(times) / len(times)
    return dict(
        last_ms=times[-1], mean_ms=mean, tokens_per_s=1e3 / mean * B,
        key_MiB=caches.key_bytes / 2**20, value_MiB=caches.value_bytes / 2**20,
    )  # fmt: skip


def step_ms(cfg, model, caches, position, device):
    """Milliseconds of a step: the mean of those that end at `position`, which follow each other in one timing."""
    token = torch.zeros(cfg.batch_size, 1, dtype=torch.long, device=device)
    first = max(1, position - cfg.steps + 1)

    def steps():
        for layer in caches.layers:  # hold `first` tokens, whichever they are
            layer.count = first
            layer.at.fill_(first - 1)
        for _ in range(first, position + 1):
            model(token, cache=caches)

    run = StaticStep(steps, device)
    for _ in range(WARM_UP + 1):  # its graph is recorded before it is timed
        run()
    return median_ms(run, device, cfg.repeats) / (position - first + 1)


def make_model(cfg, model_cfg, device):
    """A GPT with weights of size 1 / sqrt(fan in) everywhere, so that every part of it counts."""
    torch.manual_seed(cfg.seed)
    model = GPT(model_cfg, VOCAB_SIZE).to(device).eval()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.ndim >= 2:
                parameter.normal_(std=module.fan_in**-0.5)
    return model.to(DTYPES[cfg.dtype])


def cached_errors(cfg, model_cfg, device):
    """(error of the logits through the cache, the largest that is allowed), relative and against float64."""
    model = make_model(cfg, model_cfg, device)
    tokens = torch.randint(VOCAB_SIZE, (2, CHECK_LENGTH), device=device)
    caches = model.trunk.new_cache(2, CHECK_LENGTH)
    model(tokens[:, :-CHECK_STEPS], cache=caches)
    cached = torch.cat([model(token, cache=caches) for token in tokens[:, -CHECK_STEPS:].split(1, 1)], 1)
    exact = GPT(replace(model_cfg, scoring=replace(model_cfg.scoring, backend="dense")), VOCAB_SIZE).double().eval()
    exact.load_state_dict(model.state_dict())
    want = exact(tokens.cpu())[:, -CHECK_STEPS:]

    def error(logits):
        return ((logits.cpu().double() - want).norm() / want.norm()).item()

    return error(cached), max(TOLERANCE[cfg.dtype], AS_FAR_AS_UNCACHED * error(model(tokens)[:, -CHECK_STEPS:]))
