"""Recipe -> live objects. The only caller of `build()`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import nn

from sslkit import features, freezing, randomness, registry
from sslkit.api import (
    Component,
    DataInfo,
    GroupOptions,
    ImageSet,
    LossModule,
    ParamGroup,
    RunInfo,
    Schedule,
    TargetModule,
    Value,
    ViewMaker,
    value_of,
)
from sslkit.batch import Needs
from sslkit.batch_norm import synchronise_batch_norm
from sslkit.bf16 import refuse_broken_bf16
from sslkit.data import cache_folder, channel_statistics
from sslkit.errors import RunFailed, SslkitError, UserError
from sslkit.initialise import Start
from sslkit.recipe import Recipe
from sslkit.siamese import Encoder, Siamese
from sslkit.viewing import fitting
from sslkit.words import spoken

if TYPE_CHECKING:
    from collections.abc import Iterator

T = TypeVar("T")


@dataclass
class GroupValues:
    """Learning rate and weight decay of one parameter group as functions of the step."""

    lr: Value
    weight_decay: Value


@dataclass
class Parts:
    """Everything a recipe builds."""

    recipe: Recipe
    run: RunInfo
    device: torch.device
    data: ImageSet
    views: ViewMaker
    model: Siamese
    loss: nn.Module
    updater: nn.Module
    groups: list[ParamGroup]
    optimizer: torch.optim.Optimizer
    values: list[GroupValues]
    observers: dict[str, object]
    initialised: dict[str, Any] | None = None
    """Where the first weights are from, as `env.json` and every checkpoint say it; None where they were drawn."""

    @property
    def loss_module(self) -> LossModule:
        """The loss, seen as what its contract says."""
        return cast(LossModule, self.loss)

    @property
    def target(self) -> TargetModule:
        """The target updater, seen as what its contract says."""
        return cast(TargetModule, self.updater)


def choose_device(wanted: str) -> torch.device:
    """`auto` is CUDA where there is a device.

    Raises:
        UserError: CUDA was asked for and is not there.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{spoken().cuda}: torch sees no CUDA device here; use {spoken().cpu_or_auto}")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def open_data(recipe: Recipe, say: Callable[[str], None]) -> ImageSet:
    """Open the recipe's data source."""
    info = DataInfo(seed=recipe.seed, cache=cache_folder(), say=say)
    return _made(recipe.data_source, lambda: recipe.data_source.build(info))


def describe_run(recipe: Recipe, data: ImageSet, device: torch.device, processes: int = 1) -> RunInfo:
    """The facts that components may ask for; the view specs are added once the views are built.

    Raises:
        UserError: the training set is smaller than one batch, or a batch cannot be shared among the processes.
    """
    images, size = len(data.train), recipe.train.batch_size
    shares = processes * recipe.train.accumulate
    if processes > 1 and (size % shares or size // shares < 2):
        near = max(2, round(size / shares)) * shares
        parts = f"{processes} processes" + (f" x accumulate = {shares // processes}" if shares > processes else "")
        raise UserError(
            f"train.batch_size is {size}, the images of a step of all processes, and {parts} cannot share it equally, "
            f"two or more images each; choose {near}"
        )
    if images < size:
        raise UserError(f"train.batch_size is {size}, but there are only {images} training images; make it smaller")
    first = data.train.read(torch.zeros(1, dtype=torch.int64))
    mean, std = channel_statistics(data.train)
    per_epoch = images // size
    return RunInfo(
        seed=recipe.seed,
        device=device.type,
        image_size=first.shape[-1],
        channels=first.shape[1],
        mean=mean,
        std=std,
        train_images=images,
        total_steps=recipe.train.epochs * per_epoch,
        steps_per_epoch=per_epoch,
        batch_size=size,
        world_size=processes,
        class_names=data.class_names,
        labelled=data.train.labels is not None,
        originals=getattr(data.train, "sizes", None) is not None,
    )


def build_views(
    recipe: Recipe, device: torch.device, say: Callable[[str], None], processes: int = 1
) -> tuple[ImageSet, RunInfo, ViewMaker]:
    """The data and what makes their views, without networks; the facts of the run include the views' specs.

    Raises:
        UserError: as `build` does, of these two parts.
    """
    data = open_data(recipe, say)
    run = describe_run(recipe, data, device, processes)
    views = fitting(_made(recipe.view_generator, lambda: recipe.view_generator.build(run)), recipe, run)
    return data, replace(run, views=tuple(views.specs)), views


def build(
    recipe: Recipe,
    device: torch.device,
    say: Callable[[str], None],
    *,
    processes: int = 1,
    start: Start | None = None,
) -> Parts:
    """Make every part of a run. Each part's weights are keyed by the seed and its slot, so that swapping one part
    leaves the others' initial weights as they were. Those of `start` take their places.

    Raises:
        UserError: parts that do not fit together, or a part's own objection.
    """
    if device.type == "cuda" and recipe.train.precision == "fp32":
        torch.backends.cudnn.allow_tf32 = False  # fp32 means float32: TF32 keeps 10 bits of the fraction
    data, run, views = build_views(recipe, device, say, processes)

    updater = _made(recipe.target_updater, lambda: recipe.target_updater.build(run))
    with randomness.seeded(run.seed, "backbone"):
        backbone = _made(recipe.backbone, lambda: recipe.backbone.build(replace(run, weights_follow=start is not None)))
    made = _tried(recipe.backbone, backbone, "feature_dim", torch.zeros(2, run.channels, *[run.views[0].size] * 2))
    with randomness.seeded(run.seed, "projector"):
        projector = _made(recipe.projector, lambda: recipe.projector.build(made.shape[1], run))
    made = _tried(recipe.projector, projector, "out_dim", made)
    dim = made.shape[1]
    predictor, spec = None, recipe.predictor
    if spec is not None:
        with randomness.seeded(run.seed, "predictor"):
            predictor = _made(spec, lambda: spec.build(dim, run))
        _tried(spec, predictor, "out_dim", made)
    with randomness.seeded(run.seed, "loss"):
        loss = _made(recipe.loss, lambda: recipe.loss.build(dim, run))

    needs = _made(recipe.loss, lambda: cast(LossModule, loss).needs(run.views))
    _check_fit(recipe, needs, cast(LossModule, loss), cast(TargetModule, updater), predictor, run)
    encoder, train, split = Encoder(backbone, projector), recipe.train, _groups_here(recipe, run)
    if start:  # before the target is made, which begins as a copy
        start.take({"backbone": backbone, "projector": projector, "predictor": predictor, "loss": loss},
                   recipe.backbone, run)  # fmt: skip
    model = _made(
        recipe.target_updater,
        lambda: Siamese(encoder, predictor, cast(TargetModule, updater), run.views, needs, train.forward, split),
    )
    if start:
        start.take({"target": model.target})
    if device.type == "cpu" and train.precision == "bf16":
        refuse_broken_bf16(backbone, run)
    if train.batch_norm == "sync" and processes > 1:
        if device.type == "cpu":
            raise UserError(
                "train.batch_norm = 'sync': torch's SyncBatchNorm needs GPUs; use 'local', or networks with GroupNorm"
            )
        synchronise_batch_norm(model, "the model")
    freezing.freeze(model.online.backbone, model.target, train.freeze or ())
    model.to(device)
    loss.to(device)
    updater.to(device)
    if recipe.train.channels_last:
        model.to(memory_format=torch.channels_last)

    groups = parameter_groups(recipe, model, loss)
    optimizer = _made(recipe.optimizer, lambda: recipe.optimizer.build(groups, run))
    values = _made(recipe.optimizer, lambda: group_values(recipe, groups, run))
    observers: dict[str, object] = {}
    for observer in recipe.observers:
        if observer.enabled:
            name = _free(registry.short_name(type(observer)), observers)
            observers[name] = _made(observer, lambda observer=observer: observer.build(run))  # type: ignore[misc]
    return Parts(
        recipe, run, device, data, views, model, loss, updater, groups, optimizer, values, observers,
    )  # fmt: skip


def _groups_here(recipe: Recipe, run: RunInfo) -> int:
    """Groups of BatchNorm in one process.

    Raises:
        UserError: the processes cannot share them, or each would have one, which cannot be shuffled.
    """
    groups, processes = recipe.train.batch_norm_groups, run.world_size
    if groups > 1 and processes > 1 and (groups % processes or groups == processes):
        raise UserError(
            f"train.batch_norm = 'split:{groups}': {processes} processes need two or more groups each, among which the "
            f"target's images are shuffled; use 'split:{max(2, -(-groups // processes)) * processes}'"
        )
    return max(1, groups // processes)


def parameter_groups(recipe: Recipe, model: Siamese, loss: nn.Module) -> list[ParamGroup]:
    """Trainable parameters by part of the model and by whether they are bias or normalisation parameters.

    These are told by their shape: one dimension or none.
    """
    parts = {
        "backbone": model.online.backbone,
        "projector": model.online.projector,
        "predictor": model.predictor,
        "loss": loss,
    }
    groups = []
    for part, module in parts.items():
        trained = [p for p in module.parameters() if p.requires_grad] if module is not None else []
        split = recipe.optimizer.exclude_bias_and_norm
        for excluded in (False, True):
            chosen = [p for p in trained if (split and p.ndim <= 1) == excluded]
            if chosen:
                groups.append(ParamGroup(part, excluded, chosen))
    return groups


def group_values(recipe: Recipe, groups: list[ParamGroup], run: RunInfo) -> list[GroupValues]:
    """The learning rate and weight decay of each group, scaled by the batch size where the recipe says so."""
    spec = recipe.optimizer
    scale = run.batch_size / spec.lr_reference_batch if spec.lr_reference_batch else 1.0
    values: list[GroupValues] = []
    for group in groups:
        own = spec.groups.get(cast(Any, group.part))
        lr = _rate(own, group.part, "lr", spec.lr, run)
        decay = _rate(own, group.part, "weight_decay", spec.weight_decay, run)
        values.append(
            GroupValues(
                lr=lambda step, lr=lr: lr(step) * scale,  # type: ignore[misc]
                weight_decay=(lambda step: 0.0) if group.excluded else decay,
            )
        )
    return values


def _rate(own: GroupOptions | None, part: str, name: str, common: float | Schedule, run: RunInfo) -> Value:
    """A part's own rate or the common one, as a function of the step.

    Raises:
        UserError: the schedule does not fit the run, or the rate is negative somewhere.
    """
    chosen = getattr(own, name, None)
    key = f"optimizer.{name}" if chosen is None else f"optimizer.groups.{part}.{name}"
    try:
        value = value_of(common if chosen is None else chosen, run)
    except UserError as error:
        raise UserError(*(f"{key}: {line}" for line in error.lines)) from None
    for step in range(0, run.total_steps + 1, max(1, run.total_steps // 1000)):
        if value(step) < 0:
            raise UserError(f"{key}: is {value(step):g} at step {step}; it cannot be negative")
    return value


def _check_fit(
    recipe: Recipe, needs: Needs, loss: LossModule, updater: TargetModule, predictor: nn.Module | None, run: RunInfo
) -> None:
    loss_name = registry.name_of(type(recipe.loss))
    if needs.predictions and recipe.predictor is None:
        raise UserError(
            f"loss {loss_name!r} needs predictions, but the recipe has no [predictor]; add one, such as use = 'mlp'"
        )
    if needs.targets and updater.source == "none":
        raise UserError(
            f"loss {loss_name!r} needs a target branch, but target_updater "
            f"{registry.name_of(type(recipe.target_updater))!r} makes none; use 'ema' or 'stop_gradient'"
        )
    if predictor is not None and not needs.predictions and any(True for _ in predictor.parameters()):
        raise UserError(
            f"loss {loss_name!r} uses no predictions, so the [predictor] would never be trained; remove it, "
            "or set predictor = false"
        )
    if updater.source != "none" and not needs.targets:
        raise UserError(f"loss {loss_name!r} uses no target branch; set target_updater.use = 'none'")
    wanted = {*needs.projections, *needs.predictions, *needs.targets}
    if wanted - set(range(len(run.views))):
        raise UserError(f"loss {loss_name!r} needs views {sorted(wanted)}, but there are only {len(run.views)}")
    parts = recipe.train.accumulate
    if parts > 1 and not loss.additive:
        raise UserError(
            f"train.accumulate = {parts}: loss {loss_name!r} compares the images of a batch with one another, so the "
            "losses of micro-batches do not add up to the loss of the batch; use accumulate = 1"
        )


def _tried(spec: Component, network: nn.Module, attribute: str, given: torch.Tensor) -> torch.Tensor:
    """What a network makes of a batch: one row for each, as wide as its attribute says.

    Raises:
        RunFailed: it is not so; training would only say that two matrices do not fit.
    """
    with features.in_eval_mode(network), torch.random.fork_rng(devices=[]):
        made = _made(spec, lambda: network(given))
    width = getattr(network, attribute, None)
    if not isinstance(made, torch.Tensor) or not isinstance(width, int) or made.shape != (len(given), width):
        shape = list(made.shape) if isinstance(made, torch.Tensor) else type(made).__name__
        promised = f"{attribute} = {width}" if isinstance(width, int) else f"no attribute {attribute!r}"
        raise RunFailed(
            f"{spec.kind} {registry.short_name(type(spec))!r} from {registry.provider_of(type(spec)).origin} gives "
            f"{shape} for an input of {list(given.shape)}, and has {promised}; its kind promises [B, {attribute}]"
        )
    return made


def _free(name: str, taken: dict[str, object]) -> str:
    number = 2
    chosen = name
    while chosen in taken:
        chosen, number = f"{name}_{number}", number + 1
    return chosen


def _made(spec: Component, make: Callable[[], T]) -> T:
    with _blamed_on(spec):
        return make()


@contextmanager
def _blamed_on(spec: Component) -> Iterator[None]:
    """An error inside a component's `build()` names the component and the package it comes from."""
    try:
        yield
    except SslkitError:
        raise
    except (Exception, SystemExit) as error:
        provider = registry.provider_of(type(spec))
        first = str(error).strip().partition("\n")[0]
        name = registry.short_name(type(spec))
        raise RunFailed(
            f"{spec.kind} {name!r} from {provider.origin} failed to build: {type(error).__name__}: {first}"
        ) from error
