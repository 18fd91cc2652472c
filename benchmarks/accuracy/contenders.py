"""The contenders: each a short description, so that a new one is one line of `CONTENDERS`; and which are run when."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    "published, planned": Contender(plan={**_PUBLISHED, "rounds": 10}, convert=_PER_BATCH, compensation=None),
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
    # With smaller groups of coordinates in the heads too; then one option of training at a time.
    "groups of 4, planned": Contender(plan={**LOSS, **MEASURED}, convert=GROUPS),
    "groups of 4, planned, from moments": Contender(plan={**LOSS, **MEASURED}, convert=GROUPS, from_moments=True),
    "groups of 4": Contender(TRAINED, convert=GROUPS),
    "groups of 4, original teaches": Contender({**TRAINED, "kd_teacher": "original"}, convert=GROUPS),
    "groups of 4, larger teaches": Contender({**TRAINED, "kd_teacher": "larger"}, convert=GROUPS),
    "groups of 4, small more often": Contender({**TRAINED, "entry_sampling": "small"}, convert=GROUPS),
    "groups of 4, sandwich": Contender({**TRAINED, "entry_sampling": "sandwich"}, convert=GROUPS),
    "groups of 4, fitted start": Contender({**TRAINED, "refit_start": True}, convert=GROUPS),
    "paper, headless": Contender(headless=True),
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


def ablation() -> Iterator[Unit]:
    """Every contender on the small networks of three seeds, the digits last."""
    for tasks in (("harder", "fashion"), ("digits",)):
        for seed in range(3):
            yield from (Unit(task, "small", seed, name) for task in tasks for name in CONTENDERS)


def final() -> Iterator[Unit]:
    """The winners on both sizes and five seeds, paired with `published`."""
    for size in ("small", "large"):
        for seed in range(5):
            yield from (Unit(task, size, seed, name) for task in ("harder", "fashion") for name in FINAL)


PLANS = {"ablation": ablation, "final": final}
