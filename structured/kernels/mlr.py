"""Fused MLR attention, forward and backward: how the levels look to the kernels, and the launches."""

import math
from functools import lru_cache
from itertools import accumulate, combinations_with_replacement, pairwise, permutations
from typing import NamedTuple

import torch
import triton
from triton.runtime.interpreter import InterpretedFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from structured.kernels import mlr_triton
from structured.kernels.memory import heads_last, per_row

NARROWEST = 32  # features of a chunk, values of a head: those of fewer are filled up with zeros
CHUNK_COST = 8  # how many more features a far tile may load to save one chunk
EVERYTHING = 2**30  # the block length of a level on which all positions meet


class Launch(NamedTuple):
    """Tiles of BM queries and BN keys, warps, pipeline stages, the cap on a thread's registers (None: no cap)."""

    BM: int
    BN: int
    warps: int
    stages: int
    registers: int | None


class Shape(NamedTuple):
    """What the kernels know when they are compiled.

    The levels as they are seen by pairs: entry m stands for the pairs whose finest common block is of blocks[m]; they
    score with the first prefix[m] features times weights[m]. The first `far` entries are runs of whole tiles; classes
    are the bounds of those runs that need the same number of chunks. widths: the chunks that the features are cut into.
    ranks, ends: 1 / r_l is the scale of the features below ends[l]. limit: the largest sum of a row's exp2 that is
    trusted; products take exp2 in 16 bits.
    """

    blocks: tuple
    prefix: tuple
    weights: tuple
    far: int
    classes: tuple
    one_weight: bool
    widths: tuple
    ranks: tuple
    ends: tuple
    causal: bool
    DV: int
    BM: int
    BN: int
    stages: int
    precision: str
    limit: float
    packed: bool


def level_entries(ranks, block_sizes, weighting, T, tile):
    """[(block, prefix, weight)] of the kinds of pairs, from the coarsest, and how many of them are runs of whole tiles.

    Levels that do not cut T are one entry; where nothing is shared the prefix is 0. Between the coarser levels, whose
    blocks are whole tiles, and the finer ones, an entry of the smallest common block keeps the near tiles few.
    """
    entries, prefix = [], 0
    if block_sizes[0] < T:
        entries.append((EVERYTHING, 0, 1.0))
    for shared, (r, b) in enumerate(zip(ranks, block_sizes, strict=True), start=1):
        prefix += r
        weight = {"none": 1.0, "levels": 1 / len(ranks), "shared": 1 / shared}[weighting]
        if b >= T and b % tile:
            b = EVERYTHING
        if entries and (entries[-1][0] == b or entries[-1][1:] == (prefix, weight)):
            entries[-1] = (max(b, entries[-1][0]), prefix, weight)
        else:
            entries.append((b, prefix, weight))
    whole = sum(b % tile == 0 for b, *_ in entries)
    near = math.lcm(entries[whole][0], tile) if whole < len(entries) else tile
    if near < entries[whole - 1][0]:
        entries.insert(whole, (near, *entries[whole - 1][1:]))
        whole += 1
    return entries, whole - 1


def chunk_widths(entries, far, width, T):
    """The cut of `width` features into at most 3 powers of two with which far tiles load the least.

    Chunks of 16 would suit ranks better, but one product of 32 is faster than two of 16 (dev/LOG.md).
    """
    total = width + -width % NARROWEST
    cuts = {
        order
        for n in (1, 2, 3)
        for sizes in combinations_with_replacement((NARROWEST, 64, 128), n)
        if sum(sizes) == total
        for order in permutations(sizes)
    }
    reach = [min(block, T) for block, *_ in entries[: far + 1]]
    share = [a - b for a, b in pairwise(reach)]  # of the keys, in every run

    def loaded(cut):
        used = [next(end for end in accumulate(cut) if end >= prefix) for _, prefix, _ in entries[:far]]
        return sum(s * u for s, u in zip(share, used, strict=True)) / reach[0] + CHUNK_COST * len(cut)

    return min(sorted(cuts), key=loaded)


def launches(dtype, T, widest):
    """How the three kernels are launched. Measured on an H100 with heads of 64 in bfloat16 (dev/LOG.md)."""
    if dtype == torch.float32:
        return dict.fromkeys(("forward", "backward_q", "backward_kv"), Launch(64, 64, 4, 1, None))
    if widest > 64:
        return dict.fromkeys(("forward", "backward_q", "backward_kv"), Launch(64, 64, 4, 2, None))
    return dict(
        forward=Launch(64, 64, 4, 2 if T <= 1024 else 3, 128),
        backward_q=Launch(64, 64, 4, 3, 160 if T < 8192 else 168),
        backward_kv=Launch(64, 64, 4, 2, 168 if T < 8192 else 200),
    )


@lru_cache(maxsize=1024)
def shape(ranks, block_sizes, weighting, causal, T, dtype, d_value, launch, packed=False):
    """The Shape of a launch."""
    entries, far = level_entries(ranks, block_sizes, weighting, T, max(launch.BM, launch.BN))
    blocks, prefix, weights = zip(*entries, strict=True)
    widths = chunk_widths(entries, far, sum(ranks), T)
    need = [next(c for c, end in enumerate(accumulate(widths)) if end >= r) for r in prefix[:far]]
    classes = [m for m in range(far) if m == 0 or need[m] != need[m - 1]] + [far]
    used = tuple(r for r in ranks if r)
    return Shape(
        blocks=blocks, prefix=prefix, weights=weights, far=far, classes=tuple(classes),
        one_weight=len(set(weights[far:])) == 1, widths=widths, ranks=used, ends=tuple(accumulate(used)),
        causal=causal, DV=max(NARROWEST, triton.next_power_of_2(d_value)), BM=launch.BM, BN=launch.BN,
        stages=launch.stages, precision="tf32x3" if dtype == torch.float32 else "tf32",
        limit=2.0**15 if dtype == torch.float16 else 2.0**60, packed=packed,
    )  # fmt: skip


def like(x):
    """An empty tensor of x's shape, its gradient to be."""
    return heads_last(*x.shape, like=x)


def loadable(x):
    """x, or a copy of it that a tensor descriptor takes: features contiguous, all other strides whole 16 bytes."""
    unit = 16 // x.element_size()
    strides = [stride for n, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if n > 1]
    if x.stride(3) == 1 and all(stride and stride % unit == 0 for stride in strides) and x.data_ptr() % 16 == 0:
        return x
    return heads_last(*x.shape, like=x).copy_(x)


def descriptor(x, shape, strides, block_shape):
    """A TensorDescriptor without its own checks, which take longer than a launch: `loadable` has made them."""
    made = object.__new__(TensorDescriptor)
    made.base, made.shape, made.strides, made.block_shape = x, shape, strides, block_shape
    return made


def tiles(x, rows, width):
    """Descriptor of tiles of x (B, H, T, w): `rows` positions by `width` features."""
    (B, H, T, w), (b, h, t, _), unit = x.shape, x.stride(), 16 // x.element_size()
    strides = [b if B > 1 else unit, h if H > 1 else unit, t if T > 1 else unit, 1]
    return descriptor(x, [B, H, T, w], strides, [1, 1, rows, width])


def row_tiles(x, T, rows):
    """Descriptor of `rows` numbers of x = per_row(q), as (B H, T)."""
    return descriptor(x, [x.shape[0] * x.shape[1], T], [x.shape[2], 1], [1, rows])


def chunks(x, rows, widths):
    """Descriptors of the same tiles cut into chunks of features, three of them, None where there is no chunk."""
    return [*(tiles(x, rows, width) for width in widths), None, None][:3]


@lru_cache(maxsize=1)
def assembler():
    """The assembler to compile with: Triton's own, or the newer one that it brings for newer cards.

    ptxas of CUDA 12.8 got some of these kernels wrong: it read uniform registers before it wrote them (dev/LOG.md).
    """
    tools = triton.knobs.nvidia
    version = tuple(int(n) for n in tools.ptxas.version.split("."))
    return tools.ptxas_blackwell if version < (12, 9) and hasattr(tools, "ptxas_blackwell") else tools.ptxas


def run(kernel, arguments, programs, launch, S):
    """Launch a kernel; what has not been launched before is compiled first, and kept by what it depends on."""
    query, group = arguments[0].base, arguments[-1]
    key = kernel, S, launch, query.dtype, group, query.device
    with torch.cuda.device_of(query):
        if key in compiled:
            compiled[key][programs, 1, 1](*arguments, S)
            return
        options = dict(num_warps=launch.warps, maxnreg=launch.registers, enable_fp_fusion=True)
        with triton.knobs.nvidia.scope():
            if not isinstance(kernel, InterpretedFunction):
                triton.knobs.nvidia.ptxas = assembler().path
            made = kernel[(programs,)](*arguments, S, **options)
        if made:
            compiled[key] = made


compiled = {}  # the interpreter makes nothing


def written(x, rows, widths, packed):
    """What a kernel takes to write x in chunks: descriptors, or the memory where tiles may end behind a sequence."""
    return [*[x] * len(widths), None, None][:3] if packed else chunks(x, rows, widths)


def forward(q, k, v, ranks, block_sizes, weighting, causal, starts=None, longest=None):
    """(output (B, H, T, d), log2 of the sum of exp2 of the scores, per_row(q)).

    starts: of sequences packed into a batch of 1, and the end, (N + 1,) of int32; longest: a bound on their lengths.
    """
    B, H, T, _ = q.shape
    out, lse = heads_last(B, H, T, v.shape[3], v), per_row(q)
    if not out.numel():
        return out, lse
    N, T, packed = (B, T, False) if starts is None else (len(starts) - 1, longest, True)
    launch = launches(q.dtype, T, max(q.shape[3], v.shape[3]))["forward"]
    S = shape(ranks, block_sizes, weighting, causal, T, q.dtype, v.shape[3], launch, packed)
    Q, K = chunks(loadable(q), S.BM, S.widths), chunks(loadable(k), S.BN, S.widths)
    V, (O, *_) = tiles(loadable(v), S.BN, S.DV), written(out, S.BM, (S.DV,), packed)
    arguments = (*Q, *K, V, O, lse, T, lse.shape[2], starts, out.stride(1), H, H // k.shape[1])
    run(mlr_triton.forward, arguments, -(-T // S.BM) * N * H, launch, S)
    return out, lse


def backward(q, k, v, out, lse, grad, ranks, block_sizes, weighting, causal, starts=None, longest=None):
    """Gradients of q, k and v; the same bits every time."""
    (B, H, T, _), (G, d_value) = q.shape, v.shape[1::2]
    dq, dk, dv = like(q), like(k), like(v)
    if not grad.numel():
        return dq.zero_(), dk.zero_(), dv.zero_()
    N, T, packed = (B, T, False) if starts is None else (len(starts) - 1, longest, True)
    delta, launch = per_row(q), launches(q.dtype, T, max(q.shape[3], d_value))
    lse = lse.contiguous()
    q, k, v, out, grad = (loadable(x) for x in (q, k, v, out, grad))
    geometry = ranks, block_sizes, weighting, causal, T, q.dtype, d_value
    S = shape(*geometry, launch["backward_q"], packed)
    Q, K, DQ = chunks(q, S.BM, S.widths), chunks(k, S.BN, S.widths), written(dq, S.BM, S.widths, packed)
    V, O, DO = tiles(v, S.BN, S.DV), tiles(out, S.BM, S.DV), tiles(grad, S.BM, S.DV)
    arguments = (*Q, *K, V, O, DO, *DQ, lse, delta, T, lse.shape[2], starts, dq.stride(1), H, H // G)
    run(mlr_triton.backward_q, arguments, -(-T // S.BM) * N * H, launch["backward_q"], S)
    S = shape(*geometry, launch["backward_kv"], packed)
    Q, K, DK = chunks(q, S.BM, S.widths), chunks(k, S.BN, S.widths), written(dk, S.BN, S.widths, packed)
    V, DO, (DV, *_) = tiles(v, S.BN, S.DV), tiles(grad, S.BM, S.DV), written(dv, S.BN, (S.DV,), packed)
    numbers = (lse, delta) if packed else (row_tiles(lse, T, S.BM), row_tiles(delta, T, S.BM))
    sizes = T, lse.shape[2], starts, dk.stride(1), dv.stride(1), H, H // G
    arguments = (*Q, *K, V, DO, *DK, DV, *numbers, *sizes)
    run(mlr_triton.backward_kv, arguments, -(-T // S.BN) * N * G, launch["backward_kv"], S)
    return dq, dk, dv
