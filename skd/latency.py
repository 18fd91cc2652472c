"""Latency of any sub-network, predicted from a table of measured modules: `LatencyTable`.

`skd.measure_latency` makes one. The milliseconds of a network are taken for a sum, and the sum is put on the scale of
whole networks, which is what a user times::

    sum of a network  =  skipped_ms + over modules (curve of the module at its width)
    prediction        =  scale * sum + offset_ms
"""

from __future__ import annotations

import json
import math
import numbers
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from skd.supernet import SuperNet, check_supernet
from skd.support.clocks import Conditions
from skd.support.outputs import output_file, write_json
from skd.vit import unwrapped

VERSION = 1
# A width that takes so much more than the line between its neighbours is flagged.
_ABOVE_THE_LINE = 1.1


@dataclass(frozen=True)
class Flag:
    """A width that the device does not like.

    Attributes:
        width, ms: what it takes.
        than, than_ms: a wider one that takes less; or None, and what the line between its neighbours gives.
    """

    width: int
    ms: float
    than: int | None
    than_ms: float

    def __str__(self) -> str:
        other = "the line between its neighbours" if self.than is None else f"width {self.than}"
        return f"width {self.width} takes {self.ms:.3f} ms, {other} {self.than_ms:.3f} ms"


@dataclass(frozen=True)
class Curve:
    """What one shape of module takes at the widths that were timed.

    Attributes:
        modules: names of the modules of this shape, such as "0.attn".
        widths: ascending, from 0 to the full width.
        ms: milliseconds that one module takes at each, beyond what it takes when it is skipped; 0 at width 0.
        spread_ms: of each, the distance between the quartiles of its rounds.
    """

    modules: tuple[str, ...]
    widths: tuple[int, ...]
    ms: tuple[float, ...]
    spread_ms: tuple[float, ...]

    def __post_init__(self) -> None:
        if not len(self.widths) == len(self.ms) == len(self.spread_ms) > 0 or not self.modules:
            raise ValueError("a curve has as many widths as times and spreads, at least one, and modules")
        if list(self.widths) != sorted(set(self.widths)) or self.widths[0] != 0:
            raise ValueError(f"widths is {self.widths}; they must ascend from 0")

    def at(self, widths: npt.ArrayLike) -> np.ndarray:
        """Milliseconds at any widths, on the lines between those that were timed."""
        return np.interp(np.asarray(widths, dtype=float), self.widths, self.ms)

    @cached_property
    def flags(self) -> tuple[Flag, ...]:
        """The widths that take longer than a wider one by more than both spreads, or far more than the line between
        their neighbours."""
        found = (self._flag(index) for index in range(1, len(self.widths)))
        return tuple(flag for flag in found if flag is not None)

    def _flag(self, index: int) -> Flag | None:
        width, ms, spread = self.widths[index], self.ms[index], self.spread_ms[index]
        wider = range(index + 1, len(self.widths))
        quicker = [i for i in wider if ms > self.ms[i] + spread + self.spread_ms[i]]
        if quicker:
            best = min(quicker, key=lambda i: self.ms[i])
            return Flag(width, ms, self.widths[best], self.ms[best])
        if 1 < index < len(self.widths) - 1:  # after width 0 every curve jumps: the norm, the residual sum
            around = [index - 1, index + 1]
            line = float(np.interp(width, [self.widths[i] for i in around], [self.ms[i] for i in around]))
            if ms > _ABOVE_THE_LINE * line + spread + max(self.spread_ms[i] for i in around):
                return Flag(width, ms, None, line)
        return None


@dataclass(frozen=True)
class Whole:
    """A whole network that was timed beside the modules: its widths, its milliseconds, and the sum of its modules."""

    widths: tuple[int, ...]
    ms: float
    sum_ms: float


@dataclass(frozen=True)
class Architecture:
    """The network that a table is of: what decides how long it takes at given widths.

    Attributes:
        name: timm's, or None.
        modules, full_widths: of all attentions and MLPs, in order.
        macs, params: of the full network.
    """

    name: str | None
    modules: tuple[str, ...]
    full_widths: tuple[int, ...]
    macs: int
    params: int

    @classmethod
    def of(cls, supernet: SuperNet) -> Architecture:
        full, name = supernet.widths(), supernet.model.pretrained_cfg.get("architecture")
        macs, params = int(supernet.costs.macs(full)), int(supernet.costs.params(full))
        return cls(None if name is None else str(name), supernet.modules_in_order, tuple(full), macs, params)

    def same(self, other: Architecture) -> bool:
        """Whether the networks have the same shapes; their names do not matter."""
        mine, others = ((a.modules, a.full_widths, a.macs, a.params) for a in (self, other))
        return mine == others

    def __str__(self) -> str:
        name = "a network" if self.name is None else self.name
        return f"{name} of {len(self.modules)} modules, {self.macs:,} MACs and {self.params:,} parameters"


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of modules, from which those of any sub-network of one architecture are predicted.

    Attributes:
        architecture: of the super-network; a table is refused with another.
        conditions: device, dtype, batch, threads, versions.
        rounds: how often everything was timed.
        curves: one for each shape of module.
        skipped_ms: of the network with every module skipped: embedding, head, and what a skipped module leaves.
        scale, offset_ms: put sums on the scale of whole networks.
        whole: the whole networks that these two were fitted to.
        checked: others that were timed with them, and are only compared.
    """

    architecture: Architecture
    conditions: Conditions
    rounds: int
    curves: tuple[Curve, ...]
    skipped_ms: float
    scale: float
    offset_ms: float
    whole: tuple[Whole, ...] = ()
    checked: tuple[Whole, ...] = ()

    def __post_init__(self) -> None:
        named = [name for curve in self.curves for name in curve.modules]
        if sorted(named) != sorted(self.architecture.modules):
            raise ValueError("curves must have every module of the architecture once")
        numbers_ = [self.skipped_ms, self.scale, self.offset_ms, *(ms for curve in self.curves for ms in curve.ms)]
        if not all(math.isfinite(number) for number in numbers_) or not self.scale > 0:
            raise ValueError("times must be finite, and scale above 0")
        modules = len(self.architecture.modules)
        for name, widths in (
            ("full_widths", [self.architecture.full_widths]),
            ("whole", [one.widths for one in self.whole]),
            ("checked", [one.widths for one in self.checked]),
        ):
            if any(len(row) != modules for row in widths):
                raise ValueError(f"{name} must have a width for each of the {modules} modules")

    def check(self, supernet: SuperNet) -> None:
        """Raise ValueError if the table is of another architecture than `supernet`."""
        check_supernet(supernet)
        found = Architecture.of(supernet)
        if not self.architecture.same(found):
            raise ValueError(
                f"latency is a table of {self.architecture}; this super-network is {found}: "
                "skd latency (skd.measure_latency) makes its own"
            )

    def predict(self, supernet: SuperNet, entries: int | Iterable[int] | None = None) -> np.ndarray:
        """Milliseconds of entries of a super-network's dropout list for one batch, (entries,) float64.

        Args:
            supernet: of the table's architecture; it need not be the one that was timed.
            entries: indices into its dropout list; None: all of them.

        Raises:
            ValueError: another architecture, or an entry out of range.
        """
        supernet = unwrapped(supernet)
        self.check(supernet)
        if entries is None:
            return self.at(supernet.dropout_list.widths)
        chosen = list(entries) if isinstance(entries, Iterable) else [entries]
        return self.at([supernet.widths(entry) for entry in chosen])

    def at(self, widths: npt.ArrayLike) -> np.ndarray:
        """Milliseconds at widths (..., modules), one for each module in order: (...) float64.

        Raises:
            ValueError: there are more widths than modules, or fewer.
        """
        return self.scale * self.sum_at(widths) + self.offset_ms

    def sum_at(self, widths: npt.ArrayLike) -> np.ndarray:
        """As `at`, before the fit to whole networks."""
        return summed(self.architecture.modules, self.curves, self.skipped_ms, widths)

    @property
    def agreement(self) -> tuple[float, float] | None:
        """How well the networks of `checked` are predicted, as `skd.latency.agreement` says it; None without any."""
        if not self.checked:
            return None
        return agreement(self.at([one.widths for one in self.checked]), [one.ms for one in self.checked])

    @property
    def flags(self) -> dict[str, tuple[Flag, ...]]:
        """The widths that the device does not like, by the names of the modules."""
        return {", ".join(curve.modules): curve.flags for curve in self.curves if curve.flags}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON.

        Raises:
            ValueError: the file cannot be written.
        """
        output_file(path)
        write_json(path, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """What `save` writes; of each curve also its `flags`."""
        document = asdict(self)
        for curve, written in zip(self.curves, document["curves"], strict=True):
            written["flags"] = [asdict(flag) for flag in curve.flags]
        return {"version": VERSION, **document}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """Read what `save` wrote.

        Raises:
            ValueError: there is no such file, or it is something else.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
            if document["version"] != VERSION:
                raise ValueError(f"its version is {document['version']!r}, and this skd reads version {VERSION}")
            return cls.from_dict(document)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            raise ValueError(f"{str(path)!r} is not a table that skd latency wrote: {reason}") from None

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> LatencyTable:
        """The table of what `to_dict` gave."""
        known = _tuples({name: document[name] for name in cls.__dataclass_fields__})
        curves = [{key: value for key, value in curve.items() if key != "flags"} for curve in known["curves"]]
        return cls(
            **{
                **known,
                "architecture": Architecture(**known["architecture"]),
                "conditions": Conditions(**known["conditions"]),
                "curves": tuple(Curve(**curve) for curve in curves),
                "whole": tuple(Whole(**whole) for whole in known["whole"]),
                "checked": tuple(Whole(**whole) for whole in known["checked"]),
            }
        )


def _tuples(value: Any) -> Any:
    """A JSON value with tuples in place of its lists."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def summed(modules: Sequence[str], curves: Iterable[Curve], skipped_ms: float, widths: npt.ArrayLike) -> np.ndarray:
    """The sum of all modules at widths (..., modules): (...) milliseconds."""
    rows = np.asarray(widths)
    if rows.shape[-1:] != (len(modules),):
        raise ValueError(
            f"widths has shape {rows.shape}; its last axis must have one for each of {len(modules)} modules"
        )
    column = {name: index for index, name in enumerate(modules)}
    total: np.ndarray = np.full(rows.shape[:-1], skipped_ms)
    for curve in curves:
        total = total + curve.at(rows[..., [column[name] for name in curve.modules]]).sum(-1)
    return total


def agreement(predicted: npt.ArrayLike, measured: npt.ArrayLike) -> tuple[float, float]:
    """The median relative error of predictions, and Spearman's rank correlation with what was measured (nan of one).

    Both are milliseconds of the same networks, (networks,).
    """
    mine, true = np.asarray(predicted, dtype=float), np.asarray(measured, dtype=float)
    error = float(np.median(np.abs(mine - true) / true))
    if len(np.unique(mine)) < 2 or len(np.unique(true)) < 2:
        return error, math.nan
    return error, float(np.corrcoef(_ranks(mine), _ranks(true))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """The rank of each value; equal values share the mean of theirs."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    ranks: np.ndarray = (last - (count - 1) / 2)[place]
    return ranks


# A latency as a budget


def checked(latency_ms: object, latency: object) -> LatencyTable:
    """The table that goes with a latency, both of which are checked.

    Raises:
        ValueError: there is no table, or no latency; or the latency is no positive finite number.
    """
    if latency is None:
        raise ValueError(
            f"latency_ms is {latency_ms!r}, but there is no table to predict it from: "
            "give one as latency (skd latency, skd.measure_latency)"
        )
    table = as_table(latency)
    number = isinstance(latency_ms, numbers.Real) and not isinstance(latency_ms, bool)
    if not number or not 0 < float(latency_ms) < math.inf:  # type: ignore[arg-type]
        raise ValueError(f"latency_ms is {latency_ms!r}; it must be a positive finite number of milliseconds")
    return table


def as_table(latency: object) -> LatencyTable:
    """`latency` itself; ValueError if it is no table."""
    if not isinstance(latency, LatencyTable):
        raise ValueError(f"latency is a {type(latency).__name__}; it must be a skd.LatencyTable")
    return latency


def entry_within(supernet: SuperNet, latency_ms: float, table: LatencyTable | None) -> int:
    """The largest entry, which is the first of the list, whose predicted latency is within the budget.

    Raises:
        ValueError: none is; or as `checked`.
    """
    table = checked(latency_ms, table)
    predicted = table.predict(supernet)
    fitting = np.flatnonzero(predicted <= float(latency_ms))
    if len(fitting) == 0:
        fastest = int(predicted.argmin())
        alone = "" if len(predicted) > 1 else ", the full network alone: skd plan or skd train adds smaller ones"
        raise ValueError(
            f"latency_ms is {latency_ms}; the fastest of this list is entry {fastest}, predicted to take "
            f"{predicted[fastest]:.4g} ms on {table.conditions}{alone}"
        )
    return int(fitting[0])
