from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from torch import nn

from sslkit import checkpoint, features, health, randomness
from sslkit.build import build
from sslkit.features import chosen, knn_accuracy
from sslkit.recipe import DEFAULT_OBSERVERS, parse_recipe
from sslkit.run_directory import RunDirectory, read_metrics
from sslkit.trainer import Trainer
from sslkit_watch.health import HealthObserver
from sslkit_watch.probe import ProbeObserver, fresh, learn, scores


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Callable[..., Trainer]]:
    """Makes a run of the tiny recipe; `records` reads what it recorded."""
    opened: list[RunDirectory] = []

    def make(*overrides: str, folder: str = "run", **options: Any) -> Trainer:
        parts = build(parse_recipe(TINY, "r.toml", overrides), torch.device("cpu"), lambda text: None)
        files = RunDirectory(tmp_path / folder)
        opened.append(files)
        found, _ = checkpoint.newest(files.checkpoints)
        files.open_metrics(found.facts["metrics_offset"] if found else 0)
        trainer = Trainer(parts, files, **{"say": lambda text: None, **options})
        if found:
            trainer.restore(found)
        return trainer

    yield make
    for files in opened:
        files.close()


def records(trainer: Trainer) -> list[dict[str, Any]]:
    timings = ("images_per_second", "data_wait")
    return [{k: v for k, v in r.items() if k not in timings} for r in read_metrics(trainer.directory)]


# ---------------------------------------------------------------- health


def test_a_record_tells_of_views_gradients_and_target(trainer: Callable[..., Trainer]) -> None:
    t = trainer("train.log_every=1")
    t.fit(6)
    logged = [r for r in records(t) if "loss" in r]
    assert [r["step"] for r in logged] == [1, 2, 3, 4, 5, 6]
    keys = {"std_sqrt_d", "alignment", "uniformity", "view_difference", "view_difference_max", "target_drift",
            "target_norm_ratio", "target_step", "tau_measured", "target_updates", "grad_norm_backbone",
            "grad_norm_projector", "grad_norm_predictor"}  # fmt: skip
    assert keys <= set(logged[0])
    assert [r["target_updates"] for r in logged] == [1, 2, 3, 4, 5, 6]
    assert logged[0]["tau_measured"] is None, "in the first step of a warm-up nothing moves"
    assert [r["tau_measured"] for r in logged[1:]] == pytest.approx([r["tau"] for r in logged[1:]], abs=1e-5)
    assert all(r["target_step"] > 0 for r in logged[1:])
    for r in logged:
        parts = sum(r[f"grad_norm_{part}"] ** 2 for part in ("backbone", "projector", "predictor"))
        assert parts**0.5 == pytest.approx(r["grad_norm"], rel=1e-5)


def test_the_figures_are_those_of_the_step_that_is_recorded(trainer: Callable[..., Trainer]) -> None:
    t = trainer("train.log_every=3", "train.accumulate=2", "backbone.norm=group")
    for draw in t.feed.steps(0, 3):
        seen = t.train_step(draw)
    first = next(iter(draw.micro(2)))
    one, two = t.views.appear(t.views.crop(first.batch.images, first.parameters), first.parameters)
    assert torch.equal(seen.views[0], one), "of the first micro-batch"
    t._log()
    found = records(t)[-1]
    assert found["view_difference"] == pytest.approx(float((one - two)[:64].abs().mean()), rel=1e-6)
    assert found["view_difference_max"] == pytest.approx(float((one - two)[:64].abs().max()), rel=1e-6)
    assert seen.projections[0] is not None
    assert seen.projections[1] is not None
    assert found["alignment"] == pytest.approx(float(health.alignment(*seen.projections)), rel=1e-6)  # type: ignore[arg-type]


def test_identical_views_show_as_a_difference_of_zero(trainer: Callable[..., Trainer]) -> None:
    t = trainer("view_generator.use=identity")
    t.fit(1)
    found = records(t)[-1]
    assert (found["view_difference"], found["view_difference_max"]) == (0, 0)


def test_views_are_held_only_at_a_step_that_is_recorded(trainer: Callable[..., Trainer]) -> None:
    t = trainer("train.log_every=5")
    observer = t.parts.observers["health"]
    assert isinstance(observer, HealthObserver)
    held = []
    for draw in t.feed.steps(0, 6):
        t.train_step(draw)
        held.append(observer.branches is not None)
        if t.will_record(t.step):
            t._log()
            assert observer.branches is None
    assert held == [True, False, False, False, True, False]


def test_a_run_without_a_target_has_no_figures_of_one(trainer: Callable[..., Trainer]) -> None:
    t = trainer("target_updater.use=stop_gradient", "loss.form=simsiam")
    t.fit(1)
    assert not {"target_updates", "target_step", "tau_measured", "target_drift", "tau"} & set(records(t)[-1])


def test_the_ranks_are_of_the_newest_training_views(trainer: Callable[..., Trainer]) -> None:
    t = trainer("observers.health.ring=256")
    embeddings, projections = [], []
    for draw in t.feed.steps(0, 10):
        seen = t.train_step(draw)
        embeddings.append(seen.embeddings[0])
        projections.append(seen.projections[0])
    t._end_epoch()
    found = next(r for r in records(t) if "effective_rank" in r)
    z, p = torch.cat(embeddings[-2:]), torch.cat(projections[-2:])  # type: ignore[arg-type]
    assert found["effective_rank"] == pytest.approx(health.effective_rank(z), rel=1e-6)
    assert found["rankme"] == pytest.approx(health.rankme(z), rel=1e-6)
    assert found["alpha_req"] == pytest.approx(health.alpha_req(z), rel=1e-6)
    assert found["projection_rank"] == pytest.approx(health.effective_rank(p), rel=1e-6)
    assert found["projection_rank_share"] == pytest.approx(health.effective_rank(p) / 8, rel=1e-6)


def test_lidar_is_of_newly_drawn_views_in_eval_mode_at_the_end(trainer: Callable[..., Trainer]) -> None:
    t = trainer("observers.health.lidar_images=50", "observers.health.lidar_views=3")
    t.fit(20)
    found = [r for r in records(t) if "lidar" in r]
    assert [r["step"] for r in found] == [20]
    where = chosen(t.data.train, 50)
    twice = t.data.train.read(where).repeat_interleave(2, dim=0)  # of two views each
    parameters = t.views.draw(100, randomness.generator(0, "lidar"))
    with torch.no_grad():
        t.model.eval()
        one, two = (t.model.online(v)[1] for v in t.views.appear(t.views.crop(twice, parameters), parameters))
    z = torch.stack([one[::2], two[::2], one[1::2]], dim=1)
    assert found[0]["lidar"] == pytest.approx(health.lidar(z), rel=1e-4)
    assert (found[0]["lidar_images"], found[0]["lidar_views"]) == (50, 3)


def test_lidar_can_be_switched_off(trainer: Callable[..., Trainer]) -> None:
    t = trainer("observers.health.lidar_images=0")
    t.fit(20)
    assert not any("lidar" in r for r in records(t))


# ---------------------------------------------------------------- knn


def test_knn_is_of_clean_images_in_eval_mode(trainer: Callable[..., Trainer]) -> None:
    t = trainer("observers.knn.bank=0", "observers.knn.queries=0")
    t.fit(10)
    data, backbone = t.data, t.model.online.backbone.eval()
    assert data.test is not None
    with torch.no_grad():
        bank, queries = (
            backbone(t.views.clean(images.read(torch.arange(len(images))))) for images in (data.train, data.test)
        )
    expected = knn_accuracy(bank, data.train.labels, queries, data.test.labels, k=20, temperature=0.1)  # type: ignore[arg-type]
    measured = [r for r in records(t) if "knn_top1" in r]
    assert [r["step"] for r in measured] == [0, 10]
    assert measured[-1]["knn_top1"] == pytest.approx(expected, abs=1e-6)
    assert measured[-1]["knn_bank"] == 1347


def test_observers_change_nothing_of_the_training(trainer: Callable[..., Trainer]) -> None:
    watched = trainer(folder="a")
    off = [f"observers.{name}.enabled=false" for name in DEFAULT_OBSERVERS]
    alone = trainer(*off, folder="b")
    assert alone.parts.observers == {}
    for t in (watched, alone):
        t.fit(20)
    assert [r["loss"] for r in records(watched) if "loss" in r] == [r["loss"] for r in records(alone) if "loss" in r]
    assert not any("knn_top1" in r or "std_sqrt_d" in r or "probe_top1" in r for r in records(alone))
    for name, value in alone.model.state_dict().items():
        assert torch.equal(value, watched.model.state_dict()[name]), name


def test_knn_and_probe_share_the_features_of_a_step(
    trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    forwarded: list[int] = []
    plain = features.features

    def counted(network: Any, images: Any, indices: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        forwarded.append(len(indices))
        return plain(network, images, indices, *rest, **named)

    monkeypatch.setattr(features, "features", counted)
    t = trainer("observers.probe.queries=60")
    t.fit(10)
    assert forwarded == [200, 100] * 2, "the probe's queries are among kNN's"
    t.features("test", torch.arange(5))
    assert forwarded[-1] == 5, "outside an event nothing is kept"


def test_of_a_target_that_is_evaluated_the_probe_still_measures_the_online_branch(
    trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    t = trainer("target_updater.evaluate=target")
    seen: dict[tuple[str, str], torch.Tensor] = {}
    plain = t.features

    def noted(split: str, indices: torch.Tensor, branch: str = "evaluated") -> torch.Tensor:
        seen[split, branch] = plain(split, indices, branch)
        return seen[split, branch]

    monkeypatch.setattr(t, "features", noted)
    t.fit(10)
    assert set(seen) == {("train", "evaluated"), ("test", "evaluated"), ("test", "online")}
    assert t.data.test is not None
    everything = t.views.clean(t.data.test.read(torch.arange(len(t.data.test))))
    with torch.no_grad():
        t.model.eval()
        assert torch.allclose(seen["test", "online"], t.model.online.backbone(everything), atol=1e-5)
        target = t.model.target.backbone(everything[chosen(t.data.test, 100)])  # type: ignore[union-attr, operator]
    assert torch.allclose(seen["test", "evaluated"], target, atol=1e-5)


# ---------------------------------------------------------------- probe


def test_the_probe_learns_as_autograd_and_sgd_do() -> None:
    norm, linear = nn.BatchNorm1d(6, affine=False), nn.Linear(6, 4)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    sgd = torch.optim.SGD(linear.parameters(), lr=0.3, momentum=0.8)
    state, right = fresh(6, 4), 0.0
    for step in range(12):
        generator = torch.Generator().manual_seed(step)
        x = 3 * torch.randn(32, 6, generator=generator) + 5
        labels = torch.randint(4, (32,), generator=generator)
        logits = linear(norm(x))
        right += float((logits.argmax(dim=1) == labels).sum())
        sgd.zero_grad()
        nn.functional.cross_entropy(logits, labels).backward()
        sgd.step()
        learn(state, x, labels, 0.3, 0.8)
    assert torch.allclose(state["weight"], linear.weight, atol=1e-5)
    assert torch.allclose(state["bias"], linear.bias, atol=1e-5)
    assert (float(state["right"]), float(state["seen"])) == (right, 12 * 32)
    norm.eval()
    x = torch.randn(10, 6, generator=torch.Generator().manual_seed(99)) + 5
    assert torch.allclose(scores(state, x), linear(norm(x)), atol=1e-5)


def test_nothing_of_the_probe_reaches_the_features() -> None:
    rows = torch.randn(8, 6).requires_grad_()
    state = fresh(6, 4)
    learn(state, rows, torch.zeros(8, dtype=torch.int64), 0.1, 0.9)
    assert rows.grad is None
    assert not any(value.requires_grad for value in state.values())


def test_the_probe_tells_apart_what_a_line_can_tell_apart() -> None:
    state = fresh(3, 2)
    for step in range(50):
        x = torch.randn(64, 3, generator=torch.Generator().manual_seed(step))
        learn(state, x, (x[:, 1] > 0).long(), 0.1, 0.9)
    x = torch.randn(500, 3, generator=torch.Generator().manual_seed(1000))
    assert float((scores(state, x).argmax(dim=1) == (x[:, 1] > 0)).float().mean()) > 0.95


def test_the_probe_is_measured_at_the_start_and_after_each_epoch(trainer: Callable[..., Trainer]) -> None:
    t = trainer()
    t.fit(20)
    measured = [r for r in records(t) if "probe_top1" in r]
    assert [r["step"] for r in measured] == [0, 10, 20]
    assert measured[0]["probe_top1"] == pytest.approx(0.1, abs=0.05), "it knows nothing, and says 0 to all"
    probe = t.parts.observers["probe"]
    assert isinstance(probe, ProbeObserver)
    assert t.data.test is not None
    with torch.no_grad():
        rows = t.model.online.backbone.eval()(t.views.clean(t.data.test.read(torch.arange(len(t.data.test)))))
    expected = (scores(probe.state, rows).argmax(dim=1) == t.data.test.labels).float().mean()
    assert measured[-1]["probe_top1"] == pytest.approx(float(expected), abs=0.005)
    assert all(0 <= r["probe_train_top1"] <= 1 for r in records(t) if "loss" in r)


def test_progress_is_counted_from_record_to_record(trainer: Callable[..., Trainer]) -> None:
    t = trainer("train.log_every=4")
    probe = t.parts.observers["probe"]
    assert isinstance(probe, ProbeObserver)
    t.bus.emit("run_started", run=t)
    for draw in t.feed.steps(0, 7):
        t.train_step(draw)
        if t.step == 4:
            t._log()
    assert float(probe.state["seen"]) == 3 * 128


@pytest.mark.parametrize("stop", [3, 11, 13])
def test_resumed_observers_go_on_exactly(stop: int, trainer: Callable[..., Trainer]) -> None:
    whole = trainer("train.log_every=3", folder="whole")
    whole.fit(20)
    first = trainer("train.log_every=3", folder="parts")
    first.fit(stop)
    first.files.close()
    second = trainer("train.log_every=3", folder="parts")
    assert second.step == stop
    second.fit(20)
    assert records(second) == records(whole)


@pytest.mark.parametrize("missing", ["labels", "test"])
def test_without_labels_each_says_so_once_and_does_nothing(missing: str, trainer: Callable[..., Trainer]) -> None:
    said: list[str] = []
    t = trainer(say=said.append)
    if missing == "labels":
        t.data.train.labels = None
        t.feed.labels = None
    else:
        t.data.test = None
    t.fit(10)
    about = "labels" if missing == "labels" else "labelled test images"
    assert sorted(said) == [
        f"The probe is not {'trained' if missing == 'labels' else 'measured'}: this data source has no {about}",
        f"kNN is not measured: this data source has no {'labels' if missing == 'labels' else 'test images'}",
    ]
    found = records(t)
    assert not any("probe_top1" in r or "knn_top1" in r for r in found)
    assert any("probe_train_top1" in r for r in found) == (missing == "test")


# ---------------------------------------------------------------- tensorboard


def test_tensorboard_files_hold_every_record_once_across_a_resume(trainer: Callable[..., Trainer]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    t = trainer()
    t.fit(10)  # then, as if killed at 15 without another checkpoint
    for draw in t.feed.steps(10, 15):
        t.train_step(draw)
    t._log()
    t.bus.emit("run_ended", run=t, status="stopped")
    t.files.close()

    time.sleep(1)  # TensorBoard orders files by the second that they were begun in
    again = trainer()
    again.fit(20)
    again.bus.emit("run_ended", run=again, status="done")

    events = EventAccumulator(str(t.directory / "tensorboard")).Reload()
    for name in ("loss", "knn_top1", "effective_rank", "probe_top1"):
        expected = [(r["step"], pytest.approx(r[name])) for r in records(again) if name in r]
        assert [(e.step, e.value) for e in events.Scalars(name)] == expected, name


def test_images_without_a_label_teach_the_probe_nothing() -> None:
    from sslkit_watch.probe import fresh, learn

    rows, labels = torch.randn(8, 5), torch.tensor([0, 1, 2, 0, -1, -1, 2, 1])
    seen, only = fresh(5, 3), fresh(5, 3)
    for _ in range(3):
        learn(seen, rows, labels, 0.1, 0.9)
        learn(only, rows, labels.clamp_min(0), 0.1, 0.9)
    assert not torch.equal(seen["weight"], only["weight"]), "-1 is no class 0"
    assert float(seen["seen"]) == 18
    nothing = fresh(5, 3)
    learn(nothing, rows, torch.full((8,), -1), 0.1, 0.9)
    assert not nothing["weight"].any()
    assert not nothing["bias"].any()
