"""`skd.train` and `skd.finetune`: training runs from Python; the command line calls the same functions."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from rich.console import Console

from skd import planners
from skd.data.building import warn_of_ignored
from skd.supernet import SuperNet, belongs_to_supernet, check_supernet
from skd.support.checks import length_of
from skd.support.outputs import output_folder, remove_leftovers, write_json
from skd.support.ranks import check_group, check_same, rank_of, together
from skd.support.settings import RESUME, TrainConfig, finetune_config
from skd.support.types import Document
from skd.training.checkpoints import checkpoints
from skd.training.history import History
from skd.training.loop import run_epochs
from skd.training.resume import take_up_newest
from skd.training.run import Run, make_run
from skd.training.screen import Screen
from skd.training.tracking import check_log
from skd.training.types import Batches, Group
from skd.vit import unwrapped
from skd_kernels import build_info


def train(
    supernet: SuperNet,
    train_loader: Batches,
    val_loader: Batches | None,
    config: TrainConfig | None = None,
    *,
    calibration: Batches | None,
    out: str | os.PathLike[str] | None = None,
    resume: str | None = None,
    console: Console | None = None,
    verbose: bool = True,
    group: Group = None,
) -> History:
    """Train a super-network by progressive importance-aware dropout (PIAD, METHOD 2), in place.

    In each of the first epochs importance is measured on the calibration images and the dropout list grows; every
    step draws one of its entries (by default uniformly, the last included) and trains that sub-network.

    Args:
        supernet: from `skd.convert`. Its corrections (`skd.compensate`) and moments (`skd.moments`) are dropped
            first, since they belong to its present weights. Its dropout list grows; at the end it holds the weights
            of the evaluated epoch with the largest area under the accuracy-MACs curve (the average of the weights,
            where model_ema is on).
        train_loader: batches (images (B, in_chans, H, W) float, labels (B,) int), augmented and preprocessed; Mixup
            is applied here. Read once per epoch; ``set_epoch(epoch)`` is called where it exists. skd's own
            (`skd.data.train_loader`) resume in the middle of an epoch without reading what was before; with those, or
            a list, a run depends on the seed alone.
        val_loader: batches to evaluate on; None: no evaluation, the last weights are kept.
        config: settings; None: the paper's.
        calibration: un-augmented batches of training images for importance (the paper: 1,024 images); read in each
            epoch that grows the list, so not an iterator. May be None where progressive_epochs is 0 and
            refit_start false.
        out: folder for supernet.safetensors (the best so far), dropout_list.json, history.jsonl, run.json and
            checkpoints/, and with config.log the folder tensorboard/. None: nothing is written, and signals are left
            alone.
        resume: "auto" goes on from the newest checkpoint in `out`, or starts where there is none. The run ends as if
            it had never stopped: with the same weights, bit for bit, on a CPU. It goes on from the network that the
            run began with, or any that it reached (this one, if it was stopped here), and on the same data: classes
            and numbers of images are compared where the loaders say them (`source` or `dataset`; lists).
        console: where lines and bars go; None: standard error.
        verbose: a line per epoch; else only bars, in a terminal.
        group: a torch.distributed group whose processes all call this, with the same network and settings and each
            with its own share of every batch (rows rank, rank + world, ...: `rank` and `world` of skd's loaders); the
            group has gloo for CPU tensors. Every rank trains the same entry and holds the same weights and list. Only
            rank 0 writes, and the others read `out` to resume. None: this process alone.

    Returns:
        What happened in each epoch.

    Raises:
        ValueError: bad settings, batches or labels; a headless network; `out` holds a run already; a checkpoint of
            another run: other settings, weights to begin with, or data; the message says which.
        Diverged: the loss became NaN or infinite; names the last good checkpoint.
        Stopped: SIGTERM or SIGINT, after a checkpoint was written.
        OSError: something could not be written or read (full disk, vanished data set).
        ImportError: config.log is "tensorboard", which is not installed.
        RankFailed: another process of the group failed, or died.
    """
    config = TrainConfig() if config is None else config
    supernet = unwrapped(supernet)
    _check(supernet, train_loader, val_loader, config, calibration, resume, group)
    with together(group):
        check_log(config.log, out)
    folder = _run_folder(out, resume, group)
    supernet.corrections, supernet.moments = {}, {}
    screen = Screen(console, verbose)
    batches = () if calibration is None else calibration
    run = make_run(supernet, train_loader, val_loader, config, batches, screen=screen, folder=folder, group=group)
    return _run(run, resume)


def finetune(
    model: torch.nn.Module,
    train_loader: Batches,
    val_loader: Batches | None,
    config: TrainConfig | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    resume: str | None = None,
    console: Console | None = None,
    verbose: bool = True,
    group: Group = None,
) -> History:
    """Train a plain model, such as an extracted sub-network (METHOD 3), in place.

    Args:
        model: a timm model; also a freshly initialised one. At the end it holds the weights of the best
            evaluated epoch.
        train_loader, val_loader, out, resume, console, verbose, group: as for `train`; the best weights so far are in
            model.safetensors. To resume, a model with random weights (a new head too) has to be made with the same
            seed again.
        config: settings; None: `finetune_config()`, the paper's 30 epochs at 5e-5.

    Returns, Raises:
        as `train`.
    """
    model = unwrapped(model)
    if belongs_to_supernet(model):
        raise ValueError("model belongs to a SuperNet; fine-tune what skd.extract gives")
    supernet = SuperNet(model)
    config = finetune_config() if config is None else config
    if config.growing_epochs:
        raise ValueError(
            f"progressive_epochs is {config.growing_epochs}; a plain model has nothing to drop: set it to 0"
        )
    if config.kd_teacher in ("larger", "both"):
        raise ValueError(f"kd_teacher is {config.kd_teacher!r}; a plain model has no larger entry: use 'original'")
    if config.refit_start:
        raise ValueError("refit_start is true; a plain model has no smaller entries to fit: set it to false")
    _check(supernet, train_loader, val_loader, config, None, resume, group)
    with together(group):
        check_log(config.log, out)
    folder = _run_folder(out, resume, group)
    screen = Screen(console, verbose)
    run = make_run(supernet, train_loader, val_loader, config, screen=screen, folder=folder, plain=True, group=group)
    history = _run(run, resume)
    model.load_state_dict(supernet.state_dict())
    return history


def _run(run: Run, resume: str | None) -> History:
    if resume is not None and take_up_newest(run):
        run.screen.line(f"going on after {run.position.epoch} epochs, {run.step} steps")
    else:
        run.check_product()
    history = run_epochs(run)
    with together(run.group):
        if run.folder is not None and run.state.rank == 0:
            write_json(run.folder / "run.json", _record(history, run.config))
    return history


def _check(
    supernet: SuperNet,
    train_loader: Batches,
    val_loader: Batches | None,
    config: TrainConfig,
    calibration: Batches | None,
    resume: str | None,
    group: Group,
) -> None:
    """Check everything that can be wrong before any work. What a user gave need not have the types written here."""
    check_supernet(supernet)
    check_group(group)
    if not isinstance(config, TrainConfig):
        raise ValueError(f"config is a {type(config).__name__}; it must be a TrainConfig")
    if supernet.model.num_classes == 0:
        raise ValueError("the network has no classifier (num_classes is 0); training needs one")
    dtype = next(supernet.parameters()).dtype
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the network has {dtype} weights; train float32 weights, with amp_dtype for the arithmetic")
    if config.expected_top1 is not None and val_loader is None:
        raise ValueError("expected_top1 is given, but val_loader is None: there is nothing to measure it on")
    if config.opt.startswith("lookahead"):
        raise ValueError(f"opt is {config.opt!r}; Lookahead keeps state that a checkpoint cannot hold")
    planners.check_options(config.chosen_planner, config.planner_options)
    if resume not in RESUME:
        raise ValueError(f"resume is {resume!r}; it may be one of {RESUME}")
    loaders = {"train_loader": train_loader, "val_loader": val_loader, "calibration": calibration}
    for name, batches in loaders.items():
        if batches is not None and not isinstance(batches, Iterable):
            raise ValueError(f"{name} is a {type(batches).__name__}; it must be batches of (images, labels)")
        if isinstance(batches, Iterator):
            raise ValueError(
                f"{name} is an iterator, empty after one pass; it must be a list, a DataLoader or the like"
            )
    steps = length_of(train_loader)
    check_same([steps, config.to_dict()], "the batches of an epoch and the settings", group)
    if calibration is None and (config.growing_epochs or config.refit_start):
        raise ValueError(
            "calibration is None; importance and refit_start need un-augmented batches of training images"
        )
    warn_of_ignored(config, **loaders)
    if config.kd_teacher == "larger" and config.growing_epochs == 0 and len(supernet.dropout_list) == 1:
        warnings.warn(
            "kd_teacher is 'larger', but there is only the full network, which has no larger one: it has no effect",
            stacklevel=3,
        )


def _run_folder(out: str | os.PathLike[str] | None, resume: str | None, group: Group) -> Path | None:
    if out is None:
        if resume is not None:
            raise ValueError(f"resume is {resume!r}, but there is no `out` to go on in")
        return None
    folder = Path(out)
    with together(group):
        if rank_of(group) == 0:
            output_folder(out)
            output_folder(folder / "checkpoints")
            remove_leftovers(folder, folder / "checkpoints")
            there_is_one = bool(checkpoints(folder / "checkpoints"))
            if not there_is_one and (folder / "run.json").exists():
                raise ValueError(
                    f"out is {str(folder)!r}, which holds a finished run whose checkpoints are gone; choose another "
                    "folder"
                )
            if resume is None and there_is_one:
                raise ValueError(
                    f"out is {str(folder)!r}, which holds a run already; resume it (--resume auto, in "
                    "Python resume='auto'), or choose another folder"
                )
    return folder


def _record(history: History, config: TrainConfig) -> Document:
    info = build_info()
    return {
        "original_top1": history.original_top1,
        "best_epoch": history.best_epoch,
        "area": history.area,
        "curve": history.curve,
        "seconds": sum(row.seconds["total"] for row in history.epochs),
        "config": config.to_dict(),
        "versions": {name: info[name] for name in ("skd", "python", "torch", "timm")},
    }
