"""The cost of what runs inside a block, in forward passes of one image through the full network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from timm.models.vision_transformer import VisionTransformer

import skd


class Count:
    """How many forward passes there were; a backward pass counts as one more, with gradients of weights as two."""

    forwards = 0.0


@contextmanager
def counted() -> Iterator[Count]:
    """Count the passes of all super-networks and plain networks in the block, in proportion to their MACs.

    A step of one module counts by the MACs of that module; embeddings and heads beside steps are left out.
    """
    count = Count()
    wrappers: list[tuple[type, str, Callable[..., float]]] = [
        (skd.SuperNet, "forward", _of_forward),
        (skd.SuperNet, "step", _of_step),
        (VisionTransformer, "forward", _of_plain),
    ]
    with ExitStack() as stack:
        for owner, name, price in wrappers:
            stack.enter_context(mock.patch.object(owner, name, _wrapped(getattr(owner, name), price, count)))
        yield count


def _wrapped(method: Callable[..., Any], price: Callable[..., float], count: Count) -> Callable[..., Any]:
    def wrapper(self: Any, *arguments: Any, **named: Any) -> Any:
        count.forwards += price(self, *arguments, **named)
        return method(self, *arguments, **named)

    return wrapper


def _passes(network: torch.nn.Module) -> int:
    """1, 2 with a backward pass to the activations, 3 with one to the weights."""
    if not torch.is_grad_enabled():
        return 1
    return 3 if any(parameter.requires_grad for parameter in network.parameters()) else 2


def _of_forward(supernet: skd.SuperNet, images: torch.Tensor, entry: int | None = None) -> float:
    costs, full = supernet.costs, supernet.widths()
    share = int(costs.macs(supernet.widths(entry))) / int(costs.macs(full))
    return _passes(supernet) * len(images) * share


def _of_step(supernet: skd.SuperNet, index: int, x: torch.Tensor, width: int, *_: object, **__: object) -> float:
    costs, full = supernet.costs, supernet.widths()
    share = costs.planned_per_unit()[index] * width / int(costs.macs(full))
    return (2 if x.requires_grad else 1) * len(x) * share


def _of_plain(model: VisionTransformer, images: torch.Tensor, *_: object, **__: object) -> float:
    return float(_passes(model) * len(images))
