"""The device's stage of augmentation: what Pillow and timm do to the same images by the same numbers, within a bound.

The bound: operations that look values up or blend are equal; operations that move pixels differ by at most 1 of 255,
in at most a twentieth of the values; a resized crop differs by at most 2 of 255.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_data_loaders import config

from skd.data import Augmentation, open_source, seeded, train_loader, train_transform
from skd.data.augmenting import NAMES, TABLES, augmented, moved
from skd.data.loading import Loading
from skd.data.operations import Drawing, Operation, Unknown
from skd.data.pixels import Crops, Normalisation, Pixels, in_pixels
from skd.data.workers import Preparation

FILL = (124, 116, 104)
MEANS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
WHOLE = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}  # with images of the model's size the crop changes nothing
MOVES = ("Rotate", "Shear", "Translate")


def pictures(channels: int, size: int) -> list[Image.Image]:
    """Noise, smooth, dark, of two values, and even: histograms of all kinds."""
    numbers = np.random.default_rng(0)
    noise = numbers.integers(0, 256, (size, size, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(noise[:4, :4]).resize((size, size), Image.Resampling.BICUBIC))
    two = np.where(noise > 90, 200, 40).astype(np.uint8)
    arrays = [noise, smooth, noise // 9, two, np.full_like(noise, 255), np.full_like(noise, 77)]
    return [Image.fromarray(array).convert("L" if channels == 1 else "RGB") for array in arrays]


def tensor(images: list[Image.Image]) -> torch.Tensor:
    """(n, C, H, W) uint8."""
    return torch.stack([in_pixels(image, image.mode).contiguous() for image in images])


def fill(channels: int) -> torch.Tensor:
    return torch.tensor(FILL[:channels], dtype=torch.uint8)


def difference(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return (found.int() - expected.int()).abs()


def randaugment(transform: Any) -> Any:
    return next(step for step in transform.transforms if hasattr(step, "ops"))


@pytest.mark.parametrize("channels, size", [(3, 23), (1, 8), (3, 3)])
@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1-p1", "rand-m3-p1", "rand-m10-inc1-p1"])
@pytest.mark.parametrize("interpolation", ["bicubic", "random"])
def test_each_operation_is_pillows(channels: int, size: int, policy: str, interpolation: str) -> None:
    """Every operation of RandAugment, by timm's own function on the same magnitudes."""
    given = config(channels, size) | {"mean": MEANS["mean"][:channels], "std": MEANS["std"][:channels]}
    done, drawn_only = (train_transform(given, aa=policy, train_interpolation=interpolation) for _ in range(2))
    Drawing(drawn_only, (size, size))
    theirs, ours, images = randaugment(done), randaugment(drawn_only), pictures(channels, size)
    assert len(theirs.ops) == 15
    for operation, recorded in zip(theirs.ops, ours.ops, strict=True):
        with seeded(0, policy, operation.name):
            expected = tensor([operation(image) for image in images])
        with seeded(0, policy, operation.name):
            drawn = [recorded(()) for _ in images]
        found = difference(augmented(tensor(images), drawn, fill(channels)), expected)
        moves = operation.name.startswith(MOVES)
        assert found.max() <= (1 if moves else 0), operation.name
        assert found.count_nonzero() <= found.numel() / 20


@pytest.mark.parametrize("taps, resample", [(2, Image.Resampling.BILINEAR), (4, Image.Resampling.BICUBIC)])
def test_any_affine_move_is_pillows(taps: int, resample: Image.Resampling) -> None:
    """The function for devices other than CPUs: rotations, with enlargement, out of the image, of other sides."""
    images = [image.crop((0, 0, 23, 17)) for image in pictures(3, 23)]
    matrices = [(0.9, 0.3, -2.0, -0.3, 0.9, 3.0), (0.4, -0.1, 5.5, 0.2, 0.6, 1.0), (1.0, 0.0, 90.0, 0.0, 1.0, 0.0)]
    for matrix in [*matrices, (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)]:
        numbers = torch.tensor([matrix] * len(images), dtype=torch.float64)
        turned = [
            image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=FILL) for image in images
        ]
        found = difference(moved(tensor(images), numbers, fill(3), taps), tensor(turned))
        # Where a value is nearly a whole number, as of these round matrices, the two may cut it to different ones.
        assert found.max() <= 1 and found.count_nonzero() <= found.numel() / 20
        assert not found[4:].any()  # even images


@pytest.mark.parametrize(
    "augmentation",
    [
        {"aa": "rand-m9-mstd0.5-inc1-n1"},
        {"aa": "original-mstd0.5"},
        {"aa": None, "color_jitter": 0.4, "train_interpolation": "random"},
        {"aa": "rand-m9-mstd0.5-inc1-n3-p0.9"},
    ],
)
def test_an_image_is_augmented_as_by_the_workers(augmentation: dict[str, Any]) -> None:
    """The same random numbers give the same flips, operations and rectangles.

    After a move a later operation may magnify a difference of 1, as at a threshold: so the mean is compared.
    """
    given = config(3, 24) | MEANS
    options = {**WHOLE, "vflip": 0.3, "reprob": 0.5, **augmentation}
    here, there = Pixels(train_transform(given, **options)), Crops(train_transform(given, **options), (24, 24))
    images, several = pictures(3, 24)[:3], 0
    for seed in range(40):
        image = images[seed % 3]
        with seeded(seed):
            expected = here(image)
        with seeded(seed):
            prepared = there(in_pixels(image, "RGB"))
        found = augmented(prepared.pixels[None].contiguous(), [prepared.operations], fill(3))[0]
        off = difference(found, expected.pixels)
        assert off.float().mean() < 0.05
        several += len(prepared.operations) > 2
        assert [patch[:2] for patch in prepared.patches] == [patch[:2] for patch in expected.patches]
        assert all(torch.equal(a.values, b.values) for a, b in zip(prepared.patches, expected.patches, strict=True))
    assert several


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_crop_is_pillows(interpolation: str) -> None:
    transform = train_transform(
        config(3, 32), hflip=0.0, aa=None, color_jitter=None, train_interpolation=interpolation
    )
    image = pictures(3, 75)[1].resize((90, 60), Image.Resampling.BICUBIC)
    for source in (image, pictures(3, 75)[0], pictures(1, 20)[0].convert("RGB")):
        for seed in range(5):
            with seeded(seed):
                expected = in_pixels(transform.transforms[0](source), "RGB")
            with seeded(seed):
                found, operations = Drawing(transform, (32, 32))(in_pixels(source, "RGB"))
            assert difference(found, expected).max() <= 2 and difference(found, expected).float().mean() < 0.2
            assert not any(operations)


def test_nothing_depends_on_the_rest_of_the_batch() -> None:
    images, operations = (
        tensor(pictures(3, 23)),
        [Operation(name, (1.4,)) for name in (*TABLES, "Color", "Sharpness")],
    )
    operations += [Operation("Across", (0.2, 1.3), 4), Operation("Down", (0.2, 1.3), 2), Operation("HorizontalFlip")]
    lists = [[operations[(7 * row + turn) % len(operations)] for turn in range(3)] for row in range(len(images))]
    together = augmented(images.clone(), lists, fill(3))
    for row, (image, drawn) in enumerate(zip(images, lists, strict=True)):
        assert torch.equal(augmented(image[None].clone(), [drawn], fill(3))[0], together[row])
    assert torch.equal(augmented(images.clone(), [(), (None,)] * 3, fill(3)), images)


def test_what_the_device_cannot_do() -> None:
    """It is left to the workers, unless the device is asked for."""
    for augmentation, what in (
        ({"aa": "augmix-m3"}, "AugMixAugment"),
        ({"aa": "3a"}, "GaussianBlur"),
        ({"train_interpolation": "lanczos"}, "train_interpolation"),
    ):
        with pytest.raises(Unknown, match=what):
            Crops(train_transform(config(3), **augmentation), (16, 16))
        for where in ("auto", "cpu"):
            chosen = Loading(2, Augmentation(**augmentation), augment_on=where)
            assert not Preparation(config(3), chosen).crops
        with pytest.raises(ValueError, match=f"augment_on is 'device'.*{what}.*'auto' or 'cpu'"):
            Preparation(config(3), Loading(2, Augmentation(**augmentation), augment_on="device"))
    with pytest.raises(ValueError, match=r"augment_on is 'gpu'; it may be one of \('auto', 'device', 'cpu'\)"):
        Loading(2, augment_on="gpu")
    with pytest.raises(ValueError, match="operation is 'Blur'; it may be one of HorizontalFlip"):
        augmented(tensor(pictures(3, 8)[:1]), [[Operation("Blur")]], fill(3))
    assert len(NAMES) == len(set(NAMES)) == 15


def test_a_spawned_worker_can_crop() -> None:
    transform = train_transform(config(3, 24), aa="rand-m9-n4-p1-inc1", reprob=1.0)
    crops = pickle.loads(pickle.dumps(Crops(transform, (24, 24))))
    with seeded(0):
        assert len(crops(in_pixels(pictures(3, 30)[0], "RGB")).operations) == 5


def jpegs(folder: Path) -> Path:
    """Colour, grey, CMYK, progressive and with a wrong ending, in one class."""
    place, (noise, smooth, *_) = folder / "class0", pictures(3, 40)
    place.mkdir(parents=True)
    noise.save(place / "a.jpg", quality=90)
    smooth.convert("L").save(place / "b.jpg")
    smooth.convert("CMYK").save(place / "c.jpg")
    smooth.save(place / "d.png", "JPEG", progressive=True)
    return folder


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("decoder", ["torchvision's", "Pillow's"])
def test_jpegs_have_pillows_pixels(
    tmp_path: Path, channels: int, decoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if decoder == "Pillow's":
        monkeypatch.setattr("skd.data.pixels.decode_jpeg", None)
    source: Any = open_source(jpegs(tmp_path), "train", in_chans=channels)
    for index in range(4):
        image, label = source.read(index)
        pixels, same = source.pixels(index)
        assert label == same and torch.equal(pixels, in_pixels(image, image.mode))
    assert pixels.shape == (channels, 40, 40) and pixels.stride(2) == channels  # without a copy


def test_damaged_jpegs_are_judged_alike(tmp_path: Path) -> None:
    source: Any = open_source(jpegs(tmp_path), "train")
    whole = Path(source.file(0)).read_bytes()
    for kept in (len(whole) // 2, 300, len(whole) - 2):
        Path(source.file(0)).write_bytes(whole[:kept])
        results = []
        for read in (source.read, source.pixels):
            try:
                results.append(np.asarray(read(0)[0]).size)
            except Exception as error:
                results.append(type(error).__name__)
        assert results[0] == results[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is False")
@pytest.mark.parametrize("taps", [2, 4])
def test_a_gpu_gives_the_same(taps: int) -> None:
    """Every operation, the moves within 1 of 255; a rotation is Pillow's own on the CPU."""
    images = tensor(pictures(3, 23))
    moves = [Operation("Move", (0.9, 0.3, -2.0, -0.3, 0.9, 3.0), taps)]
    moves += [Operation(name, (0.2, 1.3), taps) for name in ("Across", "Down")]
    others = [Operation(name, (1.4,)) for name in NAMES if name not in ("Across", "Down", "Move")]
    for operation in [*others, *moves]:
        drawn = [[operation]] * len(images)
        there = augmented(images.cuda(), drawn, fill(3).cuda()).cpu()
        assert difference(there, augmented(images.clone(), drawn, fill(3))).max() <= (operation in moves)


def test_the_loader_normalises_what_was_augmented(tmp_path: Path) -> None:
    """A batch is the crops of its keys, augmented, normalised, and the rectangles over them."""
    source: Any = open_source(jpegs(tmp_path), "train")
    given, options = config(3, 24, 1) | MEANS, {"aa": "rand-m9-n2-p1-inc1", "reprob": 1.0}
    loader = train_loader(source, given, batch_size=4, seed=3, augment_on="device", **options)
    ((images, _),) = loader
    crops, normalise = Crops(train_transform(given, **options), (24, 24)), Normalisation(given)
    order = [key for keys in loader._plan for key in keys]  # type: ignore[attr-defined]
    for found, key in zip(images, order, strict=True):
        with seeded(3, "augment", *key):
            prepared = crops(source.pixels(key[1])[0])
        done = augmented(prepared.pixels[None].contiguous(), [prepared.operations], normalise.fill)
        expected = normalise(done, None)[0]
        for top, left, values in prepared.patches:
            expected[:, top : top + values.shape[1], left : left + values.shape[2]] = values
        assert torch.equal(found, expected)
    assert images.is_contiguous()
