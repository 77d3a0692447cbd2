"""Compile the MLR kernels for an H100 without one: what the interpreter takes, the compiler may refuse.

python tests/compile_kernels.py, without TRITON_INTERPRET.
"""

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


def chunks(name, rows, widths):
    """The three arguments of a tensor in chunks."""
    kinds = [*(tile(rows, width) for width in widths), "constexpr", "constexpr"]
    return {f"{name}{c}": kinds[c] for c in range(3)}


def signature(kernel, S):
    """Argument: kind."""
    q, k = (lambda name: chunks(name, S.BM, S.widths)), (lambda name: chunks(name, S.BN, S.widths))
    o, v, integer, per_row = tile(S.BM, S.DV), tile(S.BN, S.DV), "i32", f"tensordesc<fp32[1,{S.BM}]>"
    end = dict(T=integer, ROW=integer, H=integer, GROUP=integer, S="constexpr")
    return {
        "forward": {**q("Q"), **k("K"), "V": v, "O": o, "LSE": "*fp32", **end},
        "backward_q": {**q("Q"), **k("K"), "V": v, "O": o, "DO": o, **q("DQ"), "LSE": "*fp32", "DELTA": "*fp32", **end},
        "backward_kv": {
            **q("Q"), **k("K"), "V": v, "DO": o, **k("DK"), "DV": v, "LSE": per_row, "DELTA": per_row,
            "T": integer, "H": integer, "GROUP": "constexpr", "S": "constexpr",
        },
    }[kernel]  # fmt: skip


for kernel, launch in mlr.launches(torch.bfloat16, T, 64).items():
    S = mlr.shape(RANKS, default_block_sizes(T, len(RANKS)), "shared", True, T, torch.bfloat16, 64, launch)
    kinds = signature(kernel, S)
    constants = {name: {"S": S, "GROUP": 2}.get(name) for name, kind in kinds.items() if kind == "constexpr"}
    options = dict(num_warps=launch.warps, maxnreg=launch.registers, enable_fp_fusion=True)
    source = ASTSource(getattr(mlr_triton, kernel), kinds, constants, {})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "wgmma" in compiled.asm["ptx"]
    print(f"compiled {kernel}: {compiled.metadata.shared} bytes of shared memory")
