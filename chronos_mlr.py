"""Chronos with MLR attention: the self-attention of a T5, encoder and decoder, with scores of many levels (DESIGN 3).

    pipeline = ChronosPipeline.from_pretrained("amazon/chronos-t5-tiny")
    use_mlr_attention(pipeline.inner_model, ranks=(32, 16, 8, 8))
    pipeline.inner_model.save_pretrained("folder")
    pipeline = load_pipeline("folder")

Needs requirements-chronos.txt. Weights stay what they are, under the same names; cross-attention is left alone. A saved
model's config says which levels it has and that it is a `chronos_mlr`: transformers knows that type once this module is
imported, and refuses the folder by that name where it is not.
"""

import copy
import math
from dataclasses import asdict

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.t5.modeling_t5 import T5Attention, eager_attention_forward

from model import Compute
from structured import BadInput, default_block_sizes
from structured.flops import mlr_score_macs
from structured.functional import check_levels, check_ranks
from training.configurator import parse_list

WEIGHTINGS = ("none", "shared")
STACKS = ("encoder", "decoder")


def use_mlr_attention(model, ranks, block_sizes=None, weighting="none"):
    """Replace every self-attention of a T5 by MLR attention with the same weights; gives the model back.

    ranks add up to d_kv. block_sizes: {"encoder": .., "decoder": ..}; a stack that is not there has them halved level
    by level, from the longest sequence that Chronos gives it. weighting: "none" or "shared", see `level_scores`.
    Raises BadInput, the model untouched, for levels that cannot be and for a model that has no T5 self-attention.
    """
    config, given = model.config, block_sizes or {}
    layers = {stack: found for stack in STACKS if (found := self_attentions(getattr(model, stack, None)))}
    if not layers:
        raise BadInput(f"{type(model).__name__} has no T5 self-attention to replace")
    if weighting not in WEIGHTINGS:
        raise BadInput(f"no level weighting '{weighting}' for Chronos, there are {', '.join(WEIGHTINGS)}")
    if unknown := given.keys() - layers.keys():
        raise BadInput(f"block_sizes for {', '.join(sorted(unknown))}; the model has {', '.join(layers)}")
    check_ranks(ranks, config.d_kv)
    blocks = {stack: given.get(stack) or halved(longest(config, stack), len(ranks)) for stack in layers}
    for stack in layers:
        check_levels(ranks, blocks[stack], weighting, config.d_kv)
    sizes = {stack: list(blocks[stack]) for stack in layers}
    replace_attention(model, dict(ranks=list(ranks), block_sizes=sizes, weighting=weighting))
    return model


def replace_attention(model, levels):
    """The work of `use_mlr_attention`, levels being in the form that the model's config keeps."""
    for stack, sizes in levels["block_sizes"].items():
        for holder in self_attentions(getattr(model, stack)):
            options = tuple(levels["ranks"]), tuple(sizes), levels["weighting"]
            holder.SelfAttention = MLRT5Attention(holder.SelfAttention, *options)
    model.config.__class__, model.config.mlr = MLRT5Config, levels
    if type(model) is T5ForConditionalGeneration:
        model.__class__ = MLRT5ForConditionalGeneration


def load_pipeline(folder, **options):
    """The ChronosPipeline of a folder that `save_pretrained` or train_chronos.py left, whichever attention it has."""
    from chronos import ChronosPipeline

    return ChronosPipeline.from_pretrained(str(folder), **options)


def pipeline_for(cfg):
    """The Chronos pipeline that train_chronos.py's settings ask for; BadInput for one that cannot be."""
    pipeline = load_t5(cfg.pretrained) if cfg.pretrained else new_pipeline(cfg)
    config = pipeline.inner_model.config
    trained, earlier = getattr(config, "mlr", None), config.chronos_config if cfg.pretrained else None
    lengths = dict(context_length=cfg.look_back, prediction_length=cfg.horizon, num_samples=cfg.num_samples)
    vars(pipeline.model.config).update(lengths)
    config.chronos_config = asdict(pipeline.model.config)
    if cfg.token_mixing_struct == "multi_level_low_rank":
        ranks = parse_list(cfg.mlr_rank_list, "mlr_rank_list")
        weighting = "shared" if cfg.mlr_block_divide_by_num_levels else "none"
        if trained:
            check_as_trained(cfg, trained, ranks, weighting)
        use_mlr_attention(pipeline.inner_model, ranks, chosen_block_sizes(cfg, trained, earlier), weighting)
    elif trained:
        levels = "|".join(map(str, trained["ranks"]))
        words = f"give --token_mixing_struct=multi_level_low_rank --mlr_rank_list='{levels}'"
        raise BadInput(f"pretrained={cfg.pretrained} has MLR attention, not low_rank; {words}")
    return pipeline


def check_as_trained(cfg, trained, ranks, weighting):
    """Raise BadInput unless pretrained weights with MLR attention are asked for with the ranks they had."""
    if (tuple(trained["ranks"]), trained["weighting"]) != (tuple(ranks), weighting):
        levels, divided = "|".join(map(str, trained["ranks"])), trained["weighting"] == "shared"
        words = f"--mlr_rank_list='{levels}' --mlr_block_divide_by_num_levels={divided}"
        raise BadInput(f"pretrained={cfg.pretrained} was trained with other levels; give {words}")


def chosen_block_sizes(cfg, trained, earlier):
    """{stack: block sizes} where they are not to be halved: those given, or the trained ones of the same length."""
    stacks = dict(
        encoder=("mlr_block_size_list", "context_length", cfg.look_back),
        decoder=("mlr_decoder_block_size_list", "prediction_length", cfg.horizon),
    )
    sizes = {}
    for stack, (name, key, length) in stacks.items():
        if getattr(cfg, name) != "default":
            sizes[stack] = parse_list(getattr(cfg, name), name)
        elif trained and earlier[key] == length:
            sizes[stack] = tuple(trained["block_sizes"][stack])
    return sizes


def load_t5(pretrained):
    """The pipeline of a folder or of a name on the hub, as it was saved; BadInput unless it is a Chronos T5."""
    try:
        pipeline = load_pipeline(pretrained)
    except (OSError, ValueError, TypeError, AssertionError) as error:
        why = str(error).partition("\n")[0]
        raise BadInput(f"pretrained={pretrained} cannot be loaded as a Chronos T5: {why}") from None
    if not isinstance(pipeline.inner_model, T5ForConditionalGeneration):
        raise BadInput(f"pretrained={pretrained} is a {type(pipeline.inner_model).__name__}, not a T5")
    return pipeline


def new_pipeline(cfg):
    """A pipeline with random weights: T5's architecture, Chronos' tokens and its factor on T5's initial weights."""
    from chronos import ChronosConfig, ChronosPipeline
    from chronos.chronos import ChronosModel

    special = dict(pad_token_id=0, eos_token_id=1)
    chronos = ChronosConfig(
        tokenizer_class="MeanScaleUniformBins",
        tokenizer_kwargs=dict(low_limit=-15.0, high_limit=15.0),
        context_length=cfg.look_back,
        prediction_length=cfg.horizon,
        n_tokens=cfg.n_tokens,
        n_special_tokens=2,
        use_eos_token=True,
        model_type="seq2seq",
        num_samples=cfg.num_samples,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        **special,
    )
    config = T5Config(
        vocab_size=cfg.n_tokens,
        d_model=cfg.d_model,
        d_kv=cfg.d_head,
        d_ff=cfg.d_ff,
        num_layers=cfg.n_layer,
        num_heads=cfg.n_head,
        dropout_rate=cfg.dropout,
        initializer_factor=0.05,
        decoder_start_token_id=0,
        **special,
    )
    return ChronosPipeline(chronos.create_tokenizer(), ChronosModel(chronos, T5ForConditionalGeneration(config)))


def self_attentions(stack):
    """The layers of a T5 stack that hold a self-attention."""
    if stack is None:
        return []
    return [m for m in stack.modules() if isinstance(getattr(m, "SelfAttention", None), T5Attention)]


def longest(config, stack):
    """Tokens of the longest sequence that Chronos gives to a stack: the context or the prediction, and a last token.

    The encoder reads the end-of-series token there, the decoder begins with one more than it predicts.
    """
    chronos = getattr(config, "chronos_config", None)
    if chronos is None:
        raise BadInput("the model has no chronos_config to take the lengths from; give block_sizes for both stacks")
    return chronos["context_length" if stack == "encoder" else "prediction_length"] + 1


def halved(length, n_levels):
    """Default block sizes of a length that need not halve: those of the next that does, cut at this one."""
    finest = 2 ** (n_levels - 1)
    padded = math.ceil(length / finest) * finest
    return tuple(min(b, length) for b in default_block_sizes(padded, n_levels))


class MLRT5Attention(T5Attention):
    """T5's self-attention with MLR scores and the weights of the one it replaces; causal where that was.

    Where every pair shares all levels, as with one level that reaches everywhere, this is T5's own function.
    """

    def __init__(self, attention, ranks, block_sizes, weighting):
        a = attention
        with torch.device("meta"):
            super().__init__(a.config, a.has_relative_attention_bias, a.layer_idx, a.is_causal)
        for name, module in a.named_children():
            setattr(self, name, module)
        self.train(a.training)
        self.ranks, self.block_sizes, self.weighting = ranks, block_sizes, weighting
        self.stack_config = getattr(a, "stack_config", a.config)
        self.config = copy.copy(self.stack_config)
        self.config._attn_implementation = "mlr_t5"

    def forward(self, hidden_states, *args, past_key_values=None, **kwargs):
        """As T5Attention's. `seen` tells attend at which position the queries begin: behind the cached keys."""
        seen = 0 if past_key_values is None else past_key_values.get_seq_length(self.layer_idx)
        seen = seen.clone() if isinstance(seen, torch.Tensor) else seen  # a static cache counts on in place
        return super().forward(hidden_states, *args, past_key_values=past_key_values, seen=seen, **kwargs)

    def all_shared(self, n_keys):
        """Whether every pair of n_keys positions shares every level."""
        return min(self.block_sizes) >= n_keys

    def attend(self, q, k, v, mask, *, position_bias, seen, dropout, **options):
        """The attention function that T5Attention calls: q (B, H, T, d_kv), k and v (B, H, keys, d_kv)."""
        if self.all_shared(k.shape[2]):
            name = self.stack_config._attn_implementation
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
            return attend(self, q, k, v, mask, position_bias=position_bias, dropout=dropout, **options)
        i = seen + torch.arange(q.shape[2], device=q.device)[:, None]
        j = torch.arange(k.shape[2], device=q.device)
        scores = level_scores(q, k, i, j, self.ranks, self.block_sizes, self.weighting) + position_bias
        least = torch.finfo(scores.dtype).min  # not -inf: a row may see nothing, as that of a context of gaps
        if mask is not None:
            scores = scores.masked_fill(~mask, least) if mask.dtype == torch.bool else scores + mask
        if self.is_causal:
            scores = scores.masked_fill(j > i, least)
        weights = nn.functional.dropout(scores.softmax(-1), dropout, self.training)
        return (weights @ v).transpose(1, 2), weights  # (B, T, H, d_kv)


ALL_ATTENTION_FUNCTIONS.register("mlr_t5", MLRT5Attention.attend)


class MLRT5Config(T5Config):
    """A T5's config and `mlr`, its levels: {"ranks", "block_sizes" of every stack, "weighting"}."""

    model_type = "chronos_mlr"


class MLRT5ForConditionalGeneration(T5ForConditionalGeneration):
    """A T5 with the MLR attention that its config says."""

    config_class = MLRT5Config

    def __init__(self, config):
        super().__init__(config)
        replace_attention(self, config.mlr)


AutoConfig.register(MLRT5Config.model_type, MLRT5Config)
AutoModelForSeq2SeqLM.register(MLRT5Config, MLRT5ForConditionalGeneration)


def level_scores(q, k, i, j, ranks, block_sizes, weighting):
    """MLR scores of queries at positions i (T, 1) and keys at positions j (keys,): (B, H, T, keys), not masked.

    T5 has no scale, its weights make up for it, so levels have none either: S_ij = c_ij * sum of q_i^(l) . k_j^(l) over
    the levels that i and j share. c_ij = 1 ("none"), or the number of levels over the number shared ("shared"), which
    is DESIGN 3's up to a factor that T5's weights hold. A pair that shares all levels has T5's own score, whichever c.
    """
    scores, shared = 0, 0
    for q_l, k_l, b in zip(q.split(ranks, -1), k.split(ranks, -1), block_sizes, strict=True):
        same = i // b == j // b  # (T, keys)
        scores = scores + (q_l @ k_l.mT).masked_fill(~same, 0)
        shared = shared + same.long()
    return scores if weighting == "none" else scores * (len(ranks) / shared.clamp(min=1))


class Chronos(nn.Module):
    """A Chronos pipeline in the shape that train_chronos.py trains: tokens of context and future -> the loss in nats.

    The T5 is the pipeline's; here its parameters, tied ones once, are those of one module with one role, so that all
    have the same learning rate. The role's initial values are not T5's: whoever draws them puts T5's back (`initial`).
    """

    role, fan_in = "embedding", 1

    def __init__(self, pipeline):
        super().__init__()
        self.pipeline, self.lengths = pipeline, pipeline.model.config
        for name, parameter in self.t5.named_parameters():
            self.register_parameter(name.replace(".", "/"), parameter)
        self.initial = {name: value.clone() for name, value in self.state_dict().items()}

    @property
    def t5(self):
        return self.pipeline.inner_model

    @property
    def block_size(self):
        """Tokens of a window, encoder's and decoder's."""
        return self.lengths.context_length + self.lengths.prediction_length + 2

    def train(self, mode=True):
        self.t5.train(mode)
        return super().train(mode)

    def forward(self, input_ids, attention_mask, labels):
        """(B, context + 1), (B, context + 1), (B, prediction + 1) with -100 where nothing is asked -> mean loss."""
        logits = self.t5(input_ids=input_ids, attention_mask=attention_mask, labels=labels).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    def num_params(self):
        total = sum(p.numel() for p in self.parameters())
        return total, total - self.t5.shared.weight.numel()

    def compute(self, T):
        """Of one window; T is block_size. All linear layers, scores and value products; norms on the paper's axis."""
        c = self.t5.config
        inner, ff = c.num_heads * c.d_kv, (3 if c.is_gated_act else 2) * c.d_ff
        n, m = self.lengths.context_length + 1, self.lengths.prediction_length + 1
        encoder = c.num_layers * (n * c.d_model * (4 * inner + ff) + n * n * inner)
        decoder = c.num_decoder_layers * (m * c.d_model * (6 * inner + ff) + m * m * inner)
        cross = c.num_decoder_layers * (2 * n * c.d_model * inner + 2 * m * n * inner)
        scores = self.score_macs(self.t5.encoder, n) + self.score_macs(self.t5.decoder, m)
        trunk, head = encoder + decoder + cross + scores, m * c.d_model * c.vocab_size
        norms = c.d_model * (n * (2 * c.num_layers + 1) + m * (3 * c.num_decoder_layers + 1))
        return Compute(trunk + head, trunk, trunk + head + 5 * norms)

    def score_macs(self, stack, T):
        """Multiply-adds of the self-attention scores of a stack that reads T tokens."""
        c = self.t5.config
        heads = [holder.SelfAttention for holder in self_attentions(stack)]
        levels = [(a.ranks, a.block_sizes) if isinstance(a, MLRT5Attention) else ((c.d_kv,), (T,)) for a in heads]
        return c.num_heads * sum(mlr_score_macs(T, ranks, blocks) for ranks, blocks in levels)
