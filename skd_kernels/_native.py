"""The compiled extension, loaded with the package. If that fails, one warning says so, and refusals say why."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType
from typing import TYPE_CHECKING

import torch  # before the extension, which needs its libraries loaded
from torch.autograd import forward_ad

if TYPE_CHECKING:
    from skd_kernels._dispatch import TensorSpec

STATISTICS_DTYPES = {
    "cpu": (torch.float32, torch.float64, torch.float16, torch.bfloat16),
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
}
CUDA_LARGEST_GROUP = 128


def refuses_transforms() -> str | None:
    """The reason why a compiled kernel cannot run here, or None.

    torch.func and forward-mode derivatives have to trace PyTorch's own operations, and a compiled kernel is opaque to
    them.
    """
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms what PyTorch is made of"
    return "forward-mode derivatives may be asked for" if forward_mode() else None


def forward_mode() -> bool:
    """Whether PyTorch's forward mode of differentiation is on."""
    return bool(forward_ad._current_level >= 0)


def refuses_statistics(*, x: TensorSpec, grad: TensorSpec, **_: object) -> str | None:
    """The reason why the compiled statistics cannot take features `x` and gradients `grad`, or None."""
    if module is None:
        return failure
    if x.device not in STATISTICS_DTYPES:
        return f"there is no kernel for {x.device}"
    if x.device == "cuda" and not HAS_CUDA:
        return "the extension was built without CUDA (SKD_CUDA=on builds it)"
    if x.dtype not in STATISTICS_DTYPES[x.device]:
        return f"dtype {x.dtype} is not compiled for {x.device}"
    if x.needs_grad or grad.needs_grad:
        return "a gradient is asked for; the compiled statistics have none"
    return refuses_transforms()


def refuses_moments(*, x: TensorSpec, grad: TensorSpec, **_: object) -> str | None:
    """As `refuses_statistics`; the CUDA kernel holds a group's D x D product in registers, so D is limited."""
    if x.device == "cuda" and x.shape[-1] > CUDA_LARGEST_GROUP:
        return f"groups of {x.shape[-1]} coordinates; the CUDA kernel takes up to {CUDA_LARGEST_GROUP}"
    return refuses_statistics(x=x, grad=grad)


def rows(tensor: torch.Tensor, trailing: int) -> torch.Tensor:
    """`tensor` as (tokens, ...last `trailing` dims) with unit stride along the last: a view where there is one."""
    if tensor.ndim != trailing + 1:
        tensor = tensor.reshape(tensor.shape[: tensor.ndim - trailing].numel(), *tensor.shape[-trailing:])
    return tensor if tensor.shape[-1] < 2 or tensor.stride(-1) == 1 else tensor.contiguous()


def _load() -> tuple[ModuleType | None, str]:
    try:
        module = importlib.import_module("skd_kernels._C")
    except ImportError as error:
        reason = f"the extension does not load: {error}"
        if isinstance(error, ModuleNotFoundError) and error.name == "skd_kernels._C":
            reason = "the extension is not built (no compiler when skd was installed?); reinstall with one"
        warnings.warn(f"skd runs without its compiled half, by PyTorch alone: {reason}", stacklevel=2)
        return None, reason
    _register_fakes()
    return module, ""


def _register_fakes() -> None:
    """Shapes and dtypes of the outputs, for torch.compile."""
    torch.library.register_fake("skd_kernels::token_moments", _fake_moments)
    torch.library.register_fake("skd_kernels::centred_moments", _fake_moments)
    torch.library.register_fake("skd_kernels::taylor_scores", _fake_scores)
    torch.library.register_fake("skd_kernels::attention", _fake_attention)
    torch.library.register_fake("skd_kernels::attention_backward", lambda grad, qkv, *_: torch.empty_like(qkv))


def _fake_moments(x: torch.Tensor, grad: torch.Tensor, shift: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    """The outputs of both moments operations, in the order of the fields of `Moments`."""
    groups, dims = x.shape[-2:]
    sizes = ((), (groups, dims), (groups,), (groups, dims), (groups, dims), (groups, dims, dims))
    return tuple(x.new_empty(size, dtype=torch.float64) for size in sizes)


def _fake_attention(qkv: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    batch, tokens, _, heads, dims = qkv.shape
    return qkv.new_empty(batch, tokens, heads, dims), qkv.new_empty(batch, heads, tokens, 2)


def _fake_scores(x: torch.Tensor, grad: torch.Tensor, power: int) -> torch.Tensor:
    return x.new_empty(x.shape[-1:], dtype=torch.float64)


# `skd_kernels._C`, or None and the reason. It is loaded at import because torch.compile cannot trace an import.
module, failure = _load()
HAS_CUDA = module is not None and bool(module.build_info()["cuda"])
