"""The limits of rules over records: a figure on this side of each is told, and one on that side is not."""

from __future__ import annotations

from typing import Any

import pytest
from sound_runs import BYOL, EPOCH, FACTS, RULES, look, severity

from sslkit.rules import Course, Facts

STEPS = [int(step) for step in BYOL["step"]]


def run(facts: Facts = FACTS, stretch: int = 1, **columns: Any) -> Course:
    """Records at the fixture's steps: a number, or the values at its steps; ends of epochs apart from others."""
    lines: dict[tuple[int, bool], dict[str, Any]] = {}
    for key, values in columns.items():
        of_epochs = key.endswith(("_top1", "_share"))
        at = [0, 84, 168, 252, 336] if of_epochs else STEPS
        several = values if isinstance(values, list) else [values] * len(at)
        for step, value in zip(at[-len(several) :], several, strict=True):
            line = {"step": step * stretch, "epoch": step / EPOCH}
            lines.setdefault((step, of_epochs), line)[key] = value
    return Course(facts, {}, [lines[place] for place in sorted(lines)])


def first_low(low: float, high: float, since: int) -> list[float]:
    return [low if step >= since else high for step in STEPS]


def logged(*records: tuple[float, float], key: str = "loss", **facts: Any) -> Course:
    """A log of epochs and values, of 100 steps an epoch."""
    return Course(Facts(**facts), {}, [{"step": int(100 * e), "epoch": e, key: v} for e, v in records])


WORKS_AGAINST = FACTS.model_copy(update={"prevents_collapse": True})
NO_LENGTH = WORKS_AGAINST.model_copy(update={"total_steps": None})


@pytest.mark.parametrize(
    ("rule", "told", "silent"),
    [
        ("collapse", run(std_sqrt_d=0.49), run(std_sqrt_d=0.51)),
        (
            "collapse",
            run(WORKS_AGAINST, std_sqrt_d=first_low(0.3, 0.9, 220)),
            run(WORKS_AGAINST, std_sqrt_d=first_low(0.3, 0.9, 250)),
        ),
        (
            "collapse",
            run(NO_LENGTH, 10, std_sqrt_d=first_low(0.3, 0.9, 230)),
            run(NO_LENGTH, 10, std_sqrt_d=first_low(0.3, 0.9, 240)),
        ),
        ("dimensional_collapse", run(effective_rank_share=0.09), run(effective_rank_share=0.11)),
        ("dimensional_collapse", run(projection_rank_share=[0.5, 0.24]), run(projection_rank_share=[0.5, 0.26])),
        ("cosine_high", run(cosine=0.991), run(cosine=0.989)),
        ("cosine_high", run(cosine=first_low(0.995, 0.5, 250)), run(cosine=first_low(0.995, 0.5, 260))),
        ("target_equals_online", run(target_drift=9e-7), run(target_drift=1.1e-6)),
        ("target_diverges", run(target_norm_ratio=1.11), run(target_norm_ratio=1.09)),
        ("target_not_following", run(target_drift=0.41), run(target_drift=0.39)),
        ("tau_not_applied", run(tau=0.9, tau_measured=0.888), run(tau=0.9, tau_measured=0.892)),
        ("tau_not_applied", run(tau=0.99969, tau_measured=0.999), run(tau=0.99971, tau_measured=0.999)),
        ("updates_not_steps", run(target_updates=[1.021 * s for s in STEPS]),
         run(target_updates=[1.019 * s for s in STEPS])),
        ("resume_reset", run(target_drift=first_low(0.055, 0.1, 200)), run(target_drift=first_low(0.065, 0.1, 200))),
        ("resume_reset", run(target_drift=first_low(0.41, 0.1, 200)), run(target_drift=first_low(0.39, 0.1, 200))),
        ("loss_rise", run(loss=[2.0, *first_low(1.6, 1.0, 200)[1:]]),
         run(loss=[2.0, *first_low(1.4, 1.0, 200)[1:]])),
        ("loss_at_chance", run(loss=[3.0 if s < 220 else 4.03 for s in STEPS]),
         run(loss=[3.0 if s < 220 else 4.05 for s in STEPS])),
        ("loss_at_chance", run(loss=[3.0 if s < 200 else 4.0 for s in STEPS]),
         run(loss=[3.0 if s < 280 else 4.0 for s in STEPS])),
        ("loss_not_falling", run(loss=[2.0, *[1.95] * 18]), run(loss=[2.0, *[1.92] * 18])),
        ("gradient_spike", Course(FACTS, {}, [
            {"step": i, "grad_norm": 11.0 if i == 40 else 1.0} for i in range(60)]),
         Course(FACTS, {}, [{"step": i, "grad_norm": 9.0 if i == 40 else 1.0} for i in range(60)])),
        ("rate_oscillation", Course(FACTS, {}, [{"step": 20 * i, "loss": 1.0 + 0.18 * (i % 2)} for i in range(40)]),
         Course(FACTS, {}, [{"step": 20 * i, "loss": 1.0 + 0.15 * (i % 2)} for i in range(40)])),
        ("no_gradient", run(grad_norm=1.0, grad_norm_predictor=1.0, grad_norm_backbone=1e-13),
         run(grad_norm=1.0, grad_norm_predictor=1.0, grad_norm_backbone=1e-9)),
        # A gain of one standard error (.0137) may be learning while it goes on; at the end it has to be two.
        ("knn_not_improving", run(FACTS.model_copy(update={"total_steps": 420}), knn_top1=[0.2, 0.2, 0.2, 0.2, 0.21]),
         run(FACTS.model_copy(update={"total_steps": 420}), knn_top1=[0.2, 0.2, 0.2, 0.2, 0.22])),
        ("knn_not_improving", run(knn_top1=[0.2, 0.2, 0.2, 0.2, 0.225]), run(knn_top1=[0.2, 0.2, 0.2, 0.2, 0.23])),
        # Without the random network's figure: flat from the beginning of a log on.
        ("knn_not_improving", logged(*[(e, 0.31) for e in range(1, 13)], key="knn_top1"),
         logged(*[(e, 0.31 + 0.01 * e) for e in range(1, 13)], key="knn_top1")),
        ("knn_not_improving", logged(*[(e, 0.1) for e in range(1, 13)], key="probe_top1"),
         logged(*[(e, 0.85) for e in range(40, 53)], key="probe_top1")),
        ("knn_falling", run(knn_top1=[0.2, 0.3, 0.5, 0.5, 0.39]), run(knn_top1=[0.2, 0.3, 0.5, 0.5, 0.41])),
        ("prototype_collapse", run(kl=[2.0, *[0.039] * 18]), run(kl=[2.0, *[0.041] * 18])),
        ("prototype_collapse", run(kl=1.0, prototypes_used=[50.0, *[2.4] * 18]),
         run(kl=1.0, prototypes_used=[50.0, *[2.6] * 18])),
        ("loss_at_chance", logged(*[(e, 0.509) for e in range(12)], blank_loss=0.5),
         logged(*[(e, 0.511) for e in range(12)], blank_loss=0.5)),
        ("rate_oscillation", logged(*[(e, 1.0 + e % 2) for e in range(24)]),
         logged(*[(e, 1.0 + e % 2) for e in range(22)])),
        ("gradient_spike", logged(*[(e, 11.0 if e == 25 else 1.0) for e in range(40)], key="grad_norm"),
         logged(*[(e, 11.0 if e == 24 else 1.0) for e in range(40)], key="grad_norm")),
        ("knn_not_improving", logged(*[(e, 0.2) for e in (0.0, 1.0, 2.0, 3.0)], key="knn_top1", total_steps=890),
         logged(*[(e, 0.2) for e in (0.0, 1.0, 2.0, 3.0)], key="knn_top1", total_steps=910)),
        ("knn_not_improving", logged(*[(e, 0.2) for e in (0.0, 1.0, 2.0, 10.0)], key="knn_top1"),
         logged(*[(e, 0.2) for e in (0.0, 1.0, 2.0, 9.9)], key="knn_top1")),
        ("partial_collapse", run(loss=[2.0 if s < 200 else 0.98 for s in STEPS], knn_top1=[0.1, 0.3, 0.5, 0.3, 0.3]),
         run(loss=[2.0 if s < 200 else 1.02 for s in STEPS], knn_top1=[0.1, 0.3, 0.5, 0.3, 0.3])),
    ],
)  # fmt: skip
def test_a_limit_is_where_it_is_said_to_be(rule: str, told: Course, silent: Course) -> None:
    assert look(RULES[rule], told) is not None
    assert look(RULES[rule], silent) is None


@pytest.mark.parametrize(
    ("rule", "error", "warning"),
    [
        ("collapse", run(std_sqrt_d=0.09), run(std_sqrt_d=0.11)),
        ("collapse", run(std_sqrt_d=0.3, uniformity=-0.19), run(std_sqrt_d=0.3, uniformity=-0.21)),
        ("dimensional_collapse", run(effective_rank_share=0.029), run(effective_rank_share=0.031)),
        ("target_not_following", run(target_drift=0.81), run(target_drift=0.79)),
        ("loss_rise", run(loss=[2.0, *[1.0] * 9, *[10.1] * 9]), run(loss=[2.0, *[1.0] * 9, *[9.9] * 9])),
        ("loss_at_chance", run(loss=[3.0 if s < 130 else 4.0 for s in STEPS]),
         run(loss=[3.0 if s < 170 else 4.0 for s in STEPS])),
        ("loss_not_falling", run(loss=[2.0] * 4 + [3.1] * 15), run(loss=[2.0] * 4 + [2.9] * 15)),
        ("knn_not_improving", run(knn_top1=[0.2, 0.2, 0.2, 0.2, 0.2]),
         Course(FACTS.model_copy(update={"total_steps": 460}), {}, run(knn_top1=0.2).records)),
        ("knn_falling", run(knn_top1=[0.2, 0.3, 0.5, 0.5, 0.21]), run(knn_top1=[0.2, 0.3, 0.5, 0.5, 0.22])),
    ],
)  # fmt: skip
def test_where_an_error_begins(rule: str, error: Course, warning: Course) -> None:
    for course, expected in ((error, "error"), (warning, "warning")):
        seen = look(RULES[rule], course)
        assert seen is not None
        assert severity(RULES[rule], seen) == expected
