"""Peak memory: of one call, and of a calibration.

Streamed statistics are compared with features that are kept until the backward pass is over:

python -m benchmarks.memory --model deit_tiny_patch16_224 --batch 16

Each way runs in a process of its own: peak resident memory on a CPU, peak allocated memory on a GPU. The first line
is a process that only loads the model and the images.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

WAYS = ("load", "streamed", "published")


def peaks(model: str, batch: int, device: str) -> dict[str, float]:
    """Peak MB of each way, each in a fresh process."""
    root = Path(__file__).parent.parent
    found = {}
    for way in WAYS:
        command = [sys.executable, "-m", "benchmarks.memory", "--way", way]
        command += ["--model", model, "--batch", str(batch), "--device", device]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[1:])} failed:\n{done.stderr}")
        found[way] = json.loads(done.stdout)
    return found


def run_way(way: str, model_name: str, batch: int, device: str) -> float:
    """In the process of its own: calibrate with two batches, return the peak in MB."""
    import timm
    import torch

    import skd
    from benchmarks import published_conversion

    torch.manual_seed(0)
    model = timm.create_model(model_name).to(device).eval()
    size = model.patch_embed.img_size
    batches = [(torch.randn(batch, 3, *size), torch.zeros(batch, dtype=torch.int64)) for _ in range(2)]
    calibrate: dict[str, Callable[[Any, Any], Any]] = {
        "load": lambda model, batches: None,
        "streamed": lambda model, batches: skd.convert(model, batches, centering="batch"),
        "published": published_conversion.convert,
    }
    calibrate[way](model, batches)
    peak = torch.cuda.max_memory_allocated() if torch.device(device).type == "cuda" else peak_resident()
    return round(peak / 1e6, 1)


def peak_of_call(call: Callable[[], object], device: str) -> float:
    """MB that PyTorch's allocator holds for a call at most, beyond what it held before."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiled.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    held = accumulate(event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"]))
    return round(max(held, default=0) / 1e6, 1)


def peak_resident() -> int:
    """Bytes. The kernel's count comes first: getrusage reports the peak of the parent where that was larger."""
    status = Path("/proc/self/status")
    match = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    unit = 1 if sys.platform == "darwin" else 1024
    return 1024 * int(match[1]) if match else unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description="Peak memory of a calibration.")
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
