"""Five settings train to the losses, gradient norms and evaluations that are on record in losses.json.

The record was made on one x86-64 CPU with torch 2.13 by the loop that the scripts had before they took their steps
themselves, and the same machine gives it back to the last bit; another may round a product of matrices differently.
`PYTHONPATH=. python tests/test_losses.py > tests/losses.json` makes it again, for a change that means to change a loss.
"""

import contextlib
import io
import json
import tempfile
from pathlib import Path

import pytest
from runs import TINY, TINY_ICL, TINY_LM, flags, metrics, one_thread, timeless, waves, write_corpus, write_series

import train
import train_ICL
import train_TS

RECORD = Path(__file__).with_name("losses.json")
LONG = dict(max_iters=12, log_interval=1, eval_interval=6)
SERIES = dict(
    TINY, dataset="waves", look_back=24, horizon=12, batch_size=8, mlr_rank_list="4|2|1|1", dropout=0.2,
    init_lr=1e-2, eval_batch_size=64,
)  # fmt: skip
CASES = {  # name: script and settings
    "text_mlr": (train, TINY_LM, dict(token_mixing_struct="multi_level_low_rank", mlr_rank_list="4|2|2")),
    "text_sequential_gswa": (
        train,
        TINY_LM,
        dict(
            token_mixing_struct="low_rank_with_sequential_gswa", sequential_GSWA_layer_list="MHA|SWA",
            sliding_block_size=5, dtype="bfloat16", decay_lr=True, lr_decay_iters=12, weight_decay=0.1,
        ),
    ),
    "prompts_bilinear_btt": (train_ICL, TINY_ICL, dict(token_mixing_struct="bilinear_BTT")),
    "recall": (
        train_ICL,
        TINY,
        dict(training_task="noisy_recall", n_dims=4, n_positions=6, batch_size=8, eval_prompts=8, grad_clip=1.0,
             mlr_rank_list="4|2|2"),
    ),
    "series_mlr": (train_TS, SERIES, dict(token_mixing_struct="multi_level_low_rank", patience=3)),
}  # fmt: skip


def lines(name, folder):
    """metrics.jsonl of a case, without times."""
    script, *settings = CASES[name]
    where = dict(out_dir=folder / name) | ({} if script is train_ICL else dict(data_dir=folder))
    with one_thread(), contextlib.redirect_stdout(io.StringIO()):
        script.main(flags(*settings, LONG, where))
    return timeless(metrics(folder / name))


def make_data(folder):
    write_corpus(folder / "text")
    write_series(folder / "waves", waves(400), (240, 80, 80))


@pytest.mark.parametrize("name", CASES)
def test_the_losses_on_record(name, tmp_path):
    make_data(tmp_path)
    want = json.loads(RECORD.read_text())[name]
    got = json.loads(json.dumps(lines(name, tmp_path)))
    assert [list(line) for line in got] == [list(line) for line in want]
    near = 3e-2 if name == "text_sequential_gswa" else 2e-4  # bfloat16: products differ more from CPU to CPU
    for mine, recorded in zip(got, want, strict=True):
        for key, value in recorded.items():
            assert mine[key] == (pytest.approx(value, rel=near, abs=1e-7) if is_number(value) else value), key


def is_number(value):
    return isinstance(value, float) or (isinstance(value, list) and all(map(is_number, value)))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder))
        cases = {name: ",\n".join(map(json.dumps, lines(name, Path(folder)))) for name in CASES}
        print("{" + ",\n".join(f'"{name}": [\n{record}]' for name, record in cases.items()) + "}")
