"""Data source -> batches on the device. The batch of a step is a function of (seed, step), whoever reads it."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sslkit import randomness
from sslkit.api import Images, RunInfo, ViewMaker
from sslkit.batch import Batch, Pixels
from sslkit.viewing import Hands, Viewing, part_of

EVERY_WHOLE = 2**24
"""Above it float32 has not every whole number. Below, other positions would change what older runs measured."""

RESIDENT_SHARE = 0.25
"""A data set lives on the device if it takes no more than this share of the device's free memory."""

BEGUN = 2
"""Steps whose images are read at a time, so that no thread is idle where one batch ends and the next begins."""
PATIENCE = 0.5
"""Seconds after which somebody who waits for data looks whether the run has to end."""

LONG_PATIENCE = 10.0
"""Seconds that a run which ends waits for a reader in the middle of a file, which may be on a drive that is gone."""


@dataclass(frozen=True)
class Draw:
    """What one optimizer step reads: images, and the views' parameters, on the device."""

    batch: Batch
    parameters: dict[str, Tensor]

    def micro(self, parts: int) -> Iterator[Draw]:
        """The same in `parts` equal micro-batches."""
        if parts == 1:
            yield self
            return
        size = len(self.batch.indices) // parts
        for start in range(0, size * parts, size):
            part = slice(start, start + size)
            pixels, labels = part_of(self.batch.images, part), self.batch.labels
            yield Draw(
                Batch(pixels, self.batch.indices[part], None if labels is None else labels[part]),
                {name: values[part] for name, values in self.parameters.items()},
            )


class Feed:
    """Gives the `Draw` of any step; reads ahead in a thread where the images are not resident on the device."""

    def __init__(
        self,
        images: Images,
        views: ViewMaker,
        run: RunInfo,
        device: torch.device,
        share: Callable[[Tensor], Tensor] = lambda rows: rows,
    ) -> None:
        """
        Args:
            images, views, run, device: what is read and made, and where it goes.
            share: of the rows of a global batch, those that this process reads.
        """
        self.share = share
        self.images, self.views, self.run, self.device = images, views, run, device
        self.viewing = Viewing(images, views, pinned=device.type == "cuda")
        self.resident = None if self.viewing.originals else self._resident(images.tensor)
        self.labels = None if images.labels is None else images.labels.to(device)
        self._permutation: tuple[int, Tensor] = (-1, torch.empty(0, dtype=torch.int64))
        self.waited = 0.0
        """Seconds spent waiting for data so far."""
        self.hurried: Callable[[], bool] = lambda: False
        """Whether data that does not come is to be waited for no longer."""

    def _resident(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is None or self.device.type == "cpu":
            return tensor
        free, _ = torch.cuda.mem_get_info(self.device)
        return tensor.to(self.device) if tensor.nbytes <= RESIDENT_SHARE * free else None

    def indices(self, step: int) -> Tensor:
        """int64 `[B]` on the CPU: `perm(seed, epoch)[s*B : (s+1)*B]` for step s of its epoch; a set that lies in shards
        gives the permutation itself."""
        epoch, position = divmod(step, self.run.steps_per_epoch)
        if self._permutation[0] != epoch:
            generator = randomness.generator(self.run.seed, "order", epoch)
            order: Callable[[torch.Generator], Tensor] | None = getattr(self.images, "order", None)  # of shards
            shuffled = order(generator) if order else torch.randperm(self.run.train_images, generator=generator)
            self._permutation = (epoch, shuffled)
        return self._permutation[1][position * self.run.batch_size : (position + 1) * self.run.batch_size]

    def draw(self, step: int) -> Draw:
        """The images and view parameters of the update after `step`."""
        with self.viewing.hands() as hands:
            return self._begin(step, hands)()

    def _begin(self, step: int, hands: Hands) -> Callable[[], Draw]:
        """Begin to read what the update after `step` needs, and give what waits for it."""
        indices = self.indices(step)
        drawn = self.viewing.draw(indices, randomness.generator(self.run.seed, "views", step))
        parameters = {name: self.share(values) for name, values in drawn.items()}
        indices = self.share(indices)
        read = self.viewing.begin(indices, parameters, hands) if self.resident is None else None

        def finish() -> Draw:
            on_device = {name: self._send(values) for name, values in parameters.items()}
            where = self._send(indices)
            pixels: Pixels
            if read is None:
                assert self.resident is not None
                pixels = self.resident.index_select(0, where)
            else:
                got = read()
                pixels = self._send(got) if isinstance(got, Tensor) else tuple(self._send(crops) for crops in got)
            labels = None if self.labels is None else self.labels.index_select(0, where)
            return Draw(Batch(pixels, where, labels), on_device)

        return finish

    def _send(self, values: Tensor) -> Tensor:
        if self.device.type == "cpu":
            return values
        return values.pin_memory().to(self.device, non_blocking=True)

    def steps(self, start: int, stop: int) -> Generator[Draw, None, None]:
        """The draws of steps start .. stop - 1, counting in `waited` what the caller waits for."""
        draws = self._ahead(start, stop) if self.resident is None else self._here(start, stop)
        with contextlib.closing(draws) as source:
            while True:
                before = time.perf_counter()
                draw = next(source, None)
                self.waited += time.perf_counter() - before
                if draw is None:
                    return
                yield draw

    def _here(self, start: int, stop: int) -> Generator[Draw, None, None]:
        yield from map(self.draw, range(start, stop))

    def _ahead(self, start: int, stop: int) -> Generator[Draw, None, None]:
        ready: queue.Queue[Draw | BaseException | None] = queue.Queue(maxsize=2)
        ended, hands = threading.Event(), self.viewing.hands()

        def put(item: Draw | BaseException | None) -> None:
            while not ended.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    return
                except queue.Full:
                    continue

        def read() -> None:
            try:
                begun: deque[Callable[[], Draw]] = deque()
                for step in range(start, stop + BEGUN - 1):
                    if ended.is_set():
                        return
                    if step < stop:
                        begun.append(self._begin(step, hands))
                    if step >= start + BEGUN - 1:
                        put(begun.popleft()())
                put(None)
            except BaseException as error:  # carried to the thread that waits for it
                put(error)

        thread = threading.Thread(target=read, name="sslkit-read-ahead", daemon=True)
        thread.start()
        try:
            while (item := self._waited_for(ready, ended)) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            gave_up = ended.is_set()
            ended.set()
            hands.let_go()
            patience = PATIENCE if gave_up else LONG_PATIENCE  # one that hangs ends with the process
            for each in (thread, hands):
                each.join(patience)

    def _waited_for(
        self, ready: queue.Queue[Draw | BaseException | None], ended: threading.Event
    ) -> Draw | BaseException | None:
        """The next of the queue; None, with `ended` set, if it does not come and the run has to end."""
        while True:
            try:
                return ready.get(timeout=PATIENCE)
            except queue.Empty:
                if self.hurried():
                    ended.set()
                    return None


def spread(images: Images, number: int) -> Tensor:
    """Positions of some images, evenly from the whole set, or as a set that lies in shards chooses them."""
    sample: Callable[[int], Tensor] | None = getattr(images, "sample", None)
    if sample:
        return sample(number)
    precise = torch.float64 if len(images) > EVERY_WHOLE else torch.float32
    return torch.linspace(0, len(images) - 1, min(number, len(images)), dtype=precise).long()


def channel_statistics(images: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel on the scale 0..1, of images spread evenly over the set.

    Of 10,000 where they are in memory, else of 1,000, which have to be decoded.
    """
    chosen = spread(images, 1_000 if images.tensor is None else 10_000)
    total = square = torch.zeros(0, dtype=torch.float64)
    pixels = 0
    for part in chosen.split(512):
        values = images.read(part).to(torch.float64) / 255
        sums, squares = values.sum(dim=(0, 2, 3)), values.square().sum(dim=(0, 2, 3))
        total, square = (total + sums, square + squares) if pixels else (sums, squares)
        pixels += values[:, 0].numel()
    mean = total / pixels
    std = (square / pixels - mean.square()).clamp_min(0).sqrt().clamp_min(1e-3)
    return tuple(round(m, 4) for m in mean.tolist()), tuple(round(s, 4) for s in std.tolist())


def cache_folder() -> Path:
    """`$SSLKIT_DATA`, else `~/.cache/sslkit`."""
    import os

    chosen = os.environ.get("SSLKIT_DATA")
    return Path(chosen) if chosen else Path.home() / ".cache" / "sslkit"
