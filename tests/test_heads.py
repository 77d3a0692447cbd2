"""Queries, keys and values of one product, normed head by head by a kernel of their own: against the definition."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from compare import relative_error
from torch._dynamo.backends.debugging import aot_eager
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("triton", reason="Triton is not installed: make interpreter")

from model import GPT, ModelConfig
from structured import ScoringConfig, build_scoring, kernels, transforms
from structured.kernels import heads
from structured.layers import Linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
EPS = 1e-5
CASES = {  # B, T, n_head, kv_heads, width, features of a value
    "odd": (2, 37, 3, 3, 16, 16),
    "one token": (1, 1, 2, 2, 8, 8),
    "grouped, widths that differ": (2, 21, 6, 2, 12, 20),
    "heads of 64": (1, 70, 2, 2, 64, 64),
}


def definition(qkv, query_weight, key_weight, layout):
    """Cut apart, then two LayerNorms."""
    n_head, kv_heads, width = layout
    q, k, v = qkv.split([n_head * width, kv_heads * width, qkv.shape[-1] - layout.values_from], -1)
    q, k, v = (x.unflatten(-1, (n, -1)).transpose(1, 2) for x, n in ((q, n_head), (k, kv_heads), (v, kv_heads)))
    return F.layer_norm(q, (width,), query_weight, eps=EPS), F.layer_norm(k, (width,), key_weight, eps=EPS), v


def kernel(qkv, query_weight, key_weight, layout):
    return heads.NormedHeads.apply(qkv, query_weight, key_weight, layout, EPS)


def example(case, dtype=torch.float32):
    """(inputs, layout) with rows far from mean 0 and deviation 1."""
    B, T, n_head, kv_heads, width, d_value = CASES[case]
    g = torch.Generator().manual_seed(T)
    qkv = 3 * torch.randn(B, T, (n_head + kv_heads) * width + kv_heads * d_value, generator=g) + 1
    weights = (1 + torch.rand(width, generator=g) for _ in range(2))
    return [x.to(DEVICE, dtype) for x in (qkv, *weights)], heads.Layout(n_head, kv_heads, width)


def with_gradients(function, inputs, layout):
    """Outputs and gradients, those of the outputs lying in memory in three different orders."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    q, k, v = function(*inputs, layout)
    g = torch.Generator().manual_seed(1)
    dq, dk, dv = (torch.randn(x.shape, generator=g, dtype=torch.float64).to(x) for x in (q, k, v))
    grads = dq, dk.transpose(1, 2).contiguous().transpose(1, 2), dv.mT.contiguous().mT
    return [q, k, v, *torch.autograd.grad((q, k, v), inputs, grads)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_against_the_definition(case, dtype):
    inputs, layout = example(case, dtype)
    got = with_gradients(kernel, inputs, layout)
    want = with_gradients(definition, [x.double() for x in inputs], layout)
    for name, g, w in zip(("q", "k", "v", "dqkv", "dquery_weight", "dkey_weight"), got, want, strict=True):
        assert (g.dtype, g.shape) == (dtype, w.shape), name
        assert relative_error(g.cpu(), w.cpu()) <= TOLERANCE[dtype], name


def test_programs_that_take_several_tiles(monkeypatch):
    """Nine tiles for three programs; the same bits every time."""
    inputs, layout = example("heads of 64")
    monkeypatch.setattr(heads, "ROWS", 16)
    monkeypatch.setattr(heads, "FORWARD", 3)
    monkeypatch.setattr(heads, "BACKWARD", 3)
    first, second = (with_gradients(kernel, inputs, layout) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    want = with_gradients(definition, [x.double() for x in inputs], layout)
    assert all(relative_error(g.cpu(), w.cpu()) <= 2e-6 for g, w in zip(first, want, strict=True))


def test_no_rows():
    (qkv, *weights), layout = example("odd")
    outs = with_gradients(kernel, [qkv[:0], *weights], layout)
    assert outs[3].shape == (0, *qkv.shape[1:])
    assert not torch.cat(outs[4:]).any()


@pytest.mark.parametrize("case", ["odd", "grouped, widths that differ"])
def test_products_and_gradients_of_any_strides(case):
    """Features apart, a slice of something wider, weights of every other number, gradients that are one number."""
    (qkv, *weights), layout = example(case)
    want = with_gradients(definition, [x.double() for x in (qkv, *weights)], layout)
    weights = [w.repeat_interleave(2)[::2] for w in weights]
    for laid_out in (qkv.mT.contiguous().mT, torch.cat([qkv, qkv], -1)[..., : qkv.shape[-1]]):
        for g, w in zip(with_gradients(kernel, [laid_out, *weights], layout), want, strict=True):
            assert relative_error(g.cpu(), w.cpu()) <= 2e-6
    qkv.requires_grad_()
    outs = [sum(y.sum() for y in f(qkv, *weights, layout)) for f in (kernel, definition)]
    got, want = (torch.autograd.grad(out, qkv)[0] for out in outs)
    assert (got - want).abs().max() < 1e-4


def test_gradients_have_derivatives():
    """Those of the definition; and a batch of cotangents at once."""
    inputs, layout = example("odd")
    found = []
    for f in (kernel, definition):
        x = [y.detach().clone().requires_grad_() for y in inputs]
        out = torch.cat([y.flatten() for y in f(*x, layout)]).sin()
        first = torch.autograd.grad(out.sum(), x, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), x, retain_graph=True)
        cotangents = torch.stack([out, out.cos()]).detach()
        batch = torch.autograd.grad(out, x, cotangents, is_grads_batched=True)
        found.append([*first, *second, *batch])
    for got, want in zip(*found, strict=True):
        assert relative_error(got, want) < 1e-5


def test_operators_that_pytorch_knows():
    (qkv, *weights), layout = example("grouped, widths that differ")
    grads = [torch.randn_like(x) for x in definition(qkv, *weights, layout)]
    for operator, tensors in ((heads.forward_operator, ()), (heads.backward_operator, grads)):
        checked = torch.library.opcheck(operator, (qkv, *weights, *tensors, list(layout), EPS))
        assert checked["test_faketensor"] == "SUCCESS"
        assert set(checked.values()) == {"SUCCESS"}


BASE = ScoringConfig("low_rank", d_model=24, n_head=3, block_size=32)
STRUCTURES = {
    "low_rank": dict(n_kv_head=1, bias=True),
    "multi_level_low_rank": dict(ranks=(4, 2, 2), weighting="levels"),
    "low_rank_with_sliding_window": dict(window=5),
    "low_rank_with_gswa": dict(gswa_ranks=(4, 4), window=5),
}


def attend(scoring, value, x, together, monkeypatch, compiled=False):
    """Output and gradients of `mix`, by the kernel or not."""
    monkeypatch.setattr(kernels, "norms_heads", lambda x: together)
    scoring.zero_grad(), value.zero_grad()
    x = x.clone().requires_grad_()
    mix = torch.compile(scoring.mix, backend="aot_eager", fullgraph=True) if compiled else scoring.mix
    out = mix(x, value)
    out.square().sum().backward()
    return [out, x.grad, *(p.grad.clone() for p in (*scoring.parameters(), *value.parameters()))]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_mixing_is_the_same_with_it(structure, compiled, monkeypatch):
    torch.manual_seed(0)
    cfg = dataclasses.replace(BASE, structure=structure, **STRUCTURES[structure])
    scoring = build_scoring(cfg).to(DEVICE)
    value = Linear(24, cfg.kv_heads * 8, role="hidden", bias=cfg.bias).to(DEVICE)
    x = torch.randn(2, 32, 24, device=DEVICE)
    torch.compiler.reset()
    got = attend(scoring, value, x, True, monkeypatch, compiled)
    want = attend(scoring, value, x, False, monkeypatch)
    for g, w in zip(got, want, strict=True):
        assert relative_error(g, w) < 1e-5
    plain = scoring(x, value(x).unflatten(-1, (cfg.kv_heads, 8)).transpose(1, 2))
    assert relative_error(got[0], plain) < 1e-5


@pytest.mark.parametrize(("own", "values"), [(False, True), (True, False)])
def test_a_bias_that_only_some_have(own, values, monkeypatch):
    torch.manual_seed(0)
    scoring = build_scoring(dataclasses.replace(BASE, bias=own)).to(DEVICE)
    value = Linear(24, 24, role="hidden", bias=values).to(DEVICE)
    for p in (*scoring.parameters(), *value.parameters()):
        torch.nn.init.normal_(p)
    x = torch.randn(2, 32, 24, device=DEVICE)
    got, want = (attend(scoring, value, x, together, monkeypatch) for together in (True, False))
    for g, w in zip(got, want, strict=True):
        assert relative_error(g, w) < 1e-5


@pytest.fixture
def one_process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process_group")
def test_in_a_compiled_network_that_is_cut_into_buckets(monkeypatch):
    """DistributedDataParallel has compiled networks cut where gradients are to be sent."""
    torch.manual_seed(0)
    scoring = dataclasses.replace(BASE, d_model=128, n_head=2)
    model = GPT(ModelConfig(scoring, n_layer=6), vocab_size=11).to(DEVICE)
    parts = []

    def backend(graph, inputs):
        parts.append(graph)
        return aot_eager(graph, inputs)

    network = DistributedDataParallel(torch.compile(model, backend=backend), bucket_cap_mb=1)
    tokens = torch.randint(11, (2, 32), device=DEVICE)
    losses, gradients = [], []
    for together in (True, False):
        monkeypatch.setattr(kernels, "norms_heads", lambda x, together=together: together)
        torch.compiler.reset()
        model.zero_grad()
        losses.append(network(tokens, tokens)[1])
        losses[-1].backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert len(parts) > 2  # of two networks
    torch.testing.assert_close(*losses)
    for got, want in zip(*gradients, strict=True):
        assert relative_error(got, want) < 1e-4


def test_without_norms_there_is_nothing_to_do(monkeypatch):
    monkeypatch.setattr(kernels, "norms_heads", lambda x: True)
    scoring = build_scoring(dataclasses.replace(BASE, qk_norm=False))
    value = Linear(24, 24, role="hidden")
    x = torch.randn(1, 5, 24)
    want = scoring(x, value(x).unflatten(-1, (3, 8)).transpose(1, 2))
    assert torch.equal(scoring.mix(x, value), want)


class OnTheGPU:
    """What `norms_heads` asks of a tensor."""

    def __init__(self, dtype, is_cuda=True):
        self.dtype, self.is_cuda = dtype, is_cuda


def test_where_it_is_taken(monkeypatch):
    taken = {dtype: kernels.norms_heads(OnTheGPU(dtype)) for dtype in (torch.bfloat16, torch.float16, torch.float32)}
    assert taken == {torch.bfloat16: True, torch.float16: True, torch.float32: False}
    assert not kernels.norms_heads(OnTheGPU(torch.bfloat16, is_cuda=False))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    assert kernels.norms_heads(OnTheGPU(torch.float32))
    for name, answer in (("mapped", True), ("derivatives", "forward")):
        with monkeypatch.context() as patch:
            patch.setattr(transforms, name, lambda answer=answer: answer)
            assert not kernels.norms_heads(OnTheGPU(torch.bfloat16)), name
