"""`bench.py attention`: every attention function and backend beside PyTorch's own.

A function is timed only after its output and gradients, at a length of at most check_up_to, agree with the float64
definition in structured/reference.py. How well bfloat16 can agree is not known beforehand, so PyTorch's SDPA is judged
by its own definition on the same inputs: a function may be off by the tolerance or by 1.3 times what SDPA is off.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain, islice
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

import structured
from benchmarks.measure import BenchSettings, attempt, chosen, median_ms, parse_lengths, peak_MiB
from structured import default_block_sizes, reference
from structured.functional import check_ranks, flex_mask
from training.configurator import parse_list, setting
from training.devices import DTYPES

TOLERANCE = {"float32": 2e-5, "float16": 1.2e-3, "bfloat16": 1e-2}  # largest relative error
AS_FAR_AS_SDPA = 1.3  # times SDPA's error is allowed, too
TILE = 128  # what fast functions cut a sequence into, or a multiple of it
FACTORS = (1, 3)  # of the queries and keys in the check: scores of every size, and large ones


@dataclass
class Settings(BenchSettings):
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

    ON_CUDA: ClassVar[tuple] = (
        "--dtype=bfloat16", "--lengths=512|1024|2048|4096|8192|16384|32768", "--tokens=65536", "--n_head=12",
        "--dense_up_to=4096", "--check_up_to=1024",
    )  # fmt: skip


def sdpa(q, k, v, *, scale, backend=None):
    with sdpa_kernel(backend) if backend else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


def flex(q, k, v, *, scale, window=None):
    T = q.shape[2]
    return compiled_flex()(q, k, v, scale=scale, block_mask=kept_mask(T, T if window is None else window, 0, q.device))


kept_mask = cache(flex_mask)  # so that it is not timed


@cache
def compiled_flex():
    return torch.compile(flex_attention, dynamic=False)


def shared_query(function, copies=False):
    """The function of queries (B, 1 or H, T, r) of which one side serves all heads, as a view or as copies."""

    def run(q, k, v, **keywords):
        q = q.expand(-1, k.shape[1], -1, -1)
        return function(q.contiguous() if copies else q, k, v, **keywords)

    return run


def packed(function):
    """The function of the same tokens as one batch of B sequences of T, packed, and not as B of one."""

    def run(q, k, v, **keywords):
        (B, _, T, _), (q, k, v) = q.shape, (x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None] for x in (q, k, v))
        out = function(q, k, v, cu_seqlens=kept_starts(B, T, q.device), max_seqlen=T, **keywords)
        return out.unflatten(2, (B, T))[0].transpose(0, 1)

    return run


@cache
def kept_starts(B, T, device):
    return torch.arange(0, B * T + 1, T, device=device, dtype=torch.int32)


def ours(structure, function, *backends):
    return {(structure, backend): (partial(function, backend=backend), structure) for backend in backends}


DEFINITIONS = {
    "standard": reference.attention,
    "window": reference.window_attention,
    "GSWA": reference.gswa_attention,
    "MLR": reference.mlr_attention,
    "bilinear BTT": shared_query(reference.attention),
}
SDPA = {
    "default": None, "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH,
}  # fmt: skip
CASES = {  # (structure, backend): what runs, and the definition that it has to agree with
    **{("SDPA", name): (partial(sdpa, backend=backend), "standard") for name, backend in SDPA.items()},
    ("FlexAttention", "standard"): (flex, "standard"),
    ("FlexAttention", "window"): (flex, "window"),
    ("standard", "auto"): (structured.attention, "standard"),
    **ours("MLR", structured.mlr_attention, "triton", "blockwise", "dense"),
    **ours("window", structured.window_attention, "flex", "blockwise", "dense"),
    **ours("GSWA", structured.gswa_attention, "auto"),
    ("standard", "packed"): (packed(structured.attention), "standard"),
    ("MLR", "packed"): (packed(structured.mlr_attention), "MLR"),
    ("window", "packed"): (packed(structured.window_attention), "window"),
    ("bilinear BTT", "auto"): (shared_query(structured.attention), "bilinear BTT"),
}
ON_CUDA_ONLY = {"FlexAttention", "cudnn", "efficient", "triton", "flex"}
DENSE = {"math", "dense"}  # backends that hold T x T matrices
STRUCTURES = tuple(dict.fromkeys(structure for structure, _ in CASES))
COLUMNS = {  # key: format; Settings says what they are
    "structure": "13s", "backend": "9s", "T": "d", "error": ".1e", "error_ratio": ".2f", "forward_ms": ".3f",
    "forward/default": ".2f", "forward/best": ".2f", "both_ms": ".3f", "both/default": ".2f", "both/best": ".2f",
    "extra_MiB": ",.1f",
}  # fmt: skip


def keywords(cfg, T):
    """{definition: its keywords at length T}. MLR's coarsest block is the first power of two that is not below T."""
    ranks, gswa_ranks = (
        check_ranks(parse_list(getattr(cfg, name), name), cfg.d_head, name)
        for name in ("mlr_rank_list", "gswa_rank_list")
    )
    window, scale = min(cfg.sliding_block_size, max(1, T // 2)), cfg.d_head**-0.5
    block_size = max(2 ** (T - 1).bit_length(), 2 ** (len(ranks) - 1))
    return {
        "standard": dict(scale=scale),
        "window": dict(window=window, scale=scale),
        "GSWA": dict(ranks=gswa_ranks, window=window),
        "MLR": dict(ranks=ranks, block_sizes=default_block_sizes(block_size, len(ranks)), weighting="shared"),
        "bilinear BTT": dict(scale=cfg.bilinear_width**-0.5),
    }


def rows(cfg, device):
    """One row a T and case, SDPA's first. First None: the settings are good."""
    lengths, structures = parse_lengths(cfg), {"SDPA", *chosen(cfg.structures, STRUCTURES, "structures")}
    keywords(cfg, 1)  # which refuses bad ranks
    yield
    torch._dynamo.config.recompile_limit = 256  # FlexAttention is compiled for every length, mask and grad mode
    cases = [case for case in CASES if case[0] in structures and (device.type == "cuda" or not ON_CUDA_ONLY & {*case})]
    for T in lengths:
        checks = cache(partial(make_checks, cfg, device, T))
        measured = (attempt(check_and_time, cfg, device, T, checks, *case) for case in cases)
        measured = (dict(structure=s, backend=b, T=T) | found for (s, b), found in zip(cases, measured, strict=True))
        peers = list(islice(measured, sum(structure == "SDPA" for structure, _ in cases)))
        for row in chain(peers, measured):
            for what in ("forward", "both"):
                times = [peer[f"{what}_ms"] for peer in peers if f"{what}_ms" in peer]
                if f"{what}_ms" in row and f"{what}_ms" in peers[0]:  # below 1 is faster
                    row[f"{what}/default"] = row[f"{what}_ms"] / times[0]
                    row[f"{what}/best"] = row[f"{what}_ms"] / min(times)
            yield row


def check_and_time(cfg, device, T, checks, *case):
    """The numbers of a row but for its ratios, or a note if a check fails."""
    if case[1] in DENSE and cfg.dense_up_to < T:
        return dict(note=f"T x T matrices, not run above T = {cfg.dense_up_to} (dense_up_to)")
    (run, definition), error, error_ratio = CASES[case], 0.0, 0.0
    for factor, errors_of, by_sdpa in checks(definition):
        found, allowed = errors_of(run), [max(TOLERANCE[cfg.dtype], AS_FAR_AS_SDPA * error) for error in by_sdpa]
        if not all(error <= most for error, most in zip(found, allowed, strict=True)):  # NaN is not
            texts = (" ".join(f"{x:.1e}" for x in each) for each in (found, allowed))
            return dict(note="WRONG, not timed: errors {}, allowed {}".format(*texts))
        error = max(error, *found) if factor == 1 else error
        error_ratio = max(error_ratio, max(found) / max(*by_sdpa, 1e-12))
    *inputs, cotangent = random_inputs(cfg, device, definition, max(1, cfg.tokens // T), cfg.n_head, T)
    forward = partial(run, *inputs, **keywords(cfg, T)[definition])

    def both():
        torch.autograd.grad(forward(), inputs, cotangent)

    return dict(
        error=error,
        error_ratio=error_ratio,
        forward_ms=median_ms(torch.no_grad()(forward), device, cfg.repeats),
        both_ms=median_ms(both, device, cfg.repeats),
        extra_MiB=peak_MiB(both, device, extra=True),
    )


def make_checks(cfg, device, T, definition):
    """[(factor of the queries and keys, errors, SDPA's by standard attention's definition on the same inputs)].

    errors(run) are those of a function's output and gradients. There are checks with small and large scores and with
    blocks and windows of two sizes: a long T is cut to one that exceeds whole tiles by as much as T does, once with T's
    own blocks and window and once with those of the cut length, which has all levels of MLR and a window that ends
    inside.
    """
    short = T if cfg.check_up_to >= T else max(1, cfg.check_up_to - -T % TILE)
    geometries = [keywords(cfg, length)[definition] for length in (short, T)]
    geometries = geometries[: 1 + (geometries[0] != geometries[1])]
    checks = []
    for factor in FACTORS:
        inputs = random_inputs(cfg, device, definition, 2, 2, short, factor)
        exact = [x.detach().to(device if device.type == "cuda" else "cpu").double() for x in inputs]
        exact = [*(x.requires_grad_() for x in exact[:3]), exact[3]]
        standard = dict(scale=inputs[0].shape[-1] ** -0.5)
        with exact[0].device:  # where the definitions make their indices
            yardstick = with_gradients(DEFINITIONS["bilinear BTT"], exact, standard)
            wants = [with_gradients(DEFINITIONS[definition], exact, options) for options in geometries]
        by_sdpa = relative_errors(inputs, standard, yardstick, shared_query(sdpa, copies=True))  # cuDNN takes no view
        pairs = zip(geometries, wants, strict=True)
        checks += [(factor, partial(relative_errors, inputs, *pair), by_sdpa) for pair in pairs]
    return checks


def random_inputs(cfg, device, definition, batch_size, n_head, T, factor=1):
    """q, k, v that want gradients and a cotangent, laid out as a model's projections leave them: (B, T, H, width)."""
    query_heads, width = (1, cfg.bilinear_width) if definition == "bilinear BTT" else (n_head, cfg.d_head)
    torch.manual_seed(cfg.seed)
    shapes = (query_heads, width), (n_head, width), (n_head, cfg.d_head), (n_head, cfg.d_head)
    drawn = [torch.randn(batch_size, T, *shape, device=device).transpose(1, 2) for shape in shapes]
    drawn = [(x * scale).to(DTYPES[cfg.dtype]) for x, scale in zip(drawn, (factor, factor, 1, 1), strict=True)]
    return [*(x.requires_grad_() for x in drawn[:3]), drawn[3]]


def with_gradients(function, inputs, options):
    *qkv, cotangent = inputs
    out = function(*qkv, **options)
    return [out.detach(), *torch.autograd.grad(out, qkv, cotangent)]


def relative_errors(inputs, options, want, run):
    """||got - want|| / ||want|| of output and gradients; where ||want|| is 0 in exact arithmetic, of 0.01."""
    pairs = zip(with_gradients(run, inputs, options), want, strict=True)
    return [((a.to(b.device).double() - b).norm() / b.norm().clamp(min=1e-2)).item() for a, b in pairs]
