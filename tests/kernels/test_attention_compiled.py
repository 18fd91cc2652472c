"""masked_attention by the compiled CPU kernel, against the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import Attention, check

import skd_kernels as kernels


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [0, 1, 7, 8, 16, 24, 40])
def test_attention(width: int, bias: bool) -> None:
    check(Attention((2, 135, 24), full=40, heads=3, bias=bias), width, "compiled")


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(2, 150),
    heads=st.integers(1, 3),
    dims=st.integers(1, 70),
    part=st.floats(0, 1),
    scale=st.sampled_from([None, 0.05, -0.3]),
)
def test_attention_of_any_shape(batch: int, tokens: int, heads: int, dims: int, part: float, scale: Any) -> None:
    shape, width = (batch, tokens, 24), round(part * dims)
    check(Attention(shape, full=dims, heads=heads, scale=scale), width, "compiled")


def test_nan_reaches_its_image_and_no_other() -> None:
    x, *parameters = Attention((2, 70, 24), full=16, heads=2).inputs().values()
    x[1, 3, 2] = float("nan")
    with kernels.use("compiled"):
        out = kernels.masked_attention(x, *parameters, 8, num_heads=2)
    assert out[0].isfinite().all() and out[1].isnan().all()


def test_large_logits_do_not_overflow() -> None:
    x, *parameters = Attention((1, 40, 24), full=16, heads=2).inputs().values()
    with kernels.use("compiled"):
        out = kernels.masked_attention(300 * x, *parameters, 16, num_heads=2)
    assert out.isfinite().all()


def test_same_bits_for_any_number_of_threads() -> None:
    x, *parameters = Attention((3, 90, 24), full=16, heads=2).inputs().values()
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        scores = torch.zeros(3, 2, 16)
        own = x.detach().clone().requires_grad_()
        with kernels.use("compiled"):
            kernels.masked_attention(own, *parameters, 8, num_heads=2, scores=scores).sum().backward()
        found.append(torch.cat([own.grad.flatten(), scores.flatten()]))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])


def test_when_it_is_chosen() -> None:
    shapes = (2, 5, 24), (96, 24), None, (24, 32), None

    def why(width: Any, **options: Any) -> str:
        explained = kernels.explain("masked_attention", *shapes, width, num_heads=2, **options)
        return "" if explained.chosen == "compiled" else explained.refused["compiled"]

    assert why(7) == why(torch.tensor(7)) == ""
    assert why(7, dtype=torch.float64) == "there is no kernel for torch.float64"
    assert why(7, device="cuda") == "there is no kernel for cuda"
    assert "all queries" in why(7, queries=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert why(7) == "there is no kernel for torch.bfloat16"


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # PyTorch's of its own attention
def test_transforms_of_functions_go_another_way() -> None:
    """torch.func sees PyTorch's own operations, not the kernel."""
    images, *parameters = Attention((3, 5, 24), full=8, heads=2).inputs().values()
    images, *parameters = (tensor.detach() for tensor in (images, *parameters))

    def attend(x: torch.Tensor) -> torch.Tensor:
        return kernels.masked_attention(x, *parameters, 8, num_heads=2)

    one_by_one = torch.func.vmap(lambda image: attend(image[None])[0])(images)
    torch.testing.assert_close(one_by_one, attend(images))
    own = images.clone().requires_grad_()
    (grad,) = torch.autograd.grad(attend(own).square().sum(), own)
    torch.testing.assert_close(torch.func.grad(lambda x: attend(x).square().sum())(images), grad)


@pytest.mark.parametrize("linear", [True, False])
def test_a_second_derivative_is_refused(linear: bool) -> None:
    """Also where the incoming gradient is a constant."""
    x, *parameters = Attention((1, 5, 24), full=8, heads=2).inputs().values()
    own = x.detach().clone().requires_grad_()
    out = kernels.masked_attention(own, *parameters, 8, num_heads=2)
    (grad,) = torch.autograd.grad((out if linear else out.square()).sum(), own, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.square().sum().backward()


def test_shapes_without_values() -> None:
    """What tracing sees is what the kernel gives."""
    operations = torch.ops.skd_kernels
    qkv = torch.randn(2, 5, 3, 2, 8)
    out, sums = operations.attention(qkv, 0.3)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(operations.attention.default, (qkv, 0.3), test_utils=tests)
    torch.library.opcheck(operations.attention_backward.default, (out, qkv, out, sums, 0.3), test_utils=tests)


@pytest.mark.parametrize("tensor", [torch.zeros(2, 3).double(), torch.zeros(3, 2).T])
def test_the_kernel_checks_what_it_is_given(tensor: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match="float32 and contiguous"):
        torch.ops.skd_kernels.attention(tensor, 1.0)
