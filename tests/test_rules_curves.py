"""Rules about the curves of loss, gradient and quality: each seen to speak of the fault that it is for."""

from __future__ import annotations

import math
from typing import Any

import pytest
from sound_runs import BYOL, BYOL_EPOCHS, FACTS, RULES, byol, late, look, losses, records, severity, told, worthless

from sslkit.rules import Course, Facts, Trajectory
from sslkit_rules import collapse, course, progress

# ---------------------------------------------------------------- loss


THREAD = (0.1489, 0.0108, 0.0100, 0.0087, 0.0054, 0.0092, 0.0855, 0.2342, 0.0304, 0.0142)


def test_the_threads_ten_losses() -> None:
    seen = told(course.loss_rise, losses(*THREAD))
    assert seen.severity == "error"
    assert "falls to 0.0054 at epoch 4 and rises to 0.2342 at epoch 7, 43 times its least" in seen.text
    assert "not recovery" in seen.text
    assert "tau" not in seen.text
    assert all(look(rule, losses(*THREAD)) is None for name, rule in RULES.items() if name not in ("loss_rise",))


def test_the_threads_ten_losses_with_its_tau() -> None:
    tau = Trajectory.of(lambda epoch: 1 - 0.004 * math.cos(math.pi * epoch / 10) / 2, 10)
    seen = told(course.loss_rise, losses(*THREAD, tau=tau, total_steps=10, byol_scale=1.0))
    assert "tau passes 1 at step 7: the onset matches" in seen.text
    assert look(collapse.cosine_high, losses(*THREAD, byol_scale=1.0)) is not None


@pytest.mark.parametrize(
    ("times", "learns", "expected"),
    [(1.4, False, None), (1.4, True, "info"), (3, True, "info"), (3, False, "warning"), (11, True, "warning"),
     (11, False, "error")],
)  # fmt: skip
def test_how_grave_a_rise_is(times: float, learns: bool, expected: str | None) -> None:
    curve = [4.0, 2.0, 1.0, 0.5, 0.3, 0.3, 0.3 * times, 0.3 * times, 0.3 * times]
    knn = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.8] if learns else [0.1] * 9
    lines = [
        {"step": i, "epoch": float(i), "loss": v, "knn_top1": k}
        for i, (v, k) in enumerate(zip(curve, knn, strict=True))
    ]
    seen = look(course.loss_rise, Course(Facts(), {}, lines))
    assert (seen and seen.severity) == expected


def test_a_rise_is_called_by_its_size() -> None:
    assert told(course.loss_rise, losses(*THREAD)).what == "The loss rises far above its least."
    lesser = told(course.loss_rise, losses(4.0, 2.0, 1.0, 0.5, 0.3, 0.3, 0.9, 0.9, 0.9))
    assert lesser.what == "The loss rises above its least."


def test_figures_that_are_medians_are_said_to_be() -> None:
    assert told(course.loss_rise, losses(*THREAD)).text.startswith("the loss falls to 0.0054 at")
    curve = [*(4 - i / 13 for i in range(40)), *[2.0] * 16]
    curve[20], curve[50] = 0.01, 9.0  # a single record is neither the least nor the highest
    text = told(course.loss_rise, losses(*curve)).text
    assert (
        text
        == "the loss (medians of 5 records) falls to 1.154 at epoch 39 and rises to 2 at epoch 42, 1.7 times its least"
    )


def test_a_rise_that_the_loss_has_made_good_is_no_rise() -> None:
    bump = [4.0, 2.0, 1.0, 0.7, 0.7, 1.4, 1.4]
    assert told(course.loss_rise, losses(*bump, 0.8))
    assert look(course.loss_rise, losses(*bump, 0.6)) is None
    late = [*(4 - i / 13 for i in range(40)), *[2.0] * 8]
    assert told(course.loss_rise, losses(*late))
    assert look(course.loss_rise, losses(*late, 0.9)) is None, "the newest record is below, whatever the medians say"
    steep = told(course.loss_rise, losses(4.0, 2.0, 1.0, 0.1, 0.1, 5.0, 5.0, 0.05))
    assert (steep.severity, steep.what) == ("error", "The loss rose far above its least, and is below it again.")
    assert steep.text.startswith("the loss fell to 0.1 at epoch 3 and rose to 5 at epoch 5, 50 times its least so far; "
                                 "it is 0.05 now")  # fmt: skip


def test_simsiams_rise_is_measured_from_minus_one() -> None:
    seen = told(course.loss_rise, losses(-0.1, -0.5, -0.9, -0.98, -0.6, -0.5, -0.5))
    assert seen.severity == "error"


def test_loss_at_chance() -> None:
    seen = look(course.loss_at_chance, byol(late("loss", lambda *_: 4.005, 0)))
    assert seen is None, "features get better all the same"

    def chance(line: dict[str, Any]) -> dict[str, Any]:
        return {"loss": 4.005} if "loss" in line else worthless(line)

    seen = told(course.loss_at_chance, byol(chance))
    assert seen.severity == "error"
    assert "since step 1" in seen.text


def test_loss_not_falling() -> None:
    def rising(line: dict[str, Any]) -> dict[str, Any]:
        return worthless(line) | ({"loss": 4 + line["step"] / 200} if "loss" in line else {})

    seen = told(course.loss_not_falling, byol(rising))
    assert severity(course.loss_not_falling, seen) == "warning"
    assert look(course.loss_not_falling, byol(late("loss", lambda step, _: 4 + step / 200, 0))) is None


@pytest.mark.parametrize("wrong", [None, math.nan, math.inf])
def test_not_finite_in_a_record(wrong: float | None) -> None:
    seen = told(course.not_finite, byol(late("grad_norm", lambda *_: wrong, 200)))
    assert seen.step == 210
    assert "grad_norm" in seen.text
    unimportant = byol(late("tau_measured", lambda *_: wrong, 0))
    assert look(course.not_finite, unimportant) is None


def test_not_finite_in_the_status() -> None:
    seen = told(course.not_finite, byol(status="failed", reason="not_finite", step=151))
    assert seen.step == 151


# ---------------------------------------------------------------- gradients


def test_no_gradient() -> None:
    seen = told(course.no_gradient, byol(late("grad_norm_predictor", lambda *_: 0.0, 200)))
    assert seen.text == "the gradient of the predictor is 0 from step 210 on"
    without = [{k: v for k, v in line.items() if k != "grad_norm_backbone"} for line in records(BYOL, BYOL_EPOCHS)]
    seen = told(course.no_gradient, Course(FACTS, {}, without))
    assert "reaches the backbone" in seen.text
    backbone = FACTS.model_copy(update={"trained_parts": ("projector", "predictor")})
    assert look(course.no_gradient, Course(backbone, {}, without)) is None, "a frozen backbone is meant to get none"
    none = [{k: v for k, v in line.items() if not k.startswith("grad_norm")} for line in records(BYOL, BYOL_EPOCHS)]
    optimised = FACTS.model_copy(update={"trained_parts": ("backbone", "projector"), "optimizer": "sgd"})
    assert "no gradient was recorded" in told(course.no_gradient, Course(optimised, {"status": "done"}, none)).text
    assert look(course.no_gradient, Course(optimised, {"status": "running"}, none[:2])) is None, "too early to tell"
    assert look(course.no_gradient, Course(optimised, {}, none)) is None, "a log seldom has gradients"
    same = byol(late("loss", lambda *_: 2.5, 200))
    assert look(course.no_gradient, same) is None, "a log's losses are rounded"
    same.status = {"status": "running"}
    assert "2.5 in each of the newest 5" in told(course.no_gradient, same).text


def test_prototypes_may_be_kept_still_at_first() -> None:
    def still(line: dict[str, Any]) -> dict[str, Any]:
        return {"grad_norm_loss": 0.0} if "loss" in line else {}

    assert look(course.no_gradient, Course(FACTS, {}, byol(still).records[:7])) is None
    assert look(course.no_gradient, byol(still)) is not None


def test_gradient_spike() -> None:
    lines = [{"step": i, "grad_norm": 1.0 + 0.1 * (i % 3)} for i in range(60)]
    assert look(course.gradient_spike, Course(Facts(), {}, lines)) is None
    lines[40]["grad_norm"] = 20.0
    seen = told(course.gradient_spike, Course(Facts(), {}, lines))
    assert seen.severity == "info"
    assert seen.step == 40
    for i in (45, 50, 55):
        lines[i]["grad_norm"] = 20.0
    seen = told(course.gradient_spike, Course(Facts(), {}, lines))
    assert seen.severity == "warning"
    assert "4 of 60" in seen.text


def test_rate_oscillation() -> None:
    def swinging(line: dict[str, Any]) -> dict[str, Any]:
        return {"loss": 2.0 + (line["step"] // 10 % 4 - 1.5)} if "loss" in line else {}

    flat = [
        {key: value for key, value in {**line, **swinging(line)}.items() if not key.endswith("_top1")}
        for line in records(BYOL, BYOL_EPOCHS)
    ]
    twice = [{**line, "step": line["step"] + 336 * again} for again in (0, 1) for line in flat]
    assert look(course.rate_oscillation, Course(FACTS, {}, twice)) is not None


# ---------------------------------------------------------------- quality


def test_knn_not_improving() -> None:
    seen = told(progress.knn_not_improving, byol(late("knn_top1", lambda *_: 0.12, 1)))
    assert "random network's, at step 0, is 0.144" in seen.text
    assert seen.key is None
    shortcut = byol(lambda line: late("knn_top1", lambda *_: 0.12, 1)(line) | late("cosine", lambda *_: 0.97, 0)(line))
    seen = told(progress.knn_not_improving, shortcut)
    assert seen.key == "view_generator"
    early = Course(FACTS, {}, byol(late("knn_top1", lambda *_: 0.12, 1)).records[:9])
    assert look(progress.knn_not_improving, early) is None


@pytest.mark.parametrize(
    ("changes", "begins_learnt"),
    [
        ({"initialised": "runs/x, step 840"}, True),
        ({"recipe": {"backbone": {"use": "timm", "pretrained": True}}}, True),
        ({"recipe": {"backbone": {"use": "timm", "pretrained": False}}}, False),
        ({"recipe": {"backbone": {"use": "mine", "pretrained": "a name"}}}, False),
        ({"recipe": None}, False),
    ],
)
def test_what_others_have_learnt_is_no_floor(changes: dict[str, Any], begins_learnt: bool) -> None:
    facts = FACTS.model_copy(update=changes)
    assert facts.begins_learnt is begins_learnt
    assert facts.first_network == ("initialised network" if begins_learnt else "random network")
    records = byol(late("knn_top1", lambda *_: 0.12, 1)).records
    found = look(progress.knn_not_improving, Course(facts, {}, records))
    assert (found is None) is begins_learnt


def test_knn_not_improving_is_an_error_late_and_without_a_probe_that_learns() -> None:
    def both(line: dict[str, Any]) -> dict[str, Any]:
        return {key: 0.12 for key in ("knn_top1", "probe_top1") if key in line and line["step"]}

    seen = told(progress.knn_not_improving, byol(both))
    assert seen.severity == "error"


def test_knn_falling() -> None:
    seen = told(progress.knn_falling, byol(late("knn_top1", lambda *_: 0.3, 300)))
    assert seen.severity == "warning"
    assert seen.step == 252
    seen = told(progress.knn_falling, byol(late("knn_top1", lambda *_: 0.12, 300)))
    assert seen.severity == "error"
    assert look(progress.knn_falling, byol(late("knn_top1", lambda *_: 0.45, 300))) is None


@pytest.mark.parametrize("key", ["knn_top1", "probe_top1"])
@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        ((0.50, 0.47, 0.41, 0.33, 0.25, 0.22), "error"),
        ((0.50, 0.51, 0.50, 0.46, 0.43, 0.42), "warning"),
        ((0.50, 0.49, 0.47, 0.46, 0.46, 0.46), None),  # within chance
        ((0.50, 0.30, 0.45, 0.48, 0.30, 0.51), None),
        ((0.50, 0.50, 0.50, 0.50, 0.50, 0.25), None),  # one record alone
        ((0.50, 0.42, 0.42), None),  # early: it often dips
    ],
)
def test_features_that_fall_below_what_was_measured_first(
    key: str, accuracies: tuple[float, ...], expected: str | None
) -> None:
    lines = [{"step": 100 * e, "epoch": float(e), key: v} for e, v in enumerate(accuracies, 1)]
    seen = look(progress.knn_falling, Course(Facts(total_steps=600 if len(lines) > 3 else 1000), {}, lines))
    assert (seen and severity(progress.knn_falling, seen)) == expected


def test_cosine_high_from_the_losses_of_a_log() -> None:
    seen = told(collapse.cosine_high, losses(0.149, 0.0108, 0.01, 0.0087, byol_scale=1.0))
    assert seen.step == 1
    assert look(collapse.cosine_high, losses(0.149, 0.0108, 0.01, 0.0087)) is None
