"""The tables of performance, made from committed results.

python -m benchmarks.table RESULT.json ...                              print them
python -m benchmarks.table RESULT.json ... --write docs/PERFORMANCE.md  put them between the file's two marker lines
python -m benchmarks.table RESULT.json ... --short                      one short table for each device instead

A RESULT.json is a run of pytest-benchmark, the output of benchmarks.quick or benchmarks.steps, or means of training
steps. A profile among them gives the table of steps their GPU time. short.py makes the short tables.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import result, short
from benchmarks.result import Info, Result, Times, models, ratios, rows_of, share, three_digits

OTHERS = ("eager", "blocked", "torch.compile", "published")
# Milliseconds that the GPU works for a step, by model and share of the MACs, then by contender.
GpuTimes = dict[tuple[str, str], Times]

# One part per result --------------------------------------------------------------------------------


def section(paths: list[Path]) -> str:
    """The text between the markers: one part per file, under the name of the device where that changes."""
    results = [Result.read(path) for path in paths]
    profiled, device = gpu_times(results), ""
    parts = []
    for file in results:
        if file.device_name != device:
            device = file.device_name
            parts.append(f"### {device}")
        parts.append(part(file, profiled))
    return "\n\n".join(parts)


def part(file: Result, profiled: GpuTimes) -> str:
    makers = {result.MEAN: mean_table, result.PRODUCTS: products_table, result.PROFILE: profile_table}
    if file.kind == result.RUN:
        return run_part(file, profiled)
    if file.kind not in makers:
        raise ValueError(f"{file.name} is not a result that has a table")
    return "\n".join([heading(file), "", *makers[file.kind](file.results)])


def run_part(file: Result, profiled: GpuTimes) -> str:
    """The tables of a run of pytest-benchmark, and a line on each of the other things that it has measured."""
    steps = file.infos("step")
    made = {
        "operation": operation_table(file.infos("operation")),
        "masked": masked_table(file.infos("masked")),
        "step": [*step_table(steps), *gpu_time_table(steps, profiled)],
        "pass": pass_table(file.infos("pass")),
    }
    made = {key: table for key, table in made.items() if table}
    if not made:
        raise ValueError(f"{file.name} has no benchmark of an operation or a step; run pytest benchmarks")
    lines = [heading(file, next(info for info in file.benchmarks or () if next(iter(made)) in info))]
    for table in made.values():
        lines += ["", *table]
    lines += [calibration(info) for info in file.infos("peak_mb_over_loading")]
    lines += [following(info) for info in file.infos("time_against_macs")]
    lines += [memory(info.times("peak_mb")) for info in file.infos("step_memory")]
    return "\n".join(lines)


def heading(file: Result, first: Info | None = None) -> str:
    """The file, the machine and the versions; of a run also what its first benchmark says of all of them."""
    if not file.device:
        return f"`{file.name}`: where it was measured is not recorded."
    on_gpu = first is None or first.get("threads") == "gpu"
    names = ("torch", "triton") if on_gpu else ("torch",)
    versions = "".join(f"{name} {file.versions[name]}, " for name in names if file.versions.get(name))
    changed = f" ({file.changes})" if file.changes else ""
    where = file.device if on_gpu else f"{file.device}, {file.cores} cores"
    text = f"`{file.name}`: {where}; {versions}commit {file.commit}{changed}, {file.date}"
    if first is None:
        return f"{text}. {file.what}"
    batch = "" if "operation" in first else f"batch {first.text('batch')}, "  # a column of that table
    threads = "" if on_gpu else f", {first.get('threads')} threads"
    return f"{text}; {batch}197 tokens" + (f", {first.text('dtype')}{threads}." if "step" in first else ".")


def operation_table(infos: list[Info]) -> list[str]:
    """The statistics; no line if there are none, as of all these tables."""
    if not infos:
        return []
    others = [name for name in OTHERS if any(name in info.times("ratio") for info in infos)]
    columns = ["operation", "DeiT", "dtype", "batch", "threads", "ours", "ms", "GB/s", "% of copy", *others]
    rows = []
    for info in sorted(infos, key=lambda info: (info.text("operation"), info.number("batch"), info.text("threads"))):
        cells = [f"`{info.text('operation')}`", info.text("model").capitalize(), info.text("dtype")]
        cells += [info.text("batch"), info.text("threads"), info.text("implementation")]
        cells += [f"{info.times('median_ms')['ours']:.3g}", f"{info.number('gigabytes_per_second'):.4g}"]
        rows.append([*cells, f"{info.number('percent_of_copy'):.0f}", *ratios(info.times("ratio"), others)])
    return rows_of(columns, rows, 6)


def masked_table(infos: list[Info]) -> list[str]:
    """Forward and backward of one layer: ours, and how much longer the others take; what torch.compile compiled."""
    if not infos:
        return []
    others = [name for name in infos[0].part("both").times("ratio") if name != "ours, scores"]
    columns = ["operation", "DeiT", "width", "ms", "TFLOP/s", "% of matmul", *others, "with scores"]
    columns += ["MB", "published, MB", "compilations", "compiling, s: ours / torch.compile"]
    rows = []
    for info in infos:
        both, peak, compiling = info.part("both"), info.times("peak_mb"), info.times("warm_up_seconds")
        cells = [f"`{info.text('masked')}`", info.text("model").capitalize(), f"{100 * info.number('fraction'):g} %"]
        cells += [f"{both.times('median_ms')['ours']:.3g}", f"{both.times('tflops')['ours']:.3g}"]
        cells.append(f"{both.times('percent_of_matmul')['ours']:.0f}")
        cells += ratios(both.times("ratio"), [*others, "ours, scores"])
        cells += [three_digits(peak["ours"]), three_digits(peak["published"]), info.text("compilations")]
        rows.append([*cells, f"{compiling['ours']:.1f} / {compiling['torch.compile']:.1f}"])
    return rows_of(columns, rows, 2)


def step_table(infos: list[Info]) -> list[str]:
    """One training step: milliseconds of ours, and how much longer the others take."""
    if not infos:
        return []
    ours = next(iter(infos[0].times("median_ms")))
    others = list(dict.fromkeys(name for info in infos for name in info.times("median_ms") if name != ours))
    rows = []
    for info in infos:
        mean = ", mean of a list" if info.text("fraction") == "mean" else ""
        cells = [info.text("step").capitalize(), f"{100 * info.number('macs_fraction'):.0f} %{mean}"]
        cells += [
            three_digits(times[ours]) if ours in times else ""
            for times in (info.times("median_ms"), info.times("tflops"))
        ]
        percent = info.times("percent_of_matmul")
        cells.append(f"{percent[ours]:.0f}" if ours in percent else "")
        rows.append([*cells, *ratios(info.times("ratio"), others)])
    lines = rows_of(["DeiT", "MACs", f"{ours}, ms", "TFLOP/s", "% of matmul", *others], rows, 1)
    notes = step_notes(infos)
    return [*lines, "", *notes] if notes else lines


def step_notes(infos: list[Info]) -> list[str]:
    """What the host does meanwhile, what took long to be ready, the memory, and who failed."""
    notes, last = [], infos[-1]
    for info in infos:
        if "host_ms" in info:
            percent = f"{100 * info.number('macs_fraction'):.0f} %"
            notes.append(
                f"Milliseconds of the host at {percent} of the MACs: {result.listed(info.times('host_ms'))}."
            )
    if compilations := last.times("compilations"):
        seconds = result.listed(last.times("warm_up_seconds"))
        notes.append(f"Compilations: {result.listed(compilations)}. Seconds to warm up: {seconds}.")
    if peaks := last.times("peak_mb"):
        notes.append(f"Peak MB: {result.listed(peaks)}.")
    failed = {f"{name} failed: {why}." for info in infos for name, why in info.part("failed").items()}
    return [*notes, *sorted(failed)]


def pass_table(infos: list[Info]) -> list[str]:
    """Passes of the method, ours against each other way of the same."""
    lines = ["| DeiT | pass | ours, ms | time of other ways |", "|---|---|--:|---|"] if infos else []
    for info in infos:
        ours = next(iter(info.times("median_ms").values()))
        others = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in info.times("ratio").items())
        lines.append(f"| {info.text('model').title()} | {info.text('pass')} | {three_digits(ours)} | {others} |")
    return lines


def following(info: Info) -> str:
    """One line on how the time of a step follows the sub-network's MACs."""
    shares = info.times("macs_fraction")
    pairs = (f"{100 * shares[key]:.0f} %: {value:.2f}" for key, value in info.times("time_over_macs").items())
    return f"\nTime over MACs of a step, relative to the full network, in turn in one run: {', '.join(pairs)}."


def memory(peaks: Times) -> str:
    said = ", ".join(f"{name} {round(value):,} MB" for name, value in peaks.items())
    return f"Peak memory of a process that takes two steps: {said}."


def calibration(info: Info) -> str:
    """One paragraph on the memory and time of `skd.convert`."""
    peak, ratio = info.times("peak_mb_over_loading"), info.times("ratio")["published"]
    return (
        f"\n`skd.convert` of DeiT-Tiny in batches of 16 takes {peak['streamed']:,} MB on top of model and images;\n"
        f"the published way takes {peak['published']:,} MB and {ratio:.2f}x the time."
    )


# Results of a GPU that no run of pytest-benchmark made -----------------------------------------------


def mean_table(results: Info) -> list[str]:
    """A step at shares of the MACs and on average over a dropout list: milliseconds, and the others' over ours."""
    rows, ways = [], list[str]()
    for model, shares in results.parts(models(results)).items():
        for fraction in shares:
            times = shares.times(fraction)
            ours, *others = ways = ways or list(times)
            cells = [f"{three_digits(times[name])} ({times[name] / times[ours]:.2f}x)" for name in others]
            rows.append([model.capitalize(), share(fraction), three_digits(times[ours]), *cells])
    return rows_of(["DeiT", "MACs", *(f"{name}, ms" for name in ways)], rows, 2)


def products_table(results: Info) -> list[str]:
    """Kernels at full width against the library, the norms, the whole operations replayed at every width."""
    rows = [(row, [row.text("question"), model.title()]) for model in models(results) for row in results.rows(model)]
    norms = [(first, row.times("norm_ms"), row.times("percent_of_copy")) for row, first in rows if "norm_ms" in row]
    replays = [(first, row.times("replay_ms")) for row, first in rows if "replay_ms" in row]
    columns = ["kernel at full width", "DeiT", "ours, ms", "TFLOP/s", "% of matmul"]
    columns += ["library, ms", "TFLOP/s", "% of matmul", "library over ours"]
    lines = rows_of(columns, [[*first, *kernel_cells(row)] for row, first in rows if "library_ms" in row], 2)
    if norms:
        columns = [
            "residual sum and norm",
            "DeiT",
            *(f"{name}, ms (of the copy's bandwidth)" for name in norms[0][1]),
        ]
        cells = [[*f, *(f"{three_digits(ms)} ({of[n]:.0f} %)" for n, ms in times.items())] for f, times, of in norms]
        lines += ["", *rows_of(columns, cells, 2)]
    if replays:
        columns = ["forward and backward", "DeiT", *(f"width {share(fraction)}, ms" for fraction in replays[0][1])]
        lines += ["", *rows_of(columns, [[*f, *map(three_digits, times.values())] for f, times in replays], 2)]
    copy, matmul = results.number("copy_gigabytes_per_second"), results.number("matmul_tflops")
    return [*lines, "", f"Ceilings of the same run: copy {copy:,.0f} GB/s, matrix product {matmul:.1f} TFLOP/s."]


def kernel_cells(row: Info) -> list[str]:
    cells = []
    for name in ("ours", "library"):
        cells += [three_digits(row.number(f"{name}_ms")), three_digits(row.number(f"{name}_tflops"))]
        cells.append(f"{row.number(f'{name}_percent_of_matmul'):.0f}")
    return [*cells, f"{row.number('library_over_ours'):.2f}x"]


def profile_table(results: Info) -> list[str]:
    """Where the GPU time of a step goes: milliseconds by class of kernel, their sum, and the wall clock."""
    profiled = {f"{name}, {share(fraction)}": found for name, fraction, found in profiles_in(results)}
    classes = {name: result.grouped(result.kernels_of(found)) for name, found in profiled.items()}
    rows = [
        [kind_of_work, *(f"{found[kind_of_work]:.2f}" if kind_of_work in found else "" for found in classes.values())]
        for kind_of_work in [*result.CLASSES, result.OTHER]
        if any(kind_of_work in found for found in classes.values())
    ]
    rows.append(["sum of the kernels listed", *(f"{sum(found.values()):.2f}" for found in classes.values())])
    rows.append(["a step by the wall clock", *(f"{found.number('step_ms'):.2f}" for found in profiled.values())])
    return rows_of(["milliseconds a step", *profiled], rows, 1)


def profiles_in(results: Info) -> list[tuple[str, str, Info]]:
    """Contender, share of the MACs, and what was found."""
    by_name = results.parts(results).items()
    found = [(name, share, shares.part(share)) for name, shares in by_name for share in shares]
    return [(name, share, entry) for name, share, entry in found if "kernel_ms_per_step" in entry]


def gpu_times(results: Sequence[Result]) -> GpuTimes:
    """Of the profiles among them: the sums of the kernels that they list."""
    times: GpuTimes = {}
    for file in results:
        for name, fraction, found in profiles_in(file.results) if file.kind == result.PROFILE else ():
            times.setdefault((file.model, fraction), {})[name] = sum(result.kernels_of(found).values())
    return times


def gpu_time_table(infos: list[Info], profiled: GpuTimes) -> list[str]:
    """Of the steps whose GPU time was taken, beside their times or by a profile; no line where none was."""
    keys = [(info.text("step"), info.text("fraction")) for info in infos]
    times = [info.times("gpu_ms") or profiled.get(key, {}) for info, key in zip(infos, keys, strict=True)]
    names = list(dict.fromkeys(name for found in times for name in found))
    rows = [
        [model.capitalize(), share(fraction), *(f"{found[name]:.1f}" if name in found else "" for name in names)]
        for (model, fraction), found in zip(keys, times, strict=True)
        if found
    ]
    return ["", *rows_of(["DeiT", "MACs", *(f"{name}, GPU ms" for name in names)], rows, 2)] if rows else []


# The command ----------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description="Make the tables of performance.")
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT.json")
    parser.add_argument("--short", action="store_true", help="a short table for each device")
    parser.add_argument("--write", type=Path, metavar="FILE", help="rewrite the table between FILE's markers")
    args = parser.parse_args(arguments)
    try:
        text = short.section(args.results) if args.short else section(args.results)
        if args.write is None:
            print(text)
        else:
            result.rewrite(args.write, text, *(result.SHORT if args.short else (result.BEGIN, result.END)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
