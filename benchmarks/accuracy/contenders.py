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
        never_drawn: entries at the end of the list that no step of the training draws.
        headless: the pre-trained network loses its classifier first, and its features are measured.
    """

    training: Settings | None = None
    plan: Settings = field(default_factory=lambda: PAPER)
    convert: Settings = field(default_factory=dict)
    compensation: Settings | None = field(default_factory=dict)
    never_drawn: int = 0
    headless: bool = False


PAPER: Settings = {"planner": "paper", "rounds": 10}
LOSS: Settings = {"planner": "loss", "rounds": 5}
_PUBLISHED: Settings = {"planner": published.NAME, "convention": "linear"}
_PER_BATCH: Settings = {"centering": "batch"}

CONTENDERS: dict[str, Contender] = {
    "published": Contender(dict(_PUBLISHED), convert=_PER_BATCH, compensation=None, never_drawn=1),
    "published, planned": Contender(plan={**_PUBLISHED, "rounds": 10}, convert=_PER_BATCH, compensation=None),
    # skd's defaults, then one option at a time.
    "skd": Contender({}),
    "skd, planned": Contender(),
    "loss": Contender({"planner": "loss"}),
    "loss, planned": Contender(plan=LOSS),
    "square root": Contender({"planner_options": {"sensitivity": "sqrt"}}),
    # With the planner that measures the loss, one option of training at a time.
    "loss, original teaches": Contender({"planner": "loss", "kd_teacher": "original"}),
    "loss, larger teaches": Contender({"planner": "loss", "kd_teacher": "larger"}),
    "loss, both teach": Contender({"planner": "loss", "kd_teacher": "both"}),
    "loss, small more often": Contender({"planner": "loss", "entry_sampling": "small"}),
    "loss, sandwich": Contender({"planner": "loss", "entry_sampling": "sandwich"}),
    "loss, fitted start": Contender({"planner": "loss", "refit_start": True}),
    "loss, fitted start, original teaches": Contender(
        {"planner": "loss", "refit_start": True, "kd_teacher": "original"}
    ),
    "loss, measured often": Contender({"planner": "loss", "planner_options": {"reach": 0.25}}),
    "loss, measured often, original teaches": Contender(
        {"planner": "loss", "planner_options": {"reach": 0.25}, "kd_teacher": "original"}
    ),
    # And one option of planning or conversion at a time, not trained.
    "loss, measured often, planned": Contender(plan={**LOSS, "reach": 0.25}),
    "loss, Taylor between, planned": Contender(plan={**LOSS, "shape": "taylor"}),
    "loss, cross-entropy, planned": Contender(plan={**LOSS, "criterion": "cross_entropy"}),
    "square root, planned": Contender(plan={**PAPER, "sensitivity": "sqrt"}),
    "loss, balanced, planned": Contender(plan=LOSS, convert={"qk": "balanced"}),
    "loss, V by output, planned": Contender(plan=LOSS, convert={"v": "output"}),
    "loss, neurons by residual, planned": Contender(plan=LOSS, convert={"neurons": "residual"}),
    "skd, headless": Contender(headless=True),
    "loss, headless": Contender(plan=LOSS, headless=True),
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


# The winners of the ablation, which the final plan runs together on two sizes; see `plans`.
FINAL = ("published", "skd", "loss", "skd, planned", "loss, planned")


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
