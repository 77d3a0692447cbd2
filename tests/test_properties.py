"""Attention of whatever is asked, found by hypothesis: every path that is here against the definition in float64."""

import warnings

import pytest
import torch
from compare import relative_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from structured import BadInput, attention, gswa_attention, kernels, mlr_attention, reference, window_attention
from structured.blockwise import nesting_refusal

pytestmark = pytest.mark.usefixtures("single_thread")
BOUNDED = settings(derandomize=True, deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
FEWER = settings(BOUNDED, max_examples=24)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-4, torch.bfloat16: 4e-2, torch.float16: 6e-3}
LENGTHS = st.sampled_from([0, 1, 2, 7, 33, 64, 129, 191, 192, 193, 257])
SMALL = st.sampled_from([0, 1, 5, 16, 37])  # for Triton's interpreter
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "features apart": lambda x: x.mT.contiguous().mT,
    "heads last": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "batch innermost": lambda x: x.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0),
    "every other feature": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "every third position": lambda x: x.repeat_interleave(3, 2)[:, :, ::3],
    "behind another": lambda x: torch.cat([x[..., :1], x], -1)[..., 1:],
    "one for the batch": lambda x: x[:1].expand_as(x),
    "one for all heads": lambda x: x[:, :1].expand_as(x),
    "one for all features": lambda x: x[..., :1].expand_as(x),
    "one number": lambda x: x[:1, :1, :1, :1].expand_as(x),
}
layouts = st.lists(st.sampled_from(list(LAYOUTS)), min_size=4, max_size=4)


@st.composite
def shapes(draw, lengths=LENGTHS):
    """(B, H, G, T, features of values)."""
    G, share = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    return draw(st.integers(0, 2)), G * share, G, draw(lengths), draw(st.sampled_from([1, 3, 8, 16]))


@st.composite
def levels(draw, nested=None):
    """(ranks, block sizes): zeros among the ranks, blocks that nest and blocks that do not."""
    ranks = draw(st.lists(st.integers(0, 6), min_size=1, max_size=4).filter(any))
    if draw(st.booleans()) if nested is None else nested:
        blocks = [draw(st.integers(1, 40))]
        while len(blocks) < len(ranks):
            blocks.insert(0, blocks[0] * draw(st.integers(1, 4)))
    else:
        blocks = draw(st.lists(st.integers(1, 300), min_size=len(ranks), max_size=len(ranks)))
    return tuple(ranks), tuple(blocks)


def inputs(shape, width, dtype, laid_out):
    """q, k, v and a cotangent; no layout that needs an element where there is none."""
    B, H, G, T, d = shape
    g = torch.Generator().manual_seed(B + H + T)
    sizes = (B, H, T, width), (B, G, T, width), (B, G, T, d), (B, H, T, d)
    made = [torch.randn(size, generator=g, dtype=torch.float64).to(dtype) for size in sizes]
    return [LAYOUTS[name](x) if x.numel() else x for name, x in zip(laid_out, made, strict=True)]


def with_gradients(function, q, k, v, cotangent):
    x = [y.detach().requires_grad_() for y in (q, k, v)]
    out = function(*x)
    return [out, *torch.autograd.grad(out, x, cotangent.to(out.dtype))]


def check(functions, definition, tensors):
    """Every function gives the definition's output and gradients, whatever the layout; nothing of nothing.

    A gradient is judged beside all three: in some cases one is 0 in exact arithmetic.
    """
    *x, cotangent = tensors
    found = {name: with_gradients(f, *tensors) for name, f in functions.items()}
    if not x[0].numel() or not cotangent.numel():
        for name, (out, *gradients) in found.items():
            assert out.shape == cotangent.shape, name
            assert [g.shape for g in gradients] == [y.shape for y in x], name
            assert not any(g.any() for g in gradients), name
        return
    want = with_gradients(definition, *(y.double().contiguous() for y in tensors))
    size = torch.stack([w.norm() for w in want[1:]]).max().clamp(min=1e-2)
    for name, got in found.items():
        assert [y.dtype for y in got] == [x[0].dtype] * 4, name
        errors = [relative_error(got[0], want[0])]
        errors += [((g.double() - w).norm() / size).item() for g, w in zip(got[1:], want[1:], strict=True)]
        assert max(errors) < TOLERANCE[x[0].dtype], (name, errors)


@BOUNDED
@given(shapes(), levels(), layouts, st.sampled_from(list(TOLERANCE)), st.sampled_from(["none", "levels", "shared"]),
       st.booleans())  # fmt: skip
def test_mlr_attention(shape, of_levels, laid_out, dtype, weighting, causal):
    ranks, blocks = of_levels
    options = dict(weighting=weighting, causal=causal)
    names = ["auto", "dense"] + ["blockwise"] * (nesting_refusal(shape[3], blocks) is None)
    check(
        {name: lambda *x, n=name: mlr_attention(*x, ranks, blocks, backend=n, **options) for name in names},
        lambda *x: reference.mlr_attention(*x, ranks, blocks, **options),
        inputs(shape, sum(ranks), dtype, laid_out),
    )  # fmt: skip


@pytest.mark.skipif(kernels.mlr is None, reason="Triton is not installed: make interpreter")
@FEWER
@given(shapes(SMALL), levels(nested=True), layouts, st.sampled_from([torch.float32, torch.float16]), st.booleans())
def test_mlr_attention_by_the_kernels(shape, of_levels, laid_out, dtype, causal):
    (ranks, blocks), device = of_levels, "cuda" if torch.cuda.is_available() else "cpu"

    def attend(q, k, v):
        out = mlr_attention(*(x.to(device) for x in (q, k, v)), ranks, blocks, causal=causal, backend="triton")
        return out.cpu()

    check(
        dict(triton=attend),
        lambda *x: reference.mlr_attention(*x, ranks, blocks, causal=causal),
        inputs(shape, sum(ranks), dtype, laid_out),
    )  # fmt: skip


@BOUNDED
@given(shapes(), st.integers(1, 16), st.sampled_from([0, 1, 5, 63, 128, 400]), layouts,
       st.sampled_from(list(TOLERANCE)), st.booleans())  # fmt: skip
def test_window_and_standard_attention(shape, width, window, laid_out, dtype, causal):
    tensors, options = inputs(shape, width, dtype, laid_out), dict(scale=0.4, causal=causal)
    names = ("auto", "blockwise", "dense")
    check(
        {name: lambda *x, n=name: window_attention(*x, window, backend=n, **options) for name in names},
        lambda *x: reference.window_attention(*x, window, **options), tensors,
    )  # fmt: skip
    check(dict(attention=lambda *x: attention(*x, **options)), lambda *x: reference.attention(*x, **options), tensors)


@FEWER
@given(shapes(), st.sampled_from([(4, 4), (1, 3), (6, 2)]), st.sampled_from([0, 5, 90]), layouts,
       st.sampled_from(list(TOLERANCE)), st.sampled_from(["softmax", "identity"]))  # fmt: skip
def test_gswa_attention(shape, ranks, window, laid_out, dtype, link):
    check(
        dict(auto=lambda *x: gswa_attention(*x, ranks, window, scales=(0.3, 0.5), link=link)),
        lambda *x: reference.gswa_attention(*x, ranks, window, scales=(0.3, 0.5), link=link),
        inputs(shape, sum(ranks), dtype, laid_out),
    )  # fmt: skip


def gradient(f, x):
    return torch.func.grad(lambda *y: f(*y).sin().sum(), argnums=(0, 1, 2))(*x)


@FEWER
@given(shapes(), levels(), layouts, st.sampled_from(["grad", "jvp", "vmap", "vmap(grad)"]))
def test_transforms_of_any_geometry(shape, of_levels, laid_out, transform):
    ranks, blocks = of_levels
    *x, _ = inputs((2, *shape[1:]), sum(ranks), torch.float64, laid_out)
    if not x[0].numel():
        return
    apply = {
        "grad": gradient,
        "jvp": lambda f, x: [torch.func.jvp(f, tuple(y.clone() for y in x), tuple(y.cos() for y in x))[1]],
        "vmap": lambda f, x: [torch.func.vmap(lambda *y: f(*(z[None] for z in y))[0])(*x)],
        "vmap(grad)": lambda f, x: torch.func.vmap(lambda *y: gradient(f, [z[None] for z in y]))(*x),
    }[transform]
    got, want = (apply(lambda *y, f=f: f(*y, ranks, blocks), x) for f in (mlr_attention, reference.mlr_attention))
    size = torch.stack([w.norm() for w in want]).max().clamp(min=1e-2)
    assert max((g - w).norm() / size for g, w in zip(got, want, strict=True)) < 1e-9


WRONG = {  # what is wrong with a call that would be right, and what the one line names
    "dtypes": (dict(k=lambda x: x.double()), "float32, float64, float32.*torch.float64"),
    "integers": (dict.fromkeys("qkv", lambda x: x.long()), "int64, int64, int64.*float32"),
    "device": (dict(v=lambda x: x.to("meta")), "cpu, cpu, meta; move them to one device"),
    "length": (dict(v=lambda x: x[:, :, :-1]), r"q, k, v are \(B, H, Tq, r\).* not \(2, 4, "),
    "dimensions": (dict(q=lambda x: x[0]), r"q, k, v are \(B, H, Tq, r\)"),
    "width": (dict(k=lambda x: x[..., :-1]), "q has 6 features, k 5"),
    "heads": (dict(q=lambda x: x[:, :3]), "2 key heads do not divide 3 query heads; 4 query heads would do"),
    "dropout": (dict(dropout=1.5), "dropout 1.5: it is a probability"),
    "link": (dict(link="relu"), "no link function 'relu', there are softmax, identity"),
}
LEVELS_WRONG = {
    "float blocks": (dict(block_sizes=(16.0, 8.0)), r"block sizes \(16.0, 8.0\): give whole numbers; .* \(16, 8\)"),
    "half blocks": (dict(block_sizes=(16.5, 8)), r"the nearest are \(16, 8\)"),
    "not a number": (dict(block_sizes=(float("nan"), 8)), r"block sizes \(nan, 8\): give whole numbers"),
    "float ranks": (dict(ranks=(4.0, 2.0)), r"ranks \(4.0, 2.0\): give whole numbers; the nearest are \(4, 2\)"),
    "a bool": (dict(ranks=(5, True)), r"ranks \(5, True\): give whole numbers"),
    "text": (dict(ranks=("4", "2")), "give whole numbers"),
    "sum": (dict(ranks=(4, 4)), r"add up to 8, the queries and keys of a head have 6 features; \(2, 4\) would do"),
    "window": (dict(window=4.5), "give whole numbers"),
}


def refused(call, words):
    with pytest.raises(BadInput, match=words) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("T", [1, 24, 300])
@pytest.mark.parametrize("wrong", WRONG)
def test_what_no_path_takes_is_refused_alike(wrong, T):
    change, words = WRONG[wrong]
    tensors = dict(q=torch.ones(2, 4, T, 6), k=torch.ones(2, 2, T, 6), v=torch.ones(2, 2, T, 5))
    options = {name: value for name, value in change.items() if name not in tensors}
    q, k, v = (change[name](x) if name in change else x for name, x in tensors.items())
    for backend in ("auto", "blockwise", "dense"):
        refused(lambda b=backend: mlr_attention(q, k, v, (4, 2), (16, 8), backend=b, **options), words)
        refused(lambda b=backend: window_attention(q, k, v, 4, scale=1.0, backend=b, **options), words)
        refused(lambda b=backend: gswa_attention(q, k, v, (4, 2), 4, backend=b, **options), words)
    refused(lambda: attention(q, k, v, scale=1.0, **options), words)


@pytest.mark.parametrize("T", [24, 300])
@pytest.mark.parametrize("wrong", LEVELS_WRONG)
def test_levels_that_are_none_are_refused_alike(wrong, T):
    change, words = LEVELS_WRONG[wrong]
    x = torch.ones(2, 4, T, 6)
    for backend in ("auto", "blockwise", "dense"):
        if "window" in change:
            refused(lambda b=backend: window_attention(x, x, x, 4.5, scale=1.0, backend=b), words)
            continue
        of_levels = dict(ranks=(4, 2), block_sizes=(16, 8)) | change
        refused(lambda b=backend, kw=of_levels: mlr_attention(x, x, x, backend=b, **kw), words)


def test_numpy_integers_and_lists_are_levels_too():
    numpy = pytest.importorskip("numpy")
    x = torch.randn(1, 2, 9, 6)
    want = mlr_attention(x, x, x, (4, 2), (8, 4))
    assert torch.equal(mlr_attention(x, x, x, numpy.array([4, 2]), [8, 4]), want)


@pytest.mark.parametrize("T", [24, 300])
def test_no_features_is_the_mean_of_what_is_seen(T):
    q, v = torch.randn(1, 2, T, 0, requires_grad=True), torch.randn(1, 2, T, 3, requires_grad=True)
    mean = v.cumsum(2) / torch.arange(1, T + 1)[:, None]
    for out in (
        attention(q, q, v, scale=1.0), window_attention(q, q, v, T, scale=1.0), mlr_attention(q, q, v, (0, 0), (8, 4)),
        mlr_attention(q, q, v, (0, 0), (8, 4), backend="blockwise"),
    ):  # fmt: skip
        torch.testing.assert_close(out, mean)
        assert torch.autograd.grad(out.sum(), q)[0].shape == q.shape


def test_features_apart_of_one_tensor_alone():
    """As from a Conv1d. The operator behind PyTorch's fused attention reads such keys as if they were not."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.manual_seed(0)
        q, k, v = torch.randn(3, 2, 4, 300, 16)
        levels = (8, 4, 4), (256, 128, 64)
        want = reference.mlr_attention(*(x.double() for x in (q, k, v)), *levels)
        for which in range(3):
            x = [y.mT.contiguous().mT if n == which else y for n, y in enumerate((q, k, v))]
            assert relative_error(mlr_attention(*x, *levels), want) < 1e-5
