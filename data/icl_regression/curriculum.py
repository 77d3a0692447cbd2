"""How many coordinates and points a training prompt has, as a pure function of the step."""

import math
from dataclasses import dataclass

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
