"""The attention functions against their definitions: outputs and gradients of every input, odd sizes included."""

import pytest
import torch
import torch.nn.functional as F
from compare import TOLERANCE, assert_same, relative_error, with_gradients

from structured import (
    BadInput,
    attention,
    default_block_sizes,
    gswa_attention,
    mlr_attention,
    reference,
    window_attention,
)

SETTINGS = pytest.mark.parametrize(
    ("causal", "link"), [(True, "softmax"), (False, "softmax"), (True, "identity"), (False, "identity")]
)
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
NAMES = ["out", "dq", "dk", "dv"]


def qkv(T, width, *, n_head=4, kv_heads=2, d_value=7, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(3, n_head, T, width), (3, kv_heads, T, width), (3, kv_heads, T, d_value)]
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


def check(fast, slow, inputs, dtype):
    got = with_gradients(fast, inputs)
    want = with_gradients(slow, [x.double() for x in inputs])
    assert_same(got, want, NAMES, TOLERANCE[dtype])


@DTYPES
@SETTINGS
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention(causal, link, kv_heads, dtype):
    options = dict(scale=0.31, causal=causal, link=link)
    inputs = qkv(13, 5, kv_heads=kv_heads, dtype=dtype)
    check(lambda *x: attention(*x, **options), lambda *x: reference.attention(*x, **options), inputs, dtype)


@DTYPES
@SETTINGS
@pytest.mark.parametrize(("T", "window"), [(13, 0), (13, 1), (13, 5), (7, 6), (7, 40), (1, 3)])
def test_window_attention(T, window, causal, link, dtype):
    options = dict(scale=0.7, causal=causal, link=link)
    inputs = qkv(T, 6, dtype=dtype)
    check(
        lambda *x: window_attention(*x, window, **options),
        lambda *x: reference.window_attention(*x, window, **options),
        inputs, dtype,
    )  # fmt: skip


@DTYPES
@SETTINGS
@pytest.mark.parametrize("scales", [None, (0.4, 0.9)])
def test_gswa_attention(scales, causal, link, dtype):
    options = dict(scales=scales, causal=causal, link=link)
    inputs = qkv(11, 8, dtype=dtype)
    check(
        lambda *x: gswa_attention(*x, (5, 3), 4, **options),
        lambda *x: reference.gswa_attention(*x, (5, 3), 4, **options),
        inputs, dtype,
    )  # fmt: skip


MLR_CASES = {  # T, ranks, block sizes
    "one level": (9, (6,), (9,)),
    "default": (16, (3, 2, 1), (16, 8, 4)),
    "shorter than block_size": (11, (3, 2, 1), (16, 8, 4)),
    "one token": (1, (3, 2, 1), (16, 8, 4)),
    "blocks do not halve": (24, (3, 2, 1), (24, 12, 3)),
    "blocks do not divide T": (23, (3, 1, 2), (24, 7, 3)),
    "blocks do not nest": (23, (2, 2, 2), (24, 10, 7)),
    "not everything meets": (13, (2, 3), (5, 3)),
    "an empty level": (16, (6, 0), (16, 8)),
    "blocks of one": (10, (4, 2), (10, 1)),
}


@DTYPES
@SETTINGS
@pytest.mark.parametrize("weighting", ["none", "levels", "shared"])
@pytest.mark.parametrize("case", MLR_CASES)
def test_mlr_attention(case, weighting, causal, link, dtype):
    T, ranks, blocks = MLR_CASES[case]
    options = dict(weighting=weighting, causal=causal, link=link)
    inputs = qkv(T, sum(ranks), dtype=dtype)
    check(
        lambda *x: mlr_attention(*x, ranks, blocks, **options),
        lambda *x: reference.mlr_attention(*x, ranks, blocks, **options),
        inputs, dtype,
    )  # fmt: skip


@SETTINGS
def test_one_level_is_standard_attention(causal, link):
    inputs = qkv(17, 6)
    options = dict(causal=causal, link=link)
    got = with_gradients(lambda *x: mlr_attention(*x, (6,), (32,), weighting="shared", **options), inputs)
    want = with_gradients(lambda *x: attention(*x, scale=1 / 6, **options), inputs)
    assert_same(got, want, NAMES)


@SETTINGS
def test_full_window_is_standard_attention(causal, link):
    inputs = qkv(17, 6)
    options = dict(scale=0.5, causal=causal, link=link)
    got = with_gradients(lambda *x: window_attention(*x, 16, **options), inputs)
    assert_same(got, with_gradients(lambda *x: attention(*x, **options), inputs), NAMES)


def test_window_of_w_sees_w_plus_one_keys():
    """Equal scores: a row of weights is uniform over the keys it sees, and GSWA's rows sum to 2."""
    q, k, _ = qkv(9, 4)
    ones = torch.ones(3, 2, 9, 1, dtype=torch.float64)
    position = torch.arange(9.0, dtype=torch.float64).view(1, 1, 9, 1).expand(3, 2, 9, 1)
    mean = window_attention(0 * q, k, position, 3, scale=1.0)
    assert mean[0, 0, 8].item() == pytest.approx((5 + 6 + 7 + 8) / 4)
    assert gswa_attention(q, k, ones, (2, 2), 3).sub(2).abs().max() < 1e-12


FUNCTIONS = {
    "standard": lambda q, k, v: attention(q, k, v, scale=1.0),
    "window": lambda q, k, v: window_attention(q, k, v, 4, scale=1.0),
    "gswa": lambda q, k, v: gswa_attention(q, k, v, (4, 2), 4),
    "mlr": lambda q, k, v: mlr_attention(q, k, v, (3, 2, 1), (16, 8, 3), weighting="shared"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_outputs_do_not_move_when_the_future_changes(name):
    q, k, v = qkv(16, 6)
    before = FUNCTIONS[name](q, k, v)
    for x in (q, k, v):
        x[:, :, 9:] = torch.randn_like(x[:, :, 9:])
    after = FUNCTIONS[name](q, k, v)
    assert torch.equal(before[:, :, :9], after[:, :, :9])
    assert not torch.allclose(before[:, :, 9:], after[:, :, 9:])


def test_default_block_sizes():
    assert default_block_sizes(1024, 8) == (1024, 512, 256, 128, 64, 32, 16, 8)
    with pytest.raises(BadInput, match="multiple of 8, not 100; the nearest is 96"):
        default_block_sizes(100, 4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda q, k, v: mlr_attention(q, k, v, (4, 1), (8, 4)), r"add up to 5, the queries and keys .* 6 features"),
        (lambda q, k, v: mlr_attention(q, k, v, (4, 2), (8,)), "1 block sizes for 2 ranks"),
        (lambda q, k, v: mlr_attention(q, k, v, (4, 2), (8, 0)), "at least 1 long"),
        (lambda q, k, v: mlr_attention(q, k, v, (8, -2), (8, 4)), "from 0 on"),
        (lambda q, k, v: mlr_attention(q, k, v, (4, 2), (8, 4), weighting="some"), "no level weighting 'some'"),
        (lambda q, k, v: attention(q, k, v, scale=1.0, link="relu"), "no link function 'relu'"),
        (lambda q, k, v: attention(q[:, :3], k, v, scale=1.0), "2 key heads do not divide 3"),
        (lambda q, k, v: attention(q, k[:, :, :4], v, scale=1.0), r"q, k, v are \(B, H, Tq, r\)"),
        (lambda q, k, v: window_attention(q, k, v, -1, scale=1.0), "window -1"),
        (lambda q, k, v: gswa_attention(q, k, v, (6, 0), 3), "two ranks of at least 1"),
    ],
)
def test_bad_input_says_what_is_wrong(call, words):
    with pytest.raises(BadInput, match=words):
        call(*qkv(8, 6))


DENSE = {  # the function by the dense path, its definition
    "mlr": (
        lambda *x: mlr_attention(*x, (8, 4, 2, 2), (2048, 1024, 512, 256), weighting="shared", backend="dense"),
        lambda *x: reference.mlr_attention(*x, (8, 4, 2, 2), (2048, 1024, 512, 256), weighting="shared"),
    ),
    "mlr, identity link": (
        lambda *x: mlr_attention(*x, (8, 4, 2, 2), (2048, 1024, 512, 256), link="identity"),
        lambda *x: reference.mlr_attention(*x, (8, 4, 2, 2), (2048, 1024, 512, 256), link="identity"),
    ),
    "gswa": (
        lambda *x: gswa_attention(*x, (8, 8), 100, backend="dense"),
        lambda *x: reference.gswa_attention(*x, (8, 8), 100),
    ),
    "window": (
        lambda *x: window_attention(*x, 100, scale=0.5, backend="dense"),
        lambda *x: reference.window_attention(*x, 100, scale=0.5),
    ),
    "identity link": (
        lambda *x: attention(*x, scale=0.5, link="identity"),
        lambda *x: reference.attention(*x, scale=0.5, link="identity"),
    ),
}


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.bfloat16, True), (torch.float16, False)], ids=str)
@pytest.mark.parametrize("name", DENSE)
def test_half_precision_is_as_exact_as_pytorch(name, dtype, autocast):
    """At T 2048 errors of output and gradients are at most 1.2 times those of PyTorch's math, which is in float32."""
    inputs = [x[:1].to(dtype) for x in qkv(2048, 16, n_head=1, kv_heads=1, d_value=16)]

    def errors(function, definition):
        with torch.autocast("cpu", dtype, enabled=autocast):
            got = with_gradients(function, inputs)
        want = with_gradients(definition, [x.double() for x in inputs])
        return [relative_error(*pair) for pair in zip(got, want, strict=True)]

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        window = 100 if name == "window" else 2048
        theirs = errors(
            lambda *x: F.scaled_dot_product_attention(*x, reference.window_pairs(2048, window), scale=0.5),
            lambda *x: reference.window_attention(*x, window, scale=0.5),
        )
    for tensor, our, their in zip(NAMES, errors(*DENSE[name]), theirs, strict=True):
        assert our <= 1.2 * their, tensor
