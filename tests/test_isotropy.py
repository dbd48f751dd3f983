"""LeJEPA and EMP-SSL: the papers' formulas, lightly's pieces, and what must not change them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import run_info
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from sslkit.batch import Branches, ViewSpec
from sslkit.errors import UserError
from sslkit_isotropy import EMPSSL, LeJEPA
from sslkit_isotropy.emp_ssl import EMPSSLLoss, coding_rate
from sslkit_isotropy.lejepa import LeJEPALoss, SIGReg
from sslkit_schedules import Linear

GLOBAL, LOCAL = ViewSpec(32), ViewSpec(16, "local")
D = 6
seeds = st.integers(0, 2**31 - 1)
both = pytest.mark.parametrize("spec", [LeJEPA(slices=32), EMPSSL()], ids=["lejepa", "emp_ssl"])


def lejepa(**options: Any) -> LeJEPALoss:
    module = LeJEPA(**options).build(D, run_info())
    assert isinstance(module, LeJEPALoss)
    return module


def emp_ssl(**options: Any) -> EMPSSLLoss:
    module = EMPSSL(**options).build(D, run_info())
    assert isinstance(module, EMPSSLLoss)
    return module


def branches(projections: list[Any], specs: tuple[ViewSpec, ...] | None = None) -> Branches:
    nothing = [None] * len(projections)
    return Branches(specs or (GLOBAL,) * len(projections), list(nothing), projections, list(nothing), list(nothing))


def vectors(views: int, n: int = 9, d: int = D, seed: int = 0) -> list[Tensor]:
    drawn = torch.randn(views, n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return [z.clone().requires_grad_() for z in drawn]


def directions(d: int, slices: int, seed: int = 0) -> Tensor:
    drawn = torch.randn(d, slices, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn / drawn.norm(dim=0)


def assert_same_gradients(ours: Tensor, theirs: Tensor, inputs: list[Tensor], rtol: float = 1e-10) -> None:
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-13)
    pairs = zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-13)


# ---------------------------------------------------------------- SIGReg


def epps_pulley(samples: Tensor, low: float, high: float, points: int) -> Tensor:
    """n * the integral of |phi_n(t) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) over [low, high], by the trapezoidal rule."""
    t = torch.linspace(low, high, points, dtype=torch.float64)
    empirical = torch.exp(1j * t[:, None] * samples).mean(1)
    integrand = (empirical - torch.exp(-(t**2) / 2)).abs() ** 2 * torch.exp(-(t**2) / 2)
    return len(samples) * torch.trapezoid(integrand, t)


def epps_pulley_over_the_line(samples: Tensor) -> Tensor:
    """The same integral over all t, which Gaussian integrals solve."""
    n = len(samples)
    among = torch.exp(-((samples[:, None] - samples) ** 2) / 2).sum() / n
    each = torch.exp(-(samples**2) / 4).sum()
    return math.sqrt(2 * math.pi) * (among - math.sqrt(2) * each + n / math.sqrt(3))


@pytest.mark.parametrize(
    ("knots", "t_max", "low", "high", "points"),
    [(17, 3.0, -3, 3, 33), (9, 5.0, -5, 5, 17)],  # the authors' code; the paper's algorithm 1
)
def test_sigreg_is_the_trapezoid_over_the_whole_interval(knots: int, t_max: float, low: int, high: int, points: int):
    (z,) = vectors(1)
    along = directions(D, 5)
    expected = torch.stack([epps_pulley(z @ along[:, s], low, high, points) for s in range(5)]).mean()
    assert_same_gradients(SIGReg(knots, t_max)(z, along), expected, [z])


def test_sigreg_with_many_knots_is_the_integral():
    (z,) = vectors(1)
    along = directions(D, 5)
    expected = torch.stack([epps_pulley_over_the_line(z @ along[:, s]) for s in range(5)]).mean()
    assert_same_gradients(SIGReg(200, 10.0)(z, along), expected, [z])


def test_the_default_knots_integrate_well():
    (z,) = vectors(1, n=100)
    along = directions(D, 5)
    coarse, fine = SIGReg(17, 3.0)(z, along), SIGReg(2000, 3.0)(z, along)
    torch.testing.assert_close(coarse, fine, rtol=2e-3, atol=0)


def test_sigreg_averages_over_views():
    z = torch.stack(vectors(3))
    along = directions(D, 5)
    sigreg = SIGReg(17, 3.0)
    torch.testing.assert_close(sigreg(z, along), torch.stack([sigreg(view, along) for view in z]).mean())


@given(seed=seeds)
@settings(deadline=None, max_examples=30)
def test_sigreg_turns_with_its_directions(seed: int):
    (z,) = vectors(1, seed=seed)
    along = directions(D, 8, seed)
    turn, _ = torch.linalg.qr(directions(D, D, seed + 1))
    sigreg = SIGReg(17, 3.0)
    torch.testing.assert_close(sigreg(z @ turn, turn.T @ along), sigreg(z, along))


def test_sigreg_of_a_standard_normal_is_its_expectation_at_any_size():
    sigreg = SIGReg(17, 3.0)
    # E |phi_n - phi|^2 = (1 - phi^2) / n, which leaves the integral of (1 - exp(-t^2)) exp(-t^2 / 2).
    expected = math.sqrt(2 * math.pi) * (math.erf(3 / math.sqrt(2)) - math.erf(3 * math.sqrt(1.5)) / math.sqrt(3))
    for n in (16, 256):
        generator = torch.Generator().manual_seed(n)
        z = torch.randn(150, n, D, generator=generator, dtype=torch.float64)
        assert sigreg(z, directions(D, 16)).item() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda z: torch.zeros_like(z),
        lambda z: z[:, :1].expand_as(z),  # one dimension, copied
        lambda z: z * torch.tensor([3.0, 1, 1, 1, 1, 0.1], dtype=z.dtype),
        lambda z: z + 1,
        lambda z: 2 * z,
        lambda z: z.sign(),  # unit variance, no correlation, and not normal
    ],
    ids=["collapsed", "rank_1", "anisotropic", "shifted", "scaled", "binary"],
)
def test_sigreg_is_larger_for_anything_else(spoil: Any):
    z = torch.randn(1024, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigreg, along = SIGReg(17, 3.0), directions(D, 256)
    assert sigreg(spoil(z), along) > 2 * sigreg(z, along)


# ---------------------------------------------------------------- LeJEPA


def lejepa_by_formula(z: list[Tensor], specs: tuple[ViewSpec, ...], along: Tensor, share: float) -> Tensor:
    """Algorithm 2, view by view and image by image, with the authors' integral."""
    n, d = z[0].shape
    prediction, sigreg = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    heads = [view for view, spec in zip(z, specs, strict=True) if spec.kind == "global"]
    for view in z:
        for b in range(n):
            centre = sum(head[b] for head in heads) / len(heads)
            prediction = prediction + ((view[b] - centre) ** 2).sum() / (len(z) * n * d)
        for s in range(along.shape[1]):
            sigreg = sigreg + epps_pulley(view @ along[:, s], -3, 3, 33) / (len(z) * along.shape[1])
    return (1 - share) * prediction + share * sigreg


@pytest.mark.parametrize("specs", [(GLOBAL, GLOBAL), (GLOBAL, LOCAL, GLOBAL, LOCAL), (LOCAL, GLOBAL)])
def test_lejepa_is_the_formula(specs: tuple[ViewSpec, ...]):
    z = vectors(len(specs))
    torch.manual_seed(3)
    ours = lejepa(sigreg=0.3, slices=7)(branches(z, specs))
    torch.manual_seed(3)
    drawn = torch.randn(D, 7, dtype=torch.float64)
    expected = lejepa_by_formula(z, specs, drawn / drawn.norm(dim=0), 0.3)
    assert_same_gradients(ours.total, expected, z)


@pytest.mark.filterwarnings("ignore")
def test_lejepa_against_lightly():
    pytest.importorskip("lightly")
    from lightly.loss.lejepa_loss import LeJEPALoss as Theirs

    specs = (GLOBAL, GLOBAL, LOCAL, LOCAL, LOCAL)
    z = [view.detach().float().requires_grad_() for view in vectors(5, n=32, d=16)]
    torch.manual_seed(3)
    ours = lejepa()(branches(z, specs)).total
    torch.manual_seed(3)
    theirs = Theirs()(global_proj=torch.stack(z[:2]), local_proj=torch.stack(z[2:]))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    for a, b in zip(torch.autograd.grad(ours, z), torch.autograd.grad(theirs, z), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_lejepa_draws_new_directions_of_length_1_from_the_default_generator(monkeypatch: pytest.MonkeyPatch):
    module, z = lejepa(slices=4), branches(vectors(2))
    used = []
    monkeypatch.setattr(module.sigreg, "forward", lambda z, along: used.append(along) or z.sum())
    for _ in range(2):
        module(z)
    torch.manual_seed(1)
    module(z)
    torch.manual_seed(1)
    module(z)
    assert not torch.equal(used[0], used[1])
    assert torch.equal(used[2], used[3])
    torch.testing.assert_close(used[0].norm(dim=0), torch.ones(4, dtype=torch.float64))


def test_lejepa_tells_its_parts():
    module = lejepa(sigreg=0.25, slices=5)
    terms = module(branches(vectors(2)))
    assert terms.terms.keys() == {"prediction", "sigreg"}
    assert terms.total.item() == pytest.approx(0.75 * terms.terms["prediction"] + 0.25 * terms.terms["sigreg"])


def test_lejepas_centre_takes_gradient():
    centre, local = vectors(2)
    terms = lejepa(slices=3, sigreg=1e-300)(branches([centre, local.detach()], (GLOBAL, LOCAL)))
    (gradient,) = torch.autograd.grad(terms.total, centre)
    torch.testing.assert_close(gradient, (centre - local).detach() / local.numel())


@pytest.mark.parametrize("specs", [(), (GLOBAL,), (LOCAL, LOCAL)])
def test_lejepa_refuses_views_that_do_not_suffice(specs: tuple[ViewSpec, ...]):
    with pytest.raises(UserError, match="two or more views, one of them global"):
        lejepa().needs(specs)


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "above 0"), (-0.1, "above 0"), (1.5, "is 1.5; it has to be at most 1")],
)
def test_lejepa_refuses_a_share_that_is_none(share: float, text: str):
    with pytest.raises(UserError, match=rf"^loss\.sigreg: .*{text}"):
        lejepa(sigreg=share)
    lejepa(sigreg=1.0)


def test_lejepa_refuses_a_share_that_grows_beyond_1():
    with pytest.raises(UserError, match=r"loss\.sigreg: is 1\.1 at step 6"):
        LeJEPA(sigreg=Linear(start=0.5, end=1.5)).build(D, run_info())


@pytest.mark.parametrize("options", [{"slices": 0}, {"knots": 1}, {"t_max": 0.0}])
def test_lejepa_refuses_what_it_cannot_integrate(options: dict[str, Any]):
    with pytest.raises(ValidationError):
        LeJEPA(**options)


# ---------------------------------------------------------------- EMP-SSL


def coding_rate_by_formula(z: Tensor, eps: float) -> Tensor:
    n, d = z.shape
    matrix = torch.eye(d, dtype=torch.float64)
    for b in range(n):
        matrix = matrix + d / (n * eps) * torch.outer(z[b], z[b])
    return torch.linalg.eigvalsh(matrix).log().sum() / 2


@pytest.mark.parametrize(("n", "d"), [(20, 5), (5, 20), (7, 7), (1, 4)])
def test_coding_rate_is_the_formula_for_any_shape(n: int, d: int):
    (z,) = vectors(1, n, d)
    assert_same_gradients(coding_rate(z, 0.3), coding_rate_by_formula(z, 0.3), [z])


def emp_ssl_by_formula(z: list[Tensor], invariance: float, eps: float) -> Tensor:
    """The paper maximises the mean over views of R(Z_i) + lambda D(Z_i, mean of the Z)."""
    z = [torch.stack([row / row.norm() for row in view]) for view in z]
    mean = sum(z) / len(z)
    objective = torch.zeros((), dtype=torch.float64)
    for view in z:
        cosines = [(view[b] @ mean[b]) / mean[b].norm() for b in range(len(view))]
        objective = objective + (coding_rate_by_formula(view, eps) + invariance * sum(cosines) / len(view)) / len(z)
    return -objective


@pytest.mark.parametrize("n", [4, 9])
@pytest.mark.parametrize("views", [2, 5])
def test_emp_ssl_is_the_formula(views: int, n: int):
    z = vectors(views, n)
    ours = emp_ssl(invariance=3.0, eps=0.5)(branches(z)).total
    assert_same_gradients(ours, emp_ssl_by_formula(z, 3.0, 0.5), z)


def test_emp_ssl_has_the_papers_defaults():
    z = vectors(3)
    torch.testing.assert_close(emp_ssl()(branches(z)).total, emp_ssl_by_formula(z, 200.0, 0.2))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("n", [8, 32])
def test_emp_ssl_against_lightlys_pieces(n: int):
    """lightly adds the coding rate, which the paper and its code maximise; its pieces are theirs."""
    pytest.importorskip("lightly")
    from lightly.loss.emp_ssl_loss import invariance_loss, tcr_loss

    z = [view.detach().float().requires_grad_() for view in vectors(4, n, 16)]
    terms = emp_ssl()(branches(z))
    unit = torch.nn.functional.normalize(torch.stack(z), dim=-1)
    rate, invariance = tcr_loss(unit, 0.2), invariance_loss(unit)
    torch.testing.assert_close(terms.terms["coding_rate"], rate.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(terms.terms["cosine"], -invariance.detach(), rtol=1e-5, atol=0)
    theirs = torch.autograd.grad(200 * invariance - rate, z)
    for a, b in zip(torch.autograd.grad(terms.total, z), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_emp_ssl_spreads_rather_than_collapses():
    spread = torch.eye(D, dtype=torch.float64)
    collapsed = spread[:1].expand(D, D)
    module = emp_ssl()
    apart, alike = module(branches([spread, spread])), module(branches([collapsed, collapsed]))
    assert apart.terms["cosine"] == alike.terms["cosine"] == 1
    # Six directions of weight 1 + 1 / eps each, against one of 1 + d / eps.
    assert apart.terms["coding_rate"].item() == pytest.approx(0.5 * D * math.log(1 + 1 / 0.2))
    assert alike.terms["coding_rate"].item() == pytest.approx(0.5 * math.log(1 + D / 0.2))
    assert apart.total < alike.total


@given(seed=seeds, scale=st.floats(1e-3, 1e3))
@settings(deadline=None, max_examples=30)
def test_emp_ssl_knows_neither_lengths_nor_rotations(seed: int, scale: float):
    z = vectors(3, seed=seed)
    turn, _ = torch.linalg.qr(directions(D, D, seed))
    module = emp_ssl()
    plain = module(branches(z)).total
    torch.testing.assert_close(module(branches([view * scale for view in z])).total, plain)
    torch.testing.assert_close(module(branches([view @ turn for view in z])).total, plain)


def test_emp_ssl_counts_local_views_like_global_ones():
    z = vectors(3)
    module = emp_ssl()
    assert torch.equal(module(branches(z, (LOCAL, GLOBAL, LOCAL))).total, module(branches(z)).total)
    assert module.needs((LOCAL, LOCAL)).projections == (0, 1)


def test_a_coding_rate_lost_to_rounding_is_nan(monkeypatch: pytest.MonkeyPatch):
    z = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)) @ torch.randn(4, 64)
    assert coding_rate(z, 0.2).isfinite()
    assert coding_rate(z, 1e-20).isnan()
    # What a factorisation that failed leaves behind is the device's affair.
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda matrix: (torch.ones_like(matrix), torch.tensor(3)))
    assert coding_rate(z, 0.2).isnan()


@pytest.mark.parametrize("specs", [(), (GLOBAL,)])
def test_emp_ssl_refuses_a_single_view(specs: tuple[ViewSpec, ...]):
    with pytest.raises(UserError, match=f"two or more views, and the view generator makes {len(specs)}"):
        emp_ssl().needs(specs)


@pytest.mark.parametrize("option", ["invariance", "eps"])
def test_emp_ssl_refuses_numbers_that_are_not_positive(option: str):
    with pytest.raises(UserError, match=rf"^loss\.{option}: .*above 0"):
        emp_ssl(**{option: 0.0})


# ---------------------------------------------------------------- both


@both
def test_needs_the_projections_of_every_view_and_nothing_else(spec: Any):
    module = spec.build(D, run_info())
    needs = module.needs((GLOBAL, LOCAL, GLOBAL))
    assert needs.projections == (0, 1, 2)
    assert needs.predictions == needs.targets == ()
    assert not module.additive
    assert module.prevents_collapse
    assert module.state_dict() == {}


@both
@given(seed=seeds)
@settings(deadline=None, max_examples=30)
def test_order_of_images_and_of_views_does_not_matter(spec: Any, seed: int):
    module, z = spec.build(D, run_info()), vectors(3, seed=seed)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    totals = []
    for projections in (z, [view[order] for view in z], z[::-1]):
        torch.manual_seed(seed)
        totals.append(module(branches(projections)).total)
    torch.testing.assert_close(totals[1], totals[0])
    torch.testing.assert_close(totals[2], totals[0])


@both
def test_micro_batches_do_not_add_up(spec: Any):
    module, z = spec.build(D, run_info()), vectors(2, n=12)
    totals = []
    for rows in (torch.arange(12), *torch.arange(12).chunk(3)):
        torch.manual_seed(0)
        totals.append(module(branches([view[rows] for view in z])).total)
    assert not torch.isclose(torch.stack(totals[1:]).mean(), totals[0], rtol=1e-3)


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(spec: Any, dtype: torch.dtype):
    z = [view.detach().to(dtype).requires_grad_() for view in vectors(2, n=32)]
    module = spec.build(D, run_info())
    torch.manual_seed(0)
    expected = module(branches([view.detach().float() for view in z])).total
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = module(branches(z)).total
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    total.backward()
    assert all(view.grad is not None and view.grad.isfinite().all() for view in z)


@both
def test_zero_vectors_stay_finite(spec: Any):
    z = [torch.zeros(4, D, requires_grad=True) for _ in range(2)]
    total = spec.build(D, run_info())(branches(z)).total
    total.backward()
    assert total.isfinite()
    assert all(view.grad is not None and view.grad.isfinite().all() for view in z)


@pytest.mark.parametrize(
    ("scheduled", "constant"),
    [
        (LeJEPA(slices=8, sigreg=Linear(start=0.1, end=0.6)), LeJEPA(slices=8, sigreg=0.3)),
        (EMPSSL(invariance=Linear(start=1.0, end=11.0)), EMPSSL(invariance=5.0)),
        (EMPSSL(eps=Linear(start=0.1, end=0.6)), EMPSSL(eps=0.3)),
    ],
    ids=["sigreg", "invariance", "eps"],
)
def test_weights_follow_their_schedules(scheduled: Any, constant: Any):
    z = branches(vectors(2))
    totals = []
    for spec in (scheduled, constant):
        module = spec.build(D, run_info())
        for part in module.modules():
            if hasattr(part, "before_step"):
                part.before_step(4)
        torch.manual_seed(0)
        totals.append(module(z).total)
    torch.testing.assert_close(totals[0], totals[1], rtol=1e-6, atol=0)


@both
def test_a_missing_projection_is_named(spec: Any):
    with pytest.raises(UserError, match="has no projection of view 1"):
        spec.build(D, run_info())(branches([vectors(1)[0], None]))


@both
def test_terms_do_not_hold_the_graph_and_commit_moves_nothing(spec: Any):
    module, z = spec.build(D, run_info()), branches(vectors(2))
    terms = module(z)
    assert terms.total.requires_grad
    assert not any(term.requires_grad for term in terms.terms.values())
    assert not hasattr(module, "commit")
    assert module.state_dict() == {}


@both
def test_a_spec_survives_json(spec: Any):
    table = spec.model_dump(mode="json")
    assert table.pop("use") in {"lejepa", "emp_ssl"}
    assert type(spec).model_validate(table) == spec
