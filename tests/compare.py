"""How the tests compare a fast path with its twin: one relative error, the tensor's name in the failure."""

import torch

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


def relative_error(got, want):
    """||got - want|| / ||want|| in float64, ||want|| taken as 0.01 at least: some gradients are 0 in exact arithmetic.

    NaN where anything is not finite, which no tolerance passes.
    """
    got, want = got.detach().double(), want.detach().double()
    return ((got - want).norm() / want.norm().clamp(min=1e-2)).item()


def assert_same(got, want, names, tolerance=1e-12):
    """Tensors equal to a relative tolerance, one by one."""
    for name, g, w in zip(names, got, want, strict=True):
        assert g.shape == w.shape, f"{name}: {tuple(g.shape)} instead of {tuple(w.shape)}"
        error = relative_error(g, w)
        assert error <= tolerance, f"{name}: relative error {error:.2e} above {tolerance:.0e}"


def with_gradients(function, inputs, seed=0):
    """[output, gradient of every input] of function(*inputs) under a fixed random cotangent."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    generator = torch.Generator().manual_seed(seed)
    cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    return [out, *torch.autograd.grad(out, inputs, cotangent)]
