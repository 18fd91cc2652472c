"""The contenders: each a short description, so that a new one is one line of `CONTENDERS`; and which are run when."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from benchmarks.accuracy import published

Settings = Mapping[str, Any]  # keyword arguments


@dataclass(frozen=True)
class Contender:
    """A way from a pre-trained network to sub-networks.

    Attributes:
        training: fields of `skd.TrainConfig` that differ from the comparison's own; None: planned, and not trained.
        plan: arguments of `skd.plan`, where nothing is trained.
        convert: arguments of `skd.convert`.
        compensation: arguments of `skd.compensate` at the end, which gives further figures; None: without.
        from_moments: the corrections are of stored moments (`skd.moments`), not fitted on images.
        never_drawn: entries at the end of the list that no step of the training draws.
        headless: the pre-trained network loses its classifier first, and its features are measured.
    """

    training: Settings | None = None
    plan: Settings = field(default_factory=lambda: PAPER)
    convert: Settings = field(default_factory=dict)
    compensation: Settings | None = field(default_factory=dict)
    from_moments: bool = False
    never_drawn: int = 0
    headless: bool = False


PAPER: Settings = {"planner": "paper", "rounds": 10}
LOSS: Settings = {"planner": "loss", "rounds": 5}
_PUBLISHED: Settings = {"planner": published.NAME, "convention": "linear"}
_PER_BATCH: Settings = {"centering": "batch"}

GROUPS: Settings = {"attention_group": 4}
# The planner's defaults, written out: a stored unit is known by what it was measured with.
MEASURED: Settings = {"compensated": True, "reach": 0.25}
TRAINED: Settings = {"planner": "loss", "planner_options": MEASURED}

CONTENDERS: dict[str, Contender] = {
    "published": Contender(dict(_PUBLISHED), convert=_PER_BATCH, compensation=None, never_drawn=1),
    # The published planner and the one that measures the loss, in skd.
    "paper": Contender({"planner": "paper"}),
    "paper, planned": Contender(),
    "loss": Contender({"planner": "loss"}),
    "loss, planned": Contender(plan=LOSS),
    "loss, rises not compensated": Contender({"planner": "loss", "planner_options": {"compensated": False}}),
    # One option of planning or conversion at a time.
    "square root, planned": Contender(plan={**PAPER, "sensitivity": "sqrt"}),
    "loss, Taylor between, planned": Contender(plan={**LOSS, "shape": "taylor"}),
    "loss, cross-entropy, planned": Contender(plan={**LOSS, "criterion": "cross_entropy"}),
    "loss, measured once a round, planned": Contender(plan={**LOSS, "reach": 1.0}),
    "loss, rises not compensated, planned": Contender(plan={**LOSS, "compensated": False}),
    "loss, balanced, planned": Contender(plan=LOSS, convert={"qk": "balanced"}),
    "loss, V by output, planned": Contender(plan=LOSS, convert={"v": "output"}),
    "loss, neurons by residual, planned": Contender(plan=LOSS, convert={"neurons": "residual"}),
    # With smaller groups of coordinates in the heads too; then one option of training at a time. A teacher takes
    # more time, and 16 epochs instead of 12 show what more steps give.
    "groups of 4, planned": Contender(plan={**LOSS, **MEASURED}, convert=GROUPS),
    "groups of 4, planned, from moments": Contender(plan={**LOSS, **MEASURED}, convert=GROUPS, from_moments=True),
    "groups of 4": Contender(TRAINED, convert=GROUPS),
    "groups of 4, original teaches": Contender({**TRAINED, "kd_teacher": "original"}, convert=GROUPS),
    "groups of 4, a third longer": Contender({**TRAINED, "epochs": 16}, convert=GROUPS),
    "groups of 4, larger teaches": Contender({**TRAINED, "kd_teacher": "larger"}, convert=GROUPS),
    "groups of 4, small more often": Contender({**TRAINED, "entry_sampling": "small"}, convert=GROUPS),
    "groups of 4, sandwich": Contender({**TRAINED, "entry_sampling": "sandwich"}, convert=GROUPS),
    "groups of 4, fitted start": Contender({**TRAINED, "refit_start": True}, convert=GROUPS),
    "groups of 4, headless": Contender(plan={**LOSS, **MEASURED}, convert=GROUPS, headless=True),
}
BASE = "published"  # what differences are from


class Unit(NamedTuple):
    """One contender on one network: what is measured and stored as a whole."""

    task: str
    size: str
    seed: int
    contender: str

    @property
    def name(self) -> str:
        return f"{self.task}/{self.size}/{self.seed}/{self.contender}"

    @property
    def network(self) -> tuple[str, str, int]:
        return self.task, self.size, self.seed

    def matches(self, patterns: list[str]) -> bool:
        """Whether its name matches one of the patterns ("harder/*/0/loss*"), or there are none."""
        return not patterns or any(fnmatchcase(self.name, pattern) for pattern in patterns)


# The winners of the ablation, which the final plan runs on two sizes.
FINAL = ("published", "groups of 4, original teaches", "groups of 4, planned")

# The simpler way that a contender without options is a change of.
SIMPLER = {"loss": "paper", "square root": "paper", "groups of 4": "loss"}


def options_of(contender: str) -> list[str]:
    return [part for part in contender.split(", ")[1:] if part != "planned"]


def without_option(contender: str) -> str | None:
    """The contender that differs in one option alone, the last of the name; None: there is none.

    That of "groups of 4, sandwich" is "groups of 4", whose own is "loss"; that of "loss, balanced, planned" is
    "loss, planned".
    """
    first, *others = contender.split(", ")
    if options := options_of(contender):
        others.remove(options[-1])
    elif first in SIMPLER:
        first = SIMPLER[first]
    else:
        return None
    return ", ".join((first, *others))


# Set, seeds and contenders. An option is paired with the contender without it, on the same networks.
ABLATION: tuple[tuple[str, Sequence[int], tuple[str, ...]], ...] = (
    ("harder", range(3), ("paper", "paper, planned", "loss", "loss, planned", "groups of 4")),
    ("harder", range(3), ("square root, planned", "loss, Taylor between, planned", "loss, cross-entropy, planned")),
    ("harder", range(3), ("loss, measured once a round, planned", "loss, rises not compensated, planned")),
    ("harder", range(3), ("loss, rises not compensated", "groups of 4, planned, from moments")),
    ("harder", range(3), ("groups of 4, larger teaches", "groups of 4, headless")),
    ("harder", range(2), ("groups of 4, sandwich", "groups of 4, fitted start")),
    ("harder", range(1), ("loss, balanced, planned", "groups of 4, small more often")),
    ("harder", range(5, 8), ("loss, planned", "loss, balanced, planned", "loss, V by output, planned")),
    ("harder", range(5, 8), ("loss, neurons by residual, planned", "groups of 4", "groups of 4, original teaches")),
    ("harder", range(5, 8), ("groups of 4, a third longer",)),
    ("harder", range(5, 8), ("groups of 4, small more often", "groups of 4, sandwich", "groups of 4, fitted start")),
    ("fashion", range(3), ("paper, planned", "loss, planned", "groups of 4, headless")),
    ("fashion", range(2), ("paper", "loss", "groups of 4")),
    ("fashion", range(1), ("groups of 4, small more often",)),
    ("fashion", range(5, 8), ("groups of 4", "groups of 4, original teaches")),
    ("digits", range(8), FINAL),
    ("digits", range(3), ("groups of 4, headless",)),
    ("digits", range(3, 8), ("groups of 4",)),
)


def ablation() -> Iterator[Unit]:
    """Every contender on small networks, one network after the other."""
    for task in dict.fromkeys(task for task, _, _ in ABLATION):
        rows = [(seeds, names) for set_, seeds, names in ABLATION if set_ == task]
        for seed in sorted({seed for seeds, _ in rows for seed in seeds}):
            yield from (Unit(task, "small", seed, name) for seeds, names in rows if seed in seeds for name in names)


def final() -> Iterator[Unit]:
    """The winners on both sizes and five seeds, paired with `published`."""
    for size in ("small", "large"):
        for seed in range(5):
            yield from (Unit(task, size, seed, name) for task in ("harder", "fashion") for name in FINAL)


PLANS = {"ablation": ablation, "final": final}
