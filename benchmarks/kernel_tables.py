"""Writes the tables of docs/KERNELS.md from results that were computed without a GPU.

python -m benchmarks.kernel_tables docs/KERNELS.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.result import Info, rewrite, rows_of

RESULTS = Path(__file__).parent / "results"
COUNTED = "<!-- counted:begin -->", "<!-- counted:end -->"
COMPILED = "<!-- compiled:begin -->", "<!-- compiled:end -->"
BEFORE, AFTER, REGISTERS = "step-kernels-base-before", "step-kernels-base", "registers"
TARGETS = ("sm_80", "sm_90")
# Kernels of the counted steps by what they do, in the order of the table; the first word that a name begins with.
GROUPS = {
    "products": ("product_", "hidden_", "gradient_kernel", "output_", "input_gradient", "into_heads", "out_of_heads"),
    "gradients of weights": ("weight_gradient", "finish_"),
    "attention core": ("flash_",),
    "weights cast and packed": ("pack_", "transpose_kept"),
    "residual sums and norms": ("residual_norm",),
    "sums of biases": ("column_sums", "sums_", "add_terms"),
    "PyTorch: layer norms": ("aten::native_layer_norm",),
    "PyTorch: sums and products of elements": ("aten::add.", "aten::mul."),
    "PyTorch: conversions and copies": ("aten::_to_copy", "aten::clone"),
    "PyTorch: AdamW and the average": ("aten::_fused_adamw", "aten::_foreach"),
    "PyTorch: all else": ("aten::",),
}


def read(name: str) -> Info:
    return Info(json.loads((RESULTS / f"{name}.json").read_text()))


def source(name: str) -> str:
    document = read(name)
    versions = document.part("versions")
    note = f" ({document.text('note')})" if "note" in document else ""
    return f"`{name}.json`: commit {document.text('commit')[:8]}{note}, triton {versions.text('triton')}"


def group_of(kernel: str) -> str:
    return next(name for name, beginnings in GROUPS.items() if kernel.startswith(beginnings))


def counted_table() -> list[str]:
    """Launches and gigabytes of a step by what they are for, before and after."""
    sums = {(name, group): [0.0, 0.0] for name in (BEFORE, AFTER) for group in (*GROUPS, "all")}
    for name in (BEFORE, AFTER):
        for kernel in read(name).part("results").rows("kernels"):
            for group in (group_of(kernel.text("name")), "all"):
                found = sums[name, group]
                found[0] += kernel.number("launches")
                found[1] += kernel.number("bytes") / 1e9
    rows = []
    for group in (*GROUPS, "all"):
        (old, old_bytes), (new, new_bytes) = sums[BEFORE, group], sums[AFTER, group]
        rows.append([group, f"{old:.0f}", f"{new:.0f}", f"{old_bytes:.2f}", f"{new_bytes:.2f}"])
    columns = ["DeiT-Base, 128 images", "launches before", "now", "GB before", "now"]
    return [*rows_of(columns, rows, 1), "", f"Computed, not measured. {source(BEFORE)}; {source(AFTER)}."]


def compiled_table() -> list[str]:
    """The most that any variant of a kernel takes on each target."""
    kernels = read(REGISTERS).part("results").rows("kernels")
    rows = []
    for name in dict.fromkeys(kernel.text("kernel") for kernel in kernels):
        cells = [f"`{name}`"]
        for target in TARGETS:
            own = [kernel for kernel in kernels if (kernel.text("kernel"), kernel.text("target")) == (name, target)]
            most = (
                f"{max((kernel.number(key) for kernel in own), default=0):.0f}"
                for key in ("registers", "shared KiB", "spilled bytes")
            )
            tiles = dict.fromkeys(kernel.text("tile").replace("x", " x ") for kernel in own)
            cells += [", ".join(tiles), *most]
        rows.append(cells)
    columns = ["kernel, bfloat16"]
    for target in TARGETS:
        columns += [f"{target}: tile", "registers", "shared KiB", "spilled bytes"]
    return [*rows_of(columns, rows, 1), "", f"Read from the binaries, not measured. {source(REGISTERS)}."]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    page = parser.parse_args().page
    rewrite(page, "\n".join(counted_table()), *COUNTED)
    rewrite(page, "\n".join(compiled_table()), *COMPILED)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
