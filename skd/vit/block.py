"""`SuperBlock`: a timm block whose attention and MLP take a width, and how a plain block is cut out of it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from skd.vit.layers import with_output_layer
from skd.vit.protocol import Module, OutputLayer, TimmModel, Width
from skd.vit.residual import Addition, Norm, Stream, add, is_watched
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
        # Copies those fields of timm's block that are not layers: an absent scale, and initial values of norms.
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
        x: torch.Tensor | Stream,
        widths: Sequence[Width] | None = None,
        tokens: int | None = None,
        scores: Sequence[torch.Tensor | None] | None = None,
        shared: Any = None,
        following: Norm | None = None,
        outputs: Sequence[OutputLayer | None] | None = None,
        **of_timm: Any,
    ) -> torch.Tensor | Stream:
        """Run the block at the given widths.

        A tensor (B, N, C) gives a tensor, (B, tokens, C) when `tokens` is given. A `Stream` gives a `Stream`, normed
        by `following`, the norm of what runs after the block. `widths` and `scores` have one item per module, and so
        have `outputs`: layers that take the place of the modules' own for this call.
        timm's own forward of the model may also call this; `of_timm` takes the arguments that timm gives its blocks.

        Raises:
            ValueError: an attention mask, or another argument that is not supported.
        """
        for module in self.modules_in_order:
            shared = of_timm.pop(module.place.shared, shared)
        given = [name for name, value in of_timm.items() if value is not None and value is not False]
        if given:
            raise ValueError(f"{', '.join(given)}: the blocks of a super-network do not take it")
        widths = [module.full_width for module in self.modules_in_order] if widths is None else widths
        stream = x if isinstance(x, Stream) else Stream(x)
        for index, width in enumerate(widths):
            own = None if scores is None else scores[index]
            output = None if outputs is None else outputs[index]
            norm = self._norm_from(index + 1, widths, following)
            stream = self._step(index, stream, width, tokens, own, shared, norm, output)
        return stream if isinstance(x, Stream) else stream.x

    def step(
        self,
        index: int,
        x: torch.Tensor,
        width: Width | None = None,
        tokens: int | None = None,
        scores: torch.Tensor | None = None,
        shared: Any = None,
        output: OutputLayer | None = None,
    ) -> torch.Tensor:
        """The first `tokens` (None: all) of x plus the branch of module `index` at `width` (None: full)."""
        width = self.modules_in_order[index].full_width if width is None else width
        return self._step(index, Stream(x), width, tokens, scores, shared, None, output).x

    def _step(
        self,
        index: int,
        stream: Stream,
        width: Width,
        tokens: int | None,
        scores: torch.Tensor | None,
        shared: Any,
        following: Norm | None,
        output: OutputLayer | None = None,
    ) -> Stream:
        """As `step`, on a stream that may be normed already; the result is normed by `following`."""
        module = self.modules_in_order[index]
        place, kept = module.place, stream.leading(tokens)
        norm, scale = getattr(self, place.norm), getattr(self, place.scale, None)
        if _is_skipped(module, width):
            return _skip(kept, [getattr(self, place.module), norm, scale, shared])
        inputs = stream if module.mixes_tokens else kept
        drop_path = getattr(self, place.drop_path)
        block = self if output is None else with_output_layer(self, module, output)
        addition = Addition.of(kept.x, scale, drop_path, None if place.post_norm else following)
        bias = module.output_bias(block) if addition is not None and addition.takes_bias else None
        if place.post_norm:
            y = norm(module.forward(block, inputs.x, width, scores, tokens, shared))
        else:
            normed = norm(inputs.x) if inputs.normed is None else inputs.normed
            y = module.forward(block, normed, width, scores, tokens, shared, with_bias=bias is None)
        if isinstance(width, torch.Tensor) and (place.post_norm or module.binary):
            # A module at width 0 on the device returns zeros; but a norm behind it, or a binary module, does not.
            y = torch.where(width > 0, y, 0.0)
        if addition is None:
            return add(kept.x, y, scale, drop_path)
        return addition.add(kept.x, y, bias, width)

    def entry_norm(self, widths: Sequence[Width], tokens: int | None, following: Norm | None) -> Norm | None:
        """The norm that the block applies first to its input, or `following` if it runs no module.

        None means that the block should get the stream without a normed form. This is so where it skips its first
        module and needs the first `tokens` only, because norming all tokens would be wasted work. Otherwise such a
        block needs all tokens in their normed form, and only the first of the stream.
        """
        if tokens is not None and _is_skipped(self.modules_in_order[0], widths[0]):
            return None
        norm = self._norm_from(0, widths, following)
        return norm if norm is None or tokens is None else norm._replace(sum_tokens=tokens)

    def _norm_from(self, start: int, widths: Sequence[Width], following: Norm | None) -> Norm | None:
        """The norm of the first module from `start` on that runs, or `following`."""
        for module, width in zip(self.modules_in_order[start:], widths[start:], strict=True):
            if not _is_skipped(module, width):
                return None if module.place.post_norm else Norm.of(getattr(self, module.place.norm))
        return following

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


def run_block(
    block: nn.Module,
    stream: Stream,
    *arguments: Any,
    following: Norm | None,
    recomputes: bool,
    outputs: Sequence[OutputLayer | None] = (),
) -> Stream:
    """Call `block` as a module; with `recomputes` its activations are computed again in the backward pass.

    A block that has hooks or is wrapped takes and returns the residual stream as a tensor, without its normed form
    (see `block_norm`). `outputs` are as for `SuperBlock.forward`; nothing of the block changes, so that other threads
    may run it at the same time.
    """
    call = partial(checkpoint, block, use_reentrant=False) if recomputes else block
    more = [outputs] if any(output is not None for output in outputs) else []
    if _takes_a_tensor(block):
        return Stream(call(stream.x, *arguments, *([None, *more] if more else [])))
    result: Stream = call(stream, *arguments, following, *more)
    return result


def block_norm(block: Any, widths: Sequence[Width], tokens: int | None, following: Norm | None) -> Norm | None:
    """`SuperBlock.entry_norm`; None for a block that `run_block` gives a tensor."""
    return None if _takes_a_tensor(block) else block.entry_norm(widths, tokens, following)


def _takes_a_tensor(block: nn.Module) -> bool:
    return not isinstance(block, SuperBlock) or is_watched(block)


def first_block(model: TimmModel) -> nn.Module:
    """The block of a model that runs first: what enters it is where gradients of activations begin."""
    first: nn.Module = model.blocks[0]
    return first


def _is_skipped(module: Module, width: Width) -> bool:
    """Whether the host knows that nothing of the module runs."""
    return module.full_width == 0 or (isinstance(width, int) and width == 0)


def _skip(stream: Stream, parts: Sequence[Any]) -> Stream:
    """Return the stream unchanged, but keep the parameters of what is skipped in the autograd graph.

    Their gradients are then zeros instead of None, so that DistributedDataParallel finds no unused parameter. They
    are attached to the normed form where there is one, because after the last block only that is read.
    """
    if not torch.is_grad_enabled():
        return stream
    layers = [parameter for part in parts if isinstance(part, nn.Module) for parameter in part.parameters()]
    tensors = [part for part in parts if isinstance(part, torch.Tensor)]
    nothing = [tensor.reshape(-1)[:0].sum() for tensor in (*layers, *tensors) if tensor.requires_grad]
    if not nothing:
        return stream
    zero = torch.stack(nothing).sum()
    return Stream(stream.x + zero) if stream.normed is None else Stream(stream.x, stream.normed + zero)
