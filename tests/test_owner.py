"""A folder has one owner at a time, runs and corpora alike; a dead one is no obstacle. Damage is named."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import assert_same_run, begin, metrics, record, stops, write_corpus

import train
from data.corpus import CHARACTERS, CorpusWriter
from training import owner
from training.checkpoint import load_checkpoint
from training.errors import BadInput
from training.files import here, replacing
from training.owner import NAME, Owner

ROOT = Path(__file__).parents[1]
HOLD = """
import sys, time
from training.owner import Owner
owner = Owner(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""


def holder(folder):
    """A process that owns the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout.readline() == b"held\n"
    return process


def test_a_second_owner_is_told_who_has_the_folder(tmp_path):
    process = holder(tmp_path)
    try:
        with pytest.raises(BadInput, match=f"belongs to process {process.pid} on {socket.gethostname()}, since 20"):
            Owner(tmp_path)
    finally:
        process.kill()
        process.wait()
    assert json.loads((tmp_path / NAME).read_text())["pid"] == process.pid
    Owner(tmp_path).release()  # a dead owner is no obstacle
    assert not (tmp_path / NAME).exists()


def test_within_a_process_too(tmp_path):
    first = Owner(tmp_path)
    with pytest.raises(BadInput, match=f"belongs to process {os.getpid()}"):
        Owner(tmp_path)
    first.release()
    first.release()
    Owner(tmp_path).release()


def test_an_owner_on_a_node_whose_locks_do_not_reach(tmp_path, monkeypatch):
    """Alive as long as its file is touched, by the disk's clock."""
    path = tmp_path / NAME
    path.write_text(json.dumps(dict(pid=7, host="elsewhere", since="2026-01-01 00:00:00")))
    with pytest.raises(BadInput, match="belongs to process 7 on elsewhere, since 2026-01-01 00:00:00"):
        Owner(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [NAME]
    os.utime(path, (time.time() - owner.STALE - 1,) * 2)
    Owner(tmp_path).release()
    monkeypatch.setattr(owner, "BEAT", 0.05)
    mine = Owner(tmp_path)
    os.utime(path, (0, 0))
    time.sleep(0.3)
    assert time.time() - path.stat().st_mtime < owner.STALE
    mine.release()


def test_a_disk_without_locks(tmp_path, monkeypatch):
    """There the owner's process decides."""

    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(owner.fcntl, "flock", no_locks)
    first = Owner(tmp_path)
    with pytest.raises(BadInput, match=f"belongs to process {os.getpid()}"):
        Owner(tmp_path)
    first.release()
    (tmp_path / NAME).write_text(json.dumps(dict(pid=2**22 + 1, host=socket.gethostname(), since="")))
    Owner(tmp_path).release()


def test_tasks_that_do_not_know_of_each_other_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    first = Owner(tmp_path)
    with pytest.raises(BadInput, match="set MASTER_ADDR and MASTER_PORT so that they train together"):
        Owner(tmp_path)
    first.release()


def test_a_run_whose_folder_is_taken(argv, tmp_path, capsys):
    steps, _ = begin(train, dict(part.removeprefix("--").split("=", 1) for part in argv(out_dir=tmp_path / "run")))
    next(steps)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert stops(train.main, argv(out_dir=tmp_path / "run", init_from="auto")) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"belongs to process {os.getpid()}" in said
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    for _ in steps:
        pass
    assert not (tmp_path / "run" / NAME).exists()


def test_a_checkpoint_written_while_a_run_starts(argv, whole, tmp_path, monkeypatch, capsys):
    """The owner ends between the other's look at the folder and its start."""
    train.main(argv(out_dir=tmp_path, max_iters=4))
    initialised = train.Process.initialised

    def slow(self, *given):
        (tmp_path / "ckpt.pt").write_bytes((whole / "ckpt.pt").read_bytes())
        return initialised(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(train.Process, "initialised", slow)
        assert stops(train.main, argv(out_dir=tmp_path, init_from="resume")) == 2
    assert "was written by another process while this run was starting; start it again" in capsys.readouterr().err
    assert metrics(tmp_path)[-1]["step"] == 4
    assert not (tmp_path / NAME).exists()


def start(command):
    return subprocess.Popen(
        [sys.executable, "train.py", *command], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def test_a_folder_that_cannot_be_written(argv, tmp_path, capsys):
    (tmp_path / NAME).mkdir()
    assert stops(train.main, argv(out_dir=tmp_path)) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / NAME} cannot be written: Is a directory\n"
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_start_that_fails_gives_the_folder_back(argv, tmp_path, monkeypatch):
    """The process may live on, with other runs in it."""
    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "_write_record", lambda self: [][0])
        with pytest.raises(IndexError):
            train.main(argv(out_dir=tmp_path))
    Owner(tmp_path).release()


def test_two_processes_started_at_once(argv, whole, tmp_path):
    """One trains, as if it were alone; the other is refused, and the same command given again finds it finished."""
    command = argv(out_dir=tmp_path, init_from="auto")
    both = [start(command) for _ in range(2)]
    said = [process.communicate(timeout=100)[1] for process in both]
    assert sorted(process.returncode for process in both) in ([0, 2], [0, 0])  # [0, 0]: the second came too late
    for process, words in zip(both, said, strict=True):
        assert (process.returncode == 0) == (words == ""), words
    assert_same_run(tmp_path, whole)
    assert record(tmp_path)["status"] == "finished"


def test_a_killed_run_is_no_obstacle(argv, whole, tmp_path):
    process = start(argv(out_dir=tmp_path, max_iters=10**6))
    while not (tmp_path / "ckpt.pt").exists():
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (tmp_path / NAME).exists()
    train.main(argv(out_dir=tmp_path, overwrite=True))
    assert_same_run(tmp_path, whole)


def test_a_corpus_that_is_being_written(tmp_path):
    process = holder(tmp_path)
    try:
        with pytest.raises(BadInput, match=f"belongs to process {process.pid}"), CorpusWriter(tmp_path, CHARACTERS):
            pass
        assert [path.name for path in tmp_path.iterdir()] == [NAME]
    finally:
        process.kill()
        process.wait()
    write_corpus(tmp_path)
    assert not (tmp_path / NAME).exists()


def test_every_flipped_bit_of_a_checkpoint_is_noticed(whole, tmp_path):
    """Where it changes what is read; some bytes between the parts of the file mean nothing."""
    content, path = (whole / "ckpt.pt").read_bytes(), tmp_path / "ckpt.pt"
    want, draws, refused = load_checkpoint(whole / "ckpt.pt"), random.Random(0), 0
    for _ in range(100):
        bit = draws.randrange(8 * len(content))
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            got = load_checkpoint(path)
        except BadInput:
            refused += 1
        else:
            assert same(got, want), f"bit {bit} goes unnoticed"
    assert refused > 50


def same(got, want):
    if isinstance(want, dict):
        return got.keys() == want.keys() and all(same(got[key], want[key]) for key in want)
    if isinstance(want, list | tuple):
        return len(got) == len(want) and all(map(same, got, want))
    return torch.equal(got, want) if isinstance(want, torch.Tensor) else got == want


def test_a_damaged_checkpoint_is_not_resumed(argv, tmp_path, capsys):
    train.main(argv(out_dir=tmp_path, max_iters=4))
    content = bytearray((tmp_path / "ckpt.pt").read_bytes())
    weights = len(content) // 2
    content[weights] ^= 1
    (tmp_path / "ckpt.pt").write_bytes(content)
    assert stops(train.main, argv(out_dir=tmp_path, init_from="resume")) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "ckpt.pt is damaged" in said or "cannot be read" in said


def test_a_temporary_file_follows_no_link(tmp_path):
    """Whoever can write into the folder cannot have a run write elsewhere."""
    other, path = tmp_path / "other", tmp_path / "file"
    other.write_text("mine")
    Path(f"{path}.{os.getpid()}.tmp").symlink_to(other)
    with replacing(path) as file:
        file.write(b"new")
    assert (other.read_text(), path.read_bytes(), path.is_symlink()) == ("mine", b"new", False)


def test_what_a_killed_process_left_is_taken_away(argv, tmp_path):
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "ckpt.pt.99.tmp").write_bytes(b"half")
    train.main(argv(out_dir=tmp_path, max_iters=2))
    assert not list(tmp_path.glob("*.tmp"))


def test_a_command_is_named_as_it_is_called_from_here(tmp_path, monkeypatch):
    root = Path(__file__).parents[1]
    monkeypatch.chdir(root)
    assert here("data/NAME/prepare.py") == "data/NAME/prepare.py"
    monkeypatch.chdir(tmp_path)
    assert here("data/NAME/prepare.py") == f"{root}/data/NAME/prepare.py"
    monkeypatch.chdir(root / "data")
    assert here("data/NAME/prepare.py") == f"{root}/data/NAME/prepare.py"
