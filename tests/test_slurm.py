"""The grids in a real SLURM of one node: they finish, what is finished is left out, and what is stopped goes on.

The fixture starts munge, slurmctld and slurmd as root in a temporary folder, with ports of their own. Without Debian's
packages (slurmctld, slurmd, slurm-client, munge) the tests are skipped.
"""

import contextlib
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import assert_same_run, flags, metrics, one_thread, record, write_corpus

import train
from scripts.grid import finished, queued

ROOT = Path(__file__).resolve().parents[1]
LM = "scripts/language_modeling/submit_language_modeling_greene.sh"
ICL = "scripts/icl_regression/submit_icl_regression.sh"
SMALL = ["--cpus-per-task=1", "--mem=100M", "--time=10"]
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerParameters=bf_interval=2,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
SwitchType=switch/none
KillWait=20
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=1000 Gres=gpu:8 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=24:00:00 State=UP
"""


def output(*command, **more):
    done = subprocess.run(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=60, **more,
    )  # fmt: skip
    assert not done.returncode, f"{command}\n{done.stdout}"
    return done.stdout


def wait_for(condition, what, seconds=300):
    """Ask until the answer is true, and return it."""
    end = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.1)
    return answer


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def configuration(folder):
    """slurm.conf, a munge key and eight files that stand for GPUs."""
    host = socket.gethostname().partition(".")[0]
    for name in ("state", "spool", "munge"):
        (folder / name).mkdir(mode=0o700)
    (folder / "munge" / "key").write_bytes(os.urandom(128))
    (folder / "munge" / "key").chmod(0o400)
    for i in range(8):
        (folder / f"gpu{i}").touch()
    (folder / "gres.conf").write_text(f"NodeName={host} Name=gpu File={folder}/gpu[0-7]\n")
    (folder / "slurm.conf").write_text(CONF.format(host=host, folder=folder, ports=free_ports(2)))
    return host


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A SLURM that takes our jobs for as long as the module's tests last; the environment says where it is."""
    programs = ("munged", "slurmctld", "slurmd", "sbatch", "setpriv")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
    if missing := [name for name in programs if not shutil.which(name, path=path)]:
        pytest.skip(f"SLURM is not installed: no {', '.join(missing)}")
    if os.geteuid():
        pytest.skip("SLURM's daemons are started as root only")
    folder = tmp_path_factory.mktemp("slurm")
    folder.parent.chmod(0o755)  # munge refuses a socket that others cannot reach
    host, conf = configuration(folder), folder / "slurm.conf"
    munge = [f"--{name}-file={folder}/munge/{name}" for name in ("key", "pid", "log", "seed")]
    daemons = [
        ["munged", "--foreground", "--force", f"--socket={folder}/munge/socket", *munge],
        ["slurmctld", "-D", "-f", conf],
        ["slurmd", "-D", "-f", conf, "-N", host],
    ]
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        log = stack.enter_context(open(folder / "daemons.log", "w"))
        for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
            patch.delenv(name)
        for name, value in dict(PATH=path, SLURM_CONF=str(conf), OMP_NUM_THREADS="1", LOG_DIR=str(folder)).items():
            patch.setenv(name, value)
        for command in daemons:
            bound = ["setpriv", "--pdeathsig", "TERM", *command]  # a killed pytest takes them with it
            stack.callback(stop, subprocess.Popen(bound, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
            time.sleep(0.3)
        try:
            wait_for(lambda: "idle" in ask("sinfo", "-h", "-o", "%T"), "an idle node", seconds=20)
        except AssertionError as error:
            log.flush()
            pytest.skip(f"SLURM does not start here: {error}; {(folder / 'daemons.log').read_text()[-500:]}")
        stack.callback(cancel_all)
        yield folder


def ask(*command):
    """What a command of SLURM says, nothing if it does not answer."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=5).stdout
    return ""


def cancel_all():
    ask("scancel", "--me")
    with contextlib.suppress(AssertionError):
        wait_for(lambda: not ask("squeue", "-h"), "an empty queue", seconds=30)


def stop(process):
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def states():
    """{task of the queue: its state}"""
    return dict(row.split() for row in output("squeue", "-h", "-r", "-o", "%K %T").splitlines())


def job(task):
    """SLURM's record of a task, as a dict."""
    return dict(word.partition("=")[::2] for word in output("scontrol", "show", "job", task).split())


def submit(script, *more):
    """Submit and return what was said, with the array's job id, None if nothing was submitted."""
    said = output("bash", script, *SMALL, *more)
    number = [line.split()[-1] for line in said.splitlines() if line.startswith("Submitted batch job")]
    return said, number[0] if number else None


def log_folder(said):
    return Path(said.split("commands and logs: ")[1].strip())


@pytest.fixture
def grid(tmp_path):
    """sweep.py's flags for a grid of tiny runs in tmp_path."""
    write_corpus(tmp_path / "text")

    def make(config, only, **settings):
        extra = [config, *flags(dict(device="cpu", eval_interval=5), settings, warmup_iters=2)]
        return ["--", f"--out_dir={tmp_path}/runs", f"--only={only}", f"--extra={' '.join(extra)}"]

    return make


def lm(grid, tmp_path, only, **settings):
    text = dict(dataset="text", data_dir=tmp_path, block_size=16, batch_size=2, eval_iters=1, compile=False)
    return grid("config/struct_configs/tiny.py", only, **text, n_layer=1, d_model=32, **settings)


def test_grids_finish_and_finished_runs_are_left_out(slurm, grid, tmp_path):
    icl = dict(n_dims=2, d_model=16, n_head=2, batch_size=4, eval_prompts=8, max_iters=10)
    icl = grid("config/icl_configs/tiny.py", "^(standard|bilinear_btt)_n16_d64_lr0.0001", **icl)
    said, number = {}, {}
    said[ICL], number[ICL] = submit(ICL, "--hold", *icl)
    assert queued() == set((log_folder(said[ICL]) / "runs.txt").read_text().splitlines())
    assert output("squeue", "-h", "-r", "-o", "%j %C %b").splitlines() == ["icl_regression 1 gres:gpu:1"] * 2
    output("scontrol", "release", number[ICL])
    argv = lm(grid, tmp_path, "^standard_d256", max_iters=10)
    said[LM], number[LM] = submit(LM, "--gres=none", *argv)
    wait_for(lambda: not states(), "the grids' end")
    folders = list((tmp_path / "runs").iterdir())
    assert len(folders) == 3
    for folder in folders:
        assert record(folder)["status"] == "finished"
        assert metrics(folder)[-1]["step"] == 10
    for script, task in (LM, 1), (ICL, 1), (ICL, 2):
        assert "step 10/10" in (log_folder(said[script]) / f"{task}.out").read_text()
        assert job(f"{number[script]}_{task}")["ExitCode"] == "0:0"
    assert "gpu" not in job(f"{number[LM]}_1").get("TresPerNode", "")
    again = submit(LM, *argv)
    assert "runs: 1 finished, 0 in the queue, 0 to do" in again[0]
    assert again[1] is None


def test_stopped_tasks_go_back_into_the_queue_and_cancelled_ones_do_not(slurm, grid, tmp_path):
    steps, tiny = 300, dict(sliding_block_size=4, gswa_rank_list="'16|16'", eval_interval=20)
    argv = lm(grid, tmp_path, "^(standard|sliding_window|gswa)_d256", max_iters=steps, **tiny)
    said, number = submit(LM, *argv)
    commands = (log_folder(said) / "runs.txt").read_text().splitlines()
    folders = [Path(c.partition("--out_dir=")[2].split()[0]) for c in commands]
    tasks = [f"{number}_{i}" for i in (1, 2, 3)]
    orders = [["scancel", "--signal=USR1", "--batch"], ["scontrol", "requeue"], ["scancel"]]
    left = {folder: [*order, task] for folder, order, task in zip(folders, orders, tasks, strict=True)}

    def interrupt():
        for folder in [folder for folder in left if (folder / "ckpt.pt").exists()]:
            output(*left.pop(folder))
        return not left

    wait_for(interrupt, "a checkpoint of every run")
    wait_for(lambda: states() == {"1": "PENDING", "2": "PENDING"}, "two tasks in the queue")
    for folder, signal in zip(folders, ("SIGUSR1", "SIGTERM", "SIGTERM"), strict=True):
        assert record(folder)["status"] == f"stopped: {signal}"
        assert 0 < metrics(folder)[-1]["step"] < steps
    assert job(tasks[2])["JobState"] == "CANCELLED"
    for task in tasks[:2]:
        # SLURM waits two minutes before it starts again; for about a second its daemon still refuses the ended job
        output("scontrol", "update", f"JobId={task}", "StartTime=now+3seconds")
    straight = [tmp_path / f"straight{i}" for i in (0, 1)]
    with one_thread():  # as the tasks have
        for i in (0, 1):
            train.main([*shlex.split(commands[i])[2:], f"--out_dir={straight[i]}"])
    wait_for(lambda: not states(), "the resumed runs' end")
    for i in (0, 1):
        assert job(tasks[i])["Restarts"] == "1"
        assert len(record(folders[i])["resumed"]) == 1
        assert_same_run(folders[i], straight[i])
    assert [finished(command) for command in commands] == [True, True, False]
