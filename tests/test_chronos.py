"""Chronos with MLR attention: T5's own at one level, its definition at several, caches, checkpoints, training."""

import copy
import json
import math
import signal
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from compare import relative_error
from runs import assert_same_run, begin, checkpoint, flags, metrics, record, signal_at, stops, waves, write_series
from torch.utils.flop_counter import FlopCounterMode

import train_chronos
from data import kernel_synth
from training.configurator import configure
from training.errors import BadInput
from training.process import Process

PACKAGES = pytest.mark.skipif(
    find_spec("chronos") is None or find_spec("transformers") is None,
    reason="needs chronos-forecasting and transformers: pip install -r requirements-chronos.txt",
)
TINY = dict(
    look_back=23, horizon=12, n_layer=2, d_model=32, n_head=4, d_head=8, d_ff=48, n_tokens=64, dropout=0.1,
    mlr_rank_list="4|2|2", batch_size=4, max_iters=6, init_lr=1e-2, eval_interval=4, eval_windows=3, eval_batch_size=8,
    num_samples=5, log_interval=2, device="cpu", synthetic=0.3,
)  # fmt: skip
MLR = dict(token_mixing_struct="multi_level_low_rank")
LEVELS = [  # ranks, block sizes of encoder and decoder (None: halved), weighting
    ((4, 2, 2), None, "none"),
    ((4, 2, 2), None, "shared"),
    ((3, 5), dict(encoder=(24, 7), decoder=(5, 3)), "shared"),
    ((2, 0, 6), dict(encoder=(10, 4, 3), decoder=(9, 9, 2)), "none"),
]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ett")
    write_series(folder / "ETTh1", waves(300), (200, 50, 50))
    return folder


@pytest.fixture
def argv(data_dir, tmp_path):
    return lambda *settings, **more: flags(TINY, dict(data_dir=data_dir, out_dir=tmp_path / "run"), *settings, more)


def model_of(command):
    """The model that a command begins with."""
    return begin(train_chronos, dict(part.removeprefix("--").split("=", 1) for part in command))[1].model


@pytest.fixture(scope="module")
def t5():
    """A Chronos T5 with weights large enough that attention has something to choose."""
    from chronos_mlr import pipeline_for

    torch.manual_seed(0)
    pipeline = pipeline_for(configure(train_chronos.Settings, flags(TINY)))
    for p in pipeline.inner_model.parameters():
        p.data.mul_(40)
    return pipeline.inner_model.eval()


@pytest.fixture(scope="module")
def tokens():
    """Contexts, the first padded on the left, and what is to be predicted."""
    generator = torch.Generator().manual_seed(1)
    inputs, labels = (torch.randint(2, 64, (3, n), generator=generator) for n in (24, 13))
    mask = torch.ones_like(inputs, dtype=torch.bool)
    mask[0, :5] = False
    return dict(input_ids=inputs, attention_mask=mask), labels


def generate(model, inputs, **options):
    return model.generate(
        **inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False, return_dict_in_generate=True,
        output_logits=True, **options,
    )  # fmt: skip


# --- attention ---


@PACKAGES
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("weighting", ["none", "shared"])
def test_one_level_is_t5(implementation, weighting, t5, tokens):
    """Bit for bit: logits, gradients, and what it generates with a cache; the names of the weights are the same."""
    from chronos_mlr import MLRT5Attention, use_mlr_attention

    inputs, labels = tokens
    plain = copy.deepcopy(t5)
    plain.set_attn_implementation(implementation)
    one = use_mlr_attention(copy.deepcopy(plain), (8,), weighting=weighting)
    assert sum(isinstance(m, MLRT5Attention) for m in one.modules()) == 4
    assert list(one.state_dict()) == list(plain.state_dict())
    outputs = [model(**inputs, labels=labels) for model in (one, plain)]
    assert torch.equal(*(out.logits for out in outputs))
    for out in outputs:
        out.loss.backward()
    for (name, p), (_, want) in zip(one.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(p.grad, want.grad), name
    got, want = generate(one, inputs), generate(plain, inputs)
    assert torch.equal(got.sequences, want.sequences)
    assert all(map(torch.equal, got.logits, want.logits))


@PACKAGES
def test_one_level_by_level_scores_is_t5(tokens, t5, monkeypatch):
    """The same without the shortcut to T5's own function, which a level that reaches everywhere takes."""
    from chronos_mlr import MLRT5Attention, use_mlr_attention

    inputs, labels = tokens
    plain = copy.deepcopy(t5)
    plain.set_attn_implementation("eager")
    one = use_mlr_attention(copy.deepcopy(plain), (8,), weighting="shared")
    monkeypatch.setattr(MLRT5Attention, "all_shared", lambda self, n_keys: False)
    assert torch.equal(one(**inputs, labels=labels).logits, plain(**inputs, labels=labels).logits)


def defined(q, k, v, bias, visible, ranks, blocks, weighting):
    """MLR attention of one head, pair by pair."""
    scores = torch.full((len(q), len(k)), -math.inf, dtype=torch.float64)
    edges = np.cumsum([0, *ranks])
    for i in range(len(q)):
        for j in range(len(k)):
            if visible[i, j]:
                shared = [level for level, b in enumerate(blocks) if i // b == j // b]
                score = sum(q[i, edges[m] : edges[m + 1]] @ k[j, edges[m] : edges[m + 1]] for m in shared)
                factor = len(ranks) / max(1, len(shared)) if weighting == "shared" else 1
                scores[i, j] = factor * score + bias[i, j]
    return scores.softmax(-1) @ v


@PACKAGES
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("ranks", "blocks", "weighting"), LEVELS)
def test_levels_are_their_definition(ranks, blocks, weighting, implementation, t5, tokens):
    """Every self-attention of both stacks in float64, from its own input, against a loop over heads and pairs."""
    from chronos_mlr import MLRT5Attention, use_mlr_attention

    inputs, labels = tokens
    model = use_mlr_attention(copy.deepcopy(t5).double(), ranks, blocks, weighting)
    model.set_attn_implementation(implementation)
    calls = []
    for m in model.modules():
        if isinstance(m, MLRT5Attention):
            m.register_forward_hook(lambda m, inputs, output: calls.append((m, inputs[0], *output[:2])))
    model(**inputs, labels=labels)
    assert len(calls) == 4
    for m, x, got, bias in calls:
        seen = torch.ones(13, 13).tril().expand(3, -1, -1) if m.is_decoder else inputs["attention_mask"][:, None]
        seen = seen.expand(3, x.shape[1], x.shape[1]).bool()
        q, k, v = (f(x).unflatten(-1, (4, 8)).transpose(1, 2) for f in (m.q, m.k, m.v))
        heads = [
            [defined(q[b, h], k[b, h], v[b, h], bias[0, h], seen[b], ranks, m.block_sizes, weighting) for h in range(4)]
            for b in range(3)
        ]
        want = m.o(torch.stack([torch.cat(row, -1) for row in heads]))
        assert relative_error(got, want) < 1e-12


@PACKAGES
@pytest.mark.parametrize(("ranks", "blocks", "weighting"), LEVELS)
def test_the_cache_changes_nothing(ranks, blocks, weighting, t5, tokens):
    from chronos_mlr import use_mlr_attention

    inputs, _ = tokens
    model = use_mlr_attention(copy.deepcopy(t5).double(), ranks, blocks, weighting)
    want = generate(model, inputs, use_cache=False)
    for options in ({}, dict(cache_implementation="static")):
        got = generate(model, inputs, **options)
        assert torch.equal(got.sequences, want.sequences)
        assert relative_error(torch.stack(got.logits), torch.stack(want.logits)) < 1e-12
    plain = generate(copy.deepcopy(t5).double(), inputs)
    assert relative_error(torch.stack(plain.logits), torch.stack(want.logits)) > 1e-3, "the levels do something"


@PACKAGES
def test_the_future_moves_nothing(t5, tokens):
    from chronos_mlr import use_mlr_attention

    model = use_mlr_attention(copy.deepcopy(t5), (4, 2, 2), weighting="shared")
    inputs, labels = tokens
    other = labels.clone()
    other[:, 8:] = 5
    with torch.no_grad():
        a, b = (model(**inputs, decoder_input_ids=ids).logits for ids in (labels, other))
    assert torch.equal(a[:, :8], b[:, :8])
    assert not torch.allclose(a[:, 8:], b[:, 8:])


@PACKAGES
def test_default_blocks_are_of_the_longest_sequences(t5):
    """24 tokens of context with the end-of-series token, and 13 of the prediction, as those of 16 cut at 13."""
    from chronos_mlr import use_mlr_attention

    model = use_mlr_attention(copy.deepcopy(t5), (4, 2, 2))
    sizes = [stack.block[0].layer[0].SelfAttention.block_sizes for stack in (model.encoder, model.decoder)]
    assert sizes == [(24, 12, 6), (13, 8, 4)]


@PACKAGES
def test_replacing_twice_is_replacing_once(t5, tokens):
    from chronos_mlr import use_mlr_attention

    inputs, labels = tokens
    once = use_mlr_attention(copy.deepcopy(t5), (4, 4))
    twice = use_mlr_attention(use_mlr_attention(copy.deepcopy(t5), (2, 6)), (4, 4))
    assert torch.equal(once(**inputs, labels=labels).logits, twice(**inputs, labels=labels).logits)


@PACKAGES
@pytest.mark.parametrize(
    ("levels", "says"),
    [
        (dict(ranks=(4, 2)), "add up to 6"),
        (dict(ranks=()), "one whole number"),
        (dict(ranks=(4, 4), weighting="levels"), "no level weighting 'levels'"),
        (dict(ranks=(4, 4), block_sizes=dict(encoder=(24,))), "1 block sizes for 2 ranks"),
        (dict(ranks=(4, 4), block_sizes=dict(coder=(24, 12))), "block_sizes for coder"),
    ],
)
def test_levels_that_cannot_be(levels, says, t5):
    from chronos_mlr import MLRT5Attention, use_mlr_attention

    model = copy.deepcopy(t5)
    with pytest.raises(BadInput, match=says):
        use_mlr_attention(model, **levels)
    assert not any(isinstance(m, MLRT5Attention) for m in model.modules())


@PACKAGES
def test_models_without_levels(t5):
    from transformers import GPT2Config, GPT2LMHeadModel

    from chronos_mlr import use_mlr_attention

    other = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=1, n_positions=8))
    with pytest.raises(BadInput, match="GPT2LMHeadModel has no T5 self-attention"):
        use_mlr_attention(other, (8,))
    model = copy.deepcopy(t5)
    del model.config.chronos_config
    with pytest.raises(BadInput, match="no chronos_config"):
        use_mlr_attention(model, (4, 4))


# --- synthetic series ---


def test_a_series_depends_on_its_seed_and_number_only():
    one = kernel_synth.kernel_synth(3, 5, 40)
    kernel_synth.kernel_synth(3, 6, 40)
    assert np.array_equal(one, kernel_synth.kernel_synth(3, 5, 40))
    assert not np.array_equal(one, kernel_synth.kernel_synth(3, 6, 40))
    assert not np.array_equal(one, kernel_synth.kernel_synth(4, 5, 40))


@pytest.mark.parametrize("length", [2, 3, 50])
def test_every_draw_is_finite(length):
    """300 random sums and products: the bank has 33 kernels, up to five of them in one."""
    assert len(kernel_synth.BANK) == 33
    assert np.isfinite([kernel_synth.kernel_synth(0, i, length) for i in range(300)]).all()


def test_the_kernels_are_their_formulas():
    t = np.linspace(0, 1, 25)
    d = t[:, None] - t
    i = np.arange(25)
    steps = (i[:, None] - i) * 25 / 24  # between the times 0 and 1 there are 24 steps, and periods are in 25ths
    for kernel, want in [
        (kernel_synth.periodic(6), np.exp(-2 * np.sin(np.pi * steps / 6) ** 2)),
        (kernel_synth.rbf(0.1), np.exp(-(d**2) / 0.02)),
        (kernel_synth.rational_quadratic(10.0), (1 + d**2 / 20) ** -10.0),
        (kernel_synth.linear(2.0), 4 + np.outer(t, t)),
        (kernel_synth.white(0.1), 0.1 * np.eye(25)),
        (kernel_synth.constant, np.ones((25, 25))),
    ]:
        assert np.allclose(kernel(d, t[:, None], t), want)


def test_draws_have_the_covariance(monkeypatch):
    """Of one kernel, over many numbers."""
    monkeypatch.setattr(kernel_synth, "BANK", [kernel_synth.rbf(0.5)])
    monkeypatch.setattr(kernel_synth, "MOST_KERNELS", 1)
    draws = np.array([kernel_synth.kernel_synth(0, i, 5) for i in range(4000)])
    t = np.linspace(0, 1, 5)
    assert np.allclose(draws.T @ draws / 4000, np.exp(-2 * (t[:, None] - t) ** 2), atol=0.1)


# --- runs ---


@PACKAGES
@pytest.mark.parametrize("settings", [{}, dict(MLR, mlr_block_divide_by_num_levels=True)], ids=["standard", "mlr"])
def test_three_steps_and_three_more_are_six(settings, argv, tmp_path, monkeypatch):
    train_chronos.main(argv(settings, out_dir=tmp_path / "six"))
    signal_at(monkeypatch, train_chronos, 2, signal.SIGUSR1)
    assert stops(train_chronos.main, argv(settings, out_dir=tmp_path / "parts")) == 128 + signal.SIGUSR1
    train_chronos.main(argv(settings, out_dir=tmp_path / "parts", init_from="resume"))
    assert_same_run(tmp_path / "parts", tmp_path / "six")
    first = metrics(tmp_path / "six")[0]
    assert {"val/mse", "val/wql", "test/mse", "test/mae", "test/wql"} < first.keys()
    assert all(math.isfinite(value) for value in first.values())
    assert record(tmp_path / "six")["command"] == "train_chronos.py"


@PACKAGES
def test_training_lowers_the_loss(argv, tmp_path):
    settings = dict(MLR, max_iters=60, init_lr=2e-2, log_interval=10, eval_interval=60, dropout=0.0, synthetic=0.0)
    train_chronos.main(argv(settings))
    losses = [m["train/loss"] for m in metrics(tmp_path / "run") if "train/loss" in m]
    assert losses[-1] < losses[0] - 0.3


@PACKAGES
def test_a_finished_model_is_a_chronos_checkpoint(argv, tmp_path, tokens):
    """The folder gives the model of the run, with its levels, tokens and lengths; fine-tuning begins at its weights."""
    from chronos_mlr import MLRT5ForConditionalGeneration, load_pipeline

    train_chronos.main(argv(MLR, max_iters=2, mlr_block_size_list="24|9|3"))
    path = tmp_path / "run" / "chronos"
    pipeline = load_pipeline(path)
    config = pipeline.model.config
    assert (config.context_length, config.prediction_length, config.n_tokens) == (23, 12, 64)
    again = argv(MLR, mlr_block_size_list="24|9|3", out_dir=tmp_path / "again")
    trained = model_of(again).eval()
    trained.load_state_dict(checkpoint(tmp_path / "run")["model"])
    trained = trained.t5
    for name, value in trained.state_dict().items():
        assert torch.equal(pipeline.inner_model.state_dict()[name], value), name
    assert type(pipeline.inner_model) is MLRT5ForConditionalGeneration
    inputs, labels = tokens
    assert torch.equal(*(model(**inputs, labels=labels).logits for model in (pipeline.inner_model, trained)))
    quantiles, _ = pipeline.predict_quantiles(torch.randn(2, 23), 12, [0.1, 0.5, 0.9])
    assert quantiles.shape == (2, 12, 3)

    assert model_of(argv(MLR, pretrained=path, out_dir=tmp_path / "x")).t5.config.mlr == trained.config.mlr
    tuned = argv(MLR, pretrained=path, out_dir=tmp_path / "tuned", look_back=30, horizon=8)
    began = model_of([*tuned, f"--out_dir={tmp_path / 'began'}"])
    for name, value in began.t5.state_dict().items():
        assert torch.equal(pipeline.inner_model.state_dict()[name], value), name
    assert (began.lengths.context_length, began.lengths.prediction_length, began.block_size) == (30, 8, 40)
    assert began.t5.config.mlr["block_sizes"]["encoder"] == [31, 16, 8]
    train_chronos.main(tuned)
    assert record(tmp_path / "tuned")["status"] == "finished"


@pytest.fixture
def mlr_folder(t5, tmp_path):
    """A saved Chronos with MLR attention, and the model."""
    from chronos_mlr import use_mlr_attention

    model = use_mlr_attention(copy.deepcopy(t5), (4, 2, 2), weighting="shared")
    model.save_pretrained(tmp_path / "mlr")
    return tmp_path / "mlr", model


@PACKAGES
def test_a_folder_with_levels_loads_with_them_or_not_at_all(mlr_folder, tokens, monkeypatch):
    """By the library's own loader: what is loaded has the model's logits; without chronos_mlr nothing is."""
    from chronos import ChronosPipeline
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    path, model = mlr_folder
    inputs, labels = tokens
    loaded = ChronosPipeline.from_pretrained(str(path)).inner_model
    assert torch.equal(*(each(**inputs, labels=labels).logits for each in (loaded, model)))
    assert json.loads((path / "config.json").read_text())["mlr"] == model.config.mlr
    monkeypatch.delitem(CONFIG_MAPPING._extra_content, "chronos_mlr")
    with pytest.raises(ValueError, match="model type `chronos_mlr`"):
        ChronosPipeline.from_pretrained(str(path))


@PACKAGES
def test_a_plain_folder_is_a_plain_t5(t5, tmp_path, tokens):
    from chronos_mlr import load_pipeline

    t5.save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path).inner_model
    assert type(loaded) is type(t5)
    inputs, labels = tokens
    assert torch.equal(*(each(**inputs, labels=labels).logits for each in (loaded, t5)))


@PACKAGES
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "has MLR attention, not low_rank; give --token_mixing_struct=multi_level_low_rank --mlr_rank_list='4|2|2"),
        (dict(MLR, mlr_rank_list="4|4", mlr_block_divide_by_num_levels=True), "give --mlr_rank_list='4|2|2'"),
        (MLR, "--mlr_block_divide_by_num_levels=True"),
    ],
)
def test_weights_of_other_levels(settings, says, mlr_folder, argv, capsys):
    assert stops(train_chronos.main, argv(settings, pretrained=mlr_folder[0])) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert says in said[0]


@PACKAGES
def test_windows_are_a_function_of_seed_and_number(argv, data_dir):
    cfg = configure(train_chronos.Settings, argv())
    data = train_chronos.Windows(cfg)
    drawn = [train_chronos.training_window(data, cfg, number) for number in range(40)]
    assert all(torch.equal(train_chronos.training_window(data, cfg, n), drawn[n]) for n in (7, 0, 33))
    values = data.values[:200]
    real = values.unfold(0, 35, 1).flatten(0, 1)  # every window of every channel of the training part
    found = [bool((real == window).all(-1).any()) for window in drawn]
    assert 40 * 0.5 < sum(found) < 40
    synthetic = drawn[found.index(False)]
    want = kernel_synth.kernel_synth(cfg.seed, found.index(False), 35)
    assert torch.equal(synthetic, torch.from_numpy(want).float())


@PACKAGES
def test_an_evaluation_is_the_librarys_forecast(argv):
    """Errors of the three evenly spaced test windows of every channel, by hand; the random state stays as it was."""
    cfg = configure(train_chronos.Settings, argv(eval_batch_size=100))
    data, model, process = train_chronos.Windows(cfg), model_of(argv()).eval(), Process(cfg)
    before = torch.get_rng_state()
    got = train_chronos.errors(model, data, cfg, process, "test")
    assert got == train_chronos.errors(model, data, cfg, process, "test")
    assert torch.equal(torch.get_rng_state(), before)
    rows = data.first["test"]
    past, future = data.batch(rows[:: len(rows) // 3][:3])
    torch.manual_seed(0)
    series, truth = past.mT.flatten(0, 1), future.mT.flatten(0, 1)
    levels = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    quantiles, _ = model.pipeline.predict_quantiles(series, 12, levels)
    losses = []
    for level, forecast in zip(levels, quantiles.unbind(-1), strict=True):
        under = truth - forecast
        losses.append(2 * torch.where(under > 0, level * under, (level - 1) * under).sum() / truth.abs().sum())
    error = truth - quantiles[..., 4]
    want = dict(mse=error.square().mean(), mae=error.abs().mean(), wql=sum(losses) / 9)
    assert got == pytest.approx({name: value.item() for name, value in want.items()}, rel=1e-5)


@PACKAGES
def test_flops_are_those_counted(argv):
    """Of one window through T5's own attention; MLR counts what its blocks hold."""
    model = model_of(argv()).eval()
    model.t5.set_attn_implementation("eager")
    ids, labels = torch.ones(1, 24, dtype=torch.long), torch.ones(1, 13, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids, torch.ones_like(ids, dtype=torch.bool), labels)
    cost = model.compute(model.block_size)
    assert counter.get_total_flops() == 2 * cost.macs
    assert cost.macs - cost.non_emb == 13 * 32 * 64
    mlr = model_of(argv(MLR, overwrite=True))
    encoder = 24 * 24 * 8 - 24 * (4 * 24 + 2 * 12 + 2 * 6)
    decoder = 13 * 13 * 8 - (4 * 13 * 13 + 2 * (8 * 8 + 5 * 5) + 2 * (3 * 4 * 4 + 1))
    assert cost.macs - mlr.compute(mlr.block_size).macs == 2 * 4 * (encoder + decoder)


@PACKAGES
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(MLR, mlr_rank_list="4|2"), "add up to 6"),
        (dict(token_mixing_struct="bilinear_BTT"), "there are low_rank, multi_level_low_rank"),
        (dict(pretrained="/nowhere"), "pretrained=/nowhere cannot be loaded as a Chronos T5"),
        (dict(synthetic=1.5), "a share is at most 1"),
        (dict(look_back=300), "too few"),
        (dict(n_tokens=4), "n_tokens is 4"),
        (dict(fsdp=True), "a Chronos is whole in every process"),
    ],
)
def test_bad_input(settings, says, argv, tmp_path, capsys):
    assert stops(train_chronos.main, argv(settings)) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert says in said[0]
    assert not (tmp_path / "run").exists()


def test_a_missing_package_is_named(argv, monkeypatch, capsys):
    monkeypatch.setattr(train_chronos, "find_spec", lambda name: None)
    assert stops(train_chronos.main, argv()) == 2
    assert "pip install -r requirements-chronos.txt" in capsys.readouterr().err
    assert "chronos_mlr" not in sys.modules or find_spec("chronos")
