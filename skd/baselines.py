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
from typing import Any

import torch

from skd.architecture import ModuleInfo, describe
from skd.convert import Rotation, Transform, apply_transforms, collect, convert
from skd.supernet import SuperNet
from skd.taps import all_finite, report_left_out
from skd_kernels import taylor_scores

METHODS = ("random", "magnitude", "taylor", "hessian", "wpac")

Scores = dict[str, torch.Tensor]


def reordered(model: Any, batches: Iterable[Any], method: str, *, seed: int = 0) -> SuperNet:
    """`skd.convert` with another criterion for which coordinates lead.

    Args:
        model: timm VisionTransformer; it is not touched.
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
    infos = tuple(info for info in describe(model) if info.full_width)
    ordered = copy.deepcopy(model)
    scores = coordinate_scores(ordered, batches, method, seed=seed)
    apply_transforms(ordered, infos, {info.name: _ordering(info, scores[info.name]) for info in infos})
    return SuperNet(ordered, copy=False)


def coordinate_scores(model: Any, batches: Iterable[Any], method: str, *, seed: int = 0) -> Scores:
    """Score of every coordinate by module name, higher is better: (3, H, D) for attention, (F,) for an MLP; float64.

    Arguments as for `reordered`, without "wpac": its coordinates are not those of the model.
    """
    infos = tuple(info for info in describe(model) if info.full_width)
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        return {info.name: torch.rand(_shape(info), generator=generator, dtype=torch.float64) for info in infos}
    if method == "magnitude":
        return {info.name: _row_norms(model, info) for info in infos}
    if method in ("taylor", "hessian"):
        return _gradient_scores(model, infos, batches, method)
    raise ValueError(f"method is {method!r}; it may be one of {METHODS[:-1]}")


def _shape(info: ModuleInfo) -> tuple[int, ...]:
    return (3, info.num_heads, info.full_width) if info.kind == "attn" else (info.full_width,)


@torch.no_grad()
def _row_norms(model: Any, info: ModuleInfo) -> torch.Tensor:
    """L2 norm of the rows of qkv, or of the MLP's first layer (gated: gate and value row together)."""
    block = model.blocks[info.block]
    if info.kind == "attn":
        return block.attn.qkv.weight.double().norm(dim=1).reshape(_shape(info))
    first = [getattr(block.mlp, name).weight for name in info.inputs]
    rows = torch.cat([weight.double().norm(dim=1).reshape(-1, info.full_width) for weight in first])
    return rows.norm(dim=0)


def _gradient_scores(model: Any, infos: tuple[ModuleInfo, ...], batches: Iterable[Any], method: str) -> Scores:
    """Sums over all tokens of the batches of |x g|, or of half its square."""
    scores: Scores = {}
    batch: Scores = {}
    left_out = 0
    power, factor = (1, 1.0) if method == "taylor" else (2, 0.5)

    def add(info: ModuleInfo, feature: torch.Tensor, grad: torch.Tensor) -> None:
        coordinates = len(_shape(info))
        x, g = feature.flatten(-coordinates), grad.flatten(-coordinates)
        batch[info.name] = factor * taylor_scores(x, g, power=power).reshape(_shape(info))

    def end_batch() -> None:
        nonlocal left_out
        if all_finite(batch.values()):
            scores.update({name: scores[name] + score if scores else score for name, score in batch.items()})
        else:
            left_out += 1

    collect(model, infos, batches, add, end_batch)
    report_left_out(left_out, bool(scores))
    return scores


def _ordering(info: ModuleInfo, score: torch.Tensor) -> Transform:
    """Best coordinates first, in the form that `apply_transforms` takes; nothing moves where it may not."""
    if info.kind == "mlp":
        if info.binary:
            return torch.arange(info.full_width, device=score.device)
        return score.argsort(descending=True, stable=True)
    q, k, v = score
    return Rotation(
        v=_permutations(v) if info.rotates_v else None,
        qk=_permutations(q + k) if info.rotates_qk else None,
    )


def _permutations(score: torch.Tensor) -> torch.Tensor:
    """(H, D) scores to (H, D, D) permutation matrices, whose columns are the old coordinates, best first."""
    order = score.argsort(dim=-1, descending=True, stable=True)
    return torch.eye(score.shape[-1], dtype=torch.float64, device=score.device)[order].mT
