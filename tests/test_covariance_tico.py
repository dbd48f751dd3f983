"""TiCo: the paper's algorithm and lightly's over several steps, its second moment, and which views it pairs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import run_info
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sslkit.batch import Branches, ViewSpec
from sslkit.errors import UserError
from sslkit.nn import ScheduledNumber
from sslkit_covariance import TiCo
from sslkit_covariance.tico import TiCoLoss
from sslkit_schedules import Linear

GLOBAL, LOCAL = ViewSpec(32), ViewSpec(16, "local")
DIM = 5
seeds = st.integers(0, 2**31 - 1)


def loss(**options: Any) -> TiCoLoss:
    module = TiCo(**options).build(DIM, run_info())
    assert isinstance(module, TiCoLoss)
    return module.double()


def branches(online: list[Any], targets: list[Any], specs: tuple[ViewSpec, ...] | None = None) -> Branches:
    nothing = [None] * len(online)
    return Branches(specs or (GLOBAL,) * len(online), list(nothing), online, list(nothing), targets)


def vectors(views: int = 2, n: int = 7, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    drawn = torch.randn(2, views, n, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return [z.clone().requires_grad_() for z in drawn[0]], [t.clone().requires_grad_() for t in drawn[1]]


def by_formula(z: Tensor, t: Tensor, c: Tensor, beta: float = 0.9, rho: float = 8.0) -> tuple[Tensor, Tensor]:
    """Algorithm 1, image by image: the loss of one direction, and C after it."""
    n = len(z)
    z = torch.stack([row / row.norm() for row in z])
    t = torch.stack([row / row.norm() for row in t]).detach()
    c = beta * c + (1 - beta) * sum(torch.outer(row, row).detach() for row in z) / n
    return sum(1 - z[b] @ t[b] + rho * z[b] @ c @ z[b] for b in range(n)) / n, c  # type: ignore[return-value]


@pytest.mark.parametrize(("beta", "rho"), [(0.9, 8.0), (0.0, 20.0), (0.5, 0.0)])
def test_values_gradients_and_second_moment_are_the_papers_over_several_steps(beta: float, rho: float):
    module, c = loss(beta=beta, rho=rho), torch.zeros(DIM, DIM, dtype=torch.float64)
    for step in range(4):
        (z, _), (_, t) = vectors(seed=step)
        given = branches([z, None], [None, t])
        expected, c = by_formula(z, t, c, beta, rho)
        total = module(given).total
        torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
        ours, theirs = (torch.autograd.grad(value, z)[0] for value in (total, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
        module.commit(given.detached())
        torch.testing.assert_close(module.second_moment, c, rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings("ignore")
def test_against_lightly_over_several_steps():
    pytest.importorskip("lightly")
    from lightly.loss.tico_loss import TiCoLoss as Theirs

    ours, theirs = loss(), Theirs()
    for step in range(4):
        (z, _), (_, t) = vectors(seed=step)
        given = branches([z, None], [None, t])
        total, expected = ours(given).total, theirs(z, t.detach())
        torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
        a, b = (torch.autograd.grad(value, z)[0] for value in (total, expected))
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
        ours.commit(given.detached())


def test_symmetric_is_the_mean_over_ordered_pairs_with_one_second_moment():
    module = loss(symmetric=True)
    online, targets = vectors(3)
    specs = (GLOBAL, GLOBAL, LOCAL)
    before = torch.eye(DIM, dtype=torch.float64) / DIM
    module.second_moment.copy_(before)
    pairs = [(0, 1), (1, 0), (2, 0), (2, 1)]
    invariance = torch.stack([
        1 - torch.cosine_similarity(online[i], targets[j].detach(), dim=1).mean() for i, j in pairs
    ]).mean()  # fmt: skip
    units = torch.stack([z / z.norm(dim=1, keepdim=True) for z in online])
    c = 0.9 * before + 0.1 * torch.einsum("vbi,vbj->ij", units, units).detach() / 21
    contrast = torch.einsum("vbi,ij,vbj->", units, c, units) / 21
    given = branches(online, [*targets[:2], None], specs)
    terms = module(given)
    torch.testing.assert_close(terms.total, invariance + 8 * contrast)
    torch.testing.assert_close(terms.terms["invariance"], invariance.detach())
    torch.testing.assert_close(terms.terms["contrast"], contrast.detach())
    module.commit(given.detached())
    torch.testing.assert_close(module.second_moment, c)


def test_forward_changes_nothing_and_commit_moves_once():
    module = loss()
    (z, _), (_, t) = vectors()
    given = branches([z, None], [None, t])
    first = module(given).total
    assert torch.equal(module(given).total, first)
    assert module.second_moment.abs().sum() == 0
    module.commit(given.detached())
    assert not module.second_moment.requires_grad
    assert module.second_moment.trace().item() == pytest.approx(0.1)  # of unit vectors, the trace is 1
    assert module(given).total > first


def test_no_gradient_reaches_a_target_or_the_second_moment():
    module = loss()
    (z, _), (_, t) = vectors()
    terms = module(branches([z, None], [None, t]))
    terms.total.backward()
    assert t.grad is None
    assert z.grad is not None
    assert z.grad.abs().sum() > 0
    assert list(module.parameters()) == []
    assert not any(term.requires_grad for term in terms.terms.values())


def test_state_goes_on_where_it_was():
    module = loss()
    for step in range(3):
        online, targets = vectors(seed=step)
        module.commit(branches(online, targets).detached())
    fresh = loss()
    fresh.load_state_dict(module.state_dict())
    online, targets = vectors(seed=9)
    assert torch.equal(fresh(branches(online, targets)).total, module(branches(online, targets)).total)
    assert list(module.state_dict()) == ["second_moment"]
    assert not torch.equal(fresh(branches(online, targets)).total, loss()(branches(online, targets)).total)


@given(seed=seeds, scale=st.floats(1e-3, 1e3))
@settings(deadline=None, max_examples=30)
def test_lengths_and_order_do_not_matter(seed: int, scale: float):
    online, targets = vectors(seed=seed)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    plain = loss()(branches(online, targets)).total
    other = loss()(branches([scale * z[order] for z in online], [t[order] / scale for t in targets])).total
    torch.testing.assert_close(plain, other)


def test_spread_costs_less_than_collapse():
    """With C of the batch itself: equal vectors have contrast 1, and d orthogonal directions 1 / d."""
    module = loss(beta=0.0)
    spread = torch.eye(DIM, dtype=torch.float64)
    same = spread[:1].expand(DIM, DIM)
    assert module(branches([spread, None], [None, spread])).terms["contrast"].item() == pytest.approx(1 / DIM)
    assert module(branches([same, None], [None, same])).terms["contrast"].item() == pytest.approx(1)
    assert module.prevents_collapse
    assert not module.additive


def test_needs():
    one_way, both = loss(), loss(symmetric=True)
    needs = one_way.needs((GLOBAL, GLOBAL))
    assert (needs.projections, needs.targets, needs.predictions) == ((0,), (1,), ())
    needs = one_way.needs((GLOBAL, LOCAL))
    assert (needs.projections, needs.targets) == ((1,), (0,))
    needs = both.needs((GLOBAL, GLOBAL, LOCAL))
    assert (needs.projections, needs.targets) == ((0, 1, 2), (0, 1))
    needs = both.needs((LOCAL, GLOBAL))
    assert (needs.projections, needs.targets) == ((0,), (1,))


@pytest.mark.parametrize("specs", [(), (GLOBAL,), (LOCAL, LOCAL)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_views_without_a_pair_are_refused(specs: tuple[ViewSpec, ...], symmetric: bool):
    with pytest.raises(UserError, match="two or more views"):
        loss(symmetric=symmetric).needs(specs)


def test_more_than_two_views_want_symmetric():
    with pytest.raises(UserError, match=r"^loss\.symmetric: .* makes 3; set loss\.symmetric = true"):
        loss().needs((GLOBAL, GLOBAL, LOCAL))


def test_a_missing_branch_is_named():
    online, targets = vectors()
    with pytest.raises(UserError, match="loss 'tico' has no projection of view 0"):
        loss()(branches([None, online[1]], targets))
    with pytest.raises(UserError, match="loss 'tico' has no target projection of view 1"):
        loss()(branches(online, [targets[0], None]))


def test_scheduled_numbers_are_those_of_the_step_also_in_commit():
    scheduled, plain = loss(beta=Linear(start=0.5, end=0.9), rho=Linear(start=8.0, end=4.0)), loss(beta=0.7, rho=6.0)
    for module in scheduled.modules():
        if isinstance(module, ScheduledNumber):
            module.before_step(5)  # halfway
    for step in range(2):
        given = branches(*vectors(seed=step))
        torch.testing.assert_close(scheduled(given).total, plain(given).total, rtol=1e-6, atol=0)
        for module in (scheduled, plain):
            module.commit(given.detached())
    torch.testing.assert_close(scheduled.second_moment, plain.second_moment, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("option", "value"), [("beta", 1.0), ("beta", -0.1), ("beta", Linear(start=0.9, end=1.1)), ("rho", -1.0)]
)
def test_numbers_out_of_range_are_refused(option: str, value: Any):
    with pytest.raises(UserError, match=rf"^loss\.{option}: is .*it has to be (at least 0|below 1)"):
        loss(**{option: value})


def test_half_precision_is_computed_in_float32():
    online, targets = vectors()
    module = TiCo().build(DIM, run_info())
    half = [(100 * z.detach()).half().requires_grad_() for z in online]
    total = module(branches(half, [t.detach().half() for t in targets])).total
    exact = by_formula(half[0].detach().double(), targets[1].detach().half().double(), torch.zeros(DIM, DIM))[0]
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, exact.float(), rtol=1e-4, atol=1e-4)
