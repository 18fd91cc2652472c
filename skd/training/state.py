"""Putting a training run away, and taking it up where it stood."""

from __future__ import annotations

from typing import Any

import torch

from skd.dropout_list import DropoutList
from skd.training.checkpoints import optimizer_tensors, restore_optimizer
from skd.training.history import History, StepLog
from skd.training.origin import check_origin, merged

# Settings that do not change what a run computes, so a resumed run may have others.
_OPERATIONAL = {"workers", "log_interval", "checkpoint_hist", "checkpoint_steps", "expected_top1"}


def capture(trainer: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and JSON values from which `restore` continues a `Trainer`."""
    tensors = {f"model.{name}": tensor for name, tensor in trainer.supernet.state_dict().items()}
    if trainer.ema is not None:
        tensors |= {f"ema.{name}": tensor for name, tensor in trainer.ema.module.state_dict().items()}
    if trainer.online is not None:
        tensors |= {f"scores.{name}": tensor for name, tensor in trainer.online.state().items()}
    state, numbers = optimizer_tensors(trainer.optimizer, trainer.names)
    history = trainer.history
    return tensors | state, {
        "epoch": trainer.epoch,
        "step_in_epoch": trainer.step_in_epoch,
        "grown": trainer.grown,
        "sensitivity": trainer.sensitivity,
        "scored_steps": trainer.online.steps if trainer.online is not None else 0,
        "config": trainer.config.to_dict(),
        "origin": trainer.origin,
        "steps_per_epoch": trainer.steps_per_epoch,
        "dropout_list": trainer.supernet.dropout_list.to_json(),
        "history": [history.original_top1, history.epochs, history.best_epoch],
        "partial": trainer.log.summary(trainer.supernet.dropout_list),
        "optimizer": numbers,
        "scaler": trainer.scaler.state_dict(),
    }


def check_same_run(trainer: Any, tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> None:
    """Raises ValueError: the run had other settings, weights to begin with, or data. No other rank is asked."""
    _check_same_settings(trainer, header)
    check_origin(trainer, tensors, header)


def restore(trainer: Any, tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> None:
    """Bring a fresh `Trainer` to where `capture` left one, after `check_same_run`.

    Raises:
        ValueError: the checkpoint is of another network.
    """
    tensors, numbers = _without_skipped(tensors, header["optimizer"], set(trainer.names.values()))
    try:
        trainer.supernet.load_state_dict(_part(tensors, "model."))
        if trainer.ema is not None:
            trainer.ema.module.load_state_dict(_part(tensors, "ema."))
        restore_optimizer(trainer.optimizer, trainer.names, tensors, numbers)
        dropout_list = DropoutList.from_json(header["dropout_list"])
        trainer.supernet.dropout_list = dropout_list
    except (RuntimeError, KeyError, ValueError) as error:
        raise ValueError(f"resume: the checkpoint is of another network: {error}") from None
    trainer.use(dropout_list)
    if trainer.online is not None:
        trainer.online.load_state(_part(tensors, "scores."), header["scored_steps"])
    trainer.scaler.load_state_dict(header["scaler"])
    trainer.origin = merged(header.get("origin"), trainer.origin)
    trainer.history = History(*header["history"])
    trainer.epoch, trainer.step = header["epoch"], header["step"]
    trainer.step_in_epoch = header["step_in_epoch"]
    trainer.grown, trainer.sensitivity = header["grown"], header["sensitivity"]
    trainer.log = StepLog(trainer.device, header["partial"], trainer.group)


def _without_skipped(
    tensors: dict[str, torch.Tensor], numbers: dict[str, Any], names: set[str]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Less the optimizer's state of parameters of size 0, which earlier versions gave to skipped modules."""
    empty = {name for name, tensor in _part(tensors, "model.").items() if not tensor.numel()} - names
    kept = {
        key: tensor
        for key, tensor in tensors.items()
        if not (key.startswith("optimizer.") and key.split(".", 2)[2] in empty)
    }
    return kept, {name: value for name, value in numbers.items() if name not in empty}


def _check_same_settings(trainer: Any, header: dict[str, Any]) -> None:
    mine = trainer.config.to_dict()
    before = {"planner": "paper"} | header["config"]  # the only one there was, when it had no name
    other = [
        f"{name} is {mine.get(name)}, it was {value}"
        for name, value in before.items()
        if name not in _OPERATIONAL and mine.get(name) != value
    ]
    if header["steps_per_epoch"] != trainer.steps_per_epoch:
        other.append(f"an epoch has {trainer.steps_per_epoch} steps, it had {header['steps_per_epoch']}")
    if other:
        raise ValueError(f"resume: the checkpoint is of a run with other settings: {'; '.join(other)}")


def _part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
