"""MLR attention in models of transformers: the model's own at one level, its definition at several, padding, caches."""

import copy
import json
import re
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compare import assert_same, relative_error
from runs import write_corpus

from plots import hf_table
from scripts import hf_finetune
from structured import BadInput

if find_spec("transformers") is None:
    pytest.skip("needs transformers: pip install -r requirements-chronos.txt", allow_module_level=True)

import transformers
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, DataCollatorWithFlattening
from transformers.masking_utils import sdpa_mask

from structured import hf

pytestmark = pytest.mark.usefixtures("single_thread")
T, VOCAB = 41, 60
SHAPE = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
MODELS = {
    "llama": transformers.LlamaConfig(**SHAPE, num_key_value_heads=2),
    "qwen3": transformers.Qwen3Config(**SHAPE, num_key_value_heads=1),
    "gpt2": transformers.GPT2Config(n_inner=48, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
                                    **{name: value for name, value in SHAPE.items() if name != "head_dim"}),
}  # fmt: skip
LEVELS = [  # ranks, block sizes, weighting
    ((4, 2, 2), None, "none"),
    ((4, 2, 2), (48, 12, 3), "shared"),
    ((2, 0, 6), (10, 4, 3), "none"),  # neither nested nor as long as the text
]
SORTED = (*LEVELS[0], True)


def model_of(name, levels=None, dtype=torch.float64):
    """A small model whose scores are large enough that attention has something to choose."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy((MODELS | ALIKE)[name]))
    for p in model.parameters():
        if p.ndim > 1:
            p.data.mul_(8)
    model = model.to(dtype).eval()
    return hf.use_mlr_attention(model, *levels) if levels else model


def tokens(*shape):
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(1))


def defined(at):
    """Register "definition", MLR attention as it reads, of tokens at positions at (B, T); True pairs are a mask's."""

    def attend(module, q, k, v, mask, scaling, **kwargs):
        levels, d = module.config.mlr, q.shape[3]
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        order = torch.arange(d).expand(q.shape[1], d)
        if hasattr(module.config, "rope_parameters"):
            slowest = [list(reversed(range(d // 2)))]
            pairs = torch.tensor(levels["pairs"][module.layer_idx] if "pairs" in levels else slowest)
            pairs = pairs.repeat_interleave(q.shape[1] // len(pairs), 0)
            order = torch.stack([pairs, pairs + d // 2], -1).flatten(1)
        q, k = (torch.stack([x[:, h, :, order[h]] for h in range(x.shape[1])], 1) for x in (q, k))
        scores, shared, first = 0, 0, 0
        for r, b in zip(levels["ranks"], levels["block_sizes"], strict=True):
            same = (at[:, None, :, None] // b == at[:, None, None, :] // b).double()
            features = slice(first, first + r)
            scores = scores + same * scaling * (q[..., features] @ k[..., features].mT)
            shared, first = shared + same, first + r
        if levels["weighting"] == "shared":
            scores = scores * len(levels["ranks"]) / shared.clamp(min=1)
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        return (weights @ v).transpose(1, 2), None

    AttentionInterface.register("definition", attend)
    AttentionMaskInterface.register("definition", lambda *a, **o: sdpa_mask(*a, **o | dict(allow_is_causal_skip=False)))


def loss_and_gradients(model, implementation, inputs, labels, **kwargs):
    """[logits, gradient of every parameter] of a model with an attention function."""
    model.set_attn_implementation(implementation)
    out = model(**inputs, labels=labels, **kwargs)
    return [out.logits[labels >= 0], *torch.autograd.grad(out.loss, list(model.parameters()))]


def names(model):
    return ["logits", *(name for name, _ in model.named_parameters())]


@pytest.mark.parametrize("name", MODELS)
def test_one_level_is_the_models_own_attention(name):
    model, x = model_of(name, dtype=torch.float32), tokens(2, T)
    want = model(x).logits
    hf.use_mlr_attention(model, (8,))
    assert torch.equal(model(x).logits, want)
    mask = torch.ones_like(x)
    mask[0, :7] = 0
    got = loss_and_gradients(model, "mlr", dict(input_ids=x, attention_mask=mask), x.masked_fill(mask == 0, -100))
    want = loss_and_gradients(model, "sdpa", dict(input_ids=x, attention_mask=mask), x.masked_fill(mask == 0, -100))
    assert_same(got, want, names(model), 1e-5)


ALIKE = {
    "mistral": transformers.MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=None),
    "qwen2": transformers.Qwen2Config(**SHAPE, num_key_value_heads=2),
}


@pytest.mark.parametrize(
    ("name", "levels"), [*product(MODELS, LEVELS), *product(MODELS | ALIKE, [SORTED])], ids=str
)
def test_levels_are_as_defined(name, levels):
    model, x = model_of(name, levels), tokens(2, T)
    defined(torch.arange(T).expand(2, T))
    got = loss_and_gradients(model, "mlr", dict(input_ids=x), x)
    assert_same(got, loss_and_gradients(model, "definition", dict(input_ids=x), x), names(model))
    own = loss_and_gradients(model, "sdpa", dict(input_ids=x), x)
    assert relative_error(got[0], own[0]) > 1e-2


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_padding_changes_no_token(name, side):
    """A row beside a longer one, padded, gives the logits and the gradients that it gives alone."""
    model, (long, short) = model_of(name, LEVELS[1]), (tokens(1, T), tokens(1, 23))
    mask = torch.zeros(2, T, dtype=torch.long)
    mask[0], mask[1, slice(T - 23, T) if side == "left" else slice(23)] = 1, 1
    x = torch.zeros_like(mask)
    x[0], x[1, mask[1] == 1] = long[0], short[0]
    at = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(x, attention_mask=mask, position_ids=at).logits
    got = [out[0], out[1, mask[1] == 1]]
    want = [model(long).logits[0], model(short).logits[0]]
    assert_same(got, want, ["long", "short"])
    parameters = list(model.parameters())
    both = [torch.autograd.grad(sum(part.logsumexp(-1).sum() for part in parts), parameters) for parts in (got, want)]
    assert_same(*both, names(model)[1:])


@pytest.mark.parametrize("said", ["positions", "starts"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_sequences_do_not_meet(name, said, monkeypatch):
    model, lengths = model_of(name, LEVELS[0]), (9, 1, 30, 23)
    texts = [tokens(1, n) for n in lengths]
    want = [model(text).logits[0] for text in texts]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=said == "starts")
    batch = collate([dict(input_ids=text[0].tolist()) for text in texts])
    if said == "starts":
        monkeypatch.setattr(hf, "restarts", None)
    batch.pop("labels")
    assert_same(model(**batch, use_cache=False).logits[0].split(lengths), want, map(str, lengths))


@pytest.mark.parametrize("name", MODELS)
def test_rows_that_are_packed_each(name):
    model, x = model_of(name, LEVELS[2]), tokens(2, T)
    at = torch.stack([torch.arange(T), torch.cat([torch.arange(17), torch.arange(T - 17)])])
    got = model(x, position_ids=at, use_cache=False).logits
    want = [model(x[:1]).logits[0], model(x[1:, :17]).logits[0], model(x[1:, 17:]).logits[0]]
    assert_same([got[0], got[1, :17], got[1, 17:]], want, ["whole", "first", "second"])


def test_packed_sequences_that_continue():
    """Queries and keys of their own number: those of a cache."""
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 2, n, 8, generator=generator, dtype=torch.float64) for n in (7, 33, 33))
    module = SimpleNamespace(config=model_of("gpt2", LEVELS[2]).config, is_causal=True)
    of_q, of_k = ((3, 4), (20, 13))
    starts = {f"cu_seq_lens_{x}": torch.tensor([0, *of]).cumsum(0) for x, of in (("q", of_q), ("k", of_k))}
    got = hf.attend(module, q, k, v, None, 0.3, **starts, max_length_q=4, max_length_k=20)[0].split(of_q, 1)
    alone = zip(q.split(of_q, 2), k.split(of_k, 2), v.split(of_k, 2), strict=True)
    assert_same(got, [hf.attend(module, *x, None, 0.3)[0] for x in alone], ["first", "second"])


WAYS = [
    *((name, dict(do_sample=False)) for name in MODELS),
    ("llama", dict(do_sample=True, temperature=2.0)),
    ("gpt2", dict(do_sample=False, num_beams=3, num_return_sequences=2)),
]


@pytest.mark.parametrize(("name", "way"), WAYS, ids=str)
def test_generation_with_a_cache_is_that_without(name, way):
    """Of a batch padded on the left; and that of every row is what it gives alone."""
    model, x = model_of(name, LEVELS[1]), tokens(2, 19)
    mask = torch.ones_like(x)
    x[1, :6] = mask[1, :6] = 0
    made, options = [], dict(max_new_tokens=16, output_logits=True, return_dict_in_generate=True)
    for use_cache in (True, False):
        torch.manual_seed(3)
        made.append(model.generate(x, attention_mask=mask, use_cache=use_cache, **options, **way))
    assert torch.equal(made[0].sequences, made[1].sequences)
    assert_same(made[0].logits, made[1].logits, map(str, range(16)))
    if way == dict(do_sample=False):
        alone = model.generate(x[1:, 6:], attention_mask=mask[1:, 6:], **options, **way)
        assert_same([got[1:] for got in made[0].logits], alone.logits, map(str, range(16)))


@pytest.mark.parametrize("name", MODELS)
def test_a_cache_continued_in_chunks(name):
    model, x = model_of(name, LEVELS[0]), tokens(2, T)
    cache, parts = None, []
    for part in x.split((17, 1, 11, T - 29), 1):
        out = model(part, past_key_values=cache, use_cache=True)
        cache, parts = out.past_key_values, [*parts, out.logits]
    assert_same([torch.cat(parts, 1)], [model(x).logits], ["logits"])


def test_a_static_cache_is_refused():
    model, x = model_of("llama", LEVELS[0]), tokens(1, 5)
    with pytest.raises(BadInput, match="no StaticCache"):
        model.generate(x, max_new_tokens=3, cache_implementation="static")


def test_layers_with_a_window_keep_it():
    torch.manual_seed(0)
    layers = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=5, use_sliding_window=True)
    config = transformers.Qwen3Config(**SHAPE, num_key_value_heads=2, **layers)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    x, mask = tokens(2, T), torch.ones(2, T, dtype=torch.long)
    mask[0, :9] = 0
    want = model(x, attention_mask=mask).logits[mask == 1]
    hf.use_mlr_attention(model, (8,))
    assert_same([model(x, attention_mask=mask).logits[mask == 1]], [want], ["logits"])
    hf.use_mlr_attention(model, *SORTED)
    options = dict(attention_mask=mask, max_new_tokens=9, do_sample=False)
    assert torch.equal(model.generate(x, **options), model.generate(x, use_cache=False, **options))


def test_a_mask_of_pairs():
    """A mask of pairs alone says who meets; positions are those of the row."""
    model, x = model_of("gpt2", LEVELS[1]), tokens(1, T)
    i = torch.arange(T)
    causal = (i[:, None] >= i)[None, None]
    assert_same([model(x, attention_mask=causal).logits], [model(x).logits], ["causal"])
    assert relative_error(model(x, attention_mask=torch.ones_like(causal)).logits, model(x).logits) > 1e-2


def test_dropout_and_checkpointed_gradients():
    model, x = model_of("llama", LEVELS[0]).train(), tokens(2, T)
    want = loss_and_gradients(model, "mlr", dict(input_ids=x), x)
    model.gradient_checkpointing_enable()
    assert_same(loss_and_gradients(model, "mlr", dict(input_ids=x), x), want, names(model))
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert relative_error(model(x).logits, want[0].view(2, T, -1)) > 1e-2


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_is_what_it_was(name, tmp_path):
    """Also when what was loaded is saved again; and a program without this module does not take it for another."""
    model, x = model_of(name, SORTED, torch.float32), tokens(1, T)
    model.save_pretrained(tmp_path / "once")
    AutoModelForCausalLM.from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "twice")
    again = type(model).from_pretrained(tmp_path / "twice").eval()
    assert (again.config._attn_implementation, again.config.mlr) == ("mlr", model.config.mlr)
    assert torch.equal(again(x).logits, model(x).logits)
    copied = type(model)(type(model.config)(**copy.deepcopy(model.config).to_dict()))
    assert copied.config._attn_implementation == "mlr"
    again.set_attn_implementation("sdpa")
    assert "attn_implementation" not in again.config.to_dict()
    assert "attn_implementation" not in json.loads((tmp_path / "twice" / "generation_config.json").read_text())


def test_a_saved_model_is_refused_where_nothing_knows_its_attention(tmp_path, monkeypatch):
    model_of("llama", LEVELS[1]).save_pretrained(tmp_path)
    monkeypatch.delitem(AttentionInterface._global_mapping, "mlr")
    for kind in (AutoModelForCausalLM, transformers.LlamaForCausalLM):
        with pytest.raises(ValueError, match='`attn_implementation="mlr"` is not supported'):
            kind.from_pretrained(tmp_path)


def test_nothing_of_it_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    again = spec_from_file_location("again", hf.__file__)
    with pytest.raises(ImportError, match=r"pip install 'transformers>=5\.16,<6'"):
        again.loader.exec_module(module_from_spec(again))


def test_sorted_features_leave_the_model_what_it_is():
    """And the scores of the first features are the best of their rank: a low-rank matrix of few singular values."""
    model, x = model_of("gpt2"), tokens(2, T)
    norm, c = (part := model.transformer.h[1]).ln_1, part.attn.c_attn
    for p in (norm.weight, norm.bias, c.bias):
        torch.nn.init.normal_(p)
    inputs = torch.cat([torch.diag(norm.weight), norm.bias[None]])  # of unit variance, and 1

    def scores_of(head, features):
        q, k = (inputs @ c.weight[:, at] + torch.cat([torch.zeros(32, 8), torch.ones(1, 8)]) * c.bias[at]
                for at in (slice(first + 8 * head, first + 8 * head + 8) for first in (0, 32)))  # fmt: skip
        return q[:, :features] @ k[:, :features].mT

    want, whole = model(x).logits, [scores_of(head, 8) for head in range(4)]
    hf.use_mlr_attention(model, (8,), sort=True)
    assert_same([model(x).logits], [want], ["logits"], 1e-10)
    for head, scores in enumerate(whole):
        assert_same([scores_of(head, 8)], [scores], [f"scores of head {head}"], 1e-10)
        left = torch.linalg.svdvals(scores)[3:].norm()
        assert abs((scores - scores_of(head, 3)).norm() / left - 1) < 1e-9


@pytest.mark.parametrize("name", [name for name in MODELS | ALIKE if name != "gpt2"])
def test_pairs_are_sorted_by_their_weight_in_scores(name):
    model = model_of(name)
    layer = model.model.layers[1]
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    attention, inputs = layer.self_attn, torch.diag(layer.input_layernorm.weight)

    def size(kind, head, pair):
        """The norm of what makes a pair's queries or keys, for inputs of all directions and for the bias."""
        linear, at = getattr(attention, f"{kind}_proj"), [head * 8 + pair, head * 8 + pair + 4]
        made = inputs @ linear.weight[at].mT
        made = made if linear.bias is None else torch.cat([made, linear.bias[None, at]])
        gain = getattr(attention, f"{kind}_norm").weight[[pair, pair + 4]] if name == "qwen3" else 1
        return (made * gain).norm().item()

    share = attention.num_key_value_groups
    for g, order in enumerate(hf.sorted_pairs(model)[1]):
        heads = range(g * share, (g + 1) * share)
        weights = [size("k", g, pair) * sum(size("q", head, pair) for head in heads) for pair in range(4)]
        assert order == sorted(range(4), key=weights.__getitem__, reverse=True)


REFUSED = [  # model, levels, words
    ("llama", ((3, 3, 2),), "RoPE turns pairs of features"),
    ("llama", ((4, 2), (64, 32)), "add up to 6"),
    ("gpt2", ((4, 2, 2), (64, 32)), "2 block sizes for 3 ranks"),
    ("gpt2", ((4, 4), None, "levels"), "no level weighting 'levels'"),
    ("gpt2", ((4, 2, 2, 0, 0, 0, 0, 0), None), "give the block sizes yourself"),
]


@pytest.mark.parametrize(("name", "levels", "words"), REFUSED, ids=[words for *_, words in REFUSED])
def test_levels_that_cannot_be_leave_the_model(name, levels, words):
    model = model_of(name)
    with pytest.raises(BadInput, match=words):
        hf.use_mlr_attention(model, *levels)
    assert model.config._attn_implementation == "sdpa"
    assert not hasattr(model.config, "mlr")


def test_models_that_are_not_known():
    neox = transformers.GPTNeoXConfig(**SHAPE)
    with pytest.raises(BadInput, match="models of type 'gpt_neox'"):
        hf.use_mlr_attention(AutoModelForCausalLM.from_config(neox), (4, 4))
    windows = AutoModelForCausalLM.from_config(transformers.MistralConfig(**SHAPE, sliding_window=8))
    with pytest.raises(BadInput, match="a sliding window of 8"):
        hf.use_mlr_attention(windows, (4, 4))
    model = model_of("llama")
    model.set_attn_implementation("mlr")
    with pytest.raises(BadInput, match="no levels"):
        model(tokens(1, 4))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_record_of_fine_tuning(kind, tmp_path, capsys):
    write_corpus(tmp_path / "corpus", 900)
    small = dict(n_layer=1, block_size=64, batch_size=2, steps=2, more_steps=1, eval_windows=4)
    given = [f"--{name}={value}" for name, value in small.items()]
    out = tmp_path / f"{kind}.json"
    hf_finetune.main([f"--kind={kind}", f"--data={tmp_path / 'corpus'}", f"--out={out}", *given])
    before, own, *changed = json.loads(out.read_text())["rows"]
    assert before["after"] == own["at_once"]
    assert [row["attention"] for row in changed] == list(hf_finetune.LEVELS)
    assert all(row["after"] < row["at_once"] != own["at_once"] for row in changed)
    capsys.readouterr()
    hf_table.main([str(out)])
    assert capsys.readouterr().out.count(f"| {kind} |") == 6


BAD = [("--kind=bert", "no kind"), ("--block_size=100", "multiple of 8"), ("--steps=0", "steps"), ("--lr=-1.0", "lr")]


@pytest.mark.parametrize(("given", "words"), BAD)
def test_settings_of_fine_tuning_that_cannot_be(given, words, tmp_path, capsys):
    write_corpus(tmp_path / "corpus", 900)
    with pytest.raises(SystemExit) as end:
        hf_finetune.main([f"--data={tmp_path / 'corpus'}", f"--out={tmp_path / 'a.json'}", given])
    assert end.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "a.json").exists()


def test_the_snippet_of_the_readme_runs(tmp_path, monkeypatch):
    """With a GPT-2 made here in a folder of the name that it has on the hub."""
    monkeypatch.chdir(tmp_path)
    config = transformers.GPT2Config(vocab_size=VOCAB, n_embd=128, n_head=2, n_layer=1, n_positions=64)
    AutoModelForCausalLM.from_config(config).save_pretrained("gpt2")
    _, code = re.findall(r"```python\n(.*?)```", (Path(hf.__file__).parents[1] / "README.md").read_text(), re.DOTALL)
    exec(code, {})
    assert AutoModelForCausalLM.from_pretrained("gpt2-mlr").config.mlr["ranks"] == [32, 16, 16]
