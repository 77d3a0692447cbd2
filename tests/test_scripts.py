"""The sweeps and what brings them to SLURM: commands, flags, signals. test_slurm.py has a real SLURM."""

import dataclasses
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
import train_chronos
import train_ICL
import train_TS
from scripts import grid
from training.configurator import configure, parse_list
from training.errors import BadInput

ROOT = Path(__file__).resolve().parents[1]
COUNTS = {"language_modeling": 20, "icl_regression": 120}
SUBMIT = {name: str(path) for name in COUNTS for path in (ROOT / "scripts" / name).glob("submit_*.sh")}


def sweep(name, capsys, *argv):
    runpy.run_path(str(ROOT / "scripts" / name / "sweep.py"))["main"](list(argv))
    return capsys.readouterr().out.splitlines()


def settings(line):
    """The settings a printed command asks for, its model configuration built."""
    python, script, *argv = shlex.split(line)
    assert python == "python"
    if script == "train.py":
        cfg = configure(train.Settings, argv)
        return cfg, cfg.model_config()
    assert script == "train_ICL.py"
    cfg = configure(train_ICL.Settings, argv)
    cfg.curriculum()
    return cfg, cfg.model_config(block_size=cfg.tokens)


@pytest.mark.parametrize("name", COUNTS)
def test_commands_are_valid(name, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    runs = [settings(line) for seed in (1, 2) for line in sweep(name, capsys, f"--seed={seed}")]
    assert len(runs) == len({cfg.out_dir for cfg, _ in runs}) == 2 * COUNTS[name]
    assert all(cfg.init_from == "auto" for cfg, _ in runs)
    for cfg, model in runs:
        if model.scoring.structure == "bilinear_MLR":
            rank = sum(r * 2**level for level, r in enumerate(parse_list(cfg.mlr_rank_list, "mlr_rank_list")))
            assert rank >= cfg.n_dims


def test_bad_input(capsys):
    with pytest.raises(SystemExit) as end:
        sweep("icl_regression", capsys, "--sed=2")
    assert end.value.code == 2


def test_part_of_a_grid_and_settings_for_every_run(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = sweep("language_modeling", capsys, "--only=^(standard|gswa)_d256", "--extra=--max_iters=7 --device=cpu")
    runs = [settings(line)[0] for line in lines]
    assert [Path(cfg.out_dir).name for cfg in runs] == ["standard_d256_lr0.003_seed1337", "gswa_d256_lr0.003_seed1337"]
    assert all((cfg.max_iters, cfg.device, cfg.d_model) == (7, "cpu", 256) for cfg in runs)


def test_grids_of_language_models(capsys, monkeypatch):
    """Every grid, at chosen rates; a longer context has as many tokens a step as the others."""
    monkeypatch.chdir(ROOT)
    lines = sweep("language_modeling", capsys, "--grids=scaling|levels|context", "--rates=3e-3|1e-2")
    runs = [settings(line)[0] for line in lines]
    assert len(runs) == len({cfg.out_dir for cfg in runs}) == 2 * (COUNTS["language_modeling"] + 2 + 2)
    assert {cfg.init_lr for cfg in runs} == {3e-3, 1e-2}
    tokens = {cfg.block_size * cfg.batch_size * cfg.gradient_accumulation_steps for cfg in runs}
    assert tokens == {32 * 1024}
    ranks = [parse_list(cfg.mlr_rank_list, "mlr_rank_list") for cfg in runs if "levels" in cfg.out_dir]
    assert sorted(map(len, ranks)) == [2, 2, 4, 4]
    assert {sum(of_a_run) for of_a_run in ranks} == {64}


def test_the_best_rate_at_the_smallest_width_goes_to_the_others(tmp_path, capsys, monkeypatch):
    """Of the longest finished runs of the main grid's smallest width; a better loss elsewhere has no say."""
    monkeypatch.chdir(ROOT)
    common = [f"--out_dir={tmp_path}", "--seeds=1"]

    def made(only, loss, status="finished", *argv):
        for line in sweep("language_modeling", capsys, *common, f"--only={only}", *argv):
            cfg = settings(line)[0]
            folder = Path(cfg.out_dir)
            folder.mkdir()
            record = dict(command="train.py", argv=["train.py"], settings=dataclasses.asdict(cfg), status=status)
            (folder / "run.json").write_text(json.dumps(record))
            (folder / "metrics.jsonl").write_text(json.dumps({"step": cfg.max_iters, "val/loss": loss}) + "\n")

    made("^mlr_d256", 1.10, "finished", "--rates=3e-3")
    made("^mlr_d256", 1.09, "finished", "--rates=1e-2")
    made("^mlr_d256", 1.00, "running", "--rates=2e-2")
    made("^mlr_d256", 1.01, "finished", "--rates=5e-3", "--extra=--max_iters=50")
    made("^mlr_d384", 1.05, "finished", "--rates=3e-3")
    made("^mlr_T4096", 1.01, "finished", "--rates=3e-3", "--grids=context")
    argv = [*common, "--rates=best", "--grids=scaling|levels|context", "--only=^mlr_(d512|2levels|T4096)"]
    assert [settings(line)[0].init_lr for line in sweep("language_modeling", capsys, *argv)] == [1e-2] * 3
    runpy.run_path(str(ROOT / "scripts/language_modeling/sweep.py"))["main"](argv)
    left_out = "standard, sliding_window, gswa, sequential_gswa, which are left out"
    assert capsys.readouterr().err == f"{tmp_path} has no finished run of the smallest width of {left_out}\n"


def test_no_such_grid(capsys):
    with pytest.raises(SystemExit) as end:
        sweep("language_modeling", capsys, "--grids=scaling|level")
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: no grid 'level', there are scaling, levels, context\n"


def test_several_seeds(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    for name, count in COUNTS.items():
        runs = [settings(line)[0] for line in sweep(name, capsys, "--seeds=3|5")]
        assert len(runs) == len({cfg.out_dir for cfg in runs}) == 2 * count
        assert {cfg.seed for cfg in runs} == {3, 5}


def test_finished_runs_are_left_out(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(grid, "queued", lambda: {lines[2]})
    argv = ["--only=^standard", f"--out_dir={tmp_path}"]
    lines = sweep("language_modeling", capsys, *argv)
    for line, status in zip(lines, ("finished", "stopped: SIGUSR1"), strict=False):
        cfg = settings(line)[0]
        Path(cfg.out_dir).mkdir()
        (Path(cfg.out_dir) / "run.json").write_text(json.dumps(dict(status=status, settings=dataclasses.asdict(cfg))))
    assert sweep("language_modeling", capsys, *argv, "--todo=True") == [lines[1], lines[3]]
    longer = sweep("language_modeling", capsys, *argv, "--todo=True", "--extra=--max_iters=200000")
    other = sweep("language_modeling", capsys, *argv, "--todo=True", "--extra=--dropout=0.1")
    assert len(longer) == len(other) == 4
    assert len(sweep("language_modeling", capsys, *argv, "--todo=True", "--extra=--max_iters=50000")) == 3


def test_queued_runs(tmp_path, monkeypatch):
    """Line K of the file named in the queue is a run that waits or runs; other people's scripts are none."""
    (tmp_path / "my logs").mkdir()
    runs = tmp_path / "my logs" / "runs.txt"
    runs.write_text("python a.py\npython b.py\npython c.py\n")
    rows = [f"3 /some where/submit_x.sh {runs}", f"1 /x/submit_x.sh {runs}", "7 /other/script.sh", "N/A wrap"]
    programs(tmp_path, monkeypatch, squeue=f"cat <<'end'\n{chr(10).join(rows)}\nend")
    assert grid.queued() == {"python a.py", "python c.py"}
    programs(tmp_path, monkeypatch, squeue="echo no controller >&2; exit 1")
    with pytest.raises(BadInput, match="no controller"):
        grid.to_do([])
    assert grid.to_do([], here=True) == []


STAND_IN = """
import os, signal, sys, time
name = [a for a in sys.argv if a.startswith("--out_dir=")][0].rpartition("/")[2]
mode = {"a": "finish", "b": " ".join(sys.argv[1:-1]), "c": "finish"}[name]
print(name, "started", os.environ["OMP_NUM_THREADS"], "on", os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
if mode == "b waits for c":
    while not os.path.exists(sys.argv[-1].partition("=")[2][:-1] + "c"):
        time.sleep(0.02)
if mode == "wait":
    signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(143)))
    print("ready", flush=True)
    time.sleep(60)
if mode == "fail":
    print("b gives up", flush=True)
    sys.exit(7)
"""


def stand_ins(tmp_path, monkeypatch, mode):
    """Commands of three runs a, b, c of a script that in b does as the mode says."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return [f"python {tmp_path}/stand_in.py {mode} --out_dir={tmp_path}/{name}" for name in "abc"]


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_a_run_that_fails_does_not_stop_the_others(jobs, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        grid.run_here(stand_ins(tmp_path, monkeypatch, "fail"), jobs)
    assert end.value.code == f"error: 1 of 3 runs failed; why is in {tmp_path}/b/output.txt"  # so the status is 1
    said = [line.split(" ", 1)[1] for line in capsys.readouterr().out.splitlines()]
    ends = {"a": "finished", "b": "ended with status 7: b gives up", "c": "finished"}
    assert {f"{tmp_path}/{name} {words}" for name, words in ends.items()} <= set(said)
    assert said[0] == f"{tmp_path}/a started, 1 of 3"
    together = max(sum(1 if "started" in line else -1 for line in said[:i]) for i in range(len(said)))
    assert together <= jobs
    for name in "abc":
        assert f"{name} started {max(1, os.cpu_count() // jobs)}" in (tmp_path / name / "output.txt").read_text()


def test_jobs_are_spread_over_gpus(tmp_path, monkeypatch):
    """b is still running when a ends: c takes the GPU that a had. Those of CUDA_VISIBLE_DEVICES are what there is."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")
    grid.run_here(stand_ins(tmp_path, monkeypatch, "b waits for c"), 2, grid.visible(2))
    on = {name: (tmp_path / name / "output.txt").read_text().split()[-1] for name in "abc"}
    assert on == dict(a="3", b="5", c="3")
    with pytest.raises(BadInput, match=r"spread is 4, GPUs that this process may use are 3 \(3,5,7\)"):
        grid.visible(4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert grid.visible(2) == ["0", "1"]
    assert grid.visible(0) == []
    with pytest.raises(BadInput, match=r"spread is 3, GPUs that this process may use are 2 \(0,1\)"):
        grid.visible(3)


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["--spread=2"], "--jobs=1 leaves GPUs idle; --spread=2 needs --jobs=2 or more"),
        (["--spread=2", "--jobs=2", "--together=True"], "runs in one process share one GPU"),
    ],
)
def test_gpus_that_cannot_be_used(argv, why, capsys):
    with pytest.raises(SystemExit) as end:
        sweep("icl_regression", capsys, "--run=True", *argv)
    assert end.value.code == 2
    assert why in capsys.readouterr().err


def runner(commands):
    """A process that runs commands, one at a time, and has come to b, which waits to be stopped."""
    program = f"from scripts.grid import run_here; run_here({commands}, 1, every=0.1)"
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    output = grid.folder(commands[1]) / "output.txt"
    while not (output.exists() and "ready" in output.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    return process, output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_running_ones_save_and_starts_no_other(number, tmp_path, monkeypatch):
    process, output = runner(stand_ins(tmp_path, monkeypatch, "wait"))
    time.sleep(0.5)
    process.send_signal(number)
    said = process.communicate(timeout=30)[0]
    assert process.returncode == 128 + number
    assert output.read_text().splitlines()[-1] == "saved"
    assert f"{tmp_path}/b ready\n" in said  # its last line, said every 0.1 s
    assert f"{tmp_path}/b ended with status 143: saved" in said
    assert not (tmp_path / "c").exists()


def test_the_running_ones_save_when_the_launcher_is_killed(tmp_path, monkeypatch):
    process, output = runner(stand_ins(tmp_path, monkeypatch, "wait"))
    process.kill()
    process.wait()
    end = time.monotonic() + 30
    while not output.read_text().endswith("saved\n"):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_grid_runs_here_and_again_does_nothing(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(ROOT)
    tiny = "config/icl_configs/tiny.py --n_dims=2 --d_model=8 --n_head=2 --n_layer=1 --batch_size=2 --eval_prompts=4"
    argv = ["--only=^(standard|bilinear_btt)_n16_d64_lr0.0001", f"--out_dir={tmp_path}", "--run=True", "--jobs=2"]
    argv += [f"--extra={tiny} --max_iters=2 --device=cpu"]
    sweep("icl_regression", capfd, *argv)
    for name in ("standard", "bilinear_btt"):
        folder = tmp_path / f"{name}_n16_d64_lr0.0001_seed1337"
        assert json.loads((folder / "run.json").read_text())["status"] == "finished"
        assert "step 2/2" in (folder / "output.txt").read_text()
    assert sweep("icl_regression", capfd, *argv) == []
    monkeypatch.setattr(grid, "queued", set)
    assert sweep("icl_regression", capfd, *argv, "--todo=True", "--run=False") == []


@pytest.mark.parametrize("argv", [[], ["--todo=True"], ["--run=True"]], ids=" ".join)
@pytest.mark.parametrize("name", [*COUNTS, "time_series"])
def test_no_such_run(name, argv, capsys):
    with pytest.raises(SystemExit) as end:
        sweep(name, capsys, "--only=no_such_run", *argv)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: only is 'no_such_run', found in no name of the grid's ")
    assert f"{COUNTS.get(name, 36)} runs, such as standard_" in said
    assert said.count(", ") == 4
    assert said.count("\n") == 1


def test_only_that_is_no_regular_expression(capsys):
    with pytest.raises(SystemExit) as end:
        sweep("icl_regression", capsys, "--only=(n16")
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: only is '(n16', no regular expression: missing )")


def test_no_jobs(capsys):
    with pytest.raises(SystemExit) as end:
        sweep("icl_regression", capsys, "--run=True", "--jobs=0")
    assert end.value.code == 2
    assert "jobs is 0, it must be at least 1" in capsys.readouterr().err


def programs(folder, monkeypatch, **bodies):
    """Shell scripts that stand for programs, first in the PATH."""
    for name, body in bodies.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    if not os.environ["PATH"].startswith(f"{folder}:"):
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Programs of SLURM that write down what they are called with; the file they write into."""
    calls = tmp_path / "calls"
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)
    note = f'echo "$(basename "$0") $*" >> {calls}'
    sbatch = f'{note}; env | grep ^SBATCH_ >> {calls}; echo "Submitted batch job 12"'
    programs(tmp_path, monkeypatch, sbatch=sbatch, scontrol=note, squeue="true", sinfo='echo "$GPUS"')
    programs(tmp_path, monkeypatch, python=f'exec {sys.executable} "$@"')
    monkeypatch.setenv("LOG_DIR", str(tmp_path / "logs"))
    return calls


def submit(name, *argv):
    done = subprocess.run(["bash", SUBMIT[name], *argv], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_dry_run_submits_nothing(cluster):
    said = submit("icl_regression", "--dry-run", "--time=5", "--", "--only=^standard_n16")
    assert "'--array=1-8'" in said
    assert "'--time=5'" in said
    assert len([line for line in said.splitlines() if line.startswith("python train_ICL.py")]) == 8
    assert not cluster.exists()
    assert not (cluster.parent / "logs").exists()


@pytest.mark.parametrize(
    ("gpus", "argv", "gres"),
    [
        ("gpu:a100:4", [], "gpu:1"),
        ("(null)", [], None),
        ("gpu:4", ["--gpus=2"], None),
        ("gpu:4", ["--gres=none"], None),
    ],
)
def test_submit(gpus, argv, gres, cluster, monkeypatch):
    monkeypatch.setenv("GPUS", gpus)
    monkeypatch.setenv("SBATCH_SIGNAL", "B:USR1@300")
    programs(cluster.parent, monkeypatch, python="echo run 1; echo run 2")
    said = submit("language_modeling", *argv)
    folder = Path(said.split("commands and logs: ")[1].strip())
    assert (folder / "runs.txt").read_text() == "run 1\nrun 2\n"
    call, *variables = cluster.read_text().splitlines()
    script = f"{SUBMIT['language_modeling']} {folder}/runs.txt"
    assert call == " ".join(["sbatch --array=1-2", f"--chdir={ROOT}", *argv, script])
    given = dict(SIGNAL="B:USR1@300", REQUEUE="1", OPEN_MODE="append", OUTPUT=f"{folder}/%a.out")
    given |= dict(GRES=gres) if gres else {}
    assert sorted(variables) == sorted(f"SBATCH_{name}={value}" for name, value in given.items())


def test_nothing_is_submitted_where_nothing_is_left(cluster, monkeypatch):
    programs(cluster.parent, monkeypatch, python="true")
    assert submit("icl_regression") == "nothing to submit\n"
    assert not cluster.exists()


def test_bad_flags_submit_nothing(cluster):
    done = subprocess.run(["bash", SUBMIT["icl_regression"], "--", "--sed=2"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "did you mean 'seed'" in done.stderr
    assert not cluster.exists()


def array(tmp_path, monkeypatch, line, python):
    """array.sh on a file of three commands, started."""
    programs(tmp_path, monkeypatch, python=python)
    (tmp_path / "runs.txt").write_text("python a.py\npython b.py '--ranks=4|2|2' --lr=1\npython c.py\n")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    if line:
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", line)
    script = ["bash", str(ROOT / "scripts/array.sh"), "runs.txt"]
    return subprocess.Popen(script, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_array_runs_its_line(tmp_path, monkeypatch, cluster):
    task = array(tmp_path, monkeypatch, "2", 'printf "%s\\n" "$@"; exit 7')
    assert task.communicate(timeout=30)[0].splitlines()[1:] == ["b.py", "--ranks=4|2|2", "--lr=1"]
    assert task.returncode == 7  # the command's own status
    assert not cluster.exists()


@pytest.mark.parametrize("line", ["4", None])
def test_array_refuses_a_line_that_is_not_there(line, tmp_path, monkeypatch, cluster):
    task = array(tmp_path, monkeypatch, line, "echo started")
    assert "started" not in task.communicate(timeout=30)[0]
    assert task.returncode


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize("ending", [False, True])
def test_array_passes_signals_on_and_requeues(number, ending, tmp_path, monkeypatch, cluster):
    """A run that stops at a signal goes back into the queue, by its own name, unless SLURM is ending it."""
    programs(tmp_path, monkeypatch, squeue="" if ending else "echo 12_3")
    name, status = number.name.removeprefix("SIG"), 128 + number
    run = f"trap 'sleep 0.3; exit {status}' {name}; echo up; while :; do sleep 0.1; done"
    task = array(tmp_path, monkeypatch, "3", run)
    assert task.stdout.readline() == "python c.py\n"
    assert task.stdout.readline() == "up\n"
    task.send_signal(number)
    task.communicate(timeout=30)
    assert task.returncode == status
    assert cluster.exists() is not ending
    assert ending or cluster.read_text() == "scontrol requeue 12_3\n"


@pytest.mark.parametrize("status", [0, 1, 2, 137])
def test_array_does_not_requeue_what_was_not_asked_to_stop(status, tmp_path, monkeypatch, cluster):
    programs(tmp_path, monkeypatch, squeue="echo 12_1")
    task = array(tmp_path, monkeypatch, "1", f"exit {status}")
    task.communicate(timeout=30)
    assert task.returncode == status
    assert not cluster.exists()


def test_what_the_readme_reads_its_quick_start_has_made(monkeypatch):
    """The folders of sample.py and evaluate_ICL.py, here and in scripts/README.md, are those of its tiny runs."""
    monkeypatch.chdir(ROOT)
    pages = "\n".join((ROOT / name).read_text() for name in ("README.md", "scripts/README.md"))
    lines = pages.replace("\\\n", "").splitlines()
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("    python ")]
    tiny = [c for c in commands if c[0] in ("train.py", "train_ICL.py") and "tiny" in c[1]]
    made = {settings(shlex.join(["python", *c]))[0].out_dir for c in tiny}
    read = [c[1].removeprefix("--out_dir=") for c in commands if c[0] in ("sample.py", "evaluate_ICL.py")]
    assert len(read) == 2
    assert set(read) <= made


@pytest.mark.parametrize("script", ["scripts/gpu.sh", *SUBMIT.values()])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_of_a_script_does_nothing_else(flag, script, cluster, monkeypatch):
    """It prints the comment that the script, or the one it calls, opens with; nothing is asked of other programs."""
    programs(cluster.parent, monkeypatch, python="echo started", python3="echo started", mkdir="echo made")
    done = subprocess.run(["bash", ROOT / script, flag], cwd="/", capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    source = (ROOT / (script if script.endswith("gpu.sh") else "scripts/submit.sh")).read_text()
    comment = source[: source.index("\nset -")].splitlines()[1:]
    assert done.stdout.splitlines() == [line.removeprefix("#").removeprefix(" ") for line in comment]
    assert not cluster.exists()


def test_a_flag_where_a_folder_goes(tmp_path, monkeypatch):
    programs(tmp_path, monkeypatch, mkdir="echo made")
    script = ["bash", ROOT / "scripts/gpu.sh", "--folder"]
    done = subprocess.run(script, env=os.environ | dict(PYTHON="echo"), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no flag --folder; the one argument is a folder\n"


def asked(page, tmp_path, monkeypatch):
    """The arguments of every python that the first block of commands with a sweep on a page of results/ starts."""
    log = tmp_path / "asked"
    note = f'{{ printf "%s\\037" "$@"; echo; }} >> {log}'
    programs(tmp_path, monkeypatch, python=note, make="true")
    blocks = re.findall(r"(?:^    .*\n)+", (ROOT / "results" / page / "README.md").read_text(), re.MULTILINE)
    block = next(block for block in blocks if "sweep()" in block)
    subprocess.run(["bash", "-e", "-c", block], check=True, cwd=tmp_path)
    return [line.split("\037")[:-1] for line in log.read_text().splitlines()]


def test_the_commands_of_the_language_models(tmp_path, capsys, monkeypatch):
    """All flags are valid; the best rates come after the runs that choose them; as many tokens a step in all runs."""
    monkeypatch.chdir(ROOT)
    prepare, *sweeps, collect, table = asked("language_modeling", tmp_path, monkeypatch)
    assert [prepare[0], collect[0], table[0]] == [
        "data/openwebtext_small/prepare.py", "scripts/collect.py", "plots/lm_table.py"
    ]  # fmt: skip
    rates = [next(arg for arg in argv if arg.startswith("--rates=")) for argv in sweeps]
    assert rates == ["--rates=3e-3|1e-2", *["--rates=best"] * 3]
    lines = []
    for script, *argv in sweeps:
        assert script == "scripts/language_modeling/sweep.py"
        assert {"--run=True", "--jobs=2", "--spread=2"} < set(argv)
        lines.append(sweep("language_modeling", capsys, *argv, "--run=False", "--rates=1e-3"))
    assert [len(of_one) for of_one in lines] == [5, 4 * 5 + 2, 2, 4 * 5]
    runs = [settings(line)[0] for of_one in lines for line in of_one]
    assert {cfg.block_size * cfg.batch_size * cfg.gradient_accumulation_steps for cfg in runs} == {32 * 1024}
    assert {(cfg.max_iters, cfg.warmup_iters) for cfg in runs} == {(10_000, 500)}


def test_the_commands_of_the_time_series(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    sweeps = [argv for argv in asked("time_series", tmp_path, monkeypatch) if "sweep" in argv[0]]
    for script, *argv in sweeps:
        assert script == "scripts/time_series/sweep.py"
        lines = sweep("time_series", capsys, *argv, "--run=False")
        assert len(lines) == {"chronos": 6, "patch": 27, "paper": 54}[argv[2].partition("=")[2]]
        for _, name, *flags in map(shlex.split, lines):
            configure({"train_TS.py": train_TS, "train_chronos.py": train_chronos}[name].Settings, flags)
    assert len(sweeps) == 3
