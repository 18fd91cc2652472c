"""Reading the JSON of a benchmark run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read(path: Path) -> dict[str, Any]:
    """A run of pytest-benchmark; ValueError says what is wrong with any other file."""
    try:
        run = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    try:
        medians(run)
    except (KeyError, TypeError, IndexError, AttributeError):
        raise ValueError(f"{path} is not a result of pytest --benchmark-json") from None
    return run


def medians(run: dict[str, Any]) -> dict[str, float]:
    """Median seconds of what each benchmark times (ours), by its name; taken side by side where it was."""
    return {name_of(entry): median(entry) for entry in run["benchmarks"]}


def name_of(entry: dict[str, Any]) -> str:
    """Of a training step with the contender that is timed: where the first has failed, another one is no match."""
    info = entry.get("extra_info", {})
    return str(entry["name"]) + (f": {next(iter(info['median_ms']))}" if "step" in info else "")


def median(entry: dict[str, Any]) -> float:
    side_by_side = entry.get("extra_info", {}).get("median_ms")
    return next(iter(side_by_side.values())) / 1e3 if side_by_side else float(entry["stats"]["median"])


def device(run: dict[str, Any]) -> str:
    return str(run.get("machine_info", {}).get("device", "an unknown device"))
