"""MoCo and MoCo v3: values and gradients of the papers' formulas, the queue, and what must not change the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conftest import generator, run_info
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sslkit.batch import Branches, ViewSpec
from sslkit.errors import UserError
from sslkit_contrastive import MoCo, MoCoV3
from sslkit_contrastive.moco import MoCoLoss, MoCoV3Loss
from sslkit_schedules import Linear

GLOBAL, LOCAL = ViewSpec(32), ViewSpec(16, "local")
seeds = st.integers(0, 2**31 - 1)
both = pytest.mark.parametrize("version", [2, 3])
directions = pytest.mark.parametrize("symmetric", [False, True])


def moco(seed: int = 0, **options: Any) -> MoCoLoss:
    torch.manual_seed(seed)
    module = MoCo(**({"queue": 12} | options)).build(8, run_info())
    assert isinstance(module, MoCoLoss)
    return module


def moco_v3(**options: Any) -> MoCoV3Loss:
    module = MoCoV3(**options).build(8, run_info())
    assert isinstance(module, MoCoV3Loss)
    return module


def loss(version: int, **options: Any) -> MoCoLoss | MoCoV3Loss:
    return moco(symmetric=True, **options) if version == 2 else moco_v3(**options)


def branches(
    queries: Sequence[Tensor | None], keys: Sequence[Tensor | None], specs: tuple[ViewSpec, ...] | None = None
) -> Branches:
    """The queries are both projections and predictions; a loss takes the ones it wants."""
    specs = specs or (GLOBAL,) * len(queries)
    return Branches(specs, [None] * len(queries), list(queries), list(queries), list(keys))


def vectors(views: int, n: int = 6, d: int = 8, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    drawn = torch.randn(2, views, n, d, generator=generator(seed), dtype=torch.float64)
    return [q.requires_grad_() for q in drawn[0].clone()], [k.requires_grad_() for k in drawn[1].clone()]


def cos(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b) / (a.norm() * b.norm())


def total(values: list[Tensor]) -> Tensor:
    return torch.stack(values).sum()


def moco_equation_1(q: Tensor, k: Tensor, queue: Tensor, t: float) -> Tensor:
    losses = []
    for i in range(len(q)):
        positive = (cos(q[i], k[i].detach()) / t).exp()
        negatives = total([((q[i] / q[i].norm()) @ row / t).exp() for row in queue.double()])
        losses.append(-(positive / (positive + negatives)).log())
    return total(losses) / len(q)


def ctr(q: Tensor, k: Tensor, t: float) -> Tensor:
    """`ctr(q, k)` of MoCo v3's algorithm 1."""
    losses = []
    for i in range(len(q)):
        exponentials = torch.stack([(cos(q[i], key.detach()) / t).exp() for key in k])
        losses.append(-(exponentials[i] / exponentials.sum()).log())
    return 2 * t * total(losses) / len(q)


def assert_same(ours: Tensor, theirs: Tensor, inputs: list[Tensor], rtol: float = 1e-10) -> None:
    """Values and gradients."""
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol)
    gradients = [torch.autograd.grad(loss, inputs, allow_unused=True) for loss in (ours, theirs)]
    assert any(g is not None for g in gradients[1])
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert b.abs().max() > 1e-4
            torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


# ---------------------------------------------------------------- formulas


@pytest.mark.parametrize("t", [0.2, 0.07])
def test_moco_is_equation_1_of_the_first_view_s_query_and_the_second_s_key(t: float):
    (q0, q1), (k0, k1) = vectors(2)
    module = moco(temperature=t)
    ours = module(branches([q0, None], [None, k1])).total
    assert_same(ours, moco_equation_1(q0, k1, module.queue.rows, t), [q0, q1, k0])


@pytest.mark.parametrize("views", [2, 3])
def test_symmetric_moco_is_the_mean_over_ordered_pairs(views: int):
    q, k = vectors(views)
    module = moco(symmetric=True)
    terms = [moco_equation_1(q[i], k[j], module.queue.rows, 0.2) for i in range(views) for j in range(views) if i != j]
    assert_same(module(branches(q, k)).total, total(terms) / len(terms), q)


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("t", [0.2, 1.0])
def test_moco_v3_is_algorithm_1(views: int, t: float):
    q, k = vectors(views)
    expected = total([ctr(q[i], k[j], t) for i in range(views) for j in range(views) if i != j])
    assert_same(moco_v3(temperature=t)(branches(q, k)).total, expected, q)


@pytest.mark.filterwarnings("ignore")
def test_moco_and_its_queue_against_lightly():
    pytest.importorskip("lightly")
    from lightly.loss import NTXentLoss

    module = moco()
    theirs = NTXentLoss(temperature=0.2, memory_bank_size=(12, 8))
    theirs.memory_bank.bank = module.queue.rows.clone()
    for step in range(5):  # 6 keys a step into 12 places: around twice
        (q0, _), (_, k1) = (([v.detach().float().requires_grad_() for v in side]) for side in vectors(2, seed=step))
        batch = branches([q0, None], [None, k1])
        assert_same(module(batch).total, theirs(q0, k1.detach()), [q0], rtol=1e-6)
        module.commit(batch.detached())
        torch.testing.assert_close(module.queue.rows, theirs.memory_bank.bank, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- the queue


def test_the_queue_holds_the_newest_keys_of_length_1():
    module = moco(queue=7)
    pushed = [torch.randn(3, 8, generator=generator(step)) * 100 for step in range(4)]
    for keys in pushed:
        module.commit(branches([None, None], [torch.ones(3, 8), keys]))
    units = torch.nn.functional.normalize(torch.cat(pushed), dim=1)
    expected = torch.cat([units[7:12], units[5:7]])  # the 8th of 12 overwrites the 1st of 7 places
    torch.testing.assert_close(module.queue.rows, expected)


@pytest.mark.parametrize(
    ("symmetric", "specs", "keys"),
    [
        (False, (GLOBAL, GLOBAL), (1,)),
        (True, (GLOBAL, GLOBAL), (0, 1)),
        (False, (GLOBAL, GLOBAL, LOCAL), (1,)),
        (True, (GLOBAL, GLOBAL, LOCAL), (0, 1)),
        (False, (GLOBAL, LOCAL), (0,)),
    ],
)
def test_which_keys_enter_the_queue(symmetric: bool, specs: tuple[ViewSpec, ...], keys: tuple[int, ...]):
    module = moco(symmetric=symmetric)
    before = module.queue.rows.clone()
    k = [torch.nn.functional.normalize(key.detach().float(), dim=1) for key in vectors(len(specs), n=3)[1]]
    module.commit(branches([None] * len(specs), [*k], specs))
    expected = torch.cat([k[view] for view in keys])
    torch.testing.assert_close(module.queue.rows[: len(expected)], expected)
    torch.testing.assert_close(module.queue.rows[len(expected) :], before[len(expected) :])


def test_a_loss_takes_nothing_from_its_own_keys():
    """The queue moves in `commit` alone: forward twice, the same loss."""
    module, batch = moco(), branches(*vectors(2))
    first = module(batch).total
    torch.testing.assert_close(module(batch).total, first, rtol=0, atol=0)
    module.commit(batch.detached())
    assert module(batch).total > first + 0.01  # now the positive is among the negatives


@directions
def test_state_saved_and_restored_gives_the_same_next_loss(symmetric: bool):
    module, batch = moco(symmetric=symmetric), branches(*vectors(2))
    module.commit(batch.detached())
    fresh = moco(seed=1, symmetric=symmetric)
    assert not torch.equal(fresh(batch).total, module(batch).total)
    fresh.load_state_dict(module.state_dict())
    for step in range(3):
        following = branches(*vectors(2, seed=step))
        assert torch.equal(fresh(following).total, module(following).total)
        fresh.commit(following.detached())
        module.commit(following.detached())


@directions
def test_micro_batches_of_moco_add_up(symmetric: bool):
    module = moco(symmetric=symmetric)
    assert module.additive
    q, k = vectors(2, n=12)
    parts = [module(branches([v[rows] for v in q], [v[rows] for v in k])).total for rows in torch.arange(12).chunk(3)]
    torch.testing.assert_close(torch.stack(parts).mean(), module(branches(q, k)).total)
    assert not moco_v3().additive


# ---------------------------------------------------------------- views


def test_needs():
    assert (moco().needs((GLOBAL, GLOBAL)).projections, moco().needs((GLOBAL, GLOBAL)).targets) == ((0,), (1,))
    crops = (GLOBAL, GLOBAL, LOCAL, LOCAL)
    assert (moco().needs(crops).projections, moco().needs(crops).targets) == ((0, 2, 3), (1,))
    needs = moco(symmetric=True).needs(crops)
    assert (needs.projections, needs.predictions, needs.targets) == ((0, 1, 2, 3), (), (0, 1))
    needs = moco_v3().needs(crops)
    assert (needs.projections, needs.predictions, needs.targets) == ((), (0, 1, 2, 3), (0, 1))
    needs = moco_v3().needs((LOCAL, GLOBAL))
    assert (needs.predictions, needs.targets) == ((0,), (1,))


@both
def test_local_views_are_queries_but_no_keys(version: int):
    q, k = vectors(3)
    module = loss(version)
    found = module(branches(q, [*k[:2], None], (GLOBAL, GLOBAL, LOCAL))).total
    pairs = [(0, 1), (1, 0), (2, 0), (2, 1)]
    if version == 2:
        expected = total([moco_equation_1(q[i], k[j], module.queue.rows, 0.2) for i, j in pairs]) / 4  # type: ignore[union-attr, arg-type]
    else:
        expected = total([ctr(q[i], k[j], 0.2) for i, j in pairs])
    torch.testing.assert_close(found, expected)


def test_further_queries_of_moco_share_the_key():
    q, k = vectors(3)
    module, specs = moco(), (GLOBAL, GLOBAL, LOCAL)
    found = module(branches([q[0], None, q[2]], [None, k[1], None], specs)).total
    expected = total([moco_equation_1(q[i], k[1], module.queue.rows, 0.2) for i in (0, 2)]) / 2
    torch.testing.assert_close(found, expected)


# ---------------------------------------------------------------- invariances


@both
@given(seed=seeds, scale=st.floats(1e-2, 1e2))
@settings(deadline=None, max_examples=20)
def test_lengths_do_not_matter(version: int, seed: int, scale: float):
    q, k = vectors(2, seed=seed)
    scaled = branches([v * scale for v in q], [v / scale for v in k])
    torch.testing.assert_close(loss(version)(scaled).total, loss(version)(branches(q, k)).total)


@both
@given(seed=seeds, views=st.integers(2, 4))
@settings(deadline=None, max_examples=20)
def test_order_of_images_views_and_queue_does_not_matter(version: int, seed: int, views: int):
    q, k = vectors(views, seed=seed)
    module = loss(version)
    plain = module(branches(q, k))
    order = torch.randperm(6, generator=generator(seed))
    others = [module(branches([v[order] for v in q], [v[order] for v in k])), module(branches(q[::-1], k[::-1]))]
    if isinstance(module, MoCoLoss):
        module.queue.rows.copy_(module.queue.rows.flip(0))
        others.append(module(branches(q, k)))
    for other in others:
        torch.testing.assert_close(other.total, plain.total)
        torch.testing.assert_close(other.terms, plain.terms)


@both
def test_no_gradient_reaches_a_key(version: int):
    q, k = vectors(2)
    loss(version)(branches(q, k)).total.backward()
    assert all(v.grad is None for v in k)
    assert all(v.grad is not None and v.grad.abs().sum() > 0 for v in q)


# ---------------------------------------------------------------- terms, precision, schedules


@both
def test_terms_of_perfect_and_of_wrong_pairs(version: int):
    module = loss(version)
    apart = torch.eye(4, 8)
    if isinstance(module, MoCoLoss):
        module.queue.rows.copy_(apart.roll(4, 1).repeat(3, 1))
    assert module(branches([apart, apart], [apart, apart])).terms == {"contrastive_accuracy": 1, "cosine": 1}
    wrong = module(branches([apart, apart], [apart.roll(1, 0), apart.roll(1, 0)]))
    assert wrong.terms == {"contrastive_accuracy": 0, "cosine": 0}
    half = torch.cat([apart[:2], -apart[2:]])
    found = module(branches([apart, apart], [half, half]))
    assert found.terms == {"contrastive_accuracy": 0.5, "cosine": 0}
    assert module.prevents_collapse


@both
def test_terms_do_not_hold_the_graph(version: int):
    terms = loss(version)(branches(*vectors(2))).terms
    assert all(term.shape == () and not term.requires_grad for term in terms.values())


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(version: int, dtype: torch.dtype):
    q, k = ([(v.detach() * 1000).to(dtype) for v in side] for side in vectors(2))
    exact = loss(version)(branches([v.double() for v in q], [v.double() for v in k])).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(version)(branches(q, k)).total
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact.float(), rtol=1e-5, atol=1e-5)


@both
def test_a_low_temperature_and_zero_vectors_stay_finite(version: int):
    for scale in (0.0, 1.0):
        q = [(v.detach() * scale).float().requires_grad_() for v in vectors(2)[0]]
        k = [(v.detach() * scale).float() for v in vectors(2)[1]]
        found = loss(version, temperature=0.002)(branches(q, k)).total
        found.backward()
        assert found.isfinite()
        assert all(v.grad is not None and v.grad.isfinite().all() for v in q)


@both
def test_a_schedule_moves_the_temperature(version: int):
    module, batch = loss(version, temperature=Linear(start=1.0, end=0.5)), branches(*vectors(2))
    module.temperature.before_step(4)  # of 10
    expected = loss(version, temperature=0.8)(batch)
    torch.testing.assert_close(module(batch).total, expected.total, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(module(batch).terms, expected.terms, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- what is refused


@both
def test_what_does_not_suffice_is_refused(version: int):
    module = loss(version)
    (q, _), (k, _) = vectors(2)
    for specs in ((), (GLOBAL,), (LOCAL, LOCAL)):
        with pytest.raises(UserError, match="two or more views, one of them global"):
            module.needs(specs)
    with pytest.raises(UserError, match=r"no (projection|prediction) of view 1"):
        module(branches([q, None], [k, k]))
    with pytest.raises(UserError, match="no target projection of view 0"):
        module(branches([q, q], [None, k]))
    with pytest.raises(UserError, match=r"loss\.temperature: is .* above 0"):
        loss(version, temperature=0)


def test_a_batch_of_one_image_has_no_negatives_without_a_queue():
    batch = branches(*vectors(2, n=1))
    assert moco()(batch).total.isfinite()
    with pytest.raises(UserError, match=r"train\.batch_size above 1"):
        moco_v3()(batch)
