"""Faults planted by hand, for benchmarks/doctor.py: functions that break a trainer or its parts before a run begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslkit.batch import Branches, LossTerms
from sslkit.batch_norm import is_normalisation
from sslkit.events import observes
from sslkit.trainer import Trainer

Plant = Callable[[Trainer], None]


# ---------------------------------------------------------------- plants: the target


def updates(change: Callable[[Callable[..., None], Any, Any, Any], None]) -> Plant:
    """Replace the target's update by `change(update, online, target, tau)`."""

    def plant(trainer: Trainer) -> None:
        update = trainer.parts.updater.update
        trainer.parts.updater.update = lambda online, target, tau: change(  # type: ignore[assignment, union-attr]
            cast(Callable[..., None], update), online, target, tau
        )

    return plant


def twice(update: Callable[..., None], online: nn.Module, target: nn.Module, tau: float) -> None:
    update(online, target, tau)
    update(online, target, tau)


def weights_only(update: Callable[..., None], online: nn.Module, target: nn.Module, tau: float) -> None:
    kept = {name: p.clone() for name, p in target.named_parameters() if "norm" in name or p.ndim <= 1}
    update(online, target, tau)
    for name, p in target.named_parameters():
        if name in kept:
            p.copy_(kept[name])


def head_only(update: Callable[..., None], online: Any, target: Any, tau: float) -> None:
    update(online.projector, target.projector, tau)


def per_micro_batch(trainer: Trainer) -> None:
    """The trainer's own count tells that the target moves twice in every step."""
    move = trainer._update_target

    def twice(finite: Tensor) -> None:
        move(finite)
        move(finite)

    trainer._update_target = twice  # type: ignore[method-assign]


def schedules(change: Callable[[int, int], int]) -> Plant:
    """Let every schedule see another step: `change(step, total)`."""

    def plant(trainer: Trainer) -> None:
        total = trainer.info.total_steps
        updater = cast(Any, trainer.parts.updater)
        tau = updater._tau
        updater._tau = lambda step: tau(change(step, total))
        for values in trainer.parts.values:
            values.lr = lambda step, lr=values.lr: lr(change(step, total))  # type: ignore[misc]

    return plant


# ---------------------------------------------------------------- plants: the loss


class Changed(nn.Module):
    """A loss whose result or whose inputs are changed, in all else the same."""

    def __init__(self, inner: nn.Module, value: Callable[[nn.Module, Branches], LossTerms]) -> None:
        super().__init__()
        self.inner, self._value = inner, value

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, branches: Branches) -> LossTerms:
        """The changed loss."""
        return self._value(self.inner, branches)


def loss(value: Callable[[nn.Module, Branches], LossTerms]) -> Plant:
    def plant(trainer: Trainer) -> None:
        trainer.loss = trainer.parts.loss = Changed(trainer.loss, value)

    return plant


def scaled(factor: float) -> Plant:
    def value(loss: nn.Module, branches: Branches) -> LossTerms:
        terms = loss(branches)
        return LossTerms(terms.total * factor, terms.terms)

    return loss(value)


def no_stop_gradient(loss: nn.Module, branches: Branches) -> LossTerms:
    pairs = [(branches.predictions[0], branches.projections[1]), (branches.predictions[1], branches.projections[0])]
    total = sum((2 - 2 * F.cosine_similarity(cast(Tensor, p), cast(Tensor, t), dim=1)).mean() for p, t in pairs)
    return LossTerms(cast(Tensor, total))


def other_images(loss: nn.Module, branches: Branches) -> LossTerms:
    def rolled(tensors: list[Tensor | None]) -> list[Tensor | None]:
        return [t if t is None or view == 0 else t.roll(1, 0) for view, t in enumerate(tensors)]

    branches.projections, branches.targets = rolled(branches.projections), rolled(branches.targets)
    return cast(LossTerms, loss(branches))


def with_labels(loss: nn.Module, branches: Branches) -> LossTerms:
    terms, labels = loss(branches), branches.labels
    unit = F.normalize(cast(Tensor, branches.projections[0]), dim=1)
    assert labels is not None
    same = (labels[:, None] == labels[None]).float()
    return LossTerms(terms.total + 5 * (unit @ unit.T - same).square().mean(), terms.terms)


def half(loss: nn.Module, branches: Branches) -> LossTerms:
    """The loss of small outputs in fp16, where the square of a length is 0."""

    def small(tensors: list[Tensor | None]) -> list[Tensor | None]:
        return [None if t is None else 1e-5 * t.half() for t in tensors]

    online, target = small(branches.predictions), small(branches.targets)
    products = [
        (a / a.square().sum(1, keepdim=True).sqrt() * b / b.square().sum(1, keepdim=True).sqrt()).sum(1)
        for a, b in ((online[0], target[1]), (online[1], target[0]))
        if a is not None and b is not None
    ]
    return LossTerms(-torch.stack(products).float().mean())


def no_centre(trainer: Trainer) -> None:
    """The centre of DINO stays at zero."""
    trainer.loss.commit = lambda branches: None  # type: ignore[assignment]


# ---------------------------------------------------------------- plants: networks, optimizer, views


def no_normalisation(trainer: Trainer) -> None:
    """All normalisation layers become the identity."""
    for network in (trainer.model.online, trainer.model.predictor, trainer.model.target):
        for module in list(cast(nn.Module, network).modules()):
            for name, child in list(module.named_children()):
                if is_normalisation(child):
                    setattr(module, name, nn.Identity())


def backbone_detached(trainer: Trainer) -> None:
    """No gradient comes through to the backbone."""
    trainer.model.online.backbone.register_forward_hook(lambda module, args, output: output.detach())


def not_optimised(part: str) -> Plant:
    def plant(trainer: Trainer) -> None:
        left_out = {id(p) for g in trainer.parts.groups if g.part == part for p in g.parameters}
        for group in trainer.optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in left_out]

    return plant


def draws(change: Callable[[Callable[..., dict[str, Tensor]], int, torch.Generator], dict[str, Tensor]]) -> Plant:
    def plant(trainer: Trainer) -> None:
        views = cast(Any, trainer.views)
        draw = views.draw
        views.draw = lambda n, generator: change(draw, n, generator)

    return plant


def one_for_all(draw: Callable[..., dict[str, Tensor]], n: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {name: t[:1].expand_as(t).contiguous() for name, t in draw(n, generator).items()}


def always_the_same(draw: Callable[..., dict[str, Tensor]], n: int, generator: torch.Generator) -> dict[str, Tensor]:
    return draw(n, torch.Generator().manual_seed(0))


def views(change: Callable[[list[Tensor]], list[Tensor]]) -> Plant:
    def plant(trainer: Trainer) -> None:
        views = cast(Any, trainer.views)
        appear = views.appear
        views.appear = lambda crops, parameters: change(appear(crops, parameters))

    return plant


# ---------------------------------------------------------------- plants: in the middle of a run


class At:
    """An observer that does something once a step is completed."""

    def __init__(self, when: float, act: Callable[[Trainer], None]) -> None:
        self.when, self.act = when, act

    @observes
    def step_ended(self, run: Any) -> None:
        """Act at the given share of the run."""
        if run.step == int(self.when * run.info.total_steps):
            self.act(run)


def at(when: float, act: Callable[[Trainer], None]) -> Plant:
    return lambda trainer: cast(None, trainer.bus.manager.register(At(when, act)))


def target_reset(trainer: Trainer) -> None:
    cast(nn.Module, trainer.model.target).load_state_dict(trainer.model.online.state_dict())


def steps_reset(trainer: Trainer) -> None:
    """Schedules begin again, as after a resume that lost the step."""
    done = trainer.step
    updater = cast(Any, trainer.parts.updater)
    tau = updater._tau
    updater._tau = lambda step: tau(step - done)
    for values in trainer.parts.values:
        values.lr = lambda step, lr=values.lr: lr(step - done)  # type: ignore[misc]


def weights_reset(trainer: Trainer) -> None:
    for module in trainer.model.online.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def rate_times(factor: float) -> Callable[[Trainer], None]:
    def act(trainer: Trainer) -> None:
        for values in trainer.parts.values:
            values.lr = lambda step, lr=values.lr: factor * lr(step)  # type: ignore[misc]

    return act


def loses_stop_gradient(trainer: Trainer) -> None:
    loss(no_stop_gradient)(trainer)


def nan(trainer: Trainer) -> None:
    with torch.no_grad():
        next(trainer.model.online.parameters())[0] = torch.nan


def optimizer_idle(trainer: Trainer) -> None:
    """The optimizer's step does nothing."""
    trainer._optimize = lambda finite: None  # type: ignore[method-assign]


def one_batch(trainer: Trainer) -> None:
    """Every step has the images of the first one, in views drawn anew."""
    indices = trainer.feed.indices
    trainer.feed.indices = lambda step: indices(0)  # type: ignore[method-assign]


@torch.no_grad()
def noisily(update: Callable[..., None], online: nn.Module, target: nn.Module, tau: float) -> None:
    """The target moves as it should, and every weight at random besides."""
    update(online, target, tau)
    for p in target.parameters():
        p.add_(0.05 * torch.randn_like(p) * p.square().mean().sqrt())


def gradient_noise(trainer: Trainer) -> None:
    """Gradients are noise of their own size."""
    for p in trainer.trained:
        p.register_hook(lambda g: torch.randn_like(g) * g.norm() / max(1.0, g.numel() ** 0.5))
