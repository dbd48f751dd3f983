"""NNCLR and NNBYOL: values and gradients of the papers' formulas, the queue, and what must not change the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import generator, run_info
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sslkit.batch import Branches, ViewSpec
from sslkit.errors import UserError
from sslkit_neighbours import NNBYOL, NNCLR
from sslkit_neighbours.nnbyol import NNBYOLLoss
from sslkit_neighbours.nnclr import NNCLRLoss
from sslkit_schedules import Linear

GLOBAL, LOCAL = ViewSpec(32), ViewSpec(16, "local")
seeds = st.integers(0, 2**31 - 1)
names = pytest.mark.parametrize("name", ["nnclr", "byol", "simsiam"])


def nnclr(**options: Any) -> NNCLRLoss:
    module = NNCLR(**({"queue": 12} | options)).build(8, run_info())
    assert isinstance(module, NNCLRLoss)
    return module


def nnbyol(**options: Any) -> NNBYOLLoss:
    module = NNBYOL(**({"queue": 12} | options)).build(8, run_info())
    assert isinstance(module, NNBYOLLoss)
    return module


def loss(name: str, seed: int = 0) -> NNCLRLoss | NNBYOLLoss:
    torch.manual_seed(seed)
    return nnclr() if name == "nnclr" else nnbyol(form=name)


def branches(
    predictions: Sequence[Tensor | None], sought: Sequence[Tensor | None], specs: tuple[ViewSpec, ...] | None = None
) -> Branches:
    """What neighbours are sought for is both projections and targets; a loss takes the ones it wants."""
    specs = specs or (GLOBAL,) * len(predictions)
    return Branches(specs, [None] * len(predictions), list(sought), list(predictions), list(sought))


def vectors(views: int, n: int = 6, d: int = 8, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    drawn = torch.randn(2, views, n, d, generator=generator(seed), dtype=torch.float64)
    return [p.requires_grad_() for p in drawn[0].clone()], [z.requires_grad_() for z in drawn[1].clone()]


def cos(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b) / (a.norm() * b.norm())


def neighbour(z: Tensor, queue: Tensor) -> Tensor:
    """NN(z, Q) of the paper's equation 4: the least distance between vectors of length 1."""
    distances = [(z / z.norm() - row / row.norm()).norm().item() for row in queue.double()]
    return queue.double()[distances.index(min(distances))]


def nnclr_equation_3(z: Tensor, p: Tensor, queue: Tensor, t: float) -> Tensor:
    losses = []
    for i in range(len(z)):
        exponentials = torch.stack([(cos(neighbour(z[i], queue), other) / t).exp() for other in p])
        losses.append(-(exponentials[i] / exponentials.sum()).log())
    return torch.stack(losses).mean()


def distance(p: Tensor, z: Tensor, queue: Tensor, form: str) -> Tensor:
    cosine = torch.stack([cos(p[i], neighbour(z[i], queue)) for i in range(len(p))]).mean()
    return 2 - 2 * cosine if form == "byol" else -cosine


def by_formula(name: str, pairs: list[tuple[int, int]], p: list[Tensor], z: list[Tensor], queue: Tensor) -> Tensor:
    """Over pairs (predicted from, sought for)."""
    if name == "nnclr":
        return torch.stack([nnclr_equation_3(z[j], p[i], queue, 0.1) for i, j in pairs]).mean()
    terms = torch.stack([distance(p[i], z[j], queue, name) for i, j in pairs])
    return terms.sum() if name == "byol" else terms.mean()


def assert_same(ours: Tensor, theirs: Tensor, inputs: list[Tensor], rtol: float = 1e-10) -> None:
    """Values and gradients."""
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol)
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        assert b.abs().max() > 1e-4
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


# ---------------------------------------------------------------- formulas


@names
@pytest.mark.parametrize("views", [2, 3])
def test_value_and_gradient_are_the_formulas(name: str, views: int):
    p, z = vectors(views)
    module = loss(name)
    pairs = [(i, j) for i in range(views) for j in range(views) if i != j]
    assert_same(module(branches(p, z)).total, by_formula(name, pairs, p, z, module.queue.rows), p)


def test_the_temperature_of_nnclr():
    p, z = vectors(2)
    module = nnclr(temperature=0.4)
    expected = sum(nnclr_equation_3(z[j], p[1 - j], module.queue.rows, 0.4) for j in range(2)) / 2
    assert isinstance(expected, Tensor)
    assert_same(module(branches(p, z)).total, expected, p)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["byol", "simsiam"])
def test_nnbyol_and_its_queue_against_lightly(form: str):
    pytest.importorskip("lightly")
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import NNMemoryBankModule

    module, bank, criterion = loss(form), NNMemoryBankModule((12, 8)), NegativeCosineSimilarity()
    bank.bank = module.queue.rows.clone()
    for step in range(5):  # 6 targets a step into 12 places: around twice
        p, z = ([v.detach().float().requires_grad_() for v in side] for side in vectors(2, seed=step))
        batch = branches(p, z)
        second = bank(z[1].detach(), update=False)
        first = bank(z[0].detach(), update=True)
        theirs = 0.5 * (criterion(p[0], second) + criterion(p[1], first))
        if form == "byol":
            theirs = 4 + 4 * theirs
        assert_same(module(batch).total, theirs, p, rtol=1e-6)
        module.commit(batch.detached())
        torch.testing.assert_close(module.queue.rows, F.normalize(bank.bank, dim=1))


@pytest.mark.filterwarnings("ignore")
def test_nnclr_s_neighbours_against_lightly():
    """The losses differ: lightly adds neighbours among themselves and predictions among themselves as negatives."""
    pytest.importorskip("lightly")
    from lightly.models.modules import NNMemoryBankModule

    module, bank = nnclr(queue=50), NNMemoryBankModule((50, 8))
    bank.bank = module.queue.rows.clone()
    p, z = ([v.detach().float().requires_grad_() for v in side] for side in vectors(2, n=20))
    own = torch.arange(20)
    theirs = [F.cross_entropy(bank(z[j]) @ F.normalize(p[1 - j], dim=1).mT / 0.1, own) for j in range(2)]
    assert_same(module(branches(p, z)).total, (theirs[0] + theirs[1]) / 2, p, rtol=1e-5)


# ---------------------------------------------------------------- the queue


@names
def test_the_first_global_view_enters_the_queue_after_the_step(name: str):
    module = loss(name)
    before = module.queue.rows.clone()
    p, z = vectors(3)
    batch = branches(p, z, (LOCAL, GLOBAL, GLOBAL))
    module(batch)
    assert torch.equal(module.queue.rows, before)  # forward is pure
    module.commit(batch.detached())
    torch.testing.assert_close(module.queue.rows[:6], F.normalize(z[1].detach().float(), dim=1))
    assert torch.equal(module.queue.rows[6:], before[6:])


@names
def test_neighbours_are_of_earlier_steps(name: str):
    """Once a view is in the queue, its nearest neighbour is itself."""
    module = loss(name)
    batch = branches(*vectors(2))
    assert module(batch).terms["neighbour_cosine"] < 0.9
    module.commit(batch.detached())
    other = vectors(2)[1]
    same = branches(vectors(2)[0], [other[0], other[0]])
    torch.testing.assert_close(module(same).terms["neighbour_cosine"].item(), 1.0, rtol=0, atol=1e-6)


@names
def test_state_saved_and_restored_gives_the_same_next_loss(name: str):
    module, fresh = loss(name), loss(name, seed=1)
    module.commit(branches(*vectors(2)).detached())
    assert not torch.equal(fresh(branches(*vectors(2))).total, module(branches(*vectors(2))).total)
    fresh.load_state_dict(module.state_dict())
    for step in range(3):
        batch = branches(*vectors(2, seed=step))
        assert torch.equal(fresh(batch).total, module(batch).total)
        fresh.commit(batch.detached())
        module.commit(batch.detached())


@pytest.mark.parametrize("name", ["byol", "simsiam"])
def test_micro_batches_of_nnbyol_add_up(name: str):
    module = loss(name)
    p, z = vectors(2, n=12)
    rows = torch.arange(12).chunk(3)
    parts = [module(branches([v[r] for v in p], [v[r] for v in z])).total for r in rows]
    torch.testing.assert_close(torch.stack(parts).mean(), module(branches(p, z)).total)
    assert module.additive
    assert not module.prevents_collapse
    assert not nnclr().additive
    assert nnclr().prevents_collapse


# ---------------------------------------------------------------- views


def test_needs():
    for specs, predicted, sought in (
        ((GLOBAL, GLOBAL), (0, 1), (0, 1)),
        ((GLOBAL, GLOBAL, LOCAL), (0, 1, 2), (0, 1)),
        ((GLOBAL, LOCAL), (1,), (0,)),
    ):
        needs = nnclr().needs(specs)
        assert (needs.predictions, needs.projections, needs.targets) == (predicted, sought, ())
        needs = nnbyol().needs(specs)
        assert (needs.predictions, needs.projections, needs.targets) == (predicted, (), sought)


@names
def test_local_views_are_predicted_from_but_no_neighbours_are_sought_for_them(name: str):
    p, z = vectors(3)
    module = loss(name)
    found = module(branches(p, [*z[:2], None], (GLOBAL, GLOBAL, LOCAL))).total
    expected = by_formula(name, [(0, 1), (1, 0), (2, 0), (2, 1)], p, z, module.queue.rows)
    torch.testing.assert_close(found, expected)


# ---------------------------------------------------------------- invariances


@names
@given(seed=seeds, scale=st.floats(1e-2, 1e2))
@settings(deadline=None, max_examples=20)
def test_lengths_do_not_matter(name: str, seed: int, scale: float):
    p, z = vectors(2, seed=seed)
    module = loss(name)
    scaled = branches([v * scale for v in p], [v / scale for v in z])
    torch.testing.assert_close(module(scaled).total, module(branches(p, z)).total)


@names
@given(seed=seeds, views=st.integers(2, 4))
@settings(deadline=None, max_examples=20)
def test_order_of_images_views_and_queue_does_not_matter(name: str, seed: int, views: int):
    p, z = vectors(views, seed=seed)
    module = loss(name)
    plain = module(branches(p, z))
    order = torch.randperm(6, generator=generator(seed))
    others = [module(branches([v[order] for v in p], [v[order] for v in z])), module(branches(p[::-1], z[::-1]))]
    module.queue.rows.copy_(module.queue.rows.flip(0))
    others.append(module(branches(p, z)))
    for other in others:
        torch.testing.assert_close(other.total, plain.total)
        torch.testing.assert_close(other.terms, plain.terms)


@names
def test_gradient_flows_through_predictions_alone(name: str):
    p, z = vectors(2)
    loss(name)(branches(p, z)).total.backward()
    assert all(v.grad is None for v in z)
    assert all(v.grad is not None and v.grad.abs().sum() > 0 for v in p)


# ---------------------------------------------------------------- terms, precision, schedules


@names
def test_terms(name: str):
    module = loss(name)
    module.queue.rows.copy_(torch.eye(8).roll(1, 0).repeat(2, 1)[:12])
    near = torch.eye(4, 8) + 0.5 * torch.eye(4, 8).roll(4, 1)  # nearest to the first four axes, at atan(1/2)
    apart = torch.eye(4, 8)
    found = module(branches([apart, apart], [near, near])).terms
    expected = {"cosine": torch.tensor(1.0), "neighbour_cosine": torch.tensor(2 / math.sqrt(5))}
    if name == "nnclr":
        expected |= {"contrastive_accuracy": torch.tensor(1.0)}
    torch.testing.assert_close(found, expected)
    swapped = module(branches([apart.flip(0), apart[[1, 0, 2, 3]]], [near, near])).terms
    assert swapped["cosine"] == 0.25  # of eight pairs two agree
    if name == "nnclr":
        assert swapped["contrastive_accuracy"] == 0.25
        alike = torch.ones(4, 8)
        assert module(branches([alike, alike], [alike, alike])).terms["contrastive_accuracy"] == 0
    assert all(term.shape == () and not term.requires_grad for term in module(branches(*vectors(2))).terms.values())


@names
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype):
    p, z = ([(v.detach() * 1000).to(dtype) for v in side] for side in vectors(2))
    exact = loss(name)(branches([v.double() for v in p], [v.double() for v in z])).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(name)(branches(p, z)).total
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact.float(), rtol=1e-5, atol=1e-5)


@names
def test_neighbours_are_told_apart_in_float32_under_autocast(name: str):
    module = loss(name)
    module.queue.rows[0], module.queue.rows[1] = (
        torch.eye(8)[0],
        F.normalize(torch.eye(8)[0] + 0.02 * torch.eye(8)[1], dim=0),
    )
    z = module.queue.rows[1].expand(6, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = module(branches([v.float() for v in vectors(2)[0]], [z, z])).terms["neighbour_cosine"]
    torch.testing.assert_close(found, torch.tensor(1.0), rtol=0, atol=1e-5)  # 0.9998 with its neighbour


@names
def test_zero_vectors_stay_finite(name: str):
    p = [torch.zeros(4, 8, requires_grad=True) for _ in range(2)]
    found = loss(name)(branches(p, [torch.zeros(4, 8)] * 2)).total
    found.backward()
    assert found.isfinite()
    assert all(v.grad is not None and v.grad.isfinite().all() for v in p)


def test_a_schedule_moves_the_temperature():
    torch.manual_seed(0)
    module, batch = nnclr(temperature=Linear(start=1.0, end=0.5)), branches(*vectors(2))
    module.temperature.before_step(4)  # of 10
    torch.manual_seed(0)
    expected = nnclr(temperature=0.8)(batch)
    torch.testing.assert_close(module(batch).total, expected.total, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(module(batch).terms, expected.terms, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- what is refused


@names
def test_what_does_not_suffice_is_refused(name: str):
    module = loss(name)
    (p, _), (z, _) = vectors(2)
    for specs in ((), (GLOBAL,), (LOCAL, LOCAL)):
        with pytest.raises(UserError, match="two or more views, one of them global"):
            module.needs(specs)
    with pytest.raises(UserError, match="no prediction of view 1"):
        module(branches([p, None], [z, z]))
    with pytest.raises(UserError, match=r"no (target )?projection of view 0"):
        module(branches([p, p], [None, z]))


def test_nnclr_refuses_a_batch_of_one_image_and_a_temperature_of_zero():
    with pytest.raises(UserError, match=r"train\.batch_size above 1"):
        nnclr()(branches(*vectors(2, n=1)))
    with pytest.raises(UserError, match=r"loss\.temperature: is 0.* above 0"):
        nnclr(temperature=0)
