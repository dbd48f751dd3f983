"""BYOL's two views of a batch: geometry first, then appearance, every parameter drawn per sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sslkit.api import RunInfo
from sslkit.batch import ViewSpec
from sslkit.errors import UserError
from sslkit_crops import geometry
from sslkit_crops.appearance import Appearance
from sslkit_crops.normalize import Normalize

if TYPE_CHECKING:
    from sslkit_crops import TwoCrops

VIEWS = 2


class TwoCropsMaker:
    """Meets `sslkit.api.ViewMaker`.

    Parameters of n samples, dimension 1 being the view:

    - `box` int64 `[n, 2, 4]`: top, left, height, width of the crop in pixels; `flip` bool `[n, 2]`.
    - `jitter` bool `[n, 2]`; `brightness`, `contrast`, `saturation` (factors) and `hue` (turns) float `[n, 2]`, which
      change nothing where `jitter` is false; `order` int64 `[n, 2, 4]`: the four in the order in which they come, as
      0 brightness, 1 contrast, 2 saturation, 3 hue.
    - `grayscale`, `blur`, `solarize` bool `[n, 2]`; `blur_sigma` float `[n, 2]`, in pixels.

    Raises:
        UserError: the options do not fit the images.
    """

    def __init__(self, options: TwoCrops, run: RunInfo) -> None:
        size = options.size or run.image_size
        self.options = options
        self.channels, self.in_size = run.channels, run.image_size
        self.specs = (ViewSpec(size),) * VIEWS
        self.normalize = Normalize("view_generator.two_crops", options.mean, options.std, run)
        self.cropper = geometry.Cropper(run.image_size, size)
        self.blur_kernel = options.blur_kernel or max(3, 2 * (size // 20) + 1)
        self._check(run)
        self.appearance = Appearance(options, run.channels == 3, self.blur_kernel, self.normalize)

    def _check(self, run: RunInfo) -> None:
        colored = [n for n in ("saturation", "hue", "grayscale") if getattr(self.options, n) > 0]
        if run.channels not in (1, 3) and colored:
            raise UserError(
                f"view_generator.two_crops: the images have {run.channels} channels, and {' and '.join(colored)} "
                f"needs RGB or one channel; set {', '.join(f'{n} = 0' for n in colored)}"
            )
        size = self.specs[0].size
        if any(self.options.blur) and self.blur_kernel // 2 >= size:
            raise UserError(
                f"view_generator.two_crops: a blur_kernel of {self.blur_kernel} px does not fit views of {size} px; "
                f"set blur_kernel below {2 * size} or blur = [0.0, 0.0]"
            )

    # ---------------------------------------------------------------- what is random

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        o = self.options
        box = geometry.draw_boxes(n, VIEWS, self.in_size, o.scale, o.ratio, generator)
        u = torch.rand(10, n, VIEWS, generator=generator)
        order = torch.rand(n, VIEWS, 4, generator=generator).argsort(-1)
        jitter = u[0] < o.jitter

        def between(low: float, high: float, unit: Tensor) -> Tensor:
            return low + (high - low) * unit

        def factor(strength: float, unit: Tensor) -> Tensor:
            return torch.where(jitter, between(max(0.0, 1 - strength), 1 + strength, unit), 1.0)

        return {
            "box": box,
            "flip": u[1] < o.flip,
            "jitter": jitter,
            "order": order,
            "brightness": factor(o.brightness, u[2]),
            "contrast": factor(o.contrast, u[3]),
            "saturation": factor(o.saturation, u[4]),
            "hue": torch.where(jitter, between(-o.hue, o.hue, u[5]), 0.0),
            "grayscale": u[6] < o.grayscale,
            "blur": u[7] < torch.tensor(o.blur),
            "blur_sigma": between(*o.blur_sigma, u[8]),
            "solarize": u[9] < torch.tensor(o.solarize),
        }

    # ---------------------------------------------------------------- geometry

    def crop(self, images: Tensor, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        B, *shape = images.shape
        if shape != [self.channels, self.in_size, self.in_size]:
            raise UserError(
                f"view_generator.two_crops: got images of shape {shape}, but the boxes are drawn for "
                f"{[self.channels, self.in_size, self.in_size]}; all images of a run have one shape"
            )
        boxes, flips = parameters["box"].unbind(1), parameters["flip"].unbind(1)
        if torch.compiler.is_compiling() or images.device.type != "cpu":
            return [x.clamp(0.0, 1.0).contiguous() for x in self.cropper(images, boxes, flips)]
        size = self.specs[0].size
        crops = [torch.empty(B, self.channels, size, size) for _ in self.specs]
        for part in geometry.chunks(B, self.channels * max(size, self.in_size) ** 2):
            made = self.cropper(images[part], [b[part] for b in boxes], [f[part] for f in flips])
            for crop, x in zip(crops, made, strict=True):
                torch.clamp(x, 0.0, 1.0, out=crop[part])
        return crops

    def appear(self, crops: Sequence[Tensor], parameters: Mapping[str, Tensor]) -> list[Tensor]:
        return self.appearance(crops, parameters)

    def clean(self, images: Tensor) -> Tensor:
        size = self.specs[0].size
        x = images.float() / 255
        x = x if images.shape[-2:] == (size, size) else geometry.resize(x, size)
        return torch.stack(self.normalize(x.unbind(1)), 1)
