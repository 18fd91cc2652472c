"""The subcommands of ``skd``: one file for each, found here without being listed anywhere.

Each file defines a `Command` called COMMAND, which says what the command takes, reads, writes and shares, and has the
function that does the work. `skd.cli` knows no more than that about any command. CONTRIBUTING.md says how to add one.
Importing these files is cheap, so that ``skd COMMAND --help`` is quick: only `Command.run` imports what needs torch.

    demo, convert, plan, train, extract, evaluate, finetune, export, latency, benchmark, info    the commands
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
    """What `skd.cli` needs to know about a command.

    Attributes:
        help: one line in the list of commands.
        description: the beginning of the command's own help.
        arguments: a function that adds the command's arguments to its parser.
        files: a function that lists what the command reads and writes with the given arguments. `skd.cli` refuses the
            command if an output would overwrite another file.
        run: the function that does the work and returns what ``--json`` writes. Its arguments have two more fields:
            `command`, the name, and `group`, torchrun's process group, or None in a single process.
        shares: whether the processes of torchrun share the command's images. Then every process runs it, but only the
            first prints and writes (with `skd.commands._work.write`). Otherwise the command refuses to run under
            torchrun.
        order: the position in the list of commands; commands with the same position are sorted by name.
    """

    help: str
    description: str
    arguments: Callable[[argparse.ArgumentParser], None]
    files: Callable[[argparse.Namespace], Files]
    run: Callable[[argparse.Namespace], Document]
    shares: bool = False
    order: int = 100


def find_commands() -> dict[str, Command]:
    """The commands in the files of this package, by name, in the order in which ``skd --help`` lists them."""
    names = [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]
    commands: dict[str, Command] = {name: import_module(f"{__name__}.{name}").COMMAND for name in names}
    return dict(sorted(commands.items(), key=lambda item: (item[1].order, item[0])))


COMMANDS = find_commands()
