"""train_TS.py: which windows there are, what an evaluation averages, exact resumes, records, and that it learns."""

import runpy
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import (
    STRUCTURES,
    TINY,
    assert_same_run,
    checkpoint,
    flags,
    metrics,
    record,
    signal_at,
    stops,
    waves,
    write_series,
)

import train_TS
from data.ett import COLUMNS, DTYPE, SPLITS, load_ett
from training.configurator import configure
from training.errors import BadInput

ROOT = Path(__file__).parents[1]
TINY_TS = dict(TINY, look_back=16, horizon=5, batch_size=8, init_lr=3e-4, dropout=0.2, mlr_rank_list="4|2|2")
ROWS = (90, 40, 30)
COUNTED = ["step", "seconds", "tokens", "compute", "non_emb_compute", "paper_compute"]
PROGRESS = [*COUNTED, "train/mse", "lr", "grad_norm", "tokens_per_s", "mfu"]
EVALUATION = [*COUNTED, "val/mse", "test/mse", "test/mae"]


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
def build(argv):
    """build(**settings) is the experiment, with every weight drawn, so that its forecasts are not all zero."""

    def make(**settings):
        experiment = train_TS.Forecasting(configure(train_TS.Settings, argv(settings)))
        torch.manual_seed(0)
        for p in experiment.model.parameters():
            p.data.add_(0.2 * torch.randn_like(p))
        experiment.model.eval()
        return experiment

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
    experiment = build(look_back=look_back, horizon=horizon)
    raw = np.concatenate([np.fromfile(data_dir / "ETTh1" / f"{s}.bin", DTYPE).reshape(-1, 7) for s in SPLITS])
    values = (raw - raw[: ROWS[0]].mean(0)) / raw[: ROWS[0]].std(0)
    for split, windows in plain_windows([0, *np.cumsum(ROWS)], look_back, horizon).items():
        past, future = experiment.batch(experiment.windows[split])
        assert len(past) == len(future) == len(windows) > 0
        for got_past, got_future, (read, predicted) in zip(past, future, windows, strict=True):
            assert read.stop == predicted.start
            assert np.allclose(got_past, values[read], atol=1e-5)
            assert np.allclose(got_future, values[predicted], atol=1e-5)


def test_one_channel(build):
    every, one = build(), build(features="S")
    for a, b in zip(every.batch([20, 33]), one.batch([20, 33]), strict=True):
        assert b.shape[-1] == 1
        assert torch.equal(a[..., COLUMNS.index("OT")], b[..., 0])
    assert one.model(one.batch([20, 33])[0]).shape == (2, 5, 1)


def test_values_after_the_training_part_change_nothing_in_it(data_dir, tmp_path, build):
    changed = waves(sum(ROWS))
    changed[ROWS[0] :] += 100
    write_series(tmp_path / "other" / "ETTh1", changed, ROWS)
    a, b = build(), build(data_dir=tmp_path / "other")
    for step in range(30):
        rows = a.training_rows(step)
        assert np.array_equal(rows, b.training_rows(step))
        for got, want in zip(a.batch(rows), b.batch(rows), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("batch_size", [8, 70, 100])
def test_an_epoch_takes_every_training_window_once(batch_size, build):
    """70 windows: as batches of 8, of 70, and of more than there are."""
    one, other = build(batch_size=batch_size), build(batch_size=batch_size, seed=2)
    steps = range(280 // 8)
    rows = np.concatenate([one.training_rows(step) for step in steps])
    assert np.array_equal(rows[-batch_size:], one.training_rows(steps[-1])), "a function of the step"
    epochs = rows[: len(rows) // 70 * 70].reshape(-1, 70)
    assert all(sorted(epoch) == list(one.windows["train"]) for epoch in epochs)
    assert len(one.windows["train"]) == 70
    assert not np.array_equal(epochs[0], epochs[1]), "another order each epoch"
    assert not np.array_equal(one.training_rows(0), other.training_rows(0)), "and for each seed"


def test_the_windows_of_etth1(tmp_path):
    """The counts of the usual protocol: 8640 - L - H + 1 to train on and 2880 - H + 1 each to validate and test on."""
    source = ROOT.parent / "shared" / "data" / "ETTh1.csv"
    if not source.exists():
        pytest.skip("shared/data/ETTh1.csv is not here")
    runpy.run_path(str(ROOT / "data/ett/prepare.py"))["main"](["--input", str(source), "--out", str(tmp_path)])
    _, borders, _ = load_ett(tmp_path / "ETTh1")
    for horizon, counts in {96: (8449, 2785, 2785), 192: (8353, 2689, 2689), 336: (8209, 2545, 2545)}.items():
        windows = train_TS.first_targets(borders, 96, horizon)
        assert tuple(map(len, windows.values())) == counts
        assert (windows["val"].start, windows["test"].start) == (8640, 11520)


# --- evaluation ---


@pytest.mark.parametrize("features", ["M", "S"])
def test_an_evaluation_is_the_mean_over_every_window(features, build):
    """Equal to a loop over single windows; 26 test windows, as one batch, in sevens, and one by one."""
    errors = {}
    for size in (1, 7, 26, 500):
        experiment = build(features=features, eval_batch_size=size)
        with torch.no_grad():
            errors[size] = experiment.evaluate()
    with torch.no_grad():
        squared, absolute = {}, {}
        for split in ("val", "test"):
            for row in experiment.windows[split]:
                past, future = experiment.batch([row])
                error = (experiment.model(past) - future).double()
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
    experiment = build()
    past, _ = experiment.batch([20])
    later = past.clone()
    later[:, -1] += 1
    with torch.no_grad():
        a, b = (experiment.model.trunk(experiment.model.read_in(x))[:, 0] for x in (past, later))
    assert not torch.allclose(a, b, atol=1e-4)


# --- runs ---


@pytest.mark.parametrize("structure", ["low_rank", "multi_level_low_rank"])
def test_three_steps_and_three_more_are_six(structure, argv, tmp_path, monkeypatch):
    settings = dict(STRUCTURES[structure], token_mixing_struct=structure)
    train_TS.main(argv(settings, out_dir=tmp_path / "six"))
    signal_at(monkeypatch, train_TS.Forecasting, 2, signal.SIGUSR1)
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


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_structure_trains(structure, argv, tmp_path):
    """Every parameter takes part: output weights start at zero, so it takes three steps to reach all."""
    command = argv(STRUCTURES[structure], token_mixing_struct=structure, dropout=0.0)
    before = train_TS.Forecasting(configure(train_TS.Settings, command)).model.state_dict()
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
        (dict(features="MS"), "features is 'MS', there are M (all channels) and S (OT alone)"),
        (dict(horizon=0), "horizon is 0, it must be at least 1"),
        (dict(look_back=0), "look_back is 0, it must be at least 1"),
        (dict(batch_size=0), "batch_size is 0"),
        (dict(init_lr=0), "init_lr is 0.0, it must be above 0"),
        (dict(eval_batch_size=0), "eval_batch_size is 0"),
        (dict(block_size=32), "block_size is 32, the model reads look_back = 16 steps"),
        (dict(dataset="ETTh2"), "make it with: python data/ett/prepare.py --names ETTh2"),
        (dict(look_back=86), "the train part has 90 rows, too few for look_back 86 and horizon 5"),
        (dict(horizon=31), "the test part has 30 rows, too few for horizon 31"),
        (dict(horizon=41), "the val part has 40 rows, too few for horizon 41"),
        (dict(look_back=18, token_mixing_struct="multi_level_low_rank"), "must be a multiple of 4, not 18"),
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
        train_TS.first_targets((0, 50, 50, 60), 8, 4)
