"""A training run on disk: its record, its metrics, its checkpoint, and the signals that ask it to stop (DESIGN 9)."""

import contextlib
import dataclasses
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch

from training.configurator import differences
from training.devices import device_name, synchronise
from training.errors import BadInput, WriteError
from training.records import read_metrics

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ROOT = Path(__file__).resolve().parents[1]


class Run:
    """One run's folder. Constructing it only looks: what is refused leaves the folder as it was.

    `saved` is the checkpoint to go on from, or None. `start` writes run.json and takes the stop signals; `log` adds a
    line to metrics.jsonl; `save` writes ckpt.pt; `stop_requested` turns true when the run should save and end.
    """

    together = 1  # runs that take their steps at once, and share the seconds
    argv = None  # the command of the run, where it is not that of the process
    takes_signals = True  # False: the process takes them, for several runs

    def __init__(self, settings, command):
        self.settings, self.command = settings, command
        self.folder = Path(settings.out_dir)
        self.stop_requested = None
        self.saved = self._find_checkpoint()
        self.record, self.wandb = {}, None
        if self._wants_wandb and find_spec("wandb") is None:
            raise BadInput("wandb_log and wandb_entity need the package wandb: pip install wandb")

    def _find_checkpoint(self):
        cfg, path = self.settings, self.folder / "ckpt.pt"
        if cfg.init_from == "scratch" or (cfg.init_from == "auto" and not path.exists()):
            holds_run = (self.folder / "run.json").exists() or path.exists()
            if cfg.init_from == "scratch" and holds_run and not cfg.overwrite:
                raise BadInput(
                    f"{self.folder} holds a run already; go on with it by --init_from=resume, replace it by "
                    "--overwrite=True, or choose another --out_dir"
                )
            if self.folder.exists() and not self.folder.is_dir():
                raise BadInput(f"out_dir {self.folder} is a file")
            earlier = self._read_record().get("settings")
            if isinstance(earlier, dict) and not cfg.overwrite:  # begun, and stopped before its first checkpoint
                self._refuse_other(earlier, self.folder / "run.json")
            return None
        saved = load_checkpoint(path)
        self._refuse_other(saved["settings"], path)
        self.earlier_metrics = read_metrics(self.folder)  # a damaged line is refused before anything is written
        return saved

    def _refuse_other(self, saved, path):
        """Raise BadInput if the saved settings belong to a different run, naming the first that differs."""
        for name in differences(self.settings, saved):
            there = f"with {name} = {saved[name]!r}" if name in saved else f"without {name}"
            raise BadInput(f"{path} was made {there}, this run has {name} = {getattr(self.settings, name)!r}")

    def start(self, *, device, parameters, per_token, processes=1):
        """Write run.json, repair metrics.jsonl after a kill, begin to listen for stop signals.

        parameters: (total, non-embedding). per_token: multiply-adds, a `model.Compute` divided by T. processes:
        how many train together.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"cannot make out_dir {self.folder}: {error.strerror}") from None
        self._start_wandb()
        step = self.saved["step"] if self.saved else -1
        earlier = self._read_record() if self.saved else {}
        if self.saved is None:
            for name in ("ckpt.pt", "metrics.jsonl"):
                (self.folder / name).unlink(missing_ok=True)
        else:
            self._forget_metrics_after(step)
        self.record = dict(
            command=self.command,
            argv=self.argv or sys.argv,
            settings=dataclasses.asdict(self.settings),
            **_git_state(),
            versions=_versions(),
            device=device_name(device),
            processes=processes,
            together=self.together,
            started=earlier.get("started", _now()),
            resumed=[*earlier.get("resumed", []), *([{"step": step, "at": _now()}] if self.saved else [])],
            finished=None,
            status="running",
            parameters=dict(total=parameters[0], non_embedding=parameters[1]),
            paper_macs_per_token=per_token.paper,
            flops_per_token=6 * per_token.macs,
        )
        self._write_record()
        self._listen(patient=processes > 1)

    def _listen(self, patient):
        """Take the stop signals. Not patient: the second Ctrl-C does not wait; torchrun sends two for one."""
        self.patient = patient
        for s in STOP_SIGNALS if self.takes_signals else ():
            signal.signal(s, self._on_signal)

    def _stop_listening(self):
        for s in STOP_SIGNALS if self.takes_signals else ():
            signal.signal(s, signal.SIG_DFL if s != signal.SIGINT else signal.default_int_handler)

    def _on_signal(self, number, frame):
        if self.stop_requested and number == signal.SIGINT and not self.patient:
            raise KeyboardInterrupt
        self.stop_requested = signal.Signals(number).name
        self._announce()

    def _announce(self):
        os.write(2, f"{self.stop_requested}: will save and stop after this step\n".encode())  # print may be interrupted

    def log(self, **metrics):
        """Add one line to metrics.jsonl (and to W&B), keys as in DESIGN 9."""
        with self._writing("metrics.jsonl") as path, open(path, "a") as f:
            f.write(json.dumps(metrics) + "\n")
        if self.wandb:
            self.wandb.log(metrics, step=metrics["step"])

    def save(self, state):
        """Write the checkpoint; `state` holds step and whatever a resume needs, in plain types and tensors."""
        with self._writing("ckpt.pt") as path:
            save_atomic(dict(state, settings=dataclasses.asdict(self.settings)), path)

    def last_good(self):
        """What a run that ends badly says of its checkpoint."""
        path = self.folder / "ckpt.pt"
        return f"{path} is the last good checkpoint" if path.exists() else "no checkpoint was written before"

    def finish(self, status):
        """Close the record: "finished", "stopped: why" or "failed: why"."""
        self.record.update(status=status, finished=_now())
        try:
            self._write_record()
        except WriteError:
            if not status.startswith("failed"):  # else that failure is what to tell
                raise
        finally:
            self._stop_listening()
            if self.wandb:
                self.wandb.finish()

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
        kept = [json.dumps(line) for line in self.earlier_metrics if line["step"] <= step]
        with self._writing("metrics.jsonl") as path, replacing(path) as f:
            f.write("".join(line + "\n" for line in kept).encode())

    @property
    def _wants_wandb(self):
        return self.settings.wandb_log or bool(self.settings.wandb_entity)

    def _start_wandb(self):
        if not self._wants_wandb:
            return
        import wandb

        cfg = self.settings
        self.wandb = wandb.init(
            entity=cfg.wandb_entity or None,
            project=cfg.wandb_project,
            name=cfg.wandb_run_name or self.folder.name,
            config=dataclasses.asdict(cfg),
            dir=str(self.folder),
        )


class Follower(Run):
    """The run as all processes but the first see it: they read the checkpoint, hear signals, and write nothing."""

    def start(self, **about):
        self._listen(patient=True)

    def _announce(self):
        pass

    def log(self, **metrics):
        pass

    def save(self, state):
        pass

    def finish(self, status):
        self._stop_listening()


class Clock:
    """Training seconds, evaluation left out; the device is waited for before the time is read."""

    def __init__(self, device, seconds=0.0):
        self.device, self.seconds, self._since = device, seconds, None

    def read(self):
        synchronise(self.device)
        now = time.perf_counter()
        if self._since is not None:
            self.seconds += now - self._since
            self._since = now
        return self.seconds

    def resume(self):
        synchronise(self.device)
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def paused(self):
        self.read()
        self._since = None
        yield
        self.resume()


@contextlib.contextmanager
def replacing(path):
    """A file to write next to `path`, flushed to disk and renamed: a kill leaves the old one or the new, never half."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_atomic(state, path):
    """Save, or leave the old file as it was. Raises OSError where the system refuses to write."""
    with replacing(path) as f:
        try:
            torch.save(state, f)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # why a write failed, which torch's own error does not say
                raise error.__context__ from None
            raise


def load_checkpoint(path, map_location="cpu"):
    """A checkpoint's dict, plain types and tensors only. Raises BadInput if it is missing, damaged or foreign."""
    if not Path(path).is_file():
        raise BadInput(f"no checkpoint {path}; start with --init_from=scratch, or make the run that writes it")
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        why = f"({type(error).__name__}): truncated or of another kind"
        raise BadInput(f"{path} cannot be read as a checkpoint {why}") from None
    if not isinstance(state, dict) or not {"settings", "step", "model"} <= state.keys():
        raise BadInput(f"{path} is not a checkpoint of this project: it has no settings, step and model")
    return state


def load_weights(model, weights, path):
    """Put saved weights into a model; raises BadInput naming the first that does not fit."""
    want = model.state_dict()
    for name in [*want, *weights]:
        if name not in weights or name not in want or weights[name].shape != want[name].shape:
            shapes = [str(tuple(s[name].shape)) if name in s else "nothing" for s in (weights, want)]
            raise BadInput(f"{path}: the checkpoint has {shapes[0]} for {name}, the model {shapes[1]}")
    model.load_state_dict(weights)


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
