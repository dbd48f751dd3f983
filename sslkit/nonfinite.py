"""Why a step was not finite: the first module, or the first operation of the backward pass, in words.

A run notices only that the loss or the norm of the gradient is not finite, since to ask more would slow every step.
The step is then repeated with hooks: its batch, views and random numbers follow from the seed and its number.
"""

from __future__ import annotations

import contextlib
import copy
import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sslkit import local, registry
from sslkit.anomaly import Call, Record, measured, watching
from sslkit.api import ImageSet, RunInfo
from sslkit.batch import Branches, LossTerms
from sslkit.data import Draw, Feed
from sslkit.errors import RunFailed
from sslkit.events import Bus
from sslkit.recipe import Recipe
from sslkit.run_directory import RunDirectory
from sslkit.siamese import Siamese
from sslkit.words import spoken

BATCH_FILE = "bad_batch.json"
"""Where a run keeps the batch of the step at which it failed."""
LISTED = 5
"""So many names or images are listed in a sentence."""


@dataclass(frozen=True)
class Finding:
    """What was found about one step."""

    step: int
    """The update, counted from 1 as in `metrics.jsonl`."""
    where: str
    """Where a number was first not finite: `weights`, `views`, `forward`, `backward` or `norm`; else `nowhere`."""
    module: str | None
    """The dotted name of the module, as in the checkpoint; `loss` for the loss, `views` for the views."""
    dtype: str | None
    """What that module computed in."""
    operation: str | None
    """The operation of the backward pass, as torch calls it."""
    sentence: str
    """All of it in words."""
    parameters: tuple[str, ...] = ()
    """Weights that are not finite, or else those whose gradient is not."""

    @property
    def finite(self) -> bool:
        """Whether every number was."""
        return self.where == "nowhere"

    def status(self) -> dict[str, Any]:
        """What `status.json` says of a run that failed of it."""
        return {"reason": "not_finite", "step": self.step, "module": self.module}


class Loop(Protocol):
    """What is needed here of `sslkit.trainer.Trainer`."""

    recipe: Recipe
    info: RunInfo
    data: ImageSet
    feed: Feed
    model: Siamese
    loss: nn.Module
    trained: list[nn.Parameter]
    files: RunDirectory
    directory: Path
    bus: Bus
    step: int
    bad_step: Tensor
    terms: LossTerms
    gradient_norm: Tensor
    anomaly: Finding | None

    def train_step(self, draw: Draw) -> Branches:
        """Make the next update, or all of it but the update itself once `bad_step` is set."""
        ...


# ---------------------------------------------------------------- what it means


def conclusion(record: Record, trainer: Loop, indices: list[int]) -> Finding:
    """What a record says of the step that `trainer` has just made, whose batch had these images."""
    step, gradients = trainer.step, [name for name, gradient in record.gradients.items() if not gradient.finite]
    culprit, operation = record.culprit, record.operation
    if record.weights:
        owner = record.weights[0].rpartition(".")[0]
        sentence = (
            f"the weights were not finite before it ({_listed(record.weights)}): an update before it went too far"
        )
        return Finding(step, "weights", owner, None, None, sentence, tuple(record.weights))
    if record.rows:
        rows = sorted({row for wrong in record.rows.values() for row in wrong})
        views = " and ".join(str(number + 1) for number in sorted(record.rows))
        images = _listed([str(indices[row]) for row in rows])
        maker = f"view generator {registry.short_name(type(trainer.recipe.view_generator))!r}"
        sentence = f"the {maker} gives views that are not finite: view {views} of {_count(rows, 'image')} {images}"
        return Finding(step, "views", "views", culprit.given.dtype if culprit else None, None, sentence)
    if culprit is not None:
        sentence = f"the first output that is not finite is that of {_named(culprit)}: {culprit.gave}; it was given "
        sentence += f"finite numbers, up to {culprit.given.largest:.3g}"
        if record.before is not None:
            sentence = f"the first values that are not finite arise in the code of {_named(culprit)} itself: it gives "
            sentence += f"{record.before.module} {record.before.given}"
        if operation is not None and bool(torch.isfinite(trainer.terms.total)):
            sentence += f"; the loss is finite all the same, and its gradient is not from {operation.module} on"
        return Finding(
            step, "forward", culprit.module, culprit.dtype, None, sentence, tuple(gradients)
        )  # fmt: skip
    if operation is not None:
        sentence = f"the forward pass is finite; the first gradient that is not arises in {operation.module} "
        sentence += f"({operation.kind}, {operation.dtype}): {operation.name} gives {operation.gradient}"
        sentence += f"; so the gradient of {_listed(gradients)} is not finite" if gradients else ""
        return Finding(
            step, "backward", operation.module, operation.dtype, operation.name, sentence, tuple(gradients)
        )  # fmt: skip
    if gradients:
        found = record.gradients[gradients[0]]
        sentence = f"every operation is finite, but gradients overflow where they are summed up: {_listed(gradients)}"
        return Finding(step, "backward", gradients[0].rpartition(".")[0], found.dtype, None, sentence, tuple(gradients))
    if not bool(torch.isfinite(trainer.gradient_norm)) and record.gradients:
        name = max(record.gradients, key=lambda name: record.gradients[name].largest)
        most = record.gradients[name]
        sentence = f"every gradient is finite as the backward pass leaves it, but their norm is not: that of {name} is "
        sentence += f"up to {most.largest:.3g}"
        return Finding(step, "norm", name.rpartition(".")[0], most.dtype, None, sentence, (name,))
    sentence = "when it was repeated, every output and gradient of it was finite"
    return Finding(step, "nowhere", None, None, None, sentence)


def advice(finding: Finding, precision: str) -> str:
    """What to try."""
    if finding.where == "weights":
        return "Lower the learning rate or lengthen its warm-up"
    if finding.where == "views":
        return "Look at these images and at the view generator's options"
    if finding.where == "nowhere":
        return "So it depends on something that the seed and the step do not fix"
    said = "Lower the learning rate, lengthen its warm-up, or set train.clip_grad_norm"
    if finding.operation is not None:
        said += "; a root, a quotient or a logarithm at zero wants an epsilon"
    return said + ("; train.precision = 'fp32' tells whether bf16 is to blame" if precision == "bf16" else "")


def _named(call: Call) -> str:
    return f"{call.module} ({call.kind}, {call.dtype})" if call.dtype else f"{call.module} ({call.kind})"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")


def _count(things: Sequence[object], name: str) -> str:
    return name if len(things) == 1 else f"{len(things)} {name}s:"


# ---------------------------------------------------------------- a run that failed


@contextlib.contextmanager
def repeated(trainer: Loop, draw: Draw, step: int, *, watch: bool = True, buffers: bool = False) -> Iterator[Record]:
    """Make the update after `step` again, up to its gradients; what hooks saw if `watch`, inside the block.

    Weights, optimizer and target stay as they are, and observers hear nothing. What moves in the forward pass, as
    BatchNorm's running statistics do, moves: nothing may be saved afterwards.
    """
    kept = trainer.bus, trainer.step, trainer.bad_step
    trainer.bus, trainer.step, trainer.bad_step = Bus({}), step, torch.full_like(trainer.bad_step, step)
    record = Record()
    try:
        with contextlib.ExitStack() as stack:
            if watch:
                record = stack.enter_context(watching(trainer.model, trainer.loss, buffers=buffers))
            if watch and trainer.recipe.train.compile:
                # Compiled code has no modules to hook. Asking for this imports the compiler, which takes seconds.
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            trainer.train_step(draw)
        yield record
    finally:
        trainer.bus, trainer.step, trainer.bad_step = kept


def find(trainer: Loop, step: int) -> Finding:
    """What is not finite in the update after `step`, at which a run has failed; its batch is kept in `bad_batch.json`.

    The run is over: see `repeated`.
    """
    feed = copy.copy(trainer.feed)  # a copy, for the feed may be reading ahead in its thread
    whole, draw = feed.indices(step).tolist(), feed.draw(step)
    indices = draw.batch.indices.tolist()
    with contextlib.suppress(RunFailed):  # the disk may be full, which is not what the run failed of
        trainer.files.write(BATCH_FILE, json.dumps(batch_facts(trainer, step, whole), indent=1) + "\n")
    try:
        with repeated(trainer, draw, step) as record:
            return conclusion(record, trainer, indices)
    except Exception as error:  # a stranger's module, given what is not finite
        problem = f"it could not be repeated: {local.in_short(error)}"
        return Finding(step + 1, "nowhere", None, None, None, problem)


def order(finding: Finding) -> int:
    """How early in a step it arose: what one process finds is averaged into the gradients of all."""
    return ("weights", "views", "forward", "backward", "norm", "nowhere").index(finding.where)


def batch_facts(trainer: Loop, step: int, indices: list[int]) -> dict[str, Any]:
    """The key of the batch of the update after `step`, and where its images are, as far as their source knows."""
    files = getattr(trainer.data.train, "files", None)
    return {
        "seed": trainer.info.seed,
        "step": step + 1,
        "indices": indices,
        "files": None if files is None else [str(files[index]) for index in indices],
    }


def failure(trainer: Loop, finding: Finding) -> RunFailed:
    """What a run says that ends because of it."""
    what = f"the loss or its gradient is not finite at step {finding.step} (seed {trainer.info.seed})"
    run = str(trainer.directory)
    again = spoken().replay.format(run=run, quoted=shlex.quote(run), step=finding.step)
    return RunFailed(
        f"{what}: {finding.sentence}. Weights, optimizer and target were left as they were before it",
        f"{advice(finding, trainer.recipe.train.precision)}. To look closer: {again} (docs/how-to/find-a-nan.md)",
    )


def check_weights(trainer: Loop) -> None:
    """Keep weights that are not finite out of checkpoints: a run could not go on from them.

    Raises:
        RunFailed: an update went too far, which the next one would have noticed.
    """
    trained = [p.detach() for p in trainer.trained]
    if bool(torch.stack(torch._foreach_norm(trained)).isfinite().all()):
        return
    names = {p: name for name, p in trainer.model.named_parameters()}
    names |= {p: f"loss.{name}" for name, p in trainer.loss.named_parameters()}
    wrong = [names.get(p, "a parameter") for p in trainer.trained if not measured([p]).finite]
    if wrong:
        trainer.anomaly = Finding(trainer.step, "weights", wrong[0].rpartition(".")[0], None, None, "", tuple(wrong))
        raise RunFailed(
            f"the weights are not finite after step {trainer.step}: {_listed(wrong)}; no checkpoint was written, and "
            "earlier ones are untouched. Lower the learning rate or lengthen its warm-up"
        )
