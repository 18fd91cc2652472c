"""Checks of arguments that many functions take. Nothing here imports torch."""

from __future__ import annotations

import contextlib
from collections.abc import Sized


def check_count(name: str, value: object) -> None:
    """Raise ValueError unless `value`, called `name`, is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be an int of at least 1")


def length_of(items: object) -> int | None:
    """How many there are, None if that is unknown: a DataLoader over a stream has a length that raises."""
    with contextlib.suppress(TypeError, NotImplementedError):
        return len(items) if isinstance(items, Sized) else None
    return None
