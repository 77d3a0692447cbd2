"""Bilinear forms with any matrix of the MLBTC family."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from structured import flops
from structured.cache import InputCache, KeyCache
from structured.errors import BadInput
from structured.mlbtc import FAMILIES, MLBTC, level, split_near_sqrt
from structured.scorings.base import BilinearScoring, Cost, option


class BilinearMLBTCScoring(BilinearScoring):
    """M is any member of the MLBTC family, one a head: scores x_i . LayerNorm(M_h x_j); x is the query of all heads."""

    label, colour, marker = "bilinear MLBTC", "#E69F00", "*"
    EXAMPLE: ClassVar[dict] = dict(btt_rank=2)
    FLAGS = ("bilinear_btt_muP_attn_logits_scaling", "btt_tt_rank", "mlbtc_levels")

    @dataclass(frozen=True)
    class Settings:
        mlbtc_family: str = option("btt", "family of bilinear MLBTC; FAMILIES in structured/mlbtc.py lists them")
        mlbtc_levels: tuple[tuple, ...] = ()  # (p, p', inner, stride) of every level, instead of a family
        mlbtc_rank: int = option(1, "rank of the MLBTC families low_rank and block_low_rank")
        mlbtc_blocks: int = option(1, "number of blocks of the MLBTC family block_low_rank")
        ranks: tuple[int, ...] = ()  # of the family mlr
        btt_rank: int = 1  # of the family btt
        scale_mup: bool = False  # scale 1/d_model instead of 1/sqrt(d_model)

    @staticmethod
    def check(cfg):
        BilinearScoring.check(cfg)
        if not cfg.qk_norm:
            raise BadInput(f"{cfg.structure} has the LayerNorm of its keys in its definition: do_qk_ln must be True")
        if cfg.qk_width != cfg.d_head:
            raise BadInput(
                f"{cfg.structure} meets in d_model = {cfg.d_model} features: d_qk_head {cfg.qk_width} is not for it, "
                "leave it out"
            )
        with torch.device("meta"):
            BilinearMLBTCScoring.matrix(cfg)

    @staticmethod
    def matrix(cfg):
        """The heads' matrices, by explicit levels or by the name of a family."""
        D, options = cfg.d_model, dict(n_head=cfg.n_head, norm_cap=True)
        if cfg.mlbtc_levels:
            return MLBTC(D, D, [level(D, D, *spec) for spec in cfg.mlbtc_levels], **options)
        if cfg.mlbtc_family not in FAMILIES:
            raise BadInput(f"no mlbtc_family '{cfg.mlbtc_family}', there are {', '.join(FAMILIES)}")
        sizes = {
            "dense": (D, D), "low_rank": (D, D, cfg.mlbtc_rank),
            "block_low_rank": (D, D, cfg.mlbtc_blocks, cfg.mlbtc_rank), "mlr": (D, D, cfg.ranks),
            "btt": (D, D, cfg.btt_rank), "monarch": (D,), "butterfly": (D,),
            "kronecker": ((split_near_sqrt(D)[0],) * 2, (split_near_sqrt(D)[1],) * 2),
        }  # fmt: skip
        return FAMILIES[cfg.mlbtc_family](*sizes[cfg.mlbtc_family], **options)

    def __init__(self, cfg):
        super().__init__(cfg)
        self.key = self.matrix(cfg)
        self.key_norm = nn.LayerNorm(cfg.d_model, bias=False)

    def queries_and_keys(self, x):
        k = self.key_norm(self.key(x)).transpose(1, 2)  # (B, H, T, D)
        return x.unsqueeze(1).expand_as(k), k

    @property
    def key_width(self):
        return self.cfg.d_model

    @property
    def scores_scale(self):
        return 1 / self.cfg.d_model if self.cfg.scale_mup else self.cfg.d_model**-0.5

    @property
    def cache_type(self):
        """The smaller of the two: x and a float32 number a head (two 16-bit ones), or the keys of all heads."""
        heads, D = self.cfg.n_head, self.cfg.d_model
        return InputCache if D + 2 * heads < heads * D else KeyCache

    def cost(self, T):
        heads, D = self.cfg.n_head, self.cfg.d_model
        both = heads * flops.dense_macs(T, D + self.cfg.d_head)
        return Cost(both, both, T * heads * D)
