"""First weights from a run, or from elsewhere: found, verified, and given to the networks that they fit.

A run is read and never changed: it may be somebody else's, or train at the same time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from sslkit import checkpoint as checkpoints
from sslkit import local, registry
from sslkit.api import Backbone, RunInfo
from sslkit.errors import RunFailed, UserError
from sslkit.recipe import Recipe
from sslkit.starting_point import PLACES, SEEN_FROM, InitFrom, Part, moved
from sslkit.weights_files import Import, file_digest, imported, misfit
from sslkit.words import spoken

FILES = ("loss.safetensors", "model.safetensors")
"""The files of a checkpoint that hold weights."""


@dataclass
class RunStart:
    """The weights of a checkpoint, for the parts of another run."""

    given: InitFrom
    """As the recipe says it, with an absolute path, the step, the branch and the weights' digest."""
    found: checkpoints.Checkpoint
    origin: Mapping[str, Any]
    """What the run's lock file says of it."""
    loss: str
    """The loss of the recipe that begins with them."""
    fork: bool
    """Whether parts that do not fit are left as they were drawn."""
    taken: list[Part] = field(default_factory=list)
    left: dict[Part, str] = field(default_factory=dict)
    """Why the others were not taken, and what they begin as."""

    def take(
        self, modules: Mapping[Part, nn.Module | None], spec: Backbone | None = None, run: RunInfo | None = None
    ) -> None:
        """Give these parts their weights: a part as a whole, or not at all.

        Raises:
            UserError: they do not fit, or a part that the recipe names is missing here or there.
        """
        for part, module in modules.items():
            weights = self._weights(part)
            if (module is None or not module.state_dict()) and not weights and not self._asked(part):
                continue
            if module is None or not module.state_dict():
                why = "there is none here to begin with it"
            elif self.given.parts is not None and not self._asked(part):
                why = "not asked for"
            elif part == "loss" and self._other_loss():
                why = f"the run has another loss, {self.origin['loss']!r}"
            elif not weights:
                why = "the run has none"
            else:
                why = self._fill(part, module, weights)
            if not why:
                self.taken.append(part)
                continue
            if self._asked(part):
                raise UserError(f"{self._key('parts')}: {part!r}: {why}; leave it out")
            begins = "begins as a copy of the online network" if part == "target" else "begins as drawn"
            self.left[part] = why if module is None else f"{why}; {begins}"

    def _fill(self, part: Part, module: nn.Module, weights: dict[str, Any]) -> str:
        """Load a part's weights; why they do not fit, if they may be left out."""
        problem = misfit(module, weights)
        if not problem:
            try:
                module.load_state_dict(weights)
            except Exception as error:  # whatever a stranger's load_state_dict raises
                problem = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        if not problem:
            return ""
        if self.fork and part != "backbone":
            return f"does not fit: {problem}"
        way = "build the one that it was trained with"
        if part != "backbone":
            rest = [p for p in self.given.parts or self.taken if p != part]
            way += f", or begin it anew: init_from.parts = {json.dumps(rest)}"
        raise UserError(f"{self._key()}: {self.given.words} does not fit the {part}: {problem}; {way}")

    def _asked(self, part: Part) -> bool:
        return self.given.parts is not None and part in self.given.parts

    def _other_loss(self) -> bool:
        was = self.origin.get("loss")
        return isinstance(was, str) and was.rpartition(":")[2] != self.loss.rpartition(":")[2]

    def _weights(self, part: Part) -> dict[str, Any]:
        if part == "loss":
            return dict(self.found.parts["loss"])
        prefix = f"{self.given.branch}.{part}." if part in ("backbone", "projector") else f"{part}."
        return {k.removeprefix(prefix): v for k, v in self.found.parts["model"].items() if k.startswith(prefix)}

    def _key(self, option: str = "") -> str:
        return spoken().fork if self.fork else f"init_from{'.' * bool(option)}{option}"

    # ------------------------------------------------------------ what is said of it

    def told(self) -> list[str]:
        """What was taken and what was not, as lines for the user."""
        taken = ", ".join(self.taken) or "nothing"
        lines = [f"initialised from {self.given.words} (its {self.given.branch} network): {taken}"]
        return lines + [f"not taken: {part}: {why}" for part, why in self.left.items()]

    def settled(self, recipe: Recipe) -> Recipe:
        """The recipe with the weights that were taken, and, of a fork, the parts."""
        given = self.given
        if self.fork and self.taken:
            given = given.model_copy(update={"parts": tuple(self.taken)})
        return recipe.model_copy(update={"init_from": given})

    def facts(self) -> dict[str, Any]:
        """What `env.json` and every checkpoint record."""
        return {
            "run": local.near(Path(self.given.run or "")),
            "step": self.found.step,
            "branch": self.given.branch,
            "recipe": self.origin.get("name"),
            "recipe_hash": self.found.facts.get("recipe_hash"),
            "weights": self.given.weights,
            "taken": list(self.taken),
            "left": dict(self.left),
            "fork": self.fork,
        }


Start: TypeAlias = RunStart | Import
"""Weights that networks begin with."""


# ---------------------------------------------------------------- finding


def find(recipe: Recipe, tell: Callable[[str], None], *, fork: bool = False) -> Start | None:
    """Read the weights that a recipe begins with; None where they are drawn.

    Args:
        recipe: With `init_from`, if it has any.
        tell: Told of damaged checkpoints that were passed over.
        fork: `--fork` says it, and not the recipe.

    Raises:
        UserError: there is no such run or checkpoint, it is damaged, or it is not what it was.
    """
    if recipe.init_from is None:
        return None
    if recipe.init_from.run is None:
        return imported(recipe.init_from)
    key = spoken().fork if fork else "init_from"
    run, given = run_of(recipe.init_from)
    if not (run / "recipe.lock.toml").is_file():
        raise UserError(f"{key}: {local.near(run)}: {_no_run(run, fork)}")
    try:
        found, digest = _load(run, given, key, tell)
    except RunFailed as error:
        raise UserError(*(f"{key}: {line}" for line in error.lines)) from None
    if given.weights not in (None, digest):
        raise UserError(
            f"{key}.weights: names other weights than those of {local.near(run)}, step {found.step}: the run was made "
            "anew since; leave init_from.weights out of the recipe to begin with what is there now"
        )
    branch = _branch(given, found.facts)
    if branch == "target" and not any(name.startswith("target.") for name in found.parts["model"]):
        raise UserError(f"{key}.branch: {local.near(run)}: has no target network of its own; use 'online'")
    now = {"run": run.as_posix(), "checkpoint": found.step, "branch": branch, "weights": digest}
    return RunStart(given.model_copy(update=now), found, _origin(run), registry.name_of(type(recipe.loss)), fork)


def pinned(recipe: Recipe) -> Recipe:
    """The recipe with the step, the branch and the digest of the weights that it would begin with; as it is where they
    cannot be had, or not without fetching them."""
    if recipe.init_from is None or recipe.init_from.weights:
        return recipe
    with suppress(UserError, OSError, ValueError, KeyError):
        if recipe.init_from.file is not None:
            digest = file_digest(Path(recipe.init_from.file))
            return recipe.model_copy(update={"init_from": recipe.init_from.model_copy(update={"weights": digest})})
        if recipe.init_from.run is None:  # timm's are known once they were fetched
            return recipe
        run, given = run_of(recipe.init_from)
        path = _chosen(run, given, "init_from")
        facts = json.loads((path / "state.json").read_text(encoding="utf-8"))["facts"]
        now = {"run": run.as_posix(), "checkpoint": _step(path), "branch": _branch(given, facts)}
        now["weights"] = weights_digest(path)
        return recipe.model_copy(update={"init_from": given.model_copy(update=now)})
    return recipe


def seen_from(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the path in `init_from` as a file in this folder has to say it."""
    given = recipe.init_from
    if given is None:
        return recipe

    def relative(path: str) -> str:
        return Path(os.path.relpath(path, folder)).as_posix()

    with suppress(ValueError):  # another drive
        place = next(name for name in PLACES if getattr(given, name) is not None)
        path = getattr(given, place)
        seen = {place: moved(path, relative) if place == "timm" else relative(path)}
        return recipe.model_copy(update={"init_from": given.model_copy(update=seen)})
    return recipe


def weights_digest(path: Path) -> str:
    """SHA-256 over what a checkpoint's manifest says of its weights."""
    files = json.loads((path / "manifest.json").read_text(encoding="utf-8"))["files"]
    told = json.dumps({name: files[name]["sha256"] for name in FILES}, sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()


def run_of(given: InitFrom) -> tuple[Path, InitFrom]:
    """The run's directory, where the path may be that of one of its checkpoints."""
    path = Path(os.path.normpath(Path.cwd() / (given.run or "")))
    if path.parent.name == "checkpoints" and (step := re.fullmatch(r"step-(\d{9,})", path.name)):
        return path.parent.parent, given.model_copy(update={"checkpoint": int(step[1])})
    return path, given


def _branch(given: InitFrom, facts: Mapping[str, Any]) -> str:
    return str(facts.get("evaluated", "online")) if given.branch == "evaluated" else given.branch


def _no_run(run: Path, fork: bool) -> str:
    if run.exists():
        return "is no run directory (it has no recipe.lock.toml); give one as runs/NAME"
    here = Path(run.parent.name, run.name)
    if not fork and (here / "recipe.lock.toml").is_file():
        return f"is not there; a path in a recipe is seen from the recipe's folder, and {here} is at {here.resolve()!s}"
    return f"is not there; give the directory of a run, as runs/NAME{'' if fork else f'; {SEEN_FROM}'}"


def _load(run: Path, given: InitFrom, key: str, tell: Callable[[str], None]) -> tuple[checkpoints.Checkpoint, str]:
    """The checkpoint that is asked for. It may be removed while it is read, by the run that goes on."""
    damaged: set[str] = set()
    while True:
        path = _chosen(run, given, key, damaged)
        try:
            digest = weights_digest(path)
            return checkpoints.load(path, wanted=("model", "loss")), digest
        except (RunFailed, OSError, ValueError, KeyError) as error:
            if not path.exists():
                continue
            problem = str(error) if isinstance(error, RunFailed) else f"{path}: its manifest cannot be read"
            if given.checkpoint != "last":
                raise UserError(f"{key}: {problem}") from None
            damaged.add(path.name)
            tell(f"warning: {problem}; the one before it is taken")


def _chosen(run: Path, given: InitFrom, key: str, damaged: frozenset[str] | set[str] = frozenset()) -> Path:
    folder = run / "checkpoints"
    listed = [path for path in checkpoints.listed(folder) if path.name not in damaged]
    where = local.near(run)
    if not listed:
        why = "none of its checkpoints is sound" if damaged else "has no checkpoint yet"
        raise UserError(f"{key}: {where}: {why}; one is written every train.checkpoint_every steps and at the end")
    there = ", ".join(str(_step(path)) for path in listed)
    if given.checkpoint == "last":
        return listed[-1]
    if given.checkpoint == "best":
        if (best := checkpoints.best(folder)) is None:
            raise UserError(f"{key}.checkpoint: {where}: kNN was not measured at any of its checkpoints (steps "
                            f"{there}), so none is the best; use 'last' or a step")  # fmt: skip
        return best
    for path in listed:
        if _step(path) == given.checkpoint:
            return path
    raise UserError(f"{key}.checkpoint: {where}: has no checkpoint {given.checkpoint}; choose 'last', 'best' or a step "
                    f"of {there}")  # fmt: skip


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _origin(run: Path) -> dict[str, Any]:
    """What a run's lock file says, without loading any component."""
    try:
        tables = tomllib.loads((run / "recipe.lock.toml").read_text(encoding="utf-8"))
        return {"name": tables.get("name"), "loss": tables.get("loss", {}).get("use")}
    except (OSError, ValueError, AttributeError):
        return {}
