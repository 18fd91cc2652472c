"""`SuperBlock`: a timm block whose attention and MLP take a width, and how a plain block is cut out of it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from skd.vit.protocol import Module, TimmModel, Width
from skd.vit.skipped import is_skipped, skipped_like


class SuperBlock(nn.Module):
    """A timm block whose modules take a width; its layers and parameters keep their names.

    ``forward(x)`` is the timm block's function; narrower widths keep leading coordinates. Width 0 skips the module
    together with its norm.

    Attributes:
        block_class: timm's class of the block.
        modules_in_order: the descriptions of its modules.
    """

    def __init__(self, block: nn.Module, modules: Sequence[Module]) -> None:
        super().__init__()
        self.block_class = getattr(block, "block_class", type(block))
        self.modules_in_order = tuple(modules)
        # Fields of timm's block that are no layers: a scale that is not there, what norms are initialised to.
        plain = {"init_values", *(module.place.scale for module in modules)}
        self.settings = {name: value for name, value in vars(block).items() if name in plain}
        for name, parameter in block._parameters.items():
            self.register_parameter(name, parameter)
        for name, child in block.named_children():
            self.add_module(name, child)
        for name, value in self.settings.items():
            setattr(self, name, value)
        self.train(block.training)

    def forward(
        self,
        x: torch.Tensor,
        widths: Sequence[Width] | None = None,
        tokens: int | None = None,
        scores: Sequence[torch.Tensor | None] | None = None,
        shared: Any = None,
        **of_timm: Any,
    ) -> torch.Tensor:
        """Run the block at the given widths.

        Returns (B, N, C), or (B, tokens, C) when `tokens` is given. `widths` and `scores` have one item per module.
        timm's own forward of the model may also call this; `of_timm` takes the arguments that timm gives its blocks.

        Raises:
            ValueError: an attention mask, or another argument, which nothing here takes.
        """
        for module in self.modules_in_order:
            shared = of_timm.pop(module.place.shared, shared)
        given = [name for name, value in of_timm.items() if value is not None and value is not False]
        if given:
            raise ValueError(f"{', '.join(given)}: the blocks of a super-network do not take it")
        for index, module in enumerate(self.modules_in_order):
            width = module.full_width if widths is None else widths[index]
            x = self.step(index, x, width, tokens, None if scores is None else scores[index], shared)
        return x

    def step(
        self,
        index: int,
        x: torch.Tensor,
        width: Width | None = None,
        tokens: int | None = None,
        scores: torch.Tensor | None = None,
        shared: Any = None,
    ) -> torch.Tensor:
        """The first `tokens` (None: all) of x plus the branch of module `index` at `width` (None: full)."""
        module = self.modules_in_order[index]
        place, width = module.place, module.full_width if width is None else width
        norm, scale = getattr(self, place.norm), getattr(self, place.scale, None)
        kept = x[:, :tokens]
        if module.full_width == 0 or (isinstance(width, int) and width == 0):
            return _skip(kept, [getattr(self, place.module), norm, scale, shared])
        inputs = x if module.mixes_tokens else kept
        y = module.forward(self, inputs if place.post_norm else norm(inputs), width, scores, tokens, shared)
        if place.post_norm:
            y = norm(y)
        if isinstance(width, torch.Tensor) and (place.post_norm or module.binary):
            # A module at width 0 gives zeros, but a norm after it, or a whole module, does not.
            y = torch.where(width > 0, y, 0.0)
        if scale is not None:
            y = scale(y) if isinstance(scale, nn.Module) else scale * y
        drop_path: nn.Module = getattr(self, place.drop_path)
        return kept + drop_path(y)

    def cut(self, widths: Sequence[int]) -> nn.Module:
        """The timm block at the given widths; every tensor is a fresh copy."""
        replaced: dict[str, Any] = {}
        for module, width in zip(self.modules_in_order, widths, strict=True):
            replaced |= self._cut_branch(module, width)
        # A timm block without its constructor, which would allocate and initialise full-size weights.
        plain: Any = self.block_class.__new__(self.block_class)
        nn.Module.__init__(plain)
        for name, value in self.settings.items():
            setattr(plain, name, value)
        for name, child in (*self._parameters.items(), *self.named_children()):
            setattr(plain, name, replaced[name] if name in replaced else copy.deepcopy(child))
        if 0 in widths and self.modules_in_order[0].place.post_norm and "init_values" in self.settings:
            plain.init_values = None  # what timm's init_weights gives to both norms: not to be asked of an Identity
        result: nn.Module = plain.train(self.training)
        return result

    def _cut_branch(self, module: Module, width: int) -> dict[str, Any]:
        """The new values of the block's fields for one branch, by name; empty if the branch keeps its full width."""
        place = module.place
        whole = getattr(self, place.module)
        if is_skipped(whole) or 0 < width == module.full_width:
            return {}
        if width:
            return {place.module: module.narrowed(whole, width)}
        gone: dict[str, Any] = {place.norm: nn.Identity(), place.drop_path: nn.Identity()}
        scale = getattr(self, place.scale, None)
        if scale is not None:
            gone[place.scale] = nn.Identity() if isinstance(scale, nn.Module) else place.no_scale
        return {place.module: skipped_like(whole)} | gone


def first_block(model: TimmModel) -> nn.Module:
    """The block of a model that runs first: what enters it is where gradients of activations begin."""
    first: nn.Module = model.blocks[0]
    return first


def _skip(x: torch.Tensor, parts: Sequence[Any]) -> torch.Tensor:
    """Return x unchanged, but keep the parameters of what is skipped in the autograd graph.

    They then get zero gradients instead of None, so that DistributedDataParallel finds no unused parameter.
    """
    if not torch.is_grad_enabled():
        return x
    layers = [parameter for part in parts if isinstance(part, nn.Module) for parameter in part.parameters()]
    tensors = [part for part in parts if isinstance(part, torch.Tensor)]
    nothing = [tensor.reshape(-1)[:0].sum() for tensor in (*layers, *tensors) if tensor.requires_grad]
    return x + torch.stack(nothing).sum() if nothing else x
