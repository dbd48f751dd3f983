"""The views of a whole batch, every parameter drawn per sample and view."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sslkit.api import ViewMaker

if TYPE_CHECKING:
    from . import GridMask

INNER = "over."
"""Begins the names of the other generator's parameters."""


class GridMaskMaker:
    """Meets `sslkit.api.ViewMaker`.

    Parameters of n samples, dimension 1 being the view: those of the other generator; `unit` `[n, V]` (a fraction of
    the side), `start` `[n, V, 2]` (down and right, in units) and `masked` bool `[n, V]`.
    """

    def __init__(self, options: GridMask, over: ViewMaker) -> None:
        self.options, self.over, self.specs = options, over, over.specs

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Random parameters of n samples: the other generator's and those of the grid."""
        o, shape = self.options, (n, len(self.specs))
        inner = self.over.draw(n, generator)
        return {INNER + name: values for name, values in inner.items()} | {
            "unit": o.smallest + (o.largest - o.smallest) * torch.rand(shape, generator=generator),
            "start": torch.rand(*shape, 2, generator=generator),
            "masked": torch.rand(shape, generator=generator) < o.probability,
        }

    def crop(self, images: Tensor, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        """Geometry: the other generator's."""
        return self.over.crop(images, inner(parameters))

    def appear(self, crops: Sequence[Tensor], parameters: Mapping[str, Tensor]) -> list[Tensor]:
        """The other generator's normalised views, masked: 0 is the mean colour."""
        views = self.over.appear(crops, inner(parameters))
        return [view.masked_fill(self.hidden(view, number, parameters), 0) for number, view in enumerate(views)]

    def clean(self, images: Tensor) -> Tensor:
        """Images for evaluation: nothing is hidden."""
        return self.over.clean(images)

    def hidden(self, view: Tensor, number: int, parameters: Mapping[str, Tensor]) -> Tensor:
        """Which pixels of a view are hidden: bool `[B, 1, h, w]`."""
        start, unit = parameters["start"][:, number], parameters["unit"][:, number, None]
        rows, columns = (
            (centres(side, view.device) / unit + start[:, axis, None]) % 1 >= self.options.keep
            for axis, side in enumerate(view.shape[-2:])
        )
        masked = parameters["masked"][:, number, None, None]
        return (rows[:, :, None] & columns[:, None, :] & masked)[:, None]


def inner(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The other generator's parameters, by its own names."""
    return {name.removeprefix(INNER): values for name, values in parameters.items() if name.startswith(INNER)}


def centres(size: int, device: torch.device) -> Tensor:
    """Centres of the pixels of a line whose ends are 0 and 1."""
    return (torch.arange(size, device=device) + 0.5) / size
