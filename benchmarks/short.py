"""The short tables: for each device the most telling rows of its results, and what is slower than the library.

The sentences below a GPU's table say how the ways to take a step compare, and what is slower than the library. Each
says who is faster by what was measured, and is left out if its results are missing.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path

from benchmarks import result
from benchmarks.registry import COMPILED, PUBLISHED, SLICES
from benchmarks.result import Info, Result, Times, models, rows_of, share, three_digits

PLAIN = (SLICES, "eager")  # good PyTorch, of a step or layer and of a statistic
SHARES = (1.0, 0.25)  # and the mean over a dropout list
Row = tuple[str, float, Times]


def section(paths: list[Path]) -> str:
    """The text between the markers: one part per device."""
    devices: dict[str, list[Result]] = {}
    for path in paths:
        found = Result.read(path)
        devices.setdefault(found.device_name, []).append(found)
    return "\n\n".join(part(device, found) for device, found in devices.items())


def part(device: str, results: list[Result]) -> str:
    lines = [f"### {device}", "", source(results), ""]
    columns = ["", "ours, ms", "plain PyTorch", COMPILED, PUBLISHED]
    lines += rows_of(columns, [row(*found) for found in telling(results)], 1)
    for found in results:
        if found.kind == result.PRODUCTS:
            lines += ["", *products(found.results)]
    said = sentences(results)
    return "\n".join([*lines, "", *said] if said else lines)


def source(results: list[Result]) -> str:
    """The files, the versions and the commits of a device's results."""
    commits = sorted({found.commit + (f" ({found.changes})" if found.changes else "") for found in results})
    torch = sorted({found.versions.get("torch", "of an unknown version") for found in results})
    dates = sorted({found.date for found in results})
    files = ", ".join(f"`{found.name}`" for found in results)
    word = "commit" if len(commits) == 1 else "commits"
    return f"torch {', '.join(torch)}; {word} {' and '.join(commits)}; {', '.join(dates)}; from {files}."


def row(name: str, ours: float, ratios: Times) -> list[str]:
    """What is timed, milliseconds of ours, and how much longer each other way takes."""
    plain = next((ratios[way] for way in PLAIN if way in ratios), None)
    others = [plain, ratios.get(COMPILED), ratios.get(PUBLISHED)]
    return [name, three_digits(ours), *("" if ratio is None else f"{ratio:.2f}x" for ratio in others)]


def telling(results: list[Result]) -> Iterator[Row]:
    """Name, milliseconds of ours and ratios of the others, of each row."""
    for name, times in steps(results):
        yield name, first(times), {other: time / first(times) for other, time in times.items()}
    for info in chosen_operations(infos_of(results, "operation")):
        name = f"`{info.text('operation')}`, DeiT-{info.text('model').capitalize()}, {info.text('dtype')}"
        yield name, info.times("median_ms")["ours"], info.times("ratio")
    for info in infos_of(results, "masked"):
        if info.text("model") == "base" and info.number("fraction") in SHARES:
            both = info.part("both")
            name = f"`{info.text('masked')}`, DeiT-Base, {share(info.number('fraction'))} of the width"
            yield name, both.times("median_ms")["ours"], both.times("ratio")
    for info in infos_of(results, "pass"):
        if info.text("pass").startswith("`skd.convert`"):
            name = f"`skd.convert`, DeiT-{info.text('model').capitalize()}"
            yield name, first(info.times("median_ms")), info.times("ratio")


def infos_of(results: list[Result], key: str) -> list[Info]:
    return [info for found in results for info in found.infos(key)]


def first(times: Times) -> float:
    """The name of our contender, which comes before the others."""
    return next(iter(times.values()))


def steps(results: list[Result]) -> Iterator[tuple[str, Times]]:
    """Of every model the mean over a list, of the largest also single sub-networks."""
    found = next((file.results for file in results if file.kind == result.MEAN), Info())
    times = {model: {key: found.part(model).times(key) for key in found.part(model)} for model in models(found)}
    for info in infos_of(results, "step") if not found else ():
        times.setdefault(info.text("step"), {})[info.text("fraction")] = info.times("median_ms")
    for model in (ordered := models(times)):
        wanted = [str(fraction) for fraction in SHARES] if model == ordered[-1] else []
        for fraction in [*wanted, "mean"]:
            if fraction in times[model]:
                of = share(fraction) + ("" if fraction == "mean" else " of the MACs")
                yield f"training step, DeiT-{model.capitalize()}, {of}", times[model][fraction]


def chosen_operations(infos: list[Info]) -> list[Info]:
    """The largest batch, with all threads, of the largest and the smallest model."""
    last = max(((info.number("batch"), info.text("threads")) for info in infos), default=None)
    alike = [info for info in infos if (info.number("batch"), info.text("threads")) == last]
    return [info for info in alike if info.text("model") in ("tiny", "base")]


def products(results: Info) -> list[str]:
    """TFLOP/s of the kernels at full width, ours and the library's, of each model."""
    rows: dict[str, list[str]] = {}
    for model in models(results)[::-1]:
        for entry in results.rows(model):
            if "library_tflops" in entry:
                pair = f"{entry.number('ours_tflops'):.0f} / {entry.number('library_tflops'):.0f}"
                rows.setdefault(entry.text("question"), []).append(pair)
    names = [f"DeiT-{model.capitalize()}" for model in models(results)[::-1]]
    cells = [[question, *pairs] for question, pairs in rows.items()]
    return rows_of(["TFLOP/s at full width, ours / library", *names], cells, 1)


# Sentences ------------------------------------------------------------------------------------------

WIDTH = 118
SAME_AT_EVERY_WIDTH = [
    name for name in result.CLASSES if name.startswith(("layer norms", "additions", "conversions"))
]


def sentences(results: list[Result]) -> list[str]:
    """A Markdown list, its lines cut to the width of a page."""
    by_kind = {found.kind: found.results for found in results}
    steps = [i for i in infos_of(results, "step") if i.text("fraction") == "1.0" and "host_ms" in i]
    mean, profile = by_kind.get(result.MEAN), by_kind.get(result.PROFILE)
    said = []
    if mean:
        said += [averages(mean), full_width(mean, steps)]
    if profile:
        said += [gpu_time(profile, steps), fixed_costs(profile)]
    if mean and profile:
        said.append(scatter(mean, profile, steps))
    said += [peak_memory(info) for info in steps if info.times("peak_mb")]
    said += slow_products(by_kind.get(result.PRODUCTS, Info()))
    said += statistics([info for info in infos_of(results, "operation") if info.text("threads") == "gpu"])
    wrapper = textwrap.TextWrapper(WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return [wrapper.fill(f"* {sentence}") for sentence in said]


def averages(mean: Info) -> str:
    """How much longer the other ways take, over a dropout list."""
    means = [mean.part(model).times("mean") for model in models(mean)]

    def times(name: str) -> str:
        return enumerated([f"{found[name] / first(found):.1f}" for found in means])

    return (
        f"On average over a dropout list, with widths that change at every step, the published way takes "
        f"{times(PUBLISHED)} times as long as ours ({', '.join(model.capitalize() for model in models(mean))}), "
        f"library calls on slices {times(SLICES)} times, `{COMPILED}` on slices {times(COMPILED)} times."
    )


def full_width(mean: Info, steps: list[Info]) -> str:
    """The largest model, against torch.compile."""
    model = models(mean)[-1]
    times = mean.part(model).times("1.0")
    ours, other = first(times), times[COMPILED]
    verdict = "faster" if other < ours else "slower"
    again = [info.times("median_ms") for info in steps if info.text("step") == model]
    others = "".join(
        f"; in another run it took {time[COMPILED]:.1f} against {first(time):.1f}"
        for time in again
        if COMPILED in time
    )
    return (
        f"**At the full width of {model.capitalize()} `{COMPILED}` on slices is {verdict} than ours: {other:.1f} ms "
        f"against {ours:.1f}**{others}."
    )


def gpu_time(profile: Info, steps: list[Info]) -> str:
    """A sentence on the GPU time of a step, ours and library calls on slices, and on the host's time for it."""
    ours = next(iter(profile))
    kernels = {
        fraction: [result.kernels_of(profile.part(name).part(fraction)) for name in (ours, SLICES)]
        for fraction in profile.part(ours)
    }
    totals = {fraction: [sum(found.values()) for found in both] for fraction, both in kernels.items()}
    pairs = [f"{mine:.1f} against {other:.1f} ms at {share(fraction)}" for fraction, (mine, other) in totals.items()]
    text = "The GPU works as long for ours as for library calls on slices, or longer"
    if any(mine < other for mine, other in totals.values()):
        text = "The GPU time of ours against that of library calls on slices"
    text += f": {enumerated(pairs)} of the MACs"
    counts = {len(found) for both in kernels.values() for found in both}
    if len(counts) == 1:  # unlike steps have as many kernels only where the list was cut
        text += f" (Base, the {counts.pop()} longest kernels of each; `{SLICES}` has shorter ones beyond them)."
    else:
        text += " (Base)."
    for info in steps[-1:]:
        host = info.times("host_ms")
        text += (
            f" The host is busy for {first(host):.1f} ms a step with ours and for {host[SLICES]:.0f} ms with slices."
        )
    return text


def scatter(mean: Info, profile: Info, steps: list[Info]) -> str:
    """How far the times of library calls differ from run to run, and those of ours."""
    base = [mean.part("base").times("1.0"), *(i.times("median_ms") for i in steps if i.text("step") == "base")]

    def runs_of(name: str) -> str:
        last = profile.part(name).part("1.0").number("step_ms")
        return enumerated([f"{time:.1f}" for time in [*(found[name] for found in base), last]])

    return (
        f"Ways that wait for the host scatter: slices take {runs_of(SLICES)} ms at the full width of Base in as many "
        f"runs, ours {runs_of(next(iter(profile)))}. A faster host would bring them nearer, down to their GPU time."
    )


def peak_memory(info: Info) -> str:
    """Of a step, ours and two other ways."""
    peak = info.times("peak_mb")
    ours, slices, published = (f"{mb / 1e3:.1f} GB" for mb in (first(peak), peak[SLICES], peak[PUBLISHED]))
    return (
        f"A step of {info.text('step').capitalize()} with {info.text('batch')} images takes {ours} of memory at "
        f"most, with slices {slices}, in the published way {published}."
    )


def fixed_costs(profile: Info) -> str:
    """Why time does not follow the MACs."""
    shares = profile.part(next(iter(profile)))
    ends = [shares.part(fraction) for fraction in (next(iter(shares)), list(shares)[-1])]
    classes = [result.grouped(result.kernels_of(found)) for found in ends]
    sums = [sum(found.get(name, 0.0) for name in SAME_AT_EVERY_WIDTH) for found in classes]
    percent = 100 * ends[1].number("step_ms") / ends[0].number("step_ms")
    return (
        f"Time does not follow the MACs: at {share(list(shares)[-1])} of them a step of Base takes {percent:.0f} % "
        f"of the time. Layer norms, additions and conversions take {sums[0]:.1f} ms at the full width and "
        f"{sums[1]:.1f} ms there."
    )


def slow_products(results: Info) -> list[str]:
    """The kernels of the largest model at less than half the library's speed."""
    model = (models(results) or [""])[-1]
    slow = [
        f"{row.text('question')} ({row.number('ours_tflops'):.0f} of {row.number('library_tflops'):.0f})"
        for row in results.rows(model)
        if "library_over_ours" in row and row.number("library_over_ours") < 0.5
    ]
    said = f"Of {model.capitalize()}'s kernels these reach less than half the TFLOP/s of the library's product: "
    return [f"{said}{'; '.join(slow)}."] if slow else []


def statistics(infos: list[Info]) -> list[str]:
    """Percent of the copy bandwidth, and where torch.compile is faster."""
    said = []
    for operation in dict.fromkeys(info.text("operation") for info in infos):
        cells = [
            f"{info.number('percent_of_copy'):.0f} % ({info.text('model').capitalize()}, {info.text('dtype')})"
            for info in infos
            if info.text("operation") == operation and info.text("model") in ("tiny", "base")
        ]
        said.append(f"`{operation}` reaches {enumerated(cells)} of the copy bandwidth.")
    faster = [compiled_is_faster(info) for info in infos if info.times("ratio").get(COMPILED, 1.0) < 1.0]
    return [*said, f"`{COMPILED}` is faster than ours at {enumerated(faster)}."] if faster else said


def compiled_is_faster(info: Info) -> str:
    times, error = info.times("median_ms"), info.times("error")
    return (
        f"`{info.text('operation')}` {info.text('model').capitalize()} {info.text('dtype')}, "
        f"{1e3 * times[COMPILED]:.0f} us against {1e3 * times['ours']:.0f} "
        f"(relative error {error[COMPILED]:.1g} against {error['ours']:.1g})"
    )


def enumerated(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
