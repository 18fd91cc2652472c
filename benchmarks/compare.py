"""Did anything become slower? Exit status 0: no; 1: yes, beyond the threshold; 2: the files cannot be compared.

python -m benchmarks.compare OLD.json NEW.json --threshold 1.1
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.table import runs


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description="Compare two benchmark runs.")
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--threshold", type=float, default=1.1, help="new / old above this is a regression")
    parser.add_argument("--across-devices", action="store_true", help="compare although the devices differ")
    args = parser.parse_args(arguments)
    try:
        old, new = load(args.old, args.new, args.across_devices)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    slower = regressions(old, new, args.threshold)
    print(table(old, new, set(slower)))
    print(f"{len(slower)} of {len(old.keys() & new.keys())} benchmarks are more than {args.threshold:g}x slower")
    return 1 if slower else 0


def load(old_path: Path, new_path: Path, across_devices: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Medians by name; ValueError if the two runs have nothing to compare."""
    both = runs.read(old_path), runs.read(new_path)
    old_device, new_device = (runs.device(run) for run in both)
    if old_device != new_device and not across_devices:
        raise ValueError(
            f"{old_path} was measured on {old_device}, {new_path} on {new_device}; --across-devices compares them"
        )
    old, new = (runs.medians(run) for run in both)
    if not old.keys() & new.keys():
        raise ValueError(f"{old_path} and {new_path} have no benchmark in common")
    return old, new


def regressions(old: dict[str, float], new: dict[str, float], threshold: float) -> list[str]:
    """Names whose new median is more than `threshold` times the old one (or not a number)."""
    return [name for name in old if name in new and not new[name] <= threshold * old[name]]


def table(old: dict[str, float], new: dict[str, float], slower: set[str]) -> str:
    names = [*old, *(name for name in new if name not in old)]
    width = max(len(name) for name in names)
    lines = [f"{'benchmark':<{width}}{'old ms':>11}{'new ms':>11}{'new / old':>11}"]
    for name in names:
        if name not in old or name not in new:
            lines.append(f"{name:<{width}}  only in the {'old' if name in old else 'new'} run")
            continue
        verdict = "  SLOWER" if name in slower else ""
        cells = f"{1e3 * old[name]:>11.3f}{1e3 * new[name]:>11.3f}{new[name] / old[name]:>11.2f}"
        lines.append(f"{name:<{width}}{cells}{verdict}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
