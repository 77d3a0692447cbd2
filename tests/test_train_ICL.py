"""train_ICL.py: exact resumes in a growing curriculum, stops, records, wandb, and the paper's commands at tiny size."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from runs import (
    STRUCTURES,
    TINY_ICL,
    assert_equal,
    assert_every_parameter_moves,
    assert_same_checkpoint,
    assert_same_run,
    at_step,
    change_losses,
    checkpoint,
    child,
    flags,
    metrics,
    record,
    signal_at,
    stops,
)

import train_ICL
from data.icl_regression import stream
from data.icl_regression.tasks import TASKS

ROOT = Path(__file__).parents[1]
COUNTED = ["step", "seconds", "tokens", "compute", "non_emb_compute", "paper_compute"]
PROGRESS = [*COUNTED, "overall_loss", "excess_loss", "n_dims", "n_points", "lr", "grad_norm", "tokens_per_s", "mfu"]
EVALUATION = [*COUNTED, "eval_pointwise/loss", "eval/last", "baselines"]


def argv(*settings, **more):
    return flags(TINY_ICL, *settings, more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of six steps that nothing interrupted."""
    out_dir = tmp_path_factory.mktemp("whole") / "run"
    train_ICL.main(argv(out_dir=out_dir))
    return out_dir


# --- exact resume ---


@pytest.mark.parametrize("structure", ["low_rank", "bilinear_MLR", "bilinear_BTT"])
@pytest.mark.parametrize("stop", [1, 3])
def test_interrupted_in_a_growing_curriculum(structure, stop, tmp_path, monkeypatch):
    settings = dict(STRUCTURES[structure], token_mixing_struct=structure)
    train_ICL.main(argv(settings, out_dir=tmp_path / "six"))
    signal_at(monkeypatch, train_ICL, stop - 1, signal.SIGUSR1)
    assert stops(train_ICL.main, argv(settings, out_dir=tmp_path / "parts")) == 128 + signal.SIGUSR1
    assert checkpoint(tmp_path / "parts")["step"] == stop
    train_ICL.main(argv(settings, out_dir=tmp_path / "parts", init_from="auto"))
    assert_same_run(tmp_path / "parts", tmp_path / "six")
    assert [m["n_dims"] for m in metrics(tmp_path / "parts") if "n_dims" in m] == [2, 3, 4]


def die_at_step(step, argv):
    at_step(pytest.MonkeyPatch(), train_ICL, step, lambda: os.kill(os.getpid(), signal.SIGKILL))
    sys.stdout = io.StringIO()
    train_ICL.main(argv)


def test_a_kill_between_checkpoints(whole, tmp_path):
    """Killed at step 5 with a checkpoint of step 4: step 4 is trained again, on the same prompts."""
    process = child(die_at_step, 5, argv(out_dir=tmp_path, log_interval=1))
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert checkpoint(tmp_path)["step"] == 4
    assert metrics(tmp_path)[-1]["step"] == 5
    train_ICL.main(argv(out_dir=tmp_path, log_interval=1, init_from="resume"))
    assert_same_checkpoint(tmp_path, whole)
    assert [m["step"] for m in metrics(tmp_path)] == [0, 1, 2, 3, 4, 4, 5, 6, 6]


def test_an_error_in_a_step_is_recorded_and_raised(tmp_path, monkeypatch):
    def fail():
        raise ArithmeticError("no more")

    at_step(monkeypatch, train_ICL, 5, fail)
    with pytest.raises(ArithmeticError):
        train_ICL.main(argv(out_dir=tmp_path))
    assert record(tmp_path)["status"] == "failed: ArithmeticError: no more"
    assert checkpoint(tmp_path)["step"] == 4


def test_too_little_memory_in_a_step_is_recorded_and_one_line(tmp_path, monkeypatch, capsys):
    def fail():
        raise MemoryError("no more")

    at_step(monkeypatch, train_ICL, 5, fail)
    assert stops(train_ICL.main, argv(out_dir=tmp_path)) == 1
    assert capsys.readouterr().err == "error: out of memory (no more); fewer or smaller sizes need less\n"
    assert record(tmp_path)["status"] == "failed: MemoryError: no more"
    assert checkpoint(tmp_path)["step"] == 4


def test_a_loss_that_is_not_finite(tmp_path, monkeypatch, capsys):

    def spoiled(losses, step, network):
        return {name: value * float("inf") for name, value in losses.items()} if step == 4 else losses

    change_losses(monkeypatch, train_ICL, spoiled)
    assert stops(train_ICL.main, argv(out_dir=tmp_path)) == 1
    assert "the loss is not finite at step 4" in capsys.readouterr().err
    assert checkpoint(tmp_path)["step"] == 4
    assert all(t.isfinite().all() for t in checkpoint(tmp_path)["model"].values())


def test_the_prompts_of_every_step(tmp_path, monkeypatch):
    """They grow with the curriculum, and no example of the pool comes twice in an epoch."""
    sizes, seen, sample = [], [], stream.sample_prompts

    def recorded(**options):
        sizes.append((options["dims"], options["n_points"]))
        seen.extend(options["examples"].tolist())
        return sample(**options)

    monkeypatch.setattr(stream, "sample_prompts", recorded)
    train_ICL.main(argv(out_dir=tmp_path))
    assert sizes == [(2, 4), (3, 6), (4, 8)]  # two steps each
    assert len(set(seen)) == len(seen) == 6 * 4


# --- records ---


def test_the_lines_of_metrics(whole):
    lines = metrics(whole)
    assert [(m["step"], "eval/last" in m) for m in lines] == [
        (0, True), (2, False), (4, False), (4, True), (6, False), (6, True)
    ]  # fmt: skip
    for line in lines:
        assert list(line) == (EVALUATION if "eval/last" in line else PROGRESS)
        numbers = [v for key, v in line.items() if key not in ("eval_pointwise/loss", "baselines", "mfu")]
        assert all(type(value) in (int, float) for value in numbers)
        if "eval/last" in line:
            assert len(line["eval_pointwise/loss"]) == 8
            assert line["eval/last"] == line["eval_pointwise/loss"][-1]
            assert {"least_squares", "ridge", "averaging", "nearest_neighbours", "zero"} == line["baselines"].keys()
            assert all(len(errors) == 8 for errors in line["baselines"].values())
    assert [(m["n_dims"], m["n_points"]) for m in lines if "n_dims" in m] == [(2, 4), (3, 6), (4, 8)]
    assert lines[0]["eval/last"] == pytest.approx(lines[0]["baselines"]["zero"][-1])  # the output starts at zero
    assert lines[1]["excess_loss"] == pytest.approx(1, abs=0.1)
    assert record(whole)["command"] == "train_ICL.py"


def test_counters_equal_closed_forms(whole):
    """Executed: prompts as they were. The paper's: what a token of the full prompt costs, for every token."""
    L, D, d, B, sizes = 2, 16, 4, 4, [8, 8, 12, 12, 16, 16]

    def trunk(T):
        return L * (12 * T * D * D + 2 * T * T * D)  # projections and MLP; scores and value product

    def executed(T):
        return trunk(T) + T * d * D + T // 2 * D  # read-in of all tokens, read-out of the x tokens

    norms = D * (2 * L + 1) + L * 2 * D  # a token
    paper = trunk(16) / 16 + 5 * norms + d * D + D  # a token
    for line in metrics(whole):
        past = sizes[: line["step"]]
        assert line["tokens"] == B * sum(past)
        assert line["compute"] == 6 * B * sum(map(executed, past))
        assert line["non_emb_compute"] == 6 * B * sum(map(trunk, past))
        assert line["paper_compute"] == pytest.approx(B * sum(past) * paper, rel=1e-12)
    assert record(whole)["paper_macs_per_token"] == pytest.approx(paper, rel=1e-12)
    assert record(whole)["flops_per_token"] == 6 * executed(16) / 16


def test_the_evaluation_does_not_depend_on_its_batch(tmp_path):
    train_ICL.main(argv(out_dir=tmp_path / "a"))
    train_ICL.main(argv(out_dir=tmp_path / "b", eval_batch_size=3, seed=1337))
    for a, b in zip(metrics(tmp_path / "a"), metrics(tmp_path / "b"), strict=True):
        if "eval/last" in a:
            assert a["eval_pointwise/loss"] == pytest.approx(b["eval_pointwise/loss"], rel=1e-5)
            assert a["baselines"]["least_squares"] == pytest.approx(b["baselines"]["least_squares"], rel=1e-5)
    assert_equal(checkpoint(tmp_path / "b")["model"], checkpoint(tmp_path / "a")["model"], "model")


# --- wandb ---


def test_the_papers_command_with_wandb_offline(tmp_path):
    """A real W&B run without a network: wandb_entity alone turns it on."""
    entity = dict(PAPER, wandb_entity="some-group", out_dir=tmp_path)
    env = dict(os.environ, WANDB_MODE="offline", WANDB_SILENT="true", WANDB_CACHE_DIR=str(tmp_path / "cache"))
    pytest.importorskip("wandb")
    command = [sys.executable, "train_ICL.py", *flags(TINY, entity, token_mixing_struct="bilinear_MLR")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert record(tmp_path)["status"] == "finished"
    (saved,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = saved.read_bytes()
    assert b"some-group" in content
    for key in {key for line in metrics(tmp_path) for key in line} - {"mfu"}:
        assert key.encode() in content, key


# --- the paper's commands ---

TINY = dict(
    n_layer=2, batch_size=4, max_iters=70, warmup_iters=10, eval_interval=70, eval_prompts=8, log_interval=35,
    device="cpu", training_curriculum_dims_interval=1, training_curriculum_points_interval=1,
)  # fmt: skip
PAPER = dict(  # the flags of the paper's in-context regression
    n_dims=8, n_head=2, d_model=16, mlr_rank_list="4|2|2", mlr_divide_by_num_levels=False,
    mlr_block_divide_by_num_levels=False, bilinear_mlr_muP_attn_logits_scaling=False, mha_SP_attn_logits_scaling=False,
    training_learning_rate=0.001, training_curriculum_adaptive_inc=True, training_num_training_examples=512,
    wandb_entity="", btt_tt_rank=1, bilinear_btt_muP_attn_logits_scaling=False,
)  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        dict(token_mixing_struct="low_rank", mha_SP_attn_logits_scaling=True),
        dict(token_mixing_struct="multi_level_low_rank", mlr_block_divide_by_num_levels=True),
        dict(token_mixing_struct="bilinear_MLR", bilinear_mlr_muP_attn_logits_scaling=True),
        dict(token_mixing_struct="bilinear_BTT", btt_tt_rank=2, bilinear_btt_muP_attn_logits_scaling=True),
    ],
    ids=lambda change: change["token_mixing_struct"],
)
def test_the_papers_command(change, tmp_path):
    """In 6% of 70 steps dims grow from 4 to 8 and points from 8 to 16."""
    train_ICL.main(flags(TINY, PAPER, change, out_dir=tmp_path))
    settings = record(tmp_path)["settings"]
    assert settings | PAPER | change == settings
    assert record(tmp_path)["status"] == "finished"
    assert metrics(tmp_path)[-1]["tokens"] == 4 * 2 * (8 + 10 + 12 + 14 + 66 * 16)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_structure_trains(structure, tmp_path):
    command = argv(STRUCTURES[structure], token_mixing_struct=structure, out_dir=tmp_path, dropout=0.0)
    assert_every_parameter_moves(train_ICL, command, tmp_path)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_trains(task, tmp_path):
    noise = 0.0 if task == "linear_classification" else 0.1
    options = dict(task_sparsity=2, task_hidden=5, task_depth=2, noise_std=noise)
    train_ICL.main(argv(options, training_task=task, out_dir=tmp_path, max_iters=2))
    assert metrics(tmp_path)[-1]["eval/last"] > 0


def test_in_context_learning_beats_predicting_zero(tmp_path):
    """One dimension, y = w x: after 150 steps the last error is well below the variance of y."""
    settings = dict(
        n_dims=1, n_positions=8, max_iters=150, eval_interval=150, eval_prompts=256, batch_size=64, dropout=0.0,
        training_num_training_examples=32_000, training_learning_rate=1e-4, d_model=32, n_head=4, mlr_rank_list="4|2|2",
        training_curriculum_dims_start=1, training_curriculum_points_start=8,
    )  # fmt: skip
    train_ICL.main(argv(settings, out_dir=tmp_path, log_interval=100))
    last = metrics(tmp_path)[-1]
    assert last["eval/last"] < 0.5 * last["baselines"]["zero"][-1]
