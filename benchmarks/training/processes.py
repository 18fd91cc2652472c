"""Images per second of the training loop on one and on several processes, with the whole published recipe.

python -m benchmarks.training.processes --json FILE    random images, so that nothing but the steps is timed

On a CPU one process with all threads stands beside as many processes of one thread; on GPUs each process has one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

import skd
from benchmarks.timing import provenance
from skd.training.step import by_hand


def steps(rank: int, setup: dict[str, Any]) -> None:
    """One process: the seconds of its steps; rank 0 leaves them in the file."""
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    world, device = setup["processes"], torch.device(setup["device"])
    torch.set_num_threads(setup["threads"])
    group = None
    if device.type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    if world > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{setup['file']}.store", rank=rank, world_size=world)
        group = dist.group.WORLD
    torch.manual_seed(0)
    supernet = skd.SuperNet(skd.create_model(setup["model"])).to(device).train()
    config = skd.TrainConfig(batch_size=setup["batch"])
    step = by_hand(supernet, config, group)
    share = setup["batch"] // world
    images = torch.randn(share, 3, *supernet.model.patch_embed.img_size, device=device)
    labels = torch.arange(share, device=device)
    seconds = []
    for _ in range(setup["steps"] + 1):
        start = time.perf_counter()
        step([(images, labels)], entry=0)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        Path(setup["file"]).write_text(json.dumps(seconds[1:]))
    if group is not None:
        dist.destroy_process_group()


def measure(models: list[str], batch: int, number: int, rounds: int) -> dict[str, Any]:
    """Every contender has one turn in each round, in processes of its own."""
    on_gpu = torch.cuda.is_available()
    most = torch.cuda.device_count() if on_gpu else os.cpu_count() or 1
    contenders = [(1, 1), (most, 1)] if on_gpu else [(1, 1), (1, most), (most, 1)]
    turns: dict[tuple[str, int, int], list[float]] = {}
    for _ in range(rounds):
        for model in models:
            for processes, threads in dict.fromkeys(contenders):
                with tempfile.TemporaryDirectory() as folder:
                    setup: dict[str, Any] = {
                        "model": model,
                        "processes": processes,
                        "threads": threads,
                        "batch": batch,
                    }
                    setup |= {"steps": number, "file": f"{folder}/seconds", "device": "cuda" if on_gpu else "cpu"}
                    spawn(steps, (setup,), nprocs=processes)
                    found = json.loads(Path(setup["file"]).read_text())
                turns.setdefault((model, processes, threads), []).extend(found)
    rows = [
        {
            "model": model,
            "processes": processes,
            "threads": threads,
            "images_per_second": round(batch / statistics.median(seconds), 2),
        }
        for (model, processes, threads), seconds in turns.items()
    ]
    return {"batch": batch, "steps": number, "rounds": rounds, "rows": rows, **provenance()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training.processes", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--models", nargs="+", default=["deit_tiny_patch16_224"])
    parser.add_argument("--batch-size", type=int, default=32, help="of all processes together")
    parser.add_argument("--steps", type=int, default=4, help="of each turn, after one that does not count")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args(argv)
    document = measure(given.models, given.batch_size, given.steps, given.rounds)
    for row in document["rows"]:
        print(f"{row['model']}: {row['processes']} x {row['threads']} threads, {row['images_per_second']} images/s")
    if given.json is not None:
        given.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
