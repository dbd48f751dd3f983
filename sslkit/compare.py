"""Several runs beside each other: what each made of it, in what their recipes differ, and their curves."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sslkit import compare_groups
from sslkit.charts import Chart, Curve, Table, page
from sslkit.compare_groups import ABSENT, Group
from sslkit.describe import as_toml
from sslkit.errors import SslkitError, UserError, did_you_mean, printable
from sslkit.page import page_path, save
from sslkit.recipe import Recipe, read_recipe
from sslkit.run_directory import read_json, read_metrics, refuse_strays

DRAWN = {
    "loss": ("Loss", "What was minimised, at the batch of that step."),
    "knn_top1": (
        "kNN accuracy (top-1)",
        "Share of test images that their nearest training images sort rightly. The point at step 0 is the random "
        "network's, what the architecture gives without any training; or that of the weights a run began with.",
    ),
    "effective_rank": ("Effective rank", "How many directions the backbone's features use, at most their dimensions."),
    "std_sqrt_d": ("Spread (std √d)", "1: projections are spread over the sphere; towards 0: complete collapse."),
    "tau": ("tau", "How much of the target network remains in an update."),
    "lr": ("Learning rate", "Of the backbone."),
    "cosine": ("Cosine", "Mean cosine between predictions and targets, or what stands in their place."),
}
"""Metrics that are drawn, in this order, where a run recorded them: title and meaning."""

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


def compare(runs: Sequence[str | Path], out: str | Path, *, group: bool = False) -> None:
    """Write the page that compares runs to `out`, and print a summary.

    Args:
        runs: run directories, and folders below which there are some.
        out: the page.
        group: draw runs that differ in their seed alone as one curve, with its spread.

    Raises:
        UserError: what was given is no run directory and holds none, has no metrics yet, or was given twice; `out` is
            no place for a page.
    """
    path = page_path(out)
    paths, waiting = expanded([Path(run) for run in runs])
    found = read_runs(paths)
    warnings = {"loss": losses(found), "knn_top1": accuracies(found), "effective_rank": ranks(found)}
    groups = compare_groups.grouped(found) if group else []
    apart = [replace(g.runs[0], name=g.name, recipe=g.recipe) for g in groups]
    said = [*filter(None, [warnings["knn_top1"], *(problem for g in groups for problem in g.problems())]), *waiting]
    text = page(
        f"{len(found)} runs compared" if len(found) > 1 else found[0].name,
        [
            *([compare_groups.summary(groups, said)] if groups else []),
            summary(found, [*filter(None, warnings.values())]),
            *options(apart if groups else found),
        ],
        charts(groups or found, warnings),
    )
    save(path, text)
    measured = [run for run in groups or found if run.points("knn_top1")]
    figures = ", ".join(f"{run.name} {run.accuracy()}" for run in measured)
    number = "1 run" if len(found) == 1 else f"{len(found)} runs"
    number += f" in {len(groups)} {'group' if len(groups) == 1 else 'groups'}" if groups else ""
    print(printable(f"{out}: {number}{figures and f', kNN top-1: {figures}'}"))
    for line in [*said, *(run.problem for run in found if run.problem)]:
        print(printable(line))


# ---------------------------------------------------------------- reading


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


# ---------------------------------------------------------------- tables


def summary(runs: Sequence[Run], warnings: Iterable[str] = ()) -> Table:
    """A row for each run: how far it is, and where its figures began and stand."""
    headers = ["run", "recipe", "hash", "step", "status", "loss", "kNN top-1", "kNN protocol", "effective rank", "tau"]
    rows = []
    for run in runs:
        protocols = [
            f"k {k:g}, T {temperature:g}, bank {bank:.0f}, {queries:.0f} queries"
            for k, temperature, bank, queries in run.protocols()
        ]
        rank = run.points("effective_rank")
        rows.append([
            run.name,
            run.recipe.name if run.recipe else ABSENT,
            run.recipe.hash() if run.recipe else ABSENT,
            f"{max(run.records[-1]['step'], told if is_number(told := run.status.get('step')) else 0)} "
            f"of {run.status.get('of', ABSENT)}",
            str(run.status.get("status", ABSENT)),
            _from_to(run.points("loss"), ".4f"),
            run.accuracy(),
            "; ".join(protocols) or ABSENT,
            f"{rank[-1][1]:.1f}" if rank else ABSENT,
            _from_to(run.points("tau"), ".6g"),
        ])  # fmt: skip
    read = f"Read on {datetime.now(UTC):%Y-%m-%d at %H:%M} UTC. From → to: the first record and the last."
    return Table("Runs", headers, rows, read, [*warnings, *(run.problem for run in runs if run.problem)])


def _from_to(points: Sequence[tuple[int, float]], form: str) -> str:
    return f"{points[0][1]:{form}} → {points[-1][1]:{form}}" if points else ABSENT


def options(runs: Sequence[Run]) -> list[Table]:
    """The options that compute something and differ, a column for each run whose recipe can be read."""
    known = [run for run in runs if run.recipe]
    if len(known) < 2:
        return []
    rows = _rows([run.recipe.computing() for run in known if run.recipe])
    text = "" if rows else "None of those that change what is computed."
    return [Table("Options that differ", ["option", *(run.name for run in known)], rows, text)]


def _rows(tables: Sequence[Mapping[str, Any]], prefix: str = "") -> list[list[str]]:
    """A row for each key that the tables do not agree in. A schedule is one value where another has a number."""
    rows = []
    for key in dict.fromkeys(key for table in tables for key in table):
        values = [table.get(key) for table in tables]
        if all(isinstance(value, Mapping) or value is None for value in values):
            rows += _rows([value or {} for value in values], f"{prefix}{key}.")
        elif any(value != values[0] for value in values):
            rows.append([prefix + key, *map(as_toml, values)])
    return rows


# ---------------------------------------------------------------- what does not compare


def losses(runs: Sequence[Run]) -> str:
    """Why the runs' losses do not compare; empty if nothing speaks against it."""
    tasks = _differing([run for run in runs if run.points("loss")], "loss", "view_generator", "projector", "predictor")
    known = [run.recipe for run in runs if run.recipe and run.points("loss")]
    if not tasks and len({(r.train.batch_size, r.train.accumulate) for r in known}) > 1:
        tasks = "the batch size"
    if not tasks and len({run.data for run in runs if run.data and run.points("loss")}) > 1:
        tasks = "the data"
    return f"Losses do not compare: the runs differ in {tasks}. The easier task has the lower loss." if tasks else ""


def accuracies(runs: Sequence[Run]) -> str:
    """Why the runs' kNN accuracies do not compare; empty if nothing speaks against it."""
    measured = [run for run in runs if run.points("knn_top1")]
    reasons = []
    if len({protocol for run in measured for protocol in run.protocols()}) > 1:
        reasons.append("protocols")
    if len({run.data for run in measured if run.data}) > 1:
        reasons.append("data (data_fingerprint in env.json)")
    return f"kNN accuracies do not compare: they were measured with different {' and '.join(reasons)}." * bool(reasons)


def ranks(runs: Sequence[Run]) -> str:
    """Why the runs' effective ranks do not compare; empty if nothing speaks against it."""
    parts = _differing([run for run in runs if run.points("effective_rank")], "loss", "backbone")
    return f"Effective ranks do not compare: the runs differ in {parts}." if parts else ""


def _differing(runs: Iterable[Run], *slots: str) -> str:
    """The slots that the runs fill differently, as `loss (cosine, vicreg)`; the names are left out where they agree."""
    found = []
    for slot in slots:
        filled = [run.recipe.computing().get(slot, {}) for run in runs if run.recipe]
        if any(table != filled[0] for table in filled):
            used = dict.fromkeys(str(table.get("use", "none")) for table in filled)
            found.append(f"{slot} ({', '.join(used)})" if len(used) > 1 else f"the options of {slot}")
    return " and ".join([", ".join(found[:-1]), found[-1]] if len(found) > 1 else found)


# ---------------------------------------------------------------- curves


def charts(runs: Sequence[Run] | Sequence[Group], warnings: Mapping[str, str]) -> list[Chart]:
    """A chart for each drawn metric that some run recorded."""
    drawn = []
    keys = dict.fromkeys(key for run in runs for record in run.records for key in record if key.startswith("loss."))
    scheduled = {key: (key, "As its schedule has it.") for key in keys}
    for key, (title, meaning) in {**DRAWN, **scheduled}.items():
        curves = [run.curve(key) for run in runs if run.points(key)]
        if curves:
            drawn.append(Chart(title, meaning, curves, warnings.get(key, "")))
    return drawn


def is_number(value: object) -> bool:
    """Whether something that was read from a file is a number that can be reckoned with."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
