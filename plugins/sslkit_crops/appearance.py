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
TURNS, PLACE, TAPS = 9, 13, 14
"""Columns of `settings`: keep, gray and mean of three blends, hue in each of four places, its place, the blur's taps."""


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
        return torch.cat([keep, gray, mean, turns, place.to(keep.dtype), taps], -1)

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
        o = self.options
        B, C, h, w = crop.shape
        planes, views = crop.reshape(B * C, h, w), torch.empty(B, C, h, w)
        gray, inverted = on["grayscale"].long(), on["solarize"].long()
        # In this order the grey of a group lie together, and so do the solarized.
        kind = 2 * gray + (gray ^ inverted)
        key = 4 * torch.where(on["jitter"], self._hue_place(s), NO_JITTER) + kind
        order, start = key.argsort(), 0
        for place, (plain, solar, both, rest) in enumerate(key.bincount(minlength=20).view(5, 4).tolist()):
            n = plain + solar + both + rest
            for part in geometry.chunks(n, C * h * w):
                index = order[start + part.start : start + part.stop]
                rows = index * C + torch.arange(C)[:, None]
                x: color.Channels = planes.index_select(0, rows.view(-1)).view(C, -1, h, w).unbind(0)
                if place != NO_JITTER:
                    x = self._jitter(x, s[index], range(place, place + 1))
                some = _overlap(part, plain + solar, n)
                if some.start < some.stop:
                    luma = color.grayscale([channel[some] for channel in x])
                    for channel in x:
                        channel[some] = luma
                if o.blur[v] > 0:
                    x = self._blur_some(x, s[index, TAPS:], on["blur"][index])
                some = _overlap(part, plain, plain + solar + both)
                if some.start < some.stop:
                    new = color.solarize([channel[some] for channel in x], o.solarize_threshold)
                    for channel, changed in zip(x, new, strict=True):
                        channel[some] = changed
                # NumPy copies whole images where index_copy_ goes value by value, three times as slow.
                for c, channel in enumerate(self.normalize(x)):
                    views.numpy()[index.numpy(), c] = channel.numpy()
            start += n
        return views

    def _hue_place(self, s: Tensor) -> Tensor:
        return s[:, PLACE].long()

    def _blur_some(self, x: color.Channels, taps: Tensor, on: Tensor) -> color.Channels:
        chosen = on.nonzero().squeeze(1)
        if len(chosen) == len(on):
            return color.gaussian_blur(x, taps)
        if len(chosen) > 0:
            new = color.gaussian_blur([channel[chosen] for channel in x], taps[chosen])
            for channel, changed in zip(x, new, strict=True):
                channel[chosen] = changed
        return x


def _overlap(part: slice, start: int, stop: int) -> slice:
    """Where `start .. stop` lies within a part, counted from the part's first sample."""
    return slice(max(start - part.start, 0), min(stop, part.stop) - part.start)
