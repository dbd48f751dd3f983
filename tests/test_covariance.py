"""Barlow Twins, VICReg and VIbCReg: the papers' formulas, lightly's code, and what must not change them."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from conftest import run_info
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from sslkit.api import Loss
from sslkit.batch import Branches, ViewSpec
from sslkit.errors import UserError
from sslkit.nn import ScheduledNumber
from sslkit_covariance import WMSE, BarlowTwins, VIbCReg, VICReg
from sslkit_covariance.pairs import PairLoss
from sslkit_schedules import Linear

GLOBAL, LOCAL = ViewSpec(32), ViewSpec(16, "local")
OFF = 0.0051
SPECS: dict[str, Loss] = {
    "barlow_twins": BarlowTwins(),
    "vicreg": VICReg(),
    "vibcreg": VIbCReg(),
    "w_mse": WMSE(sub_batch=12),  # the whole batch: nothing is random
}
every = pytest.mark.parametrize("name", SPECS)
seeds = st.integers(0, 2**31 - 1)


def loss(spec: Loss, dim: int = 5) -> PairLoss:
    module = spec.build(dim, run_info(batch_size=12))
    assert isinstance(module, PairLoss)
    return module


def branches(projections: list[Any], specs: tuple[ViewSpec, ...] | None = None) -> Branches:
    nothing = [None] * len(projections)
    specs = specs or (GLOBAL,) * len(projections)
    return Branches(specs, list(nothing), projections, list(nothing), list(nothing))


def vectors(views: int = 2, n: int = 12, d: int = 5, seed: int = 0) -> list[Tensor]:
    """Float64 projections: views of the same images, so neither equal nor unrelated, on dimensions of various scale."""
    drawn = torch.randn(views + 1, n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scales = torch.logspace(-1, 0.5, d, dtype=torch.float64)
    return [((drawn[0] + 0.5 * v) * scales + 1).requires_grad_() for v in drawn[1:]]


def assert_same(total: Tensor, expected: Tensor, inputs: list[Tensor], rtol: float = 1e-10) -> None:
    """The same values and the same gradients."""
    torch.testing.assert_close(total, expected, rtol=rtol, atol=rtol)
    theirs = torch.autograd.grad(expected, inputs)
    for a, b in zip(torch.autograd.grad(total, inputs), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


# ---------------------------------------------------------------- the formulas, element by element


def barlow_twins_formula(a: Tensor, b: Tensor) -> Tensor:
    n, d = a.shape

    def normalised(z: Tensor, j: int) -> Tensor:
        column = z[:, j] - z[:, j].sum() / n
        return column / torch.sqrt((column**2).sum() / n + 1e-5)

    total = torch.zeros((), dtype=a.dtype)
    for i in range(d):
        for j in range(d):
            c = (normalised(a, i) * normalised(b, j)).sum() / n
            total = total + ((1 - c) ** 2 if i == j else OFF * c**2)
    return total


def covariance_of(z: Tensor, i: int, j: int) -> Tensor:
    return ((z[:, i] - z[:, i].mean()) * (z[:, j] - z[:, j].mean())).sum() / (len(z) - 1)


def invariance_of(a: Tensor, b: Tensor) -> Tensor:
    n, d = a.shape
    return sum((a[k] - b[k]).square().sum() for k in range(n)) / (n * d)  # type: ignore[return-value]


def variance_of(z: Tensor) -> Tensor:
    d = z.shape[1]
    return (
        sum(  # type: ignore[return-value]
            torch.clamp(1 - torch.sqrt(covariance_of(z, j, j) + 1e-4), min=0) for j in range(d)
        )
        / d
    )


def off_diagonal_of(z: Tensor, *, normalised: bool) -> Tensor:
    d = z.shape[1]
    total = torch.zeros((), dtype=z.dtype)
    for i in range(d):
        for j in range(d):
            if i != j:
                c = covariance_of(z, i, j) ** 2
                total = total + (c / (covariance_of(z, i, i) * covariance_of(z, j, j)) if normalised else c)
    return total


def vicreg_formula(a: Tensor, b: Tensor) -> Tensor:
    d = a.shape[1]
    variance = variance_of(a) / 2 + variance_of(b) / 2
    covariance = (off_diagonal_of(a, normalised=False) + off_diagonal_of(b, normalised=False)) / d
    return 25 * invariance_of(a, b) + 25 * variance + 1 * covariance


def vibcreg_formula(a: Tensor, b: Tensor) -> Tensor:
    d = a.shape[1]
    variance = variance_of(a) + variance_of(b)
    covariance = (off_diagonal_of(a, normalised=True) + off_diagonal_of(b, normalised=True)) / d**2
    return 25 * invariance_of(a, b) + 25 * variance + 200 * covariance


FORMULAS = {"barlow_twins": barlow_twins_formula, "vicreg": vicreg_formula, "vibcreg": vibcreg_formula}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("views", [2, 3])
def test_value_and_gradient_are_the_formulas(name: str, views: int):
    projections = vectors(views)
    pairs = list(combinations(projections, 2))
    expected = torch.stack([FORMULAS[name](a, b) for a, b in pairs]).mean()
    assert_same(loss(SPECS[name])(branches(projections)).total, expected, projections)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["barlow_twins", "vicreg"])
def test_against_lightly(name: str):
    pytest.importorskip("lightly")
    from lightly.loss import BarlowTwinsLoss, VICRegLoss

    theirs = BarlowTwinsLoss(lambda_param=OFF) if name == "barlow_twins" else VICRegLoss()
    for n, d in ((12, 5), (6, 9)):
        a, b = vectors(n=n, d=d)
        assert_same(loss(SPECS[name], d)(branches([a, b])).total, theirs(a, b), [a, b])


# ---------------------------------------------------------------- what the papers imply


def test_barlow_twins_of_two_equal_decorrelated_views_is_zero():
    n = 16
    walsh = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(1, 6)] for i in range(n)])
    terms = loss(BarlowTwins())(branches([walsh, 3 * walsh + 2]))
    torch.testing.assert_close(terms.total, torch.zeros(()), atol=1e-8, rtol=0)
    assert loss(BarlowTwins())(branches([walsh, -walsh])).terms["invariance"].item() == pytest.approx(4 * 5, rel=1e-4)
    repeated = walsh[:, :1].expand(n, 5)
    assert loss(BarlowTwins())(branches([repeated, repeated])).terms["redundancy"].item() == pytest.approx(20, rel=1e-4)


@given(seed=seeds, scale=st.floats(0.1, 10), shift=st.floats(-10, 10))
@settings(deadline=None, max_examples=30)
def test_barlow_twins_does_not_see_scale_and_shift(seed: int, scale: float, shift: float):
    a, b = (100 * z for z in vectors(seed=seed))  # variances far above BatchNorm's eps
    plain = loss(BarlowTwins())(branches([a, b])).total
    torch.testing.assert_close(loss(BarlowTwins())(branches([a * scale + shift, b])).total, plain, rtol=1e-4, atol=0)


@given(seed=seeds, shift=st.floats(-10, 10))
@settings(deadline=None, max_examples=30)
@pytest.mark.parametrize("name", ["vicreg", "vibcreg"])
def test_a_shift_of_both_views_changes_nothing(name: str, seed: int, shift: float):
    views = vectors(seed=seed)
    plain = loss(SPECS[name])(branches(views)).total
    torch.testing.assert_close(loss(SPECS[name])(branches([z + shift for z in views])).total, plain)


@given(seed=seeds, scale=st.floats(0.1, 10))
@settings(deadline=None, max_examples=30)
def test_only_vicregs_covariance_term_sees_the_scale(seed: int, scale: float):
    views = vectors(seed=seed)
    scaled = [z * scale for z in views]
    plain, other = (loss(VIbCReg())(branches(v)).terms["covariance"] for v in (views, scaled))
    torch.testing.assert_close(plain, other)
    plain, other = (loss(VICReg())(branches(v)).terms["covariance"] for v in (views, scaled))
    torch.testing.assert_close(plain * scale**4, other)


@pytest.mark.parametrize(("name", "once"), [("vicreg", 1.0), ("vibcreg", 2.0)])
def test_collapsed_projections_pay_the_variance_term(name: str, once: float):
    constant = [torch.ones(12, 5, requires_grad=True) for _ in range(2)]
    terms = loss(SPECS[name])(branches(constant))
    assert terms.terms["variance"].item() == pytest.approx(once * (1 - 1e-2))
    assert terms.terms["invariance"].item() == terms.terms["covariance"].item() == 0
    terms.total.backward()
    assert all(torch.isfinite(z.grad).all() for z in constant if z.grad is not None)


def test_the_threshold_is_the_standard_deviation_to_reach():
    (z, _) = vectors()
    deviations = torch.sqrt(z.var(0) + 1e-4)
    for threshold in (0.5, 2.0):
        terms = loss(VICReg(threshold=threshold))(branches([z, z])).terms
        torch.testing.assert_close(terms["variance"], torch.clamp(threshold - deviations, min=0).mean().detach())


@given(seed=seeds)
@settings(deadline=None, max_examples=20)
@every
def test_order_of_images_of_views_and_of_dimensions_does_not_matter(name: str, seed: int):
    views = vectors(3, seed=seed)
    plain = loss(SPECS[name])(branches(views)).total
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(loss(SPECS[name])(branches([z[order] for z in views])).total, plain)
    torch.testing.assert_close(loss(SPECS[name])(branches(views[::-1])).total, plain)
    if name != "w_mse":  # Cholesky whitening takes the dimensions in turn
        torch.testing.assert_close(loss(SPECS[name])(branches([z.flip(1) for z in views])).total, plain)


# ---------------------------------------------------------------- what every loss of pairs does


@every
def test_more_views_are_the_mean_over_pairs_local_ones_too(name: str):
    views = vectors(4)
    module = loss(SPECS[name])
    pairs = torch.stack([module(branches([a, b])).total for a, b in combinations(views, 2)])
    total = module(branches(views, (GLOBAL, GLOBAL, LOCAL, LOCAL))).total
    torch.testing.assert_close(total, pairs.mean())


@every
def test_needs_the_projections_of_every_view(name: str):
    needs = loss(SPECS[name]).needs((GLOBAL, GLOBAL, LOCAL))
    assert needs.projections == (0, 1, 2)
    assert needs.predictions == needs.targets == ()


@every
@pytest.mark.parametrize("specs", [(), (GLOBAL,)])
def test_fewer_than_two_views_are_refused(name: str, specs: tuple[ViewSpec, ...]):
    with pytest.raises(UserError, match="two or more views"):
        loss(SPECS[name]).needs(specs)


@every
def test_a_missing_projection_is_named(name: str):
    with pytest.raises(UserError, match=f"loss '{name}' has no projection of view 1"):
        loss(SPECS[name])(branches([vectors()[0], None]))


@every
def test_terms_explain_the_total_and_hold_no_graph(name: str):
    terms = loss(SPECS[name])(branches(vectors()))
    parts = terms.terms
    assert not any(t.requires_grad for t in parts.values())
    assert all(t.ndim == 0 for t in parts.values())
    explained = {
        "barlow_twins": lambda: parts["invariance"] + OFF * parts["redundancy"],
        "vicreg": lambda: 25 * parts["invariance"] + 25 * parts["variance"] + parts["covariance"],
        "vibcreg": lambda: 25 * parts["invariance"] + 25 * parts["variance"] + 200 * parts["covariance"],
        "w_mse": lambda: 2 - 2 * parts["cosine"],
    }[name]()
    torch.testing.assert_close(terms.total.detach(), explained)


@every
def test_without_state_and_without_micro_batches(name: str):
    module = loss(SPECS[name])
    projections = [z.detach() for z in vectors()]
    before = module(branches(projections)).total
    assert not hasattr(module, "commit")
    assert module.state_dict() == {}
    assert list(module.parameters()) == []
    assert not module.additive
    assert module.prevents_collapse
    torch.testing.assert_close(module(branches(projections)).total, before)


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype):
    half = [z.detach().to(dtype).requires_grad_() for z in vectors()]
    terms = loss(SPECS[name])(branches(half))
    exact = loss(SPECS[name])(branches([z.detach().double() for z in half])).total
    assert terms.total.dtype == torch.float32
    torch.testing.assert_close(terms.total, exact.float(), rtol=1e-4, atol=1e-5)
    terms.total.backward()
    assert all(z.grad is not None and z.grad.isfinite().all() for z in half)


# ---------------------------------------------------------------- options

WEIGHTS = {
    "barlow_twins": (BarlowTwins, ["off_diagonal", "scale"]),
    "vicreg": (VICReg, ["invariance", "variance", "covariance", "threshold"]),
    "vibcreg": (VIbCReg, ["invariance", "variance", "covariance", "threshold"]),
}
options = pytest.mark.parametrize(
    ("name", "option"), [(name, option) for name, (_, options) in WEIGHTS.items() for option in options]
)


@options
def test_a_scheduled_number_is_the_plain_one_of_its_step(name: str, option: str):
    projections = vectors()
    scheduled = loss(WEIGHTS[name][0](**{option: Linear(start=1.0, end=3.0)}))
    totals = []
    for step in (0, 5):
        for module in scheduled.modules():
            if isinstance(module, ScheduledNumber):
                module.before_step(step)
        totals.append(scheduled(branches(projections)).total)
        plain = loss(WEIGHTS[name][0](**{option: 1.0 + step / 5}))
        torch.testing.assert_close(totals[-1], plain(branches(projections)).total, rtol=1e-6, atol=0)
    assert totals[0] != totals[1]


@options
def test_a_negative_number_is_refused_wherever_it_comes(name: str, option: str):
    for value in (-1.0, Linear(start=1.0, end=-1.0)):
        with pytest.raises(UserError, match=rf"^loss\.{option}: is .*it has to be (at least|above) 0"):
            loss(WEIGHTS[name][0](**{option: value}))


def test_a_weight_of_zero_leaves_its_term_out():
    total = loss(VICReg(invariance=0, variance=0.0, covariance=2.0))(branches(vectors()))
    torch.testing.assert_close(total.total.detach(), 2 * total.terms["covariance"])
    with pytest.raises(UserError, match=r"loss\.scale: is 0"):
        loss(BarlowTwins(scale=0.0))


@pytest.mark.parametrize("spec", [VICReg, VIbCReg])
def test_eps_is_positive(spec: type[VICReg]):
    with pytest.raises(ValidationError):
        spec(eps=0.0)
