"""All sizes of a super-network in one process, on one copy of its weights: `Family`."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, TypedDict

import torch

from skd.extract import choose_entry
from skd.files import load
from skd.latency import LatencyTable
from skd.supernet import SuperNet
from skd.support.curve import sizes_of
from skd.vit import TimmModel


class Memory(TypedDict):
    """What a family holds in memory, in bytes.

    Attributes:
        weights: of the super-network, which all sizes share; on a CPU they are pages of the file.
        corrections: the output layers that entries with a correction (`skd.compensate`) have for themselves.
        total: both.
        copies: what a model of its own for each size would take.
        gathered: the most that a call copies for as long as one module runs: the kept rows and columns of an
            attention, which do not lie side by side.
    """

    weights: int
    corrections: int
    total: int
    copies: int
    gathered: int


@dataclass(frozen=True)
class Size:
    """One size of a family: a function of images.

    Attributes:
        entry: its index in the dropout list, 0 for the full network.
        macs, macs_linear: for one image, in the full and in the linear convention.
        macs_fraction: share of the full network's MACs.
        params: the parameters that it reads.
        compensated: whether it runs with a correction.
    """

    entry: int
    macs: int
    macs_linear: int
    macs_fraction: float
    params: int
    compensated: bool
    _supernet: SuperNet = field(repr=False, compare=False)

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """The logits of ``skd.extract(supernet, entry=entry)`` for images (B, channels, height, width).

        Nothing that other calls see is changed: threads may run the same and other sizes at the same time.

        Raises:
            ValueError: images of another shape, size or dtype than the network takes.
        """
        logits: torch.Tensor = self._supernet(images, entry=self.entry)
        return logits


class Family:
    """Every size of a super-network on one copy of its weights.

    ``family.at(macs=0.5)(images)`` runs the largest size within half the MACs. The next request may run another one
    at no cost: a size is no more than its widths, at which slices of the same weights are read.

    The weights are read from the file when they are first used, and stay pages of it on a CPU: so do not write over
    it in place (`skd.save` puts a new file in its place). They cannot be trained.

    Attributes:
        sizes: all of them, the full network first; ``sizes[i]`` is entry i of the dropout list.
        model: the timm model inside, for its preprocessing (``timm.data.resolve_model_data_config(family.model)``).
    """

    sizes: tuple[Size, ...]
    model: TimmModel

    def __init__(self, path: str | os.PathLike[str], device: str | torch.device = "cpu") -> None:
        """Open what `skd.save` wrote of a super-network.

        Raises:
            ValueError: as `skd.load`; or the file has a plain model.
        """
        supernet = load(path, device)
        if not isinstance(supernet, SuperNet):
            raise ValueError(f"path is {str(path)!r}, a plain model; a family is opened from a super-network's file")
        self._supernet, self.model = supernet.requires_grad_(False), supernet.model
        supernet.moments = {}  # corrections are made of them, not run with them; they may be larger than the weights
        rows = sizes_of(supernet, range(len(supernet.dropout_list)))
        self.sizes = tuple(
            Size(
                entry=row["entry"],
                macs=row["macs"],
                macs_linear=row["macs_linear"],
                macs_fraction=row["macs_fraction"],
                params=row["params"],
                compensated=row["entry"] in supernet.corrections,
                _supernet=supernet,
            )
            for row in rows
        )
        # typed: macs=1 is a count and macs=1.0 a share.
        self._chosen = lru_cache(4096, typed=True)(partial(choose_entry, supernet))

    def at(
        self,
        *,
        macs: float | None = None,
        params: float | None = None,
        entry: int | None = None,
        latency_ms: float | None = None,
        latency: LatencyTable | None = None,
        convention: str = "full",
    ) -> Size:
        """The largest size within a budget, or that of an entry; the arguments and errors are those of `skd.extract`.

        A budget that was asked for before is looked up.
        """
        given: dict[str, Any] = {"macs": macs, "params": params, "entry": entry, "convention": convention}
        given |= {"latency_ms": latency_ms, "latency": latency}
        try:
            return self.sizes[self._chosen(**given)]
        except TypeError:  # a list, for example, cannot be looked up, and is refused
            return self.sizes[choose_entry(self._supernet, **given)]

    def memory(self) -> Memory:
        """What the family holds in memory, and what copies would take."""
        supernet = self._supernet
        tensors = {tensor.data_ptr(): tensor for tensor in (*supernet.model.parameters(), *supernet.model.buffers())}
        weights = sum(tensor.nbytes for tensor in tensors.values())
        corrections = sum(correction.nbytes for correction in supernet.corrections.values())
        each = next(supernet.model.parameters()).element_size()
        return {
            "weights": weights,
            "corrections": corrections,
            "total": weights + corrections,
            "copies": each * sum(size.params for size in self.sizes),
            "gathered": each * self._gathered(),
        }

    def _gathered(self) -> int:
        """The most numbers of its weights that one module copies in a call."""
        supernet = self._supernet
        modules, rows = supernet.infos, supernet.dropout_list.widths.T.tolist()
        widths = [(module, width) for module, row in zip(modules, rows, strict=True) for width in set(row)]
        return max(module.gathered(supernet.model, width) for module, width in widths)
