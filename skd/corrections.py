"""What `skd.compensation` adds to an entry of the dropout list: other output layers for its attentions and MLPs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from skd.vit import Module, OutputLayer, TimmModel


@dataclass(frozen=True, eq=False)
class Correction:
    """Output layers that take the place of the super-network's own where one of its entries runs.

    Attributes:
        widths: of every module of the entry, in order; it fits no other.
        layers: by the name of the module, "0.attn", "0.mlp", ...; modules that are not in it keep their own.
    """

    widths: tuple[int, ...]
    layers: Mapping[str, OutputLayer]

    @property
    def nbytes(self) -> int:
        """The bytes of all its weights and biases."""
        return sum(tensor.nbytes for layer in self.layers.values() for tensor in layer if tensor is not None)

    def mapped(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Correction:
        """The correction with `function` applied to every tensor, for example to copy it to another device."""
        layers = {
            name: OutputLayer(function(layer.weight), None if layer.bias is None else function(layer.bias))
            for name, layer in self.layers.items()
        }
        return Correction(self.widths, layers)


def kept_columns(model: TimmModel, module: Module, width: int) -> torch.Tensor:
    """(full columns,) bool: which columns of the module's output layer belong to its first `width` coordinates."""
    numbers = module.coordinates(model)[f"{module.output_name}.weight"].numbers
    return numbers < width


def check_correction(model: TimmModel, modules: tuple[Module, ...], entry: int, correction: object) -> None:
    """Check that a correction fits the modules of `model`.

    Raises:
        ValueError: it is something else, or has an unknown module, or tensors of another shape than the module's
            output layer has at this width.
    """
    name = f"corrections[{entry}]"
    if not isinstance(correction, Correction):
        raise ValueError(f"{name} is a {type(correction).__name__}; it must be a skd.Correction")
    at = {module.name: (module, width) for module, width in zip(modules, correction.widths, strict=True) if width}
    for key, layer in correction.layers.items():
        if key not in at:
            raise ValueError(f"{name} has a layer for {key!r}; the modules that run are {sorted(at)}")
        module, width = at[key]
        own = module.output_layer(module.of(model))
        shape = (own.out_features, int(kept_columns(model, module, width).sum()))
        bias = None if own.bias is None else (own.out_features,)
        found = None if layer.bias is None else tuple(layer.bias.shape)
        if tuple(layer.weight.shape) != shape or found != bias:
            raise ValueError(
                f"{name}: the layer of {key} has a weight of {tuple(layer.weight.shape)} and a bias of {found}; "
                f"they must be {shape} and {bias}"
            )
