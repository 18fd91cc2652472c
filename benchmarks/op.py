"""Time one operation at a shape of yours.

python -m benchmarks.op token_moments --shape 25216,36,64 --dtype bfloat16 --threads 2
python -m benchmarks.op taylor_scores --shape 3152,3072 --device cuda --contenders ours,eager
python -m benchmarks.op masked_mlp --shape 16,197,192,768,384 --forward
"""

from __future__ import annotations

import argparse
import re
import sys
from contextlib import nullcontext

import torch

import skd_kernels
from benchmarks.measure import Measurement, measure, name_of
from benchmarks.registry import LAYER_TOLERANCE, OPERATIONS, Shape

DTYPES = {name_of(dtype): dtype for dtype in LAYER_TOLERANCE}


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads or threads)
    try:
        shape = parse_shape(args.operation, args.shape)
        with skd_kernels.use(args.implementation) if args.implementation else nullcontext():
            found = measure(
                OPERATIONS[args.operation],
                shape,
                DTYPES[args.dtype],
                args.device,
                names=re.split(",(?! )", args.contenders) if args.contenders else None,
                backward=not args.forward,
                rounds=args.rounds,
                budget=args.seconds,
                total_bytes=args.megabytes << 20,
            )
        print(table(found, args.device))
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        torch.set_num_threads(threads)
    return 0


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m benchmarks.op", description="Time one operation at your shape.")
    axes = "; ".join(f"{operation.axes} for {name}" for name, operation in OPERATIONS.items())
    found.add_argument("operation", choices=OPERATIONS)
    found.add_argument("--shape", required=True, help=f"comma-separated: {axes}")
    found.add_argument("--dtype", choices=DTYPES, default="float32")
    found.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    found.add_argument("--threads", type=int, help="of PyTorch on the CPU; default: as it is")
    found.add_argument("--implementation", help="force one of ours; default: the one that is chosen by itself")
    found.add_argument("--contenders", help="such as ours,eager; default: all that apply")
    found.add_argument("--forward", action="store_true", help="of a layer, without its backward pass")
    found.add_argument("--rounds", type=int, default=7, help="at least so many")
    found.add_argument("--seconds", type=float, default=2.0, help="go on for so long")
    found.add_argument("--megabytes", type=int, default=256, help="of the inputs used in turn, and of the copy")
    return found


def parse_shape(name: str, text: str) -> Shape:
    axes = OPERATIONS[name].axes
    try:
        shape = tuple(int(size) for size in text.split(","))
    except ValueError:
        shape = ()
    if len(shape) != len(axes.split(",")) or min(shape) < 1:
        raise ValueError(f"--shape is {text!r}; {name} takes {axes}, positive integers")
    return shape


def table(found: Measurement, device: str) -> str:
    """One line per contender; the ratio is its time to the first one's."""
    case, shape = found.case, ",".join(str(size) for size in found.case.shape)
    threads = f"threads: {torch.get_num_threads()}" if device == "cpu" else "launches hidden"
    gigabytes, gigaflops = found.work.bytes / 1e9, found.work.flops / 1e9
    first = found.seconds[next(iter(found.calls))]
    lines = [
        f"{case.operation.name} {shape} {name_of(case.dtype)} on {device}, {threads}; ours: {found.implementation}",
        f"{gigabytes:.3f} GB and {gigaflops:.3f} GFLOP at least; copy {found.copy_bandwidth / 1e9:.1f} GB/s",
        f"{'contender':<14}{'median ms':>10}{'GB/s':>9}{'% of copy':>11}{'GFLOP/s':>10}{'ratio':>8}{'error':>10}",
    ]
    for name in found.calls:
        seconds, bandwidth = found.seconds[name], found.bandwidth(name)
        lines.append(
            f"{name:<14}{1e3 * seconds:>10.3f}{bandwidth / 1e9:>9.2f}{100 * bandwidth / found.copy_bandwidth:>11.1f}"
            f"{found.work.flops / seconds / 1e9:>10.1f}{seconds / first:>8.2f}{found.errors[name]:>10.1e}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
