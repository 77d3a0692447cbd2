"""MLR attention tile by tile: the forward kernel and the two of the backward (DESIGN 3).

A program keeps one tile stationary (queries in `forward` and `backward_q`, keys in `backward_kv`) and walks over the
tiles that meet it. Blocks nest, so the tiles that share exactly the first m levels with it form one run on each side;
in that run scores need only the first prefix[m] features. Far runs have no masks at all; the near tiles, in which some
level ends, mask level by level. In a kernel of packed sequences a program finds the first position and the length of
its sequence in CU, their starts, and ends where its tile lies behind; positions in it count from 0.

`S` is a Shape (structured/kernels/mlr.py), known at compile time. Tensors come as descriptors of (B, H, T, width), one
for each chunk of features where they are cut into chunks; what lies outside of a tensor reads as 0 and is not written.
Scores are in units of log 2: exp2 is what the hardware has.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.constexpr_function
def first_column(widths, c):
    """Where chunk c begins."""
    return sum(widths[:c])


@triton.constexpr_function
def n_chunks(widths, n_features):
    """How many chunks hold the first n_features, at least 1."""
    return next((c for c in range(1, len(widths)) if sum(widths[:c]) >= n_features), len(widths))


@triton.constexpr_function
def meets(widths, c, lo, hi):
    """Whether chunk c holds some of the features lo to hi - 1."""
    return max(lo, sum(widths[:c])) < min(hi, sum(widths[: c + 1]))


@triton.constexpr_function
def within(widths, c, lo, hi):
    """Whether all features of chunk c are among lo to hi - 1."""
    return lo <= sum(widths[:c]) and sum(widths[: c + 1]) <= hi


@triton.constexpr_function
def whole(S, first, end):
    """Whether the far runs first to end - 1 need all features of their last chunk."""
    return end - first == 1 and S.prefix[first] == sum(S.widths[: n_chunks(S.widths, S.prefix[first])])


@triton.jit
def _place(b, T, CU, S: tl.constexpr):
    """((batch, first position) of sequence b in the tensors, its length)."""
    if S.packed:
        first = tl.load(CU + b)
        return (0, first), tl.load(CU + b + 1) - first
    else:
        return (b, 0), T


@triton.jit
def _line(at, h, H, ROW):
    """Where the numbers of the rows of query head h begin in LSE and DELTA."""
    return (at[0] * H + h).to(tl.int64) * ROW + at[1]


@triton.jit
def _numbers(X, at, h, t, T, H, ROW, beyond: tl.constexpr, S: tl.constexpr):
    """Those of the BM rows at t. Behind a packed sequence, where the next one is, they are `beyond`, otherwise 0."""
    if S.packed:
        rows = t + tl.arange(0, S.BM)
        return tl.load(X + _line(at, h, H, ROW) + rows, mask=rows < T, other=beyond)
    else:
        return X.load([at[0] * H + h, t]).reshape(S.BM)


@triton.jit
def _store(X, x, at, h, t, T, HEADS, WIDE, column: tl.constexpr, S: tl.constexpr):
    """A tile of positions from t on, none behind the sequence. A packed X is the memory of (T, HEADS, WIDE)."""
    if S.packed:
        rows = t + tl.arange(0, x.shape[0])
        columns = column + tl.arange(0, x.shape[1])
        places = ((at[1] + rows).to(tl.int64) * HEADS + h) * WIDE
        inside = (rows < T)[:, None] & (columns < WIDE)[None, :]
        tl.store(X + places[:, None] + columns[None, :], x.to(X.dtype.element_ty), mask=inside)
    else:
        X.store([at[0], h, t, column], x.to(X.dtype).reshape(1, 1, x.shape[0], x.shape[1]))


@triton.jit
def _load(X, at, h, t, column: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    return X.load([at[0], h, at[1] + t, column]).reshape(ROWS, WIDTH)


@triton.jit
def _values(V, at, h, t, T, MAY_END: tl.constexpr, S: tl.constexpr):
    """A tile of values; those behind a packed sequence, where the next one is, as 0: they may not be finite."""
    v = _load(V, at, h, t, 0, S.BN, S.DV)
    if S.packed and MAY_END:
        v = tl.where((t + tl.arange(0, S.BN) < T)[:, None], v, tl.zeros_like(v))
    return v


@triton.jit
def _chunks(X, at, h, t, N: tl.constexpr, S: tl.constexpr, ROWS: tl.constexpr):
    """The first N chunks of a tile."""
    x = ()
    for c in tl.static_range(N):
        x = x + (_load(X[c], at, h, t, first_column(S.widths, c), ROWS, S.widths[c]),)
    return x


@triton.jit
def _columns(x, c: tl.constexpr, lo, hi, S: tl.constexpr):
    """Chunk c with all but the features lo to hi - 1 set to 0, by a product: selects of 16 bits take several steps."""
    column = first_column(S.widths, c) + tl.arange(0, S.widths[c])
    return x * ((column >= lo) & (column < hi)).to(x.dtype)[None, :]


@triton.jit
def _zeros(S: tl.constexpr, ROWS: tl.constexpr):
    """Gradients of all chunks, 0."""
    x = ()
    for c in tl.static_range(len(S.widths)):
        x = x + (_zero(ROWS, S.widths[c]),)
    return x


@triton.jit
def _zero(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    return tl.zeros([ROWS, WIDTH], tl.float32)


@triton.jit
def _scale_features(x, c: tl.constexpr, S: tl.constexpr):
    """Chunk c times 1 / r_l."""
    column = first_column(S.widths, c) + tl.arange(0, S.widths[c])
    scale = (column * 0).to(tl.float32)
    for level in tl.static_range(len(S.ranks) - 1, -1, -1):
        if S.ranks[level] > 0:
            scale = tl.where(column < S.ends[level], 1.0 / S.ranks[level], scale)
    return x.to(tl.float32) * scale[None, :]


@triton.jit
def _stationary(X, at, h, t, S: tl.constexpr, ROWS: tl.constexpr):
    """The chunks of the tile that stays, times 1 / r_l."""
    x = ()
    for c in tl.static_range(len(S.widths)):
        chunk = _load(X[c], at, h, t, first_column(S.widths, c), ROWS, S.widths[c])
        x = x + (_scale_features(chunk, c, S).to(chunk.dtype),)
    return x


@triton.jit
def _edges(t, S: tl.constexpr):
    """Where the blocks of every far level (and the near tiles) that hold position t begin and end."""
    FAR: tl.constexpr = S.far
    starts = ()
    ends = ()
    for m in tl.static_range(FAR + 1):
        start = t // S.blocks[m] * S.blocks[m]
        starts = starts + (start,)
        ends = ends + (start + S.blocks[m],)
    return starts, ends


@triton.jit
def _run(m, starts, ends, T, FIRST: tl.constexpr, END: tl.constexpr, RIGHT: tl.constexpr, S: tl.constexpr):
    """(first position, end, prefix, weight) of run m, one of FIRST to END - 1, on one side of the stationary tile."""
    edges = ends if RIGHT else starts
    outer = edges[FIRST]
    inner = edges[FIRST + 1]
    rank = S.prefix[FIRST] + tl.zeros([], tl.int32)
    weight = S.weights[FIRST] + tl.zeros([], tl.float32)
    for i in tl.static_range(FIRST + 1, END):
        outer = tl.where(m >= i, edges[i], outer)
        inner = tl.where(m >= i, edges[i + 1], inner)
        rank = tl.where(m >= i, S.prefix[i], rank)
        weight = tl.where(m >= i, S.weights[i], weight)
    if RIGHT:
        return inner, tl.minimum(outer, T), rank, weight
    else:
        return outer, inner, rank, weight


@triton.jit
def _cut(x, rank, N: tl.constexpr, FIRST: tl.constexpr, END: tl.constexpr, S: tl.constexpr):
    """The first N chunks of x, the last of them with the features from the rank on set to 0."""
    new = ()
    for c in tl.static_range(N):
        if c == N - 1 and not whole(S, FIRST, END):
            new = new + (_columns(x[c], c, 0, rank, S),)
        else:
            new = new + (x[c],)
    return new


@triton.jit
def _product(x, y, S: tl.constexpr):
    """The inner products of the rows of x and of y, both in chunks."""
    for c in tl.static_range(len(x)):
        if c == 0:
            s = tl.dot(x[c], y[c].T, input_precision=S.precision)
        else:
            s = tl.dot(x[c], y[c].T, s, input_precision=S.precision)
    return s


@triton.jit
def _together(rows, cols, m: tl.constexpr, S: tl.constexpr):
    """Which pairs share a block of level m."""
    return (rows // S.blocks[m])[:, None] == (cols // S.blocks[m])[None, :]


@triton.jit
def _near_scores(x, y, rows, cols, S: tl.constexpr):
    """(scores times c times log2(e), c) of a tile in which levels end, from the finest level to the coarsest.

    The pairs of a finer level are among those of the coarser, so one mask after each level is enough.
    """
    FAR: tl.constexpr = S.far
    s = tl.zeros([rows.shape[0], cols.shape[0]], tl.float32)
    for m in tl.static_range(len(S.blocks) - 1, FAR, -1):
        for c in tl.static_range(len(S.widths)):
            if meets(S.widths, c, S.prefix[m - 1], S.prefix[m]):
                a = _columns(x[c], c, S.prefix[m - 1], S.prefix[m], S)
                s = tl.dot(a, y[c].T, s, input_precision=S.precision)
        s = tl.where(_together(rows, cols, m, S), s, 0.0)
    for c in tl.static_range(n_chunks(S.widths, S.prefix[FAR])):
        a = x[c]
        if not within(S.widths, c, 0, S.prefix[FAR]):
            a = _columns(a, c, 0, S.prefix[FAR], S)
        s = tl.dot(a, y[c].T, s, input_precision=S.precision)
    if S.one_weight:
        weight = S.weights[FAR] + tl.zeros([1, 1], tl.float32)
    else:
        weight = S.weights[FAR] + tl.zeros(s.shape, tl.float32)
        for m in tl.static_range(FAR + 1, len(S.blocks)):
            weight = tl.where(_together(rows, cols, m, S), S.weights[m], weight)
    return s * (weight * LOG2E), weight


@triton.jit
def _near_gradients(g, ds, y, rows, cols, S: tl.constexpr):
    """g + ds y, level by level from the coarsest to the finest: a feature counts where its level is shared."""
    FAR: tl.constexpr = S.far
    new = ()
    d = ds.to(y[0].dtype)
    for c in tl.static_range(len(S.widths)):
        if within(S.widths, c, 0, S.prefix[FAR]):
            new = new + (tl.dot(d, y[c], g[c], input_precision=S.precision),)
        elif meets(S.widths, c, 0, S.prefix[FAR]):
            new = new + (g[c] + _columns(tl.dot(d, y[c], input_precision=S.precision), c, 0, S.prefix[FAR], S),)
        else:
            new = new + (g[c],)
    for m in tl.static_range(FAR + 1, len(S.blocks)):
        ds = tl.where(_together(rows, cols, m, S), ds, 0.0)
        d = ds.to(y[0].dtype)
        finer = ()
        for c in tl.static_range(len(S.widths)):
            if meets(S.widths, c, S.prefix[m - 1], S.prefix[m]):
                part = tl.dot(d, y[c], input_precision=S.precision)
                finer = finer + (new[c] + _columns(part, c, S.prefix[m - 1], S.prefix[m], S),)
            else:
                finer = finer + (new[c],)
        new = finer
    return new


@triton.jit
def _open(g, N: tl.constexpr, FIRST: tl.constexpr, END: tl.constexpr, S: tl.constexpr):
    """The gradients that a far run adds to: the first N chunks, the last of them anew if the run does not fill it."""
    x = ()
    for c in tl.static_range(N):
        if c == N - 1 and not whole(S, FIRST, END):
            x = x + (tl.zeros_like(g[c]),)
        else:
            x = x + (g[c],)
    return x


@triton.jit
def _far_gradients(g, ds, y, S: tl.constexpr):
    """g + ds y; in the last chunk, the features from the rank on collect what is no score's."""
    new = ()
    for c in tl.static_range(len(y)):
        new = new + (tl.dot(ds, y[c], g[c], input_precision=S.precision),)
    return new


@triton.jit
def _close(g, x, rank, FIRST: tl.constexpr, END: tl.constexpr, S: tl.constexpr):
    """The gradients g with what a far run of this rank has added."""
    new = ()
    for c in tl.static_range(len(g)):
        if c >= len(x):
            new = new + (g[c],)
        elif c == len(x) - 1 and not whole(S, FIRST, END):
            new = new + (g[c] + _columns(x[c], c, 0, rank, S),)
        else:
            new = new + (x[c],)
    return new


@triton.jit
def _visible(rows, cols, T, S: tl.constexpr):
    """Which keys `cols` the queries `rows` see in a near tile."""
    seen = (cols < T)[None, :]
    if S.causal:
        seen = seen & (rows[:, None] >= cols[None, :])
    return seen


@triton.jit
def _add(acc, sums, p, v, S: tl.constexpr):
    """acc + p v, and the sums of the rows of p, 16 times, on the matrix units too: the others have no time for them."""
    p = p.to(v.dtype)
    ones = (_zero(v.shape[0], 16) + 1.0).to(v.dtype)
    acc = tl.dot(p, v, acc, input_precision=S.precision)
    return acc, tl.dot(p, ones, sums, input_precision=S.precision)


@triton.jit
def _add_online(acc, sums, top, s, v, S: tl.constexpr):
    """One tile of the softmax with a running maximum."""
    new_top = tl.maximum(top, tl.max(s, 1))
    shrink = tl.math.exp2(top - new_top)[:, None]
    acc, sums = _add(acc * shrink, sums * shrink, tl.math.exp2(s - new_top[:, None]), v, S)
    return acc, sums, new_top


@triton.jit
def _forward_class(acc, sums, top, q, K, V, at, h, starts, ends, T, I: tl.constexpr, RIGHT: tl.constexpr,
                   ONLINE: tl.constexpr, S: tl.constexpr):  # fmt: skip
    """The far keys of the runs of class I."""
    FIRST: tl.constexpr = S.classes[I]
    END: tl.constexpr = S.classes[I + 1]
    N: tl.constexpr = n_chunks(S.widths, S.prefix[FIRST])
    for m in tl.range(FIRST, END, num_stages=1):
        lo, hi, rank, weight = _run(m, starts, ends, T, FIRST, END, RIGHT, S)
        x = _cut(q, rank, N, FIRST, END, S)
        for t in tl.range(lo, hi, S.BN, num_stages=S.stages):
            s = _product(x, _chunks(K, at, h, t, N, S, S.BN), S) * (weight * LOG2E)
            if RIGHT:
                s = tl.where((t + tl.arange(0, S.BN) < T)[None, :], s, float("-inf"))
            v = _values(V, at, h, t, T, RIGHT, S)
            if ONLINE:
                acc, sums, top = _add_online(acc, sums, top, s, v, S)
            else:
                acc, sums = _add(acc, sums, tl.math.exp2(s - top[:, None]), v, S)
    return acc, sums, top


@triton.jit
def _sweep(Q, K, V, at, h, hk, t0, T, ONLINE: tl.constexpr, S: tl.constexpr):
    """(values not yet normalised, sums, maxima) of the queries at t0. Without ONLINE the near tiles fix the maximum."""
    q = _stationary(Q, at, h, t0, S, S.BM)
    starts, ends = _edges(t0, S)
    rows = t0 + tl.arange(0, S.BM)
    acc = _zero(S.BM, S.DV)
    sums = _zero(S.BM, 16)
    top = (rows * 0).to(tl.float32) - float("inf")
    end = tl.minimum(ends[S.far], tl.minimum(T, t0 + S.BM) if S.causal else T)
    for t in tl.range(starts[S.far], end, S.BN, num_stages=1):
        cols = t + tl.arange(0, S.BN)
        s, _ = _near_scores(q, _chunks(K, at, hk, t, len(S.widths), S, S.BN), rows, cols, S)
        s = tl.where(_visible(rows, cols, T, S), s, float("-inf"))
        acc, sums, top = _add_online(acc, sums, top, s, _values(V, at, hk, t, T, True, S), S)
    for i in tl.static_range(len(S.classes) - 1):
        acc, sums, top = _forward_class(acc, sums, top, q, K, V, at, hk, starts, ends, T, i, False, ONLINE, S)
        if not S.causal:
            acc, sums, top = _forward_class(acc, sums, top, q, K, V, at, hk, starts, ends, T, i, True, ONLINE, S)
    return acc, tl.max(sums, 1), top


@triton.jit(do_not_specialize=["T", "ROW", "WIDE", "H", "GROUP"], do_not_specialize_on_alignment=["CU"])
def forward(Q0, Q1, Q2, K0, K1, K2, V, O, LSE, T, ROW, CU, WIDE, H, GROUP, S: tl.constexpr):
    """O and LSE, the log2 of the sum of exp2 of the scores, (B H, T).

    The maximum that keeps exp2 in range need not be that of all keys, so the near tiles fix it and the far ones are
    added as they come: no maximum, no rescaling. Where a far score is so much larger that the sums leave the range,
    the tile is computed again with a running maximum.
    """
    Q = (Q0, Q1, Q2)
    K = (K0, K1, K2)
    n = tl.cdiv(T, S.BM)
    t0 = (n - 1 - tl.program_id(0) % n) * S.BM  # the longest rows first
    bh = tl.program_id(0) // n
    h = bh % H
    at, T = _place(bh // H, T, CU, S)
    if S.packed:  # noqa: SIM102 - known when the kernel is compiled, unlike the other
        if t0 >= T:
            return
    acc, total, top = _sweep(Q, K, V, at, h, h // GROUP, t0, T, False, S)
    in_range = (total < S.limit) & (tl.sum(acc * 0, 1) == 0)
    if tl.min(in_range.to(tl.int32), 0) == 0:
        acc, total, top = _sweep(Q, K, V, at, h, h // GROUP, t0, T, True, S)
    rows = t0 + tl.arange(0, S.BM)
    tl.store(LSE + _line(at, h, H, ROW) + rows, top + tl.math.log2(total), mask=rows < T)
    _store(O, acc / total[:, None], at, h, t0, T, H, WIDE, 0, S)


@triton.jit
def _backward_q_class(g, q, do, lse, delta, K, V, at, h, starts, ends, T, I: tl.constexpr, RIGHT: tl.constexpr,
                      S: tl.constexpr):  # fmt: skip
    """g and what the far keys of the runs of class I add."""
    FIRST: tl.constexpr = S.classes[I]
    END: tl.constexpr = S.classes[I + 1]
    N: tl.constexpr = n_chunks(S.widths, S.prefix[FIRST])
    for m in tl.range(FIRST, END, num_stages=1):
        lo, hi, rank, weight = _run(m, starts, ends, T, FIRST, END, RIGHT, S)
        x = _cut(q, rank, N, FIRST, END, S)
        dx = _open(g, N, FIRST, END, S)
        weighted = (lse - tl.math.log2(weight))[:, None]  # so that p is times the weight
        for t in tl.range(lo, hi, S.BN, num_stages=S.stages):
            k = _chunks(K, at, h, t, N, S, S.BN)
            s = _product(x, k, S) * (weight * LOG2E)
            if RIGHT:
                s = tl.where((t + tl.arange(0, S.BN) < T)[None, :], s, float("-inf"))
            v = _load(V, at, h, t, 0, S.BN, S.DV)
            dp = tl.dot(do, v.T, input_precision=S.precision)
            ds = tl.math.exp2(s - weighted) * (dp - delta[:, None])
            dx = _far_gradients(dx, ds.to(v.dtype), k, S)
        g = _close(g, dx, rank, FIRST, END, S)
    return g


@triton.jit(do_not_specialize=["T", "ROW", "WIDE", "H", "GROUP"], do_not_specialize_on_alignment=["CU"])
def backward_q(Q0, Q1, Q2, K0, K1, K2, V, O, DO, DQ0, DQ1, DQ2, LSE, DELTA, T, ROW, CU, WIDE, H, GROUP,
               S: tl.constexpr):  # fmt: skip
    """DQ, and DELTA, the inner products of O and DO that the other kernel needs, (B H, T)."""
    Q = (Q0, Q1, Q2)
    K = (K0, K1, K2)
    DQ = (DQ0, DQ1, DQ2)
    n = tl.cdiv(T, S.BM)
    t0 = (n - 1 - tl.program_id(0) % n) * S.BM
    bh = tl.program_id(0) // n
    h = bh % H
    hk = h // GROUP
    at, T = _place(bh // H, T, CU, S)
    if S.packed:  # noqa: SIM102 - known when the kernel is compiled, unlike the other
        if t0 >= T:
            return
    line = _line(at, h, H, ROW)
    rows = t0 + tl.arange(0, S.BM)
    do = _load(DO, at, h, t0, 0, S.BM, S.DV)
    delta = tl.sum(_load(O, at, h, t0, 0, S.BM, S.DV).to(tl.float32) * do.to(tl.float32), 1)
    tl.store(DELTA + line + rows, delta, mask=rows < T)
    lse = tl.load(LSE + line + rows, mask=rows < T, other=float("inf"))
    q = _stationary(Q, at, h, t0, S, S.BM)
    starts, ends = _edges(t0, S)
    g = _zeros(S, S.BM)
    end = tl.minimum(ends[S.far], tl.minimum(T, t0 + S.BM) if S.causal else T)
    for t in tl.range(starts[S.far], end, S.BN, num_stages=1):
        cols = t + tl.arange(0, S.BN)
        k = _chunks(K, at, hk, t, len(S.widths), S, S.BN)
        s, weight = _near_scores(q, k, rows, cols, S)
        p = tl.where(_visible(rows, cols, T, S), tl.math.exp2(s - lse[:, None]), 0.0)
        dp = tl.dot(do, _load(V, at, hk, t, 0, S.BN, S.DV).T, input_precision=S.precision)
        g = _near_gradients(g, p * (dp - delta[:, None]) * weight, k, rows, cols, S)
    for i in tl.static_range(len(S.classes) - 1):
        g = _backward_q_class(g, q, do, lse, delta, K, V, at, hk, starts, ends, T, i, False, S)
        if not S.causal:
            g = _backward_q_class(g, q, do, lse, delta, K, V, at, hk, starts, ends, T, i, True, S)
    for c in tl.static_range(len(S.widths)):
        _store(DQ[c], _scale_features(g[c], c, S), at, h, t0, T, H, WIDE, first_column(S.widths, c), S)


@triton.jit
def _backward_kv_class(dv, g, k, v, Q, DO, LSE, DELTA, at, h, starts, ends, T, H, ROW, I: tl.constexpr,
                       RIGHT: tl.constexpr, S: tl.constexpr):  # fmt: skip
    """dv, g and what the far queries of the runs of class I add. Scores are transposed: rows are keys."""
    FIRST: tl.constexpr = S.classes[I]
    END: tl.constexpr = S.classes[I + 1]
    N: tl.constexpr = n_chunks(S.widths, S.prefix[FIRST])
    for m in tl.range(FIRST, END, num_stages=1):
        lo, hi, rank, weight = _run(m, starts, ends, T, FIRST, END, RIGHT, S)
        x = _cut(k, rank, N, FIRST, END, S)
        dx = _open(g, N, FIRST, END, S)
        for t in tl.range(lo, hi, S.BM, num_stages=S.stages):
            q = _chunks(Q, at, h, t, N, S, S.BM)
            s = _product(x, q, S) * (weight * LOG2E)
            p = tl.math.exp2(s - _numbers(LSE, at, h, t, T, H, ROW, float("inf"), S)[None, :])
            do = _load(DO, at, h, t, 0, S.BM, S.DV)
            dp = tl.dot(v, do.T, input_precision=S.precision)
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=S.precision)
            ds = p * (dp * weight - (_numbers(DELTA, at, h, t, T, H, ROW, 0.0, S) * weight)[None, :])
            dx = _far_gradients(dx, ds.to(do.dtype), q, S)
        g = _close(g, dx, rank, FIRST, END, S)
    return dv, g


@triton.jit
def _backward_kv_head(dv, g, k, v, Q, DO, LSE, DELTA, at, h, t0, T, H, ROW, S: tl.constexpr):
    """dv and the chunks of dk of the keys at t0 with what query head h adds."""
    starts, ends = _edges(t0, S)
    cols = t0 + tl.arange(0, S.BN)
    first = t0 // S.BM * S.BM if S.causal else starts[S.far]
    for t in tl.range(first, tl.minimum(ends[S.far], T), S.BM, num_stages=1):
        rows = t + tl.arange(0, S.BM)
        q = _chunks(Q, at, h, t, len(S.widths), S, S.BM)
        s, weight = _near_scores(k, q, cols, rows, S)
        lse = _numbers(LSE, at, h, t, T, H, ROW, float("inf"), S)
        p = tl.math.exp2(s - lse[None, :])
        if S.causal:
            p = tl.where(cols[:, None] <= rows[None, :], p, 0.0)
        do = _load(DO, at, h, t, 0, S.BM, S.DV)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=S.precision)
        dp = tl.dot(v, do.T, input_precision=S.precision)
        delta = _numbers(DELTA, at, h, t, T, H, ROW, 0.0, S)
        g = _near_gradients(g, p * (dp - delta[None, :]) * weight, q, cols, rows, S)
    for i in tl.static_range(len(S.classes) - 1):
        dv, g = _backward_kv_class(dv, g, k, v, Q, DO, LSE, DELTA, at, h, starts, ends, T, H, ROW, i, True, S)
        if not S.causal:
            dv, g = _backward_kv_class(dv, g, k, v, Q, DO, LSE, DELTA, at, h, starts, ends, T, H, ROW, i, False, S)
    return dv, g


@triton.jit(do_not_specialize=["T", "ROW", "WIDE", "WIDE_V", "H"], do_not_specialize_on_alignment=["CU"])
def backward_kv(Q0, Q1, Q2, K0, K1, K2, V, DO, DK0, DK1, DK2, DV, LSE, DELTA, T, ROW, CU, WIDE, WIDE_V, H,
                GROUP: tl.constexpr, S: tl.constexpr):  # fmt: skip
    """DK and DV, summed over the GROUP query heads that share the keys."""
    Q = (Q0, Q1, Q2)
    K = (K0, K1, K2)
    DK = (DK0, DK1, DK2)
    n = tl.cdiv(T, S.BN)
    t0 = tl.program_id(0) % n * S.BN  # the longest columns first
    HK = H // GROUP
    hk = tl.program_id(0) // n % HK
    at, T = _place(tl.program_id(0) // n // HK, T, CU, S)
    if S.packed:  # noqa: SIM102 - known when the kernel is compiled, unlike the other
        if t0 >= T:
            return
    k = _stationary(K, at, hk, t0, S, S.BN)
    v = _load(V, at, hk, t0, 0, S.BN, S.DV)
    dv = _zero(S.BN, S.DV)
    g = _zeros(S, S.BN)
    if GROUP == 1:
        dv, g = _backward_kv_head(dv, g, k, v, Q, DO, LSE, DELTA, at, hk, t0, T, H, ROW, S)
    else:
        for h in tl.range(hk * GROUP, (hk + 1) * GROUP, num_stages=1):
            dv, g = _backward_kv_head(dv, g, k, v, Q, DO, LSE, DELTA, at, h, t0, T, H, ROW, S)
    for c in tl.static_range(len(S.widths)):
        _store(DK[c], _scale_features(g[c], c, S), at, hk, t0, T, HK, WIDE, first_column(S.widths, c), S)
    _store(DV, dv, at, hk, t0, T, HK, WIDE_V, 0, S)
