"""Records as TensorBoard scalars, with the recipe and the picture of the views."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from sslkit.events import Run, observes

from . import elsewhere


class TensorBoardObserver:
    """One event file per process; a resumed run hides what it measures again."""

    def __init__(self) -> None:
        self.writer: SummaryWriter | None = None

    @observes(tryfirst=True)  # another observer may record something as the run starts
    def run_started(self, run: Run) -> None:
        purge = run.step + 1 if run.step else None  # the records of this very step are kept
        self.writer = SummaryWriter(str(run.directory / "tensorboard"), purge_step=purge)
        if run.step == 0:
            self._introduce(run.directory)

    def _introduce(self, directory: Path) -> None:
        assert self.writer is not None
        recipe, picture = directory / elsewhere.RECIPE, directory / elsewhere.PICTURE
        if recipe.is_file():
            text = recipe.read_text(encoding="utf-8")
            self.writer.add_text("recipe", "\n".join(f"    {line}" for line in text.splitlines()), 0)  # Markdown: code
        if picture.is_file():
            with Image.open(picture, formats=("PNG",)) as image:
                self.writer.add_image("views", np.asarray(image.convert("RGB")), 0, dataformats="HWC")

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
