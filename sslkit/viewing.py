"""How the images of a set become views: squares cropped on the device, or originals cut in threads.

Of images of many sizes, a batch of crops is made on the host, an image at a time: decoded, cut once for each view, and
forgotten. What a row of the batch holds follows from the image and from that row's parameters, whichever thread makes
it, so the number of threads changes nothing. All that comes after the crop is done to whole batches on the device.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from itertools import groupby
from types import TracebackType
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from sslkit import registry
from sslkit.api import Images, Originals, OriginalViewMaker, RunInfo, ViewMaker
from sslkit.batch import Pixels
from sslkit.environment import cores
from sslkit.errors import UserError

if TYPE_CHECKING:
    from sslkit.recipe import Recipe


class Hands:
    """Threads that work side by side.

    A process that has to end does not wait for one that hangs, as those of a `ThreadPoolExecutor` would make it.
    """

    def __init__(self, number: int) -> None:
        self._tasks: queue.SimpleQueue[tuple[Future[None], Callable[[], None]] | None] = queue.SimpleQueue()
        self._let_go = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, name=f"sslkit-cut-{n}", daemon=True) for n in range(number)
        ]
        for thread in self._threads:
            thread.start()

    def give(self, task: Callable[[], None]) -> Future[None]:
        """Have a task done; its future says when, or what it raised."""
        done: Future[None] = Future()
        self._tasks.put((done, task))
        return done

    def _work(self) -> None:
        while (item := self._tasks.get()) is not None:
            done, task = item
            if self._let_go.is_set():
                done.cancel()
                continue
            try:
                task()
            except BaseException as error:  # carried to the thread that waits for it
                done.set_exception(error)
            else:
                done.set_result(None)

    def let_go(self) -> None:
        """Do nothing more than what is being done; whoever waits for the rest meets `CancelledError`."""
        if not self._let_go.is_set():
            self._let_go.set()
            for _ in self._threads:
                self._tasks.put(None)

    def join(self, patience: float | None = None) -> None:
        """Wait, for so many seconds at most, until the threads have ended."""
        last = None if patience is None else time.monotonic() + patience
        for thread in self._threads:
            thread.join(None if last is None else max(0.0, last - time.monotonic()))

    def __enter__(self) -> Hands:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.let_go()
        self.join()


class Viewing:
    """Makes the views of a set's images, in whichever of the two ways the set allows.

    Args:
        images: What views are made of.
        views: Makes them.
        pinned: Whether pixels are put where a GPU can fetch them itself.
    """

    def __init__(self, images: Images, views: ViewMaker, *, pinned: bool = False) -> None:
        self.images, self.views, self.pinned = images, views, pinned
        self.sizes: Tensor | None = getattr(images, "sizes", None)
        self.workers: int = (getattr(images, "workers", None) or cores()) if self.originals else 0
        """Threads that cut: what the set has as `workers`, else one for each core."""

    @property
    def originals(self) -> bool:
        """Whether views are cut from images as they lie in their files."""
        return self.sizes is not None

    def hands(self) -> Hands:
        """The threads for `begin`; none are started for squares."""
        return Hands(self.workers)

    def draw(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Random parameters of the views of these images: CPU tensors with a row for each."""
        if self.sizes is None:
            return self.views.draw(len(indices), generator)
        return cast(OriginalViewMaker, self.views).draw_sized(self.sizes[indices], generator)

    def begin(self, indices: Tensor, parameters: Mapping[str, Tensor], hands: Hands) -> Callable[[], Pixels]:
        """Begin to read these images, and give what waits for their pixels, on the CPU.

        An image that stands several times in succession is decoded once.

        Raises, while it is waited for:
            RunFailed: a file is not what it was when the source was opened.
        """
        if not self.originals:
            return lambda: self.images.read(indices)
        maker, images, numbers = cast(OriginalViewMaker, self.views), cast(Originals, self.images), indices.tolist()
        batch: list[Tensor] = []
        first = threading.Lock()

        def fill(index: int, rows: list[int]) -> None:
            original = images.original(index)
            for row in rows:
                crops = maker.cut(original, {name: values[row] for name, values in parameters.items()})
                with first:
                    if not batch:  # only now is it known how many channels there are
                        batch.extend(
                            torch.empty(len(numbers), *crop.shape, dtype=torch.uint8, pin_memory=self.pinned)
                            for crop in crops
                        )
                for whole, crop in zip(batch, crops, strict=True):
                    whole[row] = crop

        together = [(index, [row for row, _ in rows]) for index, rows in groupby(enumerate(numbers), lambda r: r[1])]
        begun = [hands.give(lambda index=index, rows=rows: fill(index, rows)) for index, rows in together]  # type: ignore[misc]

        def wait() -> Pixels:
            for done in begun:
                done.result()
            return tuple(batch)

        return wait

    def read(self, indices: Tensor, parameters: Mapping[str, Tensor]) -> Pixels:
        """`begin`, waited for."""
        with self.hands() as hands:
            return self.begin(indices, parameters, hands)()

    def of(self, indices: Tensor, times: int, generator: torch.Generator, device: torch.device) -> list[Tensor]:
        """The views of images, each of which is drawn so many times in succession: V times `[n * times, C, h, w]`."""
        rows = indices.repeat_interleave(times)
        drawn = self.draw(rows, generator)
        if self.originals:
            pixels = self.read(rows, drawn)
        else:
            pixels = self.images.read(indices).to(device).repeat_interleave(times, dim=0)
        return self.make(moved(pixels, device), {name: values.to(device) for name, values in drawn.items()})

    def make(self, pixels: Pixels, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        """Pixels of B images and their rows of the parameters, on one device -> V views, float `[B, C, h, w]`."""
        if isinstance(pixels, Tensor):
            return self.views.appear(self.views.crop(pixels, parameters), parameters)
        return self.views.appear([crops.float().div_(255) for crops in pixels], parameters)


def part_of(pixels: Pixels, rows: slice | Tensor) -> Pixels:
    """Those of some images of a batch."""
    return pixels[rows] if isinstance(pixels, Tensor) else tuple(crops[rows] for crops in pixels)


def moved(pixels: Pixels, device: torch.device) -> Pixels:
    """The same on a device."""
    return pixels.to(device) if isinstance(pixels, Tensor) else tuple(crops.to(device) for crops in pixels)


def fitting(views: ViewMaker, recipe: Recipe, run: RunInfo) -> ViewMaker:
    """The recipe's views, if they can be made of what its data source gives.

    Raises:
        UserError: the source gives originals, and the generator can only crop squares.
    """
    if not run.originals or (hasattr(views, "draw_sized") and hasattr(views, "cut")):
        return views
    generator, source = recipe.view_generator, recipe.data_source
    mend = "set data_source.crops_from = 'square', or " if "crops_from" in type(source).model_fields else ""
    raise UserError(
        f"view_generator {registry.name_of(type(generator))!r} crops squares only (it has no draw_sized and cut), and "
        f"data_source {registry.name_of(type(source))!r} gives images as they lie in their files; "
        f"{mend}choose a view generator that cuts from them, such as 'two_crops'"
    )
