"""Images per second of the loaders, next to those of the training step that has to be fed.

JPEGs of ImageNet's usual size, made here, as a folder and as web data set shards, through the published
augmentation; what the workers send as 8 bits, as `skd.data` does, and as normalised float32. Contenders take turns.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import skd
from benchmarks.timing import provenance, synchronize
from skd.data import data_config, open_source, train_loader, train_transform
from skd.data.pixels import DataConfig, Prepared
from skd.training.step import by_hand

SIZE = (500, 375)
SHARDS = 4
PUBLISHED: dict[str, Any] = {"aa": "rand-m9-mstd0.5-inc1", "reprob": 0.25, "train_interpolation": "bicubic"}
SENT = ("uint8", "float32")
STEP_IMAGES = {"cpu": 8, "cuda": 64}


class WholeTransform:
    """Everything in the worker, normalised float32 to the main process: how it is usually done."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __call__(self, image: Image.Image) -> Prepared:
        return Prepared(self.transform(image), [])


def picture(number: int) -> bytes:
    """A JPEG with structure at all scales, as photographs have, of about 95 kB."""
    numbers = np.random.default_rng(number)
    total = np.zeros((SIZE[1], SIZE[0], 3), dtype=np.float32)
    for side in (4, 8, 16, 32, 64, 128):
        coarse = numbers.integers(0, 256, (side, side, 3), dtype=np.uint8)
        total += np.asarray(Image.fromarray(coarse).resize(SIZE, Image.Resampling.BICUBIC), dtype=np.float32) / side
    total += numbers.normal(0, 9, total.shape).astype(np.float32)
    pixels = (255 * (total - total.min()) / (total.max() - total.min())).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=92)
    return file.getvalue()


def write(folder: Path, images: int) -> dict[str, str]:
    """The images as a folder of class folders and as shards: what to open, by name."""
    files = [picture(number) for number in range(images)]
    for number, content in enumerate(files):
        place = folder / "folder" / "train" / f"class{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:05d}.jpg").write_bytes(content)
    shards = folder / "shards"
    shards.mkdir()
    names = [f"part-{shard}.tar" for shard in range(SHARDS)]
    for shard, name in enumerate(names):
        with tarfile.open(shards / name, "w") as tar:
            for number in range(shard, images, SHARDS):
                for suffix, content in (("jpg", files[number]), ("cls", str(number % 2).encode())):
                    info = tarfile.TarInfo(f"{number:05d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    lengths = [len(range(shard, images, SHARDS)) for shard in range(SHARDS)]
    split = {"name": "train", "num_samples": images, "filenames": names, "shard_lengths": lengths}
    (shards / "_info.json").write_text(json.dumps({"splits": {"train": split}}))
    return {"folder": str(folder / "folder"), "shards": f"wds/{shards}"}


def make_loader(data: str, config: DataConfig, workers: int, sent: str, batch: int, device: str) -> Any:
    source = open_source(data, "train", training=True)
    loader: Any = train_loader(
        source,
        config,
        batch_size=batch,
        seed=0,
        workers=workers,
        pin_memory=device == "cuda",
        device=device,
        **PUBLISHED,
    )
    if sent == "float32":
        preparation = loader._preparation if source.iterable else loader._batches.preparation
        preparation.transform = WholeTransform(train_transform(config, **PUBLISHED))
        loader.normalise = lambda images, patches: images.to(device, non_blocking=True)
    return loader


def epoch(loader: Any) -> tuple[float, float]:
    """Images per second over one epoch, and the processor time that this process spends on an image, in ms."""
    start, used, images = time.perf_counter(), time.process_time(), 0
    for batch, _ in loader:
        images += len(batch)
    synchronize()
    return images / (time.perf_counter() - start), 1e3 * (time.process_time() - used) / images


def make_step(name: str, device: str) -> Any:
    """`epoch` of one training step of the full network, with the published settings."""
    supernet = skd.SuperNet(skd.create_model(name).to(device))
    images = STEP_IMAGES[device]
    config = skd.TrainConfig(batch_size=images)
    step = by_hand(supernet.train(), config)
    batch = (torch.randn(images, 3, 224, 224, device=device), torch.randint(1000, (images,), device=device))

    def call() -> tuple[float, float]:
        synchronize()
        start, used = time.perf_counter(), time.process_time()
        step([batch], entry=0)
        synchronize()
        return images / (time.perf_counter() - start), 1e3 * (time.process_time() - used) / images

    return call


def measure(images: int, batch: int, rounds: int, workers: list[int], models: list[str]) -> dict[str, Any]:
    """Medians over rounds in which every contender has one turn, after one that does not count."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        data = write(Path(folder), images)
        config = data_config(skd.create_model(models[0]))
        config["num_classes"] = 2
        size = statistics.mean(file.stat().st_size for file in Path(folder).rglob("*.jpg"))
        contenders: dict[tuple[Any, ...], Any] = {}
        for kind, name in data.items():
            for count in workers:
                for sent in SENT:
                    loader = make_loader(name, config, count, sent, batch, device)
                    contenders["loader", kind, count, sent] = lambda loader=loader: epoch(loader)
        for model in models:
            contenders["step", model] = make_step(model, device)
        turns: dict[tuple[Any, ...], list[tuple[float, float]]] = {key: [] for key in contenders}
        for turn in range(rounds + 1):
            for key, call in contenders.items():
                found = call()
                if turn:
                    turns[key].append(found)
    return {
        **provenance(),
        "images": {"count": images, "pixels": list(SIZE), "mean_kB": round(size / 1000, 1)},
        "batch": batch,
        "rounds": rounds,
        "loader": [
            {"source": key[1], "workers": key[2], "sent": key[3], **summary(found)}
            for key, found in turns.items()
            if key[0] == "loader"
        ],
        "step": [
            {"model": key[1], "images": STEP_IMAGES[device], **summary(found)}
            for key, found in turns.items()
            if key[0] == "step"
        ],
    }


def summary(turns: list[tuple[float, float]]) -> dict[str, Any]:
    rates, used = zip(*turns, strict=True)
    return {
        "images_per_second": round(statistics.median(rates), 1),
        "quartiles": [round(float(rate), 1) for rate in np.percentile(rates, (25, 75))],
        "main_process_ms_per_image": round(statistics.median(used), 3),
    }


def table(document: dict[str, Any]) -> str:
    """Markdown: images per second."""
    torch_version, size = document["versions"]["torch"], document["images"]["mean_kB"]
    lines = [
        f"{document['device']}, {document['cores']} cores, torch {torch_version}, commit {document['commit'][:8]}, "
        f"{document['date']}; JPEGs of 500x375 pixels, {size:.0f} kB each; medians of {document['rounds']} rounds "
        "(quartiles).",
        "",
        "| images from | workers | sent as | images/s | main process, ms per image |",
        "|---|--:|---|--:|--:|",
    ]
    for row in document["loader"]:
        cells = [
            row["source"],
            str(row["workers"]),
            row["sent"],
            spread(row),
            f"{row['main_process_ms_per_image']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| training step, full network | images at a time | images/s |", "|---|--:|--:|"]
    for row in document["step"]:
        lines.append(f"| `{row['model']}` | {row['images']} | {spread(row)} |")
    return "\n".join(lines)


def spread(row: dict[str, Any]) -> str:
    low, high = row["quartiles"]
    return f"{row['images_per_second']:.4g} ({low:.4g}-{high:.4g})"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training.input", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--models", nargs="+", default=["deit_tiny_patch16_224", "deit_small_patch16_224"])
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args(argv)
    document = measure(given.images, given.batch_size, given.rounds, given.workers, given.models)
    print(table(document))
    if given.json is not None:
        given.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
