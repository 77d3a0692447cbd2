"""Forecasters beside model.Forecaster, the encoder over time steps: PatchTST's and DLinear's layouts, and two rules.

All take the past (B, look_back, channels) to the future (B, horizon, channels), both standardised. Those that are
trained have block_size, num_params() and compute(look_back) as the models of model.py have.
"""

import torch
import torch.nn.functional as F
from torch import nn

from model import Compute, Head
from structured import STRUCTURES, BadInput
from structured.layers import Linear

PATCH, STRIDE = 16, 8  # steps of a patch, and from one to the next (PatchTST)
AVERAGE = 25  # steps of the moving average that is DLinear's trend
TRAINED = ("encoder", "patch", "dlinear")
RULES = {"repeat_last": "last step", "seasonal_naive": "last day"}  # what is repeated


def name_of(settings):
    """The words for the forecaster of a run's settings (a dict), and for what it reads."""
    forecaster, structure = settings["forecaster"], STRUCTURES[settings["token_mixing_struct"]].label
    if forecaster in RULES:
        return f"{RULES[forecaster]} repeated"
    if forecaster not in TRAINED:
        raise BadInput(f"no forecaster '{forecaster}', there are {', '.join([*TRAINED, *RULES])}")
    words = dict(encoder=structure, patch=f"patches, {structure}", dlinear="DLinear")
    return f"{words[forecaster]}, L = {settings['look_back']}"


def number_of_patches(look_back):
    """Patches that cover look_back steps, the last step repeated STRIDE times at the end."""
    if look_back + STRIDE < PATCH:
        raise BadInput(f"look_back is {look_back}, it must be at least {PATCH - STRIDE} for patches of {PATCH}")
    return (look_back + STRIDE - PATCH) // STRIDE + 1


class BatchNorm(nn.BatchNorm1d):
    """Every feature of (B, T, d_model) normed over B and T; while evaluating, by means of the training batches."""

    def forward(self, x):
        return super().forward(x.flatten(0, 1)).view_as(x)


class PatchForecaster(Head):
    """PatchTST: every channel is a sequence of its own, its tokens are patches; one linear map of all of them ends it.

    cfg: a trunk with causal=False whose block_size is number_of_patches(look_back). The published model has instance
    normalisation too: see InstanceNorm. Its BatchNorm is here as well: LayerNorm, as in the other models, would take
    from a patch how far it swings, which the forecast needs. Its blocks are post-norm, these pre-norm.
    """

    def __init__(self, cfg, n_channels, look_back, horizon):
        super().__init__(cfg)
        d_model, patches = cfg.scoring.d_model, cfg.scoring.block_size
        for block in self.trunk.h:
            block.ln_1, block.ln_2 = BatchNorm(d_model), BatchNorm(d_model)
        self.trunk.ln_f = BatchNorm(d_model)
        self.n_channels, self.look_back = n_channels, look_back
        self.read_in = Linear(PATCH, d_model, role="embedding", bias=True)
        self.read_out = Linear(patches * d_model, horizon, role="output", bias=True)

    @property
    def block_size(self):
        return self.look_back

    def forward(self, past):
        B = len(past)
        x = F.pad(past.mT, (0, STRIDE), mode="replicate").unfold(-1, PATCH, STRIDE)  # (B, channels, patches, PATCH)
        x = self.trunk(self.read_in(x.flatten(0, 1)))  # (B * channels, patches, d_model)
        return self.read_out(x.flatten(1)).unflatten(0, (B, -1)).mT

    def compute(self, T):
        """Of one window; T is look_back."""
        patches = number_of_patches(T)
        executed, paper = self.trunk.macs(patches)
        ends = patches * self.read_in.macs + self.read_out.macs
        return Compute(*(self.n_channels * n for n in (executed + ends, executed, paper + ends)))


class DLinear(nn.Module):
    """A linear map of the trend, a moving average, and one of the rest, added; all channels share the two."""

    def __init__(self, n_channels, look_back, horizon):
        super().__init__()
        self.n_channels, self.block_size = n_channels, look_back
        self.trend = Linear(look_back, horizon, role="embedding", bias=True)  # it reads data: no width grows
        self.rest = Linear(look_back, horizon, role="embedding", bias=True)

    def forward(self, past):
        x = past.mT  # (B, channels, look_back)
        trend = F.avg_pool1d(F.pad(x, (AVERAGE // 2, AVERAGE // 2), mode="replicate"), AVERAGE, stride=1)
        return (self.trend(trend) + self.rest(x - trend)).mT

    def num_params(self):
        total = sum(p.numel() for p in self.parameters())
        return total, total

    def compute(self, T):
        """Of one window; T is look_back. The average is not counted."""
        macs = self.n_channels * (self.trend.macs + self.rest.macs)
        return Compute(macs, macs, macs)


class InstanceNorm(nn.Module):
    """Reversible instance normalisation: a window is standardised by itself, channel by channel, its forecast put back.

    As in PatchTST: population standard deviation, eps in the root, nothing learned.
    """

    def __init__(self, forecaster, eps=1e-5):
        super().__init__()
        self.forecaster, self.eps = forecaster, eps
        self.block_size, self.num_params, self.compute = (
            forecaster.block_size, forecaster.num_params, forecaster.compute
        )  # fmt: skip

    def forward(self, past):
        variance, mean = torch.var_mean(past, 1, correction=0, keepdim=True)  # (B, 1, channels)
        deviation = (variance + self.eps).sqrt()
        return self.forecaster((past - mean) / deviation) * deviation + mean


def repeat_last(past, horizon):
    """The last step, over and over."""
    return past[:, -1:].expand(-1, horizon, -1)


def seasonal_naive(past, horizon, season):
    """The last `season` steps, over and over."""
    steps = torch.arange(horizon, device=past.device) % season - season
    return past[:, steps]
