"""What generation keeps of the tokens it has seen, so that one more token costs one row of scores (DESIGN 3).

A cache belongs to one layer. It is allocated once, for `batch` sequences of up to `length` tokens, and takes them in
any portions (`extend`), gives the last ones back (`crop`), and has its sequences chosen anew (`reorder`, `copy`):

    KeyCache     keys and values of every position; of the last window + 1 positions for sliding-window attention
    GSWACache    keys of the global part everywhere, of the window part in the window; every value
    LevelCache   level l keeps the keys of the current level-l block only, b_l of them; every value
    InputCache   bilinear x^T M x': the inputs x, which all heads share, one more number a head; every value

Keys are kept as they are scored: those that know where they are (structured/position.py) know their own position.

The position lives on the device (`at`), and shapes depend on it only through the next power of two, and with the fused
kernel not at all: there a step is captured in a CUDA graph and replayed (`ReplayedStep`). Heads are grouped by the key
head they share: q is (B, G, R, r) here, R = H / G heads times T positions.
"""

import copy
import functools

import torch
import torch.nn.functional as F

from structured.errors import BadInput
from structured.functional import whole
from structured.layers import BlockDiagonal, cap_norm


class Slots:
    """The newest `size` of the rows written so far, (B, G, size, width): position j lies in slot j % size.

    Keys lie feature by feature in memory, (B, G, width, size): at any rank, neighbouring positions are neighbours.
    A position needs the rows of its block of `size` if they are `in_blocks`, else those of the last `size` positions.
    The last `slack` rows that were overwritten are kept aside: what j took the place of, in `spare`, at j % slack.
    """

    def __init__(self, B, G, size, width, *, device, dtype, by_feature=True, in_blocks=False, slack=0):
        shape = (B, G, width, size) if by_feature else (B, G, size, width)
        rows = torch.zeros(shape, device=device, dtype=dtype)  # not empty: what is masked out must not be NaN
        self.rows, self.size = rows.mT if by_feature else rows, size
        self.in_blocks, self.slack = in_blocks, slack
        self.spare = rows.new_zeros(B, G, slack, width) if slack else None
        self.low = 0  # no position before it can be had again, whatever is written: see `lowest`

    def extend(self, rows, n):
        """Keep further rows (B, G, T, width), those of the positions from n on.

        Returns the rows that these may need, they among them, and their positions.
        """
        end, size = n + rows.shape[2], self.size
        rows, first = rows.detach().to(self.rows.dtype), max(0, n - size)
        at = torch.arange(first, end, device=rows.device)  # of the rows held before, then of the new ones
        if end <= size:
            self.rows[:, :, n:end] = rows
            return self.rows[:, :, :end], at
        held = torch.cat([self.rows.index_select(2, at[: n - first] % size), rows], 2) if n else rows
        kept = at[max(n, end - size) - first :]
        self.rows.index_copy_(2, kept % size, held[:, :, kept - first])
        if self.slack:
            lost = at[max(n, size, end - self.slack) - first :] - size
            self.spare.index_copy_(2, (lost + size) % self.slack, held[:, :, lost - first])
        return held, at

    def set_aside(self, at):
        """Keep in `spare` what position `at` (1,) is about to take the place of."""
        if self.slack:
            self.spare.index_copy_(2, at % self.slack, self.rows.index_select(2, at % self.size))

    def write(self, row, at):
        """One more position, (B, G, 1, width), in place of the oldest."""
        self.rows.index_copy_(2, at % self.size, row.detach().to(self.rows.dtype))

    def newest(self, n, reach):
        """(Rows in the order of their slots, their positions), n of which, or `size`, are written.

        Those of the first `reach` slots; one not yet written has a position from n on.
        """
        rows = self.rows[:, :, :reach]
        if n <= self.size:
            return rows, torch.arange(rows.shape[2], device=rows.device)
        return rows, torch.arange(n - self.size, n, device=rows.device).roll(n % self.size)

    def lowest(self, n):
        """The first position that is still kept or set aside, of n that were written."""
        return max(self.low, n - self.size - self.slack)

    def late(self, keep, n):
        """How many tokens too late it is to go back from n to `keep`: 0 where what position `keep` needs is there."""
        first = keep // self.size * self.size if self.in_blocks else max(0, keep - self.size + 1)
        return max(0, self.lowest(n) - first) if first < keep else 0

    def crop(self, keep, n):
        """Forget the positions from `keep` to n - 1: what they took the place of comes back."""
        low = self.lowest(n)
        first = max(keep, low + self.size)
        if first < n:
            again = torch.arange(first, n, device=self.rows.device)
            self.rows.index_copy_(2, again % self.size, self.spare.index_select(2, again % self.slack))
        self.low = min(low, keep)

    def reorder(self, indices):
        """Put the sequences `indices` (B,) in the place of 0 to B - 1."""
        for rows in (self.rows, self.spare):
            if rows is not None:
                rows.copy_(rows.index_select(0, indices))

    def copy(self, indices):
        """The sequences `indices`, in memory of their own."""
        chosen = copy.copy(self)
        by_feature = self.rows.mT.is_contiguous()
        chosen.rows = self.rows.mT.index_select(0, indices).mT if by_feature else self.rows.index_select(0, indices)
        chosen.spare = None if self.spare is None else self.spare.index_select(0, indices)
        return chosen

    @property
    def nbytes(self):
        return sum(rows.untyped_storage().nbytes() for rows in (self.rows, self.spare) if rows is not None)


class KeyCache:
    """Keys and values of every position, or of the last `window` + 1.

    `scoring` is the module that it serves. `count` is how many tokens it holds; `at`, on the device, the position of
    the newest one (-1 when empty). A captured step moves only `at`: call `recount` after replays. `slack` more
    positions are kept of whatever is overwritten: so many tokens can always be taken back.
    """

    def __init__(self, scoring, B, length, *, device, dtype, slack=0):
        self.scoring, self.cfg = scoring, scoring.cfg
        self.batch, self.length, self.slack = B, length, slack
        self.device, self.dtype = device, dtype or torch.get_default_dtype()
        self.count, self.at = 0, torch.full((1,), -1, device=device)
        self.keys = self.key_slots()
        self.values = self.slots(self.newest(), self.cfg.d_head, by_feature=False)

    def slots(self, size, width, **options):
        options = dict(device=self.device, dtype=self.dtype, slack=min(self.slack, self.length - size)) | options
        return Slots(self.batch, self.cfg.kv_heads, size, width, **options)

    def newest(self):
        """How many values are kept."""
        window = self.scoring.window
        return self.length if window is None else min(window + 1, self.length)

    def key_slots(self):
        return [self.slots(self.newest(), self.scoring.key_width)]

    @property
    def places(self):
        return [*self.keys, self.values]

    def rows(self, x, k):
        """What is kept of the keys of x: as many tensors (B, ., T, .) as there are `keys`."""
        return [k]

    def extend(self, x, v):
        """Keep T more tokens and attend from each to itself and to all before it.

        Args:
            x: the layer's inputs (B, T, d_model), T from 1 on: a prompt, a part of one, proposed tokens, or one token.
            v: their values (B, G, T, d_head).

        Returns:
            The mixed values (B, n_head, T, d_head), those that the whole sequence would have at these positions.
            T tokens cost T x (count + T) pairs at most.

        Raises:
            BadInput: another batch, values that are not those of x, more tokens than fit. Then nothing has changed.
        """
        B, T, _ = x.shape
        self.check(B, T)
        if v.shape != (B, self.cfg.kv_heads, T, self.cfg.d_head):
            wanted = B, self.cfg.kv_heads, T, self.cfg.d_head
            raise BadInput(f"the values of {T} tokens are {wanted}, not {tuple(v.shape)}")
        if T == 1:
            y = self.step(x, v)
        elif self.count:
            y = self.chunk(x, v)
        else:
            return self.prompt(x, v)
        return y.to(v.dtype).unflatten(2, (-1, T)).flatten(1, 2)

    def prompt(self, x, v):
        q, k = self.scoring.place(*self.scoring.queries_and_keys(x))
        self.keep([*self.rows(x, k), v])
        return self.scoring.attend(q, k, v)

    def chunk(self, x, v):
        T, heads = x.shape[1], self.cfg.n_head // self.cfg.kv_heads
        at = torch.arange(self.count, self.count + T, device=x.device)
        q, rows = self.query_and_rows(x, at)
        return self.attend(self.grouped(q), at.repeat(heads), self.keep([*rows, v]).get)

    def step(self, x, v):
        q, rows = self.query_and_rows(x, self.at + 1)
        self.count += 1
        self.at += 1
        kernels = self.kernels()
        self.write([*rows, v], kernels)
        return self.attend(self.grouped(q), self.at, lambda slots: slots.newest(self.count, self.reach), kernels)

    def grouped(self, q):
        """(B, H, T, width) -> (B, G, H / G * T, width)."""
        return q.unflatten(1, (self.cfg.kv_heads, -1)).flatten(2, 3)

    def query_and_rows(self, x, at):
        q, k = self.scoring.place(*self.scoring.queries_and_keys(x), at)
        return q, self.rows(x, k)

    def keep(self, rows):
        """Keep more positions: their rows for each of the `places`. {slots: (rows held, their positions)}."""
        held = {slots: slots.extend(more, self.count) for slots, more in zip(self.places, rows, strict=True)}
        self.count += rows[-1].shape[2]
        self.at.fill_(self.count - 1)
        return held

    def write(self, rows, kernels):
        """Keep the position `at`: a row for each of the `places`."""
        for slots in self.places:
            slots.set_aside(self.at)
        if kernels:
            kernels.write_rows([slots.rows for slots in self.places], [row.detach() for row in rows], self.at)
            return
        for slots, row in zip(self.places, rows, strict=True):
            slots.write(row, self.at)

    def attend(self, q, i, held, kernels=None):
        """Attend from the positions i (R,), or all from one (1,): q (B, G, R, width) -> (B, G, R, d).

        held(slots) has rows and their positions; `kernels` may serve where i is the newest position.
        """
        scale, size = self.scoring.scores_scale, self.values.size
        if kernels:
            return kernels.mlr_decode(q, [self.keys[0].rows], self.values.rows, self.at, (size,), (scale,))
        (k, j), (v, _) = held(self.keys[0]), held(self.values)
        return self.mix(row_scores(q, k, scale), v, seen_from(i, j, self.scoring.window))

    @property
    def reach(self):
        """Positions that a step computes over, the masked ones too: the next power of two."""
        return min(self.length, 1 << (self.count - 1).bit_length())

    def mix(self, scores, v, seen):
        """The rows of scores (B, G, R, n) weigh the values (B, G, n, d) of the positions seen, (R or 1, n)."""
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
        if T < 1:
            raise BadInput("the cache takes 1 token or more, here are 0")
        if self.count + T > self.length:
            raise BadInput(f"the cache holds {self.count} of {self.length} tokens, {T} more do not fit")

    def recount(self):
        """Take the number of tokens from the device, after replays of a captured step; waits for the device."""
        self.count = self.at.item() + 1

    def crop(self, n):
        """Forget the tokens from n on, as if they had never come; those that were proposed and refused, say.

        What a cache overwrites is gone: of a window the positions before it, of a level the blocks before the current
        one. So n is from `earliest` on, or it needs nothing of what is gone: 0 does, and where blocks end. A cache made
        with slack=m can always go back m tokens from the most that it has held.

        Raises:
            BadInput: n beyond `count`, below 0, or one whose keys are overwritten. Then nothing has changed.
        """
        n = self.check_crop(n)
        for slots in self.places:
            slots.crop(n, self.count)
        self.count = n
        self.at.fill_(n - 1)

    def check_crop(self, n):
        """n as an integer; BadInput unless it can be cropped to."""
        (n,) = whole([n], "tokens to crop to")
        if not 0 <= n <= self.count:
            raise BadInput(f"the cache holds {self.count} tokens and can be cropped to 0 to {self.count}, not to {n}")
        if late := self.late(n):
            near = f"crop to {self.earliest} or later, or make the cache with slack={self.slack + late}"
            raise BadInput(f"a crop to {n} comes {late} tokens late, keys that it needs are overwritten; {near}")
        return n

    def late(self, n):
        """How many tokens too late it is to crop to n; 0: it can be done."""
        return max(slots.late(n, self.count) for slots in self.places)

    @property
    def earliest(self):
        """The least n such that the cache can be cropped to every number of tokens from n to `count`."""
        return next((n + 1 for n in reversed(range(self.count)) if self.late(n)), 0)

    def reorder(self, indices):
        """Let the sequences `indices` (batch,), repeats allowed, take the place of 0 to batch - 1; in place.

        Raises:
            BadInput: another number of indices (`copy` takes any), or one that is not of the batch.
        """
        indices = self.check_indices(indices)
        if len(indices) != self.batch:
            raise BadInput(f"{len(indices)} indices reorder a cache of {self.batch} sequences; copy(indices) takes any")
        for slots in self.places:
            slots.reorder(indices)

    def copy(self, indices=None):
        """A cache of its own that holds the same, or the sequences `indices` (any number, repeats allowed) of it.

        It shares the scoring module.
        """
        indices = self.check_indices(torch.arange(self.batch) if indices is None else indices)
        chosen = copy.copy(self)
        chosen.batch, chosen.at = len(indices), self.at.clone()
        chosen.keys, chosen.values = [slots.copy(indices) for slots in self.keys], self.values.copy(indices)
        return chosen

    def __deepcopy__(self, memo):
        return self.copy()

    def check_indices(self, indices):
        """Indices of sequences as a tensor (n,); BadInput unless all of them are of the batch."""
        found = torch.as_tensor(indices).cpu()  # waits for the device, once for all that is asked of them
        if found.ndim != 1 or not len(found) or found.is_floating_point() or found.dtype == torch.bool:
            raise BadInput(f"sequences are chosen by a list of whole numbers, not {found.tolist()}")
        if found.min() < 0 or found.max() >= self.batch:
            raise BadInput(f"the cache keeps the sequences 0 to {self.batch - 1}, not all of {found.tolist()}")
        return found.long().to(self.at.device)

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

    def attend(self, q, i, held, kernels=None):
        (q_far, q_near), (far, near) = q.split(self.cfg.gswa_ranks, -1), self.keys
        far_scale, near_scale = self.scoring.scales
        (v, j), (k, near_at) = held(self.values), held(near)
        if kernels:
            everywhere = kernels.mlr_decode(q_far, [far.rows], self.values.rows, self.at, (far.size,), (far_scale,))
        else:
            everywhere = self.mix(row_scores(q_far, held(far)[0], far_scale), v, seen_from(i, j))
        inside, seen = v.index_select(2, near_at), seen_from(i, near_at, self.cfg.window)
        return everywhere + self.mix(row_scores(q_near, k, near_scale), inside, seen)


class LevelCache(KeyCache):
    """MLR attention: level l keeps the keys of the current block, overwritten when the next block begins."""

    def key_slots(self):
        ranks, blocks, _ = self.scoring.levels
        sizes = [(min(b, self.length), r) for r, b in zip(ranks, blocks, strict=True) if r]
        return [self.slots(size, r, in_blocks=True) for size, r in sizes]

    def rows(self, x, k):
        return [k_l for k_l in k.split(self.scoring.levels.ranks, -1) if k_l.shape[-1]]

    def attend(self, q, i, held, kernels=None):
        ranks, blocks, weighting = self.scoring.levels
        levels = len(ranks) if weighting == "levels" else 1
        used = [(b, 1 / (r * levels)) for r, b in zip(ranks, blocks, strict=True) if r]
        geometry = (*zip(*used, strict=True), blocks if weighting == "shared" else ())
        if kernels:
            return kernels.mlr_decode(q, [slots.rows for slots in self.keys], self.values.rows, self.at, *geometry)
        keys, (v, _) = [held(slots) for slots in self.keys], held(self.values)
        return mlr_decode_reference(q, keys, v, i, *geometry, **self.link_options())


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

    def query_and_rows(self, x, at):
        u = x * self.scoring.key_norm.weight
        w = apply_transposed(self.scoring.key, u - u.mean(-1, keepdim=True))  # (B, T, H, D)
        return w.transpose(1, 2), self.rows(x)

    def attend(self, q, i, held, kernels=None):
        (inputs, j), (inverse_std, _), (v, _) = map(held, self.places)
        scores = row_scores(q.flatten(1, 2).unsqueeze(1), inputs, self.scoring.scores_scale)  # (B, 1, H * T, n)
        return self.mix(scores.view(*q.shape[:3], -1) * inverse_std.mT, v, seen_from(i, j))


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
    def earliest(self):
        """As `KeyCache.earliest`, for all layers."""
        return max(layer.earliest for layer in self.layers)

    def crop(self, n):
        """As `KeyCache.crop`, for all layers or, with BadInput, for none."""
        for layer in self.layers:
            layer.check_crop(n)
        for layer in self.layers:
            layer.crop(n)

    def reorder(self, indices):
        """As `KeyCache.reorder`, for every layer."""
        indices = torch.as_tensor(indices).cpu()
        for layer in self.layers:
            layer.reorder(indices)

    def copy(self, indices=None):
        """As `KeyCache.copy`, for every layer."""
        indices = None if indices is None else torch.as_tensor(indices).cpu()
        return ModelCache([layer.copy(indices) for layer in self.layers])

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
    """The newest rows of scores: q (B, G, R, r), k (B, G, n, r) -> (B, G, R, n), at least as precise as q."""
    return ((q * scale).to(k.dtype) @ k.mT).to(q.dtype)


def seen_from(i, j, window=None):
    """Which of the positions j (n,) each of i (R,) sees, itself and `window` before it or all: (R, n) booleans."""
    back = i[:, None] - j
    return back >= 0 if window is None else (back >= 0) & (back <= window)


def mix_row(scores, v, seen, *, link="softmax", dropout=0.0):
    """Link function over the positions seen, then values: scores (B, G, R, n), v (B, G, n, d), seen (R or 1, n)."""
    if link == "softmax":
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    else:
        weights = scores.masked_fill(~seen, 0)
    return (F.dropout(weights, dropout) if dropout else weights).to(v.dtype) @ v


def mlr_decode_reference(q, keys, v, i, block_sizes, scales, shared=(), *, link="softmax", dropout=0.0):
    """Rows of MLR attention from the keys of the blocks they are in: what the kernel in kernels/decode.py computes.

    q (B, G, R, sum of ranks) at the positions i (R,) or (1,); keys[l]: (B, G, n_l, r_l) and their positions (n_l,);
    v (B, G, n, d) of the positions 0 to n - 1. Scores of a level are multiplied by scales[l]; the sum is divided by the
    number of blocks of `shared` that two positions have in common, if any are given.
    """
    j = torch.arange(v.shape[2], device=q.device)
    scores = q.new_zeros(*q.shape[:3], len(j))
    widths = [k.shape[-1] for k, _ in keys]
    for q_l, (k, at), b, scale in zip(q.split(widths, -1), keys, block_sizes, scales, strict=True):
        near = row_scores(q_l, k, scale).masked_fill(at < i[:, None] // b * b, 0)
        scores.index_add_(-1, at, near)
    if shared:  # up to i, where it is seen
        scores = scores / sum((j >= i[:, None] // b * b).long() for b in shared).clamp(min=1)
    return mix_row(scores, v, seen_from(i, j), link=link, dropout=dropout)


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
