"""The runs below a folder, a line each. Reads files only; no torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sslkit import doctor
from sslkit.errors import SslkitError, UserError, printable
from sslkit.recipe import read_recipe
from sslkit.recorded import ABSENT, first_and_last, is_run, natural, run_folders
from sslkit.run_directory import died, read_json

UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


@dataclass(frozen=True)
class Listed:
    """What a run's directory says in a line; None where it does not say."""

    name: str
    """Its directory, below the folder that was asked for."""
    directory: str
    recipe: str | None
    """The recipe's name."""
    hash: str | None
    """Runs with the same hash trained the same."""
    seed: int | None
    status: str | None
    """As in `status.json`; `died` for a run whose process is gone without a word."""
    step: int | None
    of: int | None
    verdict: str
    """The doctor's, or what keeps it from giving one."""
    knn_floor: float | None
    """kNN accuracy at step 0."""
    knn: float | None
    """The last kNN accuracy after some training."""
    time: str | None
    """When the run last said how it stands (UTC)."""


def show(folder: str, *, sort: str, as_json: bool) -> None:
    """What the command does; its options are in `sslkit.cli_many`.

    Raises:
        UserError: there is no such folder, or no run in it.
    """
    found = sorted(listed(Path(folder)), key=ORDERS[sort])
    if as_json:
        print(json.dumps([asdict(run) for run in found], indent=1))
        return
    if not found:
        raise UserError(f"{folder}: there is no run below it; `sslkit train` begins one in runs/NAME")
    now = datetime.now(UTC)
    rows = [row(run, now) for run in found]
    for line in aligned([["run", "recipe", "hash", "status", "step", "kNN top-1", "age", "verdict"], *rows]):
        print(line)


def listed(folder: Path) -> list[Listed]:
    """The runs below a folder, or the one that it is.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "is not there"
        raise UserError(f"{folder}: {problem}; give the folder that your runs are in")
    return [read(path, folder) for path in run_folders(folder, is_made)]


def is_made(path: Path) -> bool:
    """Whether a folder is a run's, of `sslkit train` or of a loop that `sslkit.watch` looks at."""
    return is_run(path) or ((path / "facts.json").is_file() and (path / "metrics.jsonl").is_file())


def read(path: Path, folder: Path) -> Listed:
    """What one run's directory says, whatever of it is there."""
    status = read_json(path / "status.json")
    try:
        recipe = read_recipe(str(path / "recipe.lock.toml"))
    except SslkitError:  # its plugin may be gone, or its code be in a file: the rest is still worth knowing
        recipe = None
    records: list[Mapping[str, Any]] = []
    name = None
    try:
        course = doctor.read_course(path)
        records, name = list(course.records), course.facts.name
        verdict = doctor.examine(course, "", accepted=course.facts.accepted).verdict
    except UserError as error:
        verdict = f"cannot be judged: {error.lines[0].removeprefix(f'{path}: ')}"
    floor, last = first_and_last(records)
    state = status.get("status")
    return Listed(
        name=path.relative_to(folder).as_posix() if path != folder else path.resolve().name,
        directory=str(path),
        recipe=recipe.name if recipe else name or None,
        hash=recipe.hash() if recipe else None,
        seed=recipe.seed if recipe else None,
        status="died" if died(status) else state if isinstance(state, str) else None,
        step=_step(status.get("step")),
        of=_step(status.get("of")),
        verdict=verdict,
        knn_floor=floor,
        knn=last,
        time=_time(status.get("time")),
    )


def _step(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _time(value: object) -> str | None:
    try:
        return value if isinstance(value, str) and datetime.fromisoformat(value).tzinfo else None
    except ValueError:
        return None


# ---------------------------------------------------------------- order and words


STATUSES = ("running", "failed", "lost", "died", "preempted", "interrupted", "stopped", "done")
"""In the order of how soon somebody may have to do something."""

ORDERS: dict[str, Callable[[Listed], Any]] = {
    "name": lambda run: natural(run.name),
    "knn": lambda run: (-math.inf if run.knn is None else run.knn) * -1,
    "age": lambda run: -datetime.fromisoformat(run.time).timestamp() if run.time else math.inf,
    "status": lambda run: (
        STATUSES.index(run.status) if run.status in STATUSES else len(STATUSES),
        natural(run.name),
    ),
}
"""`knn`: the best first. `age`: the newest first."""


def row(run: Listed, now: datetime) -> list[str]:
    """Its cells."""
    first = re.split(r"[:;,]", run.verdict, maxsplit=1)[0]
    floor, last = (ABSENT if value is None else f"{value:.4f}" for value in (run.knn_floor, run.knn))
    return [
        run.name, run.recipe or ABSENT, run.hash or ABSENT, run.status or ABSENT,
        ABSENT if run.step is None else f"{run.step} of {ABSENT if run.of is None else run.of}",
        ABSENT if run.knn is run.knn_floor is None else f"{floor} → {last}",
        age(now - datetime.fromisoformat(run.time)) if run.time else ABSENT, first,
    ]  # fmt: skip


def age(past: timedelta) -> str:
    """How long ago, in the largest unit of which there is one: `3 h`."""
    seconds = max(0, int(past.total_seconds()))
    size, unit = next((pair for pair in UNITS if seconds >= pair[0]), UNITS[-1])
    return f"{seconds // size} {unit}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines, with their columns below one another."""
    told = [[printable(cell) for cell in cells] for cells in rows]
    widths = [max(map(len, column)) for column in zip(*told, strict=True)]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip() for cells in told]
