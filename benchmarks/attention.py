"""`bench.py attention`: every attention function and backend beside PyTorch's own.

A function is timed only after its output and gradients, at a length of at most check_up_to, agree with the float64
definition in structured/reference.py. How well bfloat16 can agree is not known beforehand, so PyTorch's SDPA is judged
by its own definition on the same inputs: a function may be off by the tolerance or by 1.3 times what SDPA is off.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from itertools import chain
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import structured
from benchmarks.measure import BenchSettings, attempt, chosen, median_ms, parse_lengths, peak_MiB
from structured import default_block_sizes, reference
from structured.functional import check_ranks
from training.configurator import parse_list, setting
from training.devices import DTYPES

TOLERANCE = {"float32": 2e-5, "float16": 1.2e-3, "bfloat16": 1e-2}  # largest relative error
AS_FAR_AS_SDPA = 1.3  # times SDPA's error is allowed, too
TILE = 128  # what fast functions cut a sequence into, or a multiple of it
FACTORS = (1, 3)  # of the queries and keys in the check: scores of every size, and large ones


@dataclass
class AttentionSettings(BenchSettings):
    """Time attention functions, causal, beside PyTorch's scaled_dot_product_attention (SDPA) and FlexAttention.

    error: the largest relative error of output and gradients against float64; error_ratio: the same over SDPA's, with
    queries and keys as drawn or times 3, whichever is larger. both: forward + backward. forward/default, forward/best:
    time relative to SDPA as it chooses by itself, and to its fastest backend. extra_MiB: the most memory that forward
    + backward hold beside the inputs, on CUDA.
    """

    lengths: str = setting("256|512|1024|2048", "sequence lengths T; any, not only powers of two")
    tokens: int = setting(2048, "tokens a call: T tokens in each of tokens / T sequences, one at least")
    structures: str = setting("all", "what to time beside SDPA: structures with | between them, or all")
    n_head: int = setting(4, "number of heads")
    d_head: int = setting(64, "width of a head")
    bilinear_width: int = setting(128, "width of a head's queries and keys in bilinear BTT")
    mlr_rank_list: str = setting("32|8|6|4|4|4|4|2", "MLR's rank of every level; blocks halve from T's power of two on")
    gswa_rank_list: str = setting("32|32", "GSWA's ranks, global|window")
    sliding_block_size: int = setting(512, "window W, T / 2 where that is less")
    dense_up_to: int = setting(1024, "longest T for functions that hold T x T matrices")
    check_up_to: int = setting(256, "longest T for the float64 definition")

    AT_LEAST_1: ClassVar[tuple] = (
        "repeats", "tokens", "n_head", "d_head", "bilinear_width", "sliding_block_size", "check_up_to",
    )  # fmt: skip
    ON_CUDA: ClassVar[tuple] = (
        "--dtype=bfloat16", "--lengths=512|1024|2048|4096|8192|16384|32768", "--tokens=65536", "--n_head=12",
        "--dense_up_to=4096", "--check_up_to=1024",
    )  # fmt: skip


def sdpa(q, k, v, *, scale, backend=None):
    with sdpa_kernel(backend) if backend else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


def flex(q, k, v, *, scale, window=None):
    return compiled_flex()(q, k, v, scale=scale, block_mask=block_mask(q.shape[2], window, q.device))


@cache
def compiled_flex():
    return torch.compile(flex_attention, dynamic=False)


@lru_cache(maxsize=4)
def block_mask(T, window, device):
    def near(b, h, i, j):
        return (j <= i) & (i - j <= (T if window is None else window))

    return create_block_mask(near, None, None, T, T, device=device)


def shared_query(function, copies=False):
    """The function of queries (B, 1 or H, T, r) of which one side serves all heads, as a view or as copies."""

    def run(q, k, v, **keywords):
        expanded = q.expand(-1, k.shape[1], -1, -1)
        return function(expanded.contiguous() if copies else expanded, k, v, **keywords)

    return run


DEFINITIONS = {
    "standard": reference.attention,
    "window": reference.window_attention,
    "GSWA": reference.gswa_attention,
    "MLR": reference.mlr_attention,
    "bilinear BTT": shared_query(reference.attention),
}


def keywords(cfg, T):
    """{definition: its keywords at length T}. MLR's coarsest block is the first power of two that is not below T."""
    ranks, gswa_ranks = parse_list(cfg.mlr_rank_list, "mlr_rank_list"), parse_list(cfg.gswa_rank_list, "gswa_rank_list")
    check_ranks(ranks, cfg.d_head, "mlr_rank_list")
    check_ranks(gswa_ranks, cfg.d_head, "gswa_rank_list")
    window, scale = min(cfg.sliding_block_size, max(1, T // 2)), cfg.d_head**-0.5
    block_size = max(2 ** (T - 1).bit_length(), 2 ** (len(ranks) - 1))
    return {
        "standard": dict(scale=scale),
        "window": dict(window=window, scale=scale),
        "GSWA": dict(ranks=gswa_ranks, window=window),
        "MLR": dict(ranks=ranks, block_sizes=default_block_sizes(block_size, len(ranks)), weighting="shared"),
        "bilinear BTT": dict(scale=cfg.bilinear_width**-0.5),
    }


@dataclass(frozen=True)
class Case:
    """A row of the table: run(q, k, v, **keywords) computes what DEFINITIONS[definition] defines.

    cuda: it runs on CUDA only; dense: it holds T x T matrices.
    """

    structure: str
    backend: str
    run: Callable
    definition: str
    cuda: bool = False
    dense: bool = False


def ours(structure, function, *backends):
    """A case for each backend of a function of structured.functional."""
    return [
        Case(
            structure, backend, partial(function, backend=backend), structure,
            cuda=backend in ("triton", "flex"), dense=backend == "dense",
        )
        for backend in backends
    ]  # fmt: skip


CASES = [
    Case("SDPA", "default", sdpa, "standard"),
    Case("SDPA", "flash", partial(sdpa, backend=SDPBackend.FLASH_ATTENTION), "standard"),
    Case("SDPA", "cudnn", partial(sdpa, backend=SDPBackend.CUDNN_ATTENTION), "standard", cuda=True),
    Case("SDPA", "efficient", partial(sdpa, backend=SDPBackend.EFFICIENT_ATTENTION), "standard", cuda=True),
    Case("SDPA", "math", partial(sdpa, backend=SDPBackend.MATH), "standard", dense=True),
    Case("FlexAttention", "standard", flex, "standard", cuda=True),
    Case("FlexAttention", "window", flex, "window", cuda=True),
    Case("standard", "auto", structured.attention, "standard"),
    *ours("MLR", structured.mlr_attention, "triton", "blockwise", "dense"),
    *ours("window", structured.window_attention, "flex", "blockwise", "dense"),
    *ours("GSWA", structured.gswa_attention, "auto"),
    Case("bilinear BTT", "auto", shared_query(structured.attention), "bilinear BTT"),
]
STRUCTURES = tuple(dict.fromkeys(case.structure for case in CASES))
COLUMNS = {  # key: (width, format); AttentionSettings says what they are
    "structure": (13, "s"), "backend": (9, "s"), "T": (6, "d"), "error": (8, ".1e"), "error_ratio": (11, ".2f"),
    "forward_ms": (10, ".3f"), "forward/default": (15, ".2f"), "forward/best": (12, ".2f"),
    "both_ms": (10, ".3f"), "both/default": (12, ".2f"), "both/best": (9, ".2f"), "extra_MiB": (9, ",.1f"),
}  # fmt: skip


def rows(cfg, device):
    """One row a T and case, SDPA's first."""
    lengths, structures = parse_lengths(cfg), chosen(cfg.structures, STRUCTURES, "structures")
    keywords(cfg, 1)  # which refuses bad ranks
    return measured(cfg, device, lengths, structures)


def measured(cfg, device, lengths, structures):
    torch._dynamo.config.recompile_limit = 256  # FlexAttention is compiled for every length, mask and grad mode
    for T in lengths:
        trials = cache(partial(make_trials, cfg, device, T))
        cases = [case for case in CASES if device.type == "cuda" or not case.cuda]
        peers = [row(cfg, device, T, case, trials) for case in cases if case.structure == "SDPA"]
        others = (case for case in cases if case.structure in structures and case.structure != "SDPA")
        for each in chain(peers, (row(cfg, device, T, case, trials) for case in others)):
            yield each | ratios(each, peers)


def row(cfg, device, T, case, trials):
    start = dict(structure=case.structure, backend=case.backend, T=T)
    if case.dense and cfg.dense_up_to < T:
        return start | dict(note=f"T x T matrices, not run above T = {cfg.dense_up_to} (dense_up_to)")
    return start | attempt(partial(check_and_time, cfg, device, T, case, trials), device)


def ratios(row, peers):
    """A row's times relative to those of SDPA's default and of SDPA's fastest backend: below 1 is faster."""
    found = {}
    for what in ("forward", "both"):
        key = f"{what}_ms"
        if key in row and key in peers[0]:
            found[f"{what}/default"] = row[key] / peers[0][key]
            found[f"{what}/best"] = row[key] / min(peer[key] for peer in peers if key in peer)
    return found


def check_and_time(cfg, device, T, case, trials):
    """The numbers of a row, or a note if a check fails."""
    judged = [(trial, trial.errors(case.run)) for trial in trials(case.definition)]
    for trial, errors in judged:
        if not all(error <= most for error, most in zip(errors, trial.allowed, strict=True)):  # NaN is not
            texts = (" ".join(f"{x:.1e}" for x in each) for each in (errors, trial.allowed))
            return dict(note="WRONG, not timed: errors {}, allowed {}".format(*texts))
    *inputs, cotangent = random_inputs(cfg, device, case.definition, max(1, cfg.tokens // T), cfg.n_head, T)
    options = keywords(cfg, T)[case.definition]

    @torch.no_grad()
    def forward():
        case.run(*inputs, **options)

    def both():
        torch.autograd.grad(case.run(*inputs, **options), inputs, cotangent)

    return dict(
        error=max(max(errors) for trial, errors in judged if trial.factor == 1),
        error_ratio=max(max(errors) / max(*trial.sdpa_errors, 1e-12) for trial, errors in judged),
        forward_ms=median_ms(forward, device, cfg.repeats),
        both_ms=median_ms(both, device, cfg.repeats),
        extra_MiB=peak_MiB(both, device, extra=True),
    )


@dataclass
class Trial:
    """One check: q, k, v and a cotangent, the definition's keywords and its output and gradients in float64.

    factor: what q and k were multiplied by; sdpa_errors: those of SDPA by standard attention's definition, on the
    same inputs; allowed: the largest errors that pass. Errors are of the output and the gradients of q, k and v.
    """

    factor: int
    inputs: list
    options: dict
    want: list
    sdpa_errors: list
    allowed: list

    def errors(self, run):
        return relative_errors(with_gradients(run, self.inputs, self.options), self.want)


def make_trials(cfg, device, T, definition):
    """The checks of a definition at length T, with small and large scores and with blocks and windows of two sizes.

    A long T is cut to one that exceeds whole tiles by as much as T does, once with T's own blocks and window and once
    with those of the cut length, which has all levels of MLR and a window that ends inside.
    """
    short = T if cfg.check_up_to >= T else max(1, cfg.check_up_to - -T % TILE)
    geometries = [keywords(cfg, length)[definition] for length in (short, T)]
    geometries = geometries[: 1 + (geometries[0] != geometries[1])]
    trials = []
    for factor in FACTORS:
        inputs = random_inputs(cfg, device, definition, 2, 2, short, factor)
        exact = [x.detach().to(device if device.type == "cuda" else "cpu").double() for x in inputs]
        exact = [*(x.requires_grad_() for x in exact[:3]), exact[3]]
        standard = dict(scale=inputs[0].shape[-1] ** -0.5)
        with exact[0].device:  # where the definitions make their indices
            yardstick = with_gradients(DEFINITIONS["bilinear BTT"], exact, standard)
            wants = [with_gradients(DEFINITIONS[definition], exact, options) for options in geometries]
        by_sdpa = with_gradients(shared_query(sdpa, copies=True), inputs, standard)  # cuDNN refuses the view
        sdpa_errors = relative_errors(by_sdpa, yardstick)
        allowed = [max(TOLERANCE[cfg.dtype], AS_FAR_AS_SDPA * error) for error in sdpa_errors]
        for options, want in zip(geometries, wants, strict=True):
            trials.append(Trial(factor, inputs, options, want, sdpa_errors, allowed))
    return trials


def random_inputs(cfg, device, definition, batch_size, n_head, T, factor=1):
    """q, k, v that want gradients and a cotangent, laid out as a model's projections leave them: (B, T, H, width)."""
    bilinear = definition == "bilinear BTT"
    width = cfg.bilinear_width if bilinear else cfg.d_head
    torch.manual_seed(cfg.seed)
    shapes = (1 if bilinear else n_head, width), (n_head, width), (n_head, cfg.d_head), (n_head, cfg.d_head)
    tensors = [torch.randn(batch_size, T, *shape, device=device).transpose(1, 2) for shape in shapes]
    *inputs, cotangent = [
        (x * scale).to(DTYPES[cfg.dtype]) for x, scale in zip(tensors, (factor, factor, 1, 1), strict=True)
    ]
    return [*(x.requires_grad_() for x in inputs), cotangent]


def with_gradients(function, inputs, options):
    *qkv, cotangent = inputs
    out = function(*qkv, **options)
    return [out.detach(), *torch.autograd.grad(out, qkv, cotangent)]


def relative_errors(got, want):
    """||got - want|| / ||want|| of every pair; where ||want|| is 0 in exact arithmetic, of 0.01."""
    pairs = zip(got, want, strict=True)
    return [((a.to(b.device).double() - b).norm() / b.norm().clamp(min=1e-2)).item() for a, b in pairs]
