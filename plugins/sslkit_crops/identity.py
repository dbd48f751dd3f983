"""Views that are the image itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sslkit.api import RunInfo
from sslkit.batch import ViewSpec
from sslkit_crops import cutting
from sslkit_crops.normalize import Normalize

if TYPE_CHECKING:
    from sslkit_crops import Identity


class IdentityMaker:
    """Meets `sslkit.api.OriginalViewMaker`; it has no parameters to draw."""

    def __init__(self, options: Identity, run: RunInfo) -> None:
        self.specs = (ViewSpec(run.image_size),) * options.views
        self.normalize = Normalize("view_generator.identity", None, None, run)

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {}

    def draw_sized(self, sizes: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return {}

    def cut(self, original: Tensor, row: Mapping[str, Tensor]) -> list[Tensor]:
        return [cutting.cut(original, cutting.central_square(original), self.specs[0].size)] * len(self.specs)

    def crop(self, images: Tensor, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        return [images.float().div(255) for _ in self.specs]

    def appear(self, crops: Sequence[Tensor], parameters: Mapping[str, Tensor]) -> list[Tensor]:
        return [torch.stack(self.normalize(crop.unbind(1)), 1) for crop in crops]

    def clean(self, images: Tensor) -> Tensor:
        return torch.stack(self.normalize(images.float().div(255).unbind(1)), 1)
