"""The optimizer and the schedule of a run, by timm's names."""

from __future__ import annotations

from typing import Protocol

import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2

from skd.supernet import SuperNet
from skd.support.settings import OptimizerSettings, ScheduleSettings
from skd.training.decay import ExpectedDecay


class Scheduler(Protocol):
    """What is used of timm's: it writes the learning rate into the optimizer's groups."""

    def step(self, epoch: int) -> None: ...

    def step_update(self, num_updates: int) -> None: ...

    def _get_lr(self, t: int) -> list[float]: ...


def make_optimizer(
    supernet: SuperNet, settings: OptimizerSettings
) -> tuple[torch.optim.Optimizer, ExpectedDecay | None]:
    """timm's optimizer of the trained weights, and with decay="expected" the `ExpectedDecay` used instead of its own.

    Raises:
        ValueError: timm cannot make it.
    """
    model = supernet.model
    never = supernet.network.undecayed(model)
    groups = param_groups_weight_decay(model, settings.weight_decay, no_weight_decay_list=never)
    decay = None
    if settings.decay == "expected":
        decayed = [p for group in groups if group["weight_decay"] for p in group["params"]]
        groups = [group | {"weight_decay": 0.0} for group in groups]
        decay = ExpectedDecay(supernet, decayed, settings.weight_decay, settings.entry_sampling)
    fused = {"fused": True} if settings.name == "adamw" else {}  # one kernel; others have none
    try:
        optimizer = create_optimizer_v2(
            groups, opt=settings.name, lr=settings.peak_lr, weight_decay=0.0, eps=settings.eps, **fused
        )
    except (AssertionError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"opt is {settings.name!r}; timm cannot make that optimizer: {error}") from None
    return optimizer, decay


def make_scheduler(
    optimizer: torch.optim.Optimizer, settings: ScheduleSettings, steps_per_epoch: int | None
) -> Scheduler:
    """timm's cosine with warm-up.

    Raises:
        ValueError: it is to move every step, but how many steps an epoch has is not known.
    """
    if settings.by_step and not steps_per_epoch:
        raise ValueError("sched_on_updates is true, but train_loader has no length")
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=settings.epochs,
        min_lr=min(settings.min_lr, settings.peak_lr),
        warmup_lr=min(settings.warmup_lr, settings.peak_lr),
        warmup_epochs=settings.warmup_epochs,
        step_on_epochs=not settings.by_step,
        updates_per_epoch=steps_per_epoch or 0,
    )
    return scheduler


class DeviceRates:
    """Learning rates where a captured step reads them: a tensor for each group of parameters."""

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.optimizer = optimizer
        self.rates = [torch.tensor(float(group["lr"]), device=device) for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["capturable"] = True
        self.take()

    def take(self) -> None:
        """What the scheduler wrote as numbers goes to the device."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            rate.fill_(float(group["lr"]))
            group["lr"] = rate
