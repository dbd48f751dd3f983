"""Checks that train: the engine takes a few steps of a small recipe around the component."""

from __future__ import annotations

import json
import math
from pathlib import Path

from sslkit import checkpoint
from sslkit.errors import RunFailed, UserError
from sslkit.events import Bus, Hooks
from sslkit.testing import engine
from sslkit.testing.bench import Bench, changed
from sslkit.testing.core import check
from sslkit.testing.engine import STEPS, folder, state, steps, trainer
from sslkit.testing.outcome import Nonconforming, NotApplicable, require
from sslkit.trainer import Trainer

TRAINED = ("backbone", "head", "loss", "target_updater", "view_generator", "optimizer")


@check("a run that is interrupted and resumed ends with the same weights as one that is not", *TRAINED, "observer")
def resume(bench: Bench) -> None:
    """Saved to disk after one step, read into newly built parts, and taken on to the end of the epoch."""
    if bench.kind == "observer":
        _resume_observed(bench)
        return
    with folder() as path:
        with trainer(bench, path / "whole") as whole:
            steps(whole, STEPS)
            expected = state(whole)
        with trainer(bench, path / "first") as first:
            steps(first, 1)
            _save(first)
        with trainer(bench, path / "second") as second:
            _restore(second, path / "first")
            steps(second, STEPS - 1)
            differs = changed(expected, state(second))
    require(
        differs is None,
        f"after a run was stopped at step 1 and resumed, {differs} differs at step {STEPS}; keep all state in "
        "parameters and buffers (an optimizer's in self.state), and draw from torch's default generator or from the "
        "step alone",
    )


def _resume_observed(bench: Bench) -> None:
    """The same with all events of a run, and for what the run and its observer record."""
    with folder() as path:
        ends = []
        for name in ("whole", "again"):
            with trainer(bench, path / name) as whole:
                _fit(whole, STEPS)
                ends.append(state(whole))
        with trainer(bench, path / "first") as first:
            _fit(first, 1)
        with trainer(bench, path / "second") as second:
            _restore(second, path / "first")
            _fit(second, STEPS)
            differs = changed(ends[0], state(second))
        require(differs is None, f"after a run was stopped at step 1 and resumed, {differs} differs at step {STEPS}")
        expected, again, resumed = (_records(path / name) for name in ("whole", "again", "second"))
    for (step, key), value in expected.items():
        if value != again.get((step, key)):
            continue  # a time, which no two runs share
        found = resumed.get((step, key))
        require(
            value == found or (value is not None and found is not None and math.isclose(value, found, rel_tol=1e-5)),
            f"after a run was stopped at step 1 and resumed, {key!r} is recorded as {found} at step {step} instead of "
            f"{value}; give the observer state_dict() and load_state_dict() with all that it remembers between steps",
        )


def _fit(run: Trainer, stop: int) -> None:
    try:
        run.fit(stop)
    except RunFailed as error:
        _save(run)
        raise NotApplicable(f"the run with it fails, see the check looks_only: {error}") from error


def _records(path: Path) -> dict[tuple[int, str], float | None]:
    """All that was recorded after step 1, by step and key."""
    lines = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return {(line["step"], key): value for line in lines if line["step"] > 1 for key, value in line.items()}


def _save(run: Trainer) -> None:
    try:
        run.save()
    except RunFailed as error:
        raise Nonconforming(
            f"its state cannot be saved: {error}; let state_dict() hold tensors, numbers and text, in dicts and lists"
        ) from None


def _restore(run: Trainer, path: Path) -> None:
    found, _ = checkpoint.newest(path / "checkpoints")
    assert found is not None
    try:
        run.restore(found)
    except RunFailed as error:
        raise Nonconforming(
            f"its state cannot be loaded: {error}; let load_state_dict() take what state_dict() gives"
        ) from None


@check("its events exist, and it implements one at least", "observer")
def hooks(bench: Bench) -> None:
    """A misspelt event would never be called."""
    observer = bench.built()
    known = [name for name in vars(Hooks) if not name.startswith("_")]
    try:
        bus = Bus({"checked": observer})
    except UserError as error:
        raise Nonconforming(f"{error}; events are {', '.join(known)}, with any of their arguments") from None
    if not bus.manager.get_hookcallers(observer):
        raise Nonconforming(
            f"{type(observer).__name__} observes nothing; write a method of the name of an event ({', '.join(known)}) "
            "under @observes (from sslkit.events import observes)"
        )


@check("a run with it computes to the last bit what a run without it does", "observer")
def looks_only(bench: Bench) -> None:
    """One epoch, with every event of a run."""
    ends = []
    with folder() as path:
        for observed in (True, False):
            with trainer(bench, path / str(observed), observed=observed) as run:
                try:
                    run.fit(STEPS)
                    run.files.status("stopped", step=run.step)
                    run.bus.emit("run_ended", run=run, status="stopped")
                except RunFailed as error:
                    raise Nonconforming(f"a run of one epoch ends with: {error}") from error
                ends.append(state(run))
    differs = changed(*ends)
    require(
        differs is None,
        f"with the observer {differs} differs after {STEPS} steps; it may read the run, not change it: work on copies "
        "of tensors, leave modes (train, eval), gradients and torch's default generator as they are",
    )


@check("state_dict() and load_state_dict() come together, and give the state back", "observer")
def observer_state(bench: Bench) -> None:
    """After an epoch, through a checkpoint."""
    observer = bench.built()
    both = [hasattr(observer, name) for name in ("state_dict", "load_state_dict")]
    if not any(both):
        raise NotApplicable("the observer has no state")
    require(
        all(both),
        f"{type(observer).__name__} has one of state_dict() and load_state_dict() without the other; "
        "write both, or neither",
    )
    with folder() as path, trainer(bench, path / "run") as run:
        run.fit(STEPS)
        found, _ = checkpoint.newest(path / "run" / "checkpoints")
        assert found is not None
        saved = next(iter(found.parts["observers"].values()))
        observer.load_state_dict(saved)
        expected, again = dict(engine.flat(saved)), dict(engine.flat(observer.state_dict()))
        differs = changed(expected, again)
    require(
        differs is None,
        f"after load_state_dict() the observer's state_dict() has another {differs!r}; restore all "
        "that state_dict() gives",
    )
