"""How many multiply-adds a head's scores cost, in closed form. FLOPs are 2 per multiply-add.

No credit is given for the causal mask: a score inside a block or a window counts whether it is masked or not.
The `paper_` functions count as the paper's own axis does (DESIGN 7).
"""


def dense_macs(T, width):
    """T x T scores (or the value product) with `width` features."""
    return T * T * width


def mlr_score_macs(T, ranks, block_sizes):
    """Every pair in a block of each level: T * sum_l r_l b_l where b_l divides T, the last block shorter elsewhere."""
    return sum(r * (T // b * b * b + (T % b) ** 2) for r, b in zip(ranks, block_sizes, strict=True))


def window_pairs(T, window, causal=True):
    """Pairs of a query i and an existing key j in [i - window, i], or [i - window, i + window] if not causal."""
    w = min(window, T - 1)
    back = T * w - w * (w + 1) // 2  # pairs with 1 <= i - j <= w
    return T + back if causal else T + 2 * back


def paper_window_pairs(T, window):
    """Pairs of a query i and an existing key j in [i - window, i + window), which is what the original counts."""
    back = window_pairs(T, window) - T
    ahead = window_pairs(T, window - 1) - T if window else 0
    return back + (T if window else 0) + ahead
