"""Small geometric and lighting changes, for small pictures such as digits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, PositiveFloat

from sslkit.api import RunInfo, ViewGenerator

if TYPE_CHECKING:
    from sslkit.api import ViewMaker

Probability = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]


class Affine(ViewGenerator):
    """Two views by small rotation, scale, shear, shift, slanting light, contrast and offset per channel.

    For pictures too small or too plain to be cropped, such as digits. Each amount is drawn uniformly, for every image
    and view anew. Geometry comes first (bilinear; beyond its edge a picture goes on as its edge), then light,
    grayscale, contrast and offset. Values may leave 0..1 on the way to being normalised: clipping them would take
    shapes away along with the light.

    Geometry alone (`appearance = false`) is a lesson in shortcuts: colour and light tell which image a view is of, so
    the loss falls and nothing about shapes is learned.
    """

    rotation: Annotated[float, Field(ge=0, le=180)] = 10.0
    """Degrees: turned by -rotation to +rotation."""
    scale: BelowOne = 0.1
    """Enlarged by a factor of 1 - scale to 1 + scale."""
    shear: Strength = 0.1
    """Slanted: a row moves sideways by -shear to +shear of its height above the middle."""
    shift: Probability = 0.05
    """Moved by -shift to +shift of the side, across and down."""
    appearance: bool = True
    """False leaves only geometry: light, grayscale, contrast and offset are not applied, whatever they are set to."""
    light: BelowOne = 0.5
    """Light that falls off linearly in a random direction: from 1 to 1 +- light between the middle and an edge."""
    grayscale: Probability = 0.3
    """Probability of mixing all channels into one gray, with random weights."""
    contrast: BelowOne = 0.4
    """Each channel is multiplied by a factor of its own, of 1 - contrast to 1 + contrast."""
    offset: Probability = 0.15
    """Each channel is raised by -offset to +offset; black is 0, white is 1."""
    mean: tuple[float, ...] | None = None
    """Subtracted from each channel, on the scale 0..1; without it, the training images' own mean."""
    std: tuple[PositiveFloat, ...] | None = None
    """Each channel is divided by it, on the scale 0..1; without it, the training images' own standard deviation."""

    def build(self, run: RunInfo) -> ViewMaker:
        from sslkit_affine.maker import AffineMaker

        return AffineMaker(self, run)
