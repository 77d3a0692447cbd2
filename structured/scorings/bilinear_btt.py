"""Bilinear BTT."""

from dataclasses import dataclass
from typing import ClassVar

from structured.errors import BadInput
from structured.mlbtc import FAMILIES
from structured.scorings.base import BilinearScoring
from structured.scorings.bilinear_mlbtc import BilinearMLBTCScoring


class BilinearBTTScoring(BilinearMLBTCScoring):
    """M is a Block Tensor-Train: full rank at 2 D^1.5 s numbers a head (DESIGN 4)."""

    label, colour, marker = "bilinear BTT", "#00609A", "X"
    EXAMPLE: ClassVar[dict] = dict(btt_rank=2)
    FLAGS = ("bilinear_btt_muP_attn_logits_scaling", "btt_tt_rank")

    @dataclass(frozen=True)
    class Settings:
        btt_rank: int = 1  # the tt-rank s
        scale_mup: bool = False  # scale 1/d_model instead of 1/sqrt(d_model)

    @staticmethod
    def check(cfg):
        BilinearScoring.check(cfg)
        if cfg.btt_rank < 1:
            raise BadInput(f"btt_tt_rank is {cfg.btt_rank}, it must be at least 1")

    @staticmethod
    def matrix(cfg):
        return FAMILIES["btt"](cfg.d_model, cfg.d_model, cfg.btt_rank, n_head=cfg.n_head, norm_cap=True)
