"""Where the time of one training step goes, kernel by kernel.

python -m benchmarks.profile --model base --fraction 1.0 --fraction 0.25 --json profile.json

Of each contender and each share of the MACs: milliseconds of a step by the wall clock, and of every kernel the
milliseconds and the launches of a step, the longest first. On a CPU the operators of PyTorch stand in for kernels.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.contenders import SLICES
from benchmarks.timing import DEVICE, GPU, SIZES, Call, provenance, synchronize, wall

ROUNDS = 3
WHAT = "Milliseconds and launches of each kernel of a training step, and milliseconds of the step."


def kernel_times(call: Call, rounds: int = ROUNDS) -> dict[str, tuple[float, float]]:
    """(milliseconds, launches) of one call by the name of each kernel, the longest first; a mean over `rounds`.

    Raises:
        RuntimeError: the profiler saw no kernel.
    """
    call()
    synchronize()
    activities = [ProfilerActivity.CUDA] if GPU else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiled:
        for _ in range(rounds):
            call()
        synchronize()
    wanted = DeviceType.CUDA if GPU else DeviceType.CPU
    found = {}
    for event in profiled.key_averages():
        microseconds = event.self_device_time_total if GPU else event.self_cpu_time_total
        if event.device_type == wanted and microseconds > 0 and not event.is_user_annotation:
            found[event.key] = (round(microseconds / rounds / 1e3, 4), round(event.count / rounds, 2))
    if not found:
        raise RuntimeError("the profiler saw no kernel")
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))


def device_ms(call: Call) -> float:
    """Milliseconds that the kernels of one call take together on the GPU, whatever the host does meanwhile."""
    return round(sum(milliseconds for milliseconds, _ in kernel_times(call, rounds=1).values()), 3)


def profiles(model: str, names: list[str], fractions: list[float]) -> dict[str, Any]:
    """By contender and share of the MACs."""
    from benchmarks import steps
    from benchmarks.steps import dropout_list, entry_at

    found: dict[str, Any] = {}
    batch = steps.images_and_labels(SIZES.batch, DEVICE)
    for name in names:
        step = steps.make(name, model, batch, DEVICE)
        step.reference.dropout_list = dropout_list(step.reference)
        for _ in range(steps.WARM_UP):
            step(0)
        found[name] = {}
        for fraction in fractions:
            entry = entry_at(step.reference, fraction)
            seconds = sorted(wall(lambda: step(entry)) for _ in range(ROUNDS))[ROUNDS // 2]  # noqa: B023
            kernels = kernel_times(lambda: step(entry))  # noqa: B023
            found[name][str(fraction)] = {"step_ms": round(1e3 * seconds, 3), "kernel_ms_per_step": kernels}
    return found


def summary(found: dict[str, Any], most: int = 6) -> str:
    """The longest kernels of each profile, a line each."""
    lines = []
    for name, shares in found.items():
        for fraction, profiled in shares.items():
            kernels = profiled["kernel_ms_per_step"]
            together = sum(milliseconds for milliseconds, _ in kernels.values())
            lines.append(f"{name}, {fraction} of the MACs: {profiled['step_ms']} ms, kernels {together:.1f} ms")
            lines += [f"  {ms:8.3f} ms {count:6g}x  {key[:80]}" for key, (ms, count) in list(kernels.items())[:most]]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    from benchmarks import steps

    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description="Kernels of a training step.")
    parser.add_argument("--model", choices=("tiny", "small", "base"), default="base")
    parser.add_argument("--contender", action="append", help=f"of {', '.join(steps.names(DEVICE))}; default: two")
    parser.add_argument("--fraction", type=float, action="append", help="share of the MACs; default: 1.0 and 0.25")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    names = args.contender or [steps.names(DEVICE)[0], SLICES]
    found = profiles(args.model, names, args.fraction or [1.0, 0.25])
    print(summary(found))
    if args.json is not None:
        document = {"what": WHAT, "model": args.model, "batch": SIZES.batch, **provenance(), "results": found}
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
