"""README's table of performance, made from committed results.

python -m benchmarks.table benchmarks/results/cpu.json                      print it
python -m benchmarks.table benchmarks/results/cpu.json --write README.md    put it between the file's two marker lines
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks import runs

BEGIN, END = "<!-- performance:begin -->", "<!-- performance:end -->"
OTHERS = ("eager", "blocked", "torch.compile", "published")


def section(paths: list[Path]) -> str:
    """The text between the markers: one part per run."""
    return "\n\n".join(part(path, runs.read(path)) for path in paths)


def part(path: Path, run: dict[str, Any]) -> str:
    entries = [entry["extra_info"] for entry in run["benchmarks"]]
    operations = [info for info in entries if "operation" in info]
    if not operations:
        raise ValueError(f"{path} has no benchmark of an operation; run pytest benchmarks/test_operations.py")
    lines = [heading(path, run, operations[0]), "", *operation_table(operations)]
    lines += [calibration(info) for info in entries if "peak_mb_over_loading" in info]
    return "\n".join(lines)


def calibration(info: dict[str, Any]) -> str:
    """One paragraph on the memory and time of `skd.convert`."""
    peak, ratio = info["peak_mb_over_loading"], info["ratio"]["published"]
    return (
        f"\n`skd.convert` of DeiT-Tiny in batches of 16 takes {peak['streamed']:,} MB on top of model and images;\n"
        f"the published way takes {peak['published']:,} MB and {ratio:.2f}x the time."
    )


def heading(path: Path, run: dict[str, Any], first: dict[str, Any]) -> str:
    """The file, the machine and the versions."""
    info, commit = run["machine_info"], run["commit_info"]
    where = f"{runs.device(run)}, {info['cores']} cores" if first["threads"] != "gpu" else runs.device(run)
    state = ", with uncommitted changes" if commit.get("dirty") else ""
    return (
        f"`{path.name}`: {where}; torch {info['build']['torch']}, commit {commit['id'][:8]}{state}, "
        f"{run['datetime'][:10]}; batch {first['batch']}, 197 tokens."
    )


def operation_table(operations: list[dict[str, Any]]) -> list[str]:
    others = [name for name in OTHERS if any(name in info["ratio"] for info in operations)]
    columns = ["operation", "DeiT", "dtype", "threads", "ours", "ms", "GB/s", "% of copy", *others]
    lines = ["| " + " | ".join(columns) + " |", "|---" * 5 + "|--:" * (len(columns) - 5) + "|"]
    for info in sorted(operations, key=lambda info: (info["operation"], str(info["threads"]))):
        cells = [f"`{info['operation']}`", info["model"].capitalize(), info["dtype"], str(info["threads"])]
        cells += [info["implementation"], f"{info['median_ms']['ours']:.3g}", f"{info['gigabytes_per_second']:.4g}"]
        cells += [f"{info['percent_of_copy']:.0f}"]
        cells += [f"{info['ratio'][name]:.2f}x" if name in info["ratio"] else "" for name in others]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description="Make the table of performance.")
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT.json")
    parser.add_argument("--write", type=Path, metavar="FILE", help="rewrite the table between FILE's markers")
    args = parser.parse_args(arguments)
    try:
        text = section(args.results)
        if args.write is None:
            print(text)
        else:
            rewrite(args.write, text)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
