"""Draws idea.svg, the picture at the head of README: one network, every size.

python docs/pictures/idea.py      writes idea.svg beside this file; a test compares the two

A row is a module, a cell one of its coordinates, and a darker cell a coordinate that knows more. The numbers are made
up. The picture has a background of its own, so it is legible in dark and in light mode.
"""

from __future__ import annotations

import random
from pathlib import Path

SVG = Path(__file__).with_suffix(".svg")
WIDTH, HEIGHT = 900, 348
COORDINATES, CELL, STEP = 16, 13, 15
ROWS = ("attention", "MLP", "attention", "MLP", "attention", "MLP")
ROW_STEP, TOP = 27, 104
BEFORE, SORTED, CUT = 88, 388, 700  # left edges of the three columns
# Name, colour and the widths of the rows; nested, and unlike each other, as the planner finds them.
SIZES = (
    ("all MACs", "#0b3c6f", (16, 16, 16, 16, 16, 16)),
    ("half", "#b3261e", (9, 8, 11, 7, 8, 6)),
    ("a quarter", "#8a5a00", (4, 3, 5, 3, 5, 2)),
)
INK, QUIET, PAPER, EDGE = "#1f2933", "#52606d", "#f7f9fb", "#cbd2d9"
DARK, LIGHT = (16, 74, 130), (214, 228, 240)
FONT = "font-family='Helvetica, Arial, sans-serif'"


def shade(share: float) -> str:
    """The colour of a coordinate, 0 for what knows nothing."""
    return "#" + "".join(f"{round(b + (a - b) * share):02x}" for a, b in zip(DARK, LIGHT, strict=True))


def text(x: float, y: float, words: str, size: int = 14, color: str = INK, extra: str = "") -> str:
    return f"<text x='{x:g}' y='{y:g}' font-size='{size}' fill='{color}' {FONT} {extra}>{words}</text>"


def cells(left: float, top: float, shares: list[float], cell: float = CELL, step: float = STEP) -> list[str]:
    square = "<rect x='{:g}' y='{:g}' width='{:g}' height='{:g}' rx='{:g}' fill='{}'/>"
    return [square.format(left + step * i, top, cell, cell, cell / 6, shade(share)) for i, share in enumerate(shares)]


def boundary(widths: tuple[int, ...], color: str) -> str:
    """The stepped line to the right of the coordinates that a size keeps."""
    points = []
    for row, width in enumerate(widths):
        x, y = SORTED + STEP * width - 1, TOP + ROW_STEP * row - (ROW_STEP - CELL) / 2
        points += [f"{x:g},{y:g}", f"{x:g},{y + ROW_STEP:g}"]
    line = "<polyline points='{}' fill='none' stroke='{}' stroke-width='3' stroke-linejoin='round'/>"
    return line.format(" ".join(points), color)


def arrow(x: float, y: float, length: float, words: str) -> list[str]:
    tip = x + length
    return [
        f"<path d='M{x:g} {y:g} H{tip:g} m-7 -5 l7 5 l-7 5' fill='none' stroke='{INK}' stroke-width='2'/>",
        text(x + length / 2, y - 9, words, 13, INK, "text-anchor='middle' font-style='italic'"),
    ]


def picture() -> str:
    draw = random.Random(3)
    known = [sorted((draw.random() ** 1.7 for _ in range(COORDINATES)), reverse=True) for _ in ROWS]
    for shares in known:
        shares[:] = [round(0.05 + 0.95 * share / shares[0], 3) for share in shares]
    middle = TOP + ROW_STEP * len(ROWS) / 2 - 6
    lines = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {HEIGHT}' width='{WIDTH}' role='img'>",
        "<title>One network, every size: the coordinates of a pre-trained network are sorted by how much they know, "
        "and a smaller network is what leads</title>",
        f"<rect x='1' y='1' width='{WIDTH - 2}' height='{HEIGHT - 2}' rx='10' fill='{PAPER}' stroke='{EDGE}'/>",
        text(BEFORE, 40, "Pre-trained network", 17, INK, "font-weight='bold'"),
        text(BEFORE, 62, "knowledge lies anywhere", 13, QUIET),
        text(SORTED, 40, "Super-network", 17, INK, "font-weight='bold'"),
        text(SORTED, 62, "the same function, sorted", 13, QUIET),
        text(CUT, 40, "Any size", 17, INK, "font-weight='bold'"),
        text(CUT, 62, "plain timm models", 13, QUIET),
    ]
    for row, (name, shares) in enumerate(zip(ROWS, known, strict=True)):
        y = TOP + ROW_STEP * row
        lines.append(text(BEFORE - 10, y + 11, name, 13, QUIET, "text-anchor='end'"))
        lines += cells(BEFORE, y, draw.sample(shares, len(shares))) + cells(SORTED, y, shares)
    lines += [boundary(widths, color) for _, color, widths in SIZES]
    lines += arrow(BEFORE + 250, middle, 40, "convert") + arrow(SORTED + 258, middle, 40, "extract")
    y = 82.0
    for name, color, widths in SIZES:
        lines.append(text(CUT + 116, y + 39, name, 14, color, "font-weight='bold'"))
        for row, width in enumerate(widths):
            lines += cells(CUT, y + 11 * row, known[row][:width], 5.6, 6.6)
        y += 80
    top = TOP + ROW_STEP * len(ROWS)
    lines.append(text(BEFORE, top + 24, "a row: a module; a cell: a coordinate; darker: it knows more", 13, QUIET))
    lines.append(text(BEFORE, top + 44, "a line: where a size ends; each contains the smaller ones", 13, QUIET))
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    SVG.write_text(picture())
