"""The subcommands of ``skd``: one file for each, found here without being listed anywhere.

A command is a `Command` called COMMAND in a file with its name: what it takes, reads, writes and shares, and the
function that does its work. Of all of them `skd.cli` knows no more than that. CONTRIBUTING.md says how to add
one. To import the files is cheap, for the sake of ``skd COMMAND --help``: what needs torch is imported by
`Command.run`.

    demo, convert, plan, train, extract, evaluate, finetune, info     the commands
    _arguments    arguments that several commands share, and the files that they name
    _work         what several commands do: open images, make models, print tables, write files
    _torchrun     several processes for one command
"""

from __future__ import annotations

import argparse
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from skd.support.outputs import Files
from skd.support.types import Document


@dataclass(frozen=True)
class Command:
    """What a command declares of itself.

    Attributes:
        help: one line in the list of commands.
        description: what its own help begins with.
        arguments: adds its arguments to its parser.
        files: what it reads and writes with these arguments. No output may take the place of another file.
        run: does the work; what it returns is what ``--json`` writes. The arguments have two more: `command`, the
            name, and `group`, the processes of torchrun, None if there is one.
        shares: whether the processes of torchrun share its images. Then all of them run it, and what it prints and
            writes is printed and written by the first, with `skd.commands._work.write`. Else it is for one process.
        order: its place in the list of commands; of those in the same place the names decide.
    """

    help: str
    description: str
    arguments: Callable[[argparse.ArgumentParser], None]
    files: Callable[[argparse.Namespace], Files]
    run: Callable[[argparse.Namespace], Document]
    shares: bool = False
    order: int = 100


def find_commands() -> dict[str, Command]:
    """Those in the files of this package, by name, in the order of the list that is printed."""
    names = [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]
    commands: dict[str, Command] = {name: import_module(f"{__name__}.{name}").COMMAND for name in names}
    return dict(sorted(commands.items(), key=lambda item: (item[1].order, item[0])))


COMMANDS = find_commands()
