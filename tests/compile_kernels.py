"""Compile the MLR kernels for an H100 without one: what the interpreter takes, the compiler may refuse.

python tests/compile_kernels.py, without TRITON_INTERPRET.
"""

import itertools
import sys
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[1]))
from structured import default_block_sizes
from structured.kernels import mlr, mlr_triton

RANKS, T = (32, 16, 8, 8), 256


def tile(rows, width):
    return f"tensordesc<bf16[1,1,{rows},{width}]>"


def chunks(name, rows, widths, packed=False):
    """The three arguments of a tensor in chunks; what is written is a pointer where sequences are packed."""
    kinds = [*("*bf16" if packed else tile(rows, width) for width in widths), "constexpr", "constexpr"]
    return {f"{name}{c}": kinds[c] for c in range(3)}


def signature(kernel, S):
    """Argument: kind."""
    q, k = (lambda name, *to: chunks(name, S.BM, S.widths, *to)), (lambda name, *to: chunks(name, S.BN, S.widths, *to))
    o, v, integer, packed = tile(S.BM, S.DV), tile(S.BN, S.DV), "i32", S.packed
    out, dv = ("*bf16", "*bf16") if packed else (o, v)
    per_row = "*fp32" if packed else f"tensordesc<fp32[1,{S.BM}]>"
    place = dict(T=integer, ROW=integer, CU="*i32" if packed else "constexpr", WIDE=integer)
    end = dict(**place, H=integer, GROUP=integer, S="constexpr")
    return {
        "forward": {**q("Q"), **k("K"), "V": v, "O": out, "LSE": "*fp32", **end},
        "backward_q": {
            **q("Q"), **k("K"), "V": v, "O": o, "DO": o, **q("DQ", packed), "LSE": "*fp32", "DELTA": "*fp32", **end,
        },
        "backward_kv": {
            **q("Q"), **k("K"), "V": v, "DO": o, **k("DK", packed), "DV": dv, "LSE": per_row, "DELTA": per_row, **place,
            "WIDE_V": integer, "H": integer, "GROUP": "constexpr", "S": "constexpr",
        },
    }[kernel]  # fmt: skip


LAUNCHES = mlr.launches(torch.bfloat16, T, 64)
for kernel, packed in itertools.product(LAUNCHES, (False, True)):
    launch, levels = LAUNCHES[kernel], (RANKS, default_block_sizes(T, len(RANKS)), "shared")
    S = mlr.shape(*levels, not packed, T, torch.bfloat16, 64, launch, packed)
    kinds = signature(kernel, S)
    constants = {name: {"S": S, "GROUP": 2}.get(name) for name, kind in kinds.items() if kind == "constexpr"}
    options = dict(num_warps=launch.warps, maxnreg=launch.registers, enable_fp_fusion=True)
    source = ASTSource(getattr(mlr_triton, kernel), kinds, constants, {})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "wgmma" in compiled.asm["ptx"]
    print(f"compiled {kernel}: {compiled.metadata.shared} bytes of shared memory")
