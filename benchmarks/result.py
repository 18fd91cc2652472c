"""Reads the files of results, and writes the cells of Markdown tables and the tables of pages."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from benchmarks.registry import HEADS
from benchmarks.timing import JSON

BEGIN, END = "<!-- performance:begin -->", "<!-- performance:end -->"
SHORT = "<!-- summary:begin -->", "<!-- summary:end -->"
RUN, MEAN, PRODUCTS, PROFILE = "run", "mean", "products", "profile"  # kinds of results
Times = dict[str, float]  # by contender


class Info(dict[str, JSON]):
    """A JSON object of which the reader knows the types of the values."""

    def text(self, key: str) -> str:
        return str(self[key])

    def number(self, key: str) -> float:
        return cast(float, self[key])

    def times(self, key: str) -> Times:
        """A number for each contender; none if nothing was measured."""
        return cast(Times, self.get(key) or {})

    def part(self, key: str) -> Info:
        """The object inside, or an empty one."""
        value = self.get(key)
        return Info(value) if isinstance(value, dict) else Info()

    def parts(self, keys: Iterable[str]) -> dict[str, Info]:
        return {key: self.part(key) for key in keys}

    def rows(self, key: str) -> list[Info]:
        value = self.get(key)
        return [Info(row) for row in value if isinstance(row, dict)] if isinstance(value, list) else []


@dataclass(frozen=True)
class Result:
    """One file of results: where it comes from, and what was measured."""

    name: str
    device: str
    cores: str
    versions: dict[str, str]
    commit: str
    changes: str  # what was not committed when it was measured; empty if everything was
    date: str
    what: str  # a sentence on the figures
    model: str  # of a profile
    benchmarks: list[Info] | None  # `extra_info` of each, of a run of pytest-benchmark alone
    results: Info  # what was measured, of all others

    @staticmethod
    def read(path: Path) -> Result:
        """ValueError if it is no JSON object."""
        try:
            return Result.of(path.name, Info(json.loads(path.read_text())))
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from None
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f"{path} is not a JSON object of results: {error!r}") from None

    @staticmethod
    def of(name: str, document: Info) -> Result:
        """A run of pytest-benchmark, or what was measured, in "results", with its provenance or alone."""
        is_run = "benchmarks" in document
        where = document.part("machine_info") if is_run else document
        commit = document.part("commit_info")
        changed = commit.get("note", "uncommitted changes") if commit.get("dirty") else ""
        return Result(
            name=name,
            device=str(where.get("device", "")),
            cores=str(where.get("cores", "")),
            versions={key: str(found) for key, found in where.part("build" if is_run else "versions").items()},
            commit=str(commit.get("id", "unknown") if is_run else document.get("commit", "unknown"))[:8],
            changes=str(changed if is_run else document.get("note", "")),
            date=str(document.get("datetime" if is_run else "date", "an unknown date"))[:10],
            what=str(document.get("what", "")),
            model=str(document.get("model", "")),
            benchmarks=[row.part("extra_info") for row in document.rows("benchmarks")] if is_run else None,
            results=document.part("results") or document,
        )

    @property
    def device_name(self) -> str:
        return self.device or "an unknown device"

    @property
    def kind(self) -> str:
        """The kind of table that the result is for, judged by its fields; empty if there is none."""
        if self.benchmarks is not None:
            return RUN
        if "matmul_tflops" in self.results:
            return PRODUCTS
        entries = self.results.parts(self.results).values()
        if any("mean" in entry for entry in entries):
            return MEAN
        profiled = any("kernel_ms_per_step" in entry.part(share) for entry in entries for share in entry)
        return PROFILE if profiled else ""

    def infos(self, key: str) -> list[Info]:
        """What the benchmarks of a run hold that have `key`, which tells their kinds apart."""
        return [info for info in self.benchmarks or () if key in info]


def models(results: Mapping[str, object]) -> list[str]:
    """The models of a result, the smallest first."""
    return [model for model in HEADS if model in results]


# Markdown -------------------------------------------------------------------------------------------


def three_digits(value: float) -> str:
    """Three digits, or all of a whole number."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def listed(values: Times) -> str:
    return "; ".join(f"{name}: {three_digits(value)}" for name, value in values.items())


def share(fraction: float | str) -> str:
    """Of the MACs or the width, in percent; 'mean' is that over a dropout list."""
    return "mean over a list" if fraction == "mean" else f"{100 * float(fraction):.3g} %"


def ratios(found: Times, names: Sequence[str]) -> list[str]:
    """A cell for each name, empty if it was not timed."""
    return [f"{found[name]:.2f}x" if name in found else "" for name in names]


def rows_of(columns: list[str], rows: list[list[str]], words: int) -> list[str]:
    """The lines of a table; its first `words` columns are text, the others are numbers."""
    ruler = "|---" * words + "|--:" * (len(columns) - words) + "|"
    texts = ["| " + " | ".join(cells) + " |" for cells in (columns, *rows)]
    return [texts[0], ruler, *texts[1:]]


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


# Kinds of kernels -----------------------------------------------------------------------------------

# A table of forty long names would say little. The first pattern that a name matches decides; the project's own
# kernels stand first, by their whole names.
OTHER = "other"  # kernels of no class
CLASSES = {
    "weights and biases, cast and packed: `pack_kernel`": r"pack_kernel$",
    "fc1 with its activation: `product_activate`": r"product_activate$",
    "dZ with its sums: `product_gradient`": r"product_gradient$",
    "all other products: `product_linear`": r"product_linear$",
    "fc1 with its activation: `hidden_kernel`": r"hidden_kernel$",
    "dZ with its sums: `gradient_kernel`": r"gradient_kernel$",
    "fc2, dX: `output_kernel`, `input_gradient_kernel`": r"(output|input_gradient)_kernel$",
    "weight gradients, once the MLP's: `weight_gradient_kernel`, `finish_kernel`": (
        r"(weight_gradient|finish)_kernel$"
    ),
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


def grouped(kernels: Times) -> Times:
    """Milliseconds by class, of the classes that occur, from those by the kernel's name."""
    found: Times = {}
    for kernel, milliseconds in kernels.items():
        name = class_of(kernel)
        found[name] = found.get(name, 0.0) + milliseconds
    return found


def kernels_of(profiled: Info) -> Times:
    """Milliseconds of a step by the name of the kernel; the number of launches stands beside them."""
    kernels = profiled["kernel_ms_per_step"]
    return {name: pair[0] for name, pair in cast("dict[str, list[float]]", kernels).items()}
