"""The command ``skd``. It knows of its subcommands only what each declares in its `skd.commands.Command`.

Torch is imported only when a command runs, so that ``skd --version`` and the help of every command are quick.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module

from skd import __version__
from skd.commands import COMMANDS
from skd.support.outputs import check_files, output_file, write_json
from skd.support.process import INTERRUPTED, rank, world_size


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0; 2 for a user's mistake; 1 for a failed disk, a vanished data set, a loss of NaN, another
        process of torchrun's that failed, or a fault of skd's (with SKD_TRACEBACK=1 in the environment its traceback
        is printed); 0 after SIGTERM and 130 after Ctrl-C, with a checkpoint written. A command that has none is ended
        by SIGTERM with 143 (SystemExit), and what it was writing is removed.
    """
    return answered(argv, lambda: None)


def answered(argv: Sequence[str] | None, begin: Callable[[], None]) -> int:
    """As `main`; it calls `begin` once everything is imported and before the work begins."""
    arguments = argparse.Namespace()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            arguments = parsed(argv)
            _import_all()
            with _ended_by_sigterm():
                begin()
                _run(arguments)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except Exception as error:
        return _answer(error, arguments)
    return 0


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The parsed arguments; their field `command` is the name of the command.

    Raises:
        SystemExit: --help, --version, or arguments that the command does not have.
    """
    overview, commands = _parser(_AllWords)
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.help)
    return parser_of(overview.parse_args(argv).command).parse_args(argv)


def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser of one command, with all of its arguments."""
    parser, commands = _parser(argparse.ArgumentParser)
    own = commands.add_parser(name, description=COMMANDS[name].description)
    COMMANDS[name].arguments(own)
    own.add_argument("--json", metavar="FILE", help="write what was printed to FILE as JSON")
    return parser


def _parser(
    kind: type[argparse.ArgumentParser],
) -> tuple[argparse.ArgumentParser, argparse._SubParsersAction[argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(
        prog="skd", description="Turn one pre-trained Vision Transformer into a super-network of every size."
    )
    parser.add_argument("--version", action="version", version=f"skd {__version__}")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", dest="command", required=True, parser_class=kind
    )
    return parser, commands


class _AllWords(argparse.ArgumentParser):
    """A parser that accepts any arguments; it stands in for each command's own parser until the command is known."""

    def parse_known_args(  # type: ignore[override]
        self, args: object = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        return namespace or argparse.Namespace(), []


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Inside the block SIGTERM ends the process through an exception, so that half-written files are removed.

    Under torchrun SIGTERM keeps its default action, because a process that waits in a collective runs no handler.
    """
    if world_size() > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _import_all() -> None:
    """Import what all commands use, including torch.

    Until this is done Ctrl-C ends the process at once, since a module that is being imported may catch an exception.
    """
    for name in ("_torchrun", "_work"):
        import_module(f"skd.commands.{name}")


def _run(arguments: argparse.Namespace) -> None:
    from skd.commands._torchrun import processes
    from skd.support.ranks import rank_of, together

    command = COMMANDS[arguments.command]
    if arguments.json is not None:
        output_file(arguments.json, "--json")
    files = command.files(arguments)
    check_files(replace(files, writes={**files.writes, "--json": arguments.json}))
    with processes(arguments.command, getattr(arguments, "device", None)) as arguments.group:
        document = command.run(arguments)
        with together(arguments.group):
            if arguments.json is not None and rank_of(arguments.group) == 0:
                write_json(arguments.json, document)


def _answer(error: Exception, arguments: argparse.Namespace) -> int:
    """Print an error in one line and return the exit status for it."""
    if isinstance(error, ValueError):
        return _fail(error, 2)
    if isinstance(error, OSError | ImportError):
        return _fail(error, 1)
    import torch

    from skd.support.ranks import RankFailed
    from skd.training.stopping import Diverged, Stopped

    if isinstance(error, Stopped):
        print(error, file=sys.stderr)
        return INTERRUPTED if error.interrupted else 0
    if isinstance(error, Diverged | RankFailed):
        return _fail(error, 1)
    if isinstance(error, torch.OutOfMemoryError):
        advice = getattr(arguments, "saves_memory", None)
        return _fail(str(error).splitlines()[0] + (f" (try {advice})" if advice else ""), 1)
    if os.environ.get("SKD_TRACEBACK") == "1":
        raise error
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return _fail(f"{said} (SKD_TRACEBACK=1 in the environment shows where)", 1)


def _fail(error: object, status: int) -> int:
    line = " ".join(part.strip() for part in str(error).splitlines())
    print(f"{rank()}error: {line}", file=sys.stderr)
    return status


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {message}", file=sys.stderr)
