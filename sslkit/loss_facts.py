"""What a loss says of itself, and what it does with outputs that were made up: the part of `sslkit.facts` on losses."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkit import randomness
from sslkit.api import LossModule
from sslkit.batch import Branches, Needs, ViewSpec
from sslkit.build import Parts

TRIED = 16
"""Images of the random batches that a loss is tried with."""
LARGEST = 2**27
"""Numbers in the largest batch that a loss is tried with."""
ALIKE = (1.0, 0.75, 0.5, 0.25, 0.0)
"""Cosines between images at which the form of a contrastive loss is read off."""
FITS = 1e-3
"""How far from a form, as a share of what it moves by, a loss may be and still have it."""


@dataclass(frozen=True)
class _Trial:
    """A loss, and the shapes of what it takes."""

    loss: LossModule
    specs: tuple[ViewSpec, ...]
    needs: Needs
    dim: int
    device: torch.device
    generator: torch.Generator

    def branches(self, n: int, vectors: Callable[[str, int], Tensor], labels: Tensor | None = None) -> Branches:
        """Branches that hold `vectors(branch, view)` `[n, dim]` wherever the loss wants something."""

        def filled(branch: str, views: tuple[int, ...]) -> list[Tensor | None]:
            return [vectors(branch, view) if view in views else None for view in range(len(self.specs))]

        projections = filled("projections", self.needs.projections)
        return Branches(
            self.specs, projections, projections, filled("predictions", self.needs.predictions),
            filled("targets", self.needs.targets), torch.arange(n, device=self.device), labels,
        )  # fmt: skip

    def random(self, n: int = TRIED) -> Tensor:
        """`[n, dim]` standard normal."""
        return torch.randn(n, self.dim, generator=self.generator).to(self.device)

    def remembered(self) -> Callable[[str, int], Tensor]:
        """Random vectors that are the same whenever they are asked for."""
        vectors: dict[tuple[str, int], Tensor] = {}

        def vector(branch: str, view: int) -> Tensor:
            if (branch, view) not in vectors:
                vectors[branch, view] = self.random()
            return vectors[branch, view]

        return vector

    def labels(self, n: int = TRIED) -> Tensor:
        """Labels `[n]` of two classes."""
        return torch.arange(n, device=self.device) % 2

    def value(self, branches: Branches) -> float:
        """The loss of branches."""
        return float(self.loss(branches).total)


def loss_facts(parts: Parts) -> dict[str, Any]:
    """What the loss says of itself, and what it does with outputs that were made up."""
    model, run = parts.model, parts.run
    dim = cast(Any, model.online.projector).out_dim
    trial = _Trial(
        copy.deepcopy(parts.loss_module),
        run.views,
        model.needs,
        dim,
        parts.device,
        randomness.generator(run.seed, "doctor"),
    )
    said = getattr(parts.loss, "prevents_collapse", None)
    facts: dict[str, Any] = {"prevents_collapse": said, "wants_predictions": bool(model.needs.predictions)}
    trials: list[Callable[[], dict[str, Any]]] = [
        lambda: {"blank_loss": _blank(trial, run.batch_size)},
        lambda: {"agreement": _agreement(trial)},
        lambda: {"dead_inputs": _dead_inputs(trial)},
        lambda: {"reads_labels": _reads_labels(trial) if run.labelled else None},
        lambda: {"byol_scale": None if said or not model.needs.targets else _slope(trial, _two_minus_two_cos)},
        lambda: {"scale_sensitive": None if said else _scale_sensitive(trial)},
        lambda: {"positives_counted": _positives_counted(trial)},
    ]
    for attempt in trials:
        try:
            facts |= {name: value for name, value in attempt().items() if _finite(value)}
        except Exception:  # a loss may refuse a batch of this size; training itself will say what is wrong with it
            continue
    if said is None and (facts.get("byol_scale") is not None or _is_squared_error(trial)):
        facts["prevents_collapse"] = False  # it draws views of an image together, and does nothing else
    return facts


def _finite(value: object) -> bool:
    """Whether all numbers in it are: a file of JSON holds no others."""
    if isinstance(value, tuple):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


@torch.no_grad()
def _blank(trial: _Trial, batch_size: int) -> float | None:
    if batch_size * trial.dim * len(trial.specs) > LARGEST:
        return None
    nothing = torch.zeros(batch_size, trial.dim, device=trial.device)
    return trial.value(trial.branches(batch_size, lambda *_: nothing, trial.labels(batch_size)))


@torch.no_grad()
def _agreement(trial: _Trial) -> tuple[float, float]:
    """The loss of views that agree in everything, and of views that have nothing in common."""
    same, labels = trial.random(), trial.labels()
    agreeing = trial.value(trial.branches(TRIED, lambda *_: same, labels))
    return agreeing, trial.value(trial.branches(TRIED, lambda *_: trial.random(), labels))


def _dead_inputs(trial: _Trial) -> tuple[str, ...]:
    """Online outputs that the loss asked for and that get no gradient from it."""
    leaves: dict[str, Tensor] = {}

    def leaf(branch: str, view: int) -> Tensor:
        made = trial.random()
        if branch != "targets":
            leaves[f"{branch} of view {view}"] = made.requires_grad_()
        return made

    with torch.enable_grad():
        total = trial.loss(trial.branches(TRIED, leaf, trial.labels())).total
        if not total.requires_grad:
            return tuple(leaves)
        gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return tuple(name for name, g in zip(leaves, gradients, strict=True) if g is None or not bool(g.any()))


@torch.no_grad()
def _reads_labels(trial: _Trial) -> bool:
    vectors = trial.remembered()

    def value(labels: Tensor) -> float:
        torch.manual_seed(0)
        return trial.value(trial.branches(TRIED, vectors, labels))

    first, again, other = value(trial.labels()), value(trial.labels()), value(trial.labels() * 0)
    return first == again != other  # a loss that moves by itself says nothing of labels


@torch.no_grad()
def _scale_sensitive(trial: _Trial) -> bool | None:
    """Whether the loss is another one of outputs that are twice as long."""
    vectors = trial.remembered()

    def value(factor: float) -> float:
        torch.manual_seed(0)
        return trial.value(trial.branches(TRIED, lambda *which: factor * vectors(*which), trial.labels()))

    first, again, longer = value(1.0), value(1.0), value(2.0)
    return None if first != again else not math.isclose(first, longer, rel_tol=1e-3, abs_tol=1e-6)


# ---------------------------------------------------------------- forms


def _two_minus_two_cos(p: Tensor, t: Tensor) -> Tensor:
    return 2 - 2 * F.cosine_similarity(p, t, dim=1)


def _squared_error(p: Tensor, t: Tensor) -> Tensor:
    return (p - t).square().sum(1)


def _is_squared_error(trial: _Trial) -> bool:
    try:
        return _slope(trial, _squared_error) is not None
    except Exception:  # as in `loss_facts`
        return False


@torch.no_grad()
def _slope(trial: _Trial, distance: Callable[[Tensor, Tensor], Tensor]) -> float | None:
    """How steep the loss is where the mean distance of predictions and targets, summed over ordered pairs of views, has
    the slope 1; None where it is more or less than that."""
    points = []
    for _ in range(3):
        branches = trial.branches(TRIED, lambda *_: trial.random())
        reference = sum(
            float(distance(p, t).mean())
            for view, p in enumerate(branches.predictions)
            for other, t in enumerate(branches.targets)
            if view != other and p is not None and t is not None
        )
        points.append((reference, trial.value(branches)))
    (a, la), (b, lb), (c, lc) = points
    slopes = (la - lb) / (a - b), (lb - lc) / (b - c)
    return slopes[0] if abs(slopes[0] - slopes[1]) < FITS * max(1.0, abs(slopes[0])) else None


@torch.no_grad()
def _positives_counted(trial: _Trial) -> float | None:
    """How many terms in a softmax loss's denominator are as large as the positive's, where two views of an image agree.

    Of unit outputs of which any two images have the cosine c, such a loss is s log(A + n q^(1 - c)): A of its terms are
    the positive or like it, n are of other images, q = exp(-1 / temperature), and s is 1 for a mean over anchors. Three
    cosines give A, and two more tell whether the loss has this form at all; None if it has not.
    """
    n = min(TRIED, trial.dim - 1)
    if len(trial.needs.projections) != 2 or trial.needs.predictions or trial.needs.targets or n < 2:
        return None
    axes = torch.eye(n + 1, trial.dim, device=trial.device)
    labels = torch.arange(n, device=trial.device)  # every image is its own class

    def value(alike: float) -> float:
        rows = math.sqrt(alike) * axes[:1] + math.sqrt(1 - alike) * axes[1:]
        return trial.value(trial.branches(n, lambda *_: rows, labels))

    losses = [value(alike) for alike in ALIKE]
    fits = (_constant([math.exp(loss / s) for loss in losses], 2 * n + 2) for s in (1, 2, n, 2 * n))
    return min((round(a, 3) for a in fits if a is not None), key=lambda a: abs(a - 1), default=None)


def _constant(points: list[float], most: int) -> float | None:
    """a of a + b r^k at k = 0, 1 ... through the first three points; None if the others are elsewhere, or if a + b is
    no whole number up to `most`: the first point counts all terms, for there they are equal."""
    first, second, third = points[:3]
    down, bend = first - second, first - 2 * second + third
    if not 1.5 < first < most + 0.5 or abs(first - round(first)) > FITS * first:
        return None
    if down <= 0 or bend < FITS * first:  # r is too near 1 to be told from it
        return None
    b, r = down * down / bend, max(0.0, 1 - bend / down)
    fits = (abs(first - b + b * r**k - p) < FITS * min(p, first - points[-1]) for k, p in enumerate(points))
    return first - b if all(fits) else None
