"""``importance="online"`` against passes over calibration images: do they agree, what is saved, what is the curve.

python -m benchmarks.train_importance --json FILE    a small ViT on digits, minutes on a CPU

The same pre-trained and converted network is trained by PIAD twice. In the online run, whenever the list grows, the
passes are made as well, at the same weights and widths, and the two orders compared; their time is not counted.
"""

from __future__ import annotations

import argparse
import copy
import time
from functools import partialmethod
from pathlib import Path
from unittest import mock

import numpy as np
from rich.console import Console
from scipy.stats import spearmanr

import skd
from benchmarks.result import Info
from benchmarks.timing import JSON, as_json, provenance, write_json
from skd.data.digits import Batches
from skd.demo import running as demo
from skd.planning import Proposal, propose
from skd.training.online import OnlineImportance

SHARES = (1.0, 0.75, 0.5, 0.35, 0.25, 0.15)


class Compared:
    """Stands in front of `OnlineImportance.propose` and makes the passes too."""

    def __init__(self, calibration: Batches) -> None:
        self.calibration, self.seconds = calibration, 0.0
        self.rounds: list[dict[str, float]] = []
        self.own = OnlineImportance.propose

    def __call__(self, online: OnlineImportance, convention: str) -> Proposal:
        start = time.perf_counter()
        supernet = online.supernet
        passes = propose(supernet, self.calibration, supernet.dropout_list, convention=convention)
        self.seconds += time.perf_counter() - start
        found = self.own(online, convention)
        self.rounds.append(agreement(found, passes))
        return found


def agreement(one: Proposal, other: Proposal) -> dict[str, float]:
    """Rank correlations (Spearman) of two proposals at the same widths."""
    orders = [{(o.module, o.width): place for place, o in enumerate(p.operations)} for p in (one, other)]
    common = sorted(orders[0].keys() & orders[1].keys())
    within = [
        float(spearmanr(scores, other.scores[name]).statistic)
        for name, scores in one.scores.items()
        if len(scores) > 2
    ]
    modules = sorted(one.sensitivity)
    sensitivities = [[proposal.sensitivity[name] for name in modules] for proposal in (one, other)]
    return {
        "operations": float(spearmanr(*([order[key] for key in common] for order in orders)).statistic),
        "operations_in_common": len(common) / max(len(orders[0]), len(orders[1])),
        "coordinates_within_a_module": float(np.mean(within)),
        "modules": float(spearmanr(*sensitivities).statistic),
    }


def train(supernet: skd.SuperNet, data: demo.Data, importance: str, epochs: int, seed: int) -> Info:
    """One PIAD run: seconds, and top-1 of the largest sub-network within each share of the MACs."""
    recipe = {**demo.RECIPE, "budgets": SHARES, "planner": "paper", "importance": importance}
    config = skd.TrainConfig(epochs=epochs, warmup_epochs=0, eval_every=epochs, seed=seed, **recipe)
    batches = demo.ShiftedBatches(data.train, demo.BATCH, seed)
    quiet = Console(quiet=True)
    history = skd.train(supernet, batches, data.test, config, calibration=data.calibration, console=quiet)
    seconds: JSON = {
        name: sum(row.seconds.get(name, 0.0) for row in history.epochs) for name in ("importance", "steps")
    }
    curve: JSON = [as_json(row) for row in history.curve]
    return Info(seconds=seconds, curve=curve, area=history.area)


def run(seeds: int, stand_in_epochs: int, epochs: int) -> Info:
    data = demo.prepare_data()
    results: list[JSON] = []
    for seed in range(seeds):
        with demo.reproducible(seed):
            model = demo.train_stand_in(data, seed, stand_in_epochs, Console(quiet=True))
            converted = skd.convert(model, data.calibration)
            passes = train(copy.deepcopy(converted), data, "passes", epochs, seed + 1)
            compared = Compared(data.calibration)
            with mock.patch.object(OnlineImportance, "propose", partialmethod(compared)):
                online = train(copy.deepcopy(converted), data, "online", epochs, seed + 1)
        online.times("seconds")["importance"] -= compared.seconds
        rounds: JSON = [Info(row) for row in compared.rounds]
        result = Info(seed=seed, passes=passes, online=online, agreement=rounds)
        print(summary(result))
        results.append(result)
    return Info(epochs=epochs, stand_in_epochs=stand_in_epochs, runs=results, **provenance())


def summary(result: Info) -> str:
    lines = [f"seed {result['seed']}"]
    for name in ("passes", "online"):
        part = result.part(name)
        points = "  ".join(
            f"{row.number('macs_fraction'):.0%}: {row.number('top1'):.1f}" for row in part.rows("curve")
        )
        seconds = part.times("seconds")
        lines.append(
            f"  {name:7s} importance {seconds['importance']:.1f} s, steps {seconds['steps']:.1f} s; "
            f"top-1 {points}; area {part.number('area'):.2f}"
        )
    rows = result.rows("agreement")
    for name in rows[0]:
        values = [row.number(name) for row in rows]
        lines.append(f"  {name}: median {np.median(values):.2f}, {min(values):.2f}..{max(values):.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--stand-in-epochs", type=int, default=40)
    parser.add_argument("--epochs", type=int, default=30, help="of PIAD; a third grow the list")
    arguments = parser.parse_args()
    document = run(arguments.seeds, arguments.stand_in_epochs, arguments.epochs)
    write_json(arguments.json, document)


if __name__ == "__main__":
    main()
