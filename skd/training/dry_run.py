"""``skd train --dry-run``: whether a run fits, how long it takes and what it does, before any image is read."""

from __future__ import annotations

import re
import resource
import time
from pathlib import Path
from typing import TypedDict

import torch
from rich.console import Console
from rich.table import Table

from skd.supernet import SuperNet
from skd.support.settings import TrainConfig
from skd.training.optimizer import Scheduler, make_scheduler
from skd.training.precision import laid_out, tf32
from skd.training.state import StepState
from skd.training.step import Stepper, by_hand
from skd.vit import image_size

IMAGENET = 1_281_167  # training images, assumed where no data set is given
LARGEST = {"cpu": 8, "cuda": 64}  # images of a measured step: a whole batch need not fit where the run is planned
PROCESSES = (1, 8, 32)


class MeasuredStep(TypedDict):
    """One step: its images, the seconds that it took, and the most memory that was in use by then."""

    images: int
    seconds: float
    peak_bytes: int


class Share(TypedDict):
    """What each of several processes has if they share the images of a step."""

    processes: int
    images: int
    peak_bytes: int
    seconds_per_epoch: float


class Mark(TypedDict):
    """An epoch (from 1) where something begins or ends, its learning rate, and the share of the MACs removed."""

    epoch: int
    what: str
    lr: float
    macs_removed: float


class DryRun(TypedDict):
    """What `dry_run` found; memory in bytes, and the times are those of a step of the full network."""

    parameters: int
    device: str
    measured: list[MeasuredStep]
    seconds_per_step: float
    state_bytes: int
    peak_bytes: int
    images: int
    images_assumed: bool
    steps_per_epoch: int
    seconds_per_epoch: float
    hours: float
    bytes_per_image: int
    schedule: list[Mark]
    processes: list[Share]


def dry_run(
    supernet: SuperNet, config: TrainConfig, images: int | None = None, console: Console | None = None
) -> DryRun:
    """Build everything, run steps of two sizes on synthetic images, and say what a run would take.

    The steps train the full network, the most expensive entry. A step with a single image comes first, to allocate
    what does not depend on the batch. Then steps are run with 4 and 8 images on a CPU, 32 and 64 on a GPU (or half a
    smaller batch and the whole), twice for each size; the faster one counts. Memory per image follows from the
    difference of the two peaks, and time is scaled from the larger size.

    Args:
        supernet: changed by two steps of training; do not use it afterwards.
        config: settings of the run.
        images: in the training set; None: ImageNet-1k's 1,281,167.
        console: None: standard output.

    Returns:
        What is printed: parameters, memory (bytes), seconds per step and epoch, the same for several processes,
        schedule.

    Raises:
        ValueError: a headless network, or fewer images than one batch.
        torch.OutOfMemoryError: a step does not fit on the GPU.
    """
    if supernet.model.num_classes == 0:
        raise ValueError("supernet has no classifier (num_classes is 0); training needs one")
    device = next(supernet.parameters()).device
    # The steps have several batch sizes, but a CUDA graph is made for one. The schedule is by epoch, because a
    # schedule by step needs the number of steps in an epoch.
    stepper = by_hand(supernet, config.changed(cuda_graph=False))
    by_epoch = config.changed(sched_on_updates=False).schedule
    scheduler = make_scheduler(stepper.state.optimizer, by_epoch, None)
    supernet.train()
    supernet.grad_checkpointing = config.grad_checkpointing
    total = IMAGENET if images is None else images
    if total < config.batch_size:
        raise ValueError(f"batch_size is {config.batch_size}, but there are only {total} training images")
    _timed_step(stepper, config, 1)
    part = config.batch_size // config.grad_accum_steps
    largest = min(part, LARGEST.get(device.type, 8))
    steps = [_measure(stepper, config, images) for images in (-(-largest // 2), largest)]
    sizes = [step["images"] for step in steps]
    per_image = (steps[1]["peak_bytes"] - steps[0]["peak_bytes"]) / max(sizes[1] - sizes[0], 1)
    per_step = steps[1]["seconds"] * config.batch_size / largest
    per_epoch = per_step * (total // config.batch_size)
    document: DryRun = {
        "parameters": sum(p.numel() for p in supernet.parameters()),
        "device": str(device),
        "measured": steps,
        "seconds_per_step": per_step,
        "state_bytes": _state_bytes(stepper.state),
        "peak_bytes": round(steps[1]["peak_bytes"] + per_image * (part - largest)),
        "images": total,
        "images_assumed": images is None,
        "steps_per_epoch": total // config.batch_size,
        "seconds_per_epoch": per_epoch,
        "hours": per_epoch * config.epochs / 3600,
        "bytes_per_image": round(per_image),
        "schedule": schedule(config, scheduler),
        "processes": [],
    }
    document["processes"] = _divided(document, config)
    _print(Console() if console is None else console, document, config)
    return document


def _measure(stepper: Stepper, config: TrainConfig, images: int) -> MeasuredStep:
    """Measure the faster of two steps, because the first may compile and other work may slow down either."""
    with tf32(config.tf32):
        seconds = min(_timed_step(stepper, config, images) for _ in range(2))
    return {"images": images, "seconds": seconds, "peak_bytes": _peak_memory(stepper.state.device)}


def _divided(document: DryRun, config: TrainConfig) -> list[Share]:
    """The memory and time of each process if several share the images of a step; communication is not counted."""
    rows = []
    for processes in PROCESSES:
        images, rest = divmod(config.batch_size, processes * config.grad_accum_steps)
        if rest:
            continue
        fewer = config.batch_size // config.grad_accum_steps - images
        row: Share = {
            "processes": processes,
            "images": images,
            "peak_bytes": max(document["peak_bytes"] - fewer * document["bytes_per_image"], document["state_bytes"]),
            "seconds_per_epoch": document["seconds_per_epoch"] / processes,
        }
        rows.append(row)
    return rows


def schedule(config: TrainConfig, scheduler: Scheduler) -> list[Mark]:
    """The learning rate and the share of the MACs removed, at the epochs where something begins or ends."""
    growing, warmup = config.growing_epochs, config.warmup
    named = [(0, "start"), (config.epochs // 2, "half"), (config.epochs - 1, "last epoch")]
    named += [(warmup, "end of warm-up")] if warmup else []
    named += [(growing - 1, "dropout list complete")] if growing else []
    marks = {epoch: ", ".join(name for at, name in named if at == epoch) for epoch, _ in named}
    rows: list[Mark] = []
    for epoch in sorted(marks):
        rates = scheduler._get_lr(epoch)
        removed = config.target * min(1.0, (epoch + 1) / growing) if growing else 0.0
        rows.append({"epoch": epoch + 1, "what": marks[epoch], "lr": float(rates[0]), "macs_removed": removed})
    return rows


def _timed_step(stepper: Stepper, config: TrainConfig, images: int) -> float:
    model, device = stepper.state.supernet.model, stepper.state.device
    dtype = next(model.parameters()).dtype
    batch = torch.randn(images, model.in_chans, *image_size(model), device=device, dtype=dtype)
    batch = laid_out(batch, config)
    labels = torch.randint(model.num_classes, (images,), device=device)
    _wait(device)
    start = time.perf_counter()
    stepper([(batch, labels)], entry=0)
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_memory(device: torch.device) -> int:
    """Peak bytes so far: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    match = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return 1024 * (int(match[1]) if match else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _state_bytes(state: StepState) -> int:
    """The bytes that do not depend on the batch: weights, gradients, optimizer state, average and teacher."""
    weights = sum(p.numel() * p.element_size() for p in state.supernet.parameters())
    of_optimizer = sum(
        value.numel() * value.element_size()
        for values in state.optimizer.state.values()
        for value in values.values()
        if isinstance(value, torch.Tensor)
    )
    copies = [state.average, state.teacher.original if state.teacher is not None else None]
    return 2 * weights + of_optimizer + weights * sum(copy is not None for copy in copies)


def _print(console: Console, document: DryRun, config: TrainConfig) -> None:
    first, second = document["measured"]
    assumed = " (ImageNet-1k assumed: no --data)" if document["images_assumed"] else ""
    part = config.batch_size // config.grad_accum_steps
    scaled = "" if second["images"] == part else ", scaled"
    table = Table(show_header=False, box=None)
    for name, value in (
        ("parameters", f"{document['parameters']:,}"),
        ("device", document["device"]),
        ("two steps", f"full network, {_measured(first)}; {_measured(second)}"),
        ("time per step", f"{document['seconds_per_step']:.2f} s for {config.batch_size} images{scaled}"),
        ("memory", f"{document['peak_bytes'] / 1e9:.1f} GB at its peak, with {part} images at a time{scaled}"),
        ("", f"of it {document['state_bytes'] / 1e9:.2f} GB weights, gradients, optimizer state, average, teacher"),
        ("training images", f"{document['images']:,}{assumed}"),
        ("steps", f"{document['steps_per_epoch']:,} per epoch, {config.epochs} epochs"),
        ("time per epoch", f"{_duration(document['seconds_per_epoch'])} at this step's pace, training alone"),
        (
            "time in all",
            f"{document['hours']:,.1f} h if every step were this one; sub-networks are cheaper, evaluation extra",
        ),
    ):
        table.add_row(name, value)
    plan = Table("epoch", "", "learning rate", "MACs removed", title="Schedule", title_justify="left")
    for row in document["schedule"]:
        plan.add_row(str(row["epoch"]), row["what"], f"{row['lr']:.2e}", f"{row['macs_removed']:.1%}")
    shares = Table(
        *("processes", "images at a time", "memory of each", "time per epoch"),
        title="Divided, on devices like this one (communication and input not counted)",
        title_justify="left",
    )
    for share in document["processes"]:
        memory = f"{share['peak_bytes'] / 1e9:.1f} GB"
        shares.add_row(str(share["processes"]), str(share["images"]), memory, _duration(share["seconds_per_epoch"]))
    console.print(table, "", plan, "", shares, sep="\n")


def _duration(seconds: float) -> str:
    """A duration in short form, such as "48 s", "12.3 min" or "5.1 h"."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def _measured(step: MeasuredStep) -> str:
    return f"{step['images']} images {step['seconds']:.2f} s, {step['peak_bytes'] / 1e9:.2f} GB"
