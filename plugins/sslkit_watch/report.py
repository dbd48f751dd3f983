"""The page about a run, written when the run ends."""

from __future__ import annotations

from sslkit import report, snapshot
from sslkit.errors import SslkitError
from sslkit.events import Run, observes

LEISURELY = ("done", "stopped")
"""How a run ends that has time to be looked at; where somebody waits for it to end, it has none."""


class ReportObserver:
    """Looks at the features once, after the last step, and writes the page."""

    def __init__(self, snapshot: bool) -> None:
        self.snapshot = snapshot
        self.taken = False

    @observes(trylast=True)  # what others measure now is not computed again
    def epoch_ended(self, run: Run) -> None:
        if run.step == run.info.total_steps:
            self._take(run)

    @observes(trylast=True)  # after those that record something at the end
    def run_ended(self, run: Run, status: str) -> None:
        if status in LEISURELY and run.step:
            self._take(run)
        try:
            path = report.write(run.directory)
        except Exception as error:  # a page is not worth a run
            run.say(f"the report was not written: {_line(error)}")
        else:
            run.say(f"report: {path}")

    def _take(self, run: Run) -> None:
        if self.taken or not self.snapshot:
            return
        self.taken = True
        try:
            snapshot.write(run.directory, snapshot.take(run))
        except Exception as error:  # nor is a picture of its features
            run.say(f"no snapshot of the features: {_line(error)}")


def _line(error: Exception) -> str:
    first = str(error).partition("\n")[0]
    return first.removeprefix("--out ") if isinstance(error, SslkitError) else f"{type(error).__name__}: {first}"
