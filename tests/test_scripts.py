"""The sweeps: every printed command is valid and has its own folder; array.sh runs the line it is told to."""

import os
import runpy
import shlex
import subprocess
from pathlib import Path

import pytest

import train
import train_ICL
from training.configurator import configure, parse_list

ROOT = Path(__file__).resolve().parents[1]
COUNTS = {"language_modeling": 20, "icl_regression": 88}


def sweep(name, capsys, *argv):
    runpy.run_path(str(ROOT / "scripts" / name / "sweep.py"))["main"](list(argv))
    return capsys.readouterr().out.splitlines()


def settings(line):
    """The settings a printed command asks for, its model configuration built."""
    python, script, *argv = shlex.split(line)
    assert python == "python"
    if script == "train.py":
        cfg = configure(train.Settings, argv)
        return cfg, cfg.model_config()
    assert script == "train_ICL.py"
    cfg = configure(train_ICL.Settings, argv)
    cfg.curriculum()
    return cfg, cfg.model_config(block_size=cfg.tokens)


@pytest.mark.parametrize("name", COUNTS)
def test_commands_are_valid(name, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    runs = [settings(line) for seed in (1, 2) for line in sweep(name, capsys, f"--seed={seed}")]
    assert len(runs) == len({cfg.out_dir for cfg, _ in runs}) == 2 * COUNTS[name]
    assert all(cfg.init_from == "auto" for cfg, _ in runs)
    for cfg, model in runs:
        if model.scoring.structure == "bilinear_MLR":
            rank = sum(r * 2**level for level, r in enumerate(parse_list(cfg.mlr_rank_list, "mlr_rank_list")))
            assert rank >= cfg.n_dims


def test_bad_input(capsys):
    with pytest.raises(SystemExit) as end:
        sweep("icl_regression", capsys, "--sed=2")
    assert end.value.code == 2


def array(tmp_path, line):
    """array.sh on a file of three commands, with a python that prints its arguments one a line."""
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexit 7\n')
    stub.chmod(0o755)
    (tmp_path / "runs.txt").write_text("python a.py\npython b.py '--ranks=4|2|2' --lr=1\npython c.py\n")
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    env.pop("SLURM_ARRAY_TASK_ID", None)
    env |= {"SLURM_ARRAY_TASK_ID": line} if line else {}
    script = ["bash", str(ROOT / "scripts/array.sh"), "runs.txt"]
    return subprocess.run(script, cwd=tmp_path, env=env, capture_output=True, text=True)


def test_array_runs_its_line(tmp_path):
    done = array(tmp_path, "2")
    assert done.stdout.splitlines()[1:] == ["b.py", "--ranks=4|2|2", "--lr=1"]
    assert done.returncode == 7  # the command's own status


@pytest.mark.parametrize("line", ["4", None])
def test_array_refuses_a_line_that_is_not_there(line, tmp_path):
    done = array(tmp_path, line)
    assert done.returncode
    assert not done.stdout
