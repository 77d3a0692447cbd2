"""What all scoring functions share: what the rest of the code knows of one, and how a module scores.

`forward(x, v)` takes x (B, T, d_model), the output of the block's first LayerNorm, and values v (B, G, T, d_head), and
gives the mixed values (B, n_head, T, d_head). Projecting values and output is the caller's (model.Attention).
To generate, `new_cache` allocates memory; its `extend(x, v)` is `forward` on the tokens that follow those it holds.
"""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import nn

from structured import kernels
from structured.errors import BadInput
from structured.functional import attention
from structured.layers import Linear, side_by_side
from structured.position import ALiBi, Rotary, power_of_two


def option(default, text):
    """A setting of a scoring function that has the same name on the command line, where `text` is its help."""
    return dataclasses.field(default=default, metadata=dict(help=text, free=False))


class Cost(NamedTuple):
    """Multiply-adds of a scoring function for one sequence, all heads: scores and value product, without the linears.

    executed: this project's convention (DESIGN 7). paper: the paper's. norm_elements: numbers its LayerNorms read.
    """

    executed: int
    paper: int
    norm_elements: int


class Structure:
    """What commands, tests and figures know of a scoring function.

    label, colour, marker: in figures and tables; the colours are after Okabe and Ito, apart in grey print too.
    Settings: the fields of ScoringConfig that are its own. FLAGS: those of the paper's settings that only some
    structures obey, and this one does (training/settings.py). EXAMPLE: fields that a head of 8 features and sequences
    of 16 tokens need, as the tests build it. POSITIONS: the values of `position` that it takes.
    """

    label: ClassVar[str]
    colour: ClassVar[str]
    marker: ClassVar[str]
    EXAMPLE: ClassVar[dict] = {}
    FLAGS: ClassVar[tuple] = ()
    POSITIONS: ClassVar[tuple] = ("learned", "none")

    @dataclass(frozen=True)
    class Settings:
        pass

    @staticmethod
    def check(cfg):
        """Raise BadInput for a configuration this structure cannot be."""

    @staticmethod
    def check_layers(cfg, n_layer):
        """Raise BadInput for a number of layers that does not fit the configuration."""

    @staticmethod
    def slices(cfg):
        """Widths of the features of a head that are scored on their own; together they are its queries' and keys'."""
        return (cfg.qk_width,)

    @classmethod
    def of_layer(cls, cfg, layer):
        """The scoring module of one layer."""
        return cls(cfg)


class Scoring(Structure, nn.Module):
    """Queries and keys of x, and how they meet; over a whole sequence, or token by token with a cache.

    A variant gives `queries_and_keys(x)`, `attend(q, k, v)` and `cost(T)`, and says with `cache_type` which cache
    attends as it does from one token more (for a KeyCache also `key_width` and `scores_scale`). None: it is generated
    from without one. In between, `place` tells queries and keys where they are. A cache is right for the functions it
    was declared beside: a class that defines any of ATTENDS anew declares its own, or has none.
    """

    ATTENDS: ClassVar[tuple] = ("queries_and_keys", "place", "attend", "forward", "mix")
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
        return self.attend(*self.place(*self.queries_and_keys(x)), v)

    def place(self, q, k, at=None):
        """Queries and keys of the positions 0 to T - 1, or of `at` (T,), that know where they are."""
        return q, k

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

    def new_cache(self, B, length, device=None, dtype=None, slack=0):
        """An empty cache for B sequences of up to `length` tokens; `slack` can always be taken back (cache.crop)."""
        if not self.cfg.causal:
            raise BadInput("a model whose positions see both sides (causal=False) cannot generate")
        if not 1 <= length <= self.cfg.block_size:
            raise BadInput(f"a cache is 1 to block_size = {self.cfg.block_size} tokens long, not {length}")
        if self.cache_type is None:
            raise BadInput(f"{self.cfg.structure} declares no cache; generate with use_cache=False")
        if slack < 0:
            raise BadInput(f"slack is {slack}; a cache takes back 0 or more tokens")
        return self.cache_type(self, B, length, device=device, dtype=dtype, slack=slack)


class ProjectedScoring(Scoring):
    """Queries and keys by linear projection, normed per head.

    Variants say how the two meet, `attend(q, k, v)`, and what that costs a head: `head_macs(T)`, multiply-adds as
    executed and as the paper counts them.
    """

    FLAGS = ("d_qk_head", "do_qk_ln", "mha_SP_attn_logits_scaling")
    POSITIONS = (*Structure.POSITIONS, "rope")

    @dataclass(frozen=True)
    class Settings:
        scale_sp: bool = False  # scale 1/sqrt(width) instead of the µP scale 8/width

    def __init__(self, cfg):
        super().__init__(cfg)
        width = cfg.qk_width
        self.query = Linear(cfg.d_model, cfg.n_head * width, role="hidden", bias=cfg.bias)
        self.key = Linear(cfg.d_model, cfg.kv_heads * width, role="hidden", bias=cfg.bias)
        self.query_norm = nn.LayerNorm(width, bias=False) if cfg.qk_norm else nn.Identity()
        self.key_norm = nn.LayerNorm(width, bias=False) if cfg.qk_norm else nn.Identity()
        make = dict(rope=lambda: Rotary(self.slices(cfg), cfg.block_size), alibi=self.alibi)
        self.position = make[cfg.position]() if cfg.position in make else None

    def alibi(self):
        """The features that add ALiBi's bias to q . k `scores_scale`, a power of two here; queries make up for it."""
        scale = self.scale(self.cfg.qk_width)
        near = power_of_two(scale)
        return ALiBi(self.cfg.n_head, self.slices(self.cfg), near, factor=scale / near)

    def place(self, q, k, at=None):
        return (q, k) if self.position is None else self.position(q, k, at)

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
        q, k, v = kernels.normed_heads(qkv, cfg.n_head, cfg.kv_heads, self.query_norm, self.key_norm)
        return self.attend(*self.place(q, k), v)

    @property
    def key_width(self):
        return self.cfg.qk_width + (self.position.width if self.cfg.position == "alibi" else 0)

    @property
    def scores_scale(self):
        return self.position.scale if self.cfg.position == "alibi" else self.scale(self.cfg.qk_width)

    def scale(self, width):
        """The constant in front of q . k: 8/width in µP, 1/sqrt(width) in the standard parametrization."""
        return width**-0.5 if self.cfg.scale_sp else 8 / width

    def cost(self, T):
        cfg = self.cfg
        norms = T * cfg.qk_width * (cfg.n_head + cfg.kv_heads) if cfg.qk_norm else 0
        executed, paper = self.head_macs(T)
        return Cost(cfg.n_head * executed, cfg.n_head * paper, norms)


class BilinearScoring(Scoring):
    """x^T M_h x' with a structured M_h: `queries_and_keys` gives the two sides, which meet as in standard attention."""

    @staticmethod
    def check(cfg):
        if cfg.kv_heads != cfg.n_head:
            raise BadInput(
                f"{cfg.structure} has no grouped-query form: n_kv_head {cfg.kv_heads} must be n_head {cfg.n_head}"
            )

    def attend(self, q, k, v):
        return attention(q, k, v, scale=self.scores_scale, **self.options())
