"""Sentences on a GPU's results, with their figures: how the ways to take a step compare, and what is slower than the
library. Each names who is faster by what was measured, and is left out where its results are missing.
"""

from __future__ import annotations

import textwrap
from typing import Any

from benchmarks import gpu_table, kernel_classes, runs
from benchmarks.cells import share
from benchmarks.operations import COMPILED

PUBLISHED, SLICES = "published", "slices"
WIDTH = 118
SAME_AT_EVERY_WIDTH = [
    name for name in kernel_classes.CLASSES if name.startswith(("layer norms", "additions", "conversions"))
]


def of(documents: list[dict[str, Any]]) -> list[str]:
    """A Markdown list, its lines cut to the width of a page."""
    by_kind = {gpu_table.kind(found): runs.results(found) for found in documents if not runs.is_run(found)}
    infos = [entry["extra_info"] for found in documents if runs.is_run(found) for entry in found["benchmarks"]]
    full_steps = [info for info in infos if "step" in info and info["fraction"] == 1.0 and "host_ms" in info]
    said = []
    if mean := by_kind.get(gpu_table.MEAN):
        said += [averages(mean), full_width(mean, full_steps)]
    if profile := by_kind.get(gpu_table.PROFILE):
        said += [gpu_time(profile, full_steps), fixed_costs(profile)]
    if mean and profile:
        said.append(scatter(mean, profile, full_steps))
    said += [peak_memory(info) for info in full_steps if info["peak_mb"]]
    if products := by_kind.get(gpu_table.PRODUCTS):
        said += slow_products(products)
    said += statistics([info for info in infos if "operation" in info and info["threads"] == "gpu"])
    cut = {"width": WIDTH, "subsequent_indent": "  ", "break_long_words": False, "break_on_hyphens": False}
    return [textwrap.fill(f"* {sentence}", **cut) for sentence in said]  # type: ignore[arg-type]


def averages(mean: dict[str, Any]) -> str:
    """How much longer the other ways take, over a dropout list."""
    models = gpu_table.models(mean)

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
    model = gpu_table.models(mean)[-1]
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
        found = kernel_classes.grouped(shares[fraction]["kernel_ms_per_step"])
        sums.append(sum(found.get(name, 0.0) for name in SAME_AT_EVERY_WIDTH))
    part = 100 * shares[last]["step_ms"] / shares[first]["step_ms"]
    return (
        f"Time does not follow the MACs: at {share(last)} of them a step of Base takes {part:.0f} % of the time. "
        f"Layer norms, additions and conversions take {sums[0]:.1f} ms at the full width and {sums[1]:.1f} ms there."
    )


def slow_products(products: dict[str, Any]) -> list[str]:
    """The kernels of the largest model at less than half the library's speed."""
    model = gpu_table.models(products)[-1]
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
