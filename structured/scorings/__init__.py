"""The scoring functions, a file each, and the registry that names them as the command line does.

A scoring function makes queries and keys of x and says how they meet, nothing else. Its file holds its settings, its
module, what it costs, which cache it generates with, and its name, colour and marker in figures; CONTRIBUTING.md adds
one.
"""

import dataclasses
from dataclasses import dataclass
from pkgutil import resolve_name

from structured.errors import BadInput
from structured.functional import BACKENDS, LINKS
from structured.position import check_position

STRUCTURES = {  # token_mixing_struct: its file and class; figures and tables have this order
    name: resolve_name(f"{__name__}.{place}")
    for name, place in {
        "low_rank": "low_rank:LowRankScoring",
        "low_rank_with_sliding_window": "sliding_window:WindowScoring",
        "low_rank_with_gswa": "gswa:GSWAScoring",
        "low_rank_with_sequential_gswa": "sequential_gswa:SequentialGSWAScoring",
        "multi_level_low_rank": "mlr:MLRScoring",
        "bilinear_MLR": "bilinear_mlr:BilinearMLRScoring",
        "bilinear_BTT": "bilinear_btt:BilinearBTTScoring",
        "bilinear_MLBTC": "bilinear_mlbtc:BilinearMLBTCScoring",
    }.items()
}


def own_settings(name, wanted=lambda field: True, frozen=True):
    """A dataclass of the settings that are a structure's own, those of all structures together.

    wanted(field) chooses among them. Two structures may share a setting; then they declare it alike.
    """
    found = {}
    for scoring in STRUCTURES.values():
        for f in filter(wanted, dataclasses.fields(scoring.Settings)):
            declared = f.type, f.default, f.metadata
            if found.setdefault(f.name, declared) != declared:
                raise TypeError(f"{scoring.__name__} declares {f.name} as {declared}, another as {found[f.name]}")
    fields = [(n, kind, dataclasses.field(default=d, metadata=m, kw_only=True)) for n, (kind, d, m) in found.items()]
    return dataclasses.make_dataclass(name, fields, frozen=frozen, namespace={"__module__": __name__})


@dataclass(frozen=True)
class ScoringConfig(own_settings("OwnSettings")):
    """What a layer's scoring function is: what all of them share, and of `own_settings` those of `structure`.

    d_qk_head is the width of a head's queries and keys, d_head that of its values. backend is the path of MLR, window
    and GSWA attention (paths.BACKENDS); the other structures ignore it. position is how a model knows where tokens are
    (structured/position.py).
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
    backend: str = "auto"
    position: str = "learned"

    def __post_init__(self):
        if self.structure not in STRUCTURES:
            raise BadInput(f"no token_mixing_struct '{self.structure}', there are {', '.join(STRUCTURES)}")
        if self.link not in LINKS:
            raise BadInput(f"no link_function '{self.link}', there are {', '.join(LINKS)}")
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
        check_position(self, STRUCTURES)

    @property
    def d_head(self):
        return self.d_model // self.n_head

    @property
    def qk_width(self):
        return self.d_head if self.d_qk_head is None else self.d_qk_head

    @property
    def kv_heads(self):
        return self.n_head if self.n_kv_head is None else self.n_kv_head


def build_scoring(cfg, layer=0):
    """The scoring module of one layer."""
    return STRUCTURES[cfg.structure].of_layer(cfg, layer)
