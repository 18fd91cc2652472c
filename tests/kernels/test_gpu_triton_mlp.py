"""masked_mlp's kernels on a CUDA device; skipped, with the reason, where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from mlp_checks import check, make_inputs, relative_error, run
from tolerances import kernel_tolerance

import skd_kernels as kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is False"),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every buffer that the operation makes is born full of NaN, and float32 is float32."""
    make = torch.Tensor.new_empty

    def filled(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = make(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)
    before, torch.backends.cuda.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision, "ieee"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "quick_gelu", "silu"])
def test_activations(act: str, gated: bool, dtype: torch.dtype) -> None:
    for width in (0, 8, 45, 200, 256):
        check(dtype, (2, 75, 144), 256, width, act=act, gated=gated, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "hidden"), [(192, 768), (384, 1536), (768, 3072), (1152, 4304), (200, 500)])
def test_real_sizes(channels: int, hidden: int, dtype: torch.dtype) -> None:
    for width in (1, hidden // 4, hidden // 2 + 3, hidden):
        check(dtype, (8, 197, channels), hidden, width, device="cuda")
        check(dtype, (3, 197, channels), hidden, width, device="cuda", bias=False, gated=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_shapes(dtype: torch.dtype) -> None:
    cases = [((1, 1, 1), 1, 1), ((3, 5, 45), 7, 5), ((1, 33, 130), 67, 66), ((1, 3000, 16), 16, 9)]
    for shape, hidden, width in cases:
        check(dtype, shape, hidden, width, device="cuda")


def test_tf32_where_pytorch_allows_it() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    inputs = make_inputs((8, 197, 384), 1536, device="cuda")
    dy = torch.ones(8, 197, 384, device="cuda")
    exact = run("reference", [None if t is None else t.double() for t in inputs], 700, dy, None)
    plain, found = run("slices", inputs, 700, dy, None), run("triton", inputs, 700, dy, None)
    errors = [relative_error(got, want) for got, want in zip(found, exact, strict=True)]
    for error, other, want in zip(errors, plain, exact, strict=True):
        assert error <= 2 * relative_error(other, want) + 2 * 2.0**-10  # two operands, cut off after 10 bits
    assert max(errors) > 1e-5  # it is TF32


@pytest.mark.parametrize("width", [0, 700, 1536])
def test_runs_repeat_to_the_bit_and_an_int_is_a_device_width(width: int) -> None:
    inputs = make_inputs((16, 197, 384), 1536, dtype=torch.bfloat16, device="cuda")
    dy = torch.randn(16, 197, 384, device="cuda")
    scores = torch.zeros(3, 1536, device="cuda")
    first = run("triton", inputs, width, dy, scores[0])
    again = run("triton", inputs, width, dy, scores[1])
    device = run("triton", inputs, torch.tensor(width, device="cuda"), dy, scores[2])
    for a, b, c in zip(first, again, device, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert torch.equal(scores[0], scores[1]) and torch.equal(scores[0], scores[2])


def test_a_device_width_never_stops_the_host() -> None:
    inputs: list[Any] = [t.requires_grad_() for t in make_inputs((2, 50, 64), 128, device="cuda") if t is not None]
    width = torch.tensor(70, dtype=torch.int32, device="cuda")
    assert kernels.explain("masked_mlp", *inputs, width).chosen == "triton"
    kernels.masked_mlp(*inputs, width).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernels.masked_mlp(*inputs, width).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_one_compilation_serves_every_width() -> None:
    inputs: list[Any] = make_inputs((4, 50, 64), 160, dtype=torch.bfloat16, device="cuda")
    leaves = [tensor.requires_grad_() for tensor in inputs]
    torch._dynamo.reset()
    scores, expected_scores = torch.zeros(2, 160, device="cuda")
    compiled = torch.compile(lambda width: kernels.masked_mlp(*leaves, width, scores=scores), fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for m in range(0, 161, 8):
            width = torch.tensor(m, dtype=torch.int32, device="cuda")
            found = compiled(width)
            grads = torch.autograd.grad(found.pow(2).sum(), leaves)
            expected = kernels.masked_mlp(*leaves, width, scores=expected_scores)
            assert torch.equal(found, expected)
            for grad, want in zip(grads, torch.autograd.grad(expected.pow(2).sum(), leaves), strict=True):
                assert torch.equal(grad, want)
    assert torch.equal(scores, expected_scores)


def test_one_cuda_graph_replays_every_width() -> None:
    """Forward and backward; the width, and nothing else, changes between replays."""
    inputs: list[Any] = make_inputs((4, 50, 64), 160, dtype=torch.bfloat16, device="cuda")
    leaves = [tensor.requires_grad_() for tensor in inputs]
    width = torch.tensor(160, dtype=torch.int32, device="cuda")
    dy = torch.randn(4, 50, 64, device="cuda").bfloat16()

    def step() -> list[torch.Tensor]:
        out = kernels.masked_mlp(*leaves, width)
        return [out, *torch.autograd.grad(out, leaves, dy)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for m in (160, 0, 8, 77, 160):
        width.fill_(m)
        graph.replay()
        for found, want in zip(results, run("triton", inputs, m, dy, None), strict=True):
            assert torch.equal(found, want)


@pytest.mark.xdist_group("memory")
def test_more_than_two_billion_hidden_features() -> None:
    """Row offsets of z and h are 64-bit."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of device memory")
    tokens, hidden, width = 2**20 + 64, 2048, 2048
    x, w1, b1, w2, b2 = make_inputs((1, tokens, 16), hidden, dtype=torch.bfloat16, device="cuda")
    assert x is not None
    with torch.no_grad(), kernels.use("triton"):
        found = kernels.masked_mlp(x, w1, b1, w2, b2, width)[:, -64:]
        want = kernels.masked_mlp(x[:, -64:], w1, b1, w2, b2, width)
    assert relative_error(found, want) <= kernel_tolerance(0, torch.bfloat16)
