"""Tables of what was measured on a GPU beside the runs of pytest-benchmark: steps, kernels, where the time goes.

The kernels of a profile are grouped by what they do, since a table of forty long names says little. A document of
each kind is known by what it holds. `results` may stand in it with their provenance, or alone.
"""

from __future__ import annotations

import re
from typing import Any

from benchmarks.registry import HEADS
from benchmarks.table import runs
from benchmarks.table.runs import rows_of, share, three_digits

# Milliseconds that the GPU works for a step, by model and share of the MACs, then by contender.
GpuTimes = dict[tuple[str, float], dict[str, float]]

MEAN, PRODUCTS, PROFILE = "mean", "products", "profile"
OTHER = "other"  # kernels of no class


def kind(found: dict[str, Any]) -> str | None:
    """Which of the tables a document has, None for none of them."""
    results = runs.results(found)
    if "matmul_tflops" in results:
        return PRODUCTS
    entries = [entry for entry in results.values() if isinstance(entry, dict)]
    if any("mean" in entry for entry in entries):
        return MEAN
    shares = [value for entry in entries for value in entry.values() if isinstance(value, dict)]
    return PROFILE if any("kernel_ms_per_step" in value for value in shares) else None


def tables(found: dict[str, Any]) -> list[str]:
    """The lines of a document's table or tables."""
    makers = {MEAN: mean_table, PRODUCTS: products_table, PROFILE: profile_table}
    which = kind(found)
    if which is None:
        raise ValueError("no table shows what it holds")
    return makers[which](runs.results(found))


def models(results: dict[str, Any]) -> list[str]:
    """Those of a document, the smallest first."""
    return [model for model in HEADS if model in results]


def mean_table(results: dict[str, Any]) -> list[str]:
    """A step at shares of the MACs and on average over a dropout list: milliseconds, and the others' over ours."""
    first = next(iter(results[models(results)[0]].values()))
    ours, *others = first
    rows = []
    for model in models(results):
        for fraction, times in results[model].items():
            cells = [f"{three_digits(times[name])} ({times[name] / times[ours]:.2f}x)" for name in others]
            rows.append([model.capitalize(), share(fraction), three_digits(times[ours]), *cells])
    return rows_of(["DeiT", "MACs", f"{ours}, ms", *(f"{name}, ms" for name in others)], rows, 2)


def products_table(results: dict[str, Any]) -> list[str]:
    """Kernels at full width against the library, the norms, the whole operations replayed at every width."""
    kernels, norms, replays = [], [], []
    for model in models(results):
        for row in results[model]:
            first = [row["question"], model.capitalize()]
            if "norm_ms" in row:
                shares = row["percent_of_copy"]
                norms.append(
                    [*first, *(f"{three_digits(ms)} ({shares[n]:.0f} %)" for n, ms in row["norm_ms"].items())]
                )
                continue
            if "replay_ms" in row:
                replays.append([*first, *(three_digits(value) for value in row["replay_ms"].values())])
                continue
            for name in ("ours", "library"):
                first += [three_digits(row[f"{name}_ms"]), three_digits(row[f"{name}_tflops"])]
                first.append(f"{row[f'{name}_percent_of_matmul']:.0f}")
            kernels.append([*first, f"{row['library_over_ours']:.2f}x"])
    columns = ["kernel at full width", "DeiT", "ours, ms", "TFLOP/s", "% of matmul"]
    lines = rows_of([*columns, "library, ms", "TFLOP/s", "% of matmul", "library over ours"], kernels, 2)
    if norms:
        timed = next(row["norm_ms"] for model in models(results) for row in results[model] if "norm_ms" in row)
        names = [f"{name}, ms (of the copy's bandwidth)" for name in timed]
        lines += ["", *rows_of(["residual sum and norm", "DeiT", *names], norms, 2)]
    if replays:
        widths = next(row["replay_ms"] for model in models(results) for row in results[model] if "replay_ms" in row)
        names = [f"width {share(fraction)}, ms" for fraction in widths]
        lines += ["", *rows_of(["forward and backward", "DeiT", *names], replays, 2)]
    ceilings = f"copy {results['copy_gigabytes_per_second']:,.0f} GB/s, matrix product "
    return [*lines, "", f"Ceilings of the same run: {ceilings}{results['matmul_tflops']:.1f} TFLOP/s."]


def profile_table(results: dict[str, Any]) -> list[str]:
    """Where the GPU time of a step goes: milliseconds by class of kernel, their sum, and the wall clock."""
    profiled = {
        f"{name}, {share(fraction)}": entry
        for name, shares in results.items()
        for fraction, entry in shares.items()
        if "kernel_ms_per_step" in entry
    }
    classes = {name: grouped(entry["kernel_ms_per_step"]) for name, entry in profiled.items()}
    rows = [
        [kind_of_work, *(f"{found[kind_of_work]:.2f}" if kind_of_work in found else "" for found in classes.values())]
        for kind_of_work in [*CLASSES, OTHER]
        if any(kind_of_work in found for found in classes.values())
    ]
    rows.append(["sum of the kernels listed", *(f"{sum(found.values()):.2f}" for found in classes.values())])
    rows.append(["a step by the wall clock", *(f"{entry['step_ms']:.2f}" for entry in profiled.values())])
    return rows_of(["milliseconds a step", *profiled], rows, 1)


def gpu_times(documents: list[dict[str, Any]]) -> GpuTimes:
    """Of the profiles among them: the sums of the kernels that they list."""
    found: GpuTimes = {}
    for document in documents:
        if runs.is_run(document) or kind(document) != PROFILE:
            continue
        for name, shares in runs.results(document).items():
            for fraction, entry in shares.items():
                if "kernel_ms_per_step" in entry:
                    total = sum(milliseconds for milliseconds, _ in entry["kernel_ms_per_step"].values())
                    found.setdefault((document.get("model", ""), float(fraction)), {})[name] = total
    return found


def gpu_time_table(rows: list[dict[str, Any]], profiled: GpuTimes) -> list[str]:
    """Of the steps whose GPU time was taken, beside their times or by a profile; no line where none was."""
    times = [info.get("gpu_ms") or profiled.get((info["step"], info["fraction"]), {}) for info in rows]
    names = list(dict.fromkeys(name for found in times for name in found))
    cells = [
        [
            info["step"].capitalize(),
            share(info["fraction"]),
            *(f"{found[n]:.1f}" if n in found else "" for n in names),
        ]
        for info, found in zip(rows, times, strict=True)
        if found
    ]
    return ["", *rows_of(["DeiT", "MACs", *(f"{name}, GPU ms" for name in names)], cells, 2)] if cells else []


# Kinds of kernels -----------------------------------------------------------------------------------

# The first pattern that a name matches decides. The project's own kernels stand first, by their whole names.
CLASSES: dict[str, str] = {
    "fc1 with its activation: `hidden_kernel`": r"hidden_kernel$",
    "dZ with its sums: `gradient_kernel`": r"gradient_kernel$",
    "fc2, dX: `output_kernel`, `input_gradient_kernel`": r"(output|input_gradient)_kernel$",
    "weight gradients of the MLP: `weight_gradient_kernel`, `finish_kernel`": r"(weight_gradient|finish)_kernel$",
    "projections: `into_heads`, `out_of_heads`, `transpose_kept`": r"(into_heads|out_of_heads|transpose_kept)$",
    "weight gradients of the projections: `weight_gradient`, `finish_weight_gradient`": r"(finish_)?weight_gradient$",
    "attention core: `flash_forward`, `flash_backward`, `add_terms`; the library's": (
        r"(flash_forward|flash_backward|add_terms)$|.*(sdpa|compute_dot_do_o|convert_dq)"
    ),
    "patch embedding, by cuDNN": r".*(cutlass\w*cudnn|nchwToNhwc|nhwcToNchw)",
    "matrix products of the library": r"nvjet|.*(splitKreduce|gemm)",
    "activation, a kernel of its own": r".*Gelu",
    "layer norms": r"residual_norm|.*(layer_norm|GammaBeta)",
    "additions, most of them residual sums": r".*CUDAFunctor_add",
    "conversions between float32 and bfloat16": r".*(bfloat16_copy|unrolled_elementwise_kernel.*direct_copy)",
    "sums over rows": r"(column_)?sums_kernel$|.*reduce_kernel",
    "AdamW, average of the weights": r".*multi_tensor_apply",
    "copies, concatenations, zeros": r".*(CatArray|direct_copy|FillFunctor|Mem(cpy|set)|memset)",
}


def class_of(kernel: str) -> str:
    return next((name for name, pattern in CLASSES.items() if re.match(pattern, kernel)), OTHER)


def grouped(kernels: dict[str, list[float]]) -> dict[str, float]:
    """Milliseconds by class, of the classes that occur.

    Args:
        kernels: milliseconds and launches of a step by the kernel's name.
    """
    found: dict[str, float] = {}
    for kernel, (milliseconds, _) in kernels.items():
        name = class_of(kernel)
        found[name] = found.get(name, 0.0) + milliseconds
    return found
