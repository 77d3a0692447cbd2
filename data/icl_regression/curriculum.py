"""How many coordinates and points a training prompt has, as a pure function of the step."""

import itertools
import math
from dataclasses import dataclass

from data.icl_regression.tasks import QUERY_TASKS
from training.errors import BadInput

DIMS_START, POINTS_START, INTERVAL, WARMUP_RATIO = 4, 8, 2000, 0.06  # the original's defaults
RAMPS = ("dims", "points")


@dataclass(frozen=True)
class Curriculum:
    """Dims and points start small and grow by inc every interval steps up to end.

    The fields are the settings training_curriculum_<field> (Garg et al.'s names, flattened). inc matters only where
    start < end. Raises BadInput for start below 1 or above end, interval below 1, or an inc below 1 that is needed.
    """

    dims_start: int
    dims_end: int
    dims_inc: int
    dims_interval: int
    points_start: int
    points_end: int
    points_inc: int
    points_interval: int

    def __post_init__(self):
        for what in RAMPS:
            start, end, inc, interval = self._ramp(what)
            name = f"training_curriculum_{what}"
            if not 1 <= start <= end:
                raise BadInput(f"{name}_start must be from 1 to {name}_end = {end}, got {start}")
            if interval < 1:
                raise BadInput(f"{name}_interval must be at least 1 step, got {interval}")
            if inc < 1 and start < end:
                raise BadInput(f"{name}_inc must be at least 1 to grow from {start} to {end}, got {inc}")

    def at(self, step):
        """(dims, points) of the prompts at `step`, counted from 0."""
        return self._size("dims", step), self._size("points", step)

    def _size(self, what, step):
        start, end, inc, interval = self._ramp(what)
        return min(end, start + inc * (step // interval))

    def _ramp(self, what):
        return tuple(getattr(self, f"{what}_{part}") for part in ("start", "end", "inc", "interval"))

    def full_from(self):
        """The first step whose prompts have dims_end dims and points_end points."""
        return max(-(-(end - start) // max(1, inc)) * interval for start, end, inc, interval in map(self._ramp, RAMPS))


def adaptive_increment(start, end, steps, interval=INTERVAL, ratio=WARMUP_RATIO):
    """By how much dims grow every `interval` steps so that they are full within the first `ratio` of `steps`.

    The original's rule (`training_curriculum_adaptive_inc`): the smallest inc of at least 1 with
    start + inc * n >= end, where n = floor(ratio * steps / interval), at least 1. Points grow by twice as much. Raises
    BadInput for an interval below 1.
    """
    if interval < 1:
        raise BadInput(f"training_curriculum_dims_interval must be at least 1 step, got {interval}")
    raises = max(1, math.floor(ratio * steps / interval))
    return max(1, -(-(end - start) // raises))


def planned(cfg):
    """The Curriculum that the settings training_curriculum_* of train_ICL.py ask for, -1 being "work it out".

    Raises BadInput where two of them contradict each other, and for a task that has no curriculum and is given one.
    """
    if cfg.training_task in QUERY_TASKS:
        return _full_size(cfg)

    def ramp(what, full, start):
        def value(part, default=None):
            given = getattr(cfg, f"training_curriculum_{what}_{part}")
            return default if given == -1 and default is not None else given

        end = value("end", full)
        if end > full:
            raise BadInput(f"training_curriculum_{what}_end is {end}, a prompt has {full} {what}")
        sizes = dict(start=value("start", min(start, end)), end=end, inc=value("inc"), interval=value("interval"))
        return {f"{what}_{part}": size for part, size in sizes.items()}

    dims, points = ramp("dims", cfg.n_dims, DIMS_START), ramp("points", cfg.points, POINTS_START)
    inc = _dims_increment(cfg, dims)
    dims["dims_inc"] = inc if dims["dims_inc"] == -1 else dims["dims_inc"]
    points["points_inc"] = 2 * dims["dims_inc"] if points["points_inc"] == -1 else points["points_inc"]
    return Curriculum(**dims, **points)


def _dims_increment(cfg, dims):
    """What dims grow by where training_curriculum_dims_inc does not say it."""
    if not cfg.training_curriculum_adaptive_inc:
        return 1
    for what in RAMPS:
        if getattr(cfg, f"training_curriculum_{what}_inc") != -1:
            raise BadInput(
                f"training_curriculum_{what}_inc is given and training_curriculum_adaptive_inc would compute it; "
                "leave it out, or set --training_curriculum_adaptive_inc=False"
            )
    if cfg.training_curriculum_dims_interval != cfg.training_curriculum_points_interval:
        raise BadInput(
            f"training_curriculum_dims_interval {cfg.training_curriculum_dims_interval} and points_interval "
            f"{cfg.training_curriculum_points_interval} differ, adaptive growth has one interval; make them "
            "equal, or set --training_curriculum_adaptive_inc=False"
        )
    steps = cfg.max_iters if cfg.training_curriculum_steps == -1 else cfg.training_curriculum_steps
    return adaptive_increment(
        dims["dims_start"], dims["dims_end"], steps, cfg.training_curriculum_dims_interval,
        cfg.training_curriculum_warmup_ratio,
    )  # fmt: skip


def _full_size(cfg):
    """The curriculum of a task that has none; BadInput where a setting asks for one."""
    for what, part in itertools.product(RAMPS, ("start", "end")):
        if getattr(cfg, name := f"training_curriculum_{what}_{part}") != -1:
            raise BadInput(f"{cfg.training_task} has no curriculum; leave {name} out")
    return Curriculum(cfg.n_dims, cfg.n_dims, 0, 1, cfg.points, cfg.points, 0, 1)
