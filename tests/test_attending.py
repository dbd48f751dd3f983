from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sslkit import doctor
from sslkit.attending import Attending
from sslkit.rules import Course, Facts, Rule, Seen, Severity


def loud(course: Course) -> Seen | None:
    loss = course.last("loss") or 0.0
    return Seen(f"the loss is {loss:g}", severity="error" if loss > 10 else "warning") if loss > 1 else None


@pytest.fixture(autouse=True)
def rules(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {
        "loud": Rule("The loss is loud.", "warning", fix="turn it down", source="a paper", during=loud),
        "note": Rule("A note.", "info", fix="nothing", source="a paper", during=lambda c: "always"),
    }
    monkeypatch.setattr(doctor, "rules", lambda: (known, ()))


def attend(losses: list[float], stop_on: Severity | None = None, **facts: Any) -> tuple[Attending, list[str]]:
    said: list[str] = []
    attending = Attending(Facts(**facts), said.append, stop_on)
    for step, loss in enumerate(losses, 1):
        attending.recorded({"step": step, "epoch": 0.1 * step, "loss": loss})
    return attending, said


def test_a_finding_is_told_once_when_it_becomes_true() -> None:
    attending, said = attend([0.5, 2.0, 3.0, 0.1, 2.0])
    assert said == ["warning at step 2: The loss is loud: the loss is 2; turn it down [loud]"]
    assert not attending.lost


def test_it_is_told_again_when_it_gets_worse() -> None:
    assert [line[:15] for line in attend([2.0, 20.0, 30.0, 2.0])[1]] == ["warning at step", "error at step 2"]


@pytest.mark.parametrize(("stop_on", "losses", "lost"), [
    ("error", [2.0, 20.0], True), ("error", [2.0], False), ("warning", [2.0], True), (None, [20.0], False),
])  # fmt: skip
def test_a_run_is_lost_as_its_user_says(stop_on: Severity | None, losses: list[float], lost: bool) -> None:
    assert attend(losses, stop_on)[0].lost is lost


def test_what_the_recipe_accepts_is_neither_told_nor_a_loss() -> None:
    attending, said = attend([20.0], "error", accepted=("loud",))
    assert not said
    assert not attending.lost


def test_a_resumed_run_has_its_past_and_is_not_told_of_it_again(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "epoch": 0.1, "loss": 2.0}\n', encoding="utf-8")
    said: list[str] = []
    attending = Attending(Facts(), print)
    attending.run_started(cast(Any, SimpleNamespace(step=1, directory=tmp_path, say=said.append)))
    attending.recorded({"step": 2, "epoch": 0.2, "loss": 3.0})
    assert not said
    assert attending.course.points("loss").values == [2.0, 3.0]
    attending.recorded({"step": 3, "epoch": 0.3, "loss": 30.0})
    assert len(said) == 1


def test_later_records_are_looked_at_now_and_then_and_measurements_always(monkeypatch: pytest.MonkeyPatch) -> None:
    attending, _ = attend([0.5] * 200)
    looks: list[int] = []
    monkeypatch.setattr(attending, "look", lambda: looks.append(len(attending.course.records)))
    for step in range(201, 221):
        attending.recorded({"step": step, "loss": 0.5} if step != 213 else {"step": step, "knn_top1": 0.3})
    assert looks == [210, 213, 220]


def test_too_little_room_is_told_once_a_checkpoint_shows_what_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "step-000000001"
    path.mkdir()
    (path / "model.safetensors").write_bytes(bytes(2**20))
    said: list[str] = []
    for free in (2 * 2**20, 5 * 2**20):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        attending = Attending(Facts(), said.append, keep=3)
        attending.checkpoint_saved(path)
        attending.checkpoint_saved(path)
    (line,) = said
    assert line.endswith("takes 1.0 MiB, of which up to 5 are there at a time, and 2.0 MiB are free on this disk")
