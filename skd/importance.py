"""What each module and each of its coordinates is worth to the current smallest sub-network (METHOD 2, 1-2)."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from skd.evaluate import Top1
from skd.supernet import SuperNet, check_supernet
from skd.support.ranks import check_group, in_step, summed, total
from skd.support.taps import all_finite, check_gradients_possible, checked, frozen, objective, report_left_out
from skd.support.types import Progress
from skd.vit import Module, unwrapped
from skd.vit.protocol import Shared
from skd.vit.skipped import norm_added

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


SKIPS = ("identity", "published")


def importance(
    supernet: SuperNet,
    batches: Iterable[object],
    *,
    widths: Sequence[int] | None = None,
    skip: str = "identity",
    progress: Progress | None = None,
    group: ProcessGroup | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Taylor scores of every kept coordinate, and the sensitivity of every module, over a proxy set.

    Args:
        supernet: measured at its present (raw) weights, in evaluation mode.
        batches: iterable of (images, labels), un-augmented; the paper uses 1,024 training images. Labels may be
            None: then the full network's own predictions are the labels.
        widths: of every module, in order; None: those of the last entry of the dropout list.
        skip: what a skipped module is replaced by in the sensitivity: "identity", nothing is added to the stream; or
            "published", the normed stream is added, as the paper's own code does.
        progress: wraps the batches, e.g. ``tqdm``.
        group: a torch.distributed group whose processes all call this, each with its own share of the batches: scores
            and counts are added up, and every rank returns the same. None: this process alone.

    Returns:
        (scores, sensitivity), keyed by module name.
        scores[name]: (width,) float64 array, raw: the sum over tokens of ``|x g|``; attention: at the qkv output,
        q + k + v added, averaged over heads (cut by heads: added over the coordinates of each); MLP: at the
        activation output. A module that takes only the widths 0 and full has equal scores.
        sensitivity[name]: ``max(c - c_skip, 1/2) / max(c, 1)`` with c the number of correct predictions over the
        whole proxy set and c_skip the same with the module skipped (x -> x). Exact counts: the partition of the
        images into batches does not matter.

    Raises:
        ValueError: no batches, bad images or labels, widths out of range, or no batch (of a rank) whose output and
            scores are finite; a batch that has others is left out with a warning that counts them.
    """
    supernet = unwrapped(supernet)
    check_supernet(supernet)
    if skip not in SKIPS:
        raise ValueError(f"skip is {skip!r}; it may be one of {SKIPS}")
    check_gradients_possible()
    check_group(group)
    last = len(supernet.dropout_list) - 1
    current = supernet.widths(last) if widths is None else _checked_widths(supernet, widths)
    model = supernet.model
    buffers = score_buffers(supernet)
    totals = [None if buffer is None else torch.zeros_like(buffer, dtype=torch.float64) for buffer in buffers]
    top1 = Top1(model.num_classes == 0)
    left_out = 0
    with frozen(supernet):
        batches = checked(model, batches if progress is None else progress(batches))
        for images, labels in in_step(batches, group):
            with torch.no_grad():
                reference = supernet(images) if top1.headless or labels is None else None
            if labels is None and reference is not None and not top1.headless:
                labels = reference.argmax(-1)
            streams, shared, output = _add_scores(supernet, current, images, labels, buffers)
            finite = all_finite([output, *(buffer for buffer in buffers if buffer is not None)])
            for sums, buffer in zip(totals, buffers, strict=True):
                if sums is not None and buffer is not None:
                    if finite:
                        sums += buffer
                    buffer.zero_()
            if not finite:
                left_out += 1
                continue
            top1.start(reference, labels, len(images))
            top1.add("all", output)
            _count_skips(supernet, current, streams, shared, top1, skip)
    device = next(supernet.parameters()).device
    ranks_without = total(not top1.images, group, device)
    report_left_out(total(left_out, group, device), ranks_without == 0)
    reduced = iter(summed([part for part in totals if part is not None], group))
    counts = top1.counts(["all", *(i.name for i, w in zip(supernet.infos, current, strict=True) if w)], group)
    scores, sensitivity = {}, {}
    for info, own, width in zip(supernet.infos, totals, current, strict=True):
        scores[info.name] = read_scores(info, None if own is None else next(reduced), width)
        lost = counts["all"] - counts[info.name] if width else 0
        sensitivity[info.name] = max(lost, 0.5) / max(counts["all"], 1)
    return scores, sensitivity


def _checked_widths(supernet: SuperNet, given: Sequence[int]) -> list[int]:
    try:
        widths = [operator.index(width) for width in given]
    except TypeError:
        raise ValueError(f"widths is {given!r}; it must be a sequence of int, one per module") from None
    if len(widths) != len(supernet.infos):
        raise ValueError(f"widths has {len(widths)} numbers; the network has {len(supernet.infos)} modules")
    for info, width in zip(supernet.infos, widths, strict=True):
        if not 0 <= width <= info.full_width or (info.binary and width not in (0, info.full_width)):
            allowed = f"0 or {info.full_width}" if info.binary else f"0..{info.full_width}"
            raise ValueError(f"widths: {info.name} has {width}; it may be {allowed}")
    return widths


def score_buffers(supernet: SuperNet) -> list[torch.Tensor | None]:
    """The buffers to which the backward pass adds each module's scores; None for a binary module."""
    parameter = next(supernet.parameters())
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    return [
        None if info.binary else torch.zeros(info.score_shape, dtype=dtype, device=parameter.device)
        for info in supernet.infos
    ]


@torch.enable_grad()
def _add_scores(
    supernet: SuperNet,
    widths: list[int],
    images: torch.Tensor,
    labels: torch.Tensor | None,
    buffers: list[torch.Tensor | None],
) -> tuple[list[torch.Tensor], Sequence[Shared], torch.Tensor]:
    """Run the objective forward and backward; the backward pass adds the scores to `buffers`.

    Returns:
        The residual stream that enters each module, what the blocks share, and the output; all without a graph.
    """
    x, shared = supernet.embed(images)
    x = x.detach().requires_grad_()
    streams = []
    for index, width in enumerate(widths):
        streams.append(x.detach())
        x = supernet.step(index, x, width, buffers[index], shared)
    output = supernet.head(x)
    objective(supernet.model, output, labels).backward()
    return streams, shared, output.detach()


@torch.no_grad()
def _count_skips(
    supernet: SuperNet,
    widths: list[int],
    streams: list[torch.Tensor],
    shared: Sequence[Shared],
    top1: Top1,
    skip: str = "identity",
) -> None:
    """Count the correct predictions with each module skipped.

    The part before the skipped module is not recomputed: each variant starts from the stream that enters the module.
    """
    active = [index for index, width in enumerate(widths) if width]
    for position, skipped in enumerate(active):
        module, x = supernet.infos[skipped], streams[skipped]
        if skip == "published":
            block = supernet.network.blocks(supernet.model)[module.block]
            x = norm_added(module, block, x, supernet.tokens_of(module))
        for index in active[position + 1 :]:
            x = supernet.step(index, x, widths[index], shared=shared)
        top1.add(module.name, supernet.head(x))


def read_scores(module: Module, total: torch.Tensor | None, width: int) -> np.ndarray:
    """The raw scores of the kept coordinates; equal scores for a binary module, which has no sums."""
    if total is None:
        return np.ones(width)
    kept: np.ndarray = module.read_scores(total, width).cpu().numpy()
    return kept
