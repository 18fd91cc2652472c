"""What tables are made of: the JSON of a run, the cells of a Markdown table, the markers of its page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- performance:begin -->", "<!-- performance:end -->"
SHORT = "<!-- summary:begin -->", "<!-- summary:end -->"


def read(path: Path) -> dict[str, Any]:
    """A run of pytest-benchmark; ValueError says what is wrong with any other file."""
    run = document(path)
    try:
        medians(run)
    except (KeyError, TypeError, IndexError, AttributeError):
        raise ValueError(f"{path} is not a result of pytest --benchmark-json") from None
    return run


def document(path: Path) -> dict[str, Any]:
    """Any committed result: a run of pytest-benchmark, or what was measured, in "results", with its provenance."""
    try:
        return dict(json.loads(path.read_text()))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def is_run(found: dict[str, Any]) -> bool:
    """Was it written by pytest-benchmark?"""
    return "benchmarks" in found


def results(found: dict[str, Any]) -> dict[str, Any]:
    """What was measured, of a document that is no run of pytest-benchmark; with or without its provenance."""
    return dict(found.get("results", found))


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


def device(found: dict[str, Any]) -> str:
    return str(found.get("machine_info", found).get("device", "an unknown device"))


def versions(found: dict[str, Any]) -> dict[str, str]:
    return dict(found["machine_info"]["build"] if is_run(found) else found.get("versions", {}))


def commit(found: dict[str, Any]) -> str:
    """Eight digits of it."""
    return str(found["commit_info"]["id"] if is_run(found) else found.get("commit", "unknown"))[:8]


def changes(found: dict[str, Any]) -> str:
    """What was not committed when it was measured; an empty text where all was."""
    if not is_run(found):
        return str(found.get("note", ""))
    info = found["commit_info"]
    return str(info.get("note", "uncommitted changes")) if info.get("dirty") else ""


def date(found: dict[str, Any]) -> str:
    return str(found["datetime"] if is_run(found) else found.get("date", "an unknown date"))[:10]


# Markdown -------------------------------------------------------------------------------------------


def three_digits(value: float) -> str:
    """Or whole numbers, however large."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def listed(values: dict[str, float]) -> str:
    return "; ".join(f"{name}: {three_digits(value)}" for name, value in values.items())


def share(fraction: float | str) -> str:
    """Of the MACs or the width, in percent; 'mean' is that over a dropout list."""
    return "mean over a list" if fraction == "mean" else f"{100 * float(fraction):.3g} %"


def rows_of(columns: list[str], rows: list[list[str]], words: int) -> list[str]:
    """The lines of a table; its first `words` columns are text, the others are numbers."""
    lines = [columns, *rows]
    ruler = "|---" * words + "|--:" * (len(columns) - words) + "|"
    texts = ["| " + " | ".join(cells) + " |" for cells in lines]
    return [texts[0], ruler, *texts[1:]]


def split(text: str, begin: str = BEGIN, end: str = END) -> tuple[str, str, str]:
    """The text before the table between two markers, the table, and the text after it."""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the table belongs between the lines {begin} and {end}; each must be there once, in order")
    before, rest = text.split(begin)
    inside, after = rest.split(end)
    return before, inside.strip(), after


def rewrite(path: Path, table: str, begin: str = BEGIN, end: str = END) -> None:
    """Put `table` between the markers of a file."""
    before, _, after = split(path.read_text(), begin, end)
    path.write_text(f"{before}{begin}\n{table}\n{end}{after}")
