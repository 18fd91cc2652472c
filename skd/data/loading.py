"""Batches of (images, labels) to train, evaluate and calibrate with, the same for any number of workers.

    source + model's data configuration -> train_loader | eval_loader | calibration_loader -> (images, labels)

Images are float32 (B, C, H, W), normalised for the model, on the device that is asked for; labels are int64 (B,).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from skd.data.counted import generator
from skd.data.iteration import Loader, MapLoader, StreamLoader
from skd.data.pixels import Normalisation, Pixels
from skd.data.plans import FixedPlan, TrainPlan
from skd.data.readers import Source, StreamSource
from skd.data.transforms import eval_transform, train_transform
from skd.data.workers import MapBatches, Preparation
from skd.settings import Augmentation


def train_loader(
    source: Source,
    config: dict[str, Any],
    *,
    batch_size: int,
    seed: int,
    workers: int = 0,
    aug_repeats: int = 1,
    rank: int = 0,
    world: int = 1,
    bad_images: str = "skip",
    pin_memory: bool = False,
    device: torch.device | str | None = None,
    **augmentation: Any,
) -> Loader:
    """Shuffled, augmented, whole batches; `Loader.set_epoch` chooses the epoch and where in it to begin.

    The order is a function of (seed, epoch), the augmentation of a sample of (seed, epoch, its index, which of its
    repetitions). Neither workers, ranks nor a resumed run can change them. A stream is different: its order comes
    from its reader and depends on the number of workers and ranks, and its augmentation on (seed, epoch, rank,
    worker, position); the same numbers give the same batches.

    Args:
        source: from `open_source`, the training split.
        config: from `data_config`; with "num_classes", labels are checked.
        batch_size: images in a step of all ranks together.
        seed: 0..2**64 - 1.
        workers: processes that load; 0: this one does.
        aug_repeats: how often an image occurs in its epoch, differently augmented; the epoch keeps its length, so
            that only one image in `aug_repeats` is in it (as in DeiT). Not for streams.
        rank, world: this process takes rows rank, rank + world, ... of each batch.
        bad_images: an image that cannot be read: "skip" takes the next one in its place and counts it
            (`Loader.skipped`), "fail" is a ValueError. The reader of a stream has its own way.
        pin_memory: page-locked batches, for faster copies to a GPU.
        device: where images are normalised and left; None: on the CPU.
        augmentation: fields of `Augmentation`, in timm's names: scale, ratio, hflip, vflip, color_jitter, aa, reprob,
            remode, recount, train_interpolation.

    Raises:
        ValueError: an argument out of range, fewer images than one batch; while iterating: a label out of range, or a
            bad image with "fail".
        OSError: while iterating: the data set has vanished, or 10 images in a row cannot be read.
    """
    _check(batch_size, workers, rank, world, bad_images)
    if batch_size % world:
        raise ValueError(f"batch_size is {batch_size}; it must be a multiple of the number of ranks, {world}")
    if aug_repeats < 0 or aug_repeats != int(aug_repeats):
        raise ValueError(f"aug_repeats is {aug_repeats}; it must be a whole number, 0 or 1 for no repetition")
    if len(source) < batch_size:
        raise ValueError(f"batch_size is {batch_size}, but {source.name} has only {len(source)} images")
    generator(seed)
    preparation = Preparation(
        Pixels(train_transform(config, **augmentation)), seed, config.get("num_classes") or 0, bad_images == "fail"
    )
    normalise = Normalisation(config, device)
    settings = asdict(Augmentation(**augmentation)) | {"aug_repeats": max(1, aug_repeats), "bad_images": bad_images}
    if isinstance(source, StreamSource):
        if aug_repeats > 1:
            raise ValueError(f"aug_repeats is {aug_repeats}; a stream such as {source.name} cannot repeat images")
        if not source.training:
            raise ValueError(f"{source.name} was opened for evaluation; open it with training=True")
        stream = StreamLoader(source, preparation, normalise, batch_size, seed, workers, rank, world, pin_memory)
        stream.settings = settings
        return stream
    plan = TrainPlan(len(source), batch_size, seed, max(1, int(aug_repeats)), rank, world)
    loader = MapLoader(MapBatches(source, preparation), normalise, plan, workers, pin_memory)
    loader.settings = settings
    return loader


def eval_loader(
    source: Source,
    config: dict[str, Any],
    *,
    batch_size: int,
    workers: int = 0,
    bad_images: str = "skip",
    indices: Sequence[int] | None = None,
    rank: int = 0,
    world: int = 1,
    pin_memory: bool = False,
    device: torch.device | str | None = None,
) -> Loader:
    """Every image once, in order, prepared by timm's evaluation transform; the last batch may be smaller.

    Args:
        source: from `open_source`.
        config: from `data_config`; with "num_classes", labels are checked.
        batch_size: images in a batch of all ranks together.
        workers: processes that load; 0: this one does.
        bad_images: an image that cannot be read: "skip" leaves it out and counts it (`Loader.skipped`), "fail" is a
            ValueError. The reader of a stream has its own way.
        indices: only these images, in this order.
        rank, world: this process takes rows rank, rank + world, ... of each batch; it yields nothing for a batch
            in which it has no row. Of a stream every rank reads all, and keeps its part.
        pin_memory: page-locked batches, for faster copies to a GPU.
        device: where images are normalised and left; None: on the CPU.

    Raises:
        ValueError: an argument out of range; while iterating: a label out of range, or a bad image with "fail".
        OSError: while iterating: the data set has vanished, or none of its images can be read.
    """
    _check(batch_size, workers, rank, world, bad_images)
    preparation = _evaluation(config, bad_images)
    normalise = Normalisation(config, device)
    if isinstance(source, StreamSource):
        if indices is not None:
            raise ValueError(f"indices is given, but {source.name} is a stream; its images have no numbers")
        if source.training:
            raise ValueError(f"{source.name} was opened for training; open it with training=False")
        stream = StreamLoader(source, preparation, normalise, batch_size, 0, workers, rank, world, pin_memory)
        stream.settings = {"bad_images": bad_images}
        return stream
    chosen = range(len(source)) if indices is None else indices
    if len(chosen) and (min(chosen) < 0 or max(chosen) >= len(source)):
        raise ValueError(f"indices has {min(chosen)}..{max(chosen)}; {source.name} has images 0..{len(source) - 1}")
    plan = FixedPlan(chosen, batch_size, rank, world)
    loader = MapLoader(MapBatches(source, preparation), normalise, plan, workers, pin_memory)
    loader.settings = {"bad_images": bad_images}
    return loader


def calibration_loader(
    source: Source,
    config: dict[str, Any],
    *,
    images: int = 1024,
    seed: int = 0,
    batch_size: int = 128,
    workers: int = 0,
    bad_images: str = "skip",
    rank: int = 0,
    world: int = 1,
    pin_memory: bool = False,
    device: torch.device | str | None = None,
) -> Loader:
    """A random subset of the training images, chosen by `seed`, un-augmented; the same at every iteration.

    Of a stream, the first `images` of its shuffled order.

    Args:
        images: how many; with fewer in the source, all of them and a warning.

    The other arguments and errors are those of `eval_loader`.
    """
    if images < 1:
        raise ValueError(f"images is {images}; it must be at least 1")
    if not isinstance(source, StreamSource):
        if len(source) < images:
            warnings.warn(f"{source.name} has {len(source)} images to calibrate with, not {images}", stacklevel=2)
        chosen = generator(seed, "calibration").permutation(len(source))[:images]
        loader = eval_loader(
            source,
            config,
            batch_size=batch_size,
            workers=workers,
            bad_images=bad_images,
            indices=chosen.tolist(),
            rank=rank,
            world=world,
            pin_memory=pin_memory,
            device=device,
        )
        loader.settings["calibration_images"] = images
        return loader
    _check(batch_size, workers, rank, world, bad_images)
    preparation = _evaluation(config, bad_images)
    normalise = Normalisation(config, device)
    stream = StreamLoader(
        source, preparation, normalise, batch_size, seed, workers, rank, world, pin_memory, limit=images
    )
    stream.settings = {"bad_images": bad_images, "calibration_images": images}
    return stream


def _evaluation(config: dict[str, Any], bad_images: str) -> Preparation:
    """Nothing random."""
    return Preparation(Pixels(eval_transform(config)), None, config.get("num_classes") or 0, bad_images == "fail")


def _check(batch_size: int, workers: int, rank: int, world: int, bad_images: str) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    if workers < 0:
        raise ValueError(f"workers is {workers}; it must be at least 0")
    if not 0 <= rank < world:
        raise ValueError(f"rank is {rank} of {world}; it must be 0..world - 1")
    if batch_size < world:
        raise ValueError(f"batch_size is {batch_size}; it must be at least the number of ranks, {world}")
    if bad_images not in ("skip", "fail"):
        raise ValueError(f"bad_images is {bad_images!r}; it may be 'skip' or 'fail'")
