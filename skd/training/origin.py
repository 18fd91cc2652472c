"""What a run began with, kept in its checkpoints. A resume with other weights or other data is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sized
from pathlib import Path

import torch

from skd.data.iteration import Loader
from skd.files import load
from skd.supernet import SuperNet
from skd.support.checks import length_of
from skd.training.checkpoints import Header, Images, Origin
from skd.training.types import Batches, Group

_SHOWN = 5  # names of classes in a message


def origin(supernet: SuperNet, loaders: Mapping[str, Batches | None], group: Group) -> Origin:
    """The `Origin` of a run that has not taken a step; `loaders` are keyed by their names in messages."""
    data = {name: images_of(loader, group) for name, loader in loaders.items() if loader is not None}
    return Origin(weights=weights_hash(supernet.state_dict()), data=data)


def weights_hash(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes, on whatever device they are; a tensor of size 0 holds no weight."""
    digest = hashlib.sha256()
    for name, tensor in sorted((name, tensor) for name, tensor in state.items() if tensor.numel()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_origin(mine: Origin, product: Path, tensors: Mapping[str, torch.Tensor], header: Header) -> None:
    """Compare what a run was given with what the checkpoint (`tensors`, `header`) says of its own.

    The weights may also be some that the run has reached: a network that was stopped, or finished, in this process.
    A checkpoint of an earlier version of skd says nothing, and nothing is compared.

    Args:
        product: the file with the run's best weights, in its folder.

    Raises:
        ValueError: other weights, classes or numbers of images.
    """
    known = header.get("origin")
    if known is None:
        return
    other = []
    if not _of_the_run(mine["weights"], known["weights"], product, tensors):
        other.append(
            "of another network: the weights given are neither those that its run began with nor any that it reached "
            "(random weights are others every time, unless a seed is set)"
        )
    data = _differences(mine["data"], known["data"])
    validated = "validation" in known["data"]
    if header["epoch"] < header["config"]["epochs"] and ("validation" in mine["data"]) != validated:
        # By these images the best weights are chosen, among those of all epochs.
        data.append(f"there were {'' if validated else 'no '}validation images")
    if data:
        other.append(f"of a run on other data: {'; '.join(data)}")
    if other:
        raise ValueError(
            f"resume: the checkpoint is {'; and '.join(other)}. Resume with what the run was given, or choose "
            f"another folder than {str(product.parent)!r}"
        )


def merged(known: Origin | None, mine: Origin) -> Origin | None:
    """The run's origin in the checkpoint, completed by what the current loaders say and the checkpoint does not."""
    if known is None:
        return None
    nothing = Images(classes=None, images=None)
    data = {}
    for name in {**mine["data"], **known["data"]}:
        now, was = mine["data"].get(name, nothing), known["data"].get(name, nothing)
        data[name] = Images(
            classes=now["classes"] if was["classes"] is None else was["classes"],
            images=now["images"] if was["images"] is None else was["images"],
        )
    return Origin(weights=known["weights"], data=data)


def images_of(loader: Batches, group: Group) -> Images:
    """The classes and number of images of a loader of skd's or PyTorch's, or of a list of batches.

    The number is unknown for a rank whose loader, not being skd's, holds only its share of the images.
    """
    source = getattr(loader, "source", None)
    if source is None:
        source = getattr(loader, "dataset", None)
    classes, count = getattr(source, "classes", None), None
    whole = group is None or isinstance(loader, Loader)  # skd's loaders know the images of all ranks
    if isinstance(source, Sized) and whole:
        count = length_of(source) or None
    elif isinstance(loader, list | tuple) and whole:
        firsts = [batch[0] for batch in loader if isinstance(batch, list | tuple) and batch]
        count = sum(len(images) for images in firsts if isinstance(images, Sized))
    # In some data sets `classes` is the number of classes.
    names = [str(name) for name in classes] if isinstance(classes, list | tuple) else None
    return Images(classes=names, images=count)


def _of_the_run(mine: str, start: str, product: Path, tensors: Mapping[str, torch.Tensor]) -> bool:
    if mine == start:
        return True
    for prefix in ("model.", "ema."):
        state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if mine == weights_hash(state):
            return True
    return product.is_file() and mine == weights_hash(load(product).state_dict())


def _differences(now: Mapping[str, Images], was: Mapping[str, Images]) -> list[str]:
    """The differences in words, each with the loaders it concerns. What is unknown on one side is not compared."""
    found: dict[str, list[str]] = {}
    for name in [name for name in was if name in now]:
        classes, known = now[name]["classes"], was[name]["classes"]
        if classes is not None and known is not None and classes != known:
            found.setdefault(f"have {_classes(classes)}, not {_classes(known)}", []).append(name)
        images, number = now[name]["images"], was[name]["images"]
        if images is not None and number is not None and images != number:
            found.setdefault(f"are {images}, not {number}", []).append(name)
    return [f"the {' and '.join(names)} images {text}" for text, names in found.items()]


def _classes(names: list[str]) -> str:
    more = f" (and {len(names) - _SHOWN} more)" if names[_SHOWN:] else ""
    return f"the classes {', '.join(names[:_SHOWN])}{more}"
