"""Which run a recipe goes on with, and what is said where it cannot: forks, and recipes that changed."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sslkit import local
from sslkit.diff import Change, differences
from sslkit.errors import UserError
from sslkit.initialise import pinned, run_of
from sslkit.recipe import Recipe, parse_recipe
from sslkit.run_directory import read_json
from sslkit.sources import place
from sslkit.starting_point import PLACES, InitFrom
from sslkit.words import COMMAND, spoken


@dataclass(frozen=True)
class Asked:
    """What a run was asked for with, to be pointed at and repeated."""

    source: str | None
    """The recipe's file or shipped name; None if it was written in Python."""
    overrides: Sequence[str]
    run_dir: str | None
    fork: str | None
    """The run to fork; empty for the one of the recipe's name, None for no fork."""


# ---------------------------------------------------------------- forks


def begin(recipe: Recipe, asked: Asked, *, resume: str) -> tuple[Recipe, Path]:
    """The recipe that takes its first weights from the run to fork, and the fork's directory: one that was begun by the
    same words goes on, unless `resume` is `never`.

    Raises:
        UserError: there is no run to fork, or the directory is its own.
    """
    given = spoken().fork
    source = Path(asked.fork or Path("runs", recipe.name))
    run, start = run_of(InitFrom(run=str(source), branch="online"))
    if not (run / "recipe.lock.toml").is_file():
        there = "holds no run" if run.exists() else "is not there"
        name = "" if asked.fork else f"; give the directory of one: {given} RUN"
        raise UserError(f"{given}: {local.near(run)} {there}, and a fork begins with the weights of a run{name}")
    recipe = recipe.model_copy(update={"init_from": start.model_copy(update={"run": run.as_posix()})})
    if asked.run_dir is not None:
        path = Path(asked.run_dir)
        if path.resolve() == run.resolve():
            raise UserError(f"{given}: {path} is the run to fork itself; choose another {spoken().run_dir}")
        if resume == "never" and (path / "recipe.lock.toml").exists():
            raise UserError(
                f"{path}: holds a run already, and {spoken().resume_never} was given; choose another {spoken().run_dir}"
            )
        return recipe, path
    number, same = 1, None
    while (path := Path("runs", recipe.name + (f"-{number}" if number > 1 else ""))).exists():
        if resume == "auto" and path.resolve() != run.resolve() and _same_fork(path, recipe):
            same = path
        number += 1
    return recipe, same or path


def is_fork(path: Path) -> bool:
    """Whether the run in a directory was begun as a fork."""
    origin = read_json(path / "env.json").get("initialised")
    return isinstance(origin, dict) and bool(origin.get("fork"))


def _same_fork(path: Path, recipe: Recipe) -> bool:
    lock = path / "recipe.lock.toml"
    if not is_fork(path) or not lock.is_file():
        return False
    try:
        with local.allowed(bool(recipe.local_parts()) and path.resolve() / local.FOLDER):
            earlier = parse_recipe(lock.read_text(encoding="utf-8"), str(lock))
    except (UserError, OSError, ValueError):
        return False
    return not differences(earlier, settled(recipe, earlier, fork=True))


# ---------------------------------------------------------------- going on


def going_on(recipe: Recipe, earlier: Recipe, path: Path, asked: Asked) -> Recipe:
    """The recipe to go on with: what was settled at the start stands.

    Raises:
        UserError: it would compute something else than the run that is there; with each difference, and the ways.
    """
    recipe = settled(recipe, earlier, fork=is_fork(path))
    changed = _changes(earlier, recipe)
    if not changed:
        return recipe
    status = read_json(path / "status.json")
    at = f", at step {status['step']} of {status['of']}" if {"step", "of"} <= set(status) else ""
    raise UserError(
        f"{path}: holds a run of another recipe{at}; put back what differs, or begin a new run",
        *(f"  {_written(change, asked)}{change}" for change in changed),
        *(f"  {way}" for way in _ways(path, asked, recipe)),
    )


def settled(recipe: Recipe, earlier: Recipe, *, fork: bool) -> Recipe:
    """The recipe with what a run settled when it began: what `compile = "auto"` meant, and the weights it began with.

    Args:
        recipe: As it is asked for now.
        earlier: That of the run.
        fork: Whether the run is a fork: its weights were asked for beside the recipe, and need not be again.
    """
    was = earlier.train
    if recipe.train.compile in ("auto", was.compile):
        chosen = {"compile": was.compile, "compile_chosen": was.compile_chosen}
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update=chosen)})
    if earlier.init_from is not None and _same_start(recipe, earlier.init_from, fork=fork):
        recipe = recipe.model_copy(update={"init_from": earlier.init_from})
    return recipe


def _same_start(recipe: Recipe, was: InitFrom, *, fork: bool) -> bool:
    """Whether a recipe begins with the weights that a run began with. The other run is asked only where the paths
    differ: it may be gone, or have trained on."""
    now = recipe.init_from
    if now is None:
        return fork
    if now.run is None or was.run is None:
        now = now if now.timm is not None or now.weights or now == _unpinned(was) else pinned(recipe).init_from or now
        return now == _unpinned(was) or _placeless(now) == _placeless(was)
    if not fork and now.parts != was.parts:
        return False
    run, now = run_of(now)
    if now.weights is None and run == Path(was.run) and now.branch in ("evaluated", was.branch):
        return now.checkpoint in ("last", "best", was.checkpoint)
    found = pinned(recipe).init_from
    return found is not None and (found.weights, found.branch) == (was.weights, was.branch)


def _unpinned(start: InitFrom) -> InitFrom:
    return start.model_copy(update={"weights": None})


def _placeless(start: InitFrom) -> dict[str, Any] | None:
    """What says which weights these are, wherever they lie; None where that is not known."""
    return {**start.model_dump(), **dict.fromkeys(PLACES)} if start.weights else start.model_dump()


def _changes(earlier: Recipe, recipe: Recipe) -> list[Change]:
    """What differs; where both begin with weights, their words instead of digests."""
    was, now = earlier.init_from, recipe.init_from
    changed = differences(earlier, recipe)
    if was is None or now is None or not any(change.key.startswith("init_from") for change in changed):
        return changed
    rest = [change for change in changed if not change.key.startswith("init_from")]
    a, b = ({k: v for k, v in start.model_dump(mode="json", exclude_defaults=True).items() if k != "weights"}
            | ({"run": local.near(Path(start.run))} if start.run else {}) for start in (was, now))  # fmt: skip
    if a == b:
        a, b = ({**table, "weights": start.weights} for table, start in ((a, was), (b, now)))
    return [*rest, Change("init_from", a, b)]


def _written(change: Change, asked: Asked) -> str:
    """`recipe.toml:7: `, where the new value stands, or the table that it is missing from."""
    if asked.source is None or (change.key == "init_from" and asked.fork is not None):
        return ""
    keys = [int(key) if key.isdecimal() else key for key in change.key.split(".")]
    return f"{place(asked.source, asked.overrides, *keys)}: "


def _ways(path: Path, asked: Asked, recipe: Recipe) -> list[str]:
    """How a new run is begun, as commands where there was one."""
    if asked.source is None or spoken() is not COMMAND:
        words = spoken()
        return [
            f"from its weights: {words.fork}, or the run's directory instead of True",
            f"from the beginning: another {words.run_dir} or name",
        ]
    command = [asked.source, *(f"--set={o}" for o in asked.overrides)]
    command += ["--allow-local-code"] if recipe.local_parts() else []
    number = 2
    while (beside := path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    elsewhere = ["--run-dir", str(beside)]
    if asked.fork is not None:
        fork = ["--fork", asked.fork] if asked.fork else ["--fork"]
        return [f"beside it: sslkit train {shlex.join([*command, *fork, *elsewhere])}"]
    fork, never = (
        (["--fork", str(path), *elsewhere], elsewhere) if asked.run_dir else (["--fork"], ["--resume", "never"])
    )
    return [
        f"from its weights: sslkit train {shlex.join([*command, *fork])}",
        f"from the beginning: sslkit train {shlex.join([*command, *never])}",
    ]
