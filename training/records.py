"""The records of runs, read: by a resume, by sweeps, by collect.py and by figures alike (DESIGN 9)."""

import json
import shlex
import statistics
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from structured.errors import BadInput
from training.configurator import fits

FIELDS = {"command": str, "argv": list, "settings": dict, "status": str}  # what every reader may rely on
SOME = {"together": int, "device": str, "versions": dict, "commit": str | None}  # what older records may lack
KINDS = {  # of the settings that figures compute with
    **dict.fromkeys(
        ("seed", "d_model", "n_head", "d_head", "n_layer", "block_size", "batch_size", "max_iters", "n_dims",
         "n_positions", "horizon", "look_back", "eval_prompts", "gradient_accumulation_steps", "warmup_iters"), int,
    ),
    **dict.fromkeys(("init_lr", "training_learning_rate", "dropout", "min_lr", "noise_std", "ridge_alpha"), float),
    **dict.fromkeys(("token_mixing_struct", "dataset", "training_task", "forecaster", "features"), str),
}  # fmt: skip
RANDOM, WHOLE = "random windows", "whole text"  # what a language model's validation loss is the mean over
FEWEST_PACES = 3  # progress lines that a median is taken of
CONFIGS = {  # script: the config file that the advice for a missing run names
    "train.py": "config/struct_configs/train_struct_gpt2.py",
    "train_ICL.py": "config/icl_configs/paper.py",
    "train_TS.py": "config/ts_configs/etth1.py",
    "train_chronos.py": "config/ts_configs/chronos.py",
}
SWEEPS = {  # script: the grid that runs it together; older records of such runs have the grid's command, not their own
    "train.py": "scripts/language_modeling/sweep.py",
    "train_ICL.py": "scripts/icl_regression/sweep.py",
}


def read_record(folder):
    """The dict of a run.json. Raises BadInput that names the file unless it is the record of a run."""
    path = folder / "run.json"
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read ({type(error).__name__}); make its run again") from None
    if not isinstance(record, dict):
        raise BadInput(f"{path} is not the record of a run: it is {_kind(record)}, not an object")
    lacking = [name for name in FIELDS if name not in record]
    if lacking:
        raise BadInput(f"{path} is not the record of a run: it has no {', '.join(lacking)}")
    for name, kind in (FIELDS | SOME).items():
        if name in record and not isinstance(value := record[name], kind):
            wanted = getattr(kind, "__name__", kind)
            raise BadInput(f"{path} is not the record of a run: its {name} is {_kind(value)}, not {wanted}")
    for name, value in record["settings"].items():
        if not fits(value, KINDS.get(name, type(value))) or not isinstance(value, str | int | float):
            raise BadInput(f"{path} is not the record of a run: its setting {name} is {value!r}")
    return record


def read_metrics(folder):
    """The lines of a metrics.jsonl as dicts, none where there is no such file.

    A last line cut short by a kill is left out. Raises BadInput that names any other line that is not an object with a
    whole number `step`.
    """
    path = folder / "metrics.jsonl"
    try:
        texts = path.read_text().splitlines() if path.exists() else []
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read ({type(error).__name__})") from None
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except ValueError:
            if number == len(texts):
                break
            raise BadInput(f"{path}, line {number} is damaged; without that line the file can be read") from None
        if not isinstance(line, dict) or type(line.get("step")) is not int:
            what = _kind(line) if not isinstance(line, dict) else f"step {line.get('step')!r}"
            raise BadInput(f"{path}, line {number} has {what}, not an object with a whole number as its step")
        lines.append(line)
    return lines


class _Settings(dict):
    """The settings of a record, which names its folder where one is missing."""

    def __init__(self, settings, folder):
        super().__init__(settings)
        self.folder = folder

    def __missing__(self, name):
        raise BadInput(f"{self.folder}/run.json has no setting {name}")


@dataclass(frozen=True, eq=False)
class RecordedRun:
    """One run's folder: the dict of run.json and the lines of metrics.jsonl."""

    folder: Path
    record: dict
    metrics: list

    @cached_property
    def settings(self):
        """Those of the record; a language model's also say which text its validation loss is the mean over.

        `validation`: older runs drew RANDOM windows with their seed, others take the WHOLE validation text, or as much
        of it as `val_tokens`, the same for every run. Losses on other texts do not compare, nor do those on random
        windows of different seeds.
        """
        settings = self.record["settings"]
        if self.record["command"] == "train.py":
            tokens = next((line["val/tokens"] for line in self.metrics if "val/tokens" in line), None)
            if type(tokens) not in (int, type(None)):
                raise BadInput(f"{self.folder}/metrics.jsonl: val/tokens is {tokens!r}, not a whole number")
            settings = settings | dict(validation=WHOLE if tokens else RANDOM, val_tokens=tokens)
        return _Settings(settings, self.folder)

    @property
    def status(self):
        return self.record["status"]

    @property
    def structure(self):
        return self.settings["token_mixing_struct"]

    @property
    def of_sweep(self):
        """Whether the command that made the run is a sweep's."""
        return "--run=True" in self.record["argv"]

    def command(self, *flags):
        """The command line that made the run, its flags for starting afresh replaced by `flags`; a sweep's as it is."""
        if self.of_sweep:
            return shlex.join(["python", SWEEPS[self.record["command"]], *self.record["argv"][1:]])
        argv = [a for a in self.record["argv"] if not a.startswith(("--init_from=", "--overwrite="))]
        return shlex.join(["python", *argv, *flags])

    @cached_property
    def evaluated(self):
        """{metric: {step: line}}; a step logged twice counts as it was logged last."""
        found = {}
        for line in self.metrics:
            for name in line:
                found.setdefault(name, {})[line["step"]] = line
        return found

    def series(self, metric, x="step"):
        """{step: (x, metric)} of the lines that hold both. Raises BadInput if there are none or one is not finite.

        x may be "gpu_seconds" as well: the tokens seen, at the run's pace.
        """
        key, per = ("tokens", self.pace) if x == "gpu_seconds" else (x, 1)
        lines = self.evaluated.get(metric, {})
        pairs = {step: (line[key], line[metric]) for step, line in lines.items() if key in line}
        if not pairs:
            raise self._lacks(key if metric in self.evaluated else metric)
        for step, pair in pairs.items():
            self._check_finite(pair, f"{metric} or {x}", step)
        return {step: (at / per, value) for step, (at, value) in pairs.items()}

    def last(self, metric):
        """(step, list) of the last line that holds `metric`. Raises BadInput as `series` does."""
        if metric not in self.evaluated:
            raise self._lacks(metric)
        step, line = max(self.evaluated[metric].items())
        self._check_finite(line[metric], metric, step)
        return step, line[metric]

    def end(self, metric, x="step"):
        """(x, metric) at the last step that has both."""
        return max(self.series(metric, x).items())[1]

    def final(self, metric):
        """The number that `metric` has at the last step it was evaluated at."""
        return self.end(metric)[1]

    @property
    def seconds(self):
        """Training time without evaluations, of runs that took their steps at once each one's share."""
        return self.final("seconds") / self.record.get("together", 1)

    @property
    def paces(self):
        """tokens_per_s of the progress lines but the first, which holds the compilation."""
        return [line["tokens_per_s"] for _, line in sorted(self.evaluated.get("tokens_per_s", {}).items())][1:]

    @property
    def pace(self):
        """The median of `paces`. Raises BadInput if there are too few."""
        if len(self.paces) < FEWEST_PACES:
            raise BadInput(
                f"{self.folder} has {len(self.paces)} progress lines with tokens_per_s after its first, a pace needs "
                f"{FEWEST_PACES}; choose another --x, or make it again with a smaller --log_interval"
            )
        return statistics.median(self.paces)

    def _lacks(self, metric):
        how = "remove it and make it again" if self.of_sweep else "make it again"
        return BadInput(f"{self.folder} has no {metric}; {how} with: {self.command('--overwrite=True')}")

    def _check_finite(self, values, what, step):
        try:
            finite = np.isfinite(np.asarray(values, float)).all()
        except (TypeError, ValueError):
            finite = False
        if not finite:
            raise BadInput(f"{self.folder}: {what} is no finite number at step {step}")


def load_run(folder):
    """The run in a folder, finished or not; a last line of metrics cut short by a kill is left out."""
    folder = Path(folder)
    return RecordedRun(folder, read_record(folder), read_metrics(folder))


def find_runs(paths, script="train.py"):
    """All runs of `paths`, each once: run folders, or folders with run folders at any depth.

    Raises BadInput naming the paths that hold no run, with the command of `script` that would make one there.
    """
    folders, empty = {}, []
    for path in map(Path, paths):
        found = [path / "run.json"] if (path / "run.json").exists() else sorted(path.rglob("run.json"))
        for record in found:
            folders.setdefault(record.parent.resolve(), record.parent)
        empty += [] if found else [path]
    if empty:
        how = [f"no run in {path}; make it with: python {script} {CONFIGS[script]} --out_dir={path}" for path in empty]
        raise BadInput("; ".join(how))
    return [load_run(folder) for folder in sorted(folders.values())]


def grouped(items, key):
    """{key(item): items}, in the order of their first."""
    found = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def best_of(runs, names, error):
    """(the runs whose values of the settings `names` have the lowest mean error, {values: mean error}).

    error: run -> number. The means are over the seeds that all values have, so that more seeds of one are no advantage.
    Raises BadInput if there is no such seed.
    """
    tried = grouped(runs, lambda run: tuple(run.settings[name] for name in names))
    common = set.intersection(*({run.settings["seed"] for run in same} for same in tried.values()))
    if not common:
        words = " or ".join(", ".join(map(str, values)) for values in tried)
        alike = f"{runs[0].folder} and {len(runs) - 1} runs like it"
        raise BadInput(f"no seed is in all of {', '.join(names)} = {words}, at which {alike} are to be compared")
    means = {
        values: statistics.fmean(error(run) for run in same if run.settings["seed"] in common)
        for values, same in tried.items()
    }
    return tried[min(means, key=means.get)], means


def shared_steps(runs, metric, x="step"):
    """The steps but 0 at which all runs have `metric` and `x`, ascending. Raises BadInput if there is none."""
    steps = set.intersection(*(set(run.series(metric, x)) for run in runs)) - {0}
    if not steps:
        folders = ", ".join(str(run.folder) for run in runs)
        raise BadInput(f"no step after the first at which {metric} is known for all of {folders}")
    return sorted(steps)


def _kind(value):
    return type(value).__name__
