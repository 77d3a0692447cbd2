"""The scoring modules against their definitions from x and the weights, and what they promise as modules."""

import dataclasses

import pytest
import torch
from compare import assert_same
from runs import EXAMPLES
from torch import nn

from structured import STRUCTURES, BadInput, ScoringConfig, build_scoring, reference
from structured.mlbtc import FAMILIES
from structured.scorings import own_settings

BASE = ScoringConfig(
    structure="low_rank", d_model=24, n_head=3, block_size=16, **EXAMPLES | dict(mlbtc_rank=2, mlbtc_blocks=3)
)


CHANGES = [  # what is switched on top of BASE, and for which structures
    *[(name, {}) for name in STRUCTURES],
    *[(name, dict(causal=False)) for name in STRUCTURES],
    *[(name, dict(link="identity")) for name in STRUCTURES],
    *[(name, dict(link="identity", causal=False)) for name in STRUCTURES],
    *[(name, dict(scale_sp=True)) for name in ("low_rank", "low_rank_with_sliding_window", "low_rank_with_gswa")],
    *[(name, dict(qk_norm=False)) for name in ("low_rank", "multi_level_low_rank", "bilinear_MLR")],
    *[(name, dict(n_kv_head=1)) for name in STRUCTURES if not name.startswith("bilinear")],
    ("low_rank", dict(d_qk_head=5)),
    ("multi_level_low_rank", dict(d_qk_head=6, ranks=(3, 3), weighting="shared", n_kv_head=1)),
    ("multi_level_low_rank", dict(block_sizes=(16, 7, 3), weighting="shared")),
    ("multi_level_low_rank", dict(weighting="levels")),
    ("multi_level_low_rank", dict(ranks=(6, 0, 2), weighting="shared")),
    ("bilinear_MLR", dict(scale_mup=True, weighting="levels")),
    ("bilinear_MLR", dict(ranks=(0, 5, 3))),
    ("bilinear_BTT", dict(scale_mup=True)),
    *[("bilinear_MLBTC", dict(mlbtc_family=f)) for f in FAMILIES if f not in ("mlr", "butterfly")],
    ("bilinear_MLBTC", dict(mlbtc_family="mlr", ranks=(2, 1), scale_mup=True)),
    ("bilinear_MLBTC", dict(mlbtc_family="butterfly", d_model=16, n_head=2)),
    ("bilinear_MLBTC", dict(mlbtc_levels=((2, 3, 6, True), (1, 1, 4, False)))),
]


@pytest.mark.parametrize(("structure", "change"), CHANGES, ids=lambda x: x if isinstance(x, str) else str(x))
@pytest.mark.parametrize("T", [1, 11, 16])
def test_outputs_and_gradients(structure, change, T):
    torch.manual_seed(0)
    cfg = dataclasses.replace(BASE, structure=structure, **change)
    m = build_scoring(cfg, layer=1).double()
    for p in m.parameters():  # also norm weights away from 1, and some weights above their cap
        p.data.mul_(1 + torch.rand_like(p))
    x = torch.randn(2, T, cfg.d_model, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, cfg.kv_heads, T, cfg.d_head, dtype=torch.float64, requires_grad=True)
    inputs = {"x": x, "v": v, **dict(m.named_parameters())}

    def run(f):
        out = f(x, v)
        cotangent = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
        return [out, *torch.autograd.grad(out, list(inputs.values()), cotangent, allow_unused=True)]

    got, want = run(m), run(lambda x, v: getattr(reference, structure)(m, x, v))
    unused = [g is None for g in want]
    assert not any(unused), [n for n, u in zip(["out", *inputs], unused, strict=True) if u]
    assert_same(got, want, ["out", *(f"d {name}" for name in inputs)], 1e-11)


def test_mlbtc_with_btts_level_is_bilinear_btt():
    """By the family's name and by the level written out: the same weights give the same numbers."""
    D, b = 24, 6  # 24 = 4 * 6, tt-rank 2
    outputs = []
    for change in (
        dict(structure="bilinear_BTT"),
        dict(structure="bilinear_MLBTC", mlbtc_family="btt"),
        dict(structure="bilinear_MLBTC", mlbtc_levels=((4, 6, 2 * b, True),)),
    ):
        torch.manual_seed(0)
        m = build_scoring(dataclasses.replace(BASE, **change))
        torch.manual_seed(1)
        outputs.append(m(torch.randn(2, 9, D), torch.randn(2, 3, 9, 8)))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("structure", STRUCTURES)
def test_outputs_do_not_move_when_the_future_changes(structure):
    torch.manual_seed(0)
    m = build_scoring(dataclasses.replace(BASE, structure=structure), layer=1)
    x, v = torch.randn(2, 16, 24), torch.randn(2, 3, 16, 8)
    before = m(x, v)
    x[:, 10:], v[:, :, 10:] = torch.randn(2, 6, 24), torch.randn(2, 3, 6, 8)
    after = m(x, v)
    assert torch.allclose(before[:, :, :10], after[:, :, :10], atol=1e-6)
    assert not torch.allclose(before[:, :, 10:], after[:, :, 10:], atol=1e-3)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_nothing_but_weights_goes_into_a_checkpoint(structure):
    m = build_scoring(dataclasses.replace(BASE, structure=structure))
    assert set(m.state_dict()) == {name for name, _ in m.named_parameters()}
    assert all(isinstance(p, nn.Parameter) and p.shape != (16, 16) for p in m.parameters())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_bfloat16_autocast(structure):
    """Under autocast the outputs stay within bfloat16 rounding of the float32 ones."""
    torch.manual_seed(0)
    m = build_scoring(dataclasses.replace(BASE, structure=structure))
    x, v = torch.randn(2, 16, 24), torch.randn(2, 3, 16, 8)
    want = m(x, v)
    with torch.autocast("cpu", torch.bfloat16):
        got = m(x, v)
    assert ((got.float() - want).norm() / want.norm()).item() < 0.05


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(structure="bilinear_bt"), "no token_mixing_struct 'bilinear_bt', there are low_rank, "),
        (dict(link="relu"), "no link_function 'relu'"),
        (dict(structure="multi_level_low_rank", weighting="half"), "no level weighting 'half'"),
        (dict(n_head=5), "d_model 24 is not a multiple of n_head 5"),
        (dict(n_kv_head=2), "n_kv_head 2 does not divide n_head 3"),
        (dict(n_head=0), "n_head is 0"),
        (dict(structure="bilinear_BTT", n_kv_head=1), "bilinear_BTT has no grouped-query form"),
        (dict(structure="bilinear_BTT", btt_rank=0), "btt_tt_rank is 0"),
        (dict(structure="bilinear_MLR", ranks=(4, 4, 4)), "add up to 12, .* 8 features"),
        (dict(structure="bilinear_MLR", ranks=(4, 1, 1, 1, 1)), "16 chunks, which do not divide d_model 24"),
        (dict(structure="multi_level_low_rank", ranks=()), "give one whole number"),
        (dict(structure="multi_level_low_rank", block_sizes=(16, 8)), "names 2 levels .* mlr_rank_list 3"),
        (dict(structure="multi_level_low_rank", block_sizes=(17, 8, 4)), "block of 17; .* 1 to block_size = 16"),
        (dict(structure="multi_level_low_rank", block_sizes=(16, 8, 0)), "block of 0"),
        (dict(structure="multi_level_low_rank", block_size=18), "multiple of 4, not 18; the nearest is 16"),
        (dict(structure="low_rank_with_sliding_window", window=0), "sliding_block_size is 0"),
        (dict(structure="low_rank_with_gswa", gswa_ranks=(8,)), "takes two ranks"),
        (dict(structure="low_rank_with_sequential_gswa", layer_kinds=("MHA", "SW")), "has 'SW', there are MHA, SWA"),
        (dict(structure="bilinear_MLBTC", mlbtc_family="toeplitz"), "no mlbtc_family 'toeplitz'"),
        (dict(structure="bilinear_MLBTC", mlbtc_family="butterfly"), "power of two from 2 on, not 24"),
        (dict(structure="bilinear_MLBTC", mlbtc_levels=((5, 1, 4, False),)), "24 input features do not split into 5"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_configurations_say_what_is_wrong(change, words):
    with pytest.raises(BadInput, match=words):
        dataclasses.replace(BASE, **change)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_what_is_longer_than_block_size_is_refused(structure):
    """DESIGN 3, and no matter how long the paths of its function are; nothing is computed for nothing."""
    m = build_scoring(dataclasses.replace(BASE, structure=structure))
    for T in (17, 24, 300):
        x, v = torch.zeros(2, T, 24), torch.zeros(2, 3, T, 8)
        for call in (lambda x=x, v=v: m(x, v), lambda x=x: m.mix(x, nn.Linear(24, 24))):
            with pytest.raises(BadInput, match=f"a sequence of {T} tokens does not fit block_size = 16"):
                call()
    with pytest.raises(BadInput, match=r"x is \(B, T, 24\), d_model features last, not \(2, 5, 23\)"):
        m(torch.zeros(2, 5, 23), torch.zeros(2, 3, 5, 8))
    for B, T in ((0, 5), (2, 0), (0, 16)):
        x = torch.zeros(B, T, 24, requires_grad=True)
        out = m(x, torch.zeros(B, 3, T, 8, requires_grad=True))
        assert out.shape == (B, 3, T, 8)
        out.sum().backward()
        assert all(p.grad is None or not p.grad.any() for p in m.parameters())


def test_structures_that_share_a_setting_declare_it_alike(monkeypatch):
    class Wider(STRUCTURES["low_rank_with_sliding_window"]):
        @dataclasses.dataclass(frozen=True)
        class Settings:
            window: int = 7

    monkeypatch.setitem(STRUCTURES, "wider", Wider)
    with pytest.raises(TypeError, match=r"Wider declares window as .* 7, .*, another as .* 0, "):
        own_settings("OwnSettings")


def test_a_configuration_has_what_the_structures_declare():
    """Each under its own name and nothing else, beside what all share."""
    shared = {"structure", "d_model", "n_head", "block_size", "n_kv_head", "d_qk_head", "causal", "link", "qk_norm",
              "bias", "dropout", "backend", "position"}  # fmt: skip
    own = {f.name for scoring in STRUCTURES.values() for f in dataclasses.fields(scoring.Settings)}
    assert {f.name for f in dataclasses.fields(ScoringConfig)} == shared | own
    for structure, scoring in STRUCTURES.items():
        assert scoring.EXAMPLE.keys() <= {f.name for f in dataclasses.fields(scoring.Settings)}, structure
        ScoringConfig(structure, d_model=16, n_head=2, block_size=16, **scoring.EXAMPLE)
