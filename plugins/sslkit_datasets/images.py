"""Opened image sets, and the pass over all images that finds the broken ones before a run begins."""

from __future__ import annotations

import hashlib
import io
import json
import stat
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from sslkit.api import Images
from sslkit.errors import UserError, printable
from sslkit.progress import counted
from sslkit_datasets.bad import TOO_MUCH, BadImageError
from sslkit_datasets.decode import Pixels
from sslkit_datasets.preparing import HEAD, Preparation, digest_of_head
from sslkit_datasets.slices import Slice

Item = bytes | Path | Slice | None
"""One image as it is stored: its bytes, the file or the part of a file that holds them, or nothing at all."""

_CHUNK = 64  # images per task: small ones spend more time on the queue than in the decoder when they go one by one
_FEW = 3
_MOST_BYTES = 2**30
"""Of one image file; the pixels that are decoded at most take half of it in the plainest form."""
_MANY = 4096


@dataclass
class InMemory:
    """N images that are held as one tensor (`sslkit.api.Images`)."""

    tensor: Tensor | None
    labels: Tensor | None = None
    files: Sequence[object] | None = None
    """What each image is called, for people."""

    def __len__(self) -> int:
        return len(self._all)

    def read(self, indices: Tensor) -> Tensor:
        return self._all[indices]

    @property
    def _all(self) -> Tensor:
        assert self.tensor is not None
        return self.tensor


@dataclass
class Opened:
    """What a data source opened (`sslkit.api.ImageSet`)."""

    train: Images
    test: Images | None
    class_names: tuple[str, ...] | None
    fingerprint: str
    bad: Sequence[Mapping[str, str]] = ()


class Fingerprint:
    """A SHA-256 over records. Equal records in equal order give equal digests, and no others do."""

    def __init__(self, **preparation: object) -> None:
        self._hash = hashlib.sha256(json.dumps(preparation, sort_keys=True).encode())

    def add(self, *record: str | bytes | int | None) -> None:
        # repr quotes and escapes, so the borders between the fields are never in doubt.
        self._hash.update(f"{record!r}\n".encode())

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


class Store:
    """Room for `total` decoded images of one size, allocated when the first image tells which."""

    def __init__(self, total: int, limit_gb: float, advice: str = "") -> None:
        self.sizes: Counter[tuple[int, int]] = Counter()
        self.images: Pixels | None = None
        self._total, self._limit_gb, self._advice = total, limit_gb, advice
        self._lock = threading.Lock()

    def put(self, row: int, image: Pixels) -> None:
        """Keep one image. Called from several threads.

        Raises:
            UserError: all of them would take more than the limit.
        """
        with self._lock:
            self.sizes[image.shape[2], image.shape[1]] += 1
            if self.images is None:
                taken = self._total * image.size / 1e9
                if taken > self._limit_gb:
                    raise UserError(
                        f"{self._total} images of {image.shape[2]} x {image.shape[1]} pixels take {taken:.1f} GB, more "
                        f"than memory_limit_gb = {self._limit_gb:g}{self._advice}"
                    )
                self.images = np.empty((self._total, *image.shape), np.uint8)
        if image.shape == self.images.shape[1:]:
            self.images[row] = image

    def copied(self, rows: Sequence[int]) -> Tensor:
        """The images of these rows, in memory of their own: uint8 `[len(rows), C, H, W]`."""
        assert self.images is not None
        return torch.from_numpy(self.images[list(rows)])

    def kept(self, rows: Sequence[int]) -> Tensor:
        """The images of these ascending rows, moved together in place: uint8 `[len(rows), C, H, W]`."""
        assert self.images is not None
        for new, old in enumerate(rows):
            if new != old:
                self.images[new] = self.images[old]
        return torch.from_numpy(self.images[: len(rows)])


@dataclass(frozen=True, slots=True)
class Finding:
    """What the pass found out about one image."""

    digest: bytes
    """SHA-256 of the stored bytes."""
    problem: str | None
    """Why the image cannot be read; None where it can."""
    height: int = 0
    """Of the image as it lies in its file, upright, where that was asked for; else that of the square."""
    width: int = 0


def survey(
    batches: Iterable[Sequence[Item]],
    total: int,
    *,
    prepared: Preparation,
    store: Store | None,
    workers: int,
    title: str,
) -> list[Finding]:
    """Read and decode every image, in a pool of threads, and keep the pixels if there is a store.

    Args:
        batches: the images in order, in portions that are read one after another.
        total: how many images they are together.
        prepared: how they are decoded.
        store: where image i goes as row i; None only checks the images.
        workers: number of threads.
        title: stands before the progress bar.

    Returns:
        One finding per image, in order, however many threads there were.
    """

    def examine(row: int, item: Item) -> Finding:
        digest = b""
        try:
            if prepared.headers:
                digest, file = _opened(item)
                with file:
                    return Finding(digest, None, *prepared.sides(file))
            data = load(item)
            digest = prepared.digest(data)
            image = prepared.whole(data) if prepared.original else prepared.square(data)
        except BadImageError as error:
            return Finding(digest, str(error))
        except MemoryError:  # nothing that the file can be known by: next time there may be more
            return Finding(b"", TOO_MUCH)
        if store is not None:
            store.put(row, image)
        return Finding(digest, None, image.shape[1], image.shape[2])

    def work(task: tuple[int, Sequence[Item]]) -> list[Finding]:
        first, items = task
        return [examine(first + i, item) for i, item in enumerate(items)]

    findings: list[Finding] = []
    with (
        warnings.catch_warnings(),
        counted(title, total if total > _MANY else None) as advance,
        ThreadPoolExecutor(workers) as pool,
    ):
        # What Pillow warns of is either a problem that is reported by name or of no consequence.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        for batch in batches:
            first = len(findings)
            tasks = [(first + i, batch[i : i + _CHUNK]) for i in range(0, len(batch), _CHUNK)]
            for part in pool.map(work, tasks):
                findings += part
                advance(len(part))
    return findings


def load(item: Item) -> bytes:
    """The bytes of an image as it is stored.

    Raises:
        BadImageError: it cannot be read, or is no regular file.
    """
    if isinstance(item, bytes):
        return item
    if item is None:
        raise BadImageError("has no bytes")
    try:
        length = _length(item)
        data = item.read() if isinstance(item, Slice) else item.read_bytes()
    except OSError as error:
        raise BadImageError(f"cannot be read: {error.strerror}") from error
    if isinstance(item, Slice) and len(data) < length:
        raise BadImageError("cannot be read: its archive ends before it does")
    return data


def _opened(item: Item) -> tuple[bytes, BinaryIO]:
    """The digest of an image's first bytes, and the image to read its header from."""
    if isinstance(item, bytes) or item is None:
        data = load(item)
        return digest_of_head(len(data), data[:HEAD]), io.BytesIO(data)
    try:
        length, file = _length(item), item.open() if isinstance(item, Slice) else item.open("rb")
        head = file.read(HEAD)
        file.seek(0)
    except OSError as error:
        raise BadImageError(f"cannot be read: {error.strerror}") from error
    if not head:
        file.close()
        raise BadImageError("is empty (0 bytes)")
    return digest_of_head(length, head), file


def _length(item: Path | Slice) -> int:
    """Bytes of a file that may be read."""
    found = (item.file if isinstance(item, Slice) else item).stat()
    if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for, and a device may have no end
        raise BadImageError(f"is {_kind(found.st_mode)}, not a regular file")
    length = item.length if isinstance(item, Slice) else found.st_size
    if length > _MOST_BYTES:
        raise BadImageError(f"has {length:,} bytes, more than {_MOST_BYTES:,}")
    return length


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"


def state_of(file: Path) -> tuple[int, int]:
    """Size and time of change, in nanoseconds; -1 and -1 where they cannot be had."""
    try:
        found = file.stat()
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


def kind_of(path: Path, option: str) -> str:
    """`folder`, `file`, `nothing`, or what else it is (`a pipe`), for what an option names.

    Raises:
        UserError: it may not be looked at, or no such name is possible.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "nothing"
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or error
        raise UserError(f"data_source.{option}: {shown(path.absolute())} cannot be read: {problem}") from None
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else _kind(mode)


def sift(
    problems: Sequence[str | None],
    name: Callable[[int], str],
    *,
    which: str,
    max_bad: float,
    advice: str,
) -> tuple[list[int], list[dict[str, str]]]:
    """Part the images that can be read from those that cannot.

    Args:
        problems: for each image, why it cannot be read, or None.
        name: the name of image i, for people.
        which: `training` or `test`.
        max_bad: the largest share that may be bad.
        advice: what to do about bad images beside mending them, as the end of a sentence.

    Returns:
        The indices of the readable images, and `path` and `problem` of each of the others.

    Raises:
        UserError: more than `max_bad` of them are bad, or all.
    """
    good = [i for i, problem in enumerate(problems) if problem is None]
    bad = [{"path": name(i), "problem": problem} for i, problem in enumerate(problems) if problem is not None]
    if not good or len(bad) / len(problems) > max_bad:
        share = f"{100 * len(bad) / len(problems):.2g}%, more than max_bad = {100 * max_bad:g}%" if good else "all"
        raise UserError(
            f"{len(bad)} of {len(problems)} {which} images cannot be read ({share}): {few(bad)}{_listed(bad)}; "
            f"mend or remove them{advice}"
        )
    return good, bad


def _listed(bad: Sequence[Mapping[str, str]]) -> str:
    """Where all of them are listed, if that takes a file; there is no run's directory yet."""
    if len(bad) <= _FEW:
        return ""
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="sslkit-bad-samples-", suffix=".jsonl", delete=False, encoding="utf-8"
        ) as file:
            file.write("".join(json.dumps(dict(b)) + "\n" for b in bad))
    except OSError:
        return ""
    return f" (all of them: {shown(Path(file.name))})"


def few(bad: Sequence[Mapping[str, str]]) -> str:
    """The first few bad images in words."""
    named = ", ".join(f"{b['path']} ({b['problem']})" for b in bad[:_FEW])
    return f"{named} and {len(bad) - _FEW} more" if len(bad) > _FEW else named


def tell_left_out(say: Callable[[str], None], bad: Sequence[Mapping[str, str]], total: int) -> None:
    """One line about the images that a run goes on without."""
    if bad:
        say(f"left out {len(bad)} of {total} images that cannot be read: {few(bad)}")


def shown(path: Path | str) -> str:
    """A path for people: what a terminal would obey or choke on is escaped."""
    return printable(str(path))
