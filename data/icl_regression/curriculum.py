"""How many coordinates and points a training prompt has, as a pure function of the step."""

from dataclasses import dataclass

from training.errors import BadInput

DIMS_START, POINTS_START, INTERVAL = 4, 8, 2000
RAMP_PERCENT = 6  # the adaptive rule reaches the full size within this part of the steps


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
        for what in ("dims", "points"):
            start, end, inc, interval = self._ramp(what)
            name = f"training_curriculum_{what}"
            if not 1 <= start <= end:
                raise BadInput(f"{name}_start must be from 1 to {name}_end = {end}, got {start}")
            if interval < 1:
                raise BadInput(f"{name}_interval must be at least 1 step, got {interval}")
            if inc < 1 and start < end:
                raise BadInput(f"{name}_inc must be at least 1 to grow from {start} to {end}, got {inc}")

    @classmethod
    def adaptive(cls, n_dims, n_points, steps, interval=INTERVAL):
        """The curriculum of `training_curriculum_adaptive_inc`: full dims within the first 6% of `steps`.

        Dims go from 4 to n_dims by inc and points from 8 to n_points by 2 inc, both every `interval` steps, with inc
        the smallest integer such that 4 + inc * floor(0.06 * steps / interval) >= n_dims. A prompt smaller than the
        start begins at its full size. Raises BadInput if 6% of `steps` hold no interval and dims have to grow.
        """
        if interval < 1:
            raise BadInput(f"training_curriculum_dims_interval must be at least 1 step, got {interval}")
        dims_start = min(DIMS_START, n_dims)
        raises = RAMP_PERCENT * steps // (100 * interval)
        if raises == 0 and dims_start < n_dims:
            needed = -(-100 * interval // RAMP_PERCENT)
            raise BadInput(
                f"training_curriculum_adaptive_inc grows dims from {dims_start} to {n_dims} in the first "
                f"{RAMP_PERCENT}% of training, but {RAMP_PERCENT}% of {steps} steps is less than one interval of "
                f"{interval}; train for at least {needed} steps, or set training_curriculum_adaptive_inc=False and the "
                f"start, inc and interval of dims and points (start = end: no curriculum)"
            )
        inc = -(-(n_dims - dims_start) // max(1, raises))  # rounded up
        return cls(
            dims_start=dims_start, dims_end=n_dims, dims_inc=inc, dims_interval=interval,
            points_start=min(POINTS_START, n_points), points_end=n_points, points_inc=2 * inc, points_interval=interval,
        )  # fmt: skip

    def at(self, step):
        """(dims, points) of the prompts at `step`, counted from 0."""
        return self._size("dims", step), self._size("points", step)

    def _size(self, what, step):
        start, end, inc, interval = self._ramp(what)
        return min(end, start + inc * (step // interval))

    def _ramp(self, what):
        return tuple(getattr(self, f"{what}_{part}") for part in ("start", "end", "inc", "interval"))
