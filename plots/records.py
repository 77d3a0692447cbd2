"""Run records as curves: reading them, choosing among them, naming them, and averaging over seeds (DESIGN 9).

A curve is the mean of all runs whose settings agree but for the seed and what computes nothing. Runs that ended early,
are missing or lack a metric are refused with the command that makes them.
"""

import argparse
import difflib
import itertools
import json
import math
import shlex
import statistics
import sys
import textwrap
from ast import literal_eval
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

import structured
from training.errors import BadInput
from training.records import read_metrics, read_record

STRUCTURES = {  # token_mixing_struct: (name, colour, marker)
    structure: (scoring.label, scoring.colour, scoring.marker) for structure, scoring in structured.STRUCTURES.items()
}
IGNORED = {  # settings in which the runs of one curve may differ; runs of different lengths are different curves
    "seed", "out_dir", "init_from", "overwrite", "device", "backend", "compile", "attention_backend", "log_interval",
    "data_dir", "cuda_graph", "compile_mode", "keep", "fsdp",
    "wandb_log", "wandb_entity", "wandb_project", "wandb_run_name",
    "eval_interval", "eval_iters", "eval_only", "eval_prompts", "eval_batch_size", "always_save_checkpoint",
}  # fmt: skip
SHORT = {"d_model": "D", "init_lr": "lr", "training_learning_rate": "lr", "max_iters": "steps"}
ICL_RATE, LM_RATE = "training_learning_rate", "init_lr"
LM_LOSS = "val/loss"
RANDOM, WHOLE = "random windows", "whole text"  # what a language model's validation loss is the mean over
EVALUATED = {"train_ICL.py": "eval/last", "train.py": LM_LOSS}  # script: what its evaluations measure
ICL_SIZES = {"n_dims", "n_positions", "block_size", "d_model"}  # what a figure of in-context regression has in its axes
X_AXES = {  # key of metrics.jsonl: words of the axis
    "non_emb_compute": "training FLOPs without embeddings",
    "compute": "training FLOPs",
    "paper_compute": "forward multiply-adds, the paper's count",
    "seconds": "training time (s)",
    "gpu_seconds": "training time at median pace (s)",  # not in metrics.jsonl: tokens / Run.pace
    "step": "steps",
}
FEWEST_PACES = 3  # progress lines that a median is taken of
CONFIGS = {  # script: the config file that the advice for a missing run names
    "train.py": "config/struct_configs/train_struct_gpt2.py",
    "train_ICL.py": "config/icl_configs/paper.py",
    "train_TS.py": "config/ts_configs/etth1.py",
}
SWEEPS = {  # script: the grid that runs it together; older records of such runs have the grid's command, not their own
    "train.py": "scripts/language_modeling/sweep.py",
    "train_ICL.py": "scripts/icl_regression/sweep.py",
}
NAMED = 3  # of many runs or commands that an error gives


@dataclass(frozen=True, eq=False)
class Run:
    """One run's folder: the dict of run.json and the lines of metrics.jsonl; `as_of`: the step it ends at here."""

    folder: Path
    record: dict
    metrics: list
    as_of: float = math.inf

    @cached_property
    def settings(self):
        """Those of the record; a language model's also say which text its validation loss is the mean over.

        `validation`: older runs drew RANDOM windows with their seed, others take the WHOLE validation text, or as much
        of it as `val_tokens`, the same for every run. Losses on other texts do not compare, nor do those on random
        windows of different seeds.
        """
        settings = self.record["settings"]
        if self.record["command"] != "train.py":
            return settings
        tokens = next((line["val/tokens"] for line in self.metrics if "val/tokens" in line), None)
        return settings | dict(validation=WHOLE if tokens else RANDOM, val_tokens=tokens)

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
        """{metric: {step: line}} up to `as_of`; a step logged twice counts as it was logged last."""
        found = {}
        for line in self.metrics:
            for name in line if line["step"] <= self.as_of else ():
                found.setdefault(name, {})[line["step"]] = line
        return found

    def series(self, metric, x="step"):
        """{step: (x, metric)} of the lines that hold both. Raises BadInput if there are none or one is not finite.

        x may be "gpu_seconds" as well: the tokens seen, at the run's pace.
        """
        key, per = ("tokens", self.pace) if x == "gpu_seconds" else (x, 1)
        lines = self.evaluated.get(metric, {})
        pairs = {step: (line[key] / per, line[metric]) for step, line in lines.items() if key in line}
        if not pairs:
            raise self._lacks(key if metric in self.evaluated else metric)
        for step, pair in pairs.items():
            self._check_finite(pair, f"{metric} or {x}", step)
        return pairs

    def last(self, metric):
        """(step, list) of the last line that holds `metric`. Raises BadInput as `series` does."""
        if metric not in self.evaluated:
            raise self._lacks(metric)
        step, line = max(self.evaluated[metric].items())
        self._check_finite(line[metric], metric, step)
        return step, line[metric]

    def final(self, metric):
        """The number that `metric` has at the last step it was evaluated at."""
        return max(self.series(metric).items())[1][1]

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
        if not np.isfinite(np.asarray(values, float)).all():
            raise BadInput(f"{self.folder}: {what} is not finite at step {step}")


def load_run(folder):
    """The run in a folder, finished or not; a last line of metrics cut short by a kill is left out."""
    folder = Path(folder)
    return Run(folder, read_record(folder), read_metrics(folder))


def find_runs(paths, script="train.py"):
    """All runs of `paths`, each once: run folders, or folders with run folders at any depth.

    Raises BadInput naming the paths that hold no run, with the command of `script` that would make one there.
    """
    folders, empty = {}, []
    for path in map(Path, paths):
        found = [path / "run.json"] if (path / "run.json").exists() else sorted(path.rglob("run.json"))
        for record in found:
            folders.setdefault(record.parent.resolve(), record.parent)
        if not found:
            empty.append(path)
    if empty:
        how = [f"no run in {path}; make it with: python {script} {CONFIGS[script]} --out_dir={path}" for path in empty]
        raise BadInput("\n".join(how))
    return [load_run(folder) for folder in sorted(folders.values())]


def select(runs, wanted):
    """Runs whose settings have the wanted values: {name: [value, ..]}, any of them."""
    for name, values in wanted.items():
        known = sorted({key for run in runs for key in run.settings})
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            raise BadInput(f"the runs have no setting '{name}'" + (f", did you mean '{near[0]}'?" if near else ""))
        there = sorted({run.settings[name] for run in runs if name in run.settings}, key=repr)
        runs = [run for run in runs if name in run.settings and run.settings[name] in values]
        if not runs:
            raise BadInput(f"no run has {name} = {_either(values)}; there is {_either(there)}")
    return runs


def parse_wanted(texts):
    """["d_model=64", "d_model=128"] -> {"d_model": [64, 128]}."""
    wanted = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise BadInput(f"--only {text}: settings are chosen as NAME=VALUE")
        values = wanted.setdefault(name, [])
        values.append(value)
        try:
            values.append(literal_eval(value))
        except (ValueError, SyntaxError):
            continue
    return wanted


def check_finished(runs, script, unfinished=None):
    """Raises BadInput if a run is of another script or not finished, with the commands that would finish them.

    unfinished: runs that have not ended are taken as far as they got; None: the command at hand cannot.
    """
    for run in runs:
        if run.record["command"] != script:
            made_by = run.record["command"]
            raise BadInput(f"{run.folder} is a run of {made_by}, this picture is made from runs of {script}")
        if run.structure not in STRUCTURES:
            raise BadInput(f"{run.folder}: no name for token_mixing_struct '{run.structure}' in structured/scorings")
    left = {}  # command: the runs that it goes on with
    for run in runs:
        if run.status != "finished" and not unfinished:
            go_on = "resume" if (run.folder / "ckpt.pt").exists() else "auto"
            left.setdefault(run.command(f"--init_from={go_on}"), []).append(run)
    if left:
        taken, advice = "" if unfinished is None else "take it as it is with --unfinished, or ", []
        for command, (run, *others) in itertools.islice(left.items(), NAMED):
            step = run.metrics[-1]["step"] if run.metrics else 0
            where = f"{run.folder} is not finished ({run.status}, step {step} of {run.settings['max_iters']})"
            where += f", nor {len(others)} more of its sweep" if others else ""
            advice.append(f"{where}; {taken}go on with: {command}")
        if rest := sum(map(len, list(left.values())[NAMED:])):
            advice.append(f"and {rest} more: {sum(map(len, left.values()))} of {len(runs)} runs are not finished")
        raise BadInput("\n".join(advice))


def check_same(runs, names):
    """Raises BadInput unless the runs agree in these settings: what they measure can then share an axis."""
    for name in names:
        there = sorted({run.settings[name] for run in runs if name in run.settings}, key=repr)
        if len(there) > 1:
            raise BadInput(f"the runs differ in {name} ({_either(there)}); choose with --only {name}={there[0]}")


def as_of(runs, step, metric="eval/last"):
    """The runs as they stood at their evaluation at exactly `step`, which is then the last that each of them has.

    Where nothing before it depends on the length of a run, this is what runs of so many steps give. Raises BadInput if
    a run has no `metric` there, with the last step that such runs have one at, and the last that all have.
    """
    evaluated = {run.folder: set(run.evaluated.get(metric, {})) for run in runs}
    lacking = []
    for folder, steps in evaluated.items():
        if step not in steps:
            last = f"last at {max(steps):,}" if steps else "nowhere yet"
            lacking.append(f"{folder} has no {metric} at step {step:,} ({last})")
    if lacking:
        shared = set.intersection(*evaluated.values())
        has = f"step {max(shared):,} is the last that" if shared else "there is none that"
        more = [f"and {len(lacking) - NAMED} more"] if len(lacking) > NAMED else []
        way = f"{has} all {len(runs)} runs have; leave runs out with --only NAME=VALUE"
        raise BadInput("\n".join([*lacking[:NAMED], *more, way]))
    return [replace(run, as_of=step) for run in runs]


def run_arguments(description, script, unfinished=False, at_step=False):
    """The parser of a command that reads runs of `script`; it may add its own flags.

    unfinished, at_step: the command can take runs that have not ended as far as they got, or all runs as of one step.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help=f"folders of runs of {script}, or folders that hold such folders")
    early = parser.add_mutually_exclusive_group() if unfinished or at_step else None
    if unfinished:
        early.add_argument("--unfinished", action="store_true", help="take runs that have not ended, too")
    if at_step:
        words = "take all runs, ended or not, as they stood at their evaluation at step N"
        early.add_argument("--at-step", type=int, metavar="N", help=words)
    parser.add_argument("--only", action="append", default=[], metavar="NAME=VALUE", help="take runs with this setting")
    return parser


def arguments(description, script, unfinished=False, at_step=False):
    """The parser of a figure from runs of `script`."""
    parser = run_arguments(description, script, unfinished, at_step)
    parser.add_argument("--out", required=True, help="picture to write, as PNG and as SVG")
    return parser


def read_runs(paths, script, only=(), unfinished=None, at_step=None):
    """What a script draws: the finished runs of `script` in `paths` that have the settings `only` asks for.

    unfinished: the others, too; None: it has no such flag. at_step: all of them, as of this step.
    """
    runs = find_runs(paths, script)
    chosen = select(runs, parse_wanted(only))
    if len(chosen) < len(runs):
        print(f"{len(runs) - len(chosen)} of {len(runs)} runs left out by --only", file=sys.stderr)
    check_finished(chosen, script, unfinished if at_step is None else True)
    return chosen if at_step is None else as_of(chosen, at_step, EVALUATED[script])


def step_words(at_step):
    """What a title adds where all runs are taken as of one step."""
    return "" if at_step is None else f", step {at_step:,}"


@dataclass
class Curve:
    """The runs of one curve and their name: the structure, and in `variant` what tells it from others of its structure.

    x: where the mean over seeds is known; mean, low, high: the mean and the extremes there; steps: the training steps;
    rate: its learning rate, where that was chosen; tried: {learning rate: error} of those it was chosen from.
    """

    runs: list
    variant: str
    x: np.ndarray = None
    mean: np.ndarray = None
    low: np.ndarray = None
    high: np.ndarray = None
    steps: list = None
    rate: float = None
    tried: dict = None

    @property
    def settings(self):
        """Those of its first run: all but the seed and what computes nothing are the others', too."""
        return self.runs[0].settings

    @property
    def structure(self):
        return self.runs[0].structure

    @property
    def label(self):
        return ", ".join(filter(None, (STRUCTURES[self.structure][0], self.variant)))

    @property
    def d_model(self):
        return self.settings["d_model"]

    @property
    def seeds(self):
        return [run.settings["seed"] for run in self.runs]

    def set(self, x, values):
        """x: (n,) or (seeds, n); values: (seeds, n)."""
        x, values = np.asarray(x, float), np.asarray(values, float)
        self.x = x.mean(0) if x.ndim == 2 else x
        self.mean, self.low, self.high = values.mean(0), values.min(0), values.max(0)


def group(runs, unnamed=frozenset()):
    """Curves without numbers, in the order of STRUCTURES and then of width; all labels differ.

    A width is named where several are drawn; another setting where it tells apart curves of one structure and size.
    Settings in `unnamed` are not, and labels may then be the same. Curves without a name for their width are to become
    a line through several widths: a line has one number of heads, so that it is named where a structure has several,
    and its curves follow each other, more heads first.
    Raises BadInput for the same seed twice in a curve.
    """
    lines = "d_model" in unnamed
    groups = sorted(_alike(runs, IGNORED), key=lambda g: _order(g, lines))
    for g in groups:
        for a, b in itertools.pairwise(g):
            if a.settings["seed"] == b.settings["seed"]:
                both = f"{a.folder} and {b.folder}"
                raise BadInput(f"{both} are the same run, seed {a.settings['seed']}; give one of them")
    widths = len({g[0].settings["d_model"] for g in groups}) > 1
    curves = []
    for g in groups:
        alike = [h[0].settings for h in groups if h[0].structure == g[0].structure]
        names = ["d_model"] if widths else []
        names += ["n_head"] if lines and len({settings["n_head"] for settings in alike}) > 1 else []
        names += [n for n in _telling(alike) if n not in IGNORED | {*names, "d_model"}]
        curves.append(Curve(g, ", ".join(_setting_words(n, g[0].settings.get(n)) for n in names if n not in unnamed)))
    return curves


def tuned(runs, metric="eval/last", rate=ICL_RATE, unnamed=frozenset()):
    """As `group`, for each curve only the runs of its best learning rate: the lowest mean of `metric` at the end.

    Rates are compared on the seeds and at the last step that all of them have, so that more seeds or steps of one are
    no advantage. Raises BadInput if they have none in common.
    """
    kept, tried = [], {}
    for kind in _alike(runs, IGNORED | {rate}):
        rates = {}
        for run in sorted(kind, key=lambda run: run.settings[rate]):
            rates.setdefault(run.settings[rate], []).append(run)
        common = set.intersection(*({run.settings["seed"] for run in same} for same in rates.values()))
        if not common:
            folders = ", ".join(str(run.folder) for run in kind)
            raise BadInput(f"no seed is in all of {rate} = {_either(rates)}, which {folders} are to be compared at")
        series = {
            r: [run.series(metric) for run in same if run.settings["seed"] in common] for r, same in rates.items()
        }
        shared = set.intersection(*(set(steps) for same in series.values() for steps in same))
        if not shared:
            folders = ", ".join(str(run.folder) for run in kind)
            raise BadInput(f"no step at which {metric} is known for all of {folders}")
        errors = {r: float(np.mean([steps[max(shared)][1] for steps in same])) for r, same in series.items()}
        best = rates[min(errors, key=errors.get)]
        kept += best
        tried |= dict.fromkeys((run.folder for run in best), errors)
    curves = group(kept, unnamed | {rate})
    for curve in curves:
        curve.rate, curve.tried = curve.settings[rate], tried[curve.runs[0].folder]
    return curves


def _alike(runs, but):
    """Runs of one script whose settings agree but for `but`, in lists by seed."""
    groups = {}
    for run in runs:
        key = {k: v for k, v in run.settings.items() if k not in but}
        groups.setdefault(json.dumps([run.record["command"], key], sort_keys=True), []).append(run)
    return [sorted(g, key=lambda r: r.settings["seed"]) for g in groups.values()]


def _telling(alike):
    """Names of the settings that differ between two of these that have the same size."""
    names = {}
    for a, b in itertools.combinations(alike, 2):
        if all(a.get(n) == b.get(n) for n in ("d_model", "n_dims")):
            names |= {n: True for n in [*a, *b] if a.get(n) != b.get(n)}
    return list(names)


def _order(runs, lines=False):
    """By structure and width, more heads first; for lines through widths by heads before width."""
    settings = runs[0].settings
    size = settings["d_model"], -settings["n_head"]
    place = list(STRUCTURES).index(runs[0].structure)
    return place, *(size[::-1] if lines else size), json.dumps(settings, sort_keys=True)


def learning_curves(runs, metric, x, unnamed=frozenset()):
    """A Curve for each group of runs, with the numbers that `trace` gives it."""
    return trace(group(runs, unnamed), metric, x)


def trace(curves, metric, x):
    """The curves, now with their numbers: `metric` over `x` from the first step on, where all seeds were evaluated."""
    for curve in curves:
        series = [run.series(metric, x) for run in curve.runs]
        curve.steps = sorted(s for s in set.intersection(*map(set, series)) if s > 0)
        if not curve.steps:
            folders = ", ".join(str(run.folder) for run in curve.runs)
            raise BadInput(f"no step after the first at which {metric} is known for all of {folders}")
        points = np.array([[s[step] for step in curve.steps] for s in series], float)  # (seeds, n, 2)
        curve.set(points[..., 0], points[..., 1])
    return curves


def envelope(curves):
    """(x, y): where one of the curves goes below all that any of them reached with less, ascending in x."""
    points = sorted((x, y) for curve in curves for x, y in zip(curve.x, curve.mean, strict=True))
    lowest = np.minimum.accumulate([y for _, y in points])
    first = np.flatnonzero(np.diff(lowest, prepend=np.inf) < 0)
    return np.array([points[i][0] for i in first]), lowest[first]


def by_setting(curves, name):
    """{value: curves} of one setting, ascending."""
    found = {}
    for curve in sorted(curves, key=lambda curve: curve.settings[name]):
        found.setdefault(curve.settings[name], []).append(curve)
    return found


def by_kind(curves):
    """Lists of the curves that have one structure and one variant: they share a look, and differ in what is unnamed."""
    kinds = {}
    for curve in curves:
        kinds.setdefault((curve.structure, curve.variant), []).append(curve)
    return list(kinds.values())


def table(header, rows):
    """Text columns, each as wide as its widest entry; the first flushes left."""
    rows = [header, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = (
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def markdown(header, *rows):
    """The same as a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def prose(text):
    """A paragraph below a table, wrapped."""
    return "\n".join(["", *wrapped(text)])


def wrapped(text):
    return textwrap.wrap(text, 110, break_long_words=False, break_on_hyphens=False)


def within(low, high, form=".3f"):
    """An interval in words: [0.010, 0.020]."""
    return f"[{low:{form}}, {high:{form}}]"


def listed(words):
    """a, b and c."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def below_table(runs, curves, name, at_step=None):
    """Text below a table: the runs and hours behind it, and which curves had one learning rate; name(curve): words."""
    until = "" if at_step is None else f" until step {at_step:,}"
    text = f"{len(runs)} runs, {sum(run.seconds for run in runs) / 3600:.1f} hours of training{until}."
    few = [curve for curve in curves if curve.tried and len(curve.tried) < 2]
    which = f": {'; '.join(map(name, few))}" if len(few) < len(curves) else ""
    return "\n".join([text, *wrapped(f"One learning rate only, so none was chosen{which}." if few else "")])


def final_table(curves, y, x="step"):
    """The last point of every curve: its seeds, its step, where it is on the x axis, its mean and its extremes.

    Where the learning rate was chosen: the rate, and those it was chosen from.
    """
    rates = ["lr", "of"] if all(c.tried for c in curves) else []
    header = ["curve", "runs", "seeds", *rates, "step", *([] if x == "step" else [x]), y, "lowest", "highest"]
    rows = []
    for c in curves:
        chosen = [f"{c.rate:g}", " ".join(f"{rate:g}" for rate in c.tried)] if rates else []
        at = [] if x == "step" else [f"{c.x[-1]:.4g}"]
        numbers = [f"{v[-1]:.4g}" for v in (c.mean, c.low, c.high)]
        seeds = " ".join(map(str, c.seeds))
        rows.append([c.label, str(len(c.runs)), seeds, *chosen, f"{c.steps[-1]:,}", *at, *numbers])
    return table(header, rows)


def _setting_words(name, value):
    if name == "n_head" and value != -1:  # which is d_model / d_head
        return "1 head" if value == 1 else f"{value} heads"
    return f"{SHORT.get(name, name)} = {_text(value)}"


def _text(value):
    return f"{value:,}" if type(value) is int else f"{value:g}" if type(value) is float else str(value)


def _either(values):
    return " or ".join(map(str, dict.fromkeys(map(str, values))))
