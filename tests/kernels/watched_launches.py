"""Looking at the kernels that an operation starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from skd_kernels.gpu.launch import watch


@contextmanager
def names_of_launches() -> Iterator[list[str]]:
    """The names of the kernels that are started inside the block, and of the product kernel its epilogue's."""
    names: list[str] = []
    with watch(lambda name, arguments: names.append(arguments.get("EPILOGUE", name))):
        yield names


def check_alignment(name: str, arguments: dict[str, Any]) -> None:
    """Tensors begin at multiples of 16 bytes, but for the width, on which no kernel is specialised."""
    bases = {key: getattr(value, "base", value) for key, value in arguments.items() if key != "width"}
    tensors = {key: value for key, value in bases.items() if hasattr(value, "data_ptr")}
    assert not [key for key, tensor in tensors.items() if tensor.data_ptr() % 16], name
