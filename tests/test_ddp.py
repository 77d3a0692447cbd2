"""Several processes: the same numbers as one, stops and failures in all of them, what they refuse."""

import functools
import os
import re
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from runs import (
    TINY,
    TINY_ICL,
    assert_equal,
    change_losses,
    checkpoint,
    child,
    flags,
    metrics,
    record,
    signal_at,
    stops,
    waves,
    write_series,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

import train
import train_ICL
import train_TS
from training.distributed import Share, World
from training.errors import BadInput
from training.loop import Loop

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
SCRIPTS = {"train.py": train, "train_ICL.py": train_ICL, "train_TS.py": train_TS}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def one_of_many(world, port, said, script, argv, patch):
    """The body of one process; what it says goes to files."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    values = (world.rank, world.size, world.local_rank, world.local_size)
    os.environ.update(zip(names, map(str, values), strict=True), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for descriptor, name in [(1, "out"), (2, "err")]:
        os.dup2(os.open(f"{said}.{world.rank}.{name}", os.O_CREAT | os.O_WRONLY), descriptor)
    sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
    status = 0
    try:
        patch(SCRIPTS[script], world.rank)
        SCRIPTS[script].main(argv)
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
        status = 70
    sys.stderr.flush()
    os._exit(status)  # a forked process may wait for threads that only its parent has


def together(n, argv, said, patch, script="train.py"):
    """Run a script in n processes, as a scheduler would start them; their exit statuses, and each one's words."""
    port = free_port()
    many = [child(one_of_many, World(rank, n, rank, n), port, said, script, argv, patch) for rank in range(n)]
    for process in many:
        process.join(60)
        process.kill()
    out, err = ([Path(f"{said}.{rank}.{name}").read_text() for rank in range(n)] for name in ("out", "err"))
    return [process.exitcode for process in many], out, err


def nothing(script, rank):
    """No patch."""


def assert_close_runs(got_dir, want_dir, rel=1e-5):
    """The same lines but for rounding, the same counters exactly, and nearly the same weights."""
    got, want = metrics(got_dir), metrics(want_dir)
    assert [list(line) for line in got] == [list(line) for line in want]
    for g, w in zip(got, want, strict=True):
        for key in w.keys() - {"seconds", "tokens_per_s"}:
            exact = key in ("step", "tokens", "compute", "non_emb_compute", "paper_compute", "baselines", "lr", "mfu")
            assert g[key] == (w[key] if exact else pytest.approx(w[key], rel=rel)), (key, w["step"])
    weights, wanted = checkpoint(got_dir)["model"], checkpoint(want_dir)["model"]
    assert list(weights) == list(wanted)
    for name, tensor in wanted.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-6, msg=lambda text: f"{name}: {text}")  # noqa: B023
    assert record(got_dir)["status"] == record(want_dir)["status"] == "finished"


def layout(state):
    """A state with kinds in the place of tensors and numbers; with the bytes that saving a tensor writes."""
    if isinstance(state, dict):
        return {name: layout(value) for name, value in state.items()}
    if isinstance(state, torch.Tensor):
        return type(state), state.shape, state.dtype, state.stride(), state.untyped_storage().nbytes()
    return type(state)


# --- the same numbers ---


@pytest.mark.parametrize(
    "change",
    [
        dict(),  # each takes one of two micro-batches, dropout included
        dict(gradient_accumulation_steps=1, batch_size=4, dropout=0.0),  # each takes two of four rows
        dict(gradient_accumulation_steps=3, dropout=0.0, eval_iters=3),  # one row of each micro-batch
    ],
    ids=["micro-batches", "rows", "rows of micro-batches"],
)
def test_two_processes_equal_one(change, argv, tmp_path):
    train.main(argv(change, out_dir=tmp_path / "one"))
    status, out, err = together(2, argv(change, out_dir=tmp_path / "two"), tmp_path / "said", nothing)
    assert status == [0, 0], err
    assert_close_runs(tmp_path / "two", tmp_path / "one")
    assert [record(tmp_path / name)["processes"] for name in ("one", "two")] == [1, 2]
    assert "64 tokens a step, 2 times" in out[0] or "96 tokens a step, 2 times" in out[0]
    assert out[1] == ""


RECALL = dict(training_task="noisy_recall", training_curriculum_dims_start=-1, training_curriculum_points_start=-1)


@pytest.mark.parametrize(
    ("fsdp", "task"), [(False, {}), (True, {}), (False, RECALL)], ids=["whole", "shards", "noisy_recall"]
)
def test_two_processes_equal_one_in_context(fsdp, task, tmp_path):
    """Growing prompts; each process takes half of them, and one of three batches of the evaluation more or less.

    At a small rate: with nothing clipped, roundings would otherwise grow beyond the tolerance in six steps.
    """
    slow = dict(training_learning_rate=3e-5)
    argv = functools.partial(flags, TINY_ICL, slow, task, dropout=0.0, eval_batch_size=3)
    train_ICL.main(argv(out_dir=tmp_path / "one"))
    said = tmp_path / "said"
    status, _, err = together(2, argv(fsdp=fsdp, out_dir=tmp_path / "two"), said, nothing, script="train_ICL.py")
    assert status == [0, 0], err
    assert_close_runs(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize(
    ("change", "compiled", "rel"),
    [
        (dict(gradient_accumulation_steps=4, eval_iters=3), False, 1e-5),
        (dict(gradient_accumulation_steps=1, batch_size=4, dropout=0.0, eval_iters=1), False, 1e-5),
        (dict(dtype="float16", init_lr=1e-5), False, 1e-3),
        (dict(dropout=0.0), True, 1e-5),
    ],
    ids=["micro-batches", "rows", "float16", "compiled"],
)
def test_shards_equal_one(change, compiled, rel, argv, tmp_path):
    """Evaluations of 1 and of 3 batches, too: both processes take part in each."""
    train.main(argv(change, out_dir=tmp_path / "one"))
    command = argv(change, fsdp=True, compile=compiled, out_dir=tmp_path / "two")
    status, _, err = together(2, command, tmp_path / "said", nothing)
    assert status == [0, 0], err
    assert_close_runs(tmp_path / "two", tmp_path / "one", rel)
    assert record(tmp_path / "two")["parameters"] == record(tmp_path / "one")["parameters"]


def test_shards_forecast(tmp_path):
    """A horizon that 2 does not divide; the weights of the best evaluation are whole in the checkpoint."""
    write_series(tmp_path / "ETTh1", waves(160), (90, 40, 30))
    argv = functools.partial(
        flags, TINY, data_dir=tmp_path, look_back=16, horizon=5, batch_size=8, init_lr=3e-4, dropout=0.0
    )
    train_TS.main(argv(out_dir=tmp_path / "one"))
    command = argv(fsdp=True, out_dir=tmp_path / "two")
    status, _, err = together(2, command, tmp_path / "said", nothing, script="train_TS.py")
    assert status == [0, 0], err
    assert_close_runs(tmp_path / "two", tmp_path / "one")
    got, want = (checkpoint(tmp_path / name) for name in ("two", "one"))
    for name in ("model", "optimizer", "best_model"):
        assert_equal(layout(got[name]), layout(want[name]), name)
    for name, tensor in want["best_model"].items():
        torch.testing.assert_close(got["best_model"][name], tensor, rtol=1e-4, atol=1e-6)


ENDS = """
import os, sys, torch
from training.distributed import World
sys.setswitchinterval(1000)  # seconds: Python's lock is given away by who waits, and by nobody else
for port in sys.argv[1:]:
    pair = []
    for rank in range(2):
        if not (pid := os.fork()):
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            world = World(rank, 2, rank, 2)
            world.join(torch.device("cpu"), "auto", fsdp=False)
            world.leave()
            sys.exit()  # Python's own end, which os._exit is not
        pair.append(pid)
    print(*[os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pair])
"""


def test_an_end_right_after_a_sum_is_no_abort():
    """One end in five is, where `reduce` does not wait: gloo's thread wants the lock of a Python that is gone."""
    command = [sys.executable, "-c", ENDS, *(str(free_port()) for _ in range(12))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.stdout.splitlines() == ["0 0"] * 12, done.stderr


def test_torchrun(argv, whole, tmp_path):
    command = [*TORCHRUN, "train.py", *argv(out_dir=tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 6/6: val loss") == 1
    assert_close_runs(tmp_path, whole)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("fsdp", [False, True], ids=["whole", "shards"])
def test_two_gpus_equal_one(fsdp, compiled, argv, tmp_path):
    """NCCL between them; one GPU on its own replays its steps as a CUDA graph, two do not.

    Checkpoints hold no tensors of a GPU.
    """
    settings = dict(device="cuda", dropout=0.0, compile=compiled, init_lr=1e-5)
    launch = {"one": [sys.executable], "two": TORCHRUN}
    for name, command in launch.items():
        command = [*command, "train.py", *argv(settings, fsdp=fsdp and name == "two", out_dir=tmp_path / name)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    for name in launch:
        tensors = filter(torch.is_tensor, tree_leaves(checkpoint(tmp_path / name)))
        assert {tensor.device.type for tensor in tensors} == {"cpu"}
    assert_close_runs(tmp_path / "two", tmp_path / "one", rel=1e-4)
    assert [record(tmp_path / name)["processes"] for name in launch] == [1, 2]


def count_gradient_exchanges(script, rank):
    """Print one line for each backward pass whose gradients cross the network, with shards one for each part of it."""
    scatter_name = next(n for n in ("reduce_scatter_single", "reduce_scatter_tensor") if hasattr(torch.distributed, n))
    wrap, scatter = World.wrap, getattr(torch.distributed, scatter_name)

    def hook(state, bucket):
        if bucket.is_last():
            print("exchanged", file=sys.stderr)
        tensor = bucket.buffer() / 2
        return torch.distributed.all_reduce(tensor, async_op=True).get_future().then(lambda f: f.value()[0])

    def wrapped(self, network, device):
        network = wrap(self, network, device)
        assert type(network) is DistributedDataParallel
        network.register_comm_hook(None, hook)
        return network

    def scattered(*args, **kwargs):
        print("exchanged", file=sys.stderr)
        return scatter(*args, **kwargs)

    World.wrap = wrapped
    setattr(torch.distributed, scatter_name, scattered)


@pytest.mark.parametrize(("fsdp", "parts"), [(False, 1), (True, 3)], ids=["whole", "shards"])
def test_gradients_cross_the_network_once_a_step(fsdp, parts, argv, tmp_path):
    """Four micro-batches each, six steps; in shards two blocks and the rest go one by one."""
    settings = dict(gradient_accumulation_steps=8, batch_size=1)
    train.main(argv(settings, out_dir=tmp_path / "one"))
    command = argv(settings, fsdp=fsdp, out_dir=tmp_path / "two")
    status, _, err = together(2, command, tmp_path / "said", count_gradient_exchanges)
    assert status == [0, 0], err
    assert [text.count("exchanged") for text in err] == [6 * parts] * 2
    assert_close_runs(tmp_path / "two", tmp_path / "one")


# --- stops, and resumes with another number of processes ---


def terminate_the_last(script, rank):
    """SIGTERM to one process alone, in its third step."""
    if rank == World.from_environment().size - 1:
        signal_at(pytest.MonkeyPatch(), script, 2, signal.SIGTERM)


@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1)])
def test_a_signal_to_one_stops_all_and_any_number_goes_on(first, then, argv, whole, tmp_path):
    """Stopped between two progress lines: the losses of all processes since the last one are in the checkpoint."""
    run = tmp_path / "run"
    status, out, err = together(first, argv(out_dir=run), tmp_path / "first", terminate_the_last)
    assert status == [128 + signal.SIGTERM] * first, err
    assert "stopped: SIGTERM at step 3; go on with --init_from=resume" in out[0]
    assert record(run)["status"] == "stopped: SIGTERM"
    assert checkpoint(run)["step"] == 3
    status, _, err = together(then, argv(out_dir=run, init_from="auto"), tmp_path / "then", nothing)
    assert status == [0] * then, err
    assert_close_runs(run, whole)
    assert record(run)["processes"] == then


@pytest.mark.parametrize("fsdp", [False, True], ids=["whole", "shards"])
def test_a_checkpoint_does_not_depend_on_the_number_of_processes(fsdp, argv, whole, tmp_path):
    status, _, err = together(2, argv(fsdp=fsdp, out_dir=tmp_path / "two"), tmp_path / "said", nothing)
    assert status == [0, 0], err
    got, want = (checkpoint(d) for d in (tmp_path / "two", whole))
    assert list(got) == list(want)
    for name in ("step", "counters", "corpus", "scaler"):
        assert_equal(got[name], want[name], name)
    assert got["optimizer"]["param_groups"] == want["optimizer"]["param_groups"]
    for name in ("model", "optimizer"):
        assert_equal(layout(got[name]), layout(want[name]), name)
    for i, state in want["optimizer"]["state"].items():
        for name, tensor in state.items():
            largest = tensor.abs().max().item()  # sums of two processes are rounded in another order
            torch.testing.assert_close(got["optimizer"]["state"][i][name], tensor, rtol=1e-4, atol=1e-5 * largest)


def weigh(script, rank):
    """After a checkpoint, print the bytes of parameters and moments in this process."""
    save = Loop._save

    def weighed(self, **kinds):
        save(self, **kinds)
        kept = [*self.model.parameters()]
        kept += [t for state in self.optimizer.adamw.state.values() for name, t in state.items() if name != "step"]
        kept = [t.to_local() if isinstance(t, DTensor) else t for t in kept]
        print(f"holds {sum(t.untyped_storage().nbytes() for t in kept)} bytes", file=sys.stderr)

    Loop._save = weighed


def test_shards_are_shares_and_any_way_of_holding_the_model_goes_on(argv, tmp_path):
    """Two steps in shards, two in one process, two in shards, two in two processes: the run that nothing stopped."""
    argv, run, bytes_of_all = functools.partial(argv, eval_interval=2), tmp_path / "run", 3 * 4 * 9_584
    train.main(argv(max_iters=8, out_dir=tmp_path / "whole"))
    ways = [(2, True, 0.5), (1, False, 1), (2, True, 0.5), (2, False, 1)]
    for stage, (processes, fsdp, share) in enumerate(ways, start=1):
        command = argv(max_iters=2 * stage, fsdp=fsdp, init_from="auto", out_dir=run)
        status, _, err = together(processes, command, tmp_path / f"said{stage}", weigh)
        assert status == [0] * processes, err
        held = [[int(n) for n in re.findall(r"holds (\d+) bytes", text)] for text in err]
        assert held == [[share * bytes_of_all]] * processes
    assert_close_runs(run, tmp_path / "whole")
    assert [resumed["step"] for resumed in record(run)["resumed"]] == [2, 4, 6]


def spoil_the_last(script, rank):
    """In its sixth step, of one micro-batch."""

    def spoiled(losses, step, network):
        return {k: v * float("nan") for k, v in losses.items()} if step == 5 and rank == 1 else losses

    change_losses(pytest.MonkeyPatch(), script, spoiled)


def test_a_loss_that_is_not_finite_in_one_process_ends_all(argv, tmp_path):
    status, _, err = together(2, argv(out_dir=tmp_path / "run"), tmp_path / "said", spoil_the_last)
    assert status == [1, 1]
    why = "the loss is not finite at step 5"
    assert f"error: {why}; {tmp_path}/run/ckpt.pt is the last good checkpoint" in err[0]
    assert "error" not in err[1]
    assert record(tmp_path / "run")["status"] == f"failed: {why}"
    assert checkpoint(tmp_path / "run")["step"] == 4


# --- what is refused ---


def test_a_batch_that_cannot_be_divided(argv, tmp_path):
    status, _, err = together(3, argv(out_dir=tmp_path / "run"), tmp_path / "said", nothing)
    assert status == [2, 2, 2]
    assert err[0] == (
        "error: 3 processes divide neither gradient_accumulation_steps 2 nor batch_size 2; "
        "the settings' batch is that of all processes together\n"
    )
    assert err[1:] == ["", ""]
    assert not (tmp_path / "run").exists()


def test_shards_of_one_process(argv, tmp_path, capsys):
    assert stops(train.main, argv(fsdp=True, out_dir=tmp_path / "run")) == 2
    assert capsys.readouterr().err == (
        "error: fsdp divides a model among processes, and there is one; start several, one for each GPU: "
        "torchrun --nproc_per_node=8 train.py .. --fsdp=True\n"
    )
    assert not (tmp_path / "run").exists()


def elsewhere(script, rank):
    """The second node has its own disk."""
    if rank:
        configure = train.configure
        train.configure = lambda cls, argv: configure(cls, [*argv, f"--out_dir={argv[-1].partition('=')[2]}_of_{rank}"])


def test_processes_that_do_not_see_one_folder(argv, tmp_path):
    train.main(argv(max_iters=2, out_dir=tmp_path / "run"))
    status, _, err = together(2, argv(init_from="auto", out_dir=tmp_path / "run"), tmp_path / "said", elsewhere)
    assert status == [2, 2]
    assert "the processes start at steps [2, 0]; out_dir must be one folder" in err[0]


def test_the_shares_of_all_processes_make_the_batch():
    for micro_batches, rows, size in [(8, 4, 1), (8, 4, 4), (1, 6, 3), (3, 4, 2)]:
        taken = []
        for rank in range(size):
            share = World(rank, size).share(micro_batches, rows)
            taken += [(m, row) for m in share.micro_batches for row in range(rows)[share.rows]]
        assert sorted(taken) == [(m, row) for m in range(micro_batches) for row in range(rows)]
    assert World(1, 2).share(4, 3) == Share(range(2, 4), slice(0, 3))


SLURM = dict(SLURM_PROCID="5", SLURM_STEP_NUM_TASKS="8", SLURM_LOCALID="1", SLURM_STEP_TASKS_PER_NODE="4(x2)")


@pytest.mark.parametrize(
    ("env", "world"),
    [
        (dict(), World()),
        (dict(RANK="3", WORLD_SIZE="4", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2"), World(3, 4, 1, 2)),
        (dict(SLURM, RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="2"), World(0, 2, 0, 2)),
        (dict(SLURM, MASTER_ADDR="node1"), World(5, 8, 1, 4)),
        (SLURM, World()),  # tasks that each run a command of their own
    ],
    ids=["alone", "torchrun", "torchrun under srun", "srun", "tasks on their own"],
)
def test_the_world_from_the_environment(env, world):
    assert World.from_environment(env) == world


@pytest.mark.parametrize(
    ("device", "why"),
    [
        ("cuda:1", "device is 'cuda:1'; 2 processes take cpu, or cuda"),
        ("mps", "device is 'mps'"),
        pytest.param(
            "cuda", "2 processes on a node and 0 GPUs",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs"),
        ),
    ],
)  # fmt: skip
def test_devices_that_several_processes_cannot_take(device, why):
    with pytest.raises(BadInput, match=re.escape(why)):
        World(0, 2, 0, 2).device(device)
    assert World(1, 2, 1, 2).device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(("backend", "why"), [("mpi", "no backend 'mpi'"), ("nccl", "backend nccl needs GPUs")])
def test_backends_that_are_not_there(backend, why, argv, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(argv(backend=backend, out_dir=tmp_path / "run"))
    assert stop.value.code == 2
    assert why in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
