"""The dropout list: the nested sub-networks of a super-network, from the full one to the smallest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np

from skd.cost import CostModel


@dataclass(frozen=True)
class Operation:
    """One reduction the planner proposes: narrow `module` to `width`.

    Attributes:
        module: "3.attn", "3.mlp", ...
        width: the width after it.
        macs: MACs it removes, counted from the next wider kept width of the same module.
        score: importance lost per MAC removed; lower goes first.
    """

    module: str
    width: int
    macs: float
    score: float


@dataclass(frozen=True, eq=False)
class DropoutList:
    """Widths of every module in every sub-network; entry 0 is the full network, entries only shrink.

    Attributes:
        modules: module names in order, ("0.attn", "0.mlp", "1.attn", ...).
        widths: (entries, modules) int array, read-only.
        costs: prices of the network it belongs to (set when it is attached to a `SuperNet`), or None.
        removed_macs: MACs removed by the last entry as the planner counted them (METHOD 2, step 4); the next round's
            target is measured against it.
    """

    modules: tuple[str, ...]
    widths: Any
    costs: CostModel | None = None
    removed_macs: float = 0.0

    def __post_init__(self) -> None:
        widths = np.array(self.widths, dtype=np.int64)
        object.__setattr__(self, "modules", tuple(self.modules))
        if widths.ndim != 2 or widths.shape[0] < 1 or widths.shape[1] != len(self.modules):
            raise ValueError(
                f"widths has shape {widths.shape}; it must be (entries >= 1, {len(self.modules)} modules)"
            )
        if len(set(self.modules)) != len(self.modules):
            raise ValueError("modules has a name twice; names must differ")
        if widths.min(initial=0) < 0:
            raise ValueError(f"widths has {widths.min()}; a width may not be negative")
        if (np.diff(widths, axis=0) > 0).any():
            entry = int(np.argwhere(np.diff(widths, axis=0) > 0)[0, 0]) + 1
            raise ValueError(f"widths: entry {entry} is wider than the one before; entries must be nested")
        widths.setflags(write=False)
        object.__setattr__(self, "widths", widths)

    def __len__(self) -> int:
        return len(self.widths)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DropoutList):
            return NotImplemented
        return self.modules == other.modules and np.array_equal(self.widths, other.widths)

    @property
    def macs(self) -> np.ndarray:
        """(entries,) int64, MACs per image in the `full` convention."""
        return self._costs().macs(self.widths)

    @property
    def params(self) -> np.ndarray:
        """(entries,) int64, parameters."""
        return self._costs().params(self.widths)

    def _costs(self) -> CostModel:
        if self.costs is None:
            raise ValueError("this DropoutList has no costs; assign it to a SuperNet's dropout_list first")
        return self.costs

    def entry(self, index: int) -> dict[str, int]:
        """Widths of one sub-network by module name."""
        if not 0 <= index < len(self):
            raise ValueError(f"entry is {index}; it may be 0..{len(self) - 1}")
        return dict(zip(self.modules, self.widths[index].tolist(), strict=True))

    def extended(self, operations: Sequence[Operation], target_macs: float) -> DropoutList:
        """The list grown by the longest prefix of `operations` that stays within the target (METHOD 2, step 4).

        Args:
            operations: sorted, from `rank_operations` at the widths of the last entry.
            target_macs: MACs removed in all, counted from the full network, in the unit of the operations' macs.

        Returns:
            A new list: one more entry per operation taken, all earlier entries unchanged.

        Raises:
            ValueError: an operation of an unknown module, or one that removes nothing.
        """
        position = {name: index for index, name in enumerate(self.modules)}
        # Sums of floats: an exact hit of the target must not be lost to the last bit.
        budget = target_macs + 1e-9 * abs(target_macs)
        removed, rows, row = self.removed_macs, [], self.widths[-1].copy()
        for operation in operations:
            if operation.module not in position:
                raise ValueError(f"operation of module {operation.module!r}; it may be one of {self.modules}")
            if not 0 <= operation.width < row[position[operation.module]]:
                raise ValueError(
                    f"operation narrows {operation.module} to {operation.width}; "
                    f"it must be below {row[position[operation.module]]}"
                )
            if removed + operation.macs > budget:
                break
            removed += operation.macs
            row[position[operation.module]] = operation.width
            rows.append(row.copy())
        widths = np.concatenate([self.widths, np.array(rows, dtype=np.int64).reshape(-1, len(self.modules))])
        return replace(self, widths=widths, removed_macs=removed)

    def to_json(self) -> str:
        """JSON text of integers and names only; `removed_macs` is an exact fraction."""
        document: dict[str, Any] = {
            "modules": list(self.modules),
            "widths": self.widths.tolist(),
            "removed_macs": list(self.removed_macs.as_integer_ratio()),
        }
        if self.costs is not None:
            document |= {"macs": self.macs.tolist(), "params": self.params.tolist()}
        return json.dumps(document)

    @staticmethod
    def from_json(text: str) -> DropoutList:
        """Read `to_json`'s text; costs come back when the list is attached to its `SuperNet`.

        Raises:
            ValueError: not such a text.
        """
        try:
            document = json.loads(text)
            removed = float(Fraction(*document.get("removed_macs", [0, 1])))
            return DropoutList(tuple(document["modules"]), document["widths"], None, removed)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"text is not a dropout list: {error}") from None
