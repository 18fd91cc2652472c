"""What timm's training transform would do to an image after the crop, drawn and written down instead of done.

A worker draws (`Drawing`), the device's stage does it (`skd.data.augmenting`). timm's own objects draw, in the order
of timm's transform, so that the numbers are the same wherever the operations are done.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybeToTensor, RandomResizedCropAndInterpolation
from torch.nn import functional as F
from torchvision.transforms import ColorJitter, Compose, Normalize, RandomHorizontalFlip, RandomVerticalFlip
from torchvision.transforms.functional import InterpolationMode


class Operation(NamedTuple):
    """One operation on one image.

    Attributes:
        name: which; see `skd.data.augmenting`.
        values: its strength, where it has one; of a move the numbers of its matrix.
        taps: of a move, the pixels that are interpolated along an axis: 2 bilinear, 4 bicubic.
    """

    name: str
    values: tuple[float, ...] = ()
    taps: int = 0


Operations = Sequence[Operation | None]  # of one image, in order; None: nothing here
Recorder = Callable[..., tuple[Operation, ...]]


class Unknown(ValueError):
    """A transform has a step that the device's stage does not know."""


class Drawing:
    """Crop and resize a decoded image; draw all that follows.

    Args:
        transform: timm's training transform; its objects are changed.
        size: (height, width) of the crops.

    Raises:
        Unknown: the device's stage cannot do what the transform does.
    """

    def __init__(self, transform: Compose, size: tuple[int, int]) -> None:
        self.size = size
        first, *others = transform.transforms
        if not isinstance(first, RandomResizedCropAndInterpolation):
            raise Unknown(type(first).__name__)
        self._crop = first
        self._modes = first.interpolation
        if not set(_listed(self._modes)) <= {InterpolationMode.BICUBIC, InterpolationMode.BILINEAR}:
            raise Unknown(f"train_interpolation {self._modes.value!r}")
        done_later = Normalize | MaybeToTensor | RandomErasing
        self._draws = [_draw_of(step, size) for step in others if not isinstance(step, done_later)]

    def __call__(self, image: torch.Tensor) -> tuple[torch.Tensor, Operations]:
        """(C, height, width) uint8, whole, to (C, H, W) uint8, cropped, and what is to be done to it."""
        image = self.cropped(image)
        return image, tuple(chain.from_iterable(draw() for draw in self._draws))

    def cropped(self, image: torch.Tensor) -> torch.Tensor:
        """A random crop, resized with antialiasing, by PyTorch: within 2 of 255 of Pillow's, and faster."""
        top, left, height, width = self._crop.get_params(image, self._crop.scale, self._crop.ratio)
        mode = _chosen(self._modes)
        crop = image[None, :, top : top + height, left : left + width]
        # PyTorch's fast kernel reads the pixels of all channels together.
        crop = crop.contiguous(memory_format=torch.channels_last)
        resized: torch.Tensor = F.interpolate(crop, self.size, mode=mode.value, antialias=True)[0]
        return resized


def _draw_of(step: object, size: tuple[int, int]) -> Callable[[], Operations]:
    """A function that draws what a step of the transform would do."""
    if isinstance(step, RandomHorizontalFlip | RandomVerticalFlip):
        name = "HorizontalFlip" if isinstance(step, RandomHorizontalFlip) else "VerticalFlip"
        return partial(_flip, Operation(name), step.p)
    if isinstance(step, auto_augment.RandAugment | auto_augment.AutoAugment):
        for operation in _parts(step):
            operation.aug_fn = _recorder(operation, size)
        return partial(step, ())
    if isinstance(step, ColorJitter) and step.hue is None:
        return partial(_jitter, step)
    raise Unknown(type(step).__name__)


def _flip(operation: Operation, probability: float) -> Operations:
    return (operation if float(torch.rand(1)) < probability else None,)


def _jitter(step: ColorJitter) -> Operations:
    order, *factors, _ = step.get_params(step.brightness, step.contrast, step.saturation, None)
    named = dict(enumerate(zip(("Brightness", "Contrast", "Color"), factors, strict=True)))
    chosen = (named[number] for number in order.tolist() if number in named)
    return tuple(Operation(name, (factor,)) for name, factor in chosen if factor is not None)


def _parts(step: auto_augment.RandAugment | auto_augment.AutoAugment) -> Iterator[auto_augment.AugmentOp]:
    yield from chain.from_iterable(step.policy) if isinstance(step, auto_augment.AutoAugment) else step.ops


def _recorder(operation: auto_augment.AugmentOp, size: tuple[int, int]) -> Recorder:
    """What stands in the place of timm's function: it gets the operations so far for an image, and adds its own."""
    name = operation.name.removesuffix("Increasing").removesuffix("Original")
    if name in MOVES:
        unknown = set(_listed(operation.kwargs["resample"])) - TAPS.keys()
        if unknown:
            raise Unknown(f"{name} of aa, interpolated by {unknown.pop().name.lower()}")
        return partial(_move, *MOVES[name], size)
    if name == "Desaturate":
        return _desaturate
    if name not in SAME:
        raise Unknown(f"{operation.name} of aa")
    return partial(_same, name)


def _same(name: str, so_far: tuple[Operation, ...], *values: float, **options: object) -> tuple[Operation, ...]:
    return (*so_far, Operation(name, tuple(map(float, values))))


def _desaturate(so_far: tuple[Operation, ...], factor: float, **options: object) -> tuple[Operation, ...]:
    return (*so_far, Operation("Color", (min(1.0, max(0.0, 1.0 - factor)),)))


def _move(
    kind: str,
    matrix: Callable[[float, tuple[int, int]], tuple[float, ...]],
    size: tuple[int, int],
    so_far: tuple[Operation, ...],
    value: float,
    *,
    resample: Any,
    **options: object,
) -> tuple[Operation, ...]:
    taps = TAPS[_chosen(resample)]
    return (*so_far, Operation(kind, matrix(value, size), taps))


def _chosen(modes: Any) -> Any:
    """One of several kinds of interpolation, drawn as timm draws it."""
    return random.choice(modes) if isinstance(modes, list | tuple) else modes


def _listed(modes: Any) -> Sequence[Any]:
    return modes if isinstance(modes, list | tuple) else (modes,)


def _rotation(degrees: float, size: tuple[int, int]) -> tuple[float, ...]:
    """`PIL.Image.rotate`'s matrix: counter-clockwise around the middle."""
    angle = -math.radians(degrees % 360.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = size[1] / 2, size[0] / 2
    return cos, sin, (cos * -x + sin * -y) + x, -sin, cos, (-sin * -x + cos * -y) + y


def _shear(factor: float, size: tuple[int, int]) -> tuple[float, ...]:
    return factor, 0.0


def _shift(pixels: float, size: tuple[int, int]) -> tuple[float, ...]:
    return 0.0, pixels


def _shift_of_width(share: float, size: tuple[int, int]) -> tuple[float, ...]:
    return 0.0, share * size[1]


def _shift_of_height(share: float, size: tuple[int, int]) -> tuple[float, ...]:
    return 0.0, share * size[0]


TAPS = {Image.Resampling.BILINEAR: 2, Image.Resampling.BICUBIC: 4}

# timm's moves: the kind of the operation, and its numbers by timm's strength and the (height, width) of the image.
MOVES: dict[str, tuple[str, Callable[[float, tuple[int, int]], tuple[float, ...]]]] = {
    "Rotate": ("Move", _rotation),
    "ShearX": ("Across", _shear),
    "ShearY": ("Down", _shear),
    "TranslateX": ("Across", _shift),
    "TranslateY": ("Down", _shift),
    "TranslateXRel": ("Across", _shift_of_width),
    "TranslateYRel": ("Down", _shift_of_height),
}

# timm's other operations that the device's stage has under the same name, with the same strength.
SAME = (
    "AutoContrast",
    "Brightness",
    "Color",
    "Contrast",
    "Equalize",
    "Invert",
    "Posterize",
    "Sharpness",
    "Solarize",
    "SolarizeAdd",
)
