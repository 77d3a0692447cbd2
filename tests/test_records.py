"""training/records.py: a damaged record is named, by a resume, by figures and by collect.py, and nothing is written."""

import json
import shutil

import pytest
from runs import TINY_ICL, flags, metrics

import train_ICL
from scripts import collect
from training.errors import BadInput
from training.records import load_run, read_metrics, read_record

RECORD = dict(command="train_ICL.py", argv=["train_ICL.py"], settings={}, status="finished")


def line(**values):
    return json.dumps(dict(dict(step=1, loss=0.5), **values)).encode()


METRICS = {  # lines of metrics.jsonl, words of the message
    "half a line": ([line(), line()[:9], line()], "line 2 is damaged"),
    "a list": ([b"[1, 2]", line()], "line 1 has list"),
    "a number": ([line(), b"3"], "line 2 has int"),
    "null": ([b"null"], "line 1 has NoneType"),
    "no step": ([b'{"loss": 1}'], "step None"),
    "a step that is text": ([line(step="7")], "step '7'"),
    "a step that is no whole number": ([line(step=1.5)], "step 1.5"),
    "a step that is true": ([line(step=True)], "step True"),
    "not UTF-8": ([line(), b"\xff\xfe"], "UnicodeDecodeError"),
}


@pytest.mark.parametrize("damage", METRICS)
def test_damaged_metrics_are_named(damage, tmp_path):
    lines, words = METRICS[damage]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (tmp_path / "run.json").write_text(json.dumps(RECORD))
    for read in (read_metrics, load_run):
        with pytest.raises(BadInput, match=r"metrics\.jsonl") as error:
            read(tmp_path)
        assert words in str(error.value)


def test_a_last_line_cut_short_by_a_kill_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(line() + b"\n" + line(step=2)[:7])
    assert [m["step"] for m in read_metrics(tmp_path)] == [1]
    assert read_metrics(tmp_path / "nothing") == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"null", "NoneType, not an object"),
        (b"[]", "list, not an object"),
        (b"{}", "it has no command, argv, settings, status"),
        (b"{", "cannot be read"),
        (b"\xff", "cannot be read"),
        (json.dumps(dict(RECORD, settings=None)).encode(), "its settings is NoneType, not dict"),
        (json.dumps(dict(RECORD, status=3)).encode(), "its status is int, not str"),
    ],
)
def test_what_is_no_record_is_named(text, words, tmp_path):
    (tmp_path / "run.json").write_bytes(text)
    for read in (read_record, load_run):
        with pytest.raises(BadInput, match=r"run\.json") as error:
            read(tmp_path)
        assert words in str(error.value)


def test_a_resume_with_damaged_metrics_is_refused(tmp_path, capsys):
    argv = flags(TINY_ICL, out_dir=tmp_path / "run", max_iters=4)
    train_ICL.main(argv)
    path = tmp_path / "run" / "metrics.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines()
    path.write_bytes(b"\n".join([lines[0], lines[1][:20], *lines[2:]]) + b"\n")
    before = {p.name: p.read_bytes() for p in path.parent.iterdir()}
    with pytest.raises(SystemExit) as stop:
        train_ICL.main([*argv, "--init_from=resume", "--max_iters=6"])
    assert stop.value.code == 2
    assert f"{path}, line 2 is damaged; without that line the file can be read" in capsys.readouterr().err
    assert before == {p.name: p.read_bytes() for p in path.parent.iterdir()}
    path.write_bytes(b"\n".join([lines[0], *lines[2:]]) + b"\n")
    train_ICL.main([*argv, "--init_from=resume", "--max_iters=6"])
    assert metrics(path.parent)[-1]["step"] == 6


def test_collect_names_a_damaged_record(tmp_path, capsys):
    argv = flags(TINY_ICL, out_dir=tmp_path / "runs" / "a", max_iters=2)
    train_ICL.main(argv)
    shutil.copytree(tmp_path / "runs", tmp_path / "damaged")
    (tmp_path / "damaged" / "a" / "run.json").write_text("null")
    with pytest.raises(SystemExit) as stop:
        collect.main([str(tmp_path / "damaged"), str(tmp_path / "to")])
    assert stop.value.code == 2
    assert "not the record of a run" in capsys.readouterr().err
    assert not (tmp_path / "to").exists()
