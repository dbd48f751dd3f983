"""The doctor for a loop that is not sslkit's: `sslkit.watch(...)` measures it, and says what is wrong as it shows.

    watch = sslkit.watch(online, target=target, optimizer=optimizer, epochs=10, steps_per_epoch=196)
    for epoch in range(10):
        for batch in loader:
            ...                                  # forward, backward, optimizer.step(), update of the target
            watch.step(loss=loss, tau=tau)
        watch.epoch_ended()
    print(watch.verdict())

What the loop computes is the same to the last bit with and without it: hooks look at what goes through the networks,
no random number is drawn, and between records nothing waits for the device.
"""

from __future__ import annotations

import atexit
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sslkit.batch import Branches
from sslkit.doctor import Examination
from sslkit.errors import UserError
from sslkit.foreign import loop_facts
from sslkit.foreign.followed import Followed
from sslkit.foreign.journal import Journal, Metric, aside, detached
from sslkit.foreign.labelled import Labelled
from sslkit.foreign.loop_facts import Movement
from sslkit.foreign.taps import Networks, Part, Taps, find
from sslkit.panel import Panel, gradient_norms
from sslkit.rules import Facts, Severity, Trajectory

SETTLES = 10
"""Steps between the two looks at which of the target's parameters move."""


def watch(
    online: nn.Module | Mapping[str, nn.Module],
    target: nn.Module | Mapping[str, nn.Module] | None = None,
    *,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    backbone: Part = None,
    projector: Part = None,
    predictor: Part = None,
    epochs: int | None = None,
    steps_per_epoch: int | None = None,
    tau: Callable[[int], float] | None = None,
    labelled: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    directory: str | Path | None = None,
    name: str = "",
    views: int = 2,
    together: bool = False,
    every: int = 50,
    k: int = 200,
    stop_on: Severity = "error",
    accept: Sequence[str] = (),
    say: Callable[[str], None] | None = None,
) -> Watch:
    """Watch a training loop. Call it once, after networks and optimizer were made.

    Of processes that train together, in `torch.distributed`, the first measures, writes and speaks; the others call it
    likewise, and there it does nothing.

    Args:
        online: The network that is trained, also inside `torch.compile` or DistributedDataParallel; or a dict of its
            parts, `{"backbone": ..., "projector": ..., "predictor": ...}`.
        target: The second network of BYOL, MoCo or DINO, or a dict of its parts; None where there is none.
        optimizer: One, or several. Their steps are counted; without one, every call of `step` counts.
        backbone, projector, predictor: A part of `online`, by name (`"encoder"`) or itself. Guessed if not given, and
            said.
        epochs, steps_per_epoch: The length of the run, in optimizer steps.
        tau: How much of the target an update leaves, as a function of the step, 0 before the first update. With it the
            whole schedule is looked at before training; a tau that is given to each `step` is enough to find it wrong
            when it is.
        labelled: Images with labels for kNN, which is measured now and at the end of each epoch: training images and
            their labels, test images and theirs. Images are `[N, C, H, W]`, as the backbone takes them.
        transform: Makes uint8 images of `labelled` what the backbone takes.
        directory: Where to write `metrics.jsonl`, `facts.json` and `status.json`, for `sslkit doctor` and `sslkit
            report`. Nothing is overwritten: where a run lies already, the next free name with a number is taken.
        name: What the run is called.
        views: How many views of an image go through the backbone, one call each.
        together: Whether they go through in one call, `torch.cat(views)`.
        every: Steps between records.
        k: Neighbours that vote in kNN.
        stop_on: How grave a finding sets `lost`.
        accept: Ids of findings that are meant to be; they are not told.
        say: Prints a line; to stderr if not given.

    Raises:
        UserError: a name leads nowhere, or the labelled images are not what they should be.
    """
    networks = find(online, target, {"backbone": backbone, "projector": projector, "predictor": predictor})
    if labelled is not None and "backbone" not in networks.online:
        raise UserError(
            "labelled: kNN needs the backbone, and no part of the network is called like one; name it: backbone='...'"
        )
    speaks = loop_facts.rank() == 0
    if not speaks:
        networks, labelled, directory = Networks(), None, None
    optimizers = (optimizer,) if isinstance(optimizer, Optimizer) else tuple(optimizer or ())
    say = say or aside
    clean = None if labelled is None else Labelled(labelled, transform, k, say)
    total = epochs * steps_per_epoch if epochs and steps_per_epoch else None
    facts = Facts(
        name=name, accepted=tuple(accept), total_steps=total, steps_per_epoch=steps_per_epoch, evaluated="online",
        tau=Trajectory.of(tau, total) if tau and total else None,
        **loop_facts.of_networks(networks), **loop_facts.of_optimizers(networks, optimizers),
        **loop_facts.of_labelled(labelled),
    )  # fmt: skip
    journal = Journal(facts, say, stop_on if speaks else None, Path(directory) if directory else None, speaks=speaks)
    return Watch(networks, optimizers, Taps(networks, views, together=together), journal, clean, tau, every)


class Watch:
    """What `sslkit.watch` gives. Also a context manager, which closes it however the loop ends."""

    def __init__(
        self,
        networks: Networks,
        optimizers: Sequence[Optimizer],
        taps: Taps,
        journal: Journal,
        labelled: Labelled | None,
        tau: Callable[[int], float] | None,
        every: int,
    ) -> None:
        self._networks, self._optimizers, self._taps = networks, optimizers, taps
        self._journal, self._labelled, self._tau, self._every = journal, labelled, tau, every
        self._trained, self._copies = networks.trained, networks.copies
        self._panel = Panel()
        self._movement: Movement | None = Movement(networks) if networks.has_target else None
        self._moving_since = 0
        self._rates: dict[str, Followed] = {}
        self._taus = Followed()
        self._bad: Tensor | None = None
        """The first step whose loss was not finite, on the device; -1 while there is none."""
        self._branches: Branches | None = None
        self._newest: dict[str, Metric] = {}
        self._gradients: dict[str, Tensor] = {}
        self._pending = 0
        """Steps of the optimizer since the last call of `step`."""
        self._micro_batches = 0
        """How many the optimizer's first step was made of."""
        self._recorded_at = 0
        self._unheard = False
        self._closed = False
        self._handles = [
            handle
            for optimizer in optimizers[:1]  # where several step in turn, the first one's steps are counted
            for handle in (
                optimizer.register_step_pre_hook(self._before_update),
                optimizer.register_step_post_hook(self._after_update),
            )
        ]
        atexit.register(self.close)
        self._begin()

    def _begin(self) -> None:
        """Say what was guessed, tell what is known to be wrong, and measure what is there before training."""
        for line in self._networks.said:
            self._journal.say(line)
        self._journal.status("running")
        self._journal.learn({})
        self._journal.record(self._knn())

    @property
    def steps(self) -> int:
        """Optimizer steps so far."""
        return self._journal.step

    @property
    def lost(self) -> bool:
        """Whether something as grave as `stop_on` was found: reason enough for the loop to break off."""
        return self._journal.lost

    @property
    def facts(self) -> Facts:
        """What is known of the run so far."""
        return self._journal.facts

    @property
    def directory(self) -> Path | None:
        """Where it is written."""
        return self._journal.directory

    # ------------------------------------------------------------ what the loop calls

    def step(self, loss: Metric | None = None, tau: float | None = None, **metrics: Metric) -> None:
        """An optimizer step is done, and the target was updated.

        With gradient accumulation it may be called after every micro-batch: it counts where the optimizer stepped.

        Args:
            loss: The loss of the batch; a tensor is read when a record is written.
            tau: How much of the target the update left.
            metrics: Other figures for the record, by the names that `metrics.jsonl` has for them.
        """
        if self._closed or (self._handles and not self._pending):
            return
        before = self.steps
        self._journal.step, self._pending = before + max(1, self._pending), 0
        micro_batches = self._micro_batches or self._taps.micro_batches
        branches = self._taps.take()
        if branches is not None:
            self._panel.step(branches)
            self._branches = branches
        if tau is None and self._tau is not None:
            tau = self._tau(before)
        self._newest = {key: detached(value) for key, value in metrics.items()}
        if loss is not None:
            self._newest["loss"] = detached(loss)
        if tau is not None:
            self._newest["tau"] = float(tau)
            self._taus.note(before, float(tau))
        broken = loss is not None and self._breaks(loss)
        if before == 0 and branches is not None:
            self._learn_first(branches, micro_batches, loss)
        if broken or self._is_recorded(before, self.steps):
            self._record_step()
        self._note_target()

    def epoch_ended(self) -> None:
        """An epoch is over: measure rank and kNN, and look at the rates."""
        if self._closed:
            return
        self._journal.epochs += 1
        self._flush()
        self._journal.record({**self._panel.spectra(), **self._knn()})
        self._learn_schedules(whole=False)

    def verdict(self) -> str:
        """Everything that was found, and whether to trust the run, as `sslkit doctor` prints it."""
        if not self._closed:
            self._flush()
            self._learn_schedules(whole=self._journal.finished)
            if self._journal.finished:
                self._journal.status("done")
        return self._journal.verdict(self._networks.said)

    def examination(self) -> Examination:
        """All that was found so far, for a program."""
        return self._journal.examination(self._networks.said)

    def close(self, status: str | None = None) -> None:
        """Let go of networks and files, and say the verdict, unless `verdict` gave it and nothing came after.

        Called twice, it does nothing the second time.
        """
        if self._closed:
            return
        self._flush()
        status = status or ("done" if self._journal.finished or self.facts.total_steps is None else "stopped")
        self._learn_schedules(whole=status == "done")
        self._closed = True
        atexit.unregister(self.close)
        self._taps.remove()
        for handle in self._handles:
            handle.remove()
        self._journal.status(status)
        self._journal.close(self._networks.said)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.close("interrupted" if issubclass(kind, KeyboardInterrupt) else "failed")

    # ------------------------------------------------------------ around the optimizer's step

    def _before_update(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._pending:
            return
        for part, rate in loop_facts.rates(self._networks, self._optimizers).items():
            self._rates.setdefault(part, Followed()).note(self.steps, rate)
        if self._is_recorded(self.steps, self.steps + 1) and not _closure(args, kwargs):
            self._gradients = self._norms()
        if self.steps == 0:
            # Not earlier: weights may be loaded after `watch`. The step's update of the target may be over already.
            self._panel.before_update(self._trained, self._copies, entire=False)

    def _after_update(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._micro_batches = self._micro_batches or self._taps.micro_batches
        self._pending += 1
        if _closure(args, kwargs) and self._is_recorded(self.steps, self.steps + 1):
            self._gradients = self._norms()

    def _note_target(self) -> None:
        """Note the target after a step, if the next one is recorded: between the two lies one update of it, whether
        the loop makes it after the optimizer's step, before the forward pass or anywhere else."""
        if self._is_recorded(self.steps, self.steps + 1):
            self._panel.before_update(self._trained, self._copies)

    def _norms(self) -> dict[str, Tensor]:
        return gradient_norms({part: module.parameters() for part, module in self._networks.online.items()})

    def _is_recorded(self, before: int, after: int) -> bool:
        """Whether the step that leads to `after` is written down: the first, one in `every`, the last of an epoch."""
        often = (self._every, self.facts.steps_per_epoch or self._every)
        return before == 0 or any(after // each > before // each for each in often)

    def _breaks(self, loss: Metric) -> bool:
        """Note the first loss that is not finite; True for it, where that can be told without waiting for a device."""
        if isinstance(loss, Tensor) and loss.device.type != "cpu":
            first = torch.where(torch.isfinite(loss.detach()).all(), -1, self.steps)
            self._bad = first if self._bad is None else torch.where(self._bad >= 0, self._bad, first)
            return False
        finite = bool(torch.isfinite(loss).all()) if isinstance(loss, Tensor) else math.isfinite(loss)
        if finite or self._journal.bad_step is not None:
            return False
        self._journal.bad_step = self.steps
        return True

    # ------------------------------------------------------------ records

    def _flush(self) -> None:
        if self.steps > self._recorded_at:
            self._panel.forget()  # what was noted after this very step is for the next one
            self._record_step()
            self._note_target()

    def _record_step(self) -> None:
        self._recorded_at = self.steps
        if self._bad is not None and self._journal.bad_step is None and int(self._bad) >= 0:
            self._journal.bad_step = int(self._bad)
        rates = {part: followed.values[-1] for part, followed in self._rates.items()}
        record: dict[str, Metric] = {**self._gradients, **loop_facts.recorded_rates(rates)}
        self._gradients = {}
        if self._branches is not None:
            record |= self._panel.scalars(self._branches, self._trained, self._copies)
        elif self.steps >= self._every and not self._unheard:
            self._unheard = True
            self._journal.say(
                "no batch went through the parts that are watched: name others, and watch a network that is compiled "
                "before its first batch"
            )
        self._journal.record(record | self._newest)
        self._look_at_target()

    def _knn(self) -> dict[str, float]:
        if self._labelled is None:
            return {}
        online = self._networks.online
        # What the loop makes of the backbone's maps is known before the first batch: the projector takes it.
        head = online.get("projector", nn.Identity())
        first = next((m for m in head.modules() if isinstance(m, nn.Linear)), None)
        with loop_facts.without_trace():
            return self._labelled.measure(
                online.get("backbone") or online["projector"], None if first is None else first.in_features
            )

    # ------------------------------------------------------------ facts

    def _learn_first(self, branches: Branches, micro_batches: int, loss: Metric | None) -> None:
        """What the first step shows: sizes, views, precision, the stem, and what kind of loss it is."""
        found = loop_facts.of_batch(branches, micro_batches, self._taps)
        with loop_facts.without_trace():
            found |= loop_facts.of_maps(self._networks, branches.views[0])
        if isinstance(loss, Tensor):
            found["loss_precision"] = loop_facts.LOSS_PRECISION.get(loss.dtype)
        if loss is not None:
            found |= loop_facts.of_loss(branches, float(detached(loss)), exact=self._taps.precision == "fp32")
        self._journal.learn(found)

    def _look_at_target(self) -> None:
        """Twice, some steps apart: which of the target's parameters its updates move."""
        if self._movement is None:
            return
        if not self._movement.before:
            self._movement.look()
            self._moving_since = self.steps
        elif self.steps - self._moving_since >= SETTLES:
            measured = self._journal.last("tau_measured")
            tau = self._taus.values[-1] if self._taus.values else 1.0 if measured is None else measured
            self._journal.learn({"unmoved": self._movement.unmoved(tau, self.steps - self._moving_since)})
            self._movement = None

    def _learn_schedules(self, *, whole: bool) -> None:
        """Rates and tau that were seen; what changes says something only when the whole run has been seen."""
        if not self.steps:
            return
        rates = {p: f.trajectory(self.steps) for p, f in self._rates.items() if whole or f.constant}
        tau = self._taus.trajectory(self.steps) if whole and self._taus.values and self._tau is None else None
        self._journal.learn({"lr": rates or None, "tau": tau})


def _closure(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether an optimizer is to make its gradients itself."""
    return any(callable(given) for given in (*args, *kwargs.values()))
