"""Fixtures of the suite. Tests run from the repository root, as the scripts do."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
