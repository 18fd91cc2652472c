"""Loaders for a source and a model's data configuration: one at a time, or all three of a training run.

    source, data configuration, `Loading` -> `train_loader` | `eval_loader` | `calibration_loader` -> (images, labels)
    data, model, `skd.TrainConfig` -> `loaders`, which the command line uses too

Images are float32 (B, C, H, W), normalised for the model, on the device that is asked for; labels are int64 (B,).
They are the same for any number of workers.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from skd.data.counted import generator
from skd.data.indexed import IndexedSource
from skd.data.iteration import IndexedLoader, Loader, StreamLoader
from skd.data.loading import FixedPlan, Loading, TrainPlan
from skd.data.opening import open_source
from skd.data.pixels import AUGMENTATION, DataConfig, Normalisation, chosen_augmentation, data_config
from skd.data.source import Source, agree, name_classes
from skd.data.streams import StreamSource
from skd.data.workers import IndexedBatches, Preparation
from skd.supernet import SuperNet
from skd.support.ranks import rank_of, size_of
from skd.support.settings import Augmentation, TrainConfig
from skd.vit import TimmModel

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# One at a time


def train_loader(
    source: Source,
    config: DataConfig,
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
    augment_on: str = "auto",
    **augmentation: Any,
) -> Loader:
    """Shuffled, augmented, whole batches; `Loader.set_epoch` chooses the epoch and where in it to begin.

    The order depends only on (seed, epoch), and the augmentation of a sample only on (seed, epoch, index of the
    image, number of its repetition). Neither workers, ranks nor a resumed run can change them. A stream is different:
    its order comes from its reader and depends on the number of workers and ranks, and its augmentation depends on
    (seed, epoch, rank, worker, position). With the same number of workers and ranks a stream gives the same batches.

    Args:
        source: from `open_source`, the training split.
        config: from `data_config`; with "num_classes", labels are checked.
        batch_size: images in a step of all ranks together.
        seed: 0..2**64 - 1.
        workers: the number of processes that load images; 0: this process loads them.
        aug_repeats: how often an image occurs in an epoch, augmented differently each time. The epoch keeps its
            length, so only one in `aug_repeats` of the images occurs in it (as in DeiT). Streams do not support it.
        rank, world: this process takes rows rank, rank + world, ... of each batch.
        bad_images: what happens to an image that cannot be read: "skip" takes the next image in its place and counts
            it (`Loader.skipped`), "fail" raises a ValueError. For streams see `StreamSource.stream`.
        pin_memory: page-locked batches, for faster copies to a GPU.
        device: where images are normalised and left; None: on the CPU.
        augment_on: "device": workers only decode, crop and resize, and the device does the rest, batch by batch, to
            the same random numbers, within 2 of 255 of timm's pixels after the resize and 1 of 255 for each operation
            that moves them (which a later solarize, posterize or equalize can magnify); "cpu": timm's transform in
            the workers, to the last bit; "auto": "device", unless the augmentation has something that it cannot do
            (`aa` with augmix or a blur, `train_interpolation` other than bilinear and bicubic).
        augmentation: fields of `Augmentation`, in timm's names: scale, ratio, hflip, vflip, color_jitter, aa, reprob,
            remode, recount, train_interpolation.

    Raises:
        ValueError: an argument out of range, fewer images than one batch; while iterating: a label out of range, or a
            bad image with "fail".
        OSError: while iterating: the data set has vanished, or 10 images in a row cannot be read.
    """
    loading = Loading(
        batch_size,
        chosen_augmentation(augmentation),
        seed,
        aug_repeats,
        num_classes=config.get("num_classes") or 0,
        bad_images=bad_images,
        workers=workers,
        rank=rank,
        world=world,
        pin_memory=pin_memory,
        device=device,
        augment_on=augment_on,
    )
    return loader_of(source, config, loading)


def eval_loader(
    source: Source,
    config: DataConfig,
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
        workers: the number of processes that load images; 0: this process loads them.
        bad_images: what happens to an image that cannot be read: "skip" leaves it out and counts it
            (`Loader.skipped`), "fail" raises a ValueError.
        indices: only these images, in this order.
        rank, world: this process takes rows rank, rank + world, ... of each batch; it yields nothing for a batch
            in which it has no row. Every rank reads the whole of a stream and keeps its part.
        pin_memory: page-locked batches, for faster copies to a GPU.
        device: where images are normalised and left; None: on the CPU.

    Raises:
        ValueError: an argument out of range; while iterating: a label out of range, or a bad image with "fail".
        OSError: while iterating: the data set has vanished, or none of its images can be read.
    """
    loading = Loading(
        batch_size,
        num_classes=config.get("num_classes") or 0,
        bad_images=bad_images,
        workers=workers,
        rank=rank,
        world=world,
        pin_memory=pin_memory,
        device=device,
    )
    return loader_of(source, config, loading, indices)


def calibration_loader(
    source: Source,
    config: DataConfig,
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

    A stream gives the first `images` of its shuffled order.

    Args:
        images: how many; with fewer in the source, all of them and a warning.

    The other arguments and errors are those of `eval_loader`.
    """
    loading = Loading(
        batch_size,
        seed=seed,
        calibration_images=images,
        num_classes=config.get("num_classes") or 0,
        bad_images=bad_images,
        workers=workers,
        rank=rank,
        world=world,
        pin_memory=pin_memory,
        device=device,
    )
    return loader_of(source, config, loading)


def loader_of(source: Source, config: DataConfig, loading: Loading, indices: Sequence[int] | None = None) -> Loader:
    """The loader that `loading` describes: one for training, for evaluation or for calibration.

    Args:
        source: from `open_source`.
        config: from `data_config`.
        loading: a description of the batches.
        indices: to evaluate only these images, in this order.

    Raises:
        ValueError: as the three functions above.
    """
    if loading.training and len(source) < loading.batch_size:
        raise ValueError(f"batch_size is {loading.batch_size}, but {source.name} has only {len(source)} images")
    preparation, normalise = Preparation(config, loading), Normalisation(config, loading.device)
    if isinstance(source, StreamSource):
        _check_stream(source, loading, indices)
        return StreamLoader(source, preparation, normalise)
    if not isinstance(source, IndexedSource):
        raise ValueError(f"source is a {type(source).__name__}; it must be an IndexedSource or a StreamSource")
    if loading.training:
        return IndexedLoader(IndexedBatches(source, preparation), normalise, TrainPlan(len(source), loading))
    plan = FixedPlan(_chosen(source, loading, indices), loading)
    return IndexedLoader(IndexedBatches(source, preparation), normalise, plan)


def _check_stream(source: StreamSource, loading: Loading, indices: Sequence[int] | None) -> None:
    if loading.training:
        if loading.repeats > 1:
            raise ValueError(
                f"aug_repeats is {loading.aug_repeats}; a stream such as {source.name} cannot repeat images"
            )
        if not source.training:
            raise ValueError(f"{source.name} was opened for evaluation; open it with training=True")
    elif loading.calibration_images is None:
        if indices is not None:
            raise ValueError(f"indices is given, but {source.name} is a stream; its images have no numbers")
        if source.training:
            raise ValueError(f"{source.name} was opened for training; open it with training=False")


def _chosen(source: IndexedSource, loading: Loading, indices: Sequence[int] | None) -> Sequence[int]:
    """The numbers of the images to evaluate, or to calibrate with."""
    images = loading.calibration_images
    if images is not None:
        if len(source) < images:
            warnings.warn(f"{source.name} has {len(source)} images to calibrate with, not {images}", stacklevel=4)
        return generator(loading.seed, "calibration").permutation(len(source))[:images].tolist()
    chosen = range(len(source)) if indices is None else indices
    if len(chosen) and (min(chosen) < 0 or max(chosen) >= len(source)):
        raise ValueError(f"indices has {min(chosen)}..{max(chosen)}; {source.name} has images 0..{len(source) - 1}")
    return chosen


# The loaders of a training run


class Sources(NamedTuple):
    """The images for training, validation and calibration. The calibration images are training images.

    Only one loader at a time can read a stream, so for streams `calibration` is a second `Source` beside `train`.
    """

    train: Source
    validation: Source
    calibration: Source


class Loaders(NamedTuple):
    """The loaders of `skd.train`. `calibration` is None if no epoch grows the list and refit_start is off."""

    train: Loader
    validation: Loader
    calibration: Loader | None


def loaders(
    data: str | os.PathLike[str] | Sources,
    model: TimmModel,
    config: TrainConfig,
    *,
    train_split: str = "train",
    val_split: str = "validation",
    group: ProcessGroup | None = None,
    **options: Any,
) -> Loaders:
    """Training, validation and calibration batches for a model, with every setting of `config` that concerns them.

    These are the augmentation (scale, ratio, hflip, vflip, color_jitter, aa, train_interpolation, reprob, remode,
    recount, aug_repeats, augment_on), batch_size (over all ranks and accumulated parts; a batch is one part), seed,
    workers (no more than there are cores), validation_batch_size, calibration_images and bad_images. The model
    decides the size, the channels and the normalisation of images, and the device that they are left on.

    Where the model has the same class names as the data, the labels follow the model's order. Otherwise the model
    takes the names of the data, since it is about to be trained on them, and its files will hold these names.

    Args:
        data: as in `open_source`: "digits", a folder that is divided into training and validation images, or a name
            of timm's; or `Sources` that are open already.
        model: a timm model, or a `SuperNet`.
        config: settings.
        train_split, val_split: names of the splits.
        group: a torch.distributed group whose processes share every batch. None: this process alone.
        options: of `open_source`: data_dir, class_map, download, exif_orientation, input_key, ...

    Raises:
        ValueError: as in `open_source`, `train_loader` and `eval_loader`; the two splits, or the data and the model's
            head, do not have the same classes.
    """
    model = model.model if isinstance(model, SuperNet) else model
    if isinstance(data, Sources):
        if options:
            raise ValueError(f"{', '.join(options)} is given with sources that are open already")
        sources = data
    else:
        sources = _opened(data, model, train_split, val_split, options)
    _match(sources, model)
    images = data_config(model)
    shared = _shared(images, model, config, group)
    training = replace(
        shared,
        batch_size=config.batch_size // config.grad_accum_steps,
        augmentation=Augmentation(**{name: getattr(config, name) for name in AUGMENTATION}),
        aug_repeats=config.aug_repeats,
        augment_on=config.augment_on,
    )
    train = loader_of(sources.train, images, training)
    validation = loader_of(sources.validation, images, shared)
    if not (config.growing_epochs or config.refit_start):
        return Loaders(train, validation, None)
    return Loaders(train, validation, calibration(sources.calibration, model, config, group))


def calibration(source: Source, model: TimmModel, config: TrainConfig, group: ProcessGroup | None = None) -> Loader:
    """The loader of the un-augmented images that conversion and importance use, by the settings of a run."""
    images = data_config(model)
    shared = _shared(images, model, config, group)
    return loader_of(source, images, replace(shared, calibration_images=config.calibration_images))


def warn_of_ignored(config: TrainConfig, **given: object) -> None:
    """Warn of loaders of skd that were made with other settings than `config`, whose values then have no effect."""
    for name, loader in given.items():
        theirs = loader.loading.settings() if isinstance(loader, Loader) else {}
        if theirs.get("aa") and config.aa:
            theirs.pop("color_jitter")  # timm ignores color_jitter if there is an AutoAugment policy
        ignored = [setting for setting, value in theirs.items() if value != getattr(config, setting)]
        if ignored:
            made = ", ".join(f"{setting}={theirs[setting]!r}" for setting in ignored)
            asked = ", ".join(f"{setting}={getattr(config, setting)!r}" for setting in ignored)
            warnings.warn(
                f"{name} was made with {made}; that counts, not {asked} as in config (skd.data.loaders(data, model, "
                "config) makes loaders by config)",
                stacklevel=4,
            )


def _shared(images: DataConfig, model: TimmModel, config: TrainConfig, group: ProcessGroup | None) -> Loading:
    """The settings that the three loaders share; the validation loader needs no others."""
    device = next(model.parameters()).device
    return Loading(
        config.validation_batch_size or min(config.batch_size, 256 * size_of(group)),
        seed=config.seed,
        num_classes=images.get("num_classes") or 0,
        bad_images=config.bad_images,
        workers=usable_workers(config.workers),
        rank=rank_of(group),
        world=size_of(group),
        pin_memory=device.type == "cuda",
        device=device,
    )


def usable_workers(wanted: int) -> int:
    """At most as many workers as there are cores: PyTorch warns of more, and no result depends on the number."""
    return min(wanted, os.cpu_count() or 1)


def _opened(
    data: str | os.PathLike[str], model: TimmModel, train: str, validation: str, options: dict[str, Any]
) -> Sources:
    options = {"in_chans": model.in_chans, "require_split": True, **options}
    training = open_source(data, train, training=True, **options)
    others = open_source(data, validation, training=False, **options)
    again = open_source(data, train, training=True, **options) if training.iterable else training
    return Sources(training, others, again)


def _match(sources: Sources, model: TimmModel) -> None:
    """Make the labels of all sources agree with the model's class names, then give the model the names it lacks."""
    agree(sources.train, model)
    for other in (sources.validation, sources.calibration):
        if other is not sources.train:
            agree(other, model, like=sources.train)
    if sources.train.labelled:
        name_classes(model, sources.train, trained=True)
