"""Affine changes and light for a whole batch, every parameter drawn per sample and view."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkit.api import RunInfo
from sslkit.batch import ViewSpec
from sslkit.errors import UserError

if TYPE_CHECKING:
    from sslkit_affine import Affine

VIEWS = 2


class AffineMaker:
    """Meets `sslkit.api.ViewMaker`.

    Parameters of n samples, dimension 1 being the view:

    - float `[n, 2]`: `rotation` (degrees, clockwise), `scale` (factor), `shear`; `shift` `[n, 2, 2]` (fractions of
      the side, right and down).
    - `light` float `[n, 2]` and `light_angle` `[n, 2]` (degrees, clockwise from the right): strength and direction.
    - `grayscale` bool `[n, 2]` and `gray_weights` float `[n, 2, C]`, which sum to 1.
    - `contrast` (factor) and `offset` float `[n, 2, C]`.

    Raises:
        UserError: the options do not fit the images.
    """

    def __init__(self, options: Affine, run: RunInfo) -> None:
        self.options, self.channels = options, run.channels
        self.specs = (ViewSpec(run.image_size),) * VIEWS
        for name, values in (("mean", options.mean), ("std", options.std)):
            if values is not None and len(values) != run.channels:
                raise UserError(
                    f"view_generator.affine.{name}: {len(values)} values for images of {run.channels} channels; "
                    "give one per channel"
                )
        self.mean, self.std = options.mean or run.mean, options.std or run.std
        if not all(self.std):
            raise UserError(
                "view_generator.affine: a channel of the training images is constant (its standard deviation is 0); "
                "set std"
            )

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        o, C = self.options, self.channels

        def around(middle: float, reach: float, *shape: int) -> Tensor:
            return middle + reach * (2 * torch.rand(n, VIEWS, *shape, generator=generator) - 1)

        weights = torch.rand(n, VIEWS, C, generator=generator) + 1e-6
        return {
            "rotation": around(0.0, o.rotation),
            "scale": around(1.0, o.scale),
            "shear": around(0.0, o.shear),
            "shift": around(0.0, o.shift, 2),
            "light": around(0.0, o.light),
            "light_angle": around(180.0, 180.0),
            "grayscale": torch.rand(n, VIEWS, generator=generator) < o.grayscale,
            "gray_weights": weights / weights.sum(-1, keepdim=True),
            "contrast": around(1.0, o.contrast, C),
            "offset": around(0.0, o.offset, C),
        }

    def crop(self, images: Tensor, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        x = images.float() / 255
        H, W = images.shape[-2:]
        down, right = _positions(H, images.device)[:, None], _positions(W, images.device)
        crops = []
        for v in range(VIEWS):
            p = {name: parameters[name][:, v, None, None] for name in ("rotation", "scale", "shear")}
            # From a pixel of the view back to the image: undo the shift, the turn, the size and the slant.
            shift = parameters["shift"][:, v, :, None, None]
            angle = torch.deg2rad(p["rotation"])
            cos, sin = torch.cos(angle) / p["scale"], torch.sin(angle) / p["scale"]
            across, along = right - 2 * shift[:, 0], down - 2 * shift[:, 1]
            y = cos * along - sin * across
            grid = torch.stack([cos * across + sin * along + p["shear"] * y, y], -1)
            with torch.autocast(images.device.type, enabled=False):
                crops.append(F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False))
        return crops

    def appear(self, crops: Sequence[Tensor], parameters: Mapping[str, Tensor]) -> list[Tensor]:
        if not self.options.appearance:
            return [self._normalize(crop) for crop in crops]
        views = []
        for v, x in enumerate(crops):
            p = {name: values[:, v] for name, values in parameters.items()}
            x = x * self._light(p, x)
            gray = (x * p["gray_weights"][..., None, None]).sum(1, keepdim=True)
            x = torch.where(p["grayscale"][:, None, None, None], gray, x)
            x = x * p["contrast"][..., None, None] + p["offset"][..., None, None]
            views.append(self._normalize(x))  # not clamped: see Affine
        return views

    def clean(self, images: Tensor) -> Tensor:
        return self._normalize(images.float() / 255)

    @staticmethod
    def _light(p: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """What the values of a picture are multiplied by: `[B, 1, h, w]`, 1 in the middle."""
        down, right = _positions(x.shape[2], x.device)[:, None], _positions(x.shape[3], x.device)
        angle = torch.deg2rad(p["light_angle"])[:, None, None, None]
        return 1 + p["light"][:, None, None, None] * (torch.cos(angle) * right + torch.sin(angle) * down)

    def _normalize(self, x: Tensor) -> Tensor:
        channels = zip(x.unbind(1), self.mean, self.std, strict=True)
        return torch.stack([channel.sub(mean).div_(std) for channel, mean, std in channels], 1)


def _positions(size: int, device: torch.device) -> Tensor:
    """Centres of the pixels of a line, where its ends are -1 and 1."""
    return (torch.arange(size, device=device) * 2 + 1) / size - 1
