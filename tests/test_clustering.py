"""SwAV: Sinkhorn-Knopp and the loss by the paper's formulas, the queue, the prototypes, and what must not matter."""

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
from sslkit.nn import Queue, unit
from sslkit_clustering import SwAV
from sslkit_clustering.loss import SwAVLoss, sinkhorn
from sslkit_schedules import Linear

GLOBAL, LOCAL = ViewSpec(32), ViewSpec(16, "local")
TWO = (GLOBAL, GLOBAL)
MULTI = (GLOBAL, GLOBAL, LOCAL, LOCAL)
DIM, IMAGES = 5, 6
seeds = st.integers(0, 2**31 - 1)
views = pytest.mark.parametrize("specs", [TWO, MULTI, (GLOBAL, LOCAL), (LOCAL, GLOBAL, GLOBAL)], ids=len)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss(specs: tuple[ViewSpec, ...] = TWO, seed: int = 1, run: dict[str, Any] | None = None, **options: Any) -> Any:
    """A loss in float64, with prototypes of its own."""
    facts = {"views": specs, "total_steps": 100, "batch_size": IMAGES} | (run or {})
    torch.manual_seed(seed)
    module = SwAV(**({"prototypes": 7} | options)).build(DIM, run_info(**facts))
    assert isinstance(module, SwAVLoss)
    return module.double()


def branches(projections: list[Any], specs: tuple[ViewSpec, ...]) -> Branches:
    nothing = [None] * len(projections)
    return Branches(specs, list(nothing), projections, list(nothing), list(nothing))


def vectors(specs: tuple[ViewSpec, ...], seed: int = 0) -> list[Tensor]:
    return [z.clone().requires_grad_() for z in random(len(specs), IMAGES, DIM, seed=seed)]


# ---------------------------------------------------------------- Sinkhorn-Knopp


def by_hand(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Q = Diag(u) exp(scores / epsilon) Diag(v), entry by entry; prototypes in rows, as in the paper, sum to 1/K."""
    images, prototypes = scores.shape
    q = [[math.exp(float(scores[b, k]) / epsilon) for b in range(images)] for k in range(prototypes)]
    for _ in range(iterations):
        for k in range(prototypes):
            total = sum(q[k])
            q[k] = [value / total / prototypes for value in q[k]]
        for b in range(images):
            total = sum(q[k][b] for k in range(prototypes))
            for k in range(prototypes):
                q[k][b] /= total * images
    return torch.tensor([[q[k][b] * images for k in range(prototypes)] for b in range(images)], dtype=torch.float64)


@pytest.mark.parametrize(("epsilon", "iterations"), [(0.05, 3), (0.05, 1), (1.0, 3), (0.3, 10)])
def test_sinkhorn_is_the_papers(epsilon: float, iterations: int):
    scores = torch.tanh(random(6, 7))
    expected = by_hand(scores, epsilon, iterations)
    torch.testing.assert_close(sinkhorn(scores, epsilon, iterations), expected, rtol=1e-11, atol=0)
    as_tensor = torch.tensor(epsilon, dtype=torch.float64)
    torch.testing.assert_close(sinkhorn(scores, as_tensor, iterations), expected, rtol=1e-11, atol=0)


@pytest.mark.filterwarnings("ignore")
def test_sinkhorn_against_lightly():
    pytest.importorskip("lightly")
    from lightly.loss.swav_loss import sinkhorn as theirs

    scores = torch.tanh(random(20, 30))
    torch.testing.assert_close(sinkhorn(scores, 0.05, 3), theirs(scores, 3, 0.05), rtol=1e-11, atol=0)
    single = scores.float()
    torch.testing.assert_close(sinkhorn(single, 0.05, 3), theirs(single, 3, 0.05), rtol=1e-5, atol=1e-7)


@given(seed=seeds, images=st.integers(1, 9), prototypes=st.integers(1, 9), iterations=st.integers(1, 4))
@settings(deadline=None)
def test_every_code_is_a_distribution(seed: int, images: int, prototypes: int, iterations: int):
    codes = sinkhorn(torch.tanh(random(images, prototypes, seed=seed)), 0.05, iterations)
    assert bool((codes >= 0).all())
    torch.testing.assert_close(codes.sum(1), torch.ones(images, dtype=torch.float64))


@given(seed=seeds, images=st.integers(1, 9), prototypes=st.integers(1, 9))
@settings(deadline=None)
def test_many_iterations_share_the_images_equally(seed: int, images: int, prototypes: int):
    scores = torch.tanh(random(images, prototypes, seed=seed))
    codes = sinkhorn(scores, 0.5, 300)
    torch.testing.assert_close(codes.sum(0), torch.full((prototypes,), images / prototypes, dtype=torch.float64))
    torch.testing.assert_close(sinkhorn(scores, 0.5, 301), codes)  # where both hold, nothing moves any more


@given(seed=seeds, constant=st.floats(-100, 100))
@settings(deadline=None)
def test_a_constant_does_not_matter_to_sinkhorn_nor_does_a_prototypes_own(seed: int, constant: float):
    scores = torch.tanh(random(5, 8, seed=seed))
    codes = sinkhorn(scores, 0.1, 3)
    torch.testing.assert_close(sinkhorn(scores + constant, 0.1, 3), codes)
    torch.testing.assert_close(sinkhorn(scores + random(8, seed=seed + 1), 0.1, 3), codes)


@given(seed=seeds)
@settings(deadline=None)
def test_sinkhorn_follows_the_order_of_images_and_prototypes(seed: int):
    scores = torch.tanh(random(5, 8, seed=seed))
    draw = torch.Generator().manual_seed(seed)
    rows, columns = torch.randperm(5, generator=draw), torch.randperm(8, generator=draw)
    torch.testing.assert_close(sinkhorn(scores[rows][:, columns], 0.1, 3), sinkhorn(scores, 0.1, 3)[rows][:, columns])


def test_sinkhorn_neither_overflows_nor_loses_an_image():
    scores = torch.tanh(random(6, 7)).float() * 1000  # exp of these is infinite or 0 in float32
    scores[0] = -5000
    codes = sinkhorn(scores, 0.01, 3)
    assert bool(codes.isfinite().all())
    torch.testing.assert_close(codes.sum(1), torch.ones(6))


# ---------------------------------------------------------------- the loss


def by_formula(
    module: Any, projections: list[Tensor], specs: tuple[ViewSpec, ...], queues: list[Tensor] | None = None
) -> Tensor:
    """Image by image and pair by pair, with codes by hand."""
    c = module.prototypes
    total, terms = torch.zeros((), dtype=torch.float64), 0
    coded = [view for view, spec in enumerate(specs) if spec.kind == "global"]
    for number, own in enumerate(coded):
        images = torch.stack([z / z.norm() for z in projections[own].detach()])
        if queues is not None:
            images = torch.cat([images, queues[number]])
        q = by_hand(images @ c.detach().T, 0.05, 3)
        for view, z in enumerate(projections):
            if view == own:
                continue
            terms += 1
            for b in range(len(z)):
                scores = [z[b] / z[b].norm() @ prototype / 0.1 for prototype in c]
                normaliser = torch.stack(scores).logsumexp(0)
                for k, score in enumerate(scores):
                    total = total - q[b, k] * (score - normaliser) / len(z)
    return total / terms


@views
def test_value_and_gradients_are_the_formulas(specs: tuple[ViewSpec, ...]):
    module, projections = loss(specs), vectors(specs)
    expected = by_formula(module, projections, specs)
    wanted = [*projections, module.prototypes]
    expected_gradients = torch.autograd.grad(expected, wanted, materialize_grads=True)
    total = module(branches(projections, specs)).total
    gradients = torch.autograd.grad(total, wanted, materialize_grads=True)
    torch.testing.assert_close(total, expected, rtol=1e-11, atol=0)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.parametrize("specs", [TWO, MULTI], ids=len)
@pytest.mark.filterwarnings("ignore")
def test_against_lightly(specs: tuple[ViewSpec, ...], queued: bool):
    pytest.importorskip("lightly")
    from lightly.loss import SwaVLoss

    module, projections = loss(specs, queue=12 * queued, queue_start_epochs=0.0), vectors(specs)
    module.before_step(50)
    scores = [unit(z) @ module.prototypes.T for z in projections]
    stored = [queue.rows @ module.prototypes.T for queue in module.queues] if queued else None
    theirs = SwaVLoss()(scores[:2], scores[2:], stored).squeeze()
    ours = module(branches(projections, specs)).total
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=0)
    wanted = [*projections, module.prototypes]
    gradients = torch.autograd.grad(ours, wanted)
    for mine, other in zip(gradients, torch.autograd.grad(theirs, wanted), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-13)


@given(seed=seeds, scale=st.floats(1e-3, 1e3))
@settings(deadline=None)
def test_lengths_do_not_matter(seed: int, scale: float):
    module, projections = loss(), vectors(TWO, seed)
    plain = module(branches(projections, TWO)).total
    torch.testing.assert_close(module(branches([z * scale for z in projections], TWO)).total, plain)


@given(seed=seeds)
@settings(deadline=None)
def test_order_rotation_and_names_do_not_matter(seed: int):
    module, projections = loss(MULTI), vectors(MULTI, seed)
    plain = module(branches(projections, MULTI)).total
    draw = torch.Generator().manual_seed(seed)
    images, names = torch.randperm(IMAGES, generator=draw), torch.randperm(7, generator=draw)
    shuffled = module(branches([z[images] for z in projections], MULTI)).total
    torch.testing.assert_close(shuffled, plain)
    torch.testing.assert_close(module(branches(projections[::-1], MULTI[::-1])).total, plain)
    rotation = torch.linalg.qr(random(DIM, DIM, seed=seed)).Q
    with torch.no_grad():
        module.prototypes.copy_(module.prototypes[names] @ rotation)
    torch.testing.assert_close(module(branches([z @ rotation for z in projections], MULTI)).total, plain)


def test_terms_explain_the_loss():
    module, projections = loss(MULTI), vectors(MULTI)
    terms = module(branches(projections, MULTI))
    codes = [by_hand(unit(z.detach()) @ module.prototypes.detach().T, 0.05, 3) for z in projections[:2]]
    entropy = torch.stack([-(code * code.log()).sum(1).mean() for code in codes]).mean()
    torch.testing.assert_close(terms.terms["code_entropy"], entropy)
    torch.testing.assert_close(terms.terms["code_entropy"] + terms.terms["kl"], terms.total.detach())
    nearest = {int(k) for z in projections[:2] for k in (unit(z) @ module.prototypes.T).argmax(1)}
    assert terms.terms["prototypes_used"].item() == len(nearest) > 1
    assert not any(term.requires_grad or term.ndim for term in terms.terms.values())


def test_collapse_is_seen_and_is_worse_than_agreement():
    module = loss()
    alike = [torch.ones(IMAGES, DIM, dtype=torch.float64) for _ in TWO]
    terms = module(branches(alike, TWO))
    torch.testing.assert_close(terms.terms["code_entropy"], torch.tensor(math.log(7), dtype=torch.float64))
    assert terms.terms["prototypes_used"].item() == 1
    assert terms.total >= math.log(7)
    apart = module.prototypes.detach()[:IMAGES]  # each image at a prototype of its own, in both views
    assert module(branches([apart, apart], TWO)).total < terms.total
    assert module.prevents_collapse


def test_half_precision_is_computed_in_float32():
    module = loss().float()
    half = [(z.detach() * 1000).half().requires_grad_() for z in vectors(TWO)]
    total = module(branches(half, TWO)).total
    assert total.dtype == torch.float32
    exact = by_formula(module.double(), [z.detach().double() for z in half], TWO)
    torch.testing.assert_close(total.double(), exact.detach(), rtol=1e-5, atol=0)
    total.backward()
    assert all(z.grad is not None and z.grad.isfinite().all() for z in half)


def test_float64_projections_meet_float32_prototypes():
    module, projections = loss(queue=6, queue_start_epochs=0.0).float(), vectors(TWO)
    module.before_step(50)
    total = module(branches(projections, TWO)).total
    total.backward()
    assert total.dtype == torch.float64
    assert module.prototypes.grad.dtype == torch.float32


def test_no_gradient_flows_through_codes():
    """A global view without a global partner gives a code, and predicts none."""
    module, specs = loss((GLOBAL, LOCAL)), (GLOBAL, LOCAL)
    coded, predicting = vectors(specs)
    module(branches([coded, predicting], specs)).total.backward()
    assert coded.grad is None or not coded.grad.any()
    assert predicting.grad is not None
    assert predicting.grad.any()


def test_micro_batches_do_not_add_up():
    assert not loss().additive


# ---------------------------------------------------------------- the queue


def test_the_queue_is_the_formulas():
    module, projections = loss(queue=9, queue_start_epochs=0.0), vectors(TWO)
    module.before_step(99)
    expected = by_formula(module, projections, TWO, [queue.rows for queue in module.queues])
    wanted = [*projections, module.prototypes]
    total = module(branches(projections, TWO)).total
    torch.testing.assert_close(total, expected, rtol=1e-11, atol=0)
    for ours, theirs in zip(torch.autograd.grad(total, wanted), torch.autograd.grad(expected, wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    ("size", "start_epochs", "first"),
    [(12, 0.0, 2), (13, 0.0, 3), (3, 0.0, 1), (12, 2.0, 10), (90, 2.0, 15), (12, 0.5, 2)],
)
def test_the_queue_is_used_when_it_is_full_and_its_time_has_come(size: int, start_epochs: float, first: int):
    """Batches of 6 images, 5 steps an epoch."""
    module, plain = loss(queue=size, queue_start_epochs=start_epochs), loss()
    for step in range(first + 2):
        projections = [z.detach() for z in vectors(TWO, seed=step)]
        module.before_step(step)
        with_queue = module(branches(projections, TWO)).total
        without = plain(branches(projections, TWO)).total
        assert bool(with_queue == without) == (step < first), step
        if step == first:
            assert all(int(queue.pushed) >= size for queue in module.queues)
        module.commit(branches(projections, TWO))


def test_the_queues_hold_the_newest_projections_of_their_view():
    specs = (LOCAL, GLOBAL, GLOBAL)
    module = loss(specs, queue=8, queue_start_epochs=0.0)
    first, second = ([z.detach() for z in vectors(specs, seed)] for seed in (0, 1))
    module.commit(branches(first, specs))
    module.commit(branches(second, specs))
    for view, queue in zip((1, 2), module.queues, strict=True):
        expected = torch.cat([unit(first[view]), unit(second[view])])[-8:]
        assert {tuple(row) for row in queue.rows.tolist()} == {tuple(row) for row in expected.tolist()}


def test_forward_moves_nothing():
    module = loss(queue=12, queue_start_epochs=0.0)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.before_step(50)
    module(branches(vectors(TWO), TWO)).total.backward()
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_state_comes_back():
    module, other = (loss(seed=seed, queue=12, queue_start_epochs=0.0) for seed in (1, 2))
    module.commit(branches([z.detach() for z in vectors(TWO, 3)], TWO))
    other.load_state_dict(module.state_dict())
    for each in (module, other):
        each.commit(branches([z.detach() for z in vectors(TWO, 4)], TWO))
        each.before_step(2)
    projections = vectors(TWO, 5)
    assert torch.equal(module(branches(projections, TWO)).total, other(branches(projections, TWO)).total)


def test_without_a_queue_there_is_no_state_but_prototypes():
    module = loss()
    module.commit(branches(vectors(TWO), TWO))
    assert list(module.state_dict()) == ["prototypes"]
    assert not [m for m in module.modules() if isinstance(m, Queue)]


def test_a_queue_that_would_never_be_used_is_refused():
    with pytest.raises(UserError, match=r"loss\.queue: would never be used.* from step 75 on, and the run has 20"):
        loss(queue=12, run={"total_steps": 20})
    with pytest.raises(UserError, match=r"full after 100 steps"):
        loss(queue=600, queue_start_epochs=0.0)


# ---------------------------------------------------------------- prototypes


def test_prototypes_have_length_1_from_the_beginning():
    module = loss(prototypes=50)
    torch.testing.assert_close(module.prototypes.norm(dim=1), torch.ones(50, dtype=torch.float64), rtol=1e-6, atol=0)


def test_prototypes_are_frozen_and_then_trained_at_length_1():
    module, projections = loss(freeze_prototypes_epochs=0.6), vectors(TWO)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0, weight_decay=0.1)
    for step in range(5):
        before = module.prototypes.detach().clone()
        optimizer.zero_grad()
        module(branches(projections, TWO)).total.backward()
        module.after_backward(step)
        optimizer.step()
        module.after_step(step)
        moved = (module.prototypes.detach() - before).abs().max().item()
        assert moved == 0 if step < 3 else moved > 1e-3  # frozen for .6 of an epoch of 5 steps
        torch.testing.assert_close(module.prototypes.detach().norm(dim=1), torch.ones(7, dtype=torch.float64))


# ---------------------------------------------------------------- options and errors


def test_defaults_are_the_papers():
    options = SwAV()
    assert (options.prototypes, options.temperature, options.epsilon, options.iterations) == (3000, 0.1, 0.05, 3)
    assert (options.queue, options.queue_start_epochs, options.freeze_prototypes_epochs) == (0, 15, 1)


@pytest.mark.parametrize("name", ["temperature", "epsilon"])
def test_schedules_are_followed(name: str):
    scheduled = loss(**{name: Linear(start=0.04, end=0.24)})
    projections = vectors(TWO)
    for step, value in ((0, 0.04), (50, 0.14), (100, 0.24)):
        scheduled.before_step(step)
        for module in scheduled.children():
            if hasattr(module, "before_step"):
                module.before_step(step)
        expected = loss(**{name: value})(branches(projections, TWO)).total
        torch.testing.assert_close(scheduled(branches(projections, TWO)).total, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["temperature", "epsilon"])
@pytest.mark.parametrize("value", [0.0, -1.0, Linear(start=0.1, end=-0.1)])
def test_a_temperature_that_is_not_positive_is_refused(name: str, value: Any):
    with pytest.raises(UserError, match=rf"loss\.{name}: is .* above 0"):
        loss(**{name: value})


@pytest.mark.parametrize(
    "options", [{"prototypes": 0}, {"iterations": 0}, {"queue": -1}, {"queue_start_epochs": -1.0}, {"temperature": "x"}]
)
def test_wrong_options_are_refused(options: dict[str, Any]):
    with pytest.raises(ValidationError):
        SwAV(**options)


@pytest.mark.parametrize("specs", [(), (GLOBAL,), (LOCAL, LOCAL)])
def test_views_without_a_code_or_a_partner_are_refused(specs: tuple[ViewSpec, ...]):
    with pytest.raises(UserError, match="two or more views"):
        loss().needs(specs)


def test_needs_the_projections_of_every_view():
    needs = loss().needs(MULTI)
    assert needs.projections == (0, 1, 2, 3)
    assert needs.predictions == needs.targets == ()


def test_a_missing_projection_is_named():
    with pytest.raises(UserError, match="no projection of view 1"):
        loss()(branches([vectors(TWO)[0], None], TWO))
