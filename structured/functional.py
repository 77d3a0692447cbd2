"""Attention with structured scores, as functions of queries, keys and values (DESIGN 2 and 3).

Shapes: q (B, H, Tq, r), k (B, G, Tk, r), v (B, G, Tk, d) -> (B, H, Tq, d). G divides H; with G < H every group of
H / G query heads shares a key/value head (grouped-query attention). `link` is "softmax" or "identity" (masked scores
used as they are); `dropout` is the probability of dropping a weight. `causal=False` lets every position see both sides.

Causality, windows and blocks go by positions. Those of keys count from 0; the first query's is `offset`, so that by
default, Tk - Tq, the queries are the last positions, as where one continues from cached keys. Four arguments more are
the same everywhere:

    attn_mask: as in PyTorch's scaled_dot_product_attention: booleans, True where a pair may meet, or floating numbers
        that are added to the scores; broadcastable to (B, H, Tq, Tk). It hides keys, positions stay as they are. A
        query that sees no key gives 0, and has no gradients.
    cu_seqlens: sequences packed one after the other into a batch of 1, as for FlashAttention's varlen functions: their
        starts and the end of the last, (N + 1,) integers; or two such tensors, of queries and of keys. A sequence sees
        itself only and its positions count from 0; fewer queries than keys are its last positions.
    max_seqlen: at least the length of the longest sequence. With it a GPU is not waited for: that the starts are right
        is then asserted there.
    offset: the position of the first query.

MLR and window attention have several paths, which `mlr_backend` and `window_backend` choose by the inputs or as
`backend` says. "dense" computes T x T scores, takes all inputs and is the only one for the identity link, for dropout
and for MLR blocks that do not nest. "blockwise" (any device), "triton" (MLR) and "flex" (windows, both CUDA) do not.
"""

import math
from collections.abc import Sequence
from functools import lru_cache, partial
from numbers import Integral, Real

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from structured import blockwise, dense, kernels, operators, pairs, transforms
from structured.dense import in_window, low_rank_scores, mix, visible
from structured.errors import BadInput
from structured.pairs import check_pairs
from structured.paths import BACKENDS, autocast, check_backend, check_device, mlr_backend, packed_path, window_backend

__all__ = [
    "BACKENDS", "LINKS", "WEIGHTINGS", "attention", "check_backend", "check_device", "check_levels", "check_ranks",
    "default_block_sizes", "flex_mask", "gswa_attention", "low_rank_scores", "mix", "mlr_attention", "mlr_backend",
    "mlr_scores", "visible", "window_attention", "window_backend",
]  # fmt: skip
LINKS = ("softmax", "identity")
WEIGHTINGS = ("none", "levels", "shared")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
PADDED_FROM = 256  # positions from which fused attention is the faster on the CPU though it must pad q, k or v
ONE_LEVEL_UP_TO = 128  # features; PyTorch's attention in float32 is the faster for wider heads, at 128 they are even
FLEX_TILE = 128  # positions, FlexAttention's own granularity


def attention(
    q: Tensor, k: Tensor, v: Tensor, *,
    scale: float | Tensor, causal: bool = True, link: str = "softmax", dropout: float = 0,
    attn_mask: Tensor | None = None, cu_seqlens: Tensor | tuple[Tensor, Tensor] | None = None,
    max_seqlen: int | None = None, offset: int | None = None,
) -> Tensor:  # fmt: skip
    """Standard attention: scores q_i . k_j * scale, over all keys j <= i.

    Args:
        q: queries (B, H, Tq, r).
        k: keys (B, G, Tk, r). G divides H; H / G query heads share a key head (grouped-query attention).
        v: values (B, G, Tk, d).
        scale: factor of the scores: 8/r in µP, 1/sqrt(r) in the standard parametrization. A number, or a tensor, which
            may want gradients: (), (H,), or broadcastable to (B, H, Tq, 1).
        causal: False lets every position see both sides.
        link: "softmax", or "identity" (masked scores as they are, not normalised).
        dropout: probability of dropping a weight.
        attn_mask, cu_seqlens, max_seqlen, offset: which pairs meet, as the head of this module says.

    Returns:
        The mixed values (B, H, Tq, d), in the dtype of v.

    Raises:
        BadInput: shapes, dtypes or devices that do not fit together, an unknown link, sequences that do not add up.

    Source: DESIGN 2, low_rank.
    """
    q, k, v = check_inputs(q, k, v, link, dropout)
    q, scale = _scaled(q, scale)
    meet = check_pairs(q, k, attn_mask, cu_seqlens, max_seqlen, offset)
    options = dict(scale=scale, link=link, dropout=dropout)
    if meet is not None:
        return (_over_pairs if meet.starts is None else _packed_attention)(q, k, v, meet, causal=causal, **options)
    by_torch = link == "softmax" and q.shape[-1]
    if by_torch and not dropout and _one_level_pays(q, k, v):
        r = q.shape[-1]
        return operators.mlr_attention(q * (scale * r), k, v, (r,), (operators.EVERYTHING,), "none", causal, "triton")
    if by_torch and _fusing_pays(q, v, dropout):
        return blockwise.fused(q, k, v, causal=causal, scale=scale, dropout=dropout)
    return dense.attend(q, k, v, visible(q, causal), **options)


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int, *,
    scale: float | Tensor, causal: bool = True, link: str = "softmax", dropout: float = 0, backend: str = "auto",
    attn_mask: Tensor | None = None, cu_seqlens: Tensor | tuple[Tensor, Tensor] | None = None,
    max_seqlen: int | None = None, offset: int | None = None,
) -> Tensor:  # fmt: skip
    """Sliding-window attention: a query i sees the keys i - window <= j <= i, so window + 1 of them.

    Args:
        q: queries (B, H, Tq, r).
        k: keys (B, G, Tk, r), G a divisor of H.
        v: values (B, G, Tk, d).
        window: how many positions back the keys reach, from 0 on.
        scale: factor of the scores, as for `attention`.
        causal: False opens the window to both sides, up to i + window.
        link: "softmax" or "identity".
        dropout: probability of dropping a weight.
        backend: "flex" (CUDA), "blockwise" (any device, memory T x window), "dense" (T x T), or "auto".
        attn_mask, cu_seqlens, max_seqlen, offset: which pairs meet, as the head of this module says.

    Returns:
        The mixed values (B, H, Tq, d), in the dtype of v.

    Raises:
        BadInput: as `attention`; a window below 0; a backend that cannot take these inputs, with the reason.

    Source: DESIGN 2, low_rank_with_sliding_window.
    """
    q, k, v = check_inputs(q, k, v, link, dropout)
    (window,) = whole([window], "windows")
    if window < 0:
        raise BadInput(f"window {window}: the window reaches 0 or more positions back")
    q, scale = _scaled(q, scale)
    meet = check_pairs(q, k, attn_mask, cu_seqlens, max_seqlen, offset)
    if meet is not None:
        options = dict(scale=scale, causal=causal, link=link, dropout=dropout, backend=backend)
        return (_over_pairs if meet.starts is None else _packed_windows)(q, k, v, meet, window, **options)
    name = window_backend(q, k, v, link=link, dropout=dropout, backend=backend)
    if name in ("flex", "blockwise") and not transforms.is_static(q.shape[2]):
        return operators.window_operator(q, k, v, window, scale, causal)
    if name == "flex":
        return flex_window_attention(q, k, v, window, scale=scale, causal=causal)
    if name == "blockwise":
        return blockwise.window_attention(q, k, v, window, scale=scale, causal=causal)
    near = visible(q, causal, window)
    if backend == "auto" and link == "softmax" and q.shape[-1] and _fused(q, v):
        return blockwise.fused(q, k, v, mask=near, scale=scale, dropout=dropout)
    return dense.attend(q, k, v, near, scale=scale, link=link, dropout=dropout)


def gswa_attention(
    q: Tensor, k: Tensor, v: Tensor, ranks: Sequence[int], window: int, *,
    scales: tuple[float | Tensor, float | Tensor] | None = None, causal: bool = True, link: str = "softmax",
    dropout: float = 0, backend: str = "auto",
    attn_mask: Tensor | None = None, cu_seqlens: Tensor | tuple[Tensor, Tensor] | None = None,
    max_seqlen: int | None = None, offset: int | None = None,
) -> Tensor:  # fmt: skip
    """Global + sliding-window attention: some features meet everywhere, the others in a window.

    Each part has its own softmax; the two weight matrices are added, so rows sum to 2, as in the original.

    Args:
        q: queries (B, H, Tq, ranks[0] + ranks[1]).
        k: keys (B, G, Tk, ranks[0] + ranks[1]), G a divisor of H.
        v: values (B, G, Tk, d).
        ranks: how many features meet everywhere, and how many in the window, at least 1 each.
        window: as for `window_attention`.
        scales: factors of the scores of the two parts, each as for `attention`; None: 8 / rank each.
        causal: False lets every position see both sides.
        link: "softmax" or "identity".
        dropout: probability of dropping a weight.
        backend: the path of the window's part, as for `window_attention`.
        attn_mask, cu_seqlens, max_seqlen, offset: which pairs meet, as the head of this module says.

    Returns:
        The mixed values (B, H, Tq, d), in the dtype of v.

    Raises:
        BadInput: as `window_attention`; ranks that are not two or do not add up to the width of q.

    Source: DESIGN 2, low_rank_with_gswa.
    """
    q, k, v = check_inputs(q, k, v, link, dropout)
    ranks = check_ranks(ranks, q.shape[-1])
    if len(ranks) != 2 or min(ranks) < 1:
        raise BadInput(f"GSWA takes two ranks of at least 1, global|window, not {tuple(ranks)}")
    scales = (8 / ranks[0], 8 / ranks[1]) if scales is None else tuple(scales)
    if len(scales) != 2:
        raise BadInput(f"{len(scales)} scales: GSWA takes two, global and window")
    where = dict(attn_mask=attn_mask, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, offset=offset)
    options, dtype = dict(causal=causal, link=link, dropout=dropout, **where), v.dtype
    with dense.without_autocast(q.device):
        if backend == "dense" or link != "softmax":
            q, k, v = (dense.precise(x) for x in (q, k, v))
        (q_far, q_near), (k_far, k_near) = q.split(ranks, -1), k.split(ranks, -1)
        everywhere = attention(q_far, k_far, v, scale=scales[0], **options)
        inside = window_attention(q_near, k_near, v, window, scale=scales[1], backend=backend, **options)
        return (everywhere + inside).to(dtype)


def mlr_attention(
    q: Tensor, k: Tensor, v: Tensor, ranks: Sequence[int], block_sizes: Sequence[int], *,
    weighting: str = "none", causal: bool = True, link: str = "softmax", dropout: float = 0, backend: str = "auto",
    attn_mask: Tensor | None = None, cu_seqlens: Tensor | tuple[Tensor, Tensor] | None = None,
    max_seqlen: int | None = None, offset: int | None = None,
) -> Tensor:  # fmt: skip
    """MLR attention: level l scores pairs in the same block of block_sizes[l] positions with ranks[l] features.

        S_ij = c_ij * sum over the levels l whose block i and j share of q_i^(l) . k_j^(l) / ranks[l]

    Near tokens meet with all features, far ones with few. The idea itself is 25 lines, `structured.dense.mlr_scores`.

    Args:
        q: queries (B, H, Tq, r), r = sum(ranks), cut along the features into one slice a level, coarse to fine.
        k: keys (B, G, Tk, r), G a divisor of H.
        v: values (B, G, Tk, d).
        ranks: features of every level, from 0 on.
        block_sizes: block length of every level in positions; `default_block_sizes` halves them level by level. They
            need not halve, divide T or nest; those that nest have the fast paths.
        weighting: c_ij: "none" (1), "levels" (1 / number of levels) or "shared" (1 / number of levels that i and j
            share, the paper's language models).
        causal: False lets every position see both sides.
        link: "softmax" or "identity".
        dropout: probability of dropping a weight.
        backend: "triton" (CUDA), "blockwise" (any device), both without a T x T tensor, "dense" (T x T, every input),
            or "auto".
        attn_mask, cu_seqlens, max_seqlen, offset: which pairs meet, as the head of this module says.

    Returns:
        The mixed values (B, H, Tq, d), in the dtype of v.

    Raises:
        BadInput: as `attention`; ranks that do not add up to r, as many block sizes as ranks are not given, a backend
            that cannot take these inputs, with the reason.

    Source: the paper's MLR attention; DESIGN 3.
    """
    q, k, v = check_inputs(q, k, v, link, dropout)
    ranks, block_sizes = check_levels(ranks, block_sizes, weighting, q.shape[-1])
    meet = check_pairs(q, k, attn_mask, cu_seqlens, max_seqlen, offset)
    options = dict(causal=causal, link=link, dropout=dropout)
    if meet is not None and meet.starts is not None:
        path = packed_path(q, k, v, block_sizes, meet, link=link, dropout=dropout, backend=backend)
        if path:
            packed = meet.starts[0], meet.longest
            return operators.mlr_attention(q, k, v, ranks, block_sizes, weighting, causal, path, *packed)
        if not torch.compiler.is_compiling():  # a traced graph has no lengths
            of_each = dict(ranks=ranks, block_sizes=block_sizes, weighting=weighting, backend=backend, **options)
            return pairs.by_sequence(partial(mlr_attention, **of_each), q, k, v, meet)
    if meet is not None and pairs.follows(meet, q, k) and k.shape[2] <= 4 * q.shape[2]:
        full = pairs.filled(q, k, meet)  # four times the queries cost less than Tq x Tk
        if mlr_backend(full, k, v, block_sizes, link=link, dropout=dropout, backend=backend) != "dense":
            out = mlr_attention(full, k, v, ranks, block_sizes, weighting=weighting, backend=backend, **options)
            return pairs.cut(out, q, meet)
    if meet is not None and pairs.hides_keys_alone(meet, q, k) and block_sizes[0] >= k.shape[2]:
        r, *finer = ranks  # the feature that hides keys is one of the level on which all meet
        wider = [*pairs.hide(meet.attn_mask, torch.cat([q[..., :r] * ((r + 1) / max(1, r)), q[..., r:]], -1), k), v]
        name = mlr_backend(*wider, block_sizes, link=link, dropout=dropout, backend=backend)
        if name != "dense":
            out = operators.mlr_attention(*wider, (r + 1, *finer), block_sizes, weighting, causal, name)
            return pairs.zero(out, pairs.see_nothing(meet.attn_mask, causal))
    name = mlr_backend(q, k, v, block_sizes, link=link, dropout=dropout, pairs=meet, backend=backend)
    if name != "dense":
        return operators.mlr_attention(q, k, v, ranks, block_sizes, weighting, causal, name)
    if meet is None:
        return dense.mlr_attention(q, k, v, ranks, block_sizes, weighting=weighting, **options)
    return pairs.mlr_attention(q, k, v, ranks, block_sizes, meet, weighting=weighting, **options)


def _packed_attention(q, k, v, meet, *, scale, causal, link, dropout):
    """Standard attention of packed sequences: on CUDA as MLR attention with one level, by its kernel."""
    r, one_level = q.shape[-1], (operators.EVERYTHING,)
    if packed_path(q, k, v, one_level, meet, link=link, dropout=dropout) == "triton":
        geometry = (r,), one_level, "none", causal, "triton", meet.starts[0], meet.longest
        return operators.mlr_attention(q * (scale * r), k, v, *geometry)
    options = dict(scale=scale, causal=causal, link=link, dropout=dropout)
    if torch.compiler.is_compiling():
        return _over_pairs(q, k, v, meet, **options)
    return pairs.by_sequence(partial(attention, **options), q, k, v, meet)


def _packed_windows(q, k, v, meet, window, *, scale, causal, link, dropout, backend):
    """Window attention of packed sequences: on CUDA by FlexAttention, which is compiled once for all lengths."""
    options = dict(scale=scale, causal=causal, link=link, dropout=dropout)
    alike = meet.starts[0] is meet.starts[1] and meet.attn_mask is None and transforms.is_static(q.shape[2])
    if alike and window_backend(q, k, v, link=link, dropout=dropout, backend=backend) == "flex":
        return flex_window_attention(q, k, v, window, scale=scale, causal=causal, starts=meet.starts[0])
    if torch.compiler.is_compiling():
        return _over_pairs(q, k, v, meet, window, **options, backend=backend)
    if q.is_cuda and backend == "auto" and link == "softmax" and not dropout:
        backend = "blockwise"  # FlexAttention would be compiled for every length
    return pairs.by_sequence(partial(window_attention, window=window, backend=backend, **options), q, k, v, meet)


def _over_pairs(q, k, v, meet, window=None, *, scale, causal, link, dropout, backend="auto"):
    """Standard attention, or that of a window, over given pairs, by PyTorch's fused attention where it pays."""
    if window is not None and pairs.hides_keys_alone(meet, q, k):
        name = window_backend(q, k, v, link=link, dropout=dropout, backend=backend)
        if name != "dense":
            wider = pairs.hide(meet.attn_mask, q * scale, k)
            out = window_attention(*wider, v, window, scale=1.0, causal=causal, backend=backend)
            return pairs.zero(out, pairs.see_nothing(meet.attn_mask, causal, window))
    elif window is not None and pairs.follows(meet, q, k):
        k, v, meet = pairs.within_reach(q, k, v, meet, window, causal)
        full, options = pairs.filled(q, k, meet), dict(link=link, dropout=dropout, backend=backend)
        if q.shape[2] >= window and window_backend(full, k, v, **options) != "dense":
            return pairs.cut(window_attention(full, k, v, window, scale=scale, causal=causal, **options), q, meet)
    if window is not None:
        window_backend(q, k, v, link=link, dropout=dropout, pairs=meet, backend=backend)
    learned = meet.attn_mask is not None and meet.attn_mask.requires_grad
    fused = backend == "auto" and link == "softmax" and q.shape[-1] and k.shape[2] and not learned
    if fused and _fusing_pays(q, v, dropout):
        mask, empty = pairs.seen(meet, q, k, causal, window)
        if mask is not None and mask.dtype != torch.bool and q.is_cuda:
            mask = mask.clamp(min=torch.finfo(q.dtype).min).to(q.dtype)
        return pairs.zero(blockwise.fused(q, k, v, mask=mask, scale=scale, dropout=dropout), empty)
    scores = partial(low_rank_scores, scale=scale)
    return pairs.attend(scores, q, k, v, meet, causal=causal, window=window, link=link, dropout=dropout)


def mlr_scores(
    q: Tensor, k: Tensor, ranks: Sequence[int], block_sizes: Sequence[int], weighting: str = "none"
) -> Tensor:
    """Scores of a multi-level low-rank matrix: coarse levels see far, fine levels see near.

    Args:
        q: queries (B, H, T, sum(ranks)).
        k: keys of the same shape.
        ranks, block_sizes, weighting: as for `mlr_attention`.

    Returns:
        (B, H, T, T), neither masked nor normalised. A pair that shares no level scores 0.

    Raises:
        BadInput: ranks that do not add up to the width of q, or block sizes that are not one a level.

    Source: DESIGN 3.
    """
    ranks, block_sizes = check_levels(ranks, block_sizes, weighting, q.shape[-1])
    scores = dense.mlr_scores(dense.precise(q), dense.precise(k), ranks, block_sizes, weighting)
    return scores.to(q.dtype)


def flex_window_attention(q, k, v, window, *, scale, causal=True, starts=None):
    """Sliding-window attention by PyTorch's FlexAttention, which skips the tiles that no query sees.

    starts: those of packed sequences and the end of the last, (N + 1,).
    """
    T, after = q.shape[2], 0 if causal else window
    inside = torch.compiler.is_compiling()
    if starts is None:
        mask = (flex_mask if inside else _kept_flex_mask)(T, window, after, q.device)
    else:
        mask = packed_flex_mask(T, window, after, starts)
    function = flex_attention if inside else _compiled_flex()
    q, k, v = (blockwise.features_together(x) for x in (q, k, v))
    grouped = True if q.shape[1] != k.shape[1] else False  # noqa: SIM210 - no symbol, where heads have one
    return function(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped)


def flex_mask(T, window, after, device):
    """FlexAttention's mask of the keys from i - window to i + after, made tile by tile, without a T x T tensor."""
    tiles = torch.arange(-(-T // FLEX_TILE), device=device)
    back = (tiles[:, None] - tiles) * FLEX_TILE  # of a tile's first position; those of its pairs differ by up to a tile
    nearest, farthest = back - (FLEX_TILE - 1), back + (FLEX_TILE - 1)
    some = (nearest <= window) & (farthest >= -after)
    whole = (farthest <= window) & (nearest >= -after)
    whole &= ((tiles + 1) * FLEX_TILE <= T) & ((tiles[:, None] + 1) * FLEX_TILE <= T)
    return _block_mask(T, some, whole, lambda b, h, i, j: in_window(i - j, window, after))


def packed_flex_mask(T, window, after, starts):
    """The same of sequences that begin at starts (N + 1,) and see themselves only."""
    i = torch.arange(T, device=starts.device)
    n = torch.searchsorted(starts[1:], i, right=True)
    first, last = (i - window).maximum(starts[n]), (i + after).minimum(starts[n + 1] - 1)  # they grow with i
    tile = torch.arange(0, T, FLEX_TILE, device=starts.device)
    end = (tile + FLEX_TILE - 1).clamp(max=T - 1)
    some = (end >= first[tile][:, None]) & (tile <= last[end][:, None])
    whole = (tile >= first[end][:, None]) & (end <= last[tile][:, None])
    whole &= ((tile + FLEX_TILE <= T) & (tile[:, None] + FLEX_TILE <= T))
    return _block_mask(T, some, whole, lambda b, h, i, j: (j >= first[i]) & (j <= last[i]))


def _block_mask(T, some, whole, mask_mod):
    """A BlockMask of the tiles that queries see some of, and of those they see whole."""
    lists = [x for tiles_seen in (some & ~whole, whole) for x in _listed(tiles_seen)]
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=FLEX_TILE, seq_lengths=(T, T), mask_mod=mask_mod)


def _listed(seen):
    """How many tiles each row sees, and which, those first: (n, n) booleans -> (1, 1, n) and (1, 1, n, n) integers."""
    order = seen.int().argsort(dim=-1, descending=True, stable=True)
    return seen.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]


@lru_cache(maxsize=16)
def _kept_flex_mask(T, window, after, device):
    with torch.inference_mode(False):  # it may serve training later
        return flex_mask(T, window, after, device)


@lru_cache(maxsize=1)
def _compiled_flex():
    return torch.compile(flex_attention, dynamic=False)


def default_block_sizes(block_size: int, n_levels: int) -> tuple[int, ...]:
    """The paper's block lengths: block_size / 2^(l-1) for the levels l = 1 .. n_levels, each half of the one before.

    Args:
        block_size: the longest sequence, in positions.
        n_levels: number of levels.

    Returns:
        One length a level, coarse to fine: (1024, 3) gives (1024, 512, 256).

    Raises:
        BadInput: a block_size that cannot be halved so often; the message has the nearest that can.
    """
    finest = 2 ** (n_levels - 1)
    if block_size % finest:
        near = max(finest, round(block_size / finest) * finest)
        raise BadInput(
            f"{n_levels} levels halve the sequence {n_levels - 1} times, so block_size must be a multiple of {finest}, "
            f"not {block_size}; the nearest is {near}, or give the block sizes yourself"
        )
    return tuple(block_size // 2**level for level in range(n_levels))


def _scaled(q, scale):
    """(queries, scale as a number): a tensor is multiplied in, which is (), (H,), or broadcastable to (B, H, Tq, 1)."""
    if not isinstance(scale, Tensor):
        return q, scale
    (B, H, Tq, _), shape = q.shape, tuple(scale.shape)
    if not scale.is_floating_point() or scale.device != q.device:
        raise BadInput(f"scale is {scale.dtype} on {scale.device}; give floating numbers on {q.device}, as q")
    fits = len(shape) == 4 and all(n in (1, m) for n, m in zip(shape, (B, H, Tq, 1), strict=True))
    if shape not in ((), (H,)) and not fits:
        raise BadInput(f"scale {shape} is no number, nor ({H},), one a head, nor broadcastable to {(B, H, Tq, 1)}")
    factor = scale[:, None, None] if len(shape) == 1 else scale
    return (dense.precise(q) * factor).to(q.dtype), 1.0


def check_inputs(q, k, v, link="softmax", dropout=0):
    """q, k and v as all functions here take them, in one dtype under autocast; BadInput for what no path takes."""
    shapes = q.shape, k.shape, v.shape
    if not q.ndim == k.ndim == v.ndim == 4 or k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0]:
        raise BadInput("q, k, v are (B, H, Tq, r), (B, G, Tk, r), (B, G, Tk, d), not " + _listed_shapes(shapes))
    (_, H, _, r), G = q.shape, k.shape[1]
    if k.shape[3] != r:
        words = f"q has {r} features, k {k.shape[3]}; both take part in the same products and must have as many"
        raise BadInput(
            f"q, k, v are (B, H, Tq, r), (B, G, Tk, r), (B, G, Tk, d), not {_listed_shapes(shapes)}: {words}"
        )
    if H != G and (not G or H % G):
        near = f"; {max(1, round(H / G)) * G} query heads would do" if G else ""
        raise BadInput(f"{G} key heads do not divide {H} query heads{near}")
    if not q.device == k.device == v.device:
        raise BadInput(f"q, k, v are on {q.device}, {k.device}, {v.device}; move them to one device")
    q, k, v = autocast(q, k, v)
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        names = ", ".join(str(x.dtype).removeprefix("torch.") for x in (q, k, v))
        raise BadInput(f"q, k, v are {names}; they must be of one floating dtype: x.to({_widest(q, k, v)}) makes them")
    if link not in LINKS:
        raise BadInput(f"no link function '{link}', there are {', '.join(LINKS)}")
    if not isinstance(dropout, Real) or not 0 <= dropout <= 1:
        raise BadInput(f"dropout {dropout}: it is a probability, from 0 to 1")
    return q, k, v


def _listed_shapes(shapes):
    return ", ".join(str(tuple(shape)) for shape in shapes)


def _widest(*tensors):
    """The dtype that holds all of these, float32 where none of the four can."""
    widest = tensors[0].dtype
    for x in tensors[1:]:
        widest = torch.promote_types(widest, x.dtype)
    return widest if widest in DTYPES else torch.float32


def whole(numbers, name):
    """The numbers as a tuple of Python's integers; BadInput, under the name given, unless they are whole numbers."""
    numbers = tuple(numbers)
    if all(type(n) is int for n in numbers):
        return numbers
    if not all(isinstance(n, Integral) and not isinstance(n, bool) for n in numbers):
        near = ""
        if all(isinstance(n, Real) and math.isfinite(n) for n in numbers):
            near = f"; the nearest are {tuple(round(n) for n in numbers)}"
        raise BadInput(f"{name} {numbers}: give whole numbers{near}")
    return tuple(int(n) for n in numbers)


def check_ranks(ranks, width, name="ranks"):
    """The ranks as integers; BadInput, under the name given, unless they are from 0 on and add up to the width."""
    ranks = whole(ranks, name)
    if not ranks or min(ranks) < 0:
        raise BadInput(f"{name} {ranks}: give one whole number from 0 on for each level")
    if sum(ranks) != width:
        first = max(0, width - sum(ranks[1:]))
        near = f"; ({', '.join(map(str, (first, *ranks[1:])))}) would do" if first + sum(ranks[1:]) == width else ""
        words = f"{name} {ranks} add up to {sum(ranks)}"
        raise BadInput(f"{words}, the queries and keys of a head have {width} features{near}")
    return ranks


def check_levels(ranks, block_sizes, weighting, width):
    """Ranks and block sizes as integers; BadInput unless they are levels of an MLR matrix over heads of this width."""
    ranks, block_sizes = check_ranks(ranks, width), whole(block_sizes, "block sizes")
    if len(block_sizes) != len(ranks):
        raise BadInput(f"{len(block_sizes)} block sizes for {len(ranks)} ranks: {block_sizes}, {ranks}")
    if min(block_sizes) < 1:
        raise BadInput(f"block sizes {block_sizes}: a block is at least 1 long")
    if weighting not in WEIGHTINGS:
        raise BadInput(f"no level weighting '{weighting}', there are {', '.join(WEIGHTINGS)}")
    return ranks, block_sizes


def _one_level_pays(q, k, v):
    """Whether standard attention, which is MLR attention with one level, is faster by our kernel than by PyTorch's.

    In float32 it is, 1.3 to 1.5 times, its products being three of TF32 where PyTorch's are plain ones; not in 16 bits.
    """
    if not q.is_cuda or q.dtype != torch.float32 or transforms.derivatives():
        return False
    narrow = max(q.shape[-1], v.shape[-1]) <= ONE_LEVEL_UP_TO
    return narrow and kernels.mlr_refusal(q, k, v) is None


def _fusing_pays(q, v, dropout):
    """Whether standard attention is the faster by PyTorch's own, though q, k or v may have to be padded for it."""
    return _fused(q, v) or not (dropout or transforms.below(q.shape[2], PADDED_FROM))


def _fused(q, v):
    """Whether PyTorch's own attention is fused here: on the CPU not if values and queries differ in width."""
    return q.device.type != "cpu" or q.shape[-1] == v.shape[-1]
