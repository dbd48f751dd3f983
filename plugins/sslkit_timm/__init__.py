"""Backbones from timm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from sslkit.api import Backbone, Portable, Pretrained, RunInfo

if TYPE_CHECKING:
    from torch import nn


class Timm(Backbone):
    """Any image model of timm (PyTorch Image Models), without its classifier.

    Features are the pooled ones that the classifier would take; `feature_dim` is their width (512 for ResNet-18). The
    first layer takes as many channels as the images have. Models made for one image size (vision transformers) are
    built for the size of the views; where views differ in size, for the largest, with position embeddings resampled
    for the others (`dynamic_img_size`, in those models that have it).

    `stem = "small_image"` is the CIFAR variant of a ResNet (SimCLR, Chen et al. 2020, appendix B.9): a 3x3 convolution
    of stride 1 and no max-pool. The usual stem (7x7, stride 2, then max-pool) divides the side by 4 before the first
    block, so that at 32 px the last stage sees a single cell; with the small one it sees 4x4.
    """

    model: str = "resnet18"
    """Name of the model in timm, `resnet18` or `vit_tiny_patch16_224`; with a tag for one set of pretrained weights."""
    pretrained: bool = False
    """Start from timm's weights, downloaded at first use. `stem = "small_image"` still starts a new 3x3 stem."""
    stem: Literal["default", "small_image"] = "default"
    """`small_image`: 3x3 convolution of stride 1 and no max-pool, for pictures of up to 64 px; ResNets only."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Rate of stochastic depth in the last block, rising to it from 0 in the first; without it, the model's own."""

    def build(self, run: RunInfo) -> nn.Module:
        from sslkit_timm.models import build

        return build(self, run)

    def portable(self, run: RunInfo) -> Portable:
        from sslkit_timm.elsewhere import portable

        return portable(self, run)

    def pretrained_weights(self, name: str, run: RunInfo) -> Pretrained:
        """The weights that timm has under a name, for the network that `build` makes.

        `name` is of the same architecture: with a tag, `resnet50.a1_in1k`; or `local-dir:FOLDER`, `hf-hub:OWNER/NAME`.
        What the weights were not made for is adapted as timm does it: a first layer for other than 3 channels (kernels
        summed for one, repeated for more), position embeddings for another size. `stem = "small_image"` still starts
        a new 3x3 stem, drawn from torch's default generator.
        """
        from sslkit_timm.elsewhere import pretrained_weights

        return pretrained_weights(self, name, run)
