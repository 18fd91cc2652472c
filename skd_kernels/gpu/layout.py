"""Where the coordinates of a masked operation lie in weights and activations; importing it does not import Triton."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from skd_kernels.gpu.buffers import UNIT, ceil_div, padded, uninitialised


@dataclass(frozen=True)
class Layout:
    """Where the coordinates of an operation lie.

    Attributes:
        full: coordinates of a group: F, or D of every head.
        row_groups: groups along the rows of the weight into them: 1 or, gated, 2; for qkv three times the heads.
        column_groups: groups along the columns of the weight out of them: 1, or the heads.
        packed: whether the groups are packed.
    """

    full: int
    row_groups: int
    column_groups: int
    packed: bool

    @property
    def part_stride(self) -> int:
        """Rows, or columns of activations, from one group to the next where they are not packed."""
        return padded(self.full)

    @property
    def row_pitch(self) -> int:
        """Rows of the packed weight, and columns of the activations at its output."""
        return self._pitch(self.row_groups)

    @property
    def column_pitch(self) -> int:
        """Columns of the packed weight out of the coordinates."""
        return self._pitch(self.column_groups)

    def _pitch(self, groups: int) -> int:
        return padded(groups * ceil_div(self.full, UNIT) * UNIT) if self.packed else groups * self.part_stride

    def empty_weights(self, like: torch.Tensor, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory for the packed weight into the coordinates and the one out of them, in the dtype of `like`."""
        inward = uninitialised(like, self.row_pitch, padded(channels))
        return inward, uninitialised(like, channels, self.column_pitch)
