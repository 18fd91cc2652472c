"""The super-network: a timm Vision Transformer that can run at the widths of any entry of its dropout list."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from skd.corrections import Correction, check_correction
from skd.cost import CostModel, cost_model
from skd.dropout_list import DropoutList
from skd.moments import FeatureMoments, check_moments
from skd.vit import Module, Network, OutputLayer, SuperBlock, TimmModel, Width, describe, unwrapped
from skd.vit.block import block_norm, run_block
from skd.vit.construction import remember_construction
from skd.vit.residual import Norm, Stream, begin


class SuperNet(nn.Module):
    """A converted Vision Transformer and its dropout list of nested sub-networks.

    ``supernet(images)`` is the full network, ``supernet(images, entry=i)`` the i-th sub-network. `entry` may be a
    0-d integer tensor on the device: then widths are looked up there and nothing is read by the host.

    Attributes:
        model: the timm model, a deep copy whose blocks are `SuperBlock`s.
        network: the description of its architecture (`skd.vit`); `infos`, of each module, in order.
        costs: prices of every width (`skd.cost`); they follow changes of `model` by hand (another head, another
            image size), and those of the dropout list with them.
        dropout_list: settable; a new one must name the same modules and start at the full widths.
        corrections: settable; of some entries, other output layers (`skd.compensate`), which evaluation uses.
        moments: settable; of the features that enter the output layers (`skd.moments`), for corrections of any entry.
        scores: None, or for each module a buffer (or None) to which backward passes add its Taylor scores; see
            `masked_attention` and `masked_mlp`.

    State-dict keys are timm's own. `SuperNet(model)` reorders no weight; `skd.convert` concentrates the knowledge of
    the copy first. With ``copy=False`` the model itself is taken over and its blocks replaced: for callers who have
    no other use for it. `network` is what ``skd.vit.describe(model)`` gave, where it is known already.
    """

    model: TimmModel
    width_table: torch.Tensor

    def __init__(
        self,
        model: TimmModel,
        dropout_list: DropoutList | None = None,
        *,
        copy: bool = True,
        network: Network | None = None,
    ) -> None:
        super().__init__()
        model = unwrapped(model)
        self.network = describe(model) if network is None else network
        model = deepcopy(model) if copy else model
        remember_construction(model, self.network)
        self.model = model
        self.infos = infos = self.network.modules
        self._costs: CostModel = cost_model(model, self.network)
        self._priced = self._what_prices_depend_on()
        self.scores: list[torch.Tensor | None] | None = None
        blocks = zip(self.network.blocks(model), self.network.by_block, strict=True)
        self.network.replace_blocks(model, [SuperBlock(block, modules) for block, modules in blocks])
        groups = sum(-(-info.full_width // info.group_size) for info in infos)
        device = next(model.parameters()).device
        # The table of widths has a static shape, so that the list can grow in place without a new graph.
        table = torch.zeros(1 + groups, len(infos), dtype=torch.int32, device=device)
        self.register_buffer("width_table", table, persistent=False)
        self._corrections: dict[int, Correction] = {}
        self._moments: dict[str, FeatureMoments] = {}
        full = DropoutList(self.modules_in_order, [[info.full_width for info in infos]])
        self.dropout_list = full if dropout_list is None else dropout_list
        self.register_state_dict_post_hook(_strip_prefix)
        self.register_load_state_dict_pre_hook(_add_prefix)
        self.train(model.training)

    @property
    def modules_in_order(self) -> tuple[str, ...]:
        """The names of the modules, "0.attn", "0.mlp", "1.attn", ...; `infos` has their descriptions."""
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
        kept = self._corrections.items()
        rows = value.widths
        self._corrections = {i: c for i, c in kept if i < len(rows) and tuple(rows[i].tolist()) == c.widths}

    @property
    def corrections(self) -> Mapping[int, Correction]:
        """The corrections that `skd.compensate` found, by entry. They fit the present weights and widths only.

        A new dropout list keeps those of entries whose widths it does not change; loading a state dict, and training,
        drop all. They are not part of the state dict, but `skd.save` writes them. They are not used in training mode,
        or for an entry that is given as a tensor on the device.
        """
        return MappingProxyType(self._corrections)

    @corrections.setter
    def corrections(self, value: Mapping[int, Correction]) -> None:
        if not isinstance(value, Mapping):
            raise ValueError(f"corrections is a {type(value).__name__}; it must map entries to corrections")
        for entry, correction in value.items():
            widths = tuple(self.widths(entry))
            if isinstance(correction, Correction) and correction.widths != widths:
                raise ValueError(f"corrections[{entry}] is of widths {correction.widths}; the entry has {widths}")
            check_correction(self.model, self.infos, entry, correction)
        self._corrections = {int(entry): correction for entry, correction in sorted(value.items())}

    @property
    def moments(self) -> Mapping[str, FeatureMoments]:
        """What `skd.moments` found, by module; empty if it was not called.

        They fit the present weights only: loading a state dict, and training, drop them. They are not part of the
        state dict, but `skd.save` writes them. They stay on the CPU, in float32.
        """
        return MappingProxyType(self._moments)

    @moments.setter
    def moments(self, value: Mapping[str, FeatureMoments]) -> None:
        check_moments(self.model, self.infos, value)
        self._moments = dict(value)

    def tokens_of(self, module: Module) -> int | None:
        """The number of leading tokens that the head depends on in a module's output; None means all."""
        return self._tokens_kept()[module.block]

    def _output_layers(self, entry: int | torch.Tensor | None) -> list[OutputLayer | None]:
        """For each module the output layer that this entry's correction gives it."""
        if self.training or entry is None or isinstance(entry, torch.Tensor) or entry not in self._corrections:
            return [None] * len(self.infos)
        layers = self._corrections[entry].layers
        return [layers.get(module.name) for module in self.infos]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> SuperNet:
        """Apply `fn` to the corrections too; `to`, `cuda`, `half`, ... call this method."""
        super()._apply(fn, recurse)
        self._corrections = {entry: correction.mapped(fn) for entry, correction in self._corrections.items()}
        return self

    def _update_costs(self) -> None:
        priced = self._what_prices_depend_on()
        if priced != self._priced:
            self._costs, self._priced = cost_model(self.model, self.network), priced
            self._dropout_list = replace(self._dropout_list, costs=self._costs, removed_macs=None)

    def _what_prices_depend_on(self) -> tuple[Any, ...]:
        """The quantities outside of the blocks that prices depend on: tokens, grid, parameters.

        Every training step compares them, so they are computed without a walk through the blocks.
        """
        network = self.network
        return network.tokens(self.model), network.grid(self.model), network.outside_params(self.model)

    def _fill_table(self) -> None:
        widths = torch.from_numpy(self._dropout_list.widths.copy()).to(self.width_table)
        if len(widths) > len(self.width_table):
            self.width_table = torch.zeros_like(widths)
        # Rows past the end repeat the smallest sub-network, so that every index reads valid widths.
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
        entries = self._dropout_list.widths  # computes no prices: every forward pass comes here
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

        In evaluation mode an entry that is an int runs with its correction, where it has one (`corrections`).

        Every residual sum is made with the norm of what comes next (`skd.vit.residual`). Norms, layer scales and drop
        paths are called as layers where they have hooks, and blocks with hooks take and give tensors (B, N, C).

        Args:
            images: (B, in_chans, height, width).
            entry: None, an int in 0..len(dropout_list) - 1, or a 0-d int32 or int64 tensor (clamped to that range,
                not checked).

        Raises:
            ValueError: entry out of range or images of the wrong shape.
        """
        per_block = self.network.per_block
        widths, scores = per_block(self._resolve(entry)), per_block(self.scores or [None] * len(self.infos))
        x, shared = self.embed(images)
        blocks, tokens, norms = self.network.blocks(self.model), self._tokens_kept(), self._norms(widths)
        stream, recomputes = begin(x, norms[0]), self.grad_checkpointing and torch.is_grad_enabled()
        outputs = per_block(self._output_layers(entry))
        for block, *told, norm, own in zip(blocks, widths, tokens, scores, shared, norms[1:], outputs, strict=True):
            stream = run_block(block, stream, *told, following=norm, recomputes=recomputes, outputs=own)
        return self._logits(stream)

    def _norms(self, widths: Sequence[Sequence[Width]]) -> list[Norm | None]:
        """The norms of the stream where it enters each block at these widths and, last, where it enters the head."""
        norms = [Norm.of(self.network.last_norm(self.model), casts_under_autocast=False)]
        blocks = zip(self.network.blocks(self.model), widths, self._tokens_kept(), strict=True)
        for block, own, tokens in reversed(list(blocks)):
            norms.append(block_norm(block, own, tokens, norms[-1]))
        return norms[::-1]

    @property
    def grad_checkpointing(self) -> bool:
        """Whether activations are computed again in the backward pass, to save memory."""
        return self.network.checkpoints(self.model)

    @grad_checkpointing.setter
    def grad_checkpointing(self, on: bool) -> None:
        self.network.set_checkpoints(self.model, on)

    @property
    def tokens_read(self) -> int | None:
        """The number of leading tokens that the head reads; None means all.

        The last block computes only these. With token pooling they are the prefix tokens.
        """
        return self.network.tokens_read(self.model)

    def _tokens_kept(self) -> list[int | None]:
        """The tokens that each block gives: all, and the last one those that the head reads."""
        return [*[None] * (len(self.network.by_block) - 1), self.tokens_read]

    def embed(self, images: torch.Tensor) -> tuple[torch.Tensor, Sequence[Any]]:
        """Images (B, in_chans, height, width) to the first block's input (B, N, C), and each block's shared input.

        The shared input is None, a rotary embedding or a bias of positions; pass it to `step`.
        """
        return self.network.embed(self.model, images)

    def step(
        self,
        index: int,
        x: torch.Tensor,
        width: Width,
        scores: Any = None,
        shared: Any = None,
        output: OutputLayer | None = None,
    ) -> torch.Tensor:
        """Module `index` (in order) applied to the residual stream at `width`; `shared` is `embed`'s.

        The modules of the last block return only the tokens that the head reads. `output` takes the place of the
        module's output layer.
        """
        module = self.infos[index]
        block, tokens = self.network.blocks(self.model)[module.block], self._tokens_kept()[module.block]
        own = None if shared is None else shared[module.block]
        stepped: torch.Tensor = block.step(
            block.modules_in_order.index(module), x, width, tokens, scores, own, output
        )
        return stepped

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """The last block's output (B, N, C) to logits (or features of a headless model)."""
        return self._logits(Stream(x))

    def _logits(self, stream: Stream) -> torch.Tensor:
        normed = self.network.last_norm(self.model)(stream.x) if stream.normed is None else stream.normed
        return self.network.head(self.model, normed)


def belongs_to_supernet(model: TimmModel) -> bool:
    """Whether `model` is the model inside a super-network, whose blocks take widths."""
    return isinstance(model, nn.Module) and any(isinstance(module, SuperBlock) for module in model.modules())


def check_supernet(supernet: Any) -> None:
    if not isinstance(supernet, SuperNet):
        raise ValueError(f"supernet is a {type(supernet).__name__}; it must be a SuperNet (see skd.convert)")


def _strip_prefix(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """State-dict post-hook: ``model.blocks.0...`` is saved as timm's ``blocks.0...``."""
    for key in [key for key in state if key.startswith(prefix + "model.")]:
        state[prefix + key[len(prefix) + len("model.") :]] = state.pop(key)


def _add_prefix(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """load_state_dict pre-hook: the inverse of `_strip_prefix`.

    Skipped modules have no tensors here, or, in what earlier versions cut, tensors of size 0: either state fits both.
    """
    module._corrections, module._moments = {}, {}  # they belong to the weights before
    own = module.model.state_dict()
    for key in [key for key in state if key.startswith(prefix)]:
        name, tensor = key[len(prefix) :], state.pop(key)
        if tensor.numel() or name in own:
            state[prefix + "model." + name] = tensor
    for name, tensor in own.items():
        if not tensor.numel():
            state.setdefault(prefix + "model." + name, tensor)
