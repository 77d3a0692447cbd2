"""Time series: the test errors of forecasters against the horizon, beside published ones.

    python plots/ts_horizon.py results/time_series --out results/ts_horizon.png

A line for each kind of forecaster (its structure and what else tells it apart), the mean over seeds with the lowest and
the highest as a bar. A run counts with its evaluation of lowest validation error; of several rates and numbers of steps
those are taken that have the lowest on average. Hollow markers: what the papers report. Numbers: plots/ts_table.py.
"""

import dataclasses
import itertools
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plots.records import IGNORED, SHORT, STRUCTURES, arguments, check_same, read_runs
from plots.style import GREY, LINES, label_ends, log_ticks, picture, structure_style
from train_TS import RULES
from training.errors import BadInput, command
from training.settings import StructureSettings

ERRORS = {"mse": "mean squared error", "mae": "mean absolute error"}
DLINEAR = dict(color="#7B3294", marker="p", markersize=5, markeredgecolor="white", markeredgewidth=0.4)
RULE_NAMES = {"repeat_last": "last step", "seasonal_naive": "last day"}
RULE_LINES = {"repeat_last": (0, (1, 1)), "seasonal_naive": (0, (4, 2))}
TUNED = ("init_lr", "max_iters")  # chosen at each horizon, by validation
MODEL = {f.name for f in dataclasses.fields(StructureSettings)}  # what DLinear and the rules do not read


@dataclass
class Published:
    """Errors {horizon: (MSE, MAE)} that a paper reports; `ours`: the settings of the kind they are the errors of."""

    name: str
    marker: str
    errors: dict
    ours: dict = field(default_factory=dict)


STANDARD = dict(forecaster="patch", instance_norm=True, token_mixing_struct="low_rank")
PUBLISHED = {  # (dataset, features): of Liu et al. (2024), Nie et al. (2023) twice, Zeng et al. (2023), in this order
    ("ETTh1", "M"): [
        Published("iTransformer, L = 96", "<", {96: (0.386, 0.405), 192: (0.441, 0.436), 336: (0.487, 0.458)}),
        Published(
            "PatchTST/64, L = 512", ">", {96: (0.370, 0.400), 192: (0.413, 0.429), 336: (0.422, 0.440)},
            dict(STANDARD, look_back=512),
        ),
        Published(
            "PatchTST/42, L = 336", "^", {96: (0.375, 0.399), 192: (0.414, 0.421), 336: (0.431, 0.436)},
            dict(STANDARD, look_back=336),
        ),
        Published(
            "DLinear, L = 336", "p", {96: (0.375, 0.399), 192: (0.405, 0.416), 336: (0.439, 0.443)},
            dict(forecaster="dlinear", look_back=336, instance_norm=False),
        ),
    ]
}  # fmt: skip


@dataclass
class Kind:
    """A line: runs = {horizon: runs of different seeds}, and `variant`, what tells it from others of its forecaster."""

    runs: dict
    variant: str

    @property
    def settings(self):
        return next(iter(self.runs.values()))[0].settings

    @property
    def label(self):
        return name(self.settings) + self.variant

    def errors(self, kind):
        """{horizon: one error for each seed}, kind: mse or mae."""
        metric = f"test/{kind}" if is_rule(self.settings) else f"best/test_{kind}"
        return {horizon: [run.final(metric) for run in runs] for horizon, runs in self.runs.items()}


def is_rule(settings):
    return settings["forecaster"] in RULES


def name(settings):
    """The words for a forecaster and what it reads."""
    forecaster, structure = settings["forecaster"], STRUCTURES[settings["token_mixing_struct"]][0]
    if forecaster in RULES:
        return f"{RULE_NAMES[forecaster]} repeated"
    words = dict(encoder=structure, patch=f"patches, {structure}", dlinear="DLinear")
    return f"{words[forecaster]}, L = {settings['look_back']}"


def look(settings):
    """Colour and marker: those of the structure where a trained forecaster has one."""
    return DLINEAR if settings["forecaster"] == "dlinear" else structure_style(settings["token_mixing_struct"])


def order(settings):
    """Encoders first, then by structure and look_back."""
    forecasters = ["encoder", "patch", "dlinear", *RULES]
    place = list(STRUCTURES).index(settings["token_mixing_struct"])
    return forecasters.index(settings["forecaster"]), place, settings["look_back"]


def relevant(run):
    """The settings that change what a run computes, but for the horizon; patience only where it ended the run."""
    settings = run.settings
    if is_rule(settings):
        return {"forecaster": settings["forecaster"]}
    unread = IGNORED | {"horizon", "block_size"} | (MODEL if settings["forecaster"] == "dlinear" else set())
    kept = {key: value for key, value in settings.items() if key not in unread}
    if run.metrics and run.metrics[-1]["step"] >= settings["max_iters"]:
        kept.pop("patience", None)
    return kept


def lowest_val(run):
    return min(value for _, value in run.series("val/mse").values())


def chosen(runs):
    """Of runs that differ in TUNED and the seed, those of the rate and steps with the lowest mean validation error.

    The means are over the seeds that all have; raises BadInput if there are none.
    """
    tried = {}
    for run in runs:
        tried.setdefault(tuple(run.settings[key] for key in TUNED), []).append(run)
    if len(tried) == 1:
        return runs
    common = set.intersection(*({run.settings["seed"] for run in same} for same in tried.values()))
    if not common:
        folders = ", ".join(str(run.folder) for run in runs)
        raise BadInput(f"no seed is in all of {folders}, whose {' and '.join(TUNED)} are to be compared")

    def mean(same):
        return statistics.fmean(lowest_val(run) for run in same if run.settings["seed"] in common)

    return min(tried.values(), key=mean)


def kinds_of(runs):
    """The Kinds of runs on one dataset, in the order of the legend.

    A setting tells two kinds apart where it differs between runs of one horizon: what was made for each horizon does
    not. Raises BadInput for the same seed twice in a kind.
    """
    check_same(runs, ("dataset", "features"))
    lines = {}
    for run in sorted(runs, key=lambda run: (order(run.settings), run.settings["horizon"], run.settings["seed"])):
        lines.setdefault(name(run.settings), {}).setdefault(run.settings["horizon"], []).append(run)
    kinds = []
    for horizons in lines.values():
        telling = {}
        for same in horizons.values():
            for a, b in itertools.combinations(map(relevant, same), 2):
                telling |= {key: True for key in [*a, *b] if a.get(key) != b.get(key) and key not in TUNED}
        variants = {}
        for horizon, same in horizons.items():
            for run in same[:1] if is_rule(same[0].settings) else same:
                values = tuple(run.settings.get(key) for key in telling)
                variants.setdefault(values, {}).setdefault(horizon, []).append(run)
        for values in sorted(variants, key=lambda values: [(type(value).__name__, value) for value in values]):
            texts = [f", {SHORT.get(key, key)} = {value}" for key, value in zip(telling, values, strict=True)]
            kind = Kind({horizon: chosen(same) for horizon, same in variants[values].items()}, "".join(texts))
            for a, b in itertools.chain.from_iterable(map(itertools.pairwise, kind.runs.values())):
                if a.settings["seed"] == b.settings["seed"]:
                    raise BadInput(f"{a.folder} and {b.folder} are the same run, seed {a.settings['seed']}; give one")
            kinds.append(kind)
    return kinds


def published(settings):
    return PUBLISHED.get((settings["dataset"], settings["features"]), [])


def line_styles(kinds):
    """{label: line style}: one for each layout, what it reads and its variant; the structure has the colour."""
    styles, used = {}, {True: {}, False: {}}
    for kind in kinds:
        if not is_rule(kind.settings):
            forecaster, look_back = kind.settings["forecaster"], kind.settings["look_back"]
            places = used[forecaster == "dlinear"]  # which has a colour of its own
            styles[kind.label] = places.setdefault((forecaster, look_back, kind.variant), len(places))
    if max(styles.values(), default=0) >= len(LINES):
        raise BadInput("more kinds of forecaster than there are line styles; choose with --only NAME=VALUE")
    return {label: LINES[place] for label, place in styles.items()}


def draw(ax, kinds, error):
    """One panel. All of one horizon stands side by side on a grey band; what the rules do not fit in is cut off."""
    trained = [kind for kind in kinds if not is_rule(kind.settings)]
    peers = published(kinds[0].settings)
    n = len(trained) + len(peers)
    aside = min(1.045, 1.5 ** (1 / max(n, 1))) ** (np.arange(n) - (n - 1) / 2)
    lines, column, heights = line_styles(kinds), list(ERRORS).index(error), []
    for shift, kind in zip(aside, trained, strict=False):
        found = kind.errors(error)
        x, mean = shift * np.array(list(found), float), np.array([statistics.fmean(v) for v in found.values()])
        low, high = (np.array([end(v) for v in found.values()]) for end in (min, max))
        ax.errorbar(
            x, mean, yerr=[mean - low, high - mean], **look(kind.settings), linestyle=lines[kind.label],
            label=kind.label, capsize=2, elinewidth=0.8, capthick=0.8, linewidth=1,
        )  # fmt: skip
        ax.plot(x, mean, **look(kind.settings), linestyle="", zorder=3)  # above the lines of others
        heights += [*low, *high]
    horizons = sorted({h for kind in kinds for h in kind.runs} | {h for peer in peers for h in peer.errors})
    for shift, peer in zip(aside[len(trained) :], peers, strict=True):
        y = [errors[column] for errors in peer.errors.values()]
        ax.plot(
            shift * np.array(list(peer.errors), float), y, linestyle="", marker=peer.marker, markersize=5.5,
            markerfacecolor="none", markeredgecolor="black", markeredgewidth=0.8, zorder=4,
            label=f"{peer.name} (published)",
        )  # fmt: skip
        heights += y
    ends = {}
    for kind in kinds:
        if is_rule(kind.settings):
            found = {horizon: values[0] for horizon, values in kind.errors(error).items()}
            rule = kind.settings["forecaster"]
            ax.plot(list(found), list(found.values()), color=GREY, linewidth=0.8, linestyle=RULE_LINES[rule])
            ends[RULE_NAMES[rule]] = found[max(found)]
    ax.set(xscale="log", yscale="log", xlabel="horizon", ylabel=f"test {ERRORS[error]}")
    for horizon in horizons if n > 1 else []:
        ax.axvspan(horizon * aside[0] / 1.03, horizon * aside[-1] * 1.03, color="#F3F3F3", linewidth=0, zorder=0)
    ax.set_xlim(horizons[0] / 1.3, horizons[-1] * 1.3)
    if heights:
        ax.set_ylim(0.97 * min(heights), 1.03 * max(heights))
    ax.set_xticks(horizons, map(str, horizons))
    ax.minorticks_off()
    log_ticks(ax.yaxis)
    if ends:
        label_ends(ax, ends)


def legend(axes):
    """Below both panels, a line or marker each, in words."""
    handles, labels = axes[0].get_legend_handles_labels()
    both = sorted(zip(handles, labels, strict=True), key=lambda pair: "(published)" in pair[1])
    if both:
        handles, labels = zip(*both, strict=True)
        figure, ncols = axes[0].get_figure(root=True), 2 if max(map(len, labels)) > 36 else 3
        figure.legend(
            handles, labels, ncols=min(ncols, len(labels)), loc="outside lower center", handlelength=2.6,
            columnspacing=1.2, labelspacing=0.35,
        )  # fmt: skip


@command
def main(argv=None):
    args = arguments(__doc__, "train_TS.py").parse_args(argv)
    kinds = kinds_of(read_runs(args.runs, "train_TS.py", args.only))
    with picture(args.out, panels=2) as axes:
        for ax, error in zip(axes, ERRORS, strict=True):
            draw(ax, kinds, error)
        legend(axes)


if __name__ == "__main__":
    main()
