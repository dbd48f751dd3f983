"""A linear probe that learns while the backbone does."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkit.batch import Branches
from sslkit.events import Run, observes
from sslkit.features import chosen

if TYPE_CHECKING:
    from . import Probe


class ProbeObserver:
    """Learns from every batch, and measures at step 0 and after each epoch."""

    def __init__(self, options: Probe) -> None:
        self.options = options
        self.classes = 0
        """0 where nothing can be learned."""
        self.state: dict[str, Tensor] = {}
        self.queries: tuple[Tensor, Tensor] | None = None
        """Test images to classify, and their labels."""

    @observes
    def run_started(self, run: Run) -> None:
        train, test = run.data.train, run.data.test
        if train.labels is None:
            run.say("The probe is not trained: this data source has no labels")
            return
        self.classes = int(train.labels.max()) + 1
        if test is None or test.labels is None:
            run.say("The probe is not measured: this data source has no labelled test images")
            return
        where = chosen(test, self.options.queries)
        where = where[test.labels[where] >= 0]  # -1 is an image without a label
        self.queries = where, test.labels[where]
        if run.step == 0:
            self._measure(run)

    @observes
    def step_ended(self, run: Run, branches: Branches) -> None:
        rows = next((e for e in branches.embeddings if e is not None), None)
        if not self.classes or rows is None or branches.labels is None:
            return
        if not self.state:
            self.state = fresh(rows.shape[1], self.classes)
        self.state = {name: value.to(rows.device) for name, value in self.state.items()}  # restored ones: from a file
        learn(self.state, rows, branches.labels, self.options.lr, self.options.momentum)

    @observes
    def logging(self, record: MutableMapping[str, float | Tensor]) -> None:
        if self.state:
            record["probe_train_top1"] = self.state["right"] / self.state["seen"].clamp_min(1)
            self.state["right"], self.state["seen"] = (torch.zeros_like(self.state[n]) for n in ("right", "seen"))

    @observes
    def epoch_ended(self, run: Run) -> None:
        self._measure(run)

    def _measure(self, run: Run) -> None:
        if self.queries is None:
            return
        where, labels = self.queries
        rows = run.features("test", where, "online")
        state = self.state or fresh(rows.shape[1], self.classes)
        predicted = scores({name: value.to(rows.device) for name, value in state.items()}, rows).argmax(dim=1)
        run.record({"probe_top1": float((predicted == labels.to(rows.device)).float().mean())})

    def state_dict(self) -> dict[str, Any]:
        """Everything that it learned, so that a resumed run's probe goes on."""
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self.state = dict(state)


def fresh(dim: int, classes: int) -> dict[str, Tensor]:
    """A probe that knows nothing: weights, their momentum, statistics of the features, and its record so far."""
    return {
        "weight": torch.zeros(classes, dim), "bias": torch.zeros(classes),
        "weight_momentum": torch.zeros(classes, dim), "bias_momentum": torch.zeros(classes),
        "mean": torch.zeros(dim), "variance": torch.ones(dim),
        "right": torch.zeros(()), "seen": torch.zeros(()),
    }  # fmt: skip


@torch.no_grad()
def learn(state: dict[str, Tensor], rows: Tensor, labels: Tensor, lr: float, momentum: float) -> None:
    """One step on features `[B, d]` and labels int64 `[B]`, in place.

    The gradient of mean cross-entropy with logits W x + b is (p - y) x^T / B for W and the mean of p - y for b, with
    p the softmax and y the one-hot label. By hand it is a dozen small operations, where autograd and an optimizer
    take several times as many: every one of them is a launch that a GPU's step waits for.
    """
    x = F.batch_norm(rows.detach().float(), state["mean"], state["variance"], training=True)
    logits = torch.addmm(state["bias"], x, state["weight"].T)
    known = labels >= 0  # -1 is an image without a label: it counts for nothing, and the shapes stay
    state["right"] += (logits.argmax(dim=1) == labels).sum()
    state["seen"] += known.sum()
    error = logits.softmax(dim=1)
    error.scatter_add_(1, labels.clamp_min(0)[:, None], error.new_full((1, 1), -1.0).expand(len(labels), 1))
    error.mul_(known[:, None])
    state["weight_momentum"].addmm_(error.T, x, beta=momentum, alpha=1 / len(labels))
    state["bias_momentum"].mul_(momentum).add_(error.mean(dim=0))
    state["weight"].sub_(state["weight_momentum"], alpha=lr)
    state["bias"].sub_(state["bias_momentum"], alpha=lr)


def scores(state: dict[str, Tensor], rows: Tensor) -> Tensor:
    """Logits `[N, classes]` of features `[N, d]`, standardised by the running statistics."""
    x = F.batch_norm(rows.float(), state["mean"], state["variance"], training=False)
    return torch.addmm(state["bias"], x, state["weight"].T)
