"""What is known of a watched loop: facts, records and findings, in memory and in a run directory."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslkit import doctor
from sslkit.attending import Attending
from sslkit.rules import Facts, Severity
from sslkit.run_directory import RunDirectory

Metric = float | Tensor


def detached(value: Metric) -> Metric:
    """A figure without a graph, its mean if it is several."""
    return value.detach().mean() if isinstance(value, Tensor) else float(value)


def aside(text: str) -> None:
    """Print a line to stderr, where a program's own output is not."""
    print(text if text.startswith("sslkit") else f"sslkit: {text}", file=sys.stderr)


class Journal:
    """Takes facts and records, and tells each finding once, when it becomes true.

    Args:
        facts: What is known at the start.
        say: Prints a line.
        stop_on: How grave a finding makes the run count as lost; None if none does.
        directory: Where to write; None for nowhere. Where a run lies already, the next free name with a number.
        speaks: Whether this process is the one that tells the user anything.

    Raises:
        UserError: the directory cannot be written.
    """

    def __init__(
        self, facts: Facts, say: Callable[[str], None], stop_on: Severity | None, directory: Path | None = None, *,
        speaks: bool = True,
    ) -> None:  # fmt: skip
        self.say = say if speaks else lambda text: None
        self.step = 0
        """Optimizer steps so far."""
        self.epochs = 0
        """Epochs that ended."""
        self.bad_step: int | None = None
        """The first step whose loss was not finite."""
        self._doctor = Attending(facts, self.say, stop_on)
        self._speaks = speaks
        self._given: Any = None
        """What the verdict that the user was given rests on."""
        self._files = None if directory is None else self._opened(directory)

    def _opened(self, directory: Path) -> RunDirectory:
        free, number = directory, 2
        while (free / "metrics.jsonl").exists():
            free, number = directory.with_name(f"{directory.name}-{number}"), number + 1
        if free != directory:
            self.say(f"{directory} holds a run already; this one is written to {free}")
        files = RunDirectory(free)
        files.open_metrics(0)
        return files

    @property
    def directory(self) -> Path | None:
        """Where it is written."""
        return None if self._files is None else self._files.path

    @property
    def facts(self) -> Facts:
        """What is known of the run so far."""
        return self._doctor.course.facts

    @property
    def lost(self) -> bool:
        """Whether something as grave as `stop_on` was found."""
        return self._doctor.lost

    @property
    def finished(self) -> bool:
        """Whether all steps of the run were made."""
        return self.facts.total_steps is not None and self.step >= self.facts.total_steps

    def last(self, key: str) -> float | None:
        """The newest value under a key."""
        return self._doctor.course.last(key)

    def learn(self, found: Mapping[str, Any]) -> None:
        """Take in facts, of which None says nothing, and tell what follows from them."""
        known = {key: value for key, value in found.items() if value is not None}
        self._doctor.course.facts = Facts.model_validate({**self.facts.model_dump(), **known})
        if self._files is not None:
            self._files.write("facts.json", self.facts.model_dump_json(indent=1, exclude_none=True) + "\n")
        for finding in doctor.before(self.facts):
            self._doctor.tell(finding)

    def record(self, values: Mapping[str, Metric]) -> None:
        """Write a line of `metrics.jsonl`; tensors are read from the device here, all at once."""
        if not values:
            return
        tensors = {key: value for key, value in values.items() if isinstance(value, Tensor)}
        read = dict(zip(tensors, _read(tensors.values()), strict=True))
        each = self.facts.steps_per_epoch
        line: dict[str, Any] = {"step": self.step, "epoch": round(self.step / each, 6) if each else self.epochs}
        for key, value in values.items():
            number = read[key] if isinstance(value, Tensor) else value
            line[key] = number if math.isfinite(number) else None
        self.status("running")
        if self._files is not None:
            self._files.record(line)
        self._doctor.recorded(line)

    def status(self, status: str) -> None:
        """Say where the run stands: running, done, stopped, interrupted or failed."""
        told: dict[str, Any] = {"status": status, "step": self.step, "of": self.facts.total_steps}
        if self.bad_step is not None:
            told |= {"reason": "not_finite", "step": self.bad_step}
        self._doctor.course.status = told
        if self._files is not None:
            self._files.status(**{"state": told.pop("status"), **told})
            told["status"] = status

    def examination(self, notes: Sequence[str]) -> doctor.Examination:
        """All that was found."""
        of = f" of {self.facts.total_steps}" if self.facts.total_steps else ""
        title = f"{self.facts.name or 'a watched loop'}, step {self.step}{of}"
        return doctor.examine(self._doctor.course, title, notes=notes, accepted=self.facts.accepted)

    def verdict(self, notes: Sequence[str]) -> str:
        """All that was found, in words, for the user to print; nothing in a process that does not speak."""
        found = self.examination(notes)
        self._given = self._basis(found)
        return found.text() if self._speaks else ""

    def close(self, notes: Sequence[str]) -> None:
        """Say the verdict, unless the user was given it and nothing came after; let go of the directory."""
        found = self.examination(notes)
        if self._basis(found) != self._given:
            self.say(found.text())
        if self._files is not None:
            self.say(f"all of it: sslkit doctor {self.directory}")
            self._files.close()

    def _basis(self, found: doctor.Examination) -> tuple[object, ...]:
        return self.step, len(self._doctor.course.records), *((f.id, f.severity) for f in found.findings)


def _read(tensors: Iterable[Tensor]) -> list[float]:
    """Numbers on the host; waits for the device once."""
    found = list(tensors)
    if not found:
        return []
    device = max((t.device for t in found), key=lambda d: d.type != "cpu")
    return [float(v) for v in torch.stack([t.detach().to(device, torch.float32) for t in found]).tolist()]
