"""Features and gradients of a transformer: the objective, and hooks at the places that METHOD names."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from skd.support.types import Batch
from skd.vit import Module, TimmModel, check_images
from skd.vit.block import first_block
from skd.vit.protocol import Consumer, Handle


@contextmanager
def tapped(model: TimmModel, modules: Iterable[Module], consume: Consumer) -> Iterator[None]:
    """Inside the block every backward pass calls ``consume(module, feature, gradient)`` once per module that
    WPAC rewrites.

    For an attention the feature is the qkv projection's output, (B, N, 3, H, D); for an MLP the hidden features that
    enter its output layer, (B, N, F). Parameters are frozen meanwhile: only gradients of activations are computed.
    """
    check_gradients_possible()
    handles: list[Handle] = [first_block(model).register_forward_pre_hook(_start_graph)]
    try:
        for module in modules:
            handles += module.tap(model, consume)
        with frozen(model):
            yield
    finally:
        for handle in handles:
            handle.remove()


def check_gradients_possible() -> None:
    if torch.is_inference_mode_enabled():
        raise ValueError("gradients are needed, but torch.inference_mode() is on; call this outside of it")


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no parameter gradients inside the block; both restored after it."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = {module: module.training for module in model.modules()}
    model.requires_grad_(False).eval()
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in training.items():
            module.training = mode


def _start_graph(block: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Begin the autograd graph at the first block, since no frozen parameter begins it."""
    return (inputs[0].detach().requires_grad_(), *inputs[1:])


def objective(model: TimmModel, output: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    """The scalar that is differentiated, summed over the batch. METHOD calls it the cost.

    It is the logit of the true class, or of the predicted class without labels. For a headless model
    (num_classes = 0) it is half the squared norm of the pooled features.
    """
    if model.num_classes == 0:
        # In float32 at least: squares of half-precision features overflow.
        return 0.5 * output.to(torch.promote_types(output.dtype, torch.float32)).square().sum()
    labels = output.argmax(-1) if labels is None else labels
    return output.gather(1, labels[:, None]).sum()


def checked(
    model: TimmModel, batches: Iterable[object], name: str = "batches", *, with_labels: bool = True
) -> Iterator[Batch]:
    """The batches, each checked, on the model's device and in its dtype; without `with_labels` the labels are None.

    Raises:
        ValueError: no batch at all, or one that `checked_batch` refuses; the message has the number of the batch.
    """
    seen = False
    try:
        iterator = iter(batches)
    except TypeError:
        raise ValueError(
            f"{name} is a {type(batches).__name__}; it must be an iterable of (images, labels)"
        ) from None
    for index, batch in enumerate(iterator):
        seen = True
        yield checked_batch(model, batch, f"{name}[{index}]", with_labels)
    if not seen:
        raise ValueError(f"{name} has no batch; it must yield at least one (images, labels)")


def checked_batch(model: TimmModel, batch: object, name: str, with_labels: bool = True) -> Batch:
    """One batch, checked, on the model's device and in its dtype.

    Without `with_labels` the labels are not checked, and None is returned in their place.

    Raises:
        ValueError: not (images, labels), images of a wrong shape, labels of a wrong shape or out of range.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise ValueError(f"{name} is a {type(batch).__name__}; it must be (images, labels)")
    images, labels = batch
    try:
        check_images(model, images)
        labels = _check_labels(model, labels, len(images)) if with_labels else None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    parameter = next(model.parameters())
    to_gpu = parameter.device.type == "cuda"  # after a non-blocking copy to the host it might be read too early
    images = _usable(images).to(parameter.device, parameter.dtype, non_blocking=to_gpu)
    return images, None if labels is None else _usable(labels).to(parameter.device, non_blocking=to_gpu)


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether no number in any of the tensors is NaN or infinite; the host waits for the device once for all."""
    finite = [torch.isfinite(tensor).all() for tensor in tensors]
    return not finite or bool(torch.stack(finite).all())


def report_left_out(left_out: int, counted: bool) -> None:
    """Warn how many batches were left out, or raise if none counted, since there are then no statistics to use.

    Raises:
        ValueError: nothing `counted`.
    """
    cause = "an image, a weight or a gradient is NaN or infinite (fp16 may overflow: use float32 or bfloat16)"
    if not counted:
        raise ValueError(f"batches: none has finite statistics; {cause}")
    if left_out:
        warnings.warn(f"batches: {left_out} were left out, not finite; {cause}", stacklevel=3)


def _usable(tensor: torch.Tensor) -> torch.Tensor:
    """Tensors made in inference mode cannot take part in a backward pass; their copies can."""
    return tensor.clone() if tensor.is_inference() else tensor


def _check_labels(model: TimmModel, labels: object, count: int) -> torch.Tensor | None:
    if labels is None or model.num_classes == 0:
        return None
    integers = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    if not isinstance(labels, torch.Tensor) or labels.dtype not in integers or labels.shape != (count,):
        got = tuple(labels.shape) if isinstance(labels, torch.Tensor) else type(labels).__name__
        raise ValueError(f"labels is {got}; it must be an integer tensor of shape ({count},), or None")
    low, high = (int(labels.min()), int(labels.max())) if count else (0, 0)
    if low < 0 or high >= model.num_classes:
        raise ValueError(f"labels has {low}..{high}; the head has classes 0..{model.num_classes - 1}")
    return labels.long()
