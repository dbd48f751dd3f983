"""A number that is not finite is planted in each place, and has to be found there; nothing may have moved."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from torch import Tensor, nn

from sslkit import checkpoint
from sslkit.anomaly import measured, watching
from sslkit.batch import LossTerms
from sslkit.build import build
from sslkit.errors import RunFailed
from sslkit.nonfinite import Finding
from sslkit.recipe import parse_recipe
from sslkit.run_directory import RunDirectory, read_json
from sslkit.trainer import Trainer

BAD = 3
"""The update that goes wrong is the one after this step, which is before a record is due."""
QUEUE = ("loss.use=nnbyol", "loss.queue=256")


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Callable[..., Trainer]]:
    opened: list[RunDirectory] = []

    def make(*overrides: str) -> Trainer:
        recipe = parse_recipe(TINY, "r.toml", ("train.checkpoint_every=1", *overrides))
        files = RunDirectory(tmp_path / "run")
        opened.append(files)
        files.open_metrics(0)
        parts = build(recipe.model_copy(update={"observers": ()}), torch.device("cpu"), lambda text: None)
        return Trainer(parts, files, say=lambda text: None)

    yield make
    for files in opened:
        files.close()


def plant(t: Trainer, module: nn.Module, change: Callable[..., Any], *, at: int = BAD) -> None:
    """Let a module's forward pass be `change(forward, *arguments)` at one step."""
    forward = module.forward
    module.forward = lambda *given: change(forward, *given) if t.step == at else forward(*given)  # type: ignore[method-assign]


def failed(t: Trainer) -> tuple[Finding, str]:
    """What is found when the run meets what was planted, and what it says."""
    with pytest.raises(RunFailed) as caught:
        t.fit(8)
    assert t.anomaly is not None
    assert t.anomaly.step == BAD + 1
    return t.anomaly, str(caught.value)


def overflowing(forward: Callable[..., Tensor], *given: Tensor) -> Tensor:
    return forward(*given) * 1e30 * 1e30


def at(t: Trainer, name: str) -> nn.Module:
    return t.loss if name == "loss" else t.model.get_submodule(name)


# ---------------------------------------------------------------- the forward pass


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("online.backbone.blocks.3", "Conv2d"),
        ("online.projector.3", "Linear"),
        ("online.projector", "MLPHead"),
        ("predictor.1", "BatchNorm1d"),
        ("target.projector.0", "Linear"),
    ],
)
def test_the_first_module_is_named_as_in_the_checkpoint(name: str, kind: str, trainer: Callable[..., Trainer]) -> None:
    t = trainer()
    plant(t, at(t, name), overflowing)
    found, said = failed(t)
    assert (found.where, found.module, found.dtype) == ("forward", name, "float32")
    assert (
        f"not finite at step {BAD + 1} (seed 0): the first output that is not finite is that of {name} ({kind}" in said
    )
    assert "it was given finite numbers, up to" in said


def test_it_says_what_a_module_computed_in(trainer: Callable[..., Trainer]) -> None:
    t = trainer("train.precision=bf16")
    plant(t, at(t, "online.projector.3"), overflowing)
    found, said = failed(t)
    assert (found.module, found.dtype) == ("online.projector.3", "bfloat16")
    assert "train.precision = 'fp32' tells whether bf16 is to blame" in said


def test_a_modules_own_code_is_told_from_what_it_calls(trainer: Callable[..., Trainer]) -> None:
    t = trainer()
    plant(t, at(t, "online.projector"), lambda forward, x: forward(x / torch.zeros(())))
    found, said = failed(t)
    assert (found.where, found.module) == ("forward", "online.projector")
    assert "in the code of online.projector (MLPHead, float32) itself: it gives online.projector.0" in said


def test_a_loss_that_divides_by_zero(trainer: Callable[..., Trainer]) -> None:
    t = trainer()
    plant(t, t.loss, lambda forward, branches: LossTerms((terms := forward(branches)).total / 0, terms.terms))
    found, said = failed(t)
    assert (found.where, found.module) == ("forward", "loss")
    assert "loss (CosineLoss, float32): 1 inf of 1 values" in said


def test_an_infinite_value_that_the_loss_does_not_show(trainer: Callable[..., Trainer]) -> None:
    """BatchNorm makes 0 of what it divides by an infinite deviation; the gradient is NaN all the same."""
    t = trainer()
    plant(t, at(t, "predictor.1"), lambda forward, x: torch.clamp(forward(x) * math.inf, -1, 1).nan_to_num())
    plant(t, at(t, "predictor.0"), overflowing)
    found, said = failed(t)
    assert (found.where, found.module) == ("forward", "predictor.0")
    assert "the loss is finite all the same, and its gradient is not from predictor" in said


def test_views_are_named_with_their_images(trainer: Callable[..., Trainer]) -> None:
    t = trainer("train.accumulate=2")
    appear, calls = t.views.appear, []

    def broken(crops: Any, parameters: Any) -> list[Tensor]:
        views = appear(crops, parameters)
        calls.append(t.step)
        if t.step == BAD and calls.count(BAD) % 2 == 0:  # the second micro-batch of 64
            views[1][5] = math.nan
        return views

    t.views.appear = broken  # type: ignore[method-assign]
    found, said = failed(t)
    image = int(t.feed.indices(BAD)[64 + 5])
    assert (found.where, found.module) == ("views", "views")
    assert f"the view generator 'affine' gives views that are not finite: view 2 of image {image}" in said


# ---------------------------------------------------------------- the backward pass


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_gradient_that_is_not_finite_after_a_finite_forward_pass(
    accumulate: int, trainer: Callable[..., Trainer]
) -> None:
    t = trainer(f"train.accumulate={accumulate}")
    plant(t, at(t, "online.projector.1"), lambda forward, x: (y := forward(x)) + (y * 0).sqrt())
    found, said = failed(t)
    assert (found.where, found.module, found.operation) == ("backward", "online.projector.1", "SqrtBackward0")
    assert "the forward pass is finite; the first gradient that is not arises in online.projector.1" in said
    assert "online.projector.0.weight" in found.parameters
    assert "online.projector.3.weight" not in found.parameters, "which is nearer to the loss"
    assert "wants an epsilon" in said


def test_a_gradient_that_is_not_finite_in_the_loss(trainer: Callable[..., Trainer]) -> None:
    t = trainer()

    def rooted(forward: Callable[..., LossTerms], branches: Any) -> LossTerms:
        terms = forward(branches)
        return LossTerms(terms.total + (terms.total * 0).sqrt(), terms.terms)

    plant(t, t.loss, rooted)
    found, _ = failed(t)
    assert (found.where, found.module, found.operation) == ("backward", "loss", "SqrtBackward0")


def test_a_norm_that_overflows_though_no_gradient_does(trainer: Callable[..., Trainer]) -> None:
    t = trainer()
    plant(t, t.loss, lambda forward, branches: LossTerms(forward(branches).total * 1e30, {"cosine": torch.ones(())}))
    found, said = failed(t)
    assert found.where == "norm"
    assert "every gradient is finite as the backward pass leaves it, but their norm is not" in said


# ---------------------------------------------------------------- weights


def test_weights_that_an_update_broke_reach_no_checkpoint(trainer: Callable[..., Trainer]) -> None:
    t = trainer("optimizer.lr=3e38", "optimizer.momentum=0")
    with pytest.raises(RunFailed, match=r"the weights are not finite after step 1: .*no checkpoint was written"):
        t.fit(1)
    assert checkpoint.listed(t.files.checkpoints) == []
    assert t.anomaly is not None
    assert t.anomaly.status() == {"reason": "not_finite", "step": 1, "module": t.anomaly.module}


def test_weights_that_were_broken_before_are_told_apart(trainer: Callable[..., Trainer]) -> None:
    t = trainer("train.checkpoint_every=100")

    def spoil() -> None:
        if t.step == BAD:
            with torch.no_grad():
                t.model.online.projector[3].weight[0, 0] = math.inf  # type: ignore[index, union-attr]

    with pytest.raises(RunFailed, match=r"the weights were not finite before it \(online.projector.3.weight\)"):
        t.fit(8, spoil)
    assert t.anomaly is not None
    assert (t.anomaly.where, t.anomaly.module) == ("weights", "online.projector.3")


# ---------------------------------------------------------------- nothing moves, nothing is written


@pytest.mark.parametrize("on_device", [False, True])
def test_everything_is_as_the_checkpoint_before_says(on_device: bool, trainer: Callable[..., Trainer]) -> None:
    t = trainer(*QUEUE)
    t.masks_on_device = on_device
    plant(t, at(t, "online.projector.3"), overflowing)
    failed(t)
    path = checkpoint.listed(t.files.checkpoints)[-1]
    found = checkpoint.load(path)
    assert found.step == BAD
    trained = dict(t.model.named_parameters())
    assert any(name.startswith("target.") for name in trained)
    for name, value in trained.items():
        assert torch.equal(value, found.parts["model"][name]), name
    loss = t.loss.state_dict()
    assert any("queue" in name for name in loss)
    for name, value in loss.items():
        assert torch.equal(value, found.parts["loss"][name]), name
    mine, theirs = t.optimizer.state_dict()["state"], found.parts["optimizer"]["state"]
    assert all(torch.equal(mine[i]["momentum_buffer"], theirs[i]["momentum_buffer"]) for i in mine)
    assert int(t.target_updates) == found.facts["target_updates"] == BAD


def test_looking_for_the_cause_changes_no_file_but_the_batch(trainer: Callable[..., Trainer]) -> None:
    t = trainer()
    plant(
        t, t.loss, lambda forward, branches: LossTerms(forward(branches).total * math.nan, {"cosine": torch.ones(())})
    )
    failed(t)
    listed = checkpoint.listed(t.files.checkpoints)
    assert [path.name for path in listed] == [f"step-{step:09d}" for step in (1, 2, 3)]
    told = read_json(t.directory / "bad_batch.json")
    assert told == {"seed": 0, "step": BAD + 1, "indices": t.feed.indices(BAD).tolist(), "files": None}
    first = t.anomaly
    with pytest.raises(RunFailed):
        t.save()
    assert t.anomaly is first
    assert t.step == BAD + 1
    assert all(json.loads((path / "state.json").read_text())["step"] <= BAD for path in listed)


def test_observers_hear_nothing_of_the_repeated_step(trainer: Callable[..., Trainer]) -> None:
    from sslkit.events import Bus, observes

    class Counts:
        seen = 0

        @observes
        def step_ended(self, run: Any) -> None:
            self.seen += 1

    t, counts = trainer(), Counts()
    t.bus = Bus({"counts": counts})
    plant(t, at(t, "online.projector.3"), overflowing)
    failed(t)
    assert counts.seen == BAD + 1


def test_a_step_that_is_finite_when_it_is_repeated(trainer: Callable[..., Trainer]) -> None:
    t = trainer()
    calls: list[int] = []
    plant(t, t.loss, lambda forward, branches: (
        forward(branches) if BAD in calls else LossTerms(forward(branches).total * math.nan, {}), calls.append(BAD)
    )[0])  # fmt: skip
    found, said = failed(t)
    assert (found.finite, found.module) == (True, None)
    assert "when it was repeated, every output and gradient of it was finite" in said


def test_a_part_that_raises_when_the_step_is_repeated(trainer: Callable[..., Trainer]) -> None:
    t = trainer()
    calls: list[int] = []

    def touchy(forward: Callable[..., Tensor], x: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 2:  # there are two views
            raise ValueError("no more")
        return forward(x) * math.nan

    plant(t, at(t, "online.projector.3"), touchy)
    _, said = failed(t)
    assert "it could not be repeated: ValueError: no more" in said


# ---------------------------------------------------------------- the hooks


def test_watching_changes_no_number_and_leaves_no_hook(trainer: Callable[..., Trainer]) -> None:
    t = trainer()
    draw = t.feed.draw(0)
    twin = copy.deepcopy(t.model.state_dict())
    t.train_step(draw)
    plain, norm = t.terms.total.clone(), t.gradient_norm.clone()
    t.model.load_state_dict(twin)
    t.optimizer.state.clear()
    t.step = 0
    with watching(t.model, t.loss) as record:
        t.train_step(draw)
    assert torch.equal(t.terms.total, plain)
    assert torch.equal(t.gradient_norm, norm)
    assert {call.module for call in record.calls} >= {"model", "online.backbone.blocks.0", "predictor", "loss"}
    assert all(call.gave is not None for call in record.calls)
    assert (record.culprit, record.operation, record.weights) == (None, None, [])
    assert set(record.gradients) == {n for n, p in t.model.named_parameters() if p.requires_grad}
    modules = [*t.model.modules(), *t.loss.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def test_a_module_that_is_changed_in_place_is_no_hindrance() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.relu = nn.Linear(2, 2), nn.ReLU(inplace=True)

        def forward(self, views: list[Tensor]) -> Tensor:
            return self.relu(self.first(views[0])).add(1).sqrt_()

    net, loss = Net(), nn.Identity()
    with torch.no_grad():
        net.first.weight.zero_()
        net.first.bias.fill_(3)
    with watching(net, loss) as record:
        loss(net([torch.ones(3, 2)])).sum().backward()
    assert record.operation is None
    with watching(net, loss) as record:
        net([torch.ones(3, 2)]).sub(2).sqrt().sum().backward()  # made outside of every module
    assert record.operation is None
    assert not record.gradients["first.bias"].finite


def test_what_is_measured() -> None:
    found = measured([torch.tensor([1.0, -3.0, math.nan, math.inf, -math.inf]), torch.tensor([7]), None])
    assert (found.dtype, found.largest, found.nan, found.inf, found.of) == ("float32", 3.0, 1, 2, 5)
    assert str(found) == "1 NaN and 2 inf of 5 values"
    assert measured([torch.zeros(2, dtype=torch.bfloat16)]).dtype == "bfloat16"
    assert str(measured([torch.tensor([0.5])])) == "finite, up to 0.5"
    assert measured([torch.tensor([3])]).dtype is None
