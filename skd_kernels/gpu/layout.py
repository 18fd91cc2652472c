"""Where the coordinates of a masked operation lie in weights and activations; importing it does not import Triton."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from skd_kernels.gpu.buffers import UNIT, ceil_div, padded, uninitialised


@dataclass(frozen=True)
class Layout:
    """Where the coordinates of an operation lie in its inward and outward weight (packing.py) and its activations.

    Attributes:
        full: the coordinates of a group at full width: F of an MLP, D of a head.
        row_groups: groups along the rows of the inward weight: 1 for an MLP, 2 for a gated one, 3 H for attention.
        column_groups: groups along the columns of the outward weight: 1 for an MLP, H for attention.
        packed: whether a group follows the kept coordinates of the one before it at once (attention).
    """

    full: int
    row_groups: int
    column_groups: int
    packed: bool

    @property
    def part_stride(self) -> int:
        """The distance between groups that are not packed, in rows of the weight and in columns of activations."""
        return padded(self.full)

    def groups(self, by_rows: bool) -> int:
        """The number of groups along the rows of the inward weight, or the columns of the outward one."""
        return self.row_groups if by_rows else self.column_groups

    def parts(self, by_rows: bool) -> int:
        """How many groups have tiles of their own: 2 for the gates and values of an MLP, 1 otherwise."""
        return 1 if self.packed else self.groups(by_rows)

    def columns(self, by_rows: bool) -> int:
        """The number of columns of a part's activations, with their padding."""
        return self._pitch(self.groups(by_rows)) // self.parts(by_rows)

    @property
    def row_pitch(self) -> int:
        """The number of rows of the packed inward weight, and of columns of the activations that it computes."""
        return self._pitch(self.row_groups)

    @property
    def column_pitch(self) -> int:
        """The number of columns of the packed outward weight."""
        return self._pitch(self.column_groups)

    def _pitch(self, groups: int) -> int:
        return padded(groups * ceil_div(self.full, UNIT) * UNIT) if self.packed else groups * self.part_stride

    def empty_weights(self, like: torch.Tensor, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Uninitialised memory for the packed inward and outward weight, in the dtype of `like`."""
        inward = uninitialised(like, self.row_pitch, padded(channels))
        return inward, uninitialised(like, channels, self.column_pitch)
