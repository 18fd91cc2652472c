"""``skd evaluate``: top-1 of a model, of one sub-network, or of the whole accuracy-MACs curve."""

from __future__ import annotations

import argparse
from typing import Any

from skd.commands.work import common, models
from skd.curve import area, measure_curve, sizes_of
from skd.evaluate import evaluate
from skd.extract import choose_entry
from skd.settings import TrainConfig
from skd.supernet import SuperNet


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    where = common.device(arguments)
    if arguments.model is not None:
        return _plain(arguments, where)
    models.check_no_weights(arguments)
    supernet = common.supernet(arguments.supernet, where)
    batches = common.validation(arguments, supernet.model)
    if arguments.entry is None and arguments.macs is None and arguments.params is None:
        return _curve(arguments, supernet, batches)
    entry = choose_entry(
        supernet,
        entry=arguments.entry,
        macs=arguments.macs,
        params=arguments.params,
        convention=arguments.convention,
    )
    (top1,) = evaluate(
        supernet, batches, entries=[entry], progress=common.progress("Evaluating"), group=arguments.group
    )
    row = {**sizes_of(supernet, [entry])[0], "top1": top1}
    common.print_sizes([row], arguments.supernet)
    return {"supernet": arguments.supernet, **row, **common.images_read(arguments, validation=batches)}


def _curve(arguments: argparse.Namespace, supernet: SuperNet, batches: Any) -> dict[str, Any]:
    budgets = tuple(arguments.budgets or TrainConfig().budgets)
    if not all(0 < budget <= 1 for budget in budgets):
        raise ValueError(f"--budgets is {budgets}; they must be shares above 0 and at most 1")
    rows = measure_curve(
        supernet,
        batches,
        budgets,
        convention=arguments.convention,
        progress=common.progress("Evaluating"),
        group=arguments.group,
    )
    common.print_sizes(rows, f"{arguments.supernet}: the largest sub-network within each budget")
    score = area(rows, budgets)
    print(f"area under the curve: {score:.2f} %")
    return {
        "supernet": arguments.supernet,
        "curve": rows,
        "area": score,
        **common.images_read(arguments, validation=batches),
    }


def _plain(arguments: argparse.Namespace, where: Any) -> dict[str, Any]:
    given = [name for name in ("entry", "macs", "params", "budgets") if getattr(arguments, name) is not None]
    if given:
        raise ValueError(f"--{given[0]} is given with --model; only a super-network has sub-networks")
    if arguments.convention != "full":
        raise ValueError("--convention is given with --model; only a super-network has sub-networks")
    model = models.plain_model(arguments).to(where)
    models.warn_if_random(arguments)
    batches = common.validation(arguments, model)
    top1 = evaluate(model, batches, progress=common.progress("Evaluating"), group=arguments.group)
    print(f"{arguments.model}: {top1:.2f} % top-1")
    return {
        "model": arguments.model,
        **models.weights_taken(arguments),
        "top1": top1,
        **common.images_read(arguments, validation=batches),
    }
