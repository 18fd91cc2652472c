"""What skd needs of timm. Importing this module raises an ImportError, in one line, where it is not there."""

from __future__ import annotations

from timm import __version__ as installed
from torch.torch_version import TorchVersion

OLDEST_TIMM = "1.0.31"  # older ones do not record the arguments that a model was made with

if TorchVersion(installed) < OLDEST_TIMM:
    raise ImportError(
        f"skd needs timm {OLDEST_TIMM} or newer, and timm {installed} is installed (pip install --upgrade timm)"
    )
