"""The events of a run. Observers implement these hooks; one pluggy manager per run carries them."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pluggy

from sslkit import registry
from sslkit.api import ImageSet, RunInfo, ViewMaker
from sslkit.batch import Branches
from sslkit.errors import RunFailed, SslkitError, UserError, did_you_mean

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sslkit.siamese import Siamese

hookspec = pluggy.HookspecMarker("sslkit")
observes = pluggy.HookimplMarker("sslkit")
"""Marks a method of an observer as the implementation of the hook of its name."""
MEASURING = ("run_started", "epoch_ended")
"""Events in which observers measure. What they record is told when all are through, or not at all if a measurement is
left early."""


class Run(Protocol):
    """What an observer sees of the run."""

    info: RunInfo
    directory: Path
    data: ImageSet
    views: ViewMaker
    model: Siamese

    @property
    def step(self) -> int:
        """Completed optimizer updates."""
        ...

    def will_record(self, step: int) -> bool:
        """Whether the update that completes `step` is followed by the event `logging`."""
        ...

    def features(self, split: str, indices: Tensor, branch: str = "evaluated") -> Tensor:
        """float32 `[n, feature_dim]`: backbone features of clean `"train"` or `"test"` images in eval mode.

        The branch is the one the target updater names for evaluation, or else the `"online"` one. Observers that ask
        for the same images in the same event share one forward pass.
        """
        ...

    def view_projections(self, indices: Tensor, views: int, generator: torch.Generator) -> Tensor:
        """float32 `[n, views, d]`: online projections, in eval mode, of newly drawn global views of training images."""
        ...

    def record(self, values: Mapping[str, float]) -> None:
        """Write a line of `metrics.jsonl`; `step` and `epoch` are added."""
        ...

    def say(self, text: str) -> None:
        """Tell the user one line, without disturbing the progress display."""
        ...


class Hooks:
    """What can be observed. Implement any of these, with any subset of their arguments."""

    @hookspec
    def run_started(self, run: Run) -> None:
        """Before the first step of this process, and before every other event: what an observer records here is told
        to the others when all have started. `run.step` is 0 unless the run goes on from a checkpoint."""

    @hookspec
    def step_ended(self, run: Run, branches: Branches) -> None:
        """After every update. `branches` are detached and on the device: do not copy them to the host here."""

    @hookspec
    def logging(self, run: Run, record: MutableMapping[str, float | Tensor]) -> None:
        """Every `train.log_every` steps, before a record is written: add numbers or 0-dim tensors to it."""

    @hookspec
    def epoch_ended(self, run: Run) -> None:
        """After the last step of an epoch. What an observer records here is told to the others when all have measured;
        a signal may end a measurement where it asks for features, and it is made anew when the run goes on."""

    @hookspec
    def recorded(self, run: Run, record: Mapping[str, float]) -> None:
        """After a line was written to `metrics.jsonl`."""

    @hookspec
    def checkpoint_saved(self, run: Run, path: Path) -> None:
        """After a checkpoint is safely on disk."""

    @hookspec
    def run_ended(self, run: Run, status: str) -> None:
        """After the last step of this process; `status` as in `status.json`."""


class Bus:
    """One run's observers, called in the order of the recipe; an error names the observer at fault."""

    def __init__(self, observers: Mapping[str, object]) -> None:
        self.observers = dict(observers)
        self.failed_in = ""
        """The event in which an observer raised, if one did."""
        self._held: list[tuple[str, dict[str, Any]]] | None = None
        """Events that came while observers measure."""
        if problems := [f"{self._called(name)}: {line}" for name, o in self.observers.items() for line in _misfits(o)]:
            raise UserError(*problems)
        self.manager = pluggy.PluginManager("sslkit")
        self.manager.add_hookspecs(Hooks)
        # pluggy calls the last registered first; the recipe's order reads better.
        for name, observer in reversed(list(self.observers.items())):
            self.manager.register(observer, name=name)

    def emit(self, event: str, **arguments: Any) -> None:
        """Call every observer's hook for an event.

        Raises:
            RunFailed: an observer raised; the message says which, where and what.
        """
        if self._held is not None:
            self._held.append((event, arguments))
            return
        self._held = [] if event in MEASURING else None
        try:
            self._call(event, arguments)
        finally:
            held, self._held = self._held, None
        for later, given in held or ():
            self._call(later, given)

    def _call(self, event: str, arguments: Mapping[str, Any]) -> None:
        try:
            getattr(self.manager.hook, event)(**arguments)
        except SslkitError:
            self.failed_in = event
            raise
        except (Exception, SystemExit) as error:
            self.failed_in = event
            raise RunFailed(f"{self._culprit(error)} failed in {event}: {type(error).__name__}: {error}") from error

    def _culprit(self, error: BaseException) -> str:
        frame = error.__traceback__
        while frame is not None:
            owner = frame.tb_frame.f_locals.get("self")
            for name, observer in self.observers.items():
                if owner is observer:
                    return self._called(name)
            frame = frame.tb_next
        return "an observer"

    def _called(self, name: str) -> str:
        origin = registry.origin_of(type(self.observers[name]).__module__)
        return f"observer {name!r}{origin and f' from {origin}'}"

    def state_dict(self) -> dict[str, Any]:
        """The state of every observer that has some."""
        return {name: o.state_dict() for name, o in self.observers.items() if hasattr(o, "state_dict")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; observers that were added since start fresh."""
        for name, observer in self.observers.items():
            if name in state and hasattr(observer, "load_state_dict"):
                observer.load_state_dict(state[name])


def _misfits(observer: object) -> list[str]:
    """What is wrong with an observer's hooks: events that do not exist or do not give what is asked, missing marks."""
    events = {name: list(signature(hook).parameters)[1:] for name, hook in vars(Hooks).items() if callable(hook)}
    found = []
    for name in dir(type(observer)):
        method = getattr(type(observer), name, None)
        if not callable(method):
            continue
        if not hasattr(method, "sslkit_impl"):
            if name in events:
                found.append(f"its method {name!r} is not marked; put @sslkit.events.observes above it")
        elif name not in events:
            listed = ", ".join(events)
            found.append(f"there is no event {name!r}{did_you_mean(name, list(events))}; there are: {listed}")
        elif unknown := sorted(set(list(signature(method).parameters)[1:]) - set(events[name])):
            given = ", ".join(events[name])
            found.append(f"{name} asks for {', '.join(unknown)}, which this event does not give; it gives: {given}")
    return found
