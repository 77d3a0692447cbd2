"""Time and peak memory of attention and of training steps, every scoring function beside PyTorch's own attention.

    python bench.py attention
    python bench.py attention --device=cpu --lengths="256|1024" --out=attention.json
    python bench.py step --token_mixing_struct="low_rank|multi_level_low_rank" --compile=True

An attention function is timed only after its output and gradients, at a smaller T, agree with the float64 definition
in structured/reference.py; otherwise its row says WRONG in place of times and the command exits with status 1. Times
are medians after a warm-up. --help after a command lists its settings; sizes not given are larger on a GPU.
"""

import contextlib
import json
import math
import statistics
import sys
import time
import warnings
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import clip_grad_norm_

import structured
from model import GPT, InContextRegressor
from structured import STRUCTURES, default_block_sizes, reference
from training.configurator import configure, parse_list, require_at_least, setting
from training.devices import DTYPES, allow_tf32, autocast, device_name, pick_device, synchronise
from training.errors import BadInput, command
from training.mup import adamw, initialise
from training.settings import StructureSettings

TOLERANCE = {"float32": 2e-5, "float16": 1.2e-3, "bfloat16": 1e-2}  # largest relative error
VOCAB_SIZE = 96


@dataclass
class BenchSettings:
    device: str = setting("auto", "cpu, cuda, cuda:1, mps, or auto: the GPU if there is one")
    dtype: str = setting("float32", "float32, bfloat16 or float16; bfloat16 on CUDA if not given")
    compile: bool = setting(False, "torch.compile what is timed")
    repeats: int = setting(5, "timings that the median is taken of")
    out: str = setting("", "JSON file for the same rows")

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise BadInput(f"no dtype '{self.dtype}', there are {', '.join(DTYPES)}")
        if self.out and not Path(self.out).parent.is_dir():
            raise BadInput(f"out is {self.out}, there is no folder {Path(self.out).parent}")
        require_at_least(self, dict.fromkeys(self.AT_LEAST_1, 1))


@dataclass
class AttentionSettings(BenchSettings):
    """Time the functions of structured.attention, causal, beside PyTorch's scaled_dot_product_attention (SDPA)."""

    lengths: str = setting("256|512|1024", "sequence lengths T")
    batch_size: int = setting(1, "sequences")
    n_head: int = setting(4, "number of heads")
    d_head: int = setting(64, "width of a head")
    mlr_rank_list: str = setting("32|8|6|4|4|4|4|2", "MLR's rank of every level; blocks halve from T on")
    gswa_rank_list: str = setting("32|32", "GSWA's ranks, global|window")
    sliding_block_size: int = setting(512, "window W, T / 2 where that is less")

    AT_LEAST_1: ClassVar[tuple] = ("repeats", "batch_size", "n_head", "d_head", "sliding_block_size")
    ON_CUDA: ClassVar[tuple] = ("--dtype=bfloat16", "--lengths=1024|2048|4096", "--batch_size=4", "--n_head=12")


def arguments(cfg, T):
    """Function: its keywords at length T. The coarsest MLR block is T rounded up to what all levels can halve."""
    ranks, gswa_ranks = parse_list(cfg.mlr_rank_list, "mlr_rank_list"), parse_list(cfg.gswa_rank_list, "gswa_rank_list")
    window, scale = min(cfg.sliding_block_size, max(1, T // 2)), 8 / cfg.d_head
    sizes = default_block_sizes(T + -T % 2 ** (len(ranks) - 1), len(ranks))
    return {
        "attention": dict(scale=scale),
        "window_attention": dict(window=window, scale=scale),
        "gswa_attention": dict(ranks=gswa_ranks, window=window),
        "mlr_attention": dict(ranks=ranks, block_sizes=sizes, weighting="shared"),
    }


def sdpa(q, k, v, *, scale, backend=None):
    with sdpa_kernel(backend) if backend else contextlib.nullcontext():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


FUNCTIONS = {  # row: (function, name of its definition in structured.reference); ratios are to the first row
    "SDPA": (sdpa, "attention"),
    "standard": (structured.attention, "attention"),
    "window": (structured.window_attention, "window_attention"),
    "GSWA": (structured.gswa_attention, "gswa_attention"),
    "MLR": (structured.mlr_attention, "mlr_attention"),
}
ON_CUDA = {  # the same, there only
    "SDPA flash": (partial(sdpa, backend=SDPBackend.FLASH_ATTENTION), "attention"),
    "SDPA cudnn": (partial(sdpa, backend=SDPBackend.CUDNN_ATTENTION), "attention"),
    "SDPA efficient": (partial(sdpa, backend=SDPBackend.EFFICIENT_ATTENTION), "attention"),
    "SDPA math": (partial(sdpa, backend=SDPBackend.MATH), "attention"),
}
ATTENTION_COLUMNS = {  # key: (width, format); "both" is forward + backward, extra_MiB what that needs beside its inputs
    "function": (14, "s"), "T": (6, "d"), "error": (8, ".1e"), "forward_ms": (11, ".3f"), "forward_ratio": (13, ".2f"),
    "both_ms": (10, ".3f"), "both_ratio": (10, ".2f"), "extra_MiB": (9, ",.1f"),
}  # fmt: skip


def attention_rows(cfg, device):
    """One row a T and function."""
    lengths = parse_list(cfg.lengths, "lengths")
    if min(lengths) < 1:
        raise BadInput(f"lengths is {cfg.lengths!r}, a length is at least 1")
    for function, definition in FUNCTIONS.values():  # bad ranks are refused before anything is timed
        function(*random_inputs((1, 1, 1, cfg.d_head), "float32", "cpu")[:3], **arguments(cfg, 1)[definition])
    for T in lengths:
        first = None
        for name, case in (FUNCTIONS | (ON_CUDA if device.type == "cuda" else {})).items():
            row = dict(function=name, T=T) | attempt(partial(time_attention, cfg, device, T, *case))
            first = first or row
            for what in ("forward", "both"):
                if f"{what}_ms" in row and f"{what}_ms" in first:
                    row[f"{what}_ratio"] = row[f"{what}_ms"] / first[f"{what}_ms"]
            yield row


def time_attention(cfg, device, T, function, definition):
    run, tolerance = torch.compile(function, dynamic=False) if cfg.compile else function, TOLERANCE[cfg.dtype]
    errors = relative_errors(cfg, device, T, run, definition)
    if not all(error <= tolerance for error in errors):  # NaN is not
        return dict(note="WRONG, not timed: errors " + " ".join(f"{e:.1e}" for e in errors) + f", not {tolerance:.1e}")
    keywords = arguments(cfg, T)[definition]
    *inputs, cotangent = random_inputs((cfg.batch_size, cfg.n_head, T, cfg.d_head), cfg.dtype, device)

    @torch.no_grad()
    def forward():
        run(*inputs, **keywords)

    def both():
        torch.autograd.grad(run(*inputs, **keywords), inputs, cotangent)

    times = dict(forward_ms=median_ms(forward, device, cfg.repeats), both_ms=median_ms(both, device, cfg.repeats))
    return dict(error=max(errors), **times, extra_MiB=peak_MiB(both, device, extra=True))


def relative_errors(cfg, device, T, run, definition):
    """||got - want|| / ||want|| of the output and the gradients of q, k and v, the definition in float64.

    At a length of at most 512 (or two finest blocks) that exceeds whole blocks by as much as T does.
    """
    finest = 2 ** (len(parse_list(cfg.mlr_rank_list, "mlr_rank_list")) - 1)
    T = min(T, max(512, 2 * finest) - -T % finest)
    keywords = arguments(cfg, T)[definition]
    *inputs, cotangent = random_inputs((2, 2, T, cfg.d_head), cfg.dtype, device)
    exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    out, want = run(*inputs, **keywords), getattr(reference, definition)(*exact, **keywords)
    got = [out, *torch.autograd.grad(out, inputs, cotangent)]
    want = [want, *torch.autograd.grad(want, exact, cotangent.cpu().double())]
    return [((a.cpu().double() - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True)]


def random_inputs(shape, dtype, device):
    """q, k, v that want gradients, and a cotangent."""
    torch.manual_seed(0)
    *inputs, cotangent = (torch.randn(shape).to(device, DTYPES[dtype]) for _ in range(4))
    return *(x.requires_grad_() for x in inputs), cotangent


@dataclass
class StepSettings(BenchSettings, StructureSettings):
    """Time a training step (forward, backward, clip, AdamW) of GPT and InContextRegressor by scoring function."""

    token_mixing_struct: str = setting("all", "scoring functions with | between them, or all")
    batch_size: int = setting(2, "sequences of block_size tokens")
    n_layer: int = setting(2, "number of blocks")
    d_model: int = setting(128, "model width")
    block_size: int = setting(128, "sequence length")
    n_dims: int = setting(16, "dimension of x in in-context regression")
    mlr_block_divide_by_num_levels: bool = setting(True, "scores times 1 / number of levels the pair shares")
    sequential_GSWA_layer_list: str = setting("MHA|SWA|SWA", "kinds of layers, repeated or cut to n_layer")

    AT_LEAST_1: ClassVar[tuple] = ("repeats", "batch_size", "n_dims")
    ON_CUDA: ClassVar[tuple] = (
        "--dtype=bfloat16", "--batch_size=8", "--n_layer=6", "--d_model=768", "--block_size=1024",
    )  # fmt: skip

    def model_configs(self):
        """{structure: typed configuration}."""
        names = self.token_mixing_struct
        names = tuple(STRUCTURES) if names == "all" else parse_list(names, "token_mixing_struct", str)
        kinds = "|".join(islice(cycle(self.sequential_GSWA_layer_list.split("|")), max(0, self.n_layer)))
        each = [replace(self, token_mixing_struct=name, sequential_GSWA_layer_list=kinds) for name in names]
        return {cfg.token_mixing_struct: cfg.model_config() for cfg in each}


def gpt(cfg, model_cfg, device):
    """The model, and its loss on a batch as a function of the (perhaps compiled) model."""
    tokens = torch.randint(VOCAB_SIZE, (cfg.batch_size, cfg.block_size + 1), device=device)
    return GPT(model_cfg, VOCAB_SIZE), lambda network: network(tokens[:, :-1], tokens[:, 1:])[1]


def regressor(cfg, model_cfg, device):
    tokens = torch.randn(cfg.batch_size, cfg.block_size, cfg.n_dims, device=device)
    y = tokens[:, ::2, 0]
    return InContextRegressor(model_cfg, cfg.n_dims), lambda network: (network(tokens).float() - y).square().mean()


MODELS = {"GPT": gpt, "InContextRegressor": regressor}
STEP_COLUMNS = {
    "model": (18, "s"), "token_mixing_struct": (29, "s"), "ms": (9, ".2f"), "steps_per_s": (11, ".2f"),
    "tokens_per_s": (12, ",.0f"), "peak_MiB": (9, ",.0f"),
}  # fmt: skip


def step_rows(cfg, device):
    """One row a model and scoring function."""
    configs = cfg.model_configs()  # refused before anything is timed
    for model, build in MODELS.items():
        for name, model_cfg in configs.items():
            row = dict(model=model, token_mixing_struct=name)
            yield row | attempt(partial(time_step, cfg, device, build, model_cfg))


def time_step(cfg, device, build, model_cfg):
    torch.manual_seed(0)
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


def attempt(measure):
    """What `measure` gives, or a note where the device's memory or SDPA's backend does not allow it."""
    torch.compiler.reset()  # no row inherits another's recompilations
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a backend that refuses says why, at length
            return measure()
    except torch.OutOfMemoryError:
        return dict(note="out of memory")
    except RuntimeError as error:
        if "No available kernel" not in str(error):
            raise
        return dict(note="does not take these inputs")


def median_ms(run, device, repeats):
    """Median milliseconds of a call over `repeats` timings, each of 20 ms of calls or of one, after a warm-up."""

    def seconds(calls):
        synchronise(device)
        start = time.perf_counter()
        for _ in range(calls):
            run()
        synchronise(device)
        return time.perf_counter() - start

    seconds(3)
    calls = math.ceil(0.02 / seconds(1))
    return 1e3 * statistics.median(seconds(calls) / calls for _ in range(repeats))


def peak_MiB(run, device, extra=False):
    """Most memory allocated during a call, less what was before it if `extra`; None where PyTorch does not count."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if extra else 0
    run()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def line(row, columns):
    """A row as text: words left, numbers right, - where there is none."""
    cells = []
    for key, (width, form) in columns.items():
        value = row.get(key)
        text = "-" if value is None else f"{value:{form}}"
        cells.append(text.ljust(width) if form == "s" else text.rjust(width))
    return " ".join([*cells, row.get("note", "")]).rstrip()


COMMANDS = {
    "attention": (AttentionSettings, attention_rows, ATTENTION_COLUMNS),
    "step": (StepSettings, step_rows, STEP_COLUMNS),
}


@command
def main(argv=None):
    name, *argv = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help"):
        print(__doc__.strip())
        return
    if name not in COMMANDS:
        raise BadInput(f"no command '{name}', there are {', '.join(COMMANDS)}")
    cls, make_rows, columns = COMMANDS[name]
    device = pick_device(configure(cls, argv).device)
    cfg = configure(cls, [*(cls.ON_CUDA if device.type == "cuda" else ()), *argv])
    allow_tf32(False)
    header = dict(command=name, device=device_name(device), torch=torch.__version__, dtype=cfg.dtype)
    settings = asdict(cfg)
    shown = [key for key in settings if key == "compile" or key in cls.__annotations__]
    print(", ".join(f"{key} {value}" for key, value in header.items()))
    print(" ".join(f"{key}={settings[key]}" for key in shown))
    print(" ".join(key.ljust(w) if form == "s" else key.rjust(w) for key, (w, form) in columns.items()), flush=True)
    rows = []
    for row in make_rows(cfg, device):
        rows.append(row)
        print(line(row, columns), flush=True)
    if cfg.out:
        Path(cfg.out).write_text(json.dumps(dict(**header, settings=settings, rows=rows), indent=1) + "\n")
    if any(row.get("note", "").startswith("WRONG") for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
