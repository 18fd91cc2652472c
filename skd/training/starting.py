"""A start for small entries: the output layers that all entries share are fitted to several of them at once.

`skd.compensation` gives an entry output layers of its own. Here there is one layer for all entries, the trained one,
of which each uses some columns, so that training goes on from it. The full network is one of the entries, with the
weight of many, and stays nearly what it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import numpy as np
import torch

from skd.compensation import Part, embedded
from skd.corrections import kept_columns
from skd.extract import extract
from skd.supernet import SuperNet
from skd.support.ranks import spread, summed
from skd.support.regression import Sums
from skd.support.taps import frozen
from skd.training.batches import Anew
from skd.training.run import Run
from skd.training.types import Group
from skd.vit.refit import output_errors

ENTRIES = 8  # that are fitted: spread evenly over the list, the full network and the smallest among them
OF_FULL = 16.0  # the weight of the full network's errors, where those of every other entry have 1
RIDGE = 0.01  # strength of the shrinking, in units of the mean variance of a module's features


def refit(run: Run) -> None:
    """Fit the output layers of a run at its present list, on its calibration images; the same on every rank."""
    batches = Anew(partial(run.stoppable, run.calibration, "Fitting the output layers"))
    fit_shared(run.supernet, batches, run.group)
    spread(run.supernet, run.group)  # processors may round differently
    if run.state.average is not None and run.step == 0:  # later the average follows by itself
        run.state.average.module.load_state_dict(run.supernet.state_dict())
    run.position.refitted = True


@torch.no_grad()
def fit_shared(supernet: SuperNet, batches: Iterable[object], group: Group = None) -> None:
    """Fit the output layers (proj, fc2) of all modules in place, one module after the other.

    For each of several entries e the residual stream is computed through the modules fitted so far. The weight W of a
    module minimises, over the tokens of all images, the sum over e of weight_e |target_e - W[:, :k_e] h_e|^2, plus a
    ridge |W - W0|^2. h_e are the k_e features of the module in e, W0 is the weight before, and target_e what is
    missing to the stream of the full network before the fit, where the next module that runs in e reads it. A module
    with a norm behind it keeps its layer.

    Args:
        supernet: with its dropout list; its weights are changed.
        batches: calibration images as for `skd.importance`, read once, before anything is changed. The residual
            stream of all of them is kept on the network's device, once for each entry and once more.
        group: whose ranks have each their share of the batches; sums are added up.

    Raises:
        ValueError: bad batches, none whose outputs are finite, or features that are not.
    """
    last = len(supernet.dropout_list) - 1
    entries = np.unique(np.linspace(0, last, ENTRIES).round().astype(int)).tolist()
    with frozen(supernet):
        parts = embedded(supernet, batches, len(entries), group)
        fitted = [_Fitted(supernet, entry, number) for number, entry in enumerate(entries)]
        for index, module in enumerate(supernet.infos):
            running = [entry for entry in fitted if entry.widths[index]]
            streams = [_streams(supernet, index, running, part) for part in parts]
            if running and not module.place.post_norm:
                _fit(supernet, index, running, parts, streams, group)
            for entry in running:
                entry.go_on(index, parts)
            for part, whole in zip(parts, streams, strict=True):
                part.whole = whole[1]


class _Fitted:
    """One of the entries that are fitted together: a plain copy of it, whose output layers follow the shared ones."""

    def __init__(self, supernet: SuperNet, entry: int, number: int) -> None:
        self.shared, self.widths, self.number = supernet, supernet.widths(entry), number
        self.weight = OF_FULL if entry == 0 else 1.0
        self.plain = SuperNet(extract(supernet, entry=entry, corrected=False), copy=False).eval()

    def next(self, index: int) -> int:
        """The module after `index` that runs in this entry, or the head."""
        later = range(index + 1, len(self.widths))
        return next((module for module in later if self.widths[module]), len(self.widths))

    def add(self, sums: Sums, index: int, part: Part, target: torch.Tensor) -> None:
        """Add the equations of one batch: features, zeros where this entry has none, and what is to be added."""
        module, own = self.shared.infos[index], self.plain.infos[index]
        block = self.plain.network.blocks(self.plain.model)[own.block]
        found, wanted = output_errors(own, block, part.cut[self.number], target, part.shared[own.block])
        kept = kept_columns(self.shared.model, module, self.widths[index])
        features = found.new_zeros(len(found), len(kept))
        features[:, kept] = found
        own_sums = Sums.empty(len(kept), wanted.shape[-1], wanted.device)
        own_sums.add(features, wanted)
        for total, added in zip(sums, own_sums, strict=True):
            total.add_(added, alpha=self.weight)

    def go_on(self, index: int, parts: list[Part]) -> None:
        """Take the module's output layer from the shared one, and compute the stream through the module."""
        module, own = self.shared.infos[index], self.plain.infos[index]
        layer, there = own.output_layer(own.of(self.plain.model)), module.output_layer(module.of(self.shared.model))
        layer.weight.copy_(there.weight[:, kept_columns(self.shared.model, module, self.widths[index])])
        if layer.bias is not None:
            layer.bias.copy_(there.bias)
        for part in parts:
            x = part.cut[self.number]
            part.cut[self.number] = self.plain.step(index, x, own.full_width, shared=part.shared)


def _streams(supernet: SuperNet, index: int, running: list[_Fitted], part: Part) -> list[torch.Tensor]:
    """The full network's stream before module `index`, after it, and on to where the entries read it next.

    From this module on no layer is fitted yet, so these are the streams of the network before the fit.
    """
    streams = [part.whole]
    for later in range(index, max((entry.next(index) for entry in running), default=index + 1)):
        streams.append(supernet.step(later, streams[-1], supernet.infos[later].full_width, shared=part.shared))
    return streams


def _fit(
    supernet: SuperNet,
    index: int,
    running: list[_Fitted],
    parts: list[Part],
    streams: list[list[torch.Tensor]],
    group: Group,
) -> None:
    module = supernet.infos[index]
    layer = module.output_layer(module.of(supernet.model))
    sums = Sums.empty(layer.in_features, layer.out_features, layer.weight.device)
    for entry in running:
        for part, whole in zip(parts, streams, strict=True):
            entry.add(sums, index, part, whole[entry.next(index) - index])
    if not Sums(*summed(sums, group)).correct(layer, RIDGE):
        raise ValueError(f"calibration: the features of {module.name} are not finite")
