"""Draws widths.svg: what the sub-networks of a trained super-network keep of each module, from a real run.

python docs/pictures/widths.py          writes widths.svg beside this file; a test compares the two
python docs/pictures/widths.py RUN      takes the numbers, widths.json, from the folder of a run of skd train first

The run that widths.json is of is the one in docs/TUTORIAL.md, as it is written there.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from idea import EDGE, INK, PAPER, QUIET, text

SVG = Path(__file__).with_suffix(".svg")
NUMBERS = Path(__file__).with_suffix(".json")
WIDTH, LEFT, LENGTH, TOP, STEP, BAR = 900, 110, 560, 96, 36, 24
COLORS = ("#d6e4f0", "#a9c6de", "#7ba6cb", "#4d85b6", "#25659d", "#10497f", "#082b4f")


def taken(run: Path) -> dict[str, object]:
    """The widths of the sub-networks in the curve of a run's last epoch, with their MACs and top-1."""
    planned = json.loads((run / "dropout_list.json").read_text())
    last = json.loads((run / "history.jsonl").read_text().splitlines()[-1])
    sizes = [
        {"macs_fraction": row["macs_fraction"], "top1": row["top1"], "widths": planned["widths"][row["entry"]]}
        for row in last["curve"]
    ]
    return {"modules": planned["modules"], "sizes": sizes}


def picture() -> str:
    numbers = json.loads(NUMBERS.read_text())
    modules, sizes = numbers["modules"], numbers["sizes"]
    full = sizes[0]["widths"]
    height = TOP + STEP * len(modules) + 44
    lines = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height}' width='{WIDTH}' role='img'>",
        "<title>The share of each module that the sub-networks of a trained super-network keep</title>",
        f"<rect x='1' y='1' width='{WIDTH - 2}' height='{height - 2}' rx='10' fill='{PAPER}' stroke='{EDGE}'/>",
        text(24, 36, "What each size keeps of each module", 17, INK, "font-weight='bold'"),
        text(
            24, 60, "the tutorial's network on scikit-learn's digits; each size contains the smaller ones", 13, QUIET
        ),
    ]
    for row, name in enumerate(modules):
        y = TOP + STEP * row
        block, module = name.split(".")
        lines.append(text(LEFT - 10, y + 17, f"{block} {module}", 13, QUIET, "text-anchor='end'"))
        for color, size in zip(COLORS, sizes, strict=False):
            length = LENGTH * size["widths"][row] / full[row]
            lines.append(f"<rect x='{LEFT}' y='{y}' width='{length:g}' height='{BAR}' fill='{color}'/>")
    lines.append(text(LEFT + LENGTH + 30, 60, "MACs", 13, INK, "font-weight='bold'"))
    lines.append(text(LEFT + LENGTH + 110, 60, "top-1", 13, INK, "font-weight='bold'"))
    for place, (color, size) in enumerate(zip(COLORS, sizes, strict=False)):
        y = TOP - 14 + 30 * place
        lines.append(
            f"<rect x='{LEFT + LENGTH + 30}' y='{y}' width='18' height='14' fill='{color}' stroke='{EDGE}'/>"
        )
        lines.append(
            text(LEFT + LENGTH + 56, y + 12, f"{math.ceil(1000 * size['macs_fraction']) / 10:.1f} %", 13, INK)
        )
        lines.append(text(LEFT + LENGTH + 110, y + 12, f"{math.floor(10 * size['top1']) / 10:.1f} %", 13, INK))
    words = "a row: a module of a block; its length: all coordinates; darker: kept by smaller sizes too"
    lines.append(text(LEFT, height - 20, words, 13, QUIET))
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        NUMBERS.write_text(json.dumps(taken(Path(sys.argv[1])), indent=1) + "\n")
    SVG.write_text(picture())
