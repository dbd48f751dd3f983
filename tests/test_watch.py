from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TINY

from sslkit import checkpoint, health
from sslkit.batch import Branches, ViewSpec
from sslkit.build import build
from sslkit.evaluate import knn_accuracy
from sslkit.recipe import parse_recipe
from sslkit.run_directory import RunDirectory
from sslkit.train import Trainer
from sslkit_watch.health import HealthObserver


def branches(embedding: torch.Tensor) -> Branches:
    return Branches((ViewSpec(4),), [embedding], [embedding], [None], [None])


@pytest.mark.parametrize("batches", [[10], [64, 64], [50, 50, 50], [200]])
def test_the_ring_holds_the_newest_features(batches: list[int]) -> None:
    observer, kept = HealthObserver(64), torch.empty(0, 3)
    for number, size in enumerate(batches):
        rows = torch.randn(size, 3, generator=torch.Generator().manual_seed(number))
        observer.step_ended(None, branches(rows))  # type: ignore[arg-type]
        kept = torch.cat([kept, rows[:64]])[-64:]
    ring = observer.ring[: min(observer.filled, 64)]
    assert {tuple(r) for r in ring.tolist()} == {tuple(r) for r in kept.tolist()}


def test_the_recorded_rank_is_of_the_ring_and_state_survives() -> None:
    observer, recorded = HealthObserver(64), {}
    rows = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    observer.step_ended(None, branches(rows))  # type: ignore[arg-type]
    again = HealthObserver(64)
    again.load_state_dict(observer.state_dict())
    again.epoch_ended(SimpleNamespace(record=recorded.update))  # type: ignore[arg-type]
    assert recorded["effective_rank"] == pytest.approx(health.effective_rank(rows))
    assert recorded["effective_rank_share"] == pytest.approx(health.effective_rank(rows) / 4)


def trained(tmp_path: Path, *overrides: str) -> tuple[Trainer, list[dict[str, Any]]]:
    parts = build(parse_recipe(TINY, "r.toml", overrides), torch.device("cpu"), lambda text: None)
    files = RunDirectory(tmp_path / "run")
    files.open_metrics(0)
    trainer = Trainer(parts, files, say=lambda text: None)
    trainer.fit(10)
    files.close()
    return trainer, [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]


def test_knn_is_of_clean_images_in_eval_mode(tmp_path: Path) -> None:
    trainer, records = trained(tmp_path, "observers.knn.bank=0", "observers.knn.queries=0")
    data, backbone = trainer.data, trainer.model.online.backbone.eval()
    assert data.test is not None
    with torch.no_grad():
        bank, queries = (
            backbone(trainer.views.clean(images.read(torch.arange(len(images))))) for images in (data.train, data.test)
        )
    expected = knn_accuracy(bank, data.train.labels, queries, data.test.labels, k=20, temperature=0.1)  # type: ignore[arg-type]
    measured = [r for r in records if "knn_top1" in r]
    assert [r["step"] for r in measured] == [0, 10]
    assert measured[-1]["knn_top1"] == pytest.approx(expected, abs=1e-6)
    assert measured[-1]["knn_bank"] == 1347


def test_observers_change_nothing_of_the_training(tmp_path: Path) -> None:
    _, watched = trained(tmp_path / "a")
    off = [f"observers.{name}.enabled=false" for name in ("knn", "health", "tensorboard")]
    _, alone = trained(tmp_path / "b", *off)
    assert [r["loss"] for r in watched if "loss" in r] == [r["loss"] for r in alone if "loss" in r]
    assert not any("knn_top1" in r or "std_sqrt_d" in r for r in alone)


def test_tensorboard_files_hold_every_record_once_across_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer, _ = trained(tmp_path)  # to step 10; then, as if killed at 15 without another checkpoint
    for draw in trainer.feed.steps(10, 15):
        trainer.train_step(draw)
    trainer.files.open_metrics(10**9)
    trainer._log()
    trainer.bus.emit("run_ended", run=trainer, status="stopped")
    trainer.files.close()

    time.sleep(1)  # TensorBoard orders files by the second that they were begun in
    found, _ = checkpoint.newest(trainer.files.checkpoints)
    assert found is not None
    files = RunDirectory(tmp_path / "run")
    files.open_metrics(found.facts["metrics_offset"])
    again = Trainer(build(parse_recipe(TINY, "r.toml"), torch.device("cpu"), print), files, say=print)
    again.restore(found)
    again.fit(20)
    again.bus.emit("run_ended", run=again, status="done")
    files.close()

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "knn_top1", "effective_rank"):
        expected = [(r["step"], pytest.approx(r[name])) for r in records if name in r]
        assert [(e.step, e.value) for e in events.Scalars(name)] == expected, name


def test_a_ring_of_another_size_begins_empty() -> None:
    small, large = HealthObserver(64), HealthObserver(128)
    small.step_ended(None, branches(torch.ones(10, 3)))  # type: ignore[arg-type]
    large.load_state_dict(small.state_dict())
    assert large.filled == 0
    for _ in range(30):
        large.step_ended(None, branches(torch.ones(10, 3)))  # type: ignore[arg-type]


def test_without_labels_knn_says_so_once(tmp_path: Path) -> None:
    parts = build(parse_recipe(TINY, "r.toml"), torch.device("cpu"), lambda text: None)
    parts.data.train.labels = None
    files, said = RunDirectory(tmp_path / "run"), []
    files.open_metrics(0)
    trainer = Trainer(parts, files, say=said.append)
    trainer.fit(10)
    files.close()
    assert said == ["kNN is not measured: this data source has no labels"]
