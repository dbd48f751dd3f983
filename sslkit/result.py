"""What came of a run: the directory, how it ended, what was measured."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from sslkit import doctor
from sslkit.doctor import Examination
from sslkit.run_directory import read_json, read_metrics

Status = Literal["done", "stopped", "interrupted", "preempted", "lost", "failed"]
"""How a run ended; docs/reference/run-directory.md says what each means."""


class Metrics(list[dict[str, Any]]):
    """The records of a run, oldest first: a list of dicts, so that `pandas.DataFrame(metrics)` is a table.

    Every record has `step` and `epoch`; the other keys are those that were measured at that step.
    """

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of one figure, where it was measured and finite.

        Raises:
            KeyError: it never was; the message lists the figures that were.
        """
        points = [(r["step"], r[key]) for r in self if r.get(key) is not None]
        if not points:
            known = sorted({name for record in self for name in record} - {"step", "epoch"})
            raise KeyError(f"{key!r} was not measured; there are: {', '.join(known)}")
        return [step for step, _ in points], [value for _, value in points]

    def last(self, key: str) -> float:
        """The newest value of one figure.

        Raises:
            KeyError: as `curve`.
        """
        return self.curve(key)[1][-1]


@dataclass(frozen=True)
class Result:
    """What came of a training."""

    directory: Path
    """The run's directory; docs/reference/run-directory.md says what is in it."""
    status: Status
    """`done`; `stopped` where `steps` ended it; `interrupted`, `preempted` or `lost`, with a checkpoint each."""
    step: int
    """Updates made so far, over all calls."""
    total_steps: int
    """Updates of the whole run."""

    @classmethod
    def of(cls, directory: Path, status: Status) -> Result:
        """The result of a run that has just ended, from what its directory says."""
        told = read_json(directory / "status.json")
        return cls(directory, status, int(told.get("step", 0)), int(told.get("of", 0)))

    @cached_property
    def metrics(self) -> Metrics:
        """What was measured, from step 0 on, over all calls."""
        return Metrics(read_metrics(self.directory))

    @cached_property
    def examination(self) -> Examination:
        """What the doctor says of the run: `findings`, `verdict`, `text()`."""
        return doctor.examine_run(self.directory)

    @property
    def verdict(self) -> str:
        """One line: whether to trust the run."""
        return self.examination.verdict
