"""What simple methods reach on a prompt: the squared error of predicting y_i from the i examples before it.

Everything is float64. A regression on each of the n prefixes of a prompt would be n factorisations; one is enough. Let
L be lower triangular with L L^T = A A^T for the rows a_1, .., a_n of A. The minimum-norm w that fits the targets before
y_i misses y_i by L_ii z_i, where L z = y: row i of L holds a_i in the basis that orthogonalises a_1, .., a_i.
"""

import torch
from torch.linalg import qr, solve, solve_triangular

from training.errors import BadInput

NEIGHBOURS = 3
SHARPNESS = [2 ** (i / 4) for i in range(41)]  # 1 to 1024
CHUNK_NUMBERS = 2**21  # of the largest temporary: 16 MiB of float64


def baseline_errors(x, y, ridge_alpha=0.1):
    """Mean squared error over prompts, by number of examples seen: {name: float64 (points,)}.

    x: (B, points, n_dims) with variance 1/dims a coordinate, y: (B, points); every device, float32 or float64.
    Coordinates that are 0 in all of x are left out first, as a curriculum's dims. Entry i predicts y_i from
    (x_0, y_0) .. (x_{i-1}, y_{i-1}), entry 0 predicts 0. Classification targets are taken as numbers: a prediction is
    a real number and not a sign, and its cost is the squared distance to -1 or 1, as for the model.

    least_squares       the w of least norm among those of least squared error
    ridge               argmin_w |X w - y|^2 + ridge_alpha |w|^2; noise_std^2 is Bayes optimal for linear regression
    averaging           w = dims * mean of y_j x_j
    nearest_neighbours  mean of the y_j of the 3 nearest x_j (of all, while fewer)
    zero                0

    Raises BadInput unless ridge_alpha > 0 and the shapes agree.
    """
    if ridge_alpha <= 0:
        raise BadInput(f"ridge_alpha must be positive (0 is least_squares), got {ridge_alpha}")
    if x.ndim != 3 or x.shape[:2] != y.shape:
        raise BadInput(f"x must be (B, points, n_dims) and y (B, points), got {tuple(x.shape)} and {tuple(y.shape)}")
    B, points, _ = x.shape
    x = x[..., (x != 0).any(1).any(0)]
    chunk = max(1, CHUNK_NUMBERS // (points * (points + x.shape[2])))
    totals = {name: y.new_zeros(points, dtype=torch.float64) for name in BASELINES}
    for x_part, y_part in zip(x.split(chunk), y.split(chunk), strict=True):
        x_part, y_part = x_part.double(), y_part.double()
        for name, residuals in BASELINES.items():
            totals[name] += residuals(x_part, y_part, ridge_alpha).square().sum(0)
    return {name: total / B for name, total in totals.items()}


def _next_residuals(rows, targets):
    """Error on each target of the least-norm fit to those before it: rows (B, n, m) of rank n, targets (B, n)."""
    L = qr(rows.mT, mode="r").R.mT  # (B, n, n); its signs cancel in L_ii z_i
    z = solve_triangular(L, targets[..., None], upper=False).squeeze(-1)
    return L.diagonal(dim1=1, dim2=2) * z


def _least_squares(x, y, ridge_alpha):
    """Until there are n_dims examples the fit is exact; from then on it changes by what each example adds.

    Change variables from w to v = X_0 w, with X_0 the first n_dims rows: the squared error on those rows is then
    |v - y_0|^2, a ridge penalty around their targets y_0, and a later row x_i becomes u_i = X_0^-T x_i.
    """
    n_dims = x.shape[2]
    first = _next_residuals(x[:, :n_dims], y[:, :n_dims])
    if x.shape[1] <= n_dims:
        return first
    u = solve(x[:, :n_dims], x[:, n_dims:], left=False)  # (B, points - n_dims, n_dims)
    y_later = y[:, n_dims:] - (u @ y[:, :n_dims, None]).squeeze(-1)
    return torch.cat((first, _ridge(u, y_later, 1.0)), 1)


def _ridge(x, y, ridge_alpha):
    """Ridge is a least-norm fit with a variable of its own, weighted sqrt(alpha), for the error of each example."""
    own = ridge_alpha**0.5 * torch.eye(x.shape[1], dtype=x.dtype, device=x.device).expand(len(x), -1, -1)
    return _next_residuals(torch.cat((x, own), 2), y)


def _averaging(x, y, ridge_alpha):
    seen = torch.arange(x.shape[1], device=x.device).clamp(min=1)
    w = (y[..., None] * x).cumsum(1) - y[..., None] * x  # sum over the examples before
    return y - x.shape[2] * (w * x).sum(-1) / seen


def _nearest_neighbours(x, y, ridge_alpha):
    points = x.shape[1]
    later = torch.ones(points, points, dtype=torch.bool, device=x.device).triu()
    distance = torch.cdist(x, x).masked_fill(later, torch.inf)
    nearest = distance.topk(min(NEIGHBOURS, points), largest=False)
    found = nearest.values.isfinite()  # (B, points, 3)
    y_near = y[:, None].expand(-1, points, -1).gather(2, nearest.indices)
    return y - (y_near * found).sum(-1) / found.sum(-1).clamp(min=1)


def _zero(x, y, ridge_alpha):
    return y


BASELINES = {
    "least_squares": _least_squares,
    "ridge": _ridge,
    "averaging": _averaging,
    "nearest_neighbours": _nearest_neighbours,
    "zero": _zero,
}


def recall_errors(x, y):
    """Mean squared error over prompts on the query, which is the last point: {name: float64 (1,)}.

    x: (B, points, n_dims), y: (B, points) as noisy_recall makes them. Averaging and the kernel have the factor that is
    best on these very prompts, so no such method does better.

    nearest_neighbour   the y_i of the x_i nearest to the query
    softmax_kernel      sum_i softmax_i(sharpness x_i . query) y_i, the sharpness one of SHARPNESS
    averaging           factor sum_i (x_i . query) y_i
    zero                0
    """
    x, y = x.double(), y.double()
    seen, target = y[:, :-1], y[:, -1]
    similar = (x[:, :-1] @ x[:, -1, :, None]).squeeze(-1)  # (B, points - 1)
    total = (similar * seen).sum(1)
    predictions = {
        "nearest_neighbour": [seen.gather(1, similar.argmax(1, keepdim=True)).squeeze(1)],
        "softmax_kernel": [((sharp * similar).softmax(1) * seen).sum(1) for sharp in SHARPNESS],
        "averaging": [(total @ target) / (total @ total) * total],
        "zero": [torch.zeros_like(target)],
    }
    return {name: min((p - target).square().mean() for p in tried)[None] for name, tried in predictions.items()}
