"""Stochastic depth. The masks of a whole batch depend only on (seed, step), not on numbers drawn before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from skd.data.counted import generator
from skd.supernet import SuperNet
from skd.vit.residual import CountedDropPath


class DropPaths:
    """Stochastic depth of a whole super-network, its rate rising linearly over the blocks (Huang et al., 2016)."""

    def __init__(self, supernet: SuperNet, rate: float, seed: int) -> None:
        self.seed = seed
        self.device = next(supernet.parameters()).device
        by_depth = np.linspace(0.0, rate, len(supernet.network.by_block))
        self.rates = np.array([by_depth[info.block] for info in supernet.infos], dtype=np.float32)
        self.modules = [CountedDropPath() for _ in self.rates]

    def masks(self, step: int, batch: int) -> torch.Tensor:
        """(branches, batch) float32 masks of one step for all its images."""
        uniform = generator(self.seed, "drop_path", step).random((len(self.rates), batch), dtype=np.float32)
        rates = self.rates[:, None]
        return torch.from_numpy((uniform >= rates) / (1 - rates)).float().to(self.device, non_blocking=True)

    def set(self, masks: torch.Tensor) -> None:
        """Use `masks` (branches, images) in the next forward pass."""
        for module, mask in zip(self.modules, masks, strict=True):
            module.mask = mask


@contextmanager
def drop_paths(supernet: SuperNet, rate: float, seed: int) -> Iterator[DropPaths | None]:
    """Inside the block the super-network's branches drop at `rate`; its own DropPath modules return after it."""
    blocks = supernet.network.blocks(supernet.model)
    places = [(blocks[info.block], info.place.drop_path) for info in supernet.infos]
    own: list[nn.Module] = [getattr(block, name) for block, name in places]
    paths = DropPaths(supernet, rate, seed) if rate else None
    replacements = [nn.Identity() for _ in own] if paths is None else paths.modules
    for (block, name), module in zip(places, replacements, strict=True):
        setattr(block, name, module)
    try:
        yield paths
    finally:
        for (block, name), module in zip(places, own, strict=True):
            setattr(block, name, module)
