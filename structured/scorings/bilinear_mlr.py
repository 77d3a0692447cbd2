"""Bilinear MLR."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from structured import flops
from structured.cache import KeyCache
from structured.errors import BadInput
from structured.functional import check_ranks
from structured.layers import BlockDiagonal, multiply
from structured.scorings.base import BilinearScoring, Cost
from structured.scorings.mlr import check_weighting


class BilinearMLRScoring(BilinearScoring):
    """M is multi-level low rank over the features: level l cuts x into 2^(l-1) chunks, each with its own projections.

    The scores of all levels are one inner product of concatenated features, the levels' scales folded into the queries.
    """

    label, colour, marker = "bilinear MLR", "#CC79A7", "P"
    EXAMPLE: ClassVar[dict] = dict(ranks=(4, 3, 1))
    FLAGS = ("d_qk_head", "do_qk_ln", "mlr_divide_by_num_levels", "bilinear_mlr_muP_attn_logits_scaling")
    cache_type = KeyCache
    scores_scale = 1.0

    @dataclass(frozen=True)
    class Settings:
        ranks: tuple[int, ...] = ()  # of every level, coarse to fine
        weighting: str = "none"
        scale_mup: bool = False  # scores times a further 8/sqrt(width)

    @staticmethod
    def check(cfg):
        BilinearScoring.check(cfg)
        check_weighting(cfg.weighting)
        if cfg.weighting == "shared":
            raise BadInput(
                "bilinear_MLR has levels of features, not of positions: it takes the weightings none and levels "
                "(mlr_divide_by_num_levels), not shared (mlr_block_divide_by_num_levels)"
            )
        check_ranks(cfg.ranks, cfg.qk_width, "mlr_rank_list")
        chunks = 2 ** (len(cfg.ranks) - 1)
        if cfg.d_model % chunks:
            raise BadInput(
                f"{len(cfg.ranks)} levels cut x into {chunks} chunks, which do not divide d_model {cfg.d_model}"
            )

    def __init__(self, cfg):
        super().__init__(cfg)
        self.query, self.key, self.query_norm, self.key_norm = (nn.ModuleList() for _ in range(4))
        self.widths, self.scales = [], []
        for i, r in enumerate(cfg.ranks):
            if not r:
                continue
            chunks, width = 2**i, r * 2**i
            for side in (self.query, self.key):
                side.append(BlockDiagonal(chunks, cfg.d_model // chunks, r, n_head=cfg.n_head, norm_cap=True))
            for norm in (self.query_norm, self.key_norm):
                norm.append(nn.LayerNorm(width, bias=False) if cfg.qk_norm else nn.Identity())
            levels = len(cfg.ranks) if cfg.weighting == "levels" else 1
            self.widths.append(width)
            self.scales.append(width**-0.5 * (8 * width**-0.5 if cfg.scale_mup else 1) / levels)

    def queries_and_keys(self, x):
        def project(rows):
            sides = [torch.cat([level(rows).flatten(2) for level in side], -1) for side in (self.query, self.key)]
            return torch.stack(sides, 1)  # (N, 2, H, sum of chunks * r)

        def normalise(features, norms, scales):
            levels = zip(features.split(self.widths, -1), norms, scales, strict=True)
            features = torch.cat([norm(level) * scale for level, norm, scale in levels], -1)
            return features.unflatten(0, x.shape[:2]).transpose(1, 2)  # (B, H, T, width)

        q, k = multiply(project, x.flatten(0, 1)).unbind(1)
        ones = [1.0] * len(self.scales)
        return normalise(q, self.query_norm, self.scales), normalise(k, self.key_norm, ones)

    @property
    def key_width(self):
        return sum(self.widths)

    def cost(self, T):
        heads, width = self.cfg.n_head, sum(self.widths)
        both = heads * flops.dense_macs(T, width + self.cfg.d_head)
        return Cost(both, both, 2 * T * heads * width if self.cfg.qk_norm else 0)
