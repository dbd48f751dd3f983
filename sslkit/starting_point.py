"""`init_from`: where a recipe takes its first weights from, when they are not to be drawn. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeInt, StringConstraints, ValidationInfo
from pydantic_core import PydanticCustomError

from sslkit import local

Part = Literal["backbone", "projector", "predictor", "target", "loss"]
PARTS: tuple[Part, ...] = get_args(Part)
"""What weights may be taken for, in the order in which it is told."""


def _with_backbone(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    if "backbone" not in parts:
        raise PydanticCustomError("parts", "should name the backbone, which everything behind it was trained on")
    return parts


class InitFrom(BaseModel):
    """A run whose weights are the first ones here. `init_from = "runs/x"` is short for `{ run = "runs/x" }`."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    run: Annotated[str, StringConstraints(min_length=1)]
    """Directory of the run, or the folder of one of its checkpoints. A path in a recipe is seen from the recipe's
    folder, one in `--set` from the working directory."""
    checkpoint: Literal["last", "best"] | NonNegativeInt = "last"
    """`last`, the newest sound one; `best`, that with the highest kNN accuracy; or the number of a step."""
    branch: Literal["evaluated", "online", "target"] = "evaluated"
    """The network of the run that the online network begins as. `evaluated` is the one that the run measures and
    exports: the online network of BYOL, the target of DINO."""
    parts: Annotated[tuple[Part, ...], AfterValidator(_with_backbone)] | None = None
    """What to take. Without it everything that both have, and all of it has to fit."""
    weights: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """SHA-256 of the weights' files; other weights are refused. Lock files have it, beside the step."""

    @property
    def words(self) -> str:
        """`runs/x, step 840`."""
        step = f"step {self.checkpoint}" if isinstance(self.checkpoint, int) else f"its {self.checkpoint} checkpoint"
        return f"{local.near(Path(self.run))}, {step}"


def _table(value: object) -> object:
    """A path alone as the table that it is short for."""
    return {"run": os.fspath(value)} if isinstance(value, str | os.PathLike) else value


def filled(value: object, info: ValidationInfo) -> object:
    """What a recipe says as an `InitFrom`, for pydantic."""
    table = _table(value)
    if isinstance(table, InitFrom):
        return table
    if not isinstance(table, dict):
        raise PydanticCustomError("init_from", "should be a run's directory, or a table with a key 'run'")
    # A recipe comes as JSON, where a list may fill a tuple.
    return InitFrom.model_validate_json(json.dumps(table)) if info.mode == "json" else InitFrom.model_validate(table)


def anchored(tables: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A copy of a recipe's tables in which `init_from` is a table with an absolute path, seen from a folder."""
    given = _table(tables.get("init_from"))
    if not isinstance(given, dict) or not isinstance(given.get("run"), str) or not given["run"]:
        return dict(tables)
    run = os.path.normpath(Path.cwd() / folder / given["run"])
    return {**tables, "init_from": {**given, "run": Path(run).as_posix()}}
