"""`bench.py decode`: generating one token at a time with a key cache, with every scoring function.

What a step costs depends on where in the context it is, not on what the cache holds: the caches are filled with random
numbers, not with the keys of a prompt. On CUDA the step is captured in a CUDA graph, so that what is timed is the
card's work. No time is given before a prompt and a few steps through the cache, at a short length, end where the model
in float64 does with the whole sequence: as near as the model in the same precision does, or nearly.
"""

import statistics
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import ClassVar

import torch

from benchmarks.measure import ModelBenchSettings, attempt, elapsed_ms, parse_lengths
from model import GPT
from training.configurator import setting
from training.devices import DTYPES

VOCAB_SIZE = 96
POSITIONS = 8  # of the steps that are averaged, evenly spread
CHECK_LENGTH, CHECK_STEPS = 256, 9
TOLERANCE = {"float32": 1e-4, "float16": 3e-3, "bfloat16": 2e-2}  # largest relative error of the logits
AS_FAR_AS_UNCACHED = 2  # times the error without a cache is allowed, too


@dataclass
class DecodeSettings(ModelBenchSettings):
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

    AT_LEAST_1: ClassVar[tuple] = ("repeats", "batch_size", "steps")
    ON_CUDA: ClassVar[tuple] = (
        "--dtype=bfloat16", "--lengths=1024|2048|4096|8192|16384|32768|65536", "--n_layer=6", "--d_model=768",
        "--steps=32",
    )  # fmt: skip

    def at_length(self, T):
        """{structure: typed configuration} for contexts of T tokens, standard attention first."""
        configs = self.model_configs(block_size=T, sliding_block_size=min(self.sliding_block_size, T // 2))
        return dict(sorted(configs.items(), key=lambda item: item[0] != "low_rank"))


COLUMNS = {  # key: (width, format); DecodeSettings says what they are
    "token_mixing_struct": (29, "s"), "T": (6, "d"), "last_ms": (8, ".3f"), "mean_ms": (8, ".3f"),
    "tokens_per_s": (12, ",.1f"), "tokens/standard": (15, ".2f"), "key_MiB": (9, ",.3f"), "value_MiB": (9, ",.3f"),
    "cache/standard": (14, ".3f"),
}  # fmt: skip


def rows(cfg, device):
    """One row a T and scoring function."""
    configs = {T: cfg.at_length(T) for T in parse_lengths(cfg, least=2)}
    return measured(cfg, device, configs, cfg.at_length(CHECK_LENGTH))


def measured(cfg, device, configs, short):
    """configs: {T: {structure: typed configuration}}; short: those that are checked."""
    check = cache(lambda name: cached_errors(cfg, short[name], device))
    for T, models in configs.items():
        standard = {}
        for name, model_cfg in models.items():
            row = dict(token_mixing_struct=name, T=T)
            row |= attempt(partial(check_and_time, cfg, model_cfg, device, partial(check, name)), device)
            standard = standard or (row if name == "low_rank" else {})
            yield row | ratios(row, standard)


def ratios(row, standard):
    """A row's rate and cache relative to standard attention's."""
    if "mean_ms" not in row or "mean_ms" not in standard:
        return {}
    size, of_standard = (each["key_MiB"] + each["value_MiB"] for each in (row, standard))
    rate = row["tokens_per_s"] / standard["tokens_per_s"]
    return {"tokens/standard": rate, "cache/standard": size / of_standard}


@torch.no_grad()
def check_and_time(cfg, model_cfg, device, check):
    error, allowed = check()
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
    """Milliseconds of a step: the median of `repeats` timings of the steps that end at `position`."""
    token = torch.zeros(cfg.batch_size, 1, dtype=torch.long, device=device)
    first = max(1, position - cfg.steps + 1)

    def step():
        model(token, cache=caches)

    place(caches, position)
    run = captured(step, partial(place, caches, position)) if device.type == "cuda" else step
    times = []
    for _ in range(cfg.repeats + 1):
        place(caches, first)
        times.append(elapsed_ms(run, device, position - first + 1) / (position - first + 1))
    return statistics.median(times[1:])  # the first one warms up


def place(caches, count):
    """Let the caches hold `count` tokens, whichever they are."""
    for layer in caches.layers:
        layer.count = count
        layer.at.fill_(count - 1)


def captured(step, before):
    """`step` as one CUDA graph; `before` is called before each step that is run to make it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            before()
            step()
    torch.cuda.current_stream().wait_stream(stream)
    before()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


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
