"""BYOL's two views of a batch: geometry first, then appearance, every parameter drawn per sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sslkit.api import RunInfo
from sslkit.batch import ViewSpec
from sslkit.errors import UserError
from sslkit_crops import color, geometry
from sslkit_crops.normalize import Normalize

if TYPE_CHECKING:
    from sslkit_crops import TwoCrops

VIEWS = 2
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


class TwoCropsMaker:
    """Meets `sslkit.api.ViewMaker`.

    Parameters of n samples, dimension 1 being the view:

    - `box` int64 `[n, 2, 4]`: top, left, height, width of the crop in pixels; `flip` bool `[n, 2]`.
    - `jitter` bool `[n, 2]`; `brightness`, `contrast`, `saturation` (factors) and `hue` (turns) float `[n, 2]`, which
      change nothing where `jitter` is false; `order` int64 `[n, 2, 4]`: which of the four comes first, second, ...
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
        B, C, H, W = images.shape
        if H != self.in_size or W != self.in_size or C != self.channels:
            raise UserError(
                f"view_generator.two_crops: got images of {C} x {H} x {W}, but the boxes are drawn for "
                f"{self.channels} x {self.in_size} x {self.in_size}; all images of a run have one shape"
            )
        size = self.specs[0].size
        box, flip = parameters["box"], parameters["flip"]
        if torch.compiler.is_compiling() or images.device.type != "cpu":
            x = images.float() / 255
            return [self.cropper(x, box[:, v], flip[:, v]) for v in range(VIEWS)]
        crops = [torch.empty(B, C, size, size) for _ in range(VIEWS)]
        for part in geometry.chunks(B, C * max(size, H) ** 2):
            x = images[part].float().div_(255)
            for v in range(VIEWS):
                crops[v][part] = self.cropper(x, box[part, v], flip[part, v])
        return crops

    # ---------------------------------------------------------------- appearance

    def appear(self, crops: Sequence[Tensor], parameters: Mapping[str, Tensor]) -> list[Tensor]:
        grouped = crops[0].device.type == "cpu" and not torch.compiler.is_compiling()
        make = self._appear_grouped if grouped else self._appear_static
        settings = self._settings(parameters)
        return [make(crop, settings[:, v], {n: p[:, v] for n, p in parameters.items()}, v) for v, crop in enumerate(crops)]

    def clean(self, images: Tensor) -> Tensor:
        size = self.specs[0].size
        x = images.float() / 255
        return self.normalize(x if images.shape[-2:] == (size, size) else geometry.resize(x, size))

    def _settings(self, p: Mapping[str, Tensor]) -> Tensor:
        """Numbers per sample as the colour operations take them, in one tensor `[n, 2, 14]` (see `_Settings`).

        One tensor, because a compiler would otherwise work them out again at every pixel.
        """
        order, hue = p["order"], p["hue"][..., None]
        at = order.eq(HUE).long().argmax(-1, keepdim=True)
        slots = torch.arange(3, device=order.device)
        operation = order.gather(-1, slots + (at <= slots))
        keep = torch.stack([p["brightness"], p["contrast"], p["saturation"]], -1).gather(-1, operation)
        gray, mean = ((1 - keep) * (operation == kind) for kind in (SATURATION, CONTRAST))
        turns = hue * (at == torch.arange(4, device=order.device))
        return torch.cat([keep, gray, mean, turns, p["blur_sigma"][..., None]], -1)

    def _appear_static(self, crop: Tensor, s: Tensor, p: Mapping[str, Tensor], v: int) -> Tensor:
        """Every operation on every sample, with a neutral parameter where it is off: shapes never depend on data."""
        o = self.options
        x = crop.transpose(0, 1)
        if o.jitter > 0:
            x = self._jitter(x.clone(), s, range(4))
        if o.grayscale > 0:
            x = torch.where(_each(p["grayscale"]), color.grayscale(x), x)
        if o.blur[v] > 0:
            taps = color.gaussian_taps(s[:, 13], self.blur_kernel)
            off = [float(k == 0) for k in range(len(taps))]
            taps = [torch.where(p["blur"], tap, neutral) for tap, neutral in zip(taps, off, strict=True)]
            x = color.gaussian_blur(x, [_each(tap) for tap in taps])
        if o.solarize[v] > 0:
            x = torch.where(_each(p["solarize"]), color.solarize(x, o.solarize_threshold), x)
        return self.normalize(x.transpose(0, 1))

    def _jitter(self, x: Tensor, s: Tensor, hue_slots) -> Tensor:
        for slot in range(4):
            if slot in hue_slots and self._hue_acts():
                x = color.shift_hue(x, _each(s[:, 9+slot]), self.options.hue)
            if slot < 3:
                x = color.blend_(x, *(_each(s[:, slot + k]) for k in (0, 3, 6)))
        return x

    def _hue_acts(self) -> bool:
        return self.options.hue > 0 and self.channels == 3

    def _appear_grouped(self, crop: Tensor, s: Tensor, p: Mapping[str, Tensor], v: int) -> Tensor:
        """The same, doing only what each sample needs: samples are sorted so that one slice needs one thing."""
        o = self.options
        B, C, h, w = crop.shape
        at = torch.where(p["jitter"], p["order"].eq(HUE).long().argmax(-1) if self._hue_acts() else 0, 4)
        gray, solar = p["grayscale"].long(), p["solarize"].long()
        # Within a group: neither, solarized, both, grey. So the solarized lie together, and the grey too.
        key = at * 4 + 2 * gray + (gray ^ solar)
        order = key.argsort()
        out = torch.empty_like(crop)
        s = s[order]; blur=p["blur"][order]
        planes = crop.reshape(B * C, h, w)
        rows = order * C + torch.arange(C)[:,None]
        counts = key.bincount(minlength=20).view(5, 4).tolist()
        start = 0
        for position, count in enumerate(counts):
            n = sum(count)
            for part in geometry.chunks(n, C * h * w):
                lo, hi = start + part.start, start + part.stop
                m = hi - lo
                if not m: continue
                x = planes.index_select(0, rows[:, lo:hi].reshape(-1)).view(C, m, h, w)
                if position < 4:
                    x = self._jitter(x, s[lo:hi], (position,))
                g = max(0, min(m, count[0] + count[1] - part.start))
                if g < m:
                    x[:, g:] = color.grayscale(x[:, g:])
                if o.blur[v] > 0:
                    on = blur[lo:hi].nonzero().squeeze(1)
                    taps = [_each(t) for t in color.gaussian_taps(s[lo:hi,13][on], self.blur_kernel)]
                    if len(on)==m: x = color.gaussian_blur(x, taps)
                    elif len(on): x[:, on] = color.gaussian_blur(x[:, on], taps)
                a, b = (max(0, min(m, c - part.start)) for c in (count[0], sum(count[:3])))
                if a < b:
                    x[:, a:b] = color.solarize(x[:, a:b], o.solarize_threshold)
                self.normalize.in_place(x)
                out.numpy()[order[lo:hi].numpy()] = x.transpose(0, 1).numpy()
            start += n
        return out


def _each(parameter: Tensor) -> Tensor:
    return parameter[:, None, None]
