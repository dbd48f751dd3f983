"""A plain PyTorch loop, sound and with one fault at a time, watched."""

from __future__ import annotations

import copy
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from sklearn.datasets import load_digits
from torch import Tensor, nn

import sslkit
from sslkit import doctor
from sslkit.errors import UserError
from sslkit.features import in_eval_mode, knn_accuracy
from sslkit.foreign.taps import find
from sslkit.foreign.watching import Watch
from sslkit.run_directory import read_json, read_metrics

STEPS, EPOCHS, BATCH = 26, 4, 64
SILENT: dict[str, Any] = {"say": lambda text: None}


# ---------------------------------------------------------------- somebody's loop


class Network(nn.Module):
    """The forum thread's, smaller: encoder, projection, prediction."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm1d) -> None:
        super().__init__()
        flat = norm is nn.BatchNorm1d
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16) if flat else nn.Identity(), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32) if flat else nn.Identity(), nn.ReLU(),
        )  # fmt: skip
        self.projection = mlp(512, norm)
        self.prediction = mlp(16, norm)

    def project(self, x: Tensor) -> Tensor:
        return self.projection(self.encoder(x).flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.prediction(self.project(x))


def mlp(width: int, norm: Callable[[int], nn.Module]) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 64), norm(64), nn.ReLU(), nn.Linear(64, 16))


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    pixels = torch.from_numpy(images).float().reshape(-1, 1, 8, 8)[order] / 8 - 1
    return lit(pixels, torch.Generator().manual_seed(1)), torch.from_numpy(labels)[order]


def lit(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Under slanting light, which a random network sees before all else, and a trained one learns to overlook."""
    whole, across, down = torch.empty(3, len(images), 1, 1, 1).uniform_(-1.5, 1.5, generator=generator)
    slope = torch.linspace(-1, 1, 8)
    return images + whole + across * slope + down * slope[:, None]


def labelled(digits: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    images, labels = digits
    return images[:600], labels[:600], images[1500:], labels[1500:]


def augmented(images: Tensor) -> Tensor:
    """In another light, with noise."""
    return lit(images) + 0.2 * torch.randn_like(images)


def cosine_loss(a: Tensor, b: Tensor) -> Tensor:
    return (2 - 2 * F.cosine_similarity(a, b, dim=1)).mean()


def byol(
    digits: tuple[Tensor, Tensor],
    *,
    watched: bool = True,
    fault: str = "",
    norm: Callable[[int], nn.Module] = nn.BatchNorm1d,
    tau: Callable[[int], float] | None = None,
    epochs: int = EPOCHS,
    lr: float = 3e-3,
    **options: Any,
) -> tuple[Network, Watch | None]:
    """BYOL as people write it; `fault` is what is wrong with it."""
    torch.manual_seed(0)
    images, total = digits[0][:1500], epochs * STEPS
    online = Network(norm)
    target = copy.deepcopy(online).requires_grad_(False)
    trained = [p for n, p in online.named_parameters() if fault != "predictor" or not n.startswith("prediction")]
    optimizer = torch.optim.Adam(trained, lr)
    tau = tau or (lambda k: 1 - 0.1 * (math.cos(math.pi * k / total) + 1) / 2)
    watch = None
    if watched:
        watch = sslkit.watch(
            online, target, optimizer=optimizer, backbone="encoder", projector="projection", predictor="prediction",
            epochs=epochs, steps_per_epoch=STEPS, every=10,
            **{**SILENT, "labelled": labelled(digits), "k": 20, **options},
        )  # fmt: skip
    for step in range(total):
        batch = images[torch.randint(len(images), (BATCH,))]
        if fault in ("early", "early never"):
            follow(online, target, tau(step) if fault == "early" else 1.0)
        one, two = augmented(batch), augmented(batch)
        if fault == "pairs":
            two = two.roll(1, 0)
        if fault == "views":
            one, two = batch, batch.clone()
        with torch.no_grad():
            t1, t2 = target.project(one), target.project(two)
        loss = cosine_loss(online(one), t2) + cosine_loss(online(two), t1)
        if fault == "nan" and step == 47:
            loss = loss * math.nan
        if fault != "nan" or step != 47:
            optimizer.zero_grad()
            loss.backward()
        if fault == "between":
            follow(online, target, tau(step))
        optimizer.step()
        for _ in range({"early": 0, "early never": 0, "between": 0, "late": 0, "never": 0, "twice": 2}.get(fault, 1)):
            follow(online, target, tau(step), "weight" if fault == "filter" else "")
        if watch:
            watch.step(loss=loss, tau=tau(step))
        if fault == "late":
            follow(online, target, tau(step))
        if watch and (step + 1) % STEPS == 0:
            watch.epoch_ended()
    return online, watch


def follow(online: nn.Module, target: nn.Module, tau: float, only: str = "") -> None:
    for (name, p), t in zip(online.named_parameters(), target.parameters(), strict=True):
        if only in name:
            t.data = tau * t.data + (1 - tau) * p.data


def found(watch: Watch | None, severity: str = "error") -> set[str]:
    assert watch
    watch.close()
    return {f.id for f in watch.examination().findings if f.severity == severity}


def records(watch: Watch | None, key: str) -> list[float]:
    assert watch
    assert watch.directory
    return [r[key] for r in read_metrics(watch.directory) if r.get(key) is not None]


# ---------------------------------------------------------------- sound loops


def test_a_sound_byol_is_called_healthy(digits: Any) -> None:
    _, watch = byol(digits)
    assert not found(watch)
    assert not found(watch, "warning")
    assert watch
    assert watch.verdict().endswith("VERDICT  healthy")
    assert not watch.lost
    facts = watch.facts
    assert (facts.total_steps, facts.batch_size, facts.view_sizes) == (EPOCHS * STEPS, BATCH, (8, 8))
    assert (facts.byol_scale, facts.prevents_collapse, facts.target) == (1.0, False, "copy")
    assert (facts.classes, facts.test_classes) == (10, 10)
    assert (facts.stem_stride, facts.last_map) == (1.0, 4)
    assert facts.unmoved == ()
    assert facts.unoptimised == ()
    assert facts.tau
    assert facts.tau.steps == EPOCHS * STEPS
    assert facts.shared_images == 0


def test_the_panel_is_recorded(digits: Any, tmp_path: Path) -> None:
    _, watch = byol(digits, directory=tmp_path / "run")
    assert watch
    watch.close()
    keys = {key for record in read_metrics(tmp_path / "run") for key in record}
    assert keys >= {
        "loss", "tau", "lr", "cosine", "alignment", "uniformity", "std_sqrt_d", "view_difference_max", "target_drift",
        "target_step", "tau_measured", "grad_norm", "grad_norm_backbone", "grad_norm_predictor", "effective_rank",
        "projection_rank", "knn_top1", "knn_k",
    }  # fmt: skip
    steps = [r["step"] for r in read_metrics(tmp_path / "run") if "loss" in r]
    assert steps == [1, 10, 20, 26, 30, 40, 50, 52, 60, 70, 78, 80, 90, 100, 104]
    for record in read_metrics(tmp_path / "run"):
        if "loss" in record:  # the cosine is of one of the two directions
            assert record["tau_measured"] == pytest.approx(record["tau"], abs=1e-5)
    ends = [r for r in read_metrics(tmp_path / "run") if "effective_rank" in r]
    assert [r["epoch"] for r in ends] == list(range(1, EPOCHS + 1))
    assert len(records(watch, "knn_top1")) == EPOCHS + 1


def test_the_doctor_reads_what_was_written(digits: Any, tmp_path: Path) -> None:
    _, watch = byol(digits, fault="views", directory=tmp_path / "run", name="mine")
    assert watch
    watch.close()
    again = doctor.examine_run(tmp_path / "run")
    assert {f.id for f in again.findings} == {f.id for f in watch.examination().findings}
    assert again.exit_code == 2
    assert "mine" in again.title
    assert read_json(tmp_path / "run" / "status.json")["status"] == "done"


def test_watching_changes_nothing_to_the_last_bit(digits: Any) -> None:
    alone, _ = byol(digits, watched=False, epochs=2)
    watched, watch = byol(digits, epochs=2, tau=lambda k: 1 - 0.1 * (math.cos(math.pi * k / (2 * STEPS)) + 1) / 2)
    assert watch
    for (name, a), b in zip(alone.state_dict().items(), watched.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert all(p.training for p in watched.modules())
    state = torch.get_rng_state()
    watch.close()
    assert torch.equal(state, torch.get_rng_state())
    assert not any(m._forward_hooks for m in watched.modules())


def test_measuring_draws_nothing_from_the_loops_randomness(digits: Any) -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x)  # in eval mode, too

    online, target, optimizer = pair()
    online.encoder.append(Noisy())
    target.encoder.append(Noisy())
    state = torch.get_rng_state()
    watch = sslkit.watch(online, target, optimizer=optimizer, labelled=labelled(digits), k=20, **SILENT)
    assert torch.equal(state, torch.get_rng_state())
    one_step(online, target, optimizer)
    state = torch.get_rng_state()
    watch.step(loss=1.0)
    watch.epoch_ended()
    watch.close()
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("method", ["simsiam", "simclr"])
def test_sound_loops_without_a_target_are_called_sound(digits: Any, method: str) -> None:
    torch.manual_seed(0)
    online = Network()
    online.projection.append(nn.BatchNorm1d(16))
    if method == "simclr":
        del online.prediction
    optimizer = torch.optim.SGD(online.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    watch = sslkit.watch(
        online,
        optimizer=optimizer,
        epochs=2,
        steps_per_epoch=STEPS,
        labelled=labelled(digits),
        k=20,
        every=10,
        **SILENT,
    )
    for step in range(2 * STEPS):
        batch = digits[0][torch.randint(1500, (BATCH,))]
        z1, z2 = online.project(augmented(batch)), online.project(augmented(batch))
        if method == "simsiam":
            p1, p2 = online.prediction(z1), online.prediction(z2)
            loss = -(F.cosine_similarity(p1, z2.detach()).mean() + F.cosine_similarity(p2, z1.detach()).mean()) / 2
        else:
            similar = F.normalize(torch.cat([z1, z2]), dim=1) @ F.normalize(torch.cat([z1, z2]), dim=1).T / 0.5
            similar.fill_diagonal_(-math.inf)
            loss = F.cross_entropy(similar, torch.arange(2 * BATCH).roll(BATCH))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        watch.step(loss=loss)
        if (step + 1) % STEPS == 0:
            watch.epoch_ended()
    assert not found(watch)
    if method == "simsiam":
        assert (watch.facts.target, watch.facts.byol_scale) == ("online", 0.25)
    else:
        assert (watch.facts.target, watch.facts.prevents_collapse) == ("none", None)


# ---------------------------------------------------------------- one fault at a time


@pytest.mark.parametrize(
    ("fault", "finding"),
    [
        ("views", "identical_views"),
        ("pairs", "pairs_differ"),
        ("predictor", "predictor_untrained"),
        ("filter", "ema_skips_parameters"),
    ],
)
def test_a_fault_is_found_while_the_loop_runs(digits: Any, fault: str, finding: str) -> None:
    said: list[str] = []
    _, watch = byol(digits, fault=fault, say=said.append, epochs=1)
    assert watch
    assert watch.lost
    assert sum(f"[{finding}]" in line for line in said) == 1, said
    assert found(watch) == {finding}
    assert "not trustworthy" in watch.verdict()


@pytest.mark.parametrize("order", ["", "early", "between", "late"])
def test_the_target_may_be_updated_anywhere_in_the_step(digits: Any, order: str, tmp_path: Path) -> None:
    """After the optimizer's step as in the papers, at the head of the step as in lightly's examples, before the
    optimizer's step, and after `watch.step`."""
    said: list[str] = []
    _, watch = byol(digits, fault=order, tau=lambda step: 0.95, directory=tmp_path / "run", say=said.append, epochs=2)
    assert watch
    assert not watch.lost
    assert not found(watch)
    assert "error" not in "".join(said)
    seen = [r for r in read_metrics(tmp_path / "run") if "loss" in r]
    for record in seen[1:]:
        assert record["target_step"] > 0
        assert record["tau_measured"] == pytest.approx(0.95, abs=1e-3)
    first = seen[0]["target_step"], seen[0]["tau_measured"]
    assert first == (None, None) if order else first[1] == pytest.approx(0.95, abs=1e-3)
    assert watch.facts.unmoved == ()


def test_an_epoch_that_ends_before_a_record_compares_nothing(tmp_path: Path) -> None:
    """The figures of the target belong to one update, which is looked at from the step before it."""
    online, target, optimizer = pair()
    watch = sslkit.watch(online, target, optimizer=optimizer, every=3, directory=tmp_path / "run", **SILENT)
    for step in range(1, 7):
        one_step(online, target, optimizer)
        watch.step(tau=0.9)
        if step in (2, 4):
            watch.epoch_ended()
    watch.close()
    seen = {r["step"]: r.get("tau_measured") for r in read_metrics(tmp_path / "run") if "tau" in r}
    assert seen.keys() == {1, 2, 3, 4, 6}
    assert (seen[2], seen[4]) == (None, None)
    assert [seen[1], seen[3], seen[6]] == pytest.approx([0.9] * 3, abs=1e-3)


@pytest.mark.parametrize("fault", ["never", "early never"])
def test_a_target_that_is_never_updated_is_found(digits: Any, fault: str) -> None:
    _, watch = byol(digits, fault=fault, tau=lambda step: 0.95)
    assert found(watch) == {"target_frozen"}


def test_a_tau_above_one_is_found_when_it_comes_or_before(digits: Any) -> None:
    def wrong(step: int) -> float:
        return 1 - 0.1 * math.cos(math.pi * (step // STEPS) / EPOCHS) / 2

    said: list[str] = []
    _, watch = byol(digits, tau=wrong, say=said.append)
    assert found(watch) == {"tau_above_one"}
    assert any(line.startswith("error at step 80: ") and "[tau_above_one]" in line for line in said)

    total = EPOCHS * STEPS
    early = sslkit.watch(Network(), Network(), epochs=EPOCHS, steps_per_epoch=STEPS, tau=wrong, say=said.append)
    assert early.lost
    assert early.facts.tau
    assert early.facts.tau.above_one == (3 * STEPS, wrong(3 * STEPS))
    assert early.facts.tau.steps == total
    early.close()


def test_a_rate_of_nothing_is_found(digits: Any) -> None:
    assert "rate_zero" in found(byol(digits, lr=0.0, epochs=1)[1])


def test_networks_without_normalisation_are_warned_of(digits: Any) -> None:
    _, watch = byol(digits, norm=lambda width: nn.Identity(), epochs=1)
    assert "no_normalisation" in found(watch, "warning") | found(watch, "error"), "as grave as what follows from it"


def test_a_target_that_moves_twice_in_a_step_shows_in_tau(digits: Any, tmp_path: Path) -> None:
    _, watch = byol(digits, fault="twice", directory=tmp_path / "run", epochs=2)
    assert watch
    assert found(watch) == {"tau_not_applied"}
    assert "made twice in each step" in watch.verdict()
    for record in read_metrics(tmp_path / "run"):
        if "tau" in record:
            assert record["tau_measured"] == pytest.approx(record["tau"] ** 2, abs=1e-5)


def test_a_loss_that_is_not_a_number_is_recorded_at_once(digits: Any, tmp_path: Path) -> None:
    _, watch = byol(digits, fault="nan", directory=tmp_path / "run", epochs=2)
    assert watch
    record = next(r for r in read_metrics(tmp_path / "run") if r["step"] == 48)
    assert record["loss"] is None
    assert "not_finite" in found(watch)
    status = read_json(tmp_path / "run" / "status.json")
    assert (status["reason"], status["step"]) == ("not_finite", 48)


def test_no_labels_given_is_an_error_of_measurement(digits: Any) -> None:
    _, watch = byol(digits, labelled=None, epochs=1)
    assert "no_quality_metric" in found(watch) | found(watch, "warning")


def test_what_is_accepted_is_not_told(digits: Any) -> None:
    said: list[str] = []
    _, watch = byol(digits, fault="views", accept=["identical_views"], epochs=1, say=said.append)
    assert watch
    assert not watch.lost
    assert not any(line.startswith("error") for line in said)


def pairs_agree(views: list[Tensor], *, together: bool = False, backwards: str = "once", target: bool = False) -> Any:
    """What is made of the first batch's views, that go through the network in this order."""
    online, slow, optimizer = pair()
    watch = sslkit.watch(online, slow if target else None, optimizer=optimizer, together=together, **SILENT)
    for view in views:
        if target:
            with torch.no_grad():
                slow.project(view.roll(5, 0))
        loss = online(view).square().mean()
        if backwards == "each":
            optimizer.zero_grad()
            loss.backward()
    if backwards == "once":
        loss.backward()
    optimizer.step()
    watch.step(loss=1.0)
    watch.close()
    return watch.facts.pairs_agree


@pytest.mark.parametrize("seed", range(3))
def test_views_of_one_image_agree_and_those_of_two_do_not(digits: Any, seed: int) -> None:
    torch.manual_seed(seed)
    batch = digits[0][torch.randperm(1500)[:128]]
    flipped = torch.where(torch.rand(128, 1, 1, 1) < 0.5, batch, batch.flip(3))
    one, two = augmented(batch), 2 * augmented(flipped) + 1
    assert pairs_agree([one, two]) > 6
    assert pairs_agree([one, two.roll(1, 0)]) < 2.5
    assert pairs_agree([one, two[torch.randperm(128)]]) < 2.5
    assert pairs_agree([torch.cat([one, two])], together=True) > 6
    assert pairs_agree([torch.stack([one, two], 1).flatten(0, 1)], together=True) > 4, "one image after the other"
    assert pairs_agree([torch.cat([one, two.roll(1, 0)])], together=True) < 2.5
    batch = digits[0][:131]
    assert pairs_agree([torch.cat([augmented(batch), augmented(batch)])], together=True) > 6, "an odd number"


def test_of_passes_that_may_not_belong_together_nothing_is_said(digits: Any) -> None:
    one, two = augmented(digits[0][:128]), augmented(digits[0][128:256])
    assert pairs_agree([one, two]) < 2.5
    assert pairs_agree([one, two], backwards="each") is None, "micro-batches of one view each"
    assert pairs_agree([one, one, two]) is None, "other images went through as well"
    assert pairs_agree([one, two], target=True) is None, "the target's images are in another order, as MoCo's are"
    assert pairs_agree([one[:63], two[:63]]) is None, "too few"
    assert pairs_agree([torch.zeros(128, 1, 8, 8)] * 2) is None, "blank"
    assert pairs_agree([one * math.nan, two]) is None
    assert pairs_agree([one[:64], two]) is None
    assert pairs_agree([torch.cat([one[:96], two[:96]])], together=True) is None, "their order is not known"


# ---------------------------------------------------------------- however the loop is written


def pair() -> tuple[Network, Network, torch.optim.Optimizer]:
    torch.manual_seed(0)
    online = Network()
    return online, copy.deepcopy(online).requires_grad_(False), torch.optim.SGD(online.parameters(), 0.01)


def one_step(online: nn.Module, target: nn.Module | None, optimizer: torch.optim.Optimizer, micro: int = 1) -> Tensor:
    optimizer.zero_grad()
    loss = torch.zeros(())
    for _ in range(micro):
        one, two = torch.randn(2, 16, 1, 8, 8)
        with torch.no_grad():
            targets = [(target or online).project(view) for view in (two, one)]  # type: ignore[operator]
        loss = sum(cosine_loss(online(v), t) for v, t in zip((one, two), targets, strict=True)) / micro  # type: ignore[assignment]
        loss.backward()
    optimizer.step()
    if target is not None:
        with torch.no_grad():
            for p, t in zip(online.parameters(), target.parameters(), strict=True):
                t.lerp_(p, 0.1)
    return loss


def test_micro_batches_count_as_one_step() -> None:
    online, target, optimizer = pair()
    watch = sslkit.watch(online, target, optimizer=optimizer, **SILENT)
    for step in range(1, 4):
        one_step(online, target, optimizer, micro=4)
        watch.step(loss=1.0)
        assert watch.steps == step
        watch.step(loss=1.0)  # as a loop does that calls it after every micro-batch
        assert watch.steps == step
    watch.close()
    assert watch.facts.batch_size == 4 * 16
    assert watch.facts.batch_norm_images == 16


def test_steps_between_two_calls_are_counted(tmp_path: Path) -> None:
    online, target, optimizer = pair()
    watch = sslkit.watch(online, target, optimizer=optimizer, every=10, directory=tmp_path / "run", **SILENT)
    for _ in range(5):
        for _ in range(4):
            one_step(online, target, optimizer)
        watch.step(loss=1.0)
    assert watch.steps == 20
    watch.close()
    assert [r["step"] for r in read_metrics(tmp_path / "run") if "loss" in r] == [4, 12, 20]


def test_without_an_optimizer_every_call_is_a_step(tmp_path: Path) -> None:
    online, target, optimizer = pair()
    watch = sslkit.watch(online, target, every=3, directory=tmp_path / "run", **SILENT)
    for _ in range(7):
        one_step(online, target, optimizer)
        watch.step(tau=0.9)
    watch.close()
    measured = [r["tau_measured"] for r in read_metrics(tmp_path / "run") if "tau_measured" in r]
    assert measured == pytest.approx([0.9, 0.9], abs=1e-4)
    assert watch.facts.unoptimised is None


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("cleared", ["first", "to zero", "late"])
def test_steps_that_a_scaler_skips_are_no_micro_batches(cleared: str, told: bool, micro: int) -> None:
    online, target, optimizer = pair()
    watch = sslkit.watch(online, target, optimizer=optimizer, **SILENT)
    scaler = torch.amp.GradScaler("cpu", init_scale=2e38, backoff_factor=0.5)
    weight = next(online.parameters())
    before = weight.clone()
    steps = 0
    while torch.equal(before, weight):
        for number in range(micro):
            if not number and cleared != "late":
                optimizer.zero_grad(set_to_none=cleared == "first")
            one, two = torch.randn(2, 16, 1, 8, 8)
            with torch.no_grad():
                t1, t2 = target.project(one), target.project(two)
            loss = 1e3 * (cosine_loss(online(one), t2) + cosine_loss(online(two), t1))
            if not number and cleared == "late":
                optimizer.zero_grad()
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        steps += 1
        if told:
            watch.step(loss=loss)
    watch.step(loss=loss)
    watch.close()
    assert steps > 2, "some were skipped"
    assert (watch.steps, watch.facts.batch_size) == (1, 16 * micro)


def test_the_batch_is_that_of_the_first_step_however_often_it_is_asked_for() -> None:
    online, target, optimizer = pair()
    watch = sslkit.watch(online, target, optimizer=optimizer, **SILENT)
    for _ in range(3):
        one_step(online, target, optimizer, micro=2)
    watch.step(loss=1.0)
    watch.close()
    assert (watch.steps, watch.facts.batch_size) == (3, 32)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_several_processes_speaks(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits: Any
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    online, target, optimizer = pair()
    said: list[str] = []
    watch = sslkit.watch(
        online, target, optimizer=optimizer, labelled=labelled(digits), k=20, directory=tmp_path / "run", every=1,
        say=said.append,
    )  # fmt: skip
    assert any(m._forward_hooks for m in online.modules()) == (rank == 0)
    for _ in range(3):
        one_step(online, target, optimizer)
        watch.step(loss=math.nan)
    watch.epoch_ended()
    assert (watch.verdict() == "") == (rank == 1)
    watch.close()
    assert (tmp_path / "run").exists() == (rank == 0)
    assert bool(said) == (rank == 0)
    assert watch.lost == (rank == 0)
    assert watch.steps == 3


def test_several_optimizers_share_the_parameters() -> None:
    online, target, _ = pair()
    heads = [*online.projection.parameters(), *online.prediction.parameters()]
    both = [torch.optim.SGD(online.encoder.parameters(), 0.1), torch.optim.SGD(heads, 0.2)]
    watch = sslkit.watch(online, target, optimizer=both, **SILENT)
    one_step(online, target, both[0])
    both[1].step()
    watch.step(loss=1.0)
    watch.close()
    assert watch.steps == 1
    assert watch.facts.unoptimised == ()
    assert watch.facts.lr
    assert {part: lr.end for part, lr in watch.facts.lr.items()} == {
        "backbone": 0.1,
        "projector": 0.2,
        "predictor": 0.2,
    }


def test_a_closure_makes_the_gradients_that_are_recorded(tmp_path: Path) -> None:
    online, target, optimizer = pair()
    watch = sslkit.watch(online, target, optimizer=optimizer, directory=tmp_path / "run", **SILENT)

    def closure() -> float:
        optimizer.zero_grad()
        loss = cosine_loss(online(torch.randn(16, 1, 8, 8)), torch.randn(16, 16))
        loss.backward()
        return loss.item()

    loss = optimizer.step(closure)
    watch.step(loss=loss)
    expected = float(torch.nn.utils.get_total_norm([p.grad for p in online.parameters() if p.grad is not None]))
    watch.close()
    assert records(watch, "grad_norm") == pytest.approx([expected], rel=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's, at a graph break
def test_compiled_networks_are_looked_into(tmp_path: Path) -> None:
    online, target, optimizer = pair()
    compiled, slow = torch.compile(online, backend="eager"), torch.compile(target, backend="eager")
    watch = sslkit.watch(compiled, slow, optimizer=optimizer, directory=tmp_path / "run", every=1, **SILENT)
    plain, other, its = pair()
    twin = sslkit.watch(plain, other, optimizer=its, directory=tmp_path / "twin", every=1, **SILENT)
    for one, two, three, watched in ((compiled, slow, optimizer, watch), (plain, other, its, twin)):
        torch.manual_seed(1)
        for _ in range(2):
            a, b = torch.randn(2, 16, 1, 8, 8)
            with torch.no_grad():
                t1 = unwrap(two).project(b)
            loss = cosine_loss(one(a), t1)
            three.zero_grad()
            loss.backward()
            three.step()
            watched.step(loss=loss)
        watched.close()
    for mine, theirs in zip(read_metrics(tmp_path / "run"), read_metrics(tmp_path / "twin"), strict=True):
        assert mine.keys() == theirs.keys()
        assert mine["uniformity"] == pytest.approx(theirs["uniformity"], rel=1e-4)


def unwrap(module: Any) -> Any:
    return getattr(module, "_orig_mod", module)


def test_distributed_networks_are_looked_into(tmp_path: Path) -> None:
    online, target, optimizer = pair()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(online)
        watch = sslkit.watch(parallel, target, optimizer=optimizer, **SILENT)
        cosine_loss(parallel(torch.randn(16, 1, 8, 8)), torch.randn(16, 16)).backward()
        optimizer.step()
        watch.step(loss=1.0)
        watch.close()
        assert watch.facts.batch_size == 8 * 2  # one view was passed, of 16 images
    finally:
        torch.distributed.destroy_process_group()


def test_views_in_one_pass_are_taken_apart() -> None:
    online, target, optimizer = pair()
    watch = sslkit.watch(online, target, optimizer=optimizer, together=True, **SILENT)
    view = torch.randn(16, 1, 8, 8)
    with torch.no_grad():
        target.project(torch.cat([view, view]))
    online(torch.cat([view, view])).sum().backward()
    optimizer.step()
    watch.step(loss=1.0)
    watch.close()
    assert watch.facts.view_difference == (0, 0)
    assert (watch.facts.batch_size, watch.facts.batch_norm_images) == (16, 32)


def test_an_evaluation_in_between_is_not_taken_for_training() -> None:
    online, target, optimizer = pair()
    watch = sslkit.watch(online, target, optimizer=optimizer, **SILENT)
    with torch.no_grad():
        online(torch.zeros(3, 1, 8, 8))
    one_step(online, target, optimizer)
    watch.step(loss=1.0)
    watch.close()
    assert watch.facts.batch_size == 16


# ---------------------------------------------------------------- parts and views


def test_parts_are_guessed_from_names_and_said() -> None:
    online, target, _ = pair()
    networks = find(online, target, {})
    assert networks.online == {
        "backbone": online.encoder, "projector": online.projection, "predictor": online.prediction
    }  # fmt: skip
    assert networks.target == {"backbone": target.encoder, "projector": target.projection}
    assert networks.said == [
        "guessed from the online network's names: backbone is 'encoder', projector is 'projection', predictor is "
        "'prediction'"
    ]


def test_parts_inside_a_backbones_wrapper_are_found() -> None:
    learner = nn.Module()
    learner.online_encoder = nn.Module()
    learner.online_encoder.net, learner.online_encoder.projector = nn.Linear(4, 4), nn.Linear(4, 4)
    learner.online_predictor = nn.Linear(4, 4)
    learner.target_encoder = copy.deepcopy(learner.online_encoder)
    networks = find(learner, learner.target_encoder, {"backbone": None, "projector": None, "predictor": None})
    assert networks.online["backbone"] is learner.online_encoder.net
    assert networks.online["predictor"] is learner.online_predictor
    assert networks.target["projector"] is learner.target_encoder.projector


def test_a_network_without_usual_names_is_watched_as_a_whole() -> None:
    whole = nn.Sequential(nn.Flatten(), nn.Linear(64, 8))
    said: list[str] = []
    watch = sslkit.watch(whole, say=said.append)
    whole(torch.randn(16, 1, 8, 8)).sum().backward()
    whole(torch.randn(16, 1, 8, 8)).sum().backward()
    watch.step(loss=1.0)
    watch.close()
    assert "name the parts with backbone=" in said[0]
    assert watch.facts.batch_size == 16
    assert watch.facts.view_difference is not None


def test_parts_may_be_given_one_by_one() -> None:
    online, target, optimizer = pair()
    parts = {"predictor": online.prediction, "backbone": online.encoder, "projector": online.projection}
    copies = {"backbone": target.encoder, "projector": target.projection}
    watch = sslkit.watch(parts, copies, optimizer=optimizer, **SILENT)
    loss = one_step(online, target, optimizer)
    watch.step(loss=loss, tau=0.9)
    watch.close()
    assert watch.facts.byol_scale == 1
    by_module = find(online, target, {"backbone": online.encoder, "projector": "projection", "predictor": None})
    assert by_module.online == find(parts, copies, {}).online


def test_a_view_that_only_the_target_sees_is_a_view() -> None:
    """MoCo's loop: the query goes through one network, the key through the other."""
    online, target, optimizer = pair()
    watch = sslkit.watch(online, target, optimizer=optimizer, **SILENT)
    query, key = torch.randn(2, 16, 1, 8, 8)
    with torch.no_grad():
        target.project(key)
    online.project(query).sum().backward()
    optimizer.step()
    watch.step(loss=1.0)
    assert watch.facts.view_difference == (float((query - key).abs().mean()), float((query - key).abs().max()))
    branches = watch._branches
    assert branches
    assert branches.targets[0] is None
    assert branches.projections[1] is None
    watch.close()


def test_targets_are_put_to_the_views_that_they_are_of() -> None:
    online, target, optimizer = pair()
    watch = sslkit.watch(online, target, optimizer=optimizer, **SILENT)
    one, two = torch.randn(2, 16, 1, 8, 8)
    with torch.no_grad():
        of_two, of_one = target.project(two.clone()), target.project(one)  # the other way round, and one of them copied
    online(one), online(two)
    optimizer.step()
    watch.step(loss=1.0)
    assert watch._branches
    assert torch.equal(watch._branches.targets[0], of_one)  # type: ignore[arg-type]
    assert torch.equal(watch._branches.targets[1], of_two)  # type: ignore[arg-type]
    watch.close()


@pytest.mark.parametrize(
    ("form", "scale"),
    [(lambda c: 4 - 2 * c, 1.0), (lambda c: 2 - c, 0.5), (lambda c: 1 - c / 2, 0.25), (lambda c: -c / 2, 0.25)],
)
def test_the_form_of_the_loss_is_recognised(form: Callable[[float], float], scale: float) -> None:
    online, target, optimizer = pair()
    watch = sslkit.watch(online, target, optimizer=optimizer, **SILENT)
    one, two = torch.randn(2, 16, 1, 8, 8)
    with torch.no_grad():
        t1, t2 = target.project(one), target.project(two)
    cosines = F.cosine_similarity(online(one), t2).mean() + F.cosine_similarity(online(two), t1).mean()
    optimizer.step()
    watch.step(loss=form(cosines.item()))
    watch.close()
    assert watch.facts.byol_scale == scale


@pytest.mark.parametrize("over", ["dimensions", "pairs", "nothing"])
def test_a_squared_error_without_normalisation_is_recognised(over: str) -> None:
    online, target, optimizer = pair()
    watch = sslkit.watch(online, target, optimizer=optimizer, **SILENT)
    one, two = torch.randn(2, 16, 1, 8, 8)
    with torch.no_grad():
        t1, t2 = target.project(one), target.project(two)
    p1, p2 = online(one), online(two)
    reduce = {"reduction": "mean"} if over == "dimensions" else {"reduction": "sum"}
    loss = F.mse_loss(p1, t2, **reduce) + F.mse_loss(p2, t1, **reduce)  # type: ignore[arg-type]
    optimizer.step()
    watch.step(loss=loss.item() / {"dimensions": 1, "pairs": 32, "nothing": 16}[over])
    watch.close()
    assert (watch.facts.scale_sensitive, watch.facts.prevents_collapse, watch.facts.byol_scale) == (True, False, None)


def test_a_loss_of_another_form_is_not_taken_for_byols() -> None:
    online, target, optimizer = pair()
    watch = sslkit.watch(online, target, optimizer=optimizer, **SILENT)
    watch.step(loss=one_step(online, target, optimizer) * 1.1)
    watch.close()
    assert watch.facts.prevents_collapse is None


# ---------------------------------------------------------------- files, ends, mistakes


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    online, target, optimizer = pair()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0}\n', encoding="utf-8")
    said: list[str] = []
    watch = sslkit.watch(online, target, optimizer=optimizer, directory=tmp_path / "run", say=said.append)
    watch.close()
    assert watch.directory == tmp_path / "run-2"
    assert "holds a run already" in said[0]
    assert (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8") == '{"step": 0}\n'


@pytest.mark.parametrize(
    ("error", "status"), [(None, "stopped"), (ValueError, "failed"), (KeyboardInterrupt, "interrupted")]
)
def test_the_end_of_the_loop_is_written_down(tmp_path: Path, error: type[BaseException] | None, status: str) -> None:
    online, target, optimizer = pair()
    said: list[str] = []

    def loop() -> Iterator[None]:
        with sslkit.watch(
            online,
            target,
            optimizer=optimizer,
            epochs=2,
            steps_per_epoch=5,
            directory=tmp_path / "run",
            say=said.append,
        ) as watch:
            for _ in range(3):
                one_step(online, target, optimizer)
                watch.step(loss=1.0)
            if error:
                raise error
        yield

    if error:
        with pytest.raises(error):
            next(loop())
    else:
        next(loop())
    told = read_json(tmp_path / "run" / "status.json")
    assert (told["status"], told["step"], told["of"]) == (status, 3, 10)
    assert read_metrics(tmp_path / "run")[-1]["step"] == 3
    assert "VERDICT" in said[-2]
    assert said[-1] == f"all of it: sslkit doctor {tmp_path / 'run'}"
    assert not any(m._forward_hooks for m in online.modules())


def test_the_verdict_is_told_once() -> None:
    for again in (False, True):
        online, target, optimizer = pair()
        said: list[str] = []
        watch = sslkit.watch(online, target, optimizer=optimizer, say=said.append)
        watch.step(loss=one_step(online, target, optimizer))
        watch.epoch_ended()
        assert "VERDICT" in watch.verdict()
        if again:
            watch.step(loss=one_step(online, target, optimizer))
        watch.close()
        assert sum("VERDICT" in line for line in said) == again
        assert "VERDICT" in watch.verdict()


@pytest.mark.parametrize("given", [True, False])
def test_a_loop_that_breaks_before_its_first_step_is_not_healthy(given: bool, digits: Any, tmp_path: Path) -> None:
    online, target, optimizer = pair()
    said: list[str] = []
    seen = labelled(digits) if given else None
    with (
        pytest.raises(ValueError, match="no data"),
        sslkit.watch(
            online, target, optimizer=optimizer, labelled=seen, k=20, directory=tmp_path / "run", say=said.append
        ),
    ):
        raise ValueError("no data")
    assert said[-2].endswith("VERDICT  cannot be judged: no step was seen")
    assert doctor.examine_run(tmp_path / "run").verdict == "cannot be judged: no step was seen"


def test_mistakes_are_said_in_one_line(digits: Any) -> None:
    online, target, _ = pair()
    good = labelled(digits)
    for options, text in (
        ({"backbone": "encodr"}, "backbone: the online network has no module 'encodr'; did you mean 'encoder'?"),
        ({"predictor": nn.Linear(1, 1)}, "predictor: is no module inside the online network"),
        ({"labelled": good[:3]}, "four tensors"),
        ({"labelled": (*good[:2], good[2], good[3][:5])}, "test images [N, C, H, W] and labels [N] are wanted"),
        ({"labelled": (good[0].byte(), *good[1:])}, "training images are torch.uint8; give transform="),
    ):
        with pytest.raises(UserError) as caught:
            sslkit.watch(online, target, **{**SILENT, **options})
        assert text in str(caught.value)
        assert len(caught.value.lines) == 1
    with pytest.raises(UserError, match="online should be a module"):
        sslkit.watch("online", **SILENT)  # type: ignore[arg-type]


def test_images_of_integers_are_transformed(digits: Any) -> None:
    online, target, _ = pair()
    clean = labelled(((digits[0] * 8).round() / 8, digits[1]))
    raw = tuple((part * 8).to(torch.int8) if part.ndim == 4 else part for part in clean)
    one = sslkit.watch(online, target, labelled=clean, k=20, **SILENT)
    two = sslkit.watch(online, target, labelled=raw, transform=lambda x: x.float() / 8, k=20, **SILENT)  # type: ignore[arg-type]
    assert one._journal.last("knn_top1") == two._journal.last("knn_top1")
    for watch in (one, two):
        watch.close()


def test_the_floor_is_measured_on_the_features_that_the_projector_takes(digits: Any) -> None:
    online, target, _ = pair()
    bank, labels, queries, truth = labelled(digits)
    watch = sslkit.watch(online, target, labelled=(bank, labels, queries, truth), k=20, **SILENT)
    watch.close()
    with torch.no_grad(), in_eval_mode(online):
        known, asked = online.encoder(bank).flatten(1), online.encoder(queries).flatten(1)
    assert known.shape[1] == 512
    assert watch._journal.last("knn_top1") == knn_accuracy(known, labels, asked, truth, k=20)


def test_a_network_that_is_never_called_is_told_of() -> None:
    online, target, _ = pair()
    said: list[str] = []
    watch = sslkit.watch(online, target, every=2, say=said.append)
    for _ in range(6):
        watch.step(loss=1.0)
    watch.close()
    assert sum("no batch went through" in line for line in said) == 1


def test_the_name_brings_no_torch_until_it_is_used() -> None:
    code = "import sys, sslkit\nassert 'torch' not in sys.modules\nassert callable(sslkit.watch)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'wach'"):
        sslkit.wach  # noqa: B018


def test_metrics_of_ones_own_are_recorded(tmp_path: Path) -> None:
    online, target, optimizer = pair()
    watch = sslkit.watch(online, target, optimizer=optimizer, directory=tmp_path / "run", **SILENT)
    watch.step(loss=one_step(online, target, optimizer), mine=torch.tensor([1.0, 3.0]), lr=0.5)
    watch.close()
    (record,) = (r for r in read_metrics(tmp_path / "run") if "loss" in r)
    assert record["mine"] == 2
    assert record["lr"] == 0.5
    assert json.loads((tmp_path / "run" / "facts.json").read_text())["batch_size"] == 16


# ---------------------------------------------------------------- Lightning, by the callback that the page shows


PAGE = ROOT / "docs" / "how-to" / "watch-your-own-loop.md"


def shown(file: str, name: str) -> Any:
    """What a file of the page defines."""
    (text,) = re.findall(rf"<!-- file: {file} -->\n```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(text, str(PAGE), "exec"), names)
    return names[name]


def callback() -> Any:
    return shown("watching_callback.py", "Watching")


def test_every_process_is_told_that_a_run_is_lost(tmp_path: Path) -> None:
    tell = shown("lost_everywhere.py", "lost_everywhere")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        for lost in (True, False):
            assert tell(SimpleNamespace(lost=lost), "cpu") is lost
    finally:
        torch.distributed.destroy_process_group()


def test_the_callback_follows_lightnings_calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_lightning", SimpleNamespace(Callback=object))  # type: ignore[arg-type]
    online, target, optimizer = pair()
    online.backbone_momentum, online.projection_head_momentum = target.encoder, target.projection
    alone = SimpleNamespace(reduce_boolean_decision=lambda decision, all: decision)
    trainer = SimpleNamespace(
        estimated_stepping_batches=6, max_epochs=2, optimizers=[optimizer], should_stop=False, strategy=alone
    )  # fmt: skip
    watching = callback()(directory=tmp_path / "run", say=lambda text: None)
    watching.on_train_start(trainer, online)
    for epoch in range(2):
        for batch in range(3):
            view = torch.randn(16, 1, 8, 8)
            with torch.no_grad():
                targets = target.project(view)
            loss = 2 * cosine_loss(online(view), targets)
            online(view.clone())
            optimizer.step(lambda loss=loss: loss.backward())
            watching.on_train_batch_end(trainer, online, {"loss": loss.detach()}, None, batch)
        watching.on_train_epoch_end(trainer, online)
        assert trainer.should_stop, epoch  # the views are identical
    watching.on_train_end(trainer, online)
    told = read_json(tmp_path / "run" / "status.json")
    assert (told["status"], told["step"], told["of"]) == ("done", 6, 6)


@pytest.mark.filterwarnings("ignore")  # Lightning's own
def test_the_callback_watches_a_lightning_module(tmp_path: Path) -> None:
    pl = pytest.importorskip("pytorch_lightning")

    class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            made = Network()
            self.backbone, self.projection_head, self.prediction_head = made.encoder, made.projection, made.prediction
            self.backbone_momentum = copy.deepcopy(self.backbone).requires_grad_(False)
            self.projection_head_momentum = copy.deepcopy(self.projection_head).requires_grad_(False)

        def training_step(self, batch: Any, number: int) -> Tensor:
            for a, b in (
                (self.backbone, self.backbone_momentum),
                (self.projection_head, self.projection_head_momentum),
            ):
                for p, t in zip(a.parameters(), b.parameters(), strict=True):
                    t.data.lerp_(p.data, 0.1)
            one, two = (augmented(batch[0]) for _ in range(2))
            p1, p2 = (self.prediction_head(self.projection_head(self.backbone(v).flatten(1))) for v in (one, two))
            t1, t2 = (self.projection_head_momentum(self.backbone_momentum(v).flatten(1)) for v in (one, two))
            return cosine_loss(p1, t2) + cosine_loss(p2, t1)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.05)

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(128, 1, 8, 8)), batch_size=32)
    trainer = pl.Trainer(
        max_epochs=2, callbacks=[callback()(directory=tmp_path / "run", say=lambda text: None, every=1)], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(Module(), loader)
    facts = doctor.read_course(tmp_path / "run").facts
    assert (facts.total_steps, facts.batch_size, facts.byol_scale, facts.target) == (8, 32, 1.0, "copy")
    assert facts.unoptimised == ()
    measured = [r["tau_measured"] for r in read_metrics(tmp_path / "run") if r.get("tau_measured") is not None]
    # Its first update comes before the optimizer's first step, when both networks are the same.
    assert measured == pytest.approx([0.9] * 7, abs=1e-3)


def test_the_threads_script_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's script, which is the forum's with other data, on fewer images."""
    monkeypatch.chdir(tmp_path)
    script = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)[1]
    for line, other in (("images[:64]", "images[:16]"), ('"batch_size": 32', '"batch_size": 8')):
        assert line in script
        script = script.replace(line, other)
    exec(compile(script, str(PAGE), "exec"), {"__name__": "page"})
    examined = doctor.examine_run(tmp_path / "runs" / "thread")
    assert {f.id for f in examined.findings if f.severity == "error"} == {"identical_views", "tau_above_one"}
    assert {"no_quality_metric", "stem_too_coarse"} <= {f.id for f in examined.findings if f.severity == "warning"}
    assert examined.exit_code == 2


def test_labelled_images_want_a_backbone_to_be_known() -> None:
    online = nn.ModuleDict({"x": nn.Linear(2, 2), "proj": nn.Linear(2, 2), "pred": nn.Linear(2, 2)})
    images, labels = torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(UserError, match="no part of the network is called like one"):
        sslkit.watch(online, labelled=(images, labels, images, labels))
