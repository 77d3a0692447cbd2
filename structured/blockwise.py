"""Softmax attention in pieces, without a T x T tensor: MLR attention and sliding windows on any device (DESIGN 3).

Shapes are those of `structured.functional`. For MLR attention with nested blocks the keys that share exactly m levels
with a query fill whole blocks, so the scores fall into rectangles ("the right half of a block attends to its left
half") whose features are a prefix of the head's. All rectangles of a level are one batched call; what the calls give
is merged by log-sum-exp. The finest levels are computed densely inside leaves of about LEAF positions.
Window attention takes its queries in chunks, which see a chunk and a window of keys.
"""

import math
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F

from structured import dense, transforms
from structured.dense import in_window, one_per_head
from structured.errors import BadInput

LEAF = 32  # positions of a leaf, about
FUSED = ("cpu",)  # devices whose fused attention gives the log-sum-exp, by `aten`'s operators for the CPU
TILE, GPU_TILE = 2**19, 2**25  # scores held at once: on the CPU they should stay in the cache
CHUNK = 64  # least number of queries in a chunk of window attention


def nesting_refusal(T, block_sizes):
    """Why these blocks do not nest in a sequence of T, or None. Blocks of T and more all count as one block."""
    clipped = [min(b, T) for b in block_sizes]
    if clipped != sorted(clipped, reverse=True):
        return f"takes block sizes from coarse to fine, not {tuple(block_sizes)}"
    inner = [b for b in clipped if b < T]
    for coarse, fine in pairwise(inner):
        if coarse % fine:
            return f"takes nested blocks; {coarse} is not a multiple of {fine}"
    return None


def mlr_attention(q, k, v, ranks, block_sizes, weighting, causal):
    """MLR attention with nested blocks: output (B, H, T, d) and each row's log-sum-exp (B, H, T).

    Memory is linear in T, backward too: kept are q, k, v, the output and each row's log-sum-exp, as in FlashAttention.
    Half precision is computed in float32.
    """
    plan = plan_parts(q.shape[2], ranks, block_sizes, weighting, causal, LEAF)
    out, lse = parts_forward(*_by_key_head(q * _inverse(q, ranks), k, v), plan)
    return out.view(*q.shape[:3], -1).to(v.dtype), lse.view(q.shape[:3])


def mlr_gradients(q, k, v, out, lse, grad, ranks, block_sizes, weighting, causal):
    """Gradients of q, k and v, given that of the output."""
    plan = plan_parts(q.shape[2], ranks, block_sizes, weighting, causal, LEAF)
    inverse, G = _inverse(q, ranks), k.shape[1]
    folded = _by_key_head(q * inverse, k, v)
    out, grad = (_grouped(x, G) for x in (out, grad))
    dq, dk, dv = parts_backward(grad, *folded, out, _grouped(lse.unsqueeze(-1), G), plan)
    return (dq.view(q.shape) * inverse).to(q.dtype), dk.view(k.shape).to(k.dtype), dv.view(v.shape).to(v.dtype)


@lru_cache(maxsize=64)
def _inverse_ranks(ranks, dtype, device):
    with torch.inference_mode(False):
        return torch.tensor([1 / r for r in ranks for _ in range(r)], dtype=dtype, device=device)


def _inverse(q, ranks):
    """1 / r_l for the features of level l, at least in float32."""
    return _inverse_ranks(ranks, torch.promote_types(q.dtype, torch.float32), q.device)


def _by_key_head(q, k, v):
    """q (B G, H / G, T, r), k and v (B G, 1, T, .), in float32 at least."""
    G = k.shape[1]
    return tuple(_grouped(x, G) for x in (q, k, v))


def _grouped(x, G):
    """(B, G n, T, w) -> (B G, n, T, w) in float32 at least, the features side by side in memory."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return features_together(x.reshape(x.shape[0] * G, x.shape[1] // G, *x.shape[2:]))


def features_together(x):
    """x, copied if its last dimension is spread in memory, which the operators of PyTorch below take for granted."""
    return x if x.stride(-1) == 1 else x.contiguous()


def window_attention(q, k, v, window, *, scale, causal=True):
    """Sliding-window attention without dropout in time and memory T x window: see `structured.functional`.

    All chunks of queries that see a whole window of keys are one batched call and share one mask; those near the ends
    of the sequence are calls of their own.
    """
    T, chunk = q.shape[2], max(CHUNK, window // 2)
    if window >= T - 1 or not q.numel() or not v.numel():
        return fused(q, k, v, causal=causal, scale=scale)
    after = 0 if causal else window
    first, last = -(-window // chunk), (T - after) // chunk  # chunks that see whole windows
    if first >= last:
        first = last = 0
    parts = [_window_chunk(q, k, v, c, chunk, window, after, scale) for c in range(first)]
    if first < last:
        parts.append(_window_chunks(q, k, v, first, last, chunk, window, after, scale))
    parts += [_window_chunk(q, k, v, c, chunk, window, after, scale) for c in range(last, -(-T // chunk))]
    return torch.cat(parts, 2)


def _window_chunk(q, k, v, c, chunk, window, after, scale):
    """The outputs of chunk number c: (B, H, chunk or less, d)."""
    rows = slice(c * chunk, min((c + 1) * chunk, q.shape[2]))
    keys = slice(max(0, rows.start - window), rows.stop + after)
    q, k, v = q[:, :, rows], k[:, :, keys], v[:, :, keys]
    back = _distances(q.shape[2], k.shape[2], rows.start - keys.start, q.device)
    return fused(q, k, v, mask=in_window(back, window, after), scale=scale)


def _window_chunks(q, k, v, first, last, chunk, window, after, scale):
    """The outputs of chunks number first to last - 1, each of which sees `chunk + window + after` keys."""
    B, H, _, G = *q.shape[:3], k.shape[1]
    q = q[:, :, first * chunk : last * chunk].reshape(B * G, H // G, last - first, chunk, -1)
    q = q.transpose(1, 2).flatten(2, 3)  # (B G, chunks, H / G chunk, r): the query heads of a group share the keys
    span = slice(first * chunk - window, last * chunk + after)
    k, v = (
        x[:, :, span].flatten(0, 1).unfold(1, chunk + window + after, chunk).mT for x in (k, v)
    )  # (B G, chunks, keys, .), views that overlap
    mask = in_window(_distances(chunk, k.shape[2], window, q.device), window, after).repeat(H // G, 1)
    out = fused(q, k, v, mask=mask, scale=scale).unflatten(2, (H // G, chunk))
    return out.transpose(1, 2).reshape(B, H, (last - first) * chunk, -1)


def _distances(rows, keys, shift, device):
    """How far key j lies before query i, where query 0 is at key `shift`: (rows, keys)."""
    return torch.arange(shift, shift + rows, device=device)[:, None] - torch.arange(keys, device=device)


def fused(q, k, v, *, scale, mask=None, causal=False, dropout=0):
    """PyTorch's attention in its fused form: where that takes q, k and v of one width only, zeros are put behind.

    Dense where derivatives are asked for that the fused form does not have, or may not have on the CPU.
    """
    derivatives, d = transforms.derivatives(), v.shape[-1]
    if derivatives and (derivatives != "reverse" or q.device.type in FUSED):
        seen = dense.visible(q, causal) if mask is None else mask
        return dense.attend(q, k, v, seen, scale=scale, dropout=dropout)
    if one_width(q) and q.is_cuda and not q.stride(1):  # one head for all: cuDNN would lay its output out the same way
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
    if one_width(q):
        q, k, v = (_widened(x, max(q.shape[-1], d)) for x in (q, k, v))
    if _needs_second_derivatives(q, k, v) and q.device.type in FUSED and not dropout:
        inputs = (features_together(x) for x in (q, *one_per_head(q, k, v)))
        return Flash.apply(*inputs, mask, causal, scale)[..., :d]
    grouped = True if q.shape[1] != k.shape[1] else False  # noqa: SIM210 - no symbol, where heads have one
    options = dict(is_causal=causal, scale=scale, dropout_p=dropout, enable_gqa=grouped)
    out = F.scaled_dot_product_attention(q, k, v, mask, **options)
    if _needs_second_derivatives(q, k, v):
        _only_once(out.grad_fn)
    return out[..., :d]


def _needs_second_derivatives(q, k, v):
    """Whether torch.autograd may ask for derivatives of these gradients."""
    if torch.compiler.is_compiling() or transforms.mapped() or not torch.is_grad_enabled():
        return False
    return (q.requires_grad or k.requires_grad or v.requires_grad) and q.numel() > 0 < v.numel()


class Flash(torch.autograd.Function):
    """PyTorch's fused attention on the CPU by the operators behind its public entry: so gradients have derivatives.

    What that entry checks is true here: one width, as many key heads as query heads, features side by side in memory.
    """

    @staticmethod
    def forward(ctx, q, k, v, mask, causal, scale):
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -math.inf)
        options = dict(is_causal=causal, attn_mask=mask, scale=scale)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, **options)
        ctx.save_for_backward(q, k, v, out, lse, mask)
        ctx.options = causal, scale
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse, mask = ctx.saved_tensors
        causal, scale = ctx.options
        if torch.is_grad_enabled():
            seen = dense.visible(q, causal) if mask is None else mask
            gradients = torch.func.vjp(lambda *x: dense.attend(*x, seen, scale=scale), q, k, v)[1](grad)
        else:
            gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                features_together(grad), q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale
            )
        return *gradients, None, None, None


def _only_once(node):
    """Refuse derivatives of the gradients that a node of PyTorch's fused attention gives; it has none."""
    if node is not None and node.name().startswith("ScaledDotProduct"):
        node.register_hook(_refuse_derivatives)


def _refuse_derivatives(gradients, _):
    """A hook: where a graph of the gradients is asked for (create_graph), one that says why it ends here."""
    return _NoDerivatives.apply(*gradients) if torch.is_grad_enabled() else None


class _NoDerivatives(torch.autograd.Function):
    """Gradients as they are, without derivatives."""

    @staticmethod
    def forward(ctx, *gradients):
        return tuple(None if g is None else g.view_as(g) for g in gradients)

    @staticmethod
    def backward(ctx, *_):
        raise BadInput(
            "PyTorch's fused attention has no second derivatives; take them by torch.func, or under "
            "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
        )


def one_width(q):
    """Whether PyTorch's fused attention wants q, k and v of one width.

    So it is on the CPU, and on CUDA in 16 bits: there cuDNN takes other widths, but not with every layout.
    """
    return q.device.type == "cpu" or q.element_size() == 2


class Part(NamedTuple):
    """In each of `count` blocks of `block` positions from `start` on, some rows attend to some keys of the block.

    rows, keys: (first, end) in the block. width: how many features meet. scale: the constant c of these pairs.
    kind: "all" (every row sees every key), "causal", or "leaf" (with the plan's finer levels inside).
    """

    start: int
    block: int
    count: int
    rows: tuple[int, int]
    keys: tuple[int, int]
    width: int
    scale: float
    kind: str


class Finer(NamedTuple):
    """A level inside a leaf: its block size, its features (first, end), and the constant c of pairs that share it."""

    block: int
    first: int
    end: int
    scale: float


class Plan(NamedTuple):
    """How MLR attention falls into parts, which hold every visible pair once."""

    parts: tuple[Part, ...]
    finer: tuple[Finer, ...]
    causal: bool


@lru_cache(maxsize=256)
def plan_parts(T, ranks, block_sizes, weighting, causal, leaf):
    """The plan for T positions and nested blocks; `leaf` is the size of a leaf to aim at."""
    shared = {T: (0, 0)}  # block size: (features, levels) that two positions of one such block share
    for m, b in enumerate(block_sizes, 1):
        shared[min(b, T)] = (sum(ranks[:m]), m)
    sizes = sorted(shared, reverse=True)

    def level(b):
        """(width, scale) of pairs that meet in blocks of b positions and in none of a finer level."""
        width, m = shared[min(size for size in sizes if size >= min(b, T))]
        return width, {"none": 1.0, "levels": 1 / len(ranks), "shared": 1 / max(1, m)}[weighting]

    own = _own_size(sizes, leaf)
    kind = "leaf" if own <= leaf or own > sizes[-1] else "causal" if causal else "all"
    parts = [Part(*place, (0, place[1]), (0, place[1]), *level(own), kind) for place in _blocks(T, own)]
    child = own
    for parent in _parents(own, sizes):
        for place in _blocks(T, parent):
            parts += [Part(*place, *spans, *level(parent), "all") for spans in _rectangles(place[1], child, causal)]
        child = parent
    finer, first = [], level(own)[0]
    for b in sizes:
        if b < own:
            width, scale = level(b)
            finer.append(Finer(b, first, width, scale))
            first = width
    return Plan(tuple(parts), tuple(finer), causal)


def _own_size(sizes, leaf):
    """Size of the blocks whose positions attend to each other in one part: a leaf, or the finest block if larger.

    sizes: the block sizes that occur, T first. A leaf holds blocks of finer levels whole, and coarser ones hold it so.
    """
    small = [b for b in sizes if b <= leaf]
    if not small or small[0] == sizes[0]:
        return sizes[0] if small else sizes[-1]
    b, coarser = small[0], sizes[sizes.index(small[0]) - 1]
    if coarser == sizes[0]:
        return min(coarser, b * 2 ** int(math.log2(leaf // b)))
    multiples = [b * n for n in range(1, min(coarser, 4 * leaf) // b + 1) if coarser % (b * n) == 0]
    return min(multiples, key=lambda size: abs(math.log(size / leaf)))


def _parents(size, sizes):
    """Block sizes above `size` up to T = sizes[0], each a small multiple of the one before, through all of `sizes`."""
    for b in reversed(sizes[1:]):
        while b > size:
            ratio = b // size
            size *= next(n for n in range(2, ratio + 1) if ratio % n == 0)
            yield size
    while size < sizes[0]:
        size *= 2
        yield size


def _blocks(T, b):
    """(start, block, count) of the whole blocks of b positions, and of the shorter one at the end."""
    whole = T // b
    return [place for place in ((0, b, whole), (whole * b, T - whole * b, 1)) if place[1] and place[2]]


def _rectangles(length, child, causal):
    """(rows, keys) inside a block of `length`: every child attends to those before it, and after it if not causal."""
    for first in range(0, length, child):
        end = min(first + child, length)
        if first:
            yield (first, end), (0, first)
        if not causal and end < length:
            yield (first, end), (end, length)


def parts_forward(q, k, v, plan):
    """Softmax over all parts: q (N, S, T, r), k and v (N, 1, T, .) -> out (N, S, T, d), log-sum-exp (N, S, T, 1).

    N are the key/value heads of all sequences, S the query heads of each; q is already divided by the ranks.
    """
    out = v.new_zeros(*q.shape[:3], v.shape[-1])
    lse = v.new_full((*q.shape[:3], 1), -math.inf)
    for part in plan.parts:
        of_part = _take(q, part, part.rows), *(_take(x, part, part.keys) for x in (k, v))
        _merge(_look(out, part, part.rows), _look(lse, part, part.rows), *_part_forward(*of_part, part, plan))
    return out, lse


def parts_backward(grad, q, k, v, out, lse, plan):
    """Gradients of q, k and v of `parts_forward`; the weights of every part are computed again, from `lse`."""
    totals = [torch.zeros_like(x) for x in (q, k, v)]
    for part in plan.parts:
        of_rows = [_take(x, part, part.rows) for x in (q, out, lse, grad)]
        of_keys = [_take(x, part, part.keys) for x in (k, v)]
        part_grads = _part_backward(*of_rows, *of_keys, part, plan)
        for total, part_grad, span in zip(totals, part_grads, (part.rows, part.keys, part.keys), strict=True):
            view = _look(total[..., : part_grad.shape[-1]], part, span)
            view += part_grad.unflatten(0, view.shape[:2])
    return tuple(totals)


def _look(x, part, span):
    """A view of the positions of `span` in every block of the part: (N, S, T, w) -> (N, count, S, n, w)."""
    blocks = x[:, :, part.start : part.start + part.block * part.count].unflatten(2, (part.count, part.block))
    return blocks[:, :, :, span[0] : span[1]].transpose(1, 2)


def _take(x, part, span):
    """The same with the blocks as one batch: (N count, S, n, w)."""
    return _look(x, part, span).flatten(0, 1)


def _merge(out, lse, part_out, part_lse):
    """Softmax over the keys so far and those of one more part, in place: `out` and `lse` are views."""
    part_out, part_lse = (x.unflatten(0, lse.shape[:2]) for x in (part_out, part_lse))
    out.lerp_(part_out, (part_lse - lse).sigmoid())
    lse.copy_(torch.logaddexp(lse, part_lse))


def _part_forward(q, k, v, part, plan):
    """Softmax over the keys of one part: q (M, S, n, r), k and v (M, 1, j, .) -> out (M, S, n, d), lse (M, S, n, 1)."""
    if _is_fused(q, part):
        d = v.shape[-1]
        q, k, v = _equal_widths(q[..., : part.width], k, v)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, is_causal=part.kind == "causal", scale=part.scale
        )
        return out[..., :d], lse.unsqueeze(-1)
    rows, v = q.shape[1] * q.shape[2], v.squeeze(1)
    out, lse = v.new_empty(len(v), rows, v.shape[-1]), v.new_empty(len(v), rows, 1)
    for tile, scores, _ in _tiles(_operands(q, part, plan), _operands(k, part, plan), q.shape[2], part, plan):
        top = scores.amax(-1, keepdim=True)
        weights = scores.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        torch.bmm(weights.div_(total), v[tile[0]], out=out[tile])
        lse[tile] = total.log_().add_(top)
    return out.view(*q.shape[:3], -1), lse.view(*q.shape[:3], 1)


def _part_backward(q, out, lse, grad, k, v, part, plan):
    """Gradients of one part's q, k, v, given the output and log-sum-exp over ALL keys of its rows."""
    if _is_fused(q, part):
        width, d = part.width, v.shape[-1]
        q, k, v = _equal_widths(q[..., :width], k, v)
        out, grad = (features_together(_widened(x, v.shape[-1])) for x in (out, grad))
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse.squeeze(-1), 0.0, part.kind == "causal", scale=part.scale
        )
        return dq[..., :width], *(_over_heads(x) for x in (dk[..., :width], dv[..., :d]))
    queries, keys, v = _operands(q, part, plan), _operands(k, part, plan), v.squeeze(1)
    delta = (out * grad).sum(-1, keepdim=True).flatten(1, 2)
    lse, grad = lse.flatten(1, 2), grad.flatten(1, 2)
    dq, dk, dv = [torch.empty_like(x) for x in queries], [torch.zeros_like(x) for x in keys], torch.zeros_like(v)
    for tile, scores, scale in _tiles(queries, keys, q.shape[2], part, plan):
        m = tile[0]
        weights = scores.sub_(lse[tile]).exp_()
        dv[m].baddbmm_(weights.mT, grad[tile])
        d_scores = (grad[tile] @ v[m].mT).sub_(delta[tile]).mul_(weights).mul_(scale)
        for x, y, dx, dy in zip(queries, keys, dq, dk, strict=True):
            torch.bmm(d_scores, y[m], out=dx[tile])
            dy[m].baddbmm_(d_scores.mT, x[tile])
    return *(_operands_backward(dx, x.shape, plan) for dx, x in ((dq, q), (dk, k))), dv.unsqueeze(1)


def _is_fused(q, part):
    return part.kind != "leaf" and q.device.type in FUSED


def _equal_widths(q, k, v):
    """q, k and v padded with zeros to the widest, as fused attention on the CPU asks; one key head for all S of q."""
    q, k, v = (features_together(_widened(x, max(k.shape[-1], v.shape[-1]))) for x in (q, k, v))
    return q, *(x.expand(-1, q.shape[1], -1, -1) for x in (k, v))


def _widened(x, width):
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def _over_heads(grad):
    """Sum over the query heads of a key head: (M, S, j, w) -> (M, 1, j, w)."""
    return grad if grad.shape[1] == 1 else grad.sum(1, keepdim=True)


def _tiles(queries, keys, n, part, plan):
    """A part's scores, some at a time: (batches, rows) of these scores, the scores, and their constants c.

    queries, keys: operands of the product, see `_operands`. n: positions of the rows, which S query heads share.
    """
    (M, rows, _), j, device = queries[0].shape, keys[0].shape[1], queries[0].device
    limit = TILE if device.type == "cpu" else GPU_TILE
    batch = min(M, max(1, limit // (rows * j)))
    strip = min(rows, max(1, limit // (batch * j)))
    for first in range(0, rows, strip):
        at = slice(first, min(first + strip, rows))
        i, key = torch.arange(at.start, at.stop, device=device)[:, None] % n, torch.arange(j, device=device)
        hidden = i < key if plan.causal and part.kind != "all" else None
        scale = _constants(i, key, part, plan, queries[0])
        for m in range(0, M, batch):
            tile = slice(m, min(m + batch, M)), at
            scores = queries[0][tile] @ keys[0][tile[0]].mT
            for x, y in zip(queries[1:], keys[1:], strict=True):
                scores.baddbmm_(x[tile], y[tile[0]].mT)
            scores *= scale
            yield tile, scores if hidden is None else scores.masked_fill_(hidden, -math.inf), scale


def _constants(i, j, part, plan, like):
    """c of the pairs of positions i and j in a part: one number, or a tensor where a leaf's levels differ."""
    if part.kind != "leaf" or all(level.scale == part.scale for level in plan.finer):
        return part.scale
    scale = like.new_full((), part.scale)
    for level in plan.finer:
        scale = torch.where(i // level.block == j // level.block, level.scale, scale)
    return scale.to(like.dtype)


def _operands(x, part, plan):
    """Features whose inner products, added up, are the scores of a part: (M, S, n, r) -> one or two (M, S n, w).

    In a leaf the second operand holds the finer levels' features, once for every block of the level and zero where a
    position is not in the block, so that positions of different blocks are orthogonal.
    """
    coarse = x[..., : part.width].flatten(1, 2)
    if part.kind != "leaf" or not plan.finer:
        return [coarse]
    copies = [x[..., level.first : level.end].unsqueeze(-2) * _blocks_of(x.shape[2], level, x) for level in plan.finer]
    return [coarse, torch.cat([c.flatten(-2) for c in copies], -1).flatten(1, 2)]


def _operands_backward(grads, shape, plan):
    """The gradient of the features that `_operands` uses: back to (M, S, n, at most r)."""
    coarse, *rest = (g.view(*shape[:3], -1) for g in grads)
    if not rest:
        return coarse
    levels, at = [coarse], 0
    for level in plan.finer:
        blocks, features = _blocks_of(shape[2], level, coarse), level.end - level.first
        copies = rest[0][..., at : at + blocks.shape[1] * features]
        levels.append((copies.unflatten(-1, (blocks.shape[1], features)) * blocks).sum(-2))
        at += copies.shape[-1]
    return torch.cat(levels, -1)


def _blocks_of(n, level, like):
    """1 where a position of a leaf is in a block: (n, number of blocks, 1)."""
    block = torch.arange(n, device=like.device) // level.block
    return F.one_hot(block, -(-n // level.block)).unsqueeze(-1).to(like.dtype)
