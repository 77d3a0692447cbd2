"""Which pairs of queries and keys meet, where it is not all of one sequence: masks, packed sequences, cached keys."""

from functools import lru_cache, partial
from itertools import pairwise
from numbers import Integral
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from structured import dense, transforms
from structured.errors import BadInput

HIDDEN = 2.0**11  # its square, divided by all features and levels, is larger than scores are, and exact in 16 bits


class Pairs(NamedTuple):
    """What a call says of its pairs.

    offset: the position of the first query. attn_mask: (1 or B, 1 or H, 1 or Tq, 1 or Tk), True or finite where a pair
    may meet, or None. starts: those of packed sequences' queries and keys, each (N + 1,), or None. longest: a bound on
    the length of a sequence, or None.
    """

    offset: int
    attn_mask: Tensor | None = None
    starts: tuple[Tensor, Tensor] | None = None
    longest: int | None = None


def check_pairs(q, k, attn_mask, cu_seqlens, max_seqlen, offset):
    """The Pairs of a call, or None where they are all of one sequence; BadInput for what does not fit q and k."""
    Tq, Tk = q.shape[2], k.shape[2]
    if attn_mask is not None:
        attn_mask = _checked_mask(attn_mask, q, Tk)
    if cu_seqlens is not None:
        if offset is not None:
            raise BadInput(f"offset {offset} with cu_seqlens: queries are the last positions of their own sequence")
        return Pairs(0, attn_mask, *_checked_starts(cu_seqlens, max_seqlen, q, Tk))
    if max_seqlen is not None:
        raise BadInput(f"max_seqlen {max_seqlen} without cu_seqlens: it bounds the lengths of packed sequences")
    if offset is None:
        offset = Tk - Tq
    elif not isinstance(offset, Integral) or isinstance(offset, bool) or offset < min(0, Tk - Tq):
        raise BadInput(
            f"offset {offset}: the position of the first query is a whole number from {min(0, Tk - Tq)} on; "
            f"{Tk - Tq} makes the {Tq} queries the last of {Tk} positions"
        )
    return None if Tq == Tk and not offset and attn_mask is None else Pairs(offset, attn_mask)


def _checked_mask(mask, q, Tk):
    """The mask as one of 4 dimensions."""
    shape = *q.shape[:3], Tk
    if not isinstance(mask, Tensor):
        raise BadInput(f"attn_mask is a {type(mask).__name__}; give a tensor, True or finite where a pair may meet")
    wrong = mask.ndim > 4 or any(n not in (1, m) for n, m in zip(mask.shape[::-1], shape[::-1], strict=False))
    if wrong:
        near = "; of keys alone it is mask[:, None, None]" if mask.ndim == 2 and mask.shape == (shape[0], Tk) else ""
        raise BadInput(f"attn_mask {tuple(mask.shape)} does not broadcast to (B, H, Tq, Tk) = {tuple(shape)}{near}")
    if mask.device != q.device:
        raise BadInput(f"attn_mask is on {mask.device}, q on {q.device}; move them to one device")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise BadInput(f"attn_mask is {mask.dtype}; mask.bool() is True where a pair may meet, a floating one is added")
    if mask.dtype != torch.bool:
        mask = mask.to(torch.promote_types(q.dtype, torch.float32))
    return mask[(None,) * (4 - mask.ndim)]


def _checked_starts(cu_seqlens, max_seqlen, q, Tk):
    """(starts of queries and keys, a bound on their lengths)."""
    pair = tuple(cu_seqlens) if isinstance(cu_seqlens, (tuple, list)) else (cu_seqlens, cu_seqlens)
    names = ("cu_seqlens",) if pair[0] is pair[-1] else ("cu_seqlens_q", "cu_seqlens_k")
    if len(pair) != 2:
        raise BadInput(f"cu_seqlens are one tensor, or two, of queries and of keys, not {len(pair)}")
    if q.shape[0] != 1:
        raise BadInput(f"cu_seqlens take sequences packed into a batch of 1, q has {q.shape[0]}")
    if max_seqlen is not None and (not isinstance(max_seqlen, Integral) or max_seqlen < 0):
        raise BadInput(f"max_seqlen {max_seqlen}: give the longest sequence's whole number of positions")
    for name, starts in zip(names, pair, strict=False):
        if not isinstance(starts, Tensor) or starts.ndim != 1 or starts.dtype not in (torch.int32, torch.int64):
            what = f"{starts.dtype} {tuple(starts.shape)}" if isinstance(starts, Tensor) else type(starts).__name__
            raise BadInput(f"{name} is a tensor (N + 1,) of int32 or int64, the starts and the end, not {what}")
        if transforms.is_mapped(starts):
            raise BadInput(f"{name} cannot be mapped by torch.vmap: each would have other lengths")
        if starts.device != q.device:
            raise BadInput(f"{name} is on {starts.device}, q on {q.device}; move them to one device")
    if pair[0].shape != pair[1].shape or not len(pair[0]):
        raise BadInput(f"cu_seqlens of {len(pair[0])} and {len(pair[1])} numbers; N sequences have N + 1 in both")
    if len(names) == 1 and q.shape[2] != Tk:
        raise BadInput(f"one cu_seqlens for {q.shape[2]} queries and {Tk} keys; give (cu_seqlens_q, cu_seqlens_k)")
    lengths = [_longest(*of, max_seqlen) for of in zip(names, pair, (q.shape[2], Tk), strict=False)]
    return pair, None if None in lengths else max(lengths)


def _longest(name, starts, T, max_seqlen):
    """A bound on the lengths, or None; BadInput unless the starts go from 0 to T and never back.

    Where a device or a tracer would have to be asked, that is asserted on the device.
    """
    if torch.compiler.is_compiling() or (starts.is_cuda and max_seqlen is not None):
        lengths = starts.diff()
        good = (starts[0] == 0) & (starts[-1] == T) & (lengths >= 0).all()
        if max_seqlen is not None:
            good = good & (lengths <= max_seqlen).all()
        torch._assert_async(good, f"{name} goes from 0 to the number of positions, by up to max_seqlen and never back")
        return max_seqlen
    numbers = starts.tolist()
    lengths = [end - start for start, end in pairwise(numbers)]
    if numbers[0] != 0 or numbers[-1] != T or min(lengths, default=0) < 0:
        wrong = next((n for n, length in enumerate(lengths) if length < 0), None)
        found = f"goes from {numbers[0]} to {numbers[-1]}"
        found = found if wrong is None else f"goes back, from {numbers[wrong]} to {numbers[wrong + 1]}"
        raise BadInput(f"{name} {found}; it goes from 0 to {T}, the number of positions, and never back")
    if max_seqlen is not None and max(lengths, default=0) > max_seqlen:
        raise BadInput(f"max_seqlen {max_seqlen} is below {max(lengths)}, the longest sequence in {name}")
    return max(lengths, default=0)


def places(pairs, q, k):
    """Positions (Tq,) and (Tk,) of queries and keys, and which are of one sequence, (Tq, Tk) or None for all."""
    i, j = (torch.arange(x.shape[2], device=q.device) for x in (q, k))
    if pairs.starts is None:
        return i + pairs.offset, j, None
    starts_q, starts_k = pairs.starts
    n, m = (torch.searchsorted(starts[1:].contiguous(), x.to(starts.dtype), right=True)
            for starts, x in ((starts_q, i), (starts_k, j)))  # fmt: skip
    last = starts_k[1:] - starts_q[1:]  # of a sequence's queries and keys are at one position
    return i - starts_k[n] + last[n], j - starts_k[m], n[:, None] == m


def seen(pairs, q, k, causal, window=None):
    """(mask, rows that see nothing) by positions, sequences and the mask, (B, H, Tq, Tk) and (.., Tq, 1) or smaller.

    The mask, booleans or what is added to scores, shows these rows every key, so that a softmax has no NaN; see `zero`.
    Both are None where every query sees all.
    """
    i, j, shown = places(pairs, q, k)
    mask, added = pairs.attn_mask, None
    if causal or window is not None:
        back = i[:, None] - j
        near = back >= 0 if window is None else dense.in_window(back, window, 0 if causal else window)
        shown = near if shown is None else shown & near
    if mask is not None:
        mask, added = (mask, None) if mask.dtype == torch.bool else (mask > float("-inf"), mask)
        shown = mask if shown is None else shown & mask
    if shown is None:
        return None, None
    empty = ~shown.any(-1, keepdim=True)
    if added is None:
        return shown | empty, empty
    return added.masked_fill(~shown, float("-inf")).masked_fill(empty, 0), empty


def zero(out, empty):
    """The output with 0 in the rows that see nothing, which so have no gradients."""
    return out if empty is None else out.masked_fill(empty, 0)


def hides_keys_alone(pairs, q, k):
    """Whether the pairs are all of one sequence but for keys that a mask of booleans hides from every query."""
    mask = pairs.attn_mask
    if mask is None or pairs.starts is not None or pairs.offset or q.shape[2] != k.shape[2]:
        return False
    return mask.dtype == torch.bool and mask.shape[1] == mask.shape[2] == 1 < mask.shape[3]


def follows(pairs, q, k):
    """Whether the queries are some of the positions of the keys, one after the other, and nothing is hidden."""
    return pairs.attn_mask is None and pairs.starts is None and 0 <= pairs.offset <= k.shape[2] - q.shape[2]


def within_reach(q, k, v, pairs, window, causal):
    """Keys, values and pairs without the keys that are in no query's window."""
    end = pairs.offset + q.shape[2] + (0 if causal else window)
    first = max(0, pairs.offset - window)
    return k[:, :, first:end], v[:, :, first:end], pairs._replace(offset=pairs.offset - first)


def filled(q, k, pairs):
    """The queries of `follows` among zeros, as many as there are keys."""
    return F.pad(q, (0, 0, pairs.offset, k.shape[2] - pairs.offset - q.shape[2]))


def cut(out, q, pairs):
    """What is theirs of the output for `filled`."""
    return out[:, :, pairs.offset : pairs.offset + q.shape[2]]


def hide(mask, q, k):
    """(q, k) with a feature in front that makes hidden keys' scores -HIDDEN^2: so paths without masks hide them."""
    first = (*q.shape[:3], 1)
    hidden = torch.zeros_like(k[..., :1]).masked_fill(~mask.mT, -HIDDEN)
    return torch.cat([q.new_full(first, HIDDEN), q], -1), torch.cat([hidden, k], -1)


def see_nothing(mask, causal, window=None):
    """Which queries see none of the keys that a mask (B, 1, 1, T) shows: (B, 1, T, 1)."""
    T = mask.shape[3]
    i = torch.arange(T, device=mask.device)
    first = i * 0 if window is None else (i - window).clamp(min=0)
    last = i if causal else (i * 0 + T if window is None else i + window).clamp(max=T - 1)
    before = F.pad(mask.cumsum(3), (1, 0))
    return (before[..., last + 1] == before[..., first]).mT


def attend(scores, q, k, v, pairs, *, causal, window=None, link="softmax", dropout=0):
    """Dense attention by scores(q, k) over any pairs."""
    mask, empty = seen(pairs, q, k, causal, window)
    return zero(dense.attend_by(scores, q, k, v, mask, link=link, dropout=dropout), empty)


def mlr_attention(q, k, v, ranks, block_sizes, pairs, *, weighting="none", **options):
    """Dense MLR attention over any pairs."""
    levels = dict(ranks=ranks, block_sizes=block_sizes, weighting=weighting, at=places(pairs, q, k)[:2])
    return attend(partial(dense.mlr_scores, **levels), q, k, v, pairs, **options)


def by_sequence(function, q, k, v, pairs):
    """Packed sequences one by one, those of equal lengths together, as function(q, k, v, attn_mask=..) gives them."""
    lengths = zip(*(tuple(starts.diff().tolist()) for starts in pairs.starts), strict=True)
    groups, order_q, order_k, back = _grouping(tuple(lengths), q.device)
    if not groups:
        return function(q, k, v)  # of no queries
    in_groups = []
    for x, order, of in ((q, order_q, 1), (k, order_k, 2), (v, order_k, 2)):
        x = x[0] if order is None else x[0].index_select(1, order)
        parts = x.split([group[0] * group[of] for group in groups], 1)
        in_groups.append([
            part.unflatten(1, (group[0], group[of])).transpose(0, 1) for part, group in zip(parts, groups, strict=True)
        ])  # fmt: skip
    outputs = []
    for (_, _, _, *rows_and_keys), *x in zip(groups, *in_groups, strict=True):
        mask = None if pairs.attn_mask is None else _mask_of(pairs.attn_mask, *rows_and_keys)
        outputs.append(function(*x, attn_mask=mask).transpose(0, 1).flatten(1, 2))
    out = torch.cat(outputs, 1)[None]
    return out if back is None else out.index_select(2, back)


def _mask_of(mask, rows, columns):
    """The mask (1, H, Tq, Tk) of a group of n sequences, (n, H, length, length); a dimension of 1 stays."""
    rows, columns = (
        at if size > 1 else at.new_zeros(len(at), 1) for at, size in zip((rows, columns), mask.shape[2:], strict=True)
    )
    return mask[0][:, rows[:, :, None], columns[:, None]].transpose(0, 1)


@lru_cache(maxsize=16)
def _grouping(lengths, device):
    """Sequences by their pair of lengths: (groups, the queries and the keys in their order, the order back).

    A group is (how many, length of the queries, of the keys, which queries (n, length), which keys). An order that
    changes nothing is None. Sequences without queries are left out.
    """
    first_q, first_k, members = 0, 0, {}
    for pair in lengths:
        if pair[0]:
            members.setdefault(pair, []).append((first_q, first_k))
        first_q, first_k = first_q + pair[0], first_k + pair[1]
    with torch.inference_mode(False):
        groups = []
        for (length_q, length_k), firsts in members.items():
            rows, columns = (
                torch.tensor(starts)[:, None] + torch.arange(length)
                for starts, length in zip(zip(*firsts, strict=True), (length_q, length_k), strict=True)
            )
            groups.append((len(firsts), length_q, length_k, rows.to(device), columns.to(device)))
        order_q, order_k = (
            torch.cat([torch.empty(0, dtype=torch.long, device=device), *(group[of].flatten() for group in groups)])
            for of in (3, 4)
        )
        back = order_q.argsort()
        plain_q, plain_k = (
            torch.equal(at, torch.arange(T, device=device)) for at, T in ((order_q, first_q), (order_k, first_k))
        )
    return groups, None if plain_q else order_q, None if plain_k else order_k, None if plain_q else back
