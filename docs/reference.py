"""Writes the reference pages of the site: the command line from the parsers, the rest as names for mkdocstrings.

The site's hooks (hooks.py) call `pages` when it is built, so the pages are never older than the code.

python docs/reference.py      prints the reference of the command line
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterable
from types import ModuleType

import skd
import skd.data
import skd_kernels
from skd import cli
from skd.commands import COMMANDS

# The public functions in the order of the method; all that remain follow.
FUNCTIONS = (
    *("create_model", "convert", "importance", "plan", "train", "finetune", "extract", "compensate", "moments"),
    *("evaluate", "cost", "save", "load"),
)
EXTENDING = {
    "A planner": ("skd.planners.Planner", "skd.planners.register"),
    "A command": ("skd.commands.Command", "skd.support.outputs.Files"),
    "An architecture": (
        *("skd.vit.protocol.Module", "skd.vit.protocol.Network"),
        *("skd.vit.network.BlockNetwork", "skd.vit.families.register"),
    ),
}


def pages() -> dict[str, str]:
    """The Markdown of each page by its place in the site."""
    return {
        "reference/command-line.md": command_line(),
        "reference/python.md": python(),
        "reference/data.md": _listed(
            "skd.data", "Images and loaders; [Using skd](../USE.md#data) has the command line."
        )
        + _names(skd.data, skd.data.__all__),
        "reference/kernels.md": _listed("skd_kernels", "What they compute, and how fast: [KERNELS](../KERNELS.md).")
        + _names(skd_kernels, skd_kernels.__all__),
        "reference/extending.md": extending(),
    }


def python() -> str:
    """skd's public names, functions first."""
    classes = [name for name in skd.__all__ if inspect.isclass(getattr(skd, name))]
    others = [name for name in skd.__all__ if name not in (*FUNCTIONS, *classes)]
    text = _listed(
        "skd",
        "What `import skd` gives; [Using skd](../USE.md#from-python) shows it at work. What each field of "
        "`skd.TrainConfig` means is in the table of [skd train](command-line.md#skd-train).",
    )
    for title, names in {"Functions": (*FUNCTIONS, *others), "Classes": classes}.items():
        text += f"## {title}\n\n" + _names(skd, names, level=3)
    return text


def extending() -> str:
    """The protocols that additions to skd implement."""
    text = _listed(
        "Extending",
        "What a planner, a command or an architecture implements; how: [CONTRIBUTING](../contributing.md).",
    )
    for title, names in EXTENDING.items():
        text += f"## {title}\n\n" + "".join(_name(name, name) for name in names)
    return text


def _listed(title: str, text: str) -> str:
    return f"# {title}\n\n{text}\n\n"


def _names(package: ModuleType, names: Iterable[str], level: int = 2) -> str:
    """Functions and classes of a package, each by the module that defines it: some modules have a function's name."""
    found = {name: getattr(package, name) for name in names}
    found = dict(sorted(found.items(), key=lambda item: inspect.isclass(item[1])))  # functions first
    return "".join(
        _name(f"{value.__module__}.{value.__qualname__}", f"{package.__name__}.{name}", level)
        for name, value in found.items()
        if inspect.isfunction(value) or inspect.isclass(value)
    )


def _name(path: str, shown: str, level: int = 3) -> str:
    """What mkdocstrings replaces by the docstring of `path`."""
    options = {"heading": shown, "toc_label": shown, "heading_level": level}
    return f"::: {path}\n    options:\n" + "".join(f"      {key}: {value}\n" for key, value in options.items()) + "\n"


# The command line


def command_line() -> str:
    """Every command with its arguments, from the parsers that read them."""
    commands = "".join(f"| [`skd {name}`](#skd-{name}) | {_cell(COMMANDS[name].help)} |\n" for name in COMMANDS)
    text = _listed("The command line", "Made from the parsers; `skd COMMAND --help` prints the same.")
    text += f"| command | what it does |\n|---|---|\n{commands}\n"
    return text + "".join(_command(name) for name in COMMANDS)


def _command(name: str) -> str:
    parser = cli.parser_of(name)._subparsers._group_actions[0].choices[name]  # type: ignore[union-attr,index,call-overload]
    text = f"## skd {name}\n\n{parser.description}\n\n"
    for group in parser._action_groups:
        rows = [_row(action, parser.prog) for action in group._group_actions if action.dest != "help"]
        if rows:
            title = group.title or "arguments"
            about = f", {group.description}" if group.description else ""
            text += f"**{title.capitalize()}**{about}\n\n| argument | meaning |\n|---|---|\n{''.join(rows)}\n"
    return text


def _row(action: argparse.Action, program: str) -> str:
    """A line of the table: the argument as it is written, and its help."""
    value = action.metavar or (f"{{{','.join(map(str, action.choices))}}}" if action.choices else action.dest.upper())
    flags = action.option_strings or [str(value)]
    takes = "" if action.nargs == 0 or not action.option_strings else f" {value}"
    if action.nargs == "+":
        takes += f" [{value} ...]"
    shown = "<br>".join(f"`{flag}{takes}`" for flag in flags)
    help = (action.help or "") % {**vars(action), "prog": program}
    return f"| {shown} | {_cell(help)}{' (required)' if action.required and action.option_strings else ''} |\n"


def _cell(text: str) -> str:
    """Plain text in a cell of a table."""
    for sign in "\\|*_<>[]{":
        text = text.replace(sign, {"<": "&lt;", ">": "&gt;"}.get(sign, "\\" + sign))
    return " ".join(text.split())


if __name__ == "__main__":
    print(command_line(), end="")
