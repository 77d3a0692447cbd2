"""Time series: kinds of forecaster, the runs of each by horizon, and what the papers report for theirs.

A run counts with its evaluation of lowest validation error; of several rates and numbers of steps those are taken that
have the lowest on average. Test errors have no say.
"""

import dataclasses
import itertools
import statistics
from dataclasses import dataclass, field

from plots.records import IGNORED, SHORT, STRUCTURES, check_same
from plots.style import structure_style
from train_TS import RULES
from training.errors import BadInput
from training.settings import StructureSettings

DLINEAR = dict(color="#7B3294", marker="p", markersize=5, markeredgecolor="white", markeredgewidth=0.4)
RULE_NAMES = {"repeat_last": "last step", "seasonal_naive": "last day"}
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
    """Runs of one kind, {horizon: those of different seeds}; `variant`: what tells it from others of its forecaster."""

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
