"""Images that are decoded whenever they are read: from files, from rows of Parquet files, from members of archives."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sslkit.environment import cores
from sslkit.errors import RunFailed
from sslkit_datasets.bad import BadImageError
from sslkit_datasets.decode import Pixels
from sslkit_datasets.images import load, shown, state_of
from sslkit_datasets.order import sampled, windowed
from sslkit_datasets.preparing import Preparation


class Encoded(Protocol):
    """Image files that can be had one at a time, by several threads."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What image i is called, for people."""
        ...

    def load(self, index: int) -> bytes:
        """The bytes of image i.

        Raises:
            BadImageError: they cannot be read.
        """
        ...

    def compare(self, index: int, data: bytes) -> None:
        """Whether these bytes, which were loaded, are those that the source was opened with.

        Raises:
            RunFailed: they are not.
        """
        ...


class Names(Sequence[Path]):
    """Paths below a folder. A million of them take a tenth of the memory that as many `Path`s do."""

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self.root, self.names = root, names

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> Names: ...
    def __getitem__(self, index: int | slice) -> Path | Names:
        if isinstance(index, slice):
            return Names(self.root, self.names[index])
        return self.root / self.names[index]


@dataclass
class Files:
    """Files in folders."""

    files: Sequence[Path]
    prepared: Preparation
    digests: NDArray[np.uint8]
    """Of each file when the source was opened, as `Preparation.digest` gives it: `[N, 32]`."""
    states: NDArray[np.int64]
    """Size and time of each file then, as `state_of` has them: `[N, 2]`."""

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return shown(self.files[index])

    def load(self, index: int) -> bytes:
        return load(self.files[index])

    def compare(self, index: int, data: bytes) -> None:
        # Only what has another size or time is compared byte by byte: a file that was copied back is the same.
        if state_of(self.files[index]) == tuple(self.states[index].tolist()):
            return
        if self.prepared.digest(data) != self.digests[index].tobytes():
            raise RunFailed(
                f"{self.name(index)} holds another image than when the run began; put the old file back, and the "
                "same command goes on"
            )


@dataclass
class OnDemand:
    """N images that are decoded whenever they are read (`sslkit.api.Originals`)."""

    encoded: Encoded
    prepared: Preparation
    workers: int | None
    """Threads that decode; None for one for each core of this process."""
    labels: Tensor | None = None
    sizes: Tensor | None = None
    keep_gb: float = 0.0
    """Squares that were read once are kept up to this many gigabytes."""
    tensor: Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        size = self.prepared.size or 1
        self._kept = _Kept(int(self.keep_gb * 1e9) // (self.prepared.channels * size**2))

    def __len__(self) -> int:
        return len(self.encoded)

    @property
    def files(self) -> Sequence[object]:
        """What each image is called."""
        return self.encoded.files if isinstance(self.encoded, Files) else _Called(self.encoded)

    def read(self, indices: Tensor) -> Tensor:
        """As `Images.read`.

        Raises:
            RunFailed: an image that was sound when the source was opened is not any more.
        """
        chosen: list[int] = indices.tolist()
        size = self.prepared.size
        assert size is not None
        images = np.empty((len(chosen), self.prepared.channels, size, size), np.uint8)

        def fill(row: int) -> None:
            index = chosen[row]
            kept = self._kept.get(index)
            images[row] = self._kept.put(index, self._decoded(index, square=True)) if kept is None else kept

        # A pool of its own for each call: a lasting one would not survive a fork and could not be pickled, and its
        # threads start in a fraction of the time that one image takes.
        with ThreadPoolExecutor(min(self.workers or cores(), max(1, len(chosen)))) as pool:
            list(pool.map(fill, range(len(chosen))))
        return torch.from_numpy(images)

    def original(self, index: int) -> Tensor:
        """As `Originals.original`.

        Raises:
            RunFailed: as `read`.
        """
        image = self._decoded(index, square=False)
        assert self.sizes is not None
        height, width = self.sizes[index].tolist()
        if image.shape[1:] != (height, width):
            raise RunFailed(
                f"{self.encoded.name(index)} has {image.shape[2]} x {image.shape[1]} pixels, and had {width} x "
                f"{height} when the run began; put the old file back, and the same command goes on"
            )
        return torch.from_numpy(np.ascontiguousarray(image))

    def _decoded(self, index: int, *, square: bool) -> Pixels:
        try:
            data = self.encoded.load(index)
            image = self.prepared.square(data) if square else self.prepared.whole(data)
            self.encoded.compare(index, data)
        except BadImageError as error:
            since = (
                "only its header was read when the run began; mend or remove it, and begin a new run"
                if self.prepared.headers
                else "it could be read when the run began, so it was changed since"
            )
            raise RunFailed(f"{self.encoded.name(index)} {error}; {since}") from error
        return image


class Grouped(Encoded, Protocol):
    """Images that are read a block at a time."""

    blocks: Tensor
    """int64 `[N]`, not descending: the block that each image lies in."""


@dataclass
class Streamed(OnDemand):
    """Images that lie in blocks, read one block after another (`sslkit.api.Ordered`)."""

    window: int = 1

    def order(self, generator: torch.Generator) -> Tensor:
        """As `Ordered.order`."""
        return windowed(self._blocks, self.window, generator)

    def sample(self, n: int) -> Tensor:
        """As `Ordered.sample`."""
        return sampled(self._blocks, n)

    @property
    def _blocks(self) -> Tensor:
        return cast("Grouped", self.encoded).blocks


class _Kept:
    """Squares by position, as many as there is room for; first come, first kept."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.images: dict[int, Pixels] = {}
        self._lock = threading.Lock()

    def get(self, index: int) -> Pixels | None:
        return self.images.get(index)

    def put(self, index: int, image: Pixels) -> Pixels:
        with self._lock:
            if len(self.images) < self.room:
                self.images[index] = np.ascontiguousarray(image)
        return image

    def __reduce__(self) -> tuple[Any, ...]:
        return _Kept, (self.room,)


class _Called(Sequence[str]):
    """Names of images, made when they are asked for."""

    def __init__(self, encoded: Encoded) -> None:
        self.encoded = encoded

    def __len__(self) -> int:
        return len(self.encoded)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self.encoded.name(i) for i in range(len(self.encoded))[index]]
        return self.encoded.name(range(len(self.encoded))[index])
