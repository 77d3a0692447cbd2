"""Queries, keys and values of one product: the first two normed head by head, in one pass each way (Triton).

A LayerNorm over the 64 features of a head moves as many bytes as attention itself. Here the forward pass reads queries
and keys once and writes them once; the backward pass reads their gradients and those of the values and writes the
gradient of the product, whole, so that nothing is cut apart or put together elsewhere.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch._C._functorch import is_legacy_batchedtensor

ROWS = 64  # heads of tokens in a tile
FORWARD, BACKWARD = 1024, 256  # programs at most for each of queries, keys and values, on every card: one order of sums


class Layout(NamedTuple):
    """How C of the product (B, T, C) is divided: n_head queries and kv_heads keys of `width`, kv_heads values."""

    n_head: int
    kv_heads: int
    width: int

    @property
    def values_from(self):
        return (self.n_head + self.kv_heads) * self.width


@triton.jit
def _tile(tile, column, heads, n_rows, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """(token, head, mask) of a tile of rows, a row being a token's head."""
    row = tile * ROWS + tl.arange(0, ROWS)[:, None]
    return row // heads, row % heads, (row < n_rows) & (column < WIDTH)


@triton.jit
def _standardise(x, column, eps, WIDTH: tl.constexpr):
    """(x - mean) / sqrt(variance + eps) of every row, and the factor 1 / sqrt(variance + eps)."""
    centred = tl.where(column < WIDTH, x - tl.sum(x, 1, keep_dims=True) / WIDTH, 0.0)
    factor = tl.rsqrt(tl.sum(centred * centred, 1, keep_dims=True) / WIDTH + eps)
    return centred * factor, factor


@triton.jit
def _norm(
    X, Y, WEIGHT, first, heads, stride, tokens, eps, program, programs,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Heads that begin at column `first` of X, normed, to Y (tokens, heads, WIDTH)."""
    column = tl.arange(0, COLUMNS)[None, :]
    weight = tl.load(WEIGHT + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    for tile in range(program, tl.cdiv(tokens * heads, ROWS), programs):
        token, head, inside = _tile(tile, column, heads, tokens * heads, ROWS, WIDTH)
        x = tl.load(X + token.to(tl.int64) * stride + first + head * WIDTH + column, mask=inside, other=0.0)
        y, _ = _standardise(x.to(tl.float32), column, eps, WIDTH)
        to = Y + (token.to(tl.int64) * heads + head) * WIDTH + column
        tl.store(to, (y * weight).to(Y.dtype.element_ty), mask=inside)


@triton.jit
def norm_heads(
    X, Q, K, Q_WEIGHT, K_WEIGHT, stride, tokens, n_head, kv_heads, eps,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    if tl.program_id(1) == 0:
        _norm(X, Q, Q_WEIGHT, 0, n_head, stride, tokens, eps, program, programs, WIDTH, COLUMNS, ROWS)
    else:
        first = n_head * WIDTH
        _norm(X, K, K_WEIGHT, first, kv_heads, stride, tokens, eps, program, programs, WIDTH, COLUMNS, ROWS)


@triton.jit
def _from_heads(G, token, head, column, T, b, h, t):
    """Addresses in G (B, heads, T, features) with strides b, h, t, 1."""
    return G + (token // T).to(tl.int64) * b + head * h + (token % T).to(tl.int64) * t + column


@triton.jit
def _norm_backward(
    X, DY, DX, WEIGHT, DWEIGHT, first, heads, stride, tokens, T, b, h, t, eps, program, programs,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradient of what `_norm` read to DX, that of its weight, as far as this program's rows go, to DWEIGHT."""
    column = tl.arange(0, COLUMNS)[None, :]
    weight = tl.load(WEIGHT + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tile in range(program, tl.cdiv(tokens * heads, ROWS), programs):
        token, head, inside = _tile(tile, column, heads, tokens * heads, ROWS, WIDTH)
        place = token.to(tl.int64) * stride + first + head * WIDTH + column
        x = tl.load(X + place, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(_from_heads(DY, token, head, column, T, b, h, t), mask=inside, other=0.0).to(tl.float32)
        y, factor = _standardise(x, column, eps, WIDTH)
        total += dy * y
        g = dy * weight
        g -= (tl.sum(g, 1, keep_dims=True) + y * tl.sum(g * y, 1, keep_dims=True)) / WIDTH
        tl.store(DX + place, (g * factor).to(DX.dtype.element_ty), mask=inside)
    tl.store(DWEIGHT + tl.arange(0, COLUMNS), tl.sum(total, 0), mask=tl.arange(0, COLUMNS) < WIDTH)


@triton.jit
def _copy_back(
    DV, DX, first, heads, stride, tokens, T, b, h, t, program, programs,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradients of the values to their columns of DX, from `first` on."""
    column = tl.arange(0, COLUMNS)[None, :]
    for tile in range(program, tl.cdiv(tokens * heads, ROWS), programs):
        token, head, inside = _tile(tile, column, heads, tokens * heads, ROWS, WIDTH)
        dv = tl.load(_from_heads(DV, token, head, column, T, b, h, t), mask=inside)
        tl.store(DX + token.to(tl.int64) * stride + first + head * WIDTH + column, dv, mask=inside)


@triton.jit
def norm_heads_backward(
    X, DQ, DK, DV, DX, Q_WEIGHT, K_WEIGHT, DWEIGHTS, stride, tokens, T, n_head, kv_heads, eps,
    qb, qh, qt, kb, kh, kt, vb, vh, vt,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, V_WIDTH: tl.constexpr, V_COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """DWEIGHTS (2, programs, WIDTH): parts of the gradients of the two weights, to be added up."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    if tl.program_id(1) == 0:
        part = DWEIGHTS + program * WIDTH
        _norm_backward(
            X, DQ, DX, Q_WEIGHT, part, 0, n_head, stride, tokens, T, qb, qh, qt, eps, program, programs,
            WIDTH, COLUMNS, ROWS,
        )  # fmt: skip
    elif tl.program_id(1) == 1:
        part = DWEIGHTS + (programs + program) * WIDTH
        _norm_backward(
            X, DK, DX, K_WEIGHT, part, n_head * WIDTH, kv_heads, stride, tokens, T, kb, kh, kt, eps, program, programs,
            WIDTH, COLUMNS, ROWS,
        )  # fmt: skip
    else:
        first = (n_head + kv_heads) * WIDTH
        _copy_back(DV, DX, first, kv_heads, stride, tokens, T, vb, vh, vt, program, programs, V_WIDTH, V_COLUMNS, ROWS)


def _programs(tokens, layout, most):
    return min(most, -(-tokens * max(layout.n_head, layout.kv_heads) // ROWS))


def forward(
    qkv: torch.Tensor, query_weight: torch.Tensor, key_weight: torch.Tensor, layout: Sequence[int], eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normed queries (B, n_head, T, width) and keys (B, kv_heads, T, width) of the product, heads last in memory."""
    layout, (B, T, _) = Layout(*layout), qkv.shape
    qkv, query_weight, key_weight = (x.contiguous() for x in (qkv, query_weight, key_weight))
    q, k = (qkv.new_empty(B, T, n, layout.width) for n in layout[:2])
    if qkv.numel():
        norm_heads[(_programs(B * T, layout, FORWARD), 2)](
            qkv, q, k, query_weight, key_weight, qkv.stride(1), B * T, *layout[:2], eps,
            WIDTH=layout.width, COLUMNS=triton.next_power_of_2(layout.width), ROWS=ROWS,
        )  # fmt: skip
    return q.transpose(1, 2), k.transpose(1, 2)


def backward(
    qkv: torch.Tensor, query_weight: torch.Tensor, key_weight: torch.Tensor,
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, layout: Sequence[int], eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of the product (B, T, C), and of the two weights in parts (2, programs, width) to be added up."""
    layout, (B, T, _) = Layout(*layout), qkv.shape
    qkv, query_weight, key_weight = (x.contiguous() for x in (qkv, query_weight, key_weight))
    dqkv, parts = torch.empty_like(qkv), _parts(qkv, layout)
    if not qkv.numel():
        return dqkv, parts
    dq, dk, dv = (g if g.stride(3) == 1 else g.contiguous() for g in (dq, dk, dv))
    strides = [stride for g in (dq, dk, dv) for stride in g.stride()[:3]]
    norm_heads_backward[(parts.shape[1], 3)](
        qkv, dq, dk, dv, dqkv, query_weight, key_weight, parts, qkv.stride(1), B * T, T, *layout[:2], eps, *strides,
        WIDTH=layout.width, COLUMNS=triton.next_power_of_2(layout.width),
        V_WIDTH=dv.shape[3], V_COLUMNS=triton.next_power_of_2(dv.shape[3]), ROWS=ROWS,
    )  # fmt: skip
    return dqkv, parts


def _parts(qkv, layout):
    return qkv.new_empty(2, _programs(qkv[..., 0].numel(), layout, BACKWARD), layout.width, dtype=torch.float32)


forward_operator = torch.library.custom_op("structured::norm_heads", forward, mutates_args=())
backward_operator = torch.library.custom_op("structured::norm_heads_backward", backward, mutates_args=())


@forward_operator.register_fake
def _(qkv, query_weight, key_weight, layout, eps):
    (B, T, _), (n_head, kv_heads, width) = qkv.shape, layout
    return tuple(qkv.new_empty(B, T, n, width).transpose(1, 2) for n in (n_head, kv_heads))


@backward_operator.register_fake
def _(qkv, query_weight, key_weight, dq, dk, dv, layout, eps):
    return qkv.new_empty(qkv.shape), _parts(qkv, Layout(*layout))


def definition(qkv, query_weight, key_weight, layout, eps):
    """The same by PyTorch: cut apart, then two LayerNorms."""
    n_head, kv_heads, width = layout
    q, k, v = qkv.split([n_head * width, kv_heads * width, qkv.shape[-1] - layout.values_from], -1)
    q, k, v = (x.unflatten(-1, (n, -1)).transpose(1, 2) for x, n in ((q, n_head), (k, kv_heads), (v, kv_heads)))
    return F.layer_norm(q, (width,), query_weight, eps=eps), F.layer_norm(k, (width,), key_weight, eps=eps), v


class NormedHeads(torch.autograd.Function):
    """Queries, keys and values, (B, heads, T, features) each, of the product; values are a view of it."""

    @staticmethod
    def forward(ctx, qkv, query_weight, key_weight, layout, eps):
        run = forward_operator if torch.compiler.is_compiling() else forward
        ctx.save_for_backward(qkv, query_weight, key_weight)
        ctx.layout, ctx.eps = layout, eps
        q, k = run(qkv, query_weight, key_weight, list(layout), eps)
        return q, k, qkv[..., layout.values_from :].unflatten(-1, (layout.kv_heads, -1)).transpose(1, 2)

    @staticmethod
    def backward(ctx, dq, dk, dv):
        saved, layout = ctx.saved_tensors, ctx.layout
        compiling = torch.compiler.is_compiling()
        if not compiling and torch.is_grad_enabled():  # the gradients are to have derivatives
            _, pull = torch.func.vjp(lambda *x: definition(*x, layout, ctx.eps), *saved)
            return *pull((dq, dk, dv)), None, None
        batched = not compiling and any(is_legacy_batchedtensor(g) for g in (dq, dk, dv))
        run = backward_operator if compiling or batched else backward
        dqkv, parts = run(*saved, dq, dk, dv, list(layout), ctx.eps)
        dquery, dkey = parts.sum(1)
        return dqkv, dquery.to(saved[1].dtype), dkey.to(saved[2].dtype), None, None
