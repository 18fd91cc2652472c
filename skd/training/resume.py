"""Putting a training run away, and taking it up where it stood."""

from __future__ import annotations

from pathlib import Path

from skd.dropout_list import DropoutList
from skd.files import load
from skd.support.ranks import check_same, together
from skd.support.settings import TrainConfig
from skd.training import checkpoints
from skd.training.checkpoints import Header, Numbers, Tensors, optimizer_tensors, restore_optimizer
from skd.training.history import Epoch, History, StepLog
from skd.training.origin import check_origin, merged
from skd.training.run import Position, Run

# Settings that a resumed run may change, because they do not change what it computes. The CUDA graph is one: it
# changes only how the learning rate is rounded.
_OPERATIONAL = {
    *("workers", "log_interval", "log", "checkpoint_hist", "checkpoint_steps", "expected_top1", "cuda_graph"),
}


def write_checkpoint(run: Run) -> Path:
    """Write where the run stands, by rank 0; nothing where there is no folder.

    Raises:
        Diverged: a loss or a weight is not finite.
    """
    run.check_finite(weights=True)
    if run.folder is None:
        return Path()
    folder, (tensors, header) = run.folder / "checkpoints", put_away(run)
    with together(run.group):
        if run.state.rank == 0:
            checkpoints.write(folder, run.step, tensors, header, run.config.checkpoint_hist)
    return checkpoints.checkpoint_path(folder, run.step)


def take_up_newest(run: Run) -> bool:
    """Go on from the newest checkpoint of the run's folder; False if there is none.

    Raises:
        ValueError: it is of a run with other settings, weights or data.
    """
    assert run.folder is not None
    with together(run.group):
        found = checkpoints.newest(run.folder / "checkpoints")
    check_same(None if found is None else found[1]["step"], "the newest checkpoint's step", run.group)
    if found is None:
        return False
    with together(run.group):  # one rank alone may raise, since each checks its own share of the data
        check_same_run(run, *found)
    take_up(run, *found)
    run.write_records()
    if run.history.best_epoch is not None:
        with together(run.group):
            run.best_state = load(run.product).state_dict()
    return True


def put_away(run: Run) -> tuple[Tensors, Header]:
    """Tensors and JSON values from which `take_up` continues a run."""
    state, history = run.state, run.history
    tensors = {f"model.{name}": tensor for name, tensor in run.supernet.state_dict().items()}
    if state.average is not None:
        tensors |= {f"ema.{name}": tensor for name, tensor in state.average.module.state_dict().items()}
    if state.teacher is not None:
        tensors |= {f"teacher.{name}": tensor for name, tensor in state.teacher.state().items()}
    if run.online is not None:
        tensors |= {f"scores.{name}": tensor for name, tensor in run.online.state().items()}
    of_optimizer, numbers = optimizer_tensors(state.optimizer, state.names)
    return tensors | of_optimizer, Header(
        epoch=run.position.epoch,
        step_in_epoch=run.position.steps,
        grown=run.position.grown,
        refitted=run.position.refitted,
        sensitivity=run.position.sensitivity,
        scored_steps=run.online.steps if run.online is not None else 0,
        config=run.config.to_dict(),
        origin=run.origin,
        steps_per_epoch=run.steps_per_epoch,
        dropout_list=run.supernet.dropout_list.to_json(),
        history=[history.original_top1, [dict(row) for row in history.epochs], history.best_epoch],
        partial=run.position.log.summary(run.supernet.dropout_list),
        optimizer=numbers,
        scaler=state.scaler.state_dict(),
    )


def check_same_run(run: Run, tensors: Tensors, header: Header) -> None:
    """Raises ValueError: the run had other settings, weights to begin with, or data. No other rank is asked."""
    _check_same_settings(run, header)
    assert run.origin is not None
    check_origin(run.origin, run.product, tensors, header)


def take_up(run: Run, tensors: Tensors, header: Header) -> None:
    """Bring a fresh run to where `put_away` left one, after `check_same_run`.

    Raises:
        ValueError: the checkpoint is of another network.
    """
    state = run.state
    tensors, numbers = _without_skipped(tensors, header["optimizer"], set(state.names.values()))
    try:
        run.supernet.load_state_dict(_part(tensors, "model."))
        if state.average is not None:
            state.average.module.load_state_dict(_part(tensors, "ema."))
        if state.teacher is not None:
            state.teacher.load_state(_part(tensors, "teacher."))
        restore_optimizer(state.optimizer, state.names, tensors, numbers)
        dropout_list = DropoutList.from_json(header["dropout_list"])
        run.supernet.dropout_list = dropout_list
    except (RuntimeError, KeyError, ValueError) as error:
        raise ValueError(f"resume: the checkpoint is of another network: {error}") from None
    state.use(dropout_list)
    if run.online is not None:
        run.online.load_state(_part(tensors, "scores."), header.get("scored_steps", 0))
    state.scaler.load_state_dict(header["scaler"])
    assert run.origin is not None
    run.origin = merged(header.get("origin"), run.origin)
    original, epochs, best = header["history"]
    run.history = History(original, [Epoch(**row) for row in epochs], best)
    run.stepper.step = header["step"]
    run.position = Position(
        epoch=header["epoch"],
        log=StepLog(header["partial"], run.group),
        steps=header["step_in_epoch"],
        grown=header["grown"],
        refitted=header.get("refitted", False),
        sensitivity=header["sensitivity"],
    )


def _without_skipped(tensors: Tensors, numbers: Numbers, names: set[str]) -> tuple[Tensors, Numbers]:
    """Less the optimizer's state of parameters of size 0, which earlier versions gave to skipped modules."""
    empty = {name for name, tensor in _part(tensors, "model.").items() if not tensor.numel()} - names
    kept = {
        key: tensor
        for key, tensor in tensors.items()
        if not (key.startswith("optimizer.") and key.split(".", 2)[2] in empty)
    }
    return kept, {name: value for name, value in numbers.items() if name not in empty}


def _check_same_settings(run: Run, header: Header) -> None:
    mine = run.config.to_dict()
    # A setting that a checkpoint does not know yet was what is its default now, or all that there was.
    before = TrainConfig().to_dict() | {"augment_on": "cpu", "planner": "paper"} | header["config"]
    other = [
        f"{name} is {mine.get(name)}, it was {value}"
        for name, value in before.items()
        if name not in _OPERATIONAL and mine.get(name) != value
    ]
    if header["steps_per_epoch"] != run.steps_per_epoch:
        other.append(f"an epoch has {run.steps_per_epoch} steps, it had {header['steps_per_epoch']}")
    if other:
        raise ValueError(f"resume: the checkpoint is of a run with other settings: {'; '.join(other)}")


def _part(tensors: Tensors, prefix: str) -> Tensors:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
