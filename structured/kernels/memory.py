"""How tensors lie in memory that the fused kernels read and write."""

import torch


def heads_last(B, H, T, width, like):
    """An empty (B, H, T, width) tensor, heads beside each other in memory, rows a multiple of 16 bytes long."""
    wide = width + -width % (16 // like.element_size())
    return like.new_empty(B, T, H, wide).transpose(1, 2)[..., :width]


def per_row(q):
    """One number for each query, (B, H, T or up to 3 more), in float32 at least, rows a multiple of 16 bytes apart."""
    B, H, T, _ = q.shape
    return q.new_empty(B, H, T + -T % 4, dtype=torch.promote_types(q.dtype, torch.float32))
