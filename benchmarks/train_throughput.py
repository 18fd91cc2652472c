"""Images per second of the training loop on one and on several processes, and of the loaders that feed it.

python -m benchmarks.train_throughput loaders --json FILE      next to the training step that has to be fed
python -m benchmarks.train_throughput processes --json FILE    the whole published recipe on random images

The loaders read JPEGs of ImageNet's usual size, made here, as a folder and as web data set shards, through the
published augmentation, with all of it in the workers and with all but the crop on the device (`augment_on`). Counted
is the processor's time of one thread, apart for what a worker does and for what is done to whole batches; all runs in
this process. With `processes`, one of all threads stands beside as many of one thread on a CPU; on GPUs each has one.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import statistics
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.multiprocessing.spawn import spawn

import skd
from benchmarks.result import Info, rewrite, rows_of
from benchmarks.timing import DEVICE, JSON, provenance, synchronize, wall, write_json
from skd.data import data_config, open_source, seeded, train_loader
from skd.data.iteration import Loader
from skd.data.pixels import DataConfig
from skd.training.step import by_hand

SIZE = (500, 375)
SHARDS = 4
PUBLISHED = {"aa": "rand-m9-mstd0.5-inc1", "reprob": 0.25, "train_interpolation": "bicubic"}
WAYS = {"cpu": "all in the workers", "device": "crop in the workers, the rest by batches"}
BEGIN, END = "<!-- input:begin -->", "<!-- input:end -->"
STEP_IMAGES = {"cpu": 8, "cuda": 64}
RATE = "images_per_second_and_core"

# Loaders --------------------------------------------------------------------------------------------


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


def make_loader(data: str, config: DataConfig, way: str, batch: int, device: str) -> Loader:
    source = open_source(data, "train", training=True)
    settings = {"batch_size": batch, "seed": 0, "device": device, "augment_on": way}
    return train_loader(source, config, **settings, **PUBLISHED)  # type: ignore[arg-type]


def stages(loader: Loader) -> tuple[float, float]:
    """Milliseconds for an image of an epoch: of the processor for what a worker does, and for the device's stage.

    On a GPU the latter is of the clock on the wall.
    """
    # A worker does not put the global generators back, image by image; here they are put back once.
    with seeded(0), patch("skd.data.counted.get_worker_info", return_value=True):
        start = time.process_time()
        batches = list(loader._loaded())
        worker = time.process_time() - start
    now = time.perf_counter if DEVICE == "cuda" else time.process_time
    images, start = 0, now()
    for loaded in batches:
        assert loaded.images is not None
        images += len(loader.normalise(loaded.images, loaded.patches, loaded.operations))
    synchronize()
    return 1e3 * worker / images, 1e3 * (now() - start) / images


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


def rate(call: Callable[[], int]) -> float:
    """Images per second."""
    synchronize()
    start = time.perf_counter()
    images = call()
    synchronize()
    return images / (time.perf_counter() - start)


def measure_loaders(images: int, batch: int, rounds: int, models: list[str]) -> Info:
    """Medians over rounds in which every contender has one turn, after one that does not count."""
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        data = write(Path(folder), images)
        config = data_config(skd.create_model(models[0])) | {"num_classes": 2}
        size = statistics.mean(file.stat().st_size for file in Path(folder).rglob("*.jpg"))
        keys = [(kind, way) for kind in data for way in WAYS]
        loaders = {key: make_loader(data[key[0]], config, key[1], batch, DEVICE) for key in keys}
        steps = {name: one_step(name, DEVICE) for name in models}
        found: dict[object, list[tuple[float, float]]] = {key: [] for key in (*loaders, *steps)}
        for _ in range(rounds + 1):
            torch.set_num_threads(1)
            for key, loader in loaders.items():
                found[key].append(stages(loader))
            torch.set_num_threads(threads)
            for name, step in steps.items():
                found[name].append((rate(step), 0.0))
    return Info(
        **provenance(),
        images={"count": images, "pixels": list(SIZE), "mean_kB": round(size / 1000, 1)},
        batch=batch,
        rounds=rounds,
        loader=[Info(source=kind, way=way) | summary(found[kind, way][1:]) for kind, way in keys],
        step=[
            Info(
                model=name,
                images=STEP_IMAGES[DEVICE],
                images_per_second=spread([turn[0] for turn in found[name][1:]]),
            )
            for name in models
        ],
    )


def summary(turns: list[tuple[float, float]]) -> Info:
    """Of `stages`; on a GPU the device's stage is not the processor's."""
    on_gpu = DEVICE == "cuda"
    return Info(
        worker_ms=spread([worker for worker, _ in turns]),
        device_ms=spread([device for _, device in turns]),
        images_per_second_and_core=spread([1e3 / (worker + (0 if on_gpu else device)) for worker, device in turns]),
    )


def spread(values: list[float]) -> JSON:
    """The median and the quartiles."""
    low, high = np.percentile(values, (25, 75))
    return [round(float(value), 3) for value in (statistics.median(values), low, high)]


def table(document: Info) -> str:
    """Markdown: images per second of the loaders, before and now, and of the step."""
    versions, size = document.part("versions"), document.part("images").number("mean_kB")
    heading = (
        f"{document['device']}, {document['cores']} cores, torch {versions['torch']}, commit "
        f"{document.text('commit')[:8]}, {document['date']}; JPEGs of 500x375 pixels, {size:.0f} kB each; medians of "
        f"{document['rounds']} rounds (quartiles), images/s of one core, of the step images/s of the machine."
    )
    rows, before = [], [0.0, 0.0]
    for row in document.rows("loader"):
        worker, device, whole = (cast("list[float]", row[key]) for key in ("worker_ms", "device_ms", RATE))
        rates = [1e3 / worker[0], whole[0]]
        gains = ["", ""] if row.text("way") == "cpu" else [times(*pair) for pair in zip(rates, before, strict=True)]
        before = rates if row.text("way") == "cpu" else before
        name = f"{row.text('source')}: {WAYS[row.text('way')]}"
        rows.append([name, f"{rates[0]:.4g}", gains[0], f"{1e3 / device[0]:.4g}", shown(whole), gains[1]])
    for row in document.rows("step"):
        name = f"training step of `{row.text('model')}`, {row.text('images')} images"
        rows.append([name, "", "", "", shown(cast("list[float]", row["images_per_second"])), ""])
    columns = ["", "worker's stage", "gain", "device's stage", "both", "gain"]
    return "\n".join([heading, "", *rows_of(columns, rows, 1)])


def times(rate: float, before: float) -> str:
    """How often as much, rounded down."""
    return f"{math.floor(100 * rate / before) / 100:.2f}x"


def shown(values: list[float]) -> str:
    median, low, high = values
    return f"{median:.4g} ({low:.4g}-{high:.4g})"


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
    parser.add_argument("--steps", type=int, default=4, help="of each turn, after one that does not count")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the loaders' table between its two markers")
    given = parser.parse_args(argv)
    if given.subject == "loaders":
        document = measure_loaders(given.images, given.batch_size, given.rounds, given.models)
        print(table(document))
        if given.write is not None:
            rewrite(given.write, table(document), BEGIN, END)
    else:
        document = measure_processes(given.models, given.batch_size, given.steps, given.rounds)
        for row in document.rows("rows"):
            print(", ".join(f"{key}: {value}" for key, value in row.items()))
    write_json(given.json, document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
