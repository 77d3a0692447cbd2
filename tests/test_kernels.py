"""The fused kernels against the definitions: in Triton's interpreter on the CPU, compiled where there is a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compare import relative_error, with_gradients

pytest.importorskip("triton", reason="Triton is not installed: make interpreter")

from structured import BadInput, default_block_sizes, kernels, mlr_attention, operators, reference
from structured.kernels import mlr

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("out", "dq", "dk", "dv")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
if DEVICE == "cpu":
    del TOLERANCE[torch.bfloat16]  # the interpreter's products of bfloat16 are wrong
SMALL = mlr.Launch(16, 16, 4, 1, None)


def qkv(T, width, d_value=16, *, B=1, n_head=2, kv_heads=2, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(B, T, n_head, width), (B, T, kv_heads, width), (B, T, kv_heads, d_value)]
    return [torch.randn(s, generator=g, dtype=torch.float64).to(DEVICE, dtype).transpose(1, 2) for s in shapes]


def check(inputs, ranks, blocks, tolerance=None, **options):
    got = with_gradients(lambda *x: mlr_attention(*x, ranks, blocks, backend="triton", **options), inputs)
    exact = [x.detach().cpu().double() for x in inputs]
    want = with_gradients(lambda *x: reference.mlr_attention(*x, ranks, blocks, **options), exact)
    tolerance = tolerance or TOLERANCE[inputs[0].dtype]
    for name, g, w in zip(NAMES, got, want, strict=True):
        assert g.shape == w.shape, name
        error = relative_error(g.cpu(), w)
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 positions, so that short sequences have far runs, near tiles and several classes."""

    def use(launch=SMALL):
        monkeypatch.setattr(mlr, "launches", lambda *_: dict.fromkeys(("forward", "backward_q", "backward_kv"), launch))

    if DEVICE == "cpu":
        use()
    return use


CASES = {  # T, ranks, block sizes
    "default": (64, (8, 4, 2, 2), (64, 32, 16, 8)),
    "shorter than block_size": (50, (8, 4, 4), (64, 32, 16)),
    "every level finer than a tile": (40, (8, 8), (8, 4)),
    "one level": (33, (16,), (64,)),
    "one token": (1, (8, 4, 4), (16, 8, 4)),
    "features that fill no chunk": (70, (20, 8, 8), (64, 32, 8)),
    "three chunks": (70, (16, 40, 12, 12), (128, 64, 32, 8)),
    "blocks that tiles do not divide": (70, (12, 8, 4), (66, 33, 11)),
    "blocks that do not halve": (72, (4, 8, 4), (72, 24, 3)),
    "a jump from far to near": (70, (8, 8), (96, 2)),
    "empty levels": (50, (0, 16, 0), (64, 32, 16)),
    "not everything meets": (60, (8, 8), (32, 8)),
}


OPTIONS = [("shared", True), ("none", False)]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("weighting", "causal"), OPTIONS)
@pytest.mark.parametrize("case", CASES)
def test_against_the_definition(case, weighting, causal):
    T, ranks, blocks = CASES[case]
    rounding = 2e-4 if T == 1 else None  # where dq and dk are 0
    check(qkv(T, sum(ranks)), ranks, blocks, rounding, weighting=weighting, causal=causal)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("causal", [True, False])
def test_scores_times_one_over_levels(causal):
    check(qkv(50, 16), (8, 4, 4), (64, 32, 8), weighting="levels", causal=causal)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("weighting", "causal"), OPTIONS)
def test_grouped_heads_and_dtypes(weighting, causal, dtype):
    inputs = qkv(53, 24, n_head=4, kv_heads=2, dtype=dtype)
    check(inputs, (12, 8, 4), (64, 32, 4), weighting=weighting, causal=causal)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("ranks", "d_value"), [((3, 2), 5), ((20, 10, 7), 24), ((16, 16, 16), 33), ((64, 40, 24), 128)]
)
def test_widths(ranks, d_value):
    check(qkv(37, sum(ranks), d_value, n_head=1, kv_heads=1), ranks, (64, 32, 16)[: len(ranks)], weighting="shared")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("mapped", [(0, 0, 0), (1, 0, None)], ids=str)
def test_mapped_over_models(mapped):
    """torch.vmap, as packs of runs use it: q, k and v of three models, or one v for all."""
    models = [qkv(37, 16, B=2, seed=seed) for seed in range(3)]
    tensors = zip(zip(*models, strict=True), mapped, strict=True)
    stacked = [same[0] if dim is None else torch.stack(same, dim) for same, dim in tensors]

    def one(*x):
        return mlr_attention(*x, (8, 4, 4), (64, 32, 16), weighting="shared", backend="triton")

    def one_by_one(*x):
        parts = [[t if dim is None else t.select(dim, n) for t, dim in zip(x, mapped, strict=True)] for n in range(3)]
        return torch.stack([one(*part) for part in parts])

    got = with_gradients(torch.vmap(one, in_dims=mapped), stacked)
    for name, g, w in zip(NAMES, got, with_gradients(one_by_one, stacked), strict=True):
        assert relative_error(g, w) <= 1e-6, name


@pytest.mark.parametrize(("BM", "BN"), [(16, 32), (32, 16)])
@pytest.mark.parametrize("causal", [True, False])
def test_tiles_that_are_not_square(BM, BN, causal, small_tiles):
    small_tiles(mlr.Launch(BM, BN, 4, 1, None))
    check(qkv(90, 16, n_head=1, kv_heads=1), (8, 4, 4), (128, 32, 8), weighting="shared", causal=causal)


def test_the_tiles_that_are_used():
    check(qkv(200, 64, 64, n_head=1, kv_heads=1, dtype=torch.float16), (32, 16, 16), (256, 128, 32), weighting="shared")


@pytest.mark.skipif(DEVICE == "cpu", reason="compiled kernels need a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("ranks", [(32, 8, 6, 4, 4, 4, 4, 2), (8,) * 8, (64, 64), (24, 12, 4)], ids=str)
@pytest.mark.parametrize("T", [53, 256, 512, 1000, 1024, 2100, 4096])
def test_compiled(T, ranks, dtype):
    """Each length is another kernel: other levels are coarser than a tile."""
    blocks = default_block_sizes(max(2 ** (T - 1).bit_length(), 128), len(ranks))
    inputs = qkv(T, sum(ranks), 16 if len(ranks) == 3 else 64, n_head=2, kv_heads=1 if T == 1000 else 2, dtype=dtype)
    check(inputs, ranks, blocks, weighting="shared", causal=T != 256)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("scale", [3.0, 20.0])
def test_far_scores_much_larger_than_near_ones(scale, dtype):
    """The near tiles fix the maximum; where far scores leave the range above it, the running maximum takes over."""
    q, k, v = qkv(48, 16, n_head=1, kv_heads=1, dtype=torch.float64)
    q[..., 0], k[..., 0] = scale, 1.0
    k[:, :, 9, 0] = 4 * scale  # one key that all later queries look at
    inputs = [x.to(dtype) for x in (q, k, v)]
    check(inputs, (8, 8), (64, 16), weighting="none", tolerance=5 * TOLERANCE[dtype])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_the_rows_that_see_it(bad):
    q, k, v = qkv(40, 16, n_head=2, kv_heads=2)
    q[0, 0, 7, 3] = bad
    k[0, 1, 20, 5] = bad
    out = mlr_attention(q, k, v, (8, 8), (64, 16), weighting="shared", backend="triton")
    rows = out.isfinite().all(-1)[0]
    assert not rows[0, 7]
    assert rows[0].sum() == 39
    assert rows[1, :20].all()


@pytest.mark.usefixtures("small_tiles")
def test_any_strides():
    """What a descriptor cannot take is copied: features apart, rows not on 16 bytes, an expanded head."""
    q, k, v = qkv(30, 16, n_head=2, kv_heads=2)
    options = dict(weighting="shared", backend="triton")
    want = mlr_attention(q, k, v, (8, 8), (32, 16), **options)
    apart = q.transpose(2, 3).contiguous().transpose(2, 3)
    odd = torch.cat([k, k[..., :1]], -1)[..., :16]
    assert torch.equal(mlr_attention(apart, odd, v, (8, 8), (32, 16), **options), want)
    one = q[:, :1].expand(-1, 2, -1, -1)
    assert torch.equal(
        mlr_attention(one, k, v, (8, 8), (32, 16), **options),
        mlr_attention(one.contiguous(), k, v, (8, 8), (32, 16), **options),
    )


@pytest.mark.usefixtures("small_tiles")
def test_an_operator_that_pytorch_knows():
    """Shapes, strides and gradients as registered; under torch.compile one node, no graph break."""
    q, k, v = (x.requires_grad_() for x in qkv(20, 16, 12, n_head=2, kv_heads=1))
    torch.library.opcheck(operators.mlr_operator, (q, k, v, (8, 8), (32, 16), "shared", True, "triton"))

    def attend(q, k, v):
        return mlr_attention(q, k, v, (8, 8), (32, 16), weighting="shared", backend="triton").square()

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    for got, want in zip(with_gradients(compiled, (q, k, v)), with_gradients(attend, (q, k, v)), strict=True):
        assert torch.equal(got, want)


@pytest.mark.usefixtures("small_tiles")
def test_autocast():
    q, k, v = qkv(20, 16)
    want = mlr_attention(q.half(), k.half(), v.half(), (8, 8), (32, 16), backend="triton")
    with torch.autocast(DEVICE, torch.float16):
        got = mlr_attention(q, k, v.half(), (8, 8), (32, 16), backend="triton")
    assert got.dtype == torch.float16
    assert torch.equal(got, want)


def test_no_rows():
    out = mlr_attention(*qkv(0, 16), (8, 8), (32, 16), backend="triton")
    assert out.shape == (1, 2, 0, 16)


@pytest.mark.parametrize(
    ("ranks", "blocks", "T", "want", "far"),
    [
        ((32, 8, 6, 4, 4, 4, 4, 2), default_block_sizes(1024, 8), 1024, [1024, 512, 256, 128, 64, 32, 16, 8], 4),
        ((8, 8), (1024, 32), 1024, [1024, 64, 32], 1),  # an entry of one tile keeps the near tiles few
        ((8, 8, 8), (1000, 500, 250), 1000, [mlr.EVERYTHING, 8000, 500, 250], 1),
        ((8, 8), (512, 64), 2000, [mlr.EVERYTHING, 512, 64], 2),  # pairs in no common block score 0
    ],
)
def test_entries(ranks, blocks, T, want, far):
    entries, first_near = mlr.level_entries(ranks, blocks, "shared", T, 64)
    assert [block for block, *_ in entries] == want
    assert first_near == far


def test_chunks_hold_all_features_and_suit_the_ranks():
    entries, far = mlr.level_entries((32, 8, 6, 4, 4, 4, 4, 2), default_block_sizes(4096, 8), "shared", 4096, 64)
    assert mlr.chunk_widths(entries, far, 64, 4096) == (32, 32)
    for width in range(1, 129):
        assert sum(mlr.chunk_widths(entries[:1], 0, width, 4096)) == width + -width % 32


def test_the_compiler_takes_the_kernels():
    """In a process of its own, because here Triton interprets."""
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("compiled") == 6


def test_the_assembler_is_one_that_gets_the_kernels_right():
    assert tuple(int(n) for n in mlr.assembler().version.split(".")) >= (12, 9)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q, k, v: (q.double(), k.double(), v.double()), "float64, float64, float64"),
        (lambda q, k, v: (q, k.half(), v), "float32, float16, float32"),
        (lambda q, k, v: (q, k, v.repeat(1, 1, 1, 9)), "up to 128 wide, not 144"),
    ],
)
def test_refusals(change, words):
    with pytest.raises(BadInput, match=words):
        mlr_attention(*change(*qkv(8, 16)), (8, 8), (32, 16), backend="triton")


def test_refuses_blocks_that_do_not_nest():
    with pytest.raises(BadInput, match="multiple"):
        mlr_attention(*qkv(40, 16), (8, 8), (24, 10), backend="triton")


def test_refuses_without_a_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q, k, v = (x.cpu() for x in qkv(8, 16))
    assert "needs a CUDA device; q is on cpu" in kernels.mlr_refusal(q, k, v)
