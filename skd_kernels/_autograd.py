"""The type of the `ctx` that PyTorch passes to the forward and backward functions of an autograd function."""

from __future__ import annotations

from typing import Protocol

import torch


class Context(Protocol):
    """What a forward pass keeps for its backward pass.

    A function that keeps more than tensors has a protocol of its own, which names what it keeps.
    """

    saved_tensors: tuple[torch.Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None: ...

    def mark_non_differentiable(self, *tensors: torch.Tensor) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...
