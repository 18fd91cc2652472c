"""The replacement of a module that a sub-network skips: a traced function without weights that returns zeros.

Layers of size 0 compute the same, but ONNX Runtime refuses them and quantization reads past their end.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import fx, nn

from skd.vit.protocol import (
    Consumer,
    Coordinates,
    Handle,
    Module,
    OrderedModule,
    Place,
    Prices,
    Shared,
    TimmLayer,
    TimmModel,
    Transform,
    Width,
)
from skd.vit.residual import factors_of


def skipped_like(module: nn.Module) -> fx.GraphModule:
    """A torch.fx.GraphModule that takes what `module` takes and returns zeros like its first argument.

    It is PyTorch's own class and holds its code, so it can be pickled, copied and loaded without skd.
    """
    graph = fx.Graph()
    inputs = []
    for name, parameter in inspect.signature(type(module).forward).parameters.items():
        if name == "self":
            continue
        default = inspect.Signature.empty if parameter.default is parameter.empty else parameter.default
        known = parameter.annotation is not parameter.empty and not isinstance(parameter.annotation, str)
        annotation = parameter.annotation if known else None
        inputs.append(graph.placeholder(name, type_expr=annotation, default_value=default))
    graph.output(graph.call_function(torch.zeros_like, (inputs[0],)))
    skipped = fx.GraphModule(nn.Module(), graph, class_name="Skipped")
    skipped.train(module.training)
    return skipped


def norm_added(module: Module, block: TimmLayer, x: torch.Tensor, tokens: int | None) -> torch.Tensor:
    """The first `tokens` tokens of the stream (B, N, C) plus their norm, scaled as the module's output would be.

    The published code measures a module's sensitivity with this in place of the module (METHOD 2, step 1).
    """
    x = x[:, :tokens]
    normed: torch.Tensor = getattr(block, module.place.norm)(x)
    factors = factors_of(getattr(block, module.place.scale, None))
    return x + (normed if factors is None else normed * factors)


def is_skipped(module: object) -> bool:
    """Whether `module` is a traced function that returns zeros like its first argument and does nothing else."""
    if not isinstance(module, fx.GraphModule):
        return False
    nodes = list(module.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    if len(nodes) != len(inputs) + 2 or not inputs:
        return False
    zeros, output = nodes[-2:]
    calls = zeros.op == "call_function" and zeros.target is torch.zeros_like and not zeros.kwargs
    return calls and zeros.args == (inputs[0],) and output.args == (zeros,)


@dataclass(frozen=True)
class SkippedModule(OrderedModule):
    """A module that an extraction has skipped: it has nothing to read, to rewrite or to narrow, and costs nothing."""

    @classmethod
    def describe(cls, index: int, place: Place) -> SkippedModule:
        return cls(f"{index}.{place.module}", index, place, full_width=0, group_size=1, binary=False)

    @property
    def output_name(self) -> str:
        return ""

    def tap(self, model: TimmModel, consume: Consumer) -> list[Handle]:
        return []

    def taylor(self, feature: torch.Tensor, grad: torch.Tensor, power: int = 1) -> torch.Tensor:
        return feature.new_zeros(0)

    def observe(self, feature: torch.Tensor, grad: torch.Tensor, shift: torch.Tensor | None) -> torch.Tensor:
        return feature.new_zeros(0)

    def row_norms(self, model: TimmModel) -> torch.Tensor:
        return torch.zeros(0, dtype=torch.float64)

    def apply(self, model: TimmModel, transform: Transform) -> None:
        pass

    def forward(
        self,
        block: TimmLayer,
        x: torch.Tensor,
        width: Width,
        scores: torch.Tensor | None,
        tokens: int | None,
        shared: Shared,
        with_bias: bool = True,
    ) -> torch.Tensor:
        return torch.zeros_like(x)

    def narrowed(self, module: nn.Module, width: int) -> nn.Module:
        return module

    def prices(self, model: TimmModel) -> Prices:
        return Prices(0, 0, 0, 0, 0)

    def coordinates(self, model: TimmModel) -> dict[str, Coordinates]:
        return {}
