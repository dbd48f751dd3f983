"""The cosine loss: values and gradients of BYOL's and SimSiam's formulas, and what must not change them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sslkit.api import RunInfo
from sslkit.batch import Branches, ViewSpec
from sslkit.errors import UserError
from sslkit_cosine import Cosine
from sslkit_cosine.loss import CosineLoss

RUN = RunInfo(0, "cpu", 32, 3, (0.5,) * 3, (0.25,) * 3, 1000, 1000, 10, 100)
GLOBAL, LOCAL = ViewSpec(32), ViewSpec(16, "local")
seeds = st.integers(0, 2**31 - 1)
forms = pytest.mark.parametrize("form", ["byol", "simsiam"])


def loss(form: str) -> CosineLoss:
    module = Cosine(form=form).build(8, RUN)  # type: ignore[arg-type]
    assert isinstance(module, CosineLoss)
    return module


def branches(predictions: list[Any], targets: list[Any], specs: tuple[ViewSpec, ...] | None = None) -> Branches:
    nothing = [None] * len(predictions)
    specs = specs or (GLOBAL,) * len(predictions)
    return Branches(specs, list(nothing), list(nothing), predictions, targets)


def vectors(views: int, n: int = 6, d: int = 8, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    drawn = torch.randn(2, views, n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return [p.clone().requires_grad_() for p in drawn[0]], [t.clone().requires_grad_() for t in drawn[1]]


def by_formula(form: str, predictions: list[Tensor], targets: list[Tensor]) -> Tensor:
    """Image by image and pair by pair, as the papers write it."""
    total, pairs = torch.zeros((), dtype=torch.float64), 0
    for i, p in enumerate(predictions):
        for j, t in enumerate(targets):
            if i != j:
                pairs += 1
                for b in range(len(p)):
                    cos = (p[b] @ t[b].detach()) / (p[b].norm() * t[b].norm().detach())
                    total = total + (2 - 2 * cos if form == "byol" else -cos) / len(p)
    return total if form == "byol" else total / pairs


@forms
@pytest.mark.parametrize("views", [2, 3])
def test_value_and_gradient_are_the_formulas(form: str, views: int):
    predictions, targets = vectors(views)
    expected = by_formula(form, predictions, targets)
    expected_gradients = torch.autograd.grad(expected, predictions)
    terms = loss(form)(branches(predictions, targets))
    gradients = torch.autograd.grad(terms.total, predictions)
    torch.testing.assert_close(terms.total, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@forms
@pytest.mark.filterwarnings("ignore")
def test_against_lightly(form: str):
    pytest.importorskip("lightly")
    from lightly.loss import NegativeCosineSimilarity

    (p0, p1), (t0, t1) = vectors(2)
    criterion = NegativeCosineSimilarity()
    theirs = 0.5 * (criterion(p0, t1.detach()) + criterion(p1, t0.detach()))  # SimSiam as lightly trains it
    if form == "byol":
        theirs = 4 + 4 * theirs
    expected = torch.autograd.grad(theirs, [p0, p1])
    ours = loss(form)(branches([p0, p1], [t0, t1])).total
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(ours, [p0, p1]), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@forms
@pytest.mark.parametrize("views", [2, 4])
def test_the_mean_of_the_others_as_target(form: str, views: int):
    predictions, targets = vectors(views)
    expected = torch.zeros((), dtype=torch.float64)
    for i, p in enumerate(predictions):
        mean = sum(t.detach() for j, t in enumerate(targets) if j != i) / (views - 1)
        cos = torch.stack([p[b] @ mean[b] / (p[b].norm() * mean[b].norm()) for b in range(len(p))])  # type: ignore[index]
        expected = expected + (2 - 2 * cos.mean() if form == "byol" else -cos.mean() / views)
    ours = Cosine(form=form, targets="mean").build(8, RUN)(branches(predictions, targets)).total  # type: ignore[arg-type]
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(ours, predictions), torch.autograd.grad(expected, predictions), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    if views == 2:
        torch.testing.assert_close(ours, loss(form)(branches(predictions, targets)).total)


@forms
def test_no_gradient_reaches_a_target(form: str):
    predictions, targets = vectors(2)
    loss(form)(branches(predictions, targets)).total.backward()
    assert all(t.grad is None for t in targets)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in predictions)


@given(seed=seeds, scale=st.floats(1e-3, 1e3))
@settings(deadline=None)
@forms
def test_lengths_do_not_matter(form: str, seed: int, scale: float):
    predictions, targets = vectors(2, seed=seed)
    plain = loss(form)(branches(predictions, targets)).total
    scaled = loss(form)(branches([p * scale for p in predictions], [t / scale for t in targets])).total
    torch.testing.assert_close(plain, scaled)


@given(seed=seeds)
@settings(deadline=None)
@forms
def test_order_of_images_and_of_views_does_not_matter(form: str, seed: int):
    predictions, targets = vectors(3, seed=seed)
    plain = loss(form)(branches(predictions, targets)).total
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    shuffled = loss(form)(branches([p[order] for p in predictions], [t[order] for t in targets])).total
    swapped = loss(form)(branches(predictions[::-1], targets[::-1])).total
    torch.testing.assert_close(plain, shuffled)
    torch.testing.assert_close(plain, swapped)


@pytest.mark.parametrize(("form", "alike", "orthogonal", "opposite"), [("byol", 0, 4, 8), ("simsiam", -1, 0, 1)])
def test_range(form: str, alike: float, orthogonal: float, opposite: float):
    x = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    module = loss(form)
    assert module(branches([x, x], [x, x])).total.item() == alike
    assert module(branches([x, x], [x.flip(1), x.flip(1)])).total.item() == orthogonal
    assert module(branches([x, x], [-x, -x])).total.item() == opposite
    assert module(branches([x, x], [-x, -x])).terms["cosine"].item() == -1


@forms
def test_micro_batches_add_up(form: str):
    module = loss(form)
    assert module.additive
    predictions, targets = vectors(2, n=12)
    whole = module(branches(predictions, targets)).total
    parts = [
        module(branches([p[rows] for p in predictions], [t[rows] for t in targets])).total
        for rows in torch.arange(12).chunk(3)
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


@forms
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_normalised_in_float32(form: str, dtype: torch.dtype):
    predictions, targets = vectors(2, d=256)
    half = [(p.detach() * 100).to(dtype).requires_grad_() for p in predictions]  # squares beyond float16's 65504
    exact = by_formula(form, [p.detach().double() for p in half], targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = loss(form)(branches(half, [t.to(dtype) for t in targets]))
    assert terms.total.dtype == torch.float32
    torch.testing.assert_close(terms.total, exact.float(), rtol=0, atol=1e-2 if dtype == torch.bfloat16 else 1e-3)
    terms.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in half)


@forms
def test_zero_vectors_stay_finite(form: str):
    predictions = [torch.zeros(4, 8, requires_grad=True) for _ in range(2)]
    total = loss(form)(branches(predictions, vectors(2, n=4)[1])).total
    total.backward()
    assert total.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in predictions)


def test_needs_every_prediction_and_every_target():
    needs = loss("byol").needs((GLOBAL, GLOBAL, GLOBAL))
    assert needs.predictions == needs.targets == (0, 1, 2)
    assert needs.projections == ()


def test_local_views_are_predicted_from_but_are_no_targets():
    module, specs = loss("byol"), (GLOBAL, GLOBAL, LOCAL)
    needs = module.needs(specs)
    assert needs.predictions == (0, 1, 2)
    assert needs.targets == (0, 1)
    predictions, targets = vectors(3)
    total = module(branches(predictions, [*targets[:2], None], specs)).total
    two = by_formula("byol", predictions[:2], targets[:2])
    to_global = sum((2 - 2 * torch.cosine_similarity(predictions[2], target, dim=-1)).mean() for target in targets[:2])
    torch.testing.assert_close(total, two + to_global)


@pytest.mark.parametrize("specs", [(), (GLOBAL,), (LOCAL, LOCAL)])
def test_views_without_a_pair_are_refused(specs: tuple[ViewSpec, ...]):
    with pytest.raises(UserError, match="two or more views"):
        loss("byol").needs(specs)


def test_a_missing_branch_is_named():
    predictions, targets = vectors(2)
    with pytest.raises(UserError, match="no prediction of view 0"):
        loss("byol")(branches([None, None], targets))
    with pytest.raises(UserError, match="no target projection of view 1"):
        loss("byol")(branches(predictions, [targets[0], None]))


def test_terms_do_not_hold_the_graph():
    predictions, targets = vectors(2)
    module = loss("simsiam")
    terms = module(branches(predictions, targets))
    assert not terms.terms["cosine"].requires_grad
    torch.testing.assert_close(terms.terms["cosine"], -terms.total.detach())
    assert module.state_dict() == {}
