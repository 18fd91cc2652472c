"""WPAC: rotate and reorder a pre-trained Vision Transformer so that leading coordinates know the most (METHOD 1).

The network's function is unchanged: per head one orthogonal matrix for V and the output projection, one for Q and
K, and per MLP a permutation of its neurons.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from skd.architecture import ModuleInfo, describe, unwrapped
from skd.ranks import check_group, in_step, others_alive, summed, total
from skd.settings import CENTERINGS, LABELS
from skd.supernet import SuperBlock, SuperNet
from skd.taps import all_finite, checked, frozen, probe, report_left_out, tapped, total_cost
from skd_kernels import Moments, taylor_scores, token_moments


@dataclass(frozen=True)
class Rotation:
    """Orthogonal change of basis of one attention, float64; columns are the new coordinates, best first.

    Attributes:
        v, qk: (H, D, D), or None where it would change the network's function.
    """

    v: torch.Tensor | None
    qk: torch.Tensor | None


Transform = Rotation | torch.Tensor  # a tensor is the new order of an MLP's neurons, (F,) int64


def convert(
    model: Any,
    batches: Iterable[Any],
    *,
    centering: str = "dataset",
    labels: str = "given",
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
    group: Any = None,
) -> SuperNet:
    """Convert a timm VisionTransformer to a super-network, from one pass over calibration images.

    Args:
        model: timm VisionTransformer, pre-trained; it is not touched. One wrapped by torch.compile, DataParallel or
            DistributedDataParallel is unwrapped.
        batches: iterable of (images, labels): images (B, in_chans, H, W) un-augmented, preprocessed as for
            evaluation; labels (B,) integers, or None to use the model's own predictions. The paper uses 1,024
            images of the training set. Labels of a headless model are ignored.
        centering: "dataset" centres by the mean of all calibration tokens, so the result does not depend on the
            batch size; "batch" by each batch's own mean, as published.
        labels: "given", or "predicted" to ignore the labels in favour of the model's own predictions.
        progress: wraps the batches, e.g. ``tqdm``.
        group: a torch.distributed group whose processes all call this with the same model, each with its own share
            of the batches; the statistics are added up in float64, so the result is that of one process with all
            batches (to rounding), the same on every rank. None: this process alone.

    Returns:
        A `SuperNet` holding a converted copy, whose dropout list has one entry: the full network. Its logits are the
        model's to rounding (relative 1e-12 in float64, 1e-5 in float32).

    Raises:
        ValueError: unsupported architecture, no batches, bad images or labels, or no batch with finite statistics;
            a batch whose statistics are not finite is left out with a warning that counts them.
    """
    if centering not in CENTERINGS:
        raise ValueError(f"centering is {centering!r}; it may be one of {CENTERINGS}")
    if labels not in LABELS:
        raise ValueError(f"labels is {labels!r}; it may be one of {LABELS}")
    model = unwrapped(model)
    if any(isinstance(block, SuperBlock) for block in getattr(model, "blocks", ())):
        raise ValueError("model belongs to a SuperNet already; convert what skd.extract gives, or the original")
    check_group(group)
    infos = tuple(info for info in describe(model) if info.full_width)  # not the modules an extraction skipped
    converted = copy.deepcopy(model)
    statistics = WpacStatistics(centering)
    batches = batches if progress is None else progress(batches)
    collect(converted, infos, batches, statistics.add, statistics.end_batch, labels == "predicted", group)
    with others_alive(group):
        statistics.all_reduce(group)
    report_left_out(statistics.skipped, bool(statistics.importance))
    transforms = {info.name: statistics.transform(info) for info in infos}
    apply_transforms(converted, infos, transforms)
    supernet = SuperNet(converted, copy=False)
    _check_function(model, supernet, infos, transforms)
    return supernet


@torch.no_grad()
def _check_function(
    model: Any, supernet: SuperNet, infos: tuple[ModuleInfo, ...], transforms: dict[str, Transform]
) -> None:
    """A model with a forward of its own (a subclass, a hook) is not what its modules say.

    What such a forward changes is far above rounding, but a head with large weights can make rounding as large (its
    logits are small differences of large products): then a conversion in float64 decides.
    """
    low_precision = next(model.parameters()).dtype not in (torch.float32, torch.float64)
    if not _difference(model, supernet) > (0.2 if low_precision else 1e-3):
        return
    exact = copy.deepcopy(model).double()
    converted = copy.deepcopy(exact)
    apply_transforms(converted, infos, transforms)
    error = _difference(exact, SuperNet(converted, copy=False))
    if not error <= 1e-6:
        raise ValueError(
            f"model is a {type(model).__name__} whose forward is not that of its modules: its output and that of its "
            f"super-network differ by {error:.1e}; a subclass with a forward of its own and hooks are not supported"
        )


def _difference(model: Any, supernet: SuperNet) -> float:
    """Relative, of the outputs for a random image."""
    image = probe(model)
    with frozen(model), frozen(supernet):
        expected, found = model(image).double(), supernet(image).double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def collect(
    model: Any,
    infos: tuple[ModuleInfo, ...],
    batches: Iterable[Any],
    consume: Callable[[ModuleInfo, torch.Tensor, torch.Tensor], None],
    end_batch: Callable[[], None] = lambda: None,
    predicted: bool = False,
    group: Any = None,
) -> None:
    """Forward and backward of the cost over `batches`, every (info, feature, gradient) to `consume`."""
    with tapped(model, infos, consume), torch.enable_grad():
        for images, targets in in_step(checked(model, batches, with_labels=not predicted), group):
            total_cost(model, model(images), targets).backward()
            end_batch()


class WpacStatistics:
    """Running statistics of one calibration: weighted moments at qkv, squared Taylor scores at the neurons.

    A batch counts as a whole, in `end_batch`: if any of its statistics is not finite it is left out.

    Attributes:
        skipped: number of batches left out.
    """

    def __init__(self, centering: str = "dataset") -> None:
        self.centering = centering
        self.moments: dict[str, Moments] = {}
        self.covariances: dict[str, torch.Tensor] = {}
        self.importance: dict[str, torch.Tensor] = {}
        self.skipped = 0
        self._batch: dict[str, Moments | torch.Tensor] = {}
        self._device = torch.device("cpu")

    def add(self, info: ModuleInfo, feature: torch.Tensor, grad: torch.Tensor) -> None:
        """One module of the present batch."""
        self._device = feature.device
        if info.kind == "mlp":
            self._batch[info.name] = taylor_scores(feature, grad, power=2)
            return
        # (B, N, 3, H, D) -> tokens of 3 H groups, about the first batch's mean
        x, g = feature.flatten(2, 3), grad.flatten(2, 3)
        known = self.moments.get(info.name)
        self._batch[info.name] = token_moments(x, g, None if known is None else known.shift)

    def end_batch(self) -> None:
        """Take the present batch into the sums, or count it as skipped."""
        batch, self._batch = self._batch, {}
        # What is not finite in a token is not in the squares either.
        sums = [
            part.weighted_outer.diagonal(dim1=-2, dim2=-1) if isinstance(part, Moments) else part
            for part in batch.values()
        ]
        if not all_finite(sums):
            self.skipped += 1
            return
        for name, part in batch.items():
            if isinstance(part, torch.Tensor):
                self.importance[name] = self.importance.get(name, 0.0) + part
            elif self.centering == "batch":
                self.covariances[name] = self.covariances.get(name, 0.0) + part.covariance()
            else:
                self.moments[name] = self.moments[name] + part if name in self.moments else part

    def all_reduce(self, group: Any) -> None:
        """Add up the statistics of all ranks; nothing without a group.

        Raises:
            ValueError: on every rank, if one of them has no finite batch.
        """
        if group is None:
            return
        device = self._device
        self.skipped = total(self.skipped, group, device)
        if total(not self.importance, group, device):
            raise ValueError("batches: a rank has none with finite statistics")
        self.moments = {name: moments.all_reduce(group) for name, moments in self.moments.items()}
        for sums in (self.covariances, self.importance):
            sums.update(zip(sums, summed(list(sums.values()), group), strict=True))

    def covariance(self, info: ModuleInfo) -> torch.Tensor:
        """(3, H, D, D) float64 for q, k and v."""
        if self.centering == "batch":
            flat = self.covariances[info.name]
        else:
            flat = self.moments[info.name].covariance()
        return flat.unflatten(0, (3, info.num_heads))

    def transform(self, info: ModuleInfo) -> Transform:
        """The rotation of an attention, or the order of an MLP's neurons (as it is, where nothing applies)."""
        if info.kind == "mlp":
            importance = self.importance[info.name]
            if info.binary:
                return torch.arange(info.full_width, device=importance.device)
            return importance.argsort(descending=True, stable=True)
        q, k, v = self.covariance(info)
        return Rotation(
            v=principal_axes(v) if info.rotates_v else None,
            qk=principal_axes(q + k) if info.rotates_qk else None,
        )


def principal_axes(covariance: torch.Tensor) -> torch.Tensor:
    """Eigenvectors of symmetric (..., D, D) as columns, eigenvalues descending, float64.

    The largest entry of each column is positive, so the result does not depend on the solver's signs.
    """
    symmetric = (covariance + covariance.mT) / 2
    axes = torch.linalg.eigh(symmetric)[1].flip(-1)
    peak = axes.gather(-2, axes.abs().argmax(-2, keepdim=True))
    return axes * torch.where(peak < 0, -1.0, 1.0)


@torch.no_grad()
def apply_transforms(model: Any, infos: tuple[ModuleInfo, ...], transforms: dict[str, Transform]) -> None:
    """Fold rotations and orders into the weights of `model`, in float64, in place."""
    for info in infos:
        transform, block = transforms[info.name], model.blocks[info.block]
        if isinstance(transform, Rotation):
            _rotate(block.attn, info, transform)
        else:
            _reorder(block.mlp, info, transform)


def _rotate(attn: Any, info: ModuleInfo, rotation: Rotation) -> None:
    """W <- T^T W and b <- T^T b per head; W_proj <- W_proj T undoes V's."""
    parts = (rotation.qk, rotation.qk, rotation.v)
    for tensor in (attn.qkv.weight, attn.qkv.bias):
        if tensor is None:
            continue
        rows = tensor.double().reshape(3, info.num_heads, info.full_width, -1)
        turned = [r if t is None else t.mT @ r for t, r in zip(parts, rows, strict=True)]
        tensor.copy_(torch.stack(turned).reshape(tensor.shape))
    if rotation.v is not None:
        weight = attn.proj.weight
        columns = weight.double().unflatten(1, (info.num_heads, info.full_width))  # (C, H, D)
        weight.copy_((columns.transpose(0, 1) @ rotation.v).transpose(0, 1).flatten(1))


def _reorder(mlp: Any, info: ModuleInfo, order: torch.Tensor) -> None:
    """Permute the neurons: rows of the input layers (gate and value alike), columns of the output layer."""
    for layer in (getattr(mlp, name) for name in info.inputs):
        for tensor in (layer.weight, layer.bias):
            if tensor is not None:
                rows = tensor.reshape(-1, info.full_width, *tensor.shape[1:])
                tensor.copy_(rows[:, order].reshape(tensor.shape))
    output = getattr(mlp, info.output)
    output.weight.copy_(output.weight[:, order])
