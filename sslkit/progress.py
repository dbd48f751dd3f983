"""What a user sees while a run goes: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from sslkit.errors import printable
from sslkit.events import Run, observes
from sslkit.telling import to_nowhere

QUIET_SECONDS = 10.0
"""Without a terminal, records are printed no more often than this; measurements of quality always are."""


class PatientConsole(Console):
    """A console whose reader may go away, as `| head` does or a closed terminal, without ending the run."""

    def __exit__(self, *found: Any) -> None:
        try:
            super().__exit__(*found)
        except OSError:  # a terminal that was closed is no broken pipe; nor must a full disk below `> log` end a run
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        self.quiet = True
        to_nowhere(self.file)


def say(console: Console, text: str) -> None:
    """Print lines as they are: brackets are no markup, long lines are the terminal's to wrap, and nothing in them is
    an order to it."""
    text = "\n".join(map(printable, text.split("\n")))
    console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextlib.contextmanager
def counted(words: str, total: int | None, *, size_in_bytes: bool = False) -> Iterator[Callable[[int], None]]:
    """A bar on stderr where that is a terminal and there is a total, gone when the block ends; yields `advance(by)`."""
    console = Console(stderr=True)
    if total is None or not console.file.isatty():  # FORCE_COLOR asks for colours, not for a bar in a file
        yield lambda by: None
        return
    count = DownloadColumn() if size_in_bytes else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(escape(printable(words)), total=total)
        yield lambda by: bar.advance(task, by)


class Display:
    """An observer like any other: it draws from the records of `metrics.jsonl`."""

    def __init__(
        self, console: Console, total_steps: int, steps_per_epoch: int, first_network: str = "random network"
    ) -> None:
        self.console, self.steps_per_epoch, self.first_network = console, steps_per_epoch, first_network
        self.shown: dict[str, Any] = {}
        self._printed = -QUIET_SECONDS
        self.progress: Progress | None = None
        self.task = TaskID(0)
        if console.is_terminal:
            self.progress = Progress(
                TextColumn("epoch {task.fields[epoch]:.1f}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=console,
                refresh_per_second=4,
            )
            self.task = self.progress.add_task("", total=total_steps, epoch=0.0, numbers="starting")

    def __enter__(self) -> Display:
        if self.progress:
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress:
            self.progress.stop()

    def say(self, text: str) -> None:
        """One line above the progress."""
        say(self.console, text)

    def advance(self, step: int) -> None:
        """The run is at this step."""
        if self.progress:
            self.progress.update(self.task, completed=step, epoch=step / self.steps_per_epoch)

    @observes
    def recorded(self, run: Run, record: Mapping[str, Any]) -> None:
        self.shown |= record
        if self.progress:
            self.progress.update(self.task, numbers=_numbers(self.shown))
        now, numbers = time.monotonic(), _numbers(record)
        if "knn_top1" in record and record["step"] == 0:
            self.say(f"kNN top-1 of the {self.first_network}: {record['knn_top1']:.4f}")
        elif self.progress is None and numbers and ("knn_top1" in record or now - self._printed >= QUIET_SECONDS):
            self._printed = now
            self.say(f"epoch {record['epoch']:.2f}  step {record['step']}/{run.info.total_steps}  {numbers}")


def _numbers(record: Mapping[str, Any]) -> str:
    """The figures worth a glance, those that were measured."""
    parts = []
    for key, label, form in (
        ("loss", "loss", ".4f"),
        ("tau", "tau", ".5f"),
        ("knn_top1", "kNN", ".4f"),
        ("std_sqrt_d", "std*sqrt(d)", ".2f"),
        ("images_per_second", "images/s", ".0f"),
        ("data_wait", "waiting for data", ".0%"),
    ):
        value = record.get(key)
        if value is not None:
            parts.append(f"{label} {value:{form}}")
    return "  ".join(parts)
