"""The scoring functions as modules: a variant makes queries and keys of x and says how they meet, nothing else.

`forward(x, v)` takes x (B, T, d_model), the output of the block's first LayerNorm, and values v (B, G, T, d_head), and
gives the mixed values (B, n_head, T, d_head). Projecting values and output is the caller's (model.Attention).
To generate, `new_cache` allocates memory; its `prefill(x, v)` is `forward` on a prompt and its `step(x, v)` on
one more token.
Each class also counts what it costs; see `Cost`. STRUCTURES names them as the command line does.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import nn

from structured import flops, kernels
from structured.cache import GSWACache, InputCache, KeyCache, LevelCache
from structured.errors import BadInput
from structured.functional import (
    BACKENDS,
    LINKS,
    WEIGHTINGS,
    attention,
    check_backend,
    check_ranks,
    default_block_sizes,
    gswa_attention,
    mlr_attention,
    window_attention,
)
from structured.layers import BlockDiagonal, Linear, multiply, side_by_side
from structured.mlbtc import FAMILIES, MLBTC, level, split_near_sqrt


@dataclass(frozen=True)
class ScoringConfig:
    """What a layer's scoring function is. Only the fields of the chosen `structure` matter.

    d_qk_head is the width of a head's queries and keys, d_head that of its values. scale_sp selects 1/sqrt(width)
    instead of the µP scale 8/width for standard attention and the window variants; scale_mup multiplies bilinear MLR's
    scores by a further 8/sqrt(width) and makes bilinear BTT's and MLBTC's scale 1/d_model instead of 1/sqrt(d_model).
    backend is the path of MLR, window and GSWA attention (paths.BACKENDS); the other structures ignore it.
    """

    structure: str
    d_model: int
    n_head: int
    block_size: int
    n_kv_head: int | None = None
    d_qk_head: int | None = None
    causal: bool = True
    link: str = "softmax"
    qk_norm: bool = True
    bias: bool = False
    dropout: float = 0.0
    scale_sp: bool = False
    scale_mup: bool = False
    ranks: tuple[int, ...] = ()
    block_sizes: tuple[int, ...] | None = None
    weighting: str = "none"
    window: int = 0
    gswa_ranks: tuple[int, ...] = ()
    layer_kinds: tuple[str, ...] = ()
    btt_rank: int = 1
    mlbtc_family: str = "btt"
    mlbtc_levels: tuple[tuple, ...] = ()
    mlbtc_rank: int = 1
    mlbtc_blocks: int = 1
    backend: str = "auto"

    def __post_init__(self):
        if self.structure not in STRUCTURES:
            raise BadInput(f"no token_mixing_struct '{self.structure}', there are {', '.join(STRUCTURES)}")
        if self.link not in LINKS:
            raise BadInput(f"no link_function '{self.link}', there are {', '.join(LINKS)}")
        if self.weighting not in WEIGHTINGS:
            raise BadInput(f"no level weighting '{self.weighting}', there are {', '.join(WEIGHTINGS)}")
        known = dict.fromkeys(name for names in BACKENDS.values() for name in names)
        if self.backend not in known:
            raise BadInput(f"no attention_backend '{self.backend}', there are {', '.join(known)}")
        for name in ("d_model", "n_head", "block_size", "n_kv_head", "d_qk_head"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadInput(f"{name} is {value}, it must be at least 1")
        if self.d_model % self.n_head:
            raise BadInput(f"d_model {self.d_model} is not a multiple of n_head {self.n_head}")
        if self.n_head % self.kv_heads:
            raise BadInput(f"n_kv_head {self.kv_heads} does not divide n_head {self.n_head}")
        STRUCTURES[self.structure].check(self)

    @property
    def d_head(self):
        return self.d_model // self.n_head

    @property
    def qk_width(self):
        return self.d_head if self.d_qk_head is None else self.d_qk_head

    @property
    def kv_heads(self):
        return self.n_head if self.n_kv_head is None else self.n_kv_head


class Cost(NamedTuple):
    """Multiply-adds of a scoring function for one sequence, all heads: scores and value product, without the linears.

    executed: this project's convention (DESIGN 7). paper: the paper's. norm_elements: numbers its LayerNorms read.
    """

    executed: int
    paper: int
    norm_elements: int


class Scoring(nn.Module):
    """Queries and keys of x, and how they meet; over a whole sequence, or token by token with a cache.

    A variant gives `queries_and_keys(x)` and `attend(q, k, v)`, and says with `cache_type` which cache attends as it
    does from one token more (for a KeyCache also `key_width` and `scores_scale`). None: it is generated from without
    one. A cache is right for the functions it was declared beside: a class that defines any of ATTENDS anew declares
    its own, or has none.
    """

    ATTENDS: ClassVar[tuple] = ("queries_and_keys", "attend", "forward", "mix")
    cache_type = None
    window = None  # how many positions back the keys reach, if not all

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        defined = {name: depth for depth, base in reversed([*enumerate(cls.__mro__)]) for name in vars(base)}
        if min(defined[name] for name in cls.ATTENDS if name in defined) < defined["cache_type"]:
            cls.cache_type = None

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg

    def forward(self, x, v):
        self.check_input(x)
        return self.attend(*self.queries_and_keys(x), v)

    def mix(self, x, value):
        """`forward` with values that nn.Linear `value`, d_model -> kv_heads * d_head, still has to make of x."""
        return self(x, value(x).unflatten(-1, (self.cfg.kv_heads, -1)).transpose(1, 2))

    def check_input(self, x):
        """Raise BadInput unless x is (B, T, d_model) with T up to block_size."""
        cfg = self.cfg
        if x.ndim != 3 or x.shape[2] != cfg.d_model:
            raise BadInput(f"x is (B, T, {cfg.d_model}), d_model features last, not {tuple(x.shape)}")
        if x.shape[1] > cfg.block_size:
            raise BadInput(f"a sequence of {x.shape[1]} tokens does not fit block_size = {cfg.block_size}")

    def options(self):
        cfg = self.cfg
        return dict(causal=cfg.causal, link=cfg.link, dropout=cfg.dropout if self.training else 0.0)

    def new_cache(self, B, length, device=None, dtype=None):
        """An empty cache for B sequences of up to `length` tokens."""
        if not self.cfg.causal:
            raise BadInput("a model whose positions see both sides (causal=False) cannot generate")
        if not 1 <= length <= self.cfg.block_size:
            raise BadInput(f"a cache is 1 to block_size = {self.cfg.block_size} tokens long, not {length}")
        if self.cache_type is None:
            raise BadInput(f"{self.cfg.structure} declares no cache; generate with use_cache=False")
        return self.cache_type(self, B, length, device=device, dtype=dtype)


class ProjectedScoring(Scoring):
    """Queries and keys by linear projection, normed per head. The variants below differ in how the two meet."""

    def __init__(self, cfg):
        super().__init__(cfg)
        width = cfg.qk_width
        self.query = Linear(cfg.d_model, cfg.n_head * width, role="hidden", bias=cfg.bias)
        self.key = Linear(cfg.d_model, cfg.kv_heads * width, role="hidden", bias=cfg.bias)
        self.query_norm = nn.LayerNorm(width, bias=False) if cfg.qk_norm else nn.Identity()
        self.key_norm = nn.LayerNorm(width, bias=False) if cfg.qk_norm else nn.Identity()

    @staticmethod
    def check(cfg):
        """Raise BadInput for a configuration this structure cannot be."""

    def queries_and_keys(self, x):
        width = self.cfg.qk_width
        q = self.query_norm(self.query(x).unflatten(-1, (-1, width)).transpose(1, 2))  # (B, H, T, width)
        k = self.key_norm(self.key(x).unflatten(-1, (-1, width)).transpose(1, 2))  # (B, G, T, width)
        return q, k

    def mix(self, x, value):
        """In 16 bits on a GPU queries, keys and values are one product, whose norms are one kernel each way."""
        cfg = self.cfg
        if not cfg.qk_norm or not kernels.norms_heads(x):
            return super().mix(x, value)
        self.check_input(x)
        qkv = side_by_side(x, self.query, self.key, value)
        return self.attend(*kernels.normed_heads(qkv, cfg.n_head, cfg.kv_heads, self.query_norm, self.key_norm))

    @property
    def key_width(self):
        return self.cfg.qk_width

    @property
    def scores_scale(self):
        return self.scale(self.cfg.qk_width)

    def scale(self, width):
        """The constant in front of q . k: 8/width in µP, 1/sqrt(width) in the standard parametrization."""
        return width**-0.5 if self.cfg.scale_sp else 8 / width

    def cost(self, T):
        cfg = self.cfg
        norms = T * cfg.qk_width * (cfg.n_head + cfg.kv_heads) if cfg.qk_norm else 0
        executed, paper = self.head_macs(T)
        return Cost(cfg.n_head * executed, cfg.n_head * paper, norms)


class LowRankScoring(ProjectedScoring):
    """Standard attention: every pair meets with the full head width."""

    cache_type = KeyCache

    def attend(self, q, k, v):
        return attention(q, k, v, scale=self.scores_scale, **self.options())

    def head_macs(self, T):
        both = flops.dense_macs(T, self.cfg.qk_width + self.cfg.d_head)
        return both, both


class WindowScoring(ProjectedScoring):
    """Standard attention to the last window + 1 positions."""

    cache_type = KeyCache

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


class GSWAScoring(ProjectedScoring):
    """Some features meet everywhere, the rest in a window; the two weight matrices are added."""

    cache_type = GSWACache

    @staticmethod
    def check(cfg):
        WindowScoring.check(cfg)
        check_ranks(cfg.gswa_ranks, cfg.qk_width, "gswa_rank_list")
        if len(cfg.gswa_ranks) != 2 or min(cfg.gswa_ranks) < 1:
            raise BadInput(f"gswa_rank_list takes two ranks of at least 1, global|window, not {cfg.gswa_ranks}")

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


class MLRScoring(ProjectedScoring):
    """MLR attention: the score matrix itself is multi-level low rank over positions (DESIGN 3)."""

    cache_type = LevelCache

    @staticmethod
    def check(cfg):
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

    def __init__(self, cfg):
        super().__init__(cfg)
        self.block_sizes = cfg.block_sizes or default_block_sizes(cfg.block_size, len(cfg.ranks))

    def attend(self, q, k, v):
        cfg = self.cfg
        options = dict(weighting=cfg.weighting, backend=cfg.backend, **self.options())
        return mlr_attention(q, k, v, cfg.ranks, self.block_sizes, **options)

    def head_macs(self, T):
        both = flops.mlr_score_macs(T, self.cfg.ranks, self.block_sizes) + flops.dense_macs(T, self.cfg.d_head)
        return both, both


class BilinearScoring(Scoring):
    """x^T M_h x' with a structured M_h: `queries_and_keys` gives the two sides, which meet as in standard attention."""

    def attend(self, q, k, v):
        return attention(q, k, v, scale=self.scores_scale, **self.options())


def _no_grouped_heads(cfg):
    if cfg.kv_heads != cfg.n_head:
        raise BadInput(
            f"{cfg.structure} has no grouped-query form: n_kv_head {cfg.kv_heads} must be n_head {cfg.n_head}"
        )


class BilinearMLRScoring(BilinearScoring):
    """M is multi-level low rank over the features: level l cuts x into 2^(l-1) chunks, each with its own projections.

    The scores of all levels are one inner product of concatenated features, the levels' scales folded into the queries.
    """

    cache_type = KeyCache
    scores_scale = 1.0

    @staticmethod
    def check(cfg):
        _no_grouped_heads(cfg)
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


class BilinearMLBTCScoring(BilinearScoring):
    """M is any member of the MLBTC family, one a head: scores x_i . LayerNorm(M_h x_j); x is the query of all heads."""

    @staticmethod
    def check(cfg):
        _no_grouped_heads(cfg)
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


class BilinearBTTScoring(BilinearMLBTCScoring):
    """M is a Block Tensor-Train: full rank at 2 D^1.5 s numbers a head (DESIGN 4)."""

    @staticmethod
    def check(cfg):
        _no_grouped_heads(cfg)
        if cfg.btt_rank < 1:
            raise BadInput(f"btt_tt_rank is {cfg.btt_rank}, it must be at least 1")

    @staticmethod
    def matrix(cfg):
        return FAMILIES["btt"](cfg.d_model, cfg.d_model, cfg.btt_rank, n_head=cfg.n_head, norm_cap=True)


class SequentialGSWAScoring:
    """Standard attention in some layers, sliding-window attention in the others, as `layer_kinds` says."""

    KINDS: ClassVar[dict] = {"MHA": LowRankScoring, "SWA": WindowScoring}

    @classmethod
    def check(cls, cfg):
        if not cfg.layer_kinds:
            raise BadInput("sequential_GSWA_layer_list is empty; give one of MHA, SWA for each layer")
        for kind in cfg.layer_kinds:
            if kind not in cls.KINDS:
                raise BadInput(f"sequential_GSWA_layer_list has '{kind}', there are {', '.join(cls.KINDS)}")
        if "SWA" in cfg.layer_kinds:
            WindowScoring.check(cfg)


STRUCTURES = {
    "low_rank": LowRankScoring,
    "low_rank_with_sliding_window": WindowScoring,
    "low_rank_with_gswa": GSWAScoring,
    "low_rank_with_sequential_gswa": SequentialGSWAScoring,
    "multi_level_low_rank": MLRScoring,
    "bilinear_MLR": BilinearMLRScoring,
    "bilinear_BTT": BilinearBTTScoring,
    "bilinear_MLBTC": BilinearMLBTCScoring,
}


def build_scoring(cfg, layer=0):
    """The scoring module of one layer."""
    if cfg.structure == "low_rank_with_sequential_gswa":
        if layer >= len(cfg.layer_kinds):
            raise BadInput(f"sequential_GSWA_layer_list has {len(cfg.layer_kinds)} entries, the model has more layers")
        return SequentialGSWAScoring.KINDS[cfg.layer_kinds[layer]](cfg)
    return STRUCTURES[cfg.structure](cfg)
