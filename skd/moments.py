"""Second moments of the features that enter output layers, and the corrections that follow from them.

Of what a module drops, the part that is a linear function of what it keeps can be predicted by ridge regression. The
normal equations of every width are parts of one matrix, the covariance of all features of the full network. Where it
is stored, a correction of any entry needs no images. With an infinite ridge only means are left: what is dropped
counts as constant, and its mean goes into the bias ("mean folding", as in FLAP, An et al. 2024).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from skd.corrections import Correction, kept_columns
from skd.support.ranks import check_group, in_step, summed, total
from skd.support.regression import Sums
from skd.support.taps import all_finite, checked, frozen, report_left_out
from skd.support.types import Progress
from skd.vit import Module, OutputLayer, TimmModel, unwrapped
from skd.vit.conversions import SecondMoments
from skd.vit.protocol import Shared
from skd.vit.refit import output_factors

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from skd.supernet import SuperNet


class FeatureMoments(NamedTuple):
    """Of the k features that enter the output layer of one module, float32 on the CPU.

    Attributes:
        mean: (k,).
        covariance: (k, k); (0, 0) for a module that is kept whole or not at all.
    """

    mean: torch.Tensor
    covariance: torch.Tensor

    @property
    def nbytes(self) -> int:
        """The bytes of both."""
        return self.mean.nbytes + self.covariance.nbytes


def moments(
    supernet: SuperNet,
    batches: Iterable[object],
    *,
    progress: Progress | None = None,
    group: ProcessGroup | None = None,
) -> dict[str, FeatureMoments]:
    """The mean and the covariance of the features that enter each module's output layer (proj, fc2).

    They are those of the full network, over all tokens that its head depends on. They are also put into
    ``supernet.moments``, where ``skd.extract(..., corrected="moments")``, ``skd.compensate`` without batches, and
    `skd.save` find them. They fit the present weights only.

    Args:
        supernet: its weights and its dropout list stay as they are.
        batches: calibration images as for `skd.importance`, read once; labels are not looked at.
        progress: wraps the batches, e.g. ``tqdm``.
        group: a torch.distributed group, each of whose processes has its share of the batches; sums are added up.

    Raises:
        ValueError: bad batches, or none whose features are finite; one that has others is left out with a warning.
    """
    from skd.supernet import check_supernet

    supernet = unwrapped(supernet)
    check_supernet(supernet)
    check_group(group)
    supernet.moments = found = measure_moments(supernet, batches, progress, group)
    return found


@torch.no_grad()
def measure_moments(
    supernet: SuperNet,
    batches: Iterable[object],
    progress: Progress | None = None,
    group: ProcessGroup | None = None,
) -> dict[str, FeatureMoments]:
    """What `moments` gives, without a change of the super-network."""
    from skd.extract import extract

    model = extract(supernet, entry=0, corrected=False)
    sums, left_out = dict[str, SecondMoments](), 0
    batch = dict[str, SecondMoments]()
    for module in _with_features(supernet.infos):  # the hooks are on a copy, which is not used again
        note = partial(_note, batch, module, supernet.tokens_of(module))
        module.output_layer(module.of(model)).register_forward_pre_hook(note)
    with frozen(model):
        steps = checked(model, batches if progress is None else progress(batches), with_labels=False)
        for images, _ in in_step(steps, group):
            batch.clear()
            model(images)
            if all_finite(tensor for own in batch.values() for tensor in own):
                for name in list(batch):  # one after the other, since together they may be larger than the weights
                    own = batch.pop(name)
                    sums[name] = sums[name].plus(own) if name in sums else own
            else:
                left_out += 1
    device = next(supernet.parameters()).device
    report_left_out(total(left_out, group, device), total(not sums, group, device) == 0)
    return {name: _stored(SecondMoments(*summed(own, group))) for name, own in sums.items()}


def _with_features(modules: Iterable[Module]) -> list[Module]:
    """The modules that compute something: all but those that an extraction skipped."""
    return [module for module in modules if module.full_width]


def _note(
    batch: dict[str, SecondMoments],
    module: Module,
    tokens: int | None,
    _: nn.Module,
    inputs: tuple[torch.Tensor, ...],
) -> None:
    """A forward pre-hook of an output layer: the sums over its inputs, (B, N, k)."""
    rows = inputs[0][:, :tokens].flatten(0, 1)[None]
    own = SecondMoments.of(rows)
    batch[module.name] = own._replace(squares=own.squares[:, :0, :0]) if module.binary else own


def _stored(sums: SecondMoments) -> FeatureMoments:
    size = sums.squares.shape[-1]
    covariance = sums._replace(sums=sums.sums[:, :size]).covariance()[0]
    return FeatureMoments(sums.mean()[0].float().cpu(), covariance.float().cpu())


def check_moments(model: TimmModel, modules: tuple[Module, ...], given: object) -> None:
    """Check that moments fit the modules of `model`.

    Raises:
        ValueError: they are something else, of other modules, or of another shape.
    """
    modules = tuple(_with_features(modules))
    if not isinstance(given, Mapping) or (given and set(given) != {module.name for module in modules}):
        got = list(given) if isinstance(given, Mapping) else type(given).__name__
        raise ValueError(f"moments is {got}; it must be empty or map every module to a FeatureMoments")
    for module in modules if given else ():
        own, k = given[module.name], module.output_layer(module.of(model)).in_features
        size = 0 if module.binary else k
        if not isinstance(own, FeatureMoments) or (own.mean.shape, own.covariance.shape) != ((k,), (size, size)):
            raise ValueError(f"moments of {module.name} must be a FeatureMoments of shapes {(k,)} and {(size, size)}")


@torch.no_grad()
def moments_correction(supernet: SuperNet, entry: int, ridge: float = 0.01) -> Correction:
    """The correction of one entry from the stored moments: see `skd.compensate`, whose defaults these are.

    A module that is narrowed predicts its own dropped coordinates. One that is skipped counts as its mean output,
    which goes into the bias of the last module before it that runs.

    Raises:
        ValueError: the super-network has no moments.
    """
    if not supernet.moments:
        raise ValueError("supernet has no moments; skd.moments (skd convert --moments, skd plan --moments) adds them")
    widths = tuple(supernet.widths(entry))
    layers, changed = dict[str, OutputLayer](), set[str]()
    before: Module | None = None
    for module, width in zip(supernet.infos, widths, strict=True):
        if width:
            layers[module.name] = _predicted(supernet.model, module, supernet.moments[module.name], width, ridge)
            changed |= {module.name} if width < module.full_width else set()
            before = None if module.place.post_norm else module
        elif before is not None and module.full_width and not module.place.post_norm:
            _add_mean(supernet, before, module, layers)
            changed.add(before.name)
    return Correction(widths, {name: layer for name, layer in layers.items() if name in changed})


def _predicted(model: TimmModel, module: Module, moments: FeatureMoments, width: int, ridge: float) -> OutputLayer:
    """The output layer at `width`, with what it drops predicted from what it keeps."""
    own, kept = module.output_layer(module.of(model)), kept_columns(model, module, width)
    weight, bias = own.weight[:, kept].clone(), None if own.bias is None else own.bias.detach().clone()
    if width < module.full_width:
        mean, covariance = (tensor.to(weight.device).double() for tensor in moments)
        squares = covariance + torch.outer(mean, mean)
        dropped = own.weight[:, ~kept].double()
        across = squares[kept][:, ~kept] @ dropped.mT
        sums = Sums(torch.ones_like(mean[0]), mean[kept], dropped @ mean[~kept], squares[kept][:, kept], across)
        change, shift = sums.solved(ridge, intercept=bias is not None)
        if not all_finite([change, shift]):
            raise ValueError(f"ridge is {ridge}; it is too small for the moments of {module.name}, which are float32")
        weight += change.to(weight.dtype)
        if bias is not None:
            bias += shift.to(bias.dtype)
        if not all_finite([weight] if bias is None else [weight, bias]):
            raise ValueError(f"the correction of {module.name} at width {width} overflows {weight.dtype}")
    return OutputLayer(weight, bias)


def _mean_output(supernet: SuperNet, module: Module, moments: FeatureMoments) -> torch.Tensor:
    """(C,) float64: the mean of what a module adds to the stream."""
    own = module.output_layer(module.of(supernet.model))
    mean = own.weight.double() @ moments.mean.to(own.weight.device).double()
    mean = mean if own.bias is None else mean + own.bias.double()
    factors = output_factors(module, supernet.network.blocks(supernet.model)[module.block])
    return mean if factors is None else mean * factors.double()


def _add_mean(supernet: SuperNet, before: Module, skipped: Module, layers: dict[str, OutputLayer]) -> None:
    """Add the mean of what a skipped module adds to the stream to the bias of a module before it."""
    bias = layers[before.name].bias
    if bias is None:
        return
    mean = _mean_output(supernet, skipped, supernet.moments[skipped.name])
    divided = output_factors(before, supernet.network.blocks(supernet.model)[before.block])
    if divided is not None:  # no bias reaches a channel whose factor is 0
        mean = torch.where(divided == 0, 0.0, mean / divided.double())
    raised = bias + mean.to(bias.dtype)
    # Where layer scale multiplies by next to nothing, float16 cannot hold the quotient, and nothing is lost.
    bias.copy_(torch.where(raised.isfinite(), raised, bias))


class Predicting:
    """The modules of a super-network, each of which predicts what it drops from what it keeps.

    At any width a module runs with the output layer that `moments_correction` gives it; skipped, it adds its mean,
    if its output layer has a bias to put a mean in. So it does too where no module runs before it, whose bias could
    take the mean up in a correction. A module with a norm behind it stays as it is.

    Args:
        moments: of the present weights.
        ridge: as for `skd.compensate`.
    """

    def __init__(self, supernet: SuperNet, moments: Mapping[str, FeatureMoments], ridge: float = 0.01) -> None:
        self.supernet, self.moments, self.ridge = supernet, moments, ridge
        self._means = dict[int, torch.Tensor]()
        self._layers = dict[tuple[int, int], OutputLayer]()

    def step(self, index: int, x: torch.Tensor, width: int, shared: Sequence[Shared] | None = None) -> torch.Tensor:
        """As `SuperNet.step`, (B, N, C) to (B, tokens, C)."""
        module, supernet = self.supernet.infos[index], self.supernet
        whole = width == module.full_width or module.place.post_norm
        if whole or (width == 0 and module.output_layer(module.of(supernet.model)).bias is None):
            return supernet.step(index, x, width, shared=shared)
        own = self.moments[module.name]
        if width == 0:
            if index not in self._means:
                self._means[index] = _mean_output(supernet, module, own)
            return supernet.step(index, x, 0, shared=shared) + self._means[index].to(x.dtype)
        if (index, width) not in self._layers:
            self._layers[index, width] = _predicted(supernet.model, module, own, width, self.ridge)
        return supernet.step(index, x, width, shared=shared, output=self._layers[index, width])
