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

    @observes
    def run_started(self, run: Run) -> None:
        self.writer = SummaryWriter(str(run.directory / "tensorboard"), purge_step=run.step or None)

    @observes
    def recorded(self, run: Run, record: Mapping[str, Any]) -> None:
        if self.writer is None:
            return
        for name, value in record.items():
            if name not in ("step", "epoch") and value is not None:
                self.writer.add_scalar(name, value, record["step"])

    @observes
    def run_ended(self, run: Run, status: str) -> None:
        if self.writer is not None:
            self.writer.close()
