"""train.py: exact resumes, kills, stops, losses that are not finite, records, and the paper's commands at tiny size."""

import errno
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import (
    STRUCTURES,
    TINY_LM,
    assert_equal,
    assert_every_parameter_moves,
    assert_same_checkpoint,
    assert_same_run,
    at_step,
    begin,
    change_losses,
    checkpoint,
    child,
    metrics,
    record,
    signal_at,
    stops,
    timeless,
    write_corpus,
)
from torch._dynamo.output_graph import OutputGraph
from torch.nn.functional import cross_entropy

import train
from data import windows
from training import checkpoint as checkpoint_module
from training import run as run_module
from training.checkpoint import load_checkpoint, load_run
from training.distributed import World
from training.run import Run
from training.signals import STOP_SIGNALS
from training.tracking import mirrored

ROOT = Path(__file__).parents[1]
RECORD = [
    "command", "argv", "settings", "commit", "dirty", "versions", "device", "processes", "together", "started",
    "resumed", "finished", "status", "parameters", "paper_macs_per_token", "flops_per_token",
]  # fmt: skip
COUNTED = ["step", "seconds", "tokens", "compute", "non_emb_compute", "paper_compute"]
PROGRESS = [*COUNTED, "train/loss", "lr", "grad_norm", "tokens_per_s", "mfu"]
EVALUATION = [*COUNTED, "val/loss", "val/tokens"]


# --- exact resume ---


@pytest.mark.parametrize(
    ("structure", "dtype"),
    [
        ("low_rank", "float32"),
        ("low_rank", "bfloat16"),
        ("low_rank", "float16"),  # its loss scale is in the checkpoint
        ("multi_level_low_rank", "float32"),
        ("bilinear_BTT", "float32"),
    ],
)
def test_three_steps_and_three_more_equal_six(structure, dtype, argv, tmp_path, monkeypatch):
    """Stopped at step 3, neither a progress line's nor an evaluation's, with dropout and gradient accumulation."""
    settings = dict(STRUCTURES[structure], token_mixing_struct=structure, dtype=dtype)
    train.main(argv(settings, out_dir=tmp_path / "six"))
    signal_at(monkeypatch, train, 2, signal.SIGTERM)
    assert stops(train.main, argv(settings, out_dir=tmp_path / "parts")) == 128 + signal.SIGTERM
    assert checkpoint(tmp_path / "parts")["step"] == 3
    train.main(argv(settings, out_dir=tmp_path / "parts", init_from="resume"))
    assert_same_run(tmp_path / "parts", tmp_path / "six")
    assert [r["step"] for r in record(tmp_path / "parts")["resumed"]] == [3]


def test_a_finished_run_goes_on_with_more_steps(argv, whole, tmp_path):
    train.main(argv(out_dir=tmp_path, max_iters=3))
    train.main(argv(out_dir=tmp_path, max_iters=6, init_from="resume"))
    assert_same_checkpoint(tmp_path, whole)
    got, want = ([m for m in metrics(d) if "val/loss" in m and m["step"] != 3] for d in (tmp_path, whole))
    assert timeless(got) == timeless(want)


def test_every_random_number_is_a_function_of_the_checkpoint(argv, whole, tmp_path, monkeypatch):
    """A stop after every single step, numpy's and torch's global generators disturbed in between."""
    for step in range(5):
        with monkeypatch.context() as patch:
            signal_at(patch, train, step, signal.SIGTERM)
            assert stops(train.main, argv(out_dir=tmp_path / "parts", init_from="auto")) == 128 + signal.SIGTERM
        torch.manual_seed(step)
    train.main(argv(out_dir=tmp_path / "parts", init_from="auto"))
    assert_same_run(tmp_path / "parts", whole)


def test_auto_starts_and_then_resumes(argv, whole, tmp_path, capsys):
    train.main(argv(out_dir=tmp_path, max_iters=4, init_from="auto"))
    assert "resuming" not in capsys.readouterr().out
    train.main(argv(out_dir=tmp_path, max_iters=6, init_from="auto"))
    assert "at step 4" in capsys.readouterr().out
    assert_same_run(tmp_path, whole)
    train.main(argv(out_dir=tmp_path, max_iters=6, init_from="auto"))  # nothing left to do
    assert_same_run(tmp_path, whole)


def test_auto_starts_anew_where_a_run_was_killed_before_its_first_checkpoint(argv, whole, tmp_path):
    (tmp_path / "run.json").write_text('{"status": "running"}')
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"st')
    train.main(argv(out_dir=tmp_path, init_from="auto"))
    assert_same_run(tmp_path, whole)


def test_auto_refuses_the_folder_of_another_run_that_has_no_checkpoint_yet(argv, tmp_path, capsys):
    (tmp_path / "run.json").write_text(json.dumps(dict(settings=vars(train.Settings(seed=5)))))
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}')
    with pytest.raises(SystemExit) as stopped:
        train.main(argv(out_dir=tmp_path, init_from="auto"))
    assert stopped.value.code == 2
    assert "run.json was made with" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0}'


def test_a_resume_on_another_corpus_is_refused(argv, tmp_path, capsys):
    train.main(argv(out_dir=tmp_path / "run", max_iters=2))
    write_corpus(tmp_path / "text", tokens=500)
    with pytest.raises(SystemExit) as stopped:
        train.main(argv(out_dir=tmp_path / "run", init_from="resume", data_dir=tmp_path))
    assert stopped.value.code == 2
    assert "is not the corpus" in capsys.readouterr().err


def test_free_settings_may_change_at_a_resume(argv, whole, tmp_path):
    train.main(argv(out_dir=tmp_path, max_iters=4))
    train.main(argv(out_dir=tmp_path, init_from="resume", eval_iters=3, wandb_project="other"))
    assert_equal(checkpoint(tmp_path)["model"], checkpoint(whole)["model"], "model")


def test_a_resume_to_fewer_steps_is_refused(argv, tmp_path, capsys):
    train.main(argv(out_dir=tmp_path, max_iters=4))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert stops(train.main, argv(out_dir=tmp_path, max_iters=3, init_from="resume")) == 2
    assert f"error: {tmp_path} is at step 4, max_iters is 3; a run goes on to more steps" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    train.main(argv(out_dir=tmp_path, max_iters=3, init_from="resume", eval_only=True))  # which takes no step
    assert "step 4: val loss" in capsys.readouterr().out


# --- kills ---


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_save(moment, call, argv):
    """Train, and die at one moment of the call-th checkpoint."""
    counts, save, fsync, replace = {}, torch.save, os.fsync, os.replace

    def due(here):
        counts[here] = counts.get(here, 0) + 1
        return here == moment and counts[here] == call

    def half_save(state, file):
        if due("before"):
            kill_self()
        whole = io.BytesIO()
        save(state, whole)
        half = len(whole.getvalue()) // 2
        file.write(whole.getvalue()[:half])
        if due("half written"):
            file.flush()
            kill_self()
        file.write(whole.getvalue()[half:])

    def sync(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(f".pt.{os.getpid()}.tmp") and due("not flushed"):
            kill_self()
        fsync(descriptor)

    def rename(source, target):
        name = Path(target).name
        if due(f"{name} not renamed"):
            kill_self()
        replace(source, target)
        if due(f"{name} renamed"):
            kill_self()

    torch.save, os.fsync, os.replace = half_save, sync, rename
    train.main(argv)


RENAMES = [f"{name}.pt {when}" for name in ("best", "ckpt") for when in ("not renamed", "renamed")]


@pytest.mark.parametrize("moment", ["before", "half written", "not flushed", *RENAMES])
@pytest.mark.parametrize("call", [1, 2])
def test_a_kill_at_any_moment_of_a_checkpoint(moment, call, argv, tmp_path):
    """Every one of these is the best so far, so that it is written as best.pt and gets its other name after that."""
    train.main(argv(out_dir=tmp_path / "whole", eval_interval=2))
    process = child(die_in_save, moment, call, argv(out_dir=tmp_path / "run", eval_interval=2))
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    saved = 2 * (call if moment == "ckpt.pt renamed" else call - 1)
    if saved:
        assert load_checkpoint(tmp_path / "run" / "ckpt.pt")["step"] == saved
    else:
        assert not (tmp_path / "run" / "ckpt.pt").exists()
    assert metrics(tmp_path / "run")[-1]["step"] == 2 * call  # logged before the checkpoint
    with open(tmp_path / "run" / "metrics.jsonl", "a") as f:
        f.write('{"step": 4, "val/lo')
    train.main(argv(out_dir=tmp_path / "run", eval_interval=2, init_from="auto"))
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert steps_of_checkpoints(tmp_path / "run") == steps_of_checkpoints(tmp_path / "whole")


def train_quietly(argv):
    sys.stdout = sys.stderr = io.StringIO()
    train.main(argv)


def written_at(path):
    return os.stat(path).st_mtime_ns if os.path.exists(path) else None


@pytest.mark.slow
def test_twenty_kills_at_random_moments(argv, tmp_path):
    """kill -9 while it starts, trains, evaluates or saves, at every step: it ends as the uninterrupted run does."""
    settings, steps = dict(eval_interval=1, eval_iters=1, log_interval=1), 120
    began = time.perf_counter()
    train.main(argv(settings, max_iters=steps, out_dir=tmp_path / "whole"))
    a_step = (time.perf_counter() - began) / steps
    command = argv(settings, max_iters=steps, out_dir=tmp_path / "run", init_from="auto")
    draw, path = random.Random(0), tmp_path / "run" / "ckpt.pt"
    for attempt in range(20):
        before = written_at(path)
        process = child(train_quietly, command)
        if attempt % 4 == 0:
            time.sleep(draw.uniform(0, 5) * a_step)
        else:  # some steps after its first checkpoint
            while written_at(path) == before and process.exitcode is None:
                time.sleep(a_step / 10)
            time.sleep(draw.uniform(0, 2) * a_step)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run was over before it could be killed"
    process = child(train_quietly, command)
    process.join(120)
    assert process.exitcode == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_metrics_beyond_the_checkpoint_are_dropped_at_a_resume(argv, whole, tmp_path):
    train.main(argv(out_dir=tmp_path, max_iters=4))
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 5, "val/loss": 1.0}\n{"step": 6, "val/loss": 2.0}\n{"step": 4, "val/lo')
    train.main(argv(out_dir=tmp_path, init_from="resume"))
    assert_same_run(tmp_path, whole)


def test_a_full_disk_leaves_the_old_checkpoint(argv, whole, tmp_path, monkeypatch, capsys):
    train.main(argv(out_dir=tmp_path, max_iters=4))
    before = (tmp_path / "ckpt.pt").read_bytes()

    def full(state, file):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module.torch, "save", full)
        assert stops(train.main, argv(out_dir=tmp_path, init_from="resume")) == 1
    why = "best.pt cannot be written: No space left on device"
    assert capsys.readouterr().err == f"error: {tmp_path}/{why}; {tmp_path}/ckpt.pt is the last good checkpoint\n"
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.pt", "ckpt.pt", "metrics.jsonl", "run.json"]
    assert "No space left" in record(tmp_path)["status"]
    train.main(argv(out_dir=tmp_path, init_from="resume"))
    assert_same_run(tmp_path, whole)


def train_with_files_up_to(size, argv):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    train_quietly(argv)


def test_a_file_cut_short_by_the_system_leaves_the_old_checkpoint(argv, whole, tmp_path):
    train.main(argv(out_dir=tmp_path, max_iters=4))
    before = (tmp_path / "ckpt.pt").read_bytes()
    process = child(train_with_files_up_to, len(before) // 2, argv(out_dir=tmp_path, init_from="resume"))
    process.join(60)
    assert process.exitcode == 1
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.pt", "ckpt.pt", "metrics.jsonl", "run.json"]
    assert "best.pt cannot be written: File too large" in record(tmp_path)["status"]
    train.main(argv(out_dir=tmp_path, init_from="resume"))
    assert_same_run(tmp_path, whole)


def die_before_renaming(name, argv):
    replace = os.replace

    def rename(source, target):
        if str(target).endswith(name):
            kill_self()
        replace(source, target)

    os.replace = rename
    train_quietly(argv)


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.json"])
def test_a_kill_while_a_resume_begins(name, argv, whole, tmp_path):
    train.main(argv(out_dir=tmp_path, max_iters=4))
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 5, "val/loss": 1.0}\n')
    process = child(die_before_renaming, name, argv(out_dir=tmp_path, init_from="resume"))
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert record(tmp_path)["status"] == "finished", "of the four steps before"
    train.main(argv(out_dir=tmp_path, init_from="resume"))
    assert_same_run(tmp_path, whole)


# --- stops ---


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("step", [0, 3])
def test_a_signal_saves_and_stops(number, step, argv, whole, tmp_path, monkeypatch, capfd):
    handlers = {n: signal.getsignal(n) for n in STOP_SIGNALS}
    signal_at(monkeypatch, train, step, number)
    assert stops(train.main, argv(out_dir=tmp_path)) == 128 + number
    said = capfd.readouterr()
    assert f"stopped: {number.name} at step {step + 1}; go on with --init_from=resume" in said.out
    assert f"{number.name}: will save and stop after this step" in said.err
    assert record(tmp_path)["status"] == f"stopped: {number.name}"
    assert record(tmp_path)["finished"]
    assert {n: signal.getsignal(n) for n in STOP_SIGNALS} == handlers
    monkeypatch.undo()
    train.main(argv(out_dir=tmp_path, init_from="resume"))
    assert_same_run(tmp_path, whole)


def test_a_signal_during_the_evaluation_at_the_start(argv, whole, tmp_path, monkeypatch):
    evaluate = train.evaluate

    def interrupted(*given):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*given)

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", interrupted)
        assert stops(train.main, argv(out_dir=tmp_path)) == 128 + signal.SIGTERM
    assert checkpoint(tmp_path)["step"] == 0
    train.main(argv(out_dir=tmp_path, init_from="resume"))
    assert_same_run(tmp_path, whole)


def test_a_stop_does_not_wait_for_a_long_evaluation(argv, tmp_path, monkeypatch):
    """It stops in the third batch of the one at step 4, which the resumed run makes whole."""
    to_device, seen = train.to_device, []

    def interrupted(array, device):
        seen.append(array)
        if len(seen) == 2 * per_evaluation + 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return to_device(array, device)

    with monkeypatch.context() as patch:
        patch.setattr(train, "to_device", lambda array, device: seen.append(array) or to_device(array, device))
        train.main(argv(out_dir=tmp_path / "counted", max_iters=0))
    per_evaluation = len(seen)
    seen.clear()
    with monkeypatch.context() as patch:
        patch.setattr(train, "to_device", interrupted)
        assert stops(train.main, argv(out_dir=tmp_path / "run", eval_interval=2)) == 128 + signal.SIGTERM
    assert len(seen) < 3 * per_evaluation
    assert checkpoint(tmp_path / "run")["step"] == 4
    assert [m["step"] for m in metrics(tmp_path / "run") if "val/loss" in m] == [0, 2]
    train.main(argv(out_dir=tmp_path / "run", eval_interval=2, init_from="resume"))
    train.main(argv(out_dir=tmp_path / "whole", eval_interval=2))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("graph", [1, 2])
def test_a_stop_does_not_wait_for_a_compilation(graph, argv, whole, tmp_path, monkeypatch):
    """Of the evaluation at step 0, which is saved, or of the first step, of which there is nothing to save."""
    compile_graph, seen = OutputGraph.call_user_compiler, []

    def interrupted(*given, **more):
        seen.append(given)
        if len(seen) == graph:
            os.kill(os.getpid(), signal.SIGTERM)
        return compile_graph(*given, **more)

    torch._dynamo.reset()
    with monkeypatch.context() as patch:
        patch.setattr(OutputGraph, "call_user_compiler", interrupted)
        assert stops(train.main, argv(out_dir=tmp_path, compile=True)) == 128 + signal.SIGTERM
    assert len(seen) == graph
    assert record(tmp_path)["status"] == "stopped: SIGTERM"
    assert (tmp_path / "ckpt.pt").exists() == (graph == 1)
    train.main(argv(out_dir=tmp_path, init_from="auto"))
    assert_same_run(tmp_path, whole)


def test_a_signal_and_then_one_interrupt(argv, tmp_path, monkeypatch):
    """SIGTERM, and the person's Ctrl-C before the step is over: the run saves and stops."""

    def both():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)

    at_step(monkeypatch, train, 2, both)
    assert stops(train.main, argv(out_dir=tmp_path)) == 128 + signal.SIGINT
    assert checkpoint(tmp_path)["step"] == 3


def test_a_signal_that_is_ignored_stays_ignored(argv, whole, tmp_path, monkeypatch):
    """As under nohup."""
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signal_at(monkeypatch, train, 2, signal.SIGHUP)
        train.main(argv(out_dir=tmp_path))
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, earlier)
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("number", [None, signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_output_that_nobody_reads(number, argv, whole, tmp_path):
    """`train.py | tee log` whose tee is gone: the run goes on, saves at a signal, and ends as promised."""
    command = [sys.executable, "train.py", *argv(out_dir=tmp_path, max_iters=6 if number is None else 10**6)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    process.stderr.close()
    if number is not None:
        while not (tmp_path / "ckpt.pt").exists():
            time.sleep(0.05)
        process.send_signal(number)
    assert process.wait(100) == (0 if number is None else 128 + number)
    status = record(tmp_path)["status"]
    assert status == ("finished" if number is None else f"stopped: {number.name}")
    if number is None:
        assert_same_run(tmp_path, whole)


def test_a_full_disk_for_the_output(argv, whole, tmp_path):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "train.py", *argv(out_dir=tmp_path)]
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    assert "stdout cannot be written (No space left on device): going on without it" in done.stderr
    assert_same_run(tmp_path, whole)


def test_lines_that_are_lost_are_named(argv, tmp_path, capsys):
    train.main(argv(out_dir=tmp_path, max_iters=4))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    for kept, where in [(lines[:2], "ends at step 2"), ([], "is empty or gone")]:
        (tmp_path / "metrics.jsonl").write_text("".join(kept))
        capsys.readouterr()
        train.main(argv(out_dir=tmp_path, max_iters=4, init_from="resume"))
        assert f"metrics.jsonl {where}; the checkpoint saw lines up to step 4" in capsys.readouterr().out


def test_the_second_interrupt_does_not_wait(argv, tmp_path, monkeypatch):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at_step(monkeypatch, train, 2, twice)
    with pytest.raises(KeyboardInterrupt):
        train.main(argv(out_dir=tmp_path))
    assert record(tmp_path)["status"].startswith("failed: KeyboardInterrupt")


def test_a_signal_while_a_line_is_printed(argv, tmp_path, monkeypatch):
    """The handler may run inside a write to stdout, which cannot be entered twice."""

    class Interrupted(io.RawIOBase):
        def writable(self):
            return True

        def write(self, data):
            if b"step 2/6" in bytes(data):
                os.kill(os.getpid(), signal.SIGTERM)
            return len(data)

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(Interrupted())))
    assert stops(train.main, argv(out_dir=tmp_path)) == 128 + signal.SIGTERM
    assert record(tmp_path)["status"] == "stopped: SIGTERM"


def test_the_command_stops_at_sigterm(argv, tmp_path):
    """The whole command, as a job scheduler sees it; and what it need not import."""
    script = (
        "import atexit, sys, train, train_ICL; sys.argv[0] = 'train.py'; "
        "atexit.register(lambda: print(sys.modules.keys() & {'wandb', 'datasets', 'tiktoken', 'matplotlib'})); "
        "train.main()"
    )
    command = [sys.executable, "-c", script, *argv(out_dir=tmp_path, max_iters=1_000_000, eval_interval=1_000_000)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 4/"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped: SIGTERM at step" in rest
    assert rest.splitlines()[-1] == "set()"
    assert record(tmp_path)["argv"][0] == "train.py"
    assert checkpoint(tmp_path)["step"] >= 4


# --- what is not finite ---


def spoil_loss(value):
    def spoil(network, losses):
        return {name: loss * value for name, loss in losses.items()}

    return spoil


def spoil_gradient(network, losses):
    """A finite loss with an infinite gradient."""
    weight = network.lm_head.weight
    zero = (weight - weight.detach()).abs().sqrt().sum()  # 0, with slope infinity at 0
    return {name: loss + zero for name, loss in losses.items()}


@pytest.mark.parametrize(
    ("spoil", "what"),
    [(spoil_loss(float("nan")), "loss"), (spoil_loss(float("inf")), "loss"), (spoil_gradient, "gradient")],
    ids=["nan", "inf", "gradient"],
)
@pytest.mark.parametrize(("bad", "saved"), [(2, 2), (4, 4), (5, 4)])
def test_a_loss_that_is_not_finite(spoil, what, bad, saved, argv, whole, tmp_path, monkeypatch, capsys):
    """The run fails before it saves or logs what came of it, a checkpoint at every second step."""

    def spoiled(losses, number, network):
        return spoil(network, losses) if number == 2 * bad + 1 else losses  # the second of two micro-batches

    settings = dict(eval_interval=2)
    with monkeypatch.context() as patch:
        change_losses(patch, train, spoiled)
        assert stops(train.main, argv(settings, out_dir=tmp_path)) == 1
    why = f"the {what} is not finite at step {bad}"
    assert f"error: {why}; {tmp_path}/ckpt.pt is the last good checkpoint" in capsys.readouterr().err
    assert record(tmp_path)["status"] == f"failed: {why}"
    assert checkpoint(tmp_path)["step"] == saved
    assert all(t.isfinite().all() for t in checkpoint(tmp_path)["model"].values())
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    train.main(argv(settings, out_dir=tmp_path, init_from="resume"))
    assert checkpoint(tmp_path)["step"] == 6
    assert_equal(checkpoint(tmp_path)["model"], checkpoint(whole)["model"], "model")


def test_a_loss_that_is_not_finite_is_not_saved_by_a_stop(argv, tmp_path, monkeypatch, capsys):

    def spoiled(losses, number, network):
        if number == 2 * 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return {name: value * float("nan") for name, value in losses.items()}

    change_losses(monkeypatch, train, spoiled)
    assert stops(train.main, argv(out_dir=tmp_path, log_interval=100)) == 1
    assert "the loss is not finite at step 0; no checkpoint was written before" in capsys.readouterr().err
    assert not (tmp_path / "ckpt.pt").exists()


def test_an_evaluation_that_is_not_finite(argv, tmp_path, monkeypatch, capsys):
    found = iter([3.0, 2.0, float("nan")])  # at steps 0, 2 and 4
    monkeypatch.setattr(train, "evaluate", lambda *_: {"val/loss": next(found)})
    assert stops(train.main, argv(out_dir=tmp_path, eval_interval=2)) == 1
    assert "the evaluation at step 4 is not finite" in capsys.readouterr().err
    assert checkpoint(tmp_path)["step"] == 2


def test_float16_skips_a_step_whose_gradient_overflows(argv, tmp_path, monkeypatch):
    """That is no failure: the scale of the loss is halved, and the record stays plain JSON."""
    second_step = (2, 3)  # its micro-batches

    def large(losses, number, network):
        return {name: value * (1e6 if number in second_step else 1) for name, value in losses.items()}

    change_losses(monkeypatch, train, large)
    train.main(argv(out_dir=tmp_path, dtype="float16", log_interval=1))
    assert record(tmp_path)["status"] == "finished"
    assert [m["step"] for m in metrics(tmp_path) if m.get("grad_norm", 0) is None] == [2]
    assert "Infinity" not in (tmp_path / "metrics.jsonl").read_text()
    assert checkpoint(tmp_path)["scaler"]["scale"] == 65536 / 2
    assert all(state["step"] == 5 for state in checkpoint(tmp_path)["optimizer"]["state"].values())
    assert all(t.isfinite().all() for t in checkpoint(tmp_path)["model"].values())


# --- a step ---


def test_the_gradient_is_that_of_the_mean_over_micro_batches(argv, tmp_path):
    command = argv(out_dir=tmp_path, dropout=0.0, log_interval=1, max_iters=1)
    steps, run = begin(train, dict(part.removeprefix("--").split("=", 1) for part in command))
    loss = sum(train.losses(run.model, windows)["train/loss"] for windows in run.windows.at(0).unbind()) / 2
    loss.backward()
    want = torch.stack([p.grad.norm() for p in run.model.parameters()]).norm()
    steps.close()
    train.main([*command, "--overwrite=True"])
    first = metrics(tmp_path)[1]
    assert first["grad_norm"] == pytest.approx(want.item(), rel=1e-5)
    assert first["train/loss"] == pytest.approx(loss.item(), rel=1e-6)


def test_every_micro_batch_is_another_and_every_evaluation_the_same(argv, tmp_path, monkeypatch):
    drawn, forward = {True: [], False: []}, train.GPT.forward  # in training, in evaluations

    def recorded(self, inputs, targets):
        drawn[self.training].append(torch.cat([inputs, targets[:, -1:]], 1))
        return forward(self, inputs, targets)

    monkeypatch.setattr(train.GPT, "forward", recorded)
    train.main(argv(out_dir=tmp_path))
    assert len(torch.stack(drawn[True]).unique(dim=0)) == len(drawn[True]) == 6 * 2
    assert drawn[True][0].shape == (2, 16 + 1)
    for got, want in zip(drawn[False], drawn[False][: len(drawn[False]) // 3] * 3, strict=True):
        assert torch.equal(got, want)


def test_what_goes_wrong_in_the_thread_is_the_runs_error(argv, tmp_path, monkeypatch):
    monkeypatch.setattr(windows, "BLOCK_STEPS", 2)
    draw = train.draw_windows

    def broken(*given, indices, **options):
        if 4 * 2 in indices:  # the first micro-batch of step 4
            raise OSError("the disk is gone")
        return draw(*given, indices=indices, **options)

    monkeypatch.setattr(train, "draw_windows", broken)
    with pytest.raises(OSError, match="the disk is gone"):
        train.main(argv(out_dir=tmp_path))
    assert record(tmp_path)["status"] == "failed: OSError: the disk is gone"
    assert checkpoint(tmp_path)["step"] == 4


def test_the_size_of_a_block_changes_nothing(argv, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(windows, "BLOCK_STEPS", 4)
    train.main(argv(out_dir=tmp_path))
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize(("clip", "largest"), [(1e-3, 1e-3), (0.0, 1e9)])
def test_the_gradient_is_clipped(clip, largest, argv, tmp_path, monkeypatch):
    norms, step = [], torch.optim.AdamW.step

    def seen(self, *args, **kwargs):
        norms.append(torch.stack([p.grad.norm() for group in self.param_groups for p in group["params"]]).norm().item())
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", seen)
    train.main(argv(out_dir=tmp_path, grad_clip=clip, log_interval=1))
    logged = [m["grad_norm"] for m in metrics(tmp_path) if "grad_norm" in m]
    assert min(logged) > 1e-2
    assert norms == pytest.approx([min(norm, largest) for norm in logged], rel=1e-2)


def test_a_decaying_learning_rate_reaches_the_optimizer(argv, tmp_path):
    settings = dict(decay_lr=True, warmup_iters=2, lr_decay_iters=6, min_lr=3e-5, log_interval=1)
    train.main(argv(settings, out_dir=tmp_path, max_iters=8))
    rates = [m["lr"] for m in metrics(tmp_path) if "lr" in m]
    assert rates[:3] == pytest.approx([1.5e-4, 3e-4, 3e-4])
    assert rates[4] == pytest.approx((3e-4 + 3e-5) / 2)
    assert rates[6:] == pytest.approx([3e-5, 3e-5])
    for group in checkpoint(tmp_path)["optimizer"]["param_groups"]:
        assert group["lr"] / group["peak_lr"] == pytest.approx(0.1)


# --- records ---


def test_the_record_before_the_first_step_and_after_the_last(argv, tmp_path, monkeypatch):
    seen = {}
    at_step(monkeypatch, train, 0, lambda: seen.update(record(tmp_path)))
    monkeypatch.setattr(sys, "argv", ["train.py", "--some=flag"])
    train.main(argv(out_dir=tmp_path, seed=7))
    end = record(tmp_path)
    assert list(seen) == list(end) == RECORD
    assert (seen["status"], seen["finished"]) == ("running", None)
    assert end["status"] == "finished"
    assert end["finished"] >= end["started"] == seen["started"]
    assert end["command"] == "train.py"
    assert end["argv"] == ["train.py", "--some=flag"]
    assert end["versions"].keys() == {"python", "torch", "triton", "structured-attention"}
    assert end["versions"]["torch"] == torch.__version__
    assert len(end["commit"] or "0" * 40) == 40
    assert end["dirty"] in (True, False, None)
    assert "cpu" in end["device"]
    settings = train.Settings(**end["settings"])
    assert (settings.seed, settings.init_lr, settings.mlr_rank_list) == (7, 3e-4, "32|8|6|4|4|4|4|2")
    blocks = 2 * (12 * 16 * 16 + 2 * 16 + 2 * 8) + 16  # matrices; LayerNorms of stream, queries and keys; the last
    assert end["parameters"] == dict(total=blocks + (96 + 96 + 16) * 16, non_embedding=blocks)


def test_the_lines_of_metrics(whole):
    lines = metrics(whole)
    assert [(m["step"], "val/loss" in m) for m in lines] == [
        (0, True), (2, False), (4, False), (4, True), (6, False), (6, True)
    ]  # fmt: skip
    for line in lines:
        assert list(line) == (EVALUATION if "val/loss" in line else PROGRESS)
        assert line.pop("mfu", None) is None  # no peak rate of a CPU to compare with
        assert all(type(value) in (int, float) for value in line.values())
    assert [m["lr"] for m in lines if "lr" in m] == [3e-4] * 3
    seconds = [m["seconds"] for m in lines]
    assert seconds == sorted(seconds)


def test_counters_equal_closed_forms(whole):
    L, T, D, V, sequences = 2, 16, 16, 96, 2 * 2
    trunk = L * (12 * T * D * D + 2 * T * T * D)  # projections and MLP; scores and value product
    norms = T * D * (2 * L + 1) + L * 2 * T * D  # of the stream; of queries and keys
    for line in metrics(whole):
        n = line["step"] * sequences
        assert line["tokens"] == n * T
        assert line["compute"] == 6 * n * (trunk + T * D * V)
        assert line["non_emb_compute"] == 6 * n * trunk
        assert line["paper_compute"] == n * (trunk + 5 * norms)
    assert record(whole)["flops_per_token"] == 6 * (trunk + T * D * V) / T
    assert record(whole)["paper_macs_per_token"] == (trunk + 5 * norms) / T


def test_the_loss_falls_and_the_first_is_that_of_guessing(argv, tmp_path):
    train.main(argv(out_dir=tmp_path, max_iters=60, dropout=0.0, eval_interval=60, init_lr=3e-3))
    first, last = (m["val/loss"] for m in metrics(tmp_path) if "val/loss" in m)
    assert first == pytest.approx(torch.tensor(96.0).log().item(), abs=1e-5)  # the output starts at zero
    assert last < first - 1


@pytest.mark.parametrize("eval_iters", [2, 1])
@pytest.mark.parametrize(
    "change",
    [dict(seed=1), dict(seed=2), dict(batch_size=5), dict(batch_size=64)],
    ids=["seed 1", "seed 2", "batches of 5", "one batch"],
)
def test_one_validation_text(change, eval_iters, data_dir, tmp_path, monkeypatch):
    """The same weights have the same loss whatever the seed and the batches: that of every id of the whole text."""
    monkeypatch.setattr(train, "EVAL_WINDOWS", 16)  # of the 25 that the text has
    run = begin(train, TINY_LM, change, data_dir=data_dir, out_dir=tmp_path, eval_iters=eval_iters)[1]
    draws = torch.Generator().manual_seed(0)
    for p in run.model.parameters():
        p.data = 0.1 * torch.randn(p.shape, generator=draws)
    text, T = torch.from_numpy(np.array(run.corpus.val)).long(), run.cfg.block_size
    starts = range(0, len(text) - 1, T)
    starts = [starts[i * len(starts) // 16] for i in range(16)] if eval_iters == 1 else starts
    got = run.loop.evaluation()
    run.model.eval()
    with torch.no_grad():
        losses = []
        for start in starts:
            x, y = text[start : start + T], text[start + 1 : start + 1 + T]
            losses.append(cross_entropy(run.model(x[None, : len(y)])[0], y, reduction="none"))
    losses = torch.cat(losses)
    assert got["val/tokens"] == len(losses)
    assert len(losses) == (16 * T if eval_iters == 1 else len(text) - 1)
    assert got["val/loss"] == pytest.approx(losses.double().mean().item(), rel=1e-6)


def steps_of_checkpoints(folder):
    return {name: load_checkpoint(folder / name)["step"] for name in ("best.pt", "ckpt.pt")}


@pytest.mark.parametrize("links", [True, False])
def test_the_best_checkpoint_and_the_last_are_two(argv, tmp_path, monkeypatch, links):
    """Whatever the saves between them, on a disk with links or without: an end, another evaluation, a resume."""
    losses = iter([5.0, 3.0, 4.0, 2.0, 6.0])
    monkeypatch.setattr(train, "evaluate", lambda *_: {"val/loss": next(losses)})
    if not links:
        monkeypatch.setattr(run_module, "linked", lambda *_: False)
    for max_iters, found in [(2, (2, 2)), (4, (2, 4)), (6, (6, 6)), (8, (6, 8))]:
        best_only = dict(always_save_checkpoint=False, eval_interval=2, init_from="auto")
        train.main(argv(best_only, out_dir=tmp_path, max_iters=max_iters))
        assert tuple(steps_of_checkpoints(tmp_path).values()) == found
    assert checkpoint(tmp_path)["best"] == 2.0
    assert load_run(tmp_path, "train.py", "corpus", "auto")[0]["step"] == 6
    assert load_run(tmp_path, "train.py", "corpus", "last")[0]["step"] == 8


def test_a_stop_leaves_the_best_checkpoint_alone(argv, tmp_path, monkeypatch):
    """The run that goes on from it has the files of the one that was never stopped."""
    best_only = dict(always_save_checkpoint=False, eval_interval=2, max_iters=6)
    monkeypatch.setattr(train, "evaluate", lambda network, corpus, cfg, *_: {"val/loss": next(losses)})
    losses = iter([5.0, 3.0, 4.0, 4.0])
    train.main(argv(best_only, out_dir=tmp_path / "whole"))
    losses = iter([5.0, 3.0, 4.0, 4.0])
    signal_at(monkeypatch, train, 4, signal.SIGTERM)
    assert stops(train.main, argv(best_only, out_dir=tmp_path / "parts")) == 128 + signal.SIGTERM
    assert steps_of_checkpoints(tmp_path / "parts") == {"best.pt": 2, "ckpt.pt": 5}
    train.main(argv(best_only, out_dir=tmp_path / "parts", init_from="resume"))
    assert steps_of_checkpoints(tmp_path / "parts") == steps_of_checkpoints(tmp_path / "whole")
    for name in ("best.pt", "ckpt.pt"):
        parts, whole = (load_checkpoint(tmp_path / run / name)["model"] for run in ("parts", "whole"))
        assert_equal(parts, whole, name)


def test_eval_only_writes_nothing(argv, whole, tmp_path, capsys):
    train.main(argv(out_dir=tmp_path / "no", eval_only=True))
    assert not (tmp_path / "no").exists()
    before = {p.name: p.read_bytes() for p in whole.iterdir()}
    train.main(argv(out_dir=whole, eval_only=True, init_from="resume"))
    last = metrics(whole)[-1]["val/loss"]
    assert f"step 6: val loss {last:.4f}" in capsys.readouterr().out
    assert before == {p.name: p.read_bytes() for p in whole.iterdir()}


def test_overwrite_replaces_a_run(argv, whole, tmp_path):
    train.main(argv(out_dir=tmp_path, seed=5))
    train.main(argv(out_dir=tmp_path, overwrite=True))
    assert_same_run(tmp_path, whole)


# --- wandb ---


class FakeWandb:
    id = "abc123"

    def __init__(self):
        self.logged, self.options, self.finished = [], None, False
        self.__spec__ = object()

    def init(self, **options):
        self.options = options
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


def test_wandb_mirrors_the_record(argv, tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    train.main(argv(out_dir=tmp_path / "name", wandb_log=True, wandb_project="p"))
    assert [values for _, values in fake.logged] == metrics(tmp_path / "name")
    assert all(step == values["step"] for step, values in fake.logged)
    options = fake.options
    assert (options["entity"], options["project"], options["name"]) == (None, "p", "name")
    assert options["config"] == record(tmp_path / "name")["settings"]
    assert fake.finished


def test_one_wandb_run_over_resumes(argv, tmp_path, monkeypatch):
    """Its id is in run.json; a run that replaces another, and one that starts afresh, get one of their own."""
    ids = []
    again = dict(init_from="auto")
    for max_iters, flags in [(2, {}), (4, dict(init_from="resume")), (4, again), (2, dict(overwrite=True))]:
        fake = FakeWandb()
        monkeypatch.setitem(sys.modules, "wandb", fake)
        train.main(argv(flags, out_dir=tmp_path, wandb_log=True, max_iters=max_iters))
        assert fake.options["resume"] == "allow"
        assert record(tmp_path)["wandb_id"] == "abc123"
        ids.append(fake.options["id"])
    assert ids == [None, "abc123", "abc123", None]


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_run_goes_on_without_wandb(argv, tmp_path, monkeypatch, capsys, where):
    def fails(*_, **__):
        raise RuntimeError("no network\nsecond line")

    fake = FakeWandb()
    setattr(fake, where, fails)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    train.main(argv(out_dir=tmp_path, wandb_log=True))
    assert capsys.readouterr().out.count("note: W&B: no network; the run keeps its own record") == 1
    assert record(tmp_path)["status"] == "finished"
    assert metrics(tmp_path)[-1]["step"] == 6


def test_wandb_has_the_keys_that_the_originals_notebooks_read():
    line = {"step": 3, "paper_compute": 7, "eval_pointwise/loss": [0.5, 0.25], "eval/last": 0.25}
    found = mirrored(line)
    assert found["eval_pointwise/loss"] == {"0": 0.5, "1": 0.25}
    assert (found["eval/non_emb_compute"], found["step"], found["eval/last"]) == (7, 3, 0.25)
    assert mirrored({"step": 1, "val/loss": 2.0}) == {"step": 1, "val/loss": 2.0}


def test_wandb_missing_is_said_before_anything_is_written(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_module, "find_spec", lambda name: None)
    assert stops(train.main, argv(out_dir=tmp_path / "run", wandb_entity="me")) == 2
    assert "pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# --- the paper's commands ---


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_structure_trains(structure, argv, tmp_path):
    command = argv(STRUCTURES[structure], token_mixing_struct=structure, out_dir=tmp_path, dropout=0.0)
    assert_every_parameter_moves(train, command, tmp_path)


PAPER = dict(  # the flags of the paper's language models
    d_model=16, block_size=16, batch_size=2, init_lr=0.01, d_qk_head=8, link_function="softmax", mlr_rank_list="4|2|2",
    mlr_divide_by_num_levels=False, mlr_block_divide_by_num_levels=False, mha_SP_attn_logits_scaling=False,
    bilinear_mlr_muP_attn_logits_scaling=False, sliding_block_size=5, gswa_rank_list="4|4", init_from="scratch",
    mlr_block_size_list="default", sequential_GSWA_layer_list="MHA|SWA", n_kv_head=2,
)  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        dict(token_mixing_struct="multi_level_low_rank", mlr_block_divide_by_num_levels=True),
        dict(token_mixing_struct="multi_level_low_rank", mlr_block_size_list="16|7|3", n_kv_head=1),
        dict(token_mixing_struct="low_rank", d_qk_head=12, mha_SP_attn_logits_scaling=True),
        dict(token_mixing_struct="low_rank", link_function="identity", dtype="bfloat16"),
        dict(token_mixing_struct="low_rank_with_gswa"),
        dict(token_mixing_struct="low_rank_with_sequential_gswa"),
    ],
    ids=lambda change: "-".join(map(str, change.values())),
)
def test_the_papers_command(change, argv, tmp_path):
    train.main(argv(PAPER, change, out_dir=tmp_path, max_iters=2))
    settings = record(tmp_path)["settings"]
    assert settings | PAPER | change == settings


# --- the folder of a run ---


def test_constructing_a_run_only_looks(argv, tmp_path):
    Run(train.Settings(out_dir=str(tmp_path / "run")), "train.py", World())
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_record_does_not_stop_a_resume(argv, whole, tmp_path):
    train.main(argv(out_dir=tmp_path, max_iters=4))
    (tmp_path / "run.json").write_text('{"status": "runn')
    train.main(argv(out_dir=tmp_path, init_from="resume"))
    assert_same_run(tmp_path, whole)
    assert json.loads((tmp_path / "run.json").read_text())["resumed"][0]["step"] == 4


def test_training_time_leaves_evaluation_out(argv, tmp_path, monkeypatch):
    evaluate = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *given: time.sleep(0.5) or evaluate(*given))
    train.main(argv(out_dir=tmp_path, max_iters=2))
    first, second, third = metrics(tmp_path)
    assert first["seconds"] < 0.4
    assert third["seconds"] - second["seconds"] < 0.4


def test_training_time_goes_on_at_a_resume(argv, tmp_path, monkeypatch):
    at_step(monkeypatch, train, 0, lambda: time.sleep(1))
    train.main(argv(out_dir=tmp_path, max_iters=2))
    train.main(argv(out_dir=tmp_path, max_iters=4, init_from="resume"))
    seconds = [m["seconds"] for m in metrics(tmp_path)]
    assert seconds == sorted(seconds)
    assert seconds[-1] > 1
