"""What can be known of a run before it begins: the parts of a recipe, looked at and tried out (`sslkit.rules.Facts`).

Nothing here changes the parts: what would move is copied first.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslkit import randomness, registry
from sslkit.api import Images, TargetModule, ViewMaker
from sslkit.batch_norm import is_normalisation
from sslkit.build import Parts
from sslkit.data import spread
from sslkit.features import in_eval_mode
from sslkit.health import target_drift
from sslkit.loss_facts import loss_facts
from sslkit.nn import Queue
from sslkit.panel import shared_parameters
from sslkit.rules import Facts, QueueFacts, Trajectory

IMAGES = 64
"""Images whose views are looked at."""
DRAWN, DRAWS = 61, 16
"""Images that view parameters are drawn for, a prime that no other dimension is likely to be, and how often."""
TRIED = 16
"""Updates that a target is tried with."""
COMPARED = 1_000
"""Test images that are looked for among the training images."""


def gather(parts: Parts) -> Facts:
    """All facts of a recipe's parts."""
    recipe, run, model, data = parts.recipe, parts.run, parts.model, parts.data
    tau = (lambda step: cast(float, parts.target.tau(step))) if parts.target.tau(0) is not None else None
    shown = _spread(data.train, IMAGES)
    apart = 1 if recipe.train.batch_norm == "sync" else run.world_size
    with torch.random.fork_rng(devices=[parts.device] if parts.device.type == "cuda" else []):
        return Facts(
            name=recipe.name,
            accepted=recipe.train.accept,
            recipe=recipe.computing(),
            total_steps=run.total_steps,
            steps_per_epoch=run.steps_per_epoch,
            batch_size=run.batch_size,
            train_images=run.train_images,
            processes=run.world_size,
            precision=recipe.train.precision,
            initialised=recipe.init_from.words if recipe.init_from else "",
            initialised_by=recipe.init_from.place if recipe.init_from else "",
            loss_precision="fp32",  # the engine calls losses outside autocast
            labelled=data.train.labels is not None and data.test is not None and data.test.labels is not None,
            quality=tuple(m for o in recipe.observers if o.enabled for m in type(o).measures),
            evaluated=parts.target.evaluated,
            shared_images=shared_images(data.train, data.test),
            commonest_image=commonest_image(data.train),
            classes=_classes(data.train),
            test_classes=_classes(data.test),
            clean_scale=_scale(parts.views.clean(shown.to(parts.device))),
            **view_facts(parts.views, shown.to(parts.device), run.seed),
            view_sizes=tuple(spec.size for spec in run.views),
            **map_facts(model.online.backbone, parts.views.clean(shown[:1].to(parts.device)), run.views[0].size),
            trained_parts=tuple(dict.fromkeys(group.part for group in parts.groups)),
            **normalisation_facts([model.online.backbone, model.online.projector, model.predictor]),
            batch_norm_images=run.batch_size // recipe.train.accumulate // max(recipe.train.batch_norm_groups, apart),
            batch_norm_shuffled=model.shuffles,
            predictor_learns=model.predictor is not None and any(True for _ in model.predictor.parameters()),
            projector_normalised=ends_normalised(model.online.projector),
            **loss_facts(parts),
            queues=tuple(
                QueueFacts(rows=q.size, pushed_per_step=run.batch_size * q.views, negatives=q.negatives)
                for q in parts.loss.modules()
                if isinstance(q, Queue)
            ),
            target=parts.target.source,
            tau=Trajectory.of(tau, run.total_steps) if tau else None,
            target_gap=_gap(model.online, model.target),
            unmoved=unmoved(parts.updater, model.online, model.target),
            optimizer=registry.name_of(type(recipe.optimizer)),
            lr=_rates(parts),
            unoptimised=unoptimised(
                {**_named("", model, skip="target."), **_named("loss.", parts.loss)}, parts.optimizer.param_groups
            ),
            decayed_biases=_decayed_biases(parts),
        )


def _spread(images: Images, number: int) -> Tensor:
    """Some images, from all over the set."""
    return images.read(spread(images, number))


# ---------------------------------------------------------------- data and views


def shared_images(train: Images, test: Images | None) -> float | None:
    """Share of test images (1,000 of them) that are among the training images; None where these are not in memory."""
    if test is None or train.tensor is None:
        return None
    looked_for = [picture.numpy().tobytes() for picture in _spread(test, COMPARED)]
    wanted = set(looked_for)
    found = {key for picture in train.tensor if (key := picture.numpy().tobytes()) in wanted}
    return sum(key in found for key in looked_for) / len(looked_for)


def commonest_image(images: Images) -> float | None:
    """Share of training images (1,000 of them, 64 where they are not in memory) that are one and the same picture."""
    shown = _spread(images, IMAGES if images.tensor is None else COMPARED)
    return max(Counter(p.numpy().tobytes() for p in shown).values()) / len(shown) if len(shown) > 1 else None


def _classes(images: Images | None) -> int | None:
    return None if images is None or images.labels is None else len(images.labels.unique())


def view_facts(views: ViewMaker, images: Tensor, seed: int) -> dict[str, Any]:
    """How views differ: from one another, between images, between steps; and whether their randomness is keyed."""

    def make(pictures: Tensor, step: int) -> list[Tensor]:
        drawn = views.draw(len(pictures), randomness.generator(seed, "doctor", step))
        parameters = {name: values.to(pictures.device) for name, values in drawn.items()}
        return [view.float() for view in views.appear(views.crop(pictures, parameters), parameters)]

    first, again, other = make(images, 0), make(images, 0), make(images, 1)
    copies = make(images[:1].expand_as(images).contiguous(), 0)
    difference = view_difference(first)
    random = not _same(first, other)
    one_draw = all(bool((view == view[:1]).all()) for view in copies) if len(images) > 1 else None
    return {
        "view_difference": difference,
        "view_scale": _scale(first[0]),
        "images_share_draws": one_draw and random,
        "shared_draws": shared_draws(views, seed),
        "steps_share_draws": not random and difference is not None and difference[1] > 0,
        "draws_are_keyed": _same(first, again),
    }


def shared_draws(views: ViewMaker, seed: int) -> tuple[str, ...]:
    """Parameters of which a part is equal for all images of every draw, and not the same in all draws.

    A coin that nearly always falls on one side is equal for all images, too, but then always the same.
    """
    draws = [views.draw(DRAWN, randomness.generator(seed, "doctor draws", i)) for i in range(DRAWS)]
    return tuple(name for name in draws[0] if _shared([drawn[name] for drawn in draws if name in drawn]))


def _shared(draws: Sequence[Tensor]) -> bool:
    if len({drawn.shape for drawn in draws}) > 1:
        return False
    images = next((axis for axis, size in enumerate(draws[0].shape) if size == DRAWN), None)
    # `[draws, images, numbers of an image]`; without a dimension of images, all of them have the one value.
    values = torch.stack([d[None] if images is None else d.movedim(images, 0) for d in draws])[..., None].flatten(2)
    equal = (values == values[:, :1]).all(1).all(0)
    return bool((equal & (values[:, 0] != values[:1, 0]).any(0)).any())


def _scale(pixels: Tensor) -> tuple[float, float]:
    return float(pixels.float().mean()), float(pixels.float().std())


def view_difference(views: Sequence[Tensor]) -> tuple[float, float] | None:
    """Mean and largest |v1 - v2| over all pairs of views of one size; None if there is no such pair."""
    gaps = [(a - b).abs() for a, b in combinations(views, 2) if a.shape == b.shape]
    if not gaps:
        return None
    return float(torch.stack([gap.mean() for gap in gaps]).mean()), max(float(gap.max()) for gap in gaps)


def _same(views: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(views, others, strict=True))


# ---------------------------------------------------------------- networks


def map_facts(backbone: nn.Module, images: Tensor, size: int) -> dict[str, Any]:
    """How coarse the maps are that the convolutions of a backbone see, for views of a size in pixels."""
    seen: list[tuple[int, int]] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> None:
        seen.append(((*inputs, *named.values())[0].shape[-1], output.shape[-1]))

    hooks = [m.register_forward_hook(note, with_kwargs=True) for m in backbone.modules() if isinstance(m, nn.Conv2d)]
    try:
        with in_eval_mode(backbone):
            backbone(F.interpolate(images[:1].float(), size=(size, size)))
    finally:
        for hook in hooks:
            hook.remove()
    if len(seen) < 2:  # a transformer cuts patches with its only convolution
        return {}
    return {"stem_stride": size / seen[1][0], "last_map": seen[-1][1]}


def normalisation_facts(networks: Iterable[nn.Module | None]) -> dict[str, Any]:
    """How many layers normalise, and how many of them with statistics of the batch."""
    layers = [m for network in networks if network is not None for m in network.modules() if is_normalisation(m)]
    of_batch = [
        m for m in layers
        if isinstance(m, nn.modules.batchnorm._BatchNorm) or getattr(m, "batch_statistics", False)
    ]  # fmt: skip
    return {
        "normalisation_layers": len(layers),
        "batch_norm_layers": len(of_batch),
        "batch_norm_synchronised": bool(of_batch) and all(isinstance(m, nn.SyncBatchNorm) for m in of_batch),
    }


def ends_normalised(network: nn.Module) -> bool:
    """Whether the last layer of a network normalises."""
    layers = [m for m in network.modules() if next(m.children(), None) is None]
    return is_normalisation(layers[-1])


def unmoved(updater: nn.Module, online: nn.Module, target: nn.Module | None) -> tuple[str, ...] | None:
    """Parameters of a target that updates with tau = 1/2 leave where they are, tried on copies; None if all of them are
    left, or there is no target."""
    if target is None:
        return None
    moved, still = copy.deepcopy(online), copy.deepcopy(target)
    trying, trained = cast(TargetModule, copy.deepcopy(updater)), set[str]()
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            if parameter.requires_grad:  # one that never moves is the target's for ever
                parameter.add_(1)
                trained.add(name)
        for _ in range(TRIED):  # some move now and then
            trying.update(moved, still, 0.5)
    before = dict(target.named_parameters())
    left = [name for name, p in still.named_parameters() if name in trained and torch.equal(p, before[name])]
    return tuple(left) if len(left) < len(trained) else None


def _gap(online: nn.Module, target: nn.Module | None) -> float | None:
    mine, theirs = shared_parameters(online, target)
    return float(target_drift(mine, theirs)[0]) if mine else None


# ---------------------------------------------------------------- optimizer


def unoptimised(parameters: Mapping[str, nn.Parameter], groups: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """Names of those trainable parameters that no group of an optimizer has."""
    known = {id(p) for group in groups for p in group["params"]}
    return tuple(name for name, p in parameters.items() if p.requires_grad and id(p) not in known)


def _named(prefix: str, module: nn.Module, skip: str = "\0") -> dict[str, nn.Parameter]:
    return {prefix + name: p for name, p in module.named_parameters() if not name.startswith(skip)}


def _rates(parts: Parts) -> dict[str, Trajectory]:
    """The learning rate of each part over the run."""
    values = {group.part: value.lr for group, value in zip(parts.groups, parts.values, strict=True)}
    return {part: Trajectory.of(lr, parts.run.total_steps) for part, lr in values.items()}


def _decayed_biases(parts: Parts) -> bool:
    """Whether parameters of one dimension or none are decayed, or adapted by LARS."""
    adapts = registry.name_of(type(parts.recipe.optimizer)) == "lars"
    return any(
        not group.excluded
        and any(p.ndim <= 1 for p in group.parameters)
        and (adapts or any(value.weight_decay(step) > 0 for step in (0, parts.run.total_steps // 2)))
        for group, value in zip(parts.groups, parts.values, strict=True)
    )
