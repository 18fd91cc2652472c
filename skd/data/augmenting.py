"""The device's stage of augmentation: flips and the operations of RandAugment, on batches of 8-bit images.

The workers decode, crop and resize, and draw what else happens to an image (`skd.data.operations`). This stage does
it to the whole batch, on the device of the training step, images with the same operation together. It draws nothing.
`skd.data.pixels.Normalisation` follows it.

Every operation repeats what Pillow computes for timm's operation of that name, in the same arithmetic:

    tables      a new value for each of the 256 values of a channel; autocontrast, equalize and contrast first look at
                the image's histogram or mean. Equal to Pillow's.
    blends      colour and sharpness: between the image and its grey or its smoothed version. Equal to Pillow's.
    moves       rotation, shear, translation: Pillow's bilinear or bicubic (a = -1) interpolation, the fill colour
                outside of the image. Pillow computes in float64, this stage the weights in float64 and the rest in
                float32, and both cut off the fraction: at most 1 of 255 apart.

torchvision's operations on tensors are not used, because they take one strength for a whole batch, and cannot rotate
or shear with bicubic interpolation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest

import numpy as np
import torch
from PIL import Image

from skd.data.operations import Operations


@torch.no_grad()
def augmented(images: torch.Tensor, operations: Sequence[Operations], fill: torch.Tensor) -> torch.Tensor:
    """Apply to each image its operations, in their order.

    Args:
        images: (B, C, H, W) uint8, contiguous, on any device; they are changed.
        operations: one list for each image; None stands for no operation.
        fill: (C,) uint8, the colour outside of an image that was moved.

    Returns:
        The same images. None depends on the others of its batch.
    """
    for turn in zip_longest(*operations):
        for (name, taps), rows in _grouped(turn).items():
            index = torch.tensor(list(rows), device=images.device)
            values = torch.tensor(list(rows.values()), dtype=torch.float64).to(images.device, non_blocking=True)
            results = _applied(name, images.index_select(0, index), values, fill, taps)
            if images.is_cuda:
                images.index_copy_(0, index, results)
            else:  # ten times as fast on a CPU
                for row, result in zip(rows, results, strict=True):
                    images[row] = result
    return images


def _grouped(turn: Operations) -> dict[tuple[str, int], dict[int, tuple[float, ...]]]:
    """By an operation's name and taps: the numbers of the images that have it, each with its values."""
    groups: dict[tuple[str, int], dict[int, tuple[float, ...]]] = {}
    for row, operation in enumerate(turn):
        if operation is not None:
            groups.setdefault((operation.name, operation.taps), {})[row] = operation.values
    return groups


def _applied(name: str, images: torch.Tensor, values: torch.Tensor, fill: torch.Tensor, taps: int) -> torch.Tensor:
    """One operation, on images that all have it; `values` is (n, numbers), float64."""
    if name in TABLES:
        return looked_up(images, TABLES[name](images, values))
    if name in BLENDS:
        return blended(BLENDS[name](images), images.float(), _column(values, 4))
    if name in FLIPS:
        return images.flip(FLIPS[name])
    if name == "Across":
        return moved_across(images, values, fill, taps)
    if name == "Down":
        return moved_across(images.transpose(2, 3), values, fill, taps).transpose(2, 3)
    if name != "Move":
        raise ValueError(f"operation is {name!r}; it may be one of {', '.join(NAMES)}")
    return (moved if images.is_cuda else moved_by_pillow)(images, values, fill, taps)


def _column(values: torch.Tensor, dimensions: int) -> torch.Tensor:
    """The first number of each image as (n, 1, ...), float32."""
    return values[:, 0].float().view(-1, *(1 for _ in range(dimensions - 1)))


def blended(first: torch.Tensor, second: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """first + factor (second - first), cut to 0..255 and to whole numbers: `PIL.Image.blend`. float32 to uint8."""
    # Not torch.lerp, which rounds differently, and differently for the last elements of a tensor.
    return second.sub(first).mul(factor).add_(first).clamp_(0, 255).to(torch.uint8)


def grey(images: torch.Tensor) -> torch.Tensor:
    """(n, C, H, W) to (n, 1, H, W) float32, Pillow's mode "L": (19595 R + 38470 G + 7471 B) / 65536, rounded."""
    if images.shape[1] == 1:
        return images.float()
    # In float32 all of these are exact: whole numbers below 2**24.
    red, green, blue = images.float().unbind(1)
    return red.mul(19595).add_(green.mul(38470)).add_(blue.mul(7471)).add_(0x8000).div_(0x10000).floor_().unsqueeze(1)


def smoothed(images: torch.Tensor) -> torch.Tensor:
    """Pillow's filter SMOOTH: a rounded mean of 3x3 pixels, the middle one five times; the border stays. float32."""
    whole = images.float()
    if min(images.shape[-2:]) < 3:
        return whole
    rows = whole[..., :-2, :] + whole[..., 1:-1, :] + whole[..., 2:, :]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    inside = whole[..., 1:-1, 1:-1]
    inside.mul_(4).add_(total).add_(6.5).div_(13).floor_()  # 1 / 26 at least away from the next whole number
    return whole


# Tables: of (n, C, H, W) images and (n, 1) strengths, the new values (n, C or 1, 256)


def looked_up(images: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """Each pixel's value replaced by that of the image's table, uint8."""
    tables = tables.to(torch.uint8).expand(-1, images.shape[1], -1)
    return tables.gather(2, images.flatten(2).long()).view_as(images)


def _levels(images: torch.Tensor) -> torch.Tensor:
    return torch.arange(256, device=images.device)


def _invert(images: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return (255 - _levels(images)).expand(len(images), 1, -1)


def _posterize(images: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Keep so many of the highest bits."""
    dropped = (8 - values.long()).clamp_(0, 8)[:, :, None]
    return _levels(images).bitwise_right_shift(dropped).bitwise_left_shift(dropped)


def _solarize(images: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Invert from a threshold on."""
    levels = _levels(images)
    return torch.where(levels < values[:, :, None], levels, 255 - levels)


def _solarize_add(images: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Add to the darker half."""
    levels = _levels(images)
    return torch.where(levels < 128, (levels + values[:, :, None].long()).clamp_(max=255), levels)


def _brightness(images: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    levels = _levels(images).float()
    return blended(torch.zeros_like(levels), levels, _column(values, 3))


def _contrast(images: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Away from the rounded mean of the grey image."""
    brightness = grey(images).flatten(1)
    mean = brightness.sum(1, dtype=torch.float64).div_(brightness.shape[1]).add_(0.5).floor_()
    return blended(mean.float()[:, None, None], _levels(images).float(), _column(values, 3))


def _auto_contrast(images: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Stretch each channel from its lowest to its highest value."""
    flat, levels = images.flatten(2), _levels(images).double()
    low, high = (edge[:, :, None].double() for edge in (flat.amin(2), flat.amax(2)))
    scale = levels[255] / (high - low)  # 255.0 / tensor would multiply by the reciprocal, rounded
    stretched = levels.mul(scale).add_(-low * scale).clamp_(0, 255).trunc_()
    return torch.where(high > low, stretched, levels)


def _equalize(images: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Make each channel's histogram as even as it can be."""
    n, channels = images.shape[:2]
    flat = images.flatten(2).long()
    counts = torch.zeros(n, channels, 256, dtype=torch.int64, device=images.device)
    counts.scatter_add_(2, flat, torch.ones((), dtype=torch.int64, device=images.device).expand_as(flat))
    last = counts.gather(2, flat.amax(2, keepdim=True))
    step = (flat.shape[2] - last).div_(255, rounding_mode="floor")
    below = counts.cumsum(2) - counts
    even = (below + step // 2).div_(step.clamp(min=1), rounding_mode="floor").clamp_(max=255)
    return torch.where(step > 0, even, _levels(images))


# Moves


def moved(images: torch.Tensor, matrices: torch.Tensor, fill: torch.Tensor, taps: int) -> torch.Tensor:
    """`PIL.Image.transform` by an affine matrix, for each image its own.

    Args:
        images: (n, C, H, W) uint8.
        matrices: (n, 6) float64: the middle of the pixel (x, y) takes the value at (a x + b y + c, d x + e y + f).
        fill: (C,) uint8, where that is outside of the image.
        taps: pixels that are interpolated along an axis: 2 bilinear, 4 bicubic.
    """
    n, channels, height, width = images.shape
    columns, rows = (torch.arange(size, device=images.device).double().add_(0.5) for size in (width, height))
    a, b, c, d, e, f = matrices.view(n, 6, 1, 1).unbind(1)
    x, y = columns * a + rows[:, None] * b + c, columns * d + rows[:, None] * e + f
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    (left, across), (top, down) = _split(x), _split(y)
    of_column, of_row = _weights(across, taps), _weights(down, taps)
    lefts = [(left + offset).clamp_(0, width - 1) for offset in _neighbours(taps)]
    flat = images.flatten(2)
    total = images.new_zeros(n, channels, height * width, dtype=torch.float32)
    for offset, weight in zip(_neighbours(taps), of_row, strict=True):
        start = (top + offset).clamp_(0, height - 1).mul_(width)
        for place, share in zip(lefts, of_column, strict=True):
            index = (start + place).view(n, 1, -1).expand(-1, channels, -1)
            total += flat.gather(2, index).float().mul_((weight * share).view(n, 1, -1))
    return _filled(total.view_as(images), inside, fill)


def moved_by_pillow(images: torch.Tensor, matrices: torch.Tensor, fill: torch.Tensor, taps: int) -> torch.Tensor:
    """`moved` by Pillow itself, on the CPU, where it is three times as fast."""
    mode = "L" if images.shape[1] == 1 else "RGB"
    resample = {2: Image.Resampling.BILINEAR, 4: Image.Resampling.BICUBIC}[taps]
    results = []
    for image, matrix in zip(images.permute(0, 2, 3, 1).numpy(), matrices.tolist(), strict=True):
        picture = Image.fromarray(np.ascontiguousarray(image[..., 0] if mode == "L" else image))
        turned = picture.transform(
            picture.size, Image.Transform.AFFINE, matrix, resample, fillcolor=tuple(fill.tolist())
        )
        results.append(torch.from_numpy(np.array(turned)).reshape(*image.shape))
    return torch.stack(results).permute(0, 3, 1, 2)


def moved_across(images: torch.Tensor, places: torch.Tensor, fill: torch.Tensor, taps: int) -> torch.Tensor:
    """`moved` along x only, where all pixels of a row move alike: faster, with the same result.

    Args:
        images: (n, C, H, W) uint8.
        places: (n, 2) float64, b and c: the middle of the pixel (x, y) takes the value at x + b y + c.
        fill, taps: as in `moved`.
    """
    n, channels, height, width = images.shape
    rows, columns = (torch.arange(size, device=images.device) for size in (height, width))
    b, c = places.view(n, 2, 1).unbind(1)
    distance = (rows + 0.5).double() * b + c
    inside = (columns >= (-distance - 0.5).ceil()[..., None]) & (columns < (width - distance - 0.5).ceil()[..., None])
    # A copy with room on both sides, out of which each row takes a window of its own.
    room = width + taps
    edges = images[..., :1].expand(-1, -1, -1, room), images[..., -1:].expand(-1, -1, -1, room)
    windows = torch.cat([edges[0], images, edges[1]], 3).unfold(3, width + taps - 1, 1)
    before = distance.floor()
    first = (before.long() + (room + _neighbours(taps)[0])).clamp_(0, windows.shape[3] - 1)
    image, channel = (torch.arange(size, device=images.device).unsqueeze(1) for size in (n, channels))
    values = windows[image[..., None], channel, rows, first.unsqueeze(1)].float()  # (n, C, H, W + taps - 1)
    shares = [weight.view(n, 1, height, 1) for weight in _weights((distance - before).float(), taps)]
    total = values[..., :width] * shares[0]
    for tap in range(1, taps):
        total += values[..., tap : tap + width] * shares[tap]
    return _filled(total, inside, fill)


def _split(place: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Places to the number of the pixel before each, int64, and the share of the next one, float32."""
    place = place - 0.5
    before = place.floor()
    return before.long(), place.sub_(before).float()


def _neighbours(taps: int) -> range:
    """The pixels that are interpolated, counted from the one before."""
    return range(2) if taps == 2 else range(-1, 3)


def _weights(share: torch.Tensor, taps: int) -> list[torch.Tensor]:
    """Of the neighbours, by the share of the next one: Pillow's bilinear, or its bicubic with a = -1."""
    if taps == 2:
        return [1 - share, share]
    square, cube = share.square(), share**3
    return [2 * square - share - cube, 1 - 2 * square + cube, share + square - cube, cube - square]


def _filled(values: torch.Tensor, inside: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    """(n, C, H, W) float32 to uint8, the fill colour where (n, H, W) `inside` is false.

    Pillow cuts the fraction off, and the weights of an even area may add up to a little less than 1.
    """
    whole = values.add_(_TINY).clamp_(0, 255).to(torch.uint8)
    mask = inside.to(torch.uint8).neg_().unsqueeze(1)  # 255 inside; torch.where on uint8 takes 30 times as long
    return whole.bitwise_and_(mask).bitwise_or_(fill.view(-1, 1, 1) & ~mask)


_TINY = 5e-4  # more than the rounding errors of sixteen products in float32
FLIPS = {"HorizontalFlip": (3,), "VerticalFlip": (2,)}

TABLES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "AutoContrast": _auto_contrast,
    "Brightness": _brightness,
    "Contrast": _contrast,
    "Equalize": _equalize,
    "Invert": _invert,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "SolarizeAdd": _solarize_add,
}
BLENDS = {"Color": grey, "Sharpness": smoothed}
NAMES = (*FLIPS, *TABLES, *BLENDS, "Across", "Down", "Move")
