"""What is done to a crop's colours, for a whole batch: jitter, grey, blur, solarize, normalise.

Two ways lead to the same views. On a CPU, samples that need the same operations are brought together, and nothing is
computed in vain. Compiled, or on a GPU, every operation runs on every sample with a parameter that changes nothing
where it is off, so that shapes never depend on data.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sslkit_crops import color, geometry
from sslkit_crops.normalize import Normalize

if TYPE_CHECKING:
    from sslkit_crops import ViewOptions

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
NO_JITTER = 4
"""Where hue comes in the order of a sample that is not jittered."""
BLENDS = 6
"""Three blends before the hue is turned and three after; each sample needs three of them, the others change nothing."""
TURNS, PLACE, TAPS = 3 * BLENDS, 3 * BLENDS + 1, 3 * BLENDS + 2
"""Columns of `settings`: keep, gray and mean of each blend, then hue, its place in the order, the taps of the blur."""


class Appearance:
    """Makes crops into views, all of them with the same options.

    Args:
        options: What is done to the views; an operation of probability 0 costs nothing.
        colored: Whether the images have three channels; others have no hue.
        blur_kernel: Size of the blur's kernel, in pixels, odd.
        normalize: Applied last.
    """

    def __init__(self, options: ViewOptions, colored: bool, blur_kernel: int, normalize: Normalize) -> None:
        self.options, self.blur_kernel, self.normalize = options, blur_kernel, normalize
        self.hue = options.hue if colored else 0.0
        self.changes = any((options.jitter, options.grayscale, options.blur, options.solarize))

    def __call__(self, crops: Sequence[Tensor], parameters: Mapping[str, Tensor]) -> list[Tensor]:
        """k crops float 0..1 `[B, C, h, w]` -> k views; `parameters` `[B, k, ...]` as `CropsMaker` describes them."""
        if not self.changes:
            return [torch.stack(self.normalize(x.unbind(1)), 1) for x in crops]
        settings = self._settings(parameters)
        masks = {name: parameters[name] for name in ("jitter", "grayscale", "blur", "solarize")}
        if crops[0].device.type == "cpu" and not torch.compiler.is_compiling():
            return [
                self._grouped(x, settings[:, v], {n: m[:, v] for n, m in masks.items()}) for v, x in enumerate(crops)
            ]
        # As one batch: twenty patches take as many kernels, and as long to compile, as one.
        x = crops[0] if len(crops) == 1 else torch.cat(list(crops))
        views = self._static(x, _one_batch(settings), {name: _one_batch(m) for name, m in masks.items()})
        return list(views.chunk(len(crops)))

    def _settings(self, p: Mapping[str, Tensor]) -> Tensor:
        """Numbers per sample and view as the colour operations take them: float `[n, k, columns]`.

        They are one tensor because a compiler would otherwise work them out again at every pixel.
        """
        order = p["order"]
        slots = torch.arange(3, device=order.device)
        place = order.eq(HUE).long().argmax(-1, keepdim=True)
        operation = order.gather(-1, slots + (place <= slots))
        keep = torch.stack([p["brightness"], p["contrast"], p["saturation"]], -1).gather(-1, operation)
        if self.hue == 0:
            place = torch.full_like(place, 3)
        first = slots < place
        keep = torch.cat([torch.where(first, keep, 1.0), torch.where(first, 1.0, keep)], -1)
        kind = torch.cat([operation, operation], -1)
        gray, mean = (1 - keep) * (kind == SATURATION), (1 - keep) * (kind == CONTRAST)
        columns = [keep, gray, mean, p["hue"][..., None], place.to(keep.dtype)]
        if self.options.blur > 0:
            taps = color.gaussian_taps(p["blur_sigma"], self.blur_kernel)
            neutral = (torch.arange(taps.shape[-1], device=order.device) == 0).to(taps.dtype)
            columns.append(torch.where(p["blur"][..., None], taps, neutral))
        return torch.cat(columns, -1)

    def _jitter(self, x: color.Channels, s: Tensor, before: range, after: range) -> color.Channels:
        column = s[:, :, None, None].unbind(1)
        for blend in before:
            x = color.blend(x, *column[blend:TURNS:BLENDS])
        if self.hue > 0:
            x = color.shift_hue(x, column[TURNS], self.hue)
            for blend in after:
                x = color.blend(x, *column[blend:TURNS:BLENDS])
        return x

    def _static(self, crop: Tensor, s: Tensor, on: Mapping[str, Tensor]) -> Tensor:
        o = self.options
        mask = {name: m[:, None, None] for name, m in on.items()}
        x: color.Channels = crop.unbind(1)
        if o.jitter > 0:
            x = self._jitter(x, s, range(3), range(3, BLENDS))
        if o.grayscale > 0:
            gray = color.grayscale(x)
            x = [torch.where(mask["grayscale"], gray, channel) for channel in x]
        if o.blur > 0:
            x = color.gaussian_blur(x, s[:, TAPS:])
        if o.solarize > 0:
            pairs = zip(x, color.solarize(x, o.solarize_threshold), strict=True)
            x = [torch.where(mask["solarize"], inverted, channel) for channel, inverted in pairs]
        return torch.stack(self.normalize(x), 1)

    def _grouped(self, crop: Tensor, s: Tensor, on: Mapping[str, Tensor]) -> Tensor:
        o = self.options
        B, C, h, w = crop.shape
        planes, views = crop.reshape(B * C, h, w), torch.empty(B, C, h, w)
        group = torch.where(on["jitter"], s[:, PLACE].long(), NO_JITTER)
        for place, members in enumerate(group.argsort().split(group.bincount(minlength=5).tolist())):
            for part in geometry.chunks(len(members), C * h * w):
                index = members[part]
                rows = index * C + torch.arange(C)[:, None]
                x: color.Channels = planes.index_select(0, rows.view(-1)).view(C, -1, h, w).unbind(0)
                if place != NO_JITTER:
                    x = self._jitter(x, s[index], range(place), range(3 + place, BLENDS))
                if o.grayscale > 0:
                    x = _where(on["grayscale"][index], x, lambda y, _: [color.grayscale(y)] * len(y))
                if o.blur > 0:
                    x = _where(on["blur"][index], x, functools.partial(_blur, s[index, TAPS:]))
                if o.solarize > 0:
                    x = _where(on["solarize"][index], x, lambda y, _: color.solarize(y, o.solarize_threshold))
                # NumPy copies whole rows where index_copy_ goes value by value, three times as slow.
                for c, channel in enumerate(self.normalize(x)):
                    views.numpy()[index.numpy(), c] = channel.numpy()
        return views


def _one_batch(values: Tensor) -> Tensor:
    """`[n, k, ...]` -> `[k * n, ...]`, view after view."""
    return values.transpose(0, 1).flatten(0, 1)


def _blur(taps: Tensor, x: color.Channels, chosen: Tensor) -> list[Tensor]:
    return color.gaussian_blur(x, taps[chosen])


def _where(on: Tensor, x: color.Channels, change: Callable[[color.Channels, Tensor], color.Channels]) -> color.Channels:
    """Change the samples that are `on`, in place unless they are all; `change` is given them and their positions."""
    chosen = on.nonzero().squeeze(1)
    if len(chosen) == len(on):
        return change(x, chosen)
    if len(chosen) > 0:
        for channel, changed in zip(x, change([c.index_select(0, chosen) for c in x], chosen), strict=True):
            channel[chosen] = changed
    return x
