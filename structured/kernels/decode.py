"""One step of generation with MLR attention on a GPU, reading only the bytes that are kept (DESIGN 3).

Flash decoding: the positions up to the newest are shared out among `splits` programs for each key head, each of which
runs an online softmax over its chunks; a second kernel merges what they found. A chunk reads its values and, of level
l, the keys of the block that the newest position is in, if the chunk reaches it: that block is all that is kept. With
one level whose block is the whole sequence this is standard attention.

The newest position is read on the device, and work is shared out by it there: the launch is the same at every
position, so a CUDA graph of it can be replayed. Twin: `structured.cache.mlr_decode_reference`. `write_rows` puts what
a step adds to a cache in its places, in one launch; its twin is `structured.cache.Slots.write`.
"""

import torch
import triton
import triton.language as tl

from structured.errors import BadInput

PROGRAMS = 528  # for the whole card: 4 for each of 132 multiprocessors, as many as fit at a time
CHUNK = 64  # positions that a program reads at a time; half as many in float32


def mlr_decode(q, keys, v, at, block_sizes, scales, shared=(), *, programs=PROGRAMS, chunk=None, warps=4, stages=2):
    """Attend from position `at` (1,), on the device, to itself and all before it: (B, G, S, d) in the dtype of v.

    q (B, G, S, sum of ranks), S query heads for each key head; keys[l] (B, G, min(b_l, length), r_l), the block that
    `at` is in (or the last position, where `at` is beyond it), laid out feature by feature, so keys[l].mT is
    contiguous; v (B, G, length, d), contiguous. Scores of a level are multiplied by scales[l]; the sum is divided by
    the number of blocks of sizes `shared` that the two positions have in common, if any are given. The other arguments
    tune, and do not change what is computed.
    """
    B, G, S, _ = q.shape
    length, d = v.shape[2:]
    _check(q, keys, v, block_sizes)
    ranks = tuple(k.shape[-1] for k in keys)
    chunk = chunk or (CHUNK // 2 if v.dtype == torch.float32 else CHUNK)
    splits = max(1, min(programs // (B * G), triton.cdiv(length, chunk)))
    heads = max(16, triton.next_power_of_2(S))  # rows of a tensor-core product
    d_pad = max(16, triton.next_power_of_2(d))
    part = q.new_empty(B * G, splits, S, d, dtype=torch.float32)
    peak, total = (q.new_empty(B * G, splits, S, dtype=torch.float32) for _ in range(2))
    out = v.new_empty(B, G, S, d)
    whole = tuple(0 if b >= length else b for b in block_sizes)  # 0: a block as long as the sequence
    with torch.cuda.device_of(q):
        _attend_split[B * G, splits](
            q.contiguous(), tuple(k.mT for k in keys), v, at, part, peak, total, length, splits, S, d,
            ranks, whole, tuple(map(float, scales)), tuple(0 if b >= length else b for b in shared),
            heads, d_pad, chunk, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        _merge_splits[B * G, S](part, peak, total, at, out, length, splits, S, d, chunk, d_pad, num_warps=4)
    return out


@triton.jit
def _share(t, splits, CHUNK: tl.constexpr):
    """How many chunks of the positions 0 to t a split gets."""
    return tl.cdiv(t + 1, splits * CHUNK)


@triton.jit(do_not_specialize=["splits"])
def _attend_split(
    Q, K, V, AT, PART, PEAK, TOTAL, length, splits, S: tl.constexpr, D: tl.constexpr,
    RANKS: tl.constexpr, BLOCKS: tl.constexpr, SCALES: tl.constexpr, SHARED: tl.constexpr,
    HEADS: tl.constexpr, D_PAD: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One split of one key head: unnormalised output (S, D), largest score and sum of weights, by 2^score."""
    bg = tl.program_id(0).to(tl.int64)
    split = splits - 1 - tl.program_id(1)  # the newest positions first: they have the most levels
    t = _newest(AT, length)
    share = _share(t, splits, CHUNK)
    first = split * share  # chunks, not positions: that these are multiples of CHUNK must show in every loop
    end = tl.minimum(first + share, tl.cdiv(t + 1, CHUNK))
    if first >= end:
        return
    head, feature = tl.arange(0, HEADS), tl.arange(0, D_PAD)
    q = _queries(Q + bg * S * _sum(RANKS), S, RANKS, SCALES, HEADS, V.dtype.element_ty)
    peak = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, D_PAD], tl.float32)
    for n in tl.static_range(1, len(RANKS) + 1):  # the chunks that reach the first n levels' blocks and no other
        stop = tl.minimum(end, _reached(t, n, BLOCKS, CHUNK)) if n < len(RANKS) else end
        for chunk in tl.range(first, stop):
            j = chunk * CHUNK + tl.arange(0, CHUNK)
            seen = j <= t
            v_at = V + (bg * length + j[:, None]) * D + feature[None, :]
            v = tl.load(v_at, mask=seen[:, None] & (feature < D)[None, :], other=0.0)
            scores = tl.zeros([HEADS, CHUNK], tl.float32)
            for l in tl.static_range(n):
                scores += _level(q[l], K[l], bg, j, t, length, BLOCKS[l], RANKS[l])
            if len(SHARED) > 0:
                scores = scores / _shared_levels(j, t, SHARED, CHUNK)[None, :]
            scores = tl.where(seen[None, :], scores * 1.4426950408889634, float("-inf"))
            higher = tl.maximum(peak, tl.max(scores, 1))
            weights = tl.exp2(scores - higher[:, None])
            shrink = tl.exp2(peak - higher)
            total = total * shrink + tl.sum(weights, 1)
            acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            peak = higher
        first = tl.maximum(first, stop)
    row = (bg * splits + split) * S + head
    tl.store(PART + row[:, None] * D + feature[None, :], acc, mask=(head < S)[:, None] & (feature < D)[None, :])
    tl.store(PEAK + row, peak, mask=head < S)
    tl.store(TOTAL + row, total, mask=head < S)


@triton.jit
def _newest(AT, length):
    """The newest position, as far as it matters: a full ring is seen whole, in whichever order."""
    return tl.minimum(tl.load(AT).to(tl.int32), length - 1)


@triton.jit
def _start(t, BLOCK: tl.constexpr):
    """The first position of the block that t is in; BLOCK is 0 for a block as long as the sequence."""
    return t // BLOCK * BLOCK if BLOCK > 0 else t * 0


@triton.jit
def _reached(t, n: tl.constexpr, BLOCKS: tl.constexpr, CHUNK: tl.constexpr):
    """The first chunk that reaches into the block of level n or of a finer one."""
    start = t
    for l in tl.static_range(n, len(BLOCKS)):
        start = tl.minimum(start, _start(t, BLOCKS[l]))
    return start // CHUNK


@triton.jit
def _queries(Q, S: tl.constexpr, RANKS: tl.constexpr, SCALES: tl.constexpr, HEADS: tl.constexpr, dtype: tl.constexpr):
    """Every level's features of the queries times the level's scale: (HEADS, rank or more) each."""
    head = tl.arange(0, HEADS)
    q = ()
    column = 0
    for l in tl.static_range(len(RANKS)):
        r = tl.arange(0, _padded(RANKS[l]))
        mask = (head < S)[:, None] & (r < RANKS[l])[None, :]
        x = tl.load(Q + head[:, None] * _sum(RANKS) + column + r[None, :], mask=mask, other=0.0)
        q = q + ((x * SCALES[l]).to(dtype),)
        column += RANKS[l]
    return q


@triton.jit
def _level(q, K, bg, j, t, length, BLOCK: tl.constexpr, R: tl.constexpr):
    """q . k for the positions j, 0 before and after the block: (HEADS, CHUNK).

    Slots not yet written are read, their scores masked by the caller: a mask at the newest position, unlike one at the
    ends of a block, would cut the 16-byte loads into 2-byte ones.
    """
    size = BLOCK if BLOCK > 0 else length
    r = tl.arange(0, _padded(R))
    slot = j - _start(t, BLOCK)
    k_at = K + bg * R * size + r[:, None].to(tl.int64) * size + slot[None, :]
    k = tl.load(k_at, mask=(r < R)[:, None] & ((slot >= 0) & (slot < size))[None, :], other=0.0)
    return tl.dot(q, k, input_precision="ieee")


@triton.jit
def _shared_levels(j, t, SHARED: tl.constexpr, CHUNK: tl.constexpr):
    """How many blocks each position has in common with t, at least 1: (CHUNK,)."""
    count = tl.zeros([CHUNK], tl.float32)
    for l in tl.static_range(len(SHARED)):
        if SHARED[l] == 0:
            count += 1.0
        else:
            count += (j >= t // SHARED[l] * SHARED[l]).to(tl.float32)
    return tl.maximum(count, 1.0)


@triton.constexpr_function
def _sum(numbers):
    return sum(numbers)


@triton.constexpr_function
def _padded(rank):
    """Features that a tensor-core product of `rank` features takes."""
    return max(16, triton.next_power_of_2(rank))


@triton.jit(do_not_specialize=["splits"])
def _merge_splits(
    PART, PEAK, TOTAL, AT, OUT, length, splits, S: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr,
    D_PAD: tl.constexpr,
):  # fmt: skip
    """The output of one query head from its splits, 64 at a time."""
    ROWS: tl.constexpr = 64
    bg, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    t = _newest(AT, length)
    used = tl.cdiv(t + 1, _share(t, splits, CHUNK) * CHUNK)
    feature = tl.arange(0, D_PAD)
    peak = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([D_PAD], tl.float32)
    for begin in tl.range(0, used, ROWS):
        split = begin + tl.arange(0, ROWS)
        row = (bg * splits + split) * S + head
        peaks = tl.load(PEAK + row, mask=split < used, other=float("-inf"))
        higher = tl.maximum(peak, tl.max(peaks, 0))
        weights = tl.exp2(peaks - higher)
        mask = (split < used)[:, None] & (feature < D)[None, :]
        parts = tl.load(PART + row[:, None] * D + feature[None, :], mask=mask, other=0.0)
        shrink = tl.exp2(peak - higher)
        total = total * shrink + tl.sum(weights * tl.load(TOTAL + row, mask=split < used, other=0.0), 0)
        acc = acc * shrink + tl.sum(parts * weights[:, None], 0)
        peak = higher
    tl.store(OUT + (bg * S + head) * D + feature, (acc / total).to(OUT.dtype.element_ty), mask=feature < D)


def write_rows(slots, rows, at):
    """Put rows[i] (B, G, 1, w_i) into slot at % size_i of slots[i] (B, G, size_i, w_i), positions or features first."""
    B, G = rows[0].shape[:2]
    if not all(x.is_contiguous() or x.mT.is_contiguous() for x in slots):
        raise BadInput("slots must be contiguous, or feature by feature (slots.mT contiguous)")
    rows = [row if row.stride(3) == 1 or row.shape[3] == 1 else row.contiguous() for row in rows]
    with torch.cuda.device_of(at):
        _write_rows[(B * G,)](
            tuple(rows), tuple(slots), at, G, tuple(x.stride(0) for x in rows), tuple(x.stride(1) for x in rows),
            tuple(x.shape[2] for x in slots), tuple(x.shape[3] for x in slots),
            tuple(x.stride(3) == 1 for x in slots), num_warps=1,
        )  # fmt: skip


@triton.jit
def _write_rows(
    ROWS, SLOTS, AT, G, STRIDE_B, STRIDE_G, SIZES, WIDTHS: tl.constexpr, BY_POSITION: tl.constexpr
):
    bg = tl.program_id(0).to(tl.int64)
    t = tl.load(AT)
    for i in tl.static_range(len(WIDTHS)):
        feature = tl.arange(0, triton.next_power_of_2(WIDTHS[i]))
        inside = feature < WIDTHS[i]
        row = tl.load(ROWS[i] + bg // G * STRIDE_B[i] + bg % G * STRIDE_G[i] + feature, mask=inside)
        slot = t % SIZES[i]
        place = slot * WIDTHS[i] + feature if BY_POSITION[i] else feature.to(tl.int64) * SIZES[i] + slot
        out = SLOTS[i] + bg * SIZES[i] * WIDTHS[i] + place
        tl.store(out, row.to(SLOTS[i].dtype.element_ty), mask=inside)


def _check(q, keys, v, block_sizes):
    """What the kernel takes for granted about shapes and memory."""
    length = v.shape[2]
    sizes, wanted = [k.shape[2] for k in keys], [min(b, length) for b in block_sizes]
    if sizes != wanted:
        raise BadInput(f"keys of blocks {tuple(block_sizes)} at length {length} have {wanted} slots, not {sizes}")
    width = sum(k.shape[-1] for k in keys)
    if q.shape[-1] != width or max(q.shape[-1], v.shape[-1]) > 128:
        words = f"{q.shape[-1]} features, the keys {width}, the values {v.shape[-1]}"
        raise BadInput(f"the queries have {words}; both sides must agree and be at most 128")
    if any(k.dtype != v.dtype for k in keys):
        names = ", ".join(str(x.dtype).removeprefix("torch.") for x in (*keys, v))
        raise BadInput(f"keys and values are {names}; they must be of one dtype")
    if not v.is_contiguous() or not all(k.mT.is_contiguous() for k in keys):
        raise BadInput("values must be contiguous, and keys feature by feature (keys.mT contiguous)")
