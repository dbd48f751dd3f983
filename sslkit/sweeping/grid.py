"""The runs of a grid, in their order."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from sslkit.errors import SslkitError
from sslkit.sweeping.jobs import Job, Outcome
from sslkit.sweeping.pool import Task

PATIENCE = 600.0
"""Seconds to wait for a run that another process trains; that of a killed sweep has only to save its checkpoint."""


class Progress:
    """A line for each run that changes, with how many are over."""

    def __init__(self, total: int, say: Callable[[str], None]) -> None:
        self.total, self.over, self.failed, self._say = total, 0, 0, say

    def begun(self, job: Job) -> None:
        """A run is started, or gone on with."""
        step = job.status.get("step")
        self._say(f"{job.name}: {f'goes on from step {step}' if step else 'begins'}")

    def ended(self, job: Job, outcome: Outcome) -> None:
        """A run is over, or was asked to end."""
        self.over += outcome.kind != "ended"
        self.failed += outcome.kind != "done"
        word = {"failed": "FAILED: ", "ended": ""}.get(outcome.kind, f"{job.status.get('status')}, ")
        self._say(f"[{self.over}/{self.total}] {job.name}: {word}{outcome.text}".rstrip(", "))


class Waiting:
    """Which of several runs can be started: not those that another process still trains."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._since: dict[str, float] = {}

    def free(self, job: Job) -> bool:
        """Whether it can be started; one that was waited for too long can, and says itself why it cannot."""
        if not job.held():
            return True
        if job.name not in self._since:
            self._since[job.name] = time.monotonic()
            self._say(f"{job.name}: another process trains in it; waiting until it has saved")
        return time.monotonic() - self._since[job.name] > PATIENCE


class Grid:
    """Work for `pool.run`: the runs that are not finished yet."""

    def __init__(self, jobs: Sequence[Job], say: Callable[[str], None]) -> None:
        done = [job for job in jobs if job.finished()]
        self.todo = [job for job in jobs if job not in done]
        self.progress = Progress(len(jobs), say)
        self.progress.over = len(done)
        if done:
            say(f"{len(done)} of {len(jobs)} {'is' if len(done) == 1 else 'are'} finished already")
        self.waiting = Waiting(say)
        self.running: dict[str, Job] = {}

    def take(self) -> Task | None:
        """The next run that can be started."""
        for job in self.todo:
            if self.waiting.free(job):
                self.todo.remove(job)
                if job.finished():  # while it was waited for
                    self.progress.ended(job, job.outcome(0))
                    return self.take()
                try:
                    task = job.task()
                except SslkitError as error:
                    self.progress.ended(job, Outcome("failed", error.lines[0]))
                    return self.take()
                self.progress.begun(job)
                self.running[task.name] = job
                return task
        return None

    def left(self) -> bool:
        """Whether runs are waited for."""
        return bool(self.todo)

    def ended(self, task: Task, code: int) -> None:
        """Tell what came of a run."""
        job = self.running.pop(task.name)
        self.progress.ended(job, job.outcome(code))
