"""The types that the files of training hand to each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NewType, TypeAlias

import torch

if TYPE_CHECKING:  # a PyTorch that was built without torch.distributed has no such class
    from torch.distributed import ProcessGroup

Group: TypeAlias = "ProcessGroup | None"  # None: this process alone
Forward = Callable[..., torch.Tensor]  # (images, entry=...) -> logits
Entry = int | torch.Tensor  # of the dropout list; a 0-d integer tensor is read where it is
LabelledBatch = tuple[torch.Tensor, torch.Tensor]  # (images, labels), checked and on the device
Batches = Iterable[object]  # what a user gives: each batch is checked when its turn comes
Refusal = NewType("Refusal", str)  # why something is not done, to be read after "because"
