"""From an image that Pillow opened to 8-bit pixels, and from a batch of these to a model's input.

    worker         any bit depth and mode -> `in_mode`, 8-bit "L" or "RGB" -> timm's transform -> `Pixels`, uint8
                   (C, H, W), a quarter of the bytes of float32; and the rectangles that random erasing draws
        or         -> `in_pixels`, a tensor -> `Crops`, cropped and resized; and all that is drawn for later
    main process   uint8 batch -> device -> `skd.data.augmenting`, where something was drawn for it
                   -> `Normalisation`, float32, the rectangles over it

The other functions serve these two steps: which files are images, a model's data configuration, timm's transforms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import cache
from itertools import chain
from typing import Any, NamedTuple, NotRequired, TypedDict

import numpy as np
import torch
from PIL import Image, ImageOps, JpegImagePlugin
from timm.data import auto_augment, create_transform, resolve_model_data_config
from timm.data.random_erasing import RandomErasing
from timm.data.readers.img_extensions import get_img_extensions
from timm.data.transforms import MaybePILToTensor, MaybeToTensor
from torchvision.transforms import Compose, Normalize

from skd.data.augmenting import augmented
from skd.data.operations import Drawing, Operations
from skd.supernet import SuperNet
from skd.support.settings import Augmentation
from skd.vit import TimmModel, image_size, unwrapped

try:  # deprecated in torchvision 0.29: without it Pillow decodes, a sixth of the CPU's stage slower
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    decode_jpeg = None

Transform = Callable[[Image.Image], torch.Tensor]

AUGMENTATION = tuple(field.name for field in fields(Augmentation))
_ORIENTATION = 0x0112  # EXIF's tag
_BITS = 258  # TIFF's tag: bits per sample
# Formats that Pillow recognises by their first bytes, but whose pixels it cannot give.
_WITHOUT_PIXELS = ("BUFR", "GRIB", "HDF5", "MPEG", "WMF")

# Pictures


@cache
def extensions() -> frozenset[str]:
    """Endings of the files that Pillow (with its registered plugins) and timm take for images, in lower case."""
    Image.init()
    known = Image.registered_extensions().items()
    # MPO is a JPEG file with more than one picture, which the plugin of JPEG opens.
    readable = {
        ending for ending, name in known if (name in Image.OPEN or name == "MPO") and name not in _WITHOUT_PIXELS
    }
    return frozenset(readable | get_img_extensions(as_set=True))


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    """The image (of several, the first) with 8 bits per channel, in `mode`, "L" or "RGB".

    16-bit grey is divided by 257 (12-bit grey of TIFF accordingly), so that white stays white (Pillow would clip it
    at 255). 32-bit integers and floats do not define white. Here it is the smallest of 1 (for floats only), 255 and
    65535 that no value of the image exceeds. An image with negative or larger values is stretched from its lowest
    to its highest value. Values that are not finite become black. An alpha channel is dropped, as in timm.
    """
    image.load()  # TIFF files are turned upright and may change their mode
    if image.mode.startswith("I;16"):
        image = _of(np.asarray(image).astype(np.float64) * (255 / _white(image)))
    elif image.mode in ("I", "F"):
        image = _of(_scaled(np.asarray(image).astype(np.float64), image))
    elif image.mode == "LAB":
        image = image.convert("RGB")
    elif image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    elif image.mode == "P" and "transparency" in image.info:  # one alpha for each colour: Pillow warns without RGBA
        image = image.convert("RGBA")
    return image.convert(mode)


def in_pixels(image: Image.Image, mode: str) -> torch.Tensor:
    """`in_mode` as a tensor, (C, height, width) uint8, where the channels of a pixel are neighbours in memory.

    Args:
        image: opened by Pillow. A JPEG that is not decoded yet is decoded by torchvision, where it can: the same
            library inside (libjpeg-turbo), the same pixels, and no copies.
        mode: "L" or "RGB".
    """
    if isinstance(image, JpegImagePlugin.JpegImageFile) and image.tile and image.mode in ("L", mode):
        decoded = _decoded_jpeg(image, mode)
        if decoded is not None:
            return decoded
        image.load()
    values = np.array(image if image.mode == mode else in_mode(image, mode))
    return torch.from_numpy(values.reshape(*values.shape[:2], -1)).permute(2, 0, 1)


def _decoded_jpeg(image: JpegImagePlugin.JpegImageFile, mode: str) -> torch.Tensor | None:
    """By torchvision, or None: without its decoder, and of a damaged file Pillow decides."""
    if decode_jpeg is None or image.format != "JPEG" or image.fp is None:
        return None
    image.fp.seek(0)
    content = torch.frombuffer(bytearray(image.fp.read()), dtype=torch.uint8)
    with suppress(RuntimeError):
        decoded: torch.Tensor = decode_jpeg(content, mode=ImageReadMode.GRAY if mode == "L" else ImageReadMode.RGB)
        return decoded
    return None


def _white(image: Image.Image) -> int:
    """The largest possible value of a 16-bit image. A TIFF file may use fewer of the 16 bits."""
    tags = getattr(image, "tag_v2", {})  # TIFF files have them
    bits = tags.get(_BITS, (16,))[0]
    return int(2**bits - 1) if 8 < bits < 16 else 65535


def _of(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(values).astype(np.uint8))


def _scaled(values: np.ndarray, image: Image.Image) -> np.ndarray:
    """32-bit values to 0..255."""
    values = np.where(np.isfinite(values), values, 0.0)
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 65535:
        return (values - low) * (255 / max(high - low, 1e-300))
    if image.mode == "F" and high <= 1:
        return values * 255
    # Pillow opens 16-bit portable grey maps in mode "I", and older versions open 16-bit PNG files in it too.
    sixteen_bits = high > 255 or (image.mode == "I" and image.format in ("PNG", "PPM"))
    return values / 257 if sixteen_bits else values


def is_turned(image: Image.Image) -> bool:
    """Whether EXIF says that the stored picture is not upright (TIFF files are, as soon as they are loaded)."""
    if "exif" not in image.info and "xmp" not in image.info:
        return False
    try:
        return image.getexif().get(_ORIENTATION, 1) in range(2, 9)
    except Exception:  # a broken EXIF block may raise anything, but the picture itself can be read
        return False


def upright(image: Image.Image) -> Image.Image:
    """The picture turned and mirrored as its EXIF block says."""
    return ImageOps.exif_transpose(image) if is_turned(image) else image


# A model's preprocessing


class DataConfig(TypedDict):
    """How images are prepared for a model, in timm's names; each has one value, or one per channel.

    Attributes:
        input_size: (channels, height, width).
        num_classes: of the head; 0 or missing: labels are not checked.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str
    num_classes: NotRequired[int]


def data_config(model: TimmModel) -> DataConfig:
    """How images have to be prepared for a model.

    Args:
        model: a timm model, or a `SuperNet`.

    Returns:
        timm's data configuration with "input_size" as the model was really built, mean and std one per channel, and
        "num_classes" of its head.
    """
    model = unwrapped(model)
    model = model.model if isinstance(model, SuperNet) else model
    config = resolve_model_data_config(model)
    height, width = image_size(model)
    return {
        "input_size": (model.in_chans, height, width),
        "mean": _per_channel(config["mean"], model.in_chans),
        "std": _per_channel(config["std"], model.in_chans),
        "interpolation": config["interpolation"],
        "crop_pct": config["crop_pct"],
        "crop_mode": config["crop_mode"],
        "num_classes": model.num_classes,
    }


def _per_channel(values: Iterable[float], channels: int) -> tuple[float, ...]:
    """One value per channel: the average where their number differs, as for a colour model built for grey images."""
    values = tuple(float(value) for value in values)
    return values if len(values) == channels else (sum(values) / len(values),) * channels


def chosen_augmentation(fields: Mapping[str, Any]) -> Augmentation:
    """An `Augmentation` of some of its fields.

    Raises:
        ValueError: an unknown name or a value out of range.
    """
    unknown = sorted(fields.keys() - set(AUGMENTATION))
    if unknown:
        raise ValueError(f"augmentation has {', '.join(unknown)}; it may have {', '.join(AUGMENTATION)}")
    return Augmentation(**fields)


def train_transform(config: DataConfig, **augmentation: Any) -> Transform:
    """timm's training transform; it draws from the global generators of Python, NumPy and PyTorch.

    Args:
        config: from `data_config`.
        augmentation: fields of `Augmentation`.

    Raises:
        ValueError: an unknown name or a value out of range.
    """
    chosen = chosen_augmentation(augmentation)
    try:
        transform = create_transform(
            config["input_size"],
            is_training=True,
            scale=chosen.scale,
            ratio=chosen.ratio,
            hflip=chosen.hflip,
            vflip=chosen.vflip,
            color_jitter=chosen.color_jitter,
            auto_augment=chosen.aa or None,
            interpolation=chosen.train_interpolation,
            mean=config["mean"],
            std=config["std"],
            re_prob=chosen.reprob,
            re_mode=chosen.remode,
            re_count=chosen.recount,
        )
    except (AssertionError, KeyError, ValueError, TypeError) as error:  # timm's parsing of the two strings
        raise ValueError(
            f"aa is {chosen.aa!r}, train_interpolation {chosen.train_interpolation!r}, color_jitter "
            f"{chosen.color_jitter!r}; timm does not know one of them: {error}"
        ) from None
    for operation in _operations(transform):
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = _posterize
    return transform


def _operations(transform: Compose) -> Iterator[auto_augment.AugmentOp]:
    """The AutoAugment operations in a training transform of timm's."""
    for step in transform.transforms:
        if isinstance(step, auto_augment.AutoAugment):
            yield from chain.from_iterable(step.policy)
        elif isinstance(step, auto_augment.RandAugment | auto_augment.AugMixAugment):
            yield from step.ops


def _posterize(image: Image.Image, bits_to_keep: int, **options: object) -> Image.Image:
    """timm's posterize, also for 0 bits (its highest magnitude): black, but newer versions of Pillow refuse it."""
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits_to_keep, **options)


def eval_transform(config: DataConfig) -> Transform:
    """timm's evaluation transform: resize and crop by interpolation, crop_pct and crop_mode; nothing random."""
    return create_transform(
        config["input_size"],
        is_training=False,
        mean=config["mean"],
        std=config["std"],
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
    )


# Batches of 8 bits


class Patch(NamedTuple):
    """A rectangle of normalised values, (C, height, width) float32, and the position of its top left corner."""

    top: int
    left: int
    values: torch.Tensor


class Prepared(NamedTuple):
    """One image, (C, H, W) uint8, and what is left to do to it.

    Attributes:
        pixels: the image.
        patches: rectangles that are pasted over it, in order, once it is normalised.
        operations: of the device's stage, before that.
    """

    pixels: torch.Tensor
    patches: list[Patch]
    operations: Operations = ()


class Pixels:
    """One of timm's transforms, stopped before normalisation, so that workers send uint8 instead of float32.

    Random erasing draws the same numbers as in timm, but its rectangles are kept and applied after normalisation. The
    random numbers and the final values of the image are those of timm's whole transform, because normalisation draws
    nothing and the values that erasing fills in do not depend on the image.
    """

    def __init__(self, transform: Compose) -> None:
        last = MaybeToTensor | Normalize | RandomErasing
        self.steps = Compose(
            [*(step for step in transform.transforms if not isinstance(step, last)), MaybePILToTensor()]
        )
        self.erasing = _Erasing(transform)

    def __call__(self, image: Image.Image) -> Prepared:
        pixels = self.steps(image).contiguous()  # a stack of strided images takes twice as long
        return Prepared(pixels, self.erasing(pixels.shape))


class Crops:
    """The CPU's stage of a training transform: crop and resize. All that follows is only drawn.

    The random numbers are those of timm's whole transform, so an image is augmented in the same way as by `Pixels`;
    only the arithmetic is rounded differently.

    Args:
        transform: timm's training transform.
        size: (height, width) of the crops.

    Raises:
        skd.data.operations.Unknown: the device's stage cannot do what the transform does.
    """

    def __init__(self, transform: Compose, size: tuple[int, int]) -> None:
        self.drawing = Drawing(transform, size)
        self.erasing = _Erasing(transform)

    def __call__(self, image: torch.Tensor) -> Prepared:
        """Of an image from `in_pixels`."""
        pixels, operations = self.drawing(image)
        return Prepared(pixels, self.erasing(pixels.shape), operations)


class _Erasing:
    """The random erasing of a transform: the rectangles that it would paste over an image of some shape."""

    def __init__(self, transform: Compose) -> None:
        self.steps = [step for step in transform.transforms if isinstance(step, RandomErasing)]

    def __call__(self, shape: torch.Size) -> list[Patch]:
        canvas = _Canvas(shape)
        for step in self.steps:
            step(canvas)
        return canvas.patches


class _Canvas:
    """Stands in for the normalised image that timm's `RandomErasing` writes to, and records what it writes."""

    dtype = torch.float32

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape
        self.patches: list[Patch] = []

    def size(self) -> torch.Size:
        return self.shape

    def __setitem__(self, place: tuple[slice, slice, slice], values: torch.Tensor) -> None:
        _, rows, columns = place
        whole = values.expand(self.shape[0], rows.stop - rows.start, columns.stop - columns.start)
        self.patches.append(Patch(rows.start, columns.start, whole))


class Patches(NamedTuple):
    """The rectangles of a batch as only two tensors, so that they are cheap to send from a worker.

    Attributes:
        places: (n, 5) int64: number of the image, top, left, height, width; in the order of drawing.
        values: all their values, one rectangle after the other, flat.
    """

    places: torch.Tensor
    values: torch.Tensor


def packed(images: list[list[Patch]]) -> Patches | None:
    """The rectangles of all images of a batch in one `Patches`; None if there are no rectangles."""
    numbered = [(number, patch) for number, patches in enumerate(images) for patch in patches]
    if not numbered:
        return None
    places = [(number, patch.top, patch.left, *patch.values.shape[1:]) for number, patch in numbered]
    return Patches(torch.tensor(places), torch.cat([patch.values.flatten() for _, patch in numbered]))


class Normalisation:
    """8-bit batches to normalised float32 on a device: (x - 255 mean) / (255 std), as timm's prefetcher does.

    What was drawn for the images is done before, on the device too. The colour outside of images that are moved is
    timm's: the mean.
    """

    def __init__(self, config: DataConfig, device: torch.device | str | None = None) -> None:
        self.device = torch.device("cpu" if device is None else device)
        self.mean, self.std = (
            torch.tensor([255 * value for value in values], device=self.device).view(-1, 1, 1)
            for values in (config["mean"], config["std"])
        )
        fill = [min(255, round(255 * value)) for value in config["mean"]]
        self.fill = torch.tensor(fill, dtype=torch.uint8, device=self.device)

    def __call__(
        self, pixels: torch.Tensor, patches: Patches | None, operations: Sequence[Operations] = ()
    ) -> torch.Tensor:
        """(B, C, H, W) uint8 on the host to float32 on the device."""
        # The copy is asynchronous if the memory is page-locked; otherwise non_blocking has no effect.
        pixels = pixels.to(self.device, non_blocking=True).contiguous()
        if operations:
            pixels = augmented(pixels, operations, self.fill)
        images = pixels.float().sub_(self.mean).div_(self.std)
        if patches is not None:
            values, start = patches.values.to(self.device, non_blocking=True), 0
            for number, top, left, height, width in patches.places.tolist():
                end = start + images.shape[1] * height * width
                region = images[number, :, top : top + height, left : left + width]
                region.copy_(values[start:end].view_as(region))
                start = end
        return images
