"""An encoder that takes plain pictures: the preparation of the run's images inside the network, as numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslkit import randomness
from sslkit.api import Portable
from sslkit.encoder import encoder_of
from sslkit.errors import RunFailed, UserError
from sslkit.features import normalisation
from sslkit.opened_run import OpenedRun

PIXELS = 1e-5
"""How far normalised pixels may be from the run's own, as a share of the largest."""

IMAGES = 8
"""How many images features are compared on."""


@dataclass(frozen=True)
class Preparation:
    """What is done to a picture before the network: `(pixels - mean) / std`, with pixels on the scale 0..1."""

    channels: int
    size: int
    """Side in pixels of the squares that the run's figures were measured on."""
    raw: int
    """Side of the squares that are made of files, which the view generator resizes to `size`."""
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalise(self, pixels: Tensor) -> Tensor:
        """Float `[N, C, H, W]` on the scale 0..1, normalised."""
        mean, std = (pixels.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (pixels - mean) / std

    def resize(self, pixels: Tensor) -> Tensor:
        """Float `[N, C, raw, raw]` on the scale 0..1 as `size` squares, in the way of sslkit's own views."""
        size = (self.size, self.size)
        return F.interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp(0, 1)


def preparation_of(opened: OpenedRun) -> Preparation:
    """How a run prepares images for evaluation, as a mean and a spread for each channel.

    Raises:
        UserError: its view generator does something else to them.
    """
    channels, side = opened.info.channels, opened.info.image_size
    cleaned = opened.views.clean(torch.zeros(1, channels, side, side, dtype=torch.uint8))
    height, width = cleaned.shape[-2:]
    found = normalisation(opened.views, (channels, width, width)) if height == width else None
    if found is not None:
        black, span = (values.flatten().tolist() for values in found)
        mean = tuple(_shortest(-b / s) for b, s in zip(black, span, strict=True))
        made = Preparation(channels, width, side, mean, tuple(_shortest(1 / s) for s in span))
        # The same for each pixel, too: constant pictures would not show a crop.
        pictures = pictures_of(made, made.size)
        wanted, got = opened.views.clean(pictures), made.normalise(pictures.float() / 255)
        if wanted.shape == got.shape and difference(wanted, got) <= PIXELS:
            return made
    use = opened.tables["view_generator"]["use"]
    raise UserError(
        f"{opened.run}: its view generator {use!r} prepares images by more than a mean and a spread for each channel, "
        "which no exported file can say; use sslkit.load_encoder, or compute features with sslkit embed"
    )


def _shortest(value: float) -> float:
    """The number that was meant: 0.4914, not what float32 makes of it."""
    rounded = (round(value, digits) + 0.0 for digits in range(3, 10))  # + 0.0: without a minus before nothing
    return next((short for short in rounded if abs(short - value) <= 1e-7 * abs(value)), value)


@dataclass(frozen=True)
class Job:
    """What is to be written of which run, and how."""

    opened: OpenedRun
    preparation: Preparation
    known: Portable | None
    """How a public library builds the network."""
    formats: tuple[str, ...]
    side: int
    """Of the images that graphs take."""
    opset: int | None
    name: str
    licence: str
    """Empty where none was given."""


class Prepared(nn.Module):
    """Float32 `[N, C, S, S]` on the scale 0..1 -> features `[N, D]`, in eval mode, with its own copy of the weights."""

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, preparation: Preparation) -> None:
        super().__init__()
        # Channels last is a matter of speed where it was trained, and would be traced as part of the network.
        self.backbone = copy.deepcopy(backbone).to(memory_format=torch.contiguous_format)
        self.register_buffer("mean", torch.tensor(preparation.mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(preparation.std).view(-1, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Features of images on the scale 0..1."""
        features: Tensor = self.backbone((images - self.mean) / self.std)
        return features


# ---------------------------------------------------------------- comparing


@dataclass(frozen=True)
class Check:
    """A file that was read back, and how far its features were from the run's own."""

    file: str
    read_by: str
    """`timm.create_model, timm 1.0.31`."""
    images: int
    largest_difference: float
    """Of a feature, as a share of the largest feature."""
    allowed: float

    @property
    def words(self) -> str:
        """The check in one line."""
        return (
            f"{self.file}: read by {self.read_by}; features of {self.images} images differ by at most "
            f"{self.largest_difference:.1e} of the largest (allowed {self.allowed:.0e})"
        )


@dataclass(frozen=True)
class Reference:
    """Pictures, and the features that whatever is written has to give for them."""

    pictures: Tensor
    """uint8 `[N, C, S, S]`."""
    features: Tensor
    """float32 `[N, D]`."""

    @property
    def pixels(self) -> Tensor:
        """The pictures on the scale 0..1."""
        return self.pictures.float() / 255

    def check(self, file: str, read_by: str, allowed: float, compute: Callable[[Tensor], Tensor]) -> Check:
        """Compare the features that `compute` gives for the pictures on the scale 0..1.

        Batches of one and of five are asked for, since a graph may be tied to the size that it was traced with.

        Raises:
            RunFailed: they are others.
        """
        pixels = self.pixels
        with torch.no_grad():
            got = torch.cat([compute(part).float() for part in pixels.split([1, 5, len(pixels) - 6])])
        same = got.shape == self.features.shape
        found = Check(file, read_by, len(pixels), difference(self.features, got) if same else float("inf"), allowed)
        if not found.largest_difference <= allowed:  # nor NaN
            shapes = "" if same else f" (of the shape {list(got.shape)}, not {list(self.features.shape)})"
            raise RunFailed(f"what was written to {found.words}{shapes}; nothing was kept")
        return found


def pictures_of(preparation: Preparation, side: int) -> Tensor:
    """uint8 `[IMAGES, C, side, side]`, the same each time: coarse patches, and as many of noise."""
    keyed = randomness.generator(0, "export")
    fine = torch.randint(0, 256, (IMAGES // 2, preparation.channels, side, side), generator=keyed)
    patches = torch.randint(0, 256, (IMAGES // 2, preparation.channels, 4, 4), generator=keyed)
    cell = torch.arange(side) * 4 // side
    return torch.cat([patches[:, :, cell][:, :, :, cell], fine]).to(torch.uint8)


def reference(opened: OpenedRun, preparation: Preparation, side: int) -> Reference:
    """Features of images of one size: those of the run's encoder, where it is the size that it was measured with.

    Raises:
        UserError: the network takes no images of this size.
        RunFailed: its features are not finite.
    """
    pictures = pictures_of(preparation, side)
    if side == preparation.size:
        features = encoder_of(opened).features(pictures)
    else:
        try:
            with torch.no_grad():
                features = Prepared(opened.backbone, preparation)(pictures.float() / 255)
        except (ValueError, RuntimeError, AssertionError) as error:
            line = str(error).strip().partition("\n")[0]
            raise UserError(f"size: the run's network takes no images of {side} px: {line}; leave it out for "
                            f"{preparation.size}") from error  # fmt: skip
    if not bool(features.isfinite().all()):
        raise RunFailed(f"{opened.run}: the features at step {opened.step} are not finite; there is nothing to export")
    return Reference(pictures, features)


def difference(wanted: Tensor, got: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    largest = float(wanted.abs().max())
    return float((wanted - got).abs().max()) / (largest if largest > 0 else 1.0)
