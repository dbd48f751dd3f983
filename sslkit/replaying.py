"""`sslkit replay`: one update of a run, made again with hooks on every module; nothing is written to the run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from sslkit import checkpoint, local, nonfinite, view_grid
from sslkit.anomaly import Call, Record
from sslkit.api import ImageSet
from sslkit.build import Parts, build, choose_device
from sslkit.data import Draw
from sslkit.errors import RunFailed, UserError
from sslkit.nonfinite import Finding
from sslkit.panel import joined_norms
from sslkit.randomness import undisturbed
from sslkit.recipe import Recipe, parse_recipe
from sslkit.resuming import other_code, other_data
from sslkit.run_directory import RunDirectory, read_json, read_metrics
from sslkit.summary import device_name
from sslkit.telling import tell
from sslkit.trainer import Trainer

DRAWN = 32
"""So many images of the batch are drawn, those with views that are not finite first."""
TOLD = 8
"""So many of them are named in a line."""
ENDED = ("done", "stopped", "interrupted", "preempted", "lost", "failed")
"""A run with such a status has made as many updates as it says."""


@dataclass(frozen=True)
class Replay:
    """What one update of a run computed."""

    run: str
    """The run's directory."""
    step: int
    """The update, counted from 1 as in `metrics.jsonl`."""
    of: int
    """Updates of the whole run."""
    start: int
    """The step of the checkpoint that it was reached from; 0 is the run's beginning."""
    device: str
    """Where it was computed."""
    figures: dict[str, float]
    """The loss, its named terms and the norms of the gradient, by part and before clipping, as `metrics.jsonl` names
    them."""
    recorded: dict[str, float | None] | None
    """The same figures as the run recorded them; None where it did not record this update."""
    finding: Finding
    """Where its numbers were first not finite."""
    modules: tuple[Call, ...]
    """Every call of a module, in the order in which calls began."""
    gradients: dict[str, float]
    """The largest magnitude of each parameter's gradient."""
    indices: tuple[int, ...]
    """The images of its batch, by their positions in the training set."""
    labels: tuple[int, ...] | None
    """Their labels, where there are some."""
    files: tuple[str, ...] | None
    """Their files, where the data source knows them."""
    notes: tuple[str, ...]
    """Why figures may differ from those that were recorded."""

    @property
    def identical(self) -> bool | None:
        """Whether it is to the last bit what was recorded; None where nothing was."""
        return None if self.recorded is None else not self._differing()

    @property
    def exit_code(self) -> int:
        """0; 1 where a number was not finite."""
        return 0 if self.finding.finite else 1

    def _differing(self) -> list[str]:
        told = self.recorded or {}
        return [name for name in told if told[name] != _plain(self.figures[name])]

    def text(self, *, modules: bool = False) -> str:
        """All of it in lines, with a table of every call if `modules`."""
        return "\n".join(self._lines(modules))

    def as_json(self) -> str:
        """All of it as JSON, in which what is not finite is null."""
        told = asdict(self) | {"identical": self.identical}
        told["modules"] = [{**asdict(call), "dtype": call.dtype} for call in self.modules]
        return json.dumps(_jsonable(told), indent=1)

    def _lines(self, modules: bool) -> Iterator[str]:
        before = self.step - 1 - self.start
        origin = f"from the checkpoint of step {self.start}" if self.start else "from the run's beginning"
        again = f", {before} update{'s' * (before > 1)} before it made again" if before else ""
        yield f"sslkit replay: {self.run}, update {self.step} of {self.of}, {origin}{again}, on {self.device}"
        yield from self.notes
        width = max(map(len, self.figures))
        for name, value in self.figures.items():
            told = "" if self.recorded is None or name not in self.recorded else self._compared(name)
            yield f"{name:{width}}  {_digits(value)}{told}"
        if self.recorded is None:
            yield "this update was not recorded, so there is nothing to compare with"
        yield f"batch: {len(self.indices)} images: {self._images()}"
        yield from self._verdict()
        if modules:
            yield from self._table()

    def _compared(self, name: str) -> str:
        told, found = (self.recorded or {})[name], _plain(self.figures[name])
        if told == found:
            return f"  recorded {_digits(told)}: identical"
        if told is None or found is None:
            return f"  recorded {_digits(told)}: differs"
        return f"  recorded {_digits(told)}: differs by {abs(found - told) / max(abs(told), 1e-30):.2g} of it"

    def _images(self) -> str:
        named = [
            f"{index}{'' if self.labels is None else f' (label {self.labels[row]})'}"
            for row, index in enumerate(self.indices[:TOLD])
        ]
        more = len(self.indices) - len(named)
        return ", ".join(named) + (f" and {more} more (--json has them all)" if more > 0 else "")

    def _verdict(self) -> Iterator[str]:
        if not self.finding.finite:
            yield f"NOT FINITE ({self.finding.where}): {self.finding.sentence}"
            return
        calls = [call for call in self.modules if call.gave and call.gave.dtype]
        yield f"every output and gradient is finite, in {len(calls)} calls of {len({c.module for c in calls})} modules"
        if calls:
            call = max(calls, key=lambda call: call.gave.largest if call.gave else 0.0)
            yield f"largest output: {call.gave.largest if call.gave else 0:.4g}, of {call.module} ({call.dtype})"
        if self.gradients:
            name = max(self.gradients, key=lambda name: self.gradients[name])
            yield f"largest gradient: {self.gradients[name]:.4g}, of {name}"

    def _table(self) -> Iterator[str]:
        rows = [("module", "class", "dtype", "given", "gave")]
        for call in self.modules:
            rows.append((call.module, call.kind, call.dtype or "", str(call.given), str(call.gave or "it raised")))
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        for row in rows:
            yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def replay(
    run: Path, step: int, *, device: str = "auto", save_views: Path | None = None, say: Callable[[str], None] = print
) -> Replay:
    """Make an update of a run again: train on in memory from the newest checkpoint before it, then watch it.

    Args:
        run: The run's directory. It is only read, so another process may train in it.
        step: The update, counted from 1.
        device: `auto`, which is that of the run where it is here, `cpu` or `cuda`.
        save_views: A picture to draw the batch's views into.
        say: Told what takes a while.

    Raises:
        UserError: there is no such run or update, or its data, code or recipe are not what they were.
        RunFailed: the checkpoint does not fit, or the file cannot be written.
    """
    if save_views is not None:
        view_grid.check_suffix(save_views)
    recipe = _recipe(run)
    _check_reached(run, step)
    found, notes = _start(run, step, recipe)
    on_cpu = str(read_json(run / "env.json").get("device")).startswith("cpu")
    where = choose_device("cpu" if device == "auto" and on_cpu else device)
    if where.type == "cpu" and not on_cpu and recipe.train.compile:
        notes.append("note: the run was compiled for a GPU; here it is not")
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"compile": False})})
    with undisturbed(where), TemporaryDirectory() as scratch:
        parts = build(recipe.model_copy(update={"observers": ()}), where, say)
        notes += _check_same(run, found, parts, step)
        files = RunDirectory(Path(scratch))
        try:
            return _replayed(run, step, Trainer(parts, files, say), found, notes, save_views, say)
        finally:
            files.close()
            if recipe.train.compile:
                torch.compiler.reset()  # or the ninth run of a process would meet torch's limit of recompilations


def show(run: str, *, step: int, device: str, modules: bool, save_views: str | None, as_json: bool) -> int:
    """Print a replay.

    Returns:
        The exit code: 0, or 1 where a number was not finite.

    Raises:
        UserError, RunFailed: as `replay`.
    """
    picture = None if save_views is None else Path(save_views)
    found = replay(Path(run), step, device=device, save_views=picture, say=partial(tell, error=True))
    tell(found.as_json() if as_json else found.text(modules=modules))
    return found.exit_code


def _replayed(
    run: Path, step: int, trainer: Trainer, found: checkpoint.Checkpoint | None, notes: list[str],
    save_views: Path | None, say: Callable[[str], None],
) -> Replay:  # fmt: skip
    if found:
        trainer.restore(found)
    start = trainer.step
    if start < step - 1:
        origin = found.path if found else "the beginning"
        made = f"update {step - 1}" if start + 1 == step - 1 else f"updates {start + 1} to {step - 1}"
        say(f"making {made} again, from {origin}")
        for draw in trainer.feed.steps(start, step - 1):
            trainer.train_step(draw)
        if (earlier := int(trainer.bad_step)) >= 0:
            raise UserError(
                f"{run}: update {earlier + 1} is not finite already, and nothing follows it; give that number"
            )
    draw = trainer.feed.draw(step - 1)
    figures = {}
    if trainer.recipe.train.compile:  # the hooks need code that is not compiled, whose last bits are others
        with nonfinite.repeated(trainer, draw, step - 1, watch=False):
            figures = _figures(trainer)
    with nonfinite.repeated(trainer, draw, step - 1, buffers=True) as record:
        figures = figures or _figures(trainer)
        finding = nonfinite.conclusion(record, trainer, draw.batch.indices.tolist())
    if save_views is not None:
        _draw_views(trainer, draw, record, save_views)
    key = nonfinite.batch_facts(trainer, step - 1, draw.batch.indices.tolist())
    labels = draw.batch.labels
    return Replay(
        run=str(run),
        step=step,
        of=trainer.info.total_steps,
        start=start,
        device=device_name(trainer.device),
        figures=figures,
        recorded=_recorded(run, step, figures),
        finding=finding,
        modules=tuple(record.calls),
        gradients={name: gradient.largest for name, gradient in record.gradients.items()},
        indices=tuple(key["indices"]),
        labels=None if labels is None else tuple(labels.tolist()),
        files=None if key["files"] is None else tuple(key["files"]),
        notes=tuple(notes),
    )


def _figures(trainer: Trainer) -> dict[str, float]:
    values = {"loss": trainer.terms.total, **trainer.terms.terms, **joined_norms(*trainer.gradient_norms)}
    read = torch.stack([value.detach().float() for value in values.values()]).tolist()
    return dict(zip(values, read, strict=True))


def _recorded(run: Path, step: int, figures: dict[str, float]) -> dict[str, float | None] | None:
    try:
        records = [r for r in read_metrics(run) if r.get("step") == step and "loss" in r]
    except OSError:
        return None
    return {name: records[-1][name] for name in figures if name in records[-1]} if records else None


def _draw_views(trainer: Trainer, draw: Draw, record: Record, path: Path) -> None:
    wrong = sorted({row for rows in record.rows.values() for row in rows})
    rows = [*wrong, *(row for row in range(len(draw.batch.indices)) if row not in set(wrong))][:DRAWN]
    parameters: dict[str, Tensor] = {name: values[rows].cpu() for name, values in draw.parameters.items()}
    data: ImageSet = trainer.data
    image = view_grid.draw_batch(
        data, trainer.info, trainer.views, trainer.recipe.name, draw.batch.indices[rows].cpu(), parameters
    )
    try:
        image.save(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


# ---------------------------------------------------------------- what there is to start from


def _recipe(run: Path) -> Recipe:
    lock = run / "recipe.lock.toml"
    try:
        text = lock.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        problem = "is not there" if not run.exists() else "is no run directory (it has no recipe.lock.toml)"
        raise UserError(f"{run}: {problem}; give one such as runs/NAME") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{lock}: cannot be read: {error}") from None
    with local.allowed(local.is_allowed() and run.resolve() / local.FOLDER):  # and no code of any other folder
        return parse_recipe(text, str(lock))


def _check_reached(run: Path, step: int) -> None:
    """
    Raises:
        UserError: the run has not got there.
    """
    told = read_json(run / "status.json")
    made, total = told.get("step"), told.get("of")
    if isinstance(total, int) and step > total:
        raise UserError(f"{run}: has {total} updates, so there is no update {step}")
    if told.get("status") in ENDED and isinstance(made, int) and step > made + 1:
        steps = ", ".join(str(_step(path)) for path in checkpoint.listed(run / "checkpoints")) or "none"
        raise UserError(
            f"{run}: ended at step {made}, so there is no update {step} to repeat; its checkpoints, from which later "
            f"updates can be reached, are of steps: {steps}"
        )


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _start(run: Path, step: int, recipe: Recipe) -> tuple[checkpoint.Checkpoint | None, list[str]]:
    """The newest sound checkpoint before an update, and what is to be said; None for the run's beginning."""
    notes = []
    for path in reversed(checkpoint.listed(run / "checkpoints")):
        if _step(path) >= step:
            continue
        try:
            found = checkpoint.load(path)
        except RunFailed as error:  # damaged, or removed by the process that trains; nothing is set aside here
            notes.append(f"note: {error}; an earlier one is taken")
            continue
        if found.facts["recipe_hash"] != recipe.hash():
            raise UserError(
                f"{run}: recipe.lock.toml, or the code in {local.FOLDER}/, is not what the checkpoint of step "
                f"{found.step} was trained with; put back what was there"
            )
        return found, notes
    return None, notes


def _check_same(run: Path, found: checkpoint.Checkpoint | None, parts: Parts, step: int) -> list[str]:
    """What may make figures differ, in lines.

    Raises:
        UserError: other data, or no such update.
    """
    env = read_json(run / "env.json")
    before = found.facts["data_fingerprint"] if found else env.get("data_fingerprint")
    if before is not None and before != parts.data.fingerprint:
        raise UserError(
            f"{run}: the data changed since this run was trained ({other_data(before, found, parts)}); put the old "
            "data back"
        )
    if not 1 <= step <= parts.run.total_steps:
        raise UserError(f"{run}: has {parts.run.total_steps} updates, so there is no update {step}")
    notes = [f"note: {line}" for line in (other_code(found, parts.recipe) if found else ())]
    if env.get("device") and env["device"] != device_name(parts.device):
        notes.append(f"note: the run was trained on {env['device']}, whose last bits may be others")
    if (processes := env.get("processes", 1)) > 1:
        notes.append(f"note: {processes} processes trained the run, and this is one: BatchNorm's statistics are others")
    torch_then = env.get("packages", {}).get("torch")
    if torch_then and torch_then != version("torch"):
        notes.append(f"note: the run was trained with torch {torch_then}, and this is {version('torch')}")
    return notes


# ---------------------------------------------------------------- numbers


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _digits(value: float | None) -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.7g}"


def _jsonable(value: Any) -> Any:
    if isinstance(value, float):
        return _plain(value)
    if isinstance(value, dict):
        return {key: _jsonable(inner) for key, inner in value.items()}
    return [_jsonable(inner) for inner in value] if isinstance(value, list | tuple) else value
