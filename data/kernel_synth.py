"""Synthetic series: draws from Gaussian processes whose kernels are random sums and products of a bank's.

KernelSynth of Ansari et al., "Chronos: Learning the Language of Time Series" (arXiv 2403.07815), section 4.2, with the
bank of its released code: periods of hours, days, weeks, months, quarters and years, in steps of the series; the other
kernels on times from 0 to 1.
"""

import functools

import numpy as np

PERIODS = (24, 48, 96, 168, 336, 672, 7, 14, 30, 60, 365, 730, 4, 26, 52, 4, 6, 12, 4, 40, 10)
MOST_KERNELS = 5
JITTER = 1e-8  # of the mean variance, so that rounding leaves no negative eigenvalue; float64 needs about 1e-12


def periodic(steps):
    return lambda d, s, t: np.exp(-2 * np.sin(np.pi * d * len(d) / steps) ** 2)


def rbf(scale):
    return lambda d, s, t: np.exp(-0.5 * (d / scale) ** 2)


def rational_quadratic(alpha):
    return lambda d, s, t: (1 + d**2 / (2 * alpha)) ** -alpha


def linear(offset):
    return lambda d, s, t: offset**2 + s * t


def white(variance):
    return lambda d, s, t: variance * (d == 0)


def constant(d, s, t):
    return np.ones_like(d)


BANK = [  # functions of a difference in time and of both times, (n, n), (n, 1) and (n,)
    *map(periodic, PERIODS),
    *map(linear, (0.0, 1.0, 10.0)),
    *map(rbf, (0.1, 1.0, 10.0)),
    *map(rational_quadratic, (0.1, 1.0, 10.0)),
    *map(white, (0.1, 1.0)),
    constant,
]


def kernel_synth(seed, index, length):
    """Series number `index` of a seed, (length,) float64, length from 2 on: 1 to 5 kernels, added or multiplied."""
    rng = np.random.Generator(np.random.Philox(key=[seed, 1], counter=[0, 0, 0, index]))
    t = np.linspace(0, 1, length)
    d = t[:, None] - t
    kernels = [BANK[i](d, t[:, None], t) for i in rng.integers(len(BANK), size=rng.integers(1, MOST_KERNELS + 1))]
    covariance = functools.reduce(lambda a, b: a + b if rng.random() < 0.5 else a * b, kernels)
    covariance[np.diag_indices(length)] += JITTER * np.trace(covariance) / length
    return np.linalg.cholesky(covariance) @ rng.standard_normal(length)
