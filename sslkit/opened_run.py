"""A run, opened to be used: its backbone with the weights of one checkpoint, and how its images are prepared.

Evaluation, export and search begin here. Only the packages of the backbone and the view generator are needed.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, get_args

import torch
from pydantic import BaseModel, ConfigDict, SerializeAsAny, TypeAdapter, ValidationError
from torch import Tensor, nn

from sslkit import checkpoint as checkpoints
from sslkit import complaints, local, randomness, registry, sources
from sslkit.api import Backbone, Head, RunInfo, ViewGenerator, ViewMaker, slot
from sslkit.errors import RunFailed, UserError
from sslkit.positions import lines_of
from sslkit.recipe import Recipe, parse_recipe
from sslkit.run_directory import refuse_strays

Branch = Literal["evaluated", "online", "target"]


@dataclass(frozen=True)
class OpenedRun:
    """What a run's directory gives without its data."""

    run: Path
    """The run's directory."""
    tables: Mapping[str, Any]
    """Its recipe, as the lock file has it, with absolute paths."""
    facts: Mapping[str, Any]
    """What the checkpoint says of itself: `recipe_hash`, `data_fingerprint`, `knn_top1`, `plugins`."""
    checkpoint: Literal["last", "best"] | int
    """As it was asked for."""
    step: int
    """Updates that the weights have seen."""
    branch: Literal["online", "target"]
    """Whose weights they are."""
    info: RunInfo
    """What the run's components were told, on the CPU."""
    spec: Backbone
    backbone: nn.Module
    """On the CPU, in training mode, with the checkpoint's weights. An encoder that is made of it takes it over."""
    views: ViewMaker
    weights: str
    """SHA-256 over the backbone's tensors, by name, type, shape and value."""
    model: Mapping[str, Tensor]
    """All tensors of the checkpoint's networks, by name: `online.projector.0.weight`."""
    allow_local_code: bool

    @property
    def channels_last(self) -> bool:
        """Whether the run kept its weights channels last."""
        return bool(self.tables.get("train", {}).get("channels_last", True))

    def recipe(self, overrides: Sequence[str] = ()) -> Recipe:
        """The run's whole recipe, for whoever needs its data; all its packages have to be there.

        Raises:
            UserError: one line for each thing that is wrong or missing.
        """
        lock = self.run / "recipe.lock.toml"
        with local.allowed(self.allow_local_code):
            return parse_recipe(sources.read(lock), str(lock), overrides)

    def initial_backbone(self) -> nn.Module:
        """A backbone with the weights that the run's was built with: drawn from its seed, or a library's pretrained
        ones. Weights of `init_from` came after that."""
        with randomness.seeded(self.info.seed, "backbone"):
            return self.spec.build(replace(self.info, weights_follow=False))

    def projector(self) -> nn.Module:
        """The projector of the same branch and checkpoint, in training mode.

        Raises:
            UserError: its package is not installed.
            RunFailed: its weights do not fit it.
        """
        with local.allowed(self.allow_local_code):
            spec = _read(_Projector, self.tables, self.run / "recipe.lock.toml", self.facts.get("plugins", []))
        with randomness.seeded(0, "projector"):  # the weights are replaced
            head = spec.projector.build(cast(int, self.backbone.feature_dim), self.info)
        _fill(head, spec.projector, _of(self.model, f"{self.branch}.projector."), self.run, self.facts)
        return head


def open_run(
    run_dir: str | PathLike[str],
    branch: Branch = "evaluated",
    checkpoint: Literal["last", "best"] | int = "last",
    *,
    allow_local_code: bool = False,
) -> OpenedRun:
    """Read a run's backbone from its directory. Reading a checkpoint runs no code of it.

    Args:
        run_dir: The run's directory.
        branch: `evaluated` is the branch that the run's own figures are of, which its target updater names.
        checkpoint: `last`; `best`, that with the highest kNN accuracy; or the number of a step.
        allow_local_code: Let a backbone or view generator run that came from a file beside the recipe.

    Raises:
        UserError: there is no run, no such checkpoint or branch, or a package is missing.
        RunFailed: the checkpoint is damaged.
    """
    if branch not in get_args(Branch):
        raise UserError(f"branch: should be 'evaluated', 'online' or 'target', not {branch!r}")
    run = Path(run_dir)
    tables, lock = _lock(run)
    found = checkpoints.load(_chosen(run, checkpoint), wanted=("model",))
    with local.allowed(allow_local_code):
        needed = _read(_Encoder, tables, lock, found.facts.get("plugins", []))
    try:
        told = TypeAdapter(RunInfo).validate_python(found.facts["run"])
        evaluated = found.facts["evaluated"]
    except (KeyError, ValidationError):
        raise UserError(f"{found.path}: was written by a version of sslkit that did not record what it was told of "
                        "the run; train the run anew, or a step further, with this version") from None  # fmt: skip
    info = replace(told, device="cpu", weights_follow=True)
    with randomness.seeded(0, "encoder"):  # the weights are replaced; the caller's random numbers stay as they are
        backbone = needed.backbone.build(info)
    views = needed.view_generator.build(info)
    chosen = evaluated if branch == "evaluated" else branch
    weights = _of(found.parts["model"], f"{chosen}.backbone.")
    if not weights and chosen == "target":
        raise UserError(f"{run}: has no target network of its own; use branch='online'")
    _fill(backbone, needed.backbone, weights, found.path, found.facts)
    return OpenedRun(
        run=run, tables=tables, facts=found.facts, checkpoint=checkpoint, step=found.step, branch=chosen, info=info,
        spec=needed.backbone, backbone=backbone, views=views, weights=digest_of(backbone.state_dict()),
        model=found.parts["model"], allow_local_code=allow_local_code,
    )  # fmt: skip


def knn_of(recipe: Recipe) -> tuple[int, float]:
    """k and temperature of the run's own kNN, enabled or not; those of Wu et al. 2018 where it has none."""
    own: Any = next((one for one in recipe.observers if registry.short_name(type(one)) == "knn"), None)
    return int(getattr(own, "k", 200)), float(getattr(own, "temperature", 0.1))


def digest_of(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over tensors: the name, type, shape and bytes of each, in the order of their names."""
    found = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _of(model: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in model.items() if name.startswith(prefix)}


def _fill(
    module: nn.Module, spec: Backbone | Head, weights: Mapping[str, Tensor], where: Path, facts: Mapping[str, Any]
) -> None:
    try:
        module.load_state_dict(weights)
    except Exception as error:  # whatever a stranger's load_state_dict raises
        provider = registry.provider_of(type(spec))
        was = _origin(facts.get("plugins", []), provider.key)
        slot_name = "projector" if isinstance(spec, Head) else "backbone"
        raise RunFailed(
            f"{where}: its weights do not fit the {slot_name} that {provider.origin} builds (trained with "
            f"{was or 'an unknown version'}): {str(error).strip().partition(chr(10))[0]}"
        ) from error


# ---------------------------------------------------------------- reading


class _Encoder(BaseModel):
    """The tables of a recipe that an encoder is made of."""

    model_config = ConfigDict(extra="ignore", strict=True)

    backbone: Annotated[SerializeAsAny[Backbone], slot("backbone")]
    view_generator: Annotated[SerializeAsAny[ViewGenerator], slot("view_generator")]


class _Projector(BaseModel):
    """The table of what comes behind it."""

    model_config = ConfigDict(extra="ignore", strict=True)

    projector: Annotated[SerializeAsAny[Head], slot("head")]


Needed = TypeVar("Needed", _Encoder, _Projector)


def _lock(run: Path) -> tuple[dict[str, Any], Path]:
    path = run / "recipe.lock.toml"
    refuse_strays(run)
    try:
        tables: dict[str, Any] = local.anchored(tomllib.loads(path.read_text(encoding="utf-8")), run)
    except FileNotFoundError:
        problem = "is not there" if not run.exists() else "is no run directory (it has no recipe.lock.toml)"
        raise UserError(f"{run}: {problem}; give one such as runs/NAME") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    for name in ("backbone", "view_generator", "projector", "train"):
        if not isinstance(tables.get(name, {}), dict):
            raise UserError(f"{path}: {name}: should be a table; it was changed since the run wrote it")
    return tables, path


def _chosen(run: Path, checkpoint: str | int) -> Path:
    """The folder of the checkpoint that is asked for."""
    folder = run / "checkpoints"
    listed = checkpoints.listed(folder)
    if not listed:
        raise UserError(f"{run}: has no checkpoint yet; one is written every train.checkpoint_every steps and at the "
                        "end of a run")  # fmt: skip
    steps = {int(path.name.removeprefix("step-")): path for path in listed}
    there = ", ".join(map(str, steps))
    if checkpoint == "last":
        return listed[-1]
    if checkpoint == "best":
        best = checkpoints.best(folder)
        if best is None:
            raise UserError(f"{run}: kNN was not measured at any of its checkpoints (steps {there}), so none is the "
                            "best; use checkpoint='last' or a step")  # fmt: skip
        return best
    if checkpoint not in steps:
        raise UserError(f"{run}: has no checkpoint {checkpoint!r}; choose 'last', 'best' or a step of {there}")
    return steps[int(checkpoint)]


def _read(needed: type[Needed], tables: Mapping[str, Any], lock: Path, plugins: Sequence[Mapping[str, str]]) -> Needed:
    """The specs that are needed, from the run's own recipe.

    Raises:
        UserError: a package is missing, or the table is not as the component wants it.
    """
    for slot_name in needed.model_fields:
        kind = "head" if slot_name == "projector" else slot_name
        use = tables.get(slot_name, {}).get("use")
        was = _origin(plugins, f"{kind}.{use}")
        if was and use not in registry.names(kind):
            distribution, _, version = was.rpartition(" ")
            raise UserError(f"{lock.parent}: its {slot_name} {use!r} is from {was}, which is not installed here: "
                            f"pip install '{distribution}=={version}'")  # fmt: skip
    known = lines_of(lock.read_text(encoding="utf-8"))

    def place(keys: tuple[str | int, ...]) -> str:
        return f"{lock}:{next((known[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in known), 1)}"

    try:
        return needed.model_validate_json(json.dumps(tables, default=str))
    except ValidationError as error:
        raise UserError(*complaints.lines(error, dict(tables), place, needed)) from None


def _origin(plugins: Sequence[Mapping[str, str]], component: str) -> str:
    """`distribution version` that a component of the run came from; empty if it was not recorded."""
    return next((f"{p['distribution']} {p['version']}" for p in plugins if p.get("component") == component), "")
