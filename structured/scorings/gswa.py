"""Global + sliding-window attention (GSWA)."""

from dataclasses import dataclass
from typing import ClassVar

from structured import flops
from structured.cache import GSWACache
from structured.errors import BadInput
from structured.functional import check_ranks, gswa_attention
from structured.scorings.base import ProjectedScoring
from structured.scorings.sliding_window import WindowScoring


class GSWAScoring(ProjectedScoring):
    """Some features meet everywhere, the rest in a window; the two weight matrices are added."""

    label, colour, marker = "GSWA", "#00694D", "^"
    EXAMPLE: ClassVar[dict] = dict(gswa_ranks=(6, 2), window=5)
    cache_type = GSWACache

    @dataclass(frozen=True)
    class Settings(WindowScoring.Settings):
        gswa_ranks: tuple[int, ...] = ()  # features that meet everywhere, features that meet in the window

    @staticmethod
    def check(cfg):
        WindowScoring.check(cfg)
        check_ranks(cfg.gswa_ranks, cfg.qk_width, "gswa_rank_list")
        if len(cfg.gswa_ranks) != 2 or min(cfg.gswa_ranks) < 1:
            raise BadInput(f"gswa_rank_list takes two ranks of at least 1, global|window, not {cfg.gswa_ranks}")

    @staticmethod
    def slices(cfg):
        return cfg.gswa_ranks

    @property
    def scales(self):
        return tuple(self.scale(r) for r in self.cfg.gswa_ranks)

    def attend(self, q, k, v):
        cfg = self.cfg
        options = dict(scales=self.scales, backend=cfg.backend, **self.options())
        return gswa_attention(q, k, v, cfg.gswa_ranks, cfg.window, **options)

    def head_macs(self, T):
        cfg = self.cfg
        far, near = cfg.gswa_ranks
        window = flops.window_pairs(T, cfg.window, cfg.causal)
        executed = flops.dense_macs(T, far + cfg.d_head) + window * (near + cfg.d_head)
        return executed, flops.dense_macs(T, far + cfg.d_head) + flops.paper_window_pairs(T, cfg.window) * near
