"""MLR attention."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from structured import flops
from structured.cache import LevelCache
from structured.errors import BadInput
from structured.functional import WEIGHTINGS, check_backend, check_ranks, default_block_sizes, mlr_attention
from structured.position import COLUMNS, ALiBi
from structured.scorings.base import ProjectedScoring


class Levels(NamedTuple):
    """What `mlr_attention` is told of the features that it gets."""

    ranks: tuple[int, ...]
    block_sizes: tuple[int, ...]
    weighting: str


class MLRScoring(ProjectedScoring):
    """MLR attention: the score matrix itself is multi-level low rank over positions (DESIGN 3)."""

    label, colour, marker = "MLR", "#D55E00", "D"
    EXAMPLE: ClassVar[dict] = dict(ranks=(4, 3, 1))
    FLAGS = (
        "d_qk_head", "do_qk_ln", "mlr_divide_by_num_levels", "mlr_block_divide_by_num_levels", "mlr_block_size_list",
    )  # fmt: skip
    POSITIONS = (*ProjectedScoring.POSITIONS, "alibi")
    cache_type = LevelCache

    @dataclass(frozen=True)
    class Settings:
        ranks: tuple[int, ...] = ()  # of every level, coarse to fine
        block_sizes: tuple[int, ...] | None = None  # None: halved level by level
        weighting: str = "none"

    @staticmethod
    def check(cfg):
        check_weighting(cfg.weighting)
        check_ranks(cfg.ranks, cfg.qk_width, "mlr_rank_list")
        check_backend("mlr", cfg.backend)
        if cfg.block_sizes is None:
            default_block_sizes(cfg.block_size, len(cfg.ranks))
            return
        if len(cfg.block_sizes) != len(cfg.ranks):
            raise BadInput(
                f"mlr_block_size_list names {len(cfg.block_sizes)} levels {cfg.block_sizes}, "
                f"mlr_rank_list {len(cfg.ranks)} {cfg.ranks}"
            )
        for b in cfg.block_sizes:
            if not 1 <= b <= cfg.block_size:
                raise BadInput(
                    f"mlr_block_size_list has a block of {b}; blocks are 1 to block_size = {cfg.block_size} long"
                )

        if cfg.position == "alibi" and cfg.weighting == "shared" and max(cfg.block_sizes) < cfg.block_size:
            raise BadInput(
                "position alibi with mlr_block_divide_by_num_levels needs a level on which all tokens meet: a block of "
                f"block_size = {cfg.block_size}, mlr_block_size_list is {cfg.block_sizes}"
            )

    @staticmethod
    def slices(cfg):
        return cfg.ranks

    def __init__(self, cfg):
        super().__init__(cfg)
        self.block_sizes = cfg.block_sizes or default_block_sizes(cfg.block_size, len(cfg.ranks))
        self.levels = Levels(cfg.ranks, self.block_sizes, cfg.weighting)
        if cfg.position == "alibi":
            self.levels = self.levels_with_alibi()

    def alibi(self):
        """The bias is features of levels of its own, of COLUMNS, so that its scale is a power of two.

        Where scores are divided by the number of levels that two tokens share, each level has a twin for the bias, as
        many times added as it is divided by; half of the shared levels are twins, so queries are doubled. Elsewhere
        one level for the whole sequence holds it, and 1 / number of levels is a factor of the queries.
        """
        cfg = self.cfg
        if cfg.weighting == "shared":
            return ALiBi(cfg.n_head, cfg.ranks, 0.5 / COLUMNS, factor=2.0)
        factor = 1 / len(cfg.ranks) if cfg.weighting == "levels" else 1.0
        return ALiBi(cfg.n_head, (cfg.qk_width,), 1 / COLUMNS, factor)

    def levels_with_alibi(self):
        ranks, blocks = self.cfg.ranks, self.block_sizes
        if self.cfg.weighting == "shared":
            twins = [n for r in ranks for n in (COLUMNS, r)]
            return Levels(tuple(twins), tuple(b for b in blocks for _ in range(2)), "shared")
        return Levels((COLUMNS, *ranks), (self.cfg.block_size, *blocks), "none")

    def attend(self, q, k, v):
        ranks, block_sizes, weighting = self.levels
        options = dict(weighting=weighting, backend=self.cfg.backend, **self.options())
        return mlr_attention(q, k, v, ranks, block_sizes, **options)

    def head_macs(self, T):
        both = flops.mlr_score_macs(T, self.cfg.ranks, self.block_sizes) + flops.dense_macs(T, self.cfg.d_head)
        return both, both


def check_weighting(weighting):
    if weighting not in WEIGHTINGS:
        raise BadInput(f"no level weighting '{weighting}', there are {', '.join(WEIGHTINGS)}")
