"""Where tokens are, as their queries and keys tell it: rotary embeddings and ALiBi, in front of every path.

`position` of a ScoringConfig is "learned" (a vector for each position, which model.Trunk adds to the tokens'), "none"
(nothing but the causal mask says where a token is), "rope" or "alibi". The last two change queries and keys, which then
meet as ever: paths, fused kernels and caches compute them as they are, and a cache keeps keys that know where they are.

Their constants are tensors of no checkpoint. They follow the module to its device, in float32 at least.
"""

import math

import torch
from torch import nn

from structured.errors import BadInput

POSITIONS = ("learned", "none", "rope", "alibi")
BASE = 10_000  # of the rotary frequencies
COLUMNS = 4  # features that ALiBi adds to the queries and keys of a slice
NEAR = 256  # positions that a number of 8 significant bits, bfloat16's, tells apart
ALIBI_UP_TO = NEAR**2  # positions


def check_position(cfg, structures):
    """Raise BadInput for a position that there is not, or that the scoring function cannot have."""
    name, structure = cfg.position, structures[cfg.structure]
    if name not in POSITIONS:
        raise BadInput(f"no position '{name}', there are {', '.join(POSITIONS)}")
    if name not in structure.POSITIONS:
        others = ", ".join(other for other, scoring in structures.items() if name in scoring.POSITIONS)
        raise BadInput(f"position {name} is for {others}; {cfg.structure} takes {', '.join(structure.POSITIONS)}")
    if name == "rope":
        _check_pairs(structure.slices(cfg))
    if name == "alibi":
        if cfg.link != "softmax":
            raise BadInput(f"position alibi is a bias in front of a softmax, link_function is {cfg.link}")
        if not cfg.causal:
            raise BadInput("position alibi is for causal models, where keys are never ahead of the query")
        if cfg.block_size > ALIBI_UP_TO:
            raise BadInput(f"position alibi is exact up to {ALIBI_UP_TO} positions, block_size is {cfg.block_size}")


def _check_pairs(slices):
    """Raise BadInput for slices that rotary embeddings cannot turn: they take features in pairs."""
    odd = [i for i, r in enumerate(slices) if r % 2]
    if not odd:
        return
    if len(slices) == 1:
        r = slices[0]
        near = " or ".join(str(n) for n in (r - 1, r + 1) if n)
        raise BadInput(f"position rope turns pairs of features, the queries of a head have {r}; {near} would do")
    even = list(slices)
    for n, i in enumerate(odd):
        first = slices[odd[n - n % 2]]  # one of each two gives a feature to the other, and not its only one
        even[i] += -1 if (n % 2 == 0) == (first > 1) else 1
    near = f"; {'|'.join(map(str, even))} would do" if sum(even) == sum(slices) else ""
    raise BadInput(f"position rope turns pairs of features, rank {slices[odd[0]]} of {tuple(slices)} is odd{near}")


class Constants(nn.Module):
    """A module without weights whose tensors are made anew where it is moved to.

    They are no buffers: those would be sent from process to process in every step, and rounded with the weights.
    """

    def __init__(self):
        super().__init__()
        self.like = torch.empty(0)

    def make(self):
        """Make the tensors, on the device of `like` and in `dtype`."""
        raise NotImplementedError

    @property
    def dtype(self):
        return torch.promote_types(self.like.dtype, torch.float32)

    def placed(self, values):
        """float64 values, which not every device has, made on the CPU, as a tensor of this module."""
        return values.to(self.dtype).to(self.like.device)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.like = fn(self.like)
        self.make()
        return self


class Rotary(Constants):
    """Rotary embeddings (Su et al., 2021): pair i of a slice of r features turns by 10000^(-2 i / r) a position.

    Features 2 i and 2 i + 1 are a pair. slices: the widths of features that are scored on their own, the levels' ranks
    in MLR attention: in each, scores depend on the distance of two tokens alone. length: positions. Computed in float32
    at least from angles in float64, then rounded to the dtype of queries and keys. It has no products of matrices, and
    costs count none.
    """

    def __init__(self, slices, length):
        super().__init__()
        self.slices, self.length = tuple(slices), length
        self.make()

    def make(self):
        if self.like.is_meta:
            self.turns = torch.empty(2, self.length, sum(self.slices) // 2, device="meta", dtype=self.dtype)
            return
        options = dict(dtype=torch.float64, device="cpu")
        speeds = torch.cat([BASE ** (-torch.arange(0, r, 2, **options) / r) for r in self.slices if r])
        angles = torch.arange(self.length, **options)[:, None] * speeds
        self.turns = self.placed(torch.stack([angles.cos(), angles.sin()]))  # (2, length, width / 2)

    def forward(self, q, k, at=None):
        """q, k: (B, heads, T, width) at the positions 0 to T - 1, or `at` (T,)."""
        cos, sin = self.turns[:, : q.shape[2]] if at is None else self.turns.index_select(1, at)
        return _turned(q, cos, sin), _turned(k, cos, sin)


def _turned(x, cos, sin):
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


def slopes(n_head):
    """ALiBi's slope of every head: the powers 2^(-8 h / n_head) where n_head is a power of two.

    For other numbers the slopes of the power of two below, then every other slope of the power of two above.
    """
    below = 2 ** int(math.log2(n_head))
    between = [2 ** (-4 * h / below) for h in range(1, 2 * below, 2)]
    return [2 ** (-8 * h / below) for h in range(1, below + 1)] + between[: n_head - below]


class ALiBi(Constants):
    """ALiBi (Press, Smith and Lewis, 2022): the score of i and j less slope_h (i - j), as COLUMNS further features.

    A path that multiplies the products of a slice by `scale`, a power of two, adds the bias with

        the slope's first 8 bits  times  256 (j // 256)
        the slope's first 8 bits  times  j % 256
        the rest of the slope     times  j
        -slope i                  times  1

    What is wrong in the last product is wrong for a whole row, and drops out of its softmax; it is there to keep the
    sums small. The others are exact in float32 and float64; their sums round as any do, by 2^-24 slope j in float32 at
    most. In 16 bits the first two are exact, up to 65536 positions, and the third is off by 2^-8 of itself. So there
    the bias is exact for up to 8 heads, whose slopes are powers of two, and off by 2^-17 slope j at most for more.

    In front of each of the `slices` stand these columns, so that in MLR attention every level can have its own.
    Queries are multiplied by `factor`. The products of these columns are not counted as the model's.
    """

    def __init__(self, n_head, slices, scale, factor=1.0):
        super().__init__()
        self.slopes, self.slices, self.scale, self.factor = slopes(n_head), tuple(slices), scale, factor
        self.make()

    def make(self):
        slope = torch.tensor(self.slopes, dtype=torch.float64, device="cpu")
        first = slope.bfloat16().double()
        parts = [first / self.scale, first / self.scale, NEAR * (slope - first) / self.scale, -slope]
        self.parts = self.placed(torch.stack(parts, -1).unsqueeze(1))  # (n_head, 1, COLUMNS)

    @property
    def width(self):
        """Features added to a head."""
        return COLUMNS * len(self.slices)

    def forward(self, q, k, at=None):
        """q, k: (B, heads, T, width) at the positions 0 to T - 1, or `at` (T,) -> as many heads, self.width wider."""
        at = torch.arange(q.shape[2], device=q.device) if at is None else at
        i, one = at.to(self.parts.dtype), torch.ones_like(at, dtype=self.parts.dtype)
        near = at % NEAR
        of_queries = self.parts * torch.stack([one, one, one, i], -1)  # (H, T, COLUMNS)
        of_keys = torch.stack([(at - near).to(i), near.to(i), i / NEAR, one / self.scale], -1)  # (T, COLUMNS)
        q = q if self.factor == 1 else q * self.factor
        return self._beside(of_queries, q), self._beside(of_keys, k)

    def _beside(self, columns, x):
        columns = columns.to(x.dtype).expand(*x.shape[:3], -1)
        return torch.cat([part for x_l in x.split(self.slices, -1) for part in (columns, x_l)], -1)


def power_of_two(number):
    """The nearest power of two, by ratio."""
    return 2.0 ** round(math.log2(number))
