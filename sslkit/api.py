"""The shapes of components: everything the author of a plugin imports.

A component is a pydantic class whose fields are the options a recipe may set; the docstring under a field is
its help text everywhere. `build()` makes the live object, and torch is imported there, not before. The live
objects' contracts are in `sslkit.contracts` and can be imported from here too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar, cast

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    model_serializer,
)
from pydantic_core import PydanticCustomError

from sslkit import registry
from sslkit.batch import Branches, LossTerms, Needs, ViewSpec
from sslkit.contracts import (
    BackboneModule,
    DataInfo,
    HeadModule,
    Images,
    ImageSet,
    LossModule,
    Ordered,
    Originals,
    OriginalViewMaker,
    ParamGroup,
    Portable,
    Pretrained,
    RunInfo,
    TargetModule,
    ViewMaker,
)
from sslkit.errors import UserError
from sslkit.installed import API_VERSION
from sslkit.looking import FileReader, Look

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = [
    "API_VERSION", "Backbone", "BackboneModule", "Branches", "Component", "DataInfo", "DataSource", "FileReader",
    "GroupOptions", "Head", "HeadModule", "ImageSet", "Images", "Incidental", "Look", "Loss", "LossModule", "LossTerms",
    "Needs", "Observer", "Optimizer", "Ordered", "OriginalViewMaker", "Originals", "ParamGroup", "Portable",
    "Pretrained", "RunInfo", "Schedule", "Scheduled", "TargetModule", "TargetUpdater", "Value", "ViewGenerator",
    "ViewMaker", "ViewSpec", "slot", "value_of",
]  # fmt: skip

# ---------------------------------------------------------------- components

T = TypeVar("T")


class Component(BaseModel):
    """A spec: options in, live object out. Unknown options and loose types are refused."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )
    kind: ClassVar[str] = ""

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        for name in ("use", "kind", "build"):
            if name in cls.model_fields:
                raise TypeError(f"{cls.__qualname__}: an option cannot be called {name!r}, which means something else")

    @model_serializer(mode="wrap")
    def _with_use(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {"use": registry.name_of(type(self)), **handler(self)}


class Incidental:
    """Marks an option that does not change what a run computes (workers, paths, cadences).

    `workers: Annotated[int, Incidental] = 4`. Such options are left out of the recipe's hash, so that a run may go
    on with other values.
    """


def slot(kind: str) -> BeforeValidator:
    """Fill a table from the component its `use` names: `Annotated[SerializeAsAny[Loss], slot("loss")]`."""

    def fill(value: object, info: ValidationInfo) -> object:
        if not isinstance(value, dict):
            if isinstance(value, Component):
                return value
            raise PydanticCustomError("slot", "should be a table with a key 'use' that names a {kind}", {"kind": kind})
        table = dict(value)
        use = table.pop("use", None)
        if not isinstance(use, str):
            listed = ", ".join(registry.names(kind))
            problem = "needs a key 'use' that names a {kind}: {listed}" if use is None else "'use' should be a name"
            raise PydanticCustomError("slot", problem, {"kind": kind, "listed": listed})
        try:
            component = registry.load(kind, use)
        except UserError as error:
            raise PydanticCustomError("component", "{text}", {"text": str(error)}) from None
        # A recipe comes as JSON, where a list may fill a tuple; in Python the types are the author's.
        if info.mode == "json":
            return component.model_validate_json(json.dumps(table))
        return component.model_validate(table)

    return BeforeValidator(fill)


class Schedule(Component):
    """A number that changes over the run: a pure function of the optimizer step."""

    kind: ClassVar[str] = "schedule"

    def build(self, run: RunInfo) -> Callable[[int], float]:
        """`value(step)` for step 0 .. `run.total_steps`. Update s uses the value at s - 1.

        Contract:
            shapes: A step, int, -> one finite number.
            dtype: A Python float, not a tensor.
            device: The host.
            autocast: Not concerned.
            processes: The same value in each process.
            state: None is saved: the step is all that the value depends on.
            randomness: None.
            called: For any step, in any order, more than once: all over the run before training, to refuse what an
                option does not allow, then before each step.
        """
        raise NotImplementedError


def _number_or_schedule(value: object, info: ValidationInfo) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float | dict | Schedule):
        raise PydanticCustomError("scheduled", "should be a number or a schedule such as {example}", {
            "example": "{ use = 'cosine', start = 1.0, end = 0.0 }"
        })  # fmt: skip
    if isinstance(value, float) and not math.isfinite(value):
        raise PydanticCustomError("scheduled", "should be a finite number")
    if isinstance(value, dict):
        return cast("Any", slot("schedule").func)(value, info)
    return float(value) if isinstance(value, int) else value


Scheduled = Annotated[float | SerializeAsAny[Schedule], BeforeValidator(_number_or_schedule)]
"""The type of an option that may change over the run: a plain number, or a table that names a schedule."""

Value = Callable[[int], float]
"""A schedule that was built: step -> value."""


def value_of(scheduled: float | Schedule, run: RunInfo) -> Value:
    """A `Scheduled` option as a function of the step."""
    if isinstance(scheduled, Schedule):
        return scheduled.build(run)
    constant = float(scheduled)
    return lambda step: constant


# ---------------------------------------------------------------- data


class DataSource(Component):
    """Where images come from."""

    kind: ClassVar[str] = "data_source"

    def build(self, info: DataInfo) -> ImageSet:
        """Open the source.

        Raises:
            UserError: what is missing, and what to put where.
        """
        raise NotImplementedError

    def look(self, info: DataInfo, limit: int = 0) -> Look:
        """What lies there, for `sslkit init`: sizes, kinds, classes, files that are equal or cannot be read. May be
        left out.

        Args:
            info: As `build` takes it.
            limit: How many files to decode, spread over all; 0 for all.

        Raises:
            UserError: there is nothing to look at.
        """
        raise UserError(f"data_source {registry.name_of(type(self))!r} cannot say what its images are like")

    def reader(self) -> FileReader:
        """How the source reads one file, for files that are in none of its sets. May be left out.

        Raises:
            UserError: it reads no single files.
        """
        raise UserError(f"data_source {registry.name_of(type(self))!r} reads no single files")


# ---------------------------------------------------------------- views


class ViewGenerator(Component):
    """Makes the views of an image that a method compares."""

    kind: ClassVar[str] = "view_generator"

    def build(self, run: RunInfo) -> ViewMaker:
        raise NotImplementedError


# ---------------------------------------------------------------- networks


class Backbone(Component):
    """The encoder whose features are the purpose of the training."""

    kind: ClassVar[str] = "backbone"

    def build(self, run: RunInfo) -> nn.Module:
        """A module that meets `BackboneModule`."""
        raise NotImplementedError

    def portable(self, run: RunInfo) -> Portable | None:
        """How a public library builds the same network; None where none does. May be left out."""
        return None

    def pretrained_weights(self, name: str, run: RunInfo) -> Pretrained:
        """The weights that a public library has under this name, for what `build` makes. May be left out.

        Raises:
            UserError: there are none, or they do not fit.
        """
        raise UserError(f"init_from.timm: backbone {registry.name_of(type(self))!r} is not one of timm's")


class Head(Component):
    """A small network after the backbone (slot `projector`) or after the projector (slot `predictor`)."""

    kind: ClassVar[str] = "head"

    def build(self, in_dim: int, run: RunInfo) -> nn.Module:
        """A module that meets `HeadModule`."""
        raise NotImplementedError


# ---------------------------------------------------------------- loss


class Loss(Component):
    """What the training minimises, computed from all branches and all views."""

    kind: ClassVar[str] = "loss"

    def build(self, dim: int, run: RunInfo) -> nn.Module:
        """A module that meets `LossModule`. `dim` is the projector's output dimension."""
        raise NotImplementedError


# ---------------------------------------------------------------- target


class TargetUpdater(Component):
    """How the target network follows the online network."""

    kind: ClassVar[str] = "target_updater"

    def build(self, run: RunInfo) -> nn.Module:
        """A module that meets `TargetModule`."""
        raise NotImplementedError


# ---------------------------------------------------------------- optimizer


class GroupOptions(BaseModel):
    """Learning rate and weight decay of one part of the model, where they differ from the rest."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    lr: Scheduled | None = None
    """Learning rate of this part; without it, the optimizer's."""
    weight_decay: Scheduled | None = None
    """Weight decay of this part; without it, the optimizer's."""


class Optimizer(Component):
    """The optimizer. The engine sets `lr` and `weight_decay` of every group before each step."""

    kind: ClassVar[str] = "optimizer"

    lr: Scheduled
    """Learning rate: a number or a schedule."""
    lr_reference_batch: PositiveInt | None = None
    """If given, `lr` is meant for this batch size and is multiplied by batch_size / lr_reference_batch."""
    weight_decay: Scheduled = 0.0
    """Weight decay: a number or a schedule."""
    exclude_bias_and_norm: bool = True
    """Leave bias and normalisation parameters (one dimension or none) out of weight decay and LARS adaptation."""
    groups: dict[Literal["backbone", "projector", "predictor", "loss"], GroupOptions] = Field(default_factory=dict)
    """Other values for one part of the model: `[optimizer.groups.predictor]` with `lr` or `weight_decay`."""

    def build(self, groups: list[ParamGroup], run: RunInfo) -> torch.optim.Optimizer:
        """A torch optimizer over `[g.as_torch() for g in groups]`, whose `lr` and `weight_decay` are set later.

        An optimizer that sets `_step_supports_amp_scaling` and reads the 0-dim tensor `self.found_inf` as torch's
        fused ones do (1 means: change nothing) never makes the engine wait for the device.

        Contract:
            shapes: Parameters of any shape, in the groups that `build` was given and in their order.
            dtype: Parameters and gradients float32. `lr` and `weight_decay` of a group are Python floats.
            device: Built after the parameters were moved. State goes where they are.
            autocast: `step` runs outside autocast.
            processes: Each process takes the same step, from gradients that are equal by then.
            state: `state_dict()`, in every checkpoint: tensors, numbers, texts, lists and tables of them.
            randomness: None is needed; torch's default generator is keyed by seed and step.
            called: `step()` without a closure once for each optimizer step, after clipping. Gradients are None where a
                parameter took no part. A step that is not finite is left out: `step` is not called, or `found_inf` is
                1.
        """
        raise NotImplementedError


# ---------------------------------------------------------------- observer


class Observer(Component):
    """Looks on: measures, records, draws. Never changes what the next step computes."""

    kind: ClassVar[str] = "observer"
    measures: ClassVar[tuple[str, ...]] = ()
    """The keys of its records that tell how good the features are: `("knn_top1",)`. A run without any is warned of."""

    enabled: bool = True
    """False leaves the observer out."""

    def build(self, run: RunInfo) -> object:
        """An object with hook implementations of `sslkit.events`; if it has state, also `state_dict` and
        `load_state_dict`.

        Contract:
            shapes: `Branches` as a loss gets them, detached, with all micro-batches joined.
            dtype: Branches and features float32 or better. A record takes numbers and 0-dim tensors.
            device: Branches and `run.features` are on the device, the data source's images and labels on the CPU.
            autocast: Events are outside autocast; `run.features` has the run's precision.
            processes: The engine runs one.
            state: What `state_dict` gives, in every checkpoint: tensors, numbers, texts, lists and tables of them.
            randomness: A generator of its own, keyed by `run.info.seed` and `run.step`. Draws from torch's default one
                change no step, since the engine keys that anew, and are not repeated by a resumed run.
            called: By the events below, in the order of the recipe's observers, in the training's own thread: a step
                waits for them.
        """
        raise NotImplementedError


KIND_CLASSES: Mapping[str, type[Component]] = {
    c.kind: c for c in (Backbone, Head, Loss, TargetUpdater, ViewGenerator, DataSource, Optimizer, Schedule, Observer)
}


def components(component: Component) -> Iterator[Component]:
    """A component and every component inside it (schedules), for whoever walks a recipe."""
    yield component
    for name in type(component).model_fields:
        yield from _inside(getattr(component, name))


def _inside(value: object) -> Iterator[Component]:
    if isinstance(value, Component):
        yield from components(value)
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _inside(getattr(value, name))
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _inside(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _inside(inner)
