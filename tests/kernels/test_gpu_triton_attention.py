"""masked_attention's kernels on a CUDA device; skipped, with the reason, where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_checks import check, make_inputs, relative_error, run
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
    make, make_like = torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: make(*args, **kwargs).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: make_like(*args, **kwargs).fill_(torch.nan))
    before, torch.backends.cuda.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision, "ieee"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("head_dim", [16, 32, 40, 64, 72, 80, 128])
def test_head_widths(head_dim: int, bias: bool, dtype: torch.dtype) -> None:
    for width in sorted({0, 1, 8, 16, 17, head_dim // 2, head_dim - 1, head_dim}):
        if width <= head_dim:
            check(dtype, (2, 75, 144), 3, head_dim, width, bias=bias, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("channels", "heads", "head_dim", "tokens"),
    [(192, 3, 64, 197), (768, 12, 64, 197), (1024, 16, 64, 577), (1152, 16, 72, 256), (384, 6, 64, 1370)],
)
def test_real_sizes(channels: int, heads: int, head_dim: int, tokens: int, dtype: torch.dtype) -> None:
    for width in (8, head_dim // 4, head_dim // 2, head_dim):
        check(dtype, (4, tokens, channels), heads, head_dim, width, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_shapes(dtype: torch.dtype) -> None:
    for shape, heads, head_dim, width in [
        ((1, 3, 4), 1, 1, 1),
        ((3, 5, 45), 3, 15, 15),
        ((3, 5, 45), 5, 9, 7),
        ((1, 33, 130), 1, 20, 3),
        ((2, 3000, 16), 2, 8, 5),
        ((70_000, 3, 16), 2, 8, 8),  # more images than a grid's second dimension holds
    ]:
        check(dtype, shape, heads, head_dim, width, device="cuda")


@pytest.mark.parametrize("scale", [0.0, -0.3, 20.0])
def test_scales(scale: float) -> None:
    check(torch.float32, (2, 100, 48), 3, 16, 11, scale=scale, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_core_is_as_exact_as_the_library(dtype: torch.dtype) -> None:
    """`attend` alone against F.scaled_dot_product_attention, at full width."""
    from skd_kernels.gpu.flash import attend

    images, tokens, heads, head_dim = 8, 197, 6, 64
    inner = heads * head_dim
    packed = torch.randn(images * tokens, 3 * inner, device="cuda").to(dtype)
    q, k, v = packed.view(images, tokens, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
    out = torch.empty_like(packed[:, :inner])
    logsumexp = torch.empty(images, heads, tokens, device="cuda")
    width = torch.tensor(head_dim, dtype=torch.int32, device="cuda")
    attend(packed, out, logsumexp, width, head_dim, head_dim**-0.5)
    found = out.view(images, tokens, heads, head_dim).transpose(1, 2)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    library = relative_error(F.scaled_dot_product_attention(q, k, v), exact)
    logit = float((q.double() @ k.double().mT * head_dim**-0.5).abs().max())
    assert relative_error(found, exact) <= kernel_tolerance(library, dtype, terms=tokens, logit=logit)
    sums = (q.double() @ k.double().mT * head_dim**-0.5).logsumexp(-1) / torch.tensor(2.0).log()
    torch.testing.assert_close(logsumexp.double(), sums, rtol=1e-4, atol=1e-3)


def test_tf32_where_pytorch_allows_it() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    inputs = make_inputs((8, 197, 384), 6, 64, device="cuda")
    dy = torch.ones(8, 197, 384, device="cuda")
    exact = run("reference", [None if t is None else t.double() for t in inputs], 40, 6, dy, None)
    found = run("triton", inputs, 40, 6, dy, None)
    errors = [relative_error(got, want) for got, want in zip(found, exact, strict=True)]
    assert max(errors) <= 8 * 2.0**-11
    assert max(errors) > 1e-5  # it is TF32


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("width", [0, 40, 64])
def test_runs_repeat_to_the_bit_and_an_int_is_a_device_width(width: int, deterministic: bool) -> None:
    inputs = make_inputs((16, 197, 384), 6, 64, dtype=torch.bfloat16, device="cuda")
    dy = torch.randn(16, 197, 384, device="cuda")
    scores = torch.zeros(3, 3, 6, 64, device="cuda")
    torch.use_deterministic_algorithms(deterministic)
    try:
        first = run("triton", inputs, width, 6, dy, scores[0])
        again = run("triton", inputs, width, 6, dy, scores[1])
        device = run("triton", inputs, torch.tensor(width, device="cuda"), 6, dy, scores[2])
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b, c in zip(first, again, device, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert torch.equal(scores[0], scores[1]) and torch.equal(scores[0], scores[2])


def test_a_device_width_never_stops_the_host() -> None:
    inputs: list[Any] = [t.requires_grad_() for t in make_inputs((2, 50, 64), 2, 32, device="cuda") if t is not None]
    width = torch.tensor(20, dtype=torch.int32, device="cuda")
    assert kernels.explain("masked_attention", *inputs, width, num_heads=2).chosen == "triton"
    kernels.masked_attention(*inputs, width, num_heads=2).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernels.masked_attention(*inputs, width, num_heads=2).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_width_from_a_table_needs_no_second_compilation() -> None:
    """Elements of an int32 table start at any multiple of 4 bytes; a compilation inside a captured graph may fail."""
    from skd_kernels.gpu.flash import flash_forward

    inputs: list[Any] = make_inputs((2, 50, 64), 2, 32, device="cuda")
    table = torch.tensor([32, 24, 16, 8, 20], dtype=torch.int32, device="cuda")
    with torch.no_grad():
        kernels.masked_attention(*inputs, table[0], num_heads=2)
        before = len(flash_forward.device_caches[torch.cuda.current_device()][0])
        for width in table:
            kernels.masked_attention(*inputs, width, num_heads=2)
    assert len(flash_forward.device_caches[torch.cuda.current_device()][0]) == before


def test_one_compilation_serves_every_width() -> None:
    inputs: list[Any] = make_inputs((4, 50, 64), 2, 40, dtype=torch.bfloat16, device="cuda")
    leaves = [tensor.requires_grad_() for tensor in inputs]
    torch._dynamo.reset()
    scores, expected_scores = torch.zeros(2, 3, 2, 40, device="cuda")
    compiled = torch.compile(
        lambda width: kernels.masked_attention(*leaves, width, num_heads=2, scores=scores), fullgraph=True
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for k in range(0, 41, 4):
            width = torch.tensor(k, dtype=torch.int32, device="cuda")
            found = compiled(width)
            grads = torch.autograd.grad(found.pow(2).sum(), leaves)
            expected = kernels.masked_attention(*leaves, width, num_heads=2, scores=expected_scores)
            assert torch.equal(found, expected)
            for grad, want in zip(grads, torch.autograd.grad(expected.pow(2).sum(), leaves), strict=True):
                assert torch.equal(grad, want)
    assert torch.equal(scores, expected_scores)


def test_one_cuda_graph_replays_every_width() -> None:
    """Forward and backward; the width, and nothing else, changes between replays."""
    inputs: list[Any] = make_inputs((4, 50, 64), 2, 40, dtype=torch.bfloat16, device="cuda")
    leaves = [tensor.requires_grad_() for tensor in inputs]
    width = torch.tensor(40, dtype=torch.int32, device="cuda")
    dy = torch.randn(4, 50, 64, device="cuda").bfloat16()

    def step() -> list[torch.Tensor]:
        out = kernels.masked_attention(*leaves, width, num_heads=2)
        return [out, *torch.autograd.grad(out, leaves, dy)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for k in (40, 0, 8, 23, 40):
        width.fill_(k)
        graph.replay()
        for found, want in zip(results, run("triton", inputs, k, 2, dy, None), strict=True):
            assert torch.equal(found, want)


@pytest.mark.xdist_group("memory")
def test_more_than_two_billion_packed_elements() -> None:
    """Token offsets are 64-bit."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of device memory")
    images, tokens, heads, head_dim = 2**14 + 1, 64, 11, 64  # 2^31 elements and more in qkv
    x, w_qkv, b_qkv, w_proj, b_proj = make_inputs(
        (images, tokens, 16), heads, head_dim, dtype=torch.bfloat16, device="cuda"
    )
    assert x is not None and 3 * heads * head_dim * images * tokens > 2**31
    with torch.no_grad(), kernels.use("triton"):
        found = kernels.masked_attention(x, w_qkv, b_qkv, w_proj, b_proj, head_dim, num_heads=heads)[-1:]
        want = kernels.masked_attention(x[-1:], w_qkv, b_qkv, w_proj, b_proj, head_dim, num_heads=heads)
    assert relative_error(found, want) <= kernel_tolerance(0, torch.bfloat16)
