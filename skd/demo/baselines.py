"""Simpler orders of a network's coordinates, to compare WPAC with. For comparison only: convert with `skd.convert`.

Every method scores each coordinate once and puts the best first: within each head V's coordinates by their score and
those of Q and K jointly by the sum of theirs, the neurons of an MLP by theirs. Coordinates only change places, so
the network's function is unchanged, as it is by WPAC; the methods differ in which coordinates lead.

    random       uniform noise
    magnitude    L2 norm of the weight rows that compute the coordinate (rows of qkv, of fc1)
    taylor       sum over tokens of |x g|        (Molchanov et al., 2017, arXiv 1611.06440)
    hessian      sum over tokens of 1/2 (x g)^2  (diagonal Fisher approximation)
    wpac         `skd.convert`: WPAC's rotations in place of permutations

x is the feature at the qkv output or the activation output, g the gradient of the true class's logit there.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch

from skd.convert import apply_transforms, collect, convert
from skd.supernet import SuperNet
from skd.support.taps import all_finite, report_left_out
from skd.vit import Module, Network, TimmModel, describe

METHODS = ("random", "magnitude", "taylor", "hessian", "wpac")

Scores = dict[str, torch.Tensor]


def reordered(model: TimmModel, batches: Iterable[object], method: str, *, seed: int = 0) -> SuperNet:
    """`skd.convert` with another criterion for which coordinates lead.

    Args:
        model: a timm model that `skd.convert` takes; it is not touched.
        batches: iterable of (images, labels) as for `skd.convert`; "random" and "magnitude" do not read it.
        method: "random", "magnitude", "taylor", "hessian" or "wpac".
        seed: of "random".

    Returns:
        A `SuperNet` that computes the model's function, with one entry: the full network.

    Raises:
        ValueError: unknown method, or as `skd.convert`.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; it may be one of {METHODS}")
    if method == "wpac":
        return convert(model, batches)
    network, ordered = describe(model), copy.deepcopy(model)
    scores = _scores(network, ordered, batches, method, seed)
    orders = {
        module.name: module.ordering(scores[module.name]) for module in network.modules if module.name in scores
    }
    apply_transforms(ordered, network, orders)
    return SuperNet(ordered, copy=False, network=network)


def coordinate_scores(model: TimmModel, batches: Iterable[object], method: str, *, seed: int = 0) -> Scores:
    """The score of every coordinate by module name, float64; higher is better.

    The shape is (3, H, D) for an attention, (H,) for one that is cut by heads, and (F,) for an MLP. "taylor" and
    "hessian" leave out modules whose gradients are not read: attentions by heads that are binary.

    The arguments are those of `reordered`, without "wpac", whose coordinates are not those of the model.
    """
    return _scores(describe(model), model, batches, method, seed)


def _scores(network: Network, model: TimmModel, batches: Iterable[object], method: str, seed: int) -> Scores:
    modules = [module for module in network.modules if module.full_width]
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        return {m.name: torch.rand(m.score_shape, generator=generator, dtype=torch.float64) for m in modules}
    if method == "magnitude":
        with torch.no_grad():
            return {module.name: module.row_norms(model) for module in modules}
    if method in ("taylor", "hessian"):
        return _gradient_scores(model, modules, batches, method)
    raise ValueError(f"method is {method!r}; it may be one of {METHODS[:-1]}")


def _gradient_scores(model: TimmModel, modules: list[Module], batches: Iterable[object], method: str) -> Scores:
    """Sums over all tokens of the batches of |x g|, or of half its square."""
    scores: Scores = {}
    batch: Scores = {}
    left_out = counted = 0
    power, factor = (1, 1.0) if method == "taylor" else (2, 0.5)

    def add(module: Module, feature: torch.Tensor, grad: torch.Tensor) -> None:
        batch[module.name] = factor * module.taylor(feature, grad, power)

    def end_batch() -> None:
        nonlocal left_out, counted
        if all_finite(batch.values()):
            counted += 1
            scores.update({name: scores[name] + score if scores else score for name, score in batch.items()})
        else:
            left_out += 1

    collect(model, modules, batches, add, end_batch)
    report_left_out(left_out, counted > 0)
    return scores
