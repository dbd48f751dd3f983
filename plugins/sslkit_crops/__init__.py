"""Random crops of a batch, made together on the device (BYOL's two views), and no augmentation at all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from sslkit.api import RunInfo, ViewGenerator

if TYPE_CHECKING:
    from sslkit.api import ViewMaker

Probability = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0)]


class TwoCrops(ViewGenerator):
    """BYOL's two random views: crop, flip, colour jitter, grey, blur, solarize (Grill et al. 2020)."""

    size: PositiveInt | None = None
    """a"""
    scale: tuple[float, float] = (0.08, 1.0)
    """a"""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """a"""
    flip: Probability = 0.5
    """a"""
    jitter: Probability = 0.8
    """a"""
    brightness: Strength = 0.4
    """a"""
    contrast: Strength = 0.4
    """a"""
    saturation: Strength = 0.2
    """a"""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """a"""
    grayscale: Probability = 0.2
    """a"""
    blur: tuple[Probability, Probability] = (1.0, 0.1)
    """a"""
    blur_sigma: tuple[PositiveFloat, PositiveFloat] = (0.1, 2.0)
    """a"""
    blur_kernel: PositiveInt | None = None
    """a"""
    solarize: tuple[Probability, Probability] = (0.0, 0.2)
    """a"""
    solarize_threshold: Probability = 0.5
    """a"""
    mean: tuple[float, ...] | None = None
    """a"""
    std: tuple[PositiveFloat, ...] | None = None
    """a"""

    def build(self, run: RunInfo) -> ViewMaker:
        from sslkit_crops.two_crops import TwoCropsMaker

        return TwoCropsMaker(self, run)
