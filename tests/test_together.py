"""Several runs in one process: each as it would be alone."""

import functools
import os
import signal

import pytest
from runs import TINY_ICL, assert_same_run, checkpoint, flags, record

import train
import train_ICL
from scripts.icl_regression import sweep
from training.configurator import configure
from training.together import Turn, fit_together

RUNS = {  # name: what it differs in
    "first": dict(seed=1),
    "second": dict(seed=2, token_mixing_struct="bilinear_BTT", dropout=0.2),
    "third": dict(seed=3, max_iters=2),
}


def in_context(**settings):
    return train_ICL.InContextRegression(configure(train_ICL.Settings, flags(TINY_ICL, settings)))


def builders(folder, **more):
    return [functools.partial(in_context, out_dir=folder / name, **{**run, **more}) for name, run in RUNS.items()]


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_each_run_is_as_it_is_alone(jobs, tmp_path):
    for name, run in RUNS.items():
        in_context(out_dir=tmp_path / "alone" / name, **run).fit()
    fit_together(builders(tmp_path / "together"), jobs)
    for name in RUNS:
        assert_same_run(tmp_path / "together" / name, tmp_path / "alone" / name)
        assert record(tmp_path / "together" / name)["together"] == jobs
        assert "step 2/" in (tmp_path / "together" / name / "output.txt").read_text()


def test_scripts_mix(argv, tmp_path):
    text = functools.partial(train.LanguageModelling, configure(train.Settings, argv(out_dir=tmp_path / "text")))
    fit_together([text, *builders(tmp_path)], jobs=4)
    for name in ("text", *RUNS):
        assert record(tmp_path / name)["status"] == "finished"


def test_a_run_that_fails_does_not_stop_the_others(tmp_path, capsys):
    first, second, _ = builders(tmp_path)
    exploding = functools.partial(in_context, out_dir=tmp_path / "third", training_learning_rate=1e30, grad_clip=0)
    refused = functools.partial(in_context, out_dir=tmp_path / "fourth", tf32=True)
    with pytest.raises(SystemExit, match="2 of 4 runs failed"):
        fit_together([first, exploding, refused, second], jobs=3)
    said = capsys.readouterr()
    assert "has tf32 = True" in said.err
    assert f"{tmp_path / 'third'} failed: the " in said.out
    assert not (tmp_path / "fourth").exists()
    assert [record(tmp_path / name)["status"] for name in ("first", "second")] == ["finished", "finished"]


def test_a_signal_stops_all_and_the_same_command_goes_on(tmp_path, monkeypatch):
    handler = signal.getsignal(signal.SIGTERM)
    fit_together(builders(tmp_path / "whole"), jobs=3)
    stepped, step = [], Turn.step

    def step_then_signal(self):
        step(self)
        stepped.append(self)
        if len(stepped) == 7:  # the first run has made three steps, the others two
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Turn, "step", step_then_signal)
        with pytest.raises(SystemExit) as end:
            fit_together(builders(tmp_path / "parts"), jobs=3)
    assert end.value.code == 128 + signal.SIGTERM
    assert [checkpoint(tmp_path / "parts" / name)["step"] for name in RUNS] == [3, 2, 2]
    assert record(tmp_path / "parts" / "first")["status"] == "stopped: SIGTERM"
    fit_together(builders(tmp_path / "parts", init_from="auto"), jobs=3)
    for name in RUNS:
        assert_same_run(tmp_path / "parts" / name, tmp_path / "whole" / name)
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_grid_in_one_process(tmp_path, capsys):
    tiny = "--n_layer=1 --batch_size=2 --max_iters=2 --eval_prompts=4 --log_interval=1 --compile=False --device=cpu"
    tiny += " --training_curriculum_adaptive_inc=False --n_positions=4"
    here = [f"--out_dir={tmp_path}", "--run=True", "--together=True", "--jobs=2"]
    sweep.main([*here, "--only=^standard_n16_d128_lr0.001", f"--extra={tiny}"])
    (folder,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert record(folder)["status"] == "finished"
    assert "finished" in capsys.readouterr().out
