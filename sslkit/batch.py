"""What travels through a training step. No torch at import: only shapes and names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

Pixels: TypeAlias = "Tensor | tuple[Tensor, ...]"
"""Squares, uint8 `[B, C, S, S]`; of a source of originals their crops, V times uint8 `[B, C, s, s]`."""


@dataclass(frozen=True)
class Batch:
    """B images as they lie in the data set, or their crops, and where they came from."""

    images: Pixels
    indices: Tensor
    """int64 `[B]`: positions in the training set."""
    labels: Tensor | None = None
    """int64 `[B]`, or None where the source has none."""


@dataclass(frozen=True)
class ViewSpec:
    """What one view of an image is: its side in pixels, and whether it shows most of the image."""

    size: int
    kind: Literal["global", "local"] = "global"


@dataclass(frozen=True)
class Needs:
    """Which views a loss wants of each branch, as view numbers, so that nothing is computed in vain."""

    projections: tuple[int, ...] = ()
    predictions: tuple[int, ...] = ()
    targets: tuple[int, ...] = ()

    @property
    def online(self) -> tuple[int, ...]:
        """Views that the online branch has to encode."""
        return tuple(sorted({*self.projections, *self.predictions}))


@dataclass
class Branches:
    """What the networks made of V views. Each list has V entries; None where `Needs` left a view out."""

    specs: tuple[ViewSpec, ...]
    embeddings: list[Tensor | None]
    """Backbone features of the online branch, `[B, feature_dim]`."""
    projections: list[Tensor | None]
    """Projector output of the online branch, `[B, d]`."""
    predictions: list[Tensor | None]
    """Predictor output, `[B, d]`; all None in a recipe without a predictor."""
    targets: list[Tensor | None]
    """Projector output of the target branch, `[B, d]`, without gradient; all None without a target."""
    indices: Tensor | None = None
    labels: Tensor | None = None
    views: list[Tensor] = field(default_factory=list)
    """What the online branch saw, `[B, C, h, w]` each, for observers: of the first micro-batch where there are several,
    and empty until the step has ended. Whoever keeps them keeps a batch of images."""

    def detached(self) -> Branches:
        """The same numbers outside the graph, for whoever looks on."""

        def cut(tensors: list[Tensor | None]) -> list[Tensor | None]:
            return [None if t is None else t.detach() for t in tensors]

        return Branches(
            self.specs,
            cut(self.embeddings),
            cut(self.projections),
            cut(self.predictions),
            cut(self.targets),
            self.indices,
            self.labels,
            [v.detach() for v in self.views],
        )


@dataclass
class LossTerms:
    """What a loss returns: the scalar to minimise, and named scalars that explain it."""

    total: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)


def joined(branches: list[Branches]) -> Branches:
    """The branches of micro-batches as if they were one batch."""
    if len(branches) == 1:
        return branches[0]
    import torch

    def cat(name: str) -> list[Tensor | None]:
        views = zip(*(getattr(b, name) for b in branches), strict=True)
        return [None if parts[0] is None else torch.cat(parts) for parts in views]

    def cat_one(name: str) -> Tensor | None:
        parts = [getattr(b, name) for b in branches]
        return None if parts[0] is None else torch.cat(parts)

    return Branches(
        branches[0].specs,
        cat("embeddings"),
        cat("projections"),
        cat("predictions"),
        cat("targets"),
        cat_one("indices"),
        cat_one("labels"),
        branches[0].views,
    )


def mean_of(terms: list[LossTerms]) -> LossTerms:
    """The mean over micro-batches, outside the graph."""
    import torch

    total = torch.stack([t.total.detach() for t in terms]).mean()
    names = terms[0].terms
    return LossTerms(total, {name: torch.stack([t.terms[name].detach() for t in terms]).mean() for name in names})
