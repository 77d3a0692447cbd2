"""What the original does, as tables of facts: shapes, deviations, rates, curriculum, clipping, compute, defaults.

The original is the paper's released code (YilunKuang/structured-attention, commit 4895ad58); each table says in which
of its files the fact stands, or how it follows from the paper's formulas. Where we differ on purpose README says so.
"""

import math

import pytest
import torch
from runs import TINY_ICL, checkpoint, flags, metrics, record

import train
import train_ICL
from data.icl_regression.sampler import interleave, sample_prompts, training_examples
from model import GPT, InContextRegressor
from training import optimizer
from training.configurator import configure
from training.mup import adamw, initialise, roles

CONFIG = "config/icl_configs"
STANDARD, BTT, MLR = (f"{CONFIG}/{name}.py" for name in ("standard", "bilinear_btt", "bilinear_mlr"))


def in_context(*argv):
    """The settings and the model of train_ICL.py's command line, on no device."""
    cfg = configure(train_ICL.Settings, [f"{CONFIG}/paper.py", *argv])
    with torch.device("meta"):
        return cfg, InContextRegressor(cfg.model_config(block_size=cfg.tokens), cfg.n_dims)


def language_model(*argv):
    cfg = configure(train.Settings, ["config/struct_configs/train_struct_gpt2.py", *argv])
    with torch.device("meta"):
        return cfg, GPT(cfg.model_config(), 96)


# --- models ---


@pytest.mark.parametrize(
    ("d_model", "c", "d"),  # src/model.py, BilinearBTTAttention.factorize: d is the first divisor above sqrt(d_model)
    [(16, 2, 8), (32, 4, 8), (64, 4, 16), (96, 8, 12), (128, 8, 16), (256, 8, 32), (512, 16, 32), (1024, 16, 64)],
)
def test_factors_of_bilinear_btt(d_model, c, d):
    H, s = 4, 2
    size = ["--n_dims=8", f"--d_model={d_model}", f"--n_head={H}", f"--btt_tt_rank={s}", "--n_layer=1"]
    _, model = in_context(BTT, *size)
    right, left = (p for p in model.trunk.h[0].attn.scoring.key.parameters())
    assert right.shape == (c, d, H * d * s)  # (c, d, H b s) with b = d
    assert left.shape == (H * d, c * s, c)  # (H b, c s, a), transposed to multiply from the right, with a = c
    spread = {name: fan_in**-0.5 for name, _, role, fan_in in roles(model) if ".key." in name and role == "hidden"}
    assert sorted(spread.values()) == pytest.approx(sorted([d**-0.5, (c * s) ** -0.5]))


@pytest.mark.parametrize(
    ("argv", "parameters"),
    [  # n_dims 64, d_model 256, all of the model
        # 6 (2 D^2 + 8 D^2 + H D (a + b) + 3 D) + D + wpe 256 D + n_dims D + D
        ([BTT, "--n_head=8"], 6 * (10 * 256**2 + 8 * 256 * 40 + 3 * 256) + 256 + 256 * 256 + 64 * 256 + 256),
        # 6 (12 D^2 + 2 D + 2 r) + ..
        ([STANDARD, "--n_head=8"], 6 * (12 * 256**2 + 2 * 256 + 2 * 32) + 256 + 256 * 256 + 64 * 256 + 256),
    ],
    ids=["BTT", "standard"],
)
def test_number_of_parameters(argv, parameters):
    _, model = in_context("--n_dims=64", "--d_model=256", *argv)
    assert model.num_params()[0] == parameters
    assert not any(name.endswith("bias") for name, _ in model.named_parameters())


def test_the_number_measured_on_the_original():
    """src/models/icl_models.py with bias=False, read-in and read-out included; 4,412,673 with factors (16, 16)."""
    _, model = in_context("--n_dims=64", "--d_model=256", "--n_head=8", BTT)
    assert model.num_params()[0] == 4_510_720


@pytest.mark.parametrize(
    ("parameter", "std", "rate"),  # src/muP.py at base width 768: the deviation, and the rate over the tuned one
    [
        ("wpe", 0.02, 1),
        ("read_in", 0.02, 1),
        ("read_out", 0, 768 / 256),
        ("h.0.attn.scoring.query.weight", 256**-0.5, 768 / 256),
        ("h.0.attn.value", 256**-0.5, 768 / 256),
        ("h.0.attn.c_proj", 0, 768 / 256),
        ("h.0.mlp.c_fc", 256**-0.5, 768 / 256),
        ("h.0.mlp.c_proj", 0, 768 / 1024),
        ("h.0.attn.scoring.query_norm", None, 1),
        ("ln_f", None, 1),
    ],
)
def test_deviations_and_rates_of_standard_attention(parameter, std, rate):
    assert_deviation_and_rate([STANDARD], parameter, std, rate)


@pytest.mark.parametrize(
    ("parameter", "std", "rate"),  # blocks of 32 -> 8 * 32 and of 8 -> 8: fan-in 32 and 8
    [("key.levels.0.0", 32**-0.5, 768 / 32), ("key.levels.0.2", 8**-0.5, 768 / 8)],
)
def test_deviations_and_rates_of_bilinear_btt(parameter, std, rate):
    assert_deviation_and_rate([BTT], parameter, std, rate)


def assert_deviation_and_rate(argv, parameter, std, rate):
    cfg = configure(train_ICL.Settings, ["--n_dims=64", "--d_model=256", "--n_layer=1", *argv])
    model = InContextRegressor(cfg.model_config(block_size=cfg.tokens), cfg.n_dims)
    torch.manual_seed(0)
    initialise(model)
    ((_, p),) = [(name, p) for name, p in model.named_parameters() if parameter in name]
    optimizer = adamw(model, 1e-4)
    (group,) = [g for g in optimizer.param_groups if any(q is p for q in g["params"])]
    assert group["lr"] == pytest.approx(1e-4 * rate)
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.95), 1e-20, 0)
    if std is None:
        assert (p == 1).all()
    else:
        assert p.std().item() == pytest.approx(std, rel=0.05)


# --- training in context ---


def test_defaults_of_train_icl():
    """train_ICL.py, parse_args, and its loop, which has no clipping and a constant rate after 1,000 steps."""
    cfg = train_ICL.Settings()
    assert cfg.max_iters == 500_001  # training_train_steps
    assert cfg.training_learning_rate == 3e-4
    assert cfg.training_num_training_examples == -1  # None: fresh prompts
    assert cfg.training_curriculum_adaptive_inc is True
    assert cfg.training_curriculum_warmup_ratio == 0.06
    assert (cfg.grad_clip, cfg.weight_decay, cfg.dropout, cfg.bias) == (0, 0, 0, False)
    assert (cfg.batch_size, cfg.n_layer, cfg.do_qk_ln, cfg.warmup_iters) == (64, 6, True, 1_000)
    assert (cfg.points, cfg.tokens) == (2 * cfg.n_dims, 4 * cfg.n_dims)


@pytest.mark.parametrize("max_iters", [100_000, 230_000, 500_001])
@pytest.mark.parametrize(
    ("n_dims", "dims"),  # in_context_regression/curriculum.py with train_ICL.py's increment: step -> dims
    [
        (16, {0: 4, 1_999: 4, 2_000: 5, 12_000: 10, 24_000: 16, 99_999: 16}),
        (64, {2_000: 8, 15_999: 32, 16_000: 36, 30_000: 64, 99_999: 64}),
        (128, {2_000: 13, 26_000: 121, 28_000: 128}),
    ],
)
def test_a_short_run_is_a_prefix_of_the_papers(n_dims, dims, max_iters):
    cfg, _ = in_context(f"--n_dims={n_dims}", "--d_model=128", f"--max_iters={max_iters}")
    curriculum = cfg.curriculum()
    points = {step: min(2 * n_dims, 8 + 2 * (size - 4)) for step, size in dims.items()}
    assert {step: curriculum.at(step) for step in dims} == {step: (dims[step], points[step]) for step in dims}


@pytest.mark.parametrize(
    ("argv", "step", "size"),
    [
        (["--training_curriculum_dims_start=8"], 2_000, (9, 10)),  # inc 1: 8 + 15 >= 16
        (["--training_curriculum_points_start=32"], 2_000, (5, 32)),
        (["--training_curriculum_steps=-1", "--max_iters=20000"], 2_000, (16, 32)),  # 6% hold no interval: one raise
        (["--training_curriculum_dims_start=16", "--training_curriculum_points_start=32"], 0, (16, 32)),
    ],
)
def test_the_curriculum_obeys_its_settings(argv, step, size):
    cfg, _ = in_context("--n_dims=16", *argv)
    assert cfg.curriculum().at(step) == size


def test_a_resume_on_another_curriculum_is_refused(tmp_path, capsys):
    """Without training_curriculum_steps the growth depends on max_iters, which a resume may raise otherwise."""
    adaptive = dict(training_curriculum_adaptive_inc=True, training_curriculum_dims_start=1)
    argv = flags(TINY_ICL, adaptive, out_dir=tmp_path)
    train_ICL.main(argv)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(SystemExit):
        train_ICL.main([*argv, "--init_from=resume", "--max_iters=200"])
    assert "another curriculum" in capsys.readouterr().err
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    train_ICL.main([*argv, "--init_from=resume", "--max_iters=8"])  # still one raise
    assert record(tmp_path)["status"] == "finished"


@pytest.mark.parametrize("grad_clip", [None, 0.01])
def test_steps_in_context_are_not_clipped(grad_clip, tmp_path):
    """By default the steps are those of a plain loop without clipping (train_ICL.py, train_step)."""
    change = {} if grad_clip is None else dict(grad_clip=grad_clip)
    argv = flags(TINY_ICL, change, dropout=0.0, max_iters=4, training_num_training_examples=-1, out_dir=tmp_path)
    train_ICL.main(argv)
    cfg = configure(train_ICL.Settings, argv)
    torch.manual_seed(cfg.seed)
    model = InContextRegressor(cfg.model_config(block_size=cfg.tokens), cfg.n_dims)
    initialise(model)
    optimizer = adamw(model, cfg.training_learning_rate)
    for step in range(4):
        dims, points = cfg.curriculum().at(step)
        examples = training_examples(cfg.seed, step, cfg.batch_size)
        x, y = sample_prompts("linear_regression", cfg.seed, examples, cfg.n_dims, points, dims)
        optimizer.zero_grad()
        (model(interleave(x, y)) - y).square().mean().backward()
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * min(1, (step + 1) / cfg.warmup_iters)
        optimizer.step()
    weights = checkpoint(tmp_path)["model"]
    errors = [(weights[name] - p).abs().max().item() for name, p in model.named_parameters()]
    assert (max(errors) < 1e-6) == (grad_clip is None), errors


def test_language_models_are_clipped_at_1(monkeypatch, data_dir, tmp_path):
    """train.py of the original: grad_clip = 1.0."""
    assert train.Settings().grad_clip == 1.0
    limits, clip = [], optimizer.clip_grad_norm_
    monkeypatch.setattr(optimizer, "clip_grad_norm_", lambda p, most: limits.append(most) or clip(p, most))
    train.main(["--dataset=text", f"--data_dir={data_dir}", "--n_layer=1", "--d_model=64", "--block_size=16",
                "--max_iters=1", "--eval_iters=1", "--device=cpu", f"--out_dir={tmp_path}"])  # fmt: skip
    train_ICL.main(flags(TINY_ICL, out_dir=tmp_path / "icl", max_iters=1))
    assert limits == [1.0, math.inf]


def test_excess_loss_is_over_predicting_zero(tmp_path):
    """Ours: the original divides by mean(max(dims - i, 0)), which is not of the scale of prompts with x ~ N(0, I/d)."""
    train_ICL.main(flags(TINY_ICL, out_dir=tmp_path))
    first = next(m for m in metrics(tmp_path) if "excess_loss" in m)
    assert first["excess_loss"] == pytest.approx(1, abs=0.2)


# --- the paper's axis of compute ---


@pytest.mark.parametrize("n_dims", [16, 64])
@pytest.mark.parametrize("d_model", [128, 256])
@pytest.mark.parametrize(
    ("argv", "mixing"),
    [  # multiply-adds a token and layer beside W_V, W_O and the MLP, and LayerNorm elements: 8 heads, T = 4 n_dims
        ([STANDARD], lambda D, T: (2 * D * D + 2 * T * D, 2 * D)),
        ([BTT], lambda D, T: (8 * D * {128: 24, 256: 40}[D] + 8 * T * D + T * D, 8 * D)),
        (
            [MLR, "--mlr_rank_list=R|R|R|R"],  # level l: 2^l chunks, 8 R of D / 2^l features each, two sides
            lambda D, T: (8 * D * D + 8 * 15 * (D // 32) * T + T * D - 6 * D * D, 2 * 8 * 15 * (D // 32)),
        ),
    ],
    ids=["standard", "BTT", "MLR"],
)
def test_paper_compute_in_context(argv, mixing, n_dims, d_model):
    """src/utils.py, compute_model_FLOPs_for_ICLRegression: forward multiply-adds, 5 a LayerNorm element."""
    D, T, L = d_model, 4 * n_dims, 6
    argv = [arg.replace("R", str(D // 32)) if "rank" in arg else arg for arg in argv]
    _, model = in_context(*argv, f"--n_dims={n_dims}", f"--d_model={D}", "--n_head=8")
    products, norms = mixing(D, T)
    layer = 2 * D * D + 8 * D * D + products + 5 * (norms + 2 * D)
    assert model.compute(T).paper / T == L * layer + 5 * D + n_dims * D + D


WINDOW_KEYS = sum(min(1024, i + 512) - max(0, i - 512) for i in range(1024))  # the keys in [i - 512, i + 512)


@pytest.mark.parametrize("d_model", [256, 384, 512, 768])
@pytest.mark.parametrize(
    ("argv", "scores"),  # multiply-adds of a head's scores, in units of T = 1024
    [
        ([], lambda T: 64 * T),
        (
            ["--token_mixing_struct=multi_level_low_rank", "--mlr_block_divide_by_num_levels=True"],
            lambda T: sum(r * T // 2**i for i, r in enumerate((32, 8, 6, 4, 4, 4, 4, 2))),
        ),
        (["--token_mixing_struct=low_rank_with_sliding_window"], lambda T: 64 * WINDOW_KEYS / T),
        (["--token_mixing_struct=low_rank_with_gswa"], lambda T: 32 * T + 32 * WINDOW_KEYS / T),
    ],
    ids=["standard", "MLR", "window", "GSWA"],
)
def test_paper_compute_of_language_models(argv, scores, d_model):
    """src/utils.py, compute_model_FLOPs without embeddings and lm_head."""
    D, T, L, H = d_model, 1024, 6, d_model // 64
    _, model = language_model(f"--d_model={D}", *argv)
    layer = 12 * D * D + H * (scores(T) + 64 * T) + 5 * (2 * D + 2 * D)
    assert model.compute(T).paper / T == pytest.approx(L * layer + 5 * D, rel=1e-12)


# --- what a structure cannot obey is refused ---


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["bilinear_MLR", "--mlr_block_divide_by_num_levels=True"], "mlr_block_divide_by_num_levels is True"),
        (["low_rank", "--mlr_divide_by_num_levels=True"], "mlr_divide_by_num_levels is True"),
        (["bilinear_BTT", "--do_qk_ln=False"], "do_qk_ln is False"),
        (["bilinear_MLBTC", "--do_qk_ln=False"], "do_qk_ln is False"),
        (["bilinear_BTT", "--d_qk_head=4"], "d_qk_head is 4"),
        (["bilinear_BTT", "--mha_SP_attn_logits_scaling=True"], "mha_SP_attn_logits_scaling is True"),
        (["multi_level_low_rank", "--mha_SP_attn_logits_scaling=True"], "mha_SP_attn_logits_scaling is True"),
        (["low_rank", "--btt_tt_rank=2"], "btt_tt_rank is 2"),
        (["bilinear_BTT", "--mlbtc_family=monarch"], "mlbtc_family is monarch"),
        (["low_rank", "--mlr_block_size_list=16|8"], "mlr_block_size_list is 16|8"),
        (["low_rank", "--d_head=32", "--d_model=128"], "n_head 8 heads of d_head 32 are 256 wide, d_model is 128"),
    ],
)
def test_a_setting_that_a_structure_cannot_obey(argv, words, tmp_path, capsys):
    command = [f"--token_mixing_struct={argv[0]}", *argv[1:], f"--out_dir={tmp_path / 'run'}", "--device=cpu"]
    with pytest.raises(SystemExit) as stop:
        train_ICL.main(command)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_heads_by_number_or_width():
    def heads(**change):
        return train.Settings(d_model=256, **change).model_config().scoring.n_head

    assert [heads(), heads(d_head=32), heads(n_head=2), heads(n_head=8, d_head=32)] == [4, 8, 2, 8]


def test_bilinear_mlr_without_norms():
    """As in the original, do_qk_ln=False leaves them out."""
    _, model = in_context(MLR, "--n_dims=8", "--d_model=64", "--mlr_rank_list=4|2|2", "--do_qk_ln=False")
    assert not any("norm" in name for name, _ in model.named_parameters())
