"""What BYOL does to a crop's colours, for a whole batch: jitter, grey, blur, solarize, normalise.

Two ways lead to the same views. On a CPU, samples that need the same operations are brought together, and nothing is
computed in vain. Compiled, or on a GPU, every operation runs on every sample with a parameter that changes nothing
where it is off, so that shapes never depend on data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sslkit_crops import color, geometry
from sslkit_crops.normalize import Normalize

if TYPE_CHECKING:
    from sslkit_crops import TwoCrops

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
NO_JITTER = 4
"""Where hue comes in the order of a sample that is not jittered."""
TURNS, TAPS = 9, 13
"""Columns of `settings`: keep, gray and mean of three blends, hue in each of four places, taps of the blur."""


class Appearance:
    """Makes crops into views.

    Args:
        options: The view generator's.
        colored: Whether the images have three channels; others have no hue.
        blur_kernel: Size of the blur's kernel, in pixels, odd.
        normalize: Applied last.
    """

    def __init__(self, options: TwoCrops, colored: bool, blur_kernel: int, normalize: Normalize) -> None:
        self.options, self.blur_kernel, self.normalize = options, blur_kernel, normalize
        self.hue = options.hue if colored else 0.0

    def __call__(self, crops: list[Tensor], parameters: Mapping[str, Tensor]) -> list[Tensor]:
        """Crops float 0..1 `[B, C, h, w]` -> views; `parameters` as `TwoCropsMaker` describes them."""
        grouped = crops[0].device.type == "cpu" and not torch.compiler.is_compiling()
        make = self._grouped if grouped else self._static
        settings = self._settings(parameters)
        masks = {name: parameters[name] for name in ("jitter", "grayscale", "blur", "solarize")}
        return [make(x, settings[:, v], {n: m[:, v] for n, m in masks.items()}, v) for v, x in enumerate(crops)]

    def _settings(self, p: Mapping[str, Tensor]) -> Tensor:
        """Numbers per sample and view as the colour operations take them: float `[n, 2, columns]`.

        They are one tensor because a compiler would otherwise work them out again at every pixel.
        """
        order = p["order"]
        place = order.eq(HUE).long().argmax(-1, keepdim=True)
        slots = torch.arange(4, device=order.device)
        operation = order.gather(-1, slots[:3] + (place <= slots[:3]))
        keep = torch.stack([p["brightness"], p["contrast"], p["saturation"]], -1).gather(-1, operation)
        gray, mean = ((1 - keep) * (operation == kind) for kind in (SATURATION, CONTRAST))
        turns = p["hue"][..., None] * (place == slots)
        taps = color.gaussian_taps(p["blur_sigma"], self.blur_kernel)
        neutral = (torch.arange(taps.shape[-1], device=order.device) == 0).to(taps.dtype)
        taps = torch.where(p["blur"][..., None], taps, neutral)
        return torch.cat([keep, gray, mean, turns, taps], -1)

    def _jitter(self, x: color.Channels, s: Tensor, hue_slots: range) -> color.Channels:
        column = s[:, :, None, None].unbind(1)
        for slot in range(4):
            if self.hue > 0 and slot in hue_slots:
                x = color.shift_hue(x, column[TURNS + slot], self.hue)
            if slot < 3:
                x = color.blend(x, *column[slot:TURNS:3])
        return x

    def _static(self, crop: Tensor, s: Tensor, on: Mapping[str, Tensor], v: int) -> Tensor:
        o = self.options
        mask = {name: m[:, None, None] for name, m in on.items()}
        x: color.Channels = crop.unbind(1)
        if o.jitter > 0:
            x = self._jitter(x, s, range(4))
        if o.grayscale > 0:
            gray = color.grayscale(x)
            x = [torch.where(mask["grayscale"], gray, channel) for channel in x]
        if o.blur[v] > 0:
            x = color.gaussian_blur(x, s[:, TAPS:])
        if o.solarize[v] > 0:
            pairs = zip(x, color.solarize(x, o.solarize_threshold), strict=True)
            x = [torch.where(mask["solarize"], inverted, channel) for channel, inverted in pairs]
        return torch.stack(self.normalize(x), 1)

    def _grouped(self, crop: Tensor, s: Tensor, on: Mapping[str, Tensor], v: int) -> Tensor:
        B, C, h, w = crop.shape
        place = s[:, TURNS:TAPS].ne(0).long().argmax(-1) 
        out = torch.empty(B, C, h, w)
        return out
