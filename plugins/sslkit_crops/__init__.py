"""Views made for a whole batch at once: random crops of one or several sizes, and the image unchanged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
)

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


# ---------------------------------------------------------------- options that several specs have


class CropOptions(BaseModel):
    """How a view is cut from an image and what is done to its colors, apart from blur and solarize."""

    model_config = ViewGenerator.model_config

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
    blur_sigma: Annotated[tuple[PositiveFloat, PositiveFloat], AfterValidator(_rising)] = (0.1, 2.0)
    """Standard deviation of the blur, in pixels: [lowest, highest]."""
    blur_kernel: Annotated[int, Field(ge=3), AfterValidator(_odd)] | None = None
    """Size of the blur's kernel, in pixels, odd; without it, a tenth of the view (23 at 224 px, 3 at 32 px)."""
    solarize_threshold: Probability = 0.5
    """Values at or above it are inverted where a view is solarized; black is 0, white is 1."""


class ViewOptions(CropOptions):
    """All that is done to make one view."""

    blur: Probability = 0.5
    """Probability of a Gaussian blur."""
    solarize: Probability = 0.0
    """Probability of inverting all values from `solarize_threshold` up."""


class ViewGroup(ViewOptions):
    """Views of one kind, such as six small crops.

    An option that a group leaves out is the generator's: in a validated `MultiCrop` it has that value here, and is
    not among `model_fields_set`.
    """

    count: PositiveInt = 1
    """How many views of each image."""
    kind: Literal["global", "local"] = "global"
    """`local` marks views of small parts of the image, of which losses make no targets."""

    def within(self, common: Mapping[str, Any]) -> ViewGroup:
        """The same group, with what it leaves out taken from `common`."""
        inherited = {name: value for name, value in common.items() if name not in self.model_fields_set}
        # Not model_copy, for which all that is inherited would count as set.
        return ViewGroup.model_construct(self.model_fields_set, **{**dict(self), **inherited})

    @model_serializer(mode="wrap")
    def _as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        kept = {"count", "kind", *self.model_fields_set}
        return {name: value for name, value in handler(self).items() if name in kept}


class _Normalized(ViewGenerator):
    mean: tuple[float, ...] | None = None
    """Subtracted from each channel, on the scale 0..1; without it, the training images' own mean."""
    std: tuple[PositiveFloat, ...] | None = None
    """Each channel is divided by it, on the scale 0..1; without it, the training images' own standard deviation."""


# ---------------------------------------------------------------- components


class TwoCrops(_Normalized, CropOptions):
    """Two random views: crop, flip, color jitter, grayscale, blur, solarize (BYOL).

    Grill et al. 2020 (arXiv 2006.07733), section 3.2 and appendix B, whose values are the defaults; an option with
    two values has one for each view. On CIFAR the usual choice is `blur = [0.0, 0.0]` and the rest as it is. The
    pictures are those of torchvision's RandomResizedCrop (bicubic, antialiased), RandomHorizontalFlip, ColorJitter,
    RandomGrayscale, GaussianBlur, RandomSolarize and Normalize on float images, in this order. Images of one channel
    have no color: saturation, hue and grayscale leave them as they are, as in torchvision. For other numbers of
    channels these three have to be 0.
    """

    blur: tuple[Probability, Probability] = (1.0, 0.1)
    """Probability of a Gaussian blur, in the first view and in the second."""
    solarize: tuple[Probability, Probability] = (0.0, 0.2)
    """Probability of inverting all values from `solarize_threshold` up, in the first view and in the second."""

    def build(self, run: RunInfo) -> ViewMaker:
        from sslkit_crops.crops import CropsMaker

        common = {name: getattr(self, name) for name in CropOptions.model_fields}
        where = "view_generator.two_crops"
        groups = [
            (where, ViewGroup(**common, blur=blur, solarize=solarize))
            for blur, solarize in zip(self.blur, self.solarize, strict=True)
        ]
        return CropsMaker(where, groups, self.mean, self.std, run)


class MultiCrop(_Normalized, ViewOptions):
    """Any number of random views, in groups of their own sizes and augmentations (SwAV's multi-crop, DINO).

    Caron et al. 2020 (SwAV, arXiv 2006.09882), section 3.2: two crops of full size and V small ones of small parts of
    the image. Caron et al. 2021 (DINO, arXiv 2104.14294), section 3.1, calls them global views (224 px, over half of
    the area) and local views (96 px, under half of it). Each `[[view_generator.views]]` is a group; an option that it
    leaves out is the one given at the top level. Views are numbered in the order of the groups. Each is made as
    `two_crops` makes its own, and for evaluation images have the size of the first global view, or of the first view
    where none is global.
    """

    views: tuple[ViewGroup, ...]
    """Groups of views: `count`, `kind` (`"global"` or `"local"`) and, where it differs from the top level, any option
    but `mean` and `std`."""

    @field_validator("views")
    @classmethod
    def _complete(cls, groups: tuple[ViewGroup, ...], info: ValidationInfo) -> tuple[ViewGroup, ...]:
        if not groups:
            raise ValueError("should hold one group of views or more")
        common = {name: value for name, value in info.data.items() if name in ViewOptions.model_fields}
        return tuple(group.within(common) for group in groups)

    def build(self, run: RunInfo) -> ViewMaker:
        from sslkit_crops.crops import CropsMaker

        where = "view_generator.multi_crop"
        groups = [(f"{where}.views.{number}", group) for number, group in enumerate(self.views)]
        return CropsMaker(where, groups, self.mean, self.std, run)


class Identity(ViewGenerator):
    """The unchanged image, several times: the trivial task, which teaches nothing.

    For tests, and to show what becomes of a method without augmentations.
    """

    views: PositiveInt = 2
    """How many views of each image."""

    def build(self, run: RunInfo) -> ViewMaker:
        from sslkit_crops.identity import IdentityMaker

        return IdentityMaker(self, run)
