"""Generation with a key cache: the same as recomputing the prefix, from the memory that DESIGN 3 promises."""

import dataclasses
import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compare import relative_error
from runs import CACHED, EXAMPLES

ROOT = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from model import GPT, ModelConfig  # noqa: E402
from structured import STRUCTURES, BadInput, ScoringConfig, build_scoring  # noqa: E402
from structured.cache import (  # noqa: E402
    InputCache,
    KeyCache,
    ReplayedStep,
    Slots,
    apply_transposed,
    mlr_decode_reference,
)
from structured.mlbtc import FAMILIES  # noqa: E402
from structured.scorings.base import ProjectedScoring  # noqa: E402
from structured.scorings.low_rank import LowRankScoring  # noqa: E402
from structured.scorings.mlr import MLRScoring  # noqa: E402

pytestmark = pytest.mark.usefixtures("single_thread")
BASE = ScoringConfig(
    structure="low_rank", d_model=24, n_head=3, block_size=16, **EXAMPLES | dict(mlbtc_rank=2, mlbtc_blocks=3)
)
PROJECTED = [name for name in STRUCTURES if not name.startswith("bilinear")]
MLR = "multi_level_low_rank"
CASES = [
    *[(name, {}) for name in CACHED],
    *[(name, dict(link="identity")) for name in CACHED],
    *[(name, dict(n_kv_head=1)) for name in PROJECTED if name in CACHED],
    *[(name, dict(qk_norm=False, bias=True)) for name in ("low_rank", MLR)],
    *[(name, dict(scale_sp=True)) for name in ("low_rank_with_sliding_window", "low_rank_with_gswa")],
    *[(name, dict(scale_mup=True)) for name in STRUCTURES if name.startswith("bilinear")],
    *[(name, dict(window=1)) for name in ("low_rank_with_sliding_window", "low_rank_with_gswa")],
    ("low_rank_with_sliding_window", dict(window=20)),
    ("low_rank", dict(d_qk_head=5)),
    (MLR, dict(weighting="levels")),
    (MLR, dict(weighting="shared")),
    (MLR, dict(block_sizes=(16, 7, 3), weighting="shared")),
    (MLR, dict(block_sizes=(9, 5, 1), weighting="shared", n_kv_head=1)),
    (MLR, dict(block_sizes=(3, 16, 7), weighting="levels")),
    (MLR, dict(ranks=(6, 0, 2), weighting="shared")),
    (MLR, dict(ranks=(0, 5, 3), link="identity")),
    (MLR, dict(ranks=(8,))),
    ("bilinear_MLR", dict(ranks=(0, 5, 3), weighting="levels")),
    ("bilinear_BTT", dict(n_head=1)),
    *[("bilinear_MLBTC", dict(mlbtc_family=f)) for f in FAMILIES if f not in ("mlr", "butterfly")],
    ("bilinear_MLBTC", dict(mlbtc_family="mlr", ranks=(2, 1))),
    ("bilinear_MLBTC", dict(mlbtc_family="butterfly", d_model=16, n_head=2)),
    ("bilinear_MLBTC", dict(mlbtc_levels=((2, 3, 6, True), (1, 1, 4, False)))),
]
EVERY_CASE = pytest.mark.parametrize(("structure", "change"), CASES, ids=lambda x: x if isinstance(x, str) else str(x))
EVERY_STRUCTURE = pytest.mark.parametrize("structure", STRUCTURES)
EVERY_CACHE = pytest.mark.parametrize("structure", CACHED)


def gpt(structure="low_rank", **change):
    """A float64 model all of whose parts matter: zero outputs, norm weights and biases moved too."""
    torch.manual_seed(0)
    scoring = dataclasses.replace(BASE, structure=structure, **change)
    model = GPT(ModelConfig(scoring=scoring, n_layer=2, bias=scoring.bias), vocab_size=11).double()
    for p in model.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    return model.eval()


def tokens(B=2, T=16):
    return torch.randint(11, (B, T), generator=torch.Generator().manual_seed(1))


@EVERY_CASE
@torch.no_grad()
def test_logits_equal_the_whole_forward_pass(structure, change):
    """A prompt that ends anywhere, then token by token to the end, across the borders of every block and window."""
    model, idx = gpt(structure, **change), tokens()
    want = model(idx)
    for prompt in (3, 8, 13):
        cache = model.trunk.new_cache(len(idx), 16)
        logits = [model(idx[:, :prompt], cache=cache)]
        logits += [model(idx[:, t : t + 1], cache=cache) for t in range(prompt, 16)]
        for t, (got, right) in enumerate(zip(torch.cat(logits, 1).unbind(1), want.unbind(1), strict=True)):
            assert relative_error(got, right) < 1e-10, f"prompt of {prompt}, position {t}"


@pytest.mark.parametrize("length", [1, 5, 11, 13])
@EVERY_CACHE
@torch.no_grad()
def test_a_cache_shorter_than_block_size(structure, length):
    """Memory for fewer tokens than block_size, or than a block or window, changes nothing."""
    model, idx = gpt(structure), tokens()
    cache = model.trunk.new_cache(2, length)
    logits = [model(idx[:, t : t + 1], cache=cache) for t in range(length)]
    assert relative_error(torch.cat(logits, 1), model(idx[:, :length])) < 1e-10


@EVERY_STRUCTURE
def test_generation_equals_recomputing(structure):
    """Greedy and drawn text, a batch at once, past block_size where the context is cropped."""
    model, start = gpt(structure), tokens(T=3)

    def text(new_tokens, seed=0, **options):
        return model.generate(start, new_tokens, generator=torch.Generator().manual_seed(seed), **options)

    greedy = text(17, temperature=0)
    assert torch.equal(greedy, text(17, temperature=0, use_cache=False))
    drawn = text(17, temperature=0.8, top_k=4)
    assert torch.equal(drawn, text(17, temperature=0.8, top_k=4, use_cache=False))
    assert not torch.equal(drawn, text(17, temperature=0.8, top_k=4, seed=1))
    assert torch.equal(text(6, top_k=1), greedy[:, :9])
    assert torch.equal(model.generate(start[1:], 6, temperature=0), greedy[1:, :9])


@EVERY_STRUCTURE
@torch.no_grad()
def test_prompts_of_unequal_length(structure):
    """Each row gets what its prompt alone gets, also past block_size; read together as far as the shortest goes."""
    model, idx, lengths, read = gpt(structure), tokens(B=3), torch.tensor([5, 2, 11]), []
    rows = [row[:n] for row, n in zip(idx, lengths, strict=True)]
    want = [model.generate(row[None], 7, temperature=0)[0] for row in rows]
    model.wte.register_forward_hook(lambda module, inputs, output: read.append(tuple(output.shape[:2])))
    for prompts, options in ((rows, {}), (idx, dict(lengths=lengths, use_cache=False))):
        got = model.generate(prompts, 7, temperature=0, **options)
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    recomputed = [(3, min(T, 16)) for T in range(2, 18)]
    by_cache = [(3, 2)] + [(3, 1)] * 14 + [(3, 16)]
    assert read == (by_cache if structure in CACHED else recomputed) + recomputed


@torch.no_grad()
def test_what_unequal_prompts_draw():
    """The same from the same seed; rows of one length draw as a tensor does."""
    model, idx = gpt(MLR), tokens(B=3)

    def text(prompts, **options):
        return model.generate(prompts, 5, generator=torch.Generator().manual_seed(0), **options)

    rows = [idx[0, :4], idx[1, :7], idx[2, :5]]
    first, again = text(rows), text(idx[:, :7], lengths=[4, 7, 5])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert [len(row) for row in first] == [9, 12, 10]
    assert torch.equal(torch.stack(text(list(idx[:, :4]))), text(idx[:, :4]))
    assert all(torch.equal(a, b) for a, b in zip(model.generate(rows, 0), rows, strict=True))


@pytest.mark.parametrize(
    ("prompts", "lengths", "said"),
    [
        ([], None, "at least 1 token, there is no prompt"),
        ([torch.zeros(2).long(), torch.zeros(0).long()], None, "at least 1 token, a prompt has 0"),
        ([torch.zeros(1, 2).long()], None, r"a tensor \(B, T\), with lengths or without, or a list"),
        ([torch.zeros(2).long()], [2], r"a tensor \(B, T\), with lengths or without, or a list"),
        (tokens(), [3], r"lengths \[3\] are not those of 2 prompts of 1 to 16 tokens"),
        (tokens(), [3, 17], r"lengths \[3, 17\] are not those of 2 prompts of 1 to 16 tokens"),
        (tokens(), [3, -1], r"lengths \[3, -1\] are not those of 2 prompts"),
        (tokens(), [0, 2], "at least 1 token, a prompt has 0"),
    ],
)
def test_prompts_that_cannot_be_gone_on_from(prompts, lengths, said):
    with pytest.raises(BadInput, match=said):
        gpt().generate(prompts, 1, lengths=lengths)


def test_prompts_longer_than_block_size():
    model, start = gpt(MLR), tokens(T=19)
    greedy = [model.generate(start, 2, temperature=0, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*greedy)
    assert torch.equal(model.generate(start[:, -16:], 2, temperature=0), greedy[0][:, 3:])


def test_generation_makes_steps_of_one_token():
    """What the cache is for: after the prompt the model reads one token at a time; beyond block_size, all again."""
    model, read = gpt(MLR), []
    model.wte.register_forward_hook(lambda module, inputs, output: read.append(output.shape[1]))
    model.generate(tokens(T=5), 14, temperature=0)
    assert read == [5] + [1] * 11 + [16, 16]
    read.clear()
    model.generate(tokens(T=5), 3, temperature=0, use_cache=False)
    assert read == [5, 6, 7]


@torch.no_grad()
def test_precision_of_the_cache():
    """Under autocast the cache is in its dtype and the logits are within its rounding; without it, the caller says."""
    model, idx = gpt(MLR).float(), tokens()
    want = model(idx)
    with torch.autocast("cpu", torch.bfloat16):
        cache = model.trunk.new_cache(2, 16)
        logits = [model(idx[:, t : t + 1], cache=cache) for t in range(16)]
    assert {slots.rows.dtype for layer in cache.layers for slots in [*layer.keys, layer.values]} == {torch.bfloat16}
    assert relative_error(torch.cat(logits, 1), want) < 0.05
    scoring, x, v = model.trunk.h[0].attn.scoring, torch.randn(2, 16, 24), torch.randn(2, 3, 16, 8)
    cache = scoring.new_cache(2, 16, dtype=torch.bfloat16)
    rows = [cache.extend(x[:, t : t + 1], v[:, :, t : t + 1]) for t in range(16)]
    assert relative_error(torch.cat(rows, 2), scoring(x, v)) < 0.02


# Memory


RANKS = (32, 8, 6, 4, 4, 4, 4, 2)


def layer_cache(structure, length=1024, B=2, slack=0, **change):
    sizes = dict(d_model=128, n_head=2, block_size=1024, ranks=RANKS, gswa_ranks=(48, 16), window=99)
    cfg = dataclasses.replace(BASE, structure=structure, **sizes | change)
    return build_scoring(cfg).new_cache(B, length, dtype=torch.float32, slack=slack)


@pytest.mark.parametrize(
    ("structure", "keys", "values"),  # float32 numbers kept for one sequence in one layer of 2 heads of 64
    [
        ("low_rank", 2 * 64 * 1024, 2 * 64 * 1024),
        ("low_rank_with_sliding_window", 2 * 64 * 100, 2 * 64 * 100),
        ("low_rank_with_gswa", 2 * (48 * 1024 + 16 * 100), 2 * 64 * 1024),
        ("multi_level_low_rank", 2 * sum(r * 1024 // 2**i for i, r in enumerate(RANKS)), 2 * 64 * 1024),
        ("bilinear_BTT", (128 + 2) * 1024, 2 * 64 * 1024),
        ("bilinear_MLBTC", (128 + 2) * 1024, 2 * 64 * 1024),
        ("bilinear_MLR", 2 * sum(r * 2**i for i, r in enumerate(RANKS)) * 1024, 2 * 64 * 1024),
    ],
)  # fmt: skip
def test_memory_is_what_the_structure_needs(structure, keys, values):
    cache = layer_cache(structure)
    assert cache.key_bytes == 2 * 4 * keys
    assert cache.value_bytes == 2 * 4 * values
    assert cache.nbytes == cache.key_bytes + cache.value_bytes
    held = [t for slots in [*cache.keys, cache.values] for t in vars(slots).values() if isinstance(t, torch.Tensor)]
    assert sum(t.untyped_storage().nbytes() for t in held) == cache.nbytes


def test_mlr_keeps_fewer_keys_than_standard_attention():
    standard, mlr = layer_cache("low_rank"), layer_cache(MLR)
    assert mlr.key_bytes / standard.key_bytes == pytest.approx(0.6008, abs=1e-4)
    eights = layer_cache(MLR, ranks=(8,) * 8)
    assert standard.key_bytes / eights.key_bytes == pytest.approx(4.0, abs=0.05)
    half = layer_cache(MLR, length=512)
    assert half.key_bytes == 4 * 2 * 2 * sum(r * min(512, 1024 // 2**i) for i, r in enumerate(RANKS))
    whole = gpt(MLR).trunk.new_cache(2, 16)
    assert whole.key_bytes == 2 * 2 * 3 * 8 * (4 * 16 + 3 * 8 + 1 * 4)  # 2 layers, 2 sequences, 3 heads, float64
    assert whole.nbytes == whole.key_bytes + whole.value_bytes


def test_bilinear_forms_keep_the_smaller_of_inputs_and_keys():
    assert type(layer_cache("bilinear_BTT")) is InputCache
    one_head = layer_cache("bilinear_BTT", n_head=1)
    assert type(one_head) is KeyCache
    assert one_head.key_bytes == 2 * 4 * 128 * 1024


@pytest.mark.parametrize("family", FAMILIES)
def test_transposed_products(family):
    sizes = dict(d_model=16, n_head=2) if family in ("butterfly", "monarch") else {}
    cfg = dataclasses.replace(BASE, structure="bilinear_MLBTC", mlbtc_family=family, ranks=(2, 1), **sizes)
    matrix = build_scoring(cfg).key.double()
    u = torch.randn(3, 2, cfg.d_model, dtype=torch.float64)
    assert relative_error(apply_transposed(matrix, u), torch.einsum("bto,hoi->bthi", u, matrix.dense())) < 1e-12


# Bad use


@EVERY_CACHE
@torch.no_grad()
def test_bad_use_says_what_is_wrong(structure):
    model, idx = gpt(structure), tokens()
    cache = model.trunk.new_cache(2, 7)
    with pytest.raises(BadInput, match="holds 0 of 7 tokens, 8 more do not fit"):
        model(idx[:, :8], cache=cache)
    model(idx[:, :6], cache=cache)
    with pytest.raises(BadInput, match="keeps 2 sequences, here are 1"):
        model(idx[:1, 6:7], cache=cache)
    before = model(idx[:, :7])[:, -1]
    assert relative_error(model(idx[:, 6:7], cache=cache)[:, -1], before) < 1e-10  # an error changed nothing
    with pytest.raises(BadInput, match="holds 7 of 7 tokens, 1 more do not fit"):
        model(idx[:, 7:8], cache=cache)


@torch.no_grad()
def test_layers_move_together():
    model, idx = gpt(), tokens()
    cache = model.trunk.new_cache(2, 16)
    model(idx[:, :6], cache=cache)
    cache.layers[0].extend(torch.randn(2, 1, 24).double(), torch.randn(2, 3, 1, 8).double())
    with pytest.raises(BadInput, match=r"the caches of the layers hold \[7, 6\] tokens"):
        model(idx[:, 6:7], cache=cache)
    cache.crop(6)
    assert relative_error(model(idx[:, 6:7], cache=cache)[:, -1], model(idx[:, :7])[:, -1]) < 1e-10


def test_settings_that_cannot_generate():
    with pytest.raises(BadInput, match=r"see both sides \(causal=False\) cannot generate"):
        gpt(causal=False).trunk.new_cache(1, 4)
    for length in (0, 17):
        with pytest.raises(BadInput, match=f"1 to block_size = 16 tokens long, not {length}"):
            gpt().trunk.new_cache(1, length)
    with pytest.raises(BadInput, match=r"temperature -1.0, top_k None: a temperature is at least 0"):
        gpt().generate(tokens(), 1, temperature=-1.0)
    with pytest.raises(BadInput, match=r"top_k 0: .* top_k at least 1"):
        gpt().generate(tokens(), 1, top_k=0)
    with pytest.raises(BadInput, match="at least 1 token, a prompt has 0"):
        gpt().generate(tokens(T=0), 1)


# A scoring function that declares no cache


class WithALiBi:
    """Scores minus the distance, steeper in every further head: not what a cache of keys computes."""

    def attend(self, q, k, v):
        T = q.shape[2]
        back = torch.arange(T)[:, None] - torch.arange(T)
        steepness = 0.5 ** torch.arange(q.shape[1])[:, None, None]
        scores = q @ k.mT * self.scores_scale - steepness * back
        return scores.masked_fill(back < 0, float("-inf")).softmax(-1) @ v


class ALiBiScoring(ProjectedScoring):
    """As a new structure is made: one class, one row in STRUCTURES."""

    attend = WithALiBi.attend
    head_macs = LowRankScoring.head_macs


class ALiBiOfStandard(LowRankScoring):
    attend = WithALiBi.attend


class ALiBiMixedIn(WithALiBi, LowRankScoring):
    pass


class FurtherALiBi(ALiBiOfStandard):
    pass


class OtherQueries(MLRScoring):
    def queries_and_keys(self, x):
        q, k = super().queries_and_keys(x)
        return q, k.cumsum(2)


@pytest.mark.parametrize("scoring", [ALiBiScoring, ALiBiOfStandard, ALiBiMixedIn, FurtherALiBi, OtherQueries])
def test_a_new_scoring_function_inherits_no_cache(scoring, monkeypatch):
    """It trains, and generates by recomputing; a cache asked for is refused in a line that says so."""
    monkeypatch.setitem(STRUCTURES, "new", scoring)
    model, start = gpt("new"), tokens(T=3)
    assert scoring.cache_type is None
    model(start, start)[1].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    got, want = start, model.generate(start, 8, temperature=0)
    for _ in range(8):
        got = torch.cat([got, model(got)[:, -1:].argmax(-1)], 1)
    assert torch.equal(got, want)
    assert torch.equal(model.generate(start, 8, temperature=0, use_cache=False), want)
    for call in (lambda: model.generate(start, 8, use_cache=True), lambda: model.trunk.new_cache(2, 8)):
        with pytest.raises(BadInput, match=r"^new declares no cache; generate with use_cache=False$"):
            call()


def test_a_cache_can_be_declared_again(monkeypatch):
    class Declared(LowRankScoring):
        cache_type = KeyCache

        def attend(self, q, k, v):
            return super().attend(q, k, v)

    class Renamed(Declared):
        """Changes nothing of what a cache is right for."""

    monkeypatch.setitem(STRUCTURES, "new", Renamed)
    assert Renamed.cache_type is KeyCache
    model, start = gpt("new"), tokens(T=3)
    greedy = [model.generate(start, 8, temperature=0, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*greedy)


def test_recount_follows_the_device():
    """After replays of a captured step only the device knows how many tokens there are."""
    cache = gpt().trunk.new_cache(2, 16)
    for layer in cache.layers:
        layer.at += 5
    cache.recount()
    assert cache.count == 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@EVERY_CACHE
@torch.no_grad()
def test_a_replayed_step_is_the_step(structure):
    """The same logits as without a graph, where there can be one, also after a crop, and the same text in the end."""
    model, idx = gpt(structure).cuda().float(), tokens().cuda()
    plain, cache = (model.trunk.new_cache(2, 16, slack=2) for _ in range(2))
    step = ReplayedStep(functools.partial(model, cache=cache), cache)
    for t in range(16):
        want, got = model(idx[:, t : t + 1], cache=plain), (step if t else step.step)(idx[:, t : t + 1])
        assert relative_error(got, want) < 1e-5, f"position {t}"
        assert cache.count == t + 1
    replayed = ("low_rank", "low_rank_with_sliding_window", "low_rank_with_sequential_gswa", MLR)
    assert (step.graph is not None) == (structure in replayed or structure == "bilinear_MLR")
    cache.recount()
    assert cache.count == 16
    for each in (plain, cache):
        each.crop(14)
        each.reorder([1, 0])
    swapped = idx.flip(0)
    want = model(swapped[:, 14:], cache=plain)
    got = torch.cat([step(swapped[:, t : t + 1]).clone() for t in range(14, 16)], 1)
    assert relative_error(got, want) < 1e-5
    greedy = [model.generate(idx[:, :3], 13, temperature=0, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*greedy)


# The kernel

KERNEL_CASES = [  # B, G, S, d, length, ranks, block sizes, blocks that "shared" counts, dtype, positions
    (2, 2, 1, 8, 37, (4, 3, 1), (37, 16, 7), (), torch.float32, (0, 15, 36)),
    (1, 2, 3, 20, 70, (5, 2), (100, 9), (100, 9, 30), torch.float32, (8, 62)),
    (1, 1, 18, 16, 40, (8, 8), (40, 20), (40, 20), torch.float16, (39,)),
    (1, 1, 1, 64, 48, (64,), (48,), (), torch.float16, (47,)),
    (1, 2, 1, 16, 150, (8, 4, 2, 2), (160, 80, 40, 5), (160, 80, 40, 5), torch.float32, (3, 79, 80, 138, 149)),
    (1, 1, 2, 16, 90, (4, 4, 8), (16, 90, 48), (), torch.float32, (50, 89)),
    (1, 1, 1, 16, 33, (16,), (33,), (), torch.float32, (100,)),
]


def kernel_errors():
    """Print the relative error of the kernel in Triton's interpreter, a line for every case and position."""
    from triton.runtime import interpreter

    from structured.kernels.decode import mlr_decode

    plain = interpreter._patch_lang_tensor

    def patched(tensor, scope):  # NumPy 2.4 refuses the int(array of one element) that bounds of loops go through
        plain(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched
    for B, G, S, d, length, ranks, blocks, shared, dtype, positions in KERNEL_CASES:
        torch.manual_seed(0)
        q, v = torch.randn(B, G, S, sum(ranks)), torch.randn(B, G, length, d).to(dtype)
        keys = [torch.randn(B, G, r, min(b, length)).to(dtype).mT for r, b in zip(ranks, blocks, strict=True)]
        geometry = (blocks, [1 / r for r in ranks], shared)
        for t in positions:
            at = torch.tensor([t])
            got = mlr_decode(q, keys, v, at, *geometry, chunk=16, programs=2 * B * G)
            last = at.clamp(max=length - 1)
            starts = [last.item() // b * b for b in blocks]
            of_keys = [torch.arange(a, min(a + k.shape[2], length)) for a, k in zip(starts, keys, strict=True)]
            held = [(k[:, :, : len(j)].double(), j) for k, j in zip(keys, of_keys, strict=True)]
            want = mlr_decode_reference(q.double(), held, v.double(), last, *geometry)
            print(dtype, ranks, blocks, t, relative_error(got, want))
    print(torch.float32, "written", written_error())


def written_error():
    """How far `write_rows` is from `Slots.write`, at positions before and after the ring closes."""
    from structured.kernels.decode import write_rows

    B, G, widths, sizes = 2, 3, (5, 1, 16), (7, 40, 1)

    def places():
        options = dict(device="cpu", dtype=torch.float32)
        return [Slots(B, G, n, w, by_feature=w != 16, **options) for n, w in zip(sizes, widths, strict=True)]

    ours, plain = places(), places()
    for t in (0, 1, 6, 7, 33):
        both = torch.randn(B, 1, G, sum(widths)).transpose(1, 2)  # as projections leave them
        rows, at = both.split(widths, -1), torch.tensor([t])
        write_rows([slots.rows for slots in ours], rows, at)
        for slots, row in zip(plain, rows, strict=True):
            slots.write(row, at)
    return max((a.rows - b.rows).abs().max().item() for a, b in zip(ours, plain, strict=True))


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")
def test_decode_kernel_in_the_interpreter():
    """In a process of its own: the interpreter is chosen when Triton is first imported.

    Not in bfloat16, whose products the interpreter gets wrong.
    """
    environment = os.environ | dict(TRITON_INTERPRET="1", PYTHONPATH=str(ROOT))
    child = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    lines = child.stdout.splitlines()
    assert len(lines) == sum(len(case[-1]) for case in KERNEL_CASES) + 1
    for line in lines:
        tolerance = 1e-6 if "float32" in line else 2e-3
        assert float(line.split()[-1]) < tolerance, line


if __name__ == "__main__":
    kernel_errors()
