"""The time-series grids: their commands, what validation chooses, and the same by Ray, killed and given again."""

import dataclasses
import json
import os
import runpy
import shlex
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from runs import assert_same_run, checkpoint, flags, metrics, record, timeless, waves, write_series

import train_chronos
import train_TS
from scripts import grid
from training.configurator import configure
from training.owner import Owner

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "time_series" / "sweep.py"
RAY = pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray: pip install -r requirements-ray.txt")
SMALL = dict(
    look_back=16, d_model=16, n_head=2, mlr_rank_list="4|2|2", batch_size=4, device="cpu", log_interval=1000,
    eval_interval=10,
)  # fmt: skip


@pytest.fixture(autouse=True)
def root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ett")
    write_series(folder / "ETTh1", waves(700), (400, 150, 150))
    return folder


def sweep(capsys, *argv):
    runpy.run_path(str(SCRIPT))["main"](list(argv))
    return capsys.readouterr().out.splitlines()


def settings(line):
    python, script, *argv = shlex.split(line)
    module = {"train_TS.py": train_TS, "train_chronos.py": train_chronos}[script]
    assert python == "python"
    return configure(module.Settings, argv)


def write_run(cfg, status, *errors):
    """A run's folder with evaluations every 100 steps: (val/mse, test/mse)."""
    folder = Path(cfg.out_dir)
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(dict(status=status, settings=dataclasses.asdict(cfg))))
    lines = [{"step": 50, "train/mse": 0.0}]
    lines += [{"step": 100 * i, "val/mse": v, "test/mse": t, "test/mae": t} for i, (v, t) in enumerate(errors)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_grid(capsys):
    """The paper's: 2 structures, 3 horizons, 3 rates, 2 numbers of iterations, each with a folder of its own."""
    cfgs = [settings(line) for line in sweep(capsys)]
    assert len(cfgs) == len({cfg.out_dir for cfg in cfgs}) == 36
    made = {(cfg.token_mixing_struct, cfg.horizon, cfg.init_lr, cfg.max_iters) for cfg in cfgs}
    assert made == {
        (structure, horizon, lr, iterations)
        for structure in ("low_rank", "multi_level_low_rank")
        for horizon in (96, 192, 336)
        for lr in (1e-5, 2e-4, 5e-3)
        for iterations in (200, 1000)
    }
    for cfg in cfgs:
        scoring = cfg.trunk(cfg.look_back).scoring
        assert (cfg.n_layer, scoring.d_model, scoring.n_head, scoring.causal) == (2, 512, 8, False)
        assert cfg.init_from == "auto"


def test_several_grids_at_once(capsys):
    names = [Path(settings(line).out_dir).name for line in sweep(capsys, "--grids=chronos|patch", "--only=standard")]
    assert names[:2] == ["chronos_standard_seed1337", "patch_standard_h96_seed1337"]
    assert len(names) == 4


def test_patches(capsys):
    """One size and one schedule for all three scores, 42 patches at 3 horizons and 3 seeds; MLR's blocks and ranks."""
    cfgs = [settings(line) for line in sweep(capsys, "--grid=patch", "--seeds=1|2|3")]
    assert len(cfgs) == len({cfg.out_dir for cfg in cfgs}) == 27
    made = {(cfg.token_mixing_struct, cfg.horizon, cfg.seed) for cfg in cfgs}
    assert len(made) == 27
    told = {"token_mixing_struct", "horizon", "seed", "out_dir", "mlr_rank_list", "mlr_block_divide_by_num_levels"}
    told |= {"mha_SP_attn_logits_scaling"}  # the scale of MLR attention is 1/rank
    alike = [{k: v for k, v in vars(cfg).items() if k not in told | {"sliding_block_size"}} for cfg in cfgs]
    assert all(settings == alike[0] for settings in alike)
    for cfg in cfgs:
        scoring = cfg.trunk(42).scoring
        assert (cfg.forecaster, scoring.d_model, scoring.n_head, scoring.causal) == ("patch", 16, 4, False)
        if cfg.token_mixing_struct == "multi_level_low_rank":
            assert (scoring.ranks, scoring.block_sizes, scoring.weighting) == ((2, 1, 1), (42, 22, 11), "shared")
        if cfg.token_mixing_struct == "low_rank_with_sliding_window":
            assert scoring.window == 5


@pytest.mark.parametrize("dataset", ["ETTh1", "ETTh2", "ETTm1", "ETTm2"])
def test_another_series(dataset, capsys):
    """The same runs, in folders of their own."""
    for grids, count in (("patch", 9), ("paper", 36)):
        cfgs = [settings(line) for line in sweep(capsys, f"--grids={grids}", f"--dataset={dataset}")]
        first = "" if dataset == "ETTh1" else f"{dataset}_"
        usual = [settings(line) for line in sweep(capsys, f"--grids={grids}")]
        assert len(cfgs) == count
        for cfg, other in zip(cfgs, usual, strict=True):
            parent, name = Path(other.out_dir).parent, Path(other.out_dir).name
            assert vars(cfg) == vars(other) | dict(dataset=dataset, out_dir=f"{parent}/{first}{name}")


def test_chronos(capsys):
    cfgs = [settings(line) for line in sweep(capsys, "--grid=chronos", "--seeds=1|2")]
    assert [(cfg.token_mixing_struct, cfg.seed) for cfg in cfgs] == [
        ("low_rank", 1), ("multi_level_low_rank", 1), ("low_rank", 2), ("multi_level_low_rank", 2)
    ]  # fmt: skip
    assert {(cfg.look_back, cfg.horizon, cfg.d_model, cfg.synthetic) for cfg in cfgs} == {(256, 64, 256, 0.1)}


def test_part_of_it_and_what_is_left(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(grid, "queued", set)
    argv = [f"--out_dir={tmp_path}", "--only=^mlr_h96_.*_it200", "--seed=3"]
    lines = sweep(capsys, *argv)
    assert [settings(line).init_lr for line in lines] == [2e-4, 5e-3, 1e-5]
    assert all(settings(line).seed == 3 for line in lines)
    write_run(settings(lines[1]), "finished", (1.0, 1.0))
    write_run(settings(lines[2]), "stopped: SIGTERM", (1.0, 1.0))
    assert sweep(capsys, *argv, "--todo=True") == [lines[0], lines[2]]


def test_validation_chooses(tmp_path, capsys):
    """Among finished runs, by the lowest val/mse at any evaluation; a better test error elsewhere changes nothing."""
    argv = [f"--out_dir={tmp_path}", "--only=_h96_.*_it200"]
    runs = [settings(line) for line in sweep(capsys, *argv)]
    assert len(runs) == 6
    write_run(runs[0], "finished", (2.0, 0.1), (1.5, 0.9), (1.7, 0.2))
    write_run(runs[2], "finished", (1.6, 0.1))
    write_run(runs[4], "running", (0.1, 0.1))
    write_run(runs[1], "finished", (1.2, 3.0))
    assert sweep(capsys, *argv, "--best=True") == [
        f"standard h96: val/mse 1.5000, test/mse 0.9000, test/mae 0.9000 ({Path(runs[0].out_dir).name}, step 100)",
        f"mlr h96: val/mse 1.2000, test/mse 3.0000, test/mae 3.0000 ({Path(runs[1].out_dir).name}, step 0)",
        "3 of 6 runs finished",
    ]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--gpu=1"], "did you mean 'gpus'"),
        (["--cpus=0"], "cpus is 0"),
        (["--run=True", "--ray=True"], "exclude each other"),
        (["--grid=papers"], "no grid 'papers', there are paper, patch, chronos"),
    ],
)
def test_bad_input(argv, says, capsys):
    with pytest.raises(SystemExit) as end:
        sweep(capsys, *argv)
    assert end.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray(capsys):
    with pytest.raises(SystemExit) as end:
        sweep(capsys, "--ray=True")
    assert end.value.code == 2
    assert "pip install -r requirements-ray.txt" in capsys.readouterr().err


@pytest.mark.parametrize("structure", ["standard", "mlr"])
def test_200_iterations_are_the_start_of_1000(structure, data_dir, tmp_path, capsys):
    """The paper's two lengths, scaled to 20 and 40 steps: same data, rates and evaluation, so one run holds both."""
    lines = []
    for iterations in (200, 1000):
        *_, line = sweep(capsys, f"--only=^{structure}_h96_lr0.0002_it{iterations}", f"--out_dir={tmp_path}")
        where = next(part for part in shlex.split(line) if part.startswith("--out_dir=")).partition("=")[2]
        small = dict(
            SMALL, data_dir=data_dir, features="S", max_iters={200: 20, 1000: 40}[iterations], eval_interval=20
        )
        train_TS.main([*shlex.split(line)[2:], *flags(small)])
        lines.append([m for m in timeless(metrics(where)) if "val/mse" in m])
    short, long = lines
    assert [m["step"] for m in short] == [0, 20]
    assert [m["step"] for m in long] == [0, 20, 40]
    assert short == long[:2]


def until(true, seconds=240):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def test_a_run_stops_when_its_parent_is_killed(data_dir, tmp_path):
    """It saves, and its record says so."""
    folder = tmp_path / "run"
    argv = flags(SMALL, data_dir=data_dir, out_dir=folder, horizon=5, max_iters=10**6, features="S")
    child = [sys.executable, "scripts/until_parent_ends.py", "train_TS.py", *argv]
    code = f"import subprocess; subprocess.Popen({child}, stdin=subprocess.PIPE).wait()"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    until((folder / "ckpt.pt").exists)
    parent.kill()
    parent.wait()
    until(lambda: record(folder)["status"] != "running")
    assert record(folder)["status"] == "stopped: SIGTERM"
    assert record(folder)["argv"][0] == "train_TS.py"
    assert checkpoint(folder)["step"] >= 10


def test_a_run_waits_for_one_of_its_folder_that_is_still_saving(data_dir, tmp_path):
    """As that of a sweep which was killed and is given again at once."""
    folder = tmp_path / "run"
    folder.mkdir()
    owner = Owner(folder)
    argv = flags(SMALL, data_dir=data_dir, out_dir=folder, horizon=5, max_iters=1, features="S")
    child = [sys.executable, "scripts/until_parent_ends.py", "train_TS.py", *argv]
    process = subprocess.Popen(child, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    time.sleep(5)
    assert process.poll() is None
    owner.release()
    assert process.wait(timeout=120) == 0
    assert record(folder)["status"] == "finished"


@pytest.fixture
def tune(data_dir, tmp_path):
    """tune(only, **settings) starts a sweep by Ray on this machine."""

    def start(only, **more):
        extra = shlex.join(flags(SMALL, data_dir=data_dir, features="S", **more))
        cpus = f"--cpus={torch.get_num_threads()}"  # sums in the order they have in this process
        argv = ["--ray=True", cpus, f"--out_dir={tmp_path}", f"--only={only}", f"--extra={extra}"]
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), *argv], cwd=ROOT, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    return start


@RAY
def test_finished_runs_are_left_and_refused_ones_are_told(tune, tmp_path):
    """A grid with another look_back finds a finished run in its first folder: that one fails, the other is made."""
    done, other = (tmp_path / f"{name}_h96_lr0.0002_it200_seed1337" for name in ("standard", "mlr"))
    said, _ = tune("^standard_h96_lr0.0002_it200", max_iters=20).communicate(timeout=300)
    assert said.rstrip().endswith("1 of 1 runs finished")
    assert "standard h96: val/mse" in said
    written = (done / "metrics.jsonl").read_text()

    second = tune("_h96_lr0.0002_it200", max_iters=20, look_back=96)
    said, _ = second.communicate(timeout=300)
    assert second.returncode == 1
    assert f"1 of 2 runs failed; why is in {done}/output.txt" in said
    assert "this run has look_back = 96" in (done / "output.txt").read_text()
    assert (done / "metrics.jsonl").read_text() == written
    assert record(other)["status"] == "finished"


@RAY
def test_a_sweep_killed_in_a_run_goes_on(tune, data_dir, tmp_path):
    """Every process of it is killed; given again at once, the run ends as one that nothing interrupted."""
    cut = tmp_path / "mlr_h96_lr0.0002_it200_seed1337"
    killed = tune("^mlr_h96_lr0.0002_it200", max_iters=400)
    until((cut / "ckpt.pt").exists)
    os.killpg(killed.pid, signal.SIGKILL)
    again = tune("^mlr_h96_lr0.0002_it200", max_iters=400)
    said, _ = again.communicate(timeout=300)
    assert again.returncode == 0, said
    assert record(cut)["resumed"], "the run was cut, and went on from its checkpoint"
    assert [m["step"] for m in metrics(cut) if "val/mse" in m] == list(range(0, 401, 10))

    config = ["config/ts_configs/etth1.py", "config/ts_configs/mlr.py"]
    whole = flags(SMALL, data_dir=data_dir, features="S", horizon=96, max_iters=400, out_dir=tmp_path / "whole")
    train_TS.main([*config, *whole])
    assert_same_run(cut, tmp_path / "whole")
