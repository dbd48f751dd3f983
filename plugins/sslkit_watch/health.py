"""The panel (`sslkit.panel`) over a run, and LiDAR at its end."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sslkit import health, randomness
from sslkit.batch import Branches
from sslkit.events import Run, observes
from sslkit.features import chosen
from sslkit.panel import Panel

if TYPE_CHECKING:
    from . import Health


class HealthObserver:
    """Looks at the branches of every step, at the target around a step that is recorded, and at views at the end."""

    def __init__(self, options: Health) -> None:
        self.options, self.panel = options, Panel(options.ring)
        self.branches: Branches | None = None
        """Those of a step that is about to be recorded; of no other, since they hold a batch of images."""

    @observes
    def run_started(self, run: Run) -> None:
        self._prepare(run)

    @observes
    def step_ended(self, run: Run, branches: Branches) -> None:
        self.panel.step(branches)
        self.branches = branches if run.will_record(run.step) else None
        if self.branches is None:
            self._prepare(run)

    @observes
    def logging(self, run: Run, record: MutableMapping[str, float | Tensor]) -> None:
        if self.branches is not None:
            found = self.panel.scalars(self.branches, run.model.online, run.model.target)
            record.update({name: value for name, value in found.items() if name not in record})
        self.branches = None
        self._prepare(run)

    def _prepare(self, run: Run) -> None:
        """The target before an update that will be recorded is the target after the one before."""
        if run.will_record(run.step + 1):
            self.panel.before_update(run.model.online, run.model.target)

    @observes
    def epoch_ended(self, run: Run) -> None:
        found = self.panel.spectra()
        images, views = min(self.options.lidar_images, len(run.data.train)), self.options.lidar_views
        if images and run.step == run.info.total_steps:
            generator = randomness.generator(0, "lidar")  # the same images and views for every seed, as for kNN
            projections = run.view_projections(chosen(run.data.train, images), views, generator)
            found |= {"lidar": health.lidar(projections), "lidar_images": images, "lidar_views": views}
        if found:
            run.record(found)

    def state_dict(self) -> dict[str, Any]:
        """The rings, so that a resumed run measures the same rank."""
        return self.panel.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`; a ring of another size begins empty."""
        self.panel.load_state_dict(state)
