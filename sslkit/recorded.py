"""What run directories say of their runs, for whoever lists, compares or reports them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sslkit.charts import Curve
from sslkit.errors import SslkitError, UserError, did_you_mean
from sslkit.recipe import Recipe, read_recipe
from sslkit.rules import is_number
from sslkit.run_directory import read_json, read_metrics, refuse_strays

ABSENT = "\N{EN DASH}"
"""Stands where there is no figure."""

PROTOCOL = ("knn_k", "knn_temperature", "knn_bank", "knn_queries")


@dataclass(frozen=True)
class Run:
    """What a run directory says; `name` tells it from the others of the comparison."""

    name: str
    records: Sequence[Mapping[str, Any]]
    status: Mapping[str, Any]
    data: str | None
    recipe: Recipe | None
    problem: str = ""
    place: Path = Path()
    """Its directory."""

    @property
    def counts_epochs(self) -> bool:
        """Whether every record says where it stands in epochs."""
        return all(is_number(record.get("epoch")) for record in self.records)

    def curve(self, key: str) -> Curve:
        """What was recorded under `key`; what was not finite, and so was recorded as null, is a gap."""
        kept = [record for record in self.records if key in record]
        values = [record[key] if is_number(record[key]) else None for record in kept]
        epochs = [record["epoch"] if is_number(record.get("epoch")) else record["step"] for record in kept]
        return Curve(self.name, [record["step"] for record in kept], epochs, values)

    def points(self, key: str) -> list[tuple[int, float]]:
        """`(step, value)` of the records that have a number under `key`."""
        curve = self.curve(key)
        return [(step, value) for step, value in zip(curve.steps, curve.values, strict=True) if value is not None]

    def accuracy(self) -> str:
        """kNN of the random network and the last one; neither stands in for the other."""
        found = first_and_last(self.records)
        told = (ABSENT if value is None else f"{value:.4f}" for value in found)
        return ABSENT if found == (None, None) else " → ".join(told)

    def protocols(self) -> list[tuple[Any, ...]]:
        """What kNN was measured with, each once; more than one if a run was gone on with differently."""
        measured = (tuple(record.get(name) for name in PROTOCOL) for record in self.records if "knn_top1" in record)
        return list(dict.fromkeys(protocol for protocol in measured if all(is_number(part) for part in protocol)))


def expanded(paths: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Each path, but for folders that hold runs: these runs; and a line for each of them that has no metrics yet."""
    found, waiting = [], []
    for path in paths:
        below = run_folders(path) if path.is_dir() and not is_run(path) else []
        found += [run for run in below if _records(run)] or [path]
        waiting += [f"{run}: is left out, since it has no metrics yet" for run in below if not _records(run)]
    return found, waiting


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read run directories, also of runs that are going on.

    Raises:
        UserError: one line for each path that cannot be compared.
    """
    problems = [problem for path in paths if (problem := _unusable(path))]
    places = [path.resolve() for path in paths]
    problems += [f"{path}: is given twice" for path in dict.fromkeys(paths) if places.count(path.resolve()) > 1]
    if problems:
        raise UserError(*problems)
    return [read_run(path, name) for path, name in zip(paths, names(places), strict=True)]


def _unusable(path: Path) -> str:
    """What keeps a path from being compared, in a line; empty if nothing does."""
    if not path.is_dir():
        if path.exists():
            return f"{path}: is a file; give a run directory such as runs/NAME"
        near = did_you_mean(path.name, (below.name for below in run_folders(path.parent)))
        return f"{path}: is not there{near}; give a run directory such as runs/NAME"
    try:
        refuse_strays(path)
    except UserError as error:
        return error.lines[0]
    if not is_run(path):
        return (
            f"{path}: is no run directory (it has no recipe.lock.toml), nor are there runs below it; give one such "
            "as runs/NAME"
        )
    if not _records(path):
        return f"{path}: has no metrics yet; wait for the first ones, or leave it out"
    return ""


def is_run(path: Path) -> bool:
    """Whether a folder is the directory of a run."""
    return (path / "recipe.lock.toml").is_file()


def run_folders(folder: Path, wanted: Callable[[Path], bool] = is_run) -> list[Path]:
    """A folder, if it is a run's, or the directories of runs below it, at any depth, in the order of their names; links
    are not followed."""
    found = []
    for place, folders, _ in os.walk(folder):
        if wanted(Path(place)):
            found.append(Path(place))
            folders.clear()
        folders[:] = [name for name in folders if not name.startswith(".")]
    return sorted(found, key=lambda path: [natural(part) for part in path.parts])


def natural(text: str) -> list[tuple[int, float, str]]:
    """A key that sorts seed-10 behind seed-9, and lr=0.1 behind lr=0.03."""
    parts = re.split(r"([0-9]+(?:[.][0-9]+)?(?:e[+-]?[0-9]{1,3})?)", text)
    return [(0, float(part), part) if place % 2 else (1, 0.0, part) for place, part in enumerate(parts)]


def first_and_last(records: Iterable[Any]) -> tuple[float | None, float | None]:
    """kNN accuracy of the random network, and the last one after some training; None where it was not measured."""
    known = (record for record in records if isinstance(record, dict) and is_number(record.get("knn_top1")))
    found = [(record.get("step"), record["knn_top1"]) for record in known]
    return (
        found[0][1] if found and found[0][0] == 0 else None,
        found[-1][1] if found and found[-1][0] != 0 else None,
    )


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        found = read_metrics(path)
    except OSError:
        return []
    found = [record for record in found if isinstance(record, dict) and is_number(record.get("step"))]
    # A loop of somebody else's may count no epochs; where the steps of one are known, they follow.
    steps = read_json(path / "facts.json").get("steps_per_epoch")
    for record in found:
        if not is_number(record.get("epoch")) and is_number(steps) and steps:
            record["epoch"] = record["step"] / steps
    return found


def read_run(path: Path, name: str) -> Run:
    """What a run directory says, whatever of it is there."""
    recipe, problem = None, ""
    lock = path / "recipe.lock.toml"
    try:
        recipe = read_recipe(str(lock)) if lock.is_file() else None
    except SslkitError as error:  # its plugin may be gone, or an option renamed: its curves are still worth seeing
        problem = f"{name}: its recipe cannot be read here: {error.lines[0]}"
    data = read_json(path / "env.json").get("data_fingerprint")
    return Run(name, _records(path), read_json(path / "status.json"), data, recipe, problem, path.resolve())


def names(places: Sequence[Path]) -> list[str]:
    """The directories' names, each with as many folders above it as tell it from the others."""

    def name(place: Path, length: int) -> str:
        return Path(*place.parts[-length:]).as_posix()

    lengths = [
        next(
            (
                length
                for length in range(1, len(place.parts))
                if [name(other, length) for other in places].count(name(place, length)) == 1
            ),
            len(place.parts),
        )
        for place in places
    ]
    # What cannot be printed would be lost in a page, and would do something to a terminal.
    return [
        "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name(place, length))
        for place, length in zip(places, lengths, strict=True)
    ]
