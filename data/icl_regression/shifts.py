"""Prompts unlike those of training: the distribution shifts of Garg et al. (2022), section 4, each one function.

A prompt here is `seen` examples and one query, with the x and the hidden function of the evaluation set. A shift
changes x before the targets are computed, or the targets after it. What it draws comes from streams of its own, keyed
by the prompt's number: a shifted prompt is a function of (number, seen) alone, and more examples begin with the same
ones. Geometry is float64, the result float32.
"""

import difflib
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from data.icl_regression.philox import normal
from data.icl_regression.sampler import EVALUATION_BIT, EVALUATION_SEED, evaluation_prompts
from data.icl_regression.tasks import TASKS, Purpose
from training.errors import BadInput


@dataclass(frozen=True)
class Shift:
    """What changes: inputs(x, draw) -> x, float64 (B, seen + 1, n_dims), the query last; targets(y, n_dims, draw) -> y.

    draw(purpose, shape): standard normal (B, *shape) from the prompts' own streams.
    """

    inputs: Callable = lambda x, draw: x
    targets: Callable | None = None
    below_n_dims: bool = False  # whether there must be fewer examples than dimensions


def shifted_prompts(shift, task, first, count, n_dims, seen, noise_std=0.0, *, device=None, **options):
    """Prompts first .. first + count - 1 of the evaluation set, shifted.

    Returns x (count, seen + 1, n_dims) and y (count, seen + 1), float32, the query last. shift: a name in SHIFTS;
    "none" gives `evaluation_prompts`, whose arguments the others are. Raises BadInput as that does, and for what
    `check_shift` refuses.
    """
    check_shift(shift, task, n_dims, seen)
    shift, points = SHIFTS[shift], seen + 1
    x, _ = evaluation_prompts(task, first, count, n_dims, points, noise_std=noise_std, device=device, **options)
    examples, key = torch.arange(first, first + count, device=device), EVALUATION_SEED + EVALUATION_BIT
    draw = functools.partial(normal, key, examples)
    x = shift.inputs(x.double(), lambda *what: draw(*what).double()).float()
    y = TASKS[task](x, n_dims, key, examples, **options)
    if noise_std > 0:
        y = y + noise_std * draw(Purpose.NOISE, (points,))
    return x, y if shift.targets is None else shift.targets(y, n_dims, draw)


def check_shift(shift, task, n_dims, seen):
    """Raises BadInput for an unknown shift or task, too many examples for it, or new targets for labels."""
    if task not in TASKS:
        raise BadInput(f"{task} has no shifts, they are those of Garg et al.'s regressions: {', '.join(TASKS)}")
    if shift not in SHIFTS:
        near = difflib.get_close_matches(shift, SHIFTS, n=1)
        raise BadInput(f"no shift '{shift}'" + (f", did you mean '{near[0]}'?" if near else f"; there are {[*SHIFTS]}"))
    if seen < 0:
        raise BadInput(f"a prompt has at least 0 examples, got {seen}")
    if SHIFTS[shift].below_n_dims and seen >= n_dims:
        raise BadInput(f"{shift} needs fewer examples than n_dims = {n_dims}, got {seen}: they span the whole space")
    if SHIFTS[shift].targets and task == "linear_classification":
        raise BadInput(f"linear_classification has the labels -1 and 1, {shift} would change them")


def stretch(x, factors, draw):
    """x (B, points, n) times factors (n,) along random orthogonal directions, scaled so that E|x|^2 stays the same."""
    n = len(factors)
    directions = torch.linalg.qr(draw(Purpose.ROTATION, (n, n))).Q  # columns, uniform up to their signs
    factors = factors * (n / factors.square().sum()).sqrt()
    return x @ directions * factors @ directions.mT


def half_subspace(x, draw):
    """Inputs from a random subspace of half the dimensions, rounded down but at least one."""
    n = x.shape[2]
    return stretch(x, (torch.arange(n, device=x.device) < max(1, n // 2)).double(), draw)


def skewed_covariance(x, draw):
    """Inputs whose covariance has eigenvalues proportional to 1/i^2, along random directions."""
    return stretch(x, 1 / torch.arange(1, x.shape[2] + 1, dtype=x.dtype, device=x.device), draw)


def orthants(x, draw):
    """All examples from one random orthant, the query from another, drawn apart from it."""
    signs = torch.where(draw(Purpose.ORTHANT, (1, x.shape[2])) < 0, -1.0, 1.0)
    return torch.cat((x[:, :-1].abs() * signs, x[:, -1:]), 1)


def orthogonal_query(x, draw):
    """The query orthogonal to all examples, of the length it had: they say nothing about its target."""
    examples, query = x[:, :-1], x[:, -1:]
    basis = torch.linalg.qr(examples.mT).Q  # (B, n_dims, seen)
    rest = query - query @ basis @ basis.mT
    return torch.cat((examples, rest * (query.norm(dim=2) / rest.norm(dim=2))[..., None]), 1)


def repeated_query(x, draw):
    """The query one of the examples, drawn anew for every prompt and number of examples; without any, as it was."""
    seen = x.shape[1] - 1
    if seen == 0:
        return x
    chosen = draw(Purpose.REPEATED, (seen,)).argmax(1)
    return torch.cat((x[:, :-1], x[torch.arange(len(x), device=x.device), chosen][:, None]), 1)


def scaled(factor):
    """Inputs times a factor."""
    return Shift(lambda x, draw: factor * x)


def noisy_labels(y, n_dims, draw):
    """Noise of standard deviation 1 where w . x has variance n_dims, as in Garg et al.; E[y^2] stays 1, as there."""
    return (y + n_dims**-0.5 * draw(Purpose.SHIFT_NOISE, (y.shape[1],))) * (1 + 1 / n_dims) ** -0.5


SHIFTS = {
    "none": Shift(),
    "half_subspace": Shift(half_subspace),
    "skewed_covariance": Shift(skewed_covariance),
    "noisy_labels": Shift(targets=noisy_labels),
    "scale_1/3": scaled(1 / 3),
    "scale_1/2": scaled(1 / 2),
    "scale_2": scaled(2),
    "scale_3": scaled(3),
    "orthants": Shift(orthants),
    "orthogonal_query": Shift(orthogonal_query, below_n_dims=True),
    "repeated_query": Shift(repeated_query),
}
