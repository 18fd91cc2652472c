"""A sub-network of any size as a plain timm model: a slice of the super-network's weights (METHOD 3)."""

from __future__ import annotations

import copy
import math
import numbers
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from skd.corrections import Correction
from skd.cost import check_convention
from skd.latency import LatencyTable, entry_within
from skd.moments import moments_correction
from skd.supernet import SuperNet, check_supernet
from skd.vit import Module, TimmLayer, unwrapped


def extract(
    supernet: SuperNet,
    *,
    macs: float | None = None,
    params: float | None = None,
    entry: int | None = None,
    latency_ms: float | None = None,
    latency: LatencyTable | None = None,
    convention: str = "full",
    corrected: bool | str = True,
) -> nn.Module:
    """Cut one sub-network out of the super-network.

    Args:
        supernet: not changed; the result shares no memory with it.
        macs, params: budget; a float in (0, 1] is a fraction of the full network, an int an absolute count. The
            largest sub-network of the dropout list within the budget is taken.
        entry: index into the dropout list.
        latency_ms: milliseconds for a batch. The largest sub-network of the list that is predicted to stay within
            them is taken. Exactly one of `macs`, `params`, `entry` and `latency_ms` must be given.
        latency: the table that predicts them, from `skd.measure_latency`.
        convention: how `macs` counts, "full" or "linear" (see `skd.cost`).
        corrected: fold in the entry's correction, where it has one (`skd.compensate`); False: take the
            super-network's own weights; "moments": fold in what ``skd.compensate(supernet, entries=[entry])`` gives
            from the stored moments (`skd.moments`), without images.

    Returns:
        A model of timm's class, of timm and torch modules only, usable without skd. With `corrected` true its logits
        are those of ``supernet(images, entry=...)`` in evaluation mode: the softmax scale of the original head width
        is folded into the Q rows. In place of a skipped module stands a torch.fx.GraphModule that returns zeros, and
        in place of its norm and layer scale Identity: block indices never shift, and every entry can be exported and
        quantized. For images of another size call timm's ``set_input_size`` of ``supernet.model`` first: that of a
        cut model looks into modules that may be gone.

    Raises:
        ValueError: not exactly one choice, an entry out of range, or a budget below the smallest sub-network; no
            table of latencies for `latency_ms`, or one of another architecture; "moments" of a super-network
            without any.
    """
    supernet = unwrapped(supernet)
    if corrected not in (True, False, "moments"):
        raise ValueError(f"corrected is {corrected!r}; it may be True, False or 'moments'")
    chosen = choose_entry(
        supernet,
        macs=macs,
        params=params,
        entry=entry,
        latency_ms=latency_ms,
        latency=latency,
        convention=convention,
    )
    model, modules = cut_at(supernet, supernet.widths(chosen)), supernet.network.modules
    if corrected == "moments":
        _correct(supernet.network.blocks(model), modules, moments_correction(supernet, chosen))
    elif corrected and chosen in supernet.corrections:
        _correct(supernet.network.blocks(model), modules, supernet.corrections[chosen])
    return model


def cut_at(supernet: SuperNet, widths: Sequence[int]) -> nn.Module:
    """A plain model at these widths, one for each module in order, which need not be those of an entry."""
    network = supernet.network
    blocks = network.blocks(supernet.model)
    cut = [block.cut(own) for block, own in zip(blocks, network.per_block(widths), strict=True)]
    # Everything outside of the blocks is copied; the blocks are already cut, and are not copied again.
    model: nn.Module = copy.deepcopy(supernet.model, {id(blocks): blocks})
    network.replace_blocks(model, cut)
    return model


@torch.no_grad()
def _correct(blocks: Sequence[TimmLayer], modules: Sequence[Module], correction: Correction) -> None:
    """Put the corrected output layers into cut blocks."""
    for module in modules:
        layer = correction.layers.get(module.name)
        if layer is not None:
            own = module.output_layer(getattr(blocks[module.block], module.place.module))
            own.weight.copy_(layer.weight)
            if layer.bias is not None:
                own.bias.copy_(layer.bias)


def choose_entry(
    supernet: SuperNet,
    *,
    macs: float | None = None,
    params: float | None = None,
    entry: int | None = None,
    latency_ms: float | None = None,
    latency: LatencyTable | None = None,
    convention: str = "full",
) -> int:
    """The entry that `extract` would cut, for the same arguments and with the same errors."""
    given = {"macs": macs, "params": params, "entry": entry, "latency_ms": latency_ms}
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) != 1:
        raise ValueError(f"exactly one of macs, params, entry and latency_ms must be given; got {chosen or 'none'}")
    if latency is not None and latency_ms is None:
        raise ValueError(f"latency is given with {chosen[0]}; a table goes with latency_ms")
    check_convention(convention)
    check_supernet(supernet)
    if entry is not None:
        supernet.widths(entry)
        return entry
    if latency_ms is not None:
        return entry_within(supernet, latency_ms, latency)
    return _entry_of_size(supernet, chosen[0], given[chosen[0]], convention)


def _entry_of_size(supernet: SuperNet, name: str, value: object, convention: str) -> int:
    """The largest entry within a budget of MACs or parameters, as `name` says."""
    widths = supernet.dropout_list.widths
    sizes = supernet.costs.macs(widths, convention) if name == "macs" else supernet.costs.params(widths)
    unit = f"MACs ({convention})" if name == "macs" else "parameters"
    budget = _budget(name, value, int(sizes[0]))
    fitting = np.flatnonzero(sizes <= budget)
    if len(fitting) == 0:
        smallest = int(sizes[-1])
        if len(sizes) == 1:
            raise ValueError(
                f"{name} is {value}, but this super-network was never planned: its dropout list has "
                f"the full network alone, with {smallest:,} {unit}; skd plan or skd train (skd.plan, skd.train) "
                "gives it smaller ones"
            )
        raise ValueError(
            f"{name} is {value}, that is {budget:,} {unit}; the smallest sub-network is entry "
            f"{len(sizes) - 1} with {smallest:,} ({smallest / int(sizes[0]):.4f} of the full network)"
        )
    return int(fitting[0])


def _budget(name: str, value: object, full: int) -> int:
    """A fraction (float in (0, 1]) or a count (int) as a count."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        if int(value) < 1:
            raise ValueError(f"{name} is {value}; a count must be positive")
        return int(value)
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        if 0 < float(value) <= 1:
            count = math.floor(float(value) * full)
            # If the fraction was computed as count / full, it means that count, even if the product rounds below it.
            return count + 1 if (count + 1) / full <= float(value) else count
        raise ValueError(f"{name} is {value}; a float is a fraction in (0, 1], an int an absolute count")
    raise ValueError(f"{name} is {value!r}; it must be a float in (0, 1] or an int")
