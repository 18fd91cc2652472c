"""The tables of performance, made from committed results.

python -m benchmarks.table RESULT.json ...                              print them
python -m benchmarks.table RESULT.json ... --write docs/PERFORMANCE.md  put them between the file's two marker lines
python -m benchmarks.table RESULT.json ... --short                      one short table for each device instead
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.table import rewrite, section, short
from benchmarks.table.runs import BEGIN, END, SHORT


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
            rewrite(args.write, text, *(SHORT if args.short else (BEGIN, END)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
