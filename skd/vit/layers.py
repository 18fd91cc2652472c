"""Small operations on linear layers and their neighbours that the descriptions of modules share."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import torch
from torch import nn

from skd.vit.protocol import Coordinates, Module, OutputLayer, TimmLayer


def require_linear(name: str, layer: object) -> None:
    """Refuse a layer whose weights are computed (weight norm, adapters, quantisation): they cannot be rewritten.

    Raises:
        ValueError: `layer` is not a plain torch.nn.Linear.
    """
    if type(layer) is not nn.Linear:
        raise ValueError(f"{name} is a {type(layer).__name__}; it must be a plain torch.nn.Linear")


def linear_like(layer: nn.Linear, rows: int, columns: int, bias: bool) -> nn.Linear:
    """A Linear of another size, uninitialised, with the dtype, device, mode and grad flag of `layer`."""
    weight = layer.weight
    linear = nn.Linear(1, 1, bias=bias, device="meta")  # nothing to initialise, and no random number drawn
    linear.in_features, linear.out_features = columns, rows
    linear.weight = nn.Parameter(weight.new_empty(rows, columns))
    if bias:
        linear.bias = nn.Parameter(weight.new_empty(rows))
    linear.requires_grad_(weight.requires_grad).train(layer.training)
    return linear


@torch.no_grad()
def first_rows(layer: nn.Linear, full: int, width: int) -> nn.Linear:
    """The layer with the first `width` of every `full` rows: those of q, k and v, or of gate and value."""
    parts = layer.out_features // full
    cut = linear_like(layer, parts * width, layer.in_features, layer.bias is not None)
    for new, old in ((cut.weight, layer.weight), (cut.bias, layer.bias)):
        if old is not None:
            rows = old.unflatten(0, (parts, full))[:, :width]
            new.copy_(rows.reshape(new.shape))
    return cut


@torch.no_grad()
def first_columns(layer: nn.Linear, full: int, width: int) -> nn.Linear:
    """The layer with the first `width` of every `full` columns, and its whole bias."""
    parts = layer.in_features // full
    cut = linear_like(layer, layer.out_features, parts * width, layer.bias is not None)
    cut.weight.copy_(layer.weight.unflatten(1, (parts, full))[:, :, :width].flatten(1))
    if cut.bias is not None:
        cut.bias.copy_(layer.bias)
    return cut


def with_output_layer(block: TimmLayer, module: Module, output: OutputLayer) -> TimmLayer:
    """What `Module.forward` takes as its block, where the module's last layer has other weights and another width.

    Nothing is copied, and nothing of the block changes.
    """
    whole = getattr(block, module.place.module)
    layer, other = copy.copy(module.output_layer(whole)), copy.copy(whole)
    layer.in_features = output.weight.shape[1]
    vars(layer)["_parameters"] = output._asdict()
    vars(other)["_modules"] = {**whole._modules, module.output_name: layer}
    return SimpleNamespace(**{module.place.module: other})


def rows_kept(tensor: torch.Tensor, full: int, width: int) -> torch.Tensor:
    """The first `width` of every `full` rows; a view where there is one run of them."""
    return tensor.unflatten(0, (-1, full))[:, :width].flatten(0, 1)


@torch.no_grad()
def permute(tensor: torch.Tensor, order: torch.Tensor, axis: int) -> None:
    """Reorder, in place, every run of ``len(order)`` positions along `axis`."""
    parts = tensor.shape[axis] // len(order)
    runs = tensor.unflatten(axis, (parts, len(order)))
    tensor.copy_(runs.index_select(axis + 1, order).flatten(axis, axis + 1))


def along(axis: int, width: int, times: int, device: torch.device, *, each: int = 1) -> Coordinates:
    """The coordinates 0..width - 1 along an axis: each fills `each` positions, and the run repeats `times` times."""
    index = torch.arange(width, device=device).repeat_interleave(each).repeat(times)
    return Coordinates(axis, index)


def has_bias(layer: TimmLayer) -> int:
    return int(layer.bias is not None)


def count(*parts: object) -> int:
    """How many numbers are in the parameters of layers and in parameters; anything else (None, a number) has none."""
    total = 0
    for part in parts:
        if isinstance(part, nn.Module):
            total += sum(parameter.numel() for parameter in part.parameters())
        elif isinstance(part, torch.Tensor):
            total += part.numel()
    return total


def is_there(layer: nn.Module | None) -> bool:
    """Whether an optional layer is there: neither None nor an Identity."""
    return layer is not None and not isinstance(layer, nn.Identity)
