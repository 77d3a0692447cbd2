"""What generation keeps of the tokens it has seen, so that one more token costs one row of scores (DESIGN 3).

A cache belongs to one layer. It is allocated once, for `batch` sequences of up to `length` tokens:

    KeyCache     keys and values of every position; of the last window + 1 positions for sliding-window attention
    GSWACache    keys of the global part everywhere, of the window part in the window; every value
    LevelCache   level l keeps the keys of the current level-l block only, b_l of them; every value
    InputCache   bilinear x^T M x': the inputs x, which all heads share, one more number a head; every value

Keys are kept as they are scored: those that know where they are (structured/position.py) know their own position.

The position lives on the device (`at`), and shapes depend on it only through the next power of two, and with the fused
kernel not at all: there a step is captured in a CUDA graph and replayed (`ReplayedStep`). Heads are grouped by the key
head they share: q is (B, G, H / G, r) here.
"""

import functools

import torch
import torch.nn.functional as F

from structured.errors import BadInput
from structured.layers import BlockDiagonal, cap_norm


class Slots:
    """The newest `size` of the rows written so far, (B, G, size, width): position j lies in slot j % size.

    Keys lie feature by feature in memory, (B, G, width, size): at any rank, neighbouring positions are neighbours.
    """

    def __init__(self, B, G, size, width, *, device, dtype, by_feature=True):
        shape = (B, G, width, size) if by_feature else (B, G, size, width)
        rows = torch.zeros(shape, device=device, dtype=dtype)  # not empty: what is masked out must not be NaN
        self.rows, self.size = rows.mT if by_feature else rows, size

    def fill(self, rows):
        """Keep what is still needed of positions 0 to T - 1, given as (B, G, T, width)."""
        T = rows.shape[2]
        kept = torch.arange(max(0, T - self.size), T, device=rows.device)
        self.rows.index_copy_(2, kept % self.size, rows[:, :, kept].detach().to(self.rows.dtype))

    def write(self, row, at):
        """One more position, (B, G, 1, width), in place of the oldest."""
        self.rows.index_copy_(2, at % self.size, row.detach().to(self.rows.dtype))

    def first(self, n):
        """The slots that the first n positions can have reached."""
        return self.rows[:, :, :n]

    @property
    def nbytes(self):
        return self.rows.untyped_storage().nbytes()


class KeyCache:
    """Keys and values of every position, or of the last `window` + 1.

    `scoring` is the module that it serves. `count` is how many tokens it holds; `at`, on the device, the position of
    the newest one (-1 when empty). A captured step moves only `at`: call `recount` after replays.
    """

    def __init__(self, scoring, B, length, *, device, dtype):
        self.scoring, self.cfg = scoring, scoring.cfg
        self.batch, self.length = B, length
        self.device, self.dtype = device, dtype or torch.get_default_dtype()
        self.count, self.at = 0, torch.full((1,), -1, device=device)
        self.keys = self.key_slots()
        self.values = self.slots(self.newest(), self.cfg.d_head, by_feature=False)

    def slots(self, size, width, **options):
        options = dict(device=self.device, dtype=self.dtype) | options
        return Slots(self.batch, self.cfg.kv_heads, size, width, **options)

    def newest(self):
        """How many values are kept."""
        window = self.scoring.window
        return self.length if window is None else min(window + 1, self.length)

    def key_slots(self):
        return [self.slots(self.newest(), self.scoring.key_width)]

    def rows(self, x, k):
        """What is kept of the keys of x: as many tensors (B, ., T, .) as there are `keys`."""
        return [k]

    def prefill(self, x, v):
        """Attend to a whole prompt, x (B, T, D) and v (B, G, T, d), and keep it; the cache must be empty."""
        B, T, _ = x.shape
        self.check(B, T)
        if self.count:
            raise BadInput(f"a prompt of {T} tokens begins at position 0, the cache already holds {self.count}")
        q, k = self.scoring.place(*self.scoring.queries_and_keys(x))
        for slots, rows in zip([*self.keys, self.values], [*self.rows(x, k), v], strict=True):
            slots.fill(rows)
        self.count = T
        self.at.fill_(T - 1)
        return self.scoring.attend(q, k, v)

    def step(self, x, v):
        """Keep one more token, x (B, 1, D) and v (B, G, 1, d), and attend from it: (B, H, 1, d)."""
        B, T, _ = x.shape
        self.check(B, T)
        if T != 1:
            raise BadInput(f"a step takes 1 token, not {T}; a cache that holds {self.count} tokens takes no prompt")
        q, rows = self.query_and_rows(x)
        self.count += 1
        self.at += 1
        self.write([*rows, v])
        q = q.unflatten(1, (self.cfg.kv_heads, -1)).squeeze(3)  # (B, G, H / G, width)
        return self.attend(q).to(v.dtype).flatten(1, 2).unsqueeze(2)

    def query_and_rows(self, x):
        q, k = self.scoring.place(*self.scoring.queries_and_keys(x), self.at + 1)
        return q, self.rows(x, k)

    def write(self, rows):
        """Keep one more position: a row for each of the `keys`, and the values'."""
        places = [*self.keys, self.values]
        kernels = self.kernels()
        if kernels:
            kernels.write_rows([slots.rows for slots in places], [row.detach() for row in rows], self.at)
            return
        for slots, row in zip(places, rows, strict=True):
            slots.write(row, self.at)

    def attend(self, q):
        scale, size = self.scoring.scores_scale, self.values.size
        kernels = self.kernels()
        if kernels:
            return kernels.mlr_decode(q, [self.keys[0].rows], self.values.rows, self.at, (size,), (scale,))
        k, v = self.keys[0].first(self.reach), self.values.first(self.reach)
        seen = torch.arange(k.shape[2], device=k.device) <= self.at
        return self.mix(row_scores(q, k, scale), v, seen)

    @property
    def reach(self):
        """Positions that a step computes over, the masked ones too: the next power of two."""
        return min(self.length, 1 << (self.count - 1).bit_length())

    def mix(self, scores, v, seen):
        """The rows of scores (B, G, H / G, n) weigh the values (B, G, n, d) of the positions seen, (n,)."""
        return mix_row(scores, v, seen, **self.link_options())

    def link_options(self):
        options = self.scoring.options()
        return dict(link=options["link"], dropout=options["dropout"])

    def kernels(self):
        """kernels/decode.py, where it can serve: softmax without dropout, up to 128 features, no float64."""
        width = max(sum(slots.rows.shape[-1] for slots in self.keys), self.cfg.d_head)
        fits = width <= 128 and self.dtype != torch.float64 and self.cfg.backend in ("auto", "triton")
        plain = self.link_options() == dict(link="softmax", dropout=0.0)
        return _decode_kernels(self.at.device) if fits and plain else None

    @property
    def replayable(self):
        """Whether a step launches the same work at every position."""
        return self.kernels() is not None

    def check(self, B, T):
        if self.batch != B:
            raise BadInput(f"the cache keeps {self.batch} sequences, here are {B}")
        if self.count + T > self.length:
            raise BadInput(f"the cache holds {self.count} of {self.length} tokens, {T} more do not fit")

    def recount(self):
        """Take the number of tokens from the device, after replays of a captured step; waits for the device."""
        self.count = self.at.item() + 1

    @property
    def key_bytes(self):
        """Memory allocated for keys, or for what stands in for them."""
        return sum(slots.nbytes for slots in self.keys)

    @property
    def value_bytes(self):
        return self.values.nbytes

    @property
    def nbytes(self):
        return self.key_bytes + self.value_bytes


class GSWACache(KeyCache):
    """Global + sliding-window attention: the window part's keys are a ring, its values are found among all."""

    replayable = False

    def key_slots(self):
        far, near = self.cfg.gswa_ranks
        return [self.slots(self.length, far), self.slots(min(self.cfg.window + 1, self.length), near)]

    def rows(self, x, k):
        return k.split(self.cfg.gswa_ranks, -1)

    def attend(self, q):
        (q_far, q_near), (far, near) = q.split(self.cfg.gswa_ranks, -1), self.keys
        far_scale, near_scale = self.scoring.scales
        v, k = self.values.first(self.reach), near.first(self.reach)
        slot = torch.arange(v.shape[2], device=v.device)
        kernels = self.kernels()
        if kernels:
            everywhere = kernels.mlr_decode(q_far, [far.rows], self.values.rows, self.at, (far.size,), (far_scale,))
        else:
            everywhere = self.mix(row_scores(q_far, far.first(self.reach), far_scale), v, slot <= self.at)
        position = self.at - (self.at - slot[: k.shape[2]]) % near.size  # of the key in each slot, < 0 if none yet
        inside = v.index_select(2, position.clamp(min=0))
        return everywhere + self.mix(row_scores(q_near, k, near_scale), inside, position >= 0)


class LevelCache(KeyCache):
    """MLR attention: level l keeps the keys of the current block, overwritten when the next block begins."""

    def key_slots(self):
        ranks, blocks, _ = self.scoring.levels
        return [self.slots(min(b, self.length), r) for r, b in zip(ranks, blocks, strict=True) if r]

    def rows(self, x, k):
        return [k_l for k_l in k.split(self.scoring.levels.ranks, -1) if k_l.shape[-1]]

    def attend(self, q):
        ranks, blocks, weighting = self.scoring.levels
        levels = len(ranks) if weighting == "levels" else 1
        used = [(b, 1 / (r * levels)) for r, b in zip(ranks, blocks, strict=True) if r]
        geometry = (*zip(*used, strict=True), blocks if weighting == "shared" else ())
        kernels = self.kernels()
        if kernels:
            return kernels.mlr_decode(q, [slots.rows for slots in self.keys], self.values.rows, self.at, *geometry)
        keys, v = [slots.first(self.reach) for slots in self.keys], self.values.first(self.reach)
        return mlr_decode_reference(q, keys, v, self.at, *geometry, **self.link_options())


class InputCache(KeyCache):
    """x_i . LayerNorm(M_h x_j) from the inputs x_j and one number for each head, 1 / std(M_h x_j).

    LayerNorm is g * (y - mean y) / std y, and centring can be moved to the other side:
    x_i . LayerNorm(M_h x_j) = w_h . x_j / std(M_h x_j) with w_h = M_h^T centred(g * x_i), one product a step.
    """

    def key_slots(self):
        D, options = self.cfg.d_model, dict(device=self.device)
        precise = torch.promote_types(self.dtype, torch.float32)
        return [
            Slots(self.batch, 1, self.length, D, dtype=self.dtype, **options),
            Slots(self.batch, self.cfg.n_head, self.length, 1, dtype=precise, **options),
        ]

    def rows(self, x, k=None):
        y = self.scoring.key(x).transpose(1, 2)  # (B, H, T, D)
        variance = y.to(self.keys[1].rows.dtype).var(-1, correction=0, keepdim=True)
        return [x.unsqueeze(1), (variance + self.scoring.key_norm.eps).rsqrt()]

    def kernels(self):
        return None  # one input serves all heads, any number of features

    def query_and_rows(self, x):
        u = x * self.scoring.key_norm.weight
        w = apply_transposed(self.scoring.key, u - u.mean(-1, keepdim=True))  # (B, 1, H, D)
        return w.transpose(1, 2), self.rows(x)

    def attend(self, q):
        inputs, inverse_std = (slots.first(self.reach) for slots in self.keys)
        scores = row_scores(q.transpose(1, 2), inputs, self.scoring.scores_scale).transpose(1, 2) * inverse_std.mT
        seen = torch.arange(scores.shape[-1], device=scores.device) <= self.at
        return self.mix(scores, self.values.first(self.reach), seen)


class ModelCache:
    """The caches of all layers of a model."""

    def __init__(self, layers):
        self.layers = layers

    @property
    def count(self):
        """How many tokens every layer holds."""
        return self.layers[0].count

    def next_positions(self, x):
        """Positions (T,) of the next tokens x (B, T, D), as a captured step needs them: from the device."""
        B, T, _ = x.shape
        counts = [layer.count for layer in self.layers]
        if any(count != counts[0] for count in counts):
            raise BadInput(f"the caches of the layers hold {counts} tokens; they must move together")
        self.layers[0].check(B, T)
        return self.layers[0].at + 1 + torch.arange(T, device=x.device)

    def recount(self):
        """As `KeyCache.recount`, for every layer."""
        for layer in self.layers:
            layer.recount()

    @property
    def key_bytes(self):
        return sum(layer.key_bytes for layer in self.layers)

    @property
    def value_bytes(self):
        return sum(layer.value_bytes for layer in self.layers)

    @property
    def nbytes(self):
        return self.key_bytes + self.value_bytes


class ReplayedStep:
    """`step(token)`, which takes one more token through a ModelCache: from the third call on as a CUDA graph.

    The host then gives one command a token instead of some hundred. Where a layer's work depends on the position every
    call runs `step`. The output of a call stands where the next one puts its own.
    """

    WARM_UP = 2  # calls in which kernels are compiled

    def __init__(self, step, cache):
        self.step, self.cache = step, cache
        self.replayable = all(layer.replayable for layer in cache.layers)
        self.calls, self.graph = 0, None

    def __call__(self, token):
        self.calls += 1
        if not self.replayable or self.calls <= self.WARM_UP:
            return self.step(token)
        if self.graph is None:
            self.token = token.clone()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # which counts the token and computes nothing
                self.out = self.step(self.token)
        else:
            self.token.copy_(token)
            for layer in self.cache.layers:
                layer.count += 1
        self.graph.replay()
        return self.out


def row_scores(q, k, scale):
    """The newest row of scores: q (B, G, S, r), k (B, G, n, r) -> (B, G, S, n), at least as precise as q."""
    return ((q * scale).to(k.dtype) @ k.mT).to(q.dtype)


def mix_row(scores, v, seen, *, link="softmax", dropout=0.0):
    """Link function over the positions seen, then values: scores (B, G, S, n), v (B, G, n, d), seen (n,)."""
    if link == "softmax":
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    else:
        weights = scores.masked_fill(~seen, 0)
    return (F.dropout(weights, dropout) if dropout else weights).to(v.dtype) @ v


def mlr_decode_reference(q, keys, v, at, block_sizes, scales, shared=(), *, link="softmax", dropout=0.0):
    """One row of MLR attention from the keys of the current blocks: what the kernel in kernels/decode.py computes.

    q (B, G, S, sum of ranks); keys[l] (B, G, size, r_l), the block that position `at` (1,) is in, oldest first;
    v (B, G, n, d). Scores of a level are multiplied by scales[l]; the sum is divided by the number of blocks of
    `shared` that two positions have in common, if any are given.
    """
    n = v.shape[2]
    position = torch.arange(n, device=q.device)
    scores = q.new_zeros(*q.shape[:3], n)
    widths = [k.shape[-1] for k in keys]
    for q_l, k, b, scale in zip(q.split(widths, -1), keys, block_sizes, scales, strict=True):
        begin, slot = at // b * b, position[: k.shape[2]]
        near = row_scores(q_l, k, scale).masked_fill(slot > at - begin, 0)
        scores.index_add_(-1, (begin + slot).clamp(max=n - 1), near)
    if shared:
        scores = scores / sum((position // b == at // b).long() for b in shared).clamp(min=1)
    return mix_row(scores, v, position <= at, link=link, dropout=dropout)


def apply_transposed(matrix, u):
    """M_h^T u for every head of an MLBTC: u (..., n_out) -> (..., n_head, n_in), factor by factor."""
    heads = u.reshape(-1, 1, matrix.n_out).expand(-1, matrix.n_head, -1)  # (N, H, n_out)
    total = 0
    for alpha, chain in zip(matrix.alphas, matrix.levels, strict=True):
        y = heads
        for factor in reversed(chain):
            y = _block_diagonal_transposed(factor, y) if isinstance(factor, BlockDiagonal) else _grid_back(factor, y)
        total = total + alpha * y.flatten(2)
    return total.unflatten(0, u.shape[:-1])


def _block_diagonal_transposed(factor, y):
    """(N, H, blocks * d_out) -> (N, H, blocks, d_in)."""
    weight = cap_norm(factor.weight) if factor.norm_cap else factor.weight
    y = y.reshape(*y.shape[:2], factor.blocks, factor.d_out)
    if factor.fan_out:
        weight = weight.unflatten(-1, (factor.n_head, factor.d_out)).expand(factor.blocks, -1, -1, -1)
        return torch.einsum("nhko,kiho->nhki", y, weight)
    weight = weight.unflatten(0, (factor.n_head, -1)).expand(-1, factor.blocks, -1, -1)
    return torch.einsum("nhko,hkio->nhki", y, weight)


def _grid_back(permutation, y):
    """The inverse of a GridTranspose."""
    batch, p, q, s = permutation.grid
    return y.reshape(*y.shape[:2], batch, q, p, s).transpose(3, 4)


@functools.cache
def _decode_kernels(device):
    """The module of decode kernels for a CUDA device of the last years, or None; also where there is no Triton."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        from structured.kernels import decode
    except ImportError:
        return None
    return decode
