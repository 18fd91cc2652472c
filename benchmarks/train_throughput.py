"""Images per second of the training loop on one and on several processes, and of the loaders that feed it.

python -m benchmarks.train_throughput loaders --json FILE      next to the training step that has to be fed
python -m benchmarks.train_throughput processes --json FILE    the whole published recipe on random images

The loaders read JPEGs of ImageNet's usual size, made here, as a folder and as web data set shards, through the
published augmentation; what the workers send as 8 bits, as `skd.data` does, and as normalised float32. On a CPU one
process with all threads stands beside as many processes of one thread; on GPUs each process has one.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.multiprocessing.spawn import spawn

import skd
from benchmarks.result import Info, rows_of
from benchmarks.timing import DEVICE, provenance, synchronize, wall, write_json
from skd.data import data_config, open_source, train_loader, train_transform
from skd.data.iteration import Loader
from skd.data.pixels import DataConfig, Prepared
from skd.data.workers import Preparation
from skd.training.step import by_hand

SIZE = (500, 375)
SHARDS = 4
PUBLISHED = {"aa": "rand-m9-mstd0.5-inc1", "reprob": 0.25, "train_interpolation": "bicubic"}
SENT = ("uint8", "float32")
STEP_IMAGES = {"cpu": 8, "cuda": 64}
Turn = tuple[float, float]  # images per second, and the milliseconds of an image on this process's processor

# Loaders --------------------------------------------------------------------------------------------


class WholeTransform:
    """Everything in the worker, normalised float32 to the main process: how it is usually done."""

    def __init__(self, transform: Callable[[Image.Image], torch.Tensor]) -> None:
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


def make_loader(data: str, config: DataConfig, workers: int, sent: str, batch: int, device: str) -> Loader:
    source = open_source(data, "train", training=True)
    settings = {"batch_size": batch, "seed": 0, "workers": workers, "pin_memory": device == "cuda", "device": device}
    loader = train_loader(source, config, **settings, **PUBLISHED)  # type: ignore[arg-type]
    if sent == "float32":
        inside: Preparation = vars(loader).get("_preparation") or vars(loader)["_batches"].preparation
        vars(inside)["transform"] = WholeTransform(train_transform(config, **PUBLISHED))
        vars(loader)["normalise"] = lambda images, patches: images.to(device, non_blocking=True)
    return loader


def epoch(loader: Loader) -> int:
    """The number of images in one epoch."""
    return sum(len(images) for images, _ in loader)


def one_step(name: str, device: str) -> Callable[[], int]:
    """A training step of the full network with the published settings; returns the number of its images."""
    supernet = skd.SuperNet(skd.create_model(name).to(device)).train()
    images = STEP_IMAGES[device]
    step = by_hand(supernet, skd.TrainConfig(batch_size=images))
    batch = (torch.randn(images, 3, 224, 224, device=device), torch.randint(1000, (images,), device=device))

    def call() -> int:
        step([batch], entry=0)
        return images

    return call


def turn(call: Callable[[], int]) -> Turn:
    synchronize()
    start, used = time.perf_counter(), time.process_time()
    images = call()
    synchronize()
    return images / (time.perf_counter() - start), 1e3 * (time.process_time() - used) / images


def measure_loaders(images: int, batch: int, rounds: int, workers: list[int], models: list[str]) -> Info:
    """Medians over rounds in which every contender has one turn, after one that does not count."""
    with tempfile.TemporaryDirectory() as folder:
        data = write(Path(folder), images)
        config = data_config(skd.create_model(models[0])) | {"num_classes": 2}
        size = statistics.mean(file.stat().st_size for file in Path(folder).rglob("*.jpg"))
        keys = [(kind, count, sent) for kind in data for count in workers for sent in SENT]
        loaders = {key: make_loader(data[key[0]], config, *key[1:], batch, DEVICE) for key in keys}
        calls = [partial(epoch, loader) for loader in loaders.values()] + [one_step(name, DEVICE) for name in models]
        turns = [[turn(call) for call in calls] for _ in range(rounds + 1)][1:]
    found = [summary(list(turns)) for turns in zip(*turns, strict=True)]
    rows = [Info(source=kind, workers=count, sent=sent) for kind, count, sent in keys]
    steps = [Info(model=model, images=STEP_IMAGES[DEVICE]) for model in models]
    return Info(
        **provenance(),
        images={"count": images, "pixels": list(SIZE), "mean_kB": round(size / 1000, 1)},
        batch=batch,
        rounds=rounds,
        loader=[row | rates for row, rates in zip(rows, found, strict=False)],
        step=[row | rates for row, rates in zip(steps, found[len(rows) :], strict=True)],
    )


def summary(turns: list[Turn]) -> Info:
    rates, used = zip(*turns, strict=True)
    return Info(
        images_per_second=round(statistics.median(rates), 1),
        quartiles=[round(float(rate), 1) for rate in np.percentile(rates, (25, 75))],
        main_process_ms_per_image=round(statistics.median(used), 3),
    )


def table(document: Info) -> str:
    """Markdown: images per second."""
    versions, size = document.part("versions"), document.part("images").number("mean_kB")
    where = f"{document['device']}, {document['cores']} cores, torch {versions['torch']}"
    heading = (
        f"{where}, commit {document.text('commit')[:8]}, {document['date']}; JPEGs of 500x375 pixels, {size:.0f} kB "
        f"each; medians of {document['rounds']} rounds (quartiles)."
    )
    loaders = ["| images from | workers | sent as | images/s | main process, ms per image |", "|---|--:|---|--:|--:|"]
    for row in document.rows("loader"):
        cells = row.text("source"), row.text("workers"), row.text("sent"), spread(row)
        loaders.append(f"| {' | '.join(cells)} | {row.number('main_process_ms_per_image'):.2f} |")
    steps = [[f"`{row.text('model')}`", row.text("images"), spread(row)] for row in document.rows("step")]
    columns = ["training step, full network", "images at a time", "images/s"]
    return "\n".join([heading, "", *loaders, "", *rows_of(columns, steps, 1)])


def spread(row: Info) -> str:
    low, high = cast("list[float]", row["quartiles"])
    return f"{row.number('images_per_second'):.4g} ({low:.4g}-{high:.4g})"


# Processes ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """One contender: a model on several processes, which share the batch; rank 0 writes seconds into the file."""

    model: str
    processes: int
    threads: int
    batch: int
    steps: int
    file: str = ""


def steps_of_rank(rank: int, setup: Setup) -> None:
    """One process: the seconds of its steps, after one that does not count."""
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    torch.set_num_threads(setup.threads)
    device, group = torch.device(DEVICE), None
    if device.type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    if setup.processes > 1:
        backend, store = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", f"file://{setup.file}.store"
        dist.init_process_group(backend, init_method=store, rank=rank, world_size=setup.processes)
        group = dist.group.WORLD
    torch.manual_seed(0)
    supernet = skd.SuperNet(skd.create_model(setup.model)).to(device).train()
    step = by_hand(supernet, skd.TrainConfig(batch_size=setup.batch), group)
    share = setup.batch // setup.processes
    images = torch.randn(share, 3, *supernet.model.patch_embed.img_size, device=device)
    labels = torch.arange(share, device=device)
    seconds = [wall(lambda: step([(images, labels)], entry=0)) for _ in range(setup.steps + 1)]
    if rank == 0:
        Path(setup.file).write_text(json.dumps(seconds[1:]))
    if group is not None:
        dist.destroy_process_group()


def measure_processes(models: list[str], batch: int, steps: int, rounds: int) -> Info:
    """Every contender has one turn in each round, in processes of its own."""
    on_gpu = DEVICE == "cuda"
    most = torch.cuda.device_count() if on_gpu else os.cpu_count() or 1
    sizes = dict.fromkeys([(1, 1), (most, 1)] if on_gpu else [(1, 1), (1, most), (most, 1)])
    turns: dict[Setup, list[float]] = {Setup(name, *size, batch, steps): [] for name in models for size in sizes}
    for _ in range(rounds):
        for setup, seconds in turns.items():
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder, "seconds")
                spawn(steps_of_rank, (replace(setup, file=str(file)),), nprocs=setup.processes)
                seconds += json.loads(file.read_text())
    rows = [
        Info(model=s.model, processes=s.processes, threads=s.threads)
        | {"images_per_second": round(batch / statistics.median(seconds), 2)}
        for s, seconds in turns.items()
    ]
    return Info(batch=batch, steps=steps, rounds=rounds, rows=list(rows), **provenance())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_throughput", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("subject", choices=("loaders", "processes"))
    parser.add_argument("--models", nargs="+", default=["deit_tiny_patch16_224"])
    parser.add_argument("--batch-size", type=int, default=32, help="of all processes together")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=256, help="of an epoch of the loaders")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="of the loaders")
    parser.add_argument("--steps", type=int, default=4, help="of each turn, after one that does not count")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args(argv)
    if given.subject == "loaders":
        document = measure_loaders(given.images, given.batch_size, given.rounds, given.workers, given.models)
        print(table(document))
    else:
        document = measure_processes(given.models, given.batch_size, given.steps, given.rounds)
        for row in document.rows("rows"):
            print(", ".join(f"{key}: {value}" for key, value in row.items()))
    write_json(given.json, document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
