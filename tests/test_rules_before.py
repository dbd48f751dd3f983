"""The rules that look at a recipe's parts: one planted fault and one sound neighbour for each, and their figures."""

from __future__ import annotations

import importlib
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sslkit.rules import Course, Facts, QueueFacts, Rule, Seen, Trajectory

TOPICS = ("target", "schedules", "views", "optimization", "networks", "losses", "methods", "measurement")
RULES: dict[str, Rule] = {
    name: value
    for topic in TOPICS
    for name, value in vars(importlib.import_module(f"sslkit_rules.{topic}")).items()
    if isinstance(value, Rule)
}


def constant(value: float, steps: int = 39_000) -> Trajectory:
    return Trajectory.of(lambda k: value, steps)


def rising(start: float, end: float, steps: int = 39_000) -> Trajectory:
    return Trajectory.of(lambda k: start + (end - start) * k / steps, steps)


RECIPE: dict[str, Any] = {
    "view_generator": {
        "use": "two_crops", "jitter": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1,
        "grayscale": 0.2,
    },
    "projector": {"use": "mlp"},
    "loss": {"use": "cosine", "form": "byol"},
    "optimizer": {"use": "lars", "eta": 0.02, "clip_lr": True, "weight_decay": 1e-5},
    "train": {"accumulate": 1},
}  # fmt: skip
STEPS = 39_000
BYOL: dict[str, Any] = {
    "name": "byol", "recipe": RECIPE, "total_steps": STEPS, "steps_per_epoch": 195, "batch_size": 256,
    "train_images": 50_000, "precision": "bf16", "loss_precision": "fp32", "labelled": True, "quality": ("knn_top1",),
    "evaluated": "online", "shared_images": 0.0, "view_difference": (0.9, 4.1), "images_share_draws": False,
    "shared_draws": (), "commonest_image": 0.001, "classes": 10, "test_classes": 10,
    "steps_share_draws": False, "draws_are_keyed": True, "view_sizes": (32, 32), "stem_stride": 1.0, "last_map": 4,
    "normalisation_layers": 22, "batch_norm_layers": 22, "batch_norm_images": 256, "batch_norm_shuffled": False,
    "batch_norm_synchronised": False, "predictor_learns": True, "projector_normalised": False,
    "prevents_collapse": False, "wants_predictions": True, "blank_loss": 4.0, "agreement": (0.0, 4.0),
    "dead_inputs": (), "byol_scale": 1.0, "scale_sensitive": False,
    "reads_labels": False, "target": "copy", "tau": rising(0.99, 1.0),
    "unmoved": (), "optimizer": "lars",
    "lr": {"backbone": Trajectory.of(lambda k: 1 - k / STEPS, STEPS),
           "predictor": Trajectory.of(lambda k: 1 - k / STEPS, STEPS)},
    "unoptimised": (), "decayed_biases": False,
}  # fmt: skip
"""All that is known of a sound run of BYOL."""


def facts(recipe: dict[str, dict[str, Any]] | None = None, **changes: Any) -> Facts:
    """BYOL's facts but for the changes; those of the recipe are laid over its tables."""
    tables = {**RECIPE, **{slot: {**RECIPE.get(slot, {}), **table} for slot, table in (recipe or {}).items()}}
    return Facts(**{**BYOL, "recipe": tables, **changes})


def before(name: str, known: Facts) -> tuple[str, Seen] | None:
    """Severity and what was seen."""
    rule = RULES[name]
    assert rule.before is not None
    seen = rule.before(known)
    seen = Seen(seen) if isinstance(seen, str) else seen
    return seen and (seen.severity or rule.severity, seen)


def queue(rows: int, pushed: int = 256, *, negatives: bool = True) -> dict[str, Any]:
    return {"queues": (QueueFacts(rows=rows, pushed_per_step=pushed, negatives=negatives),)}


def rates(**peaks: float) -> dict[str, Any]:
    return {"lr": {part: constant(peak) for part, peak in peaks.items()}}


def of(use: str, **more: Any) -> dict[str, dict[str, Any]]:
    return {"loss": {"use": use, **more}}


def temperatures(teacher: Any, student: Any = 0.1) -> Facts:
    return facts(of("dino", teacher_temperature=teacher, student_temperature=student))


def piecewise(*values: float) -> dict[str, Any]:
    return {"use": "piecewise", "points": [[float(i), value] for i, value in enumerate(values)]}


def decay(optimizer: str, value: Any) -> Facts:
    return facts({"optimizer": {"weight_decay": value}}, optimizer=optimizer)


GREY_BLIND = {"jitter": 0, "grayscale": 0}
Case = tuple[str, Facts, str, tuple[str, ...], Facts]
CASES: list[Case] = [
    # id, a fault, its severity, figures that are told, and the nearest sound neighbour
    ("identical_views", facts(view_difference=(0.0, 0.0)), "error", ("max |v1 - v2| = 0",),
     facts(view_difference=(0.2, 1e-6))),
    ("pairs_differ", facts(pairs_agree=2.49), "error", ("no more alike", "2.49 standard errors above chance"),
     facts(pairs_agree=2.5)),
    ("pairs_differ", facts(pairs_agree=-0.51), "error", ("-0.51 standard errors",), facts(pairs_agree=12.0)),
    ("weak_views", facts(view_difference=(0.0999, 0.4)), "warning", ("0.0999", "max 0.4"),
     facts(view_difference=(0.1, 0.4))),
    ("weak_views", facts(view_difference=(1e-9, 1e-6)), "warning", ("1e-09",), facts(view_difference=(0.0, 0.0))),
    ("views_not_normalised", facts(view_scale=(120.0, 60.0)), "warning", ("120", "60"), facts(view_scale=(2.0, 4.0))),
    ("views_not_normalised", facts(clean_scale=(120.0, 60.0)), "warning", ("is measured on", "120"),
     facts(view_scale=(0.0, 1.0), clean_scale=(0.1, 1.1))),
    ("views_not_normalised", facts(view_scale=(0.0, 0.2)), "warning", (), facts(view_scale=(-2.0, 0.25))),
    ("views_keep_colour", facts({"view_generator": {"jitter": 0.0, "grayscale": 0.0}}), "warning", ("every view",),
     facts({"view_generator": {"jitter": 0.0}})),
    ("views_keep_colour",
     facts({"view_generator": {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0, "grayscale": 0}}), "warning",
     (), facts({"view_generator": {"brightness": 0, "contrast": 0, "saturation": 0, "grayscale": 0}})),
    ("views_keep_colour",
     facts({"view_generator": {"use": "multi_crop", "views": [GREY_BLIND, GREY_BLIND]}}), "warning", (),
     facts({"view_generator": {"use": "multi_crop", "views": [GREY_BLIND, {}]}})),
    ("views_keep_colour", facts({"view_generator": {"use": "affine", "appearance": False, "light": 0.5}}), "warning",
     ("light",), facts({"view_generator": {"use": "affine", "appearance": True, "light": 0.5}})),
    ("views_keep_colour",
     facts({"view_generator": {"use": "affine", "light": 0, "grayscale": 0, "contrast": 0, "offset": 0}}), "warning",
     (), facts({"view_generator": {"use": "strangers", "jitter": 0, "grayscale": 0}})),
    ("one_draw_per_batch", facts(images_share_draws=True), "warning", (), facts()),
    ("one_draw_per_batch", facts(shared_draws=("hue", "flip")), "warning", ("hue, flip",), facts(shared_draws=())),
    ("one_draw_per_run", facts(steps_share_draws=True), "error", ("step 0", "step 1"), facts()),
    ("draws_not_keyed", facts(draws_are_keyed=False), "warning", (), facts()),
    ("predictor_untrained", facts(unoptimised=("predictor.0.weight", "predictor.0.bias")), "error",
     ("these 2", "predictor.0.weight, predictor.0.bias"), facts()),
    ("rate_zero", facts(**rates(backbone=1.0, predictor=0.0)), "error", ("the predictor's", "39000 steps"),
     facts(**rates(backbone=1.0, predictor=1e-9))),
    ("predictor_rate_low", facts(**rates(backbone=1.0, predictor=0.49)), "warning", ("0.49", "backbone's 1"),
     facts(**rates(backbone=1.0, predictor=0.5))),
    ("predictor_rate_low", facts(**rates(backbone=1.0, predictor=0.1)), "warning", (),
     facts(**rates(backbone=1.0, predictor=0.1), prevents_collapse=True)),
    ("decay_on_biases", facts(decayed_biases=True), "warning", ("LARS",), facts()),
    ("decay_on_biases", facts(decayed_biases=True, optimizer="sgd"), "info", ("sgd, as in SimSiam",), facts()),
    ("decay_on_biases", facts(decayed_biases=True, optimizer="adamw"), "info", ("adamw",), facts(optimizer="adamw")),
    ("adam_rate_high", facts(optimizer="adam", **rates(backbone=0.00501)), "warning", ("adam rises to 0.00501",),
     facts(optimizer="adam", **rates(backbone=0.005))),
    ("adam_rate_high", facts(optimizer="adamw", **rates(backbone=1e-3, predictor=0.2)), "warning", ("0.2",),
     facts(optimizer="sgd", **rates(backbone=0.2))),
    ("sgd_rate_high", facts(optimizer="sgd", batch_size=128, **rates(backbone=0.6)), "warning", ("0.6", "128", "1.2"),
     facts(optimizer="sgd", batch_size=128, **rates(backbone=0.5))),
    ("lars_rate", facts({"optimizer": {"eta": 0.001}}, **rates(backbone=0.01)), "warning", ("0.01", "0.001", "1e-05"),
     facts({"optimizer": {"eta": 0.001}}, **rates(backbone=0.05))),
    ("lars_rate", facts(**rates(backbone=10.1)), "warning", ("10.1", "0.02", "0.2 of its length"),
     facts(**rates(backbone=10.0))),
    ("decay_high", decay("sgd", 0.0051), "warning", ("0.0051", "sgd"), decay("sgd", 0.005)),
    ("decay_high", decay("adamw", 0.51), "warning", ("0.51",),
     decay("adamw", {"use": "linear", "start": 0, "end": 0.5})),
    ("decay_high", decay("lars", {"use": "cosine", "start": 1e-4, "end": 0.1}), "warning", ("0.1 with lars",),
     decay("lars", {"use": "strangers", "end": 0.1})),
    ("no_normalisation", facts(normalisation_layers=0), "warning", ("0 normalisation layers",),
     facts(normalisation_layers=1)),
    ("no_normalisation", facts(normalisation_layers=0), "warning", (),
     facts(normalisation_layers=0, prevents_collapse=True)),
    ("batch_norm_small", facts(batch_norm_images=31), "warning", ("22 BatchNorm layers", "31 of the 256 images"),
     facts(batch_norm_images=32)),
    ("batch_norm_small", facts(batch_norm_images=1), "error", ("1 of the 256",),
     facts(batch_norm_images=1, batch_norm_layers=0)),
    ("batch_norm_not_synchronised", facts(processes=8), "warning", ("8 processes", "256 images"),
     facts(processes=8, batch_norm_synchronised=True)),
    ("batch_norm_not_synchronised", facts(processes=2), "warning", (), facts(processes=2, batch_norm_shuffled=True)),
    ("half_precision_loss", facts(loss_precision="fp16"), "error", ("fp16", "65,504"), facts()),
    ("half_precision_loss", facts(loss_precision="bf16"), "warning", ("bf16",), facts(precision="fp16")),
    ("stem_too_coarse", facts(stem_stride=4.0, last_map=1), "warning", ("32 px are 8 px", "4 times", "1x1"),
     facts(stem_stride=3.9)),
    ("stem_too_coarse", facts(stem_stride=4.0, view_sizes=(64,)), "warning", ("64 px are 16 px",),
     facts(stem_stride=4.0, view_sizes=(65, 32))),
    ("projector_missing", facts({"projector": {"use": "identity"}}), "warning", ("backbone's features",), facts()),
    ("loss_halved", facts(byol_scale=0.5), "warning", ("0.5 times",), facts(byol_scale=0.6)),
    ("loss_halved", facts(byol_scale=0.5, optimizer="adamw"), "info", ("adamw scales",),
     facts(byol_scale=None, optimizer="adamw")),
    ("loss_halved", facts({"optimizer": {"clip_lr": False}}, byol_scale=0.5), "info", ("lars scales",), facts()),
    ("loss_halved", facts(byol_scale=0.25, optimizer="sgd"), "warning", ("0.25 times",),
     facts(byol_scale=0.25, optimizer="sgd", target="online")),
    ("loss_prefers_disagreement", facts(agreement=(0.0, -4.0)), "error", ("is 0 for", "-4 for"),
     facts(agreement=(0.0, -4.0), reads_labels=True)),
    ("loss_prefers_disagreement", facts(agreement=(1.0, 1.0)), "error", (), facts(agreement=(0.999, 1.0))),
    ("loss_without_gradient", facts(dead_inputs=("predictions of view 1",)), "warning", ("predictions of view 1",),
     facts(dead_inputs=("projections of view 1",))),
    ("loss_without_gradient", facts(dead_inputs=("projections of view 1",), wants_predictions=False), "warning",
     ("projections of view 1",), facts()),
    ("loss_not_normalised", facts(scale_sensitive=True), "warning", ("twice as long",),
     facts(scale_sensitive=True, prevents_collapse=True)),
    ("loss_not_normalised", facts(scale_sensitive=True), "warning", (),
     facts(scale_sensitive=True, wants_predictions=False)),
    ("own_view_among_negatives", facts(positives_counted=2.0), "warning", ("2 terms", "ln 2 = 0.693"),
     facts(positives_counted=1.014)),
    ("own_view_among_negatives", facts(positives_counted=3.0), "warning", ("3 terms", "1.1"),
     facts(positives_counted=0.0)),
    ("queue_never_full", facts(**queue(256 * STEPS + 1)), "warning", ("9984001 rows", "pushes 9984000"),
     facts(**queue(256 * STEPS))),
    ("queue_exceeds_data", facts(**queue(65_536)), "warning", ("65536 rows", "50000"), facts(**queue(49_920))),
    ("queue_exceeds_data", facts(**queue(65_536, negatives=False)), "info", ("solo-learn",),
     facts(**queue(65_536, 512, negatives=False))),
    ("queue_exceeds_data", facts(**queue(196, 1)), "warning", ("196 rows are of 50176",), facts(**queue(195, 1))),
    ("queue_not_divisible", facts(**queue(1000)), "info", ("1000 rows", "256", "232 remain"), facts(**queue(1024))),
    ("moco_leak", facts(**queue(4096)), "warning", ("22 BatchNorm layers",),
     facts(**queue(4096), batch_norm_shuffled=True)),
    ("moco_leak", facts(**queue(4096)), "warning", (), facts(**queue(4096, negatives=False))),
    ("moco_leak", facts(**queue(4096)), "warning", (), facts(**queue(4096), batch_norm_layers=0)),
    ("few_negatives", facts(of("nt_xent"), batch_size=63), "warning", ("'nt_xent'", "62 others"),
     facts(of("nt_xent"), batch_size=64)),
    ("few_negatives", facts(of("nnclr"), batch_size=16), "warning", (), facts(of("dcl"), batch_size=16)),
    ("temperature_extreme", facts(of("nt_xent", temperature=100)), "warning", ("loss.temperature is 100",),
     facts(of("nt_xent", temperature=1.0))),
    ("temperature_extreme", facts(of("moco", temperature=0.0299)), "warning", ("0.0299",),
     facts(of("moco", temperature=0.03))),
    ("temperature_extreme", facts(of("dino", student_temperature={"use": "cosine", "start": 0.1, "end": 5.0})),
     "warning", ("loss.student_temperature is 5",), facts(of("dino", student_temperature=0.1))),
    ("regulariser_off", facts(of("vicreg", variance=0.0, covariance=1.0)), "warning", ("loss.variance is 0",),
     facts(of("vicreg", variance=50.0, covariance=1.0))),
    ("regulariser_off", facts(of("barlow_twins", off_diagonal=0)), "warning", ("loss.off_diagonal",),
     facts(of("mine", off_diagonal=0))),
    ("regulariser_off", facts(of("lejepa", sigreg=0.0)), "warning", (),
     facts(of("lejepa", sigreg={"use": "linear", "start": 0.0, "end": 0.02}))),
    ("sinkhorn_epsilon", facts(of("swav", epsilon=0.21)), "warning", ("0.21, above 0.2",),
     facts(of("swav", epsilon=0.2))),
    ("sinkhorn_epsilon", facts(of("swav", epsilon={"use": "linear", "start": 0.05, "end": 5.0})), "warning", ("5,",),
     facts(of("mine", epsilon=5.0))),
    ("labels_in_loss", facts(of("mine"), reads_labels=True), "warning", ("'mine'",), facts(of("mine"))),
    ("labels_in_loss", facts(of("supcon"), reads_labels=True), "info", ("supervised",), facts(of("supcon"))),
    ("dino_teacher_temperature", temperatures(0.0701), "warning", ("0.0701, above 0.07",), temperatures(0.0699)),
    ("dino_teacher_temperature", temperatures(0.07), "warning", ("0.07 from the start",),
     temperatures(piecewise(0.04, 0.07))),
    ("dino_teacher_temperature", temperatures(piecewise(0.04, 0.1)), "warning", ("to 0.1, the student's 0.1",),
     facts(of("cosine", teacher_temperature=0.2, student_temperature=0.1))),
    ("dino_last_layer", facts({**of("dino"), "projector": {"freeze_last_layer_epochs": 0.0}}), "warning", ("is 0",),
     facts({**of("dino"), "projector": {"freeze_last_layer_epochs": 0.1}})),
    ("dino_tau", facts(of("dino"), tau=rising(0.996, 1.0)), "warning", ("0.996", "256", "39000 steps"),
     facts(of("dino"), tau=rising(0.9995, 1.0))),
    ("dino_tau", facts(of("dino")), "warning", ("0.99 ",), facts(of("dino"), batch_size=257)),
    ("dino_tau", facts(of("dino"), tau=rising(0.99, 1.0, 20_000)), "warning", ("20000 steps",),
     facts(of("dino"), tau=rising(0.99, 1.0, 19_999))),
    ("wrong_branch_evaluated", facts(of("dino")), "warning", ("online",), facts(of("dino"), evaluated="target")),
    ("wrong_branch_evaluated", facts(evaluated="target"), "warning", ("'cosine'",),
     facts(of("mine"), evaluated="target")),
    ("no_quality_metric", facts(quality=()), "warning", ("have labels",), facts(quality=("probe_top1",))),
    ("no_quality_metric", facts(quality=(), labelled=False, classes=None), "info", ("no labels",), facts(quality=None)),
    ("no_quality_metric", facts(quality=(), labelled=False), "info", ("no labelled test",), facts(quality=None)),
    ("one_class", facts(classes=1), "warning", ("the training images name 1 class",), facts(classes=2)),
    ("one_class", facts(classes=10, test_classes=1), "warning", ("the test images",), facts(classes=1, quality=())),
    ("equal_images", facts(commonest_image=1.0), "error", ("100.0%",), facts(commonest_image=0.1)),
    ("equal_images", facts(commonest_image=0.5), "warning", ("50.0%",), facts(commonest_image=None)),
    ("test_images_in_training", facts(shared_images=0.051), "error", ("5.10%",), facts()),
    ("test_images_in_training", facts(shared_images=0.05), "warning", ("5.00%",), facts(shared_images=None)),
    ("test_images_in_training", facts(shared_images=0.005), "info", ("0.50%",), facts()),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fault", "severity", "figures", "sound"), CASES,
                         ids=[f"{i}-{case[0]}" for i, case in enumerate(CASES)])  # fmt: skip
def test_a_planted_fault_is_found_and_its_sound_neighbour_is_not(
    name: str, fault: Facts, severity: str, figures: tuple[str, ...], sound: Facts
) -> None:
    found = before(name, fault)
    assert found is not None
    assert found[0] == severity
    assert all(figure in found[1].text for figure in figures), found[1].text
    assert before(name, sound) is None


IN_OTHER_FILES = {"target", "schedules"}
"""Topics with a test file of their own."""


def test_a_rate_of_zero_is_blamed_on_the_key_that_set_it() -> None:
    own = {"groups": {"predictor": {"lr": 0.0}}}
    for recipe, key in (({"optimizer": own}, "optimizer.groups.predictor.lr"), (None, "optimizer.lr")):
        found = before("rate_zero", facts(recipe, **rates(backbone=1.0, predictor=0.0)))
        assert found is not None
        assert found[1].key == key


def test_micro_batches_are_blamed_where_there_are_some() -> None:
    for parts, key in ((2, "train.accumulate"), (1, None)):
        found = before("batch_norm_small", facts({"train": {"accumulate": parts}}, batch_norm_images=16))
        assert found is not None
        assert found[1].key == key


def test_every_rule_has_its_cases() -> None:
    elsewhere = {
        name for topic in IN_OTHER_FILES
        for name, value in vars(importlib.import_module(f"sslkit_rules.{topic}")).items() if isinstance(value, Rule)
    }  # fmt: skip
    assert {case[0] for case in CASES} == RULES.keys() - elsewhere


def test_nothing_but_its_schedules_is_said_of_a_sound_run() -> None:
    assert [name for name in RULES if before(name, facts())] == ["schedule_values"]


def test_nothing_is_said_of_what_is_not_known() -> None:
    assert not [name for name in RULES if before(name, Facts())]


FAULTY = [case[1] for case in CASES]


@given(st.sampled_from(FAULTY), st.sets(st.sampled_from(sorted(Facts.model_fields)), min_size=1))
def test_whatever_is_not_known_no_rule_fails(known: Facts, unknown: set[str]) -> None:
    left = Facts(**{name: value for name, value in known if name not in unknown})
    for name, rule in RULES.items():
        before(name, left)
        if rule.during is not None:
            rule.during(Course(left))
            rule.during(Course(left, records=[{"step": 1, "loss": 0.5, "tau": 1.5, "target_step": 0.0}]))


# ---------------------------------------------------------------- what they say


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_whole(name: str) -> None:
    rule = RULES[name]
    assert re.fullmatch(r"[A-Z].{10,110}\.", rule.what)
    assert rule.fix
    assert re.search(r"\d{4}|issue|code|contract", rule.source), "a year, an issue, a code"
    for text in (rule.fix, rule.cause, rule.source):
        assert not text.endswith("."), "it is put between other words"
    for text in (rule.what, rule.fix, rule.cause, rule.source):
        assert "  " not in text, "a break without a space, or two"


@pytest.mark.parametrize("case", CASES, ids=[f"{i}-{case[0]}" for i, case in enumerate(CASES)])
def test_evidence_is_one_sentence_that_goes_on_after_a_colon(case: Case) -> None:
    found = before(case[0], case[1])
    assert found is not None
    assert not found[1].text[0].isupper() or found[1].text.startswith("LARS")
    assert not found[1].text.endswith(".")
    assert "\n" not in found[1].text


# ---------------------------------------------------------------- in the records


def during(name: str, known: Facts, *records: dict[str, float]) -> Seen | None:
    rule = RULES[name]
    assert rule.during is not None
    seen = rule.during(Course(known, records=list(records)))
    return Seen(seen) if isinstance(seen, str) else seen


def test_identical_views_in_the_records() -> None:
    seen = during("identical_views", Facts(), {"step": 50, "view_difference_max": 0.3},
                  {"step": 100, "view_difference_max": 0.0}, {"step": 150, "view_difference_max": 0.0})  # fmt: skip
    assert seen is not None
    assert (seen.step, seen.text) == (100, "max |v1 - v2| = 0 in 2 of 3 records, first at step 100")
    assert during("identical_views", Facts(), {"step": 50, "view_difference_max": 1e-7}) is None


THREAD = [0.1489, 0.0108, 0.0100, 0.0087, 0.0054, 0.0092, 0.0855, 0.2342, 0.0304, 0.0142]


def test_a_log_of_losses_alone_is_an_error() -> None:
    records = [{"step": i, "epoch": float(i), "Epoch_Loss": loss, "lr": 0.2} for i, loss in enumerate(THREAD)]
    for known in (Facts(), Facts(quality=()), Facts(quality=(), labelled=False)):
        seen = during("no_quality_metric", known, *records)
        assert seen is not None
        assert seen.severity == "error"
        assert "10 records of the loss beside lr" in seen.text
    assert during("no_quality_metric", Facts(quality=("knn_top1",)), *records) is None, "it will be measured"
    assert during("no_quality_metric", Facts(), {"step": 0, "knn_top1": 0.1}) is None
    assert during("no_quality_metric", Facts()) is None


@pytest.mark.parametrize("key", ["knn_top1", "probe_top1", "val_acc", "top1", "linear_acc1", "test_accuracy", "mIoU",
                                 "effective_rank", "rankme", "std_sqrt_d"])  # fmt: skip
def test_what_tells_good_from_bad_or_at_least_a_collapse_is_enough(key: str) -> None:
    assert during("no_quality_metric", Facts(), {"loss": 0.1}, {"loss": 0.2, key: 0.5}) is None


@pytest.mark.parametrize("key", ["contrastive_accuracy", "loss.accuracy_of_pretext", "knn_k", "knn_temperature",
                                 "grad_norm", "tau"])  # fmt: skip
def test_how_well_the_losss_own_task_is_solved_is_not(key: str) -> None:
    assert during("no_quality_metric", Facts(), {"loss": 0.1, key: 0.5}) is not None


def test_facts_of_real_parts_are_what_rules_expect(tiny: Any) -> None:
    """A small run, whose only faults are those of its size."""
    import torch

    from sslkit.build import build
    from sslkit.facts import gather
    from sslkit.recipe import read_recipe

    known = gather(build(read_recipe(str(tiny)), torch.device("cpu"), lambda text: None))
    found = {name: seen for name in RULES if (seen := before(name, known))}
    assert {name for name, (severity, _) in found.items() if severity != "info"} == set()
