"""Fixtures of the suite. Tests run from the repository root, as the scripts do."""

import os
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # the kernels are tested in the interpreter; Triton reads this at import
