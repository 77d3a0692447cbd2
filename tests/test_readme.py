"""README.md and results/README.md say what the records say: their tables, and the sentences beside them."""

import contextlib
import io
import json
import re
import statistics
from pathlib import Path

import pytest
from scipy.stats import ttest_1samp

from plots import lm_laws, lm_pairs, readme, speed_table, ts_table
from plots.claims import EIGHT_LEVELS
from plots.lm_levels import levels
from plots.records import read_runs, tuned
from plots.tables import student
from plots.ts_kinds import kinds_of
from plots.ts_pairs import chronos_pairs, paired
from training.records import find_runs

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
NO_RESULT = ("2.13.0", "2.11", "2509.07963", "3.11", "0.0005")  # versions, the paper's address, a setting


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_the_tables_are_what_the_records_say():
    for name in readme.FILES:
        assert readme.filled((ROOT / name).read_text())[1] == [], "make tables prints them again"
    with contextlib.redirect_stdout(printed := io.StringIO()):
        ts_table.main(["results/time_series", "results/chronos"])
    assert (RESULTS / "ts_table.md").read_text() == printed.getvalue()


def test_a_number_that_no_record_holds_is_found_and_put_right(tmp_path, monkeypatch, capsys):
    """In a copy of the README with one table: a number of it is changed, then the copy is mended."""
    page = (RESULTS / "language_modeling" / "README.md").read_text()
    whole = next(m[0] for m in readme.BLOCK.finditer(page) if m[3] == "lm_pairs")
    path = tmp_path / "README.md"
    path.write_text(f"before\n\n{whole}\nafter 1.25\n")
    wrong = path.read_text().replace("7 of 7 pairs", "8 of 8 pairs")
    assert wrong != path.read_text()
    monkeypatch.setattr(readme, "FILES", (str(path),))
    readme.main(["--check"])
    path.write_text(wrong)
    with pytest.raises(SystemExit) as end:
        readme.main(["--check"])
    assert end.value.code == 1
    assert "plots/lm_pairs.py results/language_modeling/" in capsys.readouterr().out
    assert path.read_text() == wrong
    readme.main([])
    assert path.read_text() == f"before\n\n{whole}\nafter 1.25\n"


def test_a_block_whose_runs_are_not_there_says_so(tmp_path, monkeypatch):
    block = f"<!-- if recorded: plots/icl_table.py {tmp_path} --ledger -->\n<!-- end -->"
    text, changed = readme.filled(block)
    assert readme.PENDING in text
    assert changed
    assert readme.filled(text) == (text, [])
    with pytest.raises(readme.BadInput, match="no run in"):
        readme.filled(block.replace("if recorded: ", ""))


def test_no_result_stands_outside_the_tables():
    pages = [RESULTS / page / "README.md" for page in ("icl_regression", "language_modeling", "bench")]
    front = (ROOT / "README.md").read_text()
    texts = [front[: front.index("## What is here")], *(page.read_text().partition("\n## ")[0] for page in pages)]
    text = readme.BLOCK.sub("", "".join(texts))
    found = set(re.findall(r"\d+\.\d{2,}(?:\.\d+)?", text)) - set(NO_RESULT)
    assert not found, f"{found}: a number of a record belongs in a block, or into NO_RESULT with its reason"


def runs_at_one_rate():
    folders = sorted((RESULTS / "language_modeling").glob("*_lr0.003_seed[12]"))
    return read_runs(folders, "train.py", ["max_iters=10000", *EIGHT_LEVELS])


def test_the_sentences_on_language_models():
    tables = lm_pairs.pairs(runs_at_one_rate())
    means = {structure: table.lead.mean() for structure, table in tables.items()}
    assert [s for s, mean in means.items() if mean > 0] == ["multi_level_low_rank"]
    assert (tables["multi_level_low_rank"].lead > 0).all()
    window = tables["low_rank_with_sliding_window"]
    assert lm_pairs.trend(window)[2] < 0  # falls behind with the width
    assert window.lead[window.d_model == 512].max() < 0
    laws = lm_laws.fit_laws(runs_at_one_rate())
    assert laws.offset(2) > laws.offset(1)  # whose windows are harder
    assert laws.exponent("multi_level_low_rank")[2] > laws.exponent("low_rank")[1]  # intervals overlap


def test_the_sentences_on_levels():
    runs = read_runs([RESULTS / "lm_levels"], "train.py")
    found = {
        levels(c.settings): statistics.fmean(r.final("val/loss") for r in c.runs)
        for c in tuned(runs, "val/loss", "init_lr")
    }
    assert sorted(found) == [1, 2, 4, 8]
    assert found[8] < found[4] < found[1] <= found[2]


def test_the_sentences_on_time_series():
    kinds = kinds_of(read_runs([RESULTS / "time_series"], "train_TS.py"))
    differences = [values for values in paired(kinds).values() if len(values) > 2]
    assert all(student(values)[3] > 0.05 for values in differences)  # none is beyond seeds
    encoder = next(kind for kind in kinds if kind.label == "standard, L = 96")
    day = next(kind for kind in kinds if kind.label == "last day repeated")
    for horizon, runs in encoder.runs.items():
        assert statistics.fmean(encoder.errors("mse")[horizon]) > day.errors("mse")[horizon][0]
        val = {n: statistics.fmean(run.evaluated["val/mse"][n]["val/mse"] for run in runs) for n in (200, 1000)}
        train = {n: statistics.fmean(run.evaluated["train/mse"][n]["train/mse"] for run in runs) for n in (200, 1000)}
        assert train[1000] < train[200] < 0.6 * val[200]  # overfits
    chronos = chronos_pairs(find_runs([RESULTS / "chronos"], "train_chronos.py"))["multi_level_low_rank"]
    assert {len(values) for values in chronos.values()} == {3}
    for metric in ("test/mse", "test/wql"):
        assert max(chronos[metric]) < 0
        assert ttest_1samp(chronos[metric], 0).pvalue < 0.1


def test_the_sentences_on_speed():
    record = speed_table.read(RESULTS / "bench" / "attention_h200.json")
    for rows in speed_table.by_length(record).values():
        assert rows[speed_table.DEFAULT]["both_ms"] < rows[speed_table.FLASH]["both_ms"]  # cuDNN, faster than it
        assert rows["SDPA", "cudnn"]["both_ms"] == pytest.approx(rows[speed_table.DEFAULT]["both_ms"], rel=0.04)
    for width, card, waits in ((256, "h200", True), (256, "h100", False), (768, "h200", False), (768, "h100", False)):
        path = RESULTS / "bench" / f"step_{width}_{card}.json"
        rows = {(row["batch"], row["token_mixing_struct"]): row for row in json.loads(path.read_text())["rows"]}
        peer, ours = rows["32x1", "peer"], rows["32x1", "low_rank"]
        assert (ours["tokens_per_s"] > peer["tokens_per_s"]) == waits
        if card == "h200":
            assert (peer["kernel_ms"] < 0.7 * peer["ms"]) == waits
            assert rows["4x8", "peer"]["kernel_ms"] < 0.7 * rows["4x8", "peer"]["ms"]
