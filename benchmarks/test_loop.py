"""What the training loop costs over the bare step: forward, backward and update of the same batches."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console

import skd
from benchmarks.test_passes import batch, deit
from benchmarks.timing import report
from skd.training.loop import train_epoch
from skd.training.run import Run, make_run
from skd.training.screen import Screen, Seconds

STEPS = 3
BARE: dict[str, Any] = {"mixup": 0.0, "cutmix": 0.0, "smoothing": 0.0, "drop_path": 0.0, "model_ema": False}


def run_of(device: str, batches: list[Any], **settings: Any) -> Run:
    config = skd.TrainConfig(batch_size=len(batches[0][1]), amp_dtype="float32", **settings)
    network = skd.SuperNet(deit("tiny", device))
    return make_run(network, batches, None, config, screen=Screen(Console(quiet=True)))


def test_training_loop(benchmark: Any, device: str) -> None:
    """Three steps of DeiT-Tiny: the loop, the bare steps, and the loop with the whole recipe."""
    batches = [batch(device)] * STEPS
    loop, recipe = run_of(device, batches, **BARE), run_of(device, batches)
    network = skd.SuperNet(deit("tiny", device)).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6, weight_decay=0.05)

    def bare_steps() -> None:
        for images, labels in batches:
            F.cross_entropy(network(images, entry=0), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

    def epoch(run: Run) -> None:
        run.step_in_epoch = 0
        train_epoch(run, Seconds())

    contenders = {
        "loop": lambda: epoch(loop),
        "bare steps": bare_steps,
        "loop with Mixup, label smoothing and the average of the weights": lambda: epoch(recipe),
    }
    report(benchmark, contenders, rounds=7)
