"""Loss curves of whole training runs on the built-in digits, by one implementation of the operations or another."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
from helpers import digit_vit, nested, perturb, training_config

import skd
import skd_kernels
from skd.data import digits
from skd.training.step import by_hand

# Full, narrow, odd widths, and modules of width 0.
ENTRIES = [[16, 20, 16, 24], [16, 20, 9, 24], [8, 13, 9, 16], [8, 13, 0, 16], [3, 1, 0, 5]]
SETTINGS: dict[str, Any] = {"mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0, "lr": 3e-3, "model_ema": False}


def curve(
    implementation: str | None, seed: int, steps: int, *, images: int = 32, device: str = "cpu", **changes: Any
) -> torch.Tensor:
    """The losses (steps,) of a run of random entries.

    Args:
        implementation: "slices" gets an entry's widths as numbers, all others get them on the device; None leaves the
            choice to the dispatcher.
        seed: of the initial weights, of the batches, and of which entry each step trains.
    """
    model = digit_vit()
    perturb(model, seed)
    net = nested(skd.SuperNet(model), *ENTRIES).to(device).train()
    run = by_hand(net, training_config(**{**SETTINGS, "cuda_graph": False, "batch_size": images, **changes}))
    train = digits()[0]
    pixels = torch.as_tensor(np.asarray(train.images), dtype=torch.float32)
    pixels, labels = (pixels / pixels.max() - 0.3).reshape(-1, 1, 8, 8), torch.as_tensor(np.asarray(train.labels))
    draws, losses = np.random.default_rng(seed), []
    with contextlib.nullcontext() if implementation is None else skd_kernels.use(implementation):
        for _ in range(steps):
            chosen = torch.from_numpy(draws.integers(len(labels), size=images))
            entry: Any = int(draws.integers(len(ENTRIES) + 1))
            batch = pixels[chosen].to(device), labels[chosen].long().to(device)
            entry = entry if implementation == "slices" else torch.tensor(entry, device=device)
            losses.append(run([batch], entry).detach().clone())
    if device != "cpu":
        assert run.capture is None or run.capture.graph is not None
    return torch.stack(losses).cpu()


def smoothed(losses: torch.Tensor, steps: int = 25) -> torch.Tensor:
    """The means of the curves, one in each row, over windows of `steps` steps."""
    return torch.nn.functional.avg_pool1d(losses[:, None], steps, stride=1)[:, 0]


def compare(ours: torch.Tensor, slices: torch.Tensor, *, start: float, part: float) -> None:
    """Check that two sets of curves (seeds, steps) begin alike, and differ less than curves of different seeds do.

    Args:
        start: the largest relative difference in the first steps, before rounding has had time to grow.
        part: the difference that is allowed at every point of the smoothed curves, as a part of the spread of seeds.
    """
    torch.testing.assert_close(ours[:, :10], slices[:, :10], rtol=start, atol=0.0)
    one, other = smoothed(ours), smoothed(slices)
    assert (other[:, -1] < 0.6 * other[:, 0]).all(), "nothing was learnt"
    spread = other.max(0).values - other.min(0).values
    assert ((one - other).abs() <= part * spread).all(), float(((one - other).abs() / spread).max())
