"""The short tables: for each device the most telling rows of its results, and what is slower than the library.

The sentences below a GPU's table say how the ways to take a step compare, and what is slower than the library. Each
names who is faster by what was measured, and is left out where its results are missing.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.contenders import COMPILED, PUBLISHED, SLICES
from benchmarks.table import gpu, runs
from benchmarks.table.runs import rows_of, share, three_digits

PLAIN = (SLICES, "eager")  # good PyTorch, of a step or layer and of a statistic
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
        if not runs.is_run(found) and gpu.kind(found) == gpu.PRODUCTS:
            lines += ["", *products(runs.results(found))]
    said = sentences(every)
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
    means = [runs.results(f) for f in documents if not runs.is_run(f) and gpu.kind(f) == gpu.MEAN]
    found: dict[str, dict[str, Times]] = means[0] if means else {}
    if not means:
        for info in infos:
            if "step" in info:
                found.setdefault(info["step"], {})[str(info["fraction"])] = info["median_ms"]
    models = gpu.models(found)
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
    models = gpu.models(results)[::-1]
    rows: dict[str, list[str]] = {}
    for model in models:
        for entry in results[model]:
            if "library_tflops" in entry:
                pair = f"{entry['ours_tflops']:.0f} / {entry['library_tflops']:.0f}"
                rows.setdefault(entry["question"], []).append(pair)
    columns = ["TFLOP/s at full width, ours / library", *(f"DeiT-{model.capitalize()}" for model in models)]
    return rows_of(columns, [[question, *cells] for question, cells in rows.items()], 1)


# Sentences ------------------------------------------------------------------------------------------

WIDTH = 118
SAME_AT_EVERY_WIDTH = [name for name in gpu.CLASSES if name.startswith(("layer norms", "additions", "conversions"))]


def sentences(documents: list[dict[str, Any]]) -> list[str]:
    """A Markdown list, its lines cut to the width of a page."""
    by_kind = {gpu.kind(found): runs.results(found) for found in documents if not runs.is_run(found)}
    infos = [entry["extra_info"] for found in documents if runs.is_run(found) for entry in found["benchmarks"]]
    full_steps = [info for info in infos if "step" in info and info["fraction"] == 1.0 and "host_ms" in info]
    said = []
    if mean := by_kind.get(gpu.MEAN):
        said += [averages(mean), full_width(mean, full_steps)]
    if profile := by_kind.get(gpu.PROFILE):
        said += [gpu_time(profile, full_steps), fixed_costs(profile)]
    if mean and profile:
        said.append(scatter(mean, profile, full_steps))
    said += [peak_memory(info) for info in full_steps if info["peak_mb"]]
    if products := by_kind.get(gpu.PRODUCTS):
        said += slow_products(products)
    said += statistics([info for info in infos if "operation" in info and info["threads"] == "gpu"])
    cut = {"width": WIDTH, "subsequent_indent": "  ", "break_long_words": False, "break_on_hyphens": False}
    return [textwrap.fill(f"* {sentence}", **cut) for sentence in said]  # type: ignore[arg-type]


def averages(mean: dict[str, Any]) -> str:
    """How much longer the other ways take, over a dropout list."""
    models = gpu.models(mean)

    def times(name: str) -> str:
        ratios = [mean[model]["mean"][name] / next(iter(mean[model]["mean"].values())) for model in models]
        return enumerated([f"{ratio:.1f}" for ratio in ratios])

    return (
        f"On average over a dropout list, with widths that change at every step, the published way takes "
        f"{times(PUBLISHED)} times as long as ours ({', '.join(model.capitalize() for model in models)}), "
        f"library calls on slices {times(SLICES)} times, `{COMPILED}` on slices {times(COMPILED)} times."
    )


def full_width(mean: dict[str, Any], full_steps: list[dict[str, Any]]) -> str:
    """The largest model, against torch.compile."""
    model = gpu.models(mean)[-1]
    times = mean[model]["1.0"]
    ours, other = next(iter(times.values())), times[COMPILED]
    verdict = "faster" if other < ours else "slower"
    again = [info["median_ms"] for info in full_steps if info["step"] == model and COMPILED in info["median_ms"]]
    others = "".join(
        f"; in another run it took {time[COMPILED]:.1f} against {next(iter(time.values())):.1f}" for time in again
    )
    return (
        f"**At the full width of {model.capitalize()} `{COMPILED}` on slices is {verdict} than ours: {other:.1f} ms "
        f"against {ours:.1f}**{others}."
    )


def gpu_time(profile: dict[str, Any], full_steps: list[dict[str, Any]]) -> str:
    """What the GPU works for a step, ours and library calls on slices, and what the host takes for it."""
    ours = next(iter(profile))
    totals = {
        fraction: [
            sum(time for time, _ in profile[name][fraction]["kernel_ms_per_step"].values()) for name in (ours, SLICES)
        ]
        for fraction in profile[ours]
    }
    pairs = [f"{mine:.1f} against {other:.1f} ms at {share(fraction)}" for fraction, (mine, other) in totals.items()]
    text = (
        f"The GPU works as long for ours as for library calls on slices, or longer: {enumerated(pairs)} of the MACs"
    )
    if any(mine < other for mine, other in totals.values()):
        text = f"The GPU time of ours against that of library calls on slices: {enumerated(pairs)} of the MACs"
    counts = {len(profile[name][fraction]["kernel_ms_per_step"]) for name in (ours, SLICES) for fraction in totals}
    if len(counts) == 1:  # unlike steps have as many kernels only where the list was cut
        text += f" (Base, the {counts.pop()} longest kernels of each; `{SLICES}` has shorter ones beyond them)."
    else:
        text += " (Base)."
    for info in full_steps[-1:]:
        mine, other = next(iter(info["host_ms"].values())), info["host_ms"][SLICES]
        text += f" The host is busy for {mine:.1f} ms a step with ours and for {other:.0f} ms with slices."
    return text


def scatter(mean: dict[str, Any], profile: dict[str, Any], full_steps: list[dict[str, Any]]) -> str:
    """How far the times of library calls differ from run to run, and those of ours."""
    ours = next(iter(profile))

    def runs_of(name: str) -> str:
        times = [
            mean["base"]["1.0"][name],
            *(info["median_ms"][name] for info in full_steps if info["step"] == "base"),
        ]
        return enumerated([f"{time:.1f}" for time in [*times, profile[name]["1.0"]["step_ms"]]])

    return (
        f"Ways that wait for the host scatter: slices take {runs_of(SLICES)} ms at the full width of Base in as many "
        f"runs, ours {runs_of(ours)}. A faster host would bring them nearer, down to their GPU time."
    )


def peak_memory(info: dict[str, Any]) -> str:
    """Of a step, ours and two other ways."""
    peak = {name: f"{megabytes / 1e3:.1f} GB" for name, megabytes in info["peak_mb"].items()}
    ours = next(iter(peak.values()))
    return (
        f"A step of {info['step'].capitalize()} with {info['batch']} images takes {ours} of memory at most, "
        f"with slices {peak[SLICES]}, in the published way {peak[PUBLISHED]}."
    )


def fixed_costs(profile: dict[str, Any]) -> str:
    """Why time does not follow the MACs."""
    shares = next(iter(profile.values()))
    first, last = next(iter(shares)), list(shares)[-1]
    sums = []
    for fraction in (first, last):
        found = gpu.grouped(shares[fraction]["kernel_ms_per_step"])
        sums.append(sum(found.get(name, 0.0) for name in SAME_AT_EVERY_WIDTH))
    part = 100 * shares[last]["step_ms"] / shares[first]["step_ms"]
    return (
        f"Time does not follow the MACs: at {share(last)} of them a step of Base takes {part:.0f} % of the time. "
        f"Layer norms, additions and conversions take {sums[0]:.1f} ms at the full width and {sums[1]:.1f} ms there."
    )


def slow_products(products: dict[str, Any]) -> list[str]:
    """The kernels of the largest model at less than half the library's speed."""
    model = gpu.models(products)[-1]
    slow = [
        f"{entry['question']} ({entry['ours_tflops']:.0f} of {entry['library_tflops']:.0f})"
        for entry in products[model]
        if entry.get("library_over_ours", 1.0) < 0.5
    ]
    if not slow:
        return []
    name = model.capitalize()
    return [
        f"Of {name}'s kernels these reach less than half the TFLOP/s of the library's product: {'; '.join(slow)}."
    ]


def statistics(infos: list[dict[str, Any]]) -> list[str]:
    """Percent of the copy bandwidth, and where torch.compile is faster."""
    said = []
    for operation in dict.fromkeys(info["operation"] for info in infos):
        cells = [
            f"{info['percent_of_copy']:.0f} % ({info['model'].capitalize()}, {info['dtype']})"
            for info in infos
            if info["operation"] == operation and info["model"] in ("tiny", "base")
        ]
        said.append(f"`{operation}` reaches {enumerated(cells)} of the copy bandwidth.")
    faster = [
        f"`{info['operation']}` {info['model'].capitalize()} {info['dtype']}, "
        f"{1e3 * info['median_ms'][COMPILED]:.0f} us against {1e3 * info['median_ms']['ours']:.0f} "
        f"(relative error {info['error'][COMPILED]:.1g} against {info['error']['ours']:.1g})"
        for info in infos
        if info["ratio"].get(COMPILED, 1.0) < 1.0
    ]
    return [*said, f"`{COMPILED}` is faster than ours at {enumerated(faster)}."] if faster else said


def enumerated(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
