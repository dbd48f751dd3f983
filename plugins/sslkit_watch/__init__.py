"""Observers: what is measured while a run goes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from sslkit.api import Observer, RunInfo


class KNN(Observer):
    """Weighted k-nearest-neighbour accuracy on clean images, from step 0 on.

    The random network's figure at step 0 is the floor that every later one is to be read against. Backbone features
    in eval mode, cosine similarity, votes weighted by exp(cosine / temperature) (Wu et al. 2018, arXiv 1805.01978).
    The bank is drawn from the training images and the queries from the test images, both the same for every seed and
    step. Needs labels and test images; says so once and does nothing where there are none.
    """

    every_epochs: PositiveInt = 1
    """Epochs between measurements; the end of the run is always measured."""
    k: PositiveInt = 200
    """Neighbours that vote."""
    temperature: PositiveFloat = 0.1
    """Lower values let the nearest neighbours outweigh the others more."""
    bank: NonNegativeInt = 10_000
    """Training images to search in; 0 takes all."""
    queries: NonNegativeInt = 2_000
    """Test images to classify; 0 takes all."""

    def build(self, run: RunInfo) -> object:
        from .knn import KNNObserver

        return KNNObserver(self)


class Health(Observer):
    """Signs of collapse and drift, measured on features that the training made anyway.

    With every record: `std_sqrt_d` of the online projections, `target_drift` and `target_norm_ratio`. At the end of
    each epoch: `effective_rank` of the backbone features of the newest training views.
    """

    ring: Annotated[int, Field(ge=64)] = 4096
    """How many of the newest training features the rank is measured on; at least 4 times their dimension is sound."""

    def build(self, run: RunInfo) -> object:
        from .health import HealthObserver

        return HealthObserver(self.ring)


class TensorBoard(Observer):
    """Writes every record to TensorBoard files in the run directory (`tensorboard --logdir runs`)."""

    def build(self, run: RunInfo) -> object:
        from .tensorboard import TensorBoardObserver

        return TensorBoardObserver()
