"""Benches that drive the package. They run from a checkout that is not installed: `python -m lab.bench.NAME`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT / "kernels") not in sys.path:
    sys.path.insert(0, str(ROOT / "kernels"))
