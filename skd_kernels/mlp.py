"""Masked-width MLP: fc1 -> activation -> fc2 on the first m hidden neurons, one set of weights for every m."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from skd_kernels._checks import check_alike, check_range, check_scores, check_tensor, check_width
from skd_kernels._dispatch import TensorSpec, always, operation
from skd_kernels.gpu.entry import cast_as_linear, device_width, refuses_triton
from skd_kernels.gpu.mlp import mlp_forward
from skd_kernels.taylor import with_taylor_scores

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "silu": F.silu,
}


def masked_mlp(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    width: int | torch.Tensor,
    *,
    act: str = "gelu",
    gated: bool = False,
    scores: torch.Tensor | None = None,
) -> torch.Tensor:
    """``fc2(act(fc1(x)))`` with only the first `width` of the F hidden neurons.

    Args:
        x: (B, N, C), float32, float64, bfloat16 or float16.
        w1: (F, C); gated: (2F, C), the F gate rows first, then the F value rows (timm's ``SwiGLUPacked`` order).
        b1: (F,) or (2F,), or None.
        w2: (C, F). b2: (C,) or None.
        width: int in 0..F, or a 0-d int32 tensor on the device of `x` (never read by the host on a GPU and not
            range-checked). Width 0 gives zeros, the bias b2 included; every parameter stays in the graph and gets a
            zero gradient, as do all rows and columns past the width.
        act: "gelu", "gelu_tanh", "quick_gelu" or "silu".
        gated: ``act(gate) * value`` in place of ``act``.
        scores: (F,) float32 buffer (float64 accepted) to which the backward pass adds the sum over tokens of
            ``|h * dh|`` at the hidden features h of the kept neurons.

    Returns:
        (B, N, C). Under autocast the result is what ``F.linear`` would give.

    Raises:
        ValueError: wrong shape, dtype, device, activation, or an int width out of range.
    """
    check_tensor("x", x, (None, None, None))
    channels = x.shape[-1]
    check_tensor("w2", w2, (channels, None))
    hidden = w2.shape[1]
    rows = 2 * hidden if gated else hidden
    check_tensor("w1", w1, (rows, channels))
    for name, bias, size in (("b1", b1, rows), ("b2", b2, channels)):
        if bias is not None:
            check_tensor(name, bias, (size,))
    for name, tensor in (("w1", w1), ("b1", b1), ("w2", w2), ("b2", b2)):
        check_alike(name, tensor, "x", x)
    if not isinstance(act, str) or act not in ACTIVATIONS:
        raise ValueError(f"act is {act!r}; it may be one of {sorted(ACTIVATIONS)}")
    check_width(width, hidden, x.device)
    check_scores(scores, (hidden,), x.device)
    result: torch.Tensor = _operation(
        x=x, w1=w1, b1=b1, w2=w2, b2=b2, width=width, act=act, gated=gated, scores=scores
    )
    return result


_operation = operation(masked_mlp)


def refuses_to_slice(*, width: int | TensorSpec, **_: object) -> str | None:
    """Slicing needs the width on the host: an int, or a CPU tensor outside of a compiled graph."""
    if isinstance(width, TensorSpec):
        if torch.compiler.is_compiling():
            return "width is a tensor inside a compiled graph"
        if width.device != "cpu":
            return f"width is a tensor on {width.device}: reading it would stall the host"
    return None


@_operation.implementation("slices", refuses_to_slice)
def masked_mlp_slices(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    width: int | torch.Tensor,
    act: str,
    gated: bool,
    scores: torch.Tensor | None,
) -> torch.Tensor:
    """The first rows of fc1 and columns of fc2, as views: work and traffic follow the width."""
    hidden = w2.shape[1]
    m = check_range(int(width), hidden)
    h = ACTIVATIONS[act](F.linear(x, w1[:m], None if b1 is None else b1[:m]))
    if gated:
        value = slice(hidden, hidden + m)
        h = h * F.linear(x, w1[value], None if b1 is None else b1[value])
    h = with_taylor_scores(h, None if scores is None else scores[:m])
    if m > 0 or b2 is None:
        return F.linear(h, w2[:, :m], b2)
    # The sum of nothing is zero, and it keeps the output bias in the graph.
    return F.linear(h, w2[:, :0]) + b2[:0].sum()


def refuses_to_launch(
    *,
    x: TensorSpec,
    w1: TensorSpec,
    b1: TensorSpec | None,
    w2: TensorSpec,
    b2: TensorSpec | None,
    **_: object,
) -> str | None:
    return refuses_triton(x, w1, b1, w2, b2)


# Registered after "slices": where the host knows the width, the vendor's library on exact shapes is preferred. It was
# faster on an H100 at commit 38bc3b68 (benchmarks/results/h100-quick.json); later kernels were not compared with it.
@_operation.implementation("triton", refuses_to_launch)
def masked_mlp_triton(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    width: int | torch.Tensor,
    act: str,
    gated: bool,
    scores: torch.Tensor | None,
) -> torch.Tensor:
    """skd_kernels/gpu: the width is read on the device, so one graph and one compilation serve every width."""
    x = cast_as_linear(x)
    # Slopes are kept only for the gradients that pass through the activation.
    inputs = (x, w1, b1)
    save = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
    y, *_ = mlp_forward(x, w1, b1, w2, b2, device_width(width, x.device), scores, act, gated, save)
    return y


@_operation.implementation("reference", always)
def masked_mlp_reference(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    width: int | torch.Tensor,
    act: str,
    gated: bool,
    scores: torch.Tensor | None,
) -> torch.Tensor:
    """The specification: parameters past the width are zero. Selection, never multiplication: 0 * NaN is NaN.

    Every activation maps 0 to 0, so masked neurons contribute nothing and receive no gradient.
    """
    hidden = w2.shape[1]
    keep = torch.arange(hidden, device=x.device) < width
    keep_rows = torch.cat([keep, keep]) if gated else keep
    some = torch.arange(1, device=x.device) < width
    z = F.linear(select(some, x), select(keep_rows[:, None], w1), select_bias(keep_rows, b1))
    if gated:
        gate, value = z.split(hidden, dim=-1)
        h = ACTIVATIONS[act](gate) * value
    else:
        h = ACTIVATIONS[act](z)
    h = with_taylor_scores(h, scores)
    return F.linear(h, select(keep, w2), select_bias(some, b2))


def select(keep: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` where `keep`, exact zeros elsewhere, in value and in gradient."""
    return torch.where(keep, tensor, 0.0)


def select_bias(keep: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
    """The same of a bias, which may be missing."""
    return None if bias is None else select(keep, bias)
