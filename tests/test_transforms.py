"""Every derivative that PyTorch can ask for, on both sides of the length at which paths change: right, or refused."""

import functools

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from compare import relative_error
from torch.utils._pytree import tree_leaves

from model import GPT, ModelConfig
from structured import (
    BadInput,
    ScoringConfig,
    attention,
    gswa_attention,
    kernels,
    mlr_attention,
    reference,
    window_attention,
)
from structured.paths import DENSE_BELOW

LEVELS = ((4, 2, 2), (256, 128, 32))
FUNCTIONS = {  # ours, the definition
    "standard": (functools.partial(attention, scale=0.3), functools.partial(reference.attention, scale=0.3)),
    "window": (
        lambda *x, **kw: window_attention(*x, 20, scale=0.3, **kw),
        lambda *x: reference.window_attention(*x, 20, scale=0.3),
    ),
    "gswa": (
        lambda *x, **kw: gswa_attention(*x, (4, 4), 20, **kw),
        lambda *x: reference.gswa_attention(*x, (4, 4), 20),
    ),
    "mlr": (
        lambda *x, **kw: mlr_attention(*x, *LEVELS, weighting="shared", **kw),
        lambda *x: reference.mlr_attention(*x, *LEVELS, weighting="shared"),
    ),
    "mlr, blocks that do not nest": (
        lambda *x, **kw: mlr_attention(*x, (4, 2, 2), (256, 100, 30), **kw),
        lambda *x: reference.mlr_attention(*x, (4, 2, 2), (256, 100, 30)),
    ),
}
LENGTHS = (40, DENSE_BELOW - 1, DENSE_BELOW)


def number(f):
    return lambda *x: f(*x).sin().sum()


def along(f, x):
    """f as a function of two numbers, times q and k."""
    return lambda s: number(f)(x[0] * s[0], x[1] * s[1], x[2])


def ones(x):
    return torch.ones(2, dtype=x[0].dtype, device=x[0].device)


def leaves(x):
    return [y.detach().clone().requires_grad_() for y in x]


def twice(f, x):
    """Gradients of a function of the gradients."""
    x = leaves(x)
    first = torch.autograd.grad(number(f)(*x), x, create_graph=True)
    return torch.autograd.grad(sum(g.sin().sum() for g in first), x)


def around(f, x):
    """torch.autograd outside of torch.func."""
    x = leaves(x)
    first = torch.func.grad(number(f), argnums=(0, 1, 2))(*x)
    return torch.autograd.grad(sum(g.sin().sum() for g in first), x)


def dual(f, x):
    with fwAD.dual_level():
        return fwAD.unpack_dual(f(*(fwAD.make_dual(y, y.cos()) for y in x))).tangent


def batched_gradients(f, x):
    x = leaves(x)
    out = f(*x)
    cotangents = torch.stack([out.detach().cos(), out.detach().sin()])
    return torch.autograd.grad(out, x, cotangents, is_grads_batched=True)


def pair(x):
    return torch.stack([x, x.flip(2)])


def per_sample(f, x):
    alone = number(lambda *y: f(*(z[None] for z in y)))
    return torch.func.vmap(torch.func.grad(alone, argnums=(0, 1, 2)))(*x)


def of_keys_alone(f, x):
    """Mapped over a dimension that is not the first, and out into another."""
    return torch.func.vmap(f, (None, 2, None), 1)(x[0], pair(x[1]).movedim(0, 2), x[2])


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(number(f), argnums=(0, 1, 2))(*x),
    "vmap": lambda f, x: torch.func.vmap(f)(*(pair(y) for y in x)),
    "vmap of the keys alone": of_keys_alone,
    "vmap of vmap": lambda f, x: torch.func.vmap(torch.func.vmap(f))(*(torch.stack([pair(y), -pair(y)]) for y in x)),
    "vmap(grad)": per_sample,
    "jacrev": lambda f, x: torch.func.jacrev(lambda q: f(q, *x[1:])[:, 0, -2:, 0])(x[0]),
    "is_grads_batched": batched_gradients,
    "jvp": lambda f, x: torch.func.jvp(f, tuple(x), tuple(y.cos() for y in x))[1],
    "dual": dual,
    "jacfwd": lambda f, x: torch.func.jacfwd(along(f, x))(ones(x)),
    "create_graph": twice,
    "autograd of func.grad": around,
    "grad of grad": lambda f, x: torch.func.grad(lambda q: number(torch.func.grad(number(f)))(q, *x[1:]))(x[0]),
    "hessian": lambda f, x: torch.func.hessian(along(f, x))(ones(x)),
    "jacrev of jacrev": lambda f, x: torch.func.jacrev(torch.func.jacrev(along(f, x)))(ones(x)),
    "autograd's hessian": lambda f, x: torch.autograd.functional.hessian(along(f, x), ones(x)),
}
FORWARD = ("jvp", "dual", "jacfwd", "hessian")


def qkv(T, d=8, dtype=torch.float64, device="cpu"):
    g = torch.Generator().manual_seed(T)
    shapes = (2, 2, T, 8), (2, 1, T, 8), (2, 1, T, d)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(device, dtype) for s in shapes]


def check(transform, ours, definition, x, tolerance):
    got = TRANSFORMS[transform](ours, x)
    want = TRANSFORMS[transform](definition, [y.cpu().double() for y in x])
    for g, w in zip(tree_leaves(got), tree_leaves(want), strict=True):
        assert g.shape == w.shape
        assert relative_error(g.cpu(), w) < tolerance


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_right_on_both_sides(transform, name):
    for T in LENGTHS:
        check(transform, *FUNCTIONS[name], qkv(T, 8 if T == 40 else 5), 1e-9)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", ["window", "gswa", "mlr"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_path_asked_for_is_right_or_refused(transform, name):
    ours, definition = FUNCTIONS[name]
    for backend in ("blockwise", "dense"):
        attend = functools.partial(ours, backend=backend)
        if name == "mlr" and backend == "blockwise" and transform in FORWARD:
            with pytest.raises(BadInput, match=r"forward-mode derivatives \(jvp, jacfwd, .*; backend 'dense' takes it"):
                TRANSFORMS[transform](attend, qkv(40))
        else:
            check(transform, attend, definition, qkv(40, 5), 1e-9)


@pytest.mark.skipif(kernels.mlr is None, reason="Triton is not installed: make interpreter")
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_fused_kernels(transform, monkeypatch):
    """Compiled where there is a GPU; what they cannot is refused for "triton" and right for "auto"."""
    cuda = torch.cuda.is_available()
    if not cuda:
        small = kernels.mlr.Launch(16, 16, 4, 1, None)
        names = ("forward", "backward_q", "backward_kv")
        monkeypatch.setattr(kernels.mlr, "launches", lambda *_: dict.fromkeys(names, small))
    ours, definition = FUNCTIONS["mlr"]
    x = qkv(21, 5, torch.float32, "cuda" if cuda else "cpu")
    if transform in FORWARD:
        with pytest.raises(BadInput, match="forward-mode derivatives"):
            TRANSFORMS[transform](functools.partial(ours, backend="triton"), x)
    else:
        check(transform, functools.partial(ours, backend="triton"), definition, x, 1e-4)
    if cuda:
        check(transform, ours, definition, x, 1e-4)


def test_second_derivatives_that_pytorch_does_not_have(monkeypatch):
    """Its fused attention elsewhere than on the CPU: the gradients are given, derivatives of them refused."""
    from structured import blockwise

    monkeypatch.setattr(blockwise, "FUSED", ())
    with pytest.raises(BadInput, match=r"has no second derivatives; take them by torch.func, or under .*MATH"):
        twice(FUNCTIONS["standard"][0], qkv(40))
    x = leaves(qkv(40))
    torch.autograd.grad(number(FUNCTIONS["standard"][0])(*x), x, create_graph=True)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        check("create_graph", *FUNCTIONS["standard"], qkv(40), 1e-9)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", ["window", "mlr"])
@pytest.mark.parametrize("transform", ["grad", "vmap", "vmap(grad)", "jvp"])
def test_transforms_inside_of_a_compiled_function(transform, name):
    torch.compiler.reset()
    (ours, definition), x = FUNCTIONS[name], qkv(DENSE_BELOW)
    compiled = torch.compile(lambda *x: TRANSFORMS[transform](ours, x), backend="aot_eager", fullgraph=True)
    for g, w in zip(tree_leaves(compiled(*x)), tree_leaves(TRANSFORMS[transform](definition, x)), strict=True):
        assert relative_error(g, w) < 1e-9


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("structure", ["low_rank_with_gswa", "multi_level_low_rank", "bilinear_BTT"])
def test_a_model_for_every_sample_and_direction(structure):
    """Per-sample gradients by vmap(grad), and the derivative along a direction by jvp, of a whole language model."""
    torch.manual_seed(0)
    scoring = ScoringConfig(
        structure, d_model=16, n_head=2, block_size=256, ranks=(4, 2, 2), window=20, gswa_ranks=(4, 4)
    )
    model = GPT(ModelConfig(scoring, n_layer=1), vocab_size=11).double()
    for p in model.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    idx = torch.randint(11, (2, DENSE_BELOW))

    def loss(parameters, idx):
        logits = torch.func.functional_call(model, parameters, (idx[None],))
        return logits.log_softmax(-1)[..., 0].mean()

    got = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, idx)
    want = [torch.autograd.grad(loss(dict(model.named_parameters()), each), list(model.parameters())) for each in idx]
    for name, *each in zip(parameters, *want, strict=True):
        assert relative_error(got[name], torch.stack(each)) < 1e-9, name
    along = {name: torch.randn_like(p) for name, p in parameters.items()}
    slope = torch.func.jvp(lambda p: loss(p, idx[0]), (parameters,), (along,))[1]
    assert slope.item() == pytest.approx(sum((got[name][0] * along[name]).sum().item() for name in along), rel=1e-9)
