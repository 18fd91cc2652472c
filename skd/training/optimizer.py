"""The optimizer and the schedule of a run, by timm's names."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2

from skd.settings import TrainConfig
from skd.supernet import SuperNet
from skd.training.decay import ExpectedDecay


def make_optimizer(supernet: SuperNet, config: TrainConfig) -> tuple[torch.optim.Optimizer, ExpectedDecay | None]:
    """timm's optimizer over the trained weights, and with decay="expected" what decays them in its place.

    Raises:
        ValueError: timm cannot make it.
    """
    model = supernet.model
    never = supernet.network.undecayed(model)
    groups = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=never)
    decay = None
    if config.decay == "expected":
        decayed = [p for group in groups if group["weight_decay"] for p in group["params"]]
        groups = [group | {"weight_decay": 0.0} for group in groups]
        decay = ExpectedDecay(supernet, decayed, config.weight_decay)
    fused = {"fused": True} if config.opt == "adamw" else {}  # one kernel; others have none
    try:
        optimizer = create_optimizer_v2(
            groups, opt=config.opt, lr=config.peak_lr, weight_decay=0.0, eps=config.opt_eps, **fused
        )
    except (AssertionError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"opt is {config.opt!r}; timm cannot make that optimizer: {error}") from None
    return optimizer, decay


def make_scheduler(optimizer: torch.optim.Optimizer, config: TrainConfig, steps_per_epoch: int | None) -> Any:
    """timm's cosine with warm-up.

    Raises:
        ValueError: it is to move every step, but how many steps an epoch has is not known.
    """
    if config.sched_on_updates and not steps_per_epoch:
        raise ValueError("sched_on_updates is true, but train_loader has no length")
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=config.epochs,
        min_lr=min(config.min_lr, config.peak_lr),
        warmup_lr=min(config.warmup_lr, config.peak_lr),
        warmup_epochs=config.warmup,
        step_on_epochs=not config.sched_on_updates,
        updates_per_epoch=steps_per_epoch or 0,
    )
    return scheduler
