"""The five regression tasks of Garg et al. (2022), each one function from the inputs of a prompt to its targets.
And recall, whose prompt ends in a query: one function from the inputs to the prompt.

A task is called as task(x, dims, seed, examples, **options). x: float32 (B, points, n_dims), N(0, 1/dims) on the first
`dims` coordinates and 0 on the others. It draws its own parameters from streams keyed by (seed, example, purpose) and
returns y, float32 (B, points), scaled so that E[y^2] = 1: predicting zero costs 1 on every task.
"""

from enum import IntEnum

import torch
from torch.nn.functional import normalize

from data.icl_regression.philox import bits, normal
from training.errors import BadInput


class Purpose(IntEnum):
    """What a stream of random numbers is for. The numbers are part of the data: changing one changes every prompt."""

    X = 0
    NOISE = 1
    ORDER = 2  # of the pool's examples
    WEIGHTS = 3  # of a linear map or of a hidden layer
    VALUES = 4  # output weights of a network, leaves of a tree
    COORDINATES = 5  # which inputs a task looks at
    ROTATION = 6  # of a shift's directions
    ORTHANT = 7  # of the examples' inputs
    SHIFT_NOISE = 8  # on the targets of noisy_labels
    REPEATED = 9  # which example the query repeats
    RECALLED = 10  # which pair noisy_recall asks for


def _matmul(a, b):
    """a @ b in float64, rounded to float32: targets must not feel TF32, autocast or the batch size's order of sums."""
    return (a.double() @ b.double()).float()


def _linear(x, w):
    """w . x of every point: x (B, points, n_dims), w (B, n_dims) -> (B, points)."""
    return _matmul(x, w[..., None]).squeeze(-1)


def linear_regression(x, dims, seed, examples):
    """y = w . x with w ~ N(0, I)."""
    return _linear(x, normal(seed, examples, Purpose.WEIGHTS, x.shape[2:]))


def sparse_linear_regression(x, dims, seed, examples, sparsity=3):
    """y = sqrt(dims/k) w . x with w ~ N(0, 1) on k = min(sparsity, dims) random ones of the first `dims` coordinates.

    w is 0 elsewhere. The coordinates are those with the k smallest of `dims` random words.
    """
    k = min(sparsity, dims)
    chosen = bits(seed, examples, Purpose.COORDINATES, dims).argsort(dim=1, stable=True)[:, :k]
    w = normal(seed, examples, Purpose.WEIGHTS, x.shape[2:])
    sparse = torch.zeros_like(w).scatter(1, chosen, w.gather(1, chosen))
    return _linear(x, sparse * (dims / k) ** 0.5)


def linear_classification(x, dims, seed, examples):
    """y = sign(w . x) in {-1, 1} with w ~ N(0, I)."""
    score = _linear(x, normal(seed, examples, Purpose.WEIGHTS, x.shape[2:]))
    return 2 * (score >= 0).float() - 1


def relu_2nn_regression(x, dims, seed, examples, hidden=100):
    """y = sqrt(2/hidden) a . relu(W x) with W (hidden, n_dims) and a (hidden,) standard normal.

    A unit's input has variance 1 and half of its second moment survives the ReLU, hence the 2.
    """
    w = normal(seed, examples, Purpose.WEIGHTS, (hidden, x.shape[2]))
    a = normal(seed, examples, Purpose.VALUES, (hidden,))
    return _linear(_matmul(x, w.mT).relu(), a * (2 / hidden) ** 0.5)


def decision_tree(x, dims, seed, examples, depth=4):
    """y = the N(0, 1) value of the leaf that x reaches in a full binary tree of `depth` decisions.

    Every inner node looks at one random coordinate of the first `dims` and goes right if it is positive. Nodes are
    numbered as in a heap: the children of node n are 2n + 1 (left) and 2n + 2.
    """
    n_inner = 2**depth - 1
    # word * dims / 2^32, rounded down: uniform on 0 .. dims - 1 up to dims / 2^32
    coordinate = bits(seed, examples, Purpose.COORDINATES, n_inner) * dims >> 32  # (B, n_inner)
    leaves = normal(seed, examples, Purpose.VALUES, (n_inner + 1,))
    node = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device)
    for _ in range(depth):
        at = coordinate.gather(1, node)  # (B, points)
        right = x.gather(2, at[..., None]).squeeze(-1) > 0
        node = 2 * node + 1 + right
    return leaves.gather(1, node - n_inner)


TASKS = {
    "linear_regression": linear_regression,
    "sparse_linear_regression": sparse_linear_regression,
    "linear_classification": linear_classification,
    "relu_2nn_regression": relu_2nn_regression,
    "decision_tree": decision_tree,
}


def noisy_recall(x, dims, seed, examples, query_noise=0.7):
    """Pairs (x_i, y_i), then a query near one of the x_i, whose y is asked for: x and y of the prompt, the query last.

    The x_i are the points of x but for the last, brought to the unit sphere; y_i ~ N(0, 1). The query is x_j +
    query_noise e, brought to the sphere as well, with j uniform and e ~ N(0, I/dims) the last point of x; its target is
    y_j. To find x_j a head has to compare all of it: this is the nearest-neighbour task for which Amsel, Yehudai and
    Bruna (2024) show that attention needs heads as wide as the input. The pairs of a shorter prompt begin a longer one,
    the query does not. Raises BadInput for fewer than 2 points.
    """
    B, points, n_dims = x.shape
    if points < 2:
        raise BadInput(f"noisy_recall has at least 2 points, a pair and the query, got {points}")
    x = x.double()
    keys, noise = normalize(x[:, :-1], dim=2), x[:, -1:]
    y = normal(seed, examples, Purpose.VALUES, (points - 1,))
    j = bits(seed, examples, Purpose.RECALLED, 1) * (points - 1) >> 32  # (B, 1)
    asked = keys.gather(1, j[..., None].expand(B, 1, n_dims))
    query = normalize(asked + query_noise * noise, dim=2)
    return torch.cat((keys, query), 1).float(), torch.cat((y, y.gather(1, j)), 1)


QUERY_TASKS = {"noisy_recall": noisy_recall}  # whose prompt ends in a query, the one point predicted
