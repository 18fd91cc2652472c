"""Types that many files use. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import torch

# What `json.loads` returns.
JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"
# What a command or a run reports: JSON values by name, which are written to a file and not read again.
Document: TypeAlias = dict[str, object]
# (images, labels) that were checked; None where there are no labels, or none are needed.
Batch: TypeAlias = "tuple[torch.Tensor, torch.Tensor | None]"
# Wraps batches, or rounds, to show how many are done, as ``tqdm`` does.
Progress: TypeAlias = Callable[[Iterable[object]], Iterable[object]]
