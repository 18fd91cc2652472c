"""The loaders of a training run, by its settings: `loaders`, which the command line uses too."""

from __future__ import annotations

import os
import warnings
from typing import Any, NamedTuple

from skd.data.classes import agree, name_classes
from skd.data.iteration import Loader
from skd.data.loading import calibration_loader, eval_loader, train_loader
from skd.data.readers import Source
from skd.data.sources import open_source
from skd.data.transforms import AUGMENTATION, data_config
from skd.ranks import rank_of, size_of
from skd.settings import TrainConfig
from skd.supernet import SuperNet


class Sources(NamedTuple):
    """Images to train with, to validate with, and to calibrate with: training images again.

    A stream can be read only once at a time, so its `calibration` is another `Source` than its `train`.
    """

    train: Source
    validation: Source
    calibration: Source


class Loaders(NamedTuple):
    """The loaders of `skd.train`; `calibration` is None where nothing is measured, with progressive_epochs=0."""

    train: Loader
    validation: Loader
    calibration: Loader | None


def loaders(
    data: str | os.PathLike[str] | Sources,
    model: Any,
    config: TrainConfig,
    *,
    train_split: str = "train",
    val_split: str = "validation",
    group: Any = None,
    **options: Any,
) -> Loaders:
    """Training, validation and calibration batches for a model, with every setting of `config` that concerns them.

    These are the augmentation (scale, ratio, hflip, vflip, color_jitter, aa, train_interpolation, reprob, remode,
    recount, aug_repeats), batch_size (over all ranks and accumulated parts; a batch is one part), seed, workers (no
    more than there are cores), validation_batch_size, calibration_images and bad_images. The model decides the size,
    the channels and the normalisation of images, and the device that they are left on.

    Labels are matched by name with the model's, where it has the same; otherwise it takes those of the images, as it
    is to be trained on them: its files will have them.

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
    images, shared = data_config(model), _shared(model, config, group)
    train = train_loader(
        sources.train,
        images,
        batch_size=config.batch_size // config.grad_accum_steps,
        seed=config.seed,
        aug_repeats=config.aug_repeats,
        **{name: getattr(config, name) for name in AUGMENTATION},
        **shared,
    )
    validation = eval_loader(sources.validation, images, batch_size=_evaluated(config, group), **shared)
    if not config.growing_epochs:
        return Loaders(train, validation, None)
    return Loaders(train, validation, calibration(sources.calibration, model, config, group))


def calibration(source: Source, model: Any, config: TrainConfig, group: Any = None) -> Loader:
    """The un-augmented images that a model is converted on, and importance measured, by the settings of a run."""
    return calibration_loader(
        source,
        data_config(model),
        images=config.calibration_images,
        seed=config.seed,
        batch_size=_evaluated(config, group),
        **_shared(model, config, group),
    )


def warn_of_ignored(config: TrainConfig, **given: Any) -> None:
    """A warning for each of skd's loaders that was made with other settings than the run's, which have no effect."""
    for name, loader in given.items():
        theirs = dict(loader.settings) if isinstance(loader, Loader) else {}
        if theirs.get("aa") and config.aa:
            theirs.pop("color_jitter")  # timm leaves it out then
        ignored = [setting for setting, value in theirs.items() if value != getattr(config, setting)]
        if ignored:
            made = ", ".join(f"{setting}={theirs[setting]!r}" for setting in ignored)
            asked = ", ".join(f"{setting}={getattr(config, setting)!r}" for setting in ignored)
            warnings.warn(
                f"{name} was made with {made}; that counts, not {asked} as in config (skd.data.loaders(data, model, "
                "config) makes loaders by config)",
                stacklevel=4,
            )


def _shared(model: Any, config: TrainConfig, group: Any) -> dict[str, Any]:
    """What the three loaders have in common."""
    device = next(model.parameters()).device
    return {
        "workers": min(config.workers, os.cpu_count() or 1),  # PyTorch warns of more
        "bad_images": config.bad_images,
        "rank": rank_of(group),
        "world": size_of(group),
        "device": device,
        "pin_memory": device.type == "cuda",
    }


def _evaluated(config: TrainConfig, group: Any) -> int:
    """Images of all ranks together in a batch that is not trained on."""
    return config.validation_batch_size or min(config.batch_size, 256 * size_of(group))


def _opened(
    data: str | os.PathLike[str], model: Any, train: str, validation: str, options: dict[str, Any]
) -> Sources:
    options = {"in_chans": model.in_chans, "require_split": True, **options}
    training = open_source(data, train, training=True, **options)
    others = open_source(data, validation, training=False, **options)
    again = open_source(data, train, training=True, **options) if training.iterable else training
    return Sources(training, others, again)


def _match(sources: Sources, model: Any) -> None:
    """Labels by the names that the model knows, the same in all, and the model's names by the labels."""
    agree(sources.train, model)
    for other in (sources.validation, sources.calibration):
        if other is not sources.train:
            agree(other, model, like=sources.train)
    if sources.train.labelled:
        name_classes(model, sources.train, trained=True)
