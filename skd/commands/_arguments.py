"""Arguments that several commands share, and the files that these arguments name. Nothing here imports torch."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable
from dataclasses import Field, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from skd import recipes
from skd.support.settings import BAD_IMAGES, CHECKPOINT_WEIGHTS, DTYPES, LABELS, TrainConfig
from skd.support.types import JSON

_Value = TypeVar("_Value")

_UNITS = {"K": 10**3, "M": 10**6, "G": 10**9}

# Files


def options(arguments: argparse.Namespace, *names: str) -> dict[str, str | None]:
    """The file paths given to these arguments, keyed by option: class_map becomes --class-map."""
    return {"--" + name.replace("_", "-"): getattr(arguments, name) for name in names}


def data_read(arguments: argparse.Namespace) -> dict[str, str | None]:
    """The files and folders that the data is read from, including the folder in a name such as wds/FOLDER."""
    reads = options(arguments, "class_map", "data", "data_dir")
    if reads["--data"] is not None:
        reads["--data"] = re.sub(r"^(hfds|hfids|wds)/", "", reads["--data"], flags=re.IGNORECASE)
    return reads


def model_read(arguments: argparse.Namespace) -> dict[str, str | None]:
    """The files that the model is read from."""
    found = {"--model": arguments.model, "--checkpoint": arguments.checkpoint}
    inside = arguments.model_kwargs.get("checkpoint_path")
    found["--model-kwargs (checkpoint_path)"] = inside if isinstance(inside, str) else None
    kind, _, folder = (arguments.model or "").partition(":")
    if kind.lower() == "local-dir":
        for name in ("config.json", "model.safetensors", "pytorch_model.bin"):
            found[f"--model ({name})"] = str(Path(folder) / name)
    return found


# Data


def add_data(parser: argparse.ArgumentParser, *, required: bool = True, loading: bool = True) -> None:
    """Add --data and the options that say how to read it.

    Args:
        required: --data must be given.
        loading: also add the options that a command with a TrainConfig takes from there, such as --batch-size.
    """
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        required=required,
        help="'digits' (built in), a folder (of class folders with images in any format that Pillow reads, or of "
        "MNIST-style idx files), or a name of timm's: hfds/..., wds/..., torch/...",
    )
    group.add_argument("--data-dir", metavar="DIR", help="root folder of a timm data set")
    group.add_argument(
        "--train-split",
        default="train",
        help="name of the training split; a folder's is found by other names too, such as Train or seg_train "
        "(default: %(default)s)",
    )
    group.add_argument("--val-split", default="validation", help="of the validation split (default: %(default)s)")
    group.add_argument("--class-map", metavar="FILE", help="timm's class map: names of classes to labels")
    group.add_argument("--input-key", metavar="NAME", help="column of the images in a Hugging Face data set (image)")
    group.add_argument("--target-key", metavar="NAME", help="column of the labels (label)")
    group.add_argument(
        "--exif-orientation",
        action="store_true",
        help="turn pictures as their EXIF block says; timm does not, and by default such images are only counted",
    )
    group.add_argument("--download", action="store_true", help="let timm download a torch/ data set")
    if loading:
        parser.set_defaults(saves_memory="a smaller --batch-size, or --device cpu")
        group.add_argument(
            "--batch-size", type=whole, default=128, help="images in a batch; no result depends on it (%(default)s)"
        )
        group.add_argument(
            "--workers", type=whole, default=4, help="processes that load images (default: %(default)s)"
        )
        group.add_argument(
            "--bad-images",
            choices=BAD_IMAGES,
            default="skip",
            help="an image that cannot be read: skip and count, or fail",
        )


def add_calibration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibration-images", type=whole, default=1024, help="un-augmented training images to use (%(default)s)"
    )
    parser.add_argument("--seed", type=whole, default=0, help="that chooses them (default: %(default)s)")
    parser.add_argument(
        "--labels",
        choices=LABELS,
        default="given",
        help="or the model's own predictions: the images may then be of any classes, or without labels in one folder",
    )


def add_moments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--moments",
        action="store_true",
        help="also store second moments of the features, from which extract and evaluate --compensate moments "
        "correct a sub-network without images; they may be larger than the weights",
    )


def add_size(group: argparse._ActionsContainer) -> None:
    """Add --macs, --params, --entry and --latency-ms, of which one chooses a sub-network."""
    group.add_argument("--macs", type=size, metavar="X", help="a share of the full network (0.5), or a count (4.2G)")
    group.add_argument("--params", type=size, metavar="X", help="a share (0.5), or a count (22M)")
    group.add_argument("--entry", type=whole, metavar="I", help="index into the dropout list")
    add_latency_ms(group, "milliseconds for a batch, as --latency-table predicts them")


def add_latency_ms(parser: argparse._ActionsContainer, help: str) -> None:
    parser.add_argument("--latency-ms", type=float, metavar="X", help=help)


def add_latency_table(
    parser: argparse._ActionsContainer, help: str = "what skd latency wrote, to predict latencies"
) -> None:
    parser.add_argument("--latency-table", metavar="FILE", help=help)


def add_timing(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what is timed, each None where it is not given, and on which device."""
    parser.set_defaults(saves_memory="a smaller --batch-size, or --device cpu")
    group = parser.add_argument_group("timing")
    group.add_argument("--batch-size", type=whole, metavar="N", help="images in a call (default: 1)")
    group.add_argument("--dtype", choices=DTYPES, help="of weights and images (default: float32)")
    group.add_argument("--threads", type=whole, metavar="N", help="of PyTorch on the CPU (default: PyTorch's own)")
    group.add_argument("--rounds", type=whole, metavar="N", help="how often everything is timed (default: 15)")
    add_device(group)


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Add --shares and --entries, of which one lists sub-networks."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--shares", type=shares, metavar="X,X", help="sub-networks within shares of the MACs (default: 0.75,0.5,0.25)"
    )
    group.add_argument("--entries", type=wholes, metavar="I,I", help="or those with these indices")


def add_correction(parser: argparse.ArgumentParser) -> None:
    """Add --compensate and --uncorrected, which say what becomes of the correction of a sub-network."""
    corrected = parser.add_mutually_exclusive_group()
    add_compensate(corrected)
    corrected.add_argument(
        "--uncorrected", action="store_true", help="without the correction that skd plan --compensate has stored"
    )


def add_compensate(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--compensate",
        choices=["moments"],
        help="correct the sub-network from the stored moments (convert or plan --moments)",
    )


def add_device(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is a GPU)")


# Models


def add_model(parser: argparse.ArgumentParser, help: str, *, required: bool) -> None:
    """Add --model and the options for its weights."""
    parser.add_argument("--model", metavar="NAME", required=required, help=help)
    add_weights(parser)


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Add the options that go with --model NAME."""
    parser.add_argument(
        "--model-kwargs", metavar="JSON", type=json_object, default={}, help="arguments of timm.create_model"
    )
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--pretrained", action="store_true", help="timm's weights, downloaded if need be")
    weights.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="weights, as timm loads them: a state dict or a training script's checkpoint (.safetensors, .pth; also "
        "of another image size, and of Meta's DINOv2); or skd's file",
    )
    parser.add_argument(
        "--checkpoint-weights",
        choices=CHECKPOINT_WEIGHTS,
        help="of a checkpoint with both: the average (model_ema) or the model (default: the average, if it is there)",
    )


def add_num_classes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num-classes",
        type=whole,
        metavar="N",
        help="a new head of N classes, with random weights, in place of the old",
    )


def json_object(text: str) -> dict[str, JSON]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("not a JSON object, such as '{\"num_classes\": 10}'")
    return value


# Settings


def add_settings(parser: argparse.ArgumentParser, defaults: TrainConfig) -> None:
    """Add --config and one option for each field of TrainConfig."""
    parser.set_defaults(saves_memory="--grad-accum-steps, --grad-checkpointing")
    group = parser.add_argument_group("settings", "each is a field of skd.TrainConfig")
    group.add_argument(
        "--config",
        metavar="FILE",
        help="JSON or YAML file of settings, or the name of a recipe that comes with skd "
        f"({', '.join(recipes.names())}); options take precedence",
    )
    for setting in fields(TrainConfig):
        flag = "--" + setting.name.replace("_", "-")
        default = getattr(defaults, setting.name)
        shown = " ".join(f"{value:.3g}" for value in default) if isinstance(default, tuple) else default
        text = f"{setting.metadata['help']} (default: {shown})".replace("%", "%%")
        group.add_argument(flag, dest=setting.name, default=argparse.SUPPRESS, help=text, **_kind(setting))


def _kind(setting: Field[object]) -> dict[str, Any]:
    """The keyword arguments for argparse's ``add_argument`` that fit a field's annotation."""
    annotation = str(setting.type)
    if "choices" in setting.metadata:
        return {"choices": setting.metadata["choices"]()}
    if annotation.startswith("bool"):
        return {"action": argparse.BooleanOptionalAction}
    if annotation.startswith("tuple"):
        return {"type": float, "nargs": "+", "metavar": "X"}
    if annotation.startswith("dict"):
        return {"type": json_object, "metavar": "JSON"}
    kinds: dict[str, Callable[[str], object]] = {"int": whole, "float": float, "str": str}
    base = kinds[annotation.split(" ")[0]]
    metavar = {"int": "N", "float": "X", "str": "NAME"}[annotation.split(" ")[0]]
    return {"type": partial(_or_none, base) if "None" in annotation else base, "metavar": metavar}


def _or_none(base: Callable[[str], _Value], text: str) -> _Value | None:
    try:
        return None if text.lower() == "none" else base(text)
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def settings(arguments: argparse.Namespace, defaults: TrainConfig) -> tuple[TrainConfig, recipes.About]:
    """The settings of the command, and what its recipe says about itself.

    Values from --config replace `defaults`, and options on the command line replace both.
    """
    command = arguments.command
    recipe = recipes.Recipe({}, {}) if arguments.config is None else recipes.read_recipe(arguments.config)
    meant = recipe.about.get("command", command)
    if meant != command:
        raise ValueError(f"--config is {arguments.config!r}, a recipe for skd {meant}, not for skd {command}")
    given = {s.name: getattr(arguments, s.name) for s in fields(TrainConfig) if hasattr(arguments, s.name)}
    return defaults.changed(**(recipe.settings | given)), recipe.about


def whole(text: str) -> int:
    """A whole number that fits in 64 bits, as the length of a list or a tensor must."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if abs(number) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is too large a number")
    return number


def shares(text: str) -> list[float]:
    """Shares such as '0.5,0.25', each above 0 and at most 1."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(0 < share <= 1 for share in found):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of shares above 0 and at most 1, such as 0.5,0.25")
    return found


def wholes(text: str) -> list[int]:
    """Whole numbers such as '0,10,20'."""
    return [whole(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    """Names of modules, such as '0.attn,11.mlp'."""
    return [name.strip() for name in text.split(",") if name.strip()]


def size(text: str) -> int | float:
    """A share such as '0.5' as a float, or a count such as '4.2G' or '1000000' as an int."""
    unit = _UNITS.get(text[-1:].upper())
    try:
        number = float(text) if unit is None else round(float(text[:-1]) * unit)
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or (number > 1 and number != int(number)):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a share such as 0.5 nor a count such as 4.2G")
    return number if number <= 1 and unit is None else int(number)
