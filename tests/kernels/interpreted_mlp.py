"""masked_mlp's Triton kernels, interpreted on the CPU; test_triton_mlp.py runs this in its own process.

The interpreter's device has three programs, so that persistent loops take several turns. Half precision is float16,
because the interpreter's bfloat16 products are wrong.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from layouts import LAYOUTS
from mlp_checks import NAMES, Inputs, check, make_inputs, run
from watched_launches import check_alignment, names_of_launches

import skd_kernels as kernels
from skd_kernels.gpu import mlp as operator
from skd_kernels.gpu.activations import ACTIVATIONS, activate
from skd_kernels.gpu.launch import watch

DTYPES = (torch.float32, torch.float16)
ERRORS: dict[str, list[float]] = {}


@pytest.fixture(scope="module", autouse=True)
def report() -> Iterator[None]:
    """Where SKD_ERRORS names a file, the largest errors found go there, for a table."""
    yield
    if "SKD_ERRORS" in os.environ:
        with open(os.environ["SKD_ERRORS"], "w") as file:
            json.dump(ERRORS, file)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer that the operation makes is born full of NaN."""
    make = torch.Tensor.new_empty

    def filled(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = make(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)


def verify(dtype: torch.dtype, shape: tuple[int, int, int], size: int, width: int, **kwargs: Any) -> None:
    for name, (error, plain) in check(dtype, shape, size, width, **kwargs).items():
        largest = ERRORS.setdefault(f"{dtype} {name}", [0.0, 0.0])
        largest[:] = max(largest[0], error), max(largest[1], plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations(act: str, gated: bool, dtype: torch.dtype) -> None:
    verify(dtype, (2, 17, 40), 72, 45, act=act, gated=gated)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("width", [0, 8, 63, 72])
def test_widths(width: int, gated: bool, dtype: torch.dtype) -> None:
    verify(dtype, (2, 17, 40), 72, width, gated=gated)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("width", [131, 256])
def test_several_tiles_in_every_direction(width: int, gated: bool, dtype: torch.dtype) -> None:
    """Large tiles in half precision, since 16 divides C and F; tiles are cut by M and C, and by F but at 256."""
    verify(dtype, (2, 75, 144), 256, width, gated=gated)


@pytest.mark.parametrize(
    ("shape", "size", "width"),
    [
        ((1, 1, 1), 1, 1),
        ((3, 5, 45), 7, 5),
        ((2, 64, 128), 128, 128),  # every tile is whole
        ((1, 33, 130), 67, 66),  # nothing is a multiple of 16
        ((1, 300, 16), 16, 9),  # many tokens for few weights: every program works on the same tile
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_shapes(shape: tuple[int, int, int], size: int, width: int, dtype: torch.dtype) -> None:
    verify(dtype, shape, size, width, bias=False)
    verify(dtype, shape, size, width, gated=True)


@pytest.mark.parametrize("width", [torch.tensor(5), torch.tensor(5, dtype=torch.int32), 5])
def test_widths_of_every_kind(width: Any) -> None:
    inputs, dy = make_inputs((1, 9, 16), 20), torch.ones(1, 9, 16)
    expected = run("reference", inputs, 5, dy, None)
    for found, want in zip(run("triton", inputs, width, dy, None), expected, strict=True):
        torch.testing.assert_close(found, want)


@pytest.mark.parametrize(("width", "nearest"), [(1000, 20), (-3, 0)])
def test_a_device_width_out_of_range_does_not_lead_out_of_the_buffers(width: int, nearest: int) -> None:
    inputs, dy = make_inputs((1, 9, 16), 20), torch.ones(1, 9, 16)
    expected = run("reference", inputs, nearest, dy, None)
    for found, want in zip(run("triton", inputs, torch.tensor(width), dy, None), expected, strict=True):
        torch.testing.assert_close(found, want)


def test_views_and_strides() -> None:
    """Transposed x, an expanded gradient, parts of larger or transposed weights, a column, one number repeated."""
    x, w1, b1, w2, b2 = make_inputs((9, 2, 24), 20)
    assert x is not None and w1 is not None and b1 is not None and w2 is not None and b2 is not None
    wide = torch.cat([w1, torch.full_like(w1, torch.nan)], 1)
    tall = torch.cat([w2.mT.contiguous(), torch.full_like(w2.mT, torch.nan)])
    column = torch.stack([b1, torch.full_like(b1, torch.nan)], 1)[:, 0]
    inputs: list[Any] = [x.transpose(0, 1), wide[:, :24], column, tall[:20].mT, b2[:1].expand(24)]
    leaves = [tensor.requires_grad_() for tensor in inputs]
    results = {}
    for name in ("triton", "reference"):
        with kernels.use(name):
            out = kernels.masked_mlp(*leaves, 13)
        results[name] = out, *torch.autograd.grad(out.sum(), leaves)
    for found, want in zip(*results.values(), strict=True):
        torch.testing.assert_close(found, want)


def test_operands_begin_at_multiples_of_16_bytes() -> None:
    """Whatever they are parts of: as the kernels expect that are compiled ahead of time."""
    leaves: list[Any] = [LAYOUTS["unaligned"](tensor).requires_grad_() for tensor in make_inputs((1, 9, 32), 48)]
    with kernels.use("triton"), watch(check_alignment):
        out = kernels.masked_mlp(*leaves, 16)
        found = torch.autograd.grad(out, leaves, LAYOUTS["unaligned"](torch.ones(out.shape)))
    for got, want in zip(found, run("reference", leaves, 16, torch.ones(out.shape), None)[1:], strict=True):
        torch.testing.assert_close(got, want)


def test_the_graph_of_a_gradient_keeps_the_scores_out() -> None:
    inputs = [None if tensor is None else tensor.requires_grad_() for tensor in make_inputs((1, 5, 16), 16)]
    scores = torch.zeros(16)
    with kernels.use("triton"):
        out = kernels.masked_mlp(*inputs, 8, scores=scores)
    torch.autograd.grad(out.sum(), inputs[:1], create_graph=True)
    assert bool(scores.any()) and not scores.requires_grad


@pytest.fixture
def launched() -> Iterator[list[str]]:
    with names_of_launches() as names:
        yield names


NEEDED = {
    "x": {"gradient", "linear"},
    "w1": {"gradient", "weight_gradient_kernel", "finish_kernel"},
    "b1": {"gradient", "sums_kernel"},
    "w2": {"weight_gradient_kernel", "finish_kernel"},
    "b2": {"column_sums_kernel", "sums_kernel"},
}


@pytest.mark.parametrize("count", [1, 2, 4])
def test_only_what_is_asked_for_is_computed(count: int, launched: list[str]) -> None:
    inputs: list[Any] = make_inputs((1, 5, 16), 20)
    everything = dict(zip(NAMES, run("triton", inputs, 5, torch.ones(1, 5, 16), None)[1:], strict=True))
    for chosen in itertools.combinations(NAMES, count):
        leaves = [t.detach().clone().requires_grad_(n in chosen) for n, t in zip(NAMES, inputs, strict=True)]
        scores = torch.zeros(20)
        with kernels.use("triton"):
            out = kernels.masked_mlp(*leaves, 5, scores=scores)
        launched.clear()
        out.backward(torch.ones_like(out))
        scored = not {"x", "w1", "b1"}.isdisjoint(chosen)
        assert set(launched) == set().union(*(NEEDED[name] for name in chosen), {"sums_kernel"} if scored else ())
        assert launched.count("weight_gradient_kernel") == len({"w1", "w2"} & set(chosen))
        assert bool(scores[:5].gt(0).all()) == scored
        for name, leaf in zip(NAMES, leaves, strict=True):
            if name in chosen:
                assert torch.equal(leaf.grad, everything[name])
            else:
                assert leaf.grad is None


def test_slopes_are_saved_for_gradients_that_need_them_alone() -> None:
    inputs = make_inputs((1, 5, 16), 20)
    saved: list[bool] = []

    def look(name: str, arguments: dict[str, Any]) -> None:
        if arguments.get("EPILOGUE") == "activate":
            saved.append(arguments["slopes"] is not None)

    with kernels.use("triton"), watch(look):
        assert kernels.masked_mlp(*inputs, 5).grad_fn is None
        inputs[3].requires_grad_()  # type: ignore[union-attr]
        kernels.masked_mlp(*inputs, 5)
        inputs[0].requires_grad_()  # type: ignore[union-attr]
        with torch.no_grad():
            kernels.masked_mlp(*inputs, 5)
        kernels.masked_mlp(*inputs, 5)
    assert saved == [False, False, False, True]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Multiplications of every dot product that the interpreter computes."""
    from triton.runtime.interpreter import InterpreterBuilder

    products: list[int] = []
    dot = InterpreterBuilder.create_dot

    def count(self: Any, a: Any, b: Any, *args: Any) -> Any:
        products.append(a.data.shape[0] * a.data.shape[1] * b.data.shape[1])
        return dot(self, a, b, *args)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", count)
    return products


@pytest.mark.parametrize("gated", [False, True])
def test_work_shrinks_with_the_width(gated: bool, counted: list[int]) -> None:
    inputs, dy = make_inputs((1, 8, 16), 512, gated=gated), torch.ones(1, 8, 16)
    work = {}
    for width in (512, 128, 0):
        counted.clear()
        run("triton", inputs, width, dy, None, gated=gated)
        work[width] = sum(counted)
    assert 0 < work[128] == work[512] // 4
    assert work[0] == 0


def test_runs_repeat_to_the_bit() -> None:
    inputs, dy = make_inputs((2, 70, 24), 72), torch.randn(2, 70, 24)
    scores = torch.zeros(2, 72)
    first = run("triton", inputs, 45, dy, scores[0])
    for found, again in zip(first, run("triton", inputs, 45, dy, scores[1]), strict=True):
        assert torch.equal(found, again)
    assert torch.equal(scores[0], scores[1])


def test_one_compilation_serves_every_width() -> None:
    inputs: list[Any] = [tensor.requires_grad_() for tensor in make_inputs((2, 5, 16), 20) if tensor is not None]
    scores, expected_scores = torch.zeros(20), torch.zeros(20)
    graphs: list[Any] = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    def call(width: torch.Tensor) -> torch.Tensor:
        return kernels.masked_mlp(*inputs, width, scores=scores)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    with kernels.use("triton"), torch._dynamo.config.patch(error_on_recompile=True):
        for m in range(20, 0, -1):
            width = torch.tensor(m, dtype=torch.int32)
            out = compiled(width)
            grads = torch.autograd.grad(out.pow(3).sum(), inputs)
            plain = kernels.masked_mlp(*inputs, width, scores=expected_scores)
            assert torch.equal(out, plain)
            for grad, want in zip(grads, torch.autograd.grad(plain.pow(3).sum(), inputs), strict=True):
                assert torch.equal(grad, want)
    assert len(graphs) == 1
    assert scores.gt(0).all() and torch.equal(scores, expected_scores)


@pytest.mark.parametrize("gated", [False, True])
def test_torch_library_accepts_the_operators(gated: bool) -> None:
    """With deterministic algorithms, what lies past the width repeats: opcheck compares whole saved buffers."""
    inputs = make_inputs((2, 5, 16), 20, gated=gated)
    width = torch.tensor(5, dtype=torch.int32)
    torch.use_deterministic_algorithms(True)
    try:
        leaves = [tensor.requires_grad_() for tensor in inputs if tensor is not None]
        torch.library.opcheck(operator.mlp_forward, (*leaves, width, None, "gelu", gated, True))
        x, w1, b1, w2, b2 = (tensor.detach() for tensor in leaves)
        torch.library.opcheck(operator.mlp_forward, (x, w1, None, w2, b2, width, None, "gelu", gated, False))
        y, *saved = operator.mlp_forward(x, w1, b1, w2, b2, width, None, "gelu", gated, True)
        for needs in ([True] * 6, [False, True, False, False, True, False]):
            torch.library.opcheck(operator.mlp_backward, (y, x, *saved, width, 20, gated, torch.float32, needs))
    finally:
        torch.use_deterministic_algorithms(False)


def test_one_buffer_of_scores_serves_several_passes() -> None:
    """Two forward passes before two backward passes: the first backward writes what the second needs."""
    inputs: Inputs = [None if t is None else t.requires_grad_() for t in make_inputs((1, 5, 16), 20)]
    results = []
    for name in ("triton", "reference"):
        scores = torch.zeros(20)
        with kernels.use(name):
            outs = [kernels.masked_mlp(*inputs, width, scores=scores) for width in (7, 20)]
        for out in outs:
            out.sum().backward()
        results.append(scores)
    torch.testing.assert_close(*results)


def test_autocast_casts_as_linear_does() -> None:
    inputs: list[Any] = make_inputs((1, 5, 16), 20)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    with kernels.use("triton"):
        with torch.autocast("cpu", dtype=torch.float16):
            found = kernels.masked_mlp(*leaves, 5)
        expected = kernels.masked_mlp(*(tensor.half() for tensor in leaves), 5)
    assert found.dtype == torch.float16 and torch.equal(found, expected)
    found.sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)


@triton.jit
def evaluate(z, value, slope, SIZE: tl.constexpr, ACT: tl.constexpr = "gelu_half"):  # type: ignore[no-untyped-def]
    """The activation alone."""
    i = tl.arange(0, SIZE)
    found = activate(tl.load(z + i), ACT)
    tl.store(value + i, found[0])
    tl.store(slope + i, found[1])


def test_the_half_precision_gelu() -> None:
    """Below bfloat16's roundoff of 2e-3, in value and slope, and far out below that of what was there before."""
    z = torch.linspace(-12, 12, 4096)
    value, slope = torch.zeros(2, 4096)
    evaluate[(1,)](z, value, slope, SIZE=4096)
    x = z.double().requires_grad_()
    exact = 0.5 * x * torch.special.erfc(-x * 0.5**0.5)  # 1 + erf would cancel in the tail
    (derivative,) = torch.autograd.grad(exact.sum(), x)
    error = (value - exact).abs()
    assert (error <= 7e-5).all() and (error <= 6.5e-4 * exact.abs())[x > -4].all()
    terms = 0.5 * torch.special.erfc(-z.double() * 0.5**0.5) + z.double().abs() * torch.exp(-0.5 * z.double() ** 2)
    error = (slope - derivative).abs()
    assert (error <= 3e-4).all() and (error <= 1e-3 * terms)[x > -4].all()


@pytest.mark.parametrize("act", ["gelu_half", "gelu_tanh", "quick_gelu", "silu"])
def test_activations_far_out(act: str) -> None:
    """Values that leave float16's range, and infinity: the identity on the right, zero on the left."""
    z = torch.tensor([-1e18, -1e10, -65504.0, -100.0, 100.0, 65504.0, 1e10, torch.inf])
    value, slope = torch.zeros(2, 8)
    evaluate[(1,)](z, value, slope, SIZE=8, ACT=act)
    assert torch.equal(value, torch.where(z > 0, z, 0.0))
    assert torch.equal(slope[:-1], (z > 0).float()[:-1])
