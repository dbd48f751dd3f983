"""One run of a sweep: how it is started, and what came of it. It is an ordinary run of `sslkit train`."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from sslkit import doctor, local
from sslkit.errors import UserError, printable
from sslkit.recorded import first_and_last
from sslkit.run_directory import cannot_lock, read_json, read_metrics, refuse_strays
from sslkit.stopping import ASKING
from sslkit.sweeping.pool import Task

LOG = "log.txt"

INTERRUPTED = 130
ASKED = tuple(int(getattr(signal, name)) for name in ASKING if hasattr(signal, name))


@dataclass(frozen=True)
class Outcome:
    """What came of a run's process."""

    kind: Literal["done", "ended", "failed"]
    """`ended`: it was asked to, and the run is not finished."""
    text: str
    """What it came to, or why not."""


@dataclass(frozen=True)
class How:
    """What all runs of a sweep have in common."""

    recipe: str
    overrides: tuple[str, ...]
    steps: int | None
    device: str


@dataclass(frozen=True)
class Job:
    """One run."""

    name: str
    """`lr=0.03/seed-0`: its directory below the sweep's folder."""
    directory: Path
    overrides: tuple[str, ...]
    """What `--set` says, the seed included."""
    how: How

    @property
    def status(self) -> dict[str, Any]:
        """What the run says of itself; empty where none was begun."""
        return read_json(self.directory / "status.json")

    def finished(self) -> bool:
        """Whether there is nothing left to train."""
        status, steps = self.status, self.how.steps
        state, step = status.get("status"), status.get("step")
        if steps is not None and state == "stopped" and isinstance(step, int):
            return step >= steps
        return state == "done"

    def held(self) -> bool:
        """Whether another process trains in the directory: one that a sweep which was killed had started, perhaps,
        and that saves its checkpoint."""
        lock = self.directory / ".lock"
        if not lock.is_file() or cannot_lock(lock):
            return False
        try:
            with FileLock(lock, timeout=0):
                return False
        except Timeout:
            return True

    def task(self) -> Task:
        """The process that trains it, or goes on with it.

        Raises:
            UserError: the directory is not what a run leaves.
        """
        refuse_strays(self.directory)
        return Task(self.name, "sslkit", self.arguments(), self.directory / LOG)

    def arguments(self) -> list[str]:
        """What `sslkit` is called with."""
        arguments = ["train", self.how.recipe]
        for override in self.overrides:
            arguments += ["--set", override]
        arguments += ["--run-dir", str(self.directory), "--device", self.how.device]
        if self.how.steps is not None:
            arguments += ["--steps", str(self.how.steps)]
        if local.is_allowed():
            arguments.append("--allow-local-code")
        return arguments

    def outcome(self, code: int) -> Outcome:
        """What came of the process that ended with `code`; below 0 it is the signal that killed it."""
        if code == 0 and self.finished():
            return Outcome("done", self.figures())
        status = self.status
        where = f" at step {status['step']} of {status['of']}" if {"step", "of"} <= status.keys() else ""
        state = status.get("status")
        if (code == 0 and state) or code == INTERRUPTED or -code in ASKED:
            word = state if code == 0 else "interrupted"
            return Outcome("ended", f"{word}{where}; the same command goes on with it")
        if code < 0:
            return Outcome("failed", f"killed by {_signal(-code)}{where}; the same command goes on with it")
        told = said(self.directory / LOG)
        # The run's own word for what happened; below it in the log is what to do about it. That of an earlier
        # attempt is not in the log of this one.
        message = status.get("message")
        happened = message if message in told else told[-1] if told else f"ended with {code}"
        return Outcome("failed", f"{happened} (all of it: {self.directory / LOG})")

    def figures(self) -> str:
        """Where the run stands, in a few words."""
        try:
            floor, last = first_and_last(read_metrics(self.directory))
            verdict = doctor.examine_run(self.directory).verdict
        except (OSError, UserError):
            return ""
        known = " -> ".join(f"{value:.4f}" for value in (floor, last) if value is not None)
        where = " before training" if last is None else ""
        return f"{f'kNN top-1 {known}{where}, ' if known else ''}{verdict}"


def said(log: Path) -> list[str]:
    """The last lines of a log since the last command in it, but for indented ones, which explain those above them."""
    try:
        with log.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 20_000))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    lines = [printable(line.rstrip()) for line in text.splitlines() if line.strip() and not line[0].isspace()]
    begun = max((place for place, line in enumerate(lines) if line.startswith("$ ")), default=-1)
    return lines[begun + 1 :]


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
