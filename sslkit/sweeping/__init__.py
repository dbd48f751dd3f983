"""Several runs of one recipe: a grid of its options, or a search among them."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from sslkit.compare_groups import spread
from sslkit.errors import UserError
from sslkit.recipe import Recipe
from sslkit.recorded import first_and_last
from sslkit.run_directory import cannot_lock, read_metrics
from sslkit.sweeping import plan, pool
from sslkit.sweeping.grid import Grid
from sslkit.sweeping.jobs import How, Job
from sslkit.telling import tell


def command(
    recipe: str,
    *,
    grid: Sequence[str],
    seeds: int,
    jobs: int,
    overrides: Sequence[str],
    folder: str | None,
    steps: int | None,
    device: str,
    spaces: Sequence[str],
    trials: int | None,
    by: str | None,
    dry_run: bool,
) -> int:
    """What the command does; its options are in `sslkit.cli_many`.

    Returns:
        The exit code: 0 all done, or a scheduler ended it; 1 a run failed; 130 interrupted.

    Raises:
        UserError: a recipe, an option or the folder does not allow it.
        RunFailed: a process cannot be started, or the folder cannot be written.
    """
    how = How(recipe, tuple(overrides), steps, device)
    if spaces:
        if grid:
            raise UserError("--grid and --search: give one of them; a search chooses the values itself")
        from sslkit.sweeping import search

        return search.command(how, spaces, trials, by, seeds, jobs, folder, dry_run=dry_run)
    if trials is not None or by is not None:
        raise UserError(f"{'--trials' if trials is not None else '--by'}: only with --search")
    asked = plan.read_grid(grid)
    plan.check_keys(list(asked), overrides, "--grid")
    combinations = plan.combinations(asked)
    first = plan.check_all(recipe, overrides, combinations)
    place = folder_of(folder, first)

    def planned() -> tuple[plan.Note, list[Job]]:
        note = plan.noted(place, recipe, overrides, list(asked), combinations[0])
        if note.search is not None:
            raise UserError(f"{place}: holds a search; choose another --dir")
        return note, [
            Job(f"{name}/seed-{seed}", place / name / f"seed-{seed}", plan.settings(overrides, values, seed), how)
            for values in combinations
            for name in [note.folder_of(values)]
            for seed in range(first.seed, first.seed + seeds)
        ]

    _, runs = planned()  # what does not fit is refused before anything is written
    for line in plan.constants(recipe, overrides, combinations):
        tell(f"note: {line}")
    if dry_run:
        show(runs)
        return 0
    with held(place):
        note, runs = planned()  # another sweep may have been here since
        note.write()
        work = Grid(runs, tell)
        received = pool.run(work, pool.places(min(jobs, len(runs)), device))
    summarise(place, runs)
    return ended(received, work.progress.failed)


def folder_of(folder: str | None, recipe: Recipe) -> Path:
    """Where the runs are.

    Raises:
        UserError: it is empty, as an unset variable of a shell gives.
    """
    if folder == "":
        raise UserError("--dir is empty; name a folder, or leave it out")
    return Path(folder) if folder else Path("runs") / f"{recipe.name}-sweep"


def show(runs: Sequence[Job]) -> None:
    """What would be trained, a line for each run."""
    for job in runs:
        state = "finished" if job.finished() else job.status.get("status", "new")
        tell(f"{job.directory}: {state}; {' '.join(f'--set {shlex.quote(text)}' for text in job.overrides)}")
    left = sum(not job.finished() for job in runs)
    tell(f"{len(runs)} {'run' if len(runs) == 1 else 'runs'}, {left} to train")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """The folder, for this sweep alone; the system lets go of it when the sweep ends, however it does.

    Raises:
        UserError: another sweep goes on in it, or it cannot be written.
    """
    lock = folder / ".sweep.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if cannot_lock(lock):  # as some network file systems; then it is on the user's word
            yield
            return
        found = FileLock(lock)
        found.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{folder}: another sweep goes on here; wait for it, or choose another --dir") from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}; choose another --dir") from None
    try:
        yield
    finally:
        found.release()


def summarise(folder: Path, runs: Sequence[Job]) -> None:
    """The accuracy of each combination, with the spread of its seeds."""
    found: dict[str, list[float]] = {}
    for job in runs:
        found.setdefault(job.directory.parent.name, []).extend(_accuracy(job))
    if any(found.values()):
        width = max(map(len, found))
        tell(f"kNN top-1, mean and standard deviation over seeds, below {folder}:")
        for name, values in found.items():
            tell(f"  {name:{width}}  {spread(values)}")
    if sum(job.finished() for job in runs) > 1:
        tell(f"compare them: sslkit compare --group {shlex.quote(str(folder))}")


def _accuracy(job: Job) -> list[float]:
    """The last accuracy of a run that is finished; the random network's is none of it."""
    try:
        _, last = first_and_last(read_metrics(job.directory) if job.finished() else [])
    except OSError:
        return []
    return [] if last is None else [last]


def ended(received: int | None, failed: int) -> int:
    """The exit code of a sweep, by the signal that ended it and the runs that failed."""
    if received is not None:
        tell(f"ended by {signal.Signals(received).name}; the same command goes on from here")
        return 130 if received == signal.SIGINT else 0
    return int(failed > 0)
