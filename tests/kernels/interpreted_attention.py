"""masked_attention's Triton kernels, interpreted on the CPU; test_triton_attention.py runs this in its own process.

Shapes are tiny, yet every loop takes several turns: the interpreter's device has three programs. Half precision is
float16, because the interpreter's bfloat16 products are wrong.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from attention_checks import NAMES, check, make_inputs, relative_error, run
from layouts import LAYOUTS
from tolerances import UNIT_ROUNDOFF, kernel_tolerance
from watched_launches import check_alignment, names_of_launches

import skd_kernels as kernels
from skd_kernels.gpu import attention as operator
from skd_kernels.gpu.launch import watch

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

    def poison(make: Any) -> Any:
        def filled(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return filled

    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))


def verify(dtype: torch.dtype, shape: tuple[int, int, int], heads: int, size: int, width: int, **kwargs: Any) -> None:
    for name, (error, plain) in check(dtype, shape, heads, size, width, **kwargs).items():
        largest = ERRORS.setdefault(f"{dtype} {name}", [0.0, 0.0])
        largest[:] = max(largest[0], error), max(largest[1], plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [0, 8, 13, 16])
def test_heads_of_16(width: int, dtype: torch.dtype) -> None:
    verify(dtype, (2, 17, 24), 3, 16, width)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [0, 8, 33, 40])
def test_heads_of_40(width: int, dtype: torch.dtype) -> None:
    verify(dtype, (1, 65, 48), 2, 40, width, bias=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [29, 64])
def test_heads_of_64(width: int, dtype: torch.dtype) -> None:
    verify(dtype, (1, 65, 32), 2, 64, width)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [17, 101])
def test_heads_of_128(width: int, dtype: torch.dtype) -> None:
    verify(dtype, (1, 17, 32), 1, 128, width)


@pytest.mark.parametrize(
    ("shape", "heads", "head_dim", "width"),
    [
        ((1, 1, 1), 1, 1, 1),
        ((3, 5, 45), 3, 15, 15),  # nothing is a multiple of 8
        ((3, 5, 45), 5, 9, 7),
        ((1, 33, 130), 1, 20, 3),
        ((3, 70, 16), 1, 8, 5),
    ],
)
def test_odd_shapes(shape: tuple[int, int, int], heads: int, head_dim: int, width: int) -> None:
    verify(torch.float32, shape, heads, head_dim, width)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_token(dtype: torch.dtype) -> None:
    """Its only probability is 1, so q and k get no gradient but what rounding leaves.

    That is the difference of one sum of 11 products in two orders, 11 roundings each.
    """
    shape, heads = (2, 1, 24), 3
    inputs, dy = make_inputs(shape, heads, 16, dtype=dtype), torch.ones(shape, dtype=dtype)
    exact = [None if tensor is None else tensor.double() for tensor in inputs]
    expected, plain, found = (
        run(name, tensors, 11, heads, dy, None)
        for name, tensors in (("reference", exact), ("slices", inputs), ("triton", inputs))
    )
    names = ("out", *NAMES)
    for name, got, other, want in zip(names, found, plain, expected, strict=True):
        assert relative_error(got, want) <= kernel_tolerance(relative_error(other, want), dtype), name
    queries_and_keys, values = found[2][: 2 * heads * 16], found[2][2 * heads * 16 :]
    assert queries_and_keys.norm() <= 22 * UNIT_ROUNDOFF[dtype] * values.norm()


@pytest.mark.parametrize("scale", [0.0, -0.3, 20.0])
def test_scales(scale: float) -> None:
    """Zero (a plain mean), negative, and so large that all but one of the probabilities underflow."""
    verify(torch.float32, (1, 40, 24), 2, 16, 11, scale=scale)


@pytest.mark.parametrize("width", [torch.tensor(5), torch.tensor(5, dtype=torch.int32), 5])
def test_widths_of_every_kind(width: Any) -> None:
    inputs, dy = make_inputs((1, 9, 16), 2, 8), torch.ones(1, 9, 16)
    expected = run("reference", inputs, 5, 2, dy, None)
    for found, want in zip(run("triton", inputs, width, 2, dy, None), expected, strict=True):
        torch.testing.assert_close(found, want)


def test_views_and_strides() -> None:
    """Transposed x, an expanded gradient, weights that are parts of larger ones, a column, one number."""
    x, w_qkv, b_qkv, w_proj, b_proj = make_inputs((9, 2, 24), 2, 8)
    assert x is not None and w_qkv is not None and b_qkv is not None and w_proj is not None and b_proj is not None
    wide = torch.cat([w_qkv, torch.full_like(w_qkv, torch.nan)], 1)
    tall = torch.cat([w_proj.mT.contiguous(), torch.full_like(w_proj.mT, torch.nan)])
    column = torch.stack([b_qkv, torch.full_like(b_qkv, torch.nan)], 1)[:, 0]
    inputs: list[Any] = [x.transpose(0, 1), wide[:, :24], column, tall[:16].mT, b_proj[:1].expand(24)]
    leaves = [tensor.requires_grad_() for tensor in inputs]
    results = {}
    for name in ("triton", "reference"):
        with kernels.use(name):
            out = kernels.masked_attention(*leaves, 6, num_heads=2)
        results[name] = out, *torch.autograd.grad(out.sum(), leaves)
    for found, want in zip(*results.values(), strict=True):
        torch.testing.assert_close(found, want)


def test_operands_begin_at_multiples_of_16_bytes() -> None:
    """Every operand begins at a multiple of 16 bytes, even a view, as kernels compiled ahead of time assume."""
    leaves: list[Any] = [LAYOUTS["unaligned"](tensor).requires_grad_() for tensor in make_inputs((1, 9, 32), 2, 16)]
    with kernels.use("triton"), watch(check_alignment):
        out = kernels.masked_attention(*leaves, 8, num_heads=2)
        found = torch.autograd.grad(out, leaves, LAYOUTS["unaligned"](torch.ones(out.shape)))
    for got, want in zip(found, run("reference", leaves, 8, 2, torch.ones(out.shape), None)[1:], strict=True):
        torch.testing.assert_close(got, want)


def test_the_graph_of_a_gradient_keeps_the_scores_out() -> None:
    inputs = [None if tensor is None else tensor.requires_grad_() for tensor in make_inputs((1, 5, 16), 2, 8)]
    scores = torch.zeros(3, 2, 8)
    with kernels.use("triton"):
        out = kernels.masked_attention(*inputs, 8, num_heads=2, scores=scores)
    torch.autograd.grad(out.sum(), inputs[:1], create_graph=True)
    assert bool(scores.any()) and not scores.requires_grad


@pytest.fixture
def launched() -> Iterator[list[str]]:
    with names_of_launches() as names:
        yield names


NEEDED = {
    "x": {"linear", "flash_backward"},
    "w_qkv": {"linear", "flash_backward", "weight_gradient_kernel", "finish_kernel"},
    "b_qkv": {"linear", "flash_backward", "add_terms"},
    "w_proj": {"weight_gradient_kernel", "finish_kernel"},
    "b_proj": {"column_sums_kernel", "sums_kernel"},
}


@pytest.mark.parametrize("count", [1, 2, 4])
def test_only_what_is_asked_for_is_computed(count: int, launched: list[str]) -> None:
    inputs: list[Any] = make_inputs((1, 5, 16), 2, 8)
    everything = dict(zip(NAMES, run("triton", inputs, 5, 2, torch.ones(1, 5, 16), None)[1:], strict=True))
    for chosen in itertools.combinations(NAMES, count):
        leaves = [t.detach().clone().requires_grad_(n in chosen) for n, t in zip(NAMES, inputs, strict=True)]
        scores = torch.zeros(3, 2, 8)
        with kernels.use("triton"):
            out = kernels.masked_attention(*leaves, 5, num_heads=2, scores=scores)
        launched.clear()
        out.backward(torch.ones_like(out))
        expected = set().union(*(NEEDED[name] for name in chosen))
        scored = not {"x", "w_qkv", "b_qkv"}.isdisjoint(chosen)
        assert set(launched) == (expected | {"add_terms"} if scored else expected)
        assert launched.count("linear") == scored + ("x" in chosen)  # the gradients at o and at x
        assert bool(scores[..., :5].gt(0).all()) == scored
        for name, leaf in zip(NAMES, leaves, strict=True):
            if name in chosen:
                assert torch.equal(leaf.grad, everything[name])
            else:
                assert leaf.grad is None


def test_nothing_is_saved_without_gradients() -> None:
    inputs = make_inputs((1, 5, 16), 2, 8)
    with kernels.use("triton"):
        assert kernels.masked_attention(*inputs, 5, num_heads=2).grad_fn is None


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Multiplications of every dot product that the interpreter computes."""
    from triton.runtime.interpreter import InterpreterBuilder

    products: list[int] = []
    dot = InterpreterBuilder.create_dot

    def count(self: Any, a: Any, b: Any, *args: Any) -> Any:
        products.append(a.data.shape[0] * a.data.shape[1] * b.data.shape[1])
        return dot(self, a, b, *args)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", count)
    yield products


def test_work_shrinks_with_the_width(counted: list[int]) -> None:
    """To a quarter, in whole tiles of 64."""
    inputs, dy = make_inputs((1, 8, 16), 4, 64), torch.ones(1, 8, 16)
    work = {}
    for width in (64, 16, 0):
        counted.clear()
        run("triton", inputs, width, 4, dy, None)
        work[width] = sum(counted)
    assert 0 < work[16] <= 0.25 * work[64]
    assert work[0] == 0


def test_runs_repeat_to_the_bit() -> None:
    inputs, dy = make_inputs((2, 40, 24), 3, 16), torch.randn(2, 40, 24)
    scores = torch.zeros(2, 3, 3, 16)
    first = run("triton", inputs, 11, 3, dy, scores[0])
    for found, again in zip(first, run("triton", inputs, 11, 3, dy, scores[1]), strict=True):
        assert torch.equal(found, again)
    assert torch.equal(scores[0], scores[1])


def test_one_compilation_serves_every_width() -> None:
    inputs: list[Any] = [t.requires_grad_() for t in make_inputs((2, 5, 16), 2, 8) if t is not None]
    scores, expected_scores = torch.zeros(3, 2, 8), torch.zeros(3, 2, 8)
    graphs: list[Any] = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    def call(width: torch.Tensor) -> torch.Tensor:
        return kernels.masked_attention(*inputs, width, num_heads=2, scores=scores)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    with kernels.use("triton"), torch._dynamo.config.patch(error_on_recompile=True):
        for width in (0, 1, 5, 8):
            out = compiled(torch.tensor(width, dtype=torch.int32))
            grads = torch.autograd.grad(out.pow(3).sum(), inputs)
            plain = kernels.masked_attention(
                *inputs, torch.tensor(width, dtype=torch.int32), num_heads=2, scores=expected_scores
            )
            assert torch.equal(out, plain)
            for grad, want in zip(grads, torch.autograd.grad(plain.pow(3).sum(), inputs), strict=True):
                assert torch.equal(grad, want)
    assert len(graphs) == 1
    assert scores.gt(0).all() and torch.equal(scores, expected_scores)


@pytest.mark.parametrize("width", [8, 5])
def test_torch_library_accepts_the_operators(width: int) -> None:
    """With deterministic algorithms, what lies past the width repeats: opcheck compares whole saved buffers."""
    inputs = make_inputs((2, 5, 16), 2, 8)
    count = torch.tensor(width, dtype=torch.int32)
    torch.use_deterministic_algorithms(True)
    try:
        leaves = [tensor.requires_grad_() for tensor in inputs if tensor is not None]
        torch.library.opcheck(operator.attention_forward, (*leaves, count, None, 2, 0.3))
        x, w_qkv, b_qkv, w_proj, b_proj = (tensor.detach() for tensor in leaves)
        out, *saved = operator.attention_forward(x, w_qkv, b_qkv, w_proj, b_proj, count, None, 2, 0.3)
        for needs in ([True] * 6, [False, True, False, False, True, False]):
            call = (out, x, *saved, count, 8, 0.3, torch.float32, needs)
            torch.library.opcheck(operator.attention_backward, call)
    finally:
        torch.use_deterministic_algorithms(False)


def test_autocast_casts_as_linear_does() -> None:
    inputs: list[Any] = make_inputs((1, 5, 16), 2, 8)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    with kernels.use("triton"):
        with torch.autocast("cpu", dtype=torch.float16):
            found = kernels.masked_attention(*leaves, 5, num_heads=2)
        expected = kernels.masked_attention(*(tensor.half() for tensor in leaves), 5, num_heads=2)
    assert found.dtype == torch.float16 and torch.equal(found, expected)
    found.sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)


def test_an_image_with_nan_does_not_reach_the_others() -> None:
    inputs: list[Any] = make_inputs((3, 17, 24), 2, 8)
    clean = run("triton", inputs, 5, 2, torch.ones(3, 17, 24), None)[:2]
    inputs[0][1, 3] = torch.nan
    found = run("triton", inputs, 5, 2, torch.ones(3, 17, 24), None)[:2]
    for got, want in zip(found, clean, strict=True):
        assert got[1].isnan().any()
        assert torch.equal(got[[0, 2]], want[[0, 2]])
