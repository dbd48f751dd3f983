"""Records as TensorBoard scalars."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from sslkit.events import Run, observes


class TensorBoardObserver:
    """One event file per process; a resumed run hides what it measures again."""

    def __init__(self) -> None:
        self.writer: SummaryWriter | None = None

    @observes(tryfirst=True)  # another observer may record something as the run starts
    def run_started(self, run: Run) -> None:
        purge = run.step + 1 if run.step else None  # the records of this very step are kept
        self.writer = SummaryWriter(str(run.directory / "tensorboard"), purge_step=purge)

    @observes
    def recorded(self, run: Run, record: Mapping[str, Any]) -> None:
        if self.writer is None:
            return
        for name, value in record.items():
            if name not in ("step", "epoch") and value is not None:
                self.writer.add_scalar(name, value, record["step"])

    @observes
    def checkpoint_saved(self, run: Run) -> None:
        if self.writer is not None:  # what a checkpoint goes on from must not be lost
            self.writer.flush()

    @observes
    def run_ended(self, run: Run, status: str) -> None:
        if self.writer is not None:
            self.writer.close()
