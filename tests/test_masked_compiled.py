"""masked_mlp and masked_attention by the compiled CPU kernels, against the float64 reference."""

from __future__ import annotations

from typing import Any

import attention_checks
import mlp_checks
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import skd_kernels as kernels
from skd_kernels import _native


def mlp_parameters() -> list[Any]:
    return mlp_checks.make_inputs((1, 1, 24), 40)[1:]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [0, 1, 8, 33, 70])
def test_mlp(width: int, bias: bool) -> None:
    mlp_checks.check(torch.float32, (3, 67, 24), 70, width, bias=bias, implementation="compiled")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [0, 1, 7, 8, 16, 24, 40])
def test_attention(width: int, bias: bool) -> None:
    attention_checks.check(torch.float32, (2, 135, 24), 3, 40, width, bias=bias, implementation="compiled")


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
    attention_checks.check(torch.float32, shape, heads, dims, width, scale=scale, implementation="compiled")


def test_gelu_is_as_exact_as_pytorchs() -> None:
    z = torch.linspace(-12, 12, 100_001)
    exact = F.gelu(z.double())
    _native.module()
    found = torch.ops.skd_kernels.gelu(z)
    assert (found - exact).abs().max() <= 5e-7 and (found - exact).norm() <= (F.gelu(z) - exact).norm()
    special = torch.ops.skd_kernels.gelu(torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 0.0]))
    assert not special[:3].isfinite().any() and special[3] == torch.tensor(1e30) and special[5] == 0
    assert special[4].abs() < 1e-6


def test_nan_reaches_its_image_and_no_other() -> None:
    x, *parameters = attention_checks.make_inputs((2, 70, 24), 2, 16)
    x[1, 3, 2] = float("nan")
    with kernels.use("compiled"):
        out = kernels.masked_attention(x, *parameters, 8, num_heads=2)
        hidden = kernels.masked_mlp(x, *mlp_parameters(), 16)
    assert out[0].isfinite().all() and out[1].isnan().all()
    assert hidden[0].isfinite().all() and hidden[1, 3].isnan().all() and hidden[1, :3].isfinite().all()


def test_large_logits_do_not_overflow() -> None:
    x, *parameters = attention_checks.make_inputs((1, 40, 24), 2, 16)
    with kernels.use("compiled"):
        out = kernels.masked_attention(300 * x, *parameters, 16, num_heads=2)
    assert out.isfinite().all()


def test_same_bits_for_any_number_of_threads() -> None:
    x, *parameters = attention_checks.make_inputs((3, 90, 24), 2, 16)
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        scores = torch.zeros(40), torch.zeros(3, 2, 16)
        own = x.detach().clone().requires_grad_()
        with kernels.use("compiled"):
            attended = kernels.masked_attention(own, *parameters, 8, num_heads=2, scores=scores[1])
            kernels.masked_mlp(attended, *mlp_parameters(), 16, scores=scores[0]).sum().backward()
        found.append(torch.cat([own.grad.flatten(), *(score.flatten() for score in scores)]))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])


def test_when_they_are_chosen() -> None:
    mlp, attention = ((2, 5, 24), (40, 24), (40,), (24, 40), (24,)), ((2, 5, 24), (96, 24), None, (24, 32), None)

    def why(operation: str, shapes: Any, *arguments: Any, **options: Any) -> str:
        explained = kernels.explain(operation, *shapes, *arguments, **options)
        return "" if explained.chosen == "compiled" else explained.refused["compiled"]

    assert why("masked_mlp", mlp, 7) == why("masked_attention", attention, 7, num_heads=2) == ""
    assert why("masked_mlp", mlp, torch.tensor(7)) == ""
    assert why("masked_mlp", mlp, 7, act="silu") == "there is no kernel for silu"
    assert why("masked_mlp", mlp, 7, dtype=torch.float64) == "there is no kernel for torch.float64"
    assert why("masked_mlp", mlp, 7, device="cuda") == "there is no kernel for cuda"
    assert "all queries" in why("masked_attention", attention, 7, num_heads=2, queries=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert why("masked_mlp", mlp, 7) == "there is no kernel for torch.bfloat16"


def test_a_second_derivative_is_refused() -> None:
    x, *parameters = attention_checks.make_inputs((1, 5, 24), 2, 8)
    own = x.detach().clone().requires_grad_()
    for call in (
        lambda: kernels.masked_attention(own, *parameters, 8, num_heads=2),
        lambda: kernels.masked_mlp(own, *mlp_parameters(), 16),
    ):
        (grad,) = torch.autograd.grad(call().square().sum(), own, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


def test_shapes_without_values() -> None:
    """What tracing sees is what the kernels give."""
    _native.module()
    operations = torch.ops.skd_kernels
    qkv = torch.randn(2, 5, 3, 2, 8)
    out, sums = operations.attention(qkv, 0.3)
    calls = [
        (operations.gelu.default, (qkv,)),
        (operations.gelu_backward.default, (qkv.flatten(0, 3), qkv.flatten(0, 3), True)),
        (operations.gelu_backward.default, (qkv.flatten(0, 3), qkv.flatten(0, 3), False)),
        (operations.attention.default, (qkv, 0.3)),
        (operations.attention_backward.default, (out, qkv, out, sums, 0.3)),
    ]
    for operation, arguments in calls:
        torch.library.opcheck(operation, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("tensor", [torch.zeros(2, 3).double(), torch.zeros(3, 2).T])
def test_the_kernels_check_what_they_are_given(tensor: torch.Tensor) -> None:
    _native.module()
    with pytest.raises(RuntimeError, match="float32 and contiguous"):
        torch.ops.skd_kernels.gelu(tensor)
    with pytest.raises(RuntimeError, match="float32 and contiguous"):
        torch.ops.skd_kernels.attention(tensor, 1.0)
