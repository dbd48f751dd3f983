"""Several runs beside each other: what each made of it, in what their recipes differ, and their curves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sslkit import compare_groups
from sslkit.charts import Chart, Table, page
from sslkit.compare_groups import Group
from sslkit.describe import as_toml
from sslkit.errors import printable
from sslkit.page import page_path, save
from sslkit.recorded import ABSENT, Run, expanded, read_runs
from sslkit.rules import is_number

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
    if measured and (others := [run.name for run in groups or found if not run.points("knn_top1")]):
        print(printable(f"no kNN accuracy was recorded of {', '.join(others)}"))
    for line in [*said, *(run.problem for run in found if run.problem)]:
        print(printable(line))


# ---------------------------------------------------------------- reading


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
