"""Looking at the kernels that an operation starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from skd_kernels.gpu import launch as launching


def watch(
    monkeypatch: pytest.MonkeyPatch, modules: tuple[Any, ...], look: Callable[[str, dict[str, Any]], None]
) -> None:
    """``look(name, arguments)`` of each kernel that `modules` start, before it runs."""
    start = launching.launch

    def launch(kernel: Any, grid: Any, arguments: dict[str, Any], **settings: Any) -> None:
        look(kernel.__name__, arguments)
        start(kernel, grid, arguments, **settings)

    for module in modules:
        monkeypatch.setattr(module, "launch", launch)


def check_alignment(name: str, arguments: dict[str, Any]) -> None:
    """Tensors begin at multiples of 16 bytes, but for the width, on which no kernel is specialised."""
    tensors = {key: value for key, value in arguments.items() if hasattr(value, "data_ptr") and key != "width"}
    assert not [key for key, tensor in tensors.items() if tensor.data_ptr() % 16], name
