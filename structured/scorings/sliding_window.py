"""Sliding-window attention."""

from dataclasses import dataclass
from typing import ClassVar

from structured import flops
from structured.cache import KeyCache
from structured.errors import BadInput
from structured.functional import check_backend, window_attention
from structured.scorings.base import ProjectedScoring


class WindowScoring(ProjectedScoring):
    """Standard attention to the last window + 1 positions."""

    label, colour, marker = "sliding window", "#56B4E9", "s"
    EXAMPLE: ClassVar[dict] = dict(window=5)
    POSITIONS = (*ProjectedScoring.POSITIONS, "alibi")
    cache_type = KeyCache

    @dataclass(frozen=True)
    class Settings(ProjectedScoring.Settings):
        window: int = 0  # a token sees itself and so many before it

    @staticmethod
    def check(cfg):
        if cfg.window < 1:
            raise BadInput(f"sliding_block_size is {cfg.window}, it must be at least 1")
        check_backend("window", cfg.backend)

    @property
    def window(self):
        return self.cfg.window

    def attend(self, q, k, v):
        cfg = self.cfg
        return window_attention(q, k, v, cfg.window, scale=self.scores_scale, backend=cfg.backend, **self.options())

    def head_macs(self, T):
        cfg = self.cfg
        executed = flops.window_pairs(T, cfg.window, cfg.causal) * (cfg.qk_width + cfg.d_head)
        return executed, flops.paper_window_pairs(T, cfg.window) * cfg.qk_width + flops.dense_macs(T, cfg.d_head)
