"""What the pass over all images found out, kept for the next time that the same images are opened."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

from sslkit_datasets.images import Finding

T = TypeVar("T")


def remembered_findings(record: Path, count: int, examine: Callable[[], list[Finding]]) -> list[Finding]:
    """The findings of `record`, or those of `examine`, which are then recorded.

    Args:
        record: a file whose name changes with everything that the findings depend on.
        count: how many findings there have to be.
        examine: the pass over all images.
    """

    def pack(findings: list[Finding]) -> object:
        return [(f.digest.hex(), f.problem, f.height, f.width) for f in findings]

    def unpack(found: Any) -> list[Finding]:
        if len(found) != count:
            raise ValueError
        return [
            Finding(bytes.fromhex(digest), problem, int(height), int(width)) for digest, problem, height, width in found
        ]

    # A file that could not even be read may be readable next time without any sign of a change.
    return remembered(record, examine, pack, unpack, lambda findings: all(f.digest for f in findings))


def remembered(
    record: Path,
    make: Callable[[], T],
    pack: Callable[[T], object],
    unpack: Callable[[Any], T],
    lasting: Callable[[T], bool] = lambda made: True,
) -> T:
    """What `record` holds, or what `make` makes, which is then recorded.

    Several processes of one run come here together: one makes it, and the others wait for that.

    Args:
        record: a file whose name changes with everything that is remembered in it.
        make: makes it.
        pack: to what JSON can hold.
        unpack: back; raises ValueError or TypeError where that is something else.
        lasting: whether it is worth a record.
    """
    found = _recall(record, unpack)
    if found is not None:
        return found
    with _alone(record):
        found = _recall(record, unpack)
        if found is None:
            found = make()
            if lasting(found):
                _remember(record, pack(found))
    return found


@contextlib.contextmanager
def _alone(record: Path) -> Iterator[None]:
    """Hold a lock for this record; none where the cache cannot be written, which only costs time."""
    lock = FileLock(record.with_suffix(".lock"))
    with contextlib.suppress(OSError):
        record.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _recall(record: Path, unpack: Callable[[Any], T]) -> T | None:
    try:
        return unpack(json.loads(record.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _remember(record: Path, packed: object) -> None:
    temporary = record.with_suffix(f".{os.getpid()}.part")
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(packed), encoding="utf-8")
        temporary.replace(record)
    except OSError:  # a cache that cannot be written only costs time
        with contextlib.suppress(OSError):
            temporary.unlink()
