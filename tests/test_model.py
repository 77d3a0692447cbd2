"""The three models with every structure: shapes, causality, generation, counting, and the promises of µP."""

import dataclasses

import pytest
import torch
from runs import EXAMPLES
from torch.utils.flop_counter import FlopCounterMode

from model import GPT, Forecaster, InContextRegressor, ModelConfig
from structured import STRUCTURES, BadInput, ScoringConfig, flops
from training.mup import adamw, initialise, param_groups, roles

SCORING = ScoringConfig(
    structure="low_rank", d_model=16, n_head=2, block_size=16, **EXAMPLES | dict(ranks=(4, 2, 2), btt_rank=1)
)
EVERY_STRUCTURE = pytest.mark.parametrize("structure", STRUCTURES)


def config(structure="low_rank", n_layer=2, **change):
    return ModelConfig(scoring=dataclasses.replace(SCORING, structure=structure, **change), n_layer=n_layer)


def randomised(model, seed=0):
    """Weights such that every part of the model matters: the zero-initialised outputs too."""
    torch.manual_seed(seed)
    for p in model.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    return model.eval()


@EVERY_STRUCTURE
def test_every_structure_trains_in_every_model(structure):
    """One step of each head lowers nothing to NaN and moves every parameter that can move."""
    torch.manual_seed(0)
    models = {
        GPT(config(structure), vocab_size=11): torch.randint(11, (3, 13)),
        InContextRegressor(config(structure), n_dims=5): torch.randn(3, 12, 5),
        Forecaster(config(structure, causal=False), n_channels=3, horizon=6): torch.randn(3, 16, 3),
    }
    for model, inputs in models.items():
        initialise(model)
        optimizer = adamw(model, 1e-2)
        before = {n: p.clone() for n, p in model.named_parameters()}
        for _ in range(3):  # zero outputs pass no gradient on: the parts behind them move a step later
            out = model(inputs)
            optimizer.zero_grad()
            (out - 1).square().mean().backward()
            optimizer.step()
        moved = {n: (p != before[n]).any().item() for n, p in model.named_parameters()}
        assert all(p.isfinite().all() for p in model.parameters())
        assert all(moved.values()), (type(model).__name__, [n for n, m in moved.items() if not m])


@EVERY_STRUCTURE
def test_the_future_does_not_reach_back(structure):
    gpt = randomised(GPT(config(structure), vocab_size=11))
    tokens = torch.randint(11, (2, 16))
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 11
    before, after = gpt(tokens), gpt(changed)
    assert torch.allclose(before[:, :9], after[:, :9], atol=1e-5)
    assert not torch.allclose(before[:, 9:], after[:, 9:], atol=1e-3)

    regressor = randomised(InContextRegressor(config(structure), n_dims=5))
    prompt = torch.randn(2, 16, 5)
    changed = prompt.clone()
    changed[:, 9:] += 1.0  # y_5 and everything after it: the prediction at x_5 (token 8) must not know
    before, after = regressor(prompt), regressor(changed)
    assert torch.allclose(before[:, :5], after[:, :5], atol=1e-5)
    assert not torch.allclose(before[:, 5:], after[:, 5:], atol=1e-3)


@EVERY_STRUCTURE
def test_a_shorter_sequence_is_a_prefix(structure):
    """Geometry is by absolute position: any T up to block_size gives the same numbers as the start of a longer T."""
    gpt = randomised(GPT(config(structure), vocab_size=11))
    tokens = torch.randint(11, (2, 16))
    for T in (1, 5, 15):
        assert torch.allclose(gpt(tokens)[:, :T], gpt(tokens[:, :T]), atol=1e-5)
    with pytest.raises(BadInput, match="17 tokens does not fit block_size = 16"):
        gpt(torch.zeros(1, 17, dtype=torch.long))


@EVERY_STRUCTURE
def test_generation(structure):
    """Greedy decoding takes the likeliest token of the recomputed prefix, and crops at block_size."""
    gpt = randomised(GPT(config(structure), vocab_size=11))
    start = torch.randint(11, (2, 3))
    out = gpt.generate(start, 20, temperature=0)
    assert out.shape == (2, 23)
    assert torch.equal(out[:, :3], start)
    for t in range(3, 23):
        assert torch.equal(out[:, t], gpt(out[:, max(0, t - 16) : t])[:, -1].argmax(-1))

    def sample(seed, top_k):
        return gpt.generate(start, 12, temperature=0.8, top_k=top_k, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(sample(1, 5), sample(1, 5))
    assert not torch.equal(sample(1, 5), sample(2, 5))
    assert torch.equal(sample(1, 1), gpt.generate(start, 12, temperature=0))


def test_no_prediction_before_training():
    """Zero read-outs: a new language model is uniform, a new regressor predicts 0."""
    gpt, regressor = GPT(config(), vocab_size=11), InContextRegressor(config(), n_dims=5)
    for model in (gpt, regressor):
        initialise(model)
    assert gpt(torch.randint(11, (2, 8))).abs().max() == 0
    assert regressor(torch.randn(2, 8, 5)).abs().max() == 0


def test_layers_of_sequential_gswa():
    gpt = GPT(config("low_rank_with_sequential_gswa"), vocab_size=11)
    assert [type(b.attn.scoring).__name__ for b in gpt.trunk.h] == ["LowRankScoring", "WindowScoring"]
    with pytest.raises(BadInput, match=r"names 2 layers .* n_layer = 3"):
        config("low_rank_with_sequential_gswa", n_layer=3)


# Counting


def test_paper_compute_by_hand():
    """Standard attention, D 16, 2 heads of 8, T 16, 1 layer, vocabulary 11: the paper's axis, number by number."""
    T, D = 16, 16
    linears = T * (4 * D * D + 8 * D * D)  # q, k, v, c_proj; MLP up and down
    attention = 2 * (T * T * 8 + T * T * 8)  # scores and value product of 2 heads
    layer_norms = 5 * (3 * T * D + 2 * T * D)  # ln_1, ln_2, ln_f; queries and keys of all heads
    compute = GPT(config(n_layer=1), vocab_size=11).compute(T)
    assert compute.paper == linears + attention + layer_norms
    assert compute.non_emb == linears + attention
    assert compute.macs == linears + attention + T * D * 11


def test_paper_compute_of_mlr_by_hand():
    """Scores inside blocks only: ranks 4, 2, 2 on blocks of 16, 8, 4; the value product is T x T."""
    T, D = 16, 16
    linears = T * 12 * D * D
    scores = 2 * (4 * 16 * 16 + 2 * 2 * 8 * 8 + 2 * 4 * 4 * 4)
    compute = GPT(config("multi_level_low_rank", n_layer=1), vocab_size=11).compute(T)
    assert compute.non_emb == linears + scores + 2 * T * T * 8
    assert compute.paper == compute.non_emb + 5 * 5 * T * D


def test_paper_compute_of_in_context_regression_by_hand():
    """Nothing is left out: read-in and read-out on x and y tokens both."""
    T, D = 16, 16
    model = InContextRegressor(config("bilinear_BTT", n_layer=1), n_dims=5)
    btt = T * 2 * (2 * 8 * 8 + 8 * 2 * 2)  # heads * (2 blocks of 8 -> 8, then 8 blocks of 2 -> 2) multiply-adds
    linears = T * 10 * D * D  # values, c_proj, MLP
    attention = 2 * (T * T * 16 + T * T * 8)  # x meets keys of width D
    norms = 5 * (3 * T * D + 2 * T * D)  # ln_1, ln_2, ln_f; keys of 2 heads
    ends = T * 5 * D + T * D
    assert model.compute(T).paper == btt + linears + attention + norms + ends


def test_window_counts_are_counts():
    """The closed forms against masks counted pair by pair."""
    for T in (1, 7, 16):
        i = torch.arange(T)[:, None]
        j = torch.arange(T)[None]
        for w in (0, 1, 3, 6, 15, 16, 40):
            assert flops.window_pairs(T, w) == ((i - w <= j) & (j <= i)).sum()
            assert flops.window_pairs(T, w, causal=False) == ((i - w <= j) & (j <= i + w)).sum()
            assert flops.paper_window_pairs(T, w) == ((i - w <= j) & (j < i + w)).sum()
        for blocks in ((16, 8, 4), (7, 3), (5,)):
            ranks = (3, 2, 1)[: len(blocks)]
            pairs = [(i // b == j // b).sum().item() for b in blocks]
            assert flops.mlr_score_macs(T, ranks, blocks) == sum(r * n for r, n in zip(ranks, pairs, strict=True))


COUNTED = [s for s in STRUCTURES if "window" not in s and "gswa" not in s]


@pytest.mark.parametrize("structure", COUNTED)
@pytest.mark.parametrize("T", [16, 12])
def test_flops_against_pytorchs_counter(structure, T):
    """The closed forms are what runs, at 2 FLOPs a multiply-add and no credit for the causal mask.

    Window variants are left out: the counter sees a T x T product under a mask, the closed form what is in the window.
    """
    with torch.device("meta"):
        runs = {
            GPT(config(structure), vocab_size=11): torch.zeros(2, T, dtype=torch.long),
            InContextRegressor(config(structure), n_dims=5): torch.zeros(2, T, 5),
        }
    for model, inputs in runs.items():
        with FlopCounterMode(display=False) as counter:
            model(inputs)
        assert counter.get_total_flops() == 2 * 2 * model.compute(T).macs, type(model).__name__


def test_forecaster_flops_against_pytorchs_counter():
    with torch.device("meta"):
        model = Forecaster(config("multi_level_low_rank", causal=False), n_channels=3, horizon=6)
        past = torch.zeros(2, 16, 3)
    with FlopCounterMode(display=False) as counter:
        model(past)
    assert counter.get_total_flops() == 2 * 2 * model.compute(16).macs


def test_parameters_are_counted():
    gpt = GPT(config(), vocab_size=11)
    total, non_embedding = gpt.num_params()
    assert total == sum(p.numel() for p in gpt.parameters())
    assert non_embedding == total - 16 * 16 - 2 * 11 * 16


# Maximal update parametrization


def test_roles_set_size_and_learning_rate():
    """The table of DESIGN 6 on a model that has every kind of parameter."""
    biased = dataclasses.replace(config("bilinear_BTT", d_model=64, n_head=2), bias=True)
    model = InContextRegressor(biased, n_dims=5)
    torch.manual_seed(0)
    initialise(model)
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in param_groups(model, 1.0, 0.1) for p in g["params"]}
    named = dict(model.named_parameters())
    expected = {  # name: (std, learning rate, decayed)
        "read_in.weight": (0.02, 1.0, True),
        "trunk.wpe.weight": (0.02, 1.0, True),
        "trunk.ln_f.weight": (None, 1.0, False),
        "trunk.h.0.attn.value.weight": (64**-0.5, 768 / 64, True),
        "trunk.h.0.attn.c_proj.weight": (0.0, 768 / 64, True),
        "trunk.h.0.attn.scoring.key.levels.0.0.weight": (16**-0.5, 768 / 16, True),
        "trunk.h.0.attn.scoring.key.levels.0.2.weight": (4**-0.5, 768 / 4, True),
        "trunk.h.0.mlp.c_fc.weight": (64**-0.5, 768 / 64, True),
        "trunk.h.0.mlp.c_proj.weight": (0.0, 768 / 256, True),
        "read_out.weight": (0.0, 768 / 64, True),
    }
    for name, (std, rate, decayed) in expected.items():
        p = named[name]
        assert rates[id(p)] == (pytest.approx(rate), 0.1 if decayed else 0.0), name
        if std is None:
            assert (p == 1).all(), name
        else:
            assert p.std().item() == pytest.approx(std, rel=0.15), name
    assert len(rates) == len(named)


def test_an_unlabelled_parameter_stops_the_run():
    gpt = GPT(config(), vocab_size=11)
    gpt.extra = torch.nn.Linear(3, 3)
    with pytest.raises(TypeError, match=r"extra.weight states no role"):
        list(roles(gpt))


@pytest.mark.parametrize("structure", ["low_rank", "multi_level_low_rank", "bilinear_MLR", "bilinear_BTT"])
def test_coordinate_check(structure):
    """Activations after a few steps have the same size at every width; without µP's rates they grow with it."""

    def sizes(width, mup=True):
        torch.manual_seed(0)
        scoring = dataclasses.replace(
            SCORING, structure=structure, d_model=width, n_head=width // 16, ranks=(8, 4, 4), scale_mup=True
        )
        model = GPT(ModelConfig(scoring=scoring, n_layer=2), vocab_size=17)
        initialise(model)
        optimizer = adamw(model, 3e-3)
        if not mup:
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * 6
        tokens = torch.randint(17, (8, 17), generator=torch.Generator().manual_seed(0))
        for _ in range(4):
            loss = model(tokens[:, :-1], tokens[:, 1:])[1]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            x = model.wte(tokens[:, :-1])
            logits = model(tokens[:, :-1])
            attended = model.trunk.h[0].attn(model.trunk.h[0].ln_1(x))
            return {"logits": logits.std().item(), "attention": attended.std().item()}

    narrow, wide = sizes(64), sizes(512)
    for name in narrow:
        assert 0.5 < wide[name] / narrow[name] < 2, (name, narrow, wide)
    naive = sizes(512, mup=False)["logits"] / sizes(64, mup=False)["logits"]
    assert naive > 2, naive
