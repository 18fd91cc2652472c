"""The command ``skd``: one subcommand per file of `skd.commands`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch

from skd import recipes
from skd.commands.processes import processes, world_size
from skd.outputs import output_file, write_json
from skd.ranks import RankFailed, rank_of, together
from skd.training.stopping import Diverged, Stopped

# In the folder --out of train, finetune and demo.
_FILES_OF_A_RUN = ["supernet.safetensors", "model.safetensors", "dropout_list.json", "history.jsonl", "run.json"]
_FILES_OF_A_RUN += ["report.md", "summary.json", "curve.png"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0; 2 for a user's mistake; 1 for a failed disk, a vanished data set, a loss of NaN or another
        process of torchrun's that failed; 0 after SIGTERM and 130 after Ctrl-C, with a checkpoint written. A command
        that has none is ended by SIGTERM with 143 (SystemExit), and what it was writing is removed.
    """
    arguments = build_parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            with _ended_by_sigterm():
                _run(arguments)
    except ValueError as error:
        return _fail(error, 2)
    except torch.OutOfMemoryError as error:
        return _fail(f"{str(error).splitlines()[0]} (try --grad-accum-steps, --grad-checkpointing)", 1)
    except (OSError, Diverged, RankFailed) as error:
        return _fail(error, 1)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 130 if stopped.interrupted else 0
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    return 0


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the process as an exception does. Under torchrun it stays what it is: who waits for others hears
    nothing."""
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


def _run(arguments: argparse.Namespace) -> None:
    _check_files(arguments)
    with processes(arguments.command, getattr(arguments, "device", None)) as arguments.group:
        document = arguments.run(arguments)
        with together(arguments.group):
            if arguments.json is not None and rank_of(arguments.group) == 0:
                write_json(arguments.json, document)


def _check_files(arguments: argparse.Namespace) -> None:
    """No output takes the place of an input or of another output (`skd plan` may: it only adds to its input).

    Raises:
        ValueError: one would, or --json cannot be written.
    """
    if arguments.json is not None:
        output_file(arguments.json, "--json")
    files = _files(arguments)
    folder = files.get("out")
    of_a_run = [] if folder is None else [os.path.realpath(os.path.join(folder, name)) for name in _FILES_OF_A_RUN]
    if files.get("json") in of_a_run:
        raise ValueError(f"--json is {arguments.json!r}, a file of --out; it would be lost")
    for output, other in product(("json", "out"), files):
        in_place = (arguments.command, output, other) == ("plan", "out", "supernet")
        if output != other and files.get(output) == files[other] and not in_place:
            given = getattr(arguments, other)
            raise ValueError(f"--{output} and --{other} are the same file, {given!r}; it would be lost")


def _files(arguments: argparse.Namespace) -> dict[str, str]:
    """The outputs, and the inputs that are files, without links, by the names of their options."""
    inputs = ["supernet", "checkpoint", "class_map", "file"]
    if arguments.command in ("evaluate", "finetune"):  # elsewhere a name of timm's
        inputs.append("model")
    if getattr(arguments, "config", None) not in recipes.names():
        inputs.append("config")
    given = {name: getattr(arguments, name, None) for name in ("json", "out", *inputs)}
    return {
        name: os.path.realpath(path)
        for name, path in given.items()
        if path is not None and (name not in inputs or os.path.isfile(path))
    }


def _fail(error: object, status: int) -> int:
    rank = f"rank {os.environ['RANK']}: " if world_size() > 1 and "RANK" in os.environ else ""
    print(f"{rank}error: {error}", file=sys.stderr)
    return status


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


def build_parser() -> argparse.ArgumentParser:
    from skd import __version__
    from skd.commands import convert, demo, evaluate, extract, info, plan, train

    parser = argparse.ArgumentParser(
        prog="skd", description="Turn one pre-trained Vision Transformer into a super-network of every size."
    )
    parser.add_argument("--version", action="version", version=f"skd {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for add in (
        demo.add,
        convert.add,
        plan.add,
        train.add_train,
        extract.add,
        evaluate.add,
        train.add_finetune,
        info.add,
    ):
        command = add(commands)
        command.add_argument("--json", metavar="FILE", help="write what was printed to FILE as JSON")
    return parser
