"""residual_norm's kernels on a CUDA device; skipped, with the reason, where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mlp_checks import relative_error
from norm_checks import NAMES, OF_A_BRANCH, PLAIN, check, make_inputs, run
from tolerances import kernel_tolerance

import skd_kernels as kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is False"),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KINDS = ("layer", "rms")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer that the operation makes is born full of NaN."""
    make = torch.Tensor.new_empty

    def filled(*args: Any, **kwargs: Any) -> torch.Tensor:
        return make(*args, **kwargs).fill_(torch.nan)

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)


def grads_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to("cuda", dtype) for _ in range(2)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(kind: str, dtype: torch.dtype) -> None:
    """Several turns of every program of the gradient kernel."""
    check(dtype, (16, 197, 768), kind, device="cuda")
    if dtype != torch.float32:
        check(dtype, (16, 197, 768), kind, device="cuda", mixed=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [192, 384, 768, 1152, 2048, 4096, 200, 45])
def test_real_sizes(channels: int, kind: str) -> None:
    """Between two layers, with the second one's bias or without, at the start of a network, and with all there is."""
    shape = (16, 197, channels)
    check(torch.bfloat16, shape, kind, device="cuda", mixed=True, without=OF_A_BRANCH)
    check(torch.bfloat16, shape, kind, device="cuda", mixed=True, without=("branch", *OF_A_BRANCH))
    check(torch.bfloat16, shape, kind, device="cuda", mixed=True, without=("scale", "mask"))
    check(torch.float32, shape, kind, device="cuda")
    check(torch.float32, shape, kind, device="cuda", width=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_shapes(dtype: torch.dtype) -> None:
    for shape in ((1, 1, 13), (3, 5, 45), (1, 3001, 17), (7, 1, 130)):
        check(dtype, shape, "layer", device="cuda")
        check(dtype, shape, "rms", device="cuda", without=("weight", "bias", "mask"))


def test_runs_repeat_to_the_bit() -> None:
    inputs, grads = make_inputs((64, 197, 384), torch.bfloat16, device="cuda"), grads_of((64, 197, 384))
    first, again = (run("triton", inputs, "layer", grads) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_it_is_chosen_and_never_stops_the_host() -> None:
    inputs = make_inputs((2, 50, 64), device="cuda")
    assert kernels.explain("residual_norm", **inputs, eps=1e-6).chosen == "triton"
    leaves = {name: value.requires_grad_(name not in PLAIN) for name, value in inputs.items()}

    def step() -> None:
        total, normed = kernels.residual_norm(**leaves, eps=1e-6)
        (total.sum() + normed.sum()).backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", KINDS)
def test_torch_compile_gives_the_same(kind: str) -> None:
    inputs = make_inputs((4, 50, 64), torch.bfloat16, stream=torch.float32, device="cuda")
    leaves = {name: value.requires_grad_(name not in PLAIN) for name, value in inputs.items()}
    grads = grads_of((4, 50, 64))
    torch._dynamo.reset()
    compiled = torch.compile(kernels.residual_norm, fullgraph=True)
    results = []
    for call in (compiled, kernels.residual_norm):
        with torch.autocast("cuda", torch.bfloat16):
            out = call(**leaves, eps=1e-6, kind=kind)
        given = [grad.to(value.dtype) for grad, value in zip(grads, out, strict=True)]
        results.append([*out, *torch.autograd.grad(out, [leaves[name] for name in NAMES], given)])
    for found, want in zip(*results, strict=True):
        assert torch.equal(found, want)


def test_one_cuda_graph_replays_every_mask_and_width() -> None:
    """Forward and backward; the dropped images, and whether the branch counts, change between replays."""
    inputs = make_inputs((4, 50, 64), torch.bfloat16, stream=torch.float32, device="cuda")
    leaves = {name: value.requires_grad_(name not in PLAIN) for name, value in inputs.items()}
    given = grads_of((4, 50, 64))

    def step() -> list[torch.Tensor]:
        out = kernels.residual_norm(**leaves, eps=1e-6)
        return [*out, *torch.autograd.grad(out, [leaves[name] for name in NAMES], given)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for mask in ((0, 0, 0, 0), (1, 0, 2, 0), (1.25, 1.25, 1.25, 1.25)):
        leaves["mask"].copy_(torch.tensor(mask, dtype=torch.float32))
        for width in (3, 0):
            leaves["branch_width"].fill_(width)
            graph.replay()
            for found, want in zip(results, step(), strict=True):
                assert torch.equal(found, want)


@pytest.mark.xdist_group("memory")
def test_more_than_two_billion_elements() -> None:
    """Places of rows are 64-bit, in both kernels."""
    if torch.cuda.mem_get_info()[0] < 48 * 2**30:
        pytest.skip("needs 48 GiB of device memory")
    rows, channels = 2**20 + 64, 2048
    branch = torch.randn(1, rows, channels, dtype=torch.bfloat16, device="cuda").requires_grad_()
    x = torch.zeros(1, 1, channels, dtype=torch.bfloat16, device="cuda").expand(1, rows, channels)
    out = kernels.residual_norm(x, branch, None, None, eps=1e-6)[1]
    (found,) = torch.autograd.grad(out, branch, branch.detach())
    last = branch.detach()[:, -64:].clone().requires_grad_()
    want = kernels.residual_norm(x[:, -64:], last, None, None, eps=1e-6)[1]
    assert torch.equal(out[:, -64:], want)
    (expected,) = torch.autograd.grad(want, last, last.detach())
    assert relative_error(found[:, -64:], expected) <= kernel_tolerance(0, torch.bfloat16)
