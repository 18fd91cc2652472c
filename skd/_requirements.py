"""What skd needs of timm. Importing this module raises an ImportError, in one line, where it is not there.

timm itself, and torch with it, take seconds to import, which `skd --version` does not have: the version is read.
"""

from __future__ import annotations

import os
import re
import sys
from importlib.util import find_spec

OLDEST_TIMM = "1.0.31"  # older ones do not record the arguments that a model was made with


def _installed() -> str:
    """timm's version: of the module that is imported already, as its file version.py says, or by importing it."""
    if "timm" not in sys.modules:
        spec = find_spec("timm")
        file = os.path.join(os.path.dirname(spec.origin or ""), "version.py") if spec is not None else ""
        text = ""
        if os.path.isfile(file):
            with open(file, encoding="utf-8") as lines:
                text = lines.read()
        found = re.search(r"^__version__ *= *['\"]([^'\"]+)['\"]", text, re.MULTILINE)
        if found is not None:
            return found[1]
    from timm import __version__

    return str(__version__)


def _release(version: str) -> tuple[int, ...]:
    """To compare: 1.0.31 is (1, 0, 31, 0), and what comes before it, such as 1.0.31.dev0, (1, 0, 31, -1)."""
    numbers, rest = re.match(r"[\d.]*", version)[0], re.sub(r"^[\d.]*", "", version)  # type: ignore[index]
    parts = [int(part) for part in numbers.split(".") if part][:3]
    early = re.match(r"(a|b|c|rc|alpha|beta|pre|dev)", rest) is not None
    return (*parts, *[0] * (3 - len(parts)), -1 if early else 0)


if _release(installed := _installed()) < _release(OLDEST_TIMM):
    raise ImportError(
        f"skd needs timm {OLDEST_TIMM} or newer, and timm {installed} is installed (pip install --upgrade timm)"
    )
