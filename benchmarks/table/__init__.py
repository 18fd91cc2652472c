"""The tables of performance, made from committed results: `python -m benchmarks.table RESULT.json ...`.

    __init__.py   all tables, one part per file: what docs/PERFORMANCE.md has
    __main__.py   the command
    gpu.py        the results that no run of pytest-benchmark made: steps, kernels, profiles
    short.py      the short tables: the most telling rows of each device, and sentences on them
    runs.py       reading the JSON, cells and rows of Markdown, the markers of a page

A RESULT.json is a run of pytest-benchmark, the output of benchmarks.quick, or one of the other results that
benchmarks/results has for a GPU. A profile among them gives the table of steps their GPU time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.table import gpu, runs
from benchmarks.table.gpu import GpuTimes
from benchmarks.table.runs import BEGIN, END, listed, rewrite, split, three_digits

__all__ = ["BEGIN", "END", "rewrite", "section", "split"]
OTHERS = ("eager", "blocked", "torch.compile", "published")


def section(paths: list[Path]) -> str:
    """The text between the markers: one part per file, under the name of the device where that changes."""
    documents = {path: document(path) for path in paths}
    profiled = gpu.gpu_times(list(documents.values()))
    parts, device = [], None
    for path, found in documents.items():
        if runs.device(found) != device:
            device = runs.device(found)
            parts.append(f"### {device}")
        parts.append(part(path, found, profiled) if runs.is_run(found) else other_part(path, found))
    return "\n\n".join(parts)


def document(path: Path) -> dict[str, Any]:
    """ValueError where it is neither a run of pytest-benchmark nor a result that has a table."""
    found = runs.document(path)
    return found if not runs.is_run(found) and gpu.kind(found) else runs.read(path)


def other_part(path: Path, found: dict[str, Any]) -> str:
    return "\n".join([other_heading(path, found), "", *gpu.tables(found)])


def part(path: Path, run: dict[str, Any], profiled: GpuTimes | None = None) -> str:
    entries = [entry["extra_info"] for entry in run["benchmarks"]]
    tables = [
        (rows, make([info for info in entries if rows in info]))
        for rows, make in (
            ("operation", operation_table),
            ("masked", masked_table),
            ("step", lambda rows: [*step_table(rows), *gpu.gpu_time_table(rows, profiled or {})]),
            ("pass", pass_table),
        )
        if any(rows in info for info in entries)
    ]
    if not tables:
        raise ValueError(
            f"{path} has no benchmark of an operation or a step; run pytest benchmarks/test_operations.py"
        )
    first = next(info for info in entries if tables[0][0] in info)
    lines = [heading(path, run, first)]
    for _, table in tables:
        lines += ["", *table]
    lines += [calibration(info) for info in entries if "peak_mb_over_loading" in info]
    lines += [following(info) for info in entries if "time_against_macs" in info]
    lines += [memory(info) for info in entries if "step_memory" in info]
    return "\n".join(lines)


def masked_table(layers: list[dict[str, Any]]) -> list[str]:
    """Forward and backward of one layer: ours, and how much longer the others take; what torch.compile compiled."""
    others = [name for name in layers[0]["both"]["ratio"] if name != "ours, scores"]
    columns = ["operation", "DeiT", "width", "ms", "TFLOP/s", "% of matmul", *others, "with scores"]
    columns += ["MB", "published, MB", "compilations", "compiling, s: ours / torch.compile"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * 2 + "|--:" * (len(columns) - 2) + "|"]
    for info in layers:
        both = info["both"]
        cells = [f"`{info['masked']}`", info["model"].capitalize(), f"{100 * info['fraction']:g} %"]
        cells += [f"{both['median_ms']['ours']:.3g}", f"{both['tflops']['ours']:.3g}"]
        cells += [f"{both['percent_of_matmul']['ours']:.0f}", *(f"{both['ratio'][name]:.2f}x" for name in others)]
        peak, compiling = info["peak_mb"], info["warm_up_seconds"]
        cells += [
            f"{both['ratio']['ours, scores']:.2f}x",
            three_digits(peak["ours"]),
            three_digits(peak["published"]),
        ]
        cells += [str(info["compilations"]), f"{compiling['ours']:.1f} / {compiling['torch.compile']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def step_table(rows: list[dict[str, Any]]) -> list[str]:
    """One training step: milliseconds of each contender, and how much longer the others take than ours."""
    ours = next(iter(rows[0]["median_ms"]))
    others = list(dict.fromkeys(name for info in rows for name in info["median_ms"] if name != ours))
    columns = ["DeiT", "MACs", f"{ours}, ms", "TFLOP/s", "% of matmul", *others]
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|--:" * (len(columns) - 1) + "|"]
    for info in rows:
        share = f"{100 * info['macs_fraction']:.0f} %" + (", mean of a list" if info["fraction"] == "mean" else "")
        cells = [
            info["step"].capitalize(),
            share,
            *(three_digits(info[key][ours]) if ours in info[key] else "" for key in ("median_ms", "tflops")),
            f"{info['percent_of_matmul'][ours]:.0f}" if ours in info["percent_of_matmul"] else "",
        ]
        cells += [f"{info['ratio'][name]:.2f}x" if name in info["ratio"] else "" for name in others]
        lines.append("| " + " | ".join(cells) + " |")
    last = rows[-1]
    failed = {f"{name} failed: {reason}." for info in rows for name, reason in info.get("failed", {}).items()}
    notes = [host(info) for info in rows if "host_ms" in info]
    if last["compilations"]:
        notes.append(
            f"Compilations: {listed(last['compilations'])}. Seconds to warm up: {listed(last['warm_up_seconds'])}."
        )
    if last["peak_mb"]:
        notes.append(f"Peak MB: {listed(last['peak_mb'])}.")
    notes += sorted(failed)
    return [*lines, "", *notes] if notes else lines


def host(info: dict[str, Any]) -> str:
    """One line on how long a step of each contender keeps the host."""
    return f"Milliseconds of the host at {100 * info['macs_fraction']:.0f} % of the MACs: {listed(info['host_ms'])}."


def pass_table(rows: list[dict[str, Any]]) -> list[str]:
    """Passes of the method, ours against each other way of the same."""
    lines = ["| DeiT | pass | ours, ms | time of other ways |", "|---|---|--:|---|"]
    for info in rows:
        ours = next(iter(info["median_ms"].values()))
        others = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in info["ratio"].items())
        lines.append(f"| {info['model'].title()} | {info['pass']} | {three_digits(ours)} | {others} |")
    return lines


def following(info: dict[str, Any]) -> str:
    """One line on how the time of a step follows the sub-network's MACs."""
    shares = info["macs_fraction"]
    pairs = (f"{100 * shares[key]:.0f} %: {value:.2f}" for key, value in info["time_over_macs"].items())
    return f"\nTime over MACs of a step, relative to the full network, in turn in one run: {', '.join(pairs)}."


def memory(info: dict[str, Any]) -> str:
    """One line on the peak memory of two steps."""
    peaks = ", ".join(f"{name} {round(value):,} MB" for name, value in info["peak_mb"].items())
    return f"Peak memory of a process that takes two steps: {peaks}."


def calibration(info: dict[str, Any]) -> str:
    """One paragraph on the memory and time of `skd.convert`."""
    peak, ratio = info["peak_mb_over_loading"], info["ratio"]["published"]
    return (
        f"\n`skd.convert` of DeiT-Tiny in batches of 16 takes {peak['streamed']:,} MB on top of model and images;\n"
        f"the published way takes {peak['published']:,} MB and {ratio:.2f}x the time."
    )


def heading(path: Path, run: dict[str, Any], first: dict[str, Any]) -> str:
    """The file, the machine and the versions."""
    info, on_gpu = run["machine_info"], first.get("threads") == "gpu"
    where = runs.device(run) if on_gpu else f"{runs.device(run)}, {info['cores']} cores"
    return (
        f"`{path.name}`: {where}; {versions(run, on_gpu)}commit {runs.commit(run)}{changed(run)}, "
        f"{runs.date(run)}; {batch(first)}197 tokens{precision(first)}."
    )


def other_heading(path: Path, found: dict[str, Any]) -> str:
    """The same of a result that is no run of pytest-benchmark, and what it is."""
    if "device" not in found:
        return f"`{path.name}`: where it was measured is not recorded."
    where = f"{runs.device(found)}; {versions(found, True)}commit {runs.commit(found)}{changed(found)}"
    return f"`{path.name}`: {where}, {runs.date(found)}. {found['what']}"


def versions(found: dict[str, Any], on_gpu: bool) -> str:
    names, known = ("torch", "triton") if on_gpu else ("torch",), runs.versions(found)
    return "".join(f"{name} {known[name]}, " for name in names if known.get(name))


def changed(found: dict[str, Any]) -> str:
    """What was not committed."""
    changes = runs.changes(found)
    return f" ({changes})" if changes else ""


def batch(first: dict[str, Any]) -> str:
    """Of the whole run, unless it is a column of its table."""
    return "" if "operation" in first else f"batch {first['batch']}, "


def precision(first: dict[str, Any]) -> str:
    threads = "" if first.get("threads") == "gpu" else f", {first.get('threads')} threads"
    return f", {first['dtype']}{threads}" if "step" in first else ""


def operation_table(operations: list[dict[str, Any]]) -> list[str]:
    others = [name for name in OTHERS if any(name in info["ratio"] for info in operations)]
    columns = ["operation", "DeiT", "dtype", "batch", "threads", "ours", "ms", "GB/s", "% of copy", *others]
    lines = ["| " + " | ".join(columns) + " |", "|---" * 6 + "|--:" * (len(columns) - 6) + "|"]
    for info in sorted(operations, key=lambda info: (info["operation"], info["batch"], str(info["threads"]))):
        cells = [f"`{info['operation']}`", info["model"].capitalize(), info["dtype"]]
        cells += [str(info["batch"]), str(info["threads"])]
        cells += [info["implementation"], f"{info['median_ms']['ours']:.3g}", f"{info['gigabytes_per_second']:.4g}"]
        cells += [f"{info['percent_of_copy']:.0f}"]
        cells += [f"{info['ratio'][name]:.2f}x" if name in info["ratio"] else "" for name in others]
        lines.append("| " + " | ".join(cells) + " |")
    return lines
