"""One graph for every length: compiled with symbolic shapes, exported with any batch and length, as eager code."""

import pytest
import torch
from compare import relative_error
from torch._dynamo.utils import counters

from model import GPT, ModelConfig
from structured import (
    BadInput,
    ScoringConfig,
    attention,
    gswa_attention,
    kernels,
    mlr_attention,
    operators,
    window_attention,
)

LEVELS = ((4, 2, 2), (512, 128, 32))
FUNCTIONS = {
    "standard": lambda *x: attention(*x, scale=0.3),
    "window": lambda *x: window_attention(*x, 20, scale=0.3),
    "gswa": lambda *x: gswa_attention(*x, (4, 4), 20),
    "mlr": lambda *x: mlr_attention(*x, *LEVELS, weighting="shared"),
    "mlr, blocks that do not nest": lambda *x: mlr_attention(*x, (4, 2, 2), (512, 100, 30)),
    "mlr, identity link": lambda *x: mlr_attention(*x, *LEVELS, link="identity"),
}
LENGTHS = (100, 191, 192, 50, 333)
STRUCTURES = ("low_rank", "low_rank_with_sliding_window", "low_rank_with_gswa", "multi_level_low_rank", "bilinear_BTT")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def qkv(T, B=2, dtype=torch.float64, device="cpu"):
    g = torch.Generator().manual_seed(T)
    shapes = (B, 2, T, 8), (B, 1, T, 8), (B, 1, T, 5)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(device, dtype).requires_grad_() for s in shapes]


def both(f, x):
    out = f(*x)
    return [out, *torch.autograd.grad(out.sin().sum(), x)]


def check(compiled, f, x, tolerance=1e-9):
    for got, want in zip(both(compiled, x), both(f, x), strict=True):
        assert relative_error(got, want) < tolerance


def compiled_anew(f, dynamic):
    """(f compiled, a list with how many graphs each call made).

    Eager window attention on a GPU compiles FlexAttention, which torch counts, too: calls of f itself are left out.
    """
    torch.compiler.reset()
    counters.clear()
    compiled, made = torch.compile(f, backend="aot_eager", dynamic=dynamic, fullgraph=True), []

    def counted(*inputs):
        before = counters["stats"]["unique_graphs"]
        out = compiled(*inputs)
        made.append(counters["stats"]["unique_graphs"] - before)
        return out

    return counted, made


@pytest.mark.parametrize(("dynamic", "graphs"), [(True, 1), (None, 2)], ids=["dynamic", "by itself"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_graph_for_five_lengths(name, dynamic, graphs):
    """`dynamic=None`: the second length makes a graph for all that follow."""
    compiled, made = compiled_anew(FUNCTIONS[name], dynamic)
    for T in LENGTHS:
        check(compiled, FUNCTIONS[name], qkv(T))
    assert sum(made) == graphs


@pytest.mark.skipif(kernels.mlr is None, reason="Triton is not installed: make interpreter")
@pytest.mark.parametrize("backend", ["triton", "blockwise"])
def test_one_graph_of_a_path_asked_for(backend, monkeypatch):
    """And blocks that this path does not take at a length are refused when that length comes."""
    if DEVICE == "cpu":
        small = kernels.mlr.Launch(16, 16, 4, 1, None)
        names = ("forward", "backward_q", "backward_kv")
        monkeypatch.setattr(kernels.mlr, "launches", lambda *_: dict.fromkeys(names, small))
    device = DEVICE if backend == "triton" else "cpu"

    def attend(*x):
        return mlr_attention(*x, (4, 4), (64, 24), backend=backend)

    compiled, made = compiled_anew(attend, True)
    for T in (10, 24):
        check(compiled, attend, qkv(T, dtype=torch.float32, device=device), 1e-5)
    assert sum(made) == 1
    with pytest.raises(BadInput, match="64 is not a multiple of 24"):
        compiled(*qkv(70, dtype=torch.float32, device=device))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_graph_on_a_gpu(name, dtype):
    def wide(T):
        g = torch.Generator().manual_seed(T)
        sizes = [(2, heads, T, 32) for heads in (2, 1, 1)]
        return [torch.randn(size, generator=g).to(DEVICE, dtype).requires_grad_() for size in sizes]

    of_wide = {
        "gswa": lambda *x: gswa_attention(*x, (16, 16), 20),
        "mlr": lambda *x: mlr_attention(*x, (16, 8, 8), (512, 128, 32), weighting="shared"),
        "mlr, blocks that do not nest": lambda *x: mlr_attention(*x, (16, 8, 8), (512, 100, 30)),
        "mlr, identity link": lambda *x: mlr_attention(*x, (16, 8, 8), (512, 128, 32), link="identity"),
    }
    f = of_wide.get(name, FUNCTIONS[name])
    compiled, made = compiled_anew(f, True)
    for T in LENGTHS:
        check(compiled, f, wide(T), 1e-4 if dtype == torch.float32 else 3e-2)
    assert sum(made) <= 2


class Module(torch.nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, q, k, v):
        return self.f(q, k, v)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_exported_for_any_batch_and_length(name):
    sizes = {0: torch.export.Dim("B"), 2: torch.export.Dim("T", max=512)}
    example = tuple(x.detach() for x in qkv(100, 3))
    program = torch.export.export(Module(FUNCTIONS[name]), example, dynamic_shapes=(sizes,) * 3).module()
    for T, B in ((100, 2), (191, 5), (192, 3), (400, 4)):
        x = [y.detach() for y in qkv(T, B)]
        assert relative_error(program(*x), FUNCTIONS[name](*x)) < 1e-9


def gpt(structure):
    torch.manual_seed(0)
    scoring = ScoringConfig(
        structure, d_model=16, n_head=2, block_size=512, ranks=(4, 2, 2), window=20, gswa_ranks=(4, 4)
    )
    model = GPT(ModelConfig(scoring, n_layer=1), vocab_size=11).double().eval()
    for p in model.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("structure", STRUCTURES[:4])
def test_a_model_is_one_graph(structure):
    model = gpt(structure)
    compiled, made = compiled_anew(model, True)
    parameters = list(model.parameters())
    for T in LENGTHS:
        idx = torch.randint(11, (2, T))
        losses = [f(idx, idx)[1] for f in (compiled, model)]
        for got, want in zip(*(torch.autograd.grad(loss, parameters) for loss in losses), strict=True):
            assert relative_error(got, want) < 1e-9
    assert sum(made) == 1


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_model_exported_for_any_batch_and_length(structure):
    model = gpt(structure)
    sizes = {0: torch.export.Dim("B"), 1: torch.export.Dim("T", max=512)}
    program = torch.export.export(model, (torch.zeros(3, 100, dtype=int),), dynamic_shapes=dict(idx=sizes)).module()
    for T, B in ((100, 2), (191, 5), (192, 3), (400, 4)):
        idx = torch.randint(11, (B, T))
        assert relative_error(program(idx), model(idx)) < 1e-9


@pytest.mark.parametrize("path", ["auto", "blockwise", "dense"])
def test_operators_that_pytorch_knows(path):
    """Shapes, memory layouts and gradients are as registered; two checks cannot look into the dense path."""
    q, k, v = qkv(200)
    k = k.detach().mT.contiguous().mT.requires_grad_()
    tests = ["test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic"]
    geometry = ([4, 2, 2], [512, 128, 32], "shared", True, path)
    out, lse = operators.mlr_operator(q, k, v, *geometry)
    gradients = q, k, v, out.detach(), lse.detach(), torch.randn_like(out)
    torch.library.opcheck(operators.mlr_operator, (q, k, v, *geometry), test_utils=tests)
    some = tests[2 * (path == "dense") : -1]
    torch.library.opcheck(operators.mlr_backward_operator, (*gradients, *geometry), test_utils=some)
    torch.library.opcheck(operators.window_operator, (q, k, v, 20, 0.3, True), test_utils=tests)


def test_the_operators_have_one_namespace():
    names = {str(op) for op in torch._C._dispatch_get_all_op_names()}
    assert any(name.startswith("structured::") for name in names)
    assert not any(name.startswith("structured_attention::") for name in names)
