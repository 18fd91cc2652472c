"""The model of a command: a name in timm, a file of skd's, a user's own checkpoint; and a new head for each."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from skd.cost import cost
from skd.files import load
from skd.outputs import output_file
from skd.ranks import rank_of
from skd.supernet import SuperNet
from skd.vit import MODEL_SOURCES, create_model, describe
from skd.vit.weights import load_weights, new_head

# Names of files that hold weights; and of those that no safetensors file should have.
_OTHER_FORMATS = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".pickle", ".tar", ".npz", ".npy", ".h5", ".onnx", ".json")
_WEIGHT_FILES = (".safetensors", *_OTHER_FORMATS)


def check_no_weights(arguments: argparse.Namespace) -> None:
    """Raises ValueError: --supernet is given together with what `add_weights` adds."""
    if arguments.pretrained or arguments.checkpoint or arguments.checkpoint_weights or arguments.model_kwargs:
        raise ValueError("--supernet is given, a file with its own weights; the options of --model are not for it")


def model_file(path: str, option: str = "--out") -> None:
    """`path` can be written, and is not called what it will not be.

    Raises:
        ValueError: it cannot, or it has the ending of another format.
    """
    output_file(path, option)
    ending = Path(path).suffix
    if ending.lower() in _OTHER_FORMATS:
        raise ValueError(f"{option} is {path!r}; what is written is a safetensors file: call it .safetensors")


def is_file(name: str) -> bool:
    """--model is a file, or is called like one, and not a name in timm."""
    if name.partition(":")[0].lower() in MODEL_SOURCES:
        return False
    return (
        Path(name).is_file() or Path(name).suffix.lower() in _WEIGHT_FILES or name.startswith((os.sep, "." + os.sep))
    )


def build_model(arguments: argparse.Namespace) -> Any:
    """The plain model that --model, --model-kwargs, --pretrained or --checkpoint, and --num-classes describe."""
    name = arguments.model
    if name is None:
        if arguments.checkpoint is None:
            raise ValueError("neither --model nor --checkpoint is given")
        return _own_file(arguments, arguments.checkpoint, "--checkpoint without --model")
    if is_file(name):
        missing = "" if Path(name).is_file() else " (which is not there)"
        raise ValueError(
            f"--model is {name!r}, a file{missing}; here it is a name in timm: give skd's file as --checkpoint "
            "alone, other weights as --model NAME --checkpoint FILE"
        )
    return _named(arguments)


def plain_model(arguments: argparse.Namespace) -> Any:
    """The same where --model may also be a file of skd's (evaluate, finetune)."""
    if not is_file(arguments.model):
        return build_model(arguments)
    if arguments.pretrained or arguments.checkpoint:
        raise ValueError(f"--model is {arguments.model!r}, a file; it has its own architecture and weights")
    return _own_file(arguments, arguments.model, "--model")


def warn_if_random(arguments: argparse.Namespace) -> None:
    """Nothing has given the model its weights: seldom what is meant."""
    loaded = arguments.pretrained or arguments.checkpoint or arguments.model_kwargs.get("checkpoint_path")
    if not loaded and not is_file(arguments.model) and rank_of(arguments.group) == 0:
        print(
            f"warning: the weights of {arguments.model} are random (no --pretrained, no --checkpoint)",
            file=sys.stderr,
        )


def weights_taken(arguments: argparse.Namespace) -> dict[str, Any]:
    """For --json: which of a checkpoint's weights the model has, such as "model_ema"; None: it has no choice of them.

    Nothing, where no checkpoint was read.
    """
    taken: dict[str, Any] = getattr(arguments, "taken", {})
    return taken


def with_new_head(network: Any, arguments: argparse.Namespace) -> Any:
    """`network`, a plain model or a super-network, with the head that --num-classes asks for, if it does."""
    classes = _num_classes(arguments)
    model = network.model if isinstance(network, SuperNet) else network
    # The number that a file's head has, as an argument of its architecture, asks for no other head.
    if classes is not None and (getattr(arguments, "num_classes", None) or classes != model.num_classes):
        try:
            new_head(model, classes, _seed(arguments))
        except (RuntimeError, MemoryError) as error:  # of PyTorch's allocator, in many lines
            reason = str(error).splitlines()[0][:200]
            raise ValueError(f"--num-classes is {classes}; such a head cannot be made: {reason}") from None
    return network


def _named(arguments: argparse.Namespace) -> Any:
    """A model of timm's, with its weights."""
    name, file, kwargs = arguments.model, arguments.checkpoint, dict(arguments.model_kwargs)
    if file is None and not arguments.pretrained:
        file = kwargs.pop("checkpoint_path", None)  # of timm.create_model, which does not say what it takes
    loads = arguments.pretrained or file is not None or "checkpoint_path" in kwargs
    if not loads and _num_classes(arguments) is not None:
        kwargs["num_classes"] = _num_classes(arguments)
    try:
        model = create_model(name, pretrained=arguments.pretrained, **kwargs)
        if any(tensor.is_meta for tensor in model.parameters()):
            raise ValueError(f"model {name} has no data in its tensors, on the device meta")
    except TypeError as error:  # an argument given twice
        raise ValueError(f"--model-kwargs is {json.dumps(kwargs)}: {error}") from None
    describe(model)
    try:
        cost(model)  # everything but the blocks runs, without data
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--model-kwargs is {json.dumps(kwargs)}; such a model takes no image: {reason}") from None
    if file is not None:
        _load(model, arguments, file)
    if loads:
        with_new_head(model, arguments)
    return model.eval()


def _load(model: Any, arguments: argparse.Namespace, file: str) -> None:
    """A file of weights into a model of timm's; says what was taken from a file that has more than one."""
    option = "--checkpoint" if arguments.checkpoint is not None else "checkpoint_path"
    classes = _num_classes(arguments)
    if not isinstance(file, str) or not Path(file).is_file():
        raise ValueError(f"{option} is {file!r}; there is no such file")
    try:
        key = load_weights(model, file, take=arguments.checkpoint_weights, any_head=classes is not None)
    except ValueError as error:
        hint = "" if classes or "head." not in str(error) else "; --num-classes N makes a new head"
        raise ValueError(f"{option} {file} does not fit {arguments.model}: {error}{hint}") from None
    arguments.taken = {"checkpoint": file, "checkpoint_weights": key or None}
    if key:
        print(f"{file}: the weights are those of {key!r} (see --checkpoint-weights)")


def _own_file(arguments: argparse.Namespace, file: str, option: str) -> Any:
    """A plain model that skd wrote."""
    others = sorted(arguments.model_kwargs.keys() - {"num_classes"})
    if others or arguments.checkpoint_weights:
        given = f"--model-kwargs has {others[0]}" if others else "--checkpoint-weights is given"
        raise ValueError(f"{given}, but {file!r} is a file, with its own architecture and weights")
    try:
        model = load(file)
    except ValueError as error:
        other = "; weights of another kind need --model NAME --checkpoint FILE" if Path(file).is_file() else ""
        raise ValueError(f"{option} must be a file of skd's: {error}{other}") from None
    if isinstance(model, SuperNet):
        way = {"evaluate": "give it as --supernet", "finetune": "extract a model from it, or skd train it"}
        raise ValueError(
            f"{option} is {file!r}, a super-network; {way.get(arguments.command, 'it must be a plain model')}"
        )
    return with_new_head(model, arguments)


def _num_classes(arguments: argparse.Namespace) -> int | None:
    """--num-classes; for a file, which has an architecture already, --model-kwargs may say it too."""
    wanted: int | None = getattr(arguments, "num_classes", None)
    also = arguments.model_kwargs.get("num_classes")
    of_a_file = arguments.model is None or is_file(arguments.model)
    if of_a_file and also is not None and arguments.command == "evaluate":
        raise ValueError("--model-kwargs has num_classes, but a file is evaluated with the head that it has")
    if wanted is None:
        wanted = also if of_a_file else None
    elif also is not None and also != wanted:
        raise ValueError(f"--num-classes is {wanted}, but --model-kwargs has num_classes {also}; give one of them")
    if wanted is not None and (not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1):
        raise ValueError(f"--num-classes is {wanted!r}; it must be a whole number, at least 1")
    return wanted


def _seed(arguments: argparse.Namespace) -> int:
    """A new head is the same in every process, and when a run is resumed."""
    return int(getattr(arguments, "seed", None) or 0)
