"""Draws loop.svg: from a model of timm to networks of every size, and the loop of planning and training between.

python docs/pictures/loop.py      writes loop.svg beside this file; a test compares the two
"""

from __future__ import annotations

from pathlib import Path

from idea import EDGE, INK, PAPER, QUIET, text

SVG = Path(__file__).with_suffix(".svg")
WIDTH, HEIGHT = 900, 330
BLUE, RED, BROWN = "#0b3c6f", "#b3261e", "#8a5a00"
# Left edge, top, width, height, colour, title, and the lines below it.
Box = tuple[float, float, float, float, str, str, tuple[str, ...]]
BOXES: tuple[Box, ...] = (
    (24, 116, 150, 92, BLUE, "model of timm", ("pre-trained weights", "of your own, or timm's")),
    (254, 116, 150, 92, BLUE, "super-network", ("the same function;", "what leads knows most")),
    (474, 62, 176, 82, RED, "plan: one round", ("what is the least loss", "per MAC that is saved?")),
    (474, 200, 176, 82, RED, "train: one epoch", ("every step: another entry", "of the dropout list")),
    (726, 62, 150, 60, BROWN, "half the MACs", ("a plain timm model",)),
    (726, 142, 150, 60, BROWN, "a quarter", ("a plain timm model",)),
    (726, 222, 150, 60, BROWN, "6 M parameters", ("a plain timm model",)),
)


def box(
    left: float, top: float, width: float, height: float, color: str, title: str, words: tuple[str, ...]
) -> list[str]:
    look = f"rx='8' fill='white' stroke='{color}' stroke-width='2'"
    lines = [f"<rect x='{left:g}' y='{top:g}' width='{width:g}' height='{height:g}' {look}/>"]
    lines.append(text(left + 12, top + 25, title, 14, color, "font-weight='bold'"))
    return lines + [text(left + 12, top + 45 + 18 * row, line, 12, QUIET) for row, line in enumerate(words)]


def arrow(path: str, tip: str) -> str:
    """A line, and the head of the arrow at its end: right, down or up."""
    head = {"right": "m-7 -5 l7 5 l-7 5", "down": "m-5 -7 l5 7 l5 -7", "up": "m-5 7 l5 -7 l5 7"}[tip]
    return f"<path d='{path} {head}' fill='none' stroke='{INK}' stroke-width='2' stroke-linejoin='round'/>"


def picture() -> str:
    middle = "text-anchor='middle' font-style='italic'"
    lines = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {HEIGHT}' width='{WIDTH}' role='img'>",
        "<title>A model of timm is converted to a super-network; planning and training take turns; networks of any "
        "size are extracted</title>",
        f"<rect x='1' y='1' width='{WIDTH - 2}' height='{HEIGHT - 2}' rx='10' fill='{PAPER}' stroke='{EDGE}'/>",
        text(24, 36, "From one pre-trained network to every size", 17, INK, "font-weight='bold'"),
        *(line for given in BOXES for line in box(*given)),
        arrow("M174 162 H254", "right"),
        text(214, 152, "convert", 13, INK, middle),
        arrow("M404 150 H439 V103 H474", "right"),
        arrow("M604 144 V200", "down"),
        text(612, 176, "grown list", 12, QUIET),
        arrow("M520 200 V144", "up"),
        text(512, 176, "new weights", 12, QUIET, "text-anchor='end'"),
        arrow("M650 241 H688 V92 H726", "right"),
        arrow("M688 172 H726", "right"),
        arrow("M688 241 V252 H726", "right"),
        text(688, 80, "extract", 13, INK, middle),
        text(24, HEIGHT - 20, "skd train runs the loop; skd plan takes its upper half alone, in minutes.", 13, QUIET),
    ]
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    SVG.write_text(picture())
