"""CONTRIBUTING.md: its code blocks, applied to a copy of the repository, add what the page says they add."""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import indent

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("structured", "training", "data", "plots", "benchmarks", "tests")
BLOCK = re.compile(
    r"^(A new file|One line of `(?P<table>\w+)` in|Above `(?P<name>\w+)` in|At the end of) `(?P<path>[\w/.]+)`:\n\n"
    r"```python\n(?P<code>.*?)```$",
    re.MULTILINE | re.DOTALL,
)
TINY = ["--n_layer=2", "--n_head=2", "--d_model=16", "--block_size=16", "--device=cpu"]
TRAIN = [*TINY, "--dataset=notes", "--batch_size=2", "--gradient_accumulation_steps=1", "--eval_iters=2"]
TRAIN += ["--max_iters=4", "--eval_interval=2", "--log_interval=2", "--warmup_iters=1"]
ALIBI = ["--token_mixing_struct=alibi", "--alibi_steepness=4"]


def apply(block, folder):
    path, code = folder / block["path"], block["code"]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    elif block["table"]:
        head, start, rest = path.read_text().partition(f"\n{block['table']} = ")
        last = re.search(r"^( *)[^ \n].*\n(?= *\})", rest, re.MULTILINE)  # the table's last row
        path.write_text(head + start + rest[: last.end()] + indent(code, last[1]) + rest[last.end() :])
    elif block["name"]:
        head, start, rest = path.read_text().partition(f"\n{block['name']} = ")
        path.write_text(f"{head}{code}\n{start}{rest}")
    else:
        path.write_text(f"{path.read_text()}\n\n{code}")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the repository with all blocks applied."""
    folder = tmp_path_factory.mktemp("copy")
    sources = [path for name in FOLDERS for path in (ROOT / name).rglob("*.py")]
    for path in (*sources, *ROOT.glob("*.py"), ROOT / "pyproject.toml"):
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    page = (ROOT / "CONTRIBUTING.md").read_text()
    blocks = list(BLOCK.finditer(page))
    assert len(blocks) == page.count("```python"), "every block says where it goes"
    for block in blocks:
        apply(block, folder)
    return folder


def run(folder, *argv):
    own = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}  # not those of these tests
    command = [sys.executable, *map(str, argv)]
    done = subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_the_page_adds_works(copy):
    (copy / "notes.txt").write_text("to be or not to be, that is the question\n" * 40)
    run(copy, "data/notes/prepare.py", "--input", "notes.txt")

    def trained():
        run(copy, "train.py", *TRAIN, *ALIBI, "--out_dir=out/alibi")
        greedy = ["sample.py", "--out_dir=out/alibi", "--start=to be", "--max_new_tokens=20", "--temperature=0"]
        texts = [run(copy, *greedy, f"--use_cache={use_cache}") for use_cache in (True, False)]
        assert texts[0] == texts[1]
        assert texts[0].startswith("to be")

    def measured():
        said = run(copy, "bench.py", "step", *TINY[:1], "--d_head=8", "--block_size=16", "--device=cpu", "--steps=1",
                   "--structures=alibi", "--widths=16", "--batches=1x1", "--repeats=1")  # fmt: skip
        assert re.search(r"^ +16 1x1 +alibi +[\d.]+ ", said, re.MULTILINE)

    def tested():
        chosen = ["tests/test_scoring.py", "tests/test_model.py", "tests/test_generate.py", "tests/test_icl_data.py"]
        said = run(copy, "-m", "pytest", *chosen, "-k", "alibi or quadratic_regression", "-p", "no:cacheprovider")
        assert re.search(r"\d\d passed", said)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.submit(trained), pool.submit(lambda: (measured(), tested()))
        first.result(), second.result()
    for figure in ("lm_compute", "lm_grad_norm"):
        said = run(copy, f"plots/{figure}.py", "out/alibi", "--out", f"out/{figure}.png")
        assert (copy / f"out/{figure}.png").stat().st_size > 10_000
        assert "#7f7f7f" in (copy / f"out/{figure}.svg").read_text(), "its colour"
        assert figure == "lm_grad_norm" or "ALiBi" in said


def test_a_setting_of_one_structure_is_refused_for_the_others(copy):
    argv = [sys.executable, "train.py", *TRAIN, "--alibi_steepness=4", "--out_dir=out/refused"]
    done = subprocess.run(argv, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: alibi_steepness is 4.0, low_rank takes 8.0 only; other values are for alibi\n"
    said = run(copy, "train.py", "--help")
    assert re.search(r"--alibi_steepness +float +ALiBi: .* \[8.0\]", said)
    assert "bilinear_MLBTC, alibi ['low_rank']" in said
