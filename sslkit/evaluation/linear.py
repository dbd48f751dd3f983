"""Linear classifiers on features that stay as they are: logistic regression to its optimum, and by SGD."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sslkit import randomness

STRENGTHS = tuple(10.0**power for power in range(-4, 3))
"""C, the weight of the data against that of the regularisation, from weakest to strongest."""
RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Learning rates of SGD on standardised features, at a batch of 512."""
HELD_OUT = 0.1
"""Share of the training images, of each class, that the choice among these is made by."""
ROWS = 4096
"""Features that are multiplied at a time: they stay in a processor's cache from the logits to the gradient."""
SAMPLE = 10_000
"""Features that the shape of the problem is measured by, for the solver to be quick; the optimum does not depend on
it."""


@dataclass(frozen=True)
class Linear:
    """Logits `x W^T + b`."""

    weight: Tensor
    """`[classes, d]`."""
    bias: Tensor
    """`[classes]`."""

    def predict(self, features: Tensor) -> Tensor:
        """int64 `[N]`: the class with the largest logit."""
        return torch.cat([(part @ self.weight.T + self.bias).argmax(dim=1) for part in features.split(ROWS)])


@dataclass(frozen=True)
class Fitted:
    """A classifier at the optimum of its objective, and how far from it."""

    linear: Linear
    iterations: int
    gradient: float
    """Largest entry of the gradient of the objective per image, in coordinates in which its curvature is about 1: half
    the square of them all is about what it could still fall. In single precision it cannot go far below 1e-5."""


class Standardised:
    """Features with the mean 0 and the standard deviation 1 that they have over the training images."""

    def __init__(self, features: Tensor) -> None:
        rows = _precise(features)
        self.mean = rows.mean(dim=0)
        spread = rows.std(dim=0, correction=0)
        # A feature that does not vary, but for rounding, says nothing; dividing by its noise would make it loud.
        silent = spread <= 1e-6 * rows.abs().amax(dim=0).clamp_min(torch.finfo(rows.dtype).tiny)
        self.scale = torch.where(silent, 0, 1 / torch.where(silent, 1, spread))

    def __call__(self, features: Tensor) -> Tensor:
        return (_precise(features) - self.mean) * self.scale


class LogisticRegression:
    """argmin over W, b of `C * sum of cross-entropies(W x + b, y) + |W|^2 / 2`, b not penalised: scikit-learn's.

    The largest share of L-BFGS's iterations is spent on learning that features are correlated. So it works in
    coordinates in which they are not: W = U L^-1 with L L^T = (covariance / classes + identity / (C N)), which is about
    the objective's curvature. The optimum is the same.
    """

    def __init__(self, features: Tensor, labels: Tensor, classes: int) -> None:
        """Features `[N, d]`, which should be standardised; labels int64 `[N]` from 0 to classes - 1."""
        self.x, self.y, self.classes = _precise(features), labels.to(features.device), classes
        self.curvature = 1 / classes
        sample = self.x[:: max(1, len(self.x) // SAMPLE)]
        self.covariance = (sample.T @ sample / len(sample)).double()

    @torch.no_grad()
    def fit(self, C: float, start: Linear | None = None, *, iterations: int = 1000, tolerance: float = 1e-5) -> Fitted:
        """The optimum for a C, from `start` on, by L-BFGS with the strong Wolfe conditions on all images at once."""
        x, classes, (number, width) = self.x, self.classes, self.x.shape
        decay = 1 / (C * number)
        identity = torch.eye(width, dtype=torch.float64, device=x.device)
        # The floor is far below what single precision resolves of the covariance.
        root = torch.linalg.cholesky(self.curvature * self.covariance + max(decay, 1e-5 * self.curvature) * identity)
        root, bias_root = root.to(x.dtype), math.sqrt(self.curvature)
        u = torch.zeros(classes, width + 1, dtype=x.dtype, device=x.device)
        if start is not None:
            u[:, :width], u[:, width] = start.weight.to(x.dtype) @ root, start.bias.to(x.dtype) * bias_root
        u.requires_grad_()

        def linear() -> Linear:
            weight = torch.linalg.solve_triangular(root.T, u.detach()[:, :width].T, upper=True).T
            return Linear(weight.contiguous(), u.detach()[:, width] / bias_root)

        def objective() -> Tensor:
            now = linear()
            loss, weight, bias = self._loss(now)
            u.grad = torch.empty_like(u)
            u.grad[:, :width] = torch.linalg.solve_triangular(root, (weight + decay * now.weight).T, upper=False).T
            u.grad[:, width] = bias / bias_root
            return loss + decay / 2 * now.weight.double().square().sum()

        solver = torch.optim.LBFGS(
            [u], max_iter=iterations, max_eval=2 * iterations, tolerance_grad=tolerance, tolerance_change=0,
            history_size=20, line_search_fn="strong_wolfe",
        )  # fmt: skip
        solver.step(objective)
        objective()
        assert u.grad is not None
        largest = float(u.grad.abs().max())
        return Fitted(linear(), int(solver.state[u]["n_iter"]), largest)

    def _loss(self, linear: Linear) -> tuple[Tensor, Tensor, Tensor]:
        """Mean cross-entropy, float64, and its gradients with respect to weight and bias."""
        total = torch.zeros((), dtype=torch.float64, device=self.x.device)
        weight, bias = torch.zeros_like(linear.weight), torch.zeros_like(linear.bias)
        for x, y in zip(self.x.split(ROWS), self.y.split(ROWS), strict=True):
            log = torch.addmm(linear.bias, x, linear.weight.T).log_softmax(dim=1)
            total -= log.gather(1, y[:, None]).sum(dtype=torch.float64)
            error = log.exp_()
            error.scatter_add_(1, y[:, None], error.new_full((1, 1), -1.0).expand(len(y), 1))
            weight.addmm_(error.T, x)
            bias += error.sum(dim=0)
        return total / len(self.x), weight / len(self.x), bias / len(self.x)


@torch.no_grad()
def fit_sgd(
    features: Tensor,
    labels: Tensor,
    classes: int,
    *,
    rates: Sequence[float],
    epochs: int,
    batch: int,
    seed: int,
) -> list[Linear]:
    """A classifier for each rate, all trained on the same batches: SGD with Nesterov's momentum of .9, no weight decay,
    from zero, the rate falling to 0 along a cosine; images that do not fill a last batch are left out of an epoch.

    The gradient is written out: of the mean cross-entropy with respect to logits it is (softmax - one-hot) / batch.
    """
    x, y = _precise(features), labels.to(features.device)
    batch, width, number = min(batch, len(x)), x.shape[1], len(rates)
    weight = torch.zeros(number * classes, width + 1, dtype=x.dtype, device=x.device)
    momentum, gradient = torch.zeros_like(weight), torch.zeros_like(weight)
    per_epoch = len(x) // batch
    peak = torch.tensor(rates, dtype=x.dtype, device=x.device).repeat_interleave(classes)[:, None]
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=randomness.generator(seed, "linear_sgd", epoch)).to(x.device)
        for position in range(per_epoch):
            chosen = order[position * batch : (position + 1) * batch]
            rows, wanted = x[chosen], y[chosen]
            error = torch.addmm(weight[:, width], rows, weight[:, :width].T).view(batch, number, classes).softmax(dim=2)
            error[torch.arange(batch, device=x.device), :, wanted] -= 1
            error = error.view(batch, -1) / batch
            gradient[:, :width], gradient[:, width] = error.T @ rows, error.sum(dim=0)
            momentum.mul_(0.9).add_(gradient)
            share = (1 + math.cos(math.pi * (epoch * per_epoch + position) / (epochs * per_epoch))) / 2
            weight -= share * peak * (gradient + 0.9 * momentum)
    return [Linear(part[:, :width].contiguous(), part[:, width].contiguous()) for part in weight.split(classes)]


def stratified(labels: Tensor, share: float, generator: torch.Generator, *, least: int = 1) -> tuple[Tensor, Tensor]:
    """Positions int64 `[n]` of a random share of each class, at least one, and of the rest; both ascending.

    `least` of a class stay in the rest, so that one of a single image is not in the share.
    """
    labels = labels.cpu()
    taken = torch.zeros(len(labels), dtype=torch.bool)
    shuffled = torch.randperm(len(labels), generator=generator)
    for label in labels.unique():
        own = shuffled[labels[shuffled] == label]
        taken[own[: min(max(1, round(share * len(own))), len(own) - least)]] = True
    return taken.nonzero()[:, 0], (~taken).nonzero()[:, 0]


def _precise(features: Tensor) -> Tensor:
    return features if features.dtype == torch.float64 else features.float()
