"""What observers measure between steps: features that they share, in an event that a signal may end early."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sslkit import features
from sslkit.build import Parts
from sslkit.errors import RunFailed, SslkitError
from sslkit.events import Bus
from sslkit.run_directory import RunDirectory
from sslkit.stopping import LeftEarly


class Measurements:
    """Measures for the observers of one run; what was left early is owed, and made before the run goes on."""

    def __init__(self, parts: Parts, files: RunDirectory) -> None:
        self.parts, self.files = parts, files
        self.hurried: Callable[[], bool] = lambda: False
        """Whether the run has to end so soon that a measurement must not be waited for."""
        self.owed = False
        """Whether the epoch that ended at this step was not measured."""
        self._features: features.FeatureCache | None = None

    def make(self, event: str, bus: Bus, run: Any) -> bool:
        """Emit an event in which observers measure. False if it was left: then it is as if it had not begun."""
        offset, before = self.files.metrics_offset, copy.deepcopy(bus.state_dict())
        self._features = features.FeatureCache()
        self.owed = self.owed or event == "epoch_ended"
        try:
            bus.emit(event, run=run)
        except (LeftEarly, SslkitError) as error:  # a broken observer's share is made anew once it is mended, too
            self.files.forget(offset)
            bus.load_state_dict(before)
            if isinstance(error, SslkitError):
                raise
            return False
        finally:
            self._features = None
        self.owed = self.owed and event != "epoch_ended"
        return True

    def _poll(self) -> None:
        if self._features is not None and self.hurried():
            raise LeftEarly

    def features(self, network: nn.Module, split: str, indices: Tensor) -> Tensor:
        """See `sslkit.events.Run.features`."""
        parts, train = self.parts, self.parts.recipe.train
        images = parts.data.train if split == "train" else parts.data.test
        if images is None:
            raise RunFailed("this data source has no test images to measure on")
        cache = self._features or features.FeatureCache()
        name = "online" if network is parts.model.online.backbone else "target"
        return cache.get((name, split), indices, lambda missing: features.features(
            network, images, missing, parts.views.clean, parts.device, bf16=train.precision == "bf16",
            channels_last=train.channels_last, poll=self._poll,
        ))  # fmt: skip

    def view_projections(self, indices: Tensor, views: int, generator: torch.Generator) -> Tensor:
        """See `sslkit.events.Run.view_projections`."""
        online, train, device = self.parts.model.online, self.parts.recipe.train, self.parts.device
        bf16 = torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bf16")
        with features.in_eval_mode(online), bf16:
            return features.view_projections(
                lambda pixels: online.forward(pixels), self.parts.data.train, indices, self.parts.views, views,
                generator, device, channels_last=train.channels_last, poll=self._poll,
            )  # fmt: skip
