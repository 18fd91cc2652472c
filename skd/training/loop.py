"""The epochs of a run, and the steps of an epoch."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Iterator

import torch

from skd.support.ranks import StopAll, in_step
from skd.support.taps import checked_batch
from skd.training.batches import start_epoch
from skd.training.drawing import draw
from skd.training.dropping import drop_paths
from skd.training.evaluation import evaluate_epoch, measure_original
from skd.training.growing import grow
from skd.training.history import Epoch, History, StepLog, Time, drawn_means
from skd.training.precision import laid_out, tf32
from skd.training.resume import write_checkpoint
from skd.training.run import Position, Run
from skd.training.screen import Seconds, Steps
from skd.training.starting import refit
from skd.training.step import images_in
from skd.training.stopping import Stopped, stop_signals
from skd.training.types import LabelledBatch


def run_epochs(run: Run) -> History:
    """All epochs from where the run stands; the super-network then holds the weights that were kept."""
    supernet, config = run.supernet, run.config
    training, checkpointing = supernet.training, supernet.grad_checkpointing
    supernet.grad_checkpointing = checkpointing or config.grad_checkpointing
    try:
        with (
            tf32(config.tf32),
            drop_paths(supernet, config.drop_path, config.seed) as run.state.paths,
            stop_signals(run.folder is not None) as run.stop,
        ):
            _remaining_epochs(run)
        if run.best_state is not None:
            supernet.load_state_dict(run.best_state)
    finally:
        run.stepper.release()
        supernet.scores = None
        supernet.grad_checkpointing = checkpointing
        supernet.train(training)
        if run.tracker is not None:  # last, since it may fail, on a full disk
            run.tracker.close()
    return run.history


def _remaining_epochs(run: Run) -> None:
    try:
        if run.step == 0 and run.history.original_top1 is None:
            measure_original(run)
        run.begin_tracking()
        while run.position.epoch < run.config.epochs:
            _one_epoch(run)
    except StopAll as stop:
        raise Stopped(stop.signal, write_checkpoint(run)) from None


def _one_epoch(run: Run) -> None:
    """Grow the list, train, evaluate, write it all down."""
    seconds, config, position = Seconds(), run.config, run.position
    if position.epoch < config.growing_epochs and not position.grown:
        with seconds("importance"):
            grow(run)
    if config.refit_start and position.epoch == max(config.growing_epochs - 1, 0) and not position.refitted:
        with seconds("importance"):
            refit(run)
    if run.online is not None:
        run.online.follow(position.epoch + 1 < config.growing_epochs)
    train_epoch(run, seconds)
    summary, dropout_list = position.log.summary(run.supernet.dropout_list), run.supernet.dropout_list
    row = Epoch(
        epoch=position.epoch,
        step=run.step,
        lr=float(run.state.optimizer.param_groups[0]["lr"]),
        loss=summary["loss"] / max(summary["count"], 1),
        images=summary["images"],
        entries=len(dropout_list),
        macs_fraction=float(dropout_list.macs[-1] / dropout_list.macs[0]),
        sensitivity=position.sensitivity,
        drawn=drawn_means(summary),
    )
    if position.epoch == config.epochs - 1 or (position.epoch + 1) % config.eval_every == 0:
        with seconds("evaluate"):
            evaluate_epoch(run, row)
    run.history.epochs.append(row)
    run.track(row)
    run.position = Position(position.epoch + 1, StepLog(group=run.group))
    row.seconds = seconds.all()
    with seconds("checkpoint"):
        write_checkpoint(run)
    row.seconds = seconds.all()  # the copy in the checkpoint cannot know how long it took
    run.write_records()
    run.screen.epoch(row, config.epochs)


def train_epoch(run: Run, seconds: Seconds) -> None:
    """The steps of an epoch that are not yet done."""
    config, stepper, position = run.config, run.stepper, run.position
    run.supernet.train()
    steps = iter(in_step(_batches(run), run.group, images_in))
    if config.sched_on_updates:  # set it here too, because a run may resume after the last step of an epoch
        stepper.set_learning_rate(run.scheduler.step_update, max(run.step - 1, 0))
    else:
        stepper.set_learning_rate(run.scheduler.step, position.epoch)
    with run.screen.steps(position.epoch, config.epochs, run.steps_per_epoch, position.steps) as bar:
        while True:
            with seconds("data"):
                batch = next(steps, None)
            if batch is None:
                break
            with seconds("compile" if run.compiles else "steps"):
                _check_batch_size(run, batch)
                if config.sched_on_updates:
                    stepper.set_learning_rate(run.scheduler.step_update, run.step)
                _one_step(run, batch)
            run.compiles = False
            _after_step(run, bar)
    if position.steps == 0:
        raise ValueError("train_loader has no batch; it must yield at least one (images, labels) per step")
    run.check_finite()


def _batches(run: Run) -> Iterator[list[LabelledBatch]]:
    """The batch of each step that is not yet done, as a list of micro-batches."""
    parts = run.config.grad_accum_steps
    start = run.position.steps * parts
    numbered = enumerate(start_epoch(run.train_loader, run.config.seed, run.position.epoch, start), start)
    while True:
        run.obey()
        batch = [_checked(run, number, part) for number, part in itertools.islice(numbered, parts)]
        if len(batch) < parts:
            return
        yield batch


def _checked(run: Run, number: int, part: object) -> LabelledBatch:
    name = f"train_loader[{number}] of epoch {run.position.epoch}"
    images, labels = checked_batch(run.supernet.model, part, name)
    if labels is None:
        raise ValueError(f"{name}: labels is None; training needs labels")
    return laid_out(images, run.config), labels


def _one_step(run: Run, batch: list[LabelledBatch]) -> None:
    """Train the entry that this step draws, and log it."""
    entry = draw(run.supernet.dropout_list, run.config.entry_sampling, run.config.seed, run.step)
    start = _now(run.state.device)
    loss = run.stepper(batch, entry)
    run.finite &= torch.isfinite(loss)
    run.position.steps += 1
    if run.online is not None:
        run.online.steps += 1
    run.position.log.add(entry, loss, _since(start, run.state.device), images_in(batch) * run.state.world)


def _now(device: torch.device) -> float | torch.cuda.Event:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _since(start: float | torch.cuda.Event, device: torch.device) -> Time:
    end = _now(device)
    if isinstance(start, float) and isinstance(end, float):
        return end - start
    assert isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event)
    return start, end


def _after_step(run: Run, bar: Steps) -> None:
    # On a GPU reading the loss would wait for the step, so it is read only every log_interval steps.
    if run.state.device.type != "cuda" or run.step % run.config.log_interval == 0:
        run.check_finite()
        bar.advance(run.position.log.last_loss())
    else:
        bar.advance(None)
    if run.config.checkpoint_steps and run.step % run.config.checkpoint_steps == 0:
        write_checkpoint(run)


def _check_batch_size(run: Run, batch: list[LabelledBatch]) -> None:
    """Warn if the batches do not have the batch size for which the learning rate was computed."""
    config, images = run.config, images_in(batch) * run.state.world
    if run.step == 0 and run.state.rank == 0 and config.lr is None and images != config.batch_size:
        warnings.warn(
            f"train_loader gives {images} images per step, but batch_size is {config.batch_size}: "
            f"the learning rate, {config.peak_lr:.1e}, is for the latter",
            stacklevel=2,
        )
