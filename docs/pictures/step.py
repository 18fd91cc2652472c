"""Draws step.svg: where the GPU time of a step of DeiT-Base went, and what prototypes of new kernels take of it.

python docs/pictures/step.py      writes step.svg beside this file; a test compares the two

Numbers come from benchmarks/results: h100-profile-base.json, a step's profile before the kernels were rewritten,
and h100-prototypes-base.json, kernels timed alone in throw-away code. The step as it is now is not measured.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

SVG = Path(__file__).with_suffix(".svg")
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
MLPS, NORMS = 11, 23  # of full size; the last block's MLP reads the class token alone
# A bar: its name, the kernels of the profile, and the prototypes of the same work with how often a step runs each.
# The prototypes have the tiles that the package has taken over.
BARS: tuple[tuple[str, str, dict[str, int]], ...] = (
    (
        "layer norms, residual sums, conversions",
        r".*(layer_norm|GammaBeta|CUDAFunctor_add|bfloat16_copy|unrolled_elementwise_kernel.*direct_copy)",
        {"add+norm R2 w4 (floor 0.0775)": NORMS, "norm back R2 w4 r4 (floor 0.1033)": NORMS},
    ),
    ("dZ, with its sums", r"gradient_kernel$", {"dz 128x128x64 w4 s3 r2 sub2 loop save2 scores0": MLPS}),
    ("fc1 and its activation", r"hidden_kernel$", {"fc1 128x128x64 w8 s3 r2 sub4 flat erf save2": MLPS}),
    (
        "fc2, dX of the MLP",
        r"(output|input_gradient)_kernel$",
        {"fc2 128x256x64 w8 s4 r1 flat": MLPS, "dx 128x256x64 w8 s4 r1 flat": MLPS},
    ),
    (
        "weight gradients of the MLP",
        r"(weight_gradient|finish)_kernel$",
        {"dw1 128x256x64 w8 s3 r1 flat": MLPS, "dw2 128x256x64 w8 s3 r1 flat": MLPS},
    ),
    ("attention core", r"(flash_forward|flash_backward|add_terms)$", {}),
    ("projections of attention", r"(into_heads|out_of_heads|transpose_kept)$", {}),
    ("their weight gradients", r"(finish_)?weight_gradient$", {}),
    ("patch embedding, optimizer, sums, copies", r".*", {}),
)
WIDTH, LEFT, SCALE, STEP, TOP = 900, 318, 36.0, 44, 104
INK, QUIET, PAPER, EDGE, BEFORE, PROTOTYPE = "#1f2933", "#52606d", "#f7f9fb", "#cbd2d9", "#0b3c6f", "#8a5a00"
FONT = "font-family='Helvetica, Arial, sans-serif'"


def text(x: float, y: float, words: str, size: int = 13, color: str = INK, extra: str = "") -> str:
    return f"<text x='{x:g}' y='{y:g}' font-size='{size}' fill='{color}' {FONT} {extra}>{words}</text>"


def rectangle(x: float, y: float, width: float, height: float, look: str) -> str:
    return f"<rect x='{x:.5g}' y='{y:g}' width='{width:.5g}' height='{height:g}' {look}/>"


def measured() -> list[float]:
    """Milliseconds of each bar; a kernel belongs to the first that it matches."""
    profile = json.loads((RESULTS / "h100-profile-base.json").read_text())
    kernels = profile["results"]["ours, graph"]["1.0"]["kernel_ms_per_step"]
    found = [0.0] * len(BARS)
    for name, (milliseconds, _) in kernels.items():
        found[next(bar for bar, (_, pattern, _) in enumerate(BARS) if re.match(pattern, name))] += milliseconds
    return found


def prototypes() -> list[float]:
    """Milliseconds of each bar at the full width; 0 where no prototype was timed."""
    timed = json.loads((RESULTS / "h100-prototypes-base.json").read_text())["results"]
    return [sum(count * timed[f"base {name}"][0][0] for name, count in timed_as.items()) for _, _, timed_as in BARS]


def picture() -> str:
    before, after = measured(), prototypes()
    height = TOP + STEP * len(BARS) + 50
    lines = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height}' width='{WIDTH}' role='img'>",
        "<title>Milliseconds of the kernels of a training step, measured before they were rewritten, "
        "and of prototypes of the new ones</title>",
        f"<rect x='1' y='1' width='{WIDTH - 2}' height='{height - 2}' rx='10' fill='{PAPER}' stroke='{EDGE}'/>",
        text(24, 34, "A training step of DeiT-Base on an H100, ms on the GPU", 17, INK, "font-weight='bold'"),
        rectangle(24, 50, 14, 12, f"fill='{BEFORE}'"),
        text(44, 61, f"before: the kernels of a step, profiled ({sum(before):.1f} ms)", 13, QUIET),
        rectangle(24, 70, 14, 12, f"fill='none' stroke='{PROTOTYPE}' stroke-width='2' stroke-dasharray='4 2'"),
        text(44, 81, "prototype, the step not yet measured: kernels timed alone, times their number", 13, QUIET),
    ]
    for index, (name, _, timed_as) in enumerate(BARS):
        y = TOP + STEP * index
        lines.append(text(LEFT - 10, y + 19, name, 13, INK, "text-anchor='end'"))
        lines.append(rectangle(LEFT, y, SCALE * before[index], 13, f"fill='{BEFORE}'"))
        lines.append(text(LEFT + SCALE * before[index] + 6, y + 11, f"{before[index]:.1f}", 12, BEFORE))
        if timed_as:
            look = f"fill='none' stroke='{PROTOTYPE}' stroke-width='2' stroke-dasharray='4 2'"
            lines.append(rectangle(LEFT + 1, y + 17, SCALE * after[index], 11, look))
            words = f"{after[index]:.1f} prototype"
        else:
            words = "no prototype; not yet measured"
        lines.append(text(LEFT + SCALE * after[index] + 6, y + 27, words, 12, PROTOTYPE))
    words = (
        f"Prototypes: {MLPS} full MLPs (the last reads the class token alone) and {NORMS} norms, at the full width."
    )
    lines.append(text(24, height - 22, words, 13, QUIET))
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    SVG.write_text(picture())
