"""MLR attention as one operator of PyTorch, whichever path computes it, and window attention for graphs of any length.

What the geometry depends on, the length too, is looked at inside, on tensors that exist: a graph that PyTorch traces
holds one node, for every length. Eager code takes `Direct`, which costs the host 0.3 ms less than an operator, and
under a transform of torch.func `Transformed`; derivatives of derivatives are those of the dense path.

`geometry` is ranks, block_sizes, weighting, causal and the path, which for an operator may be "auto"; then, where
sequences are packed, their starts and a bound on their lengths (see `structured.functional`): these the fused kernel
takes, or the dense path.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from structured import blockwise, dense, kernels, pairs, paths, transforms
from structured.kernels.memory import heads_last, per_row
from structured.pairs import Pairs

GEOMETRY = 7  # arguments behind q, k and v
EVERYTHING = 2**30  # a block in which all positions are


def mlr_attention(q, k, v, ranks, block_sizes, weighting, causal, path, starts=None, longest=None):
    """The output (B, H, T, d) by a path that is not the dense one, or by "auto"."""
    geometry = ranks, block_sizes, weighting, causal, path, starts, longest
    if not torch.compiler.is_compiling():
        if transforms.mapped():
            return Transformed.apply(q, k, v, *geometry)[0]
        if all(type(x) in (Tensor, torch.nn.Parameter) for x in (q, k, v)) and not q.is_meta:
            return Direct.apply(q, k, v, *geometry)
    return mlr_operator(q, k, v, *geometry)[0]


def forward(q, k, v, ranks, block_sizes, weighting, causal, path, starts, longest):
    """(output (B, H, T, d), what the path keeps of every row's softmax (B, H, T or up to 3 more))."""
    levels = tuple(ranks), tuple(block_sizes), weighting, causal
    if not v.numel() or not q.shape[1]:
        return _outputs(q, v, path)
    with dense.without_autocast(q.device):
        if path == "triton":
            return kernels.mlr.forward(q, k, v, *levels, *_packed(starts, longest))
        if path == "dense" or starts is not None:
            return _dense(q, k, v, *levels, starts, longest), _outputs(q, v, path)[1].zero_()
        return blockwise.mlr_attention(q, k, v, *levels)


def backward(q, k, v, out, lse, grad, ranks, block_sizes, weighting, causal, path, starts, longest):
    """Gradients of q, k and v."""
    if not v.numel() or not q.shape[1]:
        return tuple(torch.zeros_like(x) for x in (q, k, v))
    levels = tuple(ranks), tuple(block_sizes), weighting, causal
    with dense.without_autocast(q.device):
        if path == "triton":
            return kernels.mlr.backward(q, k, v, out, lse, grad, *levels, *_packed(starts, longest))
        if path == "dense" or starts is not None:
            return _dense_gradients(q, k, v, grad, *levels, starts, longest)
        return blockwise.mlr_gradients(q, k, v, out, lse[..., : q.shape[2]], grad, *levels)


def _packed(starts, longest):
    """The kernel's last arguments."""
    if starts is None:
        return ()
    return starts.int(), starts.diff().max().item() if longest is None else longest


def _dense(q, k, v, ranks, block_sizes, weighting, causal, starts, longest):
    if starts is not None:
        meet = Pairs(0, None, (starts, starts), longest)
        return pairs.mlr_attention(q, k, v, ranks, block_sizes, meet, weighting=weighting, causal=causal)
    return dense.mlr_attention(q, k, v, ranks, block_sizes, weighting=weighting, causal=causal)


def _dense_gradients(q, k, v, grad, *geometry):
    """Gradients of q, k and v by the dense path, differentiable themselves."""
    return torch.func.vjp(lambda *x: _dense(*x, *geometry), q, k, v)[1](grad)


def _save(ctx, inputs, output):
    q, k, v, *ctx.geometry = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output)


class Direct(torch.autograd.Function):
    """`forward` and `backward` as a function of autograd."""

    @staticmethod
    def forward(ctx, q, k, v, *geometry):
        out, lse = forward(q, k, v, *geometry)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.geometry = geometry
        return out

    @staticmethod
    def backward(ctx, grad):
        function = backward
        if is_legacy_batchedtensor(grad):  # is_grads_batched: the operator runs once for each
            function = mlr_backward_operator
        elif torch.is_grad_enabled() or transforms.mapped():
            function = Gradients.apply
        return *function(*ctx.saved_tensors, grad, *ctx.geometry), *[None] * GEOMETRY


class Transformed(torch.autograd.Function):
    """The same as torch.func wants it."""

    forward = staticmethod(forward)
    setup_context = staticmethod(_save)

    @staticmethod
    def backward(ctx, grad, _):
        return *Gradients.apply(*ctx.saved_tensors, grad, *ctx.geometry), *[None] * GEOMETRY

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return _mapped(Transformed.apply, 3, info, in_dims, arguments)


class Gradients(torch.autograd.Function):
    """`backward` as a function that has derivatives: those of q, k, v and grad, of which out and lse are functions."""

    forward = staticmethod(backward)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, _, _, grad, *ctx.geometry = inputs
        ctx.save_for_backward(q, k, v, grad)

    @staticmethod
    def backward(ctx, *cotangents):
        return *_second(ctx, cotangents), *[None] * GEOMETRY

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return _mapped(Gradients.apply, 6, info, in_dims, arguments)


def _second(ctx, cotangents):
    """Gradients of q, k, v, out, lse and grad, given those of the gradients of q, k and v."""
    *levels, _, starts, longest = ctx.geometry

    def gradients(*x):
        return _dense_gradients(*x, *levels, starts, longest)

    q, k, v, grad = torch.func.vjp(gradients, *ctx.saved_tensors)[1](tuple(cotangents))
    return q, k, v, None, None, grad


def _mapped(function, count, info, in_dims, arguments):
    """A function of `count` tensors with a batch in front, mapped over a dimension: one call with a longer batch."""
    n, tensors, rest = info.batch_size, arguments[:count], arguments[count:]
    if any(isinstance(x, Tensor) for x in rest):  # the starts of sequences that are packed into a batch of 1
        return _one_by_one(function, n, tensors, in_dims, rest)
    folded = [
        (x.expand(n, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)
        for x, dim in zip(tensors, in_dims, strict=False)
    ]
    B = folded[0].shape[0] // n if n else 0
    outputs = function(*folded, *rest)
    outputs = [x.unflatten(0, (n, B)) for x in (outputs if isinstance(outputs, tuple) else [outputs])]
    return (tuple(outputs), (0,) * len(outputs)) if len(outputs) > 1 else (outputs[0], 0)


def _one_by_one(function, n, tensors, in_dims, rest):
    """The same, a call for each."""
    outputs = []
    for i in range(n):
        some = (x if dim is None else x.select(dim, i) for x, dim in zip(tensors, in_dims, strict=False))
        outputs.append(function(*some, *rest))
    if isinstance(outputs[0], tuple):
        return tuple(torch.stack(x) for x in zip(*outputs, strict=True)), (0,) * len(outputs[0])
    return torch.stack(outputs), 0


# Operators, in which the memory of what comes out is as their `register_fake` says


def _outputs(q, v, path):
    """Empty (out, lse): with the heads last in memory where the fused kernel may fill them."""
    shape = *q.shape[:3], v.shape[3]
    if path == "triton" or q.is_cuda:
        return heads_last(*shape, like=v), per_row(q)
    return v.new_empty(shape), q.new_empty(shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


def _gradients(q, k, v, path):
    """Empty gradients."""
    if path == "triton" or q.is_cuda:
        return tuple(heads_last(*x.shape, like=x) for x in (q, k, v))
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _laid_out(tensors, wanted):
    """The tensors, those of other strides than wanted copied, rows that are longer filled up."""
    for x, want in zip(tensors, wanted, strict=True):
        if x.stride() != want.stride():
            want[..., : x.shape[-1]].copy_(x)
    return tuple(x if x.stride() == want.stride() else want for x, want in zip(tensors, wanted, strict=True))


@torch.library.custom_op("structured::mlr_attention", mutates_args=())
def mlr_operator(
    q: Tensor, k: Tensor, v: Tensor,
    ranks: Sequence[int], block_sizes: Sequence[int], weighting: str, causal: bool, path: str,
    starts: Tensor | None = None, longest: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    taken = paths.mlr_backend(q, k, v, block_sizes, backend=path)
    found = forward(q, k, v, ranks, block_sizes, weighting, causal, taken, starts, longest)
    return _laid_out(found, _outputs(q, v, path))


@torch.library.custom_op("structured::mlr_attention_backward", mutates_args=())
def mlr_backward_operator(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad: Tensor,
    ranks: Sequence[int], block_sizes: Sequence[int], weighting: str, causal: bool, path: str,
    starts: Tensor | None = None, longest: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    taken = paths.mlr_backend(q, k, v, block_sizes, backend=path)
    gradients = backward(q, k, v, out, lse, grad, ranks, block_sizes, weighting, causal, taken, starts, longest)
    return _laid_out(gradients, _gradients(q, k, v, path))


@mlr_operator.register_fake
def _(q, k, v, ranks, block_sizes, weighting, causal, path, *packed):
    return _outputs(q, v, path)


@mlr_backward_operator.register_fake
def _(q, k, v, out, lse, grad, ranks, block_sizes, weighting, causal, path, *packed):
    return _gradients(q, k, v, path)


@mlr_operator.register_vmap
def _(info, in_dims, *arguments):
    return _mapped(mlr_operator, 3, info, in_dims, arguments)


@mlr_backward_operator.register_vmap
def _(info, in_dims, *arguments):
    return _mapped(mlr_backward_operator, 6, info, in_dims, arguments)


def _differentiate(ctx, grad, _):
    return *mlr_backward_operator(*ctx.saved_tensors, grad, *ctx.geometry), *[None] * GEOMETRY


mlr_operator.register_autograd(_differentiate, setup_context=_save)
mlr_backward_operator.register_autograd(Gradients.backward, setup_context=Gradients.setup_context)


# Window attention where the length is not known yet: blockwise on every device, as a graph of FlexAttention is one for
# every number of tiles. The backward pass computes the forward pass again.


def _window(q, k, v, window, scale, causal):
    if paths.window_backend(q, k, v) == "dense":
        return dense.attend(q, k, v, dense.visible(q, causal, window), scale=scale)
    return blockwise.window_attention(q, k, v, window, scale=scale, causal=causal)


@torch.library.custom_op("structured::window_attention", mutates_args=())
def window_operator(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, causal: bool) -> Tensor:
    return _window(q, k, v, window, scale, causal).contiguous()


@torch.library.custom_op("structured::window_attention_backward", mutates_args=())
def window_backward_operator(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, window: int, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = torch.func.vjp(lambda *x: _window(*x, window, scale, causal), q, k, v)[1](grad)
    return tuple(x.contiguous() for x in gradients)


@window_operator.register_fake
def _(q, k, v, *options):
    return v.new_empty(*q.shape[:3], v.shape[3])


@window_backward_operator.register_fake
def _(q, k, v, *rest):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


@window_operator.register_vmap
def _(info, in_dims, *arguments):
    return _mapped(window_operator, 3, info, in_dims, arguments)


@window_backward_operator.register_vmap
def _(info, in_dims, *arguments):
    return _mapped(window_backward_operator, 4, info, in_dims, arguments)


def _save_window(ctx, inputs, output):
    q, k, v, *ctx.options = inputs
    ctx.save_for_backward(q, k, v)


def _differentiate_window(ctx, grad):
    return *window_backward_operator(*ctx.saved_tensors, grad, *ctx.options), None, None, None


window_operator.register_autograd(_differentiate_window, setup_context=_save_window)
