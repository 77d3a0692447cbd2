"""train_TS.py: which windows there are, what an evaluation averages, exact resumes, records, and that it learns.

forecasters.py too: each forecaster against its definition.
"""

import json
import os
import runpy
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import (
    STRUCTURES,
    TINY,
    assert_same_run,
    begin,
    checkpoint,
    flags,
    initial_weights,
    metrics,
    record,
    signal_at,
    stops,
    waves,
    write_series,
)
from torch.utils.flop_counter import FlopCounterMode

import train_TS
from data.ett import COLUMNS
from data.series import DTYPE, SPLITS, first_targets, load_series
from forecasters import (
    BatchNorm,
    DLinear,
    InstanceNorm,
    PatchForecaster,
    number_of_patches,
    repeat_last,
    seasonal_naive,
)
from training.configurator import configure
from training.distributed import World
from training.errors import BadInput

ROOT = Path(__file__).parents[1]
TINY_TS = dict(TINY, look_back=16, horizon=5, batch_size=8, init_lr=3e-4, dropout=0.2, mlr_rank_list="4|2|2")
ROWS = (90, 40, 30)
COUNTED = ["step", "seconds", "tokens", "compute", "non_emb_compute", "paper_compute"]
PROGRESS = [*COUNTED, "train/mse", "lr", "grad_norm", "tokens_per_s", "mfu"]
EVALUATION = [*COUNTED, "val/mse", "test/mse", "test/mae", "best/step", "best/test_mse", "best/test_mae"]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ett")
    write_series(folder / "ETTh1", waves(sum(ROWS)), ROWS)
    return folder


@pytest.fixture
def argv(data_dir, tmp_path):
    def make(*settings, **more):
        return flags(TINY_TS, dict(data_dir=data_dir, out_dir=tmp_path / "run"), *settings, more)

    return make


@pytest.fixture
def build(data_dir, tmp_path):
    """build(**settings) is a run at its start, with every weight drawn, so that its forecasts are not all zero."""

    def make(**settings):
        run = begin(train_TS, TINY_TS, dict(data_dir=data_dir, out_dir=tmp_path / "run", overwrite=True), settings)[1]
        torch.manual_seed(0)
        for p in run.model.parameters():
            p.data.add_(0.2 * torch.randn_like(p))
        run.model.eval()
        return run

    return make


# --- windows ---


def plain_windows(borders, look_back, horizon):
    """{split: [(rows read, rows predicted), ..]} of all windows whose predicted rows are rows of the split."""
    found = {split: [] for split in SPLITS}
    for start in range(borders[-1]):
        past = range(start, start + look_back)
        future = range(past.stop, past.stop + horizon)
        for split, first, end in zip(SPLITS, borders[:-1], borders[1:], strict=True):
            if first <= future.start and future.stop <= end:
                found[split].append((past, future))
    return found


@pytest.mark.parametrize(("look_back", "horizon"), [(16, 5), (1, 1), (50, 30), (89, 1), (60, 30)])
def test_every_window_and_no_other(look_back, horizon, build, data_dir):
    """No window is dropped, no target is an input, and the values are those of the file, standardised by training."""
    run = build(look_back=look_back, horizon=horizon)
    raw = np.concatenate([np.fromfile(data_dir / "ETTh1" / f"{s}.bin", DTYPE).reshape(-1, 7) for s in SPLITS])
    values = (raw - raw[: ROWS[0]].mean(0)) / raw[: ROWS[0]].std(0)
    for split, windows in plain_windows([0, *np.cumsum(ROWS)], look_back, horizon).items():
        past, future = run.data.batch(run.data.first[split])
        assert len(past) == len(future) == len(windows) > 0
        for got_past, got_future, (read, predicted) in zip(past, future, windows, strict=True):
            assert read.stop == predicted.start
            assert np.allclose(got_past, values[read], atol=1e-5)
            assert np.allclose(got_future, values[predicted], atol=1e-5)


def test_one_channel(build):
    every, one = build(), build(features="S")
    for a, b in zip(every.data.batch([20, 33]), one.data.batch([20, 33]), strict=True):
        assert b.shape[-1] == 1
        assert torch.equal(a[..., COLUMNS.index("OT")], b[..., 0])
    assert one.model(one.data.batch([20, 33])[0]).shape == (2, 5, 1)


def test_values_after_the_training_part_change_nothing_in_it(data_dir, tmp_path, build):
    changed = waves(sum(ROWS))
    changed[ROWS[0] :] += 100
    write_series(tmp_path / "other" / "ETTh1", changed, ROWS)
    a, b = build(), build(data_dir=tmp_path / "other")
    for step in range(30):
        rows = training_rows(a, step)
        assert np.array_equal(rows, training_rows(b, step))
        for got, want in zip(a.data.batch(rows), b.data.batch(rows), strict=True):
            assert torch.equal(got, want)


def training_rows(run, step):
    return train_TS.training_rows(run.first, run.cfg, step)


@pytest.mark.parametrize("batch_size", [8, 70, 100])
def test_an_epoch_takes_every_training_window_once(batch_size, build):
    """70 windows: as batches of 8, of 70, and of more than there are."""
    one, other = build(batch_size=batch_size), build(batch_size=batch_size, seed=2)
    steps = range(280 // 8)
    rows = np.concatenate([training_rows(one, step) for step in steps])
    assert np.array_equal(rows[-batch_size:], training_rows(one, steps[-1])), "a function of the step"
    epochs = rows[: len(rows) // 70 * 70].reshape(-1, 70)
    assert all(sorted(epoch) == list(one.data.first["train"]) for epoch in epochs)
    assert len(one.data.first["train"]) == 70
    assert not np.array_equal(epochs[0], epochs[1]), "another order each epoch"
    assert not np.array_equal(training_rows(one, 0), training_rows(other, 0)), "and for each seed"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """ETTh1 as the whole prepare script leaves it."""
    source, folder = ROOT.parent / "shared" / "data" / "ETTh1.csv", tmp_path_factory.mktemp("prepared")
    if not source.exists():
        pytest.skip("shared/data/ETTh1.csv is not here")
    runpy.run_path(str(ROOT / "data/ett/prepare.py"))["main"](["--input", str(source), "--out", str(folder)])
    return folder


def test_the_windows_of_etth1(prepared):
    """The counts of the usual protocol: 8640 - L - H + 1 to train on and 2880 - H + 1 each to validate and test on."""
    borders = load_series(prepared / "ETTh1").borders
    for horizon, counts in {96: (8449, 2785, 2785), 192: (8353, 2689, 2689), 336: (8209, 2545, 2545)}.items():
        windows = first_targets(borders, 96, horizon)
        assert tuple(map(len, windows.values())) == counts
        assert (windows["val"].start, windows["test"].start) == (8640, 11520)


# --- evaluation ---


@pytest.mark.parametrize("features", ["M", "S"])
def test_an_evaluation_is_the_mean_over_every_window(features, build):
    """Equal to a loop over single windows; 26 test windows, as one batch, in sevens, and one by one."""
    errors = {}
    for size in (1, 7, 26, 500):
        run = build(features=features, eval_batch_size=size)
        with torch.no_grad():
            errors[size] = run.data.evaluate(run.model)
    with torch.no_grad():
        squared, absolute = {}, {}
        for split in ("val", "test"):
            for row in run.data.first[split]:
                past, future = run.data.batch([row])
                error = (run.model(past) - future).double()
                squared.setdefault(split, []).append(error.square().mean().item())
                absolute.setdefault(split, []).append(error.abs().mean().item())
    assert [len(squared[split]) for split in ("val", "test")] == [36, 26]
    by_hand = {
        "val/mse": np.mean(squared["val"]),
        "test/mse": np.mean(squared["test"]),
        "test/mae": np.mean(absolute["test"]),
    }
    for size, got in errors.items():
        assert list(got) == list(by_hand)
        assert got == pytest.approx(by_hand, rel=1e-6), size
    assert by_hand["test/mse"] > by_hand["test/mae"] ** 2 > 0


def test_the_model_sees_both_sides(build):
    """Not causal: a change of the last hour read moves the encoder's state of the first."""
    run = build()
    past, _ = run.data.batch([20])
    later = past.clone()
    later[:, -1] += 1
    with torch.no_grad():
        a, b = (run.model.trunk(run.model.read_in(x))[:, 0] for x in (past, later))
    assert not torch.allclose(a, b, atol=1e-4)


# --- runs ---


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(STRUCTURES["multi_level_low_rank"], token_mixing_struct="multi_level_low_rank", instance_norm=True),
        dict(forecaster="patch", instance_norm=True, eval_interval=2, patience=3),
        dict(forecaster="dlinear", lr_schedule="type1", eval_interval=1),
    ],
    ids=lambda s: s.get("token_mixing_struct") or s.get("forecaster", "encoder"),
)
def test_three_steps_and_three_more_are_six(settings, argv, tmp_path, monkeypatch):
    train_TS.main(argv(settings, out_dir=tmp_path / "six"))
    signal_at(monkeypatch, train_TS, 2, signal.SIGUSR1)
    assert stops(train_TS.main, argv(settings, out_dir=tmp_path / "parts")) == 128 + signal.SIGUSR1
    assert checkpoint(tmp_path / "parts")["step"] == 3
    train_TS.main(argv(settings, out_dir=tmp_path / "parts", init_from="resume"))
    assert_same_run(tmp_path / "parts", tmp_path / "six")


def test_the_lines_of_metrics(argv, tmp_path):
    """Counters are closed forms: 2 layers of width 16, 16 hours of 7 channels read, 5 predicted, 8 windows a step."""
    train_TS.main(argv())
    lines = metrics(tmp_path / "run")
    assert [(m["step"], "val/mse" in m) for m in lines] == [
        (0, True), (2, False), (4, False), (4, True), (6, False), (6, True)
    ]  # fmt: skip
    L, D, T, C, H, B = 2, 16, 16, 7, 5, 8
    trunk = L * (12 * T * D * D + 2 * T * T * D)
    ends = T * C * D + T * H * D + H * D * C
    for line in lines:
        assert list(line) == (EVALUATION if "val/mse" in line else PROGRESS)
        assert line["tokens"] == line["step"] * B * T
        assert line["compute"] == line["step"] * 6 * B * (trunk + ends)
        assert line["non_emb_compute"] == line["step"] * 6 * B * trunk
        norms = T * D * (2 * L + 1) + L * 2 * T * D
        assert line["paper_compute"] == line["step"] * B * (trunk + ends + 5 * norms)
    assert (record(tmp_path / "run")["command"], record(tmp_path / "run")["status"]) == ("train_TS.py", "finished")


@pytest.mark.parametrize("look_back", [16, 18])
@pytest.mark.parametrize("forecaster", ["encoder", "patch"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_structure_trains(structure, forecaster, look_back, argv, tmp_path):
    """Every parameter takes part: output weights start at zero, so it takes three steps to reach all.

    16 or 18 tokens for the encoder, 8 or 9 patches: what MLR's three levels halve, and what they do not.
    """
    command = argv(STRUCTURES[structure], token_mixing_struct=structure, dropout=0.0, forecaster=forecaster)
    command += flags(look_back=look_back if forecaster == "encoder" else 4 * look_back, max_iters=3)
    before = initial_weights(train_TS, command)
    train_TS.main(command)
    for name, tensor in checkpoint(tmp_path / "run")["model"].items():
        assert tensor.isfinite().all(), name
        assert not torch.equal(tensor, before[name]), f"{name} did not move"


def test_the_defaults_fit_every_structure():
    """At the paper's size the default ranks, windows and layers of each structure can be built."""
    for structure in STRUCTURES:
        cfg = train_TS.Settings(token_mixing_struct=structure)
        scoring = cfg.model_config(block_size=cfg.look_back, causal=False).scoring
        assert (scoring.block_size, scoring.d_model, scoring.n_head, scoring.d_head) == (96, 512, 8, 64)


@pytest.mark.parametrize(
    ("length", "ranks", "blocks"),
    [
        (96, "32|16|8|8", (96, 48, 24, 12)),
        (42, "32|16|8|8", (42, 24, 12, 6)),
        (97, "32|32", (97, 49)),
        (3, "32|16|8|8", (3, 3, 2, 1)),
        (41, "64", (41,)),
    ],
)
def test_default_blocks_of_any_length(length, ranks, blocks):
    cfg = train_TS.Settings(token_mixing_struct="multi_level_low_rank", mlr_rank_list=ranks)
    scoring = cfg.trunk(length).scoring
    assert (scoring.block_size, scoring.block_sizes) == (length, blocks)


def test_blocks_that_are_given_are_kept():
    cfg = train_TS.Settings(token_mixing_struct="multi_level_low_rank", mlr_rank_list="32|32")
    cfg.mlr_block_size_list = "40|7"
    assert cfg.trunk(42).scoring.block_sizes == (40, 7)


def test_a_run_ends_when_its_patience_does(argv, tmp_path, monkeypatch):
    """val/mse by evaluation 3, 2, 5, 2, 2.5: the lowest is the second, and three in a row are no lower."""
    scripted = iter([3.0, 2.0, 5.0, 2.0, 2.5, 1.0])

    def evaluate(self, forecast, world):
        value = next(scripted)
        return {"val/mse": value, "test/mse": 10 * value, "test/mae": value}

    monkeypatch.setattr(train_TS.Windows, "evaluate", evaluate)
    settings = dict(eval_interval=2, max_iters=100, patience=3)
    train_TS.main(argv(settings))
    lines = [m for m in metrics(tmp_path / "run") if "val/mse" in m]
    assert [m["step"] for m in lines] == [0, 2, 4, 6, 8]
    assert [m["best/step"] for m in lines] == [0, 2, 2, 2, 2]
    assert (lines[-1]["best/test_mse"], lines[-1]["best/test_mae"]) == (20, 2)
    assert record(tmp_path / "run")["status"] == "finished"
    saved = checkpoint(tmp_path / "run")
    assert (saved["step"], saved["waited"]) == (8, 3)
    assert any(not torch.equal(saved["best_model"][name], value) for name, value in saved["model"].items())

    train_TS.main(argv(settings, init_from="resume"))  # there is nothing left to do
    assert checkpoint(tmp_path / "run")["step"] == 8
    train_TS.main(argv(settings, init_from="resume", patience=0, max_iters=10))
    assert metrics(tmp_path / "run")[-1]["best/step"] == 10


def test_patience_is_kept_through_a_stop(argv, tmp_path, monkeypatch):
    settings = dict(eval_interval=1, max_iters=40, patience=4, forecaster="dlinear", init_lr=0.1)
    train_TS.main(argv(settings, out_dir=tmp_path / "whole"))
    end = checkpoint(tmp_path / "whole")["step"]
    assert 4 < end < 40
    signal_at(monkeypatch, train_TS, end - 1, signal.SIGUSR1)
    assert stops(train_TS.main, argv(settings, out_dir=tmp_path / "parts")) == 128 + signal.SIGUSR1
    train_TS.main(argv(settings, out_dir=tmp_path / "parts", init_from="resume"))
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_a_stop_does_not_wait_for_the_end_of_an_evaluation(argv, tmp_path, monkeypatch):
    """It comes in the first batch of the first evaluation, which goes no further, and the resume makes it whole."""
    settings, batch, seen = dict(eval_interval=2, max_iters=4, eval_batch_size=4), train_TS.Windows.batch, []

    def interrupted(self, rows):
        seen.append(rows)
        if len(seen) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(train_TS.Windows, "batch", interrupted)
        assert stops(train_TS.main, argv(settings)) == 128 + signal.SIGTERM
    assert len(seen) == 1
    train_TS.main(argv(settings, init_from="resume"))
    train_TS.main(argv(settings, out_dir=tmp_path / "whole"))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_the_best_model_is_that_of_the_best_evaluation(argv, tmp_path):
    """Loaded again, it has the test errors of the record."""
    train_TS.main(argv(forecaster="dlinear", eval_interval=1, init_lr=0.1, max_iters=10))
    saved, line = checkpoint(tmp_path / "run"), metrics(tmp_path / "run")[-1]
    assert 0 < line["best/step"] < 10
    best = DLinear(7, TINY_TS["look_back"], TINY_TS["horizon"])
    best.load_state_dict(saved["best_model"])
    data = train_TS.Windows(configure(train_TS.Settings, argv()))
    with torch.no_grad():
        again = data.evaluate(best, World())
    assert (again["test/mse"], again["test/mae"]) == (line["best/test_mse"], line["best/test_mae"])
    lines = [m for m in metrics(tmp_path / "run") if "val/mse" in m]
    assert min(lines, key=lambda m: m["val/mse"])["step"] == line["best/step"]


def test_the_rates_of_the_published_schedules():
    """70 training windows in batches of 35: two steps an epoch."""
    rates = {
        "constant": [1.0] * 6,
        "type1": [1.0, 1.0, 0.5, 0.25, 0.125, 0.0625],
        "type3": [1.0, 1.0, 1.0, 1.0, 0.9, 0.81],
    }
    for schedule, want in rates.items():
        cfg = train_TS.Settings(lr_schedule=schedule, batch_size=35, warmup_iters=0)
        assert [train_TS.rate_factor(cfg, 70, step) for step in range(12)] == pytest.approx(np.repeat(want, 2))


def test_one_rate_for_every_weight(argv, tmp_path):
    """µP's are not one; after a resume it is the same, and the first step of Adam is as long as the rate."""
    rates = {}
    for one_rate in (False, True):
        command = argv(one_rate=one_rate, max_iters=3, warmup_iters=0, grad_clip=0, out_dir=tmp_path / f"{one_rate}")
        before = initial_weights(train_TS, command)
        train_TS.main([*command, "--max_iters=1"])
        weights = checkpoint(tmp_path / f"{one_rate}")["model"]
        train_TS.main([*command, "--max_iters=2", "--init_from=resume"])
        groups = checkpoint(tmp_path / f"{one_rate}")["optimizer"]["param_groups"]
        rates[one_rate] = {group["lr"] for group in groups}
        moved = (weights["read_out.weight"] - before["read_out.weight"]).abs().max().item()
        assert moved == pytest.approx(3e-4 if one_rate else 3e-4 * 768 / 16, rel=1e-3)
    assert rates[True] == {3e-4}
    assert len(rates[False]) > 2


# --- forecasters ---


def test_dlinear_is_its_definition():
    """Trend: the mean of 25 steps around, the ends repeated 12 times; one map of it, one of what is left."""
    torch.manual_seed(0)
    model, past = DLinear(3, look_back=40, horizon=6), torch.randn(4, 40, 3)
    want = torch.zeros(4, 6, 3)
    for b in range(4):
        for c in range(3):
            x = past[b, :, c]
            padded = torch.cat([x[:1].expand(12), x, x[-1:].expand(12)])
            trend = torch.stack([padded[i : i + 25].mean() for i in range(40)])
            want[b, :, c] = model.trend.weight @ trend + model.trend.bias
            want[b, :, c] += model.rest.weight @ (x - trend) + model.rest.bias
    assert torch.allclose(model(past), want, atol=1e-5)


@pytest.mark.parametrize(("look_back", "patches"), [(336, 42), (96, 12), (17, 2), (16, 2), (15, 1), (8, 1)])
def test_patches(look_back, patches, build):
    """Sixteen steps every eight, the last step repeated eight times at the end; the published model has 42 of 336."""
    assert number_of_patches(look_back) == patches
    model = PatchForecaster(train_TS.Settings(d_model=8, n_head=1).trunk(patches), 2, look_back, 5)
    seen = []
    model.read_in.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    past = torch.randn(3, look_back, 2)
    assert model(past).shape == (3, 5, 2)
    padded = torch.cat([past, past[:, -1:].expand(-1, 8, -1)], 1)
    tokens = seen[0].view(3, 2, patches, 16)
    for i in range(patches):
        assert torch.equal(tokens[:, :, i], padded[:, 8 * i : 8 * i + 16].mT)
    assert 8 * patches + 8 >= look_back, "every step is in a patch"


def test_channels_of_the_patch_forecaster_are_independent(build):
    run = build(forecaster="patch", look_back=32, instance_norm=True)
    past, _ = run.data.batch([40, 50])
    other = past.clone()
    other[..., 2] += torch.randn(32)
    with torch.no_grad():
        a, b = run.model(past), run.model(other)
    same = torch.isclose(a, b, atol=1e-6).all((0, 1))
    assert same.tolist() == [c != 2 for c in range(7)]


def test_batch_norm_is_over_sequences_and_positions():
    """In training by the batch's own mean and population variance, in evaluation by what the batches left."""
    torch.manual_seed(0)
    norm, x = BatchNorm(3), 2 + 5 * torch.randn(4, 7, 3)
    mean, variance = x.mean((0, 1)), x.var((0, 1), correction=0)
    assert torch.allclose(norm(x), (x - mean) / (variance + 1e-5).sqrt(), atol=1e-5)
    kept = 0.1 * mean, 0.9 + 0.1 * x.var((0, 1))
    assert torch.allclose(norm.eval()(x), (x - kept[0]) / (kept[1] + 1e-5).sqrt(), atol=1e-5)


def test_patches_keep_how_far_they_swing():
    """A patch twice as large has other tokens at the end, whose size LayerNorm would hide."""
    torch.manual_seed(0)
    model = PatchForecaster(train_TS.Settings(d_model=8, n_head=2).trunk(4), 1, 32, 5).eval()
    norms = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm | BatchNorm)]
    assert [type(m) for m in norms if m.weight.shape == (8,)] == [BatchNorm] * 5, "but queries and keys keep theirs"
    tokens = [model.trunk.ln_f(scale * torch.ones(1, 4, 8)) for scale in (1, 2)]
    assert torch.allclose(tokens[1], 2 * tokens[0])


def test_batch_norm_wants_one_process(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_TS.World, "from_environment", lambda: World(0, 2, 0, 2))
    assert stops(train_TS.main, argv(forecaster="patch")) == 2
    assert "forecaster patch trains in one process" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_instance_norm_follows_level_and_size():
    """A window a x + b, a and b by channel, has a times the forecast of x, plus b; nothing divides by 0."""
    torch.manual_seed(0)
    model = InstanceNorm(DLinear(3, look_back=40, horizon=6), eps=0.0)
    past, a, b = torch.randn(4, 40, 3), torch.rand(4, 1, 3) + 0.5, torch.randn(4, 1, 3)
    assert torch.allclose(model(a * past + b), a * model(past) + b, atol=1e-4)
    constant = InstanceNorm(DLinear(3, look_back=40, horizon=6))(torch.full((4, 40, 3), 7.0))
    assert constant.isfinite().all()
    assert torch.allclose(constant, torch.tensor(7.0), atol=0.05)


def test_instance_norm_is_undone_by_the_training_target(build):
    """The wrapped encoder counts and names as before, and predicts the mean of its window where its output is zero."""
    run = build(instance_norm=True)
    plain = build()
    assert run.model.num_params() == plain.model.num_params()
    assert run.model.compute(16) == plain.model.compute(16)
    for p in run.model.forecaster.read_out.parameters():
        p.data.zero_()
    past, _ = run.data.batch([20, 33])
    assert torch.allclose(run.model(past), past.mean(1, keepdim=True).expand(-1, 5, -1), atol=1e-5)


def test_the_rules():
    past = torch.arange(60.0).view(1, 30, 2)
    assert torch.equal(repeat_last(past, 3), past[:, [29, 29, 29]])
    assert torch.equal(seasonal_naive(past, 7, 3), past[:, [27, 28, 29, 27, 28, 29, 27]])
    assert torch.equal(seasonal_naive(past, 2, 30), past[:, :2])


@pytest.mark.parametrize(("minutes", "season"), [(60, 24), (15, 96)])
def test_a_rule_leaves_a_record(minutes, season, argv, tmp_path):
    """One line with the errors of all three parts, those of a loop over single windows."""
    write_series(tmp_path / "data" / "ETTh1", waves(sum((190, 140, 130))), (190, 140, 130))
    meta = json.loads((tmp_path / "data/ETTh1/meta.json").read_text())
    (tmp_path / "data/ETTh1/meta.json").write_text(json.dumps(dict(meta, minutes=minutes)))
    train_TS.main(argv(data_dir=tmp_path / "data", forecaster="seasonal_naive", look_back=100, horizon=30))
    (line,) = metrics(tmp_path / "run")
    assert record(tmp_path / "run")["status"] == "finished"
    values = load_series(tmp_path / "data/ETTh1").values
    errors = [
        values[t : t + 30] - values[[t - season + h % season for h in range(30)]] for t in range(330, 460 - 30 + 1)
    ]
    assert line["test/mse"] == pytest.approx(np.square(errors).mean(), rel=1e-5)
    assert line["test/mae"] == pytest.approx(np.abs(errors).mean(), rel=1e-5)
    assert (line["step"], line["compute"]) == (0, 0)
    assert min(line["train/mse"], line["val/mse"]) > 0


@pytest.mark.parametrize("forecaster", ["patch", "dlinear"])
def test_flops_against_pytorchs_counter(forecaster):
    cfg = train_TS.Settings(forecaster=forecaster, look_back=40, horizon=6, d_model=64, n_head=2, instance_norm=True)
    with torch.device("meta"):
        model, past = cfg.build(channels=3), torch.zeros(2, 40, 3)
    with FlopCounterMode(display=False) as counter:
        model(past)
    assert counter.get_total_flops() == 2 * 2 * model.compute(40).macs


def test_the_published_repeat_of_etth1(prepared):
    """DLinear's paper, table of Repeat: MSE and MAE 1.295 / 0.713 at 96 and 1.325 / 0.733 at 192, whatever is read."""
    for horizon, want in {96: (1.295, 0.713), 192: (1.325, 0.733)}.items():
        data = train_TS.Windows(train_TS.Settings(data_dir=str(prepared), look_back=336, horizon=horizon))
        assert data.errors(lambda past, h=horizon: repeat_last(past, h), "test") == pytest.approx(want, rel=1e-3)


def test_least_squares_on_etth1_is_near_the_published_dlinear(prepared):
    """One linear map of 336 hours, shared by the channels, is all that DLinear can be: 0.375 / 0.399 at 96 hours."""
    data = train_TS.Windows(train_TS.Settings(data_dir=str(prepared), look_back=336, horizon=96))
    x, y = (part.mT.flatten(0, 1).double() for part in data.batch(data.first["train"]))
    x = F.pad(x, (0, 1), value=1.0)
    weight = torch.linalg.solve(x.T @ x, x.T @ y)

    def forecast(past):
        return (F.pad(past.mT.double(), (0, 1), value=1.0) @ weight).mT

    assert data.errors(forecast, "test") == pytest.approx((0.375, 0.399), rel=0.03)


def test_it_learns_a_periodic_series(argv, tmp_path):
    """Far below the variance of the waves (1, what predicting the mean costs), near that of their noise (0.02)."""
    train_TS.main(argv(max_iters=100, eval_interval=100, log_interval=50, dropout=0.0, init_lr=1e-3, d_model=32))
    first, *_, last = (m for m in metrics(tmp_path / "run") if "val/mse" in m)
    assert first["val/mse"] == pytest.approx(1, abs=0.1)  # the output starts at zero
    assert last["val/mse"] < 0.2
    assert last["test/mse"] < 0.2
    assert last["test/mae"] < 0.4


# --- errors ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(features="SM"), "features is 'SM', there are M, S, MS"),
        (dict(features="S", target="OIL"), "target is 'OIL', the columns of "),
        (dict(target="OT"), "target is 'OT', features M predicts every column; give --features=MS or S"),
        (dict(horizon=0), "horizon is 0, it must be at least 1"),
        (dict(look_back=0), "look_back is 0, it must be at least 1"),
        (dict(batch_size=0), "batch_size is 0"),
        (dict(init_lr=0), "init_lr is 0.0, it must be above 0"),
        (dict(eval_batch_size=0), "eval_batch_size is 0"),
        (dict(block_size=32), "block_size is 32, the model reads look_back = 16 steps"),
        (dict(dataset="ETTh2"), "make it with: python data/ett/prepare.py --names ETTh2 --out /"),
        (dict(look_back=86), "the train part has 90 rows, too few for look_back 86 and horizon 5"),
        (dict(horizon=31), "the test part has 30 rows, too few for horizon 31"),
        (dict(horizon=41), "the val part has 40 rows, too few for horizon 41"),
        (dict(forecaster="arima"), "'arima', there are encoder, patch, dlinear, repeat_last, seasonal_naive"),
        (dict(lr_schedule="type2"), "lr_schedule is 'type2', there are constant, type1, type3"),
        (dict(patience=-1), "patience is -1, it must be at least 0"),
        (dict(forecaster="patch", look_back=7), "look_back is 7, it must be at least 8 for patches of 16"),
        (dict(forecaster="seasonal_naive"), "seasonal_naive repeats the last 24 steps, a season; look_back is 16"),
        (dict(forecaster="repeat_last", horizon=31), "the test part has 30 rows, too few for horizon 31"),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_anything_is_written(settings, message, argv, tmp_path, capsys):
    assert stops(train_TS.main, argv(settings)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert message in said
    assert not (tmp_path / "run").exists()


def test_a_resume_of_another_experiment_is_refused(argv, tmp_path, capsys):
    train_TS.main(argv(max_iters=1))
    assert stops(train_TS.main, argv(init_from="resume", horizon=4)) == 2
    assert "horizon = 5, this run has horizon = 4" in capsys.readouterr().err
    write_series(tmp_path / "other" / "ETTh1", waves(sum(ROWS), noise=0.2), ROWS)
    assert stops(train_TS.main, argv(init_from="resume", data_dir=tmp_path / "other")) == 2
    assert "other/ETTh1 is not the series that" in capsys.readouterr().err


def test_first_targets_says_which_part_is_too_short():
    with pytest.raises(BadInput, match="the val part has 0 rows"):
        first_targets((0, 50, 50, 60), 8, 4)
