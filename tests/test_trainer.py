"""The step against a plain PyTorch loop, and a run against the same run interrupted."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from torch import nn

from sslkit import checkpoint, randomness
from sslkit.build import Parts, build
from sslkit.errors import RunFailed
from sslkit.events import observes
from sslkit.recipe import parse_recipe
from sslkit.run_directory import RunDirectory, read_metrics
from sslkit.trainer import Trainer

CPU = torch.device("cpu")


def parts_of(*overrides: str) -> Parts:
    return build(parse_recipe(TINY, "r.toml", overrides), CPU, lambda text: None)


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Callable[..., Trainer]]:
    opened: list[RunDirectory] = []

    def make(*overrides: str, folder: str = "run", resume: bool = False, **options: Any) -> Trainer:
        files = RunDirectory(tmp_path / folder)
        opened.append(files)
        t = Trainer(parts_of(*overrides), files, say=lambda text: None, **options)
        found, problems = checkpoint.newest(files.checkpoints) if resume else (None, [])
        assert problems == []
        files.open_metrics(found.facts["metrics_offset"] if found else 0)
        if found:
            t.restore(found)
        return t

    yield make
    for files in opened:
        files.close()


def steps(trainer: Trainer, n: int) -> list[float]:
    losses = []
    for draw in trainer.feed.steps(trainer.step, trainer.step + n):
        trainer.train_step(draw)
        losses.append(float(trainer.terms.total))
    return losses


def weights(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


# ---------------------------------------------------------------- against a plain loop


def plain_byol(t: Trainer, n: int) -> tuple[list[float], nn.Module, nn.Module]:
    """BYOL as its paper's appendix J writes it, with torch.optim.SGD and none of our engine, loss or updater."""
    online, predictor = copy.deepcopy(t.model.online), copy.deepcopy(t.model.predictor)
    assert predictor is not None
    target = copy.deepcopy(online)
    trained = [*online.parameters(), *predictor.parameters()]
    decayed = [p for p in trained if p.ndim > 1]
    bare = [p for p in trained if p.ndim <= 1]
    sgd = torch.optim.SGD(
        [{"params": decayed, "weight_decay": 1e-4}, {"params": bare, "weight_decay": 0.0}], lr=0.1, momentum=0.9
    )
    losses = []
    for k in range(n):
        draw = t.feed.draw(k)
        one, two = t.views.appear(t.views.crop(draw.batch.images, draw.parameters), draw.parameters)
        for group in sgd.param_groups:
            group["lr"] = t.parts.values[0].lr(k)
        predictions = [predictor(online(view)[1]) for view in (one, two)]
        with torch.no_grad():
            targets = [target(view)[1] for view in (one, two)]
        loss = (2 - 2 * F.cosine_similarity(predictions[0], targets[1])).mean()
        loss = loss + (2 - 2 * F.cosine_similarity(predictions[1], targets[0])).mean()
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        tau = 1 - (1 - 0.9) * (torch.cos(torch.tensor(torch.pi * k / t.info.total_steps)).item() + 1) / 2
        with torch.no_grad():
            for a, b in zip(target.parameters(), online.parameters(), strict=True):
                a.mul_(tau).add_(b, alpha=1 - tau)
        losses.append(loss.item())
    return losses, online, target


def test_the_step_is_byols(trainer: Callable[..., Trainer]) -> None:
    t = trainer()
    losses, online, target = plain_byol(t, 6)
    assert steps(t, 6) == pytest.approx(losses, rel=1e-5)
    assert torch.allclose(weights(t.model.online), weights(online), atol=1e-4)
    assert t.model.target is not None
    assert torch.allclose(weights(t.model.target), weights(target), atol=1e-4)
    # As in the authors' code, the target has BatchNorm statistics of its own.
    buffers, own = dict(t.model.target.named_buffers()), dict(target.named_buffers())
    assert all(torch.allclose(buffers[name].float(), own[name].float(), atol=1e-4) for name in own)


def test_simsiam_is_the_same_loop_with_other_parts(trainer: Callable[..., Trainer]) -> None:
    t = trainer("target_updater.use=stop_gradient", "loss.form=simsiam")
    online, predictor = copy.deepcopy(t.model.online), copy.deepcopy(t.model.predictor)
    assert predictor is not None
    assert t.model.target is None
    draw = t.feed.draw(0)
    views = t.views.appear(t.views.crop(draw.batch.images, draw.parameters), draw.parameters)
    z = [online(view)[1] for view in views]
    p = [predictor(one) for one in z]
    expected = -(F.cosine_similarity(p[0], z[1].detach()).mean() + F.cosine_similarity(p[1], z[0].detach()).mean()) / 2
    assert steps(t, 1) == pytest.approx([expected.item()], rel=1e-5)
    counts = [m.num_batches_tracked.item() for m in t.model.online.modules() if isinstance(m, nn.BatchNorm2d)]
    assert counts == [2, 2], "one forward per view: a second one would move BatchNorm twice"


def test_accumulated_micro_batches_are_the_batch(trainer: Callable[..., Trainer]) -> None:
    group_norm = ("backbone.norm=group", "projector.layers=1", "predictor.layers=1")
    whole, parts = trainer(*group_norm, folder="a"), trainer(*group_norm, "train.accumulate=4", folder="b")
    assert steps(whole, 4) == pytest.approx(steps(parts, 4), rel=1e-5)
    assert torch.allclose(weights(whole.model), weights(parts.model), atol=1e-6)


def test_views_together_give_the_same_without_batch_statistics(trainer: Callable[..., Trainer]) -> None:
    group_norm = ("backbone.norm=group", "projector.layers=1", "predictor.layers=1")
    one, all_ = trainer(*group_norm, folder="a"), trainer(*group_norm, "train.forward=together", folder="b")
    assert steps(one, 3) == pytest.approx(steps(all_, 3), rel=1e-5)
    batch_norm = trainer("train.forward=together", folder="c")
    assert steps(batch_norm, 2) != pytest.approx(steps(trainer(folder="d"), 2), rel=1e-6), "other statistics"


def test_views_come_with_the_branches_when_the_step_has_ended(trainer: Callable[..., Trainer]) -> None:
    t = trainer("train.accumulate=4")
    before: list[int] = []
    t.loss.register_forward_pre_hook(lambda _, args: before.append(len(args[0].views)))
    (draw,) = t.feed.steps(0, 1)
    seen = t.train_step(draw)
    assert before == [0] * 4
    assert [tuple(v.shape) for v in seen.views] == [(32, 3, 16, 16)] * 2, "of the first of four micro-batches"
    assert not any(v.requires_grad for v in seen.views)


def test_gradient_norms_of_parts_are_before_clipping(trainer: Callable[..., Trainer]) -> None:
    free, clipped = trainer(folder="a"), trainer("train.clip_grad_norm=0.01", folder="b")
    for t in (free, clipped):
        steps(t, 1)
        t._log()
    one, other = (read_metrics(t.directory)[-1] for t in (free, clipped))
    names = [f"grad_norm{part}" for part in ("", "_backbone", "_projector", "_predictor")]
    assert [one[n] for n in names] == [other[n] for n in names]
    gradients = [p.grad for p in free.model.online.projector.parameters()]
    assert one["grad_norm_projector"] == pytest.approx(float(nn.utils.get_total_norm(gradients)), rel=1e-6)  # type: ignore[arg-type]


def test_clipping_scales_the_gradient_down(trainer: Callable[..., Trainer]) -> None:
    t = trainer("train.clip_grad_norm=0.01", "optimizer.lr=1", "optimizer.momentum=0", "optimizer.weight_decay=0")
    before = weights(t.model.online), weights(t.model.predictor)  # type: ignore[arg-type]
    steps(t, 1)
    assert float(t.gradient_norm) > 0.01
    after = weights(t.model.online), weights(t.model.predictor)  # type: ignore[arg-type]
    moved = sum(float((a - b).square().sum()) for a, b in zip(after, before, strict=True)) ** 0.5
    assert moved == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("use", ["sgd", "adam", "adamw", "lars"])
def test_every_optimizer_trains(use: str, trainer: Callable[..., Trainer]) -> None:
    t = trainer(f"optimizer.use={use}", "optimizer.lr=0.02")
    losses = steps(t, 10)
    assert losses[-1] < losses[0]


def test_bf16_stays_close_to_fp32(trainer: Callable[..., Trainer]) -> None:
    low, full = trainer("train.precision=bf16", folder="a"), trainer(folder="b")
    assert steps(low, 3) == pytest.approx(steps(full, 3), abs=0.05)
    assert {p.dtype for p in low.model.parameters()} == {torch.float32}


def test_swapping_the_predictor_leaves_the_other_parts_initial_weights() -> None:
    one, other = parts_of(), parts_of("predictor.hidden_dim=32")
    assert torch.equal(weights(one.model.online), weights(other.model.online))
    assert not torch.equal(weights(one.model.online), weights(parts_of("seed=1").model.online))


def test_parts_of_the_model_have_their_own_rates(trainer: Callable[..., Trainer]) -> None:
    t = trainer("optimizer.groups.predictor.lr=0.5", "optimizer.groups.backbone.weight_decay=0.2",
                "optimizer.lr_reference_batch=64", "optimizer.lr=0.1")  # fmt: skip
    steps(t, 1)
    rates = {(g["part"], g["excluded"]): (g["lr"], g["weight_decay"]) for g in t.optimizer.param_groups}
    assert rates["predictor", False] == (1.0, 1e-4)
    assert rates["backbone", False] == (0.2, 0.2)
    assert rates["backbone", True] == (0.2, 0.0), "biases and normalisation take no weight decay"
    assert rates["projector", False] == (0.2, 1e-4)


# ---------------------------------------------------------------- what is not finite


@pytest.mark.parametrize("on_device", [False, True])
def test_nothing_moves_when_the_loss_is_not_finite_nor_after_it(
    on_device: bool, trainer: Callable[..., Trainer]
) -> None:
    t = trainer()
    t.masks_on_device = on_device
    committed = []
    t.loss.register_buffer("queue", torch.zeros(1))
    t.loss.commit = lambda branches: (committed.append(1), t.loss.queue.add_(1))  # type: ignore[method-assign, assignment]
    steps(t, 2)
    assert float(t.loss.queue) == 2
    before, momentum = weights(t.model), copy.deepcopy(t.optimizer.state_dict()["state"])
    handle = t.model.online.projector.register_forward_hook(
        lambda *_: torch.full((128, 8), float("nan"), requires_grad=True)
    )
    steps(t, 1)
    handle.remove()
    steps(t, 2)  # finite again, but the run is lost: the host has only not heard of it yet
    assert torch.equal(weights(t.model), before)
    assert int(t.target_updates) == 2
    assert float(t.loss.queue) == 2
    after = t.optimizer.state_dict()["state"]
    assert all(torch.equal(momentum[i]["momentum_buffer"], after[i]["momentum_buffer"]) for i in momentum)
    with pytest.raises(RunFailed, match=r"not finite at step 3 \(seed 0\)"):
        t.save()
    with pytest.raises(RunFailed, match=r"not finite at step 3"):
        t._end_epoch()
    assert checkpoint.listed(t.files.checkpoints) == []


def test_masking_on_the_device_changes_nothing_else(trainer: Callable[..., Trainer]) -> None:
    one, other = trainer(folder="a"), trainer(folder="b")
    other.masks_on_device = True
    assert steps(one, 6) == pytest.approx(steps(other, 6), rel=1e-6)
    assert torch.allclose(weights(one.model), weights(other.model), atol=1e-6)


def test_hooks_come_before_the_step_after_the_backward_pass_and_after_the_step_and_not_on_the_target(
    trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[tuple[str, int, bool]] = []

    def backward(self: nn.Module, step: int) -> None:
        called.append(("after_backward", step, all(p.grad is not None for p in self.parameters())))

    def begun(self: nn.Module, step: int) -> None:
        called.append(("before_step", step, all(p.grad is None for p in self.parameters())))

    def stepped(self: nn.Module, step: int) -> None:
        called.append(("after_step", step, True))

    head = type(trainer(folder="probe").model.online.projector)
    monkeypatch.setattr(head, "before_step", begun, raising=False)
    monkeypatch.setattr(head, "after_backward", backward, raising=False)
    monkeypatch.setattr(head, "after_step", stepped, raising=False)
    steps(trainer(), 2)
    hooks = ("before_step", "after_backward", "after_step")
    two = [[(hook, k, True) for hook in hooks for _ in range(3 if hook == "before_step" else 2)] for k in (0, 1)]
    assert called == two[0] + two[1], "projector and predictor; the target's projector only before the step"


def test_the_targets_copy_of_a_head_follows_schedules(
    trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    head = type(trainer(folder="probe").model.online.projector)
    called: list[int] = []
    monkeypatch.setattr(head, "before_step", lambda self, step: called.append(id(self)), raising=False)
    t = trainer()
    steps(t, 1)
    assert t.model.target is not None
    assert id(t.model.target.projector) in called


def test_branches_reach_the_loss_in_float32(trainer: Callable[..., Trainer]) -> None:
    t = trainer("train.precision=bf16")
    seen: list[torch.dtype] = []
    t.loss.register_forward_pre_hook(
        lambda _, args: seen.extend(x.dtype for x in args[0].predictions + args[0].targets + args[0].embeddings)
    )
    steps(t, 1)
    assert set(seen) == {torch.float32}


# ---------------------------------------------------------------- a run and the same run interrupted


def records(trainer: Trainer) -> list[dict[str, Any]]:
    timings = ("images_per_second", "data_wait")
    return [{k: v for k, v in r.items() if k not in timings} for r in read_metrics(trainer.directory)]


@pytest.mark.parametrize("stop", [3, 8, 10, 13])
def test_going_on_gives_the_same_run(stop: int, trainer: Callable[..., Trainer]) -> None:
    overrides = ("optimizer.use=lars", "optimizer.lr=0.1") if stop == 13 else ()
    whole = trainer(*overrides, folder="whole")
    whole.fit(whole.info.total_steps)
    first = trainer(*overrides, folder="parts")
    first.fit(stop)
    first.files.close()
    second = trainer(*overrides, folder="parts", resume=True)
    assert second.step == stop
    second.fit(second.info.total_steps)

    assert records(second) == records(whole)
    assert int(second.target_updates) == int(whole.target_updates) == 20
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    ours, theirs = whole.optimizer.state_dict()["state"], second.optimizer.state_dict()["state"]
    assert all(torch.equal(ours[i]["momentum_buffer"], theirs[i]["momentum_buffer"]) for i in ours)


def test_a_signal_in_the_epochs_end_waits_for_the_measurement(trainer: Callable[..., Trainer]) -> None:
    whole = trainer(folder="whole")
    whole.fit(20)
    for end in (10, 20):
        asked = {"now": False}
        first = trainer(folder=f"parts_{end}", asked_to_stop=lambda asked=asked: asked["now"])

        class Signal:
            @observes(tryfirst=True)
            def epoch_ended(self, run: Any, asked: dict[str, bool] = asked, end: int = end) -> None:
                asked["now"] = run.step == end

        first.bus.manager.register(Signal())
        first.fit(20)
        assert first.step == end
        first.files.close()
        second = trainer(folder=f"parts_{end}", resume=True)
        second.fit(20)
        assert records(second) == records(whole)


def test_the_best_checkpoint_is_of_the_weights_that_were_measured(trainer: Callable[..., Trainer]) -> None:
    t = trainer("train.checkpoint_every=1000", "train.keep_checkpoints=1", "train.epochs=4")
    values = iter([0.1, 0.9, 0.3, 0.2])

    class Judge:
        @observes
        def epoch_ended(self, run: Any) -> None:
            run.record({"knn_top1": next(values)})

    t.bus = type(t.bus)({"judge": Judge()})
    t.fit(40)
    assert [p.name[-2:] for p in checkpoint.listed(t.files.checkpoints)] == ["20", "40"]


def test_records_hold_what_is_promised(trainer: Callable[..., Trainer]) -> None:
    t = trainer()
    t.fit(10)
    lines = [json.loads(line) for line in (t.directory / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["step"] == 0
    assert "knn_top1" in lines[0], "the random network is the floor"
    logged = [r for r in lines if "loss" in r]
    assert [r["step"] for r in logged] == [1, 5, 10]
    assert {"step", "epoch", "loss", "cosine", "lr", "tau", "grad_norm", "std_sqrt_d", "target_drift"} <= set(logged[0])
    assert {"images_per_second", "data_wait"} <= set(logged[1])
    assert logged[0]["tau"] == 0.9
    assert any("effective_rank" in r for r in lines)
    assert lines[-1]["epoch"] == 1.0


def test_an_observer_that_fails_is_named(trainer: Callable[..., Trainer]) -> None:
    t = trainer()

    class Broken:
        @observes
        def step_ended(self) -> None:
            raise ZeroDivisionError("no")

    broken = Broken()
    t.bus.observers["mine"] = broken
    t.bus.manager.register(broken)
    with pytest.raises(RunFailed, match="observer 'mine' failed in step_ended: ZeroDivisionError: no"):
        steps(t, 1)


def test_draws_are_keyed_by_seed_and_step(trainer: Callable[..., Trainer]) -> None:
    t, other = trainer(folder="a"), trainer("seed=1", folder="b")
    first, again = t.feed.draw(7), t.feed.draw(7)
    assert torch.equal(first.batch.images, again.batch.images)
    assert all(torch.equal(first.parameters[k], again.parameters[k]) for k in first.parameters)
    assert not torch.equal(first.batch.indices, t.feed.draw(8).batch.indices)
    assert not torch.equal(first.batch.indices, other.feed.draw(7).batch.indices)
    epoch = torch.cat([t.feed.indices(s) for s in range(10)])
    assert len(epoch.unique()) == len(epoch), "no image twice in an epoch"
    assert randomness.key(0, "views", 1) != randomness.key(0, "order", 1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
def test_compiled_is_eager(trainer: Callable[..., Trainer]) -> None:
    for forward in ("separate", "together"):
        eager = trainer(f"train.forward={forward}", folder=f"eager_{forward}")
        compiled = trainer(f"train.forward={forward}", "train.compile=true", folder=f"compiled_{forward}")
        assert steps(compiled, 5) == pytest.approx(steps(eager, 5), rel=1e-4)
    first = trainer("train.compile=true", folder="parts")
    first.fit(4)
    first.files.close()
    on = trainer("train.compile=true", folder="parts", resume=True)
    whole = trainer("train.compile=true", folder="whole")
    on.fit(8)
    whole.fit(8)
    assert records(on) == records(whole)
