"""WPAC: rotate and reorder a pre-trained Vision Transformer so that leading coordinates know the most (METHOD 1).

The network's function is unchanged: per head one orthogonal matrix for V and the output projection, one for Q and
K, and per MLP a permutation of its neurons; an attention that no rotation leaves alone has its heads reordered.
`skd.vit.conversions` has other bases and orders, which are options of `convert`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch

from skd.moments import moments as feature_moments
from skd.supernet import SuperNet, belongs_to_supernet
from skd.support.ranks import check_group, in_step, others_alive, summed, total
from skd.support.settings import CENTERINGS, LABELS, NEURONS, QK, V
from skd.support.taps import all_finite, checked, frozen, objective, report_left_out, tapped
from skd.support.types import Progress
from skd.vit import Module, Network, TimmModel, Transform, describe, probe, unwrapped
from skd.vit.conversions import Choices, SecondMoments
from skd_kernels import Moments

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def convert(
    model: TimmModel,
    batches: Iterable[object],
    *,
    centering: str = "dataset",
    labels: str = "given",
    qk: str = QK[0],
    v: str = V[0],
    neurons: str = NEURONS[0],
    attention_group: int | None = None,
    moments: bool = False,
    progress: Progress | None = None,
    group: ProcessGroup | None = None,
) -> SuperNet:
    """Convert a timm Vision Transformer to a super-network, from one pass over calibration images.

    Args:
        model: a timm model of a family of `skd.vit`, pre-trained; it is not touched. One wrapped by torch.compile,
            DataParallel or DistributedDataParallel is unwrapped.
        batches: iterable of (images, labels): images (B, in_chans, H, W) un-augmented, preprocessed as for
            evaluation; labels (B,) integers, or None to use the model's own predictions. The paper uses 1,024
            images of the training set. Labels of a headless model are ignored.
        centering: "dataset" centres by the mean of all calibration tokens, so the result does not depend on the
            batch size; "batch" by each batch's own mean, as published.
        labels: "given", or "predicted" to ignore the labels in favour of the model's own predictions.
        qk: "joint", the paper's one orthogonal matrix for Q and K; "balanced": one for each, which are not
            orthogonal, so that leading coordinates have the logits with the smallest error.
        v: "variance", the paper's principal axes of the values; "output": bases with the smallest error of what the
            output projection makes of the averaged values; not orthogonal either.
        neurons: "taylor", by the paper's importance; "residual": by how much of the output is lost without a neuron
            after the others have taken over what they predict of it, for use with `skd.compensate`.
            Attentions that are not rotated (with qk_norm, a gate, an inner norm, or cut by heads) and MLPs with an
            inner norm keep the paper's conversion whatever is chosen.
        attention_group: how many coordinates of every head one step of planning removes, where heads are narrowed;
            None: 8, as published. With fewer, small sub-networks keep attentions that they would have to drop whole,
            which counts most where heads are small. GPU kernels take as long for 1 to 7 coordinates as for 8.
        moments: also store the moments of the converted network (`skd.moments`), by another pass over the batches.
        progress: wraps the batches, e.g. ``tqdm``.
        group: a torch.distributed group whose processes all call this with the same model, each with its own share
            of the batches; the statistics are added up in float64, so the result is that of one process with all
            batches (to rounding), the same on every rank. None: this process alone.

    Returns:
        A `SuperNet` holding a converted copy, whose dropout list has one entry: the full network. Its logits are the
        model's to rounding (relative 1e-12 in float64, 1e-5 in float32).

    Raises:
        ValueError: unsupported architecture, an attention_group below 1, no batches, bad images or labels, or no
            batch with finite statistics; a batch whose statistics are not finite is left out with a warning that
            counts them.
    """
    if centering not in CENTERINGS:
        raise ValueError(f"centering is {centering!r}; it may be one of {CENTERINGS}")
    if labels not in LABELS:
        raise ValueError(f"labels is {labels!r}; it may be one of {LABELS}")
    choices = _checked_choices(qk, v, neurons)
    model = unwrapped(model)
    if belongs_to_supernet(model):
        raise ValueError("model belongs to a SuperNet already; convert what skd.extract gives, or the original")
    check_group(group)
    network = describe(model).with_attention_group(attention_group)
    if attention_group is not None and network.attention_group is None:
        warnings.warn(
            f"attention_group is {attention_group}; this model has no heads that are narrowed", stacklevel=2
        )
    converted = copy.deepcopy(model)
    statistics = WpacStatistics(centering, choices)
    statistics.tokens_read = {network.modules[-1].block: network.tokens_read(model)}
    if moments and isinstance(batches, Iterator):
        batches = list(batches)  # an iterator would be empty in the second pass
    shown = batches if progress is None else progress(batches)
    collect(converted, network.modules, shown, statistics.add, statistics.end_batch, labels == "predicted", group)
    with others_alive(group):
        statistics.all_reduce(group)
    report_left_out(statistics.skipped, bool(statistics.batches))
    transforms = statistics.transforms(network, converted)
    apply_transforms(converted, network, transforms)
    supernet = SuperNet(converted, copy=False, network=network)
    _check_function(model, supernet, transforms)
    if moments:
        feature_moments(supernet, batches, progress=progress, group=group)
    return supernet


def _checked_choices(*given: str) -> Choices:
    choices = Choices(*given)
    for name, known in zip(Choices._fields, (QK, V, NEURONS), strict=True):
        if getattr(choices, name) not in known:
            raise ValueError(f"{name} is {getattr(choices, name)!r}; it may be one of {known}")
    return choices


@torch.no_grad()
def _check_function(model: TimmModel, supernet: SuperNet, transforms: dict[str, Transform]) -> None:
    """Refuse a model whose forward is not that of its modules, such as a subclass with its own forward, or hooks.

    Such a forward changes the output by far more than rounding does. But if a head has large weights, its logits are
    small differences of large products, and rounding errors can be as large; then a conversion in float64 decides.
    """
    low_precision = next(model.parameters()).dtype not in (torch.float32, torch.float64)
    if not _difference(model, supernet) > (0.2 if low_precision else 1e-3):
        return
    exact = copy.deepcopy(model).double()
    converted = copy.deepcopy(exact)
    apply_transforms(converted, supernet.network, transforms)
    error = _difference(exact, SuperNet(converted, copy=False, network=supernet.network))
    if not error <= 1e-6:
        raise ValueError(
            f"model is a {type(model).__name__} whose forward is not that of its modules: its output and that of its "
            f"super-network differ by {error:.1e}; a subclass with a forward of its own and hooks are not supported"
        )


def _difference(model: TimmModel, supernet: SuperNet) -> float:
    """The relative difference of the two outputs for a random image."""
    image = probe(model)
    with frozen(model), frozen(supernet):
        expected, found = model(image).double(), supernet(image).double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def collect(
    model: TimmModel,
    modules: Iterable[Module],
    batches: Iterable[object],
    consume: Callable[[Module, torch.Tensor, torch.Tensor], None],
    end_batch: Callable[[], None] = lambda: None,
    predicted: bool = False,
    group: ProcessGroup | None = None,
) -> None:
    """Differentiate the objective over `batches`, and pass every (module, feature, gradient) to `consume`."""
    with tapped(model, modules, consume), torch.enable_grad():
        for images, targets in in_step(checked(model, batches, with_labels=not predicted), group):
            objective(model, model(images), targets).backward()
            end_batch()


class WpacStatistics:
    """The running statistics of one calibration: weighted moments at qkv, scores at neurons and heads.

    `end_batch` adds a batch as a whole, or leaves it out if any of its statistics is not finite.

    Attributes:
        batches, skipped: number of batches that count, and of those left out.
        second: unweighted second moments, of the modules that take one of the `choices` beyond METHOD's.
        tokens_read: by block, how many leading tokens the head depends on, where that is not all.
    """

    def __init__(self, centering: str = "dataset", choices: Choices | None = None) -> None:
        self.centering, self.choices = centering, choices or Choices()
        self.second: dict[str, SecondMoments] = {}
        self.tokens_read: dict[int, int | None] = {}
        self._second_batch: dict[str, SecondMoments] = {}
        self.moments: dict[str, Moments] = {}
        self.covariances: dict[str, torch.Tensor] = {}
        self.importance: dict[str, torch.Tensor] = {}
        self.batches = self.skipped = 0
        self._batch: dict[str, Moments | torch.Tensor] = {}
        self._device = torch.device("cpu")

    def add(self, module: Module, feature: torch.Tensor, grad: torch.Tensor) -> None:
        """Add one module of the present batch. Moments are taken about the mean of the first batch."""
        self._device = feature.device
        known = self.moments.get(module.name)
        self._batch[module.name] = module.observe(feature, grad, None if known is None else known.shift)
        second = module.second_moments(feature, self.tokens_read.get(module.block), self.choices)
        if second is not None:
            self._second_batch[module.name] = second

    def end_batch(self) -> None:
        """Add the present batch to the sums, or count it as skipped."""
        batch, self._batch = self._batch, {}
        second, self._second_batch = self._second_batch, {}
        # The diagonal is enough: a NaN or infinity in any token also makes a sum of squares NaN or infinite.
        sums = [
            part.weighted_outer.diagonal(dim1=-2, dim2=-1) if isinstance(part, Moments) else part
            for part in batch.values()
        ]
        sums += [part.squares.diagonal(dim1=-2, dim2=-1) for part in second.values()]
        if not all_finite(sums):
            self.skipped += 1
            return
        self.batches += 1
        for name, part in batch.items():
            if isinstance(part, torch.Tensor):
                self.importance[name] = self.importance.get(name, 0.0) + part
            elif self.centering == "batch":
                self.covariances[name] = self.covariances.get(name, 0.0) + part.covariance()
            else:
                self.moments[name] = self.moments[name] + part if name in self.moments else part
        for name, own in second.items():
            self.second[name] = self.second[name].plus(own) if name in self.second else own

    def all_reduce(self, group: ProcessGroup | None) -> None:
        """Add up the statistics of all ranks; nothing without a group.

        Raises:
            ValueError: on every rank, if one of them has no finite batch.
        """
        if group is None:
            return
        device = self._device
        self.skipped = total(self.skipped, group, device)
        if total(not self.batches, group, device):
            raise ValueError("batches: a rank has none with finite statistics")
        self.moments = {name: moments.all_reduce(group) for name, moments in self.moments.items()}
        for sums in (self.covariances, self.importance):
            sums.update(zip(sums, summed(list(sums.values()), group), strict=True))
        self.second = {name: SecondMoments(*summed(own, group)) for name, own in self.second.items()}

    def covariance(self, module: Module) -> torch.Tensor:
        """(3, H, D, D) float64 for q, k and v of an attention that is rotated."""
        if self.centering == "batch":
            flat = self.covariances[module.name]
        else:
            flat = self.moments[module.name].covariance()
        return flat.unflatten(0, module.score_shape[:-1])

    def transform(self, module: Module) -> Transform:
        """The rotation of an attention, or the order of an MLP's neurons or of heads."""
        scores = self.importance.get(module.name)
        return module.transform(self.covariance(module) if scores is None else scores)

    def transforms(self, network: Network, model: TimmModel) -> dict[str, Transform]:
        """The transform of every module of `model` that was observed, by its name."""
        observed = {*self.moments, *self.covariances, *self.importance}
        found = {module.name: self.transform(module) for module in network.modules if module.name in observed}
        for module in network.modules:
            if module.name in self.second:
                second = self.second[module.name]
                found[module.name] = module.refined(model, found[module.name], second, self.choices)
        return found


def apply_transforms(model: TimmModel, network: Network, transforms: dict[str, Transform]) -> None:
    """Fold rotations and orders into the weights of `model`, in float64, in place."""
    for module in network.modules:
        if module.name in transforms:
            module.apply(model, transforms[module.name])
