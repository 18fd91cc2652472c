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

from benchmarks.gpu_run import ROOT

GRACE = 8.0  # seconds from the interrupt, after which pytest writes what it has, to the end
FEWEST = 5.0  # seconds that a command is worth starting for


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
class Running:
    """A command on its way, in a process group of its own. It is interrupted once, and killed if it does not listen.

    Attributes:
        start, end: when it was started, and when it must end or is killed, by `time.monotonic`.
        cut: it has been interrupted.
    """

    command: Command
    process: subprocess.Popen[bytes]
    start: float
    end: float
    cut: bool = False

    def over(self) -> bool:
        """Whether it has ended; where its time has, ask it to, and later make it."""
        if self.process.poll() is not None:
            return True
        if time.monotonic() >= self.end:
            self.signal(signal.SIGKILL if self.cut else signal.SIGINT)
            self.cut, self.end = True, time.monotonic() + GRACE
        return False

    def signal(self, number: signal.Signals) -> None:
        """To all of its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


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
        """Run commands, `at_once` at a time, and note what becomes of each. None of them outlives this call."""
        print(f"== {name}", flush=True)
        waiting, running = list(commands), list[Running]()
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    running += self._started(waiting.pop(0))
                over = [command for command in running if command.over()]
                running = [command for command in running if command not in over]
                for command in over:
                    self._ended(command)
                time.sleep(0.05)
        finally:
            for command in running:
                command.signal(signal.SIGKILL)

    def note(self, name: str, value: Any) -> None:
        """Keep `value` in run.json."""
        self.notes[name] = value
        document = {**self.notes, "commands": [asdict(outcome) for outcome in self.outcomes]}
        (self.output / "run.json").write_text(json.dumps(document, indent=1) + "\n")

    def _started(self, command: Command) -> list[Running]:
        """The command on its way; none if it is left out."""
        reasons = [self.missing[name] for name in command.needs if name in self.missing]
        now = time.monotonic()
        if self.end - now < FEWEST:
            reasons.append("no time was left")
        if reasons:
            self._keep(Outcome(command.name, "left out", reason="; ".join(reasons)))
            return []
        with (self.output / f"{command.name}.log").open("w") as log:
            process = subprocess.Popen(
                command.words, cwd=ROOT, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        return [Running(command, process, now, min(now + command.limit, self.end))]

    def _ended(self, running: Running) -> None:
        """Note what became of it, with the last line that it printed; what it started ends with it."""
        running.signal(signal.SIGKILL)
        name, seconds = running.command.name, round(time.monotonic() - running.start, 1)
        status = "cut" if running.cut else "passed" if running.process.returncode == 0 else "failed"
        lines = (self.output / f"{name}.log").read_text(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")
        self._keep(Outcome(name, status, seconds, last.strip()[:200]))

    def _keep(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self.note("seconds_left", round(self.end - time.monotonic()))
        print(f"{outcome.name:<36}{outcome.status:<9}{outcome.seconds:>6.1f} s  {outcome.reason}", flush=True)
