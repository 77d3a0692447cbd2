"""Pictures of time series: of synthetic run records, and of tiny runs; what is drawn is what was recorded."""

import dataclasses
import json
import warnings

import numpy as np
import pytest
import scipy.stats
import torch
from matplotlib.figure import Figure
from runs import TINY, checkpoint, flags, waves, write_series

import forecast_TS
import train_chronos
import train_TS
from data.ett import COLUMNS
from plots import ts_forecasts, ts_horizon, ts_kinds, ts_pairs, ts_table
from plots.names import STRUCTURES
from plots.records import read_runs
from scripts.time_series import sweep
from training.errors import BadInput
from training.records import load_run

PEERS = [peer.name for peer in ts_kinds.PUBLISHED["ETTh1", "M"]]


def write_run(folder, mse=0.4, drop=(), patience_ends=False, **settings):
    """A record as train_TS.py writes it: step 20 of 30 has the lowest val/mse, step 30 the lowest test/mse."""
    cfg = train_TS.Settings(out_dir=str(folder), **(dict(max_iters=30, forecaster="dlinear", seed=1) | settings))
    lines = [{"step": 0, "val/mse": 2.0, "test/mse": mse, "test/mae": mse / 2}]
    if cfg.forecaster in train_TS.TRAINED:
        for step, val, test in ((10, 1.0, 2 * mse), (20, mse, mse), (30, 1.5, 0.1 * mse)):
            line = {"step": step, "val/mse": val, "test/mse": test, "test/mae": test / 2, "best/step": min(step, 20)}
            line |= {"best/test_mse": max(test, mse), "best/test_mae": max(test, mse) / 2}
            lines.append(line)
    lines = lines[:-1] if patience_ends else lines
    lines = [{key: value for key, value in line.items() if key not in drop} for line in lines]
    argv = ["train_TS.py", *flags(settings), f"--out_dir={folder}"]
    record = dict(command="train_TS.py", argv=argv, settings=dataclasses.asdict(cfg), status="finished")
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def kinds_of(folder):
    return ts_kinds.kinds_of(read_runs([folder], "train_TS.py"))


def refusal(capsys, main, *argv):
    """The one line with which a picture is refused."""
    with pytest.raises(SystemExit) as end:
        main([str(arg) for arg in argv])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


def drawn_twice(main, *argv, folder):
    """The bytes of two drawings, warnings being errors: {suffix: bytes} twice."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for out in ("a.png", "b"):
            main([*map(str, argv), "--out", str(folder / out)])
    first, second = ({s: (folder / f"{out}{s}").read_bytes() for s in (".png", ".svg")} for out in "ab")
    assert first[".png"].startswith(b"\x89PNG")
    return first, second


# --- kinds, and differences at each horizon ---

MLR = dict(token_mixing_struct="multi_level_low_rank")
PATCH = dict(forecaster="patch", look_back=336, instance_norm=True)


def write_pairs(folder):
    """Standard attention and MLR in patches, three seeds at 96 and two at 192: {horizon: (errors, errors)}."""
    errors = {96: ((0.30, 0.40, 0.35), (0.29, 0.41, 0.37)), 192: ((0.50, 0.52), (0.48, 0.49))}
    for horizon, both in errors.items():
        for structure, name, values in zip(({}, MLR), "sm", both, strict=True):
            for seed, mse in enumerate(values, 1):
                write_run(folder / f"{name}{horizon}_{seed}", mse, seed=seed, horizon=horizon, **PATCH, **structure)
    return errors


def test_the_iterations_are_those_of_the_grid():
    assert ts_kinds.ITERATIONS == sweep.ITERATIONS


def test_horizon_draws_the_difference_of_every_seed_and_their_mean_and_interval(tmp_path):
    errors = write_pairs(tmp_path)
    write_run(tmp_path / "dlinear", look_back=336)  # has nothing to be compared with
    panels = ts_horizon.panels_of(kinds_of(tmp_path))
    (pairs,) = panels.values()
    ts_horizon.draw(ax := Figure().subplots(), pairs)
    points, means, intervals = {}, {}, {}
    for line in ax.lines:
        x, y = line.get_data()
        if line.get_color() == STRUCTURES["multi_level_low_rank"][1]:
            found = intervals if line.get_linestyle() == "-" else points if line.get_markersize() == 3 else means
            found[y[0]] = list(x)
    for row, (standard, mlr) in enumerate(errors.values()):
        want = np.subtract(mlr, standard)
        np.testing.assert_allclose(points[row], want)
        np.testing.assert_allclose(means[row], [want.mean()])
    assert list(intervals) == [0]  # two seeds have none
    difference = np.subtract(errors[96][1], errors[96][0])
    half = 4.3027 * difference.std(ddof=1) / np.sqrt(3)
    np.testing.assert_allclose(intervals[0], difference.mean() + np.array([-half, half]), rtol=1e-3)
    (hollow,) = (line for line in ax.lines if line.get_label().endswith("published"))
    assert hollow.get_label().startswith("PatchTST/42")
    ours = [np.mean(errors[h][0]) for h in (96, 192)]
    np.testing.assert_allclose(hollow.get_xdata(), np.subtract([0.375, 0.414], ours))
    assert [t.get_text() for t in ax.get_yticklabels()] == ["96 h", "192 h"]


def test_pairs_are_runs_that_differ_in_the_scoring_function_alone(tmp_path, capsys):
    errors = write_pairs(tmp_path)
    write_run(tmp_path / "other", 0.1, seed=4, horizon=96, **PATCH, **MLR)  # a seed that standard attention lacks
    ts_pairs.main([str(tmp_path)])
    header, _, row = capsys.readouterr().out.splitlines()
    assert header == "| test MSE less that of standard attention | read at | 96 | 192 |"
    label, place, first, second = (cell.strip() for cell in row.strip("|").split("|"))
    assert (label, place, second) == ("patches, MLR, L = 336", "lowest validation error", "-0.025 (2 pairs)")
    difference = np.subtract(errors[96][1], errors[96][0])
    test = scipy.stats.ttest_rel(errors[96][1], errors[96][0])
    low, high = test.confidence_interval()
    assert first == f"{difference.mean():+.3f} [{low:+.3f}, {high:+.3f}], p {test.pvalue:.2g}"
    ts_pairs.main([str(tmp_path), "--only", "horizon=192"])
    said = capsys.readouterr()
    assert said.out.splitlines()[0].endswith("| read at | 192 |")
    assert said.err == "7 of 11 runs left out by --only\n"


def test_kinds_are_told_apart_by_structure_look_back_and_what_else_differs(tmp_path):
    mlr = dict(forecaster="encoder", token_mixing_struct="multi_level_low_rank", mlr_block_divide_by_num_levels=True)
    for name, settings in dict(
        encoder=dict(forecaster="encoder"),
        mlr=mlr,
        deep=mlr | dict(n_layer=3),
        patch=dict(forecaster="patch", look_back=512),
        short=dict(d_model=64),  # which DLinear does not read
        long=dict(look_back=336, horizon=192, batch_size=16),  # a setting of its horizon
        longer=dict(look_back=336, horizon=336, patience=3),  # which did not end it
        rule=dict(forecaster="seasonal_naive"),
        same_rule=dict(forecaster="seasonal_naive", look_back=336),
    ).items():
        write_run(tmp_path / name, **settings)
    kinds = kinds_of(tmp_path)
    assert [(kind.label, list(kind.runs)) for kind in kinds] == [
        ("standard, L = 96", [96]),
        ("MLR, L = 96, n_layer = 2", [96]),
        ("MLR, L = 96, n_layer = 3", [96]),
        ("patches, standard, L = 512", [96]),
        ("DLinear, L = 96", [96]),
        ("DLinear, L = 336", [192, 336]),
        ("last day repeated", [96]),
    ]


def test_unfinished_runs_are_paired_where_both_were_evaluated(tmp_path, capsys):
    """The paper's encoder after 200 iterations, which MLR has not reached."""
    for name, structure, status in (("s", {}, "finished"), ("m", MLR, "running")):
        folder = write_run(tmp_path / name, forecaster="encoder", max_iters=1000, **structure)
        record = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(record | dict(status=status)))
    line = {"step": 200, "val/mse": 2.0, "test/mse": 0.5, "test/mae": 0.2, "best/test_mse": 0.4, "best/test_mae": 0.2}
    with (tmp_path / "s" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    assert f"{tmp_path / 'm'} is not finished" in refusal(capsys, ts_pairs.main, tmp_path)
    ts_pairs.main([str(tmp_path), "--unfinished"])
    rows = [line.split(" | ")[1:] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[1] for row in rows] == ["+0.000 (1 pairs) |", " |", " |"]


def test_patience_is_a_kind_of_its_own_where_it_ended_a_run(tmp_path):
    write_run(tmp_path / "a", seed=1)
    write_run(tmp_path / "b", seed=2, patience=1, patience_ends=True)
    assert [kind.label for kind in kinds_of(tmp_path)] == [f"DLinear, L = 96, patience = {n}" for n in (0, 1)]


def test_the_rate_is_chosen_by_validation_on_the_seeds_that_all_have(tmp_path):
    for rate, seed, mse in ((1e-3, 1, 0.3), (1e-3, 2, 0.9), (2e-3, 1, 0.4)):
        write_run(tmp_path / f"{rate}_{seed}", mse, init_lr=rate, seed=seed)
    (kind,) = kinds_of(tmp_path)
    assert kind.errors("mse") == {96: [0.3, 0.9]}  # though seed 2 is worse
    write_run(tmp_path / "other", init_lr=3e-3, seed=7)
    with pytest.raises(BadInput, match="no seed is in all of"):
        kinds_of(tmp_path)


def test_all_that_the_grids_make_in_one_picture(tmp_path, capsys):
    """A panel for each layout, the functions of a horizon below each other; the same bytes every time."""
    structures = ("low_rank", "low_rank_with_sliding_window", "multi_level_low_rank")
    grid = [("patch", s, 1e-4, 336) for s in structures]
    grid += [("encoder", s, rate, 96) for s in structures[::2] for rate in (2e-4, 5e-3)]
    grid += [("dlinear", "low_rank", 5e-3, 336), ("seasonal_naive", "low_rank", 1e-4, 336)]
    for i, (forecaster, structure, rate, look_back) in enumerate(grid):
        for horizon in (96, 192, 336):
            settings = dict(forecaster=forecaster, token_mixing_struct=structure, init_lr=rate, look_back=look_back)
            write_run(tmp_path / "runs" / f"{i}_{horizon}", 0.4 + i / 100, horizon=horizon, **settings)
    panels = ts_horizon.panels_of(kinds_of(tmp_path / "runs"))
    assert [[other.label for _, other in pairs] for pairs in panels.values()] == [
        ["MLR, L = 96"], ["patches, sliding window, L = 336", "patches, MLR, L = 336"]
    ]  # fmt: skip
    ts_horizon.draw(ax := Figure().subplots(), panels["patch", 336])
    means = [line for line in ax.lines if line.get_markersize() == 7]
    np.testing.assert_allclose(sorted(line.get_ydata()[0] for line in means), [-0.11, 0.11, 0.89, 1.11, 1.89, 2.11])
    first, second = drawn_twice(ts_horizon.main, tmp_path / "runs", folder=tmp_path)
    assert first == second


def test_horizon_refuses_what_it_cannot_draw(tmp_path, capsys):
    out = ("--out", tmp_path / "fig.png")
    run, mlr = write_run(tmp_path / "a", **PATCH), write_run(tmp_path / "m", **PATCH, **MLR)
    old = write_run(tmp_path / "old", drop=("best/test_mse",), seed=2, **PATCH)
    write_run(tmp_path / "old_m", seed=2, **PATCH, **MLR)
    said = refusal(capsys, ts_horizon.main, run, mlr, old, tmp_path / "old_m", *out)
    assert f"{old} has no best/test_mse; make it again with: " in said
    other = write_run(tmp_path / "other", dataset="ETTh2")
    assert "the runs differ in dataset (ETTh1 or ETTh2)" in refusal(capsys, ts_horizon.main, run, other, *out)
    alone = write_run(tmp_path / "alone", features="S")
    assert "the runs differ in features" in refusal(capsys, ts_horizon.main, run, alone, *out)
    again = write_run(tmp_path / "again", **PATCH)
    assert "are the same run, seed 1" in refusal(capsys, ts_horizon.main, run, again, *out)
    assert "no run has its like of standard attention" in refusal(capsys, ts_horizon.main, run, *out)
    assert f"no run in {tmp_path / 'none'}" in refusal(capsys, ts_horizon.main, tmp_path / "none", *out)
    assert not list(tmp_path.glob("fig*"))


# --- tables ---


def table(capsys, *folders):
    """The rows of every table that is printed, cells by column."""
    capsys.readouterr()
    ts_table.main([str(folder) for folder in folders])
    texts = capsys.readouterr().out.strip().split("\n\n")
    tables = []
    for text in texts:
        header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines())
        tables.append([dict(zip(header, row, strict=True)) for row in rows])
    return tables


def test_the_table_sets_ours_beside_the_published_errors(tmp_path, capsys):
    for seed, mse in ((1, 0.30), (2, 0.40)):
        write_run(tmp_path / f"{seed}", mse, seed=seed, look_back=336)
        write_run(tmp_path / f"far{seed}", mse + 0.2, seed=seed, look_back=336, horizon=192, init_lr=1e-3)
    write_run(tmp_path / "rule", 1.25, forecaster="repeat_last")
    (rows,) = table(capsys, tmp_path)
    assert [row["forecaster"] for row in rows] == [
        "DLinear, L = 336", "*DLinear, L = 336, published*", "last step repeated",
        *(f"*{name}, published*" for name in PEERS[:-1]),
    ]  # fmt: skip
    ours, theirs, rule, *_ = rows
    assert [ours[f"{e} at {h}"] for e in ("MSE", "MAE") for h in (96, 192)] == [
        "0.350 ± 0.071", "0.550 ± 0.071", "0.175 ± 0.035", "0.275 ± 0.035"
    ]  # fmt: skip
    assert (ours["rate"], ours["seeds"]) == ("0.0002, 0.001", "1 2")
    assert (theirs["MSE at 96"], theirs["MAE at 192"]) == ("0.375", "0.416")
    assert (rule["MSE at 96"], rule["MSE at 192"], rule["rate"]) == ("1.250", "", "")


def test_the_papers_grid_is_read_where_its_iterations_end(tmp_path, capsys):
    """Steps 200 and 1000 of runs of 1000; validation chooses 200 at one rate, a lower test error elsewhere does not."""
    test = {2e-4: {200: 0.6, 600: 0.1, 1000: 0.5}, 5e-3: {200: 0.9, 600: 0.1, 1000: 0.2}}
    val = {2e-4: {200: 0.7, 600: 0.1, 1000: 0.8}, 5e-3: {200: 1.0, 600: 0.1, 1000: 0.9}}
    for rate in test:
        for seed in (1, 2):
            folder = write_run(
                tmp_path / f"{rate}_{seed}", seed=seed, init_lr=rate, forecaster="encoder", max_iters=1000
            )
            lines = []
            for step in (200, 600, 1000):
                line = {"step": step, "val/mse": val[rate][step], "test/mse": test[rate][step] + seed / 100}
                line |= {"test/mae": 0.3, "best/step": 600, "best/test_mse": 0.1, "best/test_mae": 0.1}
                lines.append(json.dumps(line) + "\n")
            (folder / "metrics.jsonl").write_text("".join(lines))
    _, rows = table(capsys, tmp_path)
    assert [(row["encoder"], row["rate"], row["iterations"], row["MSE at 96"]) for row in rows] == [
        ("standard, L = 96", "0.0002", "200", "**0.615 ± 0.007**"),
        ("standard, L = 96", "0.0002", "1,000", "0.515 ± 0.007"),
        ("standard, L = 96", "0.005", "200", "0.915 ± 0.007"),
        ("standard, L = 96", "0.005", "1,000", "0.215 ± 0.007"),
    ]
    assert rows[0]["MAE at 96"] == "**0.300 ± 0.000**"


def test_chronos_has_a_table_of_its_own(tmp_path, capsys):
    """At the evaluation of lowest validation quantile loss, here the second."""
    for structure in ("low_rank", "multi_level_low_rank"):
        for seed in (1, 2):
            folder = tmp_path / f"{structure}{seed}"
            cfg = train_chronos.Settings(out_dir=str(folder), seed=seed, token_mixing_struct=structure)
            record = dict(command="train_chronos.py", argv=[], settings=dataclasses.asdict(cfg), status="finished")
            folder.mkdir()
            (folder / "run.json").write_text(json.dumps(record))
            lines = [
                {"step": i, "val/mse": 9 - i, "val/wql": w, "test/mse": i + seed, "test/mae": 0.5, "test/wql": 10 * w}
                for i, w in enumerate((0.9, 0.5, 0.7))
            ]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_run(tmp_path / "dlinear")
    *_, rows = table(capsys, tmp_path)
    assert [row["Chronos' self-attention"] for row in rows] == ["standard", "MLR"]
    for row in rows:
        assert (row["MSE of the median"], row["weighted quantile loss"]) == ("2.500 ± 0.707", "5.000 ± 0.000")
        assert (row["steps"], row["seeds"]) == ("200,000", "1 2")


# --- forecasts ---

ROWS = (90, 40, 30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny runs: standard attention with 16 steps read, DLinear with 24, another horizon, another dataset, OT alone."""
    folder = tmp_path_factory.mktemp("forecasts")
    for name in ("ETTh1", "ETTh2"):
        write_series(folder / "ett" / name, waves(sum(ROWS)), ROWS)
    tiny = dict(TINY, look_back=16, horizon=5, batch_size=8, init_lr=3e-2, data_dir=folder / "ett")
    for name, settings in dict(
        standard={},
        dlinear=dict(forecaster="dlinear", look_back=24),
        far=dict(horizon=6),
        other=dict(dataset="ETTh2"),
        alone=dict(features="S"),
    ).items():
        train_TS.main(flags(tiny, settings, out_dir=folder / name))
    return folder


def test_forecasts_are_those_of_the_best_weights_beside_the_truth(folder):
    runs = forecast_TS.load_all([str(folder / "standard"), str(folder / "dlinear")])
    channel = COLUMNS.index("MULL")
    record = forecast_TS.recorded(runs, [3], "MULL", past=8)
    errors = ts_forecasts.draw(ax := Figure().subplots(), record, record["panels"][0])
    lines = {line.get_label(): line.get_data() for line in ax.lines}
    row, values = sum(ROWS[:2]) + 3, runs[0].data.values
    np.testing.assert_allclose(lines["truth"], [range(-7, 6), values[row - 8 : row + 5, channel]], atol=1e-4)
    for run, label, look_back in zip(runs, ("standard, L = 16", "DLinear, L = 24"), (16, 24), strict=True):
        model = run.settings.build(7).eval()
        model.load_state_dict(checkpoint(run.folder)["best_model"])
        with torch.no_grad():
            want = model(values[None, row - look_back : row])[0, :, channel]
        np.testing.assert_allclose(lines[label], [range(1, 6), want], atol=1e-4)
        assert errors[label] == pytest.approx((want - values[row : row + 5, channel]).square().mean().item(), abs=1e-3)


def test_all_windows_together_give_the_recorded_error(folder):
    (run,) = forecast_TS.load_all([str(folder / "standard")])
    values, errors = run.data.values, []
    for row in run.data.first["test"]:
        for i, channel in enumerate(COLUMNS):
            errors.append((run.forecast(row, channel) - values[row : row + 5, i]).square().mean().item())
    assert np.mean(errors) == pytest.approx(load_run(folder / "standard").final("best/test_mse"), rel=1e-5)


def made(folder, names, tmp_path, *more):
    """The file that forecast_TS.py makes of some of the runs."""
    both = "--out_dir=" + "|".join(str(folder / name) for name in names)
    forecast_TS.main([both, *more, f"--out={tmp_path / 'kept.json'}"])
    return tmp_path / "kept.json"


def test_forecasts_picture_has_the_same_bytes_every_time(folder, tmp_path, capsys):
    kept = made(folder, ["standard", "alone"], tmp_path, "--windows=0|7|25", "--channel=OT")
    first, second = drawn_twice(ts_forecasts.main, kept, folder=tmp_path)
    assert first == second
    said = capsys.readouterr().out
    for name in ("standard", "alone"):  # of one kind, so told apart by their folders
        assert said.count(f"standard, L = 16 ({name})") == 6


def test_kept_forecasts_are_refused_where_they_are_something_else(folder, tmp_path, capsys):
    kept = made(folder, ["standard", "dlinear"], tmp_path, "--windows=0|7", "--channel=HULL")
    out = tmp_path / "none.png"
    many = json.loads(kept.read_text())
    many["panels"][0]["forecasts"] = {str(i): [] for i in range(7)}
    empty = ("[]", "{", '{"panels": []}', '{"panels": [{"window": 0}]}')
    cases = dict.fromkeys(empty, "cannot be read as forecasts") | {json.dumps(many): "7 runs are too many"}
    for text, said in cases.items():
        kept.write_text(text)
        assert said in refusal(capsys, ts_forecasts.main, kept, "--out", out)
    assert not out.exists()


def test_forecasts_refuse_what_they_cannot_make(folder, tmp_path, capsys):
    def said(names, *more):
        both = "--out_dir=" + "|".join(str(folder / name) for name in names)
        return refusal(capsys, forecast_TS.main, both, *more, f"--out={tmp_path / 'new.json'}")

    assert "has no channel 'OIL', there are HUFL, HULL," in said(["standard"], "--channel=OIL")
    assert "alone has no channel 'HUFL', there are OT" in said(["standard", "alone"], "--channel=HUFL")
    assert "there is no test window 26, they are 0 to 25" in said(["standard"], "--windows=0|26")
    assert "windows is 'x'" in said(["standard"], "--windows=x")
    assert "past is -1" in said(["standard"], "--past=-1")
    assert "has dataset = ETTh1" in said(["standard", "other"])
    assert "has horizon = 5" in said(["standard", "far"])
    assert "no checkpoint" in said(["none"])
    write_series(tmp_path / "ett" / "ETTh1", 2 + waves(sum(ROWS), noise=0.2), ROWS)
    assert "is not the series that" in said(["standard"], f"--data_dir={tmp_path / 'ett'}")
    for name, change, why in (
        ("early", dict(best_model={}), "was written before the first evaluation"),
        ("foreign", dict(settings=dict(dataset="text")), "is no run of train_TS.py"),
    ):
        (folder / name).mkdir()
        torch.save(checkpoint(folder / "standard") | change, folder / name / "ckpt.pt")
        assert why in said([name])
    assert not list(tmp_path.glob("new*"))
