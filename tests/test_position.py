"""Where tokens are: learned vectors, rotary embeddings, ALiBi or nothing, in every path, in the caches, in runs."""

import dataclasses
import functools
import hashlib
import math
import re

import pytest
import torch
from compare import assert_same, relative_error, with_gradients
from runs import EXAMPLES, TINY_ICL, TINY_LM, assert_same_run, checkpoint, flags, record, stops
from torch.utils.flop_counter import FlopCounterMode

import sample
import train
import train_ICL
from model import GPT, Forecaster, ModelConfig
from structured import STRUCTURES, BadInput, ScoringConfig, attention, build_scoring, kernels, reference
from structured.cache import KeyCache
from structured.position import ALIBI_UP_TO, COLUMNS, ALiBi, Rotary, slopes
from training.mup import adamw, initialise

MLR = "multi_level_low_rank"
WINDOW, GSWA, SEQUENTIAL = (f"low_rank_with_{name}" for name in ("sliding_window", "gswa", "sequential_gswa"))
BASE = ScoringConfig("low_rank", d_model=24, n_head=3, block_size=16, **EXAMPLES | dict(ranks=(4, 2, 2)))
CHANGES = [  # structure, what differs from BASE
    ("low_rank", {}),
    ("low_rank", dict(n_kv_head=1)),
    ("low_rank", dict(d_qk_head=6)),  # a scale that is no power of two
    ("low_rank", dict(scale_sp=True, d_qk_head=2, n_head=12)),  # slopes that are none
    ("low_rank", dict(qk_norm=False, bias=True)),
    (WINDOW, {}),
    (WINDOW, dict(n_kv_head=1, d_qk_head=10)),
    (SEQUENTIAL, {}),
    (SEQUENTIAL, dict(layer_kinds=("SWA", "MHA"))),
    (MLR, {}),
    (MLR, dict(weighting="levels")),
    (MLR, dict(weighting="shared")),
    (MLR, dict(weighting="shared", n_kv_head=1, n_head=6, ranks=(2, 2))),
    (MLR, dict(weighting="shared", block_sizes=(16, 7, 3))),
    (MLR, dict(weighting="shared", ranks=(6, 0, 2))),
    (MLR, dict(weighting="levels", block_sizes=(5, 9, 2))),  # not sorted, and not everything meets
    (MLR, dict(block_sizes=(8, 4, 1), n_kv_head=1)),
]
PLACED = [
    *[(structure, dict(change, position=name)) for structure, change in CHANGES for name in ("rope", "alibi")],
    *[(GSWA, dict(position="rope", gswa_ranks=ranks)) for ranks in ((6, 2), (4, 4))],
    *[(name, dict(position="rope", causal=False)) for name in ("low_rank", MLR)],
    ("low_rank", dict(position="rope", link="identity")),
]
EVERY_CASE = pytest.mark.parametrize(("structure", "change"), PLACED, ids=lambda x: x if isinstance(x, str) else str(x))
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}


def scoring(structure, **change):
    torch.manual_seed(0)
    return build_scoring(dataclasses.replace(BASE, structure=structure, **change), layer=1)


def gpt(structure, n_layer=2, **change):
    """A float64 model all of whose parts matter."""
    torch.manual_seed(0)
    cfg = dataclasses.replace(BASE, structure=structure, **change)
    model = GPT(ModelConfig(scoring=cfg, n_layer=n_layer, bias=cfg.bias), vocab_size=11).double()
    for p in model.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    return model.eval()


def tokens(B=2, T=16):
    return torch.randint(11, (B, T), generator=torch.Generator().manual_seed(1))


# Against the definition


@EVERY_CASE
@pytest.mark.parametrize("T", [1, 7, 16])
def test_outputs_and_gradients(structure, change, T):
    m = scoring(structure, **change).double()
    for p in m.parameters():
        p.data.mul_(1 + torch.rand_like(p))
    x = torch.randn(2, T, 24, dtype=torch.float64)
    v = torch.randn(2, m.cfg.kv_heads, T, m.cfg.d_head, dtype=torch.float64)
    weights = list(m.parameters())
    results = []
    for f in (m, functools.partial(getattr(reference, structure), m)):
        inputs = [y.clone().requires_grad_() for y in (x, v)]
        out = f(*inputs)
        cotangent = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
        results.append([out, *torch.autograd.grad(out, [*inputs, *weights], cotangent)])
    assert_same(*results, ["out", "dx", "dv", *(f"d {name}" for name, _ in m.named_parameters())], 1e-11)


LONG = [  # structure, settings, backends
    ("low_rank", {}, ("auto",)),
    ("low_rank", dict(n_kv_head=1, d_qk_head=12), ("auto",)),
    (WINDOW, dict(window=20), ("blockwise", "dense")),
    (GSWA, dict(window=20), ("blockwise", "dense")),
    (MLR, dict(weighting="shared"), ("blockwise", "dense")),
    (MLR, dict(weighting="shared", block_sizes=(200, 70, 10), n_kv_head=2), ("dense",)),
    (MLR, dict(block_sizes=(200, 50, 10)), ("blockwise", "dense")),
]


def heads(m, T, dtype, seed=0):
    """q, k and v as a module would place and mix them, in dtype, of strides as projections leave them."""
    g, cfg = torch.Generator().manual_seed(seed), m.cfg
    shapes = [(2, T, cfg.n_head, cfg.qk_width), (2, T, cfg.kv_heads, cfg.qk_width), (2, T, cfg.kv_heads, cfg.d_head)]
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).transpose(1, 2) for s in shapes]


def definition(m, q, k, v):
    """What `attend` of what `place` gives is, from q, k and v."""
    cfg, T = m.cfg, q.shape[2]
    if cfg.position == "rope":
        q, k = (reference.rotated(x, m.slices(cfg)) for x in (q, k))
    bias = reference.alibi_bias(cfg.n_head, T) if cfg.position == "alibi" else 0
    if cfg.structure == MLR:
        blocks = dict(ranks=cfg.ranks, block_sizes=m.block_sizes, weighting=cfg.weighting)
        return reference.mlr_attention(q, k, v, **blocks, bias=bias)
    if cfg.structure == GSWA:
        return reference.gswa_attention(q, k, v, cfg.gswa_ranks, cfg.window, scales=m.scales)
    options = dict(scale=reference.dot_scale(m, cfg.qk_width), bias=bias)
    if cfg.structure == WINDOW:
        return reference.window_attention(q, k, v, cfg.window, **options)
    return reference.attention(q, k, v, **options)


def check_long(m, T, dtype, tolerance):
    inputs = heads(m, T, dtype)
    got = with_gradients(lambda q, k, v: m.attend(*m.place(q, k), v), inputs)
    want = with_gradients(functools.partial(definition, m), [x.double() for x in inputs])
    for name, g, w in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert g.dtype == dtype, name
        assert relative_error(g, w) <= tolerance, f"{name}: {relative_error(g, w):.1e}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ["rope", "alibi"])
@pytest.mark.parametrize(("structure", "change", "backends"), LONG, ids=lambda x: x if isinstance(x, str) else str(x))
def test_every_path_and_dtype(structure, change, backends, name, dtype):
    """At lengths that nothing divides, from inputs in that dtype."""
    if structure == GSWA and name == "alibi":
        return
    for backend in backends:
        options = dict(d_model=48, block_size=200, backend=backend, ranks=(8, 4, 4), gswa_ranks=(10, 6))
        if change.get("n_kv_head") == 2:
            options |= dict(n_head=4, d_qk_head=16)
        m = scoring(structure, **options | dict(position=name) | change)
        for T in (131, 200):
            check_long(m, T, dtype, TOLERANCE[dtype])


@pytest.mark.skipif(kernels.mlr is None, reason="Triton is not installed: make interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("weighting", ["none", "levels", "shared"])
@pytest.mark.parametrize("name", ["rope", "alibi"])
def test_the_fused_kernels(name, weighting, dtype, monkeypatch):
    """They are told of further levels, and are the same."""
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled here: tests/test_kernels.py")
    small = kernels.mlr.Launch(16, 16, 4, 1, None)
    names = ("forward", "backward_q", "backward_kv")
    monkeypatch.setattr(kernels.mlr, "launches", lambda *_: dict.fromkeys(names, small))
    change = dict(ranks=(8, 4, 4), d_model=48, block_size=64, weighting=weighting)
    for more, T in ((dict(n_kv_head=1), 53), (dict(block_sizes=(64, 16, 8)), 64)):
        m = scoring(MLR, **change, **more, position=name, backend="triton")
        check_long(m, T, dtype, 2e-5 if dtype == torch.float32 else 3e-3)


@pytest.mark.skipif(kernels.heads is None, reason="Triton is not installed: make interpreter")
@pytest.mark.parametrize("name", ["rope", "alibi"])
@pytest.mark.parametrize("structure", ["low_rank", MLR])
def test_queries_and_keys_of_one_product(structure, name, monkeypatch):
    """What the fused kernel norms is placed, too."""
    m = scoring(structure, position=name, weighting="shared")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    m, value, x = m.to(device), torch.nn.Linear(24, 24, device=device), torch.randn(2, 13, 24, device=device)
    outs = []
    for together in (True, False):
        monkeypatch.setattr(kernels, "norms_heads", lambda x, together=together: together)
        outs.append(m.mix(x, value))
    assert relative_error(*outs) < 2e-5


def test_rotary_scores_depend_on_the_distance():
    rotary = Rotary((6, 0, 2), 40).double()
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).expand(-1, -1, -1, 40, -1)
    q, k = rotary(q, k)
    for part in (slice(0, 6), slice(6, 8)):
        scores = (q[..., part] @ k[..., part].mT)[0, 0]
        for back in (0, 1, 17):
            along = scores.diagonal(-back)
            assert torch.allclose(along, along[:1])
        assert not torch.allclose(scores[5, 5], scores[5, 2], rtol=1e-2)


def test_slopes():
    """Of the paper's text and of its code, which gives those for other numbers of heads."""
    assert slopes(8) == [2.0**-h for h in range(1, 9)]
    assert slopes(1) == [2**-8]
    assert slopes(12) == pytest.approx([*(2.0**-h for h in range(1, 9)), *(2.0 ** -(h + 0.5) for h in range(4))])
    for n in range(1, 40):
        assert slopes(n) == pytest.approx(reference.alibi_slopes(n))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n_head", [8, 12])
def test_what_is_exact_of_the_bias(n_head, dtype):
    """The bias that columns in this dtype add to scores, up to a number a row, all the way to 65536."""
    columns = ALiBi(n_head, (1,), scale=1 / 8)
    columns = columns.double() if dtype == torch.float64 else columns
    at = torch.tensor([0, 1, 255, 256, 257, 4095, 30_001, ALIBI_UP_TO - 1])
    zeros = torch.zeros(1, n_head, len(at), 1, dtype=dtype)
    q, k = (x.double() for x in columns(zeros, zeros, at))
    assert q.isfinite().all()
    bias = (q @ k.mT / 8)[0]
    slope = torch.tensor(reference.alibi_slopes(n_head), dtype=torch.float64)[:, None, None]
    wrong = (bias - bias[..., :1]) / slope - at.double()
    bound = {torch.float64: 0, torch.float32: 1e-9}.get(dtype, 2**-17)
    assert (wrong.abs() <= bound * at + 1e-10).all()
    if n_head <= 8:
        assert not wrong.any()


def test_scales_that_round_nothing():
    """Caches round queries times the scale to 16 bits, kernels queries over the rank: both are powers of two here."""
    for width in (5, 6, 8, 48):
        m = scoring("low_rank", d_qk_head=width, position="alibi")
        assert math.log2(m.scores_scale) % 1 == 0
        assert m.scores_scale * m.position.factor == pytest.approx(8 / width)
    for weighting in ("none", "levels", "shared"):
        m = scoring(MLR, weighting=weighting, position="alibi")
        assert math.log2(m.position.scale) % 1 == 0
        assert set(m.levels.ranks[::2] if weighting == "shared" else m.levels.ranks[:1]) == {COLUMNS}


@pytest.mark.parametrize(("structure", "weighting"), [("low_rank", "none"), (MLR, "none"), (MLR, "shared")])
@pytest.mark.parametrize("n_head", [4, 12])
@torch.no_grad()
def test_long_sequences_cost_no_precision(structure, weighting, n_head):
    """The error at T 2048 is that of the same attention without a bias, in 16 bits."""
    options = dict(d_model=16 * n_head, n_head=n_head, block_size=2048, ranks=(8, 4, 4), weighting=weighting)
    m = scoring(structure, **options, position="alibi")
    steepest = 0 if n_head == 4 else 8
    for dtype, tolerance in ((torch.float32, 3e-5), (torch.bfloat16, 3e-3)):
        q, k, v = (x[:1] for x in heads(m, 2048, dtype))
        got = m.attend(*m.place(q, k), v)[:, steepest]
        one = [x[:, [steepest]].double() for x in (q, k)]
        back = torch.arange(2048)[:, None] - torch.arange(2048)
        if structure == MLR:
            scores = reference.mlr_scores(*one, m.cfg.ranks, m.block_sizes, weighting)
        else:
            scores = reference.inner_products(*one) * m.scale(16)
        scores = scores - slopes(n_head)[steepest] * back
        want = scores.masked_fill(back < 0, float("-inf")).softmax(-1) @ v[:, [steepest]].double()
        assert relative_error(got, want[:, 0]) < tolerance


# Models


@EVERY_CASE
@torch.no_grad()
def test_a_cache_is_the_whole_forward_pass(structure, change):
    if not change.get("causal", True):
        return
    model, idx = gpt(structure, **change), tokens()
    want = model(idx)
    for prompt in (1, 8, 13):
        cache = model.trunk.new_cache(len(idx), 16)
        logits = [model(idx[:, :prompt], cache=cache)]
        logits += [model(idx[:, t : t + 1], cache=cache) for t in range(prompt, 16)]
        assert relative_error(torch.cat(logits, 1), want) < 1e-10, f"prompt of {prompt}"


@pytest.mark.parametrize("name", ["none", "rope", "alibi"])
@pytest.mark.parametrize("structure", ["low_rank", WINDOW, GSWA, SEQUENTIAL, MLR])
def test_generation_equals_recomputing(structure, name):
    """Also past block_size, where the context is cropped and every position moves."""
    if structure == GSWA and name == "alibi":
        return
    model, start = gpt(structure, position=name, weighting="shared"), tokens(T=3)
    texts = [model.generate(start, 17, temperature=0, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*texts)
    with pytest.raises(BadInput, match="17 tokens does not fit block_size = 16"):
        model(tokens(T=17))


@pytest.mark.parametrize("name", ["rope", "alibi"])
@pytest.mark.parametrize("structure", ["low_rank", MLR])
@torch.no_grad()
def test_a_cache_in_16_bits(structure, name):
    """Where scales are no powers of two, and at positions that 8 bits do not tell apart."""
    model = gpt(structure, position=name, weighting="shared", block_size=600, d_qk_head=6, ranks=(2, 2, 2)).float()
    idx = tokens(T=600)
    want = model(idx)[:, -20:]
    with torch.autocast("cpu", torch.bfloat16):
        whole = model(idx)[:, -20:]
        cache = model.trunk.new_cache(2, 600)
        model(idx[:, :-20], cache=cache)
        steps = torch.cat([model(idx[:, t : t + 1], cache=cache) for t in range(580, 600)], 1)
    assert relative_error(whole, want) < 0.05
    assert relative_error(steps, want) < 0.05


@pytest.mark.parametrize("name", ["rope", "alibi"])
@pytest.mark.parametrize("structure", ["low_rank", WINDOW, MLR])
def test_a_compiled_model_is_one_graph_for_every_length(structure, name):
    model = gpt(structure, position=name, weighting="shared", block_size=256)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", dynamic=True, fullgraph=True)
    parameters = list(model.parameters())
    for T in (100, 200, 50):
        idx = tokens(T=T)
        losses = [f(idx, idx)[1] for f in (compiled, model)]
        for got, want in zip(*(torch.autograd.grad(loss, parameters) for loss in losses), strict=True):
            assert relative_error(got, want) < 1e-9


@pytest.mark.parametrize("name", ["rope", "alibi"])
def test_mapped_over_models_and_exported(name):
    """As packs of runs map them, and as a program of its own."""
    model = gpt(MLR, position=name, weighting="shared")
    idx = tokens()
    stacked = {n: torch.stack([p, 2 * p]).detach() for n, p in model.named_parameters()}
    got = torch.vmap(lambda p: torch.func.functional_call(model, p, (idx,)))(stacked)
    assert relative_error(got[0], model(idx)) < 1e-10
    program = torch.export.export(model, (idx,)).module()
    assert relative_error(program(idx), model(idx)) < 1e-10


@pytest.mark.parametrize("name", ["rope", "alibi"])
def test_constants_follow_the_module(name):
    """To its device and its precision, never below float32, and into no checkpoint."""
    model = gpt(MLR, position=name)
    want = model(tokens())
    assert set(model.state_dict()) == {n for n, _ in model.named_parameters()}
    assert not list(model.buffers())
    places = [m for m in model.modules() if isinstance(m, Rotary | ALiBi)]
    assert len(places) == 2
    for change, precision in ((torch.nn.Module.bfloat16, torch.float32), (torch.nn.Module.double, torch.float64)):
        change(model)
        made = [t.dtype for place in places for n, t in vars(place).items() if n in ("turns", "parts")]
        assert made == [precision] * 2
    made = gpt(MLR, position=name)
    with torch.device("meta"):
        empty = GPT(made.trunk.cfg, vocab_size=11)
    empty = empty.to_empty(device="cpu").double()
    empty.load_state_dict(made.state_dict())
    assert torch.equal(empty.eval()(tokens()), want)


def test_position_matters_and_without_one_it_does_not():
    """With position=none and all keys in sight, an order of the tokens before is like another."""
    idx = tokens()
    shuffled = torch.cat([idx[:, torch.randperm(15)], idx[:, 15:]], 1)
    assert not torch.equal(idx, shuffled)
    none = gpt("low_rank", n_layer=1, position="none")
    assert torch.allclose(none(idx)[:, -1], none(shuffled)[:, -1])
    for name in ("learned", "rope", "alibi"):
        model = gpt("low_rank", n_layer=1, position=name)
        assert not torch.allclose(model(idx)[:, -1], model(shuffled)[:, -1], rtol=1e-3)


@pytest.mark.parametrize("name", ["none", "rope"])
def test_encoders(name):
    """Where all positions see both sides, both work; every parameter has a gradient."""
    torch.manual_seed(0)
    cfg = dataclasses.replace(BASE, structure=MLR, causal=False, position=name)
    model = Forecaster(ModelConfig(cfg, n_layer=1), n_channels=3, horizon=6)
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    model(torch.randn(2, 16, 3)).square().sum().backward()
    assert all(p.grad.any() for p in model.parameters())


# Counting


@pytest.mark.parametrize("structure", ["low_rank", MLR])
def test_what_a_model_costs(structure):
    """Learned vectors are parameters, embeddings; all other counts are the same. ALiBi's columns are not counted."""
    models = {name: gpt(structure, position=name) for name in ("learned", "none", "rope", "alibi")}
    total, rest = models["learned"].num_params()
    for name in ("none", "rope", "alibi"):
        assert models[name].num_params() == (total - 16 * 24, rest)
        assert models[name].compute(16) == models["learned"].compute(16)
        assert not any("wpe" in key for key in models[name].state_dict())
    with torch.device("meta"):
        rope = GPT(models["rope"].trunk.cfg, vocab_size=11)
        idx = torch.zeros(2, 16, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        rope(idx)
    assert counter.get_total_flops() == 2 * 2 * rope.compute(16).macs


# As before

BEFORE = {  # structure: sum of |weights| as drawn, losses of the first and the fourth step, before there was a choice
    "low_rank": ("65cc6b19c8c8", 1475.2188754731078, 2.397895574569702, 2.1080029010772705),
    WINDOW: ("65cc6b19c8c8", 1475.2188754731078, 2.397895574569702, 1.909258484840393),
    GSWA: ("65cc6b19c8c8", 1475.2188754731078, 2.397895574569702, 2.002398729324341),
    SEQUENTIAL: ("65cc6b19c8c8", 1475.2188754731078, 2.397895574569702, 2.1950840950012207),
    MLR: ("65cc6b19c8c8", 1475.2188754731078, 2.397895574569702, 2.170224189758301),
    "bilinear_MLR": ("1e3533effb40", 1635.3617722079262, 2.397895574569702, 2.1308181285858154),
    "bilinear_BTT": ("99151bd84300", 1998.4582352472062, 2.397895574569702, 2.231099843978882),
    "bilinear_MLBTC": ("99151bd84300", 1998.4582352472062, 2.397895574569702, 2.231099843978882),
}


@pytest.mark.parametrize("structure", BEFORE)
def test_learned_vectors_are_as_they_were(structure):
    """Names of the weights, their draws and training; the numbers are of commit 68f3176, where nothing else was."""
    keys, drawn, first, fourth = BEFORE[structure]
    torch.manual_seed(7)
    model = GPT(ModelConfig(dataclasses.replace(BASE, structure=structure), n_layer=2), vocab_size=11)
    initialise(model)
    assert hashlib.sha256(" ".join(model.state_dict()).encode()).hexdigest().startswith(keys)
    assert sum(p.double().abs().sum().item() for p in model.parameters()) == pytest.approx(drawn, rel=1e-7)
    optimizer, idx, losses = adamw(model, 1e-3), tokens(3, 14), []
    for _ in range(4):
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[::3] == pytest.approx([first, fourth], rel=1e-5)


# What is refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(position="rotary"), "^no position 'rotary', there are learned, none, rope, alibi$"),
        (dict(structure=MLR, position="rope", ranks=(4, 3, 1)), r"rank 3 of \(4, 3, 1\) is odd; 4\|2\|2 would do$"),
        (dict(structure=MLR, position="rope", ranks=(1, 0, 7)), r"rank 1 of \(1, 0, 7\) is odd; 2\|0\|6 would do$"),
        (dict(structure=MLR, position="rope", ranks=(4, 2, 1), d_qk_head=7), r"rank 1 of \(4, 2, 1\) is odd$"),
        (dict(structure=GSWA, position="rope", gswa_ranks=(5, 3)), r"rank 5 of \(5, 3\) is odd; 4\|4 would do$"),
        (dict(position="rope", d_qk_head=5), "the queries of a head have 5; 4 or 6 would do$"),
        (dict(position="rope", d_qk_head=1), "the queries of a head have 1; 2 would do$"),
        *[
            (dict(structure=structure, position=name), f"^position {name} is for low_rank, .*{MLR}; {structure} takes ")
            for structure in ("bilinear_MLR", "bilinear_BTT", "bilinear_MLBTC")
            for name in ("rope", "alibi")
        ],
        (dict(structure=GSWA, position="alibi"), f"is for low_rank, .*; {GSWA} takes learned, none, rope$"),
        (dict(position="alibi", link="identity"), "in front of a softmax, link_function is identity"),
        (dict(position="alibi", causal=False), "for causal models"),
        (dict(position="alibi", block_size=65_537), "exact up to 65536 positions, block_size is 65537"),
        (dict(structure=MLR, position="alibi", weighting="shared", block_sizes=(8, 4, 2)), r"= 16, mlr_block.* \(8, "),
    ],
    ids=lambda x: "" if isinstance(x, str) else str(x),
)  # fmt: skip
def test_what_cannot_be_is_refused_in_a_line(change, words):
    with pytest.raises(BadInput, match=words) as error:
        dataclasses.replace(BASE, **change)
    assert "\n" not in str(error.value)


def test_what_rope_advises_is_taken():
    for ranks in ((5, 3), (1, 7), (7, 1), (3, 2, 3), (1, 1, 3, 3)):
        wanted = dict(structure=MLR, ranks=ranks, block_size=32, position="rope")
        with pytest.raises(BadInput) as error:
            dataclasses.replace(BASE, **wanted)
        advice = re.search(r"([\d|]+) would do", str(error.value))[1].split("|")
        dataclasses.replace(BASE, **wanted | dict(ranks=tuple(map(int, advice))))


def test_every_structure_without_a_position():
    for structure in STRUCTURES:
        model = gpt(structure, position="none")
        idx = tokens()
        model(idx, idx)[1].backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_cache_is_of_the_place_it_was_declared_with():
    class Elsewhere(STRUCTURES["low_rank"]):
        def place(self, q, k, at=None):
            return q, 2 * k

    assert STRUCTURES["low_rank"].cache_type is KeyCache
    assert Elsewhere.cache_type is None


def test_one_number_of_heads_a_key_head():
    """Grouped queries have slopes of their own on keys that they share."""
    m = scoring("low_rank", n_kv_head=1, position="alibi")
    q, k = m.place(torch.zeros(1, 3, 5, 8), torch.zeros(1, 1, 5, 8))
    assert (q.shape, k.shape) == ((1, 3, 5, 12), (1, 1, 5, 12))
    assert m.key_width == 12
    v = torch.randn(1, 1, 5, 8)
    bias = reference.alibi_bias(3, 5)
    want = reference.weights(bias.float()[None], reference.all_pairs(5)) @ v
    assert relative_error(attention(q, k, v, scale=m.scores_scale), want) < 1e-6


# Runs


@pytest.mark.parametrize("name", ["none", "rope", "alibi"])
@pytest.mark.parametrize("structure", ["low_rank", MLR])
def test_a_language_model(structure, name, argv, tmp_path, capsys):
    """Trained, recorded and sampled from."""
    more = dict(mlr_rank_list="4|2|2", mlr_block_divide_by_num_levels=True) if structure == MLR else {}
    out_dir = tmp_path / "run"
    train.main(argv(out_dir=out_dir, token_mixing_struct=structure, position=name, **more))
    run = record(out_dir)
    assert run["status"] == "finished"
    assert run["settings"]["position"] == name
    assert run["parameters"]["total"] == run["parameters"]["non_embedding"] + 2 * 96 * 16
    capsys.readouterr()
    texts = []
    for use_cache in (True, False):
        options = dict(out_dir=out_dir, start="to be", max_new_tokens=9, temperature=0, device="cpu", num_samples=1)
        sample.main(flags(options, use_cache=use_cache))
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("to be")


def test_runs_from_before_there_was_a_choice(argv, whole, tmp_path, capsys):
    """A checkpoint whose settings name no position goes on, with learned vectors alone."""
    out_dir = tmp_path / "run"
    train.main(argv(out_dir=out_dir, max_iters=4))
    state = checkpoint(out_dir)
    assert state["settings"].pop("position") == "learned"
    torch.save(state, out_dir / "ckpt.pt")
    assert stops(train.main, argv(out_dir=out_dir, init_from="resume", position="none")) == 2
    assert "was made without position, this run has position = 'none'" in capsys.readouterr().err
    train.main(argv(out_dir=out_dir, init_from="resume"))
    assert_same_run(out_dir, whole)


def test_in_context_and_refusals_of_commands(tmp_path, capsys):
    """Regression in context takes a position too; what cannot be ends in one line."""
    train_ICL.main(flags(TINY_ICL, out_dir=tmp_path / "icl", position="rope", max_iters=1))
    assert record(tmp_path / "icl")["settings"]["position"] == "rope"
    wrong = dict(token_mixing_struct="bilinear_BTT", position="alibi", out_dir=tmp_path / "no", data_dir=tmp_path)
    assert stops(train.main, flags(TINY_LM, wrong)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: position alibi is for low_rank, ")
    assert said.count("\n") == 1
