"""timm's models by name, with one-line errors, and models without their wrappers."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping

import timm
import torch
from torch import nn

from skd.vit.protocol import TimmModel

MODEL_SOURCES = ("hf-hub", "hf_hub", "local-dir")  # prefixes of names, as timm has them


def create_model(name: str, **kwargs: object) -> nn.Module:
    """``timm.create_model`` whose errors are one line: what is wrong with the name, or with which argument.

    Args:
        name: as timm takes it: of its registry, "hf-hub:USER/MODEL" or "local-dir:FOLDER".
        kwargs: arguments of ``timm.create_model``.

    Raises:
        ValueError: an unknown name (near ones are suggested), a folder that is not there, an argument that timm or
            the architecture does not take.
        OSError: weights that cannot be downloaded.
    """
    source, _, place = name.partition(":")
    if source.lower() not in MODEL_SOURCES:
        _check_name(name)
    elif source.lower() == "local-dir" and not os.path.isfile(os.path.join(place, "config.json")):
        raise ValueError(f"model name is {name!r}; there is no folder {place!r} with timm's config.json in it")
    try:
        model: nn.Module = timm.create_model(name, **kwargs)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except OSError as error:  # FileNotFoundError concerns a file that an argument names; others are download errors
        if isinstance(error, FileNotFoundError) and kwargs.get("checkpoint_path"):
            raise ValueError(f"checkpoint_path is {kwargs['checkpoint_path']!r}; there is no such file") from None
        raise OSError(f"model {name} cannot be had: {_first_line(error)}") from None
    except Exception as error:  # timm checks with assertions, look-ups and divisions
        raise ValueError(f"model {name} cannot be built{_with(name, kwargs)}: {_first_line(error)}") from None
    return model


def _check_name(name: str) -> None:
    if timm.is_model(name.split(".")[0]):
        return
    near = difflib.get_close_matches(name, timm.list_models(), n=4)
    hint = f"; near names: {', '.join(near)}" if near else ""
    if not near and os.sep in name:
        hint = f" (of a hub: 'hf-hub:{name}', in a folder: 'local-dir:{name}')"
    raise ValueError(f"model name is {name!r}; timm has no such model{hint}")


def _with(name: str, kwargs: Mapping[str, object]) -> str:
    """What an error says of the arguments: " with" each one that alone prevents the model, or else all of them.

    It is empty if the model can be built with these arguments, because then its weights are at fault.
    """
    plain = {key: value for key, value in kwargs.items() if key != "pretrained"}
    if _builds(name, set(plain), plain):
        return ""
    wrong = {key: value for key, value in plain.items() if _builds(name, plain.keys() - {key}, plain)} or plain
    return f" with {', '.join(f'{key}={value!r}' for key, value in wrong.items())}" if wrong else ""


def _builds(name: str, keys: set[str], kwargs: Mapping[str, object]) -> bool:
    """Whether timm builds the model with these arguments alone; no memory is used for the weights."""
    try:
        with torch.device("meta"):
            timm.create_model(name, **{key: kwargs[key] for key in keys})
    except Exception:
        return False
    return True


def _first_line(error: Exception) -> str:
    """The first line of an exception's text, preceded by its class where the text is a single word or empty."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if " " in text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def unwrapped(model: TimmModel) -> TimmModel:
    """The module inside torch.compile's, DataParallel's and DistributedDataParallel's wrappers, however nested."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        inner = model.module if isinstance(model, wrappers) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner
