"""From a recipe's name to a finished run: the directory, going on, signals, the summary."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from rich.console import Console

from sslkit import checkpoint, distributed, doctor, forking, initialise, launcher, state, view_grid
from sslkit.attending import Attending
from sslkit.build import Parts, choose_device
from sslkit.compiling import resolve_compile
from sslkit.distributed import World
from sslkit.environment import environment
from sslkit.errors import RunFailed, SslkitError
from sslkit.failing import Noted, reported
from sslkit.preparation import prepare, tell_findings, view_pixels
from sslkit.progress import Display, PatientConsole, say
from sslkit.randomness import undisturbed
from sslkit.recipe import Recipe, read_recipe
from sslkit.result import Result, Status
from sslkit.resuming import chosen, going_on, newest_checkpoint, opened
from sslkit.rules import Severity
from sslkit.run_directory import LOCK_HEADER, RunDirectory, TakenOver
from sslkit.stopping import Stopped, StopSignals, die_with_parent
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
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()  # torchrun's agent, which cannot end its workers when it is killed
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
        should_stop: Asked before each step and within measurements; True ends the run as Ctrl-C does, with a
            checkpoint.

    Raises:
        UserError: the recipe, the options or the machine do not allow it.
        RunFailed: the run began and could not go on.
    """
    signals = StopSignals(should_stop)
    with distributed.joined(choose_device(device)) as (world, where), undisturbed(where):
        if world.size > 1:
            signals.share()
        if not world.is_first:
            console = Console(quiet=True)
        try:
            asked = forking.Asked(source, overrides, run_dir, fork)
            recipe, path = chosen(recipe, asked, resume, world)
            with opened(path, world) as files, Noted(files, signals), signals:
                if files.unlocked:
                    say(console, f"warning: {path}: this file system has no locks ({files.unlocked}); if two processes "
                                 "train here, the later one goes on and the earlier one ends")  # fmt: skip
                settled = world.together(lambda: going_on(files, recipe, asked, console))
                if settled is None:
                    return Result.of(files.path, "done")
                with reported(files, settled, world):
                    parts, known = world.together(lambda: prepare(
                        settled, source, overrides, where, partial(say, console), processes=world.size,
                        fork=fork is not None, resuming=bool(checkpoint.listed(files.checkpoints)),
                    ))  # fmt: skip
                    world.first(lambda: tell_findings(known, source, overrides, console, strict=strict))
                    attending = Attending(known, partial(say, console), stop_on, settled.train.keep_checkpoints)
                    return Result.of(files.path, _train(parts, files, attending, signals, steps, console, world))
            say(console, f"{path}: {signals.status} before it trained; {spoken().again} takes it up")
            return Result.of(path, signals.status)
        except SslkitError as error:
            if not isinstance(error, distributed.EndedElsewhere | distributed.PeerLost):
                launcher.leave_error(error.exit_code)  # starting again would only meet it again
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
    if found is None:
        files.forget_failure()
    files.write("bad_samples.jsonl", "".join(json.dumps(dict(bad)) + "\n" for bad in parts.data.bad))
    if lost := files.open_metrics(int(found.facts["metrics_offset"]) if found else 0):
        say(console, f"warning: {files.path / 'metrics.jsonl'}: {lost} bytes of records are gone that were there when "
            "the checkpoint was written")  # fmt: skip

    first = attending.course.facts.first_network
    display = Display(console, parts.run.total_steps, parts.run.steps_per_epoch, first)
    # The first process observes, for all of them.
    parts.observers = {**parts.observers, "progress": display, "doctor": attending} if world.is_first else {}
    trainer = Trainer(parts, files, display.say, lambda: signals.word() or int(attending.lost), world)
    trainer.measurements.hurried = trainer.feed.hurried = signals.asked
    files.lasting["resumed_at"] = files.read_status().get("resumed_at", [])
    if found:
        files.lasting["resumed_at"] = [*files.lasting["resumed_at"], found.step]
        trainer.restore(found)
        say(console, f"going on from step {found.step} ({found.path})")
    announce(trainer, console)
    if short := state.shortage(parts, files.path):
        say(console, f"warning: {short}")
    stop = min(steps or parts.run.total_steps, parts.run.total_steps)
    # At the very end there is nothing to train, but a run that died there still has to be called done.
    if stop <= trainer.step < parts.run.total_steps and not trainer.measurements.owed:
        say(console, f"{files.path} is at step {trainer.step} already; {spoken().more_steps} goes on")
        return "stopped"
    return _fit(trainer, display, signals, attending, stop, console)


def _fit(
    trainer: Trainer, display: Display, signals: StopSignals, attending: Attending, stop: int, console: Console
) -> Status:
    files = trainer.files
    status: Status = "failed"
    reason: dict[str, Any] = {}
    begun = trainer.step

    def on_step() -> None:
        signals.settle()
        display.advance(trainer.step)

    files.status("running", step=trainer.step, of=trainer.info.total_steps)
    try:
        with display:
            display.advance(trainer.step)
            asked = trainer.fit(stop, on_step)
        signals.hear(asked)
        status = "done" if trainer.step == trainer.info.total_steps else "stopped"
        if attending.lost and trainer.step < stop:
            status, reason = "lost", {"reason": "stop_on"}
        elif (asked or signals.asked()) and (trainer.step < stop or trainer.measurements.owed):
            status, reason = signals.status, {"reason": signals.reason}
        status = trainer.world.first(lambda: status)
        signals.saved()
    except Stopped:
        trainer.step = begun  # of what came after nothing is kept
        status, reason = signals.status, {"reason": signals.reason}
    except KeyboardInterrupt:
        status, reason = "interrupted", {"reason": "SIGINT"}
        saved = checkpoint.listed(files.checkpoints)  # if it was a second one, what came after is lost
        trainer.step = checkpoint.step_of(saved[-1]) if saved else 0
        raise
    except BaseException:
        if int(trainer.bad_step) >= 0:
            reason = {"reason": "not_finite", "step": int(trainer.bad_step) + 1}
        reason |= trainer.anomaly.status() if trainer.anomaly else {}
        raise
    finally:
        _end(trainer, status, **{"of": trainer.info.total_steps, "step": trainer.step, **reason})
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


def _end(trainer: Trainer, status: str, **facts: Any) -> None:
    """Write the status and tell the observers; trouble with either must not hide why a run failed."""
    for tell in (
        partial(trainer.files.status, status, **facts),
        partial(trainer.bus.emit, "run_ended", run=trainer, status=status),
    ):
        try:
            tell()
        except RunFailed as error:
            if status != "failed":
                raise
            if isinstance(error, TakenOver):  # whose observers write here now
                return
