"""What the method needs to know about a transformer: `Module` describes one attention or MLP, `Network` the whole.

Both are descriptions without weights. Their methods take a model (timm's, or a super-network's copy of it), so that
one description serves the original, its converted copy and every copy of that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias, TypeVar

import torch
from torch import nn

from skd.vit.conversions import Choices, SecondMoments
from skd_kernels import Moments

# A timm model, and a part of one. Their fields depend on timm's class, and torch.nn.Module declares none of them, so
# a type checker cannot know them. Families and modules check the fields when they describe a model.
TimmModel: TypeAlias = Any
TimmLayer: TypeAlias = Any
Item = TypeVar("Item")
Width = int | torch.Tensor  # a 0-d integer tensor on the device is a width that the host does not know
Shared: TypeAlias = torch.Tensor | None  # what a block gets beside its input: a rotary embedding, a bias of positions


@dataclass(frozen=True)
class Rotation:
    """A change of basis in one attention, float64; columns are the new coordinates, best first.

    Attributes:
        q, k: (H, D, D) with ``q k^T = I``, or None where the change would change the network's function. METHOD's are
            one orthogonal matrix, its own inverse transposed.
        v, proj: (H, D, D) likewise, of the values and of the columns of the output projection.
    """

    q: torch.Tensor | None
    k: torch.Tensor | None
    v: torch.Tensor | None
    proj: torch.Tensor | None

    @classmethod
    def orthogonal(cls, qk: torch.Tensor | None, v: torch.Tensor | None) -> Rotation:
        return cls(qk, qk, v, v)


class OutputLayer(NamedTuple):
    """The last layer of one attention or MLP (proj, fc2) at the width of an entry, in the network's dtype.

    Attributes:
        weight: (C, k), the columns that are kept, in their order in the whole layer.
        bias: (C,), or None where the network's own layer has none.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None


Transform = Rotation | torch.Tensor  # a tensor is the new order of the coordinates, (width,) int64
Statistic = Moments | torch.Tensor
Consumer = Callable[["Module", torch.Tensor, torch.Tensor], None]


class Handle(Protocol):
    """What undoes a change to a model, such as the handle that PyTorch returns for a hook."""

    def remove(self) -> None: ...


class Coordinates(NamedTuple):
    """Where the coordinates of a module lie in one of its parameters.

    Attributes:
        axis: the axis of the parameter along which they lie.
        numbers: the coordinate of each position on that axis, (size of the axis,) int64.
    """

    axis: int
    numbers: torch.Tensor


class Prices(NamedTuple):
    """What a module and its norm cost for one token; `skd.cost.CostModel` adds these numbers up.

    Attributes:
        macs_per_unit: of one unit of width.
        macs_per_pair: of one unit of width and one pair of tokens (Q K^T and A V).
        macs_fixed: of a module that is not skipped, whatever its width.
        params_per_unit, params_fixed: parameters, likewise.
        params_if_cut: parameters per unit that a cut module has in addition to those of the whole one.
        unplanned_per_unit, unplanned_fixed: the MACs among them that METHOD 4's planner does not count.
    """

    macs_per_unit: int
    macs_per_pair: int
    macs_fixed: int
    params_per_unit: int
    params_fixed: int
    params_if_cut: int = 0
    unplanned_per_unit: int = 0
    unplanned_fixed: int = 0


@dataclass(frozen=True)
class Place:
    """The names of a block's fields around one of its modules, and how the block combines them.

    Attributes:
        module, norm, scale, drop_path: fields of the block. The scale is a layer or a parameter, or is not there.
        post_norm: the norm follows the module; otherwise it comes before it.
        no_scale: the value that replaces the scale, where it is a parameter, when the module is skipped.
        shared: the name of the argument by which timm's block and module take the tensor that all blocks share (a
            rotary embedding, a bias of positions), or "".
    """

    module: str
    norm: str
    scale: str
    drop_path: str
    post_norm: bool = False
    no_scale: float | None = None
    shared: str = ""


@dataclass(frozen=True)
class Module(ABC):
    """One attention or MLP of the network, in the method's order 0.attn, 0.mlp, 1.attn, ...

    Attributes:
        name: "3.attn", "3.mlp".
        block: index of its block.
        place: the names of the block's fields.
        full_width: number of coordinates: a head's D, the heads H of an attention that is cut by heads, an MLP's F.
        group_size: how many coordinates one pruning step removes.
        binary: the module takes the widths 0 and `full_width` only, because something inside mixes its coordinates.
    """

    name: str
    block: int
    place: Place
    full_width: int
    group_size: int
    binary: bool

    mixes_tokens: ClassVar[bool] = False  # a token's output depends on the other tokens

    @property
    def kind(self) -> str:
        """The name of the block's field that holds it: "attn" or "mlp"."""
        return self.place.module

    @property
    def coordinates_per_unit(self) -> int:
        """How many coordinates one unit of width keeps: H where it is one in each head of an attention, else 1."""
        return 1

    @property
    @abstractmethod
    def output_name(self) -> str:
        """The name of its last layer, a Linear back to the residual stream; "" where nothing is computed."""

    @property
    @abstractmethod
    def score_shape(self) -> tuple[int, ...]:
        """The shape of its Taylor scores; the last axis holds the coordinates."""

    @property
    def path(self) -> str:
        """The prefix of its parameters' names in the model: "blocks.3.attn"."""
        return f"blocks.{self.block}.{self.place.module}"

    def of(self, model: TimmModel) -> TimmLayer:
        """The layer that is described, in a model or in a super-network's copy of one."""
        return getattr(model.blocks[self.block], self.place.module)

    def output_layer(self, module: nn.Module) -> nn.Linear:
        """The last layer of the layer that is described, whole or cut: `of(model)`, or what `narrowed` gave."""
        layer: nn.Linear = getattr(module, self.output_name)
        return layer

    @property
    def chosen_group(self) -> int | None:
        """`group_size` where `with_attention_group` may change it, else None."""
        return None

    def with_attention_group(self, size: int) -> Module:
        """The same module with another group size, if it is an attention whose heads are narrowed."""
        return self

    # Reading features and gradients (METHOD 1 and 2)

    @abstractmethod
    def tap(self, model: TimmModel, consume: Consumer) -> list[Handle]:
        """Install hooks that call ``consume(self, feature, gradient)`` in every backward pass; return their handles.

        A module that WPAC does not change need not be read; then there are no handles and no calls.
        """

    @abstractmethod
    def taylor(self, feature: torch.Tensor, grad: torch.Tensor, power: int = 1) -> torch.Tensor:
        """The sum over tokens of ``|x g|``, or of ``(x g)^2`` with power 2; its shape is `score_shape`."""

    @abstractmethod
    def observe(self, feature: torch.Tensor, grad: torch.Tensor, shift: torch.Tensor | None) -> Statistic:
        """The statistic that WPAC sums over batches: `Moments` about `shift` (None: this batch's mean), or scores."""

    def read_scores(self, scores: torch.Tensor, width: int) -> torch.Tensor:
        """One score for each kept coordinate, (width,), from sums of `score_shape`."""
        return scores[:width]

    @abstractmethod
    def row_norms(self, model: TimmModel) -> torch.Tensor:
        """The L2 norm of the weights that compute each coordinate; `score_shape`, float64."""

    def second_moments(self, feature: torch.Tensor, tokens: int | None, choices: Choices) -> SecondMoments | None:
        """What `refined` needs of a feature, of which the head depends on the first `tokens` tokens (None: all).

        None: no conversion beyond METHOD's applies to this module, or none is chosen.
        """
        return None

    # Rewriting the weights (METHOD 1)

    @abstractmethod
    def transform(self, statistic: torch.Tensor) -> Transform:
        """WPAC's transform, from the sum of what `observe` gave, or from the covariance of moments."""

    @abstractmethod
    def ordering(self, scores: torch.Tensor) -> Transform:
        """The transform that puts the coordinates with the highest of `score_shape` scores first."""

    def refined(self, model: TimmModel, transform: Transform, moments: SecondMoments, choices: Choices) -> Transform:
        """METHOD's `transform` with the chosen conversions in place of its own, from sums of `second_moments`."""
        return transform

    @abstractmethod
    def apply(self, model: TimmModel, transform: Transform) -> None:
        """Fold a transform into the weights, in float64, in place; the model's function does not change."""

    # Running and cutting at a width (METHOD 3); the block is timm's, or the SuperBlock that was made from it

    @abstractmethod
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
        """The module's function at a width above 0: (B, N, C) to (B, N, C), or only to the first `tokens` tokens.

        A width on the device may be 0. Then the result is zeros (a `binary` module may return anything).
        The backward pass adds Taylor scores to `scores`. `shared` is what `Network.embed` gave for this block.
        ``with_bias=False`` leaves out `output_bias`, where there is one.
        """

    def output_bias(self, block: TimmLayer) -> torch.Tensor | None:
        """(C,), the bias that `forward` adds last and that its caller may add instead, at widths above 0.

        None: there is none, or `forward` cannot leave it out.
        """
        return None

    @abstractmethod
    def narrowed(self, module: nn.Module, width: int) -> nn.Module:
        """A copy of the whole `module` with ``0 < width < full_width`` coordinates, made of timm's classes alone."""

    def gathered(self, model: TimmModel, width: int) -> int:
        """How many numbers of its weights `forward` copies at this width, since they do not lie side by side."""
        return 0

    # Counting (METHOD 4)

    @abstractmethod
    def prices(self, model: TimmModel) -> Prices:
        """What the module costs, including its norm and its layer scale."""

    @abstractmethod
    def coordinates(self, model: TimmModel) -> dict[str, Coordinates]:
        """Where the coordinates lie, by the name of the parameter within the module."""


@dataclass(frozen=True)
class OrderedModule(Module):
    """A module whose coordinates are permuted, not rotated: each has one score, and the highest comes first."""

    @property
    def score_shape(self) -> tuple[int, ...]:
        return (self.full_width,)

    def transform(self, statistic: torch.Tensor) -> torch.Tensor:
        return self.ordering(statistic)

    def ordering(self, scores: torch.Tensor) -> torch.Tensor:
        """The new order of the coordinates, or the present one where they may not be permuted."""
        if self.binary:
            return torch.arange(self.full_width, device=scores.device)
        return scores.argsort(descending=True, stable=True)


@dataclass(frozen=True)
class Network(ABC):
    """A family of transformers: what is around the blocks, and which modules are in them.

    The model holds its blocks in its field `blocks`. They have layers and parameters, but no buffers of their own.

    Attributes:
        modules: all attentions and MLPs, in the order in which they are computed.
    """

    modules: tuple[Module, ...]

    model_classes: ClassVar[tuple[type[nn.Module], ...]]  # timm's

    @classmethod
    @abstractmethod
    def describe(cls, model: TimmModel) -> Network:
        """The description of a model of `model_classes`.

        Raises:
            ValueError: a feature that has no function-preserving nested form; the message names it.
        """

    @abstractmethod
    def embed(self, model: TimmModel, images: torch.Tensor) -> tuple[torch.Tensor, Sequence[Shared]]:
        """The first block's input (B, N, C), and for each block what it shares with the others (or None)."""

    @abstractmethod
    def last_norm(self, model: TimmModel) -> nn.Module:
        """What is between the last block and the head: a norm, or an Identity."""

    @abstractmethod
    def head(self, model: TimmModel, normed: torch.Tensor) -> torch.Tensor:
        """The logits for what `last_norm` gives, or the features of a headless model."""

    @abstractmethod
    def tokens(self, model: TimmModel) -> int:
        """The number of tokens in the blocks."""

    @abstractmethod
    def grid(self, model: TimmModel) -> tuple[int, ...]:
        """The rows and columns of patches; two grids of equally many patches may have different positions."""

    @abstractmethod
    def tokens_read(self, model: TimmModel) -> int | None:
        """The number of leading tokens that the head reads; None means all. The last block computes only these."""

    @property
    def by_block(self) -> tuple[tuple[Module, ...], ...]:
        """The modules of each block."""
        return tuple(tuple(group) for _, group in groupby(self.modules, key=lambda module: module.block))

    @property
    def attention_group(self) -> int | None:
        """The coordinates of a head that one pruning step removes; None where no attention's heads are narrowed.

        A head that has fewer goes as a whole, so that the largest group is the one that was chosen.
        """
        return max((group for module in self.modules if (group := module.chosen_group) is not None), default=None)

    def with_attention_group(self, size: int | None) -> Network:
        """The same network with another `attention_group`, at most a whole head; None: as it is.

        Raises:
            ValueError: not an int of at least 1.
        """
        if size is None:
            return self
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"attention_group is {size!r}; it must be an int of at least 1")
        return replace(self, modules=tuple(module.with_attention_group(size) for module in self.modules))

    def per_block(self, items: Iterable[Item]) -> list[list[Item]]:
        """One item for each module, to a list for each block."""
        rest = iter(items)
        return [[next(rest) for _ in group] for group in self.by_block]

    @abstractmethod
    def blocks(self, model: TimmModel) -> Sequence[TimmLayer]:
        """The blocks of a model."""

    @abstractmethod
    def replace_blocks(self, model: TimmModel, blocks: Sequence[nn.Module]) -> None:
        """Replace the model's blocks by others."""

    @abstractmethod
    def checkpoints(self, model: TimmModel) -> bool:
        """Whether activations are recomputed in the backward pass, to save memory."""

    @abstractmethod
    def set_checkpoints(self, model: TimmModel, on: bool) -> None:
        """Switch the recomputation of activations on or off."""

    @abstractmethod
    def undecayed(self, model: TimmModel) -> Collection[str]:
        """The names of the parameters without weight decay, besides biases and norms."""

    @abstractmethod
    def summary(self, model: TimmModel) -> str:
        """The size of the model in words, such as "12 blocks of width 768"."""

    @abstractmethod
    def outside_macs(self, model: TimmModel) -> tuple[int, int]:
        """The (full, linear) MACs of everything outside of the blocks, for one image."""

    @abstractmethod
    def outside_params(self, model: TimmModel) -> int:
        """The number of parameters outside of the blocks."""

    @abstractmethod
    def constructor_args(self, model: TimmModel) -> dict[str, object]:
        """The keyword arguments of the model's class that build it again, read off its layers; and norm_eps.

        Raises:
            ValueError: the layers do not show them.
        """

    @classmethod
    @abstractmethod
    def construct(cls, name: str, args: dict[str, object], norm_eps: float | None) -> nn.Module:
        """A model of the class `name`, built with the arguments that `constructor_args` gave."""
