"""Attention in pieces against the definitions, the memory it takes, and which path is chosen when."""

import pytest
import torch
import torch.nn.functional as F
from compare import TOLERANCE, assert_same, relative_error, with_gradients
from test_attention import MLR_CASES, NAMES, check, qkv
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

import train
from structured import BadInput, attention, blockwise, gswa_attention, mlr_attention, reference, window_attention
from structured.functional import flex_mask, mlr_backend, window_backend
from structured.scorings import ScoringConfig, build_scoring

DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
CAUSAL = pytest.mark.parametrize("causal", [True, False], ids=["causal", "both sides"])
CASES = {  # T, ranks, block sizes
    **{name: case for name, case in MLR_CASES.items() if not blockwise.nesting_refusal(case[0], case[2])},
    "many levels": (45, (3, 2, 1, 2, 1), (64, 32, 16, 8, 4)),
    "thirds and halves": (53, (3, 2, 1, 2), (96, 48, 16, 4)),
    "fifths": (47, (3, 2), (90, 6)),
    "equal sizes": (37, (2, 1, 3), (48, 12, 12)),
    "nothing shared far away": (40, (3, 2), (20, 5)),
    "ragged standard attention": (41, (6,), (64,)),
    "coarse levels only": (40, (2, 4), (40, 20)),
}
del CASES["one token"]  # its gradients are 0 in exact arithmetic; see test_one_token
WAYS = {  # leaf, scores held at once, fused devices
    "as is": (blockwise.LEAF, blockwise.TILE, ("cpu",)),
    "small leaves and tiles": (4, 200, ("cpu",)),
    "in strips": (4, 200, ()),
}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    leaf, tile, fused = WAYS[request.param]
    monkeypatch.setattr(blockwise, "LEAF", leaf)
    monkeypatch.setattr(blockwise, "TILE", tile)
    monkeypatch.setattr(blockwise, "FUSED", fused)


@DTYPES
@CAUSAL
@pytest.mark.parametrize("case", CASES)
def test_mlr_attention(case, causal, dtype, way):
    T, ranks, blocks = CASES[case]
    options = dict(weighting="shared", causal=causal)
    inputs = qkv(T, sum(ranks), dtype=dtype)
    check(
        lambda *x: mlr_attention(*x, ranks, blocks, backend="blockwise", **options),
        lambda *x: reference.mlr_attention(*x, ranks, blocks, **options),
        inputs, dtype,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kv_heads", "d_value", "weighting"), [(1, 3, "none"), (2, 3, "levels"), (4, 12, "none"), (4, 8, "levels")]
)
def test_mlr_attention_of_other_heads_widths_and_weightings(kv_heads, d_value, weighting, way):
    T, ranks, blocks = CASES["thirds and halves"]
    check(
        lambda *x: mlr_attention(*x, ranks, blocks, weighting=weighting, backend="blockwise"),
        lambda *x: reference.mlr_attention(*x, ranks, blocks, weighting=weighting),
        qkv(T, 8, kv_heads=kv_heads, d_value=d_value), torch.float64,
    )  # fmt: skip


@CAUSAL
def test_a_plan_holds_every_pair_once(causal):
    for T, ranks, blocks in CASES.values():
        seen = torch.zeros(T, T)
        for part in blockwise.plan_parts(T, ranks, blocks, "none", causal, 4).parts:
            for start in range(part.start, part.start + part.block * part.count, part.block):
                rows, keys = (slice(start + a, start + b) for a, b in (part.rows, part.keys))
                seen[rows, keys] += 1
        visible = reference.all_pairs(T, causal)
        assert (seen[visible] == 1).all()
        assert (seen[~visible] <= 1).all()


@DTYPES
@CAUSAL
@pytest.mark.parametrize(("T", "window"), [(13, 1), (13, 5), (7, 40), (97, 10), (64, 8), (65, 23)])
@pytest.mark.parametrize(("kv_heads", "d_value"), [(2, 7), (4, 3)])
def test_window_attention(kv_heads, d_value, T, window, causal, dtype, monkeypatch):
    monkeypatch.setattr(blockwise, "CHUNK", 4)
    options = dict(scale=0.7, causal=causal)
    inputs = qkv(T, 6, kv_heads=kv_heads, d_value=d_value, dtype=dtype)
    check(
        lambda *x: window_attention(*x, window, backend="blockwise", **options),
        lambda *x: reference.window_attention(*x, window, **options),
        inputs, dtype,
    )  # fmt: skip


def test_gswa_attention(monkeypatch):
    monkeypatch.setattr(blockwise, "CHUNK", 4)
    check(
        lambda *x: gswa_attention(*x, (5, 3), 4, backend="blockwise"),
        lambda *x: reference.gswa_attention(*x, (5, 3), 4),
        qkv(31, 8), torch.float64,
    )  # fmt: skip


@DTYPES
def test_padded_attention(dtype):
    """On the CPU, values narrower or wider than the queries go through fused attention from some length on."""
    for d_value in (3, 9):
        check(
            lambda *x: attention(*x, scale=0.4),
            lambda *x: reference.attention(*x, scale=0.4),
            qkv(257, 6, d_value=d_value, dtype=dtype), dtype,
        )  # fmt: skip


def test_one_token():
    q, k, v = qkv(1, 6, kv_heads=4)
    for out in (
        mlr_attention(q, k, v, (3, 2, 1), (16, 8, 4), backend="blockwise"),
        window_attention(q, k, v, 3, scale=1.0, backend="blockwise"),
    ):
        assert_same([out], [v], ["out"])


FUNCTIONS = {
    "mlr": lambda *x, **kw: mlr_attention(*x, (3, 2, 1), (64, 32, 8), weighting="shared", **kw),
    "window": lambda *x, **kw: window_attention(*x, 5, scale=0.5, **kw),
}
EACH = pytest.mark.parametrize("name", FUNCTIONS)


@EACH
def test_outputs_do_not_move_when_the_future_changes(name, monkeypatch):
    monkeypatch.setattr(blockwise, "CHUNK", 4)
    q, k, v = qkv(50, 6)
    before = FUNCTIONS[name](q, k, v, backend="blockwise")
    for x in (q, k, v):
        x[:, :, 41:] = torch.randn_like(x[:, :, 41:])
    after = FUNCTIONS[name](q, k, v, backend="blockwise")
    assert torch.equal(before[:, :, :41], after[:, :, :41])
    assert not torch.allclose(before[:, :, 41:], after[:, :, 41:])


@EACH
def test_inputs_of_any_layout(name):
    """As the model makes them: heads beside features, a slice of something wider, one query for all heads."""
    shared, k, v = qkv(50, 6, kv_heads=4)
    inputs = shared[:, :1].expand(-1, 4, -1, -1), k.transpose(1, 2).contiguous().transpose(1, 2), v
    inputs = *inputs[:2], torch.cat([v, v], -1)[..., 7:]

    def plain(*x):
        return FUNCTIONS[name](*(y.contiguous() for y in x), backend="dense")

    got = with_gradients_of(lambda *x: FUNCTIONS[name](*x, backend="blockwise"), inputs)
    assert_same(got, with_gradients_of(plain, inputs), NAMES)


def with_gradients_of(function, inputs):
    """As compare.with_gradients, but without changing the layout of the inputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    return [out, *torch.autograd.grad(out.square().sum(), inputs)]


@EACH
def test_nan_is_passed_on(name):
    q, k, v = qkv(50, 6)
    q[0, 1, 20, 0] = float("nan")
    out = FUNCTIONS[name](q, k, v, backend="blockwise")
    assert out[0, 1, 20].isnan().all()
    assert not out[:, 2:].isnan().any()
    k[1, 0, 10, 0] = float("nan")
    assert FUNCTIONS[name](q, k, v, backend="blockwise")[1, 0, 10:15].isnan().all()


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_about_as_exact_as_pytorch(name, dtype):
    inputs = [x.to(dtype) for x in qkv(200, 6, kv_heads=4, d_value=6)]
    wide = [x.double() for x in inputs]

    def errors(function, definition):
        return [relative_error(*pair) for pair in zip(function, definition, strict=True)]

    got = errors(
        with_gradients(lambda *x: FUNCTIONS[name](*x, backend="blockwise"), inputs),
        with_gradients(lambda *x: FUNCTIONS[name](*x, backend="dense"), wide),
    )
    sdpa = errors(
        with_gradients(lambda *x: F.scaled_dot_product_attention(*x, is_causal=True, scale=0.5), inputs),
        with_gradients(lambda *x: reference.attention(*x, scale=0.5), wide),
    )
    for tensor, ours, theirs in zip(NAMES, got, sdpa, strict=True):
        assert ours <= 1.3 * theirs, tensor


def test_autocast_casts_as_pytorch_does():
    q, k, v = qkv(200, 6, kv_heads=4, dtype=torch.float32)
    q.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = mlr_attention(q, k, v.bfloat16(), (3, 2, 1), (256, 128, 16))
    assert out.dtype == torch.bfloat16
    assert torch.autograd.grad(out.sum(), q)[0].dtype == torch.float32
    assert relative_error(out, mlr_attention(q, k, v, (3, 2, 1), (256, 128, 16))) < 1e-2


@EACH
def test_compiled(name):
    torch.compiler.reset()
    inputs = qkv(50, 6)
    compiled = torch.compile(lambda *x: FUNCTIONS[name](*x, backend="blockwise"), backend="aot_eager")
    want = with_gradients(lambda *x: FUNCTIONS[name](*x, backend="blockwise"), inputs)
    assert_same(with_gradients(compiled, inputs), want, NAMES)


class LargestTensor(TorchDispatchMode):
    """The most elements any tensor had that an operator gave back."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("fused", [("cpu",), ()], ids=["fused", "in strips"])
def test_no_tensor_of_mlr_attention_grows_with_the_square_of_the_length(fused, monkeypatch):
    """In the functions of the operators, for which alone a dispatch mode would count."""
    monkeypatch.setattr(blockwise, "FUSED", fused)
    T = 2048
    q, k, v = torch.randn(3, 1, 1, T, 6)
    plan = blockwise.plan_parts(T, (3, 2, 1), (T, T // 2, 8), "shared", True, blockwise.LEAF)
    with LargestTensor() as largest:
        out, lse = blockwise.parts_forward(q, k, v, plan)
        blockwise.parts_backward(torch.ones_like(out), q, k, v, out, lse, plan)
    assert largest.elements <= T * T / 8


def test_no_tensor_of_window_attention_grows_with_the_square_of_the_length():
    T = 2048
    x = torch.randn(3, 1, 1, T, 6, requires_grad=True)
    with LargestTensor() as largest:
        FUNCTIONS["window"](*x, backend="blockwise").sum().backward()
    assert largest.elements <= T * T / 8


PLAIN = dict(shape=(2, 4, 256, 16), blocks=(256, 128, 64))
CHOICES = [  # inputs, the path that "auto" takes, why "blockwise" cannot
    (dict(), "blockwise", None),
    (dict(shape=(2, 4, 191, 16)), "dense", None),
    (dict(blocks=(512, 128, 64)), "blockwise", None),
    (dict(blocks=(512, 300, 64)), "blockwise", None),
    (dict(blocks=(256, 24, 10)), "dense", "backend 'blockwise': takes nested blocks; 24 is not a multiple of 10"),
    (dict(blocks=(256, 64, 128)), "dense", "takes block sizes from coarse to fine, not (256, 64, 128)"),
    (dict(link="identity"), "dense", "link 'identity' takes the dense path"),
    (dict(dropout=0.1), "dense", "dropout 0.1 takes the dense path"),
]


@pytest.mark.parametrize(("inputs", "auto", "refusal"), CHOICES)
def test_the_choice_of_a_path(inputs, auto, refusal):
    inputs = {**PLAIN, **inputs}
    q, blocks = torch.zeros(inputs.pop("shape")), inputs.pop("blocks")
    assert mlr_backend(q, q, q, blocks, **inputs) == auto
    assert mlr_backend(q, q, q, blocks, backend="dense", **inputs) == "dense"
    if refusal:
        with pytest.raises(BadInput) as error:
            mlr_backend(q, q, q, blocks, backend="blockwise", **inputs)
        assert refusal in str(error.value)
    else:
        assert mlr_backend(q, q, q, blocks, backend="blockwise", **inputs) == "blockwise"
    if inputs:
        assert window_backend(q, q, q, **inputs) == "dense"
        with pytest.raises(BadInput, match="takes the dense path"):
            window_backend(q, q, q, backend="blockwise", **inputs)


def test_paths_that_need_another_device(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q = torch.zeros(2, 4, 256, 16)
    with pytest.raises(BadInput, match=r"backend 'triton': .* q is on cpu"):
        mlr_attention(q, q, q, (8, 8), (256, 64), backend="triton")
    with pytest.raises(BadInput, match=r"backend 'flex': .* q is on cpu"):
        window_attention(q, q, q, 8, scale=1.0, backend="flex")
    assert window_backend(q, q, q) == "blockwise"


def test_unknown_backends():
    q = torch.zeros(2, 4, 8, 16)
    with pytest.raises(BadInput, match="'flex' for mlr attention, there are auto, triton, blockwise, dense"):
        mlr_attention(q, q, q, (8, 8), (8, 4), backend="flex")
    with pytest.raises(BadInput, match="'fast' for window attention, there are auto, flex, blockwise, dense"):
        gswa_attention(q, q, q, (8, 8), 4, backend="fast")
    common = dict(d_model=16, n_head=2, block_size=16, ranks=(4, 4), window=4)
    for structure, backend, words in [
        ("low_rank", "fast", "no attention_backend 'fast', there are auto, triton, blockwise, dense, flex"),
        ("multi_level_low_rank", "flex", "for mlr attention"),
        ("low_rank_with_sliding_window", "triton", "for window attention"),
    ]:
        with pytest.raises(BadInput, match=words):
            ScoringConfig(structure=structure, backend=backend, **common)


@pytest.mark.parametrize("structure", ["multi_level_low_rank", "low_rank_with_sliding_window", "low_rank_with_gswa"])
def test_a_setting_chooses_the_path(structure, monkeypatch):
    taken = []
    for name in ("mlr_attention", "window_attention"):
        function = getattr(blockwise, name)
        monkeypatch.setattr(blockwise, name, lambda *x, f=function, **kw: (taken.append(f), f(*x, **kw))[1])
    outs = []
    for backend in ("dense", "blockwise"):
        settings = train.Settings(
            token_mixing_struct=structure, d_model=16, n_head=2, n_layer=1, block_size=64, mlr_rank_list="4|2|2",
            gswa_rank_list="4|4", sliding_block_size=8, attention_backend=backend,
        )  # fmt: skip
        torch.manual_seed(0)
        scoring = build_scoring(settings.model_config().scoring)
        outs.append(scoring(torch.randn(1, 64, 16), torch.randn(1, 2, 64, 8)))
        assert len(taken) == (backend == "blockwise")
    assert_same(*([out] for out in outs), ["out"], 2e-5)


@CAUSAL
@pytest.mark.parametrize(("T", "window"), [(100, 10), (128, 0), (513, 127), (640, 128), (700, 300), (300, 1000)])
def test_the_mask_for_flex_attention(T, window, causal):
    after = 0 if causal else window
    ours = flex_mask(T, window, after, torch.device("cpu"))
    visible = reference.window_pairs(T, window, causal)
    i, j = reference.positions(T)
    assert torch.equal(ours.mask_mod(0, 0, i, j).expand(T, T), visible)
    theirs = create_block_mask(ours.mask_mod, None, None, T, T, device="cpu")
    assert ours.shape == theirs.shape
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert torch.equal(ours.to_dense(), theirs.to_dense())


@pytest.mark.filterwarnings("ignore")
def test_flex_attention_with_this_mask():
    q, k, v = qkv(300, 16, d_value=16)
    mask = flex_mask(300, 40, 0, q.device)
    out = flex_attention(q, k, v, block_mask=mask, scale=0.3, enable_gqa=True)
    assert_same([out], [reference.window_attention(q, k, v, 40, scale=0.3)], ["out"])
