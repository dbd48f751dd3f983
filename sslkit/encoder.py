"""A run's encoder, from its directory alone: images in, features out."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from typing import Literal, cast

import torch
from torch import Tensor, nn

from sslkit.errors import UserError
from sslkit.features import in_eval_mode
from sslkit.opened_run import Branch, OpenedRun, open_run

ROUNDING = 0.01
"""How far outside 0..1 float images may be, as resizing makes them."""


class ImageEncoder(nn.Module):
    """The backbone of a run behind the preparation that its images were measured with.

    It is an `nn.Module` in eval mode whose parameters can be trained further. `backbone` alone takes images that are
    normalised already, and gives gradients with respect to them.
    """

    feature_dim: int
    """Width of the features."""
    step: int
    """Updates that the weights have seen."""

    def __init__(
        self,
        backbone: nn.Module,
        prepare: Callable[[Tensor], Tensor],
        *,
        channels: int,
        feature_dim: int,
        step: int,
        channels_last: bool,
    ) -> None:
        super().__init__()
        self.backbone, self._prepare = backbone, prepare
        self.feature_dim, self.step = feature_dim, step
        self._channels, self._channels_last = channels, channels_last

    def forward(self, images: Tensor) -> Tensor:
        """Features `[N, feature_dim]` of raw images `[N, C, H, W]`: uint8, or float on the scale 0..1.

        The images are resized and normalised as the run's view generator does it for evaluation; floats are rounded
        to the 256 levels of a picture first.

        Raises:
            UserError: images of another shape, type or scale.
        """
        pixels = self._pixels(images)
        prepared = self._prepare(pixels)
        if self._channels_last:
            prepared = prepared.contiguous(memory_format=torch.channels_last)
        features: Tensor = self.backbone(prepared)
        return features

    def features(self, images: Tensor, batch_size: int = 500) -> Tensor:
        """The same for many images, float32 on their device: in batches, in eval mode, without gradients."""
        _check_type(images)
        where = next((parameter.device for parameter in self.parameters()), images.device)
        with in_eval_mode(self):
            found = [self(part.to(where)).float().to(images.device) for part in images.split(batch_size)]
        return torch.cat(found)

    def _pixels(self, images: Tensor) -> Tensor:
        _check_type(images)
        if images.ndim != 4 or images.shape[1] != self._channels:
            shape = f"[N, {self._channels}, H, W]"
            raise UserError(f"the encoder takes images of the shape {shape}, not {list(images.shape)}")
        if images.dtype == torch.uint8:
            return images
        if not images.is_floating_point():
            raise UserError(f"the encoder takes images as uint8, or as float on the scale 0..1, not {images.dtype}")
        low, high = (float(value) for value in images.detach().aminmax()) if images.numel() else (0.0, 1.0)
        if not -ROUNDING <= low <= high <= 1 + ROUNDING:
            raise UserError(
                f"the encoder takes float images on the scale 0..1 and normalises them itself; these go from {low:.3g} "
                f"to {high:.3g}"
            )
        return images.clamp(0, 1).mul(255).round().to(torch.uint8)


def _check_type(images: object) -> None:
    if not isinstance(images, Tensor):
        raise UserError(
            f"the encoder takes a tensor, not a {type(images).__name__}; of PIL images of one size: "
            "torch.stack([torchvision.transforms.functional.pil_to_tensor(image) for image in images])"
        )


def load_encoder(
    run_dir: str | PathLike[str],
    branch: Branch = "evaluated",
    checkpoint: Literal["last", "best"] | int = "last",
    *,
    allow_local_code: bool = False,
) -> ImageEncoder:
    """The encoder of a run, on the CPU and in eval mode, from its directory alone: the data need not be there.

    Only the packages of the backbone and the view generator are needed, and reading a checkpoint runs no code of it.

    Args:
        run_dir: The run's directory.
        branch: `evaluated` is the branch that the run's own figures are of, which its target updater names.
        checkpoint: `last`; `best`, that with the highest kNN accuracy; or the number of a step.
        allow_local_code: Let a backbone or view generator run that came from a file beside the recipe.

    Raises:
        UserError: there is no run, no such checkpoint or branch, or a package is missing.
        RunFailed: the checkpoint is damaged.
    """
    return encoder_of(open_run(run_dir, branch, checkpoint, allow_local_code=allow_local_code))


def encoder_of(opened: OpenedRun, backbone: nn.Module | None = None) -> ImageEncoder:
    """The encoder of a run that was opened, or another backbone behind the same preparation."""
    chosen = opened.backbone if backbone is None else backbone
    if opened.channels_last:
        chosen.to(memory_format=torch.channels_last)
    made = ImageEncoder(
        chosen, opened.views.clean, channels=opened.info.channels, feature_dim=cast(int, chosen.feature_dim),
        step=opened.step, channels_last=opened.channels_last,
    )  # fmt: skip
    return made.eval()
