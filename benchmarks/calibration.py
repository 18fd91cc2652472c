"""A calibration as published, and the peak memory of it and of ours.

python -m benchmarks.calibration --model deit_tiny_patch16_224 --batch 16

The published way keeps features and gradients of all layers until the backward pass is over; ours are streamed. Each
runs in a process of its own: peak resident memory on a CPU, peak allocated memory on a GPU. The first line is a
process that only loads the model and the images.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

import timm
import torch

import skd
from benchmarks.contenders import covariance_published
from benchmarks.timing import ROOT, peak_resident
from skd.convert import WpacStatistics, apply_transforms
from skd.support.taps import checked, objective, tapped
from skd.vit import Module, describe

WAYS = ("load", "streamed", "published")
Kept = tuple[Module, torch.Tensor, torch.Tensor]


def convert(model: Any, batches: Iterable[Any]) -> skd.SuperNet:
    """The conversion with the arithmetic as published; only the way to get there differs from ours.

    Otherwise it is `skd.convert(..., centering="batch")`, and parameters get gradients that nobody reads. The clones
    are made in the backward pass, which is to its advantage.
    """
    network, converted = describe(model), copy.deepcopy(model)
    statistics = WpacStatistics("batch")
    kept: list[Kept] = []
    with tapped(converted, network.modules, lambda *tap: kept.append((tap[0], tap[1].clone(), tap[2].clone()))):
        converted.requires_grad_()
        for images, labels in checked(converted, batches):
            converted.zero_grad()
            objective(converted, converted(images), labels).backward()
            for module, feature, grad in kept:
                add(statistics, module, feature, grad)
            kept.clear()
    apply_transforms(converted, network, statistics.transforms(network))
    return skd.SuperNet(converted, copy=False, network=network)


def add(statistics: WpacStatistics, module: Module, feature: torch.Tensor, grad: torch.Tensor) -> None:
    name = module.name
    if module.kind == "mlp":
        score = (feature * grad).square().flatten(0, -2).sum(0)
        statistics.importance[name] = statistics.importance.get(name, 0.0) + score
    else:
        x, g = feature.flatten(2, 3).flatten(0, 1), grad.flatten(2, 3).flatten(0, 1)
        statistics.covariances[name] = statistics.covariances.get(name, 0.0) + covariance_published(x, g).double()


def peaks(model: str, batch: int, device: str) -> dict[str, float]:
    """Peak MB of each way, each in a fresh process."""
    found = {}
    for way in WAYS:
        command = [sys.executable, "-m", "benchmarks.calibration", "--way", way]
        command += ["--model", model, "--batch", str(batch), "--device", device]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[1:])} failed:\n{done.stderr}")
        found[way] = json.loads(done.stdout)
    return found


def run_way(way: str, model_name: str, batch: int, device: str) -> float:
    """In the process of its own: calibrate with two batches, return the peak in MB."""
    torch.manual_seed(0)
    model = timm.create_model(model_name).to(device).eval()
    size = model.patch_embed.img_size
    batches = [(torch.randn(batch, 3, *size), torch.zeros(batch, dtype=torch.int64)) for _ in range(2)]
    calibrate: dict[str, Callable[[Any, Any], Any]] = {
        "load": lambda model, batches: None,
        "streamed": lambda model, batches: skd.convert(model, batches, centering="batch"),
        "published": convert,
    }
    calibrate[way](model, batches)
    peak = torch.cuda.max_memory_allocated() if torch.device(device).type == "cuda" else peak_resident()
    return round(peak / 1e6, 1)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.calibration", description="Peak memory of a calibration."
    )
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="any VisionTransformer of timm")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--way", choices=WAYS, help="measure this process, print MB as JSON")
    args = parser.parse_args(arguments)
    if args.way:
        print(json.dumps(run_way(args.way, args.model, args.batch, args.device)))
        return 0
    found = peaks(args.model, args.batch, args.device)
    print(f"calibration of {args.model}, batch {args.batch}, {args.device}")
    print(f"{'way':<12}{'peak MB':>10}{'over loading':>14}")
    for way, peak in found.items():
        print(f"{way:<12}{peak:>10.0f}{peak - found['load']:>14.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
