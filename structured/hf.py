"""MLR attention in models of the package transformers, as attn_implementation="mlr" (DESIGN 3).

    from structured import hf
    model = AutoModelForCausalLM.from_pretrained("gpt2")
    hf.use_mlr_attention(model, ranks=(32, 16, 16), sort=True)
    model.save_pretrained("folder")
    model = AutoModelForCausalLM.from_pretrained("folder")

`config.mlr` holds the levels: {"ranks", "block_sizes", "weighting", "pairs" if sorted}. A saved config names its
attention, so that a folder loads as what it is, and is refused by transformers, whatever the class that reads it, where
this module is not imported. Layers with a sliding window keep it (`window_attention`).

Scores are those of the model: scaling q_i . k_j, of the features whose levels i and j share. A pair that shares all
levels has the model's own score, and one level is the model's attention. weighting="shared" multiplies a pair's score
by the number of levels over the number that it shares, so that far scores are not the smaller for their fewer levels.

Positions, and with them the blocks, count the tokens of a sequence: padding, left or right, and sequences packed into
one row (`position_ids` that restart, or `cu_seq_lens_q`) change nothing for any of them.
"""

import functools

import torch
import torch.nn.functional as F

try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
    from transformers.masking_utils import flash_attention_mask
except ImportError:
    raise ImportError("structured.hf is for models of transformers: pip install 'transformers>=5.16,<6'") from None

from structured.errors import BadInput
from structured.functional import attention, check_levels, default_block_sizes, mlr_attention, window_attention

WEIGHTINGS = ("none", "shared")
ROTATED = {"gpt2": False, "llama": True, "mistral": True, "qwen2": True, "qwen3": True}  # heads turned in halves (RoPE)


def use_mlr_attention(model, ranks, block_sizes=None, weighting="none", sort=False):
    """Give a model of transformers MLR attention in place of its own; gives the model back.

    Args:
        model: a GPT-2, Llama, Mistral, Qwen2 or Qwen3, with the head of a language model or another.
        ranks: features of every level, coarse to fine; they add up to the width of a head. Where heads are turned by
            RoPE, which pairs feature i with i + width / 2, a level takes whole pairs, so that ranks are even, and the
            coarse ones the pairs that turn slowest, or with `sort` those that weigh most.
        block_sizes: block length of every level in tokens; None: halved level by level from the model's
            max_position_embeddings. Tokens that share no block of any level have the score 0.
        weighting: "none" or "shared", see the head of this module.
        sort: for a trained model and weighting "none": each head's features first come in the order of their weight in
            its scores, so that far scores lose little. See `sort_features` and `sorted_pairs`; without it all weights
            stay what they are.

    Raises:
        BadInput, the model untouched: another kind of model, levels that cannot be.
    """
    config = model.config
    if block_sizes is None:
        block_sizes = default_block_sizes(config.max_position_embeddings, len(ranks))
    ranks, block_sizes, weighting = checked(config, ranks, block_sizes, weighting)
    config.mlr = dict(ranks=list(ranks), block_sizes=list(block_sizes), weighting=weighting)
    if sort and ROTATED[config.model_type]:
        config.mlr["pairs"] = sorted_pairs(model)
    elif sort:
        sort_features(model)
    model.set_attn_implementation("mlr")
    return model


@torch.no_grad()
def sort_features(model):
    """Turn the queries and keys of every head of a GPT-2 so that those features come first that weigh most in scores.

    The model stays the same function: what turns queries is undone by what turns keys. A head's scores are
    x_i^T W_q W_k^T x_j; its features become the singular vectors of W_q W_k^T, for inputs as the LayerNorm before it
    scales them.
    """
    for block in model.base_model.h:
        c, norm, H = block.attn.c_attn, block.ln_1, block.attn.num_heads
        weights = torch.cat([c.weight, c.bias[None]]).double()  # (D + 1, 3 D), for inputs (x, 1)
        scaled = norm.weight.double()[:, None] * weights[:-1]
        shift = norm.bias.double() @ weights[:-1] + weights[-1]
        q, k, _ = torch.cat([scaled, shift[None]]).unflatten(1, (3, H, -1)).permute(1, 2, 0, 3)  # (H, D + 1, d)
        r_q, r_k = (torch.linalg.qr(x, "r").R for x in (q, k))
        u, sizes, vh = torch.linalg.svd(r_q @ r_k.mT)
        turns = [torch.linalg.pinv(r) @ (x * sizes.sqrt()[:, None]) for r, x in ((r_q, u), (r_k, vh.mT))]
        for i, turn in enumerate(turns):
            of = slice(i * len(c.weight), (i + 1) * len(c.weight))
            turned = torch.einsum("nhd, hde -> nhe", weights[:, of].unflatten(1, (H, -1)), turn).flatten(1)
            c.weight[:, of], c.bias[of] = turned[:-1].to(c.weight), turned[-1].to(c.bias)


@torch.no_grad()
def sorted_pairs(model):
    """For every layer and key head the pairs of features that RoPE turns, those first that weigh most in scores.

    The weight of a pair is the norm of what makes its queries times that of what makes its keys, for inputs as the norm
    before them scales them, summed over the query heads of a key head.
    """
    orders = []
    for layer in model.base_model.layers:
        sizes = []
        for name in ("q", "k"):
            linear, norm = (getattr(layer.self_attn, f"{name}_{part}", None) for part in ("proj", "norm"))
            weights = linear.weight * layer.input_layernorm.weight
            if linear.bias is not None:
                weights = torch.cat([weights, linear.bias[:, None]], 1)
            weights = weights.unflatten(0, (-1, layer.self_attn.head_dim))
            if norm is not None:
                weights = weights * norm.weight[:, None]
            sizes.append(weights.unflatten(1, (2, -1)).float().norm(dim=(1, 3)))  # (heads, pairs)
        of_queries, of_keys = sizes
        shares = of_queries.unflatten(0, (len(of_keys), -1)).sum(1) * of_keys
        orders.append(shares.argsort(-1, descending=True).tolist())
    return orders


def checked(config, ranks, block_sizes, weighting="none", pairs=None):
    """The levels as tuples and a name; BadInput where a model of this config cannot have them."""
    kind = config.model_type
    if kind not in ROTATED or getattr(config, "add_cross_attention", False):
        what = "cross-attention" if kind in ROTATED else f"models of type '{kind}'"
        raise BadInput(f"no MLR attention for {what}; there is for decoders of type {', '.join(ROTATED)}")
    if getattr(config, "sliding_window", None) and "full_attention" not in getattr(config, "layer_types", ()):
        words = f"all layers of this {kind} have a sliding window of {config.sliding_window}"
        raise BadInput(f"{words}, which they keep; without it, config.sliding_window = None, they can have levels")
    if weighting not in WEIGHTINGS:
        raise BadInput(f"no level weighting '{weighting}' here, there are {', '.join(WEIGHTINGS)}")
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    ranks, block_sizes = check_levels(ranks, block_sizes, weighting, width)
    if ROTATED[kind] and any(r % 2 for r in ranks):
        raise BadInput(f"ranks {ranks}: RoPE turns pairs of features, which stay in one level; give even ranks")
    return ranks, block_sizes, weighting


def attend(
    module, query, key, value, attention_mask, scaling, dropout=0.0, is_causal=None, sliding_window=None,
    position_ids=None, cu_seq_lens_q=None, cu_seq_lens_k=None, max_length_q=None, max_length_k=None,
    softcap=None, s_aux=None, **kwargs,
):  # fmt: skip
    """The attention function that models call: q (B, H, Tq, r), k and v (B, G, Tk, r) -> (B, Tq, H, r), no weights.

    attention_mask: (B, Tk), True for tokens, or None for tokens alone, as `token_mask` gives it; or the caller's own
    (B, 1, Tq, Tk), which then is all that hides keys. Outputs of padding are 0.
    """
    if softcap is not None or s_aux is not None:
        raise BadInput("MLR attention has no softcap and no attention sinks (s_aux)")
    B, H, T, _ = query.shape
    function, query, key = chosen(module, query, key, scaling, sliding_window)
    causal = module.is_causal if is_causal is None else is_causal
    function = functools.partial(function, dropout=dropout, causal=causal)
    if cu_seq_lens_q is not None:
        starts = cu_seq_lens_q if key.shape[2] == T else (cu_seq_lens_q, cu_seq_lens_k)
        longest = None if max_length_q is None else max(max_length_q, max_length_k)
        out = function(query, key, value, cu_seqlens=starts, max_seqlen=longest)
    elif attention_mask is not None and attention_mask.ndim == 4:
        out = function(query, key, value, attn_mask=attention_mask, causal=False)
    elif attention_mask is not None:
        out = of_tokens(function, query, key, value, attention_mask)
    elif (starts := restarts(position_ids, B, T)) is not None:
        out = function(flat(query), flat(key), flat(value), cu_seqlens=starts, max_seqlen=T)
    else:
        out = function(query, key, value)
    return out.transpose(1, 2).reshape(B, T, H, value.shape[3]), None


def chosen(module, q, k, scaling, sliding_window):
    """(function of queries, keys and values, queries and keys as it takes them) of a layer."""
    config = module.config
    if sliding_window is not None:  # transformers counts the token itself
        return functools.partial(window_attention, window=sliding_window - 1, scale=scaling), q, k
    if not getattr(config, "mlr", None):
        raise BadInput("this model's config has no levels; give it some: structured.hf.use_mlr_attention(model, ranks)")
    ranks, block_sizes, weighting = checked(config, **config.mlr)
    if min(block_sizes) >= k.shape[2]:  # all pairs share all levels
        return functools.partial(attention, scale=scaling), q, k
    if ROTATED[config.model_type]:
        order = config.mlr.get("pairs")
        q, k = (in_pairs(x, None if order is None else order[module.layer_idx]) for x in (q, k))
    factor = scaling * (len(ranks) if weighting == "shared" else 1)
    q = torch.cat([q_l * (factor * r) for q_l, r in zip(q.split(ranks, -1), ranks, strict=True)], -1)
    options = dict(ranks=ranks, block_sizes=block_sizes, weighting=weighting)
    return functools.partial(mlr_attention, **options), q, k


def in_pairs(x, order=None):
    """Features i and i + r / 2, which RoPE turns together, side by side: (B, H, T, r) -> (B, H, T, r).

    order: which pairs come first, r / 2 numbers for each key head, of which there are H or fewer; None: the slowest.
    """
    x = x.unflatten(-1, (2, -1))
    if order is None:
        return x.flip(-1).mT.flatten(-2)
    order = torch.tensor(order, device=x.device).repeat_interleave(x.shape[1] // len(order), 0)
    return x.gather(-1, order[:, None, None].expand_as(x)).mT.flatten(-2)


def of_tokens(function, q, k, v, mask):
    """function(q, k, v) of the tokens alone, each row's as one packed sequence; mask (B, Tk) is True for them."""
    Tq, Tk = q.shape[2], k.shape[2]
    at_k, starts_k = places(mask)
    at_q, starts_q = (at_k, starts_k) if Tq == Tk else places(mask[:, -Tq:])
    starts = starts_k if Tq == Tk else (starts_q, starts_k)
    rows = flat(q)
    out = function(rows[:, :, at_q], flat(k)[:, :, at_k], flat(v)[:, :, at_k], cu_seqlens=starts, max_seqlen=Tk)
    return out.new_zeros(*rows.shape[:3], out.shape[3]).index_copy(2, at_q, out)


def places(mask):
    """Where a mask (B, T) is True, in all its rows one after the other, and the starts of the rows there, (B + 1,)."""
    return mask.flatten().nonzero()[:, 0], F.pad(mask.sum(1).cumsum(0), (1, 0))


def restarts(position_ids, B, T):
    """The starts (N + 1,) of sequences in B rows laid end to end, where positions restart; None where none does."""
    if position_ids is None or not (breaks := position_ids.diff(dim=1) != 1).any():
        return None
    first = F.pad(breaks, (1, 0), value=True).expand(B, T).flatten()
    return F.pad(first.nonzero()[:, 0], (0, 1), value=B * T)


def flat(x):
    """(B, H, T, r) -> (1, H, B * T, r), the rows one after the other."""
    return x.transpose(0, 1).flatten(1, 2)[None]


def token_mask(*, q_length, kv_length, q_offset=0, kv_offset=0, attention_mask=None, **options):
    """What `attend` gets as its mask: (B, Tk), True for tokens, or None where all are; BadInput for a static cache."""
    if kv_offset + kv_length > q_offset + q_length:
        words = f"{kv_offset + kv_length} keys for the first {int(q_offset) + q_length} positions"
        raise BadInput(f"{words}: MLR attention takes no StaticCache; cache_implementation=None makes a DynamicCache")
    lengths = dict(q_length=q_length, kv_length=kv_length)
    return flash_attention_mask(**lengths, attention_mask=attention_mask, **options)


def naming_attention(to_dict):
    """PreTrainedConfig.to_dict with an entry for MLR attention, which transformers reads but does not write."""

    @functools.wraps(to_dict)
    def written(config):
        named = dict(attn_implementation="mlr") if config._attn_implementation == "mlr" else {}
        return to_dict(config) | named

    return written


AttentionInterface.register("mlr", attend)
AttentionMaskInterface.register("mlr", token_mask)
PreTrainedConfig.to_dict = naming_attention(PreTrainedConfig.to_dict)
