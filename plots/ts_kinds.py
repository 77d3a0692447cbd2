"""Time series: kinds of forecaster, the runs of each by horizon, and what the papers report for theirs.

A run counts with its evaluation of lowest validation error; of several rates and numbers of steps those are taken that
have the lowest on average. Test errors have no say.
"""

import dataclasses
from dataclasses import dataclass, field

from forecasters import RULES, TRAINED, name_of
from plots.names import IGNORED, SHORT, STRUCTURES
from plots.records import check_finished, check_once, check_same, differing, grouped, select
from plots.style import structure_style
from training.records import best_of, find_runs
from training.settings import StructureSettings

CHRONOS = "train_chronos.py"
DLINEAR = dict(color="#7B3294", marker="p", markersize=5, markeredgecolor="white", markeredgewidth=0.4)
ITERATIONS = (200, 1_000)  # of the paper's grid
TUNED = ("init_lr", "max_iters")  # chosen at each horizon, by validation
MODEL = {f.name for f in dataclasses.fields(StructureSettings)}  # what DLinear and the rules do not read


@dataclass
class Published:
    """Errors {horizon: (MSE, MAE)} that a paper reports; `ours`: the settings of the kind they are the errors of."""

    name: str
    marker: str
    errors: dict
    ours: dict = field(default_factory=dict)

    def is_of(self, settings):
        """Whether they are those of a kind with these settings."""
        return bool(self.ours) and self.ours.items() <= settings.items()


PATCHTST = dict(forecaster="patch", instance_norm=True, token_mixing_struct="low_rank")
PUBLISHED = {  # (dataset, features): of Liu et al. (2024), Nie et al. (2023) twice, Zeng et al. (2023), in this order
    ("ETTh1", "M"): [
        Published("iTransformer, L = 96", "<", {96: (0.386, 0.405), 192: (0.441, 0.436), 336: (0.487, 0.458)}),
        Published(
            "PatchTST/64, L = 512", ">", {96: (0.370, 0.400), 192: (0.413, 0.429), 336: (0.422, 0.440)},
            dict(PATCHTST, look_back=512),
        ),
        Published(
            "PatchTST/42, L = 336", "^", {96: (0.375, 0.399), 192: (0.414, 0.421), 336: (0.431, 0.436)},
            dict(PATCHTST, look_back=336),
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
        return name_of(self.settings) + self.variant

    @property
    def structure(self):
        return self.settings["token_mixing_struct"]

    @property
    def layout(self):
        """What kinds that differ in their scoring function share."""
        return self.settings["forecaster"], self.settings["look_back"]

    def errors(self, kind):
        """{horizon: one error for each seed}, kind: mse or mae."""
        metric = f"test/{kind}" if is_rule(self.settings) else f"best/test_{kind}"
        return {horizon: [run.final(metric) for run in runs] for horizon, runs in self.runs.items()}


def is_rule(settings):
    return settings["forecaster"] in RULES


def look(settings):
    """Colour and marker: those of the structure where a trained forecaster has one."""
    return DLINEAR if settings["forecaster"] == "dlinear" else structure_style(settings["token_mixing_struct"])


def order(settings):
    """Encoders first, then by structure and look_back."""
    forecasters = {name: place for place, name in enumerate([*TRAINED, *RULES])}
    place = list(STRUCTURES).index(settings["token_mixing_struct"])
    return forecasters.get(settings["forecaster"], len(forecasters)), place, settings["look_back"]


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


def kinds_of(runs):
    """The Kinds of runs on one dataset, in the order of the legend.

    A setting tells two kinds apart where it differs between runs of one horizon: what was made for each horizon does
    not. Raises BadInput for the same seed twice in a kind.
    """
    check_same(runs, ("dataset", "features"))
    kinds, runs = [], sorted(runs, key=lambda run: (order(run.settings), run.settings["horizon"], run.settings["seed"]))
    for line in grouped(runs, lambda run: name_of(run.settings)).values():
        if is_rule(line[0].settings):
            line = [same[0] for same in by_horizon(line).values()]
        names = [key for same in by_horizon(line).values() for key in differing([relevant(run) for run in same])]
        telling = [key for key in dict.fromkeys(names) if key not in TUNED]
        variants = grouped(line, lambda run, telling=telling: tuple(run.settings.get(key) for key in telling))
        for values in sorted(variants, key=lambda values: [(type(value).__name__, value) for value in values]):
            texts = [f", {SHORT.get(key, key)} = {value}" for key, value in zip(telling, values, strict=True)]
            of_each = {h: best_of(same, TUNED, lowest_val)[0] for h, same in by_horizon(variants[values]).items()}
            check_once(of_each.values())
            kinds.append(Kind(of_each, "".join(texts)))
    return kinds


def by_horizon(runs):
    return grouped(runs, lambda run: run.settings["horizon"])


def read_both(args):
    """(runs of train_TS.py, runs of train_chronos.py) that the flags of `arguments` ask for."""
    runs = select(find_runs(args.runs, "train_TS.py"), args.only)
    of_chronos = [run for run in runs if run.record["command"] == CHRONOS]
    others = [run for run in runs if run.record["command"] != CHRONOS]
    check_finished(of_chronos, CHRONOS, args.unfinished)
    check_finished(others, "train_TS.py", args.unfinished)
    return others, of_chronos


def published(settings):
    return PUBLISHED.get((settings["dataset"], settings["features"]), [])
