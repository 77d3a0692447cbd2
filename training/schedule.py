"""The learning rate as a pure function of the step."""

import math


def lr_factor(step, warmup, total=None, floor=1.0):
    """Share of the peak learning rate at a step: linear rise over `warmup` steps, then constant.

    With floor < 1, a cosine from 1 down to `floor` at step `total`, and `floor` after it.
    """
    if step < warmup:
        return (step + 1) / warmup
    if floor == 1.0:
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
