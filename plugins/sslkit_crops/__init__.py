"""Views made for a whole batch at once: BYOL's two random crops, and the image unchanged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt

from sslkit.api import RunInfo, ViewGenerator

if TYPE_CHECKING:
    from sslkit.api import ViewMaker


def _rising(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"should be [lowest, highest], but {pair[0]} > {pair[1]}")
    return pair


def _odd(size: int) -> int:
    if size % 2 == 0:
        raise ValueError(f"should be odd, so that the kernel has a centre; try {size + 1}")
    return size


Probability = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Strength = Annotated[float, Field(ge=0)]


class TwoCrops(ViewGenerator):
    """Two random views: crop, flip, color jitter, grayscale, blur, solarize (BYOL).

    Grill et al. 2020 (arXiv 2006.07733), section 3.2 and appendix B, whose values are the defaults; an option with
    two values has one for each view. On CIFAR the usual choice is `blur = [0.0, 0.0]` and the rest as it is. The
    pictures are those of torchvision's RandomResizedCrop (bicubic, antialiased), RandomHorizontalFlip, ColorJitter,
    RandomGrayscale, GaussianBlur, RandomSolarize and Normalize on float images, in this order. Images of one channel
    have no color: saturation, hue and grayscale leave them as they are, as in torchvision. For other numbers of
    channels these three have to be 0.
    """

    size: PositiveInt | None = None
    """Side of the views, in pixels; without it, the side of the stored images."""
    scale: Annotated[tuple[Fraction, Fraction], AfterValidator(_rising)] = (0.08, 1.0)
    """Area of a crop as a fraction of the image's: [lowest, highest]."""
    ratio: Annotated[tuple[PositiveFloat, PositiveFloat], AfterValidator(_rising)] = (3 / 4, 4 / 3)
    """Width of a crop divided by its height: [lowest, highest]."""
    flip: Probability = 0.5
    """Probability of mirroring left to right."""
    jitter: Probability = 0.8
    """Probability of changing brightness, contrast, saturation and hue, in random order."""
    brightness: Strength = 0.4
    """Brightness is multiplied by a factor of 1 - brightness (at least 0) to 1 + brightness."""
    contrast: Strength = 0.4
    """Contrast (distance from the picture's mean gray) is multiplied by 1 - contrast (at least 0) to 1 + contrast."""
    saturation: Strength = 0.2
    """Saturation (distance from each pixel's gray) is multiplied by 1 - saturation (at least 0) to 1 + saturation."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """Hue is turned by -hue to +hue, where 1 is the whole color circle."""
    grayscale: Probability = 0.2
    """Probability of replacing every color by its gray."""
    blur: tuple[Probability, Probability] = (1.0, 0.1)
    """Probability of a Gaussian blur, in the first view and in the second."""
    blur_sigma: Annotated[tuple[PositiveFloat, PositiveFloat], AfterValidator(_rising)] = (0.1, 2.0)
    """Standard deviation of the blur, in pixels: [lowest, highest]."""
    blur_kernel: Annotated[int, Field(ge=3), AfterValidator(_odd)] | None = None
    """Size of the blur's kernel, in pixels, odd; without it, a tenth of the view (23 at 224 px, 3 at 32 px)."""
    solarize: tuple[Probability, Probability] = (0.0, 0.2)
    """Probability of inverting all values from `solarize_threshold` up, in the first view and in the second."""
    solarize_threshold: Probability = 0.5
    """Values at or above it are inverted where a view is solarized; black is 0, white is 1."""
    mean: tuple[float, ...] | None = None
    """Subtracted from each channel, on the scale 0..1; without it, the training images' own mean."""
    std: tuple[PositiveFloat, ...] | None = None
    """Each channel is divided by it, on the scale 0..1; without it, the training images' own standard deviation."""

    def build(self, run: RunInfo) -> ViewMaker:
        from sslkit_crops.two_crops import TwoCropsMaker

        return TwoCropsMaker(self, run)


class Identity(ViewGenerator):
    """The unchanged image, several times: the trivial task, which teaches nothing.

    For tests, and to show what becomes of a method without augmentations.
    """

    views: PositiveInt = 2
    """How many views of each image."""

    def build(self, run: RunInfo) -> ViewMaker:
        from sslkit_crops.identity import IdentityMaker

        return IdentityMaker(self, run)
