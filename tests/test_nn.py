"""Pieces that losses and heads are made of: vectors of length 1, numbers on a schedule, queues, BatchNorm in groups."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from conftest import run_info
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sslkit.api import RunInfo, Schedule
from sslkit.batch import ViewSpec
from sslkit.errors import UserError
from sslkit.nn import Queue, ScheduledNumber, chosen, global_views, precise, unit
from sslkit_schedules import Linear, Piecewise, WarmupCosine

RUN = run_info(total_steps=100)
seeds = st.integers(0, 2**31 - 1)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ---------------------------------------------------------------- vectors and views


@pytest.mark.parametrize(
    ("given_dtype", "dtype"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_vectors_are_made_unit_in_float32_or_better(given_dtype: torch.dtype, dtype: torch.dtype):
    vectors = (drawn(2, 5, 256) * 100).to(given_dtype)  # squares beyond float16's 65504
    assert precise(vectors).dtype == dtype
    assert torch.equal(precise(vectors).to(given_dtype), vectors)
    lengths = vectors.double().norm(dim=-1, keepdim=True)
    torch.testing.assert_close(unit(vectors), (vectors.double() / lengths).to(dtype))


def test_a_zero_vector_stays_zero_and_takes_a_finite_gradient():
    zero = torch.zeros(2, 4, requires_grad=True)
    unit(zero).sum().backward()
    assert torch.equal(unit(zero), torch.zeros(2, 4))
    assert zero.grad is not None
    assert zero.grad.isfinite().all()


def test_chosen_gives_views_in_the_order_asked_for_and_names_one_that_is_missing():
    tensors = [torch.zeros(1), None, torch.ones(1)]
    assert [t.item() for t in chosen(tensors, (2, 0), "loss 'x' has no target")] == [1.0, 0.0]
    with pytest.raises(UserError, match=r"^loss 'x' has no target of view 1: no part of the recipe makes it$"):
        chosen(tensors, (0, 1), "loss 'x' has no target")


def test_global_views_are_numbered_among_all():
    local = ViewSpec(16, "local")
    assert global_views((local, ViewSpec(32), local, ViewSpec(32))) == (1, 3)
    assert global_views((local,)) == ()


# ---------------------------------------------------------------- numbers on a schedule


class Late(Schedule):
    """Refuses every run."""

    def build(self, run: RunInfo) -> Any:
        raise UserError("schedule 'late': too late", "really")


@given(value=st.floats(-1e300, 1e300))
def test_a_plain_number_is_given_as_it_is(value: float):
    number = ScheduledNumber(value, RUN, "loss.weight")
    number.before_step(50)
    assert type(number()) is float
    assert number() == value


def test_a_schedule_is_followed_by_one_tensor():
    number = ScheduledNumber(Linear(start=0.1, end=0.3), RUN, "loss.weight")
    tensor = number()
    assert isinstance(tensor, Tensor)
    assert tensor.shape == ()
    assert tensor.item() == pytest.approx(0.1), "before the first step, the value of step 0"
    for step in (0, 1, 50, 99):
        number.before_step(step)
        assert number() is tensor, "compiled code reads the same tensor at every step"
        assert tensor.item() == pytest.approx(0.1 + 0.2 * step / 100)


def test_a_schedule_does_not_belong_to_the_state():
    for scheduled in (0.1, Linear(start=0.1, end=0.3)):
        assert ScheduledNumber(scheduled, RUN, "loss.weight").state_dict() == {}


@pytest.mark.parametrize("moved", [copy.deepcopy, lambda number: number.to(torch.float64)])
def test_a_scheduled_number_follows_its_schedule_after_a_move(moved: Any):
    number = moved(ScheduledNumber(Linear(start=0.1, end=0.3), RUN, "loss.weight"))
    number.before_step(50)
    assert number().item() == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("scheduled", "text"),
    [
        (0.0, "is 0; it has to be above 0"),
        (-1.0, "is -1;"),
        (Linear(start=0.5, end=-0.5), "is 0 at step 50 of 100"),
        (WarmupCosine(peak=1.0, warmup_steps=10), "is 0 at step 0 of 100"),
    ],
)
def test_a_number_that_is_not_above_its_bound_is_refused(scheduled: Any, text: str):
    with pytest.raises(UserError, match=rf"^loss\.temperature: {text}"):
        ScheduledNumber(scheduled, RUN, "loss.temperature", above=0)
    ScheduledNumber(scheduled, RUN, "loss.temperature")


@pytest.mark.parametrize(
    ("limit", "inside", "outside"), [("least", 0.5, 0.4), ("below", 0.4, 0.5), ("most", 0.5, 0.6), ("above", 0.6, 0.5)]
)
def test_every_limit_is_held_at_every_step(limit: str, inside: float, outside: float):
    ScheduledNumber(inside, RUN, "loss.x", **{limit: 0.5})
    once = Piecewise(points=((0.0, inside), (57.0, outside), (58.0, inside)), unit="steps", shape="step")
    for scheduled in (outside, once):
        with pytest.raises(UserError, match=r"^loss\.x: is .*; it has to be .* 0\.5"):
            ScheduledNumber(scheduled, RUN, "loss.x", **{limit: 0.5})


def test_a_bound_is_excluded_and_need_not_be_0():
    ScheduledNumber(math.nextafter(0.5, 1), RUN, "loss.x", above=0.5)
    with pytest.raises(UserError, match=r"has to be above 0\.5"):
        ScheduledNumber(0.5, RUN, "loss.x", above=0.5)


def test_an_error_of_a_schedule_names_the_option():
    with pytest.raises(UserError) as caught:
        ScheduledNumber(Late(), RUN, "loss.temperature")
    assert caught.value.lines == ("loss.temperature: schedule 'late': too late", "loss.temperature: really")


# ---------------------------------------------------------------- the queue


@given(
    size=st.integers(1, 12),
    pushes=st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=12),
    seed=seeds,
)
@settings(deadline=None)
def test_a_queue_is_a_list_whose_oldest_rows_are_overwritten(size: int, pushes: list[tuple[int, bool]], seed: int):
    torch.manual_seed(seed)
    queue = Queue(size, 3)
    plain = list(queue.rows.clone())
    position = 0
    for number, (count, reload) in enumerate(pushes):
        rows = torch.randn(count, 3)
        queue.push(rows)
        for row in rows:
            plain[position] = row
            position = (position + 1) % size
        assert torch.equal(queue.rows, torch.stack(plain)), f"after push {number}"
        assert queue.pushed == sum(count for count, _ in pushes[: number + 1])
        if reload:  # a checkpoint at any time changes nothing
            state = queue.state_dict()
            queue = Queue(size, 3)
            queue.load_state_dict(state)


def test_a_queue_begins_with_random_rows_of_length_1_and_position_0():
    queue = Queue(50, 8)
    torch.testing.assert_close(queue.rows.norm(dim=1), torch.ones(50))
    assert len(queue.rows.unique(dim=0)) == 50
    assert queue.pushed == 0
    assert set(queue.state_dict()) == {"rows", "pushed"}
    assert not list(queue.parameters())


def test_a_queue_keeps_no_graph_and_no_other_type():
    queue, rows = Queue(4, 2), torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
    held = queue.rows
    queue.push(rows * 2)
    assert queue.rows is held, "in place, where a captured graph reads it"
    assert not queue.rows.requires_grad
    assert queue.rows.dtype == torch.float32
    assert torch.equal(queue.rows[:2], torch.full((2, 2), 2.0))
