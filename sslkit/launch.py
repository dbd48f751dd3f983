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
from typing import Any, Literal

import torch
from rich.console import Console

from sslkit import checkpoint, distributed, doctor, forking, initialise, launcher, local, registry, view_grid
from sslkit.attending import Attending
from sslkit.build import Parts, choose_device, resolve_compile
from sslkit.distributed import World
from sslkit.errors import RunFailed, SslkitError, UserError
from sslkit.preparation import prepare, tell_findings, view_pixels
from sslkit.progress import Display, PatientConsole, say
from sslkit.randomness import undisturbed
from sslkit.recipe import Recipe, read_recipe
from sslkit.result import Result, Status
from sslkit.resuming import chosen, going_on, newest_checkpoint, opened
from sslkit.rules import Severity
from sslkit.run_directory import LOCK_HEADER, RunDirectory, environment
from sslkit.stopping import StopSignals
from sslkit.summary import announce, device_name, summarise
from sslkit.trainer import Trainer
from sslkit.words import spoken

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
    fork: str | None = None,
    strict: bool = False,
    stop_on: Severity | None = None,
    console: Console | None = None,
) -> int:
    """The command: `run` on the recipe of a file.

    Args:
        source: The recipe, by path or shipped name.
        overrides: `key=value` each.
        steps, device, run_dir, resume, fork, strict, stop_on, console: As `run` takes them.

    Returns:
        The exit code: 0 done or preempted, 1 ended by `stop_on`, 130 interrupted from the keyboard.

    Raises:
        UserError, RunFailed: as `run`.
    """
    recipe = read_recipe(source, overrides)
    result = run(
        recipe, source, overrides, steps=steps, device=device, run_dir=run_dir, resume=resume, fork=fork,
        strict=strict, stop_on=stop_on, console=console or PatientConsole(),
    )  # fmt: skip
    return launcher.leave(EXIT_CODES.get(result.status, 0))


def run(
    recipe: Recipe,
    source: str | None,
    overrides: Sequence[str] = (),
    *,
    steps: int | None,
    device: str,
    run_dir: str | None,
    resume: Literal["auto", "never"],
    fork: str | None = None,
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
        fork: Begin a new run with the weights of the run in this directory; empty, of the run of the recipe's name.
        strict: Refuse what is otherwise only warned of before training.
        stop_on: End the run, with a checkpoint, at the first live finding as grave as this.
        console: Where to print.
        should_stop: Asked before each step; True ends the run as Ctrl-C does, with a checkpoint.

    Raises:
        UserError: the recipe, the options or the machine do not allow it.
        RunFailed: the run began and could not go on.
    """
    with distributed.joined(choose_device(device)) as (world, where), undisturbed(where):
        if not world.is_first:
            console = Console(quiet=True)
        try:
            asked = forking.Asked(source, overrides, run_dir, fork)
            recipe, path = chosen(recipe, asked, resume, world)
            with opened(path, world) as files:
                settled = world.together(lambda: going_on(files, recipe, asked, console))
                if settled is None:
                    return Result.of(files.path, "done")
                with _reported(files, settled, world):
                    parts, known = world.together(lambda: prepare(
                        settled, source, overrides, where, partial(say, console), processes=world.size,
                        fork=fork is not None, resuming=bool(checkpoint.listed(files.checkpoints)),
                    ))  # fmt: skip
                    world.first(lambda: tell_findings(known, source, overrides, console, strict=strict))
                    attending = Attending(known, partial(say, console), stop_on)
                    signals = StopSignals(should_stop)
                    return Result.of(files.path, _train(parts, files, attending, signals, steps, console, world))
        except SslkitError as error:
            if not isinstance(error, distributed.EndedElsewhere | distributed.PeerLost):
                launcher.leave(error.exit_code)  # starting again would only meet it again
            if distributed.tells(error, world):
                raise
            raise type(error)() from None


def _train(
    parts: Parts,
    files: RunDirectory,
    attending: Attending,
    signals: StopSignals,
    steps: int | None,
    console: Console,
    world: World,
) -> Status:
    device = parts.device
    recipe = parts.recipe = resolve_compile(parts.recipe, view_pixels(parts), device.type)
    found = newest_checkpoint(files, parts, console, world)
    parts.initialised = found.facts.get("initialised") if found else parts.initialised
    lock = initialise.seen_from(recipe, files.path).to_toml_with(files.keep_local(recipe.local_parts()))
    files.write("recipe.lock.toml", LOCK_HEADER + lock)
    files.write("facts.json", attending.course.facts.model_dump_json(indent=1, exclude_none=True) + "\n")
    if world.is_first:
        view_grid.write(parts.data, parts.run, parts.views, recipe.name, files.path / "views.png")
    ran = environment(sys.argv, recipe.provenance(), device_name(device), world.size, parts.data.fingerprint)
    files.write("env.json", json.dumps(ran | {"initialised": parts.initialised}, indent=1) + "\n")
    files.write("bad_samples.jsonl", "".join(json.dumps(dict(bad)) + "\n" for bad in parts.data.bad))
    files.open_metrics(int(found.facts["metrics_offset"]) if found else 0)

    first = attending.course.facts.first_network
    display = Display(console, parts.run.total_steps, parts.run.steps_per_epoch, first)
    # The first process observes, for all of them.
    parts.observers = {**parts.observers, "progress": display, "doctor": attending} if world.is_first else {}
    trainer = Trainer(parts, files, display.say, lambda: signals.word() or int(attending.lost), world)
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
            asked = trainer.fit(stop, lambda: display.advance(trainer.step))
        status = "done" if trainer.step == trainer.info.total_steps else "stopped"
        if asked and trainer.step < stop:
            status = "preempted" if asked not in (1, signal.SIGINT) else "lost" if attending.lost else "interrupted"
        status = trainer.world.first(lambda: status)
    except KeyboardInterrupt:
        status = "interrupted"  # a second Ctrl-C: the newest checkpoint is the earlier one
        raise
    except BaseException:
        if int(trainer.bad_step) >= 0:
            reason = {"reason": "not_finite", "step": int(trainer.bad_step) + 1}
        reason |= trainer.anomaly.status() if trainer.anomaly else {}
        raise
    finally:
        files.status(status, **{"of": trainer.info.total_steps, "step": trainer.step, **reason})
        _end(trainer, status)
        if trainer.recipe.train.compile:
            torch.compiler.reset()  # or the ninth run of a process would meet torch's limit of recompilations
    if not trainer.world.is_first:
        return status
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
        say(console, f"{status} at step {trainer.step} of {trainer.info.total_steps}; {how} goes on from there")
        say(console, f"verdict: {doctor.examine_run(files.path).verdict}")
        say(console, f"run directory: {files.path}")
    return status


@contextmanager
def _reported(files: RunDirectory, recipe: Recipe, world: World) -> Iterator[None]:
    """Turn whatever goes wrong inside into lines; a traceback that may be wanted goes to a file."""
    try:
        with distributed.listening(world):
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
