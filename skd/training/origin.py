"""What a run began with, kept in its checkpoints: it is not gone on with from other weights, or on other data."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Mapping, Sized
from typing import Any

import torch

from skd.data.iteration import Loader
from skd.files import load

_SHOWN = 5  # names of classes in a message


def origin(trainer: Any) -> dict[str, Any]:
    """Of a `Trainer` that has not yet done anything: {weights, data}, JSON values.

    weights: a hash of the network's weights.
    data: per loader that it has, {classes (names in the order of their labels), images (their number)}; None for what
    the loader does not say.
    """
    loaders = {"training": trainer.train_loader, "validation": trainer.val_loader, "calibration": trainer.calibration}
    return {
        "weights": weights_hash(trainer.supernet.state_dict()),
        "data": {name: _images(loader, trainer.group) for name, loader in loaders.items() if loader is not None},
    }


def weights_hash(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes, on whatever device they are; a tensor of size 0 holds no weight."""
    digest = hashlib.sha256()
    for name, tensor in sorted((name, tensor) for name, tensor in state.items() if tensor.numel()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_origin(trainer: Any, tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any]) -> None:
    """Compare what a `Trainer` was given with what the checkpoint (`tensors`, `header`) says of its run.

    The weights may also be some that the run has reached: a network that was stopped, or finished, in this process.
    A checkpoint of an earlier version of skd says nothing, and nothing is compared.

    Raises:
        ValueError: other weights, classes or numbers of images.
    """
    known = header.get("origin")
    if known is None:
        return
    other = []
    if not _of_the_run(trainer, known["weights"], tensors):
        other.append(
            "of another network: the weights given are neither those that its run began with nor any that it reached "
            "(random weights are others every time, unless a seed is set)"
        )
    data = _differences(trainer.origin["data"], known["data"])
    if data:
        other.append(f"of a run on other data: {'; '.join(data)}")
    if other:
        raise ValueError(
            f"resume: the checkpoint is {'; and '.join(other)}. Resume with what the run was given, or choose "
            f"another folder than {str(trainer.folder)!r}"
        )


def merged(known: dict[str, Any] | None, mine: dict[str, Any]) -> dict[str, Any] | None:
    """What the run began with, and of its data what only the loaders of now say."""
    if known is None:
        return None
    data = {name: dict(images) for name, images in mine["data"].items()}
    for name, images in known["data"].items():
        data.setdefault(name, {}).update({key: value for key, value in images.items() if value is not None})
    return {**known, "data": data}


def _images(loader: Iterable[Any], group: Any) -> dict[str, Any]:
    """Of skd's loaders, of PyTorch's, and of lists of batches; those of a rank in a group are only its share."""
    source: Any = getattr(loader, "source", None)
    if source is None:
        source = getattr(loader, "dataset", None)
    classes, count = getattr(source, "classes", None), None
    whole = group is None or isinstance(loader, Loader)  # skd's loaders know the images of all ranks
    if isinstance(source, Sized) and whole:
        with contextlib.suppress(TypeError, NotImplementedError):  # a stream may not know
            count = len(source) or None
    elif isinstance(loader, list | tuple) and whole:
        firsts = [batch[0] for batch in loader if isinstance(batch, list | tuple) and batch]
        count = sum(len(images) for images in firsts if isinstance(images, Sized))
    # Of some data sets it is the number of classes.
    names = [str(name) for name in classes] if isinstance(classes, list | tuple) else None
    return {"classes": names, "images": count}


def _of_the_run(trainer: Any, start: str, tensors: Mapping[str, torch.Tensor]) -> bool:
    mine = trainer.origin["weights"]
    if mine == start:
        return True
    for prefix in ("model.", "ema."):
        state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if mine == weights_hash(state):
            return True
    return trainer.product.is_file() and mine == weights_hash(load(trainer.product).state_dict())


def _differences(now: Mapping[str, Any], was: Mapping[str, Any]) -> list[str]:
    """In words, each with all the loaders that it holds for; what one of the two does not say cannot differ."""
    found: dict[str, list[str]] = {}
    for name in [name for name in was if name in now]:
        for key, words in (("classes", _classes), ("images", str)):
            values = now[name][key], was[name][key]
            if None not in values and values[0] != values[1]:
                text = f"{'have' if key == 'classes' else 'are'} {words(values[0])}, not {words(values[1])}"
                found.setdefault(text, []).append(name)
    return [f"the {' and '.join(names)} images {text}" for text, names in found.items()]


def _classes(names: list[str]) -> str:
    return f"the classes {', '.join(names[:_SHOWN])}" + (
        f" (and {len(names) - _SHOWN} more)" if names[_SHOWN:] else ""
    )
