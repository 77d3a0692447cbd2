"""Several runs in one process: each as it is alone, bit for bit."""

import functools
import os
import signal

import pytest
import torch
from runs import TINY_ICL, TINY_LM, assert_same_run, at_step, checkpoint, flags, metrics, record

import train
import train_ICL
from scripts.icl_regression import sweep
from training import devices
from training.configurator import configure
from training.together import Plan, fit_together

RUNS = {  # name: what it differs in
    "first": dict(seed=1),
    "second": dict(seed=2, token_mixing_struct="bilinear_BTT", d_model=32),
    "third": dict(seed=1, max_iters=4, dtype="float16"),
    "fourth": dict(seed=3, token_mixing_struct="low_rank_with_gswa", gswa_rank_list="4|4", sliding_block_size=5),
}


def plan(script=train_ICL, tiny=TINY_ICL, **settings):
    return Plan(script.training, configure(script.Settings, flags(tiny, settings)))


def plans(folder, runs=RUNS, **more):
    return [plan(out_dir=folder / name, **{**more, **run}) for name, run in runs.items()]


def fit_alone(folder, runs=RUNS, **more):
    for name, run in runs.items():
        train_ICL.main(flags(TINY_ICL, dict(out_dir=folder / name), more, run))


def assert_same_runs(got, want, runs=RUNS):
    for name in runs:
        assert_same_run(got / name, want / name)


@pytest.mark.parametrize(("jobs", "at_once"), [(1, [1, 1, 1, 1]), (3, [2, 2, 2, 2]), (5, [4, 4, 4, 4])])
def test_runs_are_as_they_are_alone(jobs, at_once, tmp_path):
    """Of several structures, widths, lengths and precisions, with dropout."""
    fit_alone(tmp_path / "alone")
    fit_together(plans(tmp_path / "together"), jobs)
    assert_same_runs(tmp_path / "together", tmp_path / "alone")
    assert [record(tmp_path / "together" / name)["together"] for name in RUNS] == at_once
    for name in RUNS:
        assert "step 2/" in (tmp_path / "together" / name / "output.txt").read_text()


def test_language_models_and_regressions_go_together(data_dir, tmp_path):
    text, first = dict(TINY_LM, data_dir=data_dir, dtype="bfloat16"), {"first": RUNS["first"]}
    train.main(flags(text, out_dir=tmp_path / "alone" / "text"))
    fit_alone(tmp_path / "alone", first)
    fit_together(
        [plan(train, text, out_dir=tmp_path / "together" / "text"), *plans(tmp_path / "together", first)],
        jobs=2,
    )
    assert_same_runs(tmp_path / "together", tmp_path / "alone", ("text", "first"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_recorded_steps_on_streams_are_those_of_runs_alone(compiled, tmp_path):
    """The streams of a GPU work at the same time, on memory that is not shared."""
    runs = {f"{name} {seed}": dict(RUNS[name], seed=seed) for name in ("first", "second") for seed in (1, 2, 3)}
    more = dict(device="cuda", compile=compiled, max_iters=60, eval_interval=20, log_interval=5, dropout=0.0)
    fit_alone(tmp_path / "alone", runs, **more)
    fit_together(plans(tmp_path / "together", runs, **more), jobs=6)
    for name in runs:
        got, want = (metrics(tmp_path / how / name) for how in ("together", "alone"))
        for g, w in zip(got, want, strict=True):
            for key in w.keys() & {"overall_loss", "eval/last", "grad_norm"}:
                assert g[key] == pytest.approx(w[key], rel=1e-4), (name, key, w["step"])


def test_a_run_that_fails_does_not_stop_the_others(tmp_path, capsys):
    runs = dict(RUNS, second=dict(seed=1, training_learning_rate=1e30))
    refused = plan(out_dir=tmp_path / "refused", batch_size=65)
    with pytest.raises(SystemExit) as end:
        fit_together([*plans(tmp_path, runs), refused], jobs=5)
    assert end.value.code == 1
    said = capsys.readouterr()
    assert "2 of 5 runs failed" in said.err
    assert "a pool of at least that many" in said.err
    assert f"{tmp_path / 'second'} failed" in said.out
    assert record(tmp_path / "second")["status"].startswith("failed: the ")
    assert not (tmp_path / "refused").exists()
    fit_alone(tmp_path / "alone", {"first": RUNS["first"]})
    assert_same_run(tmp_path / "first", tmp_path / "alone" / "first")
    assert record(tmp_path / "third")["status"] == "finished"


def test_a_step_that_breaks_ends_its_run_alone(tmp_path, monkeypatch):
    runs = iter(range(4))

    def out_of_memory():
        if next(runs) == 1:  # the second of four runs
            raise torch.OutOfMemoryError("no memory")

    at_step(monkeypatch, train_ICL, 3, out_of_memory)
    with pytest.raises(SystemExit):
        fit_together(plans(tmp_path), jobs=4)
    statuses = [record(tmp_path / name)["status"] for name in RUNS]
    assert statuses == ["finished", "failed: OutOfMemoryError: no memory", "finished", "finished"]


def test_runs_that_cannot_begin(tmp_path, monkeypatch, capsys):
    """One whose device is not there, and one that breaks before it has a folder."""
    sample_prompts = train_ICL.sample_prompts

    def broken(**options):
        if options["seed"] == 7:
            raise MemoryError("no memory")
        return sample_prompts(**options)

    monkeypatch.setattr(train_ICL, "sample_prompts", broken)
    runs = {"first": RUNS["first"], "elsewhere": dict(device="cuda:99"), "broken": dict(seed=7)}
    with pytest.raises(SystemExit):
        fit_together(plans(tmp_path, runs), jobs=3)
    said = capsys.readouterr()
    assert "2 of 3 runs failed" in said.err
    assert "device 'cuda:99' is not there" in said.err
    assert f"{tmp_path / 'elsewhere'} refused" in said.out
    assert f"{tmp_path / 'broken'} failed" in said.out
    assert [path.name for path in tmp_path.iterdir()] == ["first"]
    assert record(tmp_path / "first")["status"] == "finished"


@pytest.mark.parametrize("name", ["tf32", "keep"])
def test_what_a_process_has_once_is_the_same_for_all(name, tmp_path):
    values = {"tf32": (True, False), "keep": (0.5, 1.0)}[name]
    with pytest.raises(devices.BadInput, match=f"{name} is .* runs in one process have the same"):
        fit_together([plan(out_dir=tmp_path / str(value), **{name: value}) for value in values], jobs=2)
    assert list(tmp_path.iterdir()) == []


def stop_at(monkeypatch, step, folder):
    """Runs that are told to stop while each takes a step."""
    with monkeypatch.context() as patch:
        at_step(patch, train_ICL, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as end:
            fit_together(plans(folder), jobs=4)
    assert end.value.code == 128 + signal.SIGTERM
    assert [checkpoint(folder / name)["step"] for name in RUNS] == [step + 1] * 4
    assert {record(folder / name)["status"] for name in RUNS} == {"stopped: SIGTERM"}


def test_a_signal_stops_all_and_the_same_command_resumes(tmp_path, monkeypatch):
    handler = signal.getsignal(signal.SIGTERM)
    fit_alone(tmp_path / "whole")
    stop_at(monkeypatch, 2, tmp_path / "parts")
    fit_together(plans(tmp_path / "parts", init_from="auto"), jobs=4)
    assert_same_runs(tmp_path / "parts", tmp_path / "whole")
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_run_begun_with_others_is_resumed_alone(tmp_path, monkeypatch):
    fit_alone(tmp_path / "whole")
    stop_at(monkeypatch, 2, tmp_path / "parts")
    fit_alone(tmp_path / "parts", init_from="resume")
    assert_same_runs(tmp_path / "parts", tmp_path / "whole")


def test_runs_of_which_one_is_finished(tmp_path):
    """Its checkpoint is of its last step, as where an interruption comes just before the end is recorded."""
    fit_alone(tmp_path / "alone")
    fit_alone(tmp_path / "together", {"third": RUNS["third"]})
    fit_together(plans(tmp_path / "together", init_from="auto"), jobs=4)
    assert_same_runs(tmp_path / "together", tmp_path / "alone")


def test_a_run_that_is_past_its_last_step(data_dir, tmp_path, capsys):
    language = functools.partial(plan, train, TINY_LM, data_dir=data_dir)
    train.main(flags(TINY_LM, data_dir=data_dir, out_dir=tmp_path / "second"))
    shorter = [language(out_dir=tmp_path / name, max_iters=4, init_from="auto") for name in ("first", "second")]
    with pytest.raises(SystemExit):
        fit_together(shorter, jobs=2)
    said = capsys.readouterr().err
    assert "1 of 2 runs failed" in said
    assert f"error: {tmp_path / 'second'} is at step 6, max_iters is 4; " in said
    for name, steps in (("first", 4), ("second", 6)):
        about = record(tmp_path / name)
        assert (about["status"], about["settings"]["max_iters"]) == ("finished", steps)


def test_a_grid_in_one_process(tmp_path, capsys):
    tiny = "--n_layer=1 --batch_size=2 --max_iters=2 --eval_prompts=4 --log_interval=1 --compile=False --device=cpu"
    tiny += " --training_curriculum_adaptive_inc=False --n_positions=4"
    here = [f"--out_dir={tmp_path}", "--run=True", "--together=True", "--jobs=2"]
    sweep.main([*here, "--only=^standard_n16_d128_", f"--extra={tiny}"])
    folders = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(folders) >= 2
    assert all(record(folder)["status"] == "finished" for folder in folders)
    assert {record(folder)["together"] for folder in folders} == {2}
    for folder in folders:  # the run's own command, which goes on with it alone
        script, *argv = record(folder)["argv"]
        assert script == "train_ICL.py"
        assert configure(train_ICL.Settings, argv) == configure(train_ICL.Settings, [*argv, f"--out_dir={folder}"])
    assert "finished" in capsys.readouterr().out
