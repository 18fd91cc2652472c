"""The subcommands of ``skd``: here what each takes and writes, in `skd.commands.work` what it does.

One file of each for a command. Those here do not import torch, for the sake of ``skd COMMAND --help``; the others are
imported when there is work to do. The function `Command.add` describes the arguments and says by ``set_defaults``

    run      "FILE.FUNCTION" in `skd.commands.work`, which does the work; what it returns is what ``--json`` writes
    files    the `skd.outputs.Files` that the command reads and writes with these arguments
"""

from __future__ import annotations

import argparse
import os
from importlib import import_module
from typing import Any, NamedTuple


class Command(NamedTuple):
    """One subcommand, as much of it as is known without importing it.

    Attributes:
        place: "FILE.FUNCTION" in this package; the function adds its parser to those of the others.
        help: one line.
        shares: whether torchrun's processes share its images; else it is for one process.
    """

    place: str
    help: str
    shares: bool = False

    def add(self, commands: Any) -> argparse.ArgumentParser:
        """Its parser, with all arguments; imports it."""
        file, function = self.place.split(".")
        parser: argparse.ArgumentParser = getattr(import_module(f"{__name__}.{file}"), function)(commands)
        return parser


COMMANDS = {
    "demo": Command("demo.add", "the whole method on real data in minutes, on a CPU"),
    "convert": Command("convert.add", "a timm model to a super-network, its function unchanged", shares=True),
    "plan": Command("plan.add", "nested sub-networks of every size, without any training", shares=True),
    "train": Command("train.add_train", "train a super-network by progressive importance-aware dropout", shares=True),
    "extract": Command("extract.add", "a sub-network of any size as a plain timm model"),
    "evaluate": Command("evaluate.add", "top-1 of a model, a sub-network, or the whole curve", shares=True),
    "finetune": Command("train.add_finetune", "train a plain model, such as an extracted sub-network", shares=True),
    "info": Command("info.add", "versions and what is compiled; or what is in a file"),
}


def world_size() -> int:
    """The number of processes, as torchrun tells it; 1 without torchrun."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or text == "0":
        raise ValueError(f"WORLD_SIZE is {text!r}; it must be the number of processes, as torchrun sets it")
    return int(text)
