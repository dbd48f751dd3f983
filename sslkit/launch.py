"""From a recipe's name to a finished run: the directory, going on, signals, the summary."""

from __future__ import annotations

import json
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from sslkit import checkpoint, doctor, local, registry, view_grid
from sslkit.attending import Attending
from sslkit.build import Parts, choose_device, resolve_compile
from sslkit.diff import differences
from sslkit.errors import RunFailed, SslkitError, UserError
from sslkit.preparation import prepare, tell_findings, view_pixels
from sslkit.progress import Display, PatientConsole, say
from sslkit.randomness import undisturbed
from sslkit.recipe import Recipe, parse_recipe, read_recipe
from sslkit.result import Result, Status
from sslkit.rules import Severity
from sslkit.run_directory import LOCK_HEADER, RunDirectory, environment
from sslkit.stopping import StopSignals
from sslkit.summary import announce, device_name, summarise
from sslkit.trainer import Trainer
from sslkit.words import COMMAND, spoken

EXIT_CODES = {"interrupted": 130, "lost": 1}
"""What `sslkit train` ends with, by the status of its run; 0 for the others."""


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
    """The command: `run` on the recipe of a file.

    Args:
        source: The recipe, by path or shipped name.
        overrides: `key=value` each.
        steps, device, run_dir, resume, strict, stop_on, console: As `run` takes them.

    Returns:
        The exit code: 0 done or preempted, 1 ended by `stop_on`, 130 interrupted from the keyboard.

    Raises:
        UserError, RunFailed: as `run`.
    """
    recipe = read_recipe(source, overrides)
    result = run(
        recipe, source, overrides, steps=steps, device=device, run_dir=run_dir, resume=resume, strict=strict,
        stop_on=stop_on, console=console or PatientConsole(),
    )  # fmt: skip
    return EXIT_CODES.get(result.status, 0)


def run(
    recipe: Recipe,
    source: str | None,
    overrides: Sequence[str] = (),
    *,
    steps: int | None,
    device: str,
    run_dir: str | None,
    resume: Literal["auto", "never"],
    strict: bool,
    stop_on: Severity | None,
    console: Console,
    should_stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Train a recipe, or go on where an earlier call stopped: what the command and `sslkit.train` do.

    Torch's random numbers and flags are afterwards what they were before.

    Args:
        recipe: What to train.
        source: The file or shipped name that the recipe was read from, for errors to point at; None if there is none.
        overrides: The `key=value` that it was read with.
        steps: Stop after this many optimizer steps.
        device: `auto`, `cpu` or `cuda`.
        run_dir: Directory of the run; `runs/NAME` without it.
        resume: `never` begins a new run beside one that is there.
        strict: Refuse what is otherwise only warned of before training.
        stop_on: End the run, with a checkpoint, at the first live finding as grave as this.
        console: Where to print.
        should_stop: Asked before each step; True ends the run as Ctrl-C does, with a checkpoint.

    Raises:
        UserError: the recipe, the options or the machine do not allow it.
        RunFailed: the run began and could not go on.
    """
    where = choose_device(device)
    path = _choose_directory(recipe.name, run_dir, resume)
    with _opened(path) as files, undisturbed(where):
        earlier = _earlier_recipe(files, leave=local.is_allowed() or bool(recipe.local_parts()))
        if earlier is not None:
            given = source is not None and spoken() is COMMAND
            arguments = [str(source), *(f"--set={o}" for o in overrides)] if given else []
            arguments += ["--allow-local-code"] if given and recipe.local_parts() else []
            recipe = _compare(recipe, earlier, path, arguments)
            if _finished(files):
                console.print(f"{path}: this run is finished", highlight=False)
                summarise(files.path, console)
                return Result.of(files.path, "done")
        with _reported(files, recipe):
            parts, known = prepare(recipe, source, overrides, where, partial(say, console))
            tell_findings(known, source, overrides, console, strict=strict)
            attending = Attending(known, partial(say, console), stop_on)
            return Result.of(files.path, _train(parts, files, attending, StopSignals(should_stop), steps, console))


def _train(
    parts: Parts, files: RunDirectory, attending: Attending, signals: StopSignals, steps: int | None, console: Console
) -> Status:
    device = parts.device
    recipe = parts.recipe = resolve_compile(parts.recipe, view_pixels(parts), device.type)
    found = _newest_checkpoint(files, parts, console)
    files.write("recipe.lock.toml", LOCK_HEADER + recipe.to_toml_with(files.keep_local(recipe.local_parts())))
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
        say(console, f"{files.path} is at step {trainer.step} already; {spoken().more_steps} goes on")
        return "stopped"
    return _fit(trainer, display, signals, attending, stop, console)


def _fit(
    trainer: Trainer, display: Display, signals: StopSignals, attending: Attending, stop: int, console: Console
) -> Status:
    files = trainer.files
    status: Status = "failed"
    reason: dict[str, Any] = {}
    files.status("running", step=trainer.step, of=trainer.info.total_steps)
    try:
        # Only from here on: before, there is nothing to save, and Ctrl-C may end things at once.
        with signals, display:
            display.advance(trainer.step)
            trainer.fit(stop, lambda: display.advance(trainer.step))
        status = "done" if trainer.step == trainer.info.total_steps else "stopped"
        if signals.asked() and trainer.step < stop:
            status = "interrupted" if signals.received in (None, signal.SIGINT) else "preempted"
        elif attending.lost and trainer.step < stop:
            status = "lost"
    except KeyboardInterrupt:
        status = "interrupted"  # a second Ctrl-C: the newest checkpoint is the earlier one
        raise
    except BaseException:
        if int(trainer.bad_step) >= 0:
            reason = {"reason": "not_finite", "step": int(trainer.bad_step) + 1}
        raise
    finally:
        files.status(status, **{"of": trainer.info.total_steps, "step": trainer.step, **reason})
        _end(trainer, status)
        if trainer.recipe.train.compile:
            torch.compiler.reset()  # or the ninth run of a process would meet torch's limit of recompilations
    if status == "done":
        summarise(files.path, console)
    elif status == "lost":
        say(
            console,
            f"ended at step {trainer.step} of {trainer.info.total_steps}, as {spoken().stop_on} asks; all of it: "
            f"sslkit doctor {shlex.quote(str(files.path))}",
        )
    else:
        how = spoken().more_steps if status == "stopped" else spoken().again
        console.print(
            f"{status} at step {trainer.step} of {trainer.info.total_steps}; {how} goes on from there", highlight=False
        )
        say(console, f"verdict: {doctor.examine_run(files.path).verdict}")
        console.print(f"run directory: {files.path}", highlight=False, soft_wrap=True)
    return status


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
    except (Exception, SystemExit) as error:
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


# ---------------------------------------------------------------- the directory


def _choose_directory(name: str, chosen: str | None, resume: str) -> Path:
    path = Path(chosen) if chosen else Path("runs") / name
    if resume == "auto" or not (path / "recipe.lock.toml").exists():
        return path
    if chosen:
        given, beside = spoken().resume_never, spoken().run_dir
        raise UserError(f"{path}: holds a run already, and {given} was given; choose another {beside}")
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


def _earlier_recipe(files: RunDirectory, leave: bool) -> Recipe | None:
    """The recipe of the run that is there. Leave for the new one's code is also leave for the copies of that run, and
    for no other file: the directory may be a stranger's."""
    if not files.has_run:
        return None
    text = files.lock_file.read_text(encoding="utf-8")
    # A run that ended before its first checkpoint has nothing to lose: the directory is free.
    begun = files.checkpoints.is_dir() and any(files.checkpoints.iterdir())
    try:
        with local.allowed(leave and files.path.resolve() / local.FOLDER):
            return parse_recipe(text, str(files.lock_file)) if begun else None
    except UserError as error:
        raise UserError(
            f"{files.path}: holds a run whose recipe cannot be read here; choose another {spoken().run_dir}, or put "
            "back the packages that it was trained with",
            *(f"  {line}" for line in error.lines),
        ) from None


def _compare(recipe: Recipe, earlier: Recipe, path: Path, arguments: Sequence[str]) -> Recipe:
    """The recipe to go on with: what `auto` chose at the start stands."""
    if recipe.train.compile == "auto":
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"compile": earlier.train.compile})})
    if changed := differences(earlier, recipe):
        beside = f"--run-dir {shlex.quote(f'{path}-2')}"
        way = f"choose another {spoken().run_dir} or name"
        if arguments:
            way = f"to train the changed one: sslkit train {shlex.join(arguments)} {beside}"
        raise UserError(
            f"{path}: holds a run of another recipe; {way}",
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
            f"{files.path}: no checkpoint can be read; put a sound one back, or begin anew with another "
            f"{spoken().run_dir}",
        )
    for problem in problems:
        say(console, problem)
    if found and found.facts["data_fingerprint"] != parts.data.fingerprint:
        raise UserError(
            f"{files.path}: the data changed since this run began (fingerprint {found.facts['data_fingerprint']}, now "
            f"{parts.data.fingerprint}); put the old data back, or start anew with another {spoken().run_dir}"
        )
    if found and parts.recipe.local_parts() and found.facts["recipe_hash"] != parts.recipe.hash():
        raise UserError(
            f"{files.path}: the code in {files.path / local.FOLDER} is not what the run was begun with; put the old "
            f"one back, or start anew with another {spoken().run_dir}"
        )
    for line in _other_code(found, parts.recipe) if found else ():
        say(console, f"warning: {line}")
    return found


def _other_code(found: checkpoint.Checkpoint, recipe: Recipe) -> list[str]:
    """A line for each package that is not what it was when the checkpoint was written."""
    before = {was["component"]: was for was in found.facts.get("plugins", [])}
    changed: dict[str, list[str]] = {}
    for now in recipe.provenance():
        was = before.get(now["component"], now)
        package = now["distribution"]
        if was["version"] != now["version"]:
            line = f"{package} was {was['version']} up to step {found.step} and is {now['version']} now"
        elif was.get("source", now.get("source")) != now.get("source"):
            line = f"the code of {package} {now['version']} is not what it was up to step {found.step}"
        else:
            continue
        changed.setdefault(line, []).append(now["component"])
    return [f"{line} ({', '.join(parts)}): what follows need not compare" for line, parts in changed.items()]


# ---------------------------------------------------------------- errors


def _culprit(error: BaseException) -> str:
    """The component in whose code an error arose, as far as its traceback tells."""
    modules = [f.f_globals.get("__name__", "") for f, _ in traceback.walk_tb(error.__traceback__)]
    for module in reversed(modules):
        if origin := registry.origin_of(module):
            return origin if local.source_in(module) else f"{module.partition('.')[0]} ({origin})"
    return "the run"


def _memory_advice(recipe: Recipe, error: Exception) -> str:
    train = recipe.train
    return (
        f"out of memory with train.batch_size = {train.batch_size}, accumulate = "
        f"{train.accumulate}, precision = {train.precision!r}: {str(error).partition('. ')[0]}. Make the batch "
        "smaller, or train.accumulate larger"
    )
