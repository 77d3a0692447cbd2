"""bench.py: every command at tiny sizes, a wrong function is not timed, the JSON holds what the table shows."""

import json
import math
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from runs import CACHED

import bench
import structured.cache
import train_ICL
from benchmarks import attention, decode, icl, measure, step
from plots import speed_table
from training.capture import WARM_UP, StaticStep
from training.configurator import configure
from training.errors import BadInput

ATTENTION = ["attention", "--device=cpu", "--repeats=1", "--n_head=2", "--d_head=8", "--bilinear_width=12"]
ATTENTION += ["--mlr_rank_list=4|2|2", "--gswa_rank_list=4|4", "--lengths=16|21", "--tokens=32"]
SMALL = ["--device=cpu", "--repeats=1", "--n_layer=2", "--d_model=16", "--d_head=8"]
SMALL += ["--mlr_rank_list=4|2|2", "--gswa_rank_list=4|4"]
STEP = ["step", *SMALL, "--block_size=16", "--steps=1", "--batches=2x1|1x3"]
DECODE = ["decode", *SMALL, "--steps=2", "--lengths=16|32|64"]

ICL = ["icl", "--device=cpu", "--repeats=1", "--steps=2", "--sizes=4x16|3x32", "--n_layer=1", "--n_head=2"]
ICL += ["--batch_size=2"]


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(measure, "LEAST_MS", 0.1)
    monkeypatch.setattr(decode, "CHECK_LENGTH", 32)
    monkeypatch.setattr(decode, "POSITIONS", 2)


def printed_and_saved(argv, columns, path, capsys):
    """The rows of the JSON file, after checking that the table shows exactly them, and the exit status."""
    status = 0
    try:
        bench.main([*argv, f"--out={path}"])
    except SystemExit as end:
        status = end.code
    lines = capsys.readouterr().out.splitlines()
    saved = json.loads(path.read_text())
    for key in ("device", "torch", "dtype", "seed"):
        assert f"{key} {saved[key]}" in lines[0]
    assert lines[1].startswith(f"python bench.py {argv[0]} --")
    assert lines[3:] == [bench.line(row, columns) for row in saved["rows"]]
    return saved["rows"], status


@pytest.fixture
def attention_rows(tmp_path, capsys):
    """Runs `bench.py attention` with more flags: (rows, exit status)."""
    return lambda *argv: printed_and_saved([*ATTENTION, *argv], attention.COLUMNS, tmp_path / "rows.json", capsys)


def without_times(row):
    return set(row) == {"structure", "backend", "T", "note"}


def test_attention(attention_rows):
    rows, status = attention_rows()
    assert status == 0
    cases = [case for case in attention.CASES if not attention.ON_CUDA_ONLY & {*case}]
    names = [(row["T"], (row["structure"], row["backend"])) for row in rows]
    assert names == [(T, case) for T in (16, 21) for case in cases]
    for row in rows:
        assert row["error"] < 2e-5
        assert row["error_ratio"] > 0
        assert row["extra_MiB"] is None
        peers = [peer for peer in rows if peer["T"] == row["T"] and peer["structure"] == "SDPA"]
        for what in ("forward", "both"):
            times = [peer[f"{what}_ms"] for peer in peers]
            assert row[f"{what}/default"] == row[f"{what}_ms"] / times[0]
            assert row[f"{what}/best"] == row[f"{what}_ms"] / min(times)


def test_only_the_structures_asked_for_beside_sdpa_and_no_large_matrices(attention_rows):
    rows, _ = attention_rows("--structures=MLR", "--dense_up_to=16")
    assert {row["structure"] for row in rows} == {"SDPA", "MLR"}
    for row in rows:
        left_out = row["T"] == 21 and row["backend"] in ("math", "dense")
        assert without_times(row) == left_out
        assert not left_out or "dense_up_to" in row["note"]


def test_the_seed_repeats_the_inputs(attention_rows):
    errors = [[row["error_ratio"] for row in attention_rows(*seed)[0]] for seed in (["--seed=5"], ["--seed=5"], [])]
    assert errors[0] == errors[1] != errors[2]


def times_factor(factor):
    return lambda function, q, k, v, **keywords: factor * function(q, k, v, **keywords)


def wrong_gradient(function, q, k, v, **keywords):
    return function(q, k, v, **keywords) + 0.01 * (v.sum() - v.sum().detach())


def wrong_for_large_scores(function, q, k, v, **keywords):
    return function(q.clamp(-5, 5), k, v, **keywords)


@pytest.mark.parametrize(
    "wrong", [times_factor(1.01), times_factor(math.nan), wrong_gradient, wrong_for_large_scores],
    ids=["1.01", "nan", "gradient", "large scores"],
)  # fmt: skip
def test_a_wrong_function_is_not_timed(wrong, attention_rows, monkeypatch):
    replace_case(monkeypatch, "MLR", "dense", lambda run: lambda *qkv, **keywords: wrong(run, *qkv, **keywords))
    rows, status = attention_rows()
    assert status == 1
    for row in rows:
        if (row["structure"], row["backend"]) == ("MLR", "dense"):
            assert without_times(row)
            assert row["note"].startswith("WRONG")
        else:
            assert row["forward_ms"] > 0


@pytest.mark.parametrize(
    ("error", "note", "want"),
    [(BadInput("too wide"), "refused: too wide", 0), (RuntimeError("No available kernel."), "does not take", 0),
     (torch.OutOfMemoryError(), "out of memory", 0), (ValueError("oh\nno"), "FAILED: ValueError: oh", 1)],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)  # fmt: skip
def test_a_function_that_cannot_run_has_a_note_and_no_times(error, note, want, attention_rows, monkeypatch):
    def cannot(*qkv, **keywords):
        raise error

    replace_case(monkeypatch, "window", "dense", lambda run: cannot)
    rows, status = attention_rows("--lengths=16", "--structures=window")
    assert status == want
    (row,) = (row for row in rows if (row["structure"], row["backend"]) == ("window", "dense"))
    assert without_times(row)
    assert row["note"].startswith(note)
    assert all("note" not in other for other in rows if other is not row)


def replace_case(monkeypatch, structure, backend, change):
    """Put change(run) in place of the function of one row."""
    run, definition = attention.CASES[structure, backend]
    monkeypatch.setitem(attention.CASES, (structure, backend), (change(run), definition))


def test_the_check_keeps_what_is_special_about_a_length():
    cfg = configure(attention.Settings, ["--check_up_to=256"])
    assert attention.keywords(cfg, 1000)["MLR"]["block_sizes"] == (1024, 512, 256, 128, 64, 32, 16, 8)
    assert attention.keywords(cfg, 3)["MLR"]["block_sizes"][-1] == 1
    for T, short in ((1000, 232), (1024, 256), (200, 200)):
        checks = attention.make_checks(cfg, torch.device("cpu"), T, "MLR")
        given = [errors.args[:2] for _, errors, _ in checks]
        assert {inputs[0].shape for inputs, _ in given} == {(2, 2, short, 64)}
        blocks = {options["block_sizes"] for _, options in given}
        assert blocks == {attention.keywords(cfg, length)["MLR"]["block_sizes"] for length in (T, short)}
        assert len(checks) == len(blocks) * len(attention.FACTORS)
        assert {inputs[0].transpose(1, 2).is_contiguous() for inputs, _ in given} == {True}


def test_decode(tmp_path, capsys):
    rows, status = printed_and_saved(DECODE, decode.COLUMNS, tmp_path / "rows.json", capsys)
    assert status == 0
    assert [(row["T"], row["token_mixing_struct"]) for row in rows] == [
        (T, name) for T in (16, 32, 64) for name in structured.STRUCTURES
    ]
    assert all("declares no cache" in row["note"] for row in rows if row["token_mixing_struct"] not in CACHED)
    numbers = 2 * 2 * 4 / 2**20  # MiB of a number a layer and head
    for row in (row for row in rows if row["token_mixing_struct"] in CACHED):
        T, name = row["T"], row["token_mixing_struct"]
        W = T // 2
        keys = {
            "low_rank": 8 * T,
            "low_rank_with_sliding_window": 8 * (W + 1),
            "low_rank_with_gswa": 4 * T + 4 * (W + 1),
            "low_rank_with_sequential_gswa": 8 * (T + W + 1) / 2,  # one layer of each kind
            "multi_level_low_rank": 4 * T + 2 * T / 2 + 2 * T / 4,
            "bilinear_MLR": (4 + 2 * 2 + 2 * 4) * T,
            "bilinear_BTT": 16 * T / 2 + T,  # the inputs, which both heads share, and a number a head
            "bilinear_MLBTC": 16 * T / 2 + T,
        }[name]
        values = keys if name.endswith(("window", "sequential_gswa")) else 8 * T
        assert row["key_MiB"] == pytest.approx(keys * numbers)
        assert row["value_MiB"] == pytest.approx(values * numbers)
        assert row["cache/standard"] == pytest.approx((keys + values) / (16 * T))
        assert row["tokens_per_s"] == pytest.approx(1e3 / row["mean_ms"])
        shorter = [r for r in rows if r["token_mixing_struct"] == name and r["T"] < T]
        assert all(r["key_MiB"] < row["key_MiB"] and r["value_MiB"] < row["value_MiB"] for r in shorter)


def test_a_timing_of_steps_ends_at_its_position(monkeypatch):
    """Every time from the same token on, so that a recorded graph of the steps can be replayed."""
    layer, seen = SimpleNamespace(count=99, at=torch.tensor([99])), []

    def model(token, cache):
        seen.append(layer.count)
        layer.count += 1
        layer.at += 1

    monkeypatch.setattr(decode, "median_ms", lambda run, device, repeats: [run(), 24.0][1])
    cfg = configure(decode.Settings, ["--steps=3"])
    for position, taken in ((20, [18, 19, 20]), (2, [1, 2]), (1, [1])):
        seen.clear()
        ms = decode.step_ms(cfg, model, SimpleNamespace(layers=[layer]), position, torch.device("cpu"))
        assert ms == 24 / len(taken)
        assert seen == taken * (len(seen) // len(taken))
        assert layer.count == position + 1 == layer.at.item() + 1


def test_times_on_a_gpu_are_tritons(monkeypatch):
    asked, found = [], iter([5.0, 1.0, 2.0])

    def do_bench(run, *, rep, return_mode):
        asked.append((run(), rep, return_mode))
        return next(found)

    monkeypatch.setitem(sys.modules, "triton.testing", SimpleNamespace(do_bench=do_bench))
    assert measure.median_ms(lambda: "ran", torch.device("cuda"), repeats=3) == 2
    assert asked == [("ran", measure.LEAST_MS, "median")] * 3


def test_times_on_the_cpu_are_a_call_s_milliseconds_with_all_threads(monkeypatch):
    threads = []

    def run():
        threads.append(torch.get_num_threads())
        time.sleep(0.02)

    cpu, most = torch.device("cpu"), torch.get_num_threads()
    assert 20 <= measure.median_ms(run, cpu, repeats=1) < 200
    assert 20 <= measure.time_step(run, cpu, steps=2, repeats=1)["ms"] < 200
    assert set(threads) == {most}


def test_the_timers_wait_for_the_card_asked_for(monkeypatch, capsys):
    """They synchronise the current device alone."""
    seen = []
    monkeypatch.setattr(bench, "pick_device", torch.device)
    monkeypatch.setattr(torch.cuda, "set_device", seen.append)
    for name in ("cuda:1", "cuda:0", "cuda", "cpu"):
        with pytest.raises(SystemExit):
            bench.main(["attention", f"--device={name}", "--lengths=0"])
    assert seen == [torch.device("cuda:1")]
    assert "lengths is '0'" in capsys.readouterr().err


def test_a_wrong_cache_is_not_timed(tmp_path, capsys, monkeypatch):
    right = structured.cache.row_scores
    monkeypatch.setattr(structured.cache, "row_scores", lambda q, k, scale: right(q, k, 1.01 * scale))
    rows, status = printed_and_saved([*DECODE, "--lengths=16"], decode.COLUMNS, tmp_path / "rows.json", capsys)
    assert status == 1
    for row in rows:
        assert set(row) == {"token_mixing_struct", "T", "note"}
        assert row["note"].startswith("WRONG")


def test_the_peak_is_that_of_one_call_after_the_warm_up(monkeypatch):
    calls, seen = [], []

    def peak(run, device):
        seen.append(len(calls))
        run()
        seen.append(len(calls))
        return 7.0

    monkeypatch.setattr(measure, "peak_MiB", peak)
    timed = measure.time_step(lambda: calls.append(0), torch.device("cpu"), steps=5, repeats=2)
    assert timed["peak_MiB"] == 7.0
    assert seen == [WARM_UP, WARM_UP + 1]
    assert len(calls) == WARM_UP + 1 + 2 * (2 + 5)  # torch.utils.benchmark calls twice before a timing


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_peak_of_a_recorded_step_is_what_the_recording_needs():
    device, MiB = torch.device("cuda"), 2**20

    def work(x):
        if static.calls < WARM_UP:
            torch.empty(256 * MiB, dtype=torch.uint8, device=device)  # like the compiler's timings
        torch.ones(32 * MiB, dtype=torch.uint8, device=device)

    static = StaticStep(work, device)
    step_ = partial(static, torch.zeros(1, device=device))
    before = torch.cuda.memory_allocated(device) / MiB
    peak = measure.time_step(step_, device, steps=1, repeats=1)["peak_MiB"]
    assert static.graph is not None
    assert 32 <= peak - before < 64


def test_step(tmp_path, capsys):
    rows, status = printed_and_saved([*STEP, "--widths=16|32"], step.COLUMNS, tmp_path / "rows.json", capsys)
    assert status == 0
    names = [(d, batch, name) for d in (16, 32) for batch in ("2x1", "1x3") for name in structured.STRUCTURES]
    assert [(row["d_model"], row["batch"], row["token_mixing_struct"]) for row in rows] == names
    for row in rows:
        tokens = 16 * (2 if row["batch"] == "2x1" else 3)
        assert row["tokens_per_s"] == pytest.approx(tokens * 1e3 / row["ms"])
        assert row["outside_ms"] < row["ms"]
        assert row["mfu"] is row["of_matmul"] is row["peak_MiB"] is None  # on the CPU there is nothing to compare with
        assert "times_peer" not in row
    macs = 2 * (3 + 1 + 8) * 16**2 + 16 * 96 + 2 * 2 * 16 * 16  # a token's: linear layers, head, scores and values
    first = rows[0]
    assert first["TFLOP_per_s"] == pytest.approx(6 * macs * first["tokens_per_s"] / 1e12)


def test_step_times_the_step_of_train(tmp_path):
    """Every structure's settings reach train.py, which writes nothing."""
    cfg = configure(step.Settings, [*STEP[1:], "--sliding_block_size=7"])
    step.write_corpus(tmp_path / "corpus", cfg)
    for name, variant in cfg.variants(d_model=32).items():
        run = variant.run_settings((2, 3), str(tmp_path))
        assert (run.token_mixing_struct, run.d_model, run.sliding_block_size) == (name, 32, 7)
        assert (run.batch_size, run.gradient_accumulation_steps, run.seed) == (2, 3, cfg.seed)
    assert step.time_run(cfg, run)["ms"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


PEER = """
import torch
from runs import CACHED
from dataclasses import dataclass

@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        assert (config.n_layer, config.n_head, config.n_embd) == (2, 2, 16)
        assert (config.block_size, config.vocab_size, config.bias) == (16, 96, False)
        print("number of parameters: few")
        self.table = torch.nn.Embedding(config.vocab_size, config.vocab_size)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)

    def forward(self, idx, targets=None):
        assert idx.shape == targets.shape and torch.equal(idx[:, 1:], targets[:, :-1])
        logits = self.table(idx)
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""


def test_step_beside_a_peer(tmp_path, capsys):
    (tmp_path / "model.py").write_text(PEER)
    argv = [*STEP, "--structures=low_rank|bilinear_BTT", f"--peer={tmp_path}"]
    rows, status = printed_and_saved(argv, step.COLUMNS, tmp_path / "rows.json", capsys)
    assert status == 0
    assert [row["token_mixing_struct"] for row in rows] == ["peer", "low_rank", "bilinear_BTT"] * 2
    for i, row in enumerate(rows):
        theirs = rows[i // 3 * 3]
        if row is not theirs:
            assert row["times_peer"] == pytest.approx(row["tokens_per_s"] / theirs["tokens_per_s"])


def test_the_kernels_of_a_step(tmp_path, capsys):
    """Of six products, the longest first; then those of a row each, printed below it."""

    def work():
        a = torch.ones(8, 8)
        for _ in range(6):
            a @ a

    found = step.kernels_of(work, torch.device("cpu"), 100, calls=2)["kernels"]
    assert [ms for _, ms, _ in found] == sorted((ms for _, ms, _ in found), reverse=True)
    assert {name: launches for name, _, launches in found}["aten::mm"] == 6
    (tmp_path / "model.py").write_text(PEER)
    out = tmp_path / "rows.json"
    bench.main([*STEP, "--structures=low_rank", "--batches=1x2", f"--peer={tmp_path}", "--kernels=2", f"--out={out}"])
    rows = json.loads(out.read_text())["rows"]
    assert [len(row["kernels"]) for row in rows] == [2, 2]
    assert all(row["kernel_ms"] > sum(ms for _, ms, _ in row["kernels"]) for row in rows)
    printed = capsys.readouterr().out.splitlines()[-6:]
    for row, lines in zip(rows, (printed[1:3], printed[4:6]), strict=True):
        for (name, ms, launches), text in zip(row["kernels"], lines, strict=True):
            assert text.split(maxsplit=4) == [f"{ms:.3f}", "ms", f"{launches:.0f}", "x", name[:90]]


def test_a_peer_that_fails_costs_no_other_row(tmp_path, capsys):
    (tmp_path / "model.py").write_text(PEER.replace("(2, 2, 16)", "(2, 2, 17)"))
    argv = [*STEP, "--structures=low_rank", "--batches=1x1", f"--peer={tmp_path}"]
    (theirs, ours), status = printed_and_saved(argv, step.COLUMNS, tmp_path / "rows.json", capsys)
    assert status == 1
    assert theirs["note"].startswith("FAILED: AssertionError")
    assert ours["ms"] > 0
    assert "times_peer" not in ours


@pytest.mark.parametrize(
    ("source", "said"),
    [(None, "FileNotFoundError"), ("GPT = 1", "no attribute 'GPTConfig'"),
     ("import no_such_package", "ModuleNotFoundError"), ("class", "SyntaxError")],
)  # fmt: skip
def test_a_folder_that_is_no_peer(source, said, tmp_path, capsys):
    if source:
        (tmp_path / "model.py").write_text(source)
    with pytest.raises(SystemExit) as end:
        bench.main([*STEP, f"--peer={tmp_path}"])
    assert end.value.code == 2
    assert said in (printed := capsys.readouterr()).err
    assert "give a checkout" in printed.err
    assert printed.out == ""


def test_icl(tmp_path, capsys):
    rows, status = printed_and_saved(ICL, icl.COLUMNS, tmp_path / "rows.json", capsys)
    assert status == 0
    names = [(4, 16, name) for name in icl.STRUCTURES] + [(3, 32, name) for name in icl.STRUCTURES]
    assert [(row["n_dims"], row["d_model"], row["token_mixing_struct"]) for row in rows[::2]] == names
    for plain, ours in zip(rows[::2], rows[1::2], strict=True):
        assert (plain["loop"], ours["loop"]) == ("reference", "train_ICL")
        assert ours["times_reference"] == pytest.approx(ours["steps_per_s"] / plain["steps_per_s"])
        assert plain["token_mixing_struct"] == ours["token_mixing_struct"]


def test_several_runs_in_a_process_count_all_their_steps(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(icl, "time_step", lambda step, *args: dict(ms=[step(), 6.0][1], peak_MiB=None))
    argv = [*ICL, "--sizes=4x16", "--token_mixing_struct=low_rank", "--together=3"]
    rows, status = printed_and_saved(argv, icl.COLUMNS, tmp_path / "rows.json", capsys)
    assert status == 0
    assert [row["loop"] for row in rows] == ["reference", "train_ICL", "3 at once"]
    assert [row["ms"] for row in rows] == [6, 6, 2]
    assert [row["steps_per_s"] for row in rows] == pytest.approx([1e3 / 6, 1e3 / 6, 500])
    assert [row.get("times_reference") for row in rows] == [None, 1, 3]


@pytest.mark.parametrize("name", icl.STRUCTURES)
def test_icls_reference_computes_the_same(name):
    """The model with dense scores, and the prompts: predicting zero costs 1."""
    cfg = configure(icl.Settings, ICL[1:])
    run = cfg.run_settings(4, 16, name)
    parts = measure.Started(train_ICL, run, eval_prompts=1).parts
    torch.nn.init.normal_(parts.model.read_out.weight)
    given = parts.layout, *parts.prompts.at(0)
    want = train_ICL.losses(parts.network, *given)["overall_loss"]
    for block in parts.model.trunk.h:
        block.attn.scoring = icl.DenseScores(block.attn.scoring)
    got = train_ICL.losses(parts.network, *given)["overall_loss"]
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    run.batch_size = 4000
    x, y = icl.draw_one_by_one(run)
    assert x.shape == (4000, 8, 4)
    assert y.square().mean().item() == pytest.approx(1, abs=0.1)


def test_a_record_that_was_cut_short_makes_no_table(tmp_path, capsys):
    rows = [dict(token_mixing_struct=name, loop="train_ICL", steps_per_s=1.0) for name in icl.STRUCTURES]
    path = tmp_path / "icl.json"
    path.write_text(json.dumps(dict(command="icl", device="GPU", torch="2.13.0", dtype="float32", rows=rows)))
    with pytest.raises(SystemExit) as end:
        speed_table.main([str(path)])
    assert end.value.code == 2
    printed, said = capsys.readouterr()
    assert "has no row low_rank reference; make one that has it with: python bench.py icl" in said
    assert said.count("\n") == 1
    assert printed == ""


@pytest.mark.parametrize(
    "argv",
    [[], ["steps"], [*ATTENTION, "--lengths=0"], [*ATTENTION, "--d_head=9"], [*ATTENTION, "--repeats=0"],
     [*ATTENTION, "--lenghts=8"], [*ATTENTION, "--structures=mlr"], [*ATTENTION, "--seed=-2"],
     [*DECODE, "--lengths=18"], [*DECODE, "--lengths=1"], [*DECODE, "--n_layer=0"],
     [*DECODE, "--token_mixing_struct=mlr"],
     [*ICL, "--sizes=16"], [*ICL, "--sizes=0x16"], [*ICL, "--sizes=4x15"], [*ICL, "--token_mixing_struct=mlr"],
     [*ICL, "--steps=0"], [*ICL, "--cuda_graph=maybe"], [*STEP, "--d_model=20"], [*STEP, "--out=no/such/folder.json"],
     [*STEP, "--batches=8"], [*STEP, "--batches=0x1"], [*STEP, "--widths=a"], [*STEP, "--steps=0"],
     [*STEP, "--cuda_graph=True"], [*STEP, "--compile_mode=fast"], [*STEP, "--kernels=-1"]],
    ids=" ".join,
)  # fmt: skip
def test_bad_input(argv, capsys):
    with pytest.raises(SystemExit) as end:
        bench.main(argv or [""])
    assert end.value.code == 2
    printed, said = capsys.readouterr()
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert printed == ""
