"""Standard attention."""

from structured import flops
from structured.cache import KeyCache
from structured.functional import attention
from structured.scorings.base import ProjectedScoring


class LowRankScoring(ProjectedScoring):
    """Standard attention: every pair meets with the full head width."""

    label, colour, marker = "standard", "#000000", "o"
    POSITIONS = (*ProjectedScoring.POSITIONS, "alibi")
    cache_type = KeyCache

    def attend(self, q, k, v):
        return attention(q, k, v, scale=self.scores_scale, **self.options())

    def head_macs(self, T):
        both = flops.dense_macs(T, self.cfg.qk_width + self.cfg.d_head)
        return both, both
