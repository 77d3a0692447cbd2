"""Fused kernels in Triton, which comes with PyTorch for CUDA. Importing this package needs neither."""

import importlib.util
import os

import torch

from structured import transforms

if importlib.util.find_spec("triton"):
    from structured.kernels import heads, mlr
else:
    heads = mlr = None

WIDEST = 128  # features of a head, of queries and keys and of values
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def interpreted():
    """Whether the kernels run in Triton's interpreter, on tensors of the CPU: TRITON_INTERPRET=1, for the tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def mlr_refusal(q, k, v):
    """Why the fused MLR attention cannot take these inputs, or None. That the blocks nest is taken for granted."""
    if mlr is None:
        return "Triton is not installed; it comes with PyTorch for CUDA"
    if q.device.type != "cuda" and not interpreted():
        return f"the fused kernel needs a CUDA device; q is on {q.device.type}"
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        names = ", ".join(str(x.dtype).removeprefix("torch.") for x in (q, k, v))
        return f"the fused kernel takes bfloat16, float16 or float32, the same for all; q, k, v are {names}"
    if not q.shape[-1]:
        return "the fused kernel takes heads with at least 1 feature"
    widest = max(q.shape[-1], v.shape[-1])
    return f"the fused kernel takes heads up to {WIDEST} wide, not {widest}" if widest > WIDEST else None


def norms_heads(x):
    """Whether `normed_heads` takes a product of x (.., features) and is faster: in 16 bits on CUDA, not transformed."""
    if heads is None or not x.is_cuda or transforms.mapped() or transforms.derivatives():
        return False
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    return dtype in (torch.bfloat16, torch.float16)


def normed_heads(qkv, n_head, kv_heads, query_norm, key_norm):
    """Queries, keys and values, (B, heads, T, features) each, from their one product (B, T, C), side by side in it.

    The norms are the LayerNorms, without bias, that queries and keys pass through head by head.
    """
    layout = heads.Layout(n_head, kv_heads, len(query_norm.weight))
    return heads.NormedHeads.apply(qkv, query_norm.weight, key_norm.weight, layout, query_norm.eps)
