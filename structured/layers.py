"""Weights that know their role: what maximal update parametrization has to be told about a matrix (DESIGN 6).

A layer states `role` ("embedding", "hidden" or "output") and `fan_in`, the size one output contracts over.
`training/mup.py` turns the two into an initial standard deviation and a learning rate. `macs` is the number of
multiply-adds for one token.
"""

import torch
import torch.nn.functional as F
from torch import nn

from structured import transforms

ASSEMBLE_UP_TO = 256  # columns; the gain falls from 4 times at 16 columns to 1.5 at 512, and the extra FLOPs grow


class Linear(nn.Linear):
    """A dense layer with a role. Weight (d_out, d_in) as in PyTorch."""

    def __init__(self, d_in, d_out, *, role, bias=False):
        super().__init__(d_in, d_out, bias=bias)
        self.role = role

    @property
    def fan_in(self):
        return self.in_features

    @property
    def macs(self):
        return self.in_features * self.out_features


def side_by_side(x, *linears):
    """The outputs of several layers on one input, (.., sum of their d_out), as one product."""
    weight, bias = torch.cat([linear.weight for linear in linears]), None
    if any(linear.bias is not None for linear in linears):
        zeros = weight.new_zeros
        bias = torch.cat([zeros(each.out_features) if each.bias is None else each.bias for each in linears])
    return F.linear(x, weight, bias)


class BlockDiagonal(nn.Module):
    """Block-diagonal matrices of `n_head` heads: chunk k of a head's features times that head's k-th block.

    x: (N, 1 or n_head, ...) with blocks * d_in features a head in any shape -> (N, n_head, blocks, d_out).
    With `fan_out` all heads read one input (N, 1, ...) and the weight is (blocks, d_in, n_head * d_out): one product
    for all heads. Otherwise each head has its own input and the weight is (n_head * blocks, d_in, d_out).
    With `shared` every block of a head is the same matrix (a Kronecker factor), stored once.
    With `norm_cap` the weight is used as W / max(1, rms(W) / cap) (DESIGN 4).
    """

    role = "hidden"

    def __init__(self, blocks, d_in, d_out, *, n_head=1, fan_out=True, shared=False, norm_cap=False):
        super().__init__()
        self.blocks, self.d_in, self.d_out, self.n_head = blocks, d_in, d_out, n_head
        self.fan_out, self.shared, self.norm_cap = fan_out, shared, norm_cap
        stored = 1 if shared else blocks
        shape = (stored, d_in, n_head * d_out) if fan_out else (n_head * stored, d_in, d_out)
        self.weight = nn.Parameter(torch.randn(shape) * d_in**-0.5)

    def forward(self, x):
        weight = cap_norm(self.weight) if self.norm_cap else self.weight
        N = x.shape[0]
        if self.fan_out:
            if self.shared:
                weight = weight.expand(self.blocks, -1, -1)
            y = x.reshape(N, self.blocks, self.d_in).transpose(0, 1) @ weight  # (blocks, N, n_head * d_out)
            return y.unflatten(-1, (self.n_head, self.d_out)).permute(1, 2, 0, 3)
        if self.shared:
            weight = weight.repeat_interleave(self.blocks, 0)
        y = x.reshape(N, self.n_head * self.blocks, self.d_in).transpose(0, 1) @ weight  # (n_head * blocks, N, d_out)
        return y.unflatten(0, (self.n_head, self.blocks)).permute(2, 0, 1, 3)

    @property
    def fan_in(self):
        return self.d_in

    @property
    def macs(self):
        return self.n_head * self.blocks * self.d_in * self.d_out

    def extra_repr(self):
        return f"{self.blocks} blocks {self.d_in} -> {self.d_out}, n_head={self.n_head}"


def cap_norm(weight):
    """W / max(1, rms(W) / cap), cap = sqrt(min(d_in, d_out)) / d_in for W of shape (..., d_in, d_out) (DESIGN 4).

    The comparison stays on the device: no host synchronisation.
    """
    d_in, d_out = weight.shape[-2:]
    cap = min(d_in, d_out) ** 0.5 / d_in
    rms = (weight.square().mean() + 1e-8).sqrt()
    return weight / (rms / cap).clamp(min=1)


def multiply(contract, x):
    """contract(x) for a linear map of rows, (N, n_in) -> (N, ...), where it pays by way of the map's matrix.

    For many more rows than columns it pays to contract the identity, which gives the matrix, and to multiply once:
    measured in dev/LOG.md.
    """
    n_in = x.shape[-1]
    if transforms.below(x.shape[0], 4 * n_in) or n_in > ASSEMBLE_UP_TO:
        return contract(x)
    matrix = contract(torch.eye(n_in, dtype=x.dtype, device=x.device))
    return (x @ matrix.flatten(1)).unflatten(1, matrix.shape[1:])
