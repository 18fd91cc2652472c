"""The version of timm that skd needs. Importing this module raises an ImportError, in one line, without it.

Importing timm, and torch with it, takes seconds, which is too long for `skd --version`. Therefore timm's version is
read from its file version.py.
"""

from __future__ import annotations

import os
import sys

OLDEST_TIMM = "1.0.31"  # older versions do not record the arguments that a model was made with


def _installed() -> str:
    """timm's version: from the module if it is imported already, else from version.py, else by importing timm."""
    if "timm" not in sys.modules:
        specs = (finder.find_spec("timm", None) for finder in sys.meta_path)  # saves the import of importlib.util
        spec = next((spec for spec in specs if spec is not None), None)
        file = os.path.join(os.path.dirname(spec.origin or ""), "version.py") if spec is not None else ""
        text = ""
        if os.path.isfile(file):
            with open(file, encoding="utf-8") as lines:
                text = lines.read()
        for line in text.splitlines():
            name, _, value = line.partition("=")
            if name.strip() == "__version__" and value.strip()[:1] in ("'", '"'):
                return value.strip()[1:].partition(value.strip()[0])[0]
    from timm import __version__

    return str(__version__)


def _release(version: str) -> tuple[int, ...]:
    """A version as a tuple that can be compared: 1.0.31 is (1, 0, 31, 0), the earlier 1.0.31.dev0 (1, 0, 31, -1)."""
    end = next((place for place, sign in enumerate(version) if not (sign.isdigit() or sign == ".")), len(version))
    parts = [int(part) for part in version[:end].split(".") if part][:3]
    early = version[end:].startswith(("a", "b", "c", "rc", "pre", "dev"))
    return (*parts, *[0] * (3 - len(parts)), -1 if early else 0)


if _release(installed := _installed()) < _release(OLDEST_TIMM):
    raise ImportError(
        f"skd needs timm {OLDEST_TIMM} or newer, and timm {installed} is installed (pip install --upgrade timm)"
    )
