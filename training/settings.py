"""The settings that the three training scripts share, under the names of the paper's commands.

`StructureSettings` says what the model is and turns into the typed configuration of `model.py`; `RunSettings` says how
it is trained and recorded. Here, at the edge, a rank list is text and -1 means "work it out"; inside it never does.
"""

import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

from model import ModelConfig
from structured import STRUCTURES, ScoringConfig
from structured.scorings import own_settings
from training.configurator import parse_list, require_at_least, require_at_most, setting
from training.devices import COMPILE_MODES
from training.errors import BadInput

DEFAULT_HEAD = 64  # the paper's language models
STARTS = ("scratch", "resume", "auto")


@dataclass
class PaperSettings:
    """What the paper's commands say of a model."""

    token_mixing_struct: str = setting("low_rank", f"scoring function: {', '.join(STRUCTURES)}")
    link_function: str = setting("softmax", "softmax, or identity: masked scores used as they are")
    n_layer: int = setting(6, "number of blocks")
    n_head: int = setting(-1, "number of heads; -1: d_model / d_head")
    d_model: int = setting(768, "model width")
    d_head: int = setting(-1, "width of a head; -1: d_model / n_head, or 64 where n_head is -1, too")
    d_qk_head: int = setting(-1, "width of a head's queries and keys; -1: that of its values")
    n_kv_head: int = setting(-1, "number of key and value heads (grouped-query attention); -1: n_head")
    block_size: int = setting(1024, "longest sequence, in tokens")
    dropout: float = setting(0.0, "dropout probability")
    bias: bool = setting(False, "biases in linear layers and LayerNorms")
    do_qk_ln: bool = setting(True, "LayerNorm on the queries and keys of every head; bilinear BTT and MLBTC need it")
    mha_SP_attn_logits_scaling: bool = setting(False, "standard and window attention: scale 1/sqrt(r), not the µP 8/r")
    mlr_rank_list: str = setting("32|8|6|4|4|4|4|2", "rank of every level, coarse to fine; they sum to the head width")
    mlr_block_size_list: str = setting("default", "block length of every level; default: halved level by level")
    mlr_divide_by_num_levels: bool = setting(False, "MLR, both kinds: scores times 1 / number of levels")
    mlr_block_divide_by_num_levels: bool = setting(False, "MLR attention: scores times 1 / number of levels shared")
    bilinear_mlr_muP_attn_logits_scaling: bool = setting(False, "bilinear MLR scores times a further 8/sqrt(r_l p_l)")
    bilinear_btt_muP_attn_logits_scaling: bool = setting(False, "bilinear BTT and MLBTC scale 1/D instead of 1/sqrt(D)")
    btt_tt_rank: int = setting(1, "tt-rank s of bilinear BTT")
    mlbtc_levels: str = setting("", "bilinear MLBTC's levels \"p:p':inner[:stride]|...\" instead of a family")
    sliding_block_size: int = setting(512, "window W: a token sees itself and the W before it")
    gswa_rank_list: str = setting("32|32", "GSWA's ranks, global|window; they add up to the head width")
    sequential_GSWA_layer_list: str = setting("MHA|SWA|SWA|MHA|SWA|SWA", "kind of every layer, MHA or SWA")
    attention_backend: str = setting("auto", "MLR: triton, blockwise, dense; window: flex, blockwise, dense", free=True)


OwnSettings = own_settings("OwnSettings", lambda field: "help" in field.metadata, frozen=False)


@dataclass
class StructureSettings(OwnSettings, PaperSettings):
    """What a model is: the paper's settings, those that scoring functions declare with `option`, and ours."""

    position: str = setting("learned", "where tokens are: learned vectors, rope, alibi, or none", before="learned")
    mup: bool = setting(True, "µP; False: GPT-2's initial weights, one rate, eps 1e-8, scores / sqrt(r)", before=True)
    gelu_tanh: bool = setting(False, "GELU by GPT-2's formula with a tanh, not the exact one", before=False)

    def model_config(self, *, block_size=None, causal=True):
        """The typed configuration; raises BadInput for one that cannot be."""
        chosen = self.token_mixing_struct
        self._refuse_foreign()
        if self.mlr_divide_by_num_levels and self.mlr_block_divide_by_num_levels:
            raise BadInput("mlr_divide_by_num_levels and mlr_block_divide_by_num_levels exclude each other")

        def given(*structures, when=True):
            return chosen in structures and when

        mlr = given("multi_level_low_rank", "bilinear_MLR") or given("bilinear_MLBTC", when=self.mlbtc_family == "mlr")
        custom = given("multi_level_low_rank", when=self.mlr_block_size_list != "default")
        explicit = given("bilinear_MLBTC", when=bool(self.mlbtc_levels))
        gswa, sequential = given("low_rank_with_gswa"), given("low_rank_with_sequential_gswa")
        mlr_mup, btt_mup = self.bilinear_mlr_muP_attn_logits_scaling, self.bilinear_btt_muP_attn_logits_scaling
        kinds = self.sequential_GSWA_layer_list
        scoring = ScoringConfig(
            structure=chosen,
            d_model=self.d_model,
            n_head=self.heads(),
            block_size=self.block_size if block_size is None else block_size,
            n_kv_head=self._or_none("n_kv_head"),
            d_qk_head=self._or_none("d_qk_head"),
            causal=causal,
            link=self.link_function,
            qk_norm=self.do_qk_ln,
            bias=self.bias,
            dropout=self.dropout,
            scale_sp=self.mha_SP_attn_logits_scaling or not self.mup,
            scale_mup=mlr_mup if given("bilinear_MLR") else btt_mup,
            ranks=parse_list(self.mlr_rank_list, "mlr_rank_list") if mlr else (),
            block_sizes=parse_list(self.mlr_block_size_list, "mlr_block_size_list") if custom else None,
            weighting=self._weighting(),
            window=self.sliding_block_size,
            gswa_ranks=parse_list(self.gswa_rank_list, "gswa_rank_list") if gswa else (),
            layer_kinds=parse_list(kinds, "sequential_GSWA_layer_list", str) if sequential else (),
            btt_rank=self.btt_tt_rank,
            mlbtc_levels=_parse_levels(self.mlbtc_levels) if explicit else (),
            backend=self.attention_backend,
            position=self.position,
            **{f.name: getattr(self, f.name) for f in fields(OwnSettings)},
        )
        gelu = "tanh" if self.gelu_tanh else "none"
        return ModelConfig(scoring=scoring, n_layer=self.n_layer, dropout=self.dropout, bias=self.bias, gelu=gelu)

    def _refuse_foreign(self):
        """BadInput for a setting that the chosen structure cannot obey."""
        for name, everywhere in foreign(self.token_mixing_struct).items():
            if (value := getattr(self, name)) != everywhere:
                raise BadInput(
                    f"{name} is {value}, {self.token_mixing_struct} takes {everywhere!r} only; "
                    f"other values are for {', '.join(only_for()[name][1])}"
                )

    def heads(self):
        """Number of heads, from n_head, d_head or both, which then have to agree."""
        n_head = self._or_none("n_head")
        d_head = self._or_none("d_head") or (DEFAULT_HEAD if n_head is None else None)
        if d_head is None:
            return n_head
        if self.d_model % d_head:
            raise BadInput(f"d_model {self.d_model} is not a multiple of d_head {d_head}")
        if n_head is not None and n_head * d_head != self.d_model:
            raise BadInput(
                f"n_head {n_head} heads of d_head {d_head} are {n_head * d_head} wide, d_model is {self.d_model}; "
                "give one of the two and leave the other at -1"
            )
        return self.d_model // d_head

    def _or_none(self, name):
        """-1 on the command line is "work it out"."""
        value = getattr(self, name)
        if value == 0 or value < -1:
            raise BadInput(f"{name} is {value}, it must be at least 1, or -1")
        return None if value == -1 else value

    def _weighting(self):
        if self.mlr_block_divide_by_num_levels:
            return "shared"
        return "levels" if self.mlr_divide_by_num_levels else "none"


# No machine holds more; what is above would be allocated, or counted to, for minutes before it fails.
AT_MOST = dict(
    n_layer=10_000, d_model=2**20, n_head=2**16, d_head=2**16, d_qk_head=2**16, btt_tt_rank=2**20, block_size=2**26,
    sliding_block_size=2**26, vocab_size=2**26, batch_size=2**24, gradient_accumulation_steps=2**24,
    eval_batch_size=2**24, eval_prompts=2**31, n_dims=2**20, n_positions=2**24, look_back=2**24, horizon=2**24,
    d_ff=2**22, n_tokens=2**26,
)  # fmt: skip


def only_for():
    """{setting: (the value that every structure takes, the structures that take others)}, as the structures declare it.

    The paper's commands give mlr_rank_list, sliding_block_size and gswa_rank_list to every structure.
    """
    found = {}
    for structure, scoring in STRUCTURES.items():
        own = {f.name for f in fields(scoring.Settings)} & {f.name for f in fields(OwnSettings)}
        for name in {*scoring.FLAGS} | own:
            found.setdefault(name, []).append(structure)
    return {f.name: (f.default, found[f.name]) for f in fields(StructureSettings) if f.name in found}


def foreign(structure):
    """{setting: the one value that the structure takes} of the settings that are for other structures."""
    known = structure in STRUCTURES
    return {name: value for name, (value, structures) in only_for().items() if known and structure not in structures}


@dataclass
class RunSettings:
    out_dir: str = setting("out", "folder of the run: run.json, metrics.jsonl, ckpt.pt, best.pt", free=True)
    own_folder: bool = setting(False, "the run's folder is one in out_dir, named by the run's settings", free=True)
    init_from: str = setting("scratch", "scratch, resume, or auto: resume if there is a checkpoint", free=True)
    overwrite: bool = setting(False, "let a run from scratch replace the run that out_dir holds", free=True)
    seed: int = setting(1337, "seed of initialisation, data order and dropout")
    device: str = setting("auto", "cpu, cuda, cuda:1, mps, or auto: the GPU if there is one", free=True)
    backend: str = setting("auto", "between processes: gloo, nccl, or auto: nccl on GPUs, else gloo", free=True)
    fsdp: bool = setting(False, "several processes: each holds a part of the model, not all of it (FSDP2)", free=True)
    dtype: str = setting("float32", "precision of the forward pass: float32, bfloat16 or float16")
    tf32: bool = setting(False, "let float32 matmuls on the GPU round their inputs to TF32")
    compile: bool = setting(False, "torch.compile the model", free=True)
    compile_mode: str = setting("default", "compile: default, or max-autotune: minutes of timing kernels", free=True)
    keep: float = setting(1.0, "compile: share of the activations that are kept, not computed again", free=True)
    weight_decay: float = setting(0.0, "AdamW's weight decay, on matrices")
    beta1: float = setting(0.9, "AdamW's first decay rate")
    beta2: float = setting(0.95, "AdamW's second decay rate")
    grad_clip: float = setting(1.0, "largest gradient norm; 0: no clipping")
    log_interval: int = setting(10, "steps between two progress lines", free=True)
    wandb_log: bool = setting(False, "mirror the record to Weights & Biases", free=True)
    wandb_entity: str = setting("", "W&B entity; giving one turns wandb_log on", free=True)
    wandb_project: str = setting("structured-attention", "W&B project", free=True)
    wandb_run_name: str = setting("", "W&B run name; empty: the name of the run's folder", free=True)

    def __post_init__(self):
        if self.init_from not in STARTS:
            raise BadInput(f"init_from is '{self.init_from}', there are {', '.join(STARTS)}")
        common = dict(log_interval=1, seed=0, weight_decay=0, beta1=0, beta2=0, grad_clip=0)
        require_at_least(self, {**common, **self.AT_LEAST})
        require_at_most(self, AT_MOST)
        for name in self.POSITIVE:
            if getattr(self, name) <= 0:
                raise BadInput(f"{name} is {getattr(self, name)}, it must be above 0")
        if not 0 <= self.keep <= 1:
            raise BadInput(f"keep is {self.keep}, a share is from 0 to 1")
        if self.compile_mode not in COMPILE_MODES:
            raise BadInput(f"compile_mode is '{self.compile_mode}', there are {', '.join(COMPILE_MODES)}")
        for name in ("beta1", "beta2"):
            if getattr(self, name) >= 1:
                raise BadInput(f"{name} is {getattr(self, name)}, it must be below 1")

    @property
    def folder(self):
        """The run's folder, with own_folder the same for the same settings, so that a run in it can be resumed."""
        if not self.own_folder:
            return Path(self.out_dir)
        computed = {f.name: getattr(self, f.name) for f in fields(self) if not f.metadata["free"]}
        digest = hashlib.sha256(json.dumps(computed).encode()).hexdigest()
        return Path(self.out_dir) / f"{self.token_mixing_struct}_{digest[:8]}"

    AT_LEAST: ClassVar[dict] = {}  # setting: least value, for each script to fill
    POSITIVE: ClassVar[tuple] = ()  # settings that must be above 0


def _parse_levels(text):
    """"4:4:8:stride|1:1:16" -> ((4, 4, 8, True), (1, 1, 16))."""
    levels = []
    for part in text.split("|"):
        fields = part.split(":")
        stride = len(fields) == 4 and fields[3] == "stride"
        if len(fields) - stride != 3 or not all(f.isdecimal() and int(f) for f in fields[:3]):
            example = "p:p':inner or p:p':inner:stride, like \"16:16:16:stride|1:1:8\""
            raise BadInput(f"mlbtc_levels is {text!r}; write levels as {example}")
        levels.append((*map(int, fields[:3]), stride))
    return tuple(levels)


