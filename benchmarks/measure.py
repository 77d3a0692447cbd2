"""How the commands of bench.py measure: their common settings, times, memory, and what becomes of a row that fails."""

import contextlib
import gc
import inspect
import io
import math
import secrets
import statistics
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from types import SimpleNamespace

import torch

from structured import STRUCTURES
from training.capture import WARM_UP
from training.configurator import parse_list, require_at_least, setting
from training.devices import DTYPES, synchronise
from training.errors import BadInput
from training.settings import StructureSettings, foreign

LEAST_MS = 50  # of calls in one timing
CUBE = 8192  # side of the matrices whose product shows what a card can do


@dataclass
class BenchSettings:
    device: str = setting("auto", "cpu, cuda, cuda:1, mps, or auto: the GPU if there is one")
    dtype: str = setting("float32", "float32, bfloat16 or float16; bfloat16 on CUDA if not given")
    repeats: int = setting(5, "timings that the median is taken of")
    seed: int = setting(-1, "seed of all random inputs; -1: another one every time, printed")
    out: str = setting("", "JSON file for the same rows")

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise BadInput(f"no dtype '{self.dtype}', there are {', '.join(DTYPES)}")
        if self.out and not Path(self.out).parent.is_dir():
            raise BadInput(f"out is {self.out}, there is no folder {Path(self.out).parent}")
        require_at_least(self, dict.fromkeys(self.AT_LEAST_1, 1) | dict(seed=-1))
        if self.seed == -1:
            self.seed = secrets.randbits(31)


@dataclass
class ModelBenchSettings(BenchSettings, StructureSettings):
    """Settings of the commands that run whole models, one for each of several scoring functions."""

    token_mixing_struct: str = setting("all", "scoring functions with | between them, or all")
    mlr_block_divide_by_num_levels: bool = setting(True, "scores times 1 / number of levels the pair shares")
    sequential_GSWA_layer_list: str = setting("MHA|SWA|SWA", "kinds of layers, repeated or cut to n_layer")

    def model_configs(self, **changes):
        """{structure: typed configuration}, after `changes` to the settings."""
        return {name: variant.model_config() for name, variant in self.variants(**changes).items()}

    def variants(self, **changes):
        """{structure: these settings for it alone, as far as they are its own}, after `changes`."""
        kinds = "|".join(islice(cycle(self.sequential_GSWA_layer_list.split("|")), max(0, self.n_layer)))
        changes |= dict(sequential_GSWA_layer_list=kinds)
        names = chosen(self.token_mixing_struct, STRUCTURES, "token_mixing_struct")
        return {name: replace(self, token_mixing_struct=name, **foreign(name) | changes) for name in names}


def parse_lengths(cfg, least=1):
    """The sequence lengths T of a command."""
    lengths = parse_list(cfg.lengths, "lengths")
    if min(lengths) < least:
        raise BadInput(f"lengths is {cfg.lengths!r}, a length is at least {least}")
    return lengths


def chosen(text, names, setting_name):
    """Which of `names` a setting like "a|b" asks for, "all" being all of them."""
    wanted = tuple(names) if text == "all" else parse_list(text, setting_name, str)
    for name in wanted:
        if name not in names:
            raise BadInput(f"{setting_name} has '{name}', there are {', '.join(names)}")
    return wanted


def attempt(measure, device):
    """What `measure` gives, or a note instead: out of memory, refused, or FAILED with the error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a backend that refuses says why, at length
            return measure()
    except torch.OutOfMemoryError:
        note = "out of memory"
    except BadInput as error:
        note = f"refused: {error}"
    except Exception as error:  # one row's failure must not cost the others
        if "No available kernel" in str(error):
            return dict(note="does not take these inputs")
        note = f"FAILED: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return dict(note=note)


def clear():
    """No row inherits another's recompilations or memory."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch._C._cuda_clearCublasWorkspaces()  # those of streams that are gone


class Started:
    """A run of a script that stands before its first step. What it prints and writes is dropped.

    step() takes a step, with nothing between them: no progress line, no evaluation. parts: the local names of the
    script's `training`, such as model, network and optimizer.
    """

    def __init__(self, script, settings, **shortest_evaluation):
        never, self.folder = 2**62, tempfile.TemporaryDirectory()  # which goes with this object
        never_due = dict(max_iters=never, log_interval=never, eval_interval=never, out_dir=f"{self.folder.name}/run")
        settings = replace(settings, **never_due, **shortest_evaluation)
        self.steps = script.training(settings)
        with contextlib.redirect_stdout(io.StringIO()):
            next(self.steps)
        self.parts = SimpleNamespace(**inspect.getgeneratorlocals(self.steps))

    def step(self):
        next(self.steps)


def time_step(step, device, steps, repeats):
    """Median milliseconds of a training step over timings of `steps` calls, and the peak memory that it needs.

    The first WARM_UP calls compile and choose kernels, which takes buffers of its own. The peak is that of the call
    after them: of the recording where the step becomes a CUDA graph, whose replays allocate nothing.
    """
    for _ in range(WARM_UP):
        step()
    gc.collect()  # what compiling left
    peak = peak_MiB(step, device)
    ms = statistics.median(elapsed_ms(step, device, steps) / steps for _ in range(repeats))
    return dict(ms=ms, peak_MiB=peak)


def median_ms(run, device, repeats):
    """Median milliseconds of a call over `repeats` timings, each of 50 ms of calls or of one, after a warm-up."""
    elapsed_ms(run, device, 1)
    calls = math.ceil(LEAST_MS / elapsed_ms(run, device, 1))
    return statistics.median(elapsed_ms(run, device, calls) / calls for _ in range(repeats))


def elapsed_ms(run, device, calls):
    """Milliseconds of `calls` calls, on the card's own clock on CUDA."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(torch.cuda.current_stream(device))
        for _ in range(calls):
            run()
        end.record(torch.cuda.current_stream(device))
        end.synchronize()
        return start.elapsed_time(end)
    synchronise(device)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    synchronise(device)
    return 1e3 * (time.perf_counter() - start)


def peak_MiB(run, device, extra=False):
    """Most memory allocated during a call, less what was before it if `extra`; None where PyTorch does not count."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if extra else 0
    run()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def kernel_times(step, device, calls=3):
    """[(kernel, milliseconds, launches)] of a call, the longest first; on the CPU of PyTorch's operators."""
    on_gpu, kinds = device.type == "cuda", torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CUDA if on_gpu else kinds.CPU]) as profile:
        for _ in range(calls):
            step()
        synchronise(device)
    spent = "self_device_time_total" if on_gpu else "self_cpu_time_total"  # microseconds
    found = [(e.key, getattr(e, spent) / calls / 1e3, e.count / calls) for e in profile.key_averages()]
    return sorted((kernel for kernel in found if kernel[1]), key=lambda kernel: -kernel[1])


def matmul_tflops(device):
    """TFLOP/s of a bfloat16 product of two square matrices, what this card can do today; None off CUDA."""
    if device.type != "cuda":
        return None
    a, b = torch.randn(2, CUBE, CUBE, device=device, dtype=torch.bfloat16)
    return round(2 * CUBE**3 / median_ms(lambda: a @ b, device, 5) / 1e9, 1)


def heading(columns):
    return " ".join(key.ljust(w) if form == "s" else key.rjust(w) for key, (w, form) in columns.items())


def line(row, columns):
    """A row as text: words left, numbers right, - where there is none. columns: {key: (width, format)}."""
    cells = []
    for key, (width, form) in columns.items():
        value = row.get(key)
        text = "-" if value is None else f"{value:{form}}"
        cells.append(text.ljust(width) if form == "s" else text.rjust(width))
    return " ".join([*cells, row.get("note", "")]).rstrip()
