"""The short tables: for each device the most telling rows of its results, and what is slower than the library."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import gpu_table, runs, sentences
from benchmarks.cells import rows_of, share, three_digits
from benchmarks.operations import COMPILED

PLAIN = ("slices", "eager")  # good PyTorch, of a step or layer and of a statistic
PUBLISHED = "published"
SHARES = (1.0, 0.25)  # and the mean over a dropout list
Times = dict[str, float]
Row = tuple[str, float, Times]


def section(paths: list[Path]) -> str:
    """The text between the markers: one part per device."""
    devices: dict[str, dict[Path, dict[str, Any]]] = {}
    for path in paths:
        found = runs.document(path)
        devices.setdefault(runs.device(found), {})[path] = found
    return "\n\n".join(part(device, found) for device, found in devices.items())


def part(device: str, documents: dict[Path, dict[str, Any]]) -> str:
    every = list(documents.values())
    lines = [f"### {device}", "", source(documents), ""]
    columns = ["", "ours, ms", "plain PyTorch", COMPILED, PUBLISHED]
    lines += rows_of(columns, [row(*found) for found in telling(every)], 1)
    for found in every:
        if not runs.is_run(found) and gpu_table.kind(found) == gpu_table.PRODUCTS:
            lines += ["", *products(runs.results(found))]
    said = sentences.of(every)
    return "\n".join([*lines, "", *said] if said else lines)


def source(documents: dict[Path, dict[str, Any]]) -> str:
    """The files, the versions and the commits of a device's results."""
    every = list(documents.values())
    commits = sorted(
        {runs.commit(found) + (f" ({runs.changes(found)})" if runs.changes(found) else "") for found in every}
    )
    torch = sorted({runs.versions(found).get("torch", "of an unknown version") for found in every})
    dates = sorted({runs.date(found) for found in every})
    files = ", ".join(f"`{path.name}`" for path in documents)
    word = "commit" if len(commits) == 1 else "commits"
    return f"torch {', '.join(torch)}; {word} {' and '.join(commits)}; {', '.join(dates)}; from {files}."


def row(name: str, ours: float, ratios: Times) -> list[str]:
    """What is timed, milliseconds of ours, and how much longer each other way takes."""
    plain = next((ratios[way] for way in PLAIN if way in ratios), None)
    others = [plain, ratios.get(COMPILED), ratios.get(PUBLISHED)]
    return [name, three_digits(ours), *("" if ratio is None else f"{ratio:.2f}x" for ratio in others)]


def telling(documents: list[dict[str, Any]]) -> Iterator[Row]:
    """Name, milliseconds of ours and ratios of the others, of each row."""
    infos = [entry["extra_info"] for found in documents if runs.is_run(found) for entry in found["benchmarks"]]
    for name, times in steps(documents, infos):
        ours = next(iter(times.values()))
        yield name, ours, {other: time / ours for other, time in times.items()}
    for info in chosen_operations([info for info in infos if "operation" in info]):
        name = f"`{info['operation']}`, DeiT-{info['model'].capitalize()}, {info['dtype']}"
        yield name, info["median_ms"]["ours"], info["ratio"]
    for info in infos:
        if "masked" in info and info["model"] == "base" and info["fraction"] in SHARES:
            both, name = info["both"], f"`{info['masked']}`, DeiT-Base, {share(info['fraction'])} of the width"
            yield name, both["median_ms"]["ours"], both["ratio"]
    for info in infos:
        if info.get("pass", "").startswith("`skd.convert`"):
            ours = next(iter(info["median_ms"].values()))
            yield f"`skd.convert`, DeiT-{info['model'].capitalize()}", ours, info["ratio"]


def steps(documents: list[dict[str, Any]], infos: list[dict[str, Any]]) -> Iterator[tuple[str, Times]]:
    """Of every model the mean over a list, of the largest also single sub-networks."""
    means = [runs.results(f) for f in documents if not runs.is_run(f) and gpu_table.kind(f) == gpu_table.MEAN]
    found: dict[str, dict[str, Times]] = means[0] if means else {}
    if not means:
        for info in infos:
            if "step" in info:
                found.setdefault(info["step"], {})[str(info["fraction"])] = info["median_ms"]
    models = gpu_table.models(found)
    for model in models:
        wanted = [str(fraction) for fraction in SHARES] if model == models[-1] else []
        for fraction in [*wanted, "mean"]:
            if fraction in found[model]:
                of = share(fraction) + ("" if fraction == "mean" else " of the MACs")
                yield f"training step, DeiT-{model.capitalize()}, {of}", found[model][fraction]


def chosen_operations(infos: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The largest batch, with all threads, of the largest and the smallest model."""
    if not infos:
        return []
    last = max(infos, key=lambda info: (info["batch"], str(info["threads"])))
    alike = [info for info in infos if (info["batch"], info["threads"]) == (last["batch"], last["threads"])]
    return [info for info in alike if info["model"] in ("tiny", "base")]


def products(results: dict[str, Any]) -> list[str]:
    """TFLOP/s of the kernels at full width, ours and the library's, of each model."""
    models = gpu_table.models(results)[::-1]
    rows: dict[str, list[str]] = {}
    for model in models:
        for entry in results[model]:
            if "library_tflops" in entry:
                pair = f"{entry['ours_tflops']:.0f} / {entry['library_tflops']:.0f}"
                rows.setdefault(entry["question"], []).append(pair)
    columns = ["TFLOP/s at full width, ours / library", *(f"DeiT-{model.capitalize()}" for model in models)]
    return rows_of(columns, [[question, *cells] for question, cells in rows.items()], 1)
