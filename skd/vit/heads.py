"""Attention by whole heads: rotary positions or biases mix a head's coordinates, so heads are kept or left out.

The layers are those of timm's EvaAttention, AttentionRope and Beit's Attention. timm's EvaAttention cannot have fewer
heads than its width allows; AttentionRope can, and computes the same: a cut EvaAttention becomes one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.layers import AttentionRope, apply_rot_embed_cat
from torch import nn
from torch.autograd.function import FunctionCtx

from skd.vit.attention import around, check_no_dropout
from skd.vit.layers import along, count, first_columns, first_rows, has_bias, is_there, permute, require_linear
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
from skd_kernels import taylor_scores

Watch = Callable[[torch.Tensor], torch.Tensor]

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class HeadAttention(OrderedModule):
    """An attention whose width counts its heads: one unit of width is one whole head.

    Attributes:
        head_dim: D, the coordinates of a head.
        kv_heads: the number of heads of keys and values; fewer than those of queries in grouped-query attention.
    """

    head_dim: int = 0
    kv_heads: int = 0

    mixes_tokens: ClassVar[bool] = True

    @classmethod
    def describe(cls, index: int, place: Place, attn: TimmLayer, *, binary: bool = False) -> HeadAttention:
        """Describe the attention in block `index`; it is `binary` if its heads cannot be cut one by one.

        Raises:
            ValueError: a layer that is not plain, or dropout.
        """
        name = f"blocks.{index}.{place.module}"
        for layer in (*_inputs(attn), "proj"):
            require_linear(f"{name}.{layer}", getattr(attn, layer))
        check_no_dropout(name, attn)
        heads = attn.num_heads
        kv_heads = getattr(attn, "num_kv_heads", heads)
        whole = binary or kv_heads < heads or is_there(getattr(attn, "norm", None))
        return cls(
            name=f"{index}.{place.module}",
            block=index,
            place=place,
            full_width=heads,
            group_size=heads if whole else 1,
            binary=whole,
            head_dim=attn.proj.in_features // heads,
            kv_heads=kv_heads,
        )

    @property
    def output_name(self) -> str:
        return "proj"

    @property
    def num_heads(self) -> int:
        return self.full_width

    def tap(self, model: TimmModel, consume: Consumer) -> list[Handle]:
        """The feature is the output of the projections, (B, N, 3, H, D). A binary attention gets no hooks.

        No layer of timm's has this output, because biases are added separately or there are three layers. Therefore
        timm's forward is replaced, and the attention is computed here.
        """
        attn = self.of(model)
        if self.binary:
            return []

        def watch(qkv: torch.Tensor) -> torch.Tensor:
            feature = qkv.detach()
            qkv.register_hook(lambda grad: consume(self, feature, grad))
            return qkv

        def forward(x: torch.Tensor, **given: Shared) -> torch.Tensor:
            return self._attend(attn, x, self.full_width, None, given.get(self.place.shared), watch)

        return [_OtherForward(attn, forward)]

    def taylor(self, feature: torch.Tensor, grad: torch.Tensor, power: int = 1) -> torch.Tensor:
        """The scores summed over q, k and v and over the coordinates of each head."""
        scores = taylor_scores(feature.flatten(-3), grad.flatten(-3), power=power)
        return scores.reshape(3, -1, self.head_dim).sum((0, 2))

    def observe(self, feature: torch.Tensor, grad: torch.Tensor, shift: torch.Tensor | None) -> torch.Tensor:
        return self.taylor(feature, grad)

    @torch.no_grad()
    def row_norms(self, model: TimmModel) -> torch.Tensor:
        attn = self.of(model)
        if self.kv_heads < self.num_heads:
            return torch.ones(self.num_heads, dtype=torch.float64)  # heads share rows, and are not ordered
        layers = ("qkv",) if attn.qkv is not None else _PROJECTIONS
        rows = torch.cat([getattr(attn, name).weight.double().norm(dim=1) for name in layers])
        return rows.reshape(3, self.num_heads, -1).norm(dim=(0, 2))

    def apply(self, model: TimmModel, transform: Transform) -> None:
        """Permute whole heads: rows of the projections, their biases and the gate, columns of the output layer."""
        assert isinstance(transform, torch.Tensor)
        if self.binary:
            return
        own = dict(self.of(model).named_parameters())
        steps = torch.arange(self.head_dim, device=transform.device)
        order = (transform[:, None] * self.head_dim + steps).flatten()
        for name, (axis, _) in self.coordinates(model).items():
            permute(own[name], order, axis)

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
        attn = getattr(block, self.place.module)
        plain = scores is None and tokens is None and isinstance(width, int) and width == self.full_width
        if self.binary or plain:
            whole: torch.Tensor = attn(x, **{self.place.shared: shared})
            return whole[:, :tokens]
        watch = None if scores is None else lambda qkv: _AddScores.apply(qkv, scores, self)
        return self._attend(attn, x, width, tokens, shared, watch)

    def _attend(
        self,
        attn: TimmLayer,
        x: torch.Tensor,
        width: Width,
        tokens: int | None,
        rope: torch.Tensor | None,
        watch: Watch | None,
    ) -> torch.Tensor:
        """timm's forward with the first heads only; `watch` is called with q, k and v, (B, N, 3, heads, D)."""
        heads = width if isinstance(width, int) else self.full_width
        qkv = self._projected(attn, x, heads)
        q, k, v = (qkv if watch is None else watch(qkv)).permute(2, 0, 3, 1, 4).unbind(0)
        q = _rotated(attn, attn.q_norm(q), rope).type_as(v)
        k = _rotated(attn, attn.k_norm(k), rope).type_as(v)
        out = F.scaled_dot_product_attention(q[:, :, :tokens], k, v).transpose(1, 2)  # (B, tokens, heads, D)
        if isinstance(width, torch.Tensor):  # zeros replace the other heads, so that one graph serves every width
            out = torch.where((torch.arange(heads, device=x.device) < width)[:, None], out, 0.0)
        out, size = out.flatten(2), heads * self.head_dim
        if getattr(attn, "gate", None) is not None:
            bias = None if attn.gate.bias is None else attn.gate.bias[:size]
            out = out * F.linear(x[:, :tokens], attn.gate.weight[:size], bias).sigmoid()
        y = F.linear(out, attn.proj.weight[:, :size], attn.proj.bias)
        return torch.where(width > 0, y, 0.0) if isinstance(width, torch.Tensor) else y

    def _projected(self, attn: TimmLayer, x: torch.Tensor, heads: int) -> torch.Tensor:
        """q, k and v of the first `heads`, (B, N, 3, heads, D)."""
        shape = (self.num_heads, self.head_dim)
        if attn.qkv is not None:
            weight = attn.qkv.weight.unflatten(0, (3, *shape))[:, :heads].flatten(0, 2)
            bias = _fused_bias(attn)
            bias = None if bias is None else bias.unflatten(0, (3, *shape))[:, :heads].flatten()
            return F.linear(x, weight, bias).unflatten(-1, (3, heads, self.head_dim))
        size = heads * self.head_dim
        layers = [getattr(attn, name) for name in _PROJECTIONS]
        parts = [F.linear(x, la.weight[:size], None if la.bias is None else la.bias[:size]) for la in layers]
        return torch.stack(parts, 2).unflatten(-1, (heads, self.head_dim))

    def gathered(self, model: TimmModel, width: int) -> int:
        """The kept rows of q, k and v where they are in one layer, with their biases."""
        attn = self.of(model)
        if self.binary or width in (0, self.full_width) or attn.qkv is None:
            return 0
        bias = _fused_bias(attn)
        return (attn.qkv.weight.numel() + (0 if bias is None else len(bias))) // self.full_width * width

    def narrowed(self, module: TimmLayer, width: int) -> nn.Module:
        """timm's AttentionRope with the first heads; where q, k and v are one layer with biases, K's are zeros."""
        size, full = width * self.head_dim, self.num_heads * self.head_dim
        cut: TimmLayer = AttentionRope(
            module.proj.out_features,
            num_heads=width,
            attn_head_dim=self.head_dim,
            qkv_fused=module.qkv is not None,
            num_prefix_tokens=module.num_prefix_tokens,
            rotate_half=module.rotate_half,
            device="meta",
        )
        if module.qkv is not None:
            cut.qkv = _with_bias(first_rows(module.qkv, full, size), _fused_bias(module), 3, full, size)
        else:
            for name in _PROJECTIONS:
                setattr(cut, name, first_rows(getattr(module, name), full, size))
        if getattr(module, "gate", None) is not None:
            cut.gate = first_rows(module.gate, full, size)
        for name in ("q_norm", "k_norm"):
            setattr(cut, name, copy.deepcopy(getattr(module, name)))
        cut.proj = first_columns(module.proj, full, size)
        cut.fused_attn = module.fused_attn
        result: nn.Module = cut.train(module.training)
        return result

    def prices(self, model: TimmModel) -> Prices:
        block, attn = model.blocks[self.block], self.of(model)
        own, dim = dict(attn.named_parameters()), attn.proj.out_features
        layers = [getattr(attn, name) for name in _inputs(attn)]
        macs = sum(layer.weight.numel() + layer.out_features * has_bias(layer) for layer in layers)
        macs += attn.proj.weight.numel()
        fused_bias = own.get("q_bias") is not None  # q's and v's, and the zeros of k are added too
        rows = self.num_heads * self.head_dim
        macs += 3 * rows * fused_bias
        macs += rows * is_there(getattr(attn, "norm", None))
        macs += rows * is_there(getattr(attn, "q_norm", None))
        macs += self.kv_heads * self.head_dim * is_there(getattr(attn, "k_norm", None))
        macs += rows * (getattr(attn, "gate", None) is not None)  # the product with the gate
        per_unit, rest = divmod(macs, self.num_heads)
        scaling = sum(own[name].numel() for name in self.coordinates(model))
        per_head = scaling // self.num_heads
        return Prices(
            macs_per_unit=per_unit,
            macs_per_pair=2 * self.head_dim,
            macs_fixed=rest + dim * has_bias(attn.proj) + dim,  # the output bias, and the block's norm
            params_per_unit=per_head,
            params_fixed=count(attn, *around(block, self.place)) - per_head * self.num_heads,
            params_if_cut=self.head_dim * fused_bias,
            unplanned_fixed=dim,
        )

    def coordinates(self, model: TimmModel) -> dict[str, Coordinates]:
        """The heads lie along rows of the projections and the gate, and along columns of the output layer."""
        attn, found = self.of(model), dict[str, Coordinates]()
        device = attn.proj.weight.device
        for name, parameter in attn.named_parameters():
            layer = name.partition(".")[0]
            if layer in ("qkv", "q_bias", "v_bias", "gate", *_PROJECTIONS):
                found[name] = self._rows(len(parameter), device)
        found["proj.weight"] = along(1, self.num_heads, 1, device, each=self.head_dim)
        return found

    def _rows(self, rows: int, device: torch.device) -> Coordinates:
        """The coordinates of a parameter with this many rows.

        They are one or three runs of all heads, or one run of the heads of keys and values, each of which serves
        several heads of queries.
        """
        if rows == self.kv_heads * self.head_dim:
            share = self.num_heads // self.kv_heads
            shared = along(0, self.kv_heads, 1, device, each=self.head_dim)
            return Coordinates(0, shared.numbers * share)
        return along(0, self.num_heads, rows // (self.num_heads * self.head_dim), device, each=self.head_dim)


class _OtherForward:
    """Replaces the forward of `module` until the handle is removed, as a hook's handle is."""

    def __init__(self, module: nn.Module, forward: Callable[..., torch.Tensor]) -> None:
        self.module, self.before = module, vars(module).get("forward")
        module.forward = forward

    def remove(self) -> None:
        del self.module.forward
        if self.before is not None:  # the instance already had a forward of its own
            self.module.forward = self.before


class _ScoresContext(FunctionCtx):
    """What `_AddScores` keeps from its forward pass for its backward pass."""

    saved_tensors: tuple[torch.Tensor, ...]
    scores: torch.Tensor
    module: HeadAttention


class _AddScores(torch.autograd.Function):
    """The identity; its backward pass adds the Taylor scores of its input to a buffer."""

    @staticmethod
    def forward(
        ctx: _ScoresContext, feature: torch.Tensor, scores: torch.Tensor, module: HeadAttention
    ) -> torch.Tensor:
        ctx.save_for_backward(feature)
        ctx.scores, ctx.module = scores, module
        return feature.view_as(feature)

    @staticmethod
    def backward(ctx: _ScoresContext, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (feature,) = ctx.saved_tensors
        own = ctx.module.taylor(feature, grad)
        ctx.scores[: len(own)].add_(own)
        return grad, None, None


def _inputs(attn: TimmLayer) -> Sequence[str]:
    """The names of the linear layers that read the tokens."""
    gate = ("gate",) if getattr(attn, "gate", None) is not None else ()
    return (*(("qkv",) if attn.qkv is not None else _PROJECTIONS), *gate)


def _fused_bias(attn: TimmLayer) -> torch.Tensor | None:
    """The bias of q, k and v together. EvaAttention's and Beit's have three parts, of which K's is zero."""
    if getattr(attn, "q_bias", None) is not None:
        return torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    bias: torch.Tensor | None = attn.qkv.bias
    return bias


@torch.no_grad()
def _with_bias(layer: nn.Linear, bias: torch.Tensor | None, parts: int, full: int, size: int) -> nn.Linear:
    """`layer`, whose bias becomes the first `size` of every `full` numbers of `bias`."""
    if bias is not None:
        kept = bias.detach().unflatten(0, (parts, full))[:, :size].flatten()
        layer.bias = nn.Parameter(kept.clone(), requires_grad=layer.weight.requires_grad)
    return layer


def _rotated(attn: TimmLayer, heads: torch.Tensor, rope: torch.Tensor | None) -> torch.Tensor:
    """Queries or keys (B, heads, N, D) rotated by the position of their patch; prefix tokens are not rotated."""
    if rope is None:
        return heads
    prefix = attn.num_prefix_tokens
    turned = apply_rot_embed_cat(heads[:, :, prefix:], rope, half=attn.rotate_half)
    return torch.cat([heads[:, :, :prefix], turned], dim=2)
