"""Attention with structured scores, as functions of queries, keys and values (DESIGN 2 and 3).

Shapes: q (B, H, T, r), k (B, G, T, r), v (B, G, T, d) -> (B, H, T, d). G divides H; with G < H every group of H / G
query heads shares a key/value head (grouped-query attention). `link` is "softmax" or "identity" (masked scores used as
they are); `dropout` is the probability of dropping a weight. `causal=False` lets every position see both sides.

MLR and window attention have several paths, which `mlr_backend` and `window_backend` choose by the inputs or as
`backend` says. "dense" computes T x T scores, takes all inputs and is the only one for the identity link, for dropout
and for MLR blocks that do not nest. "blockwise" (any device), "triton" (MLR) and "flex" (windows, both CUDA) do not.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from structured import blockwise, kernels
from structured.errors import BadInput

LINKS = ("softmax", "identity")
WEIGHTINGS = ("none", "levels", "shared")
BACKENDS = {"mlr": ("auto", "triton", "blockwise", "dense"), "window": ("auto", "flex", "blockwise", "dense")}
DENSE_BELOW = 192  # positions: with fewer, dense MLR is faster on the CPU for 8 levels (for 4: with fewer than 96)
PADDED_FROM = 256  # positions from which fused attention is the faster on the CPU though it must pad q, k or v
ONE_LEVEL_UP_TO = 128  # features; PyTorch's attention in float32 is the faster for wider heads, at 128 they are even
FLEX_TILE = 128  # positions, FlexAttention's own granularity


def attention(q, k, v, *, scale, causal=True, link="softmax", dropout=0.0):
    """Standard attention: scores q_i . k_j * scale (scale = 8/r in µP, 1/sqrt(r) in the standard parametrization)."""
    _check(q, k, v, link)
    if link == "softmax" and not dropout and _one_level_pays(q, k, v):
        r, T = q.shape[-1], q.shape[2]
        return kernels.mlr_attention(q * (scale * r), k, v, (r,), (T,), weighting="none", causal=causal)
    if link == "softmax" and (_fused(q, v) or (q.shape[2] >= PADDED_FROM and not dropout)):
        return blockwise.fused(*_autocast(q, k, v), causal=causal, scale=scale, dropout=dropout)
    k, v = _one_per_head(q, k, v)
    return mix(low_rank_scores(q, k, scale), v, visible(q, causal), link=link, dropout=dropout)


def window_attention(q, k, v, window, *, scale, causal=True, link="softmax", dropout=0.0, backend="auto"):
    """Sliding-window attention: only keys i - window <= j <= i, so window + 1 of them; both sides if not causal."""
    _check(q, k, v, link)
    if window < 0:
        raise BadInput(f"window {window}: the window reaches 0 or more positions back")
    name = window_backend(q, k, v, link=link, dropout=dropout, backend=backend)
    if name != "dense":
        path = {"flex": flex_window_attention, "blockwise": blockwise.window_attention}[name]
        return path(*_autocast(q, k, v), window, scale=scale, causal=causal)
    near = visible(q, causal, window)
    if link == "softmax" and _fused(q, v):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=near, scale=scale, dropout_p=dropout, enable_gqa=k.shape[1] != q.shape[1]
        )
    k, v = _one_per_head(q, k, v)
    return mix(low_rank_scores(q, k, scale), v, near, link=link, dropout=dropout)


def gswa_attention(q, k, v, ranks, window, *, scales=None, causal=True, link="softmax", dropout=0.0, backend="auto"):
    """Global + sliding-window attention: the first ranks[0] features meet everywhere, the other ranks[1] in a window.

    Each part has its own softmax; the two weight matrices are added, so rows sum to 2, as in the original. `scales`
    are those of the two parts, 8/rank by default, `backend` the path of the window's part.
    """
    _check(q, k, v, link)
    check_ranks(ranks, q.shape[-1])
    if len(ranks) != 2 or min(ranks) < 1:
        raise BadInput(f"GSWA takes two ranks of at least 1, global|window, not {tuple(ranks)}")
    (q_far, q_near), (k_far, k_near) = q.split(ranks, -1), k.split(ranks, -1)
    far, near = scales or (8 / ranks[0], 8 / ranks[1])
    options = dict(causal=causal, link=link, dropout=dropout)
    everywhere = attention(q_far, k_far, v, scale=far, **options)
    return everywhere + window_attention(q_near, k_near, v, window, scale=near, backend=backend, **options)


def mlr_attention(
    q, k, v, ranks, block_sizes, *, weighting="none", causal=True, link="softmax", dropout=0.0, backend="auto"
):
    """MLR attention: level l scores pairs in the same block of block_sizes[l] positions with ranks[l] features.

    weighting: "none", "levels" (scores times 1/L) or "shared" (times 1/(number of levels the pair shares)). Block
    sizes need not halve, divide T or nest. Raises BadInput where ranks do not add up to the width of q.
    """
    _check(q, k, v, link)
    check_levels(ranks, block_sizes, weighting, q.shape[-1])
    name = mlr_backend(q, k, v, block_sizes, link=link, dropout=dropout, backend=backend)
    if name != "dense":
        path = {"triton": kernels, "blockwise": blockwise}[name]
        return path.mlr_attention(*_autocast(q, k, v), ranks, block_sizes, weighting=weighting, causal=causal)
    k, v = _one_per_head(q, k, v)
    scores = mlr_scores(q, k, ranks, block_sizes, weighting)
    return mix(scores, v, visible(q, causal), link=link, dropout=dropout)


def mlr_backend(q, k, v, block_sizes, *, link="softmax", dropout=0.0, backend="auto"):
    """The path that MLR attention takes; BadInput where `backend` names one that cannot take these inputs."""
    dense_only = _dense_only(link, dropout) or blockwise.nesting_refusal(q.shape[2], block_sizes)
    refusals = {
        "triton": lambda: dense_only or kernels.mlr_refusal(*_autocast(q, k, v)),
        "blockwise": lambda: dense_only,
    }
    return _choose("mlr", backend, refusals, q)


def window_backend(q, k, v, *, link="softmax", dropout=0.0, backend="auto"):
    """The path that window attention takes; BadInput where `backend` names one that cannot take these inputs."""
    dense_only = _dense_only(link, dropout)
    refusals = {"flex": lambda: dense_only or _flex_refusal(q, v), "blockwise": lambda: dense_only}
    return _choose("window", backend, refusals, q)


def check_backend(kind, backend):
    """Raise BadInput unless MLR attention (kind "mlr") or window attention (kind "window") has such a path."""
    if backend not in BACKENDS[kind]:
        raise BadInput(f"no attention backend '{backend}' for {kind} attention, there are {', '.join(BACKENDS[kind])}")


def check_device(backend, device):
    """Raise BadInput where a backend asked for by name needs a GPU and `device` is none; for what has no inputs yet."""
    if (backend == "flex" or (backend == "triton" and not kernels.interpreted())) and device.type != "cuda":
        raise BadInput(f"backend '{backend}' needs a CUDA device, not {device.type}; 'auto' chooses by itself")


def _choose(kind, backend, refusals, q):
    """The backend asked for, or the first worth its while that does not refuse.

    refusals: {name: function giving a reason or None}, the fastest first. Triton's interpreter, on the CPU, is never
    worth its while.
    """
    check_backend(kind, backend)
    if backend == "auto":
        worth = [name for name in refusals if (q.is_cuda if name == "triton" else q.shape[2] >= DENSE_BELOW)]
        return next((name for name in worth if refusals[name]() is None), "dense")
    reason = refusals[backend]() if backend in refusals else None
    if reason:
        raise BadInput(f"backend '{backend}': {reason}; backend 'dense' takes it, 'auto' chooses by itself")
    return backend


def _dense_only(link, dropout):
    """Why only the dense path can compute this, or None."""
    if link != "softmax":
        return f"link '{link}' takes the dense path"
    return f"dropout {dropout} takes the dense path" if dropout else None


def _flex_refusal(q, v):
    """Why FlexAttention cannot run, or None."""
    if q.device.type != "cuda":
        return f"FlexAttention trains on CUDA devices; q is on {q.device.type}"
    if q.dtype == torch.float64:
        return "FlexAttention computes in 32 bits or fewer, q is float64"
    widths = q.shape[-1], v.shape[-1]
    return f"FlexAttention takes heads at least 16 wide, not {min(widths)}" if min(widths) < 16 else None


def flex_window_attention(q, k, v, window, *, scale, causal=True):
    """Sliding-window attention by PyTorch's FlexAttention, which skips the tiles that no query sees."""
    T, after = q.shape[2], 0 if causal else window
    inside = torch.compiler.is_compiling()
    mask = (flex_mask if inside else _kept_flex_mask)(T, window, after, q.device)
    function = flex_attention if inside else _compiled_flex()
    return function(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def flex_mask(T, window, after, device):
    """FlexAttention's mask of the keys from i - window to i + after, made tile by tile, without a T x T tensor."""
    tiles = torch.arange(-(-T // FLEX_TILE), device=device)
    back = (tiles[:, None] - tiles) * FLEX_TILE  # of a tile's first position; those of its pairs differ by up to a tile
    nearest, farthest = back - (FLEX_TILE - 1), back + (FLEX_TILE - 1)
    some = (nearest <= window) & (farthest >= -after)
    whole = (farthest <= window) & (nearest >= -after)
    whole &= ((tiles + 1) * FLEX_TILE <= T) & ((tiles[:, None] + 1) * FLEX_TILE <= T)
    lists = [x for tiles_seen in (some & ~whole, whole) for x in _listed(tiles_seen)]
    return BlockMask.from_kv_blocks(
        *lists, BLOCK_SIZE=FLEX_TILE, seq_lengths=(T, T),
        mask_mod=lambda b, h, i, j: blockwise.in_window(i - j, window, after),
    )  # fmt: skip


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


def low_rank_scores(q, k, scale):
    """q_i . k_j * scale: (B, H, T, r) twice -> (B, H, T, T), not masked."""
    return q @ k.mT * scale


def mlr_scores(q, k, ranks, block_sizes, weighting="none"):
    """Scores of a multi-level low-rank matrix (DESIGN 3): coarse levels see far, fine levels see near.

    q, k: (B, H, T, sum(ranks)) -> (B, H, T, T), not masked. A pair that shares no level scores 0.
    """
    check_levels(ranks, block_sizes, weighting, q.shape[-1])
    B, H, T, _ = q.shape
    scores = q.new_zeros(B, H, T, T)
    for q_l, k_l, r, b in zip(q.split(ranks, -1), k.split(ranks, -1), ranks, block_sizes, strict=True):
        if r:
            _add_level(scores, q_l / r, k_l, min(b, T))
    if weighting == "levels":
        return scores / len(ranks)
    if weighting == "shared":
        return scores / shared_levels(T, block_sizes, q.device).clamp(min=1)
    return scores


def _add_level(scores, q, k, b):
    """Add q_i . k_j to the scores of every pair in the same block of b positions; the last block may be shorter."""
    n, T = scores.shape[-1] // b, scores.shape[-1]
    whole, rest = slice(0, n * b), slice(n * b, T)
    near = q[:, :, whole].unflatten(2, (n, b)) @ k[:, :, whole].unflatten(2, (n, b)).mT  # (B, H, n, b, b)
    grid = scores[:, :, whole, whole].unflatten(3, (n, b)).unflatten(2, (n, b))  # (B, H, n, b, n, b)
    grid.diagonal(dim1=2, dim2=4).add_(near.permute(0, 1, 3, 4, 2))
    if n * b < T:
        scores[:, :, rest, rest] += q[:, :, rest] @ k[:, :, rest].mT


def shared_levels(T, block_sizes, device=None):
    """How many levels every pair of positions shares, (T, T) integers."""
    i = torch.arange(T, device=device)
    return sum((i[:, None] // b == i // b).long() for b in block_sizes)


def default_block_sizes(block_size, n_levels):
    """block_size / 2^(l-1) for l = 1..n_levels: every level halves the one before."""
    finest = 2 ** (n_levels - 1)
    if block_size % finest:
        near = max(finest, round(block_size / finest) * finest)
        raise BadInput(
            f"{n_levels} levels halve the sequence {n_levels - 1} times, so block_size must be a multiple of {finest}, "
            f"not {block_size}; the nearest is {near}, or give the block sizes yourself"
        )
    return tuple(block_size // 2**level for level in range(n_levels))


def visible(q, causal, window=None):
    """Which keys j a query i may see, as a (T, T) mask of booleans; None where it may see all."""
    if not causal and window is None:
        return None
    T = q.shape[2]
    back = torch.arange(T, device=q.device)[:, None] - torch.arange(T, device=q.device)  # i - j
    return back >= 0 if window is None else blockwise.in_window(back, window, 0 if causal else window)


def mix(scores, v, mask, *, link="softmax", dropout=0.0):
    """Weigh the values: scores (B, H, T, T), v (B, H, T, d), mask (T, T) or None -> (B, H, T, d)."""
    if link == "softmax":
        weights = scores.softmax(-1) if mask is None else scores.masked_fill(~mask, float("-inf")).softmax(-1)
    else:
        weights = scores if mask is None else scores.masked_fill(~mask, 0)
    return F.dropout(weights, dropout) @ v if dropout else weights @ v


def check_ranks(ranks, width, name="ranks"):
    """Raise BadInput, under the name given, unless the ranks are whole numbers from 0 on that add up to the width."""
    if not ranks or min(ranks) < 0:
        raise BadInput(f"{name} {tuple(ranks)}: give one whole number from 0 on for each level")
    if sum(ranks) != width:
        words = f"{name} {tuple(ranks)} add up to {sum(ranks)}"
        raise BadInput(f"{words}, the queries and keys of a head have {width} features")


def check_levels(ranks, block_sizes, weighting, width):
    """Raise BadInput unless these are levels of an MLR matrix over heads of the given width."""
    check_ranks(ranks, width)
    if len(block_sizes) != len(ranks):
        raise BadInput(f"{len(block_sizes)} block sizes for {len(ranks)} ranks: {tuple(block_sizes)}, {tuple(ranks)}")
    if min(block_sizes) < 1:
        raise BadInput(f"block sizes {tuple(block_sizes)}: a block is at least 1 long")
    if weighting not in WEIGHTINGS:
        raise BadInput(f"no level weighting '{weighting}', there are {', '.join(WEIGHTINGS)}")


def _autocast(q, k, v):
    """q, k and v as PyTorch's own attention takes them under autocast: in one dtype."""
    device = q.device.type
    if q.is_meta or not torch.is_autocast_enabled(device) or q.dtype == torch.float64:
        return q, k, v
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))


def _one_per_head(q, k, v):
    """Repeat grouped keys and values so that every query head has its own."""
    share = q.shape[1] // k.shape[1]
    return (k, v) if share == 1 else (k.repeat_interleave(share, 1), v.repeat_interleave(share, 1))


def _one_level_pays(q, k, v):
    """Whether standard attention, which is MLR attention with one level, is faster by our kernel than by PyTorch's.

    In float32 it is, 1.3 to 1.5 times, its products being three of TF32 where PyTorch's are plain ones; not in 16 bits.
    """
    if not q.is_cuda or q.dtype != torch.float32 or torch.is_autocast_enabled("cuda"):
        return False
    narrow = max(q.shape[-1], v.shape[-1]) <= ONE_LEVEL_UP_TO
    return narrow and kernels.mlr_refusal(q, k, v) is None


def _fused(q, v):
    """Whether PyTorch's own attention is fused here: on the CPU not if values and queries differ in width."""
    return q.device.type != "cpu" or q.shape[-1] == v.shape[-1]


def _check(q, k, v, link):
    """The shapes all functions here ask for."""
    if q.ndim != 4 or k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise BadInput(f"q, k, v are (B, H, T, r), (B, G, T, r), (B, G, T, d), not {shapes}")
    if q.shape[1] % k.shape[1]:
        raise BadInput(f"{k.shape[1]} key heads do not divide {q.shape[1]} query heads")
    if link not in LINKS:
        raise BadInput(f"no link function '{link}', there are {', '.join(LINKS)}")
