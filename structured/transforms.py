"""What PyTorch does around a call: the transforms of torch.func, forward-mode derivatives, symbolic lengths.

Inside torch.compile the answers are those of the time of tracing. A compiled function that is itself transformed is
not traced, PyTorch runs it as it is, so they stay true.
"""

import torch
import torch.autograd.forward_ad
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.fx.experimental.symbolic_shapes import has_static_value, statically_known_true


def mapped():
    """Whether the call is inside of any transform of torch.func, where tensors may have dimensions that do not show."""
    return _traced_mapped() if torch.compiler.is_compiling() else torch._C._are_functorch_transforms_active()


def is_mapped(x):
    """Whether torch.vmap maps over this tensor."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_batchedtensor(x)


def derivatives():
    """Which derivatives torch.func or forward mode ask for: None, "reverse", "second" (reverse twice) or "forward".

    Those of torch.autograd are asked for later, and not seen here.
    """
    return _traced_derivatives() if torch.compiler.is_compiling() else _derivatives()


def _derivatives():
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward"
    if not torch._C._are_functorch_transforms_active():
        return None
    kinds = [interpreter.key() for interpreter in get_interpreter_stack()]
    if TransformType.Jvp in kinds:
        return "forward"
    return (None, "reverse", "second")[min(2, kinds.count(TransformType.Grad))]


@torch.compiler.assume_constant_result
def _traced_derivatives():
    return _derivatives()


@torch.compiler.assume_constant_result
def _traced_mapped():
    return torch._C._are_functorch_transforms_active()


def is_static(n):
    """Whether a length is known now; while PyTorch traces a graph for any length it is not."""
    return has_static_value(n) if torch.compiler.is_compiling() else True


def below(n, limit):
    """Whether n < limit for certain; no where PyTorch traces a graph for lengths on both sides of the limit."""
    return statically_known_true(n < limit) if torch.compiler.is_compiling() else n < limit
