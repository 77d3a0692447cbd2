"""Masks, packed sequences, queries that continue from a cache, and scales as tensors: the four functions as defined."""

import functools
from itertools import product

import pytest
import torch
from compare import assert_same, with_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from test_properties import BOUNDED, LAYOUTS
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._pytree import tree_leaves

from structured import (
    BadInput,
    attention,
    functional,
    gswa_attention,
    kernels,
    mlr_attention,
    reference,
    window_attention,
)

pytestmark = pytest.mark.usefixtures("single_thread")
NAMES = ("out", "dq", "dk", "dv")
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
FUNCTIONS = {  # name: (ours, the definition, arguments)
    "standard": (attention, reference.attention, dict(scale=0.4)),
    "window": (window_attention, reference.window_attention, dict(window=3, scale=0.4)),
    "gswa": (gswa_attention, reference.gswa_attention, dict(ranks=(5, 3), window=2)),
    "mlr": (mlr_attention, reference.mlr_attention, dict(ranks=(4, 2, 2), block_sizes=(16, 8, 4), weighting="shared")),
    "mlr, other blocks": (mlr_attention, reference.mlr_attention, dict(ranks=(3, 5), block_sizes=(7, 5))),
}


def qkv(B, Tq, Tk, *, H=4, G=2, d=7, dtype=torch.float64, width=8):
    g = torch.Generator().manual_seed(0)
    shapes = (B, H, Tq, width), (B, G, Tk, width), (B, G, Tk, d)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


def random_mask(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.6


def added(*shape):
    """What is added to scores, some of it -inf."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).masked_fill(~random_mask(*shape), -torch.inf)


def starts(*lengths):
    return torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)


def padding(*lengths, T):
    """(B, 1, 1, T): as many keys as these lengths, from the first on."""
    return (torch.arange(T) < torch.tensor(lengths)[:, None])[:, None, None]


CASES = {  # B, Tq, Tk, options
    "booleans": (2, 11, 11, dict(attn_mask=random_mask(2, 4, 11, 11))),
    "booleans for all heads": (2, 11, 11, dict(attn_mask=random_mask(11, 11))),
    "added": (2, 11, 11, dict(attn_mask=added(2, 1, 11, 11))),
    "added to every key": (1, 11, 11, dict(attn_mask=added(11))),
    "right padding": (3, 19, 19, dict(attn_mask=padding(19, 4, 0, T=19))),
    "left padding": (3, 19, 19, dict(attn_mask=padding(19, 4, 0, T=19).flip(3))),
    "nothing is seen": (2, 5, 5, dict(attn_mask=torch.zeros(5, 5, dtype=torch.bool))),
    "the last queries": (2, 5, 18, {}),
    "one query": (2, 1, 18, {}),
    "more queries than keys": (2, 9, 4, {}),
    "no keys": (2, 3, 0, {}),
    "queries in the middle": (2, 5, 18, dict(offset=6)),
    "queries behind the keys": (2, 5, 8, dict(offset=10)),
    "in the middle, masked": (2, 5, 18, dict(offset=6, attn_mask=random_mask(2, 4, 5, 18))),
    "packed": (1, 40, 40, dict(cu_seqlens=starts(3, 17, 0, 1, 17, 2))),
    "packed, one sequence": (1, 13, 13, dict(cu_seqlens=starts(13).long(), max_seqlen=13)),
    "packed, no sequence": (1, 0, 0, dict(cu_seqlens=starts())),
    "packed, masked": (1, 40, 40, dict(cu_seqlens=starts(3, 17, 17, 3), attn_mask=random_mask(1, 1, 40, 40))),
    "packed, keys masked": (1, 40, 40, dict(cu_seqlens=starts(3, 17, 17, 3), attn_mask=random_mask(40))),
    "packed, fewer queries": (1, 10, 40, dict(cu_seqlens=(starts(3, 1, 5, 0, 1), starts(3, 17, 5, 9, 6)))),
    "packed, some without keys": (1, 10, 12, dict(cu_seqlens=(starts(3, 4, 0, 3), starts(0, 3, 5, 4)))),
}


def check(name, inputs, options, tolerance=1e-11):
    ours, definition, arguments = FUNCTIONS[name]
    arguments = arguments | options
    got = with_gradients(functools.partial(ours, **arguments), inputs)
    arguments = {key: x for key, x in arguments.items() if key not in ("max_seqlen", "backend")}
    want = with_gradients(functools.partial(definition, **arguments), [x.double() for x in inputs])
    assert_same(got, want, NAMES, tolerance)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("case", CASES)
def test_against_the_definition(case, name):
    B, Tq, Tk, options = CASES[case]
    for causal, link in ((True, "softmax"), (False, "softmax"), (True, "identity")):
        for d in (7, 8):  # 8 is as wide as queries are, for PyTorch's own attention
            check(name, qkv(B, Tq, Tk, d=d), dict(options, causal=causal, link=link))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", ["right padding", "added", "packed, masked", "in the middle, masked"])
def test_dtypes(case, dtype, name):
    B, Tq, Tk, options = CASES[case]
    inputs = qkv(B, Tq, Tk, d=8, dtype=dtype)
    check(name, inputs, dict(options, causal=True), TOLERANCE[dtype])


REFUSED = {  # Tq, Tk, options, words
    "a mask of another shape": (6, 6, dict(attn_mask=random_mask(2, 4, 6, 5)), r"\(2, 4, 6, 5\) does not broadcast"),
    "a mask of the keys alone": (6, 6, dict(attn_mask=random_mask(2, 6)), r"mask\[:, None, None\]"),
    "a mask of numbers": (6, 6, dict(attn_mask=torch.ones(6, 6, dtype=torch.long)), r"torch.int64; mask.bool\(\)"),
    "no tensor": (6, 6, dict(attn_mask=[True] * 6), "attn_mask is a list"),
    "a mask on another device": (6, 6, dict(attn_mask=random_mask(6, 6).to("meta")), "attn_mask is on meta, q on cpu"),
    "an offset too low": (4, 6, dict(offset=-1), "offset -1: .* from 0 on; 2 makes"),
    "an offset that is no number": (4, 6, dict(offset=1.5), "offset 1.5"),
    "max_seqlen alone": (6, 6, dict(max_seqlen=6), "max_seqlen 6 without cu_seqlens"),
    "a batch": (6, 6, dict(cu_seqlens=starts(6)), "a batch of 1, q has 2"),
    "a scale of another shape": (6, 6, dict(scale=torch.ones(3)), r"scale \(3,\) is no number, nor \(4,\)"),
    "three scales": (6, 6, dict(scales=(1, 1, 1)), "3 scales: GSWA takes two"),
    "a scale of whole numbers": (6, 6, dict(scale=torch.ones(4).int()), "scale is torch.int32"),
}
REFUSED_PACKED = {  # of one sequence of 10
    "another end": (dict(cu_seqlens=starts(4, 5)), "cu_seqlens goes from 0 to 9; it goes from 0 to 10"),
    "another start": (dict(cu_seqlens=starts(4, 6)[1:]), "goes from 4 to 10"),
    "back": (dict(cu_seqlens=torch.tensor([0, 7, 5, 10])), "goes back, from 7 to 5"),
    "floating": (dict(cu_seqlens=starts(10).float()), "int32 or int64"),
    "two dimensions": (dict(cu_seqlens=starts(10)[None]), r"not torch.int32 \(1, 2\)"),
    "numbers of sequences": (dict(cu_seqlens=(starts(10), starts(4, 6))), "2 and 3 numbers"),
    "keys that do not add up": (dict(cu_seqlens=(starts(4, 6), starts(4, 7))), "cu_seqlens_k goes from 0 to 11"),
    "three": (dict(cu_seqlens=(starts(10),) * 3), "not 3"),
    "a longer sequence": (dict(cu_seqlens=starts(4, 6), max_seqlen=5), "max_seqlen 5 is below 6"),
    "with an offset": (dict(cu_seqlens=starts(10), offset=0), "offset 0 with cu_seqlens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    Tq, Tk, options, words = REFUSED[case]
    names = {"scale": ("standard", "window"), "scales": ("gswa",)}.get(next(iter(options)), ("standard", "mlr"))
    for name in names:
        with pytest.raises(BadInput, match=words) as error:
            FUNCTIONS[name][0](*qkv(2, Tq, Tk), **FUNCTIONS[name][2] | options)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("case", REFUSED_PACKED)
def test_refusals_of_sequences(case):
    options, words = REFUSED_PACKED[case]
    for name in ("window", "mlr"):
        with pytest.raises(BadInput, match=words) as error:
            FUNCTIONS[name][0](*qkv(1, 10, 10), **FUNCTIONS[name][2] | options)
        assert "\n" not in str(error.value)


def test_one_cu_seqlens_takes_as_many_queries_as_keys():
    with pytest.raises(BadInput, match="for 4 queries and 6 keys; give"):
        attention(*qkv(1, 4, 6), scale=1, cu_seqlens=starts(6))


@pytest.mark.parametrize("shape", [(), (4,), (1, 4, 1, 1), (2, 4, 9, 1)], ids=str)
def test_scales_as_tensors(shape):
    """Gradients of a scale, too."""
    scale = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 0.5
    for name in ("standard", "window", "gswa"):
        ours, definition, arguments = FUNCTIONS[name]

        def scaled(function, q, k, v, s, name=name, arguments=arguments):
            return function(q, k, v, **arguments | (dict(scales=(s, s * s)) if name == "gswa" else dict(scale=s)))

        inputs = [*qkv(2, 9, 9), scale]
        got, want = (with_gradients(functools.partial(scaled, function), inputs) for function in (ours, definition))
        assert_same(got, want, [*NAMES, "d scale"])


@st.composite
def calls(draw):
    """(function's name, its inputs, options, dtype): random geometries, lengths, layouts and masks of every kind."""
    name, packed, longest = draw(st.sampled_from(["standard", "window", "gswa", "mlr"])), draw(st.booleans()), 24
    ranks = draw(st.lists(st.integers(1, 4), min_size=2, max_size=2 if name == "gswa" else 4))
    options = {
        "standard": dict(scale=0.4),
        "window": dict(scale=0.4, window=draw(st.integers(0, longest))),
        "gswa": dict(ranks=ranks, window=draw(st.integers(0, longest))),
        "mlr": dict(
            ranks=ranks, weighting=draw(st.sampled_from(["none", "levels", "shared"])),
            block_sizes=draw(st.lists(st.integers(1, 2 * longest), min_size=len(ranks), max_size=len(ranks))),
        ),
    }[name] | dict(causal=draw(st.booleans()), link=draw(st.sampled_from(["softmax", "identity"])))  # fmt: skip
    lengths = st.lists(st.integers(0, longest), min_size=4 if packed else 1, max_size=4 if packed else 1)
    of_q, of_k = draw(lengths), draw(lengths)
    G, B, Tq, Tk = draw(st.integers(1, 2)), 1 if packed else 2, sum(of_q), sum(of_k)
    H = G * draw(st.integers(1, 2))
    if packed:
        options |= dict(cu_seqlens=(starts(*of_q), starts(*of_k)))
    elif draw(st.booleans()):
        options |= dict(offset=draw(st.integers(max(0, Tk - Tq), Tk)))
    if draw(st.booleans()):
        shape = [n if draw(st.booleans()) else 1 for n in (B, H, Tq, Tk)]
        options |= dict(attn_mask=draw(st.sampled_from([random_mask, added]))(*shape))
    dtype, d = draw(st.sampled_from(list(TOLERANCE))), draw(st.sampled_from([3, sum(ranks)]))
    x = qkv(B, Tq, Tk, H=H, G=G, d=d, dtype=dtype, width=sum(ranks))
    return name, [LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))](y) if y.numel() else y for y in x], options, dtype


@settings(BOUNDED, max_examples=60)
@given(calls())
def test_whatever_is_asked(call):
    name, inputs, options, dtype = call
    ours, definition, _ = FUNCTIONS[name]
    got = with_gradients(functools.partial(ours, **options), inputs)
    want = with_gradients(functools.partial(definition, **options), [x.double() for x in inputs])
    size = max(w.norm() for w in want[1:]).clamp(min=1e-2)  # of gradients; one may be 0 in exact arithmetic
    for name, g, w in zip(NAMES, got, want, strict=True):
        assert g.shape == w.shape
        error = (g.double() - w).norm() / (w.norm().clamp(min=1e-2) if name == "out" else size)
        assert error <= 3 * TOLERANCE[dtype], (name, error)


LONG = {
    "window": dict(window=30),
    "mlr": dict(ranks=(4, 2, 2), block_sizes=(256, 64, 4), weighting="shared"),
    "mlr, an empty level": dict(ranks=(0, 6, 2), block_sizes=(256, 64, 4), weighting="levels"),
}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("flipped", [False, True])
def test_padded_batches_by_other_paths(flipped, name):
    """Keys are hidden without a T x T mask."""
    T, mask = 203, padding(203, 40, 0, T=203)
    inputs = qkv(3, T, T, H=2, G=1)
    for causal in (True, False):
        options = dict(LONG[name], attn_mask=mask.flip(3) if flipped else mask, causal=causal, backend="blockwise")
        check(name.split(",")[0], inputs, options)
        check(name.split(",")[0], [x.half() for x in inputs], options, TOLERANCE[torch.float16])


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize(("Tq", "offset"), [(90, 170), (70, 20), (20, 180), (203, 57), (90, 200)])
def test_long_continuations(Tq, offset, name):
    """Some with zeros as the queries that there are not, some with the keys in reach of a window alone."""
    for causal in (True, False):
        check(name.split(",")[0], qkv(1, Tq, 260, H=2, G=1), dict(LONG[name], offset=offset, causal=causal))


@pytest.fixture
def small_tiles(monkeypatch):
    """The kernels with tiles of 16 positions, in Triton's interpreter where there is no GPU."""
    pytest.importorskip("triton", reason="Triton is not installed: make interpreter")
    small = kernels.mlr.Launch(16, 16, 4, 1, None)
    launches = dict.fromkeys(("forward", "backward_q", "backward_kv"), small)
    monkeypatch.setattr(kernels.mlr, "launches", lambda *_: launches)


PACKED = {  # lengths, heads, key heads, ranks, block sizes
    "mixed": ((17, 0, 40, 3, 16, 1), 2, 1, (8, 4, 4), (64, 32, 8)),
    "one": ((50,), 2, 2, (8, 8), (64, 16)),
    "no far tiles": ((5, 6, 7), 2, 1, (8, 8), (16, 8)),
    "not everything meets": ((40, 37), 1, 1, (8, 8), (32, 8)),
    "three chunks": ((70, 33), 1, 1, (16, 40, 12, 12), (128, 64, 32, 8)),
}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("dtype", "causal", "max_seqlen"), [(torch.float32, True, None), (torch.float16, False, 80)])
@pytest.mark.parametrize("case", PACKED)
def test_packed_by_the_kernels(case, dtype, causal, max_seqlen):
    lengths, H, G, ranks, blocks = PACKED[case]
    g, T = torch.Generator().manual_seed(0), sum(lengths)
    shapes = (H, sum(ranks)), (G, sum(ranks)), (G, 12)
    inputs = [torch.randn(1, T, *s, generator=g, dtype=torch.float64).to(dtype).transpose(1, 2) for s in shapes]
    options = dict(ranks=ranks, block_sizes=blocks, weighting="shared", causal=causal, max_seqlen=max_seqlen)
    check("mlr", inputs, dict(options, backend="triton", cu_seqlens=starts(*lengths).long()), TOLERANCE[dtype])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("causal", [True, False])
def test_what_is_not_finite_stays_in_its_sequence(causal):
    q, k, v = (x.float() for x in qkv(1, 40, 40))
    options = FUNCTIONS["mlr"][2] | dict(causal=causal, cu_seqlens=starts(21, 19), backend="triton")
    want = mlr_attention(q, k, v, **options)
    for x in (q, k, v):
        x[:, :, 21:] = float("nan")
    out = mlr_attention(q, k, v, **options)
    assert_same([out[:, :, :21]], [want[:, :, :21]], ["out"], 1e-6)
    assert out[:, :, 21:].isnan().all()


@pytest.mark.usefixtures("small_tiles")
def test_standard_attention_of_packed_sequences_by_the_kernels(monkeypatch):
    monkeypatch.setattr(functional, "packed_path", lambda *_, **__: "triton")
    check("standard", [x.float() for x in qkv(1, 40, 40)], dict(cu_seqlens=starts(3, 17, 0, 20)), 2e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_packed_sequences_are_what_each_is_alone(name):
    lengths = (3, 17, 1, 17)
    inputs, function = qkv(1, 38, 38), functools.partial(FUNCTIONS[name][0], **FUNCTIONS[name][2])

    def alone(*x):
        return torch.cat([function(*some) for some in zip(*(y.split(lengths, 2) for y in x), strict=True)], 2)

    got = with_gradients(functools.partial(function, cu_seqlens=starts(*lengths)), inputs)
    assert_same(got, with_gradients(alone, inputs), NAMES)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_chunks_that_continue_are_the_whole(name):
    q, k, v = qkv(2, 23, 23)
    function = functools.partial(FUNCTIONS[name][0], **FUNCTIONS[name][2])
    cuts = [(0, 9), (9, 10), (10, 23)]

    def in_chunks(q, k, v):
        return torch.cat([function(q[:, :, at:end], k[:, :, :end], v[:, :, :end]) for at, end in cuts], 2)

    def by_offset(q, k, v):
        return torch.cat([function(q[:, :, at:end], k, v, offset=at) for at, end in cuts], 2)

    want = with_gradients(function, (q, k, v))
    for chunks in (in_chunks, by_offset):
        assert_same(with_gradients(chunks, (q, k, v)), want, NAMES)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("lengths", "window"), [((40, 0, 300, 128, 5, 200), 60), ((513, 127), 700), ((700,), 0)])
def test_the_mask_of_packed_sequences_for_flex_attention(lengths, window, causal):
    T = sum(lengths)
    ours = functional.packed_flex_mask(T, window, 0 if causal else window, starts(*lengths))
    i, n, j, m = reference.places(T, T, starts(*lengths))
    rows, columns = reference.positions(T)
    want = (n == m) & reference.visible(i, j, causal, window)
    assert torch.equal(ours.mask_mod(0, 0, rows, columns), want)
    theirs = create_block_mask(ours.mask_mod, None, None, T, T, device="cpu")
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


ASKED = {  # what is transformed: (Tq, Tk, options)
    "masked": (7, 9, dict(attn_mask=added(7, 9))),
    "padded": (9, 9, dict(attn_mask=padding(6, T=9))),
    "packed": (9, 9, dict(cu_seqlens=starts(4, 0, 5))),
    "packed, fewer queries": (5, 9, dict(cu_seqlens=(starts(2, 3, 0), starts(4, 3, 2)))),
}
TRANSFORMS = {
    "jvp": lambda f, x: torch.func.jvp(f, tuple(x), tuple(y.cos() for y in x))[1],
    "vmap": lambda f, x: torch.func.vmap(f)(*(torch.stack([y, y.flip(2)]) for y in x)),
    "vmap(grad)": lambda f, x: torch.func.vmap(torch.func.grad(lambda *y: f(*y).sin().sum(), argnums=(0, 1, 2)))(
        *(torch.stack([y, y.flip(2)]) for y in x)
    ),
    "hessian": lambda f, x: torch.func.hessian(lambda s: f(x[0] * s, x[1] * s.sin(), x[2]).sum())(torch.ones(())),
    "create_graph": lambda f, x: twice(f, x),
    "is_grads_batched": lambda f, x: many(f, x),
}


def twice(f, x):
    """Gradients of a function of the gradients."""
    x = [y.detach().requires_grad_() for y in x]
    first = torch.autograd.grad(f(*x).sin().sum(), x, create_graph=True)
    return torch.autograd.grad(sum(g.sin().sum() for g in first), x)


def many(f, x):
    x = [y.detach().requires_grad_() for y in x]
    out = f(*x)
    return torch.autograd.grad(out, x, torch.stack([out.detach().cos(), out.detach().sin()]), is_grads_batched=True)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("case", ASKED)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(transform, case, name):
    Tq, Tk, options = ASKED[case]
    ours, definition, arguments = FUNCTIONS[name]
    for d in (7, 8):
        x = qkv(1, Tq, Tk, d=d)
        functions = (functools.partial(f, **arguments, **options) for f in (ours, definition))
        got, want = (tree_leaves(TRANSFORMS[transform](f, x)) for f in functions)
        assert_same(got, want, [str(n) for n in range(len(want))], 1e-9)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("transform", ["vmap", "vmap(grad)", "create_graph", "is_grads_batched"])
def test_transforms_of_the_kernels(transform):
    ours, definition, arguments = FUNCTIONS["mlr"]
    x, options = [y.float() for y in qkv(1, 11, 11, H=2, G=1)], dict(arguments, cu_seqlens=starts(4, 0, 7))
    got = TRANSFORMS[transform](functools.partial(ours, **options, backend="triton"), x)
    want = TRANSFORMS[transform](functools.partial(definition, **options), [y.double() for y in x])
    assert_same(tree_leaves(got), tree_leaves(want), [str(n) for n in range(len(tree_leaves(want)))], 1e-4)


def test_sequences_cannot_be_mapped():
    x = qkv(1, 4, 4)
    with pytest.raises(BadInput, match="cannot be mapped"):
        torch.func.vmap(lambda s: attention(*x, scale=1.0, cu_seqlens=s))(torch.tensor([[0, 4], [0, 4]]))


@pytest.mark.parametrize(
    ("case", "name", "dynamic"),
    [*product(ASKED, ["gswa", "mlr"], [False]), ("padded", "mlr", True), ("packed", "standard", True)],
)
def test_compiled(case, name, dynamic):
    """One graph, of the dense path where sequences are packed, outputs and gradients as without."""
    Tq, Tk, options = ASKED[case]
    function = functools.partial(FUNCTIONS[name][0], **FUNCTIONS[name][2], **options)
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    x = qkv(1, Tq, Tk)
    assert_same(with_gradients(compiled, x), with_gradients(function, x), NAMES)
