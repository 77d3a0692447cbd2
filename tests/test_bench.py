"""bench.py: both commands at tiny sizes, a wrong function is not timed, the JSON holds what the table shows."""

import json
import math

import pytest

import bench

ATTENTION = ["attention", "--device=cpu", "--repeats=1", "--n_head=2", "--d_head=8", "--mlr_rank_list=4|2|2"]
ATTENTION += ["--gswa_rank_list=4|4", "--lengths=16|21"]
STEP = ["step", "--device=cpu", "--repeats=1", "--n_layer=2", "--d_model=16", "--d_head=8", "--block_size=16"]
STEP += ["--mlr_rank_list=4|2|2", "--gswa_rank_list=4|4"]


def printed_and_saved(argv, columns, path, capsys):
    """The rows of the JSON file, after checking that the table shows exactly them."""
    status = 0
    try:
        bench.main([*argv, f"--out={path}"])
    except SystemExit as end:
        status = end.code
    lines = capsys.readouterr().out.splitlines()
    saved = json.loads(path.read_text())
    assert saved["torch"] in lines[0]
    assert saved["dtype"] in lines[0]
    assert lines[3:] == [bench.line(row, columns) for row in saved["rows"]]
    return saved["rows"], status


def test_attention(tmp_path, capsys):
    rows, status = printed_and_saved(ATTENTION, bench.ATTENTION_COLUMNS, tmp_path / "rows.json", capsys)
    assert status == 0
    assert [(row["T"], row["function"]) for row in rows] == [(T, name) for T in (16, 21) for name in bench.FUNCTIONS]
    for row in rows:
        assert row["error"] < 2e-5
        first = next(r for r in rows if r["T"] == row["T"])
        assert row["both_ratio"] == row["both_ms"] / first["both_ms"]


@pytest.mark.parametrize("factor", [1.01, math.nan])
def test_a_wrong_function_is_not_timed(factor, tmp_path, capsys, monkeypatch):
    function, definition = bench.FUNCTIONS["MLR"]
    wrong = (lambda *inputs, **keywords: factor * function(*inputs, **keywords), definition)
    monkeypatch.setitem(bench.FUNCTIONS, "MLR", wrong)
    rows, status = printed_and_saved(ATTENTION, bench.ATTENTION_COLUMNS, tmp_path / "rows.json", capsys)
    assert status == 1
    for row in rows:
        if row["function"] == "MLR":
            assert set(row) == {"function", "T", "note"}
            assert row["note"].startswith("WRONG")
        else:
            assert row["forward_ms"] > 0


def test_step(tmp_path, capsys):
    rows, status = printed_and_saved(STEP, bench.STEP_COLUMNS, tmp_path / "rows.json", capsys)
    assert status == 0
    pairs = [(model, name) for model in bench.MODELS for name in bench.STRUCTURES]
    assert [(row["model"], row["token_mixing_struct"]) for row in rows] == pairs
    for row in rows:
        assert row["tokens_per_s"] == pytest.approx(row["steps_per_s"] * 2 * 16)


@pytest.mark.parametrize(
    "argv",
    [[], ["steps"], [*ATTENTION, "--lengths=0"], [*ATTENTION, "--d_head=9"], [*ATTENTION, "--repeats=0"],
     [*ATTENTION, "--lenghts=8"], [*STEP, "--d_model=20"], [*STEP, "--out=no/such/folder.json"]],
    ids=" ".join,
)  # fmt: skip
def test_bad_input(argv, capsys):
    with pytest.raises(SystemExit) as end:
        bench.main(argv or [""])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")
