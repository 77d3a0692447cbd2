"""The matrix families of the paper, all of them one: Multi-Level Block Tensor Contraction, MLBTC (DESIGN 5).

    M = sum_l  alpha_l  P_L ( blockdiag L_{l,k'} ) P_R ( blockdiag R_{l,k}^T )

A level is a chain of block-diagonal factors and fixed permutations, written as `Blocks` and `Transpose` steps; a
family is nothing but its levels. `MLBTC` multiplies any of them with one batched matmul a factor, for one matrix or
for the matrices of several heads that read the same input.

The constructors are `dense, low_rank, block_low_rank, mlr, btt, monarch, kronecker, butterfly`, by name in FAMILIES.
"""

import math
from typing import NamedTuple

import torch
from torch import nn

from structured.errors import BadInput
from structured.layers import BlockDiagonal, multiply


class Blocks(NamedTuple):
    """A block-diagonal factor: `blocks` matrices of d_in -> d_out; `shared` ones are all the same matrix."""

    blocks: int
    d_in: int
    d_out: int
    shared: bool = False


class Transpose(NamedTuple):
    """A fixed permutation: features seen as a (batch, p, q, s) grid, p and q exchanged."""

    batch: int
    p: int
    q: int
    s: int


class MLBTC(nn.Module):
    """A structured matrix M of shape (n_out, n_in), or one for each of `n_head` heads that share their input.

    levels: chains of `Blocks` and `Transpose`, as `level` makes them. alphas: one factor a level, 1 by default.
    norm_cap: use every factor with its norm capped (DESIGN 4). Factors start as N(0, 1 / contracted size).

    forward: x (..., n_in) -> M x of shape (..., n_out), or (..., n_head, n_out) if n_head is given.
    num_params: numbers stored. flops: for one input vector, factor by factor, 2 per multiply-add.
    """

    def __init__(self, n_in, n_out, levels, *, alphas=None, n_head=None, norm_cap=False):
        super().__init__()
        self.n_in, self.n_out, self.n_head = n_in, n_out, n_head
        self.alphas = (1.0,) * len(levels) if alphas is None else tuple(map(float, alphas))
        if len(self.alphas) != len(levels):
            raise BadInput(f"{len(self.alphas)} alphas for {len(levels)} levels")

        def module(i, step):
            if isinstance(step, Transpose):
                return GridTranspose(step)
            blocks, d_in, d_out, shared = step
            heads = dict(n_head=n_head or 1, fan_out=i == 0)
            return BlockDiagonal(blocks, d_in, d_out, **heads, shared=shared, norm_cap=norm_cap)

        self.levels = nn.ModuleList(nn.Sequential(*(module(i, s) for i, s in enumerate(chain))) for chain in levels)

    def forward(self, x):
        if x.shape[-1] != self.n_in:
            raise BadInput(f"the input has {x.shape[-1]} features, the matrix takes {self.n_in}")
        y = multiply(self._contract, x.reshape(-1, self.n_in))
        heads = () if self.n_head is None else (self.n_head,)
        return y.reshape(*x.shape[:-1], *heads, self.n_out)

    def dense(self):
        """The matrix itself: (n_out, n_in), or (n_head, n_out, n_in)."""
        weight = next(self.parameters())
        columns = self._contract(torch.eye(self.n_in, dtype=weight.dtype, device=weight.device)).movedim(0, -1)
        return columns[0] if self.n_head is None else columns

    def _contract(self, x):
        """M x factor by factor: (N, n_in) -> (N, n_head, n_out)."""
        y = 0
        for alpha, chain in zip(self.alphas, self.levels, strict=True):
            y = y + alpha * chain(x.unsqueeze(1)).flatten(2)
        return y

    @property
    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    @property
    def macs(self):
        return sum(m.macs for m in self.modules() if isinstance(m, BlockDiagonal))

    @property
    def flops(self):
        return 2 * self.macs


class GridTranspose(nn.Module):
    """The permutation of a `Transpose`, on the features of (N, n_head, ...); a view, no copy."""

    def __init__(self, grid):
        super().__init__()
        self.grid = grid

    def forward(self, x):
        return x.reshape(*x.shape[:2], *self.grid).transpose(3, 4)

    def extra_repr(self):
        return "batch {}, {} x {}, {} each".format(*self.grid)


def level(n_in, n_out, p, p_out, inner, stride=False, shared=False):
    """The chain of one level: p blocks n_in/p -> inner, then p_out blocks p*inner/p_out -> n_out/p_out.

    `stride` makes P_R the grid transpose (p, p_out, s) -> (p_out, p, s), s = inner / p_out, and P_L the transpose
    (p_out, a) -> (a, p_out), a = n_out / p_out. Without it both are the identity.
    """
    for blocks, size, of in [(p, n_in, "input features"), (p_out, n_out, "output features"),
                             (p_out, inner if stride else p * inner, "inner features")]:  # fmt: skip
        if blocks < 1 or size < 1 or size % blocks:
            raise BadInput(f"level {p}:{p_out}:{inner}: {size} {of} do not split into {blocks} equal blocks")
    a, middle = n_out // p_out, p * inner // p_out
    right, left = Blocks(p, n_in // p, inner, shared), Blocks(p_out, middle, a, shared)
    if not stride:
        return right, left
    return right, Transpose(1, p, p_out, inner // p_out), left, Transpose(1, p_out, a, 1)


def split_near_sqrt(n, *, above=False):
    """(n / b, b), b the smallest divisor of n that is at least sqrt(n), or is above it: 64 gives (8, 8), or (4, 16)."""
    first = math.isqrt(n) + 1 if above else math.isqrt(n - 1) + 1
    b = next((b for b in range(first, n + 1) if n % b == 0), n)
    return n // b, b


class LowRank(MLBTC):
    """L R^T of rank `rank`: one level of one block. What a head of standard attention is."""

    def __init__(self, n_in, n_out, rank, **options):
        super().__init__(n_in, n_out, [level(n_in, n_out, 1, 1, rank)], **options)


class MLR(MLBTC):
    """Multi-Level Low Rank: level l is block-diagonal with 2^(l-1) blocks of rank ranks[l]; 0 leaves a level out."""

    def __init__(self, n_in, n_out, ranks, **options):
        levels = [level(n_in, n_out, 2**i, 2**i, r) for i, r in enumerate(ranks) if r]
        if not levels:
            raise BadInput(f"ranks {tuple(ranks)}: at least one level needs a rank above 0")
        super().__init__(n_in, n_out, levels, **options)


class BTT(MLBTC):
    """Block Tensor-Train of tt-rank `rank`: n_in = c d, n_out = a b, c blocks d -> b s, then b blocks c s -> a.

    d and b are the smallest divisors of n_in and n_out above their square roots, as in the paper's code (DESIGN 4).
    """

    def __init__(self, n_in, n_out, rank, **options):
        (c, _), (_, b) = split_near_sqrt(n_in, above=True), split_near_sqrt(n_out, above=True)
        super().__init__(n_in, n_out, [level(n_in, n_out, c, b, b * rank, stride=True)], **options)
        self.rank = rank


def dense(n_in, n_out, **options):
    """One unconstrained matrix: one level of one block of inner size n_in whose right factor is the identity."""
    return MLBTC(n_in, n_out, [(Blocks(1, n_in, n_out),)], **options)


def block_low_rank(n_in, n_out, blocks, rank, **options):
    """blockdiag_k(L_k R_k^T): `blocks` blocks, each of rank `rank`."""
    return MLBTC(n_in, n_out, [level(n_in, n_out, blocks, blocks, rank)], **options)


def monarch(n, **options):
    """Monarch of size n: a block tensor-train of tt-rank 1 whose blocks are square, sqrt(n) of them where n is one."""
    c, b = split_near_sqrt(n)
    return MLBTC(n, n, [level(n, n, c, b, b, stride=True)], **options)


def kronecker(shape_a, shape_b, **options):
    """A (x) B with A (a, c) and B (b, d), of shape (a b, c d): every R block is B, every L block is A."""
    (a, c), (b, d) = shape_a, shape_b
    return MLBTC(c * d, a * b, [level(c * d, a * b, c, b, b, stride=True, shared=True)], **options)


def butterfly(n, **options):
    """Butterfly of size n = 2^k: a Monarch whose blocks are butterflies, down to k factors of 2 x 2 blocks."""
    if n < 2 or n & (n - 1):
        raise BadInput(f"the size of a butterfly is a power of two from 2 on, not {n}")

    def chain(n, batch):
        if n == 2:
            return (Blocks(batch, 2, 2),)
        c = 1 << (n.bit_length() - 1) // 2
        d = n // c
        return (*chain(d, batch * c), Transpose(batch, c, d, 1), *chain(c, batch * d), Transpose(batch, d, c, 1))

    return MLBTC(n, n, [chain(n, 1)], **options)


low_rank, mlr, btt = LowRank, MLR, BTT
FAMILIES = dict(
    dense=dense, low_rank=low_rank, block_low_rank=block_low_rank, mlr=mlr,
    btt=btt, monarch=monarch, kronecker=kronecker, butterfly=butterfly,
)  # fmt: skip
