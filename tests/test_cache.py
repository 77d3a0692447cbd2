"""A cache is the sequence it stands for, whatever has been done to it: what it gives equals recomputing without one."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from compare import relative_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import CACHED
from test_generate import MLR, gpt, layer_cache, tokens

from structured import STRUCTURES, BadInput

pytestmark = pytest.mark.usefixtures("single_thread")
WINDOW, GSWA, SEQUENTIAL = (f"low_rank_with_{kind}" for kind in ("sliding_window", "gswa", "sequential_gswa"))
CASES = [
    *[(name, dict(position=p)) for name in CACHED for p in STRUCTURES[name].POSITIONS if (name, p) != (MLR, "rope")],
    *[(name, dict(link="identity")) for name in CACHED],
    *[(name, dict(n_kv_head=1)) for name in ("low_rank", GSWA, MLR)],
    *[(name, dict(window=2)) for name in (WINDOW, GSWA, SEQUENTIAL)],
    (MLR, dict(weighting="shared", position="learned")),
    (MLR, dict(weighting="shared", position="alibi", ranks=(5, 0, 3))),
    (MLR, dict(weighting="shared", position="rope", ranks=(4, 2, 2))),
    (MLR, dict(weighting="levels", block_sizes=(16, 7, 3))),
    (MLR, dict(weighting="shared", block_sizes=(9, 5, 1), n_kv_head=1)),
    ("bilinear_BTT", dict(n_head=1)),
]
BOUNDED = settings(derandomize=True, deadline=None, max_examples=20, suppress_health_check=list(HealthCheck))
CALLS = st.tuples(st.sampled_from(["extend", "step", "crop", "reorder", "copy"]), st.integers(0, 7))
EVERY_CACHE = pytest.mark.parametrize("structure", CACHED)
model_of = functools.cache(lambda structure, *change: gpt(structure, **dict(change)))


def refusal(call, *given, **options):
    """The line in which a call is refused."""
    with pytest.raises(BadInput) as error:
        call(*given, **options)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("structure", "change"), CASES, ids=lambda x: x if isinstance(x, str) else str(x))
@BOUNDED
@given(st.lists(CALLS, min_size=6, max_size=16), st.integers(11, 16), st.integers(0, 4))
@torch.no_grad()
def test_any_order_of_calls_equals_recomputing(structure, change, calls, length, slack):
    """Tokens in portions of any size, taken back, sequences chosen anew, copies; what is refused changes nothing."""
    model, new = model_of(structure, *change.items()), torch.Generator().manual_seed(length)
    cache, held, most, seen = model.trunk.new_cache(3, length, slack), tokens(B=3, T=0), 0, []
    for name, number in calls:
        B, n = held.shape
        if name in ("extend", "step"):
            more = torch.randint(11, (B, 1 + number if name == "extend" else 1), generator=new)
            if n + more.shape[1] > length:
                assert "more do not fit" in refusal(model, more, cache=cache)
                continue
            held = torch.cat([held, more], 1)
            most = max(most, held.shape[1])
            seen.append((model(more, cache=cache), held, n))
        elif name == "crop":
            keep = max(0, n - number)
            try:
                cache.crop(keep)
            except BadInput:
                assert 0 < keep < min(cache.earliest, most - slack)
                assert structure in (WINDOW, GSWA, SEQUENTIAL, MLR)
            else:
                held, most = held[:, :keep], most if keep else 0
        else:
            chosen = torch.randint(B, (B if name == "reorder" else 1 + number % 4,), generator=new)
            held = held[chosen]
            if name == "reorder":
                cache.reorder(chosen.tolist())
            else:
                before, cache = cache, cache.copy(chosen)
                before.crop(0)
                model(tokens(B=B, T=5), cache=before)
        assert cache.count == held.shape[1]
    if seen:
        padded = torch.cat([F.pad(held, (0, 16 - held.shape[1])) for _, held, _ in seen])
        for (got, held, n), want in zip(seen, model(padded).split([len(held) for _, held, _ in seen]), strict=True):
            assert relative_error(got, want[:, n : held.shape[1]]) < 1e-10, f"tokens from {n} to {held.shape[1]}"


# How far back


@pytest.mark.parametrize(
    ("structure", "change", "slack", "count", "refused"),
    [
        ("low_rank", {}, 0, 16, []),
        ("bilinear_BTT", {}, 0, 16, []),
        (WINDOW, {}, 0, 6, []),
        (WINDOW, {}, 0, 9, range(1, 8)),
        (WINDOW, {}, 2, 9, range(1, 6)),
        (GSWA, {}, 2, 16, range(1, 13)),
        (SEQUENTIAL, {}, 2, 16, range(1, 13)),
        (MLR, {}, 0, 13, [*range(1, 8), 9, 10, 11]),
        (MLR, {}, 2, 13, range(1, 8)),
        (MLR, {}, 0, 16, [*range(1, 8), 9, 10, 11]),
        (MLR, dict(block_sizes=(16, 7, 1)), 0, 15, [*range(1, 7), *range(8, 14)]),
    ],
)
@torch.no_grad()
def test_what_can_be_taken_back(structure, change, slack, count, refused):
    """Of a cache that holds `count` tokens, however they came, and what is said of the others."""
    model, idx = gpt(structure, **change), tokens()
    whole = model(idx)
    for portions in ([count], [count - 4, 1, 1, 2]):
        cache = model.trunk.new_cache(2, 16, slack)
        for part in idx[:, :count].split(portions, 1):
            model(part, cache=cache)
        for n in {*range(count)} - {*refused}:
            probe = copy.deepcopy(cache)
            probe.crop(n)
            assert relative_error(model(idx[:, n:], cache=probe), whole[:, n:]) < 1e-10, f"from {n} on"
        for n in (-1, count + 1):
            assert f"can be cropped to 0 to {count}, not to {n}" in refusal(cache.crop, n)
    assert cache.earliest == max(refused, default=-1) + 1
    for n in refused:
        said = refusal(cache.crop, n)
        assert f"a crop to {n} comes " in said
        assert f"crop to {cache.earliest} or later, or make the cache with slack=" in said
        enough = model.trunk.new_cache(2, 16, int(said.rsplit("=", 1)[1]))
        model(idx[:, :count], cache=enough)
        enough.crop(n)
    assert "whole numbers" in refusal(cache.crop, 2.5)


def test_slack_costs_its_rows():
    """Two heads of two sequences, float32; where everything is kept there is nothing to set aside."""
    for structure, rows in ((WINDOW, 64 + 64), (GSWA, 16), (MLR, 8 + 6 + 4 + 4 + 4 + 4 + 2), ("low_rank", 0)):
        plain, cache = (layer_cache(structure, slack=slack) for slack in (0, 10))
        assert cache.nbytes - plain.nbytes == 10 * rows * 2 * 2 * 4
    assert "slack is -1" in refusal(gpt().trunk.new_cache, 1, 4, -1)


@EVERY_CACHE
@torch.no_grad()
def test_speculative_decoding(structure):
    """Five tokens proposed at a time, by a model that is wrong now and then: the text of greedy decoding."""
    model, start = gpt(structure), tokens(B=1, T=3)
    want = model.generate(start, 13, temperature=0)
    cache, text, rounds = model.trunk.new_cache(1, 16, slack=5), start, 0
    model(text[:, :-1], cache=cache)
    while text.shape[1] < 16:
        n, rounds = text.shape[1], rounds + 1
        proposed = want[:, n : n + 5].clone()
        proposed[:, rounds % 5 :] += 1
        proposed = (proposed % 11)[:, : 16 - n]
        given = torch.cat([text[:, -1:], proposed], 1)[:, : 16 - cache.count]
        right = model(given, cache=cache).argmax(-1)  # of the position behind each
        agreed = (right[:, : proposed.shape[1]] == proposed[:, : right.shape[1]]).long().cumprod(1).sum().item()
        text = torch.cat([text, right[:, : agreed + 1]], 1)[:, :16]
        cache.crop(text.shape[1] - 1)
    assert torch.equal(text, want)
    assert rounds < 10


# Sequences chosen anew


@EVERY_CACHE
@torch.no_grad()
def test_beam_search_equals_recomputing(structure):
    """Three beams of each of two prompts, with a cache whose sequences follow their beams."""
    model, prompts, beams = gpt(structure), tokens(T=4), 3

    def search(logits_of, follow):
        text, total = prompts.repeat_interleave(beams, 0), torch.tensor([0.0, -99, -99]).double().repeat(2)
        for step in range(9):
            likelihood = total[:, None] + logits_of(text if step else prompts)[:, -1].log_softmax(-1).expand(6, -1)
            total, best = likelihood.view(2, -1).topk(beams)
            total, beam = total.flatten(), (best // 11 + torch.tensor([[0], [beams]])).flatten()
            follow(beam)
            text = torch.cat([text[beam], best.view(-1, 1) % 11], 1)
        return text, total

    def recomputed(text):
        logits = model(text)
        return logits if len(logits) == 6 else logits.repeat_interleave(beams, 0)

    cache = model.trunk.new_cache(2, 16)

    def cached(text):
        nonlocal cache
        logits = model(text[:, cache.count :], cache=cache)
        if len(logits) == 2:
            cache = cache.copy([0, 0, 0, 1, 1, 1])
            logits = logits.repeat_interleave(beams, 0)
        return logits

    (want, likelihood), (got, found) = search(recomputed, lambda beam: None), search(cached, lambda b: cache.reorder(b))
    assert torch.equal(got, want)
    assert relative_error(found, likelihood) < 1e-10
    assert len(want.unique(dim=0)) == 6


@EVERY_CACHE
@torch.no_grad()
def test_copies_share_weights_and_nothing_else(structure):
    """In the same layout, which the kernels rely on."""
    model, idx = gpt(structure), tokens()
    cache = model.trunk.new_cache(2, 12, slack=1)
    model(idx[:, :8], cache=cache)
    for twin in (cache.copy(), copy.deepcopy(cache), cache.copy(torch.tensor([0, 1]))):
        assert twin.nbytes == cache.nbytes
        for ours, theirs in zip(twin.layers, cache.layers, strict=True):
            assert ours.scoring is theirs.scoring
            for a, b in zip(ours.places, theirs.places, strict=True):
                assert a.rows.stride() == b.rows.stride()
                assert a.rows.data_ptr() != b.rows.data_ptr()
        model(idx[:, 8:12], cache=twin)
        assert (twin.count, cache.count) == (12, 8)
    assert relative_error(model(idx[:, 8:12], cache=cache), model(idx[:, :12])[:, 8:]) < 1e-10


@EVERY_CACHE
@torch.no_grad()
def test_a_replayed_step_finds_what_was_reordered(structure):
    """In place: a CUDA graph has the addresses."""
    model, idx = gpt(structure), tokens()
    cache = model.trunk.new_cache(2, 16, slack=1)
    model(idx[:, :9], cache=cache)
    where = [[t.data_ptr() for t in (p.rows, layer.at)] for layer in cache.layers for p in layer.places]
    cache.reorder([1, 1])
    cache.crop(8)
    model(idx[:, 8:13], cache=cache)
    assert where == [[t.data_ptr() for t in (p.rows, layer.at)] for layer in cache.layers for p in layer.places]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda c: c.reorder([0]), r"1 indices reorder a cache of 2 sequences; copy\(indices\) takes any"),
        (lambda c: c.reorder([0, 2]), r"keeps the sequences 0 to 1, not all of \[0, 2\]"),
        (lambda c: c.copy([-1]), r"keeps the sequences 0 to 1, not all of \[-1\]"),
        (lambda c: c.copy([]), r"chosen by a list of whole numbers, not \[\]"),
        (lambda c: c.reorder(torch.tensor([True, False])), "chosen by a list of whole numbers"),
        (lambda c: c.reorder([0.0, 1.0]), "chosen by a list of whole numbers"),
        (lambda c: c.layers[0].extend(torch.zeros(2, 0, 24), None), "takes 1 token or more, here are 0"),
        (
            lambda c: c.layers[0].extend(torch.zeros(2, 3, 24), torch.zeros(2, 3, 2, 8)),
            r"the values of 3 tokens are \(2, 3, 3, 8\), not \(2, 3, 2, 8\)",
        ),
    ],
)
@torch.no_grad()
def test_what_is_refused_changes_nothing(call, said):
    model, idx = gpt(WINDOW), tokens()
    cache = model.trunk.new_cache(2, 16)
    model(idx[:, :6], cache=cache)
    with pytest.raises(BadInput, match=said):
        call(cache)
    assert relative_error(model(idx[:, 6:], cache=cache), model(idx)[:, 6:]) < 1e-10


@pytest.mark.parametrize("structure", ["low_rank", WINDOW, GSWA, MLR, "bilinear_BTT"])
@torch.no_grad()
def test_chunks_in_16_bits(structure):
    model, idx = gpt(structure).float(), tokens()
    want = model(idx)
    with torch.autocast("cpu", torch.bfloat16):
        cache = model.trunk.new_cache(2, 16)
        logits = torch.cat([model(part, cache=cache) for part in idx.split([3, 5, 1, 7], 1)], 1)
    assert relative_error(logits, want) < 0.05
