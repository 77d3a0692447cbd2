"""scripts/collect.py: small records of finished runs that say nothing of the machine and draw the same figures."""

import json

import pytest
from runs import TINY_ICL, flags, metrics, record

import train_ICL
from plots.records import learning_curves, read_runs
from scripts import collect


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("out") / "standard"
    train_ICL.main(flags(TINY_ICL, out_dir=out_dir, log_interval=1, eval_interval=1, max_iters=20))
    path = out_dir / "run.json"
    about = json.loads(path.read_text())
    about["argv"] = ["/home/me/repo/train_ICL.py", "/home/me/repo/config/icl_configs/tiny.py", f"--out_dir={out_dir}"]
    path.write_text(json.dumps(about))
    return out_dir


def refusal(capsys, *argv):
    with pytest.raises(SystemExit) as end:
        collect.main([str(arg) for arg in argv])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_record_without_paths(run, tmp_path, capsys):
    collect.main([str(run.parent), str(tmp_path / "to")])
    said = capsys.readouterr().out
    assert "KiB" in said
    assert "(41 of 41 lines)" in said
    assert sorted(path.name for path in (tmp_path / "to" / "standard").iterdir()) == ["metrics.jsonl", "run.json"]
    got, want = record(tmp_path / "to" / "standard"), record(run)
    assert got["argv"] == ["train_ICL.py", "config/icl_configs/tiny.py", "--out_dir=out/standard"]
    assert got["settings"].pop("out_dir") == "out/standard"
    del want["settings"]["out_dir"]
    assert got == want | dict(argv=got["argv"])
    assert str(run.parent) not in (tmp_path / "to" / "standard" / "run.json").read_text()


def test_thinned_metrics_draw_the_same_curve(run, tmp_path):
    collect.main([str(run), str(tmp_path / "to"), "--evaluations=5", "--progress=3"])
    lines, whole = metrics(tmp_path / "to" / "standard"), metrics(run)
    evaluated = [line for line in lines if "eval/last" in line]
    assert [line["step"] for line in lines if "eval/last" not in line] == [1, 11, 20]
    steps = [line["step"] for line in evaluated]
    assert steps == sorted(steps)
    assert (steps[0], steps[-1], len(steps)) == (0, 20, 5)
    assert steps[2] < 10  # closer together at the start
    assert ["baselines" in line for line in evaluated] == ["eval_pointwise/loss" in line for line in evaluated]
    assert ["baselines" in line for line in evaluated] == [False] * 4 + [True]
    assert evaluated[-1]["eval_pointwise/loss"] == pytest.approx(whole[-1]["eval_pointwise/loss"], rel=1e-5)
    spent = {line["step"]: line["compute"] for line in whole}
    assert all(line["compute"] == spent[line["step"]] for line in lines)
    (thinned,), (full,) = (
        learning_curves(read_runs([p], "train_ICL.py"), "eval/last", "compute") for p in (tmp_path / "to", run)
    )
    by_step = dict(zip(full.steps, full.mean, strict=True))
    assert thinned.mean == pytest.approx([by_step[step] for step in thinned.steps], rel=1e-5)


def test_unfinished_runs_are_left_out_and_named(run, tmp_path, capsys):
    other = tmp_path / "out" / "stopped"
    other.mkdir(parents=True)
    (other / "run.json").write_text(json.dumps(record(run) | dict(status="stopped: SIGTERM")))
    collect.main([str(run), str(other), str(tmp_path / "to")])
    assert "stopped is left out: stopped: SIGTERM" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["standard"]
    (other / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text())
    collect.main([str(run), str(other), str(tmp_path / "to"), "--unfinished"])
    assert {path.name for path in (tmp_path / "to").iterdir()} == {"standard", "stopped"}
    assert record(tmp_path / "to" / "stopped")["status"] == "stopped: SIGTERM"


def test_another_run_is_never_replaced(run, tmp_path, capsys):
    to = tmp_path / "to"
    for _ in range(2):  # the same run again is fine
        collect.main([str(run), str(to)])
    other = tmp_path / "other" / "standard"
    other.mkdir(parents=True)
    (other / "run.json").write_text(json.dumps(record(run) | dict(started="2001-01-01T00:00:00+0000")))
    before = (to / "standard" / "run.json").read_bytes()
    assert "standard holds another run" in refusal(capsys, other, to)
    assert "have the same name; rename one" in refusal(capsys, run, other, tmp_path / "new")
    assert (to / "standard" / "run.json").read_bytes() == before
    assert not (tmp_path / "new").exists()
    (tmp_path / "notes" / "standard").mkdir(parents=True)
    assert "is there and holds no run" in refusal(capsys, run, tmp_path / "notes")


def test_bad_input(run, tmp_path, capsys):
    assert "no run in" in refusal(capsys, tmp_path / "nowhere", tmp_path / "to")
    assert "--evaluations is at least 2" in refusal(capsys, run, tmp_path / "to", "--evaluations=1")


def test_more_than_the_budget_is_said(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(collect, "BUDGET", 1000)
    collect.main([str(run), str(tmp_path / "to")])
    assert "more than 0 MiB: choose fewer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("steps", "most", "places"),
    [
        ([0, 10, 20], 5, [0, 1, 2]),
        ([], 5, []),
        (range(0, 1001, 10), 3, [0, 3, 100]),
    ],
)
def test_log_spaced(steps, most, places):
    assert list(collect.log_spaced(steps, most)) == places
