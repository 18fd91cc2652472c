"""What the workers send: 8-bit images, a quarter of the bytes; and how the main process makes model input of them.

worker: PIL image -> Pixels -> uint8 (C, H, W), and the rectangles that random erasing draws
main process: uint8 batch -> device -> normalised float32, rectangles over it
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybePILToTensor, MaybeToTensor
from torchvision.transforms import Compose, Normalize


class Patch(NamedTuple):
    """A rectangle of normalised values, (C, height, width) float32, and where its corner is."""

    top: int
    left: int
    values: torch.Tensor


class Prepared(NamedTuple):
    """One image: (C, H, W) uint8, and what goes over it once it is normalised, in order."""

    pixels: torch.Tensor
    patches: list[Patch]


class Pixels:
    """One of timm's transforms as far as 8-bit pixels; random erasing is drawn as timm draws it, but kept apart.

    So what a worker draws, and every value of the image in the end, is as in the whole transform: normalisation
    draws nothing, and the values that erasing fills in do not depend on the image.
    """

    def __init__(self, transform: Any) -> None:
        last = MaybeToTensor | Normalize | RandomErasing
        self.steps = Compose(
            [*(step for step in transform.transforms if not isinstance(step, last)), MaybePILToTensor()]
        )
        self.erasing = [step for step in transform.transforms if isinstance(step, RandomErasing)]

    def __call__(self, image: Image.Image) -> Prepared:
        pixels = self.steps(image).contiguous()  # a stack of strided images takes twice as long
        canvas = _Canvas(pixels.shape)
        for erasing in self.erasing:
            erasing(canvas)
        return Prepared(pixels, canvas.patches)


class _Canvas:
    """Stands in for the normalised image that timm's `RandomErasing` writes to, and keeps what it writes."""

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
    """The rectangles of a batch: two tensors, however many there are, for the way from a worker.

    Attributes:
        places: (n, 5) int64: number of the image, top, left, height, width; in the order of drawing.
        values: all their values, one rectangle after the other, flat.
    """

    places: torch.Tensor
    values: torch.Tensor


def packed(images: list[list[Patch]]) -> Patches | None:
    """The rectangles of each image of a batch as one; None if there is none."""
    numbered = [(number, patch) for number, patches in enumerate(images) for patch in patches]
    if not numbered:
        return None
    places = [(number, patch.top, patch.left, *patch.values.shape[1:]) for number, patch in numbered]
    return Patches(torch.tensor(places), torch.cat([patch.values.flatten() for _, patch in numbered]))


class Normalisation:
    """8-bit batches to normalised float32 on a device: (x - 255 mean) / (255 std), as timm's prefetcher does."""

    def __init__(self, config: dict[str, Any], device: torch.device | str | None = None) -> None:
        self.device = torch.device("cpu" if device is None else device)
        self.mean, self.std = (
            torch.tensor([255 * value for value in config[name]], device=self.device).view(-1, 1, 1)
            for name in ("mean", "std")
        )

    def __call__(self, pixels: torch.Tensor, patches: Patches | None) -> torch.Tensor:
        """(B, C, H, W) uint8 on the host to float32 on the device."""
        # From page-locked memory the copy need not be waited for; from other memory the flag changes nothing.
        images = pixels.to(self.device, non_blocking=True).float().sub_(self.mean).div_(self.std)
        if patches is not None:
            values, start = patches.values.to(self.device, non_blocking=True), 0
            for number, top, left, height, width in patches.places.tolist():
                end = start + images.shape[1] * height * width
                region = images[number, :, top : top + height, left : left + width]
                region.copy_(values[start:end].view_as(region))
                start = end
        return images
