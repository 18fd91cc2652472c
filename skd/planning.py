"""`plan`, which runs rounds of a planner, and the parts of the published planner (METHOD 2, steps 3 and 4)."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from skd import planners
from skd.cost import check_convention
from skd.dropout_list import DropoutList, Operation
from skd.importance import importance
from skd.latency import LatencyTable, checked
from skd.supernet import SuperNet, check_supernet
from skd.support.checks import check_count
from skd.support.types import Progress
from skd.vit import unwrapped

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Scores that differ by less than this count as equal, because sums of the same numbers differ in their last bits.
_ROUNDING = 1e-12
TARGET = 0.875  # share of the MACs that the smallest entry has removed, as the paper trains with
SENSITIVITIES = ("count", "sqrt")


def rank_operations(
    scores: Mapping[str, npt.ArrayLike],
    sensitivity: Mapping[str, float],
    macs_per_unit: Mapping[str, float],
    group_size: Mapping[str, int],
    widths: Mapping[str, int],
    *,
    floor: float = 1e-4,
) -> list[Operation]:
    """All reductions worth considering at the current widths, the cheapest loss per MAC first (METHOD 2, step 3).

    Every argument is keyed by module name: "0.attn", "0.mlp", "1.attn", ..., which is also the modules' order.

    Args:
        scores: (width,) float arrays, raw, non-negative; normalised here to sum 1 within the module (a zero sum
            becomes uniform).
        sensitivity: gamma of each module; values below `floor` count as `floor`.
        macs_per_unit: MACs of one unit of width.
        group_size: units removed by one step.
        widths: current widths.

    Returns:
        Operations sorted by (score, module order, larger width first). Within a module, width p is proposed when
        removing everything past it loses no more per MAC than the last smaller width proposed.

    Raises:
        ValueError: a missing module, scores of the wrong length, negative or not finite, a group or price < 1.
    """
    if not floor >= 0:
        raise ValueError(f"floor is {floor}; it may not be negative")
    operations: list[tuple[float, int, int, Operation]] = []
    for order, name in enumerate(sorted(widths, key=_module_order)):
        width = widths[name]
        for mapping, label in (
            (scores, "scores"),
            (sensitivity, "sensitivity"),
            (macs_per_unit, "macs_per_unit"),
            (group_size, "group_size"),
        ):
            if name not in mapping:
                raise ValueError(f"{label} has no module {name!r}")
        if width == 0:
            continue
        gamma = float(sensitivity[name])
        if not np.isfinite(gamma):
            raise ValueError(f"sensitivity of {name} is {gamma}; it must be finite")
        normal = _normalised(name, scores[name], width)
        unit, group = float(macs_per_unit[name]), int(group_size[name])
        if not unit > 0 or group < 1:
            raise ValueError(f"{name}: macs_per_unit is {unit} and group_size {group}; they must be positive")
        kept = _kept_widths(normal, max(gamma, floor) / unit, group)
        ends = [next_width for next_width, _ in kept[1:]] + [width]
        for (p, score), end in zip(kept, ends, strict=True):
            operations.append((score, order, -p, Operation(name, p, (end - p) * unit, score)))
    return [operation for *_, operation in sorted(operations, key=lambda item: item[:3])]


def _module_order(name: str) -> tuple[int, str]:
    block, _, kind = name.partition(".")
    if not block.isdigit() or kind not in ("attn", "mlp"):
        raise ValueError(f"module name is {name!r}; it must be like '0.attn' or '11.mlp'")
    return int(block), kind


def _normalised(name: str, raw: npt.ArrayLike, width: int) -> np.ndarray:
    array = np.asarray(raw, dtype=np.float64)
    if array.shape != (width,):
        raise ValueError(f"scores of {name} has shape {array.shape}; its width is {width}")
    if not np.isfinite(array).all() or (array < 0).any():
        raise ValueError(f"scores of {name} has a negative or non-finite value")
    peak = array.max()
    scaled = array / peak if peak > 0 else np.ones(width)  # before the sum, so that it cannot overflow
    normal: np.ndarray = scaled / scaled.sum()
    return normal


def _kept_widths(normal: np.ndarray, price: float, group: int) -> list[tuple[int, float]]:
    """(p, score) for p = 0, g, 2g, ... wherever the score does not rise above the last kept one.

    `normal` sums to 1, to rounding; at p = 0 it is taken as 1, so that modules of equal sensitivity tie exactly and
    their order decides.
    """
    width = len(normal)
    last = price
    kept = []
    for p in range(0, width, group):
        score = float((normal[p:].sum() if p else 1.0) * price / (width - p))
        if score <= last * (1 + _ROUNDING):
            last = min(score, last)
            kept.append((p, last))
    return kept


def plan(
    supernet: SuperNet,
    batches: Iterable[object],
    *,
    target: float | None = None,
    latency_ms: float | None = None,
    latency: LatencyTable | None = None,
    rounds: int = 10,
    convention: str = "full",
    progress: Progress | None = None,
    group: ProcessGroup | None = None,
    planner: str | planners.Planner = "loss",
    keep: Mapping[str, int] | None = None,
    exclude: Iterable[str] = (),
    **options: Any,
) -> DropoutList:
    """Sizes in minutes: a dropout list from rounds of a planner, without any training.

    Args:
        supernet: the converted network; not changed. Assign the result to ``supernet.dropout_list``.
        batches: proxy images as for `importance`; read several times in every round, so a list or a DataLoader.
        target: share of the model's MACs that the smallest entry has removed; None: 0.875, as the paper trains with,
            where no `latency_ms` is given.
        latency_ms: instead of it, milliseconds for a batch: the list grows until the smallest entry is within them.
        latency: the table that predicts them, from `skd.measure_latency` for this architecture.
        rounds: calls of the planner, which measures afresh at the widths reached; the target grows linearly. A
            latency may need another call or two.
        convention: of the MACs that budgets count ("full" or "linear", see `skd.cost`).
        progress: wraps the rounds, e.g. ``tqdm``.
        group: a torch.distributed group, each of whose processes has its share of the batches (see `importance`).
        planner: a name (`skd.planners.names()`), or any function that is a `skd.planners.Planner`; "paper" is the
            published one, "loss" measures what narrowing costs.
        keep: by the name of a module ("3.attn", "0.mlp"), the smallest width that it may get.
        exclude: names of modules that stay at their full width.
        options: of the planner's own, such as ``points=8`` of "loss", or its ``compensated=False``, which is better
            where sub-networks will be neither trained nor corrected (`skd.compensate`).

    Returns:
        A `DropoutList` that starts at the full network.

    Warns:
        UserWarning: the target is more than all attentions and MLPs together have, or may lose, or the latency less
            than what remains takes; in the smallest entry all are at the smallest width they may have. Or the full
            network is within the latency already.

    Raises:
        ValueError: a module in `keep` or `exclude` that there is not, a width that it cannot have, target outside
            (0, 1], both a target and a latency, a latency that is no positive number or has no table of this
            architecture, rounds < 1, bad batches, an unknown planner, an option it does not have.
    """
    table = None if latency_ms is None else checked(latency_ms, latency)
    goal = _checked_target(target, latency_ms, latency)
    check_count("rounds", rounds)
    supernet = unwrapped(supernet)
    check_supernet(supernet)
    check_convention(convention)
    if table is not None:
        table.check(supernet)
    if isinstance(batches, Iterator):
        batches = list(batches)  # an iterator would be empty in the second round
    total = int(supernet.costs.macs(supernet.widths(), convention))
    least = _least(supernet, {} if keep is None else keep, exclude)
    grown = DropoutList(supernet.modules_in_order, [supernet.widths()], costs=supernet.costs, least=least)

    def grow(current: DropoutList, removed: float) -> DropoutList:
        return planners.grow(
            planner, supernet, batches, removed, current=current, convention=convention, group=group, options=options
        )

    steps: Iterable[int] = range(1, rounds + 1)
    shown: Iterable[Any] = steps if progress is None else progress(steps)
    if table is not None and latency_ms is not None:
        macs = partial(supernet.costs.macs, convention=convention)
        return _grown_to_latency(grow, grown, latency_ms, table, shown, rounds, macs)
    for step in shown:
        grown = grow(grown, goal * total * step / rounds)
    _warn_if_out_of_reach(supernet, grown, goal, convention, least)
    return grown


def _checked_target(target: object, latency_ms: object, latency: object) -> float:
    """The target, which is not used where there is a latency; ValueError if the two do not go together."""
    if latency_ms is not None and target is not None:
        raise ValueError(f"target is {target!r} and latency_ms {latency_ms!r}; one of them may be given")
    if latency_ms is None and latency is not None:
        raise ValueError("latency is given without latency_ms; a table goes with it")
    share: Any = TARGET if target is None else target
    is_number = isinstance(share, numbers.Real) and not isinstance(share, bool)
    if not is_number or not 0 < share <= 1:
        raise ValueError(f"target is {share!r}; it must be a number above 0 and at most 1")
    return float(share)


def _grown_to_latency(
    grow: Callable[[DropoutList, float], DropoutList],
    grown: DropoutList,
    latency_ms: float,
    table: LatencyTable,
    steps: Iterable[Any],
    rounds: int,
    macs: Callable[[npt.ArrayLike], np.ndarray],
) -> DropoutList:
    """The list grown, and cut short, to the first entry that is predicted to be within `latency_ms`.

    `grow` takes a list and a total of MACs to remove. The milliseconds of a round's target decrease linearly, and are
    taken for as many MACs as they are on the line from the present entry to the smallest possible one. `macs` gives
    those of widths.
    """
    smallest = [(grown.least or {}).get(name, 0) for name in grown.modules]
    most = int(macs(grown.widths[0]) - macs(smallest))
    full, least = table.at([grown.widths[0], smallest]).tolist()
    if full <= latency_ms:
        _warn(
            f"latency_ms is {latency_ms}; the full network is predicted to take {full:.4g} ms: the list has it alone"
        )
    for step in steps:
        present, goal = float(table.at(grown.widths[-1])), full - (full - latency_ms) * step / rounds
        if present > max(goal, least):
            share = min(1.0, (present - goal) / (present - least))
            grown = grow(grown, grown.removed_macs + share * (most - grown.removed_macs))
    more = True
    while more and table.at(grown.widths[-1]) > latency_ms:
        length, grown = len(grown), grow(grown, float(most))
        more = len(grown) > length
    within = np.flatnonzero(table.at(grown.widths) <= latency_ms)
    if len(within) == 0:
        left, what = float(table.at(grown.widths[-1])), _smallest(smallest)
        what = what if grown.widths[-1].tolist() == smallest else "where the planner ends"
        _warn(
            f"latency_ms is {latency_ms}, which cannot be had: the smallest sub-network, {what}, "
            f"is predicted to take {left:.4g} ms on {table.conditions}"
        )
        return grown
    kept = int(within[0]) + 1
    if kept == len(grown):
        return grown
    removed = float(macs(grown.widths[0]) - macs(grown.widths[kept - 1]))
    return replace(grown, widths=grown.widths[:kept], removed_macs=removed, sensitivity=None)


def _least(supernet: SuperNet, keep: Mapping[str, int], exclude: Iterable[str]) -> dict[str, int]:
    """The smallest width that `keep` and `exclude` allow, of each module that they name."""
    is_list = isinstance(exclude, Iterable) and not isinstance(exclude, str)
    excluded = list(exclude) if is_list else []
    if not is_list or not isinstance(keep, Mapping) or not all(isinstance(name, str) for name in [*keep, *excluded]):
        raise ValueError(f"keep is {keep!r} and exclude {exclude!r}; they must map names to widths, and list names")
    known = {info.name: info for info in supernet.infos}
    least = dict(keep) | {name: known[name].full_width for name in excluded if name in known}
    for argument, names in (("keep", list(keep)), ("exclude", excluded)):
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"{argument} has {unknown[0]!r}; it may be one of {list(known)}")
    for name, width in least.items():
        full = known[name].full_width
        if isinstance(width, bool) or not isinstance(width, numbers.Integral) or not 0 <= width <= full:
            raise ValueError(f"keep has {width!r} for {name}; it must be a width in 0..{full}")
        if width and known[name].binary:
            least[name] = full  # the module is kept whole or not at all
    return {name: int(width) for name, width in least.items()}


def _warn_if_out_of_reach(
    supernet: SuperNet, grown: DropoutList, target: float, convention: str, least: Mapping[str, int]
) -> None:
    """Warn if the embedding and the head, and what modules must keep, have more MACs than the target leaves.

    Or if the target is so small that the list has the full network alone.
    """
    sizes = supernet.costs.macs(grown.widths[[0, -1]], convention)
    left = int(sizes[1]) / int(sizes[0])
    smallest = [least.get(name, 0) for name in grown.modules]
    at_the_end = grown.widths[-1].tolist() == smallest
    if at_the_end and left > 1 - target + _ROUNDING:
        _warn(
            f"target is {target}, which cannot be had: the smallest sub-network, {_smallest(smallest)}, "
            f"still has {left:.4f} of the MACs ({convention}), so a target up to {1 - left:.4f} is within reach"
        )
    elif len(grown) == 1 and not at_the_end:
        _warn(
            f"target is {target}, and the first step that the planner would take removes more: the list has the full "
            "network alone"
        )


def _smallest(widths: list[int]) -> str:
    """In words, what the smallest possible sub-network is."""
    return (
        "at the smallest widths that keep and exclude allow" if any(widths) else "with no attention and no MLP left"
    )


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)  # as if it came from the caller of `plan`


class Proposal(NamedTuple):
    """What one round measured at the widths of the last entry.

    Attributes:
        operations: as `rank_operations` gives them.
        scores, sensitivity: as `importance` gives them.
    """

    operations: list[Operation]
    scores: dict[str, np.ndarray]
    sensitivity: dict[str, float]


def propose(
    supernet: SuperNet,
    batches: Iterable[object],
    current: DropoutList,
    *,
    convention: str = "full",
    group: ProcessGroup | None = None,
    sensitivity: str = "count",
    skip: str = "identity",
) -> Proposal:
    """One round: measure importance at the last entry of `current`, and rank the operations.

    The options are those of the planner "paper".
    """
    check_sensitivity(sensitivity)
    widths = current.entry(len(current) - 1)
    scores, gamma = importance(supernet, batches, widths=list(widths.values()), skip=skip, group=group)
    return ranked(supernet, scores, gamma, widths, convention, sensitivity)


def check_sensitivity(sensitivity: str) -> None:
    """Raise ValueError unless it is one that `ranked` knows."""
    if sensitivity not in SENSITIVITIES:
        raise ValueError(f"sensitivity is {sensitivity!r}; it may be one of {SENSITIVITIES}")


def ranked(
    supernet: SuperNet,
    scores: dict[str, np.ndarray],
    sensitivity: dict[str, float],
    widths: Mapping[str, int],
    convention: str,
    use: str = "count",
) -> Proposal:
    """Rank the operations at `widths` by what was measured there, with the network's own prices.

    With `use` "sqrt" the square root of the sensitivity counts, and the proposal's sensitivity is that square root.
    """
    if use == "sqrt":
        sensitivity = {name: math.sqrt(gamma) for name, gamma in sensitivity.items()}
    operations = rank_operations(
        scores,
        sensitivity,
        dict(zip(supernet.modules_in_order, supernet.costs.planned_per_unit(convention), strict=True)),
        {info.name: info.group_size for info in supernet.infos},
        widths,
    )
    return Proposal(operations, scores, sensitivity)
