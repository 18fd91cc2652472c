"""The images of the comparison, the order in which networks see them, and the networks pre-trained on them."""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

import skd
from skd.data.counted import generator
from skd.data.digits import MEAN as DIGITS_MEAN
from skd.data.digits import STD as DIGITS_STD
from skd.data.digits import Split, digits, shifted
from skd.data.indexed import IdxImages
from skd.demo.running import ShiftedBatches
from skd.support.outputs import replacing

MEAN, STD = 0.2860, 0.3530  # of Fashion-MNIST's pixels, scaled to [0, 1]
TRAINED, CALIBRATION = 12_000, 1_024
BATCH = 64
HEAD = 32  # coordinates of an attention head
HARDER_SEED = 0  # there is one harder set, which all networks share


@dataclass(frozen=True)
class Task:
    """A set of images, and how long networks are trained on it.

    Attributes:
        pixels, patch: height and width of an image and of a patch; 17 tokens in all.
        spread: standard deviation of the positions' initial embedding.
        background: value of an empty pixel.
        shift: pixels that a training image is moved by at most, along both axes.
        flips: whether half of the training images are mirrored.
        pretraining: epochs of the network that stands in for a pre-trained one.
        epochs, steps: of the training of a super-network; steps of each epoch.
        less_deep: blocks that its networks have less than those of the other sets.
    """

    pixels: int
    patch: int
    background: float
    shift: int
    flips: bool
    pretraining: int
    epochs: int
    steps: int
    spread: float = 0.02
    less_deep: int = 0


_FASHION = Task(28, 7, (0 - MEAN) / STD, shift=2, flips=True, pretraining=24, epochs=12, steps=93)
TASKS = {
    "digits": Task(
        8, 2, (0 - DIGITS_MEAN) / DIGITS_STD, 1, False, pretraining=40, epochs=24, steps=21, spread=0.5, less_deep=2
    ),
    "fashion": _FASHION,
    "harder": replace(_FASHION),
}
SIZES = {"small": (64, 6), "large": (96, 8)}  # width, blocks


def described(settings: Any) -> dict[str, Any]:
    """The fields of a dataclass that have no default, or another value: what stored results are recognised by.

    A field that is added later, with a default, changes none of them.
    """
    made = [
        (item, MISSING if item.default_factory is MISSING else item.default_factory()) for item in fields(settings)
    ]
    defaults = {item.name: value if item.default is MISSING else item.default for item, value in made}
    return {name: vars(settings)[name] for name, value in defaults.items() if vars(settings)[name] != value}


class Images(NamedTuple):
    """To train; to convert, plan and compensate with (not trained on, except of the digits); to measure with."""

    train: Split
    calibration: Split
    test: Split


def load(name: str, folder: str | None) -> Images:
    """The images of a set; `folder` has Fashion-MNIST's idx files.

    Raises:
        ValueError: no folder is given, and the set needs it.
    """
    if name == "digits":
        train, test = digits()
        return Images(train, Split(*(part[:CALIBRATION] for part in train)), test)
    if folder is None:
        raise ValueError(f"--data is not given; {name} needs a folder with Fashion-MNIST's idx files")
    whole, test = fashion(folder, "train", name == "harder"), fashion(folder, "validation", name == "harder")
    train = Split(*(part[:TRAINED] for part in whole))
    return Images(train, Split(*(part[TRAINED : TRAINED + CALIBRATION] for part in whole)), test)


def fashion(folder: str, split: str, changed: bool = False) -> Split:
    """Fashion-MNIST's images, normalised; `changed` makes the harder set of them."""
    source = IdxImages(Path(folder), split)
    count = TRAINED + CALIBRATION if split == "train" else None
    pixels = torch.from_numpy(np.array(source.images[:count])).float().div(255).unsqueeze(1)
    if changed:
        pixels = harder(pixels, generator(HARDER_SEED, "harder", split).random((len(pixels), 8)))
    return Split((pixels - MEAN) / STD, torch.from_numpy(np.array(source.labels[:count])).long())


def harder(images: torch.Tensor, drawn: np.ndarray) -> torch.Tensor:
    """Images scaled by .6 to 1.2 and shifted by up to 5 pixels, with a grey rectangle in front; empty pixels are 0.

    Args:
        images: (n, 1, height, width), pixels from 0 to 1.
        drawn: (n, 8) numbers from 0 to 1; a row belongs to one image.
    """
    numbers = torch.from_numpy(drawn).float()
    scale = 0.6 + 0.6 * numbers[:, 0]
    shift = (2 * numbers[:, 1:3] - 1) * 5 * 2 / images.shape[-1]  # affine_grid's unit is half an image
    theta = torch.diag_embed(torch.stack([1 / scale, 1 / scale], 1))
    theta = torch.cat([theta, -(shift / scale[:, None])[:, :, None]], 2)
    moved = F.grid_sample(images, F.affine_grid(theta, list(images.shape), False), align_corners=False)
    sides = (0.2 + 0.25 * numbers[:, 3:5]) * images.shape[-1]
    centres = numbers[:, 5:7] * images.shape[-1]
    place = torch.arange(images.shape[-1]) + 0.5
    down, right = ((place - centres[:, axis, None]).abs() < sides[:, axis, None] / 2 for axis in (0, 1))
    covered = (down[:, :, None] & right[:, None, :])[:, None]
    return torch.where(covered, numbers[:, 7].reshape(-1, 1, 1, 1), moved)


class TrainingImages(ShiftedBatches):
    """Batches of a task in random order, each image moved a little: a function of (seed, epoch)."""

    def __init__(self, split: Split, task: Task, steps: int, seed: int) -> None:
        if steps * BATCH > len(split.labels):
            raise ValueError(
                f"steps is {steps}; {len(split.labels)} images have {len(split.labels) // BATCH} batches"
            )
        super().__init__(split, BATCH, seed, steps=steps, stream="images", move=partial(moved, task))


def moved(task: Task, images: torch.Tensor, numbers: torch.Generator) -> torch.Tensor:
    """Each image shifted, and perhaps mirrored; the pixels that become free are background."""
    images = shifted(images, numbers, most=task.shift, background=task.background)
    if not task.flips:
        return images
    mirrored = torch.rand(len(images), 1, 1, 1, generator=numbers) < 0.5
    return torch.where(mirrored, images.flip(3), images)


def build(task: Task, size: str) -> VisionTransformer:
    """A freshly initialised network, from the global generator of PyTorch."""
    width, depth = SIZES[size]
    model = VisionTransformer(
        img_size=task.pixels,
        patch_size=task.patch,
        in_chans=1,
        num_classes=10,
        embed_dim=width,
        depth=depth - task.less_deep,
        num_heads=width // HEAD,
    )
    torch.nn.init.trunc_normal_(model.pos_embed, std=task.spread)
    return model


def pretrained(name: str, size: str, seed: int, images: Images, folder: Path) -> VisionTransformer:
    """The network that stands in for a pre-trained one: from the folder, or trained and put there."""
    task, file = TASKS[name], folder / f"{name}-{size}-{seed}.safetensors"
    settings = json.dumps([described(task), SIZES[size], seed, len(images.train.labels)])
    torch.manual_seed(seed)
    model = build(task, size)
    if file.exists():
        with safe_open(file, "pt") as stored:
            known = stored.metadata()["settings"]
        if known == settings:
            model.load_state_dict(load_file(file))
            return model.eval()
    loader = TrainingImages(images.train, task, len(images.train.labels) // BATCH, seed)
    config = skd.finetune_config(epochs=task.pretraining, lr=2e-3, warmup_epochs=1, seed=seed, **recipe())
    skd.finetune(model, loader, None, config, console=Console(quiet=True))
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        save_file(model.state_dict(), temporary, {"settings": settings})
    return model.eval()


def recipe() -> dict[str, float | bool | str]:
    """The settings that both trainings share: networks so small bear no Mixup and no stochastic depth."""
    return {
        "batch_size": BATCH,
        "min_lr": 1e-5,
        "sched_on_updates": True,
        "mixup": 0.0,
        "cutmix": 0.0,
        "drop_path": 0.0,
        "model_ema": False,
        "amp_dtype": "float32",
    }
