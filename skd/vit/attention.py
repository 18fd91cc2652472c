"""timm's plain `Attention`: V, and Q with K, are rotated within each head, which keeps its leading coordinates."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import nn

from skd.vit.conversions import Choices, SecondMoments, balanced_bases
from skd.vit.layers import along, count, first_columns, first_rows, has_bias, is_there, require_linear, rows_kept
from skd.vit.protocol import (
    Consumer,
    Coordinates,
    Handle,
    Module,
    Place,
    Prices,
    Rotation,
    Shared,
    TimmLayer,
    TimmModel,
    Transform,
    Width,
)
from skd_kernels import Moments, masked_attention, taylor_scores, token_moments

ATTENTION_GROUP = 8  # coordinates of a head (METHOD 2)


@dataclass(frozen=True)
class RotatedAttention(Module):
    """An attention whose width counts the coordinates of every head.

    Attributes:
        num_heads: H.
        rotates_v, rotates_qk: which of WPAC's rotations preserve its function.
    """

    num_heads: int = 0
    rotates_v: bool = False
    rotates_qk: bool = False

    mixes_tokens: ClassVar[bool] = True

    @classmethod
    def describe(cls, index: int, place: Place, attn: TimmLayer) -> RotatedAttention:
        """Describe the attention in block `index`.

        Raises:
            ValueError: another class, or a feature without a function-preserving nested form.
        """
        name = f"blocks.{index}.{place.module}"
        if type(attn) is not Attention:
            raise ValueError(
                f"{name} is a {type(attn).__name__}; differential and other attention layers are not supported, "
                "it must be timm's Attention"
            )
        require_linear(f"{name}.qkv", attn.qkv)
        require_linear(f"{name}.proj", attn.proj)
        check_no_dropout(name, attn)
        qk_norm = is_there(attn.q_norm) or is_there(attn.k_norm)
        mixed = is_there(attn.norm) or getattr(attn, "gate", None) is not None  # its norm and its gate see all of V
        binary, width = qk_norm or mixed, attn.head_dim
        return cls(
            name=f"{index}.{place.module}",
            block=index,
            place=place,
            full_width=width,
            group_size=width if binary else min(ATTENTION_GROUP, max(width, 1)),
            binary=binary,
            num_heads=attn.num_heads,
            rotates_v=not mixed,
            rotates_qk=not binary,
        )

    @property
    def chosen_group(self) -> int | None:
        return None if self.binary else self.group_size

    def with_attention_group(self, size: int) -> RotatedAttention:
        return self if self.binary else replace(self, group_size=min(size, self.full_width))

    @property
    def coordinates_per_unit(self) -> int:
        return self.num_heads

    @property
    def output_name(self) -> str:
        return "proj"

    @property
    def score_shape(self) -> tuple[int, ...]:
        return 3, self.num_heads, self.full_width

    def tap(self, model: TimmModel, consume: Consumer) -> list[Handle]:
        """The feature is the qkv projection's output, (B, N, 3, H, D)."""

        def hook(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            shape = (*output.shape[:-1], *self.score_shape)
            feature = output.detach().view(shape)  # detached: a hook that held its own graph would never be freed
            output.register_hook(lambda grad: consume(self, feature, grad.reshape(shape)))

        return [self.of(model).qkv.register_forward_hook(hook)]

    def taylor(self, feature: torch.Tensor, grad: torch.Tensor, power: int = 1) -> torch.Tensor:
        return taylor_scores(feature.flatten(-3), grad.flatten(-3), power=power).reshape(self.score_shape)

    def observe(self, feature: torch.Tensor, grad: torch.Tensor, shift: torch.Tensor | None) -> Moments:
        """The weighted moments of 3 H groups of D coordinates."""
        return token_moments(feature.flatten(2, 3), grad.flatten(2, 3), shift)

    def read_scores(self, scores: torch.Tensor, width: int) -> torch.Tensor:
        """The scores of q, k and v added, and averaged over the heads."""
        return scores.sum(0).mean(0)[:width]

    def row_norms(self, model: TimmModel) -> torch.Tensor:
        norms: torch.Tensor = self.of(model).qkv.weight.double().norm(dim=1)
        return norms.reshape(self.score_shape)

    def transform(self, statistic: torch.Tensor) -> Rotation:
        """Principal axes of the (3, H, D, D) covariances: V's own, and those of Q and K together."""
        q, k, v = statistic
        return Rotation.orthogonal(
            v=principal_axes(v) if self.rotates_v else None,
            qk=principal_axes(q + k) if self.rotates_qk else None,
        )

    def second_moments(self, feature: torch.Tensor, tokens: int | None, choices: Choices) -> SecondMoments | None:
        """3 H groups of D coordinates: queries, keys, and the averages of values that enter the output projection."""
        if self.binary or (choices.qk, choices.v) == Choices()[:2]:
            return None
        q, k, v = feature.permute(2, 0, 3, 1, 4).double()  # (B, H, N, D) each
        q = q[:, :, :tokens]
        read = F.scaled_dot_product_attention(q, k, v)
        return SecondMoments.joined([SecondMoments.of(part.transpose(0, 1).flatten(1, 2)) for part in (q, k, read)])

    def refined(self, model: TimmModel, transform: Transform, moments: SecondMoments, choices: Choices) -> Rotation:
        """Keys are centred, because the softmax ignores what is the same for all keys; queries are not."""
        assert isinstance(transform, Rotation)
        q, k, v, proj = transform.q, transform.k, transform.v, transform.proj
        about_zero, covariance = (m.chunk(3) for m in (moments.about_zero(), moments.covariance()))
        if choices.qk == "balanced":
            q, k = balanced_bases(about_zero[0], covariance[1])
        if choices.v == "output":
            columns = self.of(model).proj.weight.double().unflatten(1, (self.num_heads, self.full_width))  # (C, H, D)
            proj, v = balanced_bases(torch.einsum("chd,che->hde", columns, columns), about_zero[2])
        return Rotation(q, k, v, proj)

    def ordering(self, scores: torch.Tensor) -> Rotation:
        """Permutations within each head: V's by its scores, those of Q and K jointly by the sum of theirs."""
        q, k, v = scores
        return Rotation.orthogonal(
            v=_permutations(v) if self.rotates_v else None,
            qk=_permutations(q + k) if self.rotates_qk else None,
        )

    @torch.no_grad()
    def apply(self, model: TimmModel, transform: Transform) -> None:
        """W <- T^T W and b <- T^T b per head; W_proj <- W_proj T undoes V's, and the basis of K that of Q."""
        assert isinstance(transform, Rotation)
        attn, parts = self.of(model), (transform.q, transform.k, transform.v)
        for tensor in (attn.qkv.weight, attn.qkv.bias):
            if tensor is None:
                continue
            rows = tensor.double().reshape(*self.score_shape, -1)
            turned = [r if t is None else t.mT @ r for t, r in zip(parts, rows, strict=True)]
            tensor.copy_(torch.stack(turned).reshape(tensor.shape))
        if transform.proj is not None:
            weight = attn.proj.weight
            columns = weight.double().unflatten(1, (self.num_heads, self.full_width))  # (C, H, D)
            weight.copy_((columns.transpose(0, 1) @ transform.proj).transpose(0, 1).flatten(1))

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
        if self.binary:
            whole: torch.Tensor = attn(x)
            return whole[:, :tokens]
        proj, weight, bias = attn.proj, attn.qkv.weight, attn.qkv.bias
        if proj.in_features < self.num_heads * self.full_width:  # an output layer of this width alone
            assert isinstance(width, int)
            weight = rows_kept(weight, self.full_width, width)
            bias = None if bias is None else rows_kept(bias, self.full_width, width)
        return masked_attention(
            x,
            weight,
            bias,
            proj.weight,
            proj.bias if with_bias else None,
            width,
            num_heads=self.num_heads,
            scale=self.full_width**-0.5,
            scores=scores,
            queries=tokens,
        )

    def gathered(self, model: TimmModel, width: int) -> int:
        """The kept rows of q, k and v, with their biases, and the kept columns of proj."""
        if self.binary or width in (0, self.full_width):
            return 0
        attn = self.of(model)
        return count(attn.qkv, attn.proj.weight) // self.full_width * width

    def output_bias(self, block: TimmLayer) -> torch.Tensor | None:
        bias: torch.Tensor | None = None if self.binary else getattr(block, self.place.module).proj.bias
        return bias

    def narrowed(self, module: TimmLayer, width: int) -> nn.Module:
        """As `Module.narrowed`. timm scales by ``width ** -0.5``; the rows of Q are rescaled to make up for it."""
        qkv = first_rows(module.qkv, self.full_width, width)
        proj = first_columns(module.proj, self.full_width, width)
        with torch.no_grad():
            for tensor in qkv.parameters():
                tensor[: self.num_heads * width] *= math.sqrt(width / self.full_width)
        narrow: TimmLayer = copy.deepcopy(module, {id(module.qkv): qkv, id(module.proj): proj})
        narrow.head_dim, narrow.attn_dim, narrow.scale = width, self.num_heads * width, width**-0.5
        result: nn.Module = narrow
        return result

    def prices(self, model: TimmModel) -> Prices:
        block, attn = model.blocks[self.block], self.of(model)
        dim, norms = attn.qkv.in_features, [attn.q_norm, attn.k_norm, attn.norm]
        per_head = 4 * dim + 3 * has_bias(attn.qkv) + sum(is_there(norm) for norm in norms)
        gate = getattr(attn, "gate", None)
        if gate is not None:
            per_head += dim + has_bias(gate) + 1  # and the product with the gate
        scaling = count(attn.qkv, attn.proj.weight, gate, *norms)
        return Prices(
            macs_per_unit=self.num_heads * per_head,
            macs_per_pair=2 * self.num_heads,
            macs_fixed=dim * has_bias(attn.proj) + dim,  # the output bias, and the block's norm
            params_per_unit=scaling // max(self.full_width, 1),
            params_fixed=count(attn, *around(block, self.place)) - scaling,
            unplanned_fixed=dim,
        )

    def coordinates(self, model: TimmModel) -> dict[str, Coordinates]:
        attn, width, device = self.of(model), self.full_width, self.of(model).qkv.weight.device
        rows = along(0, width, 3 * self.num_heads, device)
        bias = {"qkv.bias": rows} if attn.qkv.bias is not None else {}
        return {"qkv.weight": rows} | bias | {"proj.weight": along(1, width, self.num_heads, device)}


def check_no_dropout(name: str, attn: TimmLayer) -> None:
    """Check that the attention has no dropout.

    Raises:
        ValueError: it drops some of its weights or outputs.
    """
    if attn.attn_drop.p > 0 or attn.proj_drop.p > 0:
        raise ValueError(
            f"{name} has dropout; build the model with attn_drop_rate=0 and proj_drop_rate=0 "
            "(drop_path_rate is supported)"
        )


def around(block: TimmLayer, place: Place) -> tuple[nn.Module, nn.Module | nn.Parameter | None]:
    """The norm of a module in its block, and its layer scale (a layer, a parameter or None)."""
    return getattr(block, place.norm), getattr(block, place.scale, None)


def principal_axes(covariance: torch.Tensor) -> torch.Tensor:
    """Eigenvectors of symmetric (..., D, D) as columns, eigenvalues descending, float64.

    The largest entry of each column is positive, so the result does not depend on the solver's signs.
    """
    symmetric = (covariance + covariance.mT) / 2
    axes = torch.linalg.eigh(symmetric)[1].flip(-1)
    peak = axes.gather(-2, axes.abs().argmax(-2, keepdim=True))
    return axes * torch.where(peak < 0, -1.0, 1.0)


def _permutations(scores: torch.Tensor) -> torch.Tensor:
    """(H, D) scores to (H, D, D) permutation matrices, whose columns are the old coordinates, best first."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return torch.eye(scores.shape[-1], dtype=torch.float64, device=scores.device)[order].mT
