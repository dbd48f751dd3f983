"""Random views of a batch: geometry first, then appearance, every parameter drawn per sample and view."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sslkit.api import RunInfo
from sslkit.batch import ViewSpec
from sslkit.errors import UserError
from sslkit_crops import cutting, geometry
from sslkit_crops.appearance import Appearance
from sslkit_crops.normalize import Normalize

if TYPE_CHECKING:
    from sslkit_crops import ViewGroup, ViewOptions


class CropsMaker:
    """Meets `sslkit.api.OriginalViewMaker`.

    Parameters of n samples, dimension 1 being the view, of which there are V:

    - `box` int64 `[n, V, 4]`: top, left, height, width of the crop in pixels; `flip` bool `[n, V]`.
    - `jitter` bool `[n, V]`; `brightness`, `contrast`, `saturation` (factors) and `hue` (turns) float `[n, V]`, which
      change nothing where `jitter` is false; `order` int64 `[n, V, 4]`: the four in the order in which they come, as
      0 brightness, 1 contrast, 2 saturation, 3 hue.
    - `grayscale`, `blur`, `solarize` bool `[n, V]`; `blur_sigma` float `[n, V]`, in pixels.

    What a view draws depends on the generator, on V and on the view's own options, not on the other views'.

    Args:
        where: What an error names, such as `view_generator.two_crops`.
        groups: Groups of views in their order, each with what an error of it names.
        mean: Of each channel, or None for the training images'.
        std: Of each channel, or None for the training images'.
        run: The run.

    Raises:
        UserError: the options do not fit the images.
    """

    def __init__(
        self,
        where: str,
        groups: Sequence[tuple[str, ViewGroup]],
        mean: tuple[float, ...] | None,
        std: tuple[float, ...] | None,
        run: RunInfo,
    ) -> None:
        self.where, self.channels, self.in_size = where, run.channels, run.image_size
        # Every group's, each line once: both groups of `two_crops` go by one name.
        if problems := dict.fromkeys(line for place, group in groups for line in self._problems(place, group)):
            raise UserError(*problems)
        self.normalize = Normalize(where, mean, std, run)
        views: list[ViewGroup] = []
        self.appearances: list[tuple[slice, Appearance]] = []
        for _, group in groups:
            part = slice(len(views), len(views) + group.count)
            made = Appearance(group, run.channels == 3, self._blur_kernel(group), self.normalize)
            self.appearances.append((part, made))
            views += [group] * group.count
        self.specs = tuple(ViewSpec(self._size(view), view.kind) for view in views)
        self.croppers = {spec.size: geometry.Cropper(run.image_size, spec.size) for spec in self.specs}
        self.clean_size = next((spec for spec in self.specs if spec.kind == "global"), self.specs[0]).size
        self._prepare_draws(views)

    def _prepare_draws(self, views: Sequence[ViewOptions]) -> None:
        self.boxes = geometry.Boxes([o.scale for o in views], [o.ratio for o in views])
        self.probability = {
            name: torch.tensor([getattr(o, name) for o in views])
            for name in ("jitter", "flip", "grayscale", "blur", "solarize")
        }
        ranges: dict[str, list[geometry.Range]] = {
            name: [(max(0.0, 1 - getattr(o, name)), 1 + getattr(o, name)) for o in views]
            for name in ("brightness", "contrast", "saturation")
        }
        ranges["hue"] = [(-o.hue, o.hue) for o in views]
        ranges["blur_sigma"] = [o.blur_sigma for o in views]
        self.between = {name: geometry.Between(of_views) for name, of_views in ranges.items()}

    def _size(self, group: ViewGroup) -> int:
        return group.size or self.in_size

    def _blur_kernel(self, group: ViewGroup) -> int:
        return group.blur_kernel or max(3, 2 * (self._size(group) // 20) + 1)

    def _problems(self, where: str, group: ViewGroup) -> Iterator[str]:
        colored = [n for n in ("saturation", "hue", "grayscale") if getattr(group, n) > 0]
        if self.channels not in (1, 3) and colored:
            yield (
                f"{where}: the images have {self.channels} channels, and {' and '.join(colored)} "
                f"needs RGB or one channel; set {', '.join(f'{n} = 0' for n in colored)}"
            )
        size, kernel = self._size(group), self._blur_kernel(group)
        if group.blur > 0 and kernel // 2 >= size:
            yield (
                f"{where}: a blur_kernel of {kernel} px does not fit views of {size} px; "
                f"set blur_kernel below {2 * size}, or blur to 0"
            )

    # ---------------------------------------------------------------- what is random

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return self.draw_sized(torch.full((n, 2), self.in_size), generator)

    def draw_sized(self, sizes: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        n, box = len(sizes), self.boxes.draw(sizes, generator)
        u = torch.rand(10, n, len(self.specs), generator=generator)
        order = torch.rand(n, len(self.specs), 4, generator=generator).argsort(-1)
        probability, between = self.probability, self.between
        jitter = u[0] < probability["jitter"]
        return {
            "box": box,
            "flip": u[1] < probability["flip"],
            "jitter": jitter,
            "order": order,
            "brightness": torch.where(jitter, between["brightness"](u[2]), 1.0),
            "contrast": torch.where(jitter, between["contrast"](u[3]), 1.0),
            "saturation": torch.where(jitter, between["saturation"](u[4]), 1.0),
            "hue": torch.where(jitter, between["hue"](u[5]), 0.0),
            "grayscale": u[6] < probability["grayscale"],
            "blur": u[7] < probability["blur"],
            "blur_sigma": between["blur_sigma"](u[8]),
            "solarize": u[9] < probability["solarize"],
        }

    # ---------------------------------------------------------------- geometry

    def crop(self, images: Tensor, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        shape, drawn_for = list(images.shape[1:]), [self.channels, self.in_size, self.in_size]
        if shape != drawn_for:
            raise UserError(
                f"{self.where}: got images of shape {shape}, but the boxes are drawn for {drawn_for}; "
                "all images of a run have one shape"
            )
        boxes, flips = parameters["box"], parameters["flip"]
        with torch.autocast(images.device.type, enabled=False):
            if images.device.type != "cpu":
                return self._crop_by_size(images, boxes, flips)
            if torch.compiler.is_compiling():
                lines = geometry.lines_of(images)
                return [self._cut(v, lines, boxes, flips).contiguous() for v in range(len(self.specs))]
            return self._crop_in_parts(images, boxes, flips)

    def _cut(self, v: int, lines: Tensor, boxes: Tensor, flips: Tensor) -> Tensor:
        """View number v, `[B, C, h, w]`, not contiguous. On a CPU, one view at a time is what fits into its cache."""
        view = slice(v, v + 1)
        return self.croppers[self.specs[v].size](lines, boxes[:, view], flips[:, view]).squeeze(1).clamp_(0.0, 1.0)

    def _crop_in_parts(self, images: Tensor, boxes: Tensor, flips: Tensor) -> list[Tensor]:
        """A few images at a time, and nothing of one before the next."""
        crops = [torch.empty(len(images), self.channels, spec.size, spec.size) for spec in self.specs]
        largest = max(self.in_size, *self.croppers)
        for part in geometry.chunks(len(images), self.channels * largest**2):
            lines = geometry.lines_of(images[part])
            for v, crop in enumerate(crops):
                crop[part] = self._cut(v, lines, boxes[part], flips[part])
        return crops

    def _crop_by_size(self, images: Tensor, boxes: Tensor, flips: Tensor) -> list[Tensor]:
        """All views of one size at once: on a GPU, twenty of them take as many kernels as one."""
        lines = geometry.lines_of(images)
        crops: dict[int, Tensor] = {}
        for size, cropper in self.croppers.items():
            numbers = [v for v, spec in enumerate(self.specs) if spec.size == size]
            of_size = (torch.stack([p[:, v] for v in numbers], 1) for p in (boxes, flips))
            crops |= zip(numbers, cropper(lines, *of_size).clamp_(0.0, 1.0).unbind(1), strict=True)
        return [crops[v].contiguous() for v in range(len(self.specs))]

    def cut(self, original: Tensor, row: Mapping[str, Tensor]) -> list[Tensor]:
        return [
            cutting.cut(original, box, spec.size, flipped)
            for spec, box, flipped in zip(self.specs, row["box"].tolist(), row["flip"].tolist(), strict=True)
        ]

    # ---------------------------------------------------------------- appearance

    def appear(self, crops: Sequence[Tensor], parameters: Mapping[str, Tensor]) -> list[Tensor]:
        return [
            view
            for part, make in self.appearances
            for view in make(crops[part], {name: values[:, part] for name, values in parameters.items()})
        ]

    def clean(self, images: Tensor) -> Tensor:
        size = self.clean_size
        x = images.float() / 255
        x = x if images.shape[-2:] == (size, size) else geometry.resize(x, size)
        return torch.stack(self.normalize(x.unbind(1)), 1)
