"""Stratified Knowledge-Density super-networks: one pre-trained Vision Transformer, every size.

    timm model + images -> convert -> SuperNet -> train (or only plan) -> extract -> plain timm model -> save

After Li, Qi, Geng, "Stratified Knowledge-Density Super-Network for Scalable Vision Transformers", AAAI 2026
(arXiv 2511.11683).

Importing skd is quick: each public name is imported, and torch and timm with it, when it is first asked for. Not even
`typing` is imported here: until `skd.support.process` runs, Ctrl-C would be a traceback.

The method, in the order of its steps:

    supernet        the super-network, which runs at the widths of any entry of its dropout list
    dropout_list    the nested sub-networks, from the full one to the smallest
    convert         weights rotated and reordered, so that leading coordinates know the most
    importance      what modules and coordinates are worth to the smallest sub-network
    planning        rounds of a planner, without any training
    extract         a sub-network as a plain timm model
    compensation    what an entry drops predicted from what it keeps, without training
    moments         second moments of features, which correct any entry without images
    corrections     the output layers that this gives an entry
    evaluate        top-1 of a model and of many sub-networks
    cost            MACs and parameters, at any widths
    benchmark       sub-networks timed as they run once they are extracted
    latency         the table of what modules take, which predicts any sub-network
    latency_measuring   modules timed for that table
    files           networks as safetensors files
    family          all sizes in one process, on one copy of the weights

Around it:

    vit/            the only code that names timm's classes and fields
    export/         sub-networks in formats that others load, and hubs
    planners/       who decides what becomes narrower
    training/       the training of a super-network, and of what is cut out of it
    data/           images, loaders
    recipes/        published runs, by name
    cli             the command ``skd``: one rule for all commands
    commands/       the commands, one file for each
    demo/           the whole method in minutes
    support/        what all of it stands on: settings, files that are written, processes, pictures
    __main__        ``python -m skd``
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType

import skd.support.requirements  # noqa: F401  (before all else: it says what is missing)

TYPE_CHECKING = False  # type checkers take it for true, as they do typing's

if TYPE_CHECKING:
    from skd.benchmark import benchmark
    from skd.compensation import compensate
    from skd.convert import convert
    from skd.corrections import Correction
    from skd.cost import Cost, cost
    from skd.dropout_list import DropoutList, Operation
    from skd.evaluate import evaluate
    from skd.export import export
    from skd.export.hub import push_to_hub
    from skd.extract import extract
    from skd.family import Family
    from skd.files import load, save
    from skd.importance import importance
    from skd.latency import LatencyTable
    from skd.latency_measuring import measure_latency
    from skd.moments import FeatureMoments, moments
    from skd.planning import plan, rank_operations
    from skd.supernet import SuperNet
    from skd.support.settings import TrainConfig, finetune_config
    from skd.training import History, finetune, train
    from skd.vit import create_model

__version__ = "0.1.0"

__all__ = [
    "Correction",
    "Cost",
    "DropoutList",
    "Family",
    "FeatureMoments",
    "History",
    "LatencyTable",
    "Operation",
    "SuperNet",
    "TrainConfig",
    "benchmark",
    "compensate",
    "convert",
    "cost",
    "create_model",
    "evaluate",
    "export",
    "extract",
    "finetune",
    "finetune_config",
    "importance",
    "load",
    "measure_latency",
    "moments",
    "plan",
    "push_to_hub",
    "rank_operations",
    "save",
    "train",
]

# The module of each public name: the imports above once more, for the interpreter.
_MODULES = {
    "Correction": "skd.corrections",
    "Cost": "skd.cost",
    "DropoutList": "skd.dropout_list",
    "Family": "skd.family",
    "FeatureMoments": "skd.moments",
    "History": "skd.training",
    "LatencyTable": "skd.latency",
    "Operation": "skd.dropout_list",
    "SuperNet": "skd.supernet",
    "TrainConfig": "skd.support.settings",
    "benchmark": "skd.benchmark",
    "compensate": "skd.compensation",
    "convert": "skd.convert",
    "cost": "skd.cost",
    "create_model": "skd.vit",
    "evaluate": "skd.evaluate",
    "export": "skd.export",
    "extract": "skd.extract",
    "finetune": "skd.training",
    "finetune_config": "skd.support.settings",
    "importance": "skd.importance",
    "load": "skd.files",
    "measure_latency": "skd.latency_measuring",
    "moments": "skd.moments",
    "plan": "skd.planning",
    "push_to_hub": "skd.export.hub",
    "rank_operations": "skd.planning",
    "save": "skd.files",
    "train": "skd.training",
}


class _Package(ModuleType):
    """The type of this module: `skd.convert` is the function, also after the module skd.convert has been imported.

    Importing a submodule sets it as an attribute of its package, and would hide the function of the same name.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _MODULES or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

if not TYPE_CHECKING:  # a type checker would take it for a promise of any name

    def __getattr__(name: str) -> object:
        """A public name, or a module of the package, at its first use."""
        if name in _MODULES:
            value = getattr(import_module(_MODULES[name]), name)
            setattr(sys.modules[__name__], name, value)
            return value
        from importlib.util import find_spec

        if name.startswith("_") or find_spec(f"{__name__}.{name}") is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
