"""The loop. `Trainer.train_step` is one update of any method, in the order in which a batch travels."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from sslkit import checkpoint, distributed, nonfinite, randomness, state
from sslkit.batch import Branches, LossTerms, Pixels, joined, mean_of
from sslkit.batch_norm import running_statistics
from sslkit.build import Parts
from sslkit.data import Draw, Feed
from sslkit.distributed import World
from sslkit.errors import RunFailed, SslkitError
from sslkit.events import Bus
from sslkit.measuring import Measurements
from sslkit.nn import ScheduledNumber
from sslkit.objective import Objective, check_gradients
from sslkit.panel import joined_norms
from sslkit.run_directory import RunDirectory

HOOKS = ("before_step", "after_backward", "after_step")
"""Methods that any module of a head, a loss or a target updater may have; each is given the completed updates."""


class Trainer:
    """A run in progress: the parts, the position, and what observers see of it (`sslkit.events.Run`)."""

    def __init__(
        self,
        parts: Parts,
        directory: RunDirectory,
        say: Callable[[str], None] = print,
        asked_to_stop: Callable[[], int] = lambda: 0,
        world: World | None = None,
    ) -> None:
        self.world = world or World()
        self.parts, self.recipe, self.info, self.device = parts, parts.recipe, parts.run, parts.device
        self.model, self.loss, self.optimizer = parts.model, parts.loss, parts.optimizer
        self.data, self.views = parts.data, parts.views
        self.files, self.directory = directory, directory.path
        self.say, self._asked_to_stop = say, asked_to_stop
        self.bus = Bus(parts.observers)
        self.feed = Feed(parts.data.train, parts.views, parts.run, self.device, self.world.share)
        self.objective = self.world.wrap(Objective(self.model, self.loss, self.recipe, self.world))
        self.step = 0
        self.knn: tuple[int, float] | None = None
        """Step and value of the newest kNN accuracy."""
        self.best_knn: float | None = None
        self.trained = [p for group in parts.groups for p in group.parameters]
        self.owners = [group.part for group in parts.groups for _ in group.parameters]
        # Not the target's copies, save to follow schedules: they have no gradients, and only the updater moves them.
        tops = (self.model.online, self.model.predictor, self.loss, parts.updater)
        self.hooked = [
            m for top in tops if top is not None for m in top.modules() if any(hasattr(m, hook) for hook in HOOKS)
        ]
        copies = self.model.target.modules() if self.model.target is not None else ()
        self.copied = [m for m in copies if hasattr(m, "before_step")]
        self.scheduled = [m for m in self.loss.modules() if isinstance(m, ScheduledNumber) and m.constant is None]
        self.masks_on_device = self.device.type != "cpu"
        """Leave steps that are not finite out by arithmetic: asking would make the host wait for the device."""
        self.bad_step = torch.full((), -1, device=self.device)
        """The first step whose loss or gradient was not finite, on the device; -1 while there is none."""
        self.anomaly: nonfinite.Finding | None = None
        """What was found about that step, once the host has heard of it."""
        self.terms = LossTerms(torch.zeros((), device=self.device))
        self.gradient_norm = torch.zeros((), device=self.device)
        self.gradient_norms: tuple[list[str], tuple[Tensor, ...]] = ([], ())
        """The part that each parameter with a gradient belongs to, and the norm of its gradient before clipping."""
        self.target_updates = torch.zeros((), dtype=torch.int64, device=self.device)
        """How often the target was moved so far; on the device, for only that knows whether a step was finite."""
        self.kept_equal = running_statistics(self.model) if self.world.size > 1 else []
        self._amid_step = False
        """Whether the other processes wait within a step, and would not hear."""
        self.unchecked = True
        self._digests = 0.0, 0.0
        """Of the state at the newest step that every process saves after, to compare."""
        self.measurements = Measurements(parts, directory)
        self._clock = (time.perf_counter(), 0, 0.0)
        if self.recipe.train.compile:
            self._compile()

    def _compile(self) -> None:
        # Branch by branch rather than the whole step: the same code then serves every view. Evaluation calls the
        # backbone below these, so it stays eager and never makes anything compile again.
        self.model.online.compile(dynamic=False)
        if self.model.target is not None:
            self.model.target.compile(dynamic=False)
        self.make_views = torch.compile(self.make_views, dynamic=False)  # type: ignore[method-assign]

    # ------------------------------------------------------------ one step

    def train_step(self, draw: Draw) -> Branches:
        """One optimizer update. Nothing here waits for the device."""
        self._amid_step = True
        self._begin()
        micros = self.recipe.train.accumulate
        kept: list[tuple[Branches, Branches]] = []
        terms: list[LossTerms] = []
        looked_at: list[Tensor] = []
        for number, micro in enumerate(draw.micro(micros)):
            views = self.make_views(micro.batch.images, micro.parameters)
            with self.world.kept_apart(self.objective, number < micros - 1):
                branches, seen, found = self.objective(views, micro.batch, self.step, number)
                (found.total / micros).backward()
            terms.append(found)
            kept.append((branches.detached(), seen.detached()))
            looked_at = looked_at or views
        branches, self.terms = joined([own for own, _ in kept]), mean_of(terms)
        self.unchecked = self.unchecked and self.world.size > 1 and check_gradients(self.model, self.loss)
        self.world.average([self.terms.total, *self.terms.terms.values(), *self.kept_equal])

        finite = self._measure_gradient()
        self._optimize(finite)
        self._update_target(finite)
        self._commit(kept, finite)
        self._call("after_step")
        self.step += 1
        self._amid_step = False
        branches.views = looked_at
        self.bus.emit("step_ended", run=self, branches=branches)
        return branches

    def make_views(self, pixels: Pixels, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        """Squares or crops, uint8 -> V views, float `[B, C, h, w]`."""
        views = self.feed.viewing.make(pixels, parameters)
        if self.recipe.train.channels_last:
            views = [v.contiguous(memory_format=torch.channels_last) for v in views]
        return views

    def _begin(self) -> None:
        # Dropout and stray draws are keyed too, so that a resumed step repeats them.
        rank = self.world.rank
        torch.manual_seed(randomness.key(self.info.seed, f"step/{rank}" if rank else "step", self.step))
        for group, values in zip(self.optimizer.param_groups, self.parts.values, strict=True):
            group["lr"], group["weight_decay"] = values.lr(self.step), values.weight_decay(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        self._call("before_step")
        for module in self.copied:
            module.before_step(self.step)  # type: ignore[operator]

    def _precision(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.train.precision == "bf16")

    def _measure_gradient(self) -> Tensor:
        """Call the hooks after the backward pass, clip, and tell (0-dim bool) whether everything is finite."""
        self._call("after_backward")
        owned = [(o, p.grad) for o, p in zip(self.owners, self.trained, strict=True) if p.grad is not None]
        norms = tuple(torch._foreach_norm([gradient for _, gradient in owned]))
        self.gradient_norms = [owner for owner, _ in owned], norms
        self.gradient_norm = torch.linalg.vector_norm(torch.stack(norms))
        if self.recipe.train.clip_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(
                self.trained, self.recipe.train.clip_grad_norm, self.gradient_norm, foreach=True
            )
        finite = torch.isfinite(self.terms.total) & torch.isfinite(self.gradient_norm) & (self.bad_step < 0)
        self.bad_step = torch.where(~finite & (self.bad_step < 0), self.step, self.bad_step)
        return finite

    def _optimize(self, finite: Tensor) -> None:
        """Step the optimizer, unless something is not finite."""
        if getattr(self.optimizer, "_step_supports_amp_scaling", False):
            self.optimizer.grad_scale = None  # type: ignore[attr-defined]
            self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif bool(finite):  # this optimizer cannot be told on the device
            self.optimizer.step()

    def _update_target(self, finite: Tensor) -> None:
        """Move the target once, after the optimizer's step."""
        if self.model.target is None:
            return
        tau = self.parts.target.tau(self.step)
        if tau is None:
            raise RunFailed("the target updater makes a second network, but its tau(step) gives no number")
        if self.masks_on_device:  # a tau of 1 leaves the target where it is; in float64, or 1 - tau would cancel
            exact = torch.full((), tau, dtype=torch.float64, device=self.device)
            self.parts.target.update(self.model.online, self.model.target, torch.where(finite, exact, 1.0))
        elif bool(finite):
            self.parts.target.update(self.model.online, self.model.target, tau)
        self.target_updates += finite

    def _commit(self, kept: list[tuple[Branches, Branches]], finite: Tensor) -> None:
        """Let the loss move its queues and centres, if it has any, by the batch of all processes."""
        if not hasattr(self.loss, "commit"):
            return
        branches = joined([seen for _, seen in kept])
        with torch.no_grad():
            if self.parts.loss_module.additive:
                branches = self.world.whole(branches)
            if not self.masks_on_device:
                if bool(finite):
                    self.parts.loss_module.commit(branches)
                return
            before = [(b, b.clone()) for b in self.loss.buffers()]
            self.parts.loss_module.commit(branches)
            for buffer, old in before:
                buffer.copy_(torch.where(finite, buffer, old))

    def _call(self, hook: str) -> None:
        for module in self.hooked:
            if hasattr(module, hook):
                getattr(module, hook)(self.step)

    # ------------------------------------------------------------ the run

    def fit(self, stop: int, on_step: Callable[[], None] = lambda: None) -> int:
        """Train up to step `stop`, or until some process is asked to end; the last thing done is a checkpoint.

        Returns:
            What `asked_to_stop` said, in whichever process; 0 if nobody asked.

        Raises:
            RunFailed: a loss or gradient was not finite, an observer failed, the disk is full.
        """
        try:
            with distributed.listening(self.world):
                return self._go_on(stop, on_step)
        except SslkitError as error:
            if not self._amid_step and not isinstance(error, distributed.EndedElsewhere | distributed.PeerLost):
                with contextlib.suppress(distributed.PeerLost):
                    self.world.words(distributed.FAILED)  # the others listen before each step
            if self.step and self.bus.failed_in:  # an observer, between two steps: what was learnt is sound
                with contextlib.suppress(Exception):  # its state_dict may be broken, too
                    self.save()
                for path in checkpoint.listed(self.files.checkpoints)[-1:]:
                    self.say(f"{path} is kept; once this is mended, the same command goes on from there")
            raise

    def _listen(self) -> int:
        """Say whether this process is asked to stop, and hear whether another one is."""
        word = self.world.words(self._asked_to_stop(), *self._digests)
        if word >= distributed.FAILED:
            raise distributed.EndedElsewhere
        return word

    def _go_on(self, stop: int, on_step: Callable[[], None]) -> int:
        train, info = self.recipe.train, self.info
        self.measurements.make("run_started", self.bus, self)
        if self.measurements.owed:  # the process before this one left them, to end in time
            self._end_epoch()
            self.save(instead=not self.measurements.owed)
        self._clock = (time.perf_counter(), self.step, self.feed.waited)
        with contextlib.closing(self.feed.steps(self.step, stop)) as draws:
            while True:
                draw = next(draws, None)  # before the others are heard, for it may fail in one process alone
                asked = self._listen()
                if asked or draw is None:
                    break
                self.train_step(draw)
                on_step()
                if self.will_record(self.step):
                    self._log()
                best = self.step % info.steps_per_epoch == 0 and self._end_epoch()
                if self.world.size > 1 and self.step % train.checkpoint_every == 0:
                    self._digests = state.digests(self.parts)
                if self.step != stop and (best or self.step % train.checkpoint_every == 0):
                    self.save()
        if self.step:
            self.save()
        self._listen()  # the first process may have failed to write
        return asked

    def _end_epoch(self) -> bool:
        """Let the observers measure. True if kNN is the best so far."""
        self.check_finite()  # what is not finite must not be measured
        before = self.knn
        try:
            self.measurements.make("epoch_ended", self.bus, self)
        finally:
            self.knn = before if self.measurements.owed else self.knn
        self._clock = (time.perf_counter(), self.step, self.feed.waited)
        if self.knn is None or self.knn[0] != self.step or (self.best_knn is not None and self.knn[1] <= self.best_knn):
            return False
        self.best_knn = self.knn[1]
        return True

    def _log(self) -> None:
        self.check_finite()
        now = time.perf_counter()
        since, step, waited = self._clock
        record: dict[str, Any] = {"loss": self.terms.total, **self.terms.terms, **joined_norms(*self.gradient_norms)}
        rates = {g["part"]: g["lr"] for g in self.optimizer.param_groups}
        record["lr"] = next(iter(rates.values()))
        record |= {f"lr_{part}": lr for part, lr in rates.items() if lr != record["lr"]}
        tau = self.parts.target.tau(self.step - 1)
        if tau is not None:
            record["tau"] = tau
        if self.model.target is not None:
            record["target_updates"] = self.target_updates
        record |= {number.option: number.value for number in self.scheduled}
        if self.step > 1:  # the first step also compiles and warms up
            record["images_per_second"] = (self.step - step) * self.info.batch_size / (now - since)
            record["data_wait"] = (self.feed.waited - waited) / (now - since)
        self.bus.emit("logging", run=self, record=record)
        self.record(record)
        self._clock = (time.perf_counter(), self.step, self.feed.waited)

    def check_finite(self) -> None:
        """Read the device's flag; if it is set, the run is over, and is searched for the cause.

        Raises:
            RunFailed: a loss or gradient was not finite; weights and target were not updated from that step on.
        """
        step = int(self.bad_step)
        if step >= 0:
            if self.anomaly is None:
                self._listen()  # an observer may have failed at the same step
                found = self.world.together(lambda: nonfinite.find(self, step), all_of_them=True)
                self.anomaly = min(found, key=nonfinite.order)  # of the process where it began
            raise nonfinite.failure(self, self.anomaly)

    def save(self, instead: bool = False) -> None:
        """Write a checkpoint of everything that affects the next loss; `instead` of the one of this step."""
        self.check_finite()
        nonfinite.check_weights(self)
        if not self.world.is_first:
            return
        self.files.sync_metrics()
        facts = {
            "recipe_hash": self.recipe.hash(),
            "recipe": self.recipe.to_toml(),
            "data_fingerprint": self.data.fingerprint,
            "metrics_offset": self.files.metrics_offset,
            "samples_seen": self.step * self.info.batch_size,
            "knn_top1": self.knn[1] if self.knn and self.knn[0] == self.step else None,
            "best_knn": self.best_knn,
            "target_updates": int(self.target_updates),
            "measurements_owed": self.measurements.owed,
            "plugins": self.recipe.provenance(),
            "run": asdict(self.info),
            "evaluated": self.parts.target.evaluated,
            "initialised": self.parts.initialised,
        }
        path = checkpoint.save(
            self.files.checkpoints, self.step, state.taken(self.parts, self.bus), facts, instead=instead,
            allowed=self.files.claim,
        )  # fmt: skip
        self.files.status("running", step=self.step, of=self.info.total_steps)
        checkpoint.prune(self.files.checkpoints, *self.recipe.train.retention, say=self.say)
        self.bus.emit("checkpoint_saved", run=self, path=path)

    def restore(self, found: checkpoint.Checkpoint) -> None:
        """Go on from a checkpoint.

        Raises:
            RunFailed: it does not fit the recipe's parts.
        """
        state.put_back(self.parts, self.bus, found)
        self.step = found.step
        self.best_knn = found.facts.get("best_knn")
        self.measurements.owed = found.facts.get("measurements_owed", False)
        self.target_updates.fill_(found.facts.get("target_updates", found.step))

    # ------------------------------------------------------------ what observers see

    @property
    def epoch(self) -> float:
        """Passes over the training images so far, with its fraction."""
        return self.step / self.info.steps_per_epoch

    def will_record(self, step: int) -> bool:
        """See `sslkit.events.Run.will_record`."""
        return step == 1 or step % self.recipe.train.log_every == 0 or step == self.info.total_steps

    @property
    def encoder(self) -> nn.Module:
        """The backbone of the branch that the target updater names for evaluation."""
        if self.parts.target.evaluated == "target" and self.model.target is not None:
            return self.model.target.backbone  # type: ignore[return-value]
        return self.model.online.backbone

    def features(self, split: str, indices: Tensor, branch: str = "evaluated") -> Tensor:
        """See `sslkit.events.Run.features`."""
        network = self.encoder if branch == "evaluated" else self.model.online.backbone
        return self.measurements.features(network, split, indices)

    def view_projections(self, indices: Tensor, views: int, generator: torch.Generator) -> Tensor:
        """See `sslkit.events.Run.view_projections`."""
        return self.measurements.view_projections(indices, views, generator)

    def record(self, values: Mapping[str, float | Tensor]) -> None:
        """See `sslkit.events.Run.record`; tensors are read from the device here, all at once."""
        names = [name for name, value in values.items() if isinstance(value, Tensor)]
        read = torch.stack([values[n].detach().float() for n in names]).tolist() if names else []  # type: ignore[union-attr]
        plain = {**values, **dict(zip(names, read, strict=True))}
        line: dict[str, Any] = {"step": self.step, "epoch": round(self.epoch, 6)}
        line |= {name: value if math.isfinite(value) else None for name, value in plain.items()}
        self.files.record(line)
        if line.get("knn_top1") is not None:
            self.knn = (self.step, line["knn_top1"])
        self.bus.emit("recorded", run=self, record=line)
