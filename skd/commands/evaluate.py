"""``skd evaluate``: top-1 of a model, of one sub-network, or of the whole accuracy-MACs curve."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import skd
from skd.commands import Command
from skd.commands import _arguments as options
from skd.support.outputs import Files
from skd.support.settings import CONVENTIONS, TrainConfig
from skd.support.types import Document

if TYPE_CHECKING:
    import torch

    from skd.data import Loader


def arguments(parser: argparse.ArgumentParser) -> None:
    network = parser.add_mutually_exclusive_group(required=True)
    network.add_argument("--supernet", metavar="FILE", help="what skd convert, plan or train wrote")
    network.add_argument(
        "--model",
        metavar="FILE",
        help="a plain model, such as skd extract wrote; or a name in timm, with its weights (--checkpoint FILE: your "
        "own, before any conversion)",
    )
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--entry", type=options.whole, metavar="I", help="one sub-network, by its index")
    one.add_argument(
        "--macs", type=options.size, metavar="X", help="the largest within a share (0.5) or a count (4.2G)"
    )
    one.add_argument("--params", type=options.size, metavar="X", help="likewise, of parameters")
    one.add_argument(
        "--budgets", type=float, nargs="+", metavar="X", help="shares of the MACs to measure (default: twelfths)"
    )
    parser.add_argument(
        "--convention", choices=CONVENTIONS, default="full", help="of --macs and --budgets (default: %(default)s)"
    )
    options.add_compensate(parser)
    options.add_weights(parser)
    options.add_data(parser)
    options.add_device(parser)


def files(given: argparse.Namespace) -> Files:
    return Files(reads=options.model_read(given) | options.options(given, "supernet") | options.data_read(given))


def run(given: argparse.Namespace) -> Document:
    from skd.commands import _work as work
    from skd.support.curve import Row, sizes_of

    where = work.device(given)
    if given.model is not None:
        return _plain(given, where)
    work.check_no_weights(given)
    supernet = work.supernet(given.supernet, where)
    batches = work.validation(given, supernet.model)
    measured = _measured(given, supernet)
    if given.compensate is not None and measured:
        skd.compensate(supernet, entries=measured)
    work.print_corrections(work.corrections(supernet), "they are measured with their corrections")
    if given.entry is None and given.macs is None and given.params is None:
        return _curve(given, supernet, batches)
    (entry,) = measured
    (top1,) = skd.evaluate(
        supernet, batches, entries=[entry], progress=work.progress("Evaluating"), group=given.group
    )
    row: Row = {**sizes_of(supernet, [entry])[0], "top1": top1}
    work.print_sizes([row], given.supernet)
    compensated = entry in supernet.corrections
    return {
        "supernet": given.supernet,
        **row,
        "compensated": compensated,
        **work.images_read(given, validation=batches),
    }


def _budgets(given: argparse.Namespace) -> tuple[float, ...]:
    budgets = tuple(given.budgets or TrainConfig().budgets)
    if not all(0 < budget <= 1 for budget in budgets):
        raise ValueError(f"--budgets is {budgets}; they must be shares above 0 and at most 1")
    return budgets


def _measured(given: argparse.Namespace, supernet: skd.SuperNet) -> list[int]:
    """The entries that will be measured."""
    from skd.extract import choose_entry
    from skd.support.curve import entries_within

    if given.entry is None and given.macs is None and given.params is None:
        return list(entries_within(supernet, _budgets(given), given.convention).values())
    return [
        choose_entry(supernet, entry=given.entry, macs=given.macs, params=given.params, convention=given.convention)
    ]


def _curve(given: argparse.Namespace, supernet: skd.SuperNet, batches: Loader) -> Document:
    from skd.commands import _work as work
    from skd.support.curve import area, measure_curve

    budgets = _budgets(given)
    rows = measure_curve(
        supernet,
        batches,
        budgets,
        convention=given.convention,
        progress=work.progress("Evaluating"),
        group=given.group,
    )
    work.print_sizes(rows, f"{given.supernet}: the largest sub-network within each budget")
    score = area(rows, budgets)
    print(f"area under the curve: {score:.2f} %")
    return {
        "supernet": given.supernet,
        "curve": rows,
        "area": score,
        "corrections": work.corrections(supernet),
        **work.images_read(given, validation=batches),
    }


def _plain(given: argparse.Namespace, where: torch.device) -> Document:
    from skd.commands import _work as work

    chosen = [name for name in ("entry", "macs", "params", "budgets") if getattr(given, name) is not None]
    if chosen:
        raise ValueError(f"--{chosen[0]} is given with --model; only a super-network has sub-networks")
    if given.compensate is not None:
        raise ValueError("--compensate is given with --model; only a super-network has sub-networks")
    if given.convention != "full":
        raise ValueError("--convention is given with --model; only a super-network has sub-networks")
    model = work.plain_model(given, instead="give it as --supernet").to(where)
    work.warn_if_random(given)
    batches = work.validation(given, model)
    top1 = skd.evaluate(model, batches, progress=work.progress("Evaluating"), group=given.group)
    print(f"{given.model}: {top1:.2f} % top-1")
    return {
        "model": given.model,
        **work.weights_taken(given),
        "top1": top1,
        **work.images_read(given, validation=batches),
    }


COMMAND = Command(
    help="top-1 of a model, a sub-network, or the whole curve",
    description="Top-1 accuracy on validation images. Of a super-network: all sub-networks on a grid of budgets in "
    "one pass, or the one that --entry, --macs or --params names.",
    arguments=arguments,
    files=files,
    run=run,
    shares=True,
    order=6,
)
