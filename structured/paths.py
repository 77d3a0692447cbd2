"""Which path computes MLR or window attention: by the inputs ("auto"), or the one asked for, refused if it cannot."""

import torch

from structured import blockwise, kernels, transforms
from structured.errors import BadInput

BACKENDS = {"mlr": ("auto", "triton", "blockwise", "dense"), "window": ("auto", "flex", "blockwise", "dense")}
DENSE_BELOW = 192  # positions: with fewer, dense MLR is faster on the CPU for 8 levels (for 4: with fewer than 96)


def mlr_backend(q, k, v, block_sizes, *, link="softmax", dropout=0, pairs=None, backend="auto"):
    """The path that MLR attention takes; BadInput where `backend` names one that cannot take these inputs.

    "auto" stays where the length is not known yet: then the operator chooses.
    """
    reason = _dense_only(link, dropout, pairs) or _underivable()
    static = transforms.is_static(q.shape[2])
    if backend == "auto" and not static and not reason and not transforms.below(q.shape[2], DENSE_BELOW):
        return "auto"
    if static:
        reason = reason or blockwise.nesting_refusal(q.shape[2], block_sizes)
    refusals = {
        "triton": lambda: reason or kernels.mlr_refusal(*autocast(q, k, v)),
        "blockwise": lambda: reason,
    }
    return _choose("mlr", backend, refusals, q)


def packed_path(q, k, v, block_sizes, pairs, **options):
    """The path that takes packed sequences in one call, "triton" or "auto" (the operator chooses), or None."""
    if pairs.attn_mask is not None or pairs.starts[0] is not pairs.starts[1]:
        return None
    path = mlr_backend(q, k, v, block_sizes, **options)
    return path if path == "triton" or (path == "auto" and q.is_cuda) else None


def window_backend(q, k, v, *, link="softmax", dropout=0, pairs=None, backend="auto"):
    """The path that window attention takes; BadInput where `backend` names one that cannot take these inputs."""
    reason = _dense_only(link, dropout, pairs)
    refusals = {"flex": lambda: reason or _flex_refusal(q, v), "blockwise": lambda: reason}
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
        long = not transforms.below(q.shape[2], DENSE_BELOW)
        worth = [name for name in refusals if (q.is_cuda if name == "triton" else long)]
        return next((name for name in worth if refusals[name]() is None), "dense")
    reason = refusals[backend]() if backend in refusals else None
    if reason:
        raise BadInput(f"backend '{backend}': {reason}; backend 'dense' takes it, 'auto' chooses by itself")
    return backend


def _dense_only(link, dropout, pairs):
    """Why only the dense path can compute this, or None."""
    if pairs is not None:
        inside = "packed sequences inside of torch.compile" if pairs.starts else "this mask or offset"
        return f"{inside} takes the dense path"
    if link != "softmax":
        return f"link '{link}' takes the dense path"
    return f"dropout {dropout} takes the dense path" if dropout else None


def _underivable():
    """Why MLR attention's other paths do not have the derivatives that are asked for, or None."""
    derivatives = transforms.derivatives()
    if derivatives == "forward":
        return "forward-mode derivatives (jvp, jacfwd, hessian, dual tensors) take the dense path"
    if derivatives and torch.compiler.is_compiling():
        return "derivatives by torch.func inside of torch.compile take the dense path"
    return None


def _flex_refusal(q, v):
    """Why FlexAttention cannot run, or None."""
    if q.device.type != "cuda":
        return f"FlexAttention trains on CUDA devices; q is on {q.device.type}"
    if transforms.mapped() or transforms.derivatives():
        return "FlexAttention has no transforms of torch.func and no forward-mode derivatives"
    if q.dtype == torch.float64:
        return "FlexAttention computes in 32 bits or fewer, q is float64"
    if transforms.below(q.shape[0] * q.shape[1] * q.shape[2], 1):
        return "FlexAttention takes at least 1 position"
    widths = q.shape[-1], v.shape[-1]
    return f"FlexAttention takes heads at least 16 wide, not {min(widths)}" if min(widths) < 16 else None


def autocast(q, k, v):
    """q, k and v as PyTorch's own attention takes them under autocast: in one dtype, float64 left as it is."""
    device = q.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v))
