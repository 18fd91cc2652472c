"""What a fit of a module's output layer needs: the features that enter it, and the factors that follow it."""

from __future__ import annotations

import torch
from torch import nn

from skd.vit.protocol import Module, Shared, TimmLayer
from skd.vit.residual import factors_of


@torch.no_grad()
def output_features(module: Module, block: TimmLayer, x: torch.Tensor, tokens: int, shared: Shared) -> torch.Tensor:
    """The features that enter the output layer of one module of `block` at its full width.

    timm's own forward of the module runs, so that whatever is between its layers (gates, norms, rotations) counts.

    Args:
        x: (B, N, C), the residual stream that enters the module.
        tokens: only the first so many tokens of the result are given.
        shared: what `Network.embed` gave for this block.

    Returns:
        (B, tokens, k), k columns of the output layer.
    """
    layer, found = getattr(block, module.place.module), list[torch.Tensor]()
    x = x if module.mixes_tokens else x[:, :tokens]
    normed = x if module.place.post_norm else getattr(block, module.place.norm)(x)

    def note(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        found.append(inputs[0])

    handle = module.output_layer(layer).register_forward_pre_hook(note)
    try:
        layer(normed, **({module.place.shared: shared} if module.place.shared else {}))
    finally:
        handle.remove()
    return found[0][:, :tokens]


@torch.no_grad()
def output_errors(
    module: Module, block: TimmLayer, x: torch.Tensor, target: torch.Tensor, shared: Shared
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a fit of the module's output layer regresses: its features, and what its output lacks.

    Args:
        x: (B, N, C), the residual stream that enters the module.
        target: (B, tokens, C), what the stream should be behind it, at the first `tokens`.
        shared: what `Network.embed` gave for this block.

    Returns:
        (B * tokens, k) features and (B * tokens, C) what would have to be added to the layer's output, float64.
    """
    layer, gamma = module.output_layer(getattr(block, module.place.module)), output_factors(module, block)
    tokens = target.shape[1]
    features = output_features(module, block, x, tokens, shared).double()
    wanted = target.double() - x[:, :tokens].double()
    if gamma is not None:
        wanted = wanted / gamma.double()
    now = features @ layer.weight.double().mT
    wanted = wanted - (now if layer.bias is None else now + layer.bias.double())
    if gamma is not None:  # no output reaches a channel whose factor is 0
        wanted = torch.where(gamma == 0, 0.0, wanted)
    return features.flatten(0, 1), wanted.flatten(0, 1)


def output_factors(module: Module, block: TimmLayer) -> torch.Tensor | None:
    """(C,) the module's layer scale, or None where it has none."""
    return factors_of(getattr(block, module.place.scale, None))
