"""How the commands of bench.py measure: their common settings, times, memory, and what becomes of a row that fails."""

import contextlib
import gc
import inspect
import io
import secrets
import statistics
import tempfile
import warnings
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from itertools import cycle, islice
from types import SimpleNamespace

import torch
from torch.nn.utils import clip_grad_norm_
from torch.utils.benchmark import Timer

from structured import STRUCTURES
from training.capture import WARM_UP
from training.configurator import parse_list, require_at_least, require_at_most, setting
from training.devices import DTYPES
from training.errors import BadInput
from training.files import check_output
from training.settings import AT_MOST, StructureSettings, foreign

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
        if self.out:
            check_output(self.out)
        require_at_least(self, {f.name: min(f.default, 1) for f in fields(self) if type(f.default) is int})
        require_at_most(self, AT_MOST)
        if self.seed == -1:
            self.seed = secrets.randbits(31)

    def run_of(self, script, **own):
        """Settings of a run of a training script: those that it shares with these, and its own."""
        shared = {f.name: getattr(self, f.name) for f in fields(script.Settings) if hasattr(self, f.name)}
        return script.Settings(**shared | own)


@dataclass
class ModelBenchSettings(BenchSettings, StructureSettings):
    """Settings of the commands that run whole models, one for each of several scoring functions."""

    token_mixing_struct: str = setting("all", "scoring functions with | between them, or all")
    mlr_block_divide_by_num_levels: bool = setting(True, "scores times 1 / number of levels the pair shares")
    sequential_GSWA_layer_list: str = setting("MHA|SWA|SWA", "kinds of layers, repeated or cut to n_layer")

    def variants(self, **changes):
        """{structure: these settings for it alone, as far as they are its own}, after `changes`."""
        kinds = "|".join(islice(cycle(self.sequential_GSWA_layer_list.split("|")), self.n_layer))
        changes |= dict(sequential_GSWA_layer_list=kinds)
        names = chosen(self.token_mixing_struct, STRUCTURES, "token_mixing_struct")
        return {name: replace(self, token_mixing_struct=name, **foreign(name) | changes) for name in names}


def parse_lengths(cfg, least=1):
    """The sequence lengths T of a command."""
    lengths = parse_list(cfg.lengths, "lengths")
    if min(lengths) < least:
        raise BadInput(f"lengths is {cfg.lengths!r}, a length is at least {least}")
    return lengths


def parse_pairs(text, name, words):
    """"32x1|4x8" -> [(32, 1), (4, 8)]; words: what the two numbers are."""
    pairs = [part.split("x") for part in parse_list(text, name, str)]
    if not all(len(pair) == 2 and all(n.isdecimal() and int(n) for n in pair) for pair in pairs):
        raise BadInput(f'{name} is {text!r}; write {words} with | between them, like "32x128|64x256"')
    return [tuple(map(int, pair)) for pair in pairs]


def chosen(text, names, setting_name):
    """Which of `names` a setting like "a|b" asks for, "all" being all of them."""
    wanted = tuple(names) if text == "all" else parse_list(text, setting_name, str)
    for name in wanted:
        if name not in names:
            raise BadInput(f"{setting_name} has '{name}', there are {', '.join(names)}")
    return wanted


def attempt(measure, *args):
    """What `measure` gives, or a note instead: out of memory, refused, or FAILED with the error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a backend that refuses says why, at length
            return measure(*args)
    except torch.OutOfMemoryError:
        note = "out of memory"
    except BadInput as error:
        note = f"refused: {error}"
    except Exception as error:  # one row's failure must not cost the others
        note = f"FAILED: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        if "No available kernel" in str(error):
            note = "does not take these inputs"
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return dict(note=note)


def afresh(measure, *args):
    """`attempt`, which inherits no other row's recompilations or memory."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch._C._cuda_clearCublasWorkspaces()  # those of streams that are gone
    return attempt(measure, *args)


class Started:
    """A run of a script that stands before its first step. What it prints and writes is dropped.

    step() takes a step, with nothing between them: no progress line, no evaluation. parts: the local names of the
    script's `training`, such as model, network and optimizer.
    """

    def __init__(self, script, settings, **shortest_evaluation):
        self.folder = tempfile.TemporaryDirectory()  # which goes with this object
        never = dict.fromkeys(("max_iters", "log_interval", "eval_interval"), 2**62)
        settings = replace(settings, out_dir=f"{self.folder.name}/run", **never, **shortest_evaluation)
        steps = script.training(settings)
        self.step = partial(next, steps)
        with contextlib.redirect_stdout(io.StringIO()):
            self.step()
        self.parts = SimpleNamespace(**inspect.getgeneratorlocals(steps))


def plain_step(losses, model, optimizer, device, dtype, grad_clip):
    """A step of an eager loop, which gives its last loss: losses() makes those of the micro-batches one by one."""
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")

    def step():
        for loss in losses():
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if grad_clip:
            clip_grad_norm_(model.parameters(), grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def timer(run):
    """torch.utils.benchmark's, with the threads that PyTorch has; it waits for the device before it reads the clock."""
    return Timer("run()", globals=dict(run=run), num_threads=torch.get_num_threads())


def median_ms(run, device, repeats):
    """Median milliseconds of a call over `repeats` timings, each of 50 ms of calls or of one, after a warm-up.

    On CUDA each is triton's: the median of calls timed on the card's own clock, its L2 cache cleared before each.
    """
    if device.type == "cuda":
        from triton.testing import do_bench  # Triton comes with PyTorch for CUDA only

        return statistics.median(do_bench(run, rep=LEAST_MS, return_mode="median") for _ in range(repeats))
    timed = (timer(run).blocked_autorange(min_run_time=LEAST_MS / 1e3) for _ in range(repeats))
    return 1e3 * statistics.median(measurement.median for measurement in timed)


def time_step(step, device, steps, repeats):
    """Median milliseconds of a training step over timings of `steps` calls, and the peak memory that it needs.

    By the host's clock on CUDA, too: steps follow each other, and what the host takes for one counts, which do_bench's
    clearing of a cache between two would hide. The first WARM_UP calls compile and choose kernels, which takes buffers
    of its own. The peak is that of the call after them: of the recording where the step becomes a CUDA graph, whose
    replays allocate nothing.
    """
    for _ in range(WARM_UP):
        step()
    gc.collect()  # what compiling left
    peak = peak_MiB(step, device)
    return dict(ms=1e3 * statistics.median(timer(step).timeit(steps).mean for _ in range(repeats)), peak_MiB=peak)


def peak_MiB(run, device, extra=False):
    """Most memory allocated during a call, less what was before it if `extra`; None where PyTorch does not count."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if extra else 0
    run()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


@cache
def matmul_tflops(device):
    """TFLOP/s of a bfloat16 product of two square matrices, what this card can do today; None off CUDA."""
    if device.type != "cuda":
        return None
    a, b = torch.randn(2, CUBE, CUBE, device=device, dtype=torch.bfloat16)
    return round(2 * CUBE**3 / median_ms(lambda: a @ b, device, 5) / 1e9, 1)
