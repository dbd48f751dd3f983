"""TOML -> a typed Recipe, and back.

A table is a slot, named after the kind of component that fills it (`projector` and `predictor` both take heads).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError

from sslkit import complaints, installed, local, registry, sources, starting_point
from sslkit.api import (
    Backbone,
    Component,
    DataSource,
    Head,
    Incidental,
    Loss,
    Observer,
    Optimizer,
    TargetUpdater,
    ViewGenerator,
    components,
    slot,
)
from sslkit.errors import UserError
from sslkit.starting_point import InitFrom

DEFAULT_OBSERVERS = ("health", "knn", "probe", "tensorboard", "report")
"""On in every run unless the recipe says `enabled = false`: a loss alone cannot tell good from bad."""

RecipeName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


_BATCH_NORM = r"^(local|sync|split:([2-9]|[1-9]\d+))$"


def _batch_norm(text: str) -> str:
    if not re.fullmatch(_BATCH_NORM, text):
        raise PydanticCustomError("batch_norm", "should be 'local', 'sync' or 'split:N' with N of 2 or more")
    return text


def _requirement(text: str) -> str:
    if problem := installed.malformed(text):
        raise PydanticCustomError(
            "requirement", "should be a requirement such as 'sslkit-vicreg>=0.2' ({problem})", {"problem": problem}
        )
    return text


# An editor sees that much of it; reading sees the rest.
Requirement = Annotated[str, AfterValidator(_requirement), Field(json_schema_extra={"pattern": r"^\s*[A-Za-z0-9]"})]


def _with_defaults(observers: object, info: ValidationInfo) -> object:
    """The observers that are given, as tables or objects, and those that are on by default and not among them."""
    # In a recipe's JSON they are a list; in Python what is no tuple is refused after this.
    if not isinstance(observers, list if info.mode == "json" else tuple):
        return observers
    used = [o.get("use") if isinstance(o, dict) else _name(o) for o in observers]
    return (*observers, *({"use": name} for name in DEFAULT_OBSERVERS if name not in used))


def _name(observer: object) -> str | None:
    try:
        return registry.name_of(type(observer))
    except UserError:  # whatever it is, it is none of the default ones
        return None


class Train(BaseModel):
    """How long, how large, how precise; nothing of the method."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    epochs: PositiveInt
    """Passes over the training images. The last incomplete batch of each is left out."""
    batch_size: Annotated[int, Field(ge=2)]
    """Images per optimizer step: over all processes and micro-batches."""
    accumulate: PositiveInt = 1
    """Micro-batches per optimizer step. BatchNorm then sees batch_size / accumulate images at a time, and losses that
    compare images with one another refuse it, since their micro-batches do not add up."""
    precision: Literal["bf16", "fp32"] = "fp32"
    """`bf16` computes the networks under autocast to bfloat16; losses, parameters and the target stay in float32."""
    channels_last: bool = True
    """Store images and convolution weights channels last, which convolutions in bf16 are fastest with."""
    forward: Literal["separate", "together"] = "separate"
    """`separate` forwards one view at a time, with BatchNorm statistics of one view as in the authors' code;
    `together` forwards all views of one size at once: faster for small batches, other statistics."""
    batch_norm: Annotated[str, AfterValidator(_batch_norm), Field(json_schema_extra={"pattern": _BATCH_NORM})] = "local"
    """`local`: BatchNorm takes its statistics from all images that are forwarded at once in a process. `sync`: from
    those of all processes (torch's SyncBatchNorm, on GPUs). `split:N`: from N equal groups of the batch apart, as if
    each lay on a device of its own, and the target sees the images in another order: MoCo's shuffled BatchNorm (He et
    al. 2020, section 3.3)."""
    compile: Literal["auto"] | bool = "auto"
    """`torch.compile` the views and the networks. `auto` does on a GPU where the run is long enough to win the
    time back; the lock file records what it chose."""
    compile_chosen: Annotated[bool | None, Incidental] = None
    """What `auto` chose, in lock files: where `compile` says the same, the recipe is still the one with `auto`."""
    clip_grad_norm: PositiveFloat | None = None
    """Scale gradients down to this norm over all parameters; without it they are left alone."""
    freeze: tuple[Annotated[str, StringConstraints(min_length=1)], ...] | None = None
    """Modules of the backbone that keep the weights and statistics that they begin with, by name or with `*`:
    `["conv1", "bn1", "layer1"]`. They are not trained, and stay in eval mode."""
    log_every: Annotated[PositiveInt, Incidental] = 50
    """Optimizer steps between records of metrics."""
    checkpoint_every: Annotated[PositiveInt, Incidental] = 1000
    """Optimizer steps between checkpoints; the end of the run always writes one."""
    keep_checkpoints: Annotated[PositiveInt, Incidental] = 3
    """How many of the newest checkpoints to keep, besides the one with the best kNN."""
    keep_every: Annotated[PositiveInt | None, Incidental] = None
    """Optimizer steps: the first checkpoint at or after each multiple of it is kept for good, too."""
    accept: Annotated[tuple[str, ...], Incidental] = ()
    """Findings, by id, that this recipe means: `train` neither stops for them nor warns of them. `check` and `doctor`
    tell an accepted warning as a note; an accepted error stays one, since the run is still not to be trusted."""

    @model_validator(mode="after")
    def _batch_divides(self) -> Train:
        images, rest = divmod(self.batch_size, self.accumulate)
        if rest:
            raise PydanticCustomError(
                "accumulate",
                "{n} does not divide batch_size = {size}",
                {"option": "accumulate", "n": self.accumulate, "size": self.batch_size},
            )
        groups = self.batch_norm_groups
        if images % groups or images // groups < 2:
            raise PydanticCustomError(
                "batch_norm",
                "{images} images cannot be split into {groups} equal groups of two or more; choose another batch_size "
                "or N",
                {"option": "batch_norm", "images": images, "groups": groups},
            )
        return self

    @property
    def retention(self) -> tuple[int, int | None]:
        """How many of the newest checkpoints are kept, and every how many steps one is kept for good."""
        return self.keep_checkpoints, self.keep_every

    @property
    def batch_norm_groups(self) -> int:
        """Groups that BatchNorm takes its statistics from; 1 for all images at once."""
        return int(self.batch_norm.partition(":")[2] or 1)


class Recipe(BaseModel):
    """A method and a run of it: one component per slot."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    name: Annotated[RecipeName, Incidental]
    """Letters, digits, dots, dashes and underscores. The run directory is `runs/NAME` unless told otherwise."""
    seed: NonNegativeInt = 0
    """All randomness is keyed by it: weights, data order, views."""
    requires: Annotated[tuple[Requirement, ...], Incidental] = ()
    """Packages that have to be installed, as pip names them: `["sslkit-vicreg>=0.2"]`. Those of a base stay."""
    data_source: Annotated[SerializeAsAny[DataSource], slot("data_source")]
    """Where images come from."""
    view_generator: Annotated[SerializeAsAny[ViewGenerator], slot("view_generator")]
    """The views of an image that the method compares."""
    backbone: Annotated[SerializeAsAny[Backbone], slot("backbone")]
    """The encoder whose features are the purpose of the training."""
    projector: Annotated[SerializeAsAny[Head], slot("head")]
    """The head between features and loss, on both branches."""
    predictor: Annotated[SerializeAsAny[Head], slot("head")] | None = None
    """The head of the online branch alone; leave it out for methods without one."""
    loss: Annotated[SerializeAsAny[Loss], slot("loss")]
    """What the training minimises."""
    target_updater: Annotated[SerializeAsAny[TargetUpdater], slot("target_updater")]
    """How the target network follows the online network."""
    optimizer: Annotated[SerializeAsAny[Optimizer], slot("optimizer")]
    """The optimizer, with its learning rate and weight decay."""
    init_from: (
        Annotated[InitFrom, BeforeValidator(starting_point.filled, json_schema_input_type=str | InitFrom)] | None
    ) = None
    """Whose weights the networks begin with: a run's directory, `timm:NAME`, a `.safetensors` file, or a table. Without
    it they are drawn from the seed. A run that goes on has its own weights, and the others may be gone by then."""
    train: Train
    """How long, how large, how precise."""
    observers: Annotated[
        tuple[Annotated[SerializeAsAny[Observer], slot("observer")], ...],
        Incidental,
        BeforeValidator(_with_defaults),
        Field(validate_default=True),
    ] = ()
    """Who looks on. health, knn, probe, tensorboard and report do unless switched off with `enabled = false`."""

    def replace(self, *, allow_local_code: bool = False, **changes: Any) -> Recipe:
        """The recipe with other values for some of its keys: `recipe.replace(loss=NTXent(), predictor=None)`.

        Args:
            allow_local_code: Let the changes run code of files (`projector={"use": "./my_head.py:WideHead"}`).
            changes: By key.

        Raises:
            pydantic.ValidationError: a key is unknown or its value does not belong there.
        """
        with local.allowed(allow_local_code):
            return type(self).model_validate({**dict(self), **changes})

    def to_toml(self) -> str:
        """The recipe with every option spelt out, ready to be trained again. What is unset is left out."""
        return tomli_w.dumps(self.tables())

    def to_toml_with(self, uses: Mapping[str, str]) -> str:
        """As `to_toml`, with other words for some components' `use`: local files that were copied elsewhere."""
        return tomli_w.dumps(local.renamed(self.tables(), lambda use: uses.get(use, use)))

    def tables(self) -> dict[str, Any]:
        """Every option, as TOML would read it; what is unset is left out."""
        spelt_out: dict[str, Any] = _without_none(json.loads(self.model_dump_json()))
        return spelt_out

    def computing(self) -> dict[str, Any]:
        """The options that change what the run computes: no cadences, observers, workers or paths."""
        computed = self.tables()
        _drop_incidental(self, computed)
        if self.train.compile_chosen == self.train.compile:
            computed["train"]["compile"] = "auto"
        if self.init_from is not None and self.init_from.weights:
            for name in (*starting_point.PLACES, "checkpoint"):  # the weights say it, wherever they lie
                computed["init_from"].pop(name, None)
        names = {local.use_of(part): local.computed_name(part) for part in self.local_parts()}
        without_places: dict[str, Any] = local.renamed(computed, lambda use: names.get(use, use))
        return without_places

    def hash(self) -> str:
        """Twelve hex digits of sha256 over `computing()`."""
        canonical = json.dumps(self.computing(), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    def parts(self) -> list[tuple[str, Component]]:
        """`(slot, component)` of every slot that is filled, observers included, schedules inside them included."""
        found = []
        for name in type(self).model_fields:
            value = getattr(self, name)
            for top in value if name == "observers" else (value,):
                if isinstance(top, Component):
                    found += [(name, inner) for inner in components(top)]
        return found

    def provenance(self) -> list[dict[str, str]]:
        """Which package, in which version, each component comes from."""
        used = {registry.provider_of(type(part)) for _, part in self.parts()}
        return [provider.provenance() for provider in sorted(used, key=lambda p: (p.kind, p.name))]

    def local_parts(self) -> list[type[Component]]:
        """The classes of its components that come from files beside a recipe."""
        return list(dict.fromkeys(type(part) for _, part in self.parts() if local.source_of(type(part))))


# ---------------------------------------------------------------- reading


def read_recipe(source: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by path or shipped name, with `key=value` overrides in dotted form.

    Raises:
        UserError: one line for each thing that is wrong, all at once.
    """
    path = sources.locate(source)
    return parse_recipe(sources.read(path), str(path), overrides)


def parse_recipe(text: str, file: str, overrides: Sequence[str] = ()) -> Recipe:
    """As `read_recipe`, from text; `file` is the name that errors show, and where a path that it extends starts."""
    tables, origin = sources.resolve(text, file, overrides)
    stem = Path(file).stem.removesuffix(".lock")
    tables.setdefault("name", stem.encode("utf-8", "replace").decode())  # a file's name may be any bytes
    for name, info in Recipe.model_fields.items():
        if info.default is None and tables.get(name) is False:
            del tables[name]  # TOML has no null: `predictor = false` takes the base's predictor away
    _check_requirements(tables, origin)
    try:
        return Recipe.model_validate_json(json.dumps(tables))
    except ValidationError as error:
        raise UserError(*complaints.lines(error, tables, origin.of, Recipe)) from None


def _check_requirements(tables: dict[str, Any], origin: sources.Origin) -> None:
    """Before any component is loaded, since what is not installed is why one is not there.

    Raises:
        UserError: for each requirement that is not met; what is no requirement is left to validation.
    """
    listed = tables.get("requires")
    problems = []
    for number, text in enumerate(listed if isinstance(listed, list) else ()):
        if isinstance(text, str) and not installed.malformed(text) and (problem := installed.unmet(text)):
            problems.append(f"{origin.of(('requires', number))}: {problem}")
    if problems:
        lacking = ", ".join(complaints.not_installed(tables, Recipe))
        raise UserError(*(f"{line} (nothing installed offers {lacking})" if lacking else line for line in problems))


# ---------------------------------------------------------------- writing


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None and inner != {}}
    if isinstance(value, list):
        return [_without_none(inner) for inner in value]
    return value


def _drop_incidental(value: Any, dumped: Any) -> None:
    if isinstance(value, BaseModel) and isinstance(dumped, dict):
        for name, info in type(value).model_fields.items():
            if Incidental in info.metadata:
                dumped.pop(name, None)
            elif name in dumped:
                _drop_incidental(getattr(value, name), dumped[name])
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            if name in dumped:
                _drop_incidental(inner, dumped[name])
    elif isinstance(value, list | tuple) and len(value) == len(dumped):
        for inner, table in zip(value, dumped, strict=True):
            _drop_incidental(inner, table)
