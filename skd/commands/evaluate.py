"""``skd evaluate``: top-1 of a model, of one sub-network, or of the whole accuracy-MACs curve."""

from __future__ import annotations

import argparse
from typing import Any

from skd.commands import common, models
from skd.commands.extract import size
from skd.curve import area, measure_curve, sizes_of
from skd.evaluate import evaluate
from skd.extract import choose_entry
from skd.outputs import Files
from skd.prices import CONVENTIONS
from skd.supernet import SuperNet
from skd.training.config import TrainConfig


def add(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "evaluate",
        description="Top-1 accuracy on validation images. Of a super-network: all sub-networks on a grid of budgets "
        "in one pass, or the one that --entry, --macs or --params names.",
    )
    network = parser.add_mutually_exclusive_group(required=True)
    network.add_argument("--supernet", metavar="FILE", help="what skd convert, plan or train wrote")
    network.add_argument(
        "--model",
        metavar="FILE",
        help="a plain model, such as skd extract wrote; or a name in timm, with its weights (--checkpoint FILE: your "
        "own, before any conversion)",
    )
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--entry", type=int, metavar="I", help="one sub-network, by its index")
    one.add_argument("--macs", type=size, metavar="X", help="the largest within a share (0.5) or a count (4.2G)")
    one.add_argument("--params", type=size, metavar="X", help="likewise, of parameters")
    one.add_argument(
        "--budgets", type=float, nargs="+", metavar="X", help="shares of the MACs to measure (default: twelfths)"
    )
    parser.add_argument(
        "--convention", choices=CONVENTIONS, default="full", help="of --macs and --budgets (default: %(default)s)"
    )
    models.add_weights(parser)
    common.add_data(parser)
    common.add_device(parser)
    parser.set_defaults(run=run, files=files)
    return parser


def files(arguments: argparse.Namespace) -> Files:
    return Files(reads=models.reads(arguments) | common.options(arguments, "supernet") | common.data_read(arguments))


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
