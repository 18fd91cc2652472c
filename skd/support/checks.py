"""Checks of arguments that many functions take. Nothing here imports torch."""

from __future__ import annotations


def check_count(name: str, value: object) -> None:
    """Raise ValueError unless `value`, called `name`, is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be an int of at least 1")
