"""What scripts and notebooks call: the command line's work as functions that raise errors and return results."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sslkit import doctor, installed, local, registry
from sslkit.doctor import Examination
from sslkit.errors import UserError, did_you_mean
from sslkit.recipe import Recipe, read_recipe
from sslkit.sources import is_path

if TYPE_CHECKING:
    from sslkit.replaying import Replay
    from sslkit.result import Result


def load_recipe(
    source: str | PathLike[str], overrides: Sequence[str] = (), *, allow_local_code: bool = False
) -> Recipe:
    """Read a recipe, as `sslkit train` does.

    Args:
        source: A path (with a slash, or ending in `.toml`), or the name of a recipe that comes with sslkit.
        overrides: What `--set` takes: `"train.batch_size=64"`, `"loss.use=nt_xent"`.
        allow_local_code: Let the recipe run code of files that it names (`use = "./my_head.py:WideHead"`).

    Raises:
        UserError: one line for each thing that is wrong, with file and line.
    """
    name = fspath(source)
    if isinstance(source, Path) and not is_path(name):
        name = f"./{name}"
    with local.allowed(allow_local_code):
        return read_recipe(name, [overrides] if isinstance(overrides, str) else overrides)


def train(
    recipe: Recipe | str | PathLike[str],
    *,
    run_dir: str | PathLike[str] | None = None,
    steps: int | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    resume: Literal["auto", "never"] = "auto",
    fork: bool | str | PathLike[str] = False,
    strict: bool = False,
    stop_on: Literal["error", "warning"] | None = None,
    should_stop: Callable[[], bool] | None = None,
    quiet: bool = False,
    allow_local_code: bool = False,
) -> Result:
    """Train a recipe, or go on where an earlier call or command stopped: what `sslkit train` does.

    Interrupting (Ctrl-C, or a notebook's stop button) ends the run after the step it is in, with a checkpoint, and
    returns a result with the status `interrupted`; the same call goes on from there. SIGTERM, SIGUSR1 and SIGHUP do the
    same with the status `preempted`. Outside the main thread, where Python handles no signals, `should_stop` ends a
    run. Interrupted twice, or before the first step, it raises KeyboardInterrupt.

    Calls do not depend on one another, nor on random numbers that were drawn before; torch's generators and flags
    are afterwards as they were.

    Args:
        recipe: A `Recipe`, or what `load_recipe` takes.
        run_dir: Directory of the run; `runs/NAME` without it.
        steps: Stop after this many optimizer steps, with a checkpoint; a later call with more goes on.
        device: Where to train; `auto` is CUDA where there is a device.
        resume: `never` begins a new run beside one that is there.
        fork: Begin a new run with the weights of the run in this directory; True, with those of `runs/NAME`. The same
            call goes on with the fork.
        strict: Refuse what is otherwise only warned of before training.
        stop_on: End the run, with a checkpoint and the status `lost`, at the first finding as grave as this.
        should_stop: Asked before each step and within measurements; True ends the run as an interrupt does.
        quiet: Print nothing.
        allow_local_code: As `load_recipe` takes it, where `recipe` is not a `Recipe` already.

    Returns:
        The directory, how the run ended, its metrics and the doctor's verdict.

    Raises:
        UserError: the recipe, an argument or the machine does not allow it.
        RunFailed: the run began and could not go on.
    """
    for name, value, valid in (
        ("device", device, ("auto", "cpu", "cuda")),
        ("resume", resume, ("auto", "never")),
        ("stop_on", stop_on, (None, "error", "warning")),
    ):
        if value not in valid:
            near = did_you_mean(str(value), filter(None, valid))
            raise UserError(f"{name}: should be {' or '.join(map(repr, valid))}, not {value!r}{near}")
    if should_stop is not None and not callable(should_stop):
        raise UserError(f"should_stop: should be a function that returns True or False, not {should_stop!r}")
    if steps is not None and (not isinstance(steps, int) or steps < 1):
        raise UserError(f"steps: should be a whole number of 1 or more, or None for the whole run, not {steps!r}")
    if isinstance(recipe, Recipe) and (lacking := list(filter(None, map(installed.unmet, recipe.requires)))):
        raise UserError(*(f"requires: {line}" for line in lacking))
    source = None if isinstance(recipe, Recipe) else fspath(recipe)
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, allow_local_code=allow_local_code)
    _check_named(chosen)

    from sslkit import launch  # brings torch, which takes seconds

    return launch.run(
        chosen, source, steps=steps, device=device, run_dir=None if run_dir is None else fspath(run_dir),
        resume=resume, fork=None if fork is False else "" if fork is True else fspath(fork), strict=strict,
        stop_on=stop_on, console=_console(quiet),
        should_stop=should_stop or (lambda: False),
    )  # fmt: skip


def _check_named(recipe: Recipe) -> None:
    """A run records where each of its parts is from, so that it can be repeated.

    Raises:
        UserError: one line for each part that came from no package and no file, such as a class of a notebook.
    """
    lacking = []
    for slot, part in recipe.parts():
        try:
            registry.provider_of(type(part))
        except UserError as error:
            lacking += [f"{slot}: {line}" for line in error.lines]
    if lacking:
        raise UserError(*dict.fromkeys(lacking))


def examine(run_dir: str | PathLike[str]) -> Examination:
    """What the doctor says of a run, while it goes on or after it: what `sslkit doctor` prints.

    Returns:
        `findings`, each with its id, severity, evidence and fix; `verdict`, one line; `text()`, all of it.

    Raises:
        UserError: there is no run.
    """
    return doctor.examine_run(Path(run_dir))


def replay(
    run_dir: str | PathLike[str],
    step: int,
    *,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    save_views: str | PathLike[str] | None = None,
    allow_local_code: bool = False,
) -> Replay:
    """Make an update of a run again, with hooks on every module: what `sslkit replay` prints.

    The run's directory is only read. Training on from the checkpoint before that update is done in memory.

    Args:
        run_dir: The run's directory.
        step: The update, counted from 1 as in `metrics.jsonl`.
        device: Where; `auto` is that of the run, where there is one.
        save_views: A picture to draw the batch's views into.
        allow_local_code: Let the run's own copies of components in files beside its recipe run.

    Raises:
        UserError: there is no such run or update, or its data or code are not what they were.
        RunFailed: a checkpoint or a part of the run failed.
    """
    if not isinstance(step, int) or step < 1:
        raise UserError(f"step: should be a whole number of 1 or more, not {step!r}")
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device: should be 'auto' or 'cpu' or 'cuda', not {device!r}")
    from sslkit import replaying  # brings torch, which takes seconds

    with local.allowed(allow_local_code):
        return replaying.replay(
            Path(run_dir), step, device=device, save_views=None if save_views is None else Path(save_views),
            say=lambda text: None,
        )  # fmt: skip


def _console(quiet: bool) -> Any:
    """Where a run prints: to the terminal as the command does, and plain lines in a notebook."""
    from sslkit.progress import PatientConsole

    # Notebooks ask for colours (FORCE_COLOR), which rich takes for a terminal, where progress is drawn over itself.
    terminal = None if sys.stdout is not None and sys.stdout.isatty() else False
    return PatientConsole(quiet=quiet, force_jupyter=False, force_terminal=terminal)
