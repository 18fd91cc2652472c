"""masked_mlp and masked_attention: the specification, its gradients, and every implementation against it."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from tolerances import FAST_GRADCHECK, kernel_tolerance

import skd_kernels as kernels
from skd_kernels.mlp import ACTIVATIONS

B, N, C, H, D, HIDDEN = 2, 5, 12, 2, 8, 20
IMPLEMENTATIONS = ("slices", "reference")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def mlp_inputs(gated: bool = False, bias: bool = True) -> list[torch.Tensor | None]:
    rows = 2 * HIDDEN if gated else HIDDEN
    biases = (randn(rows), randn(C)) if bias else (None, None)
    return [randn(B, N, C), randn(rows, C, seed=1), biases[0], randn(C, HIDDEN, seed=2), biases[1]]


def attention_inputs(bias: bool = True) -> list[torch.Tensor | None]:
    biases = (randn(3 * H * D), randn(C)) if bias else (None, None)
    return [randn(B, N, C), randn(3 * H * D, C, seed=1), biases[0], randn(C, H * D, seed=2), biases[1]]


def plain_mlp(x: Any, w1: Any, b1: Any, w2: Any, b2: Any, m: int, act: str, gated: bool) -> torch.Tensor:
    """Written out with explicit loops over nothing: matrix products of cut tensors."""
    if m == 0:
        return torch.zeros_like(x)
    rows = torch.arange(m)
    z = x @ w1[rows].T + (0 if b1 is None else b1[rows])
    h = ACTIVATIONS[act](z)
    if gated:
        rows = rows + HIDDEN
        h = h * (x @ w1[rows].T + (0 if b1 is None else b1[rows]))
    return h @ w2[:, :m].T + (0 if b2 is None else b2)


def plain_attention(x: Any, wq: Any, bq: Any, wp: Any, bp: Any, k: int) -> torch.Tensor:
    """Softmax attention head by head."""
    if k == 0:
        return torch.zeros_like(x)
    out = torch.zeros_like(x) + (0 if bp is None else bp)
    for head in range(H):
        rows = [torch.arange(k) + part * H * D + head * D for part in range(3)]
        q, key, v = (x @ wq[r].T + (0 if bq is None else bq[r]) for r in rows)
        weights = (q @ key.mT * D**-0.5).softmax(-1)
        out = out + weights @ v @ wp[:, head * D : head * D + k].T
    return out


def both_widths(width: int) -> list[Any]:
    return [width, torch.tensor(width, dtype=torch.int32)]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("act", sorted(ACTIVATIONS))
def test_mlp_value(name: str, act: str, gated: bool, bias: bool) -> None:
    inputs = mlp_inputs(gated, bias)
    for m in (0, 1, 7, HIDDEN):
        expected = plain_mlp(*inputs, m, act, gated)
        for width in both_widths(m):
            with kernels.use(name):
                found = kernels.masked_mlp(*inputs, width, act=act, gated=gated)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_attention_value(name: str, bias: bool) -> None:
    inputs = attention_inputs(bias)
    for k in (0, 1, 5, D):
        expected = plain_attention(*inputs, k)
        for width in both_widths(k):
            with kernels.use(name):
                found = kernels.masked_attention(*inputs, width, num_heads=H)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("width", [0, 7, HIDDEN])
@pytest.mark.parametrize("gated", [True, False])
def test_mlp_gradcheck(name: str, width: int, gated: bool) -> None:
    inputs = mlp_inputs(gated)
    for given in both_widths(width):
        with kernels.use(name):
            assert torch.autograd.gradcheck(
                lambda *a, w=given: kernels.masked_mlp(*a, w, gated=gated), inputs, **FAST_GRADCHECK
            )


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("width", [0, 3, D])
def test_attention_gradcheck(name: str, width: int) -> None:
    inputs = attention_inputs()
    for given in both_widths(width):
        with kernels.use(name):
            assert torch.autograd.gradcheck(
                lambda *a, w=given: kernels.masked_attention(*a, w, num_heads=H), inputs, **FAST_GRADCHECK
            )


@pytest.mark.parametrize("operation", ["mlp", "attention"])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("width", [0, 3])
def test_past_the_width_nothing_is_read_and_gradients_are_zero(operation: str, name: str, width: int) -> None:
    """NaN in every parameter past the width must not reach the output, and gradients there are exact zeros."""
    if operation == "mlp":
        inputs: list[Any] = mlp_inputs()
        kept = torch.arange(HIDDEN) < width
        masks = [None, kept, kept, kept, torch.full((C,), width > 0)]
        call = lambda w: kernels.masked_mlp(*inputs, w)  # noqa: E731
    else:
        inputs = attention_inputs()
        columns = (torch.arange(D) < width).repeat(H)
        masks = [None, columns.repeat(3), columns.repeat(3), columns, torch.full((C,), width > 0)]
        call = lambda w: kernels.masked_attention(*inputs, w, num_heads=H)  # noqa: E731
    keep = [_expand(mask, tensor, index == 3) for index, (mask, tensor) in enumerate(zip(masks, inputs, strict=True))]
    with torch.no_grad():
        for tensor, mask in zip(inputs, keep, strict=True):
            if mask is not None:
                tensor[~mask] = float("nan")
    for given in both_widths(width):
        with kernels.use(name):
            out = call(given)
        assert out.isfinite().all()
        grads = torch.autograd.grad(out.square().sum(), inputs)
        for grad, mask in zip(grads, keep, strict=True):
            assert grad.isfinite().all()
            if mask is not None:
                assert grad[~mask].eq(0).all()
                assert width == 0 or grad[mask].abs().sum() > 0


def _expand(mask: Any, tensor: torch.Tensor, columns: bool) -> Any:
    if mask is None:
        return None
    mask = mask if tensor.ndim == 1 else (mask[None, :] if columns else mask[:, None])
    return mask.expand(tensor.shape)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_scores_are_taylor_scores_of_the_hidden_features(name: str) -> None:
    inputs: list[Any] = mlp_inputs()
    x, w1, b1, w2, b2 = inputs
    for width in both_widths(7):
        scores = torch.full((HIDDEN,), 2.0, dtype=torch.float64)  # added to, not overwritten
        with kernels.use(name):
            out = kernels.masked_mlp(*inputs, width, scores=scores)
        out.pow(3).sum().backward()
        h = F.gelu(F.linear(x, w1[:7], b1[:7])).detach().requires_grad_()
        F.linear(h, w2[:, :7], b2).pow(3).sum().backward()
        assert h.grad is not None
        torch.testing.assert_close(scores[:7], 2 + (h * h.grad).abs().sum((0, 1)).detach())
        assert scores[7:].eq(2).all()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_attention_scores_are_taylor_scores_of_q_k_and_v(name: str) -> None:
    inputs: list[Any] = attention_inputs()
    x, wq, bq, wp, bp = inputs
    k = 5
    for width in both_widths(k):
        scores = torch.zeros(3, H, D, dtype=torch.float64)
        with kernels.use(name):
            kernels.masked_attention(*inputs, width, num_heads=H, scores=scores).pow(3).sum().backward()
        qkv = F.linear(x, wq, bq).reshape(B, N, 3, H, D)[..., :k].detach().requires_grad_()
        q, key, v = qkv.permute(2, 0, 3, 1, 4)
        weights = (q @ key.mT * D**-0.5).softmax(-1)
        out = (weights @ v).transpose(1, 2).flatten(2)
        F.linear(out, wp.reshape(C, H, D)[..., :k].flatten(1), bp).pow(3).sum().backward()
        assert qkv.grad is not None
        torch.testing.assert_close(scores[..., :k], (qkv * qkv.grad).abs().sum((0, 1)).detach())
        assert scores[..., k:].eq(0).all()


def test_scores_are_float32_for_float32() -> None:
    inputs = [tensor.detach().float().requires_grad_() for tensor in mlp_inputs() if tensor is not None]
    scores = torch.zeros(HIDDEN)
    kernels.masked_mlp(*inputs, 9, scores=scores).sum().backward()
    assert scores[:9].gt(0).all() and scores[9:].eq(0).all()


@pytest.mark.parametrize("implementation", ["slices", "reference"])
@pytest.mark.parametrize("width", [0, 4, D])
def test_a_few_queries_are_the_first_of_all(width: int, implementation: str) -> None:
    """Results, gradients and scores are those of a loss that reads no other token (a gradient of zero is noise)."""
    results = []
    for queries in (None, 2):
        leaves = [tensor.detach().requires_grad_() for tensor in attention_inputs() if tensor is not None]
        scores = torch.zeros(3, H, D, dtype=torch.float64)
        with kernels.use(implementation):
            out = kernels.masked_attention(*leaves, width, num_heads=H, scores=scores, queries=queries)[:, :2]
        out.square().sum().backward()
        results.append([out.detach(), scores, *(leaf.grad for leaf in leaves)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_custom_scale_and_default_scale_of_the_full_head() -> None:
    inputs = attention_inputs()
    default = kernels.masked_attention(*inputs, 4, num_heads=H)
    torch.testing.assert_close(default, kernels.masked_attention(*inputs, 4, num_heads=H, scale=D**-0.5))
    assert (default - kernels.masked_attention(*inputs, 4, num_heads=H, scale=4**-0.5)).abs().max() > 1e-3


def test_autocast_casts_as_linear_does() -> None:
    inputs: list[Any] = [t.detach().float() for t in mlp_inputs() if t is not None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = kernels.masked_mlp(*inputs, HIDDEN)
        x, w1, b1, w2, b2 = inputs
        expected = F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)


def test_one_compiled_graph_serves_every_device_width() -> None:
    inputs = mlp_inputs()
    torch._dynamo.reset()
    compiled = torch.compile(lambda w: kernels.masked_mlp(*inputs, w), fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for width in (0, 1, 7, 13, HIDDEN):
            found = compiled(torch.tensor(width, dtype=torch.int32))
            torch.testing.assert_close(found, kernels.masked_mlp(*inputs, width))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"width": HIDDEN + 1}, r"width is 21; it may be 0\.\.20"),
        ({"width": -1}, "width is -1"),
        ({"width": 2.0}, "width is 2.0"),
        ({"width": True}, "width is True"),
        ({"width": torch.tensor(1.0)}, "0-d int32"),
        ({"width": torch.tensor([1])}, "0-d int32"),
        ({"act": "relu"}, "act is 'relu'"),
        ({"x": torch.zeros(5, 12)}, "x has shape"),
        ({"x": torch.zeros(2, 5, 12, dtype=torch.int64)}, "x has dtype"),
        ({"x": [1.0]}, "x is a list"),
        ({"w1": torch.zeros(HIDDEN, 11, dtype=torch.float64)}, "w1 has shape"),
        ({"w1": torch.zeros(HIDDEN, C)}, "w1 has dtype"),
        ({"b1": torch.zeros(3, dtype=torch.float64)}, "b1 has shape"),
        ({"b2": torch.zeros(C, device="meta", dtype=torch.float64)}, "b2 is on meta"),
        ({"gated": True}, "w1 has shape"),
        ({"scores": torch.zeros(3)}, "scores has shape"),
        ({"scores": torch.zeros(HIDDEN, dtype=torch.float16)}, "scores has dtype"),
        ({"scores": torch.zeros(1).expand(HIDDEN)}, "scores is an expanded tensor"),
    ],
)
def test_mlp_rejects(change: dict[str, Any], match: str) -> None:
    names = ("x", "w1", "b1", "w2", "b2")
    call: dict[str, Any] = dict(zip(names, mlp_inputs(), strict=True)) | {"width": 3} | change
    with pytest.raises(ValueError, match=match):
        kernels.masked_mlp(**call)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"width": D + 1}, r"width is 9; it may be 0\.\.8"),
        ({"num_heads": 5}, "num_heads is 5"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"queries": 0}, r"queries is 0; it may be 1\.\."),
        ({"queries": 10_000}, "queries is 10000"),
        ({"w_qkv": torch.zeros(7, C, dtype=torch.float64)}, "w_qkv has shape"),
        ({"b_qkv": torch.zeros(7, dtype=torch.float64)}, "b_qkv has shape"),
        ({"scores": torch.zeros(H, D)}, "scores has shape"),
        ({"scale": "a"}, "scale is 'a'"),
        ({"scale": torch.ones(2)}, "scale is tensor"),
    ],
)
def test_attention_rejects(change: dict[str, Any], match: str) -> None:
    names = ("x", "w_qkv", "b_qkv", "w_proj", "b_proj")
    call: dict[str, Any] = dict(zip(names, attention_inputs(), strict=True)) | {"width": 3, "num_heads": H} | change
    with pytest.raises(ValueError, match=match):
        kernels.masked_attention(**call)


def results(implementation: str, call: Any, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Output, gradients and scores."""
    own = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    with kernels.use(implementation):
        out, scores = call(*own)
        out.square().sum().backward()
    return [out.detach(), scores, *(tensor.grad for tensor in own)]


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 20)),
    inner=st.integers(1, 40),
    heads=st.integers(1, 3),
    part=st.floats(0, 1),
    act=st.sampled_from(sorted(ACTIVATIONS)),
    gated=st.booleans(),
)
def test_slices_of_any_shape(
    sizes: tuple[int, int, int], inner: int, heads: int, part: float, act: str, gated: bool
) -> None:
    """Against the specification, in float64."""
    channels, width = sizes[-1], round(part * inner)
    rows = 2 * inner if gated else inner

    def mlp(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.zeros(inner, dtype=torch.float64)
        return kernels.masked_mlp(*inputs, width, act=act, gated=gated, scores=scores), scores

    def attention(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.zeros(3, heads, inner, dtype=torch.float64)
        return kernels.masked_attention(*inputs, width, num_heads=heads, scores=scores), scores

    x, b2 = randn(*sizes), randn(channels)
    for call, first, last in ((mlp, rows, inner), (attention, 3 * heads * inner, heads * inner)):
        inputs = [x, randn(first, channels, seed=1), randn(first), randn(channels, last, seed=2), b2]
        pairs = zip(results("slices", call, inputs), results("reference", call, inputs), strict=True)
        for found, expected in pairs:
            allowed = kernel_tolerance(0.0, torch.float64) * expected.norm()
            assert (found - expected).norm() <= allowed, (call.__name__, found.shape)
