"""`init_from`: where a recipe takes its first weights from, when they are not to be drawn. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    SerializerFunctionWrapHandler,
    StringConstraints,
    ValidationInfo,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from sslkit import local

Part = Literal["backbone", "projector", "predictor", "target", "loss"]
PARTS: tuple[Part, ...] = get_args(Part)
"""What weights may be taken for, in the order in which it is told."""


def _with_backbone(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    if "backbone" not in parts:
        raise PydanticCustomError("parts", "should name the backbone, which everything behind it was trained on")
    return parts


PLACES = ("run", "timm", "file")
TIMM = "timm:"
LOCAL = "local-dir:"
"""How timm's name of a folder on this machine begins."""
SUFFIX = ".safetensors"
SEEN_FROM = "a path in a recipe is seen from the recipe's folder, one in --set from the working directory"
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".pkl")
"""What torch.save writes: opening it may run code, so it is refused, with the line that converts it."""


class InitFrom(BaseModel):
    """Whose weights are the first ones here: a run's, timm's, or those of a file; one of the three.

    `init_from = "runs/x"` is short for `{ run = "runs/x" }`, `"timm:resnet50.a1_in1k"` for `{ timm =
    "resnet50.a1_in1k" }`, and a path that ends in `.safetensors` for `{ file = ... }`.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    run: Annotated[str, StringConstraints(min_length=1)] | None = None
    """Directory of a run, or the folder of one of its checkpoints. A path in a recipe is seen from the recipe's
    folder, one in `--set` from the working directory."""
    timm: Annotated[str, StringConstraints(min_length=1)] | None = None
    """Name of pretrained weights in timm, `resnet50.a1_in1k`, for a backbone that is timm's: they are downloaded. Or
    `local-dir:FOLDER`, where the path is seen as that of a run is."""
    file: Annotated[str, StringConstraints(min_length=1)] | None = None
    """A `.safetensors` file with the state dict of the backbone, as `sslkit export` and timm write it. The path is seen
    as that of a run is."""
    prefix: str | None = None
    """With `file`: what names in it begin with, as `encoder.`; it is taken off, and other tensors are left out."""
    ignore: tuple[str, ...] | None = None
    """With `file`: tensors to leave out, by name without the prefix or with `*`, as `["fc.*"]` for a classifier."""
    checkpoint: Literal["last", "best"] | NonNegativeInt = "last"
    """`last`, the newest sound one; `best`, that with the highest kNN accuracy; or the number of a step."""
    branch: Literal["evaluated", "online", "target"] = "evaluated"
    """The network of the run that the online network begins as. `evaluated` is the one that the run measures and
    exports: the online network of BYOL, the target of DINO."""
    parts: Annotated[tuple[Part, ...], AfterValidator(_with_backbone)] | None = None
    """What to take of a run. Without it everything that both have, and all of it has to fit. Files and timm have a
    backbone alone."""
    weights: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """SHA-256 of the weights; others are refused. Lock files have it, beside the step."""

    @model_validator(mode="after")
    def _one_place(self) -> InitFrom:
        given = [name for name in PLACES if getattr(self, name) is not None]
        if len(given) != 1:
            said = " and ".join(map(repr, given)) or "none"
            raise PydanticCustomError(
                "place", "needs exactly one of 'run', 'timm' and 'file', not {said}", {"said": said}
            )
        if self.run is None and (self.checkpoint, self.branch) != ("last", "evaluated"):
            raise PydanticCustomError("place", "'checkpoint' and 'branch' are those of a run")
        if self.run is None and self.parts not in (None, ("backbone",)):
            raise PydanticCustomError("place", "'parts' can only be those of a run: files and timm have a backbone")
        if self.file is None and (self.prefix is not None or self.ignore is not None):
            raise PydanticCustomError("place", "'prefix' and 'ignore' are about the names in a 'file'")
        return self

    @model_serializer(mode="wrap")
    def _as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what only a run has, where there is none."""
        made: dict[str, Any] = handler(self)
        return made if self.run is not None else {k: v for k, v in made.items() if k not in ("checkpoint", "branch")}

    @property
    def place(self) -> str:
        """Which one of `run`, `timm` and `file` it is."""
        return next(name for name in PLACES if getattr(self, name) is not None)

    @property
    def words(self) -> str:
        """`runs/x, step 840`, `timm's resnet50.a1_in1k`, `weights.safetensors`."""
        if self.run is None:
            return f"timm's {self.timm_name}" if self.file is None else str(local.near(Path(self.file)))
        step = f"step {self.checkpoint}" if isinstance(self.checkpoint, int) else f"its {self.checkpoint} checkpoint"
        return f"{local.near(Path(self.run))}, {step}"

    @property
    def source(self) -> str:
        """As `words`, with the folders of this machine left out: for whoever has another."""
        last = {key: Path(path).name for key in ("run", "file") if (path := getattr(self, key)) is not None}
        timm = self.timm and moved(self.timm, lambda folder: Path(folder).name)
        return self.model_copy(update={**last, "timm": timm}).words

    @property
    def timm_name(self) -> str | None:
        """What timm is asked for, a folder as a reader would write it."""
        return self.timm and moved(self.timm, lambda folder: str(local.near(Path(folder))))


def _table(value: object) -> object:
    """A text alone as the table that it is short for."""
    if not isinstance(value, str | os.PathLike):
        return value
    text = os.fspath(value)
    if isinstance(text, str) and text.startswith(TIMM):
        return {"timm": text.removeprefix(TIMM)}
    return {"file" if isinstance(text, str) and text.endswith((SUFFIX, *PICKLES)) else "run": text}


def filled(value: object, info: ValidationInfo) -> object:
    """What a recipe says as an `InitFrom`, for pydantic."""
    table = _table(value)
    if isinstance(table, InitFrom):
        return table
    if not isinstance(table, dict):
        raise PydanticCustomError(
            "init_from", "should be a run's directory, or a table with a key 'run', 'timm' or 'file'"
        )
    # A recipe comes as JSON, where a list may fill a tuple.
    return InitFrom.model_validate_json(json.dumps(table)) if info.mode == "json" else InitFrom.model_validate(table)


def moved(name: str, move: Callable[[str], str]) -> str:
    """A name of timm's, with its path changed where it is that of a folder."""
    folder = name.removeprefix(LOCAL)
    return LOCAL + move(folder) if folder and folder != name else name


def anchored(tables: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A copy of a recipe's tables in which `init_from` is a table with an absolute path, seen from a folder."""
    given = _table(tables.get("init_from"))
    if not isinstance(given, dict):
        return dict(tables)

    def absolute(path: str) -> str:
        return Path(os.path.normpath(Path.cwd() / folder / path)).as_posix()

    seen = {name: absolute(given[name]) for name in ("run", "file") if isinstance(given.get(name), str) and given[name]}
    if isinstance(given.get("timm"), str):
        seen["timm"] = moved(given["timm"], absolute)
    # A text that is no path has to become a table, too: other files' tables are laid over it.
    return {**tables, "init_from": {**given, **seen}}
