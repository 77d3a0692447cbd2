"""Attention with its T x T scores in memory: every link function, dropout and block geometry, and every derivative.

Shapes are those of `structured.functional`. Inputs of 16 bits are computed in float32 from the scores to the output,
also under autocast, as PyTorch's own attention computes them.
"""

import contextlib

import torch
import torch.nn.functional as F

from structured import transforms


def attend(q, k, v, mask, *, scale, link="softmax", dropout=0):
    """Standard attention to the keys that `mask` (Tq, Tk) shows, or to all."""
    return attend_by(lambda q, k: low_rank_scores(q, k, scale), q, k, v, mask, link=link, dropout=dropout)


def mlr_attention(q, k, v, ranks, block_sizes, *, weighting="none", causal=True, link="softmax", dropout=0):
    """MLR attention with any blocks."""
    mask = visible(q, causal)
    options = dict(link=link, dropout=dropout)
    return attend_by(lambda q, k: mlr_scores(q, k, ranks, block_sizes, weighting), q, k, v, mask, **options)


def attend_by(scores, q, k, v, mask, *, link="softmax", dropout=0):
    """Mix the values by scores(q, k) (B, H, T, T), of one key a query head, over the keys that `mask` shows."""
    dtype = v.dtype
    with without_autocast(q.device):
        q, k, v = (precise(x) for x in (q, k, v))
        k, v = one_per_head(q, k, v)
        return mix(scores(q, k), v, mask, link=link, dropout=dropout).to(dtype)


def without_autocast(device):
    """A context in which nothing is cast: the inputs have been."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def precise(x):
    """x in float32 if it has 16 bits."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def one_per_head(q, k, v):
    """Repeat grouped keys and values so that every query head has its own."""
    if q.shape[1] == k.shape[1]:
        return k, v
    share = q.shape[1] // k.shape[1]
    return k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)


def low_rank_scores(q, k, scale):
    """q_i . k_j * scale: (B, H, T, r) twice -> (B, H, T, T), not masked."""
    return q @ k.mT * scale


def mlr_scores(q, k, ranks, block_sizes, weighting="none", at=None):
    """Scores of a multi-level low-rank matrix (DESIGN 3): coarse levels see far, fine levels see near.

    q: (B, H, Tq, sum(ranks)), k: (B, H, Tk, sum(ranks)) -> (B, H, Tq, Tk), not masked. A pair that shares no level
    scores 0. at: the positions of queries and keys; None: both 0 to T - 1.
    """
    T = k.shape[2]
    if not any(ranks):
        return q @ k.mT  # 0, of 0 features
    known = at is None and transforms.is_static(T) and T > 0
    at = at or (torch.arange(T, device=q.device),) * 2
    in_place = known and not transforms.mapped() and transforms.derivatives() is None
    levels = zip(q.split(ranks, -1), k.split(ranks, -1), ranks, block_sizes, strict=True)
    scores = q.new_zeros(*q.shape[:3], T)
    for q_l, k_l, r, b in levels:
        if r and in_place:
            _add_level(scores, q_l / r, k_l, min(b, T))
        elif r:
            scores = scores + (q_l / r @ k_l.mT).masked_fill(~same_block(*at, b), 0)
    if weighting == "levels":
        return scores / len(ranks)
    if weighting == "shared":
        return scores / shared_levels(*at, block_sizes).clamp(min=1)
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


def same_block(i, j, b):
    """Which positions of i (Tq,) share a block of b with which of j (Tk,), (Tq, Tk) booleans."""
    return (i // b)[:, None] == j // b


def shared_levels(i, j, block_sizes):
    """How many levels every pair of positions shares, (Tq, Tk) integers."""
    return sum(same_block(i, j, b).long() for b in block_sizes)


def visible(q, causal, window=None):
    """Which keys j a query i may see, as a (T, T) mask of booleans; None where it may see all."""
    if not causal and window is None:
        return None
    T = q.shape[2]
    back = torch.arange(T, device=q.device)[:, None] - torch.arange(T, device=q.device)  # i - j
    return back >= 0 if window is None else in_window(back, window, 0 if causal else window)


def in_window(back, window, after):
    """Whether a query sees a key `back` positions before it, through `window` positions back and `after` ahead."""
    return (back <= window) & (back >= -after)


def mix(scores, v, mask, *, link="softmax", dropout=0):
    """Weigh the values: scores (B, H, Tq, Tk), v (B, H, Tk, d) -> (B, H, Tq, d).

    mask: (.., Tq, Tk), booleans or what is added to the scores, -inf where there is no weight; or None.
    """
    if mask is not None and mask.dtype != torch.bool:
        scores, mask = scores + mask, mask > float("-inf")
    if link == "softmax":
        weights = scores.softmax(-1) if mask is None else scores.masked_fill(~mask, float("-inf")).softmax(-1)
    else:
        weights = scores if mask is None else scores.masked_fill(~mask, 0)
    return F.dropout(weights, dropout) @ v if dropout else weights @ v
