"""Weights of a user's own files into a timm model, the way timm itself loads pre-trained ones; and new heads."""

from __future__ import annotations

import argparse
import os
import pickle
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from timm.models import clean_state_dict, vision_transformer

from skd.vit.protocol import TimmModel

# Keys of a training script's checkpoint that hold the weights, and their average (EMA), in timm's order.
_WEIGHTS = {"ema": ("state_dict_ema", "model_ema"), "model": ("state_dict", "model")}


# A function that converts the state dict of a file to that of a model, as timm does.
Filter = Callable[[dict[str, torch.Tensor], TimmModel], dict[str, torch.Tensor]]


def load_weights(
    model: TimmModel, file: str | os.PathLike[str], *, take: str | None = None, any_head: bool = False
) -> str:
    """Load a file of weights into `model`, through timm's filter for its architecture.

    The filter resamples the position embedding and the patches of another image or patch size, and renames what
    other libraries call differently (Meta's DINOv2, OpenAI's CLIP, ...). Keys must fit otherwise.

    Args:
        model: a timm model that `skd.convert` takes; of no use after an error.
        file: .safetensors, or what torch.save wrote (a state dict, or a training script's checkpoint of several), or
            JAX's .npz or .npy.
        take: of a checkpoint that has both: "ema" (the average of the weights) or "model"; None: the average, if it
            is there.
        any_head: `model` gets a head of the file's number of classes first (none, if the file has no head).

    Returns:
        The key that the weights were under, such as "model_ema"; "" if they were not under any.

    Raises:
        ValueError: there is no such file, it cannot be read, has not what `take` asks for, or does not fit.
    """
    file = Path(file)
    if not file.is_file():
        raise ValueError("there is no such file")
    try:
        if file.suffix.lower() in (".npz", ".npy"):
            if take is not None:
                raise ValueError(f"it is a NumPy file, which has no choice of weights such as {take!r}")
            if not hasattr(model, "load_pretrained"):
                raise ValueError(
                    f"it is a NumPy file, which timm reads for VisionTransformers, not for {type(model).__name__}"
                )
            model.load_pretrained(str(file))
            return ""
        state, key = _state(file, take)
        state = _filter(model)(state, model)
        if getattr(model, "attn_pool", None) is None:  # SigLIP's pool, which a model with another pooling lacks
            state = {name: tensor for name, tensor in state.items() if not name.startswith("attn_pool.")}
        if any_head:
            head = state.get("head.weight")
            model.reset_classifier(0 if head is None else len(head))
        model.load_state_dict(state)
    except MemoryError:
        raise
    except Exception as error:  # timm raises many kinds of errors for files that do not fit
        raise ValueError(_shortened(error)) from None
    return key


def new_head(model: TimmModel, num_classes: int, seed: int = 0) -> None:
    """Replace the classifier of a timm model by a fresh one, the same for the same `seed`; in place.

    The names of the classes go with the old one.

    Raises:
        ValueError: num_classes is below 1.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}; it must be at least 1")
    devices = [tensor.device for tensor in model.parameters() if tensor.is_cuda][:1]
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        model.reset_classifier(num_classes)
    model.pretrained_cfg = {
        **getattr(model, "pretrained_cfg", {}),
        "num_classes": num_classes,
        "label_names": None,
        "label_descriptions": None,
    }


def _shortened(error: Exception) -> str:
    """The first few lines of an error, in one line. PyTorch lists each tensor that does not fit on its own line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:3]) + (f" ({len(lines) - 3} more)" if len(lines) > 3 else "")


def _state(file: Path, take: str | None) -> tuple[dict[str, torch.Tensor], str]:
    """The state dict in a file, without the prefixes of wrappers, and the key that it was under."""
    whole = load_file(file) if file.suffix == ".safetensors" else _unpickled(file)
    if not isinstance(whole, dict):
        raise ValueError(f"it holds a {type(whole).__name__}; it must be a state dict, or a checkpoint that has one")
    found = {choice: [key for key in keys if isinstance(whole.get(key), dict)] for choice, keys in _WEIGHTS.items()}
    present = {choice: keys[0] for choice, keys in found.items() if keys}
    if take is not None and take not in present:
        has = " and ".join(present.values()) or "the weights alone"
        raise ValueError(f"it has no {' or '.join(_WEIGHTS[take])}; it has {has}")
    key = present.get(take or "ema", present.get("model", ""))
    return clean_state_dict(whole[key] if key else whole), key


def _unpickled(file: Path) -> object:
    """Load tensors and plain values only, and refuse a pickle that would run code."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # of timm's training script
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            "it is no file of torch.save's, or holds more than tensors and plain values, which may run code; "
            "save model.state_dict() alone"
        ) from None


def _filter(model: TimmModel) -> Filter:
    """timm's filter of checkpoints for an architecture, with the options that its module calls it with."""
    name = getattr(model, "pretrained_cfg", {}).get("architecture") or ""
    known = timm.is_model(name)
    module = sys.modules[timm.model_entrypoint(name).__module__ if known else type(model).__module__]
    filter_fn: Callable[..., dict[str, torch.Tensor]] = getattr(
        module, "checkpoint_filter_fn", vision_transformer.checkpoint_filter_fn
    )
    if "flexi" in name or "radio" in name:
        filter_fn = partial(filter_fn, interpolation="bilinear", antialias=False)
    if "radio" in name:
        corners = getattr(vision_transformer, "_RADIO_ALIGN_CORNERS", ())
        filter_fn = partial(filter_fn, align_corners=any(part in name for part in corners))
    if filter_fn is vision_transformer.checkpoint_filter_fn:  # DeiT III's gamma_1; no other file has such a key
        filter_fn = partial(filter_fn, adapt_layer_scale=True)
    return filter_fn
