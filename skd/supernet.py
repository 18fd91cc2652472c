"""The super-network: a timm Vision Transformer that can run at the widths of any entry of its dropout list."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from timm.models import checkpoint_seq
from torch import nn

from skd.architecture import ModuleInfo, describe, unwrapped
from skd.construction import remember_construction
from skd.dropout_list import DropoutList
from skd.prices import CostModel, cost_model
from skd_kernels import masked_attention, masked_mlp

Width = int | torch.Tensor


class SuperBlock(nn.Module):
    """A timm Block (or ResPostBlock) whose attention and MLP take a width; children keep their names.

    ``forward(x)`` is the timm block's function; narrower widths keep leading coordinates. Width 0 skips the module
    together with its norm.
    """

    def __init__(self, block: nn.Module, attn: ModuleInfo, mlp: ModuleInfo) -> None:
        super().__init__()
        self.block_class = type(block)
        self.post_norm = self.block_class.__name__ == "ResPostBlock"
        self.init_values = getattr(block, "init_values", None)
        self.attn_info, self.mlp_info = attn, mlp
        for name, child in block.named_children():
            self.add_module(name, child)
        self.train(block.training)

    def forward(
        self,
        x: torch.Tensor,
        attn_width: Width | None = None,
        mlp_width: Width | None = None,
        tokens: int | None = None,
        scores: Sequence[torch.Tensor | None] = (None, None),
    ) -> torch.Tensor:
        """(B, N, C), or of the first `tokens` alone: (B, tokens, C); `scores` of the attention and of the MLP."""
        return self.feed_forward(self.attend(x, attn_width, scores[0], tokens), mlp_width, scores[1])

    def attend(
        self,
        x: torch.Tensor,
        width: Width | None = None,
        scores: torch.Tensor | None = None,
        tokens: int | None = None,
    ) -> torch.Tensor:
        """x plus the attention branch at `width` (None: full), of the first `tokens` (None: all).

        `scores` as in `masked_attention`.
        """
        return self._residual(x, self.attn_info, self._attention, width, scores, tokens)

    def feed_forward(
        self, x: torch.Tensor, width: Width | None = None, scores: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x plus the MLP branch at `width` (None: full); `scores` as in `masked_mlp`."""
        return self._residual(x, self.mlp_info, self._mlp, width, scores, None)

    def _residual(
        self, x: torch.Tensor, info: ModuleInfo, branch: Any, width: Width | None, scores: Any, tokens: int | None
    ) -> torch.Tensor:
        width = info.full_width if width is None else width
        which = "1" if info.kind == "attn" else "2"
        norm, drop_path = getattr(self, f"norm{which}"), getattr(self, f"drop_path{which}")
        scale = getattr(self, f"ls{which}", nn.Identity())
        if info.full_width == 0 or (isinstance(width, int) and width == 0):
            return _skip(x[:, :tokens], [getattr(self, info.kind), norm, scale])
        y = branch(x if self.post_norm else norm(x), width, scores, tokens)
        if self.post_norm:
            y = norm(y)
        if isinstance(width, torch.Tensor) and (self.post_norm or info.binary):
            # The operation gives zeros at width 0, but a norm after it, or a whole module, does not.
            y = torch.where(width > 0, y, 0.0)
        return x[:, :tokens] + drop_path(scale(y))

    def _attention(self, x: torch.Tensor, width: Width, scores: Any, tokens: int | None) -> torch.Tensor:
        attn: Any = self.attn
        if self.attn_info.binary:
            return attn(x)[:, :tokens]
        return masked_attention(
            x,
            attn.qkv.weight,
            attn.qkv.bias,
            attn.proj.weight,
            attn.proj.bias,
            width,
            num_heads=self.attn_info.num_heads,
            scores=scores,
            queries=tokens,
        )

    def _mlp(self, x: torch.Tensor, width: Width, scores: Any, tokens: None) -> torch.Tensor:
        mlp: Any = self.mlp
        if self.mlp_info.binary:
            return mlp(x)
        info = self.mlp_info
        first, *second = [getattr(mlp, name) for name in info.inputs]
        w1, b1 = first.weight, first.bias
        if second:  # gate and value rows are in two layers
            w1 = torch.cat([w1, second[0].weight])
            b1 = None if b1 is None else torch.cat([b1, second[0].bias])
        last = getattr(mlp, info.output)
        # Only a norm over the input is left here: one over the neurons makes the module binary.
        x = mlp.norm(x)
        return masked_mlp(x, w1, b1, last.weight, last.bias, width, act=info.act, gated=info.gated, scores=scores)


def _what_prices_depend_on(model: Any) -> tuple[int, ...]:
    """What may change in a model whose blocks stay as they are. Asked in every step: the blocks are not walked."""
    outside = [part for name, part in model.named_children() if name != "blocks"]
    parameters = chain(model.parameters(recurse=False), *(part.parameters() for part in outside))
    return model.patch_embed.num_patches, sum(parameter.numel() for parameter in parameters)


def _skip(x: torch.Tensor, modules: Sequence[nn.Module]) -> torch.Tensor:
    """`x`, with the parameters of skipped modules in the graph: their gradients are zeros, not None."""
    if not torch.is_grad_enabled():
        return x
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    nothing = [p.reshape(-1)[:0].sum() for p in parameters]
    return x + torch.stack(nothing).sum() if nothing else x


class SuperNet(nn.Module):
    """A converted Vision Transformer and its dropout list of nested sub-networks.

    ``supernet(images)`` is the full network, ``supernet(images, entry=i)`` the i-th sub-network. `entry` may be a
    0-d integer tensor on the device: then widths are looked up there and nothing is read by the host.

    Attributes:
        model: the timm model, a deep copy whose blocks are `SuperBlock`s.
        infos: what is known of each module, in order.
        costs: prices of every width (`skd.cost`); they follow changes of `model` by hand (another head, another
            image size), and those of the dropout list with them.
        dropout_list: settable; a new one must name the same modules and start at the full widths.
        scores: None, or for each module a buffer (or None) to which backward passes add its Taylor scores; see
            `masked_attention` and `masked_mlp`.

    State-dict keys are timm's own. `SuperNet(model)` reorders no weight; `skd.convert` concentrates the knowledge of
    the copy first. With ``copy=False`` the model itself is taken over and its blocks replaced: for callers who have
    no other use for it.
    """

    model: Any
    width_table: torch.Tensor

    def __init__(self, model: Any, dropout_list: DropoutList | None = None, *, copy: bool = True) -> None:
        super().__init__()
        model = unwrapped(model)
        infos = describe(model)
        model = deepcopy(model) if copy else model
        remember_construction(model)
        self.model = model
        self.infos = infos
        self._costs: CostModel = cost_model(model, infos)
        self._priced = _what_prices_depend_on(model)
        self.scores: list[torch.Tensor | None] | None = None
        blocks = [SuperBlock(b, infos[2 * i], infos[2 * i + 1]) for i, b in enumerate(model.blocks)]
        self.model.blocks = nn.Sequential(*blocks)
        groups = sum(-(-info.full_width // info.group_size) for info in infos)
        device = next(model.parameters()).device
        # Static shape: the list grows in place, without a new graph.
        table = torch.zeros(1 + groups, len(infos), dtype=torch.int32, device=device)
        self.register_buffer("width_table", table, persistent=False)
        full = DropoutList(self.modules_in_order, [[info.full_width for info in infos]])
        self.dropout_list = full if dropout_list is None else dropout_list
        self.register_state_dict_post_hook(_strip_prefix)
        self.register_load_state_dict_pre_hook(_add_prefix)
        self.train(model.training)

    @property
    def modules_in_order(self) -> tuple[str, ...]:
        """Names of the modules: "0.attn", "0.mlp", "1.attn", ..."""
        return tuple(info.name for info in self.infos)

    @property
    def costs(self) -> CostModel:
        self._update_costs()
        return self._costs

    @property
    def dropout_list(self) -> DropoutList:
        self._update_costs()
        return self._dropout_list

    @dropout_list.setter
    def dropout_list(self, value: DropoutList) -> None:
        if not isinstance(value, DropoutList):
            raise ValueError(f"dropout_list is a {type(value).__name__}; it must be a DropoutList")
        if value.modules != self.modules_in_order:
            raise ValueError(f"dropout_list is of modules {value.modules}; this network has {self.modules_in_order}")
        full = [info.full_width for info in self.infos]
        if value.widths[0].tolist() != full:
            raise ValueError(f"dropout_list starts at {value.widths[0].tolist()}; entry 0 must be {full}")
        for info, widths in zip(self.infos, value.widths.T, strict=True):
            if info.binary and not set(widths.tolist()) <= {0, info.full_width}:
                raise ValueError(f"dropout_list: {info.name} may only have the widths 0 and {info.full_width}")
        self._dropout_list = replace(value, costs=self.costs)
        self._fill_table()

    def _update_costs(self) -> None:
        priced = _what_prices_depend_on(self.model)
        if priced != self._priced:
            self._costs, self._priced = cost_model(self.model, self.infos), priced
            self._dropout_list = replace(self._dropout_list, costs=self._costs, removed_macs=None)

    def _fill_table(self) -> None:
        widths = torch.from_numpy(self._dropout_list.widths.copy()).to(self.width_table)
        if len(widths) > len(self.width_table):
            self.width_table = torch.zeros_like(widths)
        # Rows past the end repeat the smallest sub-network: no index reads garbage.
        with torch.no_grad():
            self.width_table[: len(widths)] = widths
            self.width_table[len(widths) :] = widths[-1]

    def widths(self, entry: int | None = None) -> list[int]:
        """Widths of the modules of one entry (None: the full network), in order.

        Raises:
            ValueError: entry out of range.
        """
        if entry is None:
            return [info.full_width for info in self.infos]
        if isinstance(entry, bool) or not isinstance(entry, numbers.Integral):
            raise ValueError(f"entry is {entry!r}; it must be an int")
        entries = self._dropout_list.widths  # not asking for prices: every forward pass comes here
        if not 0 <= entry < len(entries):
            alone = ", the full network alone: skd plan or skd train (skd.plan, skd.train) adds smaller ones"
            raise ValueError(f"entry is {entry}; it may be 0..{len(entries) - 1}{alone if len(entries) == 1 else ''}")
        row: list[int] = entries[entry].tolist()
        return row

    def _resolve(self, entry: int | torch.Tensor | None) -> Sequence[Width]:
        if not isinstance(entry, torch.Tensor):
            return self.widths(entry)
        if entry.ndim != 0 or entry.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"entry is {entry.dtype} of shape {tuple(entry.shape)}; it must be a 0-d integer tensor")
        index = entry.reshape(1).long().clamp(0, len(self.width_table) - 1)
        return self.width_table.index_select(0, index)[0].unbind()

    def forward(self, images: torch.Tensor, entry: int | torch.Tensor | None = None) -> torch.Tensor:
        """Logits (features for a headless model) of the sub-network `entry`, or of the full network.

        Args:
            images: (B, in_chans, height, width).
            entry: None, an int in 0..len(dropout_list) - 1, or a 0-d int32 or int64 tensor (clamped to that range,
                not checked).

        Raises:
            ValueError: entry out of range or images of the wrong shape.
        """
        widths = self._resolve(entry)
        x = self.embed(images)
        tokens = [*[None] * (len(self.model.blocks) - 1), self.tokens_read]
        scores = self.scores or [None] * len(widths)
        steps = [
            _AtWidths(block, widths[2 * i : 2 * i + 2], scores[2 * i : 2 * i + 2], tokens[i])
            for i, block in enumerate(self.model.blocks)
        ]
        if self.model.grad_checkpointing and torch.is_grad_enabled():
            x = checkpoint_seq(steps, x)
        else:
            for step in steps:
                x = step(x)
        return self.head(x)

    @property
    def tokens_read(self) -> int | None:
        """How many of the first tokens the head reads, None: all; the others end at the last attention.

        With token pooling it reads the prefix tokens only; what it does not read has no gradient either.
        """
        model = self.model
        return model.num_prefix_tokens if model.global_pool == "token" and model.attn_pool is None else None

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, in_chans, height, width) to the first block's input (B, N, C)."""
        model = self.model
        check_images(model, images)
        dtype = next(model.parameters()).dtype
        if images.dtype != dtype and not torch.is_autocast_enabled(images.device.type):
            raise ValueError(f"images has dtype {images.dtype}; the model has {dtype}")
        return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))

    def step(self, index: int, x: torch.Tensor, width: Width, scores: Any = None) -> torch.Tensor:
        """Module `index` (in order) applied to the residual stream at `width`.

        The last block's give only the tokens that the head reads.
        """
        block = self.model.blocks[index // 2]
        tokens = self.tokens_read if index // 2 == len(self.model.blocks) - 1 else None
        if index % 2:
            return block.feed_forward(x[:, :tokens], width, scores)
        return block.attend(x, width, scores, tokens)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """The last block's output (B, N, C) to logits (or features of a headless model)."""
        return self.model.forward_head(self.model.norm(x))


class _AtWidths:
    """A block with its widths and scores, for timm's checkpointing of a sequence of functions of x."""

    def __init__(self, block: Any, widths: Sequence[Width], scores: Sequence[Any], tokens: int | None) -> None:
        self.block, self.widths, self.scores, self.tokens = block, widths, scores, tokens

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.block(x, *self.widths, self.tokens, self.scores)
        return y


def check_supernet(supernet: Any) -> None:
    if not isinstance(supernet, SuperNet):
        raise ValueError(f"supernet is a {type(supernet).__name__}; it must be a SuperNet (see skd.convert)")


def check_images(model: Any, images: Any) -> None:
    """`images` are a batch that `model` takes; otherwise ValueError."""
    if not isinstance(images, torch.Tensor) or images.ndim != 4:
        got = tuple(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
        raise ValueError(f"images is {got}; it must be a (B, {model.in_chans}, height, width) tensor")
    if images.shape[1] != model.in_chans:
        raise ValueError(f"images has {images.shape[1]} channels; the model takes {model.in_chans}")
    size = model.patch_embed.img_size
    if not model.dynamic_img_size and size is not None and tuple(images.shape[2:]) != tuple(size):
        raise ValueError(f"images has size {tuple(images.shape[2:])}; the model takes {tuple(size)}")
    patch = model.patch_embed.patch_size
    divisible = not any(pixels % side for pixels, side in zip(images.shape[2:], patch, strict=True))
    if model.dynamic_img_size and not divisible and not getattr(model.patch_embed, "dynamic_img_pad", False):
        raise ValueError(f"images has size {tuple(images.shape[2:])}; both must be multiples of {tuple(patch)}")
    if not images.is_floating_point():
        raise ValueError(f"images has dtype {images.dtype}; it must be a floating-point tensor")


def _strip_prefix(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """State-dict post-hook: ``model.blocks.0...`` is saved as timm's ``blocks.0...``."""
    for key in [key for key in state if key.startswith(prefix + "model.")]:
        state[prefix + key[len(prefix) + len("model.") :]] = state.pop(key)


def _add_prefix(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """load_state_dict pre-hook: the inverse of `_strip_prefix`.

    Skipped modules have no tensors here, or, in what earlier versions cut, tensors of size 0: either state fits both.
    """
    own = module.model.state_dict()
    for key in [key for key in state if key.startswith(prefix)]:
        name, tensor = key[len(prefix) :], state.pop(key)
        if tensor.numel() or name in own:
            state[prefix + "model." + name] = tensor
    for name, tensor in own.items():
        if not tensor.numel():
            state.setdefault(prefix + "model." + name, tensor)
