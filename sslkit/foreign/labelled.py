"""kNN accuracy of the backbone of anybody's loop, on labelled images that are given as tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sslkit.errors import UserError
from sslkit.features import CHUNK, in_eval_mode, knn_record

TEMPERATURE = 0.1


class Labelled:
    """Training images to search in, and test images to classify.

    Args:
        tensors: Training images and their labels, test images and theirs; images `[N, C, H, W]`, labels int `[N]`.
        transform: Makes some of the images what the backbone takes; it has to for images of integers.
        k: Neighbours that vote.
        say: Prints a line.

    Raises:
        UserError: the tensors do not go together.
    """

    def __init__(
        self,
        tensors: tuple[Tensor, Tensor, Tensor, Tensor],
        transform: Callable[[Tensor], Tensor] | None,
        k: int,
        say: Callable[[str], None],
    ) -> None:
        if len(tensors) != 4 or not all(isinstance(part, Tensor) for part in tensors):
            raise UserError(
                "watch: labelled should be four tensors: training images and labels, test images and labels"
            )
        self.bank, self.bank_labels, self.queries, self.query_labels = tensors
        for what, images, labels in (
            ("training", self.bank, self.bank_labels),
            ("test", self.queries, self.query_labels),
        ):
            if images.ndim != 4 or labels.ndim != 1 or len(images) != len(labels) or not len(images):
                shapes = f"{tuple(images.shape)} and {tuple(labels.shape)}"
                raise UserError(f"watch: labelled: {what} images [N, C, H, W] and labels [N] are wanted, not {shapes}")
            if not images.is_floating_point() and transform is None:
                raise UserError(
                    f"watch: labelled: {what} images are {images.dtype}; give transform=, or normalised images"
                )
        self.transform, self.k, self.say = transform, k, say
        self.broken = False
        """Whether the backbone turned out not to give features."""
        if k >= len(self.bank):
            say(f"kNN: k = {k} of {len(self.bank)} training images lets all of them vote; make k smaller")

    def measure(self, backbone: nn.Module, width: int | None) -> dict[str, float]:
        """`knn_top1` and how it was measured; nothing if the backbone gives no features.

        Args:
            backbone: the network, whose modes and buffers stay as they are.
            width: of the features that the loop makes of the backbone's maps, where that is known.
        """
        if self.broken:
            return {}
        bank, queries = (self._features(backbone, images, width) for images in (self.bank, self.queries))
        if bank is None or queries is None:
            return {}
        labels, truth = (found.long().to(bank.device) for found in (self.bank_labels, self.query_labels))
        return knn_record(bank, labels, queries, truth, k=self.k, temperature=TEMPERATURE)

    def _features(self, backbone: nn.Module, images: Tensor, width: int | None) -> Tensor | None:
        """float32 `[N, d]`, in eval mode."""
        weight = next(backbone.parameters(), images)
        rows = []
        with in_eval_mode(backbone), torch.autocast(weight.device.type, enabled=False):
            for part in images.split(CHUNK):
                pictures = part.to(weight.device)
                pictures = self.transform(pictures) if self.transform else pictures
                made = backbone(pictures.to(weight.dtype))
                if not isinstance(made, Tensor) or made.ndim not in (2, 4):
                    given = f"a tensor {tuple(made.shape)}" if isinstance(made, Tensor) else f"a {type(made).__name__}"
                    self.say(
                        f"kNN is not measured: the backbone gives {given}; name the part that gives features [B, d]"
                    )
                    self.broken = True
                    return None
                flat = made.flatten(1)
                # Maps of several pixels: flattened if that is what the loop's projector is given, else averaged.
                rows.append((flat if made.ndim == 2 or flat.shape[1] == width else made.mean(dim=(2, 3))).float())
        return torch.cat(rows)
