"""TOML -> a typed Recipe, and back.

A table is a slot, named after the kind of component that fills it (`projector` and `predictor` both take heads).
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    StringConstraints,
    ValidationError,
)

from sslkit import complaints, registry
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
from sslkit.errors import UserError, did_you_mean
from sslkit.positions import lines_of

DEFAULT_OBSERVERS = ("health", "knn", "tensorboard")
"""On in every run unless the recipe says `enabled = false`: a loss alone cannot tell good from bad."""

RecipeName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


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
    compile: Literal["auto"] | bool = "auto"
    """`torch.compile` the views and the networks. `auto` does on a GPU where the run is long enough to win the
    time back; the lock file records what it chose."""
    clip_grad_norm: PositiveFloat | None = None
    """Scale gradients down to this norm over all parameters; without it they are left alone."""
    log_every: Annotated[PositiveInt, Incidental] = 50
    """Optimizer steps between records of metrics."""
    checkpoint_every: Annotated[PositiveInt, Incidental] = 1000
    """Optimizer steps between checkpoints; the end of the run always writes one."""
    keep_checkpoints: Annotated[PositiveInt, Incidental] = 3
    """How many of the newest checkpoints to keep, besides the one with the best kNN."""
    accept: Annotated[tuple[str, ...], Incidental] = ()
    """Findings, by id, that would stop the run before it starts and that this recipe means."""


class Recipe(BaseModel):
    """A method and a run of it: one component per slot."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    name: Annotated[RecipeName, Incidental]
    """Letters, digits, dots, dashes and underscores. The run directory is `runs/NAME` unless told otherwise."""
    seed: NonNegativeInt = 0
    """All randomness is keyed by it: weights, data order, views."""
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
    train: Train
    """How long, how large, how precise."""
    observers: Annotated[tuple[Annotated[SerializeAsAny[Observer], slot("observer")], ...], Incidental] = ()
    """Who looks on. health, knn and tensorboard do unless switched off with `enabled = false`."""

    def to_toml(self) -> str:
        """The recipe with every option spelt out, ready to be trained again. What is unset is left out."""
        return tomli_w.dumps(_without_none(json.loads(self.model_dump_json())))

    def computing(self) -> dict[str, Any]:
        """The options that change what the run computes: no cadences, observers, workers or paths."""
        computed: dict[str, Any] = _without_none(json.loads(self.model_dump_json()))
        _drop_incidental(self, computed)
        return computed

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
        used = {(part.kind, registry.name_of(type(part))) for _, part in self.parts()}
        return [registry.find(kind, name).provenance() for kind, name in sorted(used)]


def differences(old: Recipe, new: Recipe) -> list[str]:
    """One line for each option that computes something and differs: `optimizer.lr: 0.1 -> 0.2`."""
    before, after = _flat(old.computing()), _flat(new.computing())
    return [
        f"{key}: {before.get(key, 'not set')} -> {after.get(key, 'not set')}"
        for key in [*before, *(k for k in after if k not in before)]
        if before.get(key) != after.get(key)
    ]


def _flat(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


# ---------------------------------------------------------------- reading


def shipped() -> dict[str, Path]:
    """The recipes that come with sslkit, by name."""
    here = Path(__file__).parent
    installed, checkout = here / "recipes", here.parent / "recipes"
    folder = installed if installed.is_dir() else checkout
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def locate(recipe: str) -> Path:
    """A recipe's file: a path if it holds `/` or ends in `.toml`, else the name of a shipped recipe.

    Raises:
        UserError: there is no such file or shipped recipe.
    """
    if "/" in recipe or "\\" in recipe or recipe.endswith(".toml"):
        path = Path(recipe)
        if path.is_file():
            return path
        if path.is_dir():
            raise UserError(f"{recipe}: is a folder; give a recipe file in it")
        near = did_you_mean(path.stem, shipped())
        raise UserError(f"{recipe}: no such recipe file{near and near + ' (a shipped recipe, without .toml)'}")
    known = shipped()
    if recipe not in known:
        raise UserError(
            f"{recipe}: no shipped recipe has this name{did_you_mean(recipe, known)} ({', '.join(known)}); "
            "a file's path ends in .toml"
        )
    return known[recipe]


def place(source: str, overrides: Sequence[str], *keys: str) -> str:
    """`recipe.toml:7`, or the override, for the nearest key at or above the given ones."""
    path = locate(source)
    text = path.read_text(encoding="utf-8")
    origin = Origin(str(path), lines_of(text))
    _override(tomllib.loads(text), overrides, origin)
    return origin.of(keys)


@dataclass
class Origin:
    """Where each key of a recipe was written, for errors that point there."""

    file: str
    lines: Mapping[tuple[str | int, ...], int] = field(default_factory=dict)
    overridden: dict[tuple[str | int, ...], str] = field(default_factory=dict)

    def of(self, path: tuple[str | int, ...]) -> str:
        """`recipe.toml:7` or `--set key=value` for the nearest key at or above `path`."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.overridden:
                return f"--set {self.overridden[path[:length]]}"
            if path[:length] in self.lines:
                return f"{self.file}:{self.lines[path[:length]]}"
        return f"{self.file}:1"


def read_recipe(source: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by path or shipped name, with `key=value` overrides in dotted form.

    Raises:
        UserError: one line for each thing that is wrong, all at once.
    """
    path = locate(source)
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start}); a recipe is a TOML file") from None
    return parse_recipe(text, str(path), overrides)


def parse_recipe(text: str, file: str, overrides: Sequence[str] = ()) -> Recipe:
    """As `read_recipe`, from text; `file` is the name that errors show."""
    try:
        tables = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(_syntax_error(file, error)) from None
    origin = Origin(file, lines_of(text))
    _override(tables, overrides, origin)
    tables.setdefault("name", Path(file).stem.removesuffix(".lock"))
    observers = tables.setdefault("observers", [])
    if isinstance(observers, list):
        used = [o.get("use") for o in observers if isinstance(o, dict)]
        observers += [{"use": name} for name in DEFAULT_OBSERVERS if name not in used]
    try:
        return Recipe.model_validate_json(json.dumps(tables, default=str))
    except ValidationError as error:
        raise UserError(*complaints.lines(error, tables, origin.of, Recipe)) from None


def _syntax_error(file: str, error: Exception) -> str:
    text = str(error)
    if match := re.search(r" \(at line (\d+), column (\d+)\)$", text):
        return f"{file}:{match[1]}: not valid TOML: {text[: match.start()]} (column {match[2]})"
    return f"{file}: not valid TOML: {text.removesuffix(' (at end of document)') or 'nested too deeply'}"


# ---------------------------------------------------------------- --set


def _override(tables: dict[str, Any], overrides: Iterable[str], origin: Origin) -> None:
    """Apply `--set`: a changed `use` first, since it resets the rest of its table."""
    parsed = []
    for override in overrides:
        key, equals, raw = override.partition("=")
        keys = tuple(key.strip().split("."))
        if not equals or not all(keys):
            raise UserError(f"--set {override}: should read key=value, such as train.batch_size=64")
        parsed.append((keys, _typed(raw.strip()), override))
    for keys, value, override in sorted(parsed, key=lambda item: item[0][-1] != "use"):
        _set(tables, keys, value, override, origin)


def _typed(raw: str) -> object:
    """A value as TOML reads it; a bare word is a string."""
    try:
        return tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        return raw


def _set(tables: dict[str, Any], keys: tuple[str, ...], value: object, override: str, origin: Origin) -> None:
    table: Any = tables
    path: tuple[str | int, ...] = ()
    rest = list(keys)
    if rest[0] == "observers" and len(rest) > 1:
        observers = tables.setdefault("observers", [])
        name = rest[1]
        if not isinstance(observers, list):
            return  # a mistake in the file, which validation tells
        at = next((i for i, o in enumerate(observers) if isinstance(o, dict) and o.get("use") == name), len(observers))
        if at == len(observers):
            observers.append({"use": name})
            origin.overridden["observers", at] = override
        table, path, rest = observers[at], ("observers", at), rest[2:]
        if not rest or rest == ["use"]:
            raise UserError(f"--set {override}: should name an option, such as observers.{name}.enabled=false")
    for key in rest[:-1]:
        path = (*path, key)
        if not isinstance(table.get(key), dict):
            table[key] = {}
            origin.overridden[path] = override
        table = table[key]
    if rest[-1] == "use" and table.get("use") != value:
        table.clear()
        origin.overridden[path] = override
        for below in [p for p in origin.lines if p[: len(path)] == path and len(p) > len(path)]:
            del origin.lines[below]  # type: ignore[attr-defined]
    table[rest[-1]] = value
    origin.overridden[(*path, rest[-1])] = override


# ---------------------------------------------------------------- writing


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None and inner != {}}
    if isinstance(value, list):
        return [_without_none(inner) for inner in value]
    return value


def _drop_incidental(model: BaseModel, dumped: dict[str, Any]) -> None:
    for name, info in type(model).model_fields.items():
        value = getattr(model, name)
        if Incidental in info.metadata:
            dumped.pop(name, None)
        elif isinstance(value, BaseModel) and isinstance(dumped.get(name), dict):
            _drop_incidental(value, dumped[name])
