"""The kernels of residual_norm: a row stays in registers from the residual sum to the normalised output.

Every stream (x, branch, sum, normed output) is read once and written once. A gradient that is a sum over tokens is
added up in two stages of a fixed order: each program sums its own rows, then a second kernel adds the programs' sums.

All streams of a tile have the same layout, in which a thread holds four consecutive elements of a row. Without
`_columns` Triton would choose eight for half precision and four for float32, and would convert whole tiles between
the two layouts through shared memory: 19 barriers in the gradient kernel instead of 4.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl

from skd_kernels.gpu.buffers import ceil_div
from skd_kernels.gpu.launch import device_of, launch

COLUMN_TILE, ROW_TILE = 32, 256  # the second stage's tile: there are sums of hundreds of programs, but few columns


@dataclass(frozen=True)
class Tile:
    """A tile of whole rows in the registers of one program: at most 16 elements of each stream in a thread.

    Attributes:
        columns: the columns of the tile, a power of two; those past the row's end are masked.
        rows: the rows that a program handles at a time.
        warps: so few that each thread holds the same columns of every row; sums over rows need no exchange.
    """

    columns: int
    rows: int
    warps: int

    @staticmethod
    def of(columns: int, *, rows: int = 2) -> Tile:
        """The tile for `columns` columns: it has `rows` rows, and more where there are fewer than 128 columns."""
        block = max(16, triton.next_power_of_2(columns))
        return Tile(block, max(rows, rows * 128 // block), ceil_div(block, 256))

    def split(self, like: torch.Tensor, rows: int) -> int:
        """Rows of each program of the gradient kernel, whose grid gives every multiprocessor 16 warps, once.

        A prototype of the kernel took 0.127 ms at DeiT-Base on an H100 with 16 warps in programs of 4 warps, 0.150 ms
        in programs of 8 warps, and 0.161 ms with 8 warps a multiprocessor.
        """
        programs = max(1, 16 // self.warps) * device_of(like).multiprocessors
        return self.rows * ceil_div(rows, self.rows * programs)

    def arguments(self) -> dict[str, int]:
        return {"BLOCK_C": self.columns, "BLOCK_R": self.rows}


@triton.jit
def _columns(BLOCK_C: tl.constexpr):
    """The column indices of a tile, declared contiguous in fours only, so that a thread gets four (see above)."""
    return tl.max_contiguous(tl.arange(0, BLOCK_C), 4)


@triton.jit(do_not_specialize=["rows", "tokens"], do_not_specialize_on_alignment=["width"])
def residual_norm_kernel(
    x,
    branch,
    weight,
    bias,
    scale,
    mask,
    branch_bias,
    width,
    total,
    normed,
    mean,
    rstd,
    rows,
    tokens,
    eps,
    COLUMNS: tl.constexpr,
    LAYER: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """total = x + mask * scale * (branch + branch_bias), normed = norm(total); mean and rstd (rows,) float32.

    x, branch, total and normed are (rows, COLUMNS) and contiguous. Each element of the mask holds for `tokens` rows.
    The variance is computed from the centred row, so that nothing cancels where the mean is large. LAYER selects
    LayerNorm; otherwise it is RMSNorm, without a mean. width is None or one integer; if that is not above zero,
    branch and branch_bias are not read and count as zeros.
    """
    c = _columns(BLOCK_C)
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = c < COLUMNS
    there = (r < rows)[:, None] & inside[None, :]
    at = r.to(tl.int64)[:, None] * COLUMNS + c[None, :]
    row = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    if branch is not None:
        counts = True
        if width is not None:
            counts = tl.load(width) > 0
        added = tl.load(branch + at, mask=there & counts, other=0.0).to(tl.float32)
        if branch_bias is not None:
            added += tl.load(branch_bias + c, mask=inside & counts, other=0.0).to(tl.float32)[None, :]
        if scale is not None:
            added *= tl.load(scale + c, mask=inside, other=0.0).to(tl.float32)[None, :]
        if mask is not None:
            added *= tl.load(mask + r // tokens, mask=r < rows, other=0.0).to(tl.float32)[:, None]
        row += added
        tl.store(total + at, row, mask=there)
    if LAYER:
        average = tl.div_rn(tl.sum(row, 1), COLUMNS * 1.0)
        tl.store(mean + r, average, mask=r < rows)
        row = tl.where(inside[None, :], row - average[:, None], 0.0)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(row * row, 1), COLUMNS * 1.0) + eps))
    tl.store(rstd + r, inverse, mask=r < rows)
    row *= inverse[:, None]
    if weight is not None:
        row *= tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        row += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(normed + at, row.to(normed.dtype.element_ty), mask=there)


@triton.jit
def load_leading(stream, r, tokens, leading, c, there, COLUMNS: tl.constexpr, ALL: tl.constexpr):
    """The rows r of a stream, as float32. It has only the first `leading` of each image's `tokens`; others are zeros.

    ALL: leading equals tokens.
    """
    if ALL:
        place = r.to(tl.int64)
    else:
        place = (r // tokens).to(tl.int64) * leading + r % tokens
        there = there & (r % tokens < leading)[:, None]
    return tl.load(stream + place[:, None] * COLUMNS + c[None, :], mask=there, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows", "tokens", "leading", "per_program"], do_not_specialize_on_alignment=["width"])
def residual_norm_gradient_kernel(
    dtotal,
    dnormed,
    total,
    branch,
    weight,
    scale,
    mask,
    branch_bias,
    width,
    mean,
    rstd,
    dx,
    dbranch,
    sums,
    rows,
    tokens,
    leading,
    per_program,
    COLUMNS: tl.constexpr,
    LAYER: tl.constexpr,
    ALL: tl.constexpr,
    INPUTS: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    BRANCH: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The gradients dx and dbranch, and each program's partial sums, over its `per_program` rows, of the others.

    `sums` (wanted, programs, COLUMNS) holds the partial sums that are wanted, in this order: WEIGHT, BIAS, SCALE,
    BRANCH (the column sums of dbranch, which are the gradient of branch_bias). INPUTS: something other than WEIGHT
    and BIAS is wanted. dtotal, dnormed, dx and dbranch may be None; dtotal has only the first `leading` tokens of
    each image, all if ALL. width is None or one integer; if that is not above zero, dbranch and the sums for SCALE
    and BRANCH are zeros.
    """
    c = _columns(BLOCK_C)
    inside = c < COLUMNS
    if weight is not None:
        gain = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    of_weight = tl.zeros((BLOCK_C,), tl.float32)
    of_bias = tl.zeros((BLOCK_C,), tl.float32)
    of_scale = tl.zeros((BLOCK_C,), tl.float32)
    of_branch = tl.zeros((BLOCK_C,), tl.float32)
    counts = True
    if width is not None:
        counts = tl.load(width) > 0
    begin = tl.program_id(0) * per_program
    end = tl.minimum(begin + per_program, rows)
    at = tl.arange(0, BLOCK_R)[:, None] * COLUMNS + c[None, :]
    for done in range(0, end - begin, BLOCK_R):
        first = begin + done
        r = first + tl.arange(0, BLOCK_R)
        there = (r < end)[:, None] & inside[None, :]
        base = first.to(tl.int64) * COLUMNS
        if dnormed is not None:
            grad = tl.load(dnormed + base + at, mask=there, other=0.0).to(tl.float32)
            inverse = tl.load(rstd + r, mask=r < end, other=0.0)[:, None]
            unit = tl.load(total + base + at, mask=there, other=0.0).to(tl.float32)
            if LAYER:
                unit -= tl.load(mean + r, mask=r < end, other=0.0)[:, None]
            unit *= inverse
            if WEIGHT:
                of_weight += tl.sum(grad * unit, 0)
            if BIAS:
                of_bias += tl.sum(grad, 0)
        if INPUTS:
            if dnormed is not None:
                if weight is not None:
                    grad *= gain
                along = tl.div_rn(tl.sum(grad * unit, 1), COLUMNS * 1.0)[:, None]
                if LAYER:
                    grad = (grad - tl.div_rn(tl.sum(grad, 1), COLUMNS * 1.0)[:, None] - unit * along) * inverse
                else:
                    grad = (grad - unit * along) * inverse
                if dtotal is not None:
                    grad += load_leading(dtotal, r, tokens, leading, c, there, COLUMNS, ALL)
            else:
                grad = load_leading(dtotal, r, tokens, leading, c, there, COLUMNS, ALL)
            if dx is not None:
                tl.store(dx + base + at, grad.to(dx.dtype.element_ty), mask=there)
            if width is not None:
                grad = tl.where(counts, grad, 0.0)
            if mask is not None:
                grad *= tl.load(mask + r // tokens, mask=r < end, other=0.0).to(tl.float32)[:, None]
            if SCALE:
                added = tl.load(branch + base + at, mask=there & counts, other=0.0).to(tl.float32)
                if branch_bias is not None:
                    added += tl.load(branch_bias + c, mask=inside & counts, other=0.0).to(tl.float32)[None, :]
                of_scale += tl.sum(grad * added, 0)
            if scale is not None:
                grad *= tl.load(scale + c, mask=inside, other=0.0).to(tl.float32)[None, :]
            if dbranch is not None:
                tl.store(dbranch + base + at, grad.to(dbranch.dtype.element_ty), mask=there)
            if BRANCH:
                of_branch += tl.sum(grad, 0)
    if sums is not None:
        place = sums + tl.program_id(0) * COLUMNS + c
        step = tl.num_programs(0) * COLUMNS
        if WEIGHT:
            tl.store(place, of_weight, mask=inside)
            place += step
        if BIAS:
            tl.store(place, of_bias, mask=inside)
            place += step
        if SCALE:
            tl.store(place, of_scale, mask=inside)
            place += step
        if BRANCH:
            tl.store(place, of_branch, mask=inside)


@triton.jit(do_not_specialize=["programs"])
def residual_norm_sums_kernel(
    sums, first, second, third, fourth, programs, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Sum `sums` (wanted, programs, COLUMNS) over the programs; each wanted sum goes to its own vector."""
    c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = c < COLUMNS
    which = tl.program_id(1)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, programs, BLOCK_M):
        r = start + tl.arange(0, BLOCK_M)
        places = sums + (which * programs + r)[:, None] * COLUMNS + c[None, :]
        total += tl.load(places, mask=(r < programs)[:, None] & inside[None, :], other=0.0)
    result = tl.sum(total, 0)
    if which == 0:
        tl.store(first + c, result, mask=inside)
    if second is not None:  # noqa: SIM102  (one is known at compile time)
        if which == 1:
            tl.store(second + c, result, mask=inside)
    if third is not None:  # noqa: SIM102
        if which == 2:
            tl.store(third + c, result, mask=inside)
    if fourth is not None:  # noqa: SIM102
        if which == 3:
            tl.store(fourth + c, result, mask=inside)


def normalise(inputs: dict[str, Any], results: dict[str, Any], tokens: int, eps: float, layer: bool) -> None:
    """Start the forward kernel: `inputs` are those of `residual_norm` by name, `results` its four tensors."""
    x = inputs["x"]
    columns = x.shape[-1]
    rows, tile = x.numel() // columns, Tile.of(columns)
    arguments = {**inputs, **results, "rows": rows, "tokens": tokens, "eps": eps, "COLUMNS": columns, "LAYER": layer}
    arguments |= tile.arguments()
    # Without a limit ptxas aims at 48 registers on sm_120, and spills. Rows whose length is no multiple of 4 are not
    # aligned, so that every element needs an address of its own, and more registers.
    settings: dict[str, Any] = {"num_warps": tile.warps, "num_stages": 1, "max_registers": 128 if columns % 4 else 64}
    launch(residual_norm_kernel, (ceil_div(rows, tile.rows),), arguments, **settings)


def differentiate(
    inputs: dict[str, Any],
    dx: torch.Tensor | None,
    dbranch: torch.Tensor | None,
    vectors: Sequence[torch.Tensor | None],
    tokens: int,
    layer: bool,
) -> None:
    """Start the gradient kernel, and the second stage of its sums.

    Args:
        inputs: arguments of the gradient kernel, by name. dtotal may have only the first tokens of each image.
        dx, dbranch: the outputs, or None where not wanted.
        vectors: the outputs that are sums over rows, (C,) float32 each: the gradients of weight, bias and scale, and
            the column sums of dbranch; None where not wanted.
    """
    total, dtotal = inputs["total"], inputs["dtotal"]
    leading = tokens if dtotal is None else dtotal.shape[1]
    columns = total.shape[-1]
    # The gradient of scale needs the branch, a fourth stream, and there may be four sums: with two rows at a time, 16
    # warps would not have enough registers.
    rows, tile = total.numel() // columns, Tile.of(columns, rows=2 if vectors[2] is None else 1)
    per_program = tile.split(total, rows)
    programs = ceil_div(rows, per_program)
    wanted = [vector for vector in vectors if vector is not None]
    sums = total.new_empty((len(wanted), programs, columns), dtype=torch.float32) if wanted else None
    names = ("WEIGHT", "BIAS", "SCALE", "BRANCH")
    needed = {name: vector is not None for name, vector in zip(names, vectors, strict=True)}
    inner = dx is not None or dbranch is not None or needed["SCALE"] or needed["BRANCH"]
    arguments = {**inputs, "dx": dx, "dbranch": dbranch, "sums": sums, "rows": rows, "tokens": tokens}
    arguments |= {"per_program": per_program, "COLUMNS": columns, "LAYER": layer, "INPUTS": inner}
    arguments |= {"leading": leading, "ALL": leading == tokens}
    arguments |= needed | tile.arguments()
    # 16 warps with 128 registers in each thread use all registers of a multiprocessor.
    settings: dict[str, Any] = {"num_warps": tile.warps, "num_stages": 1, "max_registers": 128}
    launch(residual_norm_gradient_kernel, (programs,), arguments, **settings)
    if sums is not None:
        named = dict(zip(("first", "second", "third", "fourth"), [*wanted, None, None, None], strict=False))
        arguments = {"sums": sums, **named, "programs": programs, "COLUMNS": columns}
        arguments |= {"BLOCK_M": ROW_TILE, "BLOCK_N": COLUMN_TILE}
        grid = ceil_div(columns, COLUMN_TILE), len(wanted)
        launch(residual_norm_sums_kernel, grid, arguments, num_warps=8, num_stages=1)


# The arguments that come with a branch in the examples: none; a bias and a width on the device; all of them.
_BESIDE_A_BRANCH = {
    "": (),
    ", bias and width": ("branch_bias", "width"),
    ", all there is": ("branch_bias", "width", "scale", "mask"),
}


_IN_DEIT = {192: "DeiT-Tiny", 384: "DeiT-Small", 768: "quick DeiT-Base"}


def examples() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that reach every kernel and configuration, for launch.record."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    for dtype, layer, (suffix, beside) in product(dtypes, (True, False), _BESIDE_A_BRANCH.items()):
        name = f"{str(dtype).removeprefix('torch.')} {'layer' if layer else 'rms'}{suffix}"
        as_in_deit = (dtype, layer) == (torch.bfloat16, True)
        for columns in (768, 1, 13, 100, 192, 384, 1152, 2048, 4096):
            label = _IN_DEIT.get(columns, str(columns)) if as_in_deit else str(columns)
            if columns == 768 or as_in_deit or (dtype, layer) == (torch.float32, False):
                yield f"{label} {name}", partial(_example, dtype, columns, layer, beside)


def _example(dtype: torch.dtype, columns: int, layer: bool, beside: Sequence[str]) -> None:
    """A norm between two branches, the last of whose sum one token is read, the first norm, and sums alone."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    images, tokens = 128, 197
    shape, rows = (images, tokens, columns), images * tokens
    stream, branch, vector = empty(*shape), empty(*shape, dtype=dtype), empty(columns)
    mean, rstd = empty(rows) if layer else None, empty(rows)
    known = {"scale": vector, "mask": empty(images), "branch_bias": vector, "width": empty(dtype=torch.int32)}
    optional = {name: tensor if name in beside else None for name, tensor in known.items()}
    affine: dict[str, Any] = {"weight": vector, "bias": vector if layer or "scale" in beside else None}
    inputs = {"x": stream, "branch": branch, **affine, **optional}
    results = {"total": stream, "normed": branch, "mean": mean, "rstd": rstd}
    saved = {"total": stream, "weight": vector, **optional, "mean": mean, "rstd": rstd}
    normalise(inputs, results, tokens, 1e-6, layer)
    normalise({**inputs, "branch": None, **dict.fromkeys(optional)}, {**results, "total": None}, tokens, 1e-6, layer)
    wanted = [vector, affine["bias"], optional["scale"], optional["branch_bias"]]
    of_scale = {"branch": branch if "scale" in beside else None}
    between = {"dtotal": stream, "dnormed": branch, **saved, **of_scale}
    differentiate(between, stream, branch, wanted, tokens, layer)
    if not beside or beside == _BESIDE_A_BRANCH[", bias and width"]:
        class_token = {**between, "dtotal": empty(images, 1, columns)}
        differentiate(class_token, stream, branch, wanted, tokens, layer)
    first = {**between, "branch": None, **dict.fromkeys(optional)}
    for dtotal in (stream, None):
        differentiate({**first, "dtotal": dtotal}, stream, None, [vector, affine["bias"], None, None], tokens, layer)
    differentiate({**between, "dnormed": None}, stream, branch, [None, None, *wanted[2:]], tokens, layer)
