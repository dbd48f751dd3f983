"""What the pass over all images found out, kept for the next time that the same images are opened."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from filelock import FileLock

from sslkit_datasets.images import Finding


def remembered(record: Path, count: int, examine: Callable[[], list[Finding]]) -> list[Finding]:
    """The findings of `record`, or those of `examine`, which are then recorded.

    Several processes of one run come here together: one examines, and the others wait for what it found.

    Args:
        record: a file whose name changes with everything that the findings depend on.
        count: how many findings there have to be.
        examine: the pass over all images.
    """
    findings = _recall(record, count)
    if findings is not None:
        return findings
    with _alone(record):
        findings = _recall(record, count)
        if findings is None:
            findings = examine()
            # A file that could not even be read may be readable next time without any sign of a change.
            if all(finding.digest for finding in findings):
                _remember(record, findings)
    return findings


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


def _recall(record: Path, count: int) -> list[Finding] | None:
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
        findings = [
            Finding(bytes.fromhex(digest), problem, int(height), int(width)) for digest, problem, height, width in found
        ]
    except (OSError, ValueError, TypeError):
        return None
    return findings if len(findings) == count else None


def _remember(record: Path, findings: Sequence[Finding]) -> None:
    temporary = record.with_suffix(f".{os.getpid()}.part")
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        listed = [(f.digest.hex(), f.problem, f.height, f.width) for f in findings]
        temporary.write_text(json.dumps(listed), encoding="utf-8")
        temporary.replace(record)
    except OSError:  # a cache that cannot be written only costs time
        with contextlib.suppress(OSError):
            temporary.unlink()
