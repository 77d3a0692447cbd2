"""A training run on disk: its record, its metrics, its checkpoint, and the signals that ask it to stop (DESIGN 9)."""

import contextlib
import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch

from training.checkpoint import load_checkpoint, save_atomic
from training.configurator import differences
from training.devices import device_name
from training.errors import BadInput, WriteError
from training.files import linked, replacing
from training.owner import Owner
from training.records import read_metrics
from training.signals import StopSignals, say
from training.tracking import Wandb

ROOT = Path(__file__).resolve().parents[1]


class Run:
    """One run's folder. Constructing it only looks: what is refused leaves the folder as it was.

    `saved` is the checkpoint to resume from, or None. `start` writes run.json and takes the stop signals; `log` adds a
    line to metrics.jsonl; `save` writes ckpt.pt, and best.pt; `stop_requested` names the signal that asks the run to
    save and end.

    settings: with the fields of RunSettings. script: its file, for the record. world: the processes that train
    together; only the first one writes. For one of several runs in a process (training/together.py): argv, the command
    that makes it alone; together, how many take their steps in turn and share the seconds; stop, the StopSignals of
    the process, which the run then leaves alone.
    """

    def __init__(self, settings, script, world, *, argv=None, together=1, stop=None):
        self.settings, self.script, self.world = settings, script, world
        self.argv, self.together = argv or sys.argv, together
        self.stop, self.own_stop = stop, stop is None
        self.writes = world.rank == 0
        self.folder, self.owner = settings.folder, None
        self.found = self._marks()
        self.saved = self._find_checkpoint()
        self.record, self.wandb, self.logged = {}, None, None
        if self._wants_wandb and find_spec("wandb") is None:
            raise BadInput("wandb_log and wandb_entity need the package wandb: pip install wandb")

    def _find_checkpoint(self):
        cfg, path = self.settings, self.folder / "ckpt.pt"
        if cfg.init_from == "scratch" or (cfg.init_from == "auto" and not path.exists()):
            holds_run = (self.folder / "run.json").exists() or path.exists()
            if cfg.init_from == "scratch" and holds_run and not cfg.overwrite:
                if getattr(cfg, "eval_only", False):
                    raise BadInput(f"{self.folder} holds a run already; evaluate it by --init_from=resume")
                raise BadInput(
                    f"{self.folder} holds a run already; go on with it by --init_from=resume, replace it by "
                    "--overwrite=True, or choose another --out_dir; --own_folder=True makes one in it for each run"
                )
            if self.folder.exists() and not self.folder.is_dir():
                raise BadInput(f"out_dir {self.folder} is a file")
            earlier = self._read_record().get("settings")
            if isinstance(earlier, dict) and not cfg.overwrite:  # begun, and stopped before its first checkpoint
                self._refuse_other(earlier, self.folder / "run.json")
            return None
        if not path.exists():
            raise BadInput(f"no checkpoint {path} to resume from; begin with --init_from=scratch, or auto")
        try:
            saved = load_checkpoint(path)
        except BadInput as error:
            raise BadInput(f"{error}; begin again with --init_from=scratch --overwrite=True") from None
        self._refuse_other(saved["settings"], path)
        self.earlier_metrics = read_metrics(self.folder)  # a damaged line is refused before anything is written
        return saved

    def _refuse_other(self, saved, path):
        """Raise BadInput if the saved settings belong to a different run, naming the first that differs."""
        for name in sorted(differences(self.settings, saved), key="pretrained".__ne__):  # it decides on others
            there = f"with {name} = {saved[name]!r}" if name in saved else f"without {name}"
            raise BadInput(f"{path} was made {there}, this run has {name} = {getattr(self.settings, name)!r}")

    @property
    def stop_requested(self):
        return self.stop and self.stop.asked

    def leaving(self):
        """A context in which a stop signal raises StopRequested; several processes look at signals between steps."""
        return self.stop.leaving() if self.world.size == 1 else contextlib.nullcontext()

    def start(self, *, device, parameters, per_token):
        """Write run.json, repair metrics.jsonl after an interruption, take the stop signals.

        parameters: (total, non-embedding). per_token: multiply-adds, a `model.Compute` divided by T.
        """
        if self.writes:
            self._begin_record(device, parameters, per_token)
            if self.settings.own_folder:
                say(f"the run's folder is {self.folder}")
        if self.own_stop:
            words = dict() if self.writes else dict(words="")
            self.stop = StopSignals(patient=self.world.size > 1, **words)

    def _begin_record(self, device, parameters, per_token):
        new = not self.folder.exists()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"cannot make out_dir {self.folder}: {error.strerror}") from None
        self.owner = Owner(self.folder)
        try:
            self._write_first_record(device, parameters, per_token)
        except BaseException:
            self.owner.release()
            if new:
                with contextlib.suppress(OSError):  # unless there is something in it
                    self.folder.rmdir()
            raise

    def _write_first_record(self, device, parameters, per_token):
        if self._marks() != self.found:
            raise BadInput(f"{self.folder} was written by another process while this run was starting; start it again")
        step = self.saved["step"] if self.saved else -1
        before = self._read_record() if self.settings.init_from in ("auto", "resume") else {}
        earlier = before if self.saved else {}
        if self.saved is None:
            for name in ("ckpt.pt", "best.pt", "metrics.jsonl"):
                (self.folder / name).unlink(missing_ok=True)
        else:
            self._forget_metrics_after(step)
        self.record = dict(
            command=self.script,
            argv=self.argv,
            settings=dataclasses.asdict(self.settings),
            **_git_state(),
            versions=_versions(),
            device=device_name(device),
            processes=self.world.size,
            together=self.together,
            started=earlier.get("started", _now()),
            resumed=[*earlier.get("resumed", []), *([{"step": step, "at": _now()}] if self.saved else [])],
            finished=None,
            status="running",
            parameters=dict(total=parameters[0], non_embedding=parameters[1]),
            paper_macs_per_token=per_token.paper,
            flops_per_token=6 * per_token.macs,
        )
        if self._wants_wandb:
            self.wandb = Wandb(self.settings, self.folder, before.get("wandb_id"))
            self.record["wandb_id"] = self.wandb.id
        self._write_record()

    def log(self, **metrics):
        """Add one line to metrics.jsonl (and to W&B), keys as in DESIGN 9."""
        if not self.writes:
            return
        with self._writing("metrics.jsonl") as path, open(path, "a") as f:
            f.write(json.dumps(metrics) + "\n")
        self.logged = metrics["step"]
        if self.wandb:
            self.wandb.log(metrics)

    def save(self, state, best=False):
        """Write the checkpoint ckpt.pt; `state` holds step and whatever a resume needs, in plain types and tensors.

        best: it is the best so far, and best.pt as well, which later ones leave alone; two names of one file where the
        disk can do that.
        """
        if not self.writes:
            return
        if self.logged is not None:
            with self._writing("metrics.jsonl") as path, open(path, "a") as f:
                os.fsync(f.fileno())  # no checkpoint is on the disk before the lines up to it
        state = dict(state, settings=dataclasses.asdict(self.settings), logged=self.logged)
        if best:
            with self._writing("best.pt") as path:
                save_atomic(state, path)
        with self._writing("ckpt.pt") as path:
            if not (best and linked(self.folder / "best.pt", path)):
                save_atomic(state, path)

    def last_good(self):
        """What a run that ends badly says of its checkpoint."""
        path = self.folder / "ckpt.pt"
        return f"{path} is the last good checkpoint" if path.exists() else "no checkpoint was written before"

    def finish(self, status):
        """Close the record: "finished", "stopped: why" or "failed: why"."""
        self.record.update(status=status, finished=_now())
        try:
            if self.writes:
                self._write_record()
        except WriteError:
            if not status.startswith("failed"):  # else that failure is what to tell
                raise
        finally:
            if self.own_stop:
                self.stop.release()
            if self.owner:
                self.owner.release()
            if self.wandb:
                self.wandb.finish()

    def _marks(self):
        """What changes where another process writes the folder's record or checkpoint."""
        marks = []
        for name in ("run.json", "ckpt.pt"):
            with contextlib.suppress(OSError):
                about = (self.folder / name).stat()
                marks.append((name, about.st_ino, about.st_mtime_ns, about.st_size))
        return marks

    def _read_record(self):
        """What run.json holds, as far as it can be read: a damaged one does not stop a resume."""
        try:
            record = json.loads((self.folder / "run.json").read_text())
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}

    def _write_record(self):
        with self._writing("run.json") as path, replacing(path) as f:
            f.write((json.dumps(self.record, indent=1) + "\n").encode())

    @contextlib.contextmanager
    def _writing(self, name):
        """The path of a file of the run; where the system refuses to write it, a WriteError that says what is kept."""
        path = self.folder / name
        try:
            yield path
        except OSError as error:
            raise WriteError(f"{path} cannot be written: {error.strerror}; {self.last_good()}") from error

    def _forget_metrics_after(self, step):
        """Drop what a killed run logged beyond its checkpoint, a half-written last line included."""
        kept = [line for line in self.earlier_metrics if line["step"] <= step]
        self.logged, ends = self.saved.get("logged"), kept[-1]["step"] if kept else -1
        if self.logged is not None and ends < self.logged:
            where = f"ends at step {ends}" if kept else "is empty or gone"
            say(f"note: {self.folder}/metrics.jsonl {where}; the checkpoint saw lines up to step {self.logged}")
        with self._writing("metrics.jsonl") as path, replacing(path) as f:
            f.write("".join(json.dumps(line) + "\n" for line in kept).encode())

    @property
    def _wants_wandb(self):
        return self.settings.wandb_log or bool(self.settings.wandb_entity)


def _versions():
    from importlib.metadata import PackageNotFoundError, version

    def of(package):
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    project = next(line.split('"')[1] for line in lines if line.startswith("version"))
    python, triton = platform.python_version(), of("triton")
    return {"python": python, "torch": torch.__version__, "triton": triton, "structured-attention": project}


def _git_state():
    """The commit the code is at and whether the tree was changed; None without git."""

    def git(*args):
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return dict(commit=None, dirty=None)
    try:
        return dict(commit=git("rev-parse", "HEAD"), dirty=bool(git("status", "--porcelain")))
    except subprocess.CalledProcessError:
        return dict(commit=None, dirty=None)


def _now():
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
