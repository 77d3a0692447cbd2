"""The definitions, as they read: plain dense twins of every scoring function, for float64 comparison.

Nothing here is meant to be fast or to save memory, and nothing here calls the code that it judges. Shapes are those of
`structured.functional`: q (B, H, T, r), k (B, G, T, r), v (B, G, T, d); x is (B, T, D). The functions of x take weights
in the layout the modules store (their docstrings say which) and loop over heads, blocks and levels. At the end, each
`token_mixing_struct` by its name: from a module's weights m, x and v.
"""

import torch


def positions(T):
    """Row index i and column index j of a T x T matrix."""
    return torch.arange(T)[:, None], torch.arange(T)[None, :]


def places(Tq, Tk, cu_seqlens=None, offset=None):
    """(position, number of its sequence) of every query, as columns, and of every key, as rows.

    Positions count the keys of a sequence. Its queries are the last of them, or begin at `offset` where there is one
    sequence. cu_seqlens: the starts of the sequences and the end of the last, or a pair of those of queries and keys.
    """
    if cu_seqlens is None:
        queries = [((Tk - Tq if offset is None else offset) + t, 0) for t in range(Tq)]
        keys = [(t, 0) for t in range(Tk)]
    else:
        starts_q, starts_k = cu_seqlens if isinstance(cu_seqlens, tuple) else (cu_seqlens, cu_seqlens)
        lengths_q, lengths_k = starts_q.diff().tolist(), starts_k.diff().tolist()
        queries = [(lengths_k[n] - length + t, n) for n, length in enumerate(lengths_q) for t in range(length)]
        keys = [(t, n) for n, length in enumerate(lengths_k) for t in range(length)]
    i, n = torch.tensor(queries, dtype=torch.long).view(Tq, 2, 1).unbind(1)
    j, m = torch.tensor(keys, dtype=torch.long).view(Tk, 2).T.unsqueeze(1)
    return i, n, j, m


def visible(i, j, causal=True, window=None):
    """Which queries at i see which keys at j."""
    after = i if causal else j if window is None else i + window
    return (j <= after) & (j >= (j if window is None else i - window)) & (i == i)


def all_pairs(T, causal=True):
    return visible(*positions(T), causal)


def window_pairs(T, window, causal=True):
    return visible(*positions(T), causal, window)


def weights(scores, allowed, link="softmax", attn_mask=None):
    """The link function over the allowed keys: softmax of each row, or the scores as they are; 0 where there are none.

    attn_mask: booleans, which keys are allowed, too, or what is added to the scores, -inf forbidding a key.
    """
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        allowed = allowed & (attn_mask > -torch.inf)
        scores = scores + torch.where(attn_mask > -torch.inf, attn_mask, 0)
    elif attn_mask is not None:
        allowed = allowed & attn_mask
    if link == "identity":
        return torch.where(allowed, scores, 0)
    if not scores.numel():
        return scores
    numerator = torch.where(allowed, (scores - scores.amax(-1, keepdim=True)).exp(), 0)
    total = numerator.sum(-1, keepdim=True)
    return numerator / torch.where(total == 0, 1, total)


def for_every_head(k, n_head):
    """Key head g serves the query heads g * n_head / G up to (g + 1) * n_head / G - 1."""
    return torch.stack([k[:, h * k.shape[1] // n_head] for h in range(n_head)], 1)


def inner_products(q, k):
    return torch.einsum("bhir,bhjr->bhij", q, for_every_head(k, q.shape[1]))


def times(scale, scores):
    """scale * scores; a scale (H,) is a number for each head."""
    per_head = isinstance(scale, torch.Tensor) and scale.ndim == 1
    return (scale[:, None, None] if per_head else scale) * scores


def attention(q, k, v, *, scale, causal=True, link="softmax", bias=0, attn_mask=None, cu_seqlens=None, offset=None):
    """DESIGN 2, low_rank."""
    i, n, j, m = places(q.shape[2], k.shape[2], cu_seqlens, offset)
    w = weights(times(scale, inner_products(q, k)) + bias, (n == m) & visible(i, j, causal), link, attn_mask)
    return w @ for_every_head(v, q.shape[1])


def window_attention(q, k, v, window, *, scale, causal=True, link="softmax", bias=0, attn_mask=None, cu_seqlens=None,
                     offset=None):  # fmt: skip
    """DESIGN 2, low_rank_with_sliding_window."""
    i, n, j, m = places(q.shape[2], k.shape[2], cu_seqlens, offset)
    w = weights(times(scale, inner_products(q, k)) + bias, (n == m) & visible(i, j, causal, window), link, attn_mask)
    return w @ for_every_head(v, q.shape[1])


def gswa_attention(q, k, v, ranks, window, *, scales=None, **options):
    """DESIGN 2, low_rank_with_gswa: two weight matrices, added."""
    a, b = ranks
    far_scale, near_scale = scales or (8 / a, 8 / b)
    far = attention(q[..., :a], k[..., :a], v, scale=far_scale, **options)
    return far + window_attention(q[..., a:], k[..., a:], v, window, scale=near_scale, **options)


def mlr_scores(q, k, ranks, block_sizes, weighting="none", at=None):
    """DESIGN 3: S_ij = c_ij * sum over the levels whose block i and j share of q_i^(l) . k_j^(l) / r_l."""
    i, j = at or positions(q.shape[2])
    scores, shared, first = torch.zeros_like(inner_products(q, k)), torch.zeros_like(i * j), 0
    for r, b in zip(ranks, block_sizes, strict=True):
        meet = i // b == j // b
        if r:
            features = slice(first, first + r)
            scores = scores + torch.where(meet, inner_products(q[..., features], k[..., features]) / r, 0)
        shared = shared + meet
        first += r
    if weighting == "none":
        return scores
    return scores / (len(ranks) if weighting == "levels" else torch.where(shared == 0, 1, shared))


def mlr_attention(q, k, v, ranks, block_sizes, *, weighting="none", causal=True, link="softmax", bias=0, attn_mask=None,
                  cu_seqlens=None, offset=None):  # fmt: skip
    i, n, j, m = places(q.shape[2], k.shape[2], cu_seqlens, offset)
    scores = mlr_scores(q, k, ranks, block_sizes, weighting, (i, j)) + bias
    return weights(scores, (n == m) & visible(i, j, causal), link, attn_mask) @ for_every_head(v, q.shape[1])


def rotated(x, slices):
    """Rotary embeddings: in a slice of r features, pair n as a complex number turns by 10000^(-2 n / r) a position."""
    j, parts, first = torch.arange(x.shape[2], dtype=torch.float64), [], 0
    for r in slices:
        for n in range(r // 2):
            real, imaginary = x[..., first + 2 * n], x[..., first + 2 * n + 1]
            turn = torch.exp(1j * j * 10000 ** (-2 * n / r))
            pair = torch.complex(real, imaginary) * turn
            parts += [pair.real, pair.imag]
        first += r
    return torch.stack(parts, -1)


def alibi_slopes(n_head):
    """A geometric sequence from 2^(-8 / n_head) on; other numbers of heads take every second slope of twice as many."""
    if n_head & (n_head - 1) == 0:
        return [2 ** (-8 * (h + 1) / n_head) for h in range(n_head)]
    fewer = 2 ** (n_head.bit_length() - 1)
    return alibi_slopes(fewer) + alibi_slopes(2 * fewer)[::2][: n_head - fewer]


def alibi_bias(n_head, T):
    """- slope_h |i - j|: (n_head, T, T)."""
    i, j = positions(T)
    return torch.stack([-slope * (i - j).abs().double() for slope in alibi_slopes(n_head)])


def layer_norm(x, gain, eps=1e-5):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * gain


def capped(weight, d_in, d_out):
    """DESIGN 4: W / max(1, rms(W) / cap)."""
    cap = min(d_in, d_out) ** 0.5 / d_in
    rms = (weight.pow(2).mean() + 1e-8) ** 0.5
    return weight / torch.maximum(rms / cap, torch.ones_like(rms))


def bilinear_mlr_scores(x, queries, keys, query_gains, key_gains, n_head, *, divide_by=1, mup=False):
    """DESIGN 4. queries, keys: one weight a level, (p_l, D / p_l, n_head * r_l); gains: (r_l p_l,) a level, or None."""
    total = 0
    for w_q, w_k, gain_q, gain_k in zip(queries, keys, query_gains, key_gains, strict=True):
        p, chunk, out = w_q.shape
        r = out // n_head
        w_q, w_k = capped(w_q, chunk, out), capped(w_k, chunk, out)
        scores = []
        for h in range(n_head):

            def side(w, gain, h=h, p=p, chunk=chunk, r=r):
                parts = [x[..., c * chunk : (c + 1) * chunk] @ w[c][:, h * r : (h + 1) * r] for c in range(p)]
                features = torch.cat(parts, -1)
                return features if gain is None else layer_norm(features, gain)

            scores.append(side(w_q, gain_q) @ side(w_k, gain_k).mT)
        scale = (r * p) ** -0.5 * (8 * (r * p) ** -0.5 if mup else 1)
        total = total + scale * torch.stack(scores, 1)
    return total / divide_by


def btt_dense(right, left, n_head, rank, cap=False):
    """The matrices (n_head, n_out, n_in) of a BTT from right (c, d, n_head * b * s) and left (n_head * b, c * s, a)."""
    (c, d, _), (hb, _, a), s = right.shape, left.shape, rank
    b = hb // n_head
    if cap:
        right, left = capped(right, d, n_head * b * s), capped(left, c * s, a)
    M = right.new_zeros(n_head, a * b, c * d)
    right = right.view(c, d, n_head, b, s)
    left = left.view(n_head, b, c, s, a)
    for h in range(n_head):
        for i in range(a):
            for j in range(b):
                for k in range(c):  # M[i b + j, k d + .] = sum_s L_j[k s, i] R_k[., j s]
                    M[h, i * b + j, k * d : (k + 1) * d] = (right[k, :, h, j] * left[h, j, k, :, i]).sum(-1)
    return M


def bilinear_scores(x, M, gain, *, mup=False):
    """Bilinear BTT and MLBTC: x_i . LayerNorm(M_h x_j) / sqrt(D), or / D. M: (n_head, D, D)."""
    D = x.shape[-1]
    heads = [x @ layer_norm(x @ M_h.T, gain).mT for M_h in M]
    return torch.stack(heads, 1) * (1 / D if mup else D**-0.5)


def queries_and_keys(m, x, slices=None):
    """DESIGN 2: of a ProjectedScoring m, per head and normed if it norms; by position=rope turned, slice by slice."""
    width, sides = m.cfg.qk_width, []
    for linear, norm in ((m.query, m.query_norm), (m.key, m.key_norm)):
        y = x @ linear.weight.T + (0 if linear.bias is None else linear.bias)
        heads = torch.stack([y[..., h : h + width] for h in range(0, y.shape[-1], width)], 1)
        heads = layer_norm(heads, norm.weight) if m.cfg.qk_norm else heads
        sides.append(rotated(heads, slices or [width]) if m.cfg.position == "rope" else heads)
    return sides


def bias(m, x):
    """What position=alibi adds to the scores."""
    return alibi_bias(m.cfg.n_head, x.shape[1]) if m.cfg.position == "alibi" else 0


def dot_scale(m, width):
    return width**-0.5 if m.cfg.scale_sp else 8 / width


def mixed(scores, v, cfg):
    w = weights(scores, all_pairs(scores.shape[-1], cfg.causal), cfg.link)
    return w @ for_every_head(v, scores.shape[1])


def low_rank(m, x, v):
    options = dict(scale=dot_scale(m, m.cfg.qk_width), causal=m.cfg.causal, link=m.cfg.link, bias=bias(m, x))
    return attention(*queries_and_keys(m, x), v, **options)


def low_rank_with_sliding_window(m, x, v):
    options = dict(scale=dot_scale(m, m.cfg.qk_width), causal=m.cfg.causal, link=m.cfg.link, bias=bias(m, x))
    return window_attention(*queries_and_keys(m, x), v, m.cfg.window, **options)


def low_rank_with_gswa(m, x, v):
    options = dict(scales=[dot_scale(m, r) for r in m.cfg.gswa_ranks], causal=m.cfg.causal, link=m.cfg.link)
    return gswa_attention(*queries_and_keys(m, x, m.cfg.gswa_ranks), v, m.cfg.gswa_ranks, m.cfg.window, **options)


def low_rank_with_sequential_gswa(m, x, v):
    """By the kind of layer that m is."""
    return (low_rank if m.window is None else low_rank_with_sliding_window)(m, x, v)


def multi_level_low_rank(m, x, v):
    cfg = m.cfg
    blocks = cfg.block_sizes or [cfg.block_size // 2**level for level in range(len(cfg.ranks))]
    options = dict(weighting=cfg.weighting, causal=cfg.causal, link=cfg.link, bias=bias(m, x))
    return mlr_attention(*queries_and_keys(m, x, cfg.ranks), v, cfg.ranks, blocks, **options)


def bilinear_MLR(m, x, v):
    cfg = m.cfg
    lists = ([getattr(p, "weight", None) for p in side] for side in (m.query, m.key, m.query_norm, m.key_norm))
    divide_by = len(cfg.ranks) if cfg.weighting == "levels" else 1
    return mixed(bilinear_mlr_scores(x, *lists, cfg.n_head, divide_by=divide_by, mup=cfg.scale_mup), v, cfg)


def bilinear_BTT(m, x, v):
    right, left = (step.weight for step in m.key.levels[0] if hasattr(step, "weight"))
    M = btt_dense(right, left, m.cfg.n_head, m.cfg.btt_rank, cap=True)
    return mixed(bilinear_scores(x, M, m.key_norm.weight, mup=m.cfg.scale_mup), v, m.cfg)


def bilinear_MLBTC(m, x, v):
    """How its matrices score; tests/test_mlbtc.py judges the matrices themselves."""
    return mixed(bilinear_scores(x, m.key.dense(), m.key_norm.weight, mup=m.cfg.scale_mup), v, m.cfg)
