"""GridMask for sslkit: another generator's views, with a grid of squares hidden."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, SerializeAsAny, model_validator
from pydantic_core import PydanticCustomError

from sslkit.api import RunInfo, ViewGenerator, slot

if TYPE_CHECKING:
    from sslkit.api import ViewMaker

SSLKIT_API = 1
"""The version of `sslkit.api` that this is written for."""

Share = Annotated[float, Field(gt=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]


class GridMask(ViewGenerator):
    """Another generator's views, with a regular grid of squares hidden (Chen et al. 2020).

    GridMask (arXiv 2001.04086, section 3.2) divides a picture into square units and hides the corner of each. For
    every image and view anew, the side of the units is drawn uniformly, and so is where the grid begins. A unit keeps
    1 - (1 - keep)^2 of its area. What is hidden has the mean colour of the training images. The grid is not turned.
    """

    over: Annotated[SerializeAsAny[ViewGenerator], slot("view_generator")]
    """The generator whose views are masked: `{ use = "two_crops" }`."""
    keep: Share = 0.5
    """Share of a unit's side that stays: the paper's r."""
    smallest: Share = 0.25
    """Side of the smallest units, as a fraction of the picture's."""
    largest: Share = 0.75
    """Side of the largest units, as a fraction of the picture's."""
    probability: Probability = 0.8
    """How often a view is masked at all."""

    @model_validator(mode="after")
    def _in_order(self) -> GridMask:
        if self.smallest > self.largest:
            raise PydanticCustomError("sizes", "'smallest' should be at most 'largest'")
        return self

    def build(self, run: RunInfo) -> ViewMaker:
        from .views import GridMaskMaker

        return GridMaskMaker(self, self.over.build(run))
