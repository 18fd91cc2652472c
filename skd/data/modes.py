"""From what Pillow opens, of any bit depth and mode, to 8-bit "L" or "RGB"; and which files it opens."""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image, ImageOps
from timm.data.readers.img_extensions import get_img_extensions

_ORIENTATION = 0x0112  # EXIF's tag
_BITS = 258  # TIFF's tag: bits per sample
# Formats that Pillow recognises by their first bytes, but whose pixels it cannot give.
_WITHOUT_PIXELS = ("BUFR", "GRIB", "HDF5", "MPEG", "WMF")


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

    16-bit grey is divided by 257 (12-bit grey of TIFF accordingly), so that white stays white (Pillow would cut it
    off at 255). 32-bit integers and floats have no white of their own: it is 1 for floats from 0 to 1, else 255, else
    65535, the smallest that no value of the image exceeds; an image with other values is stretched from its lowest to
    its highest. Values that are not finite are black. An alpha channel is dropped, as timm does it.
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


def _white(image: Image.Image) -> int:
    """The largest value of a picture of 16 bits; in TIFF files fewer of them may be in use."""
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
    # So Pillow opens portable grey maps of 16 bits, and older versions of it PNG files.
    sixteen_bits = high > 255 or (image.mode == "I" and image.format in ("PNG", "PPM"))
    return values / 257 if sixteen_bits else values


def is_turned(image: Image.Image) -> bool:
    """Whether EXIF says that the stored picture is not upright (TIFF files are, as soon as they are loaded)."""
    if "exif" not in image.info and "xmp" not in image.info:
        return False
    try:
        return image.getexif().get(_ORIENTATION, 1) in range(2, 9)
    except Exception:  # whatever a broken block of EXIF leads to: the picture itself can be read
        return False


def upright(image: Image.Image) -> Image.Image:
    """The picture turned and mirrored as its EXIF block says."""
    return ImageOps.exif_transpose(image) if is_turned(image) else image
