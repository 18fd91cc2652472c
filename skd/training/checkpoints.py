"""Checkpoints of a training run: safetensors files that appear whole or not at all; nothing is pickled.

Tensors: "model.*", "ema.*" and "teacher.*" with timm's names, "optimizer.STATE.*" per parameter. The JSON under the
metadata key "skd-checkpoint" has everything else: the position of the run, its settings, dropout list and history. No
states of random generators are saved, because random numbers depend only on the seed and on counters
(`skd.data.counted`).
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from skd.support.outputs import replacing
from skd.training.history import Summary

KEY = "skd-checkpoint"
FORMAT = 1
_NAME = re.compile(r"step-(\d{9})\.safetensors")

Tensors = dict[str, torch.Tensor]
Numbers = dict[str, dict[str, Any]]  # plain numbers of an optimizer's state, by the name of the parameter


class Images(TypedDict):
    """What a loader says of its images: names of the classes in the order of their labels, and how many images."""

    classes: list[str] | None
    images: int | None


class Origin(TypedDict):
    """What a run began with: a hash of the network's weights, and the images of each loader that it has."""

    weights: str
    data: dict[str, Images]


class Header(TypedDict):
    """The JSON of a checkpoint. What an earlier version did not write need not be there."""

    epoch: int
    step_in_epoch: int
    grown: bool
    sensitivity: dict[str, float] | None
    scored_steps: NotRequired[int]
    refitted: NotRequired[bool]
    config: dict[str, Any]
    origin: NotRequired[Origin | None]
    steps_per_epoch: int | None
    dropout_list: str
    history: list[Any]  # original_top1, epochs as in history.jsonl, best_epoch
    partial: Summary
    optimizer: Numbers
    scaler: dict[str, Any]
    format: NotRequired[int]
    step: NotRequired[int]


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:09d}.safetensors"


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest first."""
    return sorted((path for path in folder.glob("step-*.safetensors") if _NAME.fullmatch(path.name)), reverse=True)


def write(folder: Path, step: int, tensors: Tensors, header: Header, keep: int) -> Path:
    """Write one checkpoint atomically, then delete all but the newest `keep`.

    Raises:
        OSError: it cannot be written (a full disk); the earlier checkpoints are untouched.
    """
    path = checkpoint_path(folder, step)
    text = json.dumps({**header, "format": FORMAT, "step": step})
    on_cpu = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    try:
        with replacing(path) as temporary:
            save_file(on_cpu, temporary, metadata={KEY: text})
    except (SafetensorError, OSError) as error:
        last = checkpoints(folder)
        whole = f"the last whole checkpoint is {last[0]}" if last else "there is no earlier checkpoint"
        raise OSError(f"checkpoint {path} could not be written: {error}; {whole}") from None
    known = checkpoints(folder)
    here = known.index(path)
    # Checkpoints of a later step are damaged, which is why the run was resumed from an earlier one.
    for other in known[:here] + known[here + keep :]:
        other.unlink(missing_ok=True)
    return path


def read(path: Path) -> tuple[Tensors, Header]:
    """(tensors, header) of one checkpoint.

    Raises:
        ValueError: damaged, or not a checkpoint of this version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            header = cast(Header, dict(json.loads(metadata[KEY])))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"checkpoint {path} is damaged: {error}") from None
    if header.get("format") != FORMAT:
        raise ValueError(f"checkpoint {path} has format {header.get('format')}; this version of skd reads {FORMAT}")
    return tensors, header


def newest(folder: Path) -> tuple[Tensors, Header] | None:
    """The newest checkpoint that is whole, or None; a damaged one is passed over with a warning."""
    for path in checkpoints(folder):
        try:
            return read(path)
        except ValueError as error:
            warnings.warn(f"{error}; going on from an earlier one", stacklevel=3)
    return None


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> tuple[Tensors, Numbers]:
    """State of an optimizer by parameter name: its tensors, and its plain numbers.

    Some of timm's optimizers count their steps in the parameter groups: those are under the name "group N".
    """
    tensors: Tensors = {}
    numbers: Numbers = {}
    for parameter, state in optimizer.state.items():
        name = names[id(parameter)]
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{key}.{name}"] = value
            elif isinstance(value, int | float | bool) or value is None:
                numbers.setdefault(name, {})[key] = value
            else:
                raise ValueError(f"opt: the state of {type(optimizer).__name__} has a {type(value).__name__}, {key}")
    for index, group in enumerate(optimizer.param_groups):
        if "step" in group:
            numbers[f"group {index}"] = {"step": int(group["step"])}
    return tensors, numbers


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: dict[int, str], tensors: Tensors, numbers: Numbers
) -> None:
    """The inverse of `optimizer_tensors`; settings of the parameter groups stay as they are."""
    state = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    places = {names[id(parameter)]: index for index, parameter in enumerate(parameters)}
    numbers = dict(numbers)
    for index, group in enumerate(state["param_groups"]):
        group |= numbers.pop(f"group {index}", {})
    restored: dict[int, dict[str, Any]] = {places[name]: dict(values) for name, values in numbers.items()}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, field, name = key.split(".", 2)
            restored.setdefault(places[name], {})[field] = tensor
    # load_state_dict converts each tensor to the device and the dtype of its parameter.
    optimizer.load_state_dict({"state": restored, "param_groups": state["param_groups"]})
