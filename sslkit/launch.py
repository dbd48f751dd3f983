"""From a recipe's name to a finished run: the directory, going on, signals, the summary."""

from __future__ import annotations

import json
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from rich.console import Console

from sslkit import checkpoint, doctor, registry, view_grid
from sslkit.attending import Attending
from sslkit.build import Parts, build, choose_device, resolve_compile
from sslkit.diff import differences
from sslkit.errors import RunFailed, SslkitError, UserError
from sslkit.facts import gather
from sslkit.progress import Display, PatientConsole, say
from sslkit.recipe import Recipe, parse_recipe, read_recipe
from sslkit.rules import Facts, Finding, Severity
from sslkit.run_directory import LOCK_HEADER, RunDirectory, environment
from sslkit.sources import place
from sslkit.summary import announce, device_name, summarise
from sslkit.train import Trainer

INTERRUPTED = 130


@dataclass
class StopSignals:
    """SIGTERM, SIGINT and SIGUSR1 set a flag, which the loop polls; the same signal again takes its usual course."""

    received: int | None = None
    _before: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> StopSignals:
        for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
            number = getattr(signal, name, None)  # Windows has no SIGUSR1
            if number is not None:
                try:
                    self._before[number] = signal.signal(number, self._handle)
                except ValueError:  # not the main thread: whoever runs us there stops us in their own way
                    break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.received = number
        signal.signal(number, self._before[number])

    def asked(self) -> bool:
        """True once a signal came."""
        return self.received is not None


def train(
    source: str,
    overrides: Sequence[str] = (),
    *,
    steps: int | None = None,
    device: str = "auto",
    run_dir: str | None = None,
    resume: Literal["auto", "never"] = "auto",
    strict: bool = False,
    stop_on: Severity | None = None,
    console: Console | None = None,
) -> int:
    """Train a recipe, or go on where an earlier call stopped.

    Args:
        source: The recipe, by path or shipped name.
        overrides: `key=value` each.
        steps: Stop after this many optimizer steps.
        device: `auto`, `cpu` or `cuda`.
        run_dir: Directory of the run; `runs/NAME` without it.
        resume: `never` begins a new run beside one that is there.
        strict: Refuse what is otherwise only warned of before training.
        stop_on: End the run, with a checkpoint, at the first live finding as grave as this.
        console: Where to print.

    Returns:
        The exit code: 0 done or preempted, 1 ended by `stop_on`, 130 interrupted from the keyboard.

    Raises:
        UserError: the recipe, the options or the machine do not allow it.
        RunFailed: the run began and could not go on.
    """
    console = console or PatientConsole()
    recipe = read_recipe(source, overrides)
    path = _choose_directory(recipe.name, run_dir, resume)
    with _opened(path) as files:
        earlier = _earlier_recipe(files)
        if earlier is not None:
            recipe = _compare(recipe, earlier, path, [source, *(f"--set={o}" for o in overrides)])
            if _finished(files):
                console.print(f"{path}: this run is finished", highlight=False)
                summarise(files.path, console)
                return 0
        with _reported(files, recipe):
            parts, known = prepare(recipe, source, overrides, device, partial(say, console))
            tell_findings(known, source, overrides, console, strict=strict)
            return _train(parts, files, Attending(known, partial(say, console), stop_on), steps, console)


def _train(parts: Parts, files: RunDirectory, attending: Attending, steps: int | None, console: Console) -> int:
    signals, device = StopSignals(), parts.device
    recipe = parts.recipe = resolve_compile(parts.recipe, view_pixels(parts), device.type)
    found = _newest_checkpoint(files, parts, console)
    files.write("recipe.lock.toml", LOCK_HEADER + recipe.to_toml())
    files.write("facts.json", attending.course.facts.model_dump_json(indent=1, exclude_none=True) + "\n")
    view_grid.write(parts.data, parts.run, parts.views, recipe.name, files.path / "views.png")
    files.write("env.json", json.dumps(
        environment(sys.argv, recipe.provenance(), device_name(device), parts.data.fingerprint), indent=1
    ) + "\n")  # fmt: skip
    files.write("bad_samples.jsonl", "".join(json.dumps(dict(bad)) + "\n" for bad in parts.data.bad))
    files.open_metrics(int(found.facts["metrics_offset"]) if found else 0)

    display = Display(console, parts.run.total_steps, parts.run.steps_per_epoch)
    parts.observers["progress"] = display
    parts.observers["doctor"] = attending
    trainer = Trainer(parts, files, display.say, lambda: signals.asked() or attending.lost)
    files.lasting["resumed_at"] = files.read_status().get("resumed_at", [])
    if found:
        files.lasting["resumed_at"] = [*files.lasting["resumed_at"], found.step]
        trainer.restore(found)
        say(console, f"going on from step {found.step} ({found.path})")
    announce(trainer, console)
    stop = min(steps or parts.run.total_steps, parts.run.total_steps)
    # At the very end there is nothing to train, but a run that died there still has to be called done.
    if stop <= trainer.step < parts.run.total_steps:
        say(console, f"{files.path} is at step {trainer.step} already; a larger --steps goes on")
        return 0
    return _fit(trainer, display, signals, attending, stop, console)


def _fit(
    trainer: Trainer, display: Display, signals: StopSignals, attending: Attending, stop: int, console: Console
) -> int:
    files, status = trainer.files, "failed"
    facts: dict[str, Any] = {"of": trainer.info.total_steps}
    files.status("running", step=trainer.step, of=trainer.info.total_steps)
    try:
        # Only from here on: before, there is nothing to save, and Ctrl-C may end things at once.
        with signals, display:
            display.advance(trainer.step)
            trainer.fit(stop, lambda: display.advance(trainer.step))
        status = "done" if trainer.step == trainer.info.total_steps else "stopped"
        if signals.received is not None and trainer.step < stop:
            status = "interrupted" if signals.received == signal.SIGINT else "preempted"
        elif attending.lost and trainer.step < stop:
            status = "lost"
    except KeyboardInterrupt:
        status = "interrupted"  # a second Ctrl-C: the newest checkpoint is the earlier one
        raise
    finally:
        facts["step"] = trainer.step
        if status == "failed" and int(trainer.bad_step) >= 0:
            facts |= {"reason": "not_finite", "step": int(trainer.bad_step) + 1}
        files.status(status, **facts)
        _end(trainer, status)
    if status == "done":
        summarise(files.path, console)
    elif status == "lost":
        say(
            console,
            f"ended at step {trainer.step} of {trainer.info.total_steps}, as --stop-on asks; all of it: sslkit doctor "
            f"{shlex.quote(str(files.path))}",
        )
        return 1
    else:
        how = "a larger --steps" if status == "stopped" else "the same command"
        console.print(
            f"{status} at step {trainer.step} of {trainer.info.total_steps}; {how} goes on from there", highlight=False
        )
        say(console, f"verdict: {doctor.examine_run(files.path).verdict}")
        console.print(f"run directory: {files.path}", highlight=False, soft_wrap=True)
    return INTERRUPTED if status == "interrupted" else 0


@contextmanager
def _reported(files: RunDirectory, recipe: Recipe) -> Iterator[None]:
    """Turn whatever goes wrong inside into lines; a traceback that may be wanted goes to a file."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunFailed(_memory_advice(recipe, error)) from error
    except SslkitError as error:
        if error.__cause__ is not None and not isinstance(error, UserError):
            files.write("traceback.txt", traceback.format_exc())
            *before, last = error.lines
            raise type(error)(*before, f"{last} (the traceback is in {files.path / 'traceback.txt'})") from error
        raise
    except Exception as error:
        files.write("traceback.txt", traceback.format_exc())
        raise RunFailed(
            f"{_culprit(error)} failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]} "
            f"(the traceback is in {files.path / 'traceback.txt'})"
        ) from error


def _end(trainer: Trainer, status: str) -> None:
    """Tell the observers, whose own trouble must not hide why a run failed."""
    try:
        trainer.bus.emit("run_ended", run=trainer, status=status)
    except RunFailed:
        if status != "failed":
            raise


def prepare(
    recipe: Recipe, source: str, overrides: Sequence[str], device: str, tell: Callable[[str], None]
) -> tuple[Parts, Facts]:
    """Build the parts of a recipe that was read from `source`, and try them out.

    Raises:
        UserError: they do not go together, or not with the machine; with the line of the recipe.
    """
    doctor.check_accepted(recipe.train.accept)
    with placed(source, overrides):
        parts = build(recipe, choose_device(device), tell)
    return parts, gather(parts)


@contextmanager
def placed(source: str, overrides: Sequence[str]) -> Iterator[None]:
    """Put `recipe.toml:7: ` before what the parts of a recipe object to, where a line begins with a key or a slot."""
    try:
        yield
    except UserError as error:
        lines = []
        for line in error.lines:
            named = re.match(r"([a-z_]+(?:\.[a-z_0-9]+)*)(?:: | '| is )", line)
            keys = named[1].split(".") if named else []
            if keys and keys[0] in Recipe.model_fields:
                line = f"{place(source, overrides, *keys)}: {line}"
            lines.append(line)
        raise UserError(*lines) from error.__cause__


def tell_findings(
    known: Facts, source: str, overrides: Sequence[str], console: Console, *, strict: bool = False
) -> None:
    """Before training: warn of what is known to go wrong, and stop on what is sure to.

    Findings that the recipe accepts by id are left out.

    Raises:
        UserError: one line for each finding that is an error, or with `strict` a warning.
    """
    refused = []
    for line in doctor.rules()[1]:
        say(console, f"warning: a health rule is broken and is not asked: {line}")
    for finding in located(doctor.before(known), source, overrides):
        if finding.id in known.accepted or finding.severity == "info":
            continue
        at = ": ".join(filter(None, [finding.where, finding.key]))
        line = f"{at or source}: {finding.sentence}"
        accept = f"--set train.accept='[\"{finding.id}\"]'"
        if finding.severity == "error" or strict:
            refused.append(f"{line} (to train all the same: {accept})")
        else:
            say(console, f"warning: {line} (to leave this out: {accept})")
    if refused:
        raise UserError(*refused)


def located(findings: Sequence[Finding], source: str, overrides: Sequence[str]) -> list[Finding]:
    """The findings with the recipe's file and line that set what is to blame."""
    return [replace(f, where=place(source, overrides, *f.key.split("."))) if f.key else f for f in findings]


def view_pixels(parts: Parts) -> float:
    """Pixels of all views of the whole run."""
    run = parts.run
    return float(run.total_steps) * run.batch_size * sum(view.size**2 for view in run.views)


# ---------------------------------------------------------------- the directory


def _choose_directory(name: str, chosen: str | None, resume: str) -> Path:
    path = Path(chosen) if chosen else Path("runs") / name
    if resume == "auto" or not (path / "recipe.lock.toml").exists():
        return path
    if chosen:
        raise UserError(f"{path}: holds a run already, and --resume never was given; choose another --run-dir")
    number = 2
    while Path("runs", f"{name}-{number}").exists():
        number += 1
    return Path("runs", f"{name}-{number}")


@contextmanager
def _opened(path: Path) -> Iterator[RunDirectory]:
    """The directory, held while the block runs; if nothing came of it, no trace is left."""
    files = RunDirectory(path)
    try:
        yield files
    finally:
        files.close()
        if not files.has_run:
            (path / ".lock").unlink(missing_ok=True)
            if not any(path.iterdir()):
                path.rmdir()


def _earlier_recipe(files: RunDirectory) -> Recipe | None:
    if not files.has_run:
        return None
    text = files.lock_file.read_text(encoding="utf-8")
    # A run that ended before its first checkpoint has nothing to lose: the directory is free.
    begun = files.checkpoints.is_dir() and any(files.checkpoints.iterdir())
    return parse_recipe(text, str(files.lock_file)) if begun else None


def _compare(recipe: Recipe, earlier: Recipe, path: Path, arguments: Sequence[str]) -> Recipe:
    """The recipe to go on with: what `auto` chose at the start stands."""
    if recipe.train.compile == "auto":
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"compile": earlier.train.compile})})
    if changed := differences(earlier, recipe):
        raise UserError(
            f"{path}: holds a run of another recipe; to train the changed one: "
            f"sslkit train {shlex.join(arguments)} --run-dir {shlex.quote(str(path) + '-2')}",
            *(f"  {change}" for change in changed),
        )
    return recipe


def _finished(files: RunDirectory) -> bool:
    return files.read_status().get("status") == "done"


def _newest_checkpoint(files: RunDirectory, parts: Parts, console: Console) -> checkpoint.Checkpoint | None:
    checkpoint.clean(files.checkpoints)
    found, problems = checkpoint.newest(files.checkpoints)
    if found is None and (problems or any(files.checkpoints.glob("damaged-*"))):
        raise UserError(
            *problems,
            f"{files.path}: no checkpoint can be read; put a sound one back, or begin anew with another --run-dir",
        )
    for problem in problems:
        say(console, problem)
    if found and found.facts["data_fingerprint"] != parts.data.fingerprint:
        raise UserError(
            f"{files.path}: the data changed since this run began (fingerprint {found.facts['data_fingerprint']}, now "
            f"{parts.data.fingerprint}); put the old data back, or start anew with another --run-dir"
        )
    return found


# ---------------------------------------------------------------- errors


def _culprit(error: BaseException) -> str:
    """The component in whose code an error arose, as far as its traceback tells."""
    owners = {p.target.partition(":")[0].partition(".")[0]: p for p in registry.providers()}
    frames = [f.f_globals.get("__name__", "").partition(".")[0] for f, _ in traceback.walk_tb(error.__traceback__)]
    for package in reversed(frames):
        if package in owners:
            return f"{package} ({owners[package].origin})"
    return "the run"


def _memory_advice(recipe: Recipe, error: Exception) -> str:
    train = recipe.train
    return (
        f"out of memory with train.batch_size = {train.batch_size}, accumulate = "
        f"{train.accumulate}, precision = {train.precision!r}: {str(error).partition('. ')[0]}. Make the batch "
        "smaller, or train.accumulate larger"
    )
