"""Commands with a time limit each and one for all of them: what is cut keeps what it has written."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.prebuilt import ROOT

GRACE = 8  # seconds from the interrupt, after which pytest writes what it has, to the end
FEWEST = 5  # seconds that a command is worth starting for
NO_TESTS = 5  # the exit status of pytest that found nothing to run


@dataclass(frozen=True)
class Command:
    """One process.

    Attributes:
        name: of its log.
        words: the program and its arguments.
        limit: seconds.
        needs: what it is left out without, by the names in `Run.missing`.
    """

    name: str
    words: Sequence[str]
    limit: float
    needs: tuple[str, ...] = ()


@dataclass
class Outcome:
    """What became of a command: it passed, failed, was cut when its time was over, or was left out; and why."""

    name: str
    status: str
    seconds: float = 0.0
    reason: str = ""


@dataclass
class Run:
    """Commands that share a folder, an environment and an end.

    Attributes:
        output: the folder of logs and results. Its run.json has the notes and the outcomes at any time.
        end: when all must be over, by `time.monotonic`.
        environment: variables of all commands.
        missing: what is not here, with the reason.
    """

    output: Path
    end: float
    environment: dict[str, str]
    missing: dict[str, str]
    outcomes: list[Outcome] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    def part(self, name: str, commands: Sequence[Command], at_once: int = 1) -> None:
        """Run commands, `at_once` at a time, and note what becomes of each."""
        print(f"== {name}", flush=True)
        waiting, running = list(commands), []
        while waiting or running:
            while waiting and len(running) < at_once:
                started = self._start(waiting.pop(0))
                running += [started] if started else []
            running = [process for process in running if not self._ended(*process)]
            time.sleep(0.05)

    def note(self, name: str, value: Any) -> None:
        """Keep `value` in run.json."""
        self.notes[name] = value
        document = {**self.notes, "commands": [asdict(outcome) for outcome in self.outcomes]}
        (self.output / "run.json").write_text(json.dumps(document, indent=1) + "\n")

    def _start(self, command: Command) -> tuple[Command, subprocess.Popen[bytes], float, float] | None:
        """The command, its process, when it was started and when it must end; None if it is left out."""
        reasons = [self.missing[name] for name in command.needs if name in self.missing]
        now = time.monotonic()
        limit = min(command.limit, self.end - now)
        if self.end - now < FEWEST:
            reasons.append("no time was left")
        if reasons:
            self._keep(Outcome(command.name, "left out", reason="; ".join(reasons)))
            return None
        with (self.output / f"{command.name}.log").open("w") as log:
            process = subprocess.Popen(
                command.words, cwd=ROOT, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        return command, process, now, now + limit

    def _ended(self, command: Command, process: subprocess.Popen[bytes], start: float, end: float) -> bool:
        """Whether a command is over; one that has no time left is stopped."""
        code, cut = process.poll(), False
        if code is None and time.monotonic() >= end:
            code, cut = stop(process), True
        if code is None:
            return False
        passed = code == 0 or (code == NO_TESTS and "pytest" in command.words)
        status = "cut" if cut else "passed" if passed else "failed"
        lines = (self.output / f"{command.name}.log").read_text(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")
        self._keep(Outcome(command.name, status, round(time.monotonic() - start, 1), last.strip()[:200]))
        return True

    def _keep(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self.note("seconds_left", round(self.end - time.monotonic()))
        print(f"{outcome.name:<36}{outcome.status:<9}{outcome.seconds:>6.1f} s  {outcome.reason}", flush=True)


def stop(process: subprocess.Popen[bytes]) -> int:
    """Interrupt a command, so that it writes what it has; then end it and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()
