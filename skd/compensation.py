"""Compensation without training: what a sub-network drops is predicted from what it keeps (`compensate`).

A sub-network leaves out coordinates and whole modules. What they would have added is, for the most part, a linear
function of the features that remain. Ridge regression finds this function on a few calibration images, and since the
output layer of a module (proj, fc2) is linear too, its weights and bias can absorb it. Refitting the remaining
weights after a part is removed is due to Optimal Brain Surgeon (Hassibi, Stork 1993). Fitting layer by layer to the
outputs of the whole network, each layer on the inputs that the corrected layers before it give, is the sequential
form of post-training pruning (Frantar, Alistarh, "Optimal Brain Compression", 2022).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from skd.corrections import Correction
from skd.cost import check_convention
from skd.extract import choose_entry, extract
from skd.moments import moments_correction
from skd.supernet import SuperNet, check_supernet
from skd.support.ranks import check_group, in_step, summed, total
from skd.support.regression import Sums
from skd.support.taps import all_finite, checked, frozen, report_left_out
from skd.support.types import Progress
from skd.vit import Module, OutputLayer, unwrapped
from skd.vit.protocol import Shared
from skd.vit.refit import output_errors

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@torch.no_grad()
def compensate(
    supernet: SuperNet,
    batches: Iterable[object] | None = None,
    *,
    entries: Sequence[int] | None = None,
    macs: Sequence[float] | None = None,
    ridge: float = 0.01,
    convention: str = "full",
    progress: Progress | None = None,
    group: ProcessGroup | None = None,
) -> dict[int, Correction]:
    """Fit other output layers for entries of the dropout list, so that they follow the full network more closely.

    Each entry is processed module by module beside the full network. The output layer of every module that runs is
    fitted so that the entry's residual stream, at the point where the next running module reads it, is as near as
    possible to the full network's, over all tokens of all images. In this way the module before a skipped one
    predicts what the skipped one would have added. Then the stream is computed through the corrected module. The fit
    is ridge regression with an intercept, in float64. It shrinks the change of the weights, so that a module that has
    lost nothing stays as it is.

    The corrections are also put into ``supernet.corrections`` (which keeps those of other entries), where
    ``supernet(images, entry=i)`` in evaluation mode, `skd.evaluate`, `skd.extract` and `skd.save` find them. The full
    network's weights stay as they are. A module with a norm behind it keeps its own output layer, since the norm
    would undo part of the fit; a layer without a bias gets none.

    Args:
        supernet: with its dropout list.
        batches: calibration images as for `skd.importance`, read once; labels are not looked at. For each entry, and
            once more, the residual stream of all images is kept on the network's device. None: use
            ``supernet.moments``.
        entries: indices into the dropout list.
        macs: budgets instead, each as `skd.extract` takes it: the largest entry within each is chosen. Exactly one
            of `entries` and `macs` must be given.
        ridge: strength of the shrinking, in units of the mean variance of a module's features.
        convention: how `macs` counts, "full" or "linear".
        progress: wraps the modules, e.g. ``tqdm``.
        group: a torch.distributed group, each of whose processes has its share of the batches; sums are added up, so
            that all find the same corrections.

    Returns:
        The correction of each entry.

    Raises:
        ValueError: not exactly one choice or an empty one, an entry out of range, a budget below the smallest
            sub-network, a ridge that is not positive, bad batches, none whose outputs are finite, or an overflow; no
            batches and no moments.
    """
    supernet = unwrapped(supernet)
    check_supernet(supernet)
    check_group(group)
    chosen = _chosen(supernet, entries, macs, convention)
    if isinstance(ridge, bool) or not isinstance(ridge, numbers.Real) or not 0 < ridge < math.inf:
        raise ValueError(f"ridge is {ridge!r}; it must be a positive, finite number")
    if batches is None:
        found = {entry: moments_correction(supernet, entry, float(ridge)) for entry in chosen}
    else:
        found = _fitted(supernet, batches, chosen, float(ridge), progress, group)
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):  # copies that may be used outside of it
            found = {entry: correction.mapped(torch.clone) for entry, correction in found.items()}
    supernet.corrections = {**supernet.corrections, **found}
    return found


def _fitted(
    supernet: SuperNet,
    batches: Iterable[object],
    chosen: Sequence[int],
    ridge: float,
    progress: Progress | None,
    group: ProcessGroup | None,
) -> dict[int, Correction]:
    """The corrections of entries, each fitted module by module beside the full network."""
    with frozen(supernet):
        cuts = [_Cut(supernet, entry) for entry in chosen]
        parts = embedded(supernet, batches, len(cuts), group)
        steps = range(len(supernet.infos) + 1)
        for index, _ in enumerate(steps if progress is None else progress(steps)):
            for number, cut in enumerate(cuts):
                cut.reach(index, number, parts, ridge, group)
            if index < len(supernet.infos):
                for part in parts:
                    part.whole = supernet.step(
                        index, part.whole, supernet.infos[index].full_width, shared=part.shared
                    )
    return {cut.entry: Correction(cut.widths, cut.layers) for cut in cuts}


def _chosen(
    supernet: SuperNet, entries: Sequence[int] | None, macs: Sequence[float] | None, convention: str
) -> list[int]:
    """The entries that `entries` or `macs` choose, each once."""
    if (entries is None) == (macs is None):
        raise ValueError(f"exactly one of entries and macs must be given; got {'none' if macs is None else 'both'}")
    for name, given in (("entries", entries), ("macs", macs)):
        if given is not None and (isinstance(given, str) or not isinstance(given, Sequence) or not given):
            raise ValueError(f"{name} is {given!r}; it must be a list with one item at least")
    of_budgets = [choose_entry(supernet, macs=budget, convention=convention) for budget in macs or ()]
    check_convention(convention)
    return list(dict.fromkeys([*of_budgets, *(int(choose_entry(supernet, entry=entry)) for entry in entries or ())]))


class Part:
    """One batch: the residual stream in the full network and in each cut one, and the tensors that blocks share.

    Attributes:
        whole: (B, N, C), the stream in the full network; after its last block the tokens that its head reads.
        cut: of each cut network, by its number.
    """

    def __init__(self, x: torch.Tensor, shared: Sequence[Shared], cuts: int) -> None:
        self.whole, self.shared = x, shared
        self.cut = [x] * cuts


def embedded(supernet: SuperNet, batches: Iterable[object], cuts: int, group: ProcessGroup | None) -> list[Part]:
    """Every batch as it enters the first block; those whose logits are not finite are left out."""
    parts, left_out = list[Part](), 0
    for images, _ in in_step(checked(supernet.model, batches, with_labels=False), group):
        if all_finite([supernet(images)]):
            parts.append(Part(*supernet.embed(images), cuts))
        else:
            left_out += 1
    device = next(supernet.parameters()).device
    counted = total(len(parts), group, device)
    report_left_out(total(left_out, group, device), counted > 0)
    return parts


class _Cut:
    """An entry that is being fitted: its plain model, whose output layers are corrected one after the other."""

    def __init__(self, supernet: SuperNet, entry: int) -> None:
        self.entry, self.widths = entry, tuple(supernet.widths(entry))
        self.network = SuperNet(extract(supernet, entry=entry, corrected=False), copy=False).eval()
        self.layers: dict[str, OutputLayer] = {}
        self._waiting: int | None = None  # the module that ran last, until it is known where its output is read

    def reach(self, index: int, number: int, parts: list[Part], ridge: float, group: ProcessGroup | None) -> None:
        """Go on to module `index`, or to the head. If it runs, fit the module that ran last and apply it."""
        last = index == len(self.widths)
        if not (last or self.widths[index]):
            return
        if self._waiting is not None:
            module = self.network.infos[self._waiting]
            if not module.place.post_norm:
                self._fit(module, number, parts, ridge, group)
            if not last:
                for part in parts:
                    x = part.cut[number]
                    part.cut[number] = self.network.step(self._waiting, x, module.full_width, shared=part.shared)
        self._waiting = index

    def _fit(self, module: Module, number: int, parts: list[Part], ridge: float, group: ProcessGroup | None) -> None:
        """Replace the weight and the bias of the module's output layer by the fitted ones."""
        network = self.network
        block = network.network.blocks(network.model)[module.block]
        layer = module.output_layer(module.of(network.model))
        sums = Sums.empty(layer.in_features, layer.out_features, layer.weight.device)
        for part in parts:
            sums.add(*output_errors(module, block, part.cut[number], part.whole, part.shared[module.block]))
        if not Sums(*summed(sums, group)).correct(layer, ridge):
            raise ValueError(f"batches: the features of {module.name} in entry {self.entry} are not finite")
        self.layers[module.name] = OutputLayer(
            layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
        )
