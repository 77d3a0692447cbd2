"""Structured attention: scoring functions, matrix families and their definitional twins, on their own."""

from structured.errors import BadInput
from structured.functional import (
    attention,
    default_block_sizes,
    gswa_attention,
    mlr_attention,
    mlr_scores,
    window_attention,
)
from structured.mlbtc import BTT, MLBTC, MLR, LowRank
from structured.scorings import STRUCTURES, ScoringConfig, build_scoring

__all__ = [
    "BTT", "MLBTC", "MLR", "STRUCTURES", "BadInput", "LowRank", "ScoringConfig", "attention", "build_scoring",
    "default_block_sizes", "gswa_attention", "mlr_attention", "mlr_scores", "window_attention",
]  # fmt: skip
