"""Small models and batches that many tests share."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer


def perturb(model: torch.nn.Module, seed: int = 0, scale: float = 0.1) -> None:
    """Add noise to every parameter: zero biases and unit norms would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(scale * noise.to(parameter.dtype))


def tiny_vit(dtype: torch.dtype = torch.float64, **kwargs: Any) -> Any:
    """A perturbed two-block ViT: 32 px, patch 8, 17 tokens, head width 16, 72 neurons, 5 classes."""
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 1.5}
    torch.manual_seed(0)
    model = VisionTransformer(**{**args, "num_classes": 5, **kwargs}).to(dtype).eval()
    perturb(model)
    return model


def random_batches(
    count: int = 2, size: int = 4, dtype: torch.dtype = torch.float64, classes: int = 5, pixels: int = 32
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 3, pixels, pixels, generator=generator, dtype=torch.float64).to(dtype),
            torch.randint(0, classes, (size,), generator=generator),
        )
        for _ in range(count)
    ]
