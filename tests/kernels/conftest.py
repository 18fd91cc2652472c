"""The tests of `skd_kernels`, its compiled half and the benchmarks of its operations: neither skd nor timm is needed.

`pytest tests/kernels` runs them alone.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# PyTorch reads it once: without it cuBLAS refuses torch.use_deterministic_algorithms(True).
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# For `benchmarks`. Last, so that the installed package is the one tested, and not the checkout beside it.
sys.path.append(str(Path(__file__).parents[2]))
