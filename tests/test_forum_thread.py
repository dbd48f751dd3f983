"""The forum thread's run, rebuilt: its tau to the last bit, its loop step by step, and what the mended recipe mends."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import ROOT, noisy_cifar10, run_info
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from sslkit.build import Parts, build
from sslkit.recipe import read_recipe
from sslkit.run_directory import RunDirectory
from sslkit.trainer import Trainer
from sslkit_forum_thread import ForumThread
from sslkit_schedules import Cosine

CPU = torch.device("cpu")

# ---------------------------------------------------------------- tau

HPS = {"base_target_ema": 0.996, "num_epochs": 10}


# fmt: off
def update_tau(epoch):  # the thread's function, letter by letter
    
    tau = 1-(1-HPS['base_target_ema'])*(math.cos(math.pi*epoch/HPS['num_epochs']))/2
    
    return(tau)  # noqa: RET504
# fmt: on


@pytest.mark.parametrize("base", [0.996, 0.99, 0.9, 0.004])
@pytest.mark.parametrize("epochs", [1, 7, 10, 100])
@pytest.mark.parametrize("steps_per_epoch", [1, 3, 400])
def test_tau_is_the_threads_to_the_last_bit(
    base: float, epochs: int, steps_per_epoch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(HPS, "base_target_ema", base)
    monkeypatch.setitem(HPS, "num_epochs", epochs)
    run = run_info(total_steps=epochs * steps_per_epoch, steps_per_epoch=steps_per_epoch)
    tau = ForumThread(base=base).build(run)
    seen = [tau(step) for step in range(run.total_steps)]
    assert seen == [update_tau(epoch) for epoch in range(epochs) for _ in range(steps_per_epoch)]


@given(base=st.floats(0, 0.999), steps_per_epoch=st.integers(1, 50), half=st.integers(1, 50))
@settings(deadline=None)
def test_tau_passes_one_halfway_and_byols_own_does_not(base: float, steps_per_epoch: int, half: int) -> None:
    run = run_info(total_steps=2 * half * steps_per_epoch, steps_per_epoch=steps_per_epoch)
    tau, right = ForumThread(base=base).build(run), Cosine(start=base, end=1.0).build(run)
    middle = half * steps_per_epoch
    assert tau(0) == pytest.approx((1 + base) / 2)
    assert all(tau(step) < 1 for step in range(middle))
    assert tau(middle) == tau(middle + steps_per_epoch - 1) == pytest.approx(1, abs=1e-15)
    assert all(tau(step) > 1 for step in range(middle + steps_per_epoch, run.total_steps))
    assert all(right(step) <= 1 for step in range(run.total_steps))


@pytest.mark.parametrize("base", [-0.1, 1.1, math.nan])
def test_a_base_is_between_nought_and_one(base: float) -> None:
    with pytest.raises(ValidationError):
        ForumThread(base=base)


# ---------------------------------------------------------------- the thread's loop


@pytest.fixture
def noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFAR-10 as 32 training and 8 test images of noise."""
    noisy_cifar10(tmp_path, train=32, test=8)
    monkeypatch.setenv("SSLKIT_DATA", str(tmp_path))


SMALL = ["data_source.images=8", "train.batch_size=4", "train.precision=fp32", "train.compile=false",
         "projector.hidden_dim=64", "predictor.hidden_dim=64"]  # fmt: skip


def small(name: str, *overrides: str) -> Parts:
    return build(read_recipe(name, [*SMALL, *overrides]), CPU, lambda text: None)


class Network(nn.Module):
    """The thread's network: torchvision's ResNet-18 without classifier, both heads (here narrow) in either branch."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = torchvision.models.resnet18()
        self.encoder.fc = nn.Identity()
        self.projection, self.prediction = self.mlp(512), self.mlp(256)

    def mlp(self, width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(width, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 256))

    def forward(self, x: torch.Tensor, online: bool) -> torch.Tensor:
        projection = self.projection(self.encoder(x))
        prediction: torch.Tensor = self.prediction(projection) if online else projection
        return prediction

    def take(self, parts: Parts) -> None:
        """Start where a run starts. By name, every one of them: the networks are the same or this fails."""
        online, predictor = parts.model.online, parts.model.predictor
        assert predictor is not None
        self.encoder.load_state_dict(online.backbone.state_dict())
        for ours, theirs in ((online.projector, self.projection), (predictor, self.prediction)):
            assert isinstance(ours, nn.Module)
            values = list(ours.state_dict().values())
            assert len(values) == len(theirs.state_dict())
            theirs.load_state_dict(dict(zip(theirs.state_dict(), values, strict=True)))


def plain(parts: Parts, trainer: Trainer, first: int, steps: int, base: float) -> tuple[list[float], Network]:
    """What the thread's script does from step `first` on, with torchvision and torch.optim alone."""
    online, target = Network().double(), Network().double()
    online.take(parts)
    for theirs, ours in zip(target.parameters(), online.parameters(), strict=True):
        theirs.data.copy_(ours.data)
    adam = torch.optim.Adam(online.parameters(), 1e-3)
    losses = []
    for step in range(first, first + steps):
        image = trainer.feed.draw(step).batch.images.float() / 255  # as ToTensor
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (trainer.info.mean, trainer.info.std))
        one = two = ((image - mean) / std).double()
        with torch.no_grad():
            aims = target(one, online=False), target(two, online=False)
        pairs = ((online(one, online=True), aims[1]), (online(two, online=True), aims[0]))
        terms = [2 - 2 * (F.normalize(x, dim=1) * F.normalize(y, dim=1)).sum(dim=-1) for x, y in pairs]
        loss = (terms[0] + terms[1]).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        epoch = step // trainer.info.steps_per_epoch
        tau = 1 - (1 - base) * math.cos(math.pi * epoch / 10) / 2
        with torch.no_grad():
            for theirs, ours in zip(target.parameters(), online.parameters(), strict=True):
                theirs.data = tau * theirs + (1 - tau) * ours
        losses.append(loss.item())
    return losses, target


def test_the_recipe_is_the_threads_loop(noise: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, steps, base = 13, 2, 0.5  # the last step of epoch 6 and the first of epoch 7; a base that shows at once
    parts = small("forum_thread", f"target_updater.tau.base={base}")
    parts.model.double()  # Adam makes a step of the sign of a gradient that is nothing but rounding
    trainer = Trainer(parts, RunDirectory(tmp_path / "run"), say=lambda text: None)
    views = trainer.make_views
    monkeypatch.setattr(trainer, "make_views", lambda *given: [view.double() for view in views(*given)])
    trainer.step = first
    wanted, target = plain(parts, trainer, first, steps, base)
    losses = []
    for draw in trainer.feed.steps(first, first + steps):
        trainer.train_step(draw)
        losses.append(float(trainer.terms.total))
    trainer.files.close()
    assert losses == pytest.approx(wanted, rel=1e-6)
    ours = parts.model.target
    assert ours is not None
    theirs = [p for module in (target.encoder, target.projection) for p in module.parameters()]
    for mine, other in zip(ours.parameters(), theirs, strict=True):
        assert torch.allclose(mine, other, rtol=0, atol=1e-6)
    # The target's BatchNorm gathers statistics of its own, in training mode, in either program.
    assert ours.training
    assert int(ours.backbone.bn1.num_batches_tracked) == int(target.encoder.bn1.num_batches_tracked) == 2 * steps  # type: ignore[union-attr, arg-type]


def test_both_views_are_one_picture_until_it_is_mended(noise: None) -> None:
    for name, same in (("forum_thread", True), ("forum_thread_fixed", False)):
        parts = small(name)
        images = parts.data.train.read(torch.arange(8))
        drawn = parts.views.draw(8, torch.Generator().manual_seed(0))
        one, two = parts.views.appear(parts.views.crop(images, drawn), drawn)
        assert torch.equal(one, two) == same


# ---------------------------------------------------------------- what is mended


def test_the_run_is_the_threads_where_the_thread_says() -> None:
    table = read_recipe("forum_thread").tables()
    assert table["backbone"] | {"use": "timm", "model": "resnet18", "stem": "default"} == table["backbone"]
    assert table["loss"] | {"use": "cosine", "form": "byol"} == table["loss"]
    assert table["target_updater"]["tau"] == {"use": "forum_thread", "base": 0.9375}
    assert table["target_updater"]["batch_norm_buffers"] == "own"
    assert (table["optimizer"]["use"], table["optimizer"]["weight_decay"]) == ("adam", 0.0)
    assert (table["train"]["epochs"], table["view_generator"]["views"]) == (10, 2)
    assert table["train"]["accept"] == ["identical_views", "tau_above_one"]


def test_only_what_is_named_was_mended() -> None:
    wrong, fixed = read_recipe("forum_thread").tables(), read_recipe("forum_thread_fixed").tables()
    changed = {key for key in wrong if wrong[key] != fixed[key]} - {"name"}
    assert changed == {"view_generator", "target_updater", "optimizer", "train"}
    assert fixed["view_generator"]["use"] == "two_crops"
    assert fixed["target_updater"] == wrong["target_updater"] | {"tau": {"use": "cosine", "start": 0.9, "end": 1.0}}
    assert {k for k in fixed["optimizer"] if fixed["optimizer"][k] != wrong["optimizer"][k]} == {"lr"}
    assert fixed["optimizer"]["lr"]["peak"] == wrong["optimizer"]["lr"]
    train = {k for k in fixed["train"] if fixed["train"][k] != wrong["train"][k]}
    assert train == {"accept"}
    assert not set(fixed["train"]["accept"]) & set(wrong["train"]["accept"])


def test_every_mended_line_has_its_reason_above_it() -> None:
    text = (ROOT / "recipes" / "forum_thread_fixed.toml").read_text(encoding="utf-8")
    mended = re.findall(r"^((?:# .+\n)*)(\w+) = \{", text, re.MULTILINE)
    assert [name for _, name in mended] == ["view_generator", "target_updater", "optimizer", "train"]
    assert all(len(reason) > 60 for reason, _ in mended)


# ---------------------------------------------------------------- what the tutorial shows


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("forum_thread", ROOT / "benchmarks" / "forum_thread.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results(benchmark: ModuleType) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(benchmark.RESULTS.read_text(encoding="utf-8"))
    return found


def test_the_picture_is_drawn_from_the_figures(benchmark: ModuleType, results: dict[str, Any]) -> None:
    assert benchmark.PICTURE.read_text(encoding="utf-8") == benchmark.picture(results)


def test_the_tutorials_tables_are_the_figures(benchmark: ModuleType, results: dict[str, Any]) -> None:
    page = (ROOT / "docs" / "tutorial" / "is-my-loss-normal.md").read_text(encoding="utf-8")
    for name in ("forum_thread", "forum_thread_fixed"):
        assert benchmark.table(results["runs"][name]["epochs"]) in page, name


def test_the_figures_are_of_these_recipes(benchmark: ModuleType, results: dict[str, Any]) -> None:
    for name, run in results["runs"].items():
        changes = benchmark.settings(name, results["seed"])
        assert run["changes"] == changes
        assert run["hash"] == read_recipe(run["recipe"], changes).hash(), (
            "train again: python benchmarks/forum_thread.py"
        )


def test_the_loss_rises_as_the_threads_did_and_with_a_tau_of_byols_it_does_not(
    benchmark: ModuleType, results: dict[str, Any]
) -> None:
    def losses(name: str) -> list[float]:
        return [row["loss"] for row in results["runs"][name]["epochs"][1:]]

    for rising in (losses("forum_thread"), benchmark.THREAD):
        lowest, highest = min(rising[:6]), max(rising[6:])
        assert highest > 10 * lowest
        assert rising[9] < highest / 3, "and falls again"
        assert rising[5] < 2 * lowest, "not before tau is 1"
    mended = losses("tau_mended")[1:]
    assert max(mended) < 2.5 * min(mended)


def test_an_epochs_row_holds_the_mean_loss_and_the_newest_figures(benchmark: ModuleType) -> None:
    records = [
        {"epoch": 0.0, "knn_top1": 0.2}, {"epoch": 0.5, "loss": 1.0, "tau": 0.9},
        {"epoch": 1.0, "loss": 2.0, "tau": 0.95}, {"epoch": 1.0, "knn_top1": 0.3},
        {"epoch": 1.5, "loss": 5.0, "tau": None},
    ]  # fmt: skip
    assert benchmark.by_epoch(records) == [
        {"epoch": 0, "knn_top1": 0.2}, {"epoch": 1, "loss": 1.5, "tau": 0.95, "knn_top1": 0.3},
        {"epoch": 2, "loss": 5.0, "tau": None},
    ]  # fmt: skip
