"""The solvers, against scikit-learn, lightly and torch's own optimizer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import generator
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sslkit import randomness
from sslkit.api import DataInfo
from sslkit.data import cache_folder
from sslkit.evaluation import scoring
from sslkit.evaluation.linear import STRENGTHS, LogisticRegression, Standardised, fit_sgd, stratified
from sslkit.features import knn_predict
from sslkit_datasets import Digits


def correlated(number: int, width: int, classes: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Features whose covariance is far from the identity, and labels that depend on them."""
    random = generator()
    rows = torch.randn(number, width, generator=random, dtype=torch.float64)
    rows = (
        rows
        * torch.logspace(0, -2, width, dtype=torch.float64)
        @ torch.randn(width, width, generator=random, dtype=torch.float64)
    )
    logits = rows @ torch.randn(width, classes, generator=random, dtype=torch.float64)
    noise = -(-torch.rand(number, classes, generator=random, dtype=torch.float64).log()).log()
    return rows.to(dtype), (logits + noise).argmax(dim=1)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Activations of a random layer on printed digits: training rows and labels, test rows and labels."""
    data = Digits(prints=2, test_prints=1).build(DataInfo(seed=0, cache=cache_folder()))
    layer = torch.randn(768, 96, generator=generator()) / 28
    assert data.test is not None
    assert data.train.tensor is not None
    assert data.test.tensor is not None
    assert data.train.labels is not None
    assert data.test.labels is not None
    rows, queries = ((s.flatten(1) / 255 @ layer).relu() for s in (data.train.tensor, data.test.tensor))
    return rows, data.train.labels, queries, data.test.labels


@pytest.mark.parametrize("C", [0.01, 1.0, 100.0])
def test_the_optimum_is_scikit_learns(C: float) -> None:
    from sklearn.linear_model import LogisticRegression as Theirs

    rows, labels = correlated(400, 12, 4)
    rows = Standardised(rows)(rows)
    theirs = Theirs(C=C, solver="newton-cholesky", tol=1e-12, max_iter=1000).fit(rows.numpy(), labels.numpy())
    ours = LogisticRegression(rows, labels, 4).fit(C, tolerance=1e-9)
    assert ours.gradient <= 1e-8
    weight = torch.from_numpy(theirs.coef_)
    torch.testing.assert_close(ours.linear.weight, weight, rtol=1e-5, atol=1e-6)
    bias = torch.from_numpy(theirs.intercept_)  # a constant added to all changes nothing
    torch.testing.assert_close(ours.linear.bias - ours.linear.bias.mean(), bias - bias.mean(), rtol=1e-5, atol=1e-6)


def test_the_gradient_is_autograds() -> None:
    rows, labels = correlated(5000, 6, 3)
    problem = LogisticRegression(rows, labels, 3)
    fitted = problem.fit(0.1, iterations=3).linear
    loss, weight, bias = problem._loss(fitted)
    w, b = fitted.weight.clone().requires_grad_(), fitted.bias.clone().requires_grad_()
    expected = F.cross_entropy(rows @ w.T + b, labels)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close((weight, bias), (w.grad, b.grad))


def test_a_warm_start_changes_the_way_and_not_the_end() -> None:
    rows, labels = correlated(300, 8, 3)
    problem = LogisticRegression(rows, labels, 3)
    cold = problem.fit(1.0, tolerance=1e-9)
    warm = problem.fit(1.0, problem.fit(0.5, tolerance=1e-9).linear, tolerance=1e-9)
    torch.testing.assert_close(cold.linear.weight, warm.linear.weight, rtol=1e-5, atol=1e-6)
    assert warm.iterations < cold.iterations
    again = problem.fit(1.0, cold.linear, tolerance=1e-8)
    assert again.iterations <= 1


def test_coordinates_of_the_solver_do_not_move_the_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, labels = correlated(300, 8, 3)
    problem = LogisticRegression(rows, labels, 3)
    expected = problem.fit(1.0, tolerance=1e-9).linear.weight
    problem.covariance = torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(problem.fit(1.0, tolerance=1e-9).linear.weight, expected, rtol=1e-5, atol=1e-6)


def test_features_that_collapsed_are_fitted_too() -> None:
    rows = torch.ones(100, 5)
    labels = torch.arange(100) % 2
    for features in (rows, torch.cat([rows, torch.randn(100, 1, generator=generator())], dim=1)):
        standardised = Standardised(features)(features)
        assert standardised.isfinite().all()
        assert not standardised[:, :5].any()
        fitted = LogisticRegression(standardised, labels, 2).fit(100.0)
        assert fitted.linear.weight.isfinite().all()


def test_standardised_features_have_mean_zero_and_deviation_one() -> None:
    rows = torch.rand(50, 4, generator=generator(), dtype=torch.float64) * 7 + 3
    standardised = Standardised(rows)
    torch.testing.assert_close(standardised(rows).mean(dim=0), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(standardised(rows).std(dim=0, correction=0), torch.ones(4, dtype=torch.float64))
    other = rows[:3] + 1
    torch.testing.assert_close(standardised(other), (other - rows.mean(0)) / rows.std(0, correction=0))


def test_linear_is_within_a_fifth_of_a_point_of_scikit_learn(digits: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    from sklearn.linear_model import LogisticRegression as Theirs

    rows, labels, queries, wanted = digits
    standardised = Standardised(rows)
    rows, queries = standardised(rows), standardised(queries)
    classifier, chosen = scoring._by_lbfgs(rows, labels, 10, seed=0)
    ours = float((classifier.predict(queries) == wanted).float().mean())
    theirs = Theirs(C=chosen["C"], max_iter=5000, tol=1e-6).fit(rows.numpy(), labels.numpy())
    assert abs(ours - theirs.score(queries.numpy(), wanted.numpy())) <= 0.002
    held, rest = scoring._split(labels, 0)
    scores = {
        C: Theirs(C=C, max_iter=5000, tol=1e-5)
        .fit(rows[rest].numpy(), labels[rest].numpy())
        .score(rows[held].numpy(), labels[held].numpy())
        for C in STRENGTHS
    }
    assert scores[chosen["C"]] >= max(scores.values()) - 0.004, "the choice is one that scikit-learn would make"


def test_knn_predicts_what_lightly_predicts(digits: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    lightly = pytest.importorskip("lightly.utils.benchmarking.knn")
    rows, labels, queries, _ = digits
    ours = knn_predict(rows, labels, queries, 10, k=50, temperature=0.1)
    bank = F.normalize(rows, dim=1).T.contiguous()
    theirs = lightly.knn_predict(F.normalize(queries, dim=1), bank, labels, num_classes=10, knn_k=50, knn_t=0.1)
    assert torch.equal(ours, theirs[:, 0])


def test_sgd_of_many_rates_is_torchs_of_each() -> None:
    rows, labels = correlated(50, 6, 3)
    rates, epochs, batch = (0.03, 0.3), 3, 16
    found = fit_sgd(rows, labels, 3, rates=rates, epochs=epochs, batch=batch, seed=4)
    for rate, ours in zip(rates, found, strict=True):
        layer = torch.nn.Linear(6, 3, dtype=torch.float64)
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        solver = torch.optim.SGD(layer.parameters(), lr=rate, momentum=0.9, nesterov=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(solver, T_max=epochs * (50 // batch))
        for epoch in range(epochs):
            order = torch.randperm(50, generator=randomness.generator(4, "linear_sgd", epoch))
            for chosen in order[: 50 // batch * batch].split(batch):
                solver.zero_grad()
                F.cross_entropy(layer(rows[chosen]), labels[chosen]).backward()
                solver.step()
                schedule.step()
        torch.testing.assert_close((ours.weight, ours.bias), (layer.weight.data, layer.bias.data), rtol=1e-6, atol=1e-9)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.floats(0.01, 0.99), st.integers(0, 5))
def test_a_stratified_share_is_of_every_class_and_leaves_some(labels: list[int], share: float, seed: int) -> None:
    held, rest = stratified(torch.tensor(labels), share, generator(seed))
    assert sorted([*held.tolist(), *rest.tolist()]) == list(range(len(labels)))
    assert held.tolist() == sorted(held.tolist())
    assert rest.tolist() == sorted(rest.tolist())
    for label in set(labels):
        own = labels.count(label)
        number = sum(labels[i] == label for i in held.tolist())
        assert number == min(max(1, round(share * own)), own - 1)
