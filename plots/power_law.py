"""Power laws through measured points, with the confidence interval of their exponent."""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares
from scipy.stats import t as student

CONFIDENCE = 0.95
FEWEST_WITH_OFFSET = 6  # points: below, AICc is not defined for three parameters and the noise
ROUNDING = 1e-12  # residuals of the logarithms below this say nothing


@dataclass(frozen=True)
class PowerLaw:
    """y = a x^-b + c with c >= 0, from n points; interval: the lowest and highest b of the 95% confidence interval."""

    a: float
    b: float
    c: float
    interval: tuple
    n: int

    def __call__(self, x):
        return self.a * np.asarray(x, float) ** -self.b + self.c

    def inverse(self, y):
        """The x at which the law is y > c."""
        return ((np.asarray(y, float) - self.c) / self.a) ** (-1 / self.b)

    @property
    def half_width(self):
        """b is known to this, up and down."""
        return (self.interval[1] - self.interval[0]) / 2

    def largest_deviation(self, x, y):
        """The largest |y / law - 1|."""
        return float(np.abs(np.asarray(y) / self(x) - 1).max())


def fit(x, y):
    """The PowerLaw of points x, y > 0, by least squares on log y: c = 0, unless a free c has the lower AICc.

    A free c is tried from 6 points on. The interval of b is that of linear regression, from Student's t with as many
    degrees of freedom as there are more points than parameters; with a free c the law is linearised at its best
    parameters for it. It takes the points to be independent and the law chosen to be true, so that the exponents of
    laws with and without c do not compare. Needs three points, and at least two different x.
    """
    u, v = np.log(np.asarray(x, float)), np.log(np.asarray(y, float))
    middle = u.mean()
    pure = without_offset(u - middle, v)
    best = pure
    if len(v) >= FEWEST_WITH_OFFSET:
        offset = with_offset(u - middle, v)
        best = offset if aicc(*offset) < aicc(*pure) else pure
    (height, b, *c), residuals, jacobian = best
    half = half_width(residuals, jacobian)
    a = float(np.exp(height + b * middle))
    return PowerLaw(a, float(b), float(c[0]) if c else 0.0, (float(b - half), float(b + half)), len(v))


def without_offset(u, v):
    """([log a, b], residuals, their Jacobian) of v = log a - b u by linear regression."""
    slope, height = np.polyfit(u, v, 1)
    return np.array([height, -slope]), height + slope * u - v, np.stack([np.ones_like(u), -u], 1)


def with_offset(u, v):
    """([log a, b, c], residuals, their Jacobian) of v = log(a e^(-b u) + c), c >= 0; the best of three starts."""

    def residuals(p):
        return np.log(np.exp(p[0] - p[1] * u) + p[2]) - v

    def jacobian(p):
        power = np.exp(p[0] - p[1] * u)
        return np.stack([power, -u * power, np.ones_like(u)], 1) / (power + p[2])[:, None]

    fits = []
    for part in (0.1, 0.5, 0.9):  # of the lowest y, which c is below or not far above
        c = part * np.exp(v.min())
        (height, b), *_ = without_offset(u, np.log(np.exp(v) - c))
        bounds = [-np.inf, -np.inf, 0], np.inf
        tight = dict(xtol=1e-14, ftol=1e-14, gtol=1e-14)
        fits.append(least_squares(residuals, (height, b, c), jacobian, bounds, x_scale="jac", **tight))
    best = min(fits, key=lambda found: found.cost)
    return best.x, best.fun, best.jac


def aicc(parameters, residuals, jacobian):
    """Akaike's criterion with the correction for few points; the noise's variance counts as a parameter."""
    n, k = len(residuals), len(parameters) + 1
    variance = max(np.mean(residuals**2), ROUNDING**2)
    return n * np.log(variance) + 2 * k + 2 * k * (k + 1) / (n - k - 1)


def half_width(residuals, jacobian):
    """Half of the confidence interval of the second parameter: what of its column the others do not explain counts."""
    free = len(residuals) - jacobian.shape[1]
    column, others = jacobian[:, 1], np.delete(jacobian, 1, axis=1)
    left = column - others @ np.linalg.lstsq(others, column)[0]
    error = np.sqrt(residuals @ residuals / free / (left @ left))
    return student.ppf((1 + CONFIDENCE) / 2, free) * error
