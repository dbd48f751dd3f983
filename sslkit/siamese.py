"""The online and target branches: backbone, projector and predictor, and how a batch goes through them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from sslkit.api import TargetModule
from sslkit.batch import Branches, Needs, ViewSpec
from sslkit.batch_norm import split_batch_norm
from sslkit.nn import precise


class Encoder(nn.Module):
    """Backbone and projector: the part that both branches have."""

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.backbone, self.projector = backbone, projector

    def forward(self, view: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, C, h, w]` -> embedding `[B, feature_dim]`, projection `[B, d]`."""
        embedding = self.backbone(view)
        return embedding, self.projector(embedding)


class Siamese(nn.Module):
    """All networks of a method. State: `online.*`, `predictor.*` and, where it is a second network, `target.*`."""

    def __init__(
        self,
        encoder: Encoder,
        predictor: nn.Module | None,
        updater: TargetModule,
        specs: tuple[ViewSpec, ...],
        needs: Needs,
        forward_views: Literal["separate", "together"] = "separate",
        batch_norm_groups: int = 1,
    ) -> None:
        super().__init__()
        if batch_norm_groups > 1:
            for part, network in (("backbone", encoder.backbone), ("projector", encoder.projector),
                                  ("predictor", predictor)):  # fmt: skip
                if network is not None:
                    split_batch_norm(network, batch_norm_groups, part)
        self.online, self.predictor = encoder, predictor
        self.target = updater.make(encoder)
        self.reuse_online = updater.source == "online"
        self.specs, self.needs, self.together = specs, needs, forward_views == "together"
        self.shuffles = batch_norm_groups > 1 and self.target is not None
        """Whether the target sees the batch in another order, so that no group holds the same images in both branches:
        shuffled BatchNorm (MoCo; He et al. 2020, section 3.3)."""

    def forward(self, views: Sequence[Tensor]) -> Branches:
        """V views `[B, C, h, w]` -> what every branch makes of them."""
        count, needs = len(views), self.needs
        # Where the online projections are the targets, the targets' views go through the online network too.
        wanted = {*needs.online, *needs.targets} if self.reuse_online else needs.online
        encoded = self._each(self.online, views, sorted(wanted))
        embeddings = [None if e is None else e[0] for e in encoded]
        projections = [None if e is None else e[1] for e in encoded]

        predictions: list[Tensor | None] = [None] * count
        if self.predictor is not None:
            predictions = self._each(self.predictor, projections, needs.predictions)

        targets: list[Tensor | None] = [None] * count
        if self.target is not None:
            with torch.no_grad():
                seen = self._each(self._shuffled if self.shuffles else self.target, views, needs.targets)
            targets = [None if s is None else s[1] for s in seen]
        elif self.reuse_online:
            targets = [
                p.detach() if p is not None and view in needs.targets else None for view, p in enumerate(projections)
            ]
        return Branches(
            self.specs, _precise(embeddings), _precise(projections), _precise(predictions), _precise(targets)
        )

    def _shuffled(self, views: Tensor) -> tuple[Tensor, ...]:
        """The target's outputs for views that it is given in a random order, put back into theirs."""
        order = torch.randperm(len(views), device=views.device)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        # Indexing, since index_select would lose the memory layout of the views.
        return tuple(out[back] for out in cast(nn.Module, self.target)(views[order]))

    def _each(self, network: Callable[..., Any], inputs: Sequence[Tensor | None], wanted: Sequence[int]) -> list[Any]:
        """`network` of the wanted inputs: one by one, or all of one shape in one call."""
        outputs: list[Any] = [None] * len(inputs)
        if not self.together:
            for number in wanted:
                outputs[number] = network(inputs[number])
            return outputs
        shapes: dict[torch.Size, list[int]] = {}
        for number in wanted:
            shapes.setdefault(cast(Tensor, inputs[number]).shape, []).append(number)
        for numbers in shapes.values():
            result = network(torch.cat([cast(Tensor, inputs[n]) for n in numbers]))
            parts = (
                zip(*(r.chunk(len(numbers)) for r in result), strict=True)
                if isinstance(result, tuple)
                else result.chunk(len(numbers))
            )
            for number, part in zip(numbers, parts, strict=True):
                outputs[number] = part
        return outputs


def _precise(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else precise(t) for t in tensors]
