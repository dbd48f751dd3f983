"""A search: Optuna proposes values, each trial is trained as a sweep's runs are, and a figure says how good they are.

All that a search knows is in `sweep.json`: it is killed and goes on as if it had not been, and Optuna is told its past
anew. What is maximised is measured on training images, so the test images stay unseen by the choice.
"""

from __future__ import annotations

import json
import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sslkit.errors import SslkitError, UserError
from sslkit.rules import is_number
from sslkit.run_directory import read_json
from sslkit.sweeping import plan, pool, spaces
from sslkit.sweeping.grid import Progress, Waiting
from sslkit.sweeping.jobs import ASKED, INTERRUPTED, LOG, How, Job, Outcome, said
from sslkit.sweeping.pool import Task
from sslkit.telling import tell

FIGURE = "sweep_figure.json"
"""Where a run's figure is left, in its directory."""
MEANING = {
    "knn_held_out": "kNN accuracy among training images, a tenth of them as queries; no test image is looked at",
    "lidar": "LiDAR of training images, which needs no labels (Thilak et al. 2024)",
    "auto": "kNN accuracy among training images, a tenth of them as queries, or without labels LiDAR",
}


def command(
    how: How, options: Sequence[str], trials: int | None, by: str | None, seeds: int, jobs: int, folder: str | None,
    *, dry_run: bool,
) -> int:  # fmt: skip
    """`sslkit sweep --search`.

    Raises:
        UserError: an option, the recipe or the folder does not allow it, or Optuna is not installed.
    """
    from sslkit import sweeping

    spaces.check_installed()
    asked = spaces.read(options)
    if trials is None:
        raise UserError("--search: needs --trials, the number of runs to look with")
    plan.check_keys(list(asked), how.overrides, "--search")
    plan.check_all(how.recipe, how.overrides, [{key: space.low_text for key, space in asked.items()}])
    example = {key: space.high_text for key, space in asked.items()}
    first = plan.check_all(how.recipe, how.overrides, [example])
    place = sweeping.folder_of(folder, first)
    settings: dict[str, Any] = {
        "spaces": {key: space.text for key, space in asked.items()}, "by": by or "auto", "seeds": seeds,
        "steps": how.steps,
    }  # fmt: skip

    def planned() -> plan.Note:
        note = plan.noted(place, how.recipe, how.overrides, list(asked), example)
        if note.search is None and note.folders:
            raise UserError(f"{place}: holds a grid; choose another --dir")
        note.search = known = note.search or {**settings, "trials": []}
        for key, value in settings.items():
            if known[key] != value:
                raise UserError(
                    f"{place}: holds a search with other {key} ({json.dumps(known[key])}, now {json.dumps(value)}), "
                    "whose figures do not compare; choose another --dir"
                )
        for number, trial in enumerate(known["trials"]):
            values = trial["values"]
            if values.keys() != asked.keys() or not all(asked[key].holds(text) for key, text in values.items()):
                raise UserError(f"{note.path}: cannot be read (the values of trial {number}); choose another --dir")
        return note

    note = planned()  # what does not fit is refused before anything is written
    for line in plan.constants(how.recipe, how.overrides, [example]):
        tell(f"note: {line}")
    if dry_run:
        begun = len(note.search["trials"]) if note.search else 0
        tell(f"{trials} trials of {seeds} {'run' if seeds == 1 else 'runs'} each, {begun} begun")
        return 0
    with sweeping.held(place):
        note = planned()  # another search may have been here since
        search = Search(place, note, asked, how, trials, range(first.seed, first.seed + seeds), jobs)
        note.write()
        tell(f"maximised: {MEANING[settings['by']]}")
        received = pool.run(search, pool.places(min(jobs, trials * seeds), how.device))
    search.summarise()
    return sweeping.ended(received, search.progress.failed)


class Search:
    """Work for `pool.run`: the runs of each trial, and the measurement of each run's figure."""

    def __init__(
        self,
        folder: Path,
        note: plan.Note,
        asked: Mapping[str, spaces.Space],
        how: How,
        trials: int,
        seeds: Sequence[int],
        jobs: int,
    ) -> None:
        self.folder, self.note, self.how, self.seeds, self._say = folder, note, how, seeds, tell
        self.number = max(trials, len(self.trials))
        self.study = spaces.Study(asked, together=jobs > 1)
        for trial in self.trials:
            if "value" in trial:
                self.study.add(trial["values"], trial["value"])
        self.progress = Progress(self.number * len(seeds), tell)
        self.progress.over = len(seeds) * sum("value" in trial for trial in self.trials)
        self.progress.failed = sum("problem" in trial for trial in self.trials)
        self.waiting = Waiting(tell)
        self.running: dict[str, tuple[int, Job, bool]] = {}
        """By name: the trial, the run, and whether it is being measured."""
        self.put_off: set[str] = set()
        """Runs that were asked to end, or killed, which are not gone on with by this call but by the next."""

    @property
    def trials(self) -> list[dict[str, Any]]:
        """What is known of each: `values`, `figures` by seed, and at the end `value`, None if a run failed."""
        assert self.note.search is not None
        found: list[dict[str, Any]] = self.note.search["trials"]
        return found

    def jobs(self, number: int) -> list[Job]:
        """The runs of a trial."""
        name = f"trial-{number:04}"
        return [
            Job(f"{name}/seed-{seed}", self.folder / name / f"seed-{seed}",
                plan.settings(self.how.overrides, self.trials[number]["values"], seed), self.how)
            for seed in self.seeds
        ]  # fmt: skip

    def take(self) -> Task | None:
        """A measurement or a run of a trial that was begun, or a run of a new one."""
        while True:
            for number, trial in enumerate(self.trials):
                if "value" in trial:
                    continue
                for job in self.jobs(number):
                    settled = job.directory.name in trial["figures"] or job.name in self.put_off
                    if settled or job.name in self.running or not self.waiting.free(job):
                        continue
                    if task := self._next(number, job):
                        return task
            if len(self.trials) >= self.number:
                return None
            self._ask()

    def _next(self, number: int, job: Job) -> Task | None:
        try:
            if measuring := job.finished():
                task = measurement(job, self.note.search["by"] if self.note.search else "auto")
            else:
                task = job.task()
                self.progress.begun(job)
        except SslkitError as error:
            self._settle(number, job, None, Outcome("failed", error.lines[0]))
            return None
        self.running[job.name] = number, job, measuring
        return task

    def _ask(self) -> None:
        values = self.study.ask(len(self.trials))
        self.trials.append({"values": values, "figures": {}})
        self.note.folders[f"trial-{len(self.trials) - 1:04}"] = values
        self.note.write()  # before a run begins
        self._say(f"trial {len(self.trials) - 1}: {', '.join(f'{key}={value}' for key, value in values.items())}")

    def left(self) -> bool:
        """Whether there are runs without a figure, but for those that somebody asked to end."""
        return len(self.trials) < self.number or any(
            job.directory.name not in trial["figures"] and job.name not in self.put_off
            for number, trial in enumerate(self.trials)
            if "value" not in trial
            for job in self.jobs(number)
        )

    def ended(self, task: Task, code: int) -> None:
        """Take down what came of a run or of its measurement."""
        number, job, measured = self.running.pop(task.name)
        outcome = job.outcome(code)
        if "value" in self.trials[number]:  # another of its seeds failed while this one was on its way
            self.progress.ended(job, outcome)
        elif outcome.kind == "ended" or code < 0 or code == INTERRUPTED:
            self.put_off.add(job.name)
            asked = code == INTERRUPTED or -code in ASKED
            self.progress.ended(job, replace(outcome, kind="ended") if asked else outcome)
        elif not measured:
            if outcome.kind == "failed":
                self._settle(number, job, None, outcome)
        else:
            found = read_json(job.directory / FIGURE) if code == 0 else {}
            value = found.get("value")
            if is_number(value):
                outcome = replace(outcome, text=f"{found.get('by')} {value:.4f}; {outcome.text}")
                self._settle(number, job, value, outcome)
            else:
                told = said(job.directory / LOG)[-1:] or [f"ended with {code}"]
                self._settle(number, job, None, Outcome("failed", f"its figure could not be measured: {told[0]}"))

    def _settle(self, number: int, job: Job, value: float | None, outcome: Outcome) -> None:
        trial = self.trials[number]
        trial["figures"][job.directory.name] = value
        left = [other for other in self.jobs(number) if other.directory.name not in trial["figures"]]
        if value is None:
            trial["problem"] = f"{job.name}: {outcome.text}"
        if value is None or not left:
            trial["value"] = None if value is None else statistics.fmean(trial["figures"].values())
            self.study.add(trial["values"], trial["value"])
        self.note.write()
        self.progress.ended(job, outcome)
        if value is None and (spared := [other for other in left if other.name not in self.running]):
            self.progress.over += len(spared)
            self._say(f"trial {number}: has no figure now, so {len(spared)} more of its runs "
                      f"{'is' if len(spared) == 1 else 'are'} left out")  # fmt: skip

    def summarise(self) -> None:
        """The best trials, and how the best is trained again."""
        found = [(trial["value"], n) for n, trial in enumerate(self.trials) if trial.get("value") is not None]
        ranked = sorted(found, key=lambda pair: (-pair[0], pair[1]))
        for value, number in ranked[:5]:
            words = ", ".join(f"{key}={text}" for key, text in self.trials[number]["values"].items())
            self._say(f"  {value:.4f}  trial {number}: {words}")
        if ranked:
            value, number = ranked[0]
            if doubt := self._doubt(value, number):
                self._say(doubt)
            # The best of many runs was lucky, too: a seed that chose nothing tells by how much.
            settings = plan.settings(self.how.overrides, self.trials[number]["values"], self.seeds[-1] + 1)
            again = Job("best", Path(f"{self.folder}-best"), settings, self.how)
            self._say(f"the best, with a seed that chose nothing: sslkit {shlex.join(again.arguments())}")

    def _doubt(self, value: float, number: int) -> str:
        """How uncertain a trial's accuracy is, by the number of its queries; empty for other figures."""
        told = [read_json(job.directory / FIGURE) for job in self.jobs(number)]
        counts = [float(n) for figure in told if (n := figure.get("knn_queries")) is not None and is_number(n)]
        queries = max(counts, default=0.0)
        if queries < 1 or not 0 <= value <= 1:
            return ""
        error = math.sqrt(value * (1 - value) / queries)
        return (
            f"a run's figure is of {queries:.0f} queries: its standard error is {error:.4f}, and trials that are "
            "nearer to one another may be alike"
        )


def measurement(job: Job, by: str) -> Task:
    """The process that measures a run's figure."""
    from sslkit import local

    arguments = [str(job.directory), by, job.how.device, *(["--allow-local-code"] if local.is_allowed() else [])]
    return Task(job.name, "sslkit.sweeping.held_out", arguments, job.directory / LOG)
