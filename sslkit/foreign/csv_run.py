"""A run that another program made, as its log of losses tells it, with whatever else is known of it given as options.

`sslkit doctor --csv losses.csv --epochs 10 ...`. No torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Any, Literal

from sslkit import doctor
from sslkit.errors import UserError
from sslkit.foreign import formula, log_names, log_notes, logs
from sslkit.foreign.followed import Followed
from sslkit.foreign.log_notes import COSINE, LogLoss
from sslkit.rules import Course, Facts, Trajectory

NAMES = {
    **dict.fromkeys(("epoch", "current_epoch", "ep"), "epoch"),
    **dict.fromkeys(("epochs", "num_epochs", "n_epochs", "max_epochs", "total_epochs", "max_epoch"), "epochs"),
    **dict.fromkeys(("step", "k", "it", "i", "iteration", "global_step", "current_step"), "step"),
    **dict.fromkeys(
        ("steps", "total_steps", "num_steps", "max_steps", "iterations", "total_iterations", "n_steps"), "steps"
    ),
    **dict.fromkeys(
        (
            "base", "tau_base", "base_tau", "tau0", "tau_0", "base_ema", "base_target_ema", "ema_base", "base_decay",
            "base_m", "base_momentum", "initial_tau", "tau_initial", "start", "moving_average_decay",
        ),
        "base",
    ),
}  # fmt: skip
"""What names in a formula of tau mean. `k` and `K`, which differ in case alone, are told apart in `_trajectory`."""


@dataclass(frozen=True)
class Known:
    """What the log does not say. None: not known."""

    epochs: int | None = None
    """Epochs of the whole run."""
    steps_per_epoch: int | None = None
    """Optimizer steps of an epoch."""
    tau_base: float | None = None
    """The target's tau at the start."""
    tau_formula: str | None = None
    """How tau was computed, as in the script: arithmetic in epoch, epochs, step, steps and base."""
    views: Literal["identical", "augmented"] | None = None
    """Whether both views of an image were the same."""
    loss: LogLoss | None = None
    """What the losses are: BYOL's sum of 2 - 2 cos over both directions, SimSiam's mean of -cos, or another."""
    optimizer: str | None = None
    """Its name: adam, lars, sgd."""
    lr: float | None = None
    """The highest learning rate."""
    batch_size: int | None = None
    """Images of an optimizer step."""
    image_size: int | None = None
    """Side of the views, in pixels."""
    stem: Literal["large", "small"] | None = None
    """A ResNet's stem: 7x7 with stride 2 and max-pool (large), or 3x3 with stride 1 (small)."""
    labels: bool | None = None
    """Whether the images have labels, so that accuracy could be measured."""


@dataclass(frozen=True)
class LogRun:
    """A log as a run, ready for `doctor.examine(run.course, run.title, notes=run.notes)`."""

    course: Course
    title: str
    notes: tuple[str, ...]
    """Facts of the log that are no findings, one line each."""


def read(path: str, known: Known | None = None) -> LogRun:
    """Read a log; `-` is the standard input.

    Raises:
        UserError: the log or an option cannot be used; with the line of the log where there is one.
    """
    known, log = known or Known(), logs.read(path)
    losses = [row["loss"] for row in log.rows if math.isfinite(row.get("loss", math.nan))]
    cosines = [] if "cosine" in log.keys else log_notes.cosine(losses, known.loss)
    if known.loss in COSINE and losses and log_notes.stands_for(losses, known.loss) is None:
        known = replace(known, loss="other")
    form = "simsiam" if known.loss is None and log_notes.may_be_simsiams(losses) else known.loss
    may_be_byol = known.loss == "byol" or (known.loss is None and log_notes.may_be_byols(losses))
    positions = _positions(log, known)
    facts, nothing = _facts(log, known, positions), None
    if form not in COSINE and (nothing := log_notes.blank(losses, known.batch_size)):
        facts = facts.model_copy(update={"blank_loss": nothing[0]})
    course = Course(facts)
    for row, step, epoch in zip(log.rows, positions.steps, positions.epochs, strict=True):
        record = {**logs.as_record(row), "step": step, "epoch": epoch}
        if form in COSINE and math.isfinite(row.get("loss", math.nan)):
            record.setdefault("cosine", COSINE[form](row["loss"]))
        course.add(record)
    notes = [*positions.notes, *log.notes, *_told_twice(log, known), *cosines]
    if nothing:
        notes.append(f"the losses begin at {nothing[1]} = {nothing[0]:.4g}, which outputs that say nothing cost")
    notes += log_notes.curve(
        course.points("loss"), facts.tau, whole=positions.whole, per_epoch=positions.per_epoch,
        first=math.floor(positions.epochs[0]), may_be_byol=may_be_byol,
    )  # fmt: skip
    if facts.tau is None and known.tau_base is not None:
        notes.append(log_notes.byols_tau(known.tau_base, positions.whole))
    return LogRun(course, _title(path, known, positions), (*notes, *_unknown(course, known)))


def examine(path: str, known: Known | None = None) -> doctor.Examination:
    """Look at a log from all sides; `-` is the standard input.

    Raises:
        UserError: as `read`.
    """
    run = read(path, known)
    return doctor.examine(run.course, run.title, notes=run.notes)


# ---------------------------------------------------------------- where the records stand


@dataclass
class _Positions:
    """Step and epoch of each record, and the length of the run as far as it is known."""

    steps: list[int]
    epochs: list[float]
    whole: int | None
    """Epochs of the run: as told, or as many as the log has."""
    per_epoch: int
    """Steps of an epoch; 1 if that is not known, and a step then is an epoch."""
    notes: list[str]


def _positions(log: logs.Log, known: Known) -> _Positions:
    """An epoch's record holds what was seen up to its end: it stands at the epoch's last step."""
    rows, per_epoch, notes = log.rows, known.steps_per_epoch or 1, list[str]()
    for key in ("epoch", "step"):
        there = [key in row for row in rows]
        if any(there) and not all(there):
            raise UserError(
                f"the log names {key} in some records and not in others{log.place(there.index(False))}; "
                "leave it out or name it always, and give the log's lines alone"
            )
    if "epoch" in rows[0]:
        epochs = [row["epoch"] for row in rows]
        if any(b < a for a, b in pairwise(epochs)):
            raise UserError(f"the log's epochs go back, from {_falls(epochs)}; give one run at a time")
        steps = _steps_by_epoch(rows, epochs, known)
        if "step" in rows[0] and known.steps_per_epoch is None:
            per_epoch = _per_epoch(steps, epochs)
        whole: int | None = known.epochs or math.floor(epochs[-1] - epochs[0]) + 1
    elif "step" in rows[0]:
        steps = [round(row["step"]) for row in rows]
        if any(b < a for a, b in pairwise(steps)):
            raise UserError(
                f"the log's steps go back, from {_falls(steps)}; give one run at a time, or name the epochs"
            )
        if known.steps_per_epoch is None and known.epochs:
            per_epoch = max(1, round(steps[-1] / known.epochs))
            notes.append(
                f"steps per epoch were taken from the last step: {per_epoch} (--steps-per-epoch says otherwise)"
            )
        epochs = [step / per_epoch for step in steps]
        whole = known.epochs or (math.ceil(epochs[-1]) if known.steps_per_epoch else None)
    else:
        share = known.epochs / len(rows) if known.epochs and len(rows) > known.epochs else 1.0
        epochs = [number * share for number in range(len(rows))]
        steps = [round((number + 1) * share * per_epoch) for number in range(len(rows))]
        whole = known.epochs or len(rows)
        notes.append(
            "a record was taken for an epoch, counted from 0" if share == 1.0
            else f"{len(rows)} records were spread evenly over {known.epochs} epochs"
        )  # fmt: skip
    if whole is not None and known.epochs is None:
        notes.append(f"the run was taken to have {whole} epochs, as the log has (--epochs says otherwise)")
    return _Positions(steps, epochs, whole, per_epoch, notes)


def _steps_by_epoch(rows: Sequence[logs.Row], epochs: Sequence[float], known: Known) -> list[int]:
    per_epoch, first = known.steps_per_epoch or 1, math.floor(epochs[0])
    if "step" in rows[0]:
        said = [round(row["step"]) for row in rows]
        if all(a <= b for a, b in pairwise(said)):
            return said
        if known.steps_per_epoch is None:
            raise UserError("the log counts steps within each epoch; say how many there are with --steps-per-epoch")
        return [(math.floor(e) - first) * per_epoch + step for e, step in zip(epochs, said, strict=True)]
    steps = []
    for epoch, group in groupby(epochs):
        count = len(list(group))
        steps += [round((epoch - first + (number + 1) / count) * per_epoch) for number in range(count)]
    return steps


def _per_epoch(steps: Sequence[int], epochs: Sequence[float]) -> int:
    """Steps of an epoch, by the first records of the first and the last one that the log has."""
    last = next(number for number, epoch in enumerate(epochs) if math.floor(epoch) == math.floor(epochs[-1]))
    length = (steps[last] - steps[0]) / (epochs[last] - epochs[0]) if last else steps[-1]
    return max(1, round(length))


def _falls(values: Sequence[float]) -> str:
    return next(f"{a:g} to {b:g}" for a, b in pairwise(values) if b < a)


# ---------------------------------------------------------------- facts


def _facts(log: logs.Log, known: Known, positions: _Positions) -> Facts:
    """Only what was told or follows from it."""
    steps = positions.whole * positions.per_epoch if positions.whole else None
    facts: dict[str, Any] = {
        "total_steps": steps, "steps_per_epoch": known.steps_per_epoch, "batch_size": known.batch_size,
        "labelled": known.labels, "quality": tuple(key for key in log_names.QUALITY if key in log.keys),
        "optimizer": known.optimizer.lower() if known.optimizer else None,
    }  # fmt: skip
    if known.views == "identical":
        facts["view_difference"] = (0.0, 0.0)
    if known.image_size:
        facts["view_sizes"] = (known.image_size,)
        if known.stem:  # of a ResNet: 32 pixels of a view for one of the last map's, or 8
            facts["last_map"] = math.ceil(known.image_size / (32 if known.stem == "large" else 8))
    if known.stem:
        facts["stem_stride"] = 4.0 if known.stem == "large" else 1.0
    if known.loss in COSINE:
        facts |= {
            "prevents_collapse": False, "wants_predictions": True,
            "target": "copy" if known.loss == "byol" else None,
            "byol_scale": 1.0 if known.loss == "byol" else None,
        }  # fmt: skip
    looked_at = steps or positions.steps[-1]
    if known.lr is not None:
        facts["lr"] = {"backbone": Trajectory.of(lambda step: known.lr or 0.0, looked_at)}
    elif rate := _column(log, positions, "lr", looked_at):
        facts["lr"] = {"backbone": rate}
    if known.tau_formula:
        facts |= {"target": "copy", "tau": _trajectory(known.tau_formula, known, positions)}
    elif tau := _column(log, positions, "tau", looked_at):
        facts |= {"target": "copy", "tau": tau}
    return Facts(**facts)


def _column(log: logs.Log, positions: _Positions, key: str, steps: int) -> Trajectory | None:
    """A column over the run: a record holds for the steps since the one before it. None if it holds no number."""
    followed, since = Followed(), 0
    for step, row in zip(positions.steps, log.rows, strict=True):
        if math.isfinite(row.get(key, math.nan)):
            followed.note(since, row[key])
            since = step
    return followed.trajectory(steps) if followed.values else None


def _trajectory(text: str, known: Known, positions: _Positions) -> Trajectory:
    """Tau at every step of the run, by the formula."""
    where = "--tau-formula"
    value, used = formula.parse(_without_capitals(text), NAMES, where)
    for name, option, there in (
        ("base", "--tau-base", known.tau_base is not None),
        ("epochs", "--epochs", positions.whole is not None),
        ("step", "--steps-per-epoch", known.steps_per_epoch is not None),
        ("steps", "--steps-per-epoch", known.steps_per_epoch is not None),
    ):
        if name in used and not there:
            raise UserError(f"{where}: has {name!r} in it; say what it is with {option}")
    if positions.whole is None:
        raise UserError(f"{where}: the length of the run is not known; say it with --epochs")
    per_epoch, total = positions.per_epoch, positions.whole * positions.per_epoch
    values = {"base": known.tau_base or 0.0, "epochs": float(positions.whole), "steps": float(total)}
    by_epoch: dict[int, float] = {}

    def tau(step: int) -> float:
        epoch = step // per_epoch
        if "step" not in used and epoch in by_epoch:
            return by_epoch[epoch]
        try:
            found = value({**values, "epoch": float(epoch), "step": float(step)})
        except (ArithmeticError, ValueError) as error:
            raise UserError(f"{where}: at epoch {epoch} (step {step}): {error}") from None
        if not math.isfinite(found):
            raise UserError(f"{where}: is {found} at epoch {epoch} (step {step})")
        by_epoch[epoch] = found
        return found

    return Trajectory.of(tau, total)


def _without_capitals(text: str) -> str:
    """`K` and `E` are lengths, as in k/K; the case of other names does not matter."""
    return re.sub(r"\b(?<!\.)([KE])\b(?!['\"(])", lambda m: {"K": "steps", "E": "epochs"}[m[1]], text)


# ---------------------------------------------------------------- words


def _unknown(course: Course, known: Known) -> list[str]:
    """What was not told and would be examined if it were."""
    facts = course.facts
    wanted = [
        ("tau", "--tau-formula", facts.tau is None and known.loss in (None, "byol")),
        ("the views", "--views", known.views is None),
        ("the stem", "--stem and --image-size", facts.stem_stride is None or not facts.view_sizes),
        ("the optimizer's rate", "--optimizer and --lr", facts.optimizer is None or facts.lr is None),
        ("the batch size", "--batch-size", facts.batch_size is None),
        ("steps per epoch", "--steps-per-epoch", facts.steps_per_epoch is None and facts.tau is not None),
    ]
    missing = [f"{what} ({option})" for what, option, absent in wanted if absent]
    return [f"not told, so not examined: {', '.join(missing)}"] if missing else []


def _told_twice(log: logs.Log, known: Known) -> list[str]:
    """What both an option and a column of the log tell, and which of them was taken."""
    over = [
        ("--lr", known.lr is not None, "lr"),
        ("--tau-formula", known.tau_formula is not None, "tau"),
        ("--views", known.views == "identical", "view_difference"),
    ]
    under = [
        ("--tau-base", known.tau_base is not None and known.tau_formula is None, "tau"),
        ("--loss", known.loss in COSINE, "cosine"),
    ]
    notes = []
    for option, told, key in over:
        if told and key in log.keys:
            has = sorted(row[key] for row in log.rows if math.isfinite(row.get(key, math.nan)))
            span = ", which has " + " to ".join(dict.fromkeys((f"{has[0]:.4g}", f"{has[-1]:.4g}"))) if has else ""
            notes.append(
                f"{key} was taken from {option}, not from the log's column{span}; leave the option out for that"
            )
    notes += [
        f"{key} was taken from the log's column, not from {option}"
        for option, told, key in under
        if told and key in log.keys
    ]
    return notes


def _title(path: str, known: Known, positions: _Positions) -> str:
    form = {"byol": "BYOL", "simsiam": "SimSiam"}.get(known.loss or "")
    length = f"{positions.whole} epochs" if positions.whole else f"{len(positions.steps)} records"
    if positions.whole and known.steps_per_epoch:
        length += f" x {known.steps_per_epoch} steps"
    return ", ".join(part for part in ("standard input" if path == "-" else path, form, length) if part)
