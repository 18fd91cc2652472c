"""One optimizer step on one batch: forward and backward in parts, clipping, decay, update, average."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_


def eager_step(trainer: Any, parts: list[Any], entry: int, masks: torch.Tensor | None) -> torch.Tensor:
    """Train one entry on a batch given in parts of (images, labels).

    Args:
        trainer: a `Trainer`.
        parts: on the device; their gradients are those of the whole batch.
        entry: index into the dropout list.
        masks: (branches, batch) of stochastic depth, or None.

    Returns:
        The mean loss of this rank's images, 0-d, not read by the host.
    """
    images = sum(len(part) for part, _ in parts)
    loss, done = torch.zeros((), dtype=torch.float64, device=trainer.device), 0
    # Compiled, the entry is read on the device: as an int each would be compiled anew.
    chosen: Any = entry
    if trainer.config.torchcompile:
        chosen = torch.full((), int(entry), dtype=torch.int64, device=trainer.device)  # a copy would wait for the GPU
    for number, (part, labels) in enumerate(parts, start=1):
        if masks is not None:
            trainer.paths.set(masks[:, done : done + len(part)])
        done += len(part)
        part, targets = trainer.mixing(part, labels)
        with trainer.reducing(number == len(parts)):
            with trainer.autocast():
                logits = trainer.network(part, entry=chosen)
                share = trainer.mixing.loss(logits, targets) * (len(targets) / images)
            trainer.scaler.scale(share).backward()
        loss += share.detach()
    _update(trainer)
    return loss


def _update(trainer: Any) -> None:
    if trainer.config.clip_grad is not None:
        trainer.scaler.unscale_(trainer.optimizer)
        clip_grad_norm_(trainer.supernet.parameters(), trainer.config.clip_grad)
    scaled = trainer.scaler.is_enabled()
    if trainer.decay is not None and not scaled:
        trainer.decay.apply(trainer.optimizer.param_groups[0]["lr"])
    scale = trainer.scaler.get_scale() if trainer.decay is not None else 1.0  # the host waits for it
    trainer.scaler.step(trainer.optimizer)
    trainer.scaler.update()
    # float16: a scale that went down means that the gradients had overflowed and the step was left out.
    if trainer.decay is not None and scaled and trainer.scaler.get_scale() >= scale:
        trainer.decay.apply(trainer.optimizer.param_groups[0]["lr"])
    trainer.optimizer.zero_grad(set_to_none=True)
    if trainer.ema is not None:
        trainer.ema.update(trainer.supernet, step=trainer.step + 1)
