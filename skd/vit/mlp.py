"""timm's MLPs, plain and gated: their hidden neurons are sorted, and the first ones are kept."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from timm.layers import GluMlp, Mlp, SwiGLU
from timm.models.vitamin import GeGluMlp
from torch import nn

from skd.vit.attention import around
from skd.vit.conversions import Choices, SecondMoments, elimination_order
from skd.vit.layers import (
    along,
    count,
    first_columns,
    first_rows,
    has_bias,
    is_there,
    permute,
    require_linear,
    rows_kept,
)
from skd.vit.protocol import (
    Consumer,
    Coordinates,
    Handle,
    OrderedModule,
    Place,
    Prices,
    Shared,
    TimmLayer,
    TimmModel,
    Transform,
    Width,
)
from skd_kernels import masked_mlp, taylor_scores

MLP_GROUPS = 32  # groups of neurons of an MLP (METHOD 2)
# timm's and PyTorch's activation classes by the names of `skd_kernels.masked_mlp`.
_ACTIVATIONS = {
    "GELU": "gelu",
    "GELUTanh": "gelu_tanh",
    "QuickGELU": "quick_gelu",
    "SiLU": "silu",
    "Swish": "silu",
}
# The layers into and out of the hidden neurons of each MLP; the gate's layer comes first.
_LAYERS: dict[type[nn.Module], tuple[tuple[str, ...], str]] = {
    Mlp: (("fc1",), "fc2"),
    GluMlp: (("fc1",), "fc2"),
    SwiGLU: (("fc1_g", "fc1_x"), "fc2"),
    GeGluMlp: (("w0", "w1"), "w2"),
}


@dataclass(frozen=True)
class SortedMlp(OrderedModule):
    """An MLP whose width counts its hidden neurons.

    Attributes:
        act: name of the activation for `skd_kernels.masked_mlp`.
        gated: whether it has gate and value rows.
        inputs: names of the layers into the hidden neurons, the gate's first: one layer holding the rows of both, or
            two.
        output: name of the layer out of them.
    """

    act: str = ""
    gated: bool = False
    inputs: tuple[str, ...] = ()
    output: str = ""

    @classmethod
    def describe(cls, index: int, place: Place, mlp: TimmLayer) -> SortedMlp:
        """Describe the MLP in block `index`.

        Raises:
            ValueError: another class, or a feature without a function-preserving nested form.
        """
        name = f"blocks.{index}.{place.module}"
        if type(mlp) not in _LAYERS:
            known = ", ".join(sorted(known.__name__ for known in _LAYERS))
            raise ValueError(f"{name} is a {type(mlp).__name__}; it may be one of timm's {known}")
        inputs, output = _LAYERS[type(mlp)]
        for layer in (*inputs, output):
            require_linear(f"{name}.{layer}", getattr(mlp, layer))
        if any(module.p > 0 for module in mlp.modules() if isinstance(module, nn.Dropout)):
            raise ValueError(f"{name} has dropout; build the model with proj_drop_rate=0")
        if isinstance(mlp, GluMlp) and mlp.gate_last:
            raise ValueError(f"{name} is a GluMlp with gate_last=True; its gate rows must come first")
        hidden = getattr(mlp, output).in_features
        # GeGluMlp has its norm before the first layer. The others have it between the two, where it mixes neurons.
        binary = not isinstance(mlp, GeGluMlp) and is_there(mlp.norm)
        return cls(
            name=f"{index}.{place.module}",
            block=index,
            place=place,
            full_width=hidden,
            group_size=hidden if binary else mlp_group(hidden),
            binary=binary,
            act=_activation(name, mlp),
            gated=not isinstance(mlp, Mlp),
            inputs=inputs,
            output=output,
        )

    @property
    def output_name(self) -> str:
        return self.output

    def tap(self, model: TimmModel, consume: Consumer) -> list[Handle]:
        """The feature is what enters the output layer, (B, N, F)."""

        def hook(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            feature = inputs[0].detach()
            inputs[0].register_hook(lambda grad: consume(self, feature, grad))

        return [getattr(self.of(model), self.output).register_forward_pre_hook(hook)]

    def taylor(self, feature: torch.Tensor, grad: torch.Tensor, power: int = 1) -> torch.Tensor:
        return taylor_scores(feature, grad, power=power)

    def observe(self, feature: torch.Tensor, grad: torch.Tensor, shift: torch.Tensor | None) -> torch.Tensor:
        return self.taylor(feature, grad, power=2)

    def second_moments(self, feature: torch.Tensor, tokens: int | None, choices: Choices) -> SecondMoments | None:
        """One group of F neurons."""
        if self.binary or choices.neurons == Choices().neurons:
            return None
        return SecondMoments.of(feature[:, :tokens].flatten(0, 1)[None])

    @torch.no_grad()
    def refined(self, model: TimmModel, transform: Transform, moments: SecondMoments, choices: Choices) -> Transform:
        return elimination_order(moments.covariance()[0], self.output_layer(self.of(model)).weight)

    @torch.no_grad()
    def row_norms(self, model: TimmModel) -> torch.Tensor:
        """The norm of each neuron's row, or of its gate row and value row together."""
        first = [getattr(self.of(model), name).weight for name in self.inputs]
        rows = torch.cat([weight.double().norm(dim=1).reshape(-1, self.full_width) for weight in first])
        return rows.norm(dim=0)

    def apply(self, model: TimmModel, transform: Transform) -> None:
        """Permute rows of the input layers (gate and value alike) and columns of the output layer."""
        assert isinstance(transform, torch.Tensor)
        mlp = self.of(model)
        for layer in (getattr(mlp, name) for name in self.inputs):
            for tensor in layer.parameters():
                permute(tensor, transform, 0)
        permute(getattr(mlp, self.output).weight, transform, 1)

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
        mlp = getattr(block, self.place.module)
        if self.binary:
            whole: torch.Tensor = mlp(x)
            return whole
        first, *second = [getattr(mlp, name) for name in self.inputs]
        w1, b1 = first.weight, first.bias
        if second:  # gate and value rows are in two layers
            w1 = torch.cat([w1, second[0].weight])
            b1 = None if b1 is None else torch.cat([b1, second[0].bias])
        last = getattr(mlp, self.output)
        if last.in_features < self.full_width:  # an output layer of this width alone
            assert isinstance(width, int)
            w1 = rows_kept(w1, self.full_width, width)
            b1 = None if b1 is None else rows_kept(b1, self.full_width, width)
        # A norm here is one over the input, because a norm over the neurons makes the module binary.
        x = mlp.norm(x)
        b2 = last.bias if with_bias else None
        return masked_mlp(x, w1, b1, last.weight, b2, width, act=self.act, gated=self.gated, scores=scores)

    def gathered(self, model: TimmModel, width: int) -> int:
        """All rows of a gate and its values that are in two layers."""
        whole = self.binary or width == 0 or len(self.inputs) == 1
        return 0 if whole else count(*(getattr(self.of(model), name) for name in self.inputs))

    def output_bias(self, block: TimmLayer) -> torch.Tensor | None:
        bias: torch.Tensor | None = None
        if not self.binary:
            bias = getattr(getattr(block, self.place.module), self.output).bias
        return bias

    def narrowed(self, module: TimmLayer, width: int) -> nn.Module:
        inputs = [getattr(module, name) for name in self.inputs]
        memo: dict[int, nn.Module] = {id(layer): first_rows(layer, self.full_width, width) for layer in inputs}
        output = getattr(module, self.output)
        narrow: nn.Module = copy.deepcopy(module, memo | {id(output): first_columns(output, self.full_width, width)})
        return narrow

    def prices(self, model: TimmModel) -> Prices:
        mlp, block = self.of(model), model.blocks[self.block]
        output, first = getattr(mlp, self.output), [getattr(mlp, name) for name in self.inputs]
        dim, inputs = output.out_features, 2 if self.gated else 1
        per_unit = dim * (inputs + 1) + inputs * has_bias(first[0]) + 2 + (inputs - 1)
        fixed = dim * has_bias(output) + dim
        scaling = count(*first, output.weight)
        if self.binary:  # the norm over the neurons
            per_unit += 1
            scaling += count(mlp.norm)
        elif is_there(mlp.norm):  # a norm over the input
            fixed += dim
        return Prices(
            macs_per_unit=per_unit,
            macs_per_pair=0,
            macs_fixed=fixed,
            params_per_unit=scaling // max(self.full_width, 1),
            params_fixed=count(mlp, *around(block, self.place)) - scaling,
            unplanned_per_unit=1,  # the activation, which the whole model's figure counts twice
            unplanned_fixed=dim,
        )

    def coordinates(self, model: TimmModel) -> dict[str, Coordinates]:
        mlp, found = self.of(model), dict[str, Coordinates]()
        for name in self.inputs:
            layer = getattr(mlp, name)
            rows = along(0, self.full_width, layer.out_features // self.full_width, layer.weight.device)
            found |= {f"{name}.{kind}": rows for kind, _ in layer.named_parameters()}
        device = getattr(mlp, self.output).weight.device
        return found | {f"{self.output}.weight": along(1, self.full_width, 1, device)}


def mlp_group(hidden: int) -> int:
    """The neurons per group: ceil(F / 32), rounded up to a multiple of 8 when F >= 512."""
    group = max(-(-hidden // MLP_GROUPS), 1)
    return -(-group // 8) * 8 if hidden >= 512 else group


def _activation(name: str, mlp: TimmLayer) -> str:
    act = _ACTIVATIONS.get(type(mlp.act).__name__)
    if act is None:
        raise ValueError(f"{name} has activation {type(mlp.act).__name__}; it may be one of {sorted(_ACTIVATIONS)}")
    return "gelu_tanh" if act == "gelu" and getattr(mlp.act, "approximate", "none") == "tanh" else act
