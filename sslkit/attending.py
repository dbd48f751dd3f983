"""The doctor beside a run that goes on: what becomes true is told once, as it does."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sslkit import doctor
from sslkit.events import Run, observes
from sslkit.rules import RANKS, Course, Facts, Finding, Severity
from sslkit.run_directory import read_metrics

EVERY = 200
"""Records up to which every one is looked at; later, one in ten, and those that measure quality."""


class Attending:
    """An observer like any other: it reads the records as they are written.

    Args:
        facts: What is known of the run before it begins; findings that it accepts are not told.
        say: Tells the user one line.
        stop_on: How grave a finding makes the run count as lost.
        keep: How many of the newest checkpoints the run keeps.
    """

    def __init__(
        self, facts: Facts, say: Callable[[str], None], stop_on: Severity | None = None, keep: int = 0
    ) -> None:
        self.keep = keep
        self.course = Course(facts)
        self.stop_on = stop_on
        self.told: dict[str, Finding] = {}
        self.lost = False
        """Whether something as grave as `stop_on` was found."""
        self._say = say

    @observes(tryfirst=True)  # other observers may record something as the run starts
    def run_started(self, run: Run) -> None:
        self._say = run.say
        if run.step:  # what an earlier process recorded, and told
            self.course = Course(self.course.facts, {}, list(read_metrics(run.directory)))
            self.told = {f.id: f for f in doctor.during(self.course)}

    @observes
    def checkpoint_saved(self, path: Path) -> None:
        """Once the first shows what one takes, tell if there is no room for those that will be there at a time."""
        if self.keep:
            size, free = sum(p.stat().st_size for p in path.iterdir()), shutil.disk_usage(path).free
            if free < (self.keep + 1) * size:
                self._say(
                    f"warning: {path.parent}: a checkpoint takes {size / 2**20:,.1f} MiB, of which up to "
                    f"{self.keep + 2} are there at a time, and {free / 2**20:,.1f} MiB are free on this disk"
                )
            self.keep = 0

    @observes
    def recorded(self, record: Mapping[str, Any]) -> None:
        self.course.add(record)
        number = len(self.course.records)
        if number <= EVERY or number % 10 == 0 or "loss" not in record:
            self.look()

    def look(self) -> None:
        """Tell what has become true since the last look, the causes first."""
        for finding in doctor.during(self.course):
            self.tell(finding)

    def tell(self, finding: Finding) -> None:
        """Tell a finding, unless it was told before as grave as it is, is a mere note, or is accepted."""
        known = self.told.get(finding.id)
        graver = known is None or RANKS[finding.severity] < RANKS[known.severity]
        if finding.severity == "info" or not graver or finding.id in self.course.facts.accepted:
            return
        self.told[finding.id] = finding
        when = "" if finding.step is None else f" at step {finding.step}"
        self._say(f"{finding.severity}{when}: {finding.sentence} [{finding.id}]")
        self.lost = self.lost or (self.stop_on is not None and RANKS[finding.severity] <= RANKS[self.stop_on])
