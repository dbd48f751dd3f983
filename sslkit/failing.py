"""What goes wrong in a run, as lines for the user and as a reason for whoever reads `status.json`."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sslkit import local, registry
from sslkit.distributed import EndedElsewhere, PeerLost, World, listening
from sslkit.errors import RunFailed, SslkitError, UserError
from sslkit.recipe import Recipe
from sslkit.run_directory import RunDirectory
from sslkit.stopping import Stopped, StopSignals


@contextlib.contextmanager
def reported(files: RunDirectory, recipe: Recipe, world: World) -> Iterator[None]:
    """Turn whatever goes wrong inside into lines, the first of them for `status.json` too.

    A traceback that may be wanted goes to a file.
    """
    try:
        with listening(world):
            yield
    except EndedElsewhere:
        raise
    except PeerLost as error:
        raise _told(files, "peer_lost", error) from None
    except torch.OutOfMemoryError as error:
        raise _told(files, "out_of_memory", RunFailed(_memory_advice(recipe, error))) from error
    except SslkitError as error:
        told = error
        if error.__cause__ is not None and not isinstance(error, UserError):
            *before, last = error.lines
            told = type(error)(*before, f"{last} {_kept(files)}")
        _told(files, "error", told)
        if told is error:
            raise
        raise told from error
    except (Exception, SystemExit) as error:
        first = str(error).strip().partition("\n")[0]
        line = f"{_culprit(error)} failed: {type(error).__name__}: {first} {_kept(files)}"
        raise _told(files, "unexpected", RunFailed(line)) from error


@dataclass
class Noted:
    """Writes a signal that ends the run before it trains into `status.json`.

    The block then simply ends, but for an interrupt, of which somebody who waits has to hear.
    """

    files: RunDirectory
    signals: StopSignals

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        stopped = kind is not None and issubclass(kind, Stopped)
        if stopped or (self.files.has_run and kind is not None and issubclass(kind, KeyboardInterrupt)):
            self.files.ended_early(self.signals.status, reason=self.signals.reason)
        return stopped


def _kept(files: RunDirectory) -> str:
    """Keep the traceback of the error that is being handled, and say where."""
    try:
        return f"(the traceback is in {files.keep_traceback(traceback.format_exc())})"
    except RunFailed as error:
        return f"(its traceback could not be kept: {error})"


def _told(files: RunDirectory, reason: str, error: SslkitError) -> SslkitError:
    """Say in `status.json` why the run failed. What a user has to mend before it trains leaves the file as it was."""
    with contextlib.suppress(RunFailed):  # the disk may be what failed
        if files.told == "failed":
            known = {key: value for key, value in files.read_status().items() if key not in files.whose}
            files.status("failed", **{"reason": reason, **known, "message": error.lines[0]})
        elif files.has_run and not isinstance(error, UserError):
            files.ended_early("failed", reason=reason, message=error.lines[0])
    return error


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
