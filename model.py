"""A transformer whose attention takes any scoring function of `structured/`, and its three heads.

GPT predicts the next token, InContextRegressor the y of every x of a prompt, Forecaster the next hours of a series.
Pre-norm blocks, MLP of width 4 d_model with GELU, no biases unless asked for. Parameters state their role for
maximal update parametrization; `training/mup.py` initialises them. Geometry is computed, never stored in a checkpoint.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from structured import STRUCTURES, BadInput, ScoringConfig, build_scoring
from structured.cache import ModelCache, ReplayedStep
from structured.layers import BlockDiagonal, Linear


@dataclass(frozen=True)
class ModelConfig:
    """The trunk that all heads share. `scoring` holds widths, heads, block_size, scoring function and position."""

    scoring: ScoringConfig
    n_layer: int
    dropout: float = 0.0
    bias: bool = False
    gelu: str = "none"  # how GELU is approximated, as in F.gelu: none or tanh

    def __post_init__(self):
        if self.n_layer < 1:
            raise BadInput(f"n_layer is {self.n_layer}, it must be at least 1")
        if not 0 <= self.dropout < 1:
            raise BadInput(f"dropout is {self.dropout}, it must be at least 0 and below 1")
        STRUCTURES[self.scoring.structure].check_layers(self.scoring, self.n_layer)


class Compute(NamedTuple):
    """Multiply-adds of one forward pass over one sequence of T tokens (DESIGN 7).

    macs: everything; non_emb: without embeddings and output head; paper: the paper's own axis.
    """

    macs: int
    non_emb: int
    paper: int


class Attention(nn.Module):
    """Values in, a scoring function, output projection: the same for every structure."""

    def __init__(self, cfg, layer):
        super().__init__()
        s = cfg.scoring
        self.d_head = s.d_head
        self.scoring = build_scoring(s, layer)
        self.value = Linear(s.d_model, s.kv_heads * s.d_head, role="hidden", bias=cfg.bias)
        self.c_proj = Linear(s.d_model, s.d_model, role="output", bias=cfg.bias)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x, cache=None):
        if cache is None:
            y = self.scoring.mix(x, self.value)  # (B, H, T, d_head)
        else:
            v = self.value(x).unflatten(-1, (-1, self.d_head)).transpose(1, 2)  # (B, G, T, d_head)
            y = cache.extend(x, v)
        return self.dropout(self.c_proj(y.transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        d_model = cfg.scoring.d_model
        self.c_fc = Linear(d_model, 4 * d_model, role="hidden", bias=cfg.bias)
        self.c_proj = Linear(4 * d_model, d_model, role="output", bias=cfg.bias)
        self.dropout, self.gelu = nn.Dropout(cfg.dropout), cfg.gelu

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate=self.gelu)))


class Block(nn.Module):
    def __init__(self, cfg, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(cfg.scoring.d_model, bias=cfg.bias)
        self.attn = Attention(cfg, layer)
        self.ln_2 = nn.LayerNorm(cfg.scoring.d_model, bias=cfg.bias)
        self.mlp = MLP(cfg)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class Embedding(nn.Embedding):
    """A table of vectors: role "embedding"."""

    role = "embedding"
    fan_in = 1


class Trunk(nn.Module):
    """Adds position embeddings, if learned, to (B, T, d_model), runs the blocks and the last LayerNorm."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        learned = cfg.scoring.position == "learned"
        self.wpe = Embedding(cfg.scoring.block_size, cfg.scoring.d_model) if learned else None
        self.dropout = nn.Dropout(cfg.dropout)
        self.h = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_layer))
        self.ln_f = nn.LayerNorm(cfg.scoring.d_model, bias=cfg.bias)

    def forward(self, x, cache=None):
        """With a cache, x are the tokens, one or more, that follow those that the cache holds."""
        T, longest = x.shape[1], self.cfg.scoring.block_size
        if longest < T:
            raise BadInput(f"a sequence of {T} tokens does not fit block_size = {longest}")
        at = None if cache is None else cache.next_positions(x)
        if self.wpe is not None:
            x = x + (self.wpe.weight[:T] if at is None else self.wpe(at))
        x = self.dropout(x)
        for block, layer in zip(self.h, [None] * len(self.h) if cache is None else cache.layers, strict=True):
            x = block(x, layer)
        return self.ln_f(x)

    def new_cache(self, B, length, slack=0):
        """An empty cache for B sequences of up to `length` tokens, in the precision that the model runs in.

        slack: how many tokens can always be taken back (cache.crop).
        """
        weight = self.ln_f.weight
        device, dtype = weight.device, weight.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        return ModelCache([block.attn.scoring.new_cache(B, length, device, dtype, slack) for block in self.h])

    def macs(self, T):
        """(executed, paper) multiply-adds of one sequence of T tokens; the paper adds 5 per LayerNorm element."""
        linear = T * sum(m.macs for m in self.modules() if isinstance(m, Linear | BlockDiagonal))
        costs = [block.attn.scoring.cost(T) for block in self.h]
        norms = sum(c.norm_elements for c in costs) + T * self.cfg.scoring.d_model * (2 * len(self.h) + 1)
        return linear + sum(c.executed for c in costs), linear + sum(c.paper for c in costs) + 5 * norms


class Head(nn.Module):
    """What the three models share: the trunk and the counting of parameters."""

    def __init__(self, cfg):
        super().__init__()
        self.trunk = Trunk(cfg)

    @property
    def block_size(self):
        return self.trunk.cfg.scoring.block_size

    def num_params(self):
        """(total, without embeddings and output head)."""
        total, trunk = (sum(p.numel() for p in m.parameters()) for m in (self, self.trunk))
        wpe = self.trunk.wpe
        return total, trunk - (0 if wpe is None else wpe.weight.numel())


class GPT(Head):
    """Language model: token ids (B, T) -> logits (B, T, vocab_size), and the loss in nats per token given targets.

    tied: the output head is the table of token embeddings, as in GPT-2.
    """

    def __init__(self, cfg, vocab_size, tied=False):
        super().__init__(cfg)
        self.wte = Embedding(vocab_size, cfg.scoring.d_model)
        self.lm_head = Linear(cfg.scoring.d_model, vocab_size, role="output")
        if tied:
            self.lm_head.weight = self.wte.weight

    def forward(self, idx, targets=None, cache=None):
        x = self.trunk(self.wte(idx), cache)
        if targets is None:
            return self.lm_head(x)
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def compute(self, T):
        executed, paper = self.trunk.macs(T)
        return Compute(executed + T * self.lm_head.macs, executed, paper)

    @torch.no_grad()
    def generate(
        self, idx, max_new_tokens, *, temperature=1.0, top_k=None, generator=None, use_cache=None, lengths=None
    ):  # fmt: skip
        """Append max_new_tokens to every prompt, one at a time; temperature 0 takes the likeliest token.

        The context is cropped to the last block_size tokens. Up to there a key cache makes a token cost one row of
        scores; from there on every token moves all positions, nothing kept stays true, and the context is recomputed.

        Args:
            idx: prompts (B, T), or a list of B prompts (T_b,) of any lengths.
            lengths: how many tokens of each row of (B, T) are its prompt; None: all.
            top_k: only the k likeliest tokens are drawn; None: all.
            generator: of the draws, which the rows share: a row's text depends on the other rows. Greedy text does not.
            use_cache: None: where every layer declares a cache; False: recompute always, the same tokens; True: or
                BadInput.

        Returns:
            (B, T + max_new_tokens), or for a list or lengths a list of (T_b + max_new_tokens,): what each prompt alone
            gives. The prompts are read together as far as the shortest goes, then token by token.

        Raises:
            BadInput: an empty prompt, prompts or lengths that are not as above, settings out of range.
        """
        ragged = lengths is not None or not isinstance(idx, torch.Tensor)
        prompts, lengths = _padded(idx, lengths)
        if temperature < 0 or (top_k is not None and top_k < 1):
            words = "a temperature is at least 0, top_k at least 1 (None: all tokens)"
            raise BadInput(f"temperature {temperature}, top_k {top_k}: {words}")
        if use_cache is None:
            use_cache = all(block.attn.scoring.cache_type is not None for block in self.trunk.h)
        shortest, longest, step = min(lengths), max(lengths), None
        given = torch.arange(longest, device=prompts.device) < torch.tensor(lengths, device=prompts.device)[:, None]
        idx = prompts[:, :shortest]
        for T in range(shortest, longest + max_new_tokens):
            if not use_cache or self.block_size < T:
                logits = self._last_logits(idx[:, -self.block_size :])
            elif step is None:
                length = -(-(longest + max_new_tokens) // 16) * 16  # whole vectors of memory
                cache = self.trunk.new_cache(len(idx), min(length, self.block_size))
                step = ReplayedStep(functools.partial(self._last_logits, cache=cache), cache)
                logits = self._last_logits(idx, cache)
            else:
                logits = step(idx[:, -1:])
            token = draw(logits, temperature, top_k, generator)
            if longest > T:
                token = torch.where(given[:, T : T + 1], prompts[:, T : T + 1], token)
            idx = torch.cat([idx, token], 1)
        return [row[: n + max_new_tokens] for row, n in zip(idx, lengths, strict=True)] if ragged else idx

    def _last_logits(self, idx, cache=None):
        """Logits of the token after the last one, float32 (B, vocab_size)."""
        return self.lm_head(self.trunk(self.wte(idx), cache)[:, -1]).float()


def _padded(idx, lengths):
    """Prompts as a tensor (B, T) and the list of their lengths; BadInput unless there is a token in each."""
    if not isinstance(idx, torch.Tensor):
        if lengths is not None or any(row.ndim != 1 for row in idx):
            raise BadInput("prompts are a tensor (B, T), with lengths or without, or a list of tensors (T_b,)")
        lengths = [len(row) for row in idx]
        idx = nn.utils.rnn.pad_sequence(idx, batch_first=True) if lengths else torch.empty(0, 0)
    B, T = idx.shape
    lengths = [T] * B if lengths is None else [int(n) for n in lengths]
    if not lengths or 0 in lengths:
        found = "a prompt has 0" if lengths else "there is no prompt"
        raise BadInput(f"generation goes on from at least 1 token, {found}")
    if len(lengths) != B or min(lengths) < 1 or max(lengths) > T:
        raise BadInput(f"lengths {lengths} are not those of {B} prompts of 1 to {T} tokens")
    return idx, lengths


def draw(logits, temperature, top_k, generator):
    """One token for each row of logits (B, vocab_size): (B, 1)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


class InContextRegressor(Head):
    """In-context regression: tokens x_1, y_1, x_2, y_2, ... (B, 2 points, n_dims) -> predictions of y (B, points).

    The prediction of y_i is read off the token of x_i, which sees the i - 1 examples before it. Another layout of the
    prompt (data/icl_regression/layouts.py) has tokens of n_dims + extra_inputs numbers and is read off `predicting`.
    """

    def __init__(self, cfg, n_dims, extra_inputs=0, predicting=slice(None, None, 2)):
        super().__init__(cfg)
        self.predicting = predicting
        d_model = cfg.scoring.d_model
        self.read_in = Linear(n_dims + extra_inputs, d_model, role="embedding", bias=cfg.bias)
        self.read_out = Linear(d_model, 1, role="output", bias=cfg.bias)

    def forward(self, tokens):
        return self.read_out(self.trunk(self.read_in(tokens))[:, self.predicting]).squeeze(-1)

    def compute(self, T):
        executed, paper = self.trunk.macs(T)
        ends = T * self.read_in.macs
        read = len(range(T)[self.predicting]) * self.read_out.macs
        return Compute(executed + ends + read, executed, paper + ends + T * self.read_out.macs)


class Forecaster(Head):
    """Time series: the past (B, block_size, n_channels) -> the future (B, horizon, n_channels), both standardised.

    An encoder over time steps (build it with causal=False), then one linear map over time and one over features.
    """

    def __init__(self, cfg, n_channels, horizon):
        super().__init__(cfg)
        d_model = cfg.scoring.d_model
        self.read_in = Linear(n_channels, d_model, role="embedding", bias=True)
        self.time = Linear(cfg.scoring.block_size, horizon, role="hidden", bias=True)
        self.read_out = Linear(d_model, n_channels, role="output", bias=True)

    def forward(self, past):
        if past.shape[1] != self.block_size:
            raise BadInput(f"the past has {past.shape[1]} steps, the model reads {self.block_size}")
        x = self.trunk(self.read_in(past))  # (B, block_size, d_model)
        return self.read_out(self.time(x.mT).mT)

    def compute(self, T):
        executed, paper = self.trunk.macs(T)
        time = self.time.macs * self.read_in.out_features
        ends = T * self.read_in.macs + time + self.time.out_features * self.read_out.macs
        return Compute(executed + ends, executed, paper + ends)
