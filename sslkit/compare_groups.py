"""Runs that differ in their seed alone, as one curve with its spread."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sslkit.charts import Curve, Table
from sslkit.recorded import ABSENT, Run
from sslkit.run_directory import died

if TYPE_CHECKING:
    from sslkit.recipe import Recipe

OVER = ("failed", "lost")
"""Statuses of runs that ended before their time and do not go on by themselves."""


@dataclass(frozen=True)
class Group:
    """Runs of one recipe on the same data, but for the seed.

    Figures are means over the runs, at the steps that all of them have. One that ended before its time would end every
    curve where it did, so it is left out where there are others.
    """

    name: str
    runs: Sequence[Run]

    @property
    def kept(self) -> Sequence[Run]:
        """The runs that are averaged: of each seed one, since copies of a run are no further draws."""
        furthest: dict[object, Run] = {}
        for run in self._sound:
            if (known := furthest.get(_seed(run))) is None or run.records[-1]["step"] > known.records[-1]["step"]:
                furthest[_seed(run)] = run
        return list(furthest.values())

    @property
    def _sound(self) -> Sequence[Run]:
        return [run for run in self.runs if not _ended_early(run)] or self.runs

    @property
    def recipe(self) -> Recipe | None:
        """What its runs have in common, with the seed 0."""
        recipe = self.runs[0].recipe
        return recipe and recipe.model_copy(update={"seed": 0})

    @property
    def records(self) -> list[Mapping[str, Any]]:
        """Those of all its runs."""
        return [record for run in self.kept for record in run.records]

    def curve(self, key: str) -> Curve:
        """The mean of what was recorded under `key`, between mean -+ standard deviation where there are two or more."""
        curves = [run.curve(key) for run in self.kept if run.points(key)]
        values = [dict(zip(curve.steps, curve.values, strict=True)) for curve in curves]
        epochs = dict(zip(curves[0].steps, curves[0].epochs, strict=True)) if curves else {}
        steps = [step for step in epochs if all(step in known for known in values)]
        means: list[float | None] = []
        band: list[tuple[float, float] | None] = []
        for step in steps:
            found = [value for known in values if (value := known[step]) is not None]
            if len(found) < len(values):  # it was not finite somewhere
                means.append(None)
                band.append(None)
                continue
            mean, sd = statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else 0.0
            means.append(mean)
            band.append((mean - sd, mean + sd))
        return Curve(self.name, steps, [epochs[step] for step in steps], means, band if len(values) > 1 else ())

    def points(self, key: str) -> list[tuple[int, float]]:
        """`(step, mean)` where there is one."""
        curve = self.curve(key)
        return [(step, value) for step, value in zip(curve.steps, curve.values, strict=True) if value is not None]

    def last(self, key: str, form: str) -> str:
        """`0.9012 ± 0.0034 (n 3)`: the last mean, the standard deviation of the sample, and of how many."""
        points = self.points(key)
        if not points:
            return ABSENT
        step = points[-1][0]
        return spread([value for run in self.kept if (value := dict(run.points(key)).get(step)) is not None], form)

    def accuracy(self) -> str:
        """kNN of the random networks and the last one; neither stands in for the other."""
        points = self.points("knn_top1")
        if not points:
            return ABSENT
        (begun, first), (reached, _) = points[0], points[-1]
        return f"{ABSENT if begun else f'{first:.4f}'} → {self.last('knn_top1', '.4f') if reached else ABSENT}"

    @property
    def reached(self) -> int:
        """The last step that all the runs have records of."""
        return int(min(run.records[-1]["step"] for run in self.kept))

    def problems(self) -> list[str]:
        """What its reader has to know of its runs."""
        kept = {_seed(run): run for run in self.kept}
        found = []
        for run in self.runs:
            if run not in self._sound:
                why = f"it {_how(run)} at step {run.records[-1]['step']}"
            elif (other := kept[_seed(run)]).name != run.name:
                why = f"its seed is that of {other.name}, so it is no other draw"
            else:
                continue
            found.append(f"{self.name}: {run.name} is left out of the mean: {why}")
        behind = [run.name for run in self.kept if run.records[-1]["step"] == self.reached]
        if any(run.records[-1]["step"] > self.reached for run in self.kept):
            found.append(f"{self.name}: is drawn up to step {self.reached}, where {' and '.join(behind)} stands")
        return found


def spread(values: Sequence[float], form: str = ".4f") -> str:
    """`0.9012 ± 0.0034 (n 3)`: mean, standard deviation of the sample, how many."""
    if not values:
        return ABSENT
    sd = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{sd} (n {len(values)})"


def _seed(run: Run) -> object:
    """What no other draw shares; a run whose recipe cannot be read is a draw of its own."""
    return run.recipe.seed if run.recipe else run.name


def _ended_early(run: Run) -> bool:
    return run.status.get("status") in OVER or died(run.status)


def _how(run: Run) -> str:
    return "died" if died(run.status) else {"failed": "failed", "lost": "was ended"}[str(run.status.get("status"))]


def grouped(runs: Sequence[Run]) -> list[Group]:
    """The runs in groups, in the order of their first ones; one whose recipe cannot be read is alone."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        alike = run.recipe and json.dumps([{**run.recipe.computing(), "seed": 0}, run.data], sort_keys=True)
        found.setdefault(alike or f"{run.place}", []).append(run)
    return [Group(name, members) for name, members in zip(_names(list(found.values())), found.values(), strict=True)]


def _names(groups: Sequence[Sequence[Run]]) -> list[str]:
    """The folder that the runs of a group and no others lie in, as a sweep has them; or the name of the first."""
    parents = [{run.place.parent for run in members} for members in groups]
    homes = Counter(parent for found in parents for parent in found)
    first = [f"{m[0].name} and {len(m) - 1} more" if len(m) > 1 else m[0].name for m in groups]
    chosen = [
        _printable(next(iter(found))) if len(m) > 1 and len(found) == 1 and homes[next(iter(found))] == 1 else name
        for m, found, name in zip(groups, parents, first, strict=True)
    ]
    twice = Counter(chosen)
    return [name if twice[name] == 1 else other for name, other in zip(chosen, first, strict=True)]


def _printable(folder: Path) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in folder.name) or str(folder)


def summary(groups: Sequence[Group], warnings: Iterable[str] = ()) -> Table:
    """A row for each group."""
    rows = [
        [
            group.name,
            str(len(group.kept)) + (f" of {len(group.runs)}" if len(group.kept) < len(group.runs) else ""),
            str(group.reached),
            group.accuracy(),
            group.last("loss", ".4f"),
            group.last("effective_rank", ".1f"),
        ]
        for group in groups
    ]
    headers = ["group", "runs", "step", "kNN top-1", "loss", "effective rank"]
    text = (
        "Runs that differ in their seed alone: mean ± standard deviation of the sample, and of how many runs, at the "
        "last step that all of them have. In the charts the band is one standard deviation wide on each side."
    )
    return Table("Groups", headers, rows, text, [*warnings])
