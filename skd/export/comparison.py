"""A file that was exported, compared with the network that it was made of before it is kept."""

from __future__ import annotations

from collections.abc import Callable

import torch

from skd.vit import TimmModel, probe


def sample(model: TimmModel, count: int) -> torch.Tensor:
    """`count` different images that the model takes."""
    image = probe(model)
    return torch.cat([image * (1 + number) / count for number in range(count)])


@torch.no_grad()
def compare(model: TimmModel, run: Callable[[torch.Tensor], torch.Tensor], tolerance: float, what: str) -> None:
    """Compare `run` with `model` for one image and for three; files are traced with two.

    Args:
        tolerance: of the largest difference of logits, relative to the largest logit where that is above 1.
        what: what the message calls `run`.

    Raises:
        ValueError: it computes something else.
    """
    for count in (1, 3):
        images = sample(model, count)
        expected = model(images).double()
        error = float((run(images).double() - expected).abs().max() / expected.abs().max().clamp(min=1))
        if not error <= tolerance:
            raise ValueError(f"{what} differs from the network by {error:.1e} of its largest logit; it is not kept")
