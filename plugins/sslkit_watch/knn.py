"""Weighted kNN while training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sslkit.events import Run, observes
from sslkit.features import chosen, knn_record

if TYPE_CHECKING:
    from . import KNN


class KNNObserver:
    """Measures at step 0, every few epochs, and at the end."""

    def __init__(self, options: KNN) -> None:
        self.options = options
        self.bank = self.queries = torch.empty(0, dtype=torch.int64)
        self.labels: tuple[Tensor, Tensor] | None = None

    @observes
    def run_started(self, run: Run) -> None:
        train, test = run.data.train, run.data.test
        if test is None or train.labels is None or test.labels is None:
            missing = (
                "no labels" if train.labels is None else "no test images" if test is None else "no labelled test images"
            )
            run.say(f"kNN is not measured: this data source has {missing}")
            return
        # One fixed choice: figures of different seeds and steps then compare.
        self.bank, self.queries = chosen(train, self.options.bank), chosen(test, self.options.queries)
        # -1 is an image without a label.
        self.bank = self.bank[train.labels[self.bank] >= 0]
        self.queries = self.queries[test.labels[self.queries] >= 0]
        self.labels = train.labels[self.bank], test.labels[self.queries]
        if self.options.k >= len(self.bank):
            run.say(
                f"kNN: k = {self.options.k} of a bank of {len(self.bank)} images lets all of them vote; make k smaller"
            )
        if run.step == 0:
            self._measure(run)

    @observes
    def epoch_ended(self, run: Run) -> None:
        epoch = run.step // run.info.steps_per_epoch
        last = run.step == run.info.total_steps
        if self.labels is not None and (epoch % self.options.every_epochs == 0 or last):
            self._measure(run)

    def _measure(self, run: Run) -> None:
        assert self.labels is not None
        bank, queries = run.features("train", self.bank), run.features("test", self.queries)
        bank_labels, query_labels = (labels.to(bank.device) for labels in self.labels)
        run.record(
            knn_record(bank, bank_labels, queries, query_labels, k=self.options.k, temperature=self.options.temperature)
        )
