"""What the method asks of a transformer: `Module`, of one attention or MLP, and `Network`, of the whole.

Both are descriptions without weights. A model (timm's, or a super-network's copy of it) is handed to their methods,
so that one description serves the original, its converted copy and every copy of that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar, NamedTuple, TypeAlias, TypeVar

import torch
from torch import nn

from skd_kernels import Moments

# A model of timm's, and a part of one. Which fields they have depends on timm's class, and torch.nn.Module promises a
# type checker none of them: families and modules check them when they describe a model.
TimmModel: TypeAlias = Any
TimmLayer: TypeAlias = Any
Item = TypeVar("Item")
Width = int | torch.Tensor  # a 0-d integer tensor on the device is a width that the host does not know


@dataclass(frozen=True)
class Rotation:
    """Orthogonal change of basis of one attention, float64; columns are the new coordinates, best first.

    Attributes:
        v, qk: (H, D, D), or None where it would change the network's function.
    """

    v: torch.Tensor | None
    qk: torch.Tensor | None


Transform = Rotation | torch.Tensor  # a tensor is the new order of the coordinates, (width,) int64
Statistic = Moments | torch.Tensor
Consumer = Callable[["Module", torch.Tensor, torch.Tensor], None]


class Coordinates(NamedTuple):
    """Where the coordinates of a module lie in one of its parameters.

    Attributes:
        axis: the axis of the parameter along which they lie.
        numbers: the coordinate of each position on that axis, (size of the axis,) int64.
    """

    axis: int
    numbers: torch.Tensor


class Prices(NamedTuple):
    """What a module and its norm cost, for one token; the sums are those of `skd.cost.CostModel`.

    Attributes:
        macs_per_unit: of one unit of width.
        macs_per_pair: of one unit of width and one pair of tokens (Q K^T and A V).
        macs_fixed: of a module that is there, whatever its width.
        params_per_unit, params_fixed: parameters, likewise.
        params_if_cut: parameters per unit that a cut module has and the whole one has not.
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
    """The names that a block's fields have around one of its modules, and how they are put together.

    Attributes:
        module, norm, scale, drop_path: fields of the block. The scale is a layer or a parameter, or is not there.
        post_norm: the norm follows the module; otherwise it comes before it.
        no_scale: what stands in place of a parameter for the scale when the module is skipped.
        shared: the name of the argument by which timm's block and module get what all blocks share, or "".
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
        binary: it takes the widths 0 and `full_width` only, because something inside mixes its coordinates.
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
        """The block's field that it is: "attn" or "mlp"."""
        return self.place.module

    @property
    def places(self) -> int:
        """How many coordinates one unit of width stands for: H in an attention narrowed in every head, else 1."""
        return 1

    @property
    @abstractmethod
    def score_shape(self) -> tuple[int, ...]:
        """Shape of its Taylor scores; the last axis is the coordinates."""

    @property
    def path(self) -> str:
        """The prefix of its parameters' names in the model: "blocks.3.attn"."""
        return f"blocks.{self.block}.{self.place.module}"

    def of(self, model: TimmModel) -> Any:
        """The module itself, in a model or a super-network's copy of one."""
        return getattr(model.blocks[self.block], self.place.module)

    # Reading features and gradients (METHOD 1 and 2)

    @abstractmethod
    def tap(self, model: TimmModel, consume: Consumer) -> list[Any]:
        """Call ``consume(self, feature, gradient)`` in every backward pass; returns handles that undo it.

        A module that WPAC leaves alone need not be read: then there are no handles, and no calls.
        """

    @abstractmethod
    def taylor(self, feature: torch.Tensor, grad: torch.Tensor, power: int = 1) -> torch.Tensor:
        """Sum over tokens of ``|x g|``, or with power 2 of ``(x g)^2``: `score_shape`."""

    @abstractmethod
    def observe(self, feature: torch.Tensor, grad: torch.Tensor, shift: torch.Tensor | None) -> Statistic:
        """What WPAC adds up over batches: `Moments` about `shift` (None: this batch's mean), or scores."""

    def read_scores(self, scores: torch.Tensor, width: int) -> torch.Tensor:
        """(width,) one score per kept coordinate, of `score_shape` sums."""
        return scores[:width]

    @abstractmethod
    def row_norms(self, model: TimmModel) -> torch.Tensor:
        """L2 norm of the weights that compute each coordinate: `score_shape`, float64."""

    # Rewriting the weights (METHOD 1)

    @abstractmethod
    def transform(self, statistic: torch.Tensor) -> Transform:
        """WPAC's transform, of a sum of what `observe` gave (of moments: their covariance)."""

    @abstractmethod
    def ordering(self, scores: torch.Tensor) -> Transform:
        """The transform that puts the coordinates with the highest of `score_shape` scores first."""

    @abstractmethod
    def apply(self, model: TimmModel, transform: Transform) -> None:
        """Fold a transform into the weights, in float64, in place; the model's function stays."""

    # Running and cutting at a width (METHOD 3); the block is timm's, or the SuperBlock that was made from it

    @abstractmethod
    def forward(
        self,
        block: TimmLayer,
        x: torch.Tensor,
        width: Width,
        scores: torch.Tensor | None,
        tokens: int | None,
        shared: Any,
    ) -> torch.Tensor:
        """The module's function at a width above 0: (B, N, C) to the same, or of the first `tokens` only.

        A width on the device may be 0: then zeros are returned (a module that is `binary` may return anything).
        The backward pass adds Taylor scores to `scores`. `shared` is the network's for this block.
        """

    @abstractmethod
    def narrowed(self, module: nn.Module, width: int) -> nn.Module:
        """A copy of the whole `module` with ``0 < width < full_width`` coordinates, of timm's classes alone."""

    # Counting (METHOD 4)

    @abstractmethod
    def prices(self, model: TimmModel) -> Prices:
        """What it costs, its norm and layer scale included."""

    @abstractmethod
    def coordinates(self, model: TimmModel) -> dict[str, Coordinates]:
        """Where its coordinates lie, by the name of the parameter within the module."""


@dataclass(frozen=True)
class OrderedModule(Module):
    """A module whose coordinates change places, and nothing is rotated: one score each, the highest first."""

    @property
    def score_shape(self) -> tuple[int, ...]:
        return (self.full_width,)

    def transform(self, statistic: torch.Tensor) -> torch.Tensor:
        return self.ordering(statistic)

    def ordering(self, scores: torch.Tensor) -> torch.Tensor:
        """The new order of the coordinates (as it is, where they may not change places)."""
        if self.binary:
            return torch.arange(self.full_width, device=scores.device)
        return scores.argsort(descending=True, stable=True)


@dataclass(frozen=True)
class Network(ABC):
    """A family of transformers: what is around the blocks, and which modules are in them.

    The blocks are the model's field `blocks`; they have layers and parameters, and no buffers of their own.

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
    def embed(self, model: TimmModel, images: torch.Tensor) -> tuple[torch.Tensor, Sequence[Any]]:
        """Images to the first block's input (B, N, C), and what each block shares with the others (or None)."""

    @abstractmethod
    def last_norm(self, model: TimmModel) -> nn.Module:
        """What is between the last block and the head: a norm, or an Identity."""

    @abstractmethod
    def head(self, model: TimmModel, normed: torch.Tensor) -> torch.Tensor:
        """The output of `last_norm` to logits, or features of a headless model."""

    @abstractmethod
    def tokens(self, model: TimmModel) -> int:
        """Tokens in the blocks."""

    @abstractmethod
    def grid(self, model: TimmModel) -> tuple[int, ...]:
        """Rows and columns of patches: another grid of as many may have other tables of positions."""

    @abstractmethod
    def tokens_read(self, model: TimmModel) -> int | None:
        """The number of leading tokens that the head reads; None means all. The last block computes only these."""

    @property
    def by_block(self) -> tuple[tuple[Module, ...], ...]:
        """The modules of each block."""
        return tuple(tuple(group) for _, group in groupby(self.modules, key=lambda module: module.block))

    def per_block(self, items: Iterable[Item]) -> list[list[Item]]:
        """One item for each module, to a list for each block."""
        rest = iter(items)
        return [[next(rest) for _ in group] for group in self.by_block]

    @abstractmethod
    def blocks(self, model: TimmModel) -> Sequence[Any]:
        """The blocks of a model."""

    @abstractmethod
    def replace_blocks(self, model: TimmModel, blocks: Sequence[nn.Module]) -> None:
        """Put other blocks in the place of the model's own."""

    @abstractmethod
    def checkpoints(self, model: TimmModel) -> bool:
        """Whether activations are to be computed again in the backward pass, to save memory."""

    @abstractmethod
    def set_checkpoints(self, model: TimmModel, on: bool) -> None:
        """Switch that on or off."""

    @abstractmethod
    def undecayed(self, model: TimmModel) -> Collection[str]:
        """Names of the parameters that weight decay leaves out, beside biases and norms."""

    @abstractmethod
    def summary(self, model: TimmModel) -> str:
        """In words, such as "12 blocks of width 768"."""

    @abstractmethod
    def outside_macs(self, model: TimmModel) -> tuple[int, int]:
        """(full, linear) MACs of all that is not in a block, for one image."""

    @abstractmethod
    def outside_params(self, model: TimmModel) -> int:
        """Parameters of all that is not in a block."""

    @abstractmethod
    def constructor_args(self, model: TimmModel) -> dict[str, Any]:
        """Keyword arguments of its class that build the model again, read off a whole one; and norm_eps.

        Raises:
            ValueError: they cannot be read.
        """

    @classmethod
    @abstractmethod
    def construct(cls, name: str, args: dict[str, Any], norm_eps: float | None) -> nn.Module:
        """A model of the class `name`, of the arguments that `constructor_args` gave."""
