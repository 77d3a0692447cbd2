"""Every file in config/ still runs: the commands of its header, one step at tiny width, losses finite."""

import math
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
from runs import metrics, record, waves, write_corpus, write_series

import train
import train_chronos
import train_ICL
import train_TS

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "config").rglob("*.py"))
SCRIPTS = {"train.py": train, "train_ICL.py": train_ICL, "train_TS.py": train_TS, "train_chronos.py": train_chronos}
SMALL = {
    "train.py": "--dataset=corpus --d_model=192 --block_size=128 --batch_size=2 --gradient_accumulation_steps=1 "
    "--sliding_block_size=32 --eval_iters=1",
    "train_ICL.py": "--n_dims=4 --d_model=128 --n_head=8 --batch_size=4 --eval_prompts=8 --eval_batch_size=8 "
    "--training_curriculum_adaptive_inc=False",
    "train_TS.py": "--d_model=128 --n_head=2 --batch_size=4",
    "train_chronos.py": "--batch_size=4 --eval_windows=1 --num_samples=2",
}
WIDTH = ("--d_model", "--n_head")
LOSSES = ("train/loss", "overall_loss", "train/mse")


def commands(path):
    """The commands in a config file's header that use the file."""
    found = re.findall(r"^#   python (train\w*\.py .*)$", path.read_text(), flags=re.MULTILINE)
    return [shlex.split(line) for line in found if str(path.relative_to(ROOT)) in line]


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_header_commands_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    write_corpus(tmp_path / "corpus")
    for name in ("ETTh1", "sales"):
        write_series(tmp_path / name, waves(800), rows=(500, 150, 150))
    assert commands(path), f"{path} does not open with a command that uses it"
    for number, (script, *arguments) in enumerate(commands(path)):
        if script == "train_chronos.py" and find_spec("chronos") is None:
            pytest.skip("needs requirements-chronos.txt")
        out_dir = tmp_path / str(number)
        keeps_width = path.name.startswith(("tiny", "recall", "csv"))
        small = [flag for flag in SMALL[script].split() if not (keeps_width and flag.startswith(WIDTH))]
        small += [f"--data_dir={tmp_path}"] if script != "train_ICL.py" else []
        small += [f"--out_dir={out_dir}", "--max_iters=1", "--device=cpu", "--dtype=float32", "--compile=False"]
        SCRIPTS[script].main([*arguments, *small])
        assert record(out_dir)["status"] == "finished"
        losses = [m[key] for m in metrics(out_dir) for key in LOSSES if key in m]
        assert losses
        assert all(map(math.isfinite, losses))


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_only_deltas(path):
    """No assignment repeats a default, or the file that it goes on top of."""
    script, *arguments = commands(path)[0]
    values = vars(SCRIPTS[script].Settings())
    for file in (ROOT / a for a in arguments if a.endswith(".py")):
        assigned = {}
        exec(file.read_text(), {}, assigned)
        if file == path:
            assert not [name for name, value in assigned.items() if name in values and values[name] == value]
        values = {**values, **assigned}
