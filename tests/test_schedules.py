"""Schedules: the papers' formulas, exact ends, bounds that hold in floating point."""

from __future__ import annotations

import json
import math
import pickle
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from sslkit.api import RunInfo
from sslkit.errors import UserError
from sslkit_ema import EMA
from sslkit_schedules import Constant, Cosine, Linear, Piecewise, Step, WarmupCosine

numbers = st.floats(-1e6, 1e6)
lengths = st.integers(1, 1_000_000)


def run(total_steps: int = 1000, **changes: Any) -> RunInfo:
    facts: dict[str, Any] = {
        "seed": 0,
        "device": "cpu",
        "image_size": 32,
        "channels": 3,
        "mean": (0.5,) * 3,
        "std": (0.25,) * 3,
        "train_images": 1000,
        "total_steps": total_steps,
        "steps_per_epoch": 10,
        "batch_size": 100,
    }
    return RunInfo(**facts | changes)


def test_cosine_is_byols_target_decay():
    K, base = 777, 0.996
    tau = Cosine(start=base, end=1.0).build(run(K))
    for k in range(K + 10):
        expected = 1 - (1 - base) * (math.cos(math.pi * min(k, K) / K) + 1) / 2
        assert tau(k) == pytest.approx(expected, abs=1e-15)


def test_target_decay_never_exceeds_one_nor_falls():
    K = 1_000_000
    tau = Cosine(start=0.99, end=1.0).build(run(K))
    values = [tau(k) for k in range(K + 1)]
    assert values[0] == 0.99
    assert values[-1] == 1.0
    assert max(values) == 1.0
    assert all(a <= b for a, b in pairwise(values))


@given(start=numbers, end=numbers, K=lengths, data=st.data())
@settings(deadline=None)
@pytest.mark.parametrize("kind", [Linear, Cosine])
def test_ends_are_exact_and_bounds_hold(kind: Any, start: float, end: float, K: int, data: Any):
    value = kind(start=start, end=end).build(run(K))
    assert value(0) == start
    assert value(K) == value(K + 7) == end
    k = data.draw(st.integers(0, K - 1))
    here, there = value(k), value(k + 1)
    assert min(start, end) <= here <= max(start, end)
    assert here <= there if start <= end else here >= there
    assert value(k) == here  # pure: a call in between has not moved it


def test_bounds_hold_where_the_formula_rounds_out_of_them():
    K = 10**10
    assert 10.0 - (10.0 - 0.1) * (math.cos(math.pi / K) + 1) / 2 < 0.1
    assert Cosine(start=0.1, end=10.0).build(run(K))(1) == 0.1


@given(start=numbers, peak=numbers, end=numbers, K=st.integers(2, 1_000_000), data=st.data())
@settings(deadline=None)
def test_warmup_meets_its_three_points(start: float, peak: float, end: float, K: int, data: Any):
    W = data.draw(st.integers(1, K - 1))
    value = WarmupCosine(start=start, peak=peak, end=end, warmup_steps=W).build(run(K))
    assert (value(0), value(W), value(K)) == (start, peak, end)
    k = data.draw(st.integers(0, K))
    low, high = sorted((start, peak) if k <= W else (peak, end))
    assert low <= value(k) <= high


def test_warmup_is_byols_learning_rate():
    K, W, peak = 400, 40, 0.2 * 4096 / 256
    lr = WarmupCosine(peak=peak, warmup_epochs=4).build(run(K))
    for k in range(K + 1):
        decayed = peak * 0.5 * (1 + math.cos(math.pi * (k - W) / (K - W)))
        assert lr(k) == pytest.approx(peak * k / W if k < W else decayed, abs=1e-12)


def test_warmup_counts_in_epochs_or_in_steps():
    in_epochs = WarmupCosine(peak=1.0, warmup_epochs=2.5).build(run(1000, steps_per_epoch=10))
    in_steps = WarmupCosine(peak=1.0, warmup_steps=25).build(run(1000))
    assert [in_epochs(k) for k in range(1001)] == [in_steps(k) for k in range(1001)]


def test_no_warmup_is_a_cosine():
    without = WarmupCosine(peak=0.3, end=0.1, warmup_steps=0).build(run())
    cosine = Cosine(start=0.3, end=0.1).build(run())
    assert [without(k) for k in range(1001)] == [cosine(k) for k in range(1001)]


@pytest.mark.parametrize("lengths", [{}, {"warmup_epochs": 1.0, "warmup_steps": 10}])
def test_warmup_wants_exactly_one_length(lengths: dict[str, Any]):
    with pytest.raises(ValidationError, match="exactly one of 'warmup_epochs' and 'warmup_steps'"):
        WarmupCosine(peak=1.0, **lengths)


def test_warmup_longer_than_the_run_is_refused():
    with pytest.raises(UserError, match=r"warm-up of 100 steps .* run of 100 steps; lower warmup_epochs"):
        WarmupCosine(peak=1.0, warmup_epochs=10).build(run(100))


def test_step_drops_at_its_milestones():
    lr = Step(start=0.03, milestones=(0.6, 0.8)).build(run(200))  # MoCo: epochs 120 and 160 of 200
    assert [lr(k) for k in (0, 119)] == [0.03, 0.03]
    assert [lr(k) for k in (120, 159)] == pytest.approx([0.003] * 2)
    assert [lr(k) for k in (160, 200, 500)] == pytest.approx([0.0003] * 3)
    assert Step(start=1.0, milestones=(0.29,)).build(run(100))(29) == 0.1  # 0.29 * 100 is 28.999...


@pytest.mark.parametrize("milestones", [(), (0.5, 0.5), (0.8, 0.6), (0.0,), (1.0,)])
def test_step_refuses_milestones_out_of_order_or_range(milestones: tuple[float, ...]):
    with pytest.raises(ValidationError):
        Step(start=1.0, milestones=milestones)


def reference(points: list[tuple[float, float]], shape: str, k: float) -> float:
    """The definition, point by point, without care for rounding."""
    for (p, a), (q, b) in pairwise(points):
        if p <= k < q:
            x = (k - p) / (q - p)
            return {"linear": a + (b - a) * x, "cosine": b - (b - a) * (math.cos(math.pi * x) + 1) / 2, "step": a}[
                shape
            ]
    return points[0][1] if k < points[0][0] else points[-1][1]


shapes = pytest.mark.parametrize("shape", ["linear", "cosine", "step"])


@shapes
@given(
    values=st.lists(numbers, min_size=2, max_size=6),
    K=st.integers(6, 1_000_000),
    data=st.data(),
)
@settings(deadline=None)
def test_piecewise_meets_its_points_and_stays_between_them(shape: Any, values: list[float], K: int, data: Any):
    steps = sorted(data.draw(st.sets(st.integers(0, K), min_size=len(values), max_size=len(values))))
    points = [(float(s), v) for s, v in zip(steps, values, strict=True)]
    value = Piecewise(points=tuple(points), unit="steps", shape=shape).build(run(K))
    assert [value(s) for s in steps] == values
    assert value(0) == values[0]
    assert value(K) == value(K + 7) == values[-1]
    k = data.draw(st.integers(0, K))
    assert value(k) == pytest.approx(reference(points, shape, k), abs=1e-9 * max(map(abs, values)))
    if steps[0] <= k < steps[-1]:
        i = max(i for i, s in enumerate(steps) if s <= k)
        low, high = sorted(values[i : i + 2])
        assert low <= value(k) <= high


def test_piecewise_never_rounds_beyond_its_points():
    K = 10**10  # where the formula leaves the interval: see test_bounds_hold_where_the_formula_rounds_out_of_them
    tau = Piecewise(points=((0.0, 0.1), (1.0, 10.0)), shape="cosine").build(run(K))
    assert tau(1) == 0.1


def test_piecewise_is_dinos_teacher_temperature():
    temperature = Piecewise(points=((0.0, 0.04), (30.0, 0.07)), unit="epochs").build(run(1000, steps_per_epoch=10))
    for k in range(1001):
        assert temperature(k) == pytest.approx(0.04 + (0.07 - 0.04) * min(k / 300, 1), abs=1e-15)


@pytest.mark.parametrize(
    ("piecewise", "same"),
    [
        (Piecewise(points=((0.0, 0.3), (1.0, 0.1))), Linear(start=0.3, end=0.1)),
        (Piecewise(points=((0.0, 0.3), (1.0, 0.1)), shape="cosine"), Cosine(start=0.3, end=0.1)),
        (
            Piecewise(points=((0.0, 1.0), (0.29, 0.5), (0.8, 0.25)), shape="step"),
            Step(start=1.0, milestones=(0.29, 0.8), factor=0.5),
        ),
    ],
)
def test_piecewise_of_two_ends_is_the_schedule_of_that_shape(piecewise: Any, same: Any):
    for K in (1, 7, 100, 1000):
        a, b = piecewise.build(run(K)), same.build(run(K))
        assert [a(k) for k in range(K + 1)] == [b(k) for k in range(K + 1)]


@shapes
def test_piecewise_counts_in_fractions_in_epochs_or_in_steps(shape: Any):
    points = {"fraction": (0.05, 0.25, 1.0), "epochs": (0.5, 2.5, 10.0), "steps": (5.0, 25.0, 100.0)}
    curves = [
        Piecewise(points=tuple(zip(positions, (1.0, 3.0, 2.0), strict=True)), unit=unit, shape=shape).build(run(100))  # type: ignore[arg-type]
        for unit, positions in points.items()
    ]
    for k in range(101):
        assert len({curve(k) for curve in curves}) == 1


@shapes
def test_fractions_keep_their_shape_in_a_longer_run(shape: Any):
    spec = Piecewise(points=((0.1, 1.0), (0.3, 3.0), (0.9, 2.0)), shape=shape)
    short, long = spec.build(run(100)), spec.build(run(10_000))
    assert [short(k) for k in range(101)] == pytest.approx([long(100 * k) for k in range(101)])


def test_of_points_on_the_same_step_the_last_counts():
    value = Piecewise(points=((0.0, 1.0), (0.5, 2.0), (0.501, 7.0), (1.0, 8.0))).build(run(10))
    assert [value(k) for k in (0, 4, 5, 10)] == pytest.approx([1.0, 1.8, 7.0, 8.0])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"points": (0.9, 1.0)}, r"pairs of a position and a value, \[\[0\.0"),
        ({"points": ((0.0, 0.9), (1.0,))}, "pairs of"),
        ({"points": ((0.0, 0.9), (1.0, True))}, "pairs of"),
        ({"points": 3.0}, "pairs of"),
        ({"points": ((0.0, 1.0),)}, "two or more"),
        ({"points": ((0.0, 1.0), (0.0, 2.0))}, "rising position"),
        ({"points": ((0.5, 1.0), (0.2, 2.0))}, "rising position"),
        ({"points": ((-0.1, 1.0), (0.2, 2.0))}, "before position 0"),
        ({"points": ((0.0, 0.04), (30.0, 0.07))}, "unit = 'epochs'"),
        ({"points": ((0.0, 1.0), (2.5, 2.0)), "unit": "steps"}, "whole numbers"),
        ({"points": ((0.0, 1.0), (1.0, math.inf))}, "finite"),
    ],
)
def test_piecewise_refuses_points_that_make_no_curve(options: dict[str, Any], text: str):
    with pytest.raises(ValidationError, match=text):
        Piecewise(**options)


@pytest.mark.parametrize(("unit", "end"), [("epochs", 10.1), ("steps", 101.0)])
def test_piecewise_refuses_points_beyond_the_run(unit: Any, end: float):
    late = Piecewise(points=((0.0, 0.04), (end, 0.07)), unit=unit)
    with pytest.raises(UserError, match=rf"point at {end:g} {unit} lies beyond the end .*10 epochs of 10 steps"):
        late.build(run(100))
    assert late.build(run(1000))(101) == 0.07


def test_a_recipe_writes_points_as_lists():
    table = '{"use": "piecewise", "points": [[0, 0.04], [0.3, 0.07]], "shape": "step"}'
    tau = EMA.model_validate_json(f'{{"tau": {table}}}').tau
    assert tau == Piecewise(points=((0.0, 0.04), (0.3, 0.07)), shape="step")
    assert EMA.model_validate_json(json.dumps({"tau": tau.model_dump(mode="json")})).tau == tau


def test_constant():
    value = Constant(value=0.99).build(run())
    assert {value(k) for k in (0, 1, 1000, 5000)} == {0.99}


@pytest.mark.parametrize(
    "schedule",
    [
        Constant(value=1.0),
        Linear(start=0.0, end=1.0),
        Cosine(start=0.0, end=1.0),
        Step(start=1.0, milestones=(0.5,)),
        WarmupCosine(peak=1.0, warmup_steps=5),
        Piecewise(points=((0.1, 0.0), (0.9, 1.0)), shape="cosine"),
    ],
)
def test_a_built_schedule_survives_pickling(schedule: Any):
    value = schedule.build(run(50))
    restored = pickle.loads(pickle.dumps(value))
    assert [restored(k) for k in range(51)] == [value(k) for k in range(51)]


@pytest.mark.filterwarnings("ignore")
def test_against_lightly():
    pytest.importorskip("lightly")
    from lightly.utils.scheduler import cosine_schedule, cosine_warmup_schedule

    K, W = 300, 30
    tau = Cosine(start=0.99, end=1.0).build(run(K))
    lr = WarmupCosine(start=3e-5, peak=0.7, end=0.01, warmup_steps=W).build(run(K))
    for k in range(K + 1):
        # lightly reaches the end at max_steps - 1 and calls the first step of a warm-up 1.
        assert tau(k) == pytest.approx(cosine_schedule(k, K + 1, 0.99, 1.0), abs=1e-14)
        if 1 <= k <= W:
            theirs = cosine_warmup_schedule(k - 1, K + 1, 0.7, 0.01, W, 3e-5)
            assert lr(k) == pytest.approx(theirs, abs=1e-14)
        elif k > W:
            assert lr(k) == pytest.approx(cosine_warmup_schedule(k, K + 1, 0.7, 0.01, W, 3e-5), abs=1e-14)
