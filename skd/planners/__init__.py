"""Planners by name: each decides how the dropout list grows in one round.

A planner is one file of this package, registered under the name of its file, and found here without being listed
anywhere. CONTRIBUTING.md says how to add one. Importing this package imports none of them.

    paper    the published planner: operations ranked by importance for what they save
    loss     the rise of the loss, measured at several widths of each module, for what it saves
"""

from __future__ import annotations

import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from skd.dropout_list import DropoutList
    from skd.supernet import SuperNet


class Planner(Protocol):
    """One round of planning: a function that gives the list some smaller sub-networks.

    `skd.plan` calls it `rounds` times, and training once in each epoch that grows the list, each time with a larger
    target. Options of a planner's own are further keyword arguments, with defaults; `skd.plan` passes them on.
    """

    def __call__(
        self,
        supernet: SuperNet,
        batches: Iterable[object],
        target: float,
        /,
        *,
        current: DropoutList,
        convention: str,
        group: ProcessGroup | None,
    ) -> DropoutList:
        """The list grown towards the target.

        Args:
            supernet: the network at its present weights; must be left as it is. Its own dropout list need not be
                `current`.
            batches: calibration images as for `skd.importance`; may be read any number of times.
            target: the total of MACs, removed from the full network, that the smallest entry may reach.
            current: the list to grow. No module may get narrower than its `current.least` (`DropoutList.extended`
                sees to it), which is set where `skd.plan` was given `keep` or `exclude`.
            convention: how MACs are counted, "full" or "linear".
            group: a torch.distributed group, each of whose processes calls the planner with its own share of the
                batches and must get the same list; None: this process alone.

        Returns:
            All entries of `current`, and after them the new ones; `DropoutList.extended` makes it from operations.
            The same for the same arguments: a run that is resumed has to find it again.
        """
        ...


_P = TypeVar("_P", bound=Planner)
_PLANNERS: dict[str, Planner] = {}


def register(name: str) -> Callable[[_P], _P]:
    """A decorator that makes a planner known under `name`.

    Raises:
        ValueError: the name is another planner's.
    """

    def add(planner: _P) -> _P:
        own_file = getattr(planner, "__module__", "") == f"{__name__}.{name}"
        if name in names() and not own_file and _PLANNERS.get(name) is not planner:
            raise ValueError(f"planner {name!r} is there already; choose another name")
        _PLANNERS[name] = planner
        return planner

    return add


def unregister(name: str) -> None:
    """Forget the planner that was registered as `name`. A planner with a file in this package is then found again.

    Raises:
        ValueError: no planner was registered under that name.
    """
    if _PLANNERS.pop(name, None) is None:
        raise ValueError(f"planner {name!r} was not registered")
    sys.modules.pop(f"{__name__}.{name}", None)


def names() -> list[str]:
    """The names of all planners: the files of this package, and those that were registered elsewhere."""
    return sorted({*_PLANNERS, *(module.name for module in pkgutil.iter_modules(__path__))})


def planner(name: str) -> Planner:
    """The planner of that name.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    known = names()
    if name not in known:
        raise ValueError(f"planner is {name!r}; it must be one of {known}")
    if name not in _PLANNERS:
        import_module(f"{__name__}.{name}")
    return _PLANNERS[name]


def option_names(chosen: str) -> list[str]:
    """The names of the options that a planner has of its own.

    Raises:
        ValueError: there is no planner of that name.
    """
    call: Any = planner(chosen)
    own = [p.name for p in inspect.signature(call).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return [name for name in own if name not in ("current", "convention", "group")]


def check_options(chosen: str, options: Mapping[str, object] | None) -> None:
    """Check that a planner has options of these names; their values it checks itself, when it is called.

    Raises:
        ValueError: it does not.
    """
    call: Any = planner(chosen)
    own = option_names(chosen)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(call).parameters.values())
    unknown = [name for name in options or {} if name not in own]
    if unknown and not takes_any:
        raise ValueError(f"planner {chosen!r} has no option {unknown[0]!r}; it has {own or 'none'}")


def grow(
    chosen: str | Planner,
    supernet: SuperNet,
    batches: Iterable[object],
    target: float,
    *,
    current: DropoutList,
    convention: str,
    group: ProcessGroup | None,
    options: Mapping[str, object] | None = None,
) -> DropoutList:
    """Run one round of a planner, given by name or as a function, and check its arguments and its result.

    Raises:
        ValueError: an unknown planner, an option that it does not have, or an answer that does not grow `current`.
    """
    from skd.dropout_list import DropoutList

    call: Any = planner(chosen) if isinstance(chosen, str) else chosen
    shown = repr(chosen) if isinstance(chosen, str) else getattr(chosen, "__name__", repr(chosen))
    given = {"current": current, "convention": convention, "group": group}
    try:
        inspect.signature(call).bind(supernet, batches, target, **given, **(options or {}))
    except TypeError as error:
        raise ValueError(f"planner {shown} cannot be called with these arguments: {error}") from None
    grown = call(supernet, batches, target, **given, **(options or {}))
    if not isinstance(grown, DropoutList):
        raise ValueError(f"planner {shown} returned a {type(grown).__name__}; it must be a DropoutList")
    if grown.modules != current.modules or grown.widths[: len(current)].tolist() != current.widths.tolist():
        raise ValueError(f"planner {shown} returned a list that does not begin with the entries of `current`")
    narrowest = grown.entry(len(grown) - 1)
    below = [name for name, width in (current.least or {}).items() if narrowest[name] < width]
    if below:
        raise ValueError(f"planner {shown} narrows {below[0]} to {narrowest[below[0]]}; it must keep `current.least`")
    return replace(grown, least=current.least)  # which a planner that made a list of its own has not handed on
