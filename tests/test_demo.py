"""The demo from end to end at tiny size: eight runs, tables, a sample of text, pictures; and what sample.py refuses."""

import json
import sys
from pathlib import Path

import pytest
from runs import TINY_LM, flags, stops, write_corpus

import sample
import train
from plots.records import find_runs

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import demo  # noqa: E402

from plots import demo as pictures  # noqa: E402

SHORT = {
    "train.py": ["--max_iters=2", "--eval_interval=1", "--eval_iters=1", "--log_interval=1", "--batch_size=1"],
    "train_ICL.py": ["--max_iters=2", "--eval_interval=1", "--eval_prompts=8", "--log_interval=1"],
}


def test_the_demo_at_tiny_size(tmp_path, monkeypatch, capfd):
    runs = {name: [*command, *SHORT[command[0]]] for name, command in demo.RUNS.items()}
    write_corpus(tmp_path / "pydocs", tokens=2000)
    for command in runs.values():
        if command[0] == "train.py":
            command.append(f"--data_dir={tmp_path}")
    monkeypatch.setattr(demo, "RUNS", runs)
    monkeypatch.setattr(demo, "prepare", lambda: None)
    monkeypatch.chdir(ROOT)
    demo.main([f"--out_dir={tmp_path / 'out'}", "--seed=3"])
    printed = capfd.readouterr().out
    for words in ("zero", "nearest neighbour", "standard, 8 heads of 4", "standard, 1 head of 32", "def "):
        assert words in printed
    for words in ("bilinear MLR, 8 value heads of 4", "MLR after 2 steps", "standard after 2 steps", "recall.png"):
        assert words in printed
    for name in runs:
        record = json.loads((tmp_path / "out" / name / "run.json").read_text())
        assert (record["status"], record["settings"]["seed"]) == ("finished", 3)
    assert len(find_runs((tmp_path / "out").glob("recall_*"))) == 6
    for picture in ("recall", "language_modeling"):
        for kind in ("png", "svg"):
            assert (tmp_path / "out" / f"{picture}.{kind}").stat().st_size > 5_000

    pictures.main([str(tmp_path / "out"), "--out", str(tmp_path / "again")])
    again = (tmp_path / "again" / "language_modeling.svg").read_text()
    assert again == (tmp_path / "out" / "language_modeling.svg").read_text()


def test_a_run_of_the_demo_that_fails_ends_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "RUNS", {"recall_8_heads": ["train_ICL.py", "--n_head=3"]})
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match=f"1 of 1 runs failed; why is in {tmp_path}/recall_8_heads/output.txt"):
        demo.train_all(tmp_path, seed=1)
    assert "recall_8_heads ended with status 2: error: " in capsys.readouterr().out


def test_the_pictures_of_a_missing_demo(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        pictures.main([str(tmp_path), "--out", str(tmp_path / "figures")])
    assert stopped.value.code == 2
    assert "python scripts/demo.py" in capsys.readouterr().err
    assert not (tmp_path / "figures").exists()


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    write_corpus(folder / "text")
    train.main(flags(TINY_LM, data_dir=folder, out_dir=folder / "run", max_iters=4))
    return folder / "run"


def test_sample_writes_text_again_and_again(language_model, capsys):
    def text(**settings):
        asked = dict(out_dir=language_model, start="ab", num_samples=2, max_new_tokens=30, device="cpu")
        sample.main(flags(asked, settings))
        return capsys.readouterr().out

    assert text(seed=1) == text(seed=1)
    assert text(seed=1) != text(seed=2)
    first, second, _ = text(temperature=0.0).split("-" * 15 + "\n")
    assert first == second, "the likeliest tokens do not depend on the draw"
    assert len(first) == len("ab") + 30 + len("\n")
    assert text(top_k=1) == text(temperature=0.0)


def test_sample_goes_on_from_every_line(language_model, tmp_path, capsys):
    """As from each alone, blank lines left out; FILE: takes them all as one."""

    def texts(start):
        asked = dict(out_dir=language_model, start=start, num_samples=2, max_new_tokens=20, device="cpu")
        sample.main(flags(asked, dict(temperature=0.0)))
        return capsys.readouterr().out.split("\n" + "-" * 15 + "\n")[:-1]

    lines = tmp_path / "starts.txt"
    lines.write_text("ab\n\nabcdefgh: a\nb")
    assert texts(f"LINES:{lines}") == texts("ab") + texts("abcdefgh: a") + texts("b")
    assert all(text.startswith("ab\n\nabcdefgh: a\nb") for text in texts(f"FILE:{lines}"))
    lines.write_text("\n")
    assert stops(sample.main, [f"--out_dir={language_model}", f"--start=LINES:{lines}", "--device=cpu"]) == 2
    assert "the start is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(start=""), "the start is empty"),
        (dict(start="é"), "'é' is not one of the 96 characters"),
        (dict(start="FILE:nowhere.txt"), "no file nowhere.txt"),
        (dict(start="LINES:nowhere.txt"), "no file nowhere.txt"),
        (dict(max_new_tokens=0), "max_new_tokens is 0"),
        (dict(temperature=-1.0), "temperature is -1.0"),
        (dict(out_dir="nowhere"), "no checkpoint nowhere/ckpt.pt"),
        (dict(num_sample=1), "did you mean 'num_samples'?"),
    ],
)
def test_bad_input_of_sample(settings, words, language_model, capsys):
    with pytest.raises(SystemExit) as stopped:
        sample.main(flags(dict(out_dir=language_model, device="cpu"), settings))
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
