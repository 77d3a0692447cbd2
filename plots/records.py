"""Runs as curves and frames: choosing among their records, naming them, averaging over seeds (DESIGN 9).

A curve is the mean of all runs whose settings agree but for the seed and what computes nothing; a frame has a row for
every run. Runs that ended early, are missing or lack a metric are refused with the command that makes them.
"""

import argparse
import contextlib
import difflib
import itertools
import json
import sys
from ast import literal_eval
from dataclasses import dataclass

import numpy as np
import pandas as pd

from plots.names import ICL_RATE, IGNORED, SHORT, STRUCTURES
from training.errors import BadInput
from training.records import best_of, find_runs, grouped, shared_steps


def plain_arguments(description):
    """The parser of a command of plots/; `description` is the script's docstring, shown as it is."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def arguments(description, script, out=True):
    """The parser of a figure from runs of `script`, or of a table: `out` False; it may add its own flags."""
    parser = plain_arguments(description)
    parser.add_argument("runs", nargs="+", help=f"folders of runs of {script}, or folders that hold such folders")
    parser.add_argument("--unfinished", action="store_true", help="take runs that have not ended, too")
    parser.add_argument("--only", action="append", default=[], metavar="NAME=VALUE", help="take runs with this setting")
    if out:
        parser.add_argument("--out", required=True, help="picture to write, as PNG and as SVG")
    return parser


def runs_of(args, script):
    """The runs that the flags of `arguments` ask for."""
    return read_runs(args.runs, script, args.only, args.unfinished)


def read_runs(paths, script, only=(), unfinished=False):
    """The runs of `script` in `paths` that have the settings `only` asks for, by folder; the finished ones alone."""
    chosen = select(find_runs(paths, script), only)
    check_finished(chosen, script, unfinished)
    return chosen


def select(runs, only):
    """The runs that `--only NAME=VALUE` means, each text of `only` one such flag; says how many it leaves out.

    A run is taken if its setting NAME is VALUE, as it is written or as Python reads it. One NAME several times takes
    any of its VALUEs, several NAMEs only what has them all. Raises BadInput for a name or a value that no run has.
    """
    wanted, chosen = {}, runs
    for text in only:
        name, equals, value = text.partition("=")
        if not equals:
            raise BadInput(f"--only {text}: settings are chosen as NAME=VALUE")
        wanted.setdefault(name, []).append(value)
        with contextlib.suppress(ValueError, SyntaxError):
            wanted[name].append(literal_eval(value))
    for name, values in wanted.items():
        known = sorted({key for run in chosen for key in run.settings})
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            raise BadInput(f"the runs have no setting '{name}'" + (f", did you mean '{near[0]}'?" if near else ""))
        there = _values(chosen, name)
        chosen = [run for run in chosen if name in run.settings and run.settings[name] in values]
        if not chosen:
            raise BadInput(f"no run has {name} = {_either(values)}; there is {_either(there)}")
    if len(chosen) < len(runs):
        print(f"{len(runs) - len(chosen)} of {len(runs)} runs left out by --only", file=sys.stderr)
    return chosen


def check_finished(runs, script, unfinished=False):
    """Raises BadInput if a run is of another script or not finished, with the command that would finish it.

    unfinished: runs that have not ended are taken as far as they got.
    """
    for run in runs:
        if run.record["command"] != script:
            made_by = run.record["command"]
            raise BadInput(f"{run.folder} is a run of {made_by}, this picture is made from runs of {script}")
        if run.structure not in STRUCTURES:
            raise BadInput(f"{run.folder}: no name for token_mixing_struct '{run.structure}' in structured/scorings")
    left = [run for run in runs if run.status != "finished" and not unfinished]
    if left:
        run, step = left[0], left[0].metrics[-1]["step"] if left[0].metrics else 0
        where = f"{run.folder} is not finished ({run.status}, step {step} of {run.settings['max_iters']})"
        more = f", nor are {len(left) - 1} more of {len(runs)} runs" if len(left) > 1 else ""
        how = run.command(f"--init_from={'resume' if (run.folder / 'ckpt.pt').exists() else 'auto'}")
        raise BadInput(f"{where}{more}; take what there is with --unfinished, or go on with: {how}")


def check_same(runs, names):
    """Raises BadInput unless the runs agree in these settings: what they measure can then share an axis."""
    for name in names:
        if len(there := _values(runs, name)) > 1:
            raise BadInput(f"the runs differ in {name} ({_either(there)}); choose with --only {name}={there[0]}")


def frame(runs, metric=None, x="step"):
    """A row for every run: its settings, `run`, `structure` (in the order of STRUCTURES), `device`.

    Of a metric also the last `value`, and `x` there.
    """
    rows = [
        run.settings | dict(run=run, structure=run.structure, device=run.record.get("device"))
        | (dict(zip(("x", "value"), map(float, run.end(metric, x)), strict=True)) if metric else {})
        for run in runs
    ]  # fmt: skip
    table = pd.DataFrame(rows)
    return table.assign(structure=pd.Categorical(table.structure, list(STRUCTURES), ordered=True))


@dataclass
class Curve:
    """The runs of one curve and their name: the structure, and in `variant` what tells it from others of its structure.

    x: where the mean over seeds is known; mean, low, high: the mean and the extremes there; steps: the training steps;
    tried: {learning rate: error} of those its own was chosen from.
    """

    runs: list
    variant: str
    x: np.ndarray = None
    mean: np.ndarray = None
    low: np.ndarray = None
    high: np.ndarray = None
    steps: list = None
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

    def set_end(self, metric, x):
        """One point: the last `metric` of every run, at x."""
        self.steps = [min(max(run.series(metric)) for run in self.runs)]
        self.set([x], [[run.final(metric)] for run in self.runs])


def group(runs, unnamed=frozenset()):
    """Curves without numbers, in the order of STRUCTURES and then of width; all labels differ.

    A width is named where several are drawn; another setting where it tells apart curves of one structure and size.
    Settings in `unnamed` are not, and labels may then be the same. Curves without a name for their width are to become
    a line through several widths: a line has one number of heads, so that it is named where a structure has several,
    and its curves follow each other, more heads first.
    Raises BadInput for the same seed twice in a curve.
    """
    lines = "d_model" in unnamed

    def order(runs):
        settings = runs[0].settings
        size = settings["d_model"], -settings["n_head"]
        place = list(STRUCTURES).index(runs[0].structure)
        return place, *(size[::-1] if lines else size), json.dumps(settings, sort_keys=True)

    groups, curves = sorted(_alike(runs, IGNORED), key=order), []
    check_once(groups)
    widths = len({same[0].settings["d_model"] for same in groups}) > 1
    for same in groups:
        alike = [other[0].settings for other in groups if other[0].structure == same[0].structure]
        names = ["d_model"] if widths else []
        names += ["n_head"] if lines and len({settings["n_head"] for settings in alike}) > 1 else []
        of_a_size = grouped(alike, lambda settings: (settings["d_model"], settings.get("n_dims"))).values()
        names += [n for n in itertools.chain(*map(differing, of_a_size)) if n not in IGNORED | {"d_model"}]
        words = [_setting_words(n, same[0].settings.get(n)) for n in dict.fromkeys(names) if n not in unnamed]
        curves.append(Curve(same, ", ".join(words)))
    return curves


def check_once(groups):
    """Raises BadInput if a group of runs, sorted by seed, has a seed twice."""
    for a, b in itertools.chain.from_iterable(map(itertools.pairwise, groups)):
        if a.settings["seed"] == b.settings["seed"]:
            raise BadInput(f"{a.folder} and {b.folder} are the same run, seed {a.settings['seed']}; give one of them")


def tuned(runs, metric="eval/last", rate=ICL_RATE, unnamed=frozenset()):
    """As `group`, for each curve only the runs of its best learning rate: the lowest mean of `metric`.

    Rates are compared on the seeds and at the last step that all of them have, so that more seeds or steps of one are
    no advantage. Raises BadInput if they have none in common.
    """
    tried = {}
    for kind in _alike(runs, IGNORED | {rate}):
        last = shared_steps(kind, metric)[-1]
        kind.sort(key=lambda run: run.settings[rate])
        best, errors = best_of(kind, [rate], lambda run, last=last: run.series(metric)[last][1])
        rates = {lr: error for (lr,), error in errors.items()}
        tried |= dict.fromkeys(best, rates)
    curves = group(tried, unnamed | {rate})
    for curve in curves:
        curve.tried = tried[curve.runs[0]]
    return curves


def _alike(runs, but):
    """Runs of one script whose settings agree but for `but`, in lists by seed."""

    def key(run):
        kept = {k: v for k, v in run.settings.items() if k not in but}
        return json.dumps([run.record["command"], kept], sort_keys=True)

    return [sorted(same, key=lambda run: run.settings["seed"]) for same in grouped(runs, key).values()]


def differing(settings):
    """Names of the settings in which some of these dicts differ."""
    names = dict.fromkeys(itertools.chain.from_iterable(settings))
    return [name for name in names if any(each.get(name) != settings[0].get(name) for each in settings)]


def learning_curves(runs, metric, x, unnamed=frozenset()):
    """A Curve for each group of runs, with the numbers that `trace` gives it."""
    return trace(group(runs, unnamed), metric, x)


def trace(curves, metric, x):
    """The curves, now with their numbers: `metric` over `x` from the first step on, where all seeds were evaluated."""
    for curve in curves:
        curve.steps = shared_steps(curve.runs, metric, x)
        series = [run.series(metric, x) for run in curve.runs]
        points = np.array([[each[step] for step in curve.steps] for each in series], float)  # (seeds, n, 2)
        curve.set(points[..., 0], points[..., 1])
    return curves


def envelope(curves):
    """(x, y): where one of the curves goes below all that any of them reached with less, ascending in x."""
    points = sorted((x, y) for curve in curves for x, y in zip(curve.x, curve.mean, strict=True))
    lowest = np.minimum.accumulate([y for _, y in points])
    first = np.flatnonzero(np.diff(lowest, prepend=np.inf) < 0)
    return np.array([points[i][0] for i in first]), lowest[first]


def by_setting(curves, name):
    """{value: curves or runs} of one setting, ascending."""
    return grouped(sorted(curves, key=lambda curve: curve.settings[name]), lambda curve: curve.settings[name])


def by_kind(curves):
    """Lists of the curves that have one structure and one variant: they share a look, and differ in what is unnamed."""
    return list(grouped(curves, lambda curve: (curve.structure, curve.variant)).values())


def comparable(runs, x):
    """(the runs whose x compare, the card they ran on): of times those on the card that most of them ran on."""
    if x not in ("seconds", "gpu_seconds"):
        return runs, None
    by_card = grouped(runs, lambda run: run.record.get("device"))
    card = max(by_card, key=lambda card: len(by_card[card]))
    return by_card[card], card


def _setting_words(name, value):
    if name == "n_head" and value != -1:  # which is d_model / d_head
        return "1 head" if value == 1 else f"{value} heads"
    text = f"{value:,}" if type(value) is int else f"{value:g}" if type(value) is float else str(value)
    return f"{SHORT.get(name, name)} = {text}"


def _values(runs, name):
    return sorted({run.settings[name] for run in runs if name in run.settings}, key=repr)


def _either(values):
    return " or ".join(map(str, dict.fromkeys(map(str, values))))
