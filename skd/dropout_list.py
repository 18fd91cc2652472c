"""The dropout list: the nested sub-networks of a super-network, from the full one to the smallest."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
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
        macs: (entries,) MACs per image in the `full` convention, or None while the network is not known.
        params: (entries,) numbers of parameters, or None.
        costs: prices of the network the list belongs to; `macs` and `params` follow from it. Assigning the list to a
            `SuperNet` sets it.
        removed_macs: MACs removed by the last entry as the planner counted them (METHOD 2, step 4); the next round's
            target is measured against it. Where it is not given, the difference of the last and the first `macs`.
        least: of some modules, the smallest width that `extended` gives them; not part of a comparison.
        sensitivity: of each module, where the planner that added the last entries measured it for them; part neither
            of the JSON nor of a comparison.
    """

    modules: tuple[str, ...]
    widths: Any
    macs: Any = None
    params: Any = None
    costs: CostModel | None = None
    removed_macs: Any = None
    sensitivity: Mapping[str, float] | None = None
    least: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        widths = _integers("widths", self.widths)
        _check_widths(tuple(self.modules), widths)
        widths.setflags(write=False)
        set_field = partial(object.__setattr__, self)
        set_field("modules", tuple(self.modules))
        set_field("widths", widths)
        if self.least is not None:
            set_field("least", _limits(self.least, self.entry(0)))
        if self.costs is not None:
            set_field("macs", self.costs.macs(widths))
            set_field("params", self.costs.params(widths))
        for name in ("macs", "params"):
            value = getattr(self, name)
            if value is not None:
                value = _integers(name, value)
                if value.shape != widths.shape[:1]:
                    raise ValueError(f"{name} has shape {value.shape}; it must be ({len(widths)} entries,)")
                set_field(name, value)
        if self.removed_macs is None:
            set_field("removed_macs", 0.0 if self.macs is None else float(self.macs[0] - self.macs[-1]))

    def __len__(self) -> int:
        return len(self.widths)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DropoutList):
            return NotImplemented
        return self.modules == other.modules and np.array_equal(self.widths, other.widths)

    def entry(self, index: int) -> dict[str, int]:
        """The widths of one sub-network by module name."""
        if not 0 <= index < len(self):
            raise ValueError(f"entry is {index}; it may be 0..{len(self) - 1}")
        return dict(zip(self.modules, self.widths[index].tolist(), strict=True))

    def extended(self, operations: Sequence[Operation], target_macs: float) -> DropoutList:
        """The list grown by the longest prefix of `operations` that stays within the target (METHOD 2, step 4).

        Args:
            operations: sorted, from `rank_operations` at the widths of the last entry.
            target_macs: MACs removed in all, counted from the full network, in the unit of the operations' macs.

        An operation that would go below the `least` width of its module goes down to it, and removes so much less;
        where nothing is left to remove, it is left out.

        Returns:
            A new list: one more entry per operation taken, all earlier entries unchanged.

        Raises:
            ValueError: an operation of an unknown module, or one that removes nothing.
        """
        position = {name: index for index, name in enumerate(self.modules)}
        if not isinstance(target_macs, numbers.Real) or not math.isfinite(target_macs):
            raise ValueError(f"target_macs is {target_macs!r}; it must be a finite number")
        # A sum of floats that should hit the target exactly may be above it in its last bit.
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
            if not 0 < operation.macs < math.inf:
                raise ValueError(
                    f"operation of {operation.module} removes {operation.macs} MACs; it must be positive"
                )
            present, macs = row[position[operation.module]], operation.macs
            width = max(operation.width, (self.least or {}).get(operation.module, 0))
            if width >= present:
                continue
            macs *= (present - width) / (present - operation.width)
            if removed + macs > budget:
                break
            removed += macs
            row[position[operation.module]] = width
            rows.append(row.copy())
        widths = np.concatenate([self.widths, np.array(rows, dtype=np.int64).reshape(-1, len(self.modules))])
        # Without prices the sizes of the new entries are not known.
        return DropoutList(self.modules, widths, costs=self.costs, removed_macs=removed, least=self.least)

    def to_json(self) -> str:
        """JSON text of integers and names only; `removed_macs` is an exact fraction."""
        document: dict[str, Any] = {
            "modules": list(self.modules),
            "widths": self.widths.tolist(),
            "macs": None if self.macs is None else self.macs.tolist(),
            "params": None if self.params is None else self.params.tolist(),
            "removed_macs": list(float(self.removed_macs).as_integer_ratio()),
        }
        if self.least:
            document["least"] = self.least
        return json.dumps(document)

    @staticmethod
    def from_json(text: str) -> DropoutList:
        """Read `to_json`'s text.

        Raises:
            ValueError: not such a text.
        """
        try:
            document = json.loads(text)
            fields = {name: document.get(name) for name in ("macs", "params", "removed_macs")}
            if fields["removed_macs"] is not None:
                fields["removed_macs"] = float(Fraction(*fields["removed_macs"]))
            return DropoutList(document["modules"], document["widths"], least=document.get("least"), **fields)
        except (LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, ValueError) as error:
            raise ValueError(f"text is not a dropout list: {error}") from None


def _limits(given: object, full: Mapping[str, int]) -> dict[str, int]:
    """The smallest widths of modules, as ints.

    Raises:
        ValueError: they are not of modules of the list, or not widths that these have.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"least is {given!r}; it must map names of modules to widths")
    for name, width in given.items():
        is_whole = isinstance(width, numbers.Integral) and not isinstance(width, bool)
        if name not in full or not is_whole or not 0 <= width <= full[name]:
            raise ValueError(
                f"least has {width!r} for {name!r}; it must be a width in 0..{full.get(name)} of a module"
            )
    return {name: int(width) for name, width in given.items()}


def _integers(name: str, values: object) -> np.ndarray:
    """`values` as an int64 array.

    Raises:
        ValueError: they are not an array of whole numbers.
    """
    try:
        exact = np.array(values)
        array = exact.astype(np.int64)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} is not an array of integers") from None
    if exact.dtype == object or not np.array_equal(array, exact):
        raise ValueError(f"{name} has a value that is not a 64-bit integer")
    return array


def _check_widths(modules: tuple[str, ...], widths: np.ndarray) -> None:
    if widths.ndim != 2 or widths.shape[0] < 1 or widths.shape[1] != len(modules):
        raise ValueError(f"widths has shape {widths.shape}; it must be (entries >= 1, {len(modules)} modules)")
    if len(set(modules)) != len(modules):
        raise ValueError("modules has a name twice; names must differ")
    if widths.min(initial=0) < 0:
        raise ValueError(f"widths has {widths.min()}; a width may not be negative")
    growing = (np.diff(widths, axis=0) > 0).any(axis=1)
    if growing.any():
        raise ValueError(
            f"widths: entry {int(growing.argmax()) + 1} is wider than the one before; entries must be nested"
        )
