"""From images that were examined to the sets that a run is given: the broken ones left out, a share held out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sslkit.api import Images
from sslkit_datasets.bad import BadImageError
from sslkit_datasets.holding_out import held_out
from sslkit_datasets.images import Finding, InMemory, Opened, Store, sift, tell_left_out
from sslkit_datasets.preparing import HEAD, Preparation
from sslkit_datasets.reading import Encoded, OnDemand, Streamed

MOST_IN_FULL = 1000
"""Images that are read in full at most where only headers are to be read."""


class _Options(Protocol):
    """Of those of a data source, what is needed here."""

    @property
    def hold_out(self) -> float | None: ...
    @property
    def max_bad(self) -> float: ...


@dataclass(frozen=True)
class Examined:
    """All images of one set as they were found, and how some of them are opened."""

    findings: Sequence[Finding]
    name: Callable[[int], str]
    """What image i is called, for people."""
    labels: Tensor | None
    """int64, also of those that cannot be read."""
    part: Callable[[Sequence[int]], Encoded]
    """The images at ascending positions."""
    store: Store | None = None
    """Where they are already, decoded."""
    files: Callable[[Sequence[int]], Sequence[object] | None] = lambda rows: None
    """What images of the store are called."""


@dataclass(frozen=True)
class Reading:
    """How images are read that are not in memory."""

    prepared: Preparation
    workers: int | None
    keep_gb: float
    """Room for squares that were measured."""
    window: int | None = None
    """Images that are shuffled together; None shuffles them all."""


def opened(
    sets: Mapping[str, Examined],
    reading: Reading,
    options: _Options,
    say: Callable[[str], None],
    class_names: tuple[str, ...] | None,
    fingerprint: str,
    advice: str = ", or raise data_source.max_bad",
) -> Opened:
    """The sets `training` and perhaps `test`, of images that can be read. `advice` is as for `sift`.

    It is said which images are left out, and how many test images are training images. Of images in memory the rule
    `test_images_in_training` tells that, and compares their pixels.

    Raises:
        UserError: too many cannot, or nothing can be held out.
    """
    made: dict[str, Images] = {}
    bad: list[dict[str, str]] = []
    for which, found in sets.items():
        good, left_out = sift(
            [f.problem for f in found.findings],
            found.name,
            which=which,
            max_bad=options.max_bad,
            advice=advice,
        )
        bad += left_out
        if options.hold_out is None:
            made[which] = _images(found, good, reading)
            continue
        labels = None if found.labels is None else found.labels[good]
        rows, held = held_out([found.findings[i].digest for i in good], labels, options.hold_out)
        made["test"] = _images(found, [good[i] for i in held], reading, copy=True)
        made["training"] = _images(found, [good[i] for i in rows], reading)
    tell_left_out(say, bad, sum(len(found.findings) for found in sets.values()))
    if "test" in sets and sets["training"].store is None:
        _tell_shared(sets["training"], sets["test"], headers=reading.prepared.headers, say=say)
    return Opened(made["training"], made.get("test"), class_names, fingerprint, bad)


def _tell_shared(train: Examined, test: Examined, *, headers: bool, say: Callable[[str], None]) -> None:
    """Say how many test images are training images, if any. Of those whose headers alone were read, the few that have
    the same first bytes are read in full for that."""
    trained = {finding.digest for finding in train.findings if finding.problem is None}
    tested = [i for i, finding in enumerate(test.findings) if finding.problem is None]
    suspects = [i for i in tested if test.findings[i].digest in trained]
    shared = len(suspects)
    if headers and shared:
        both = {test.findings[i].digest for i in suspects}
        alike = [i for i, finding in enumerate(train.findings) if finding.problem is None and finding.digest in both]
        if len(alike) + shared > MOST_IN_FULL:
            say(
                f"{shared:,} of {len(tested):,} test images have the length and the first {HEAD:,} bytes of training "
                "images, which is all that was read of them: see whether they are the same"
            )
            return
        whole = set(_in_full(train, alike)) - {None}
        shared = sum(digest in whole for digest in _in_full(test, suspects))
    if shared:
        say(f"{shared} of {len(tested)} test images are training images, too, byte for byte: take them out")


def _in_full(found: Examined, rows: Sequence[int]) -> Iterator[bytes | None]:
    """SHA-256 of all bytes of the images at ascending rows; None of one that cannot be read any more."""
    encoded = found.part(rows)
    for i in range(len(rows)):
        try:
            yield hashlib.sha256(encoded.load(i)).digest()
        except BadImageError:
            yield None


def _images(found: Examined, rows: Sequence[int], reading: Reading, *, copy: bool = False) -> Images:
    """The images at these rows. Those of a store are moved together in place unless they are copied."""
    labels = None if found.labels is None else found.labels[list(rows)]
    if found.store is not None:
        tensor = found.store.copied(rows) if copy else found.store.kept(rows)
        return InMemory(tensor, labels, found.files(rows))
    prepared, sizes = reading.prepared, None
    if prepared.original:
        sides = [(found.findings[i].height, found.findings[i].width) for i in rows]
        sizes = torch.tensor(sides, dtype=torch.int32)
    rest = (found.part(rows), prepared, reading.workers, labels, sizes, reading.keep_gb if prepared.original else 0.0)
    return OnDemand(*rest) if reading.window is None else Streamed(*rest, window=reading.window)


def digests_of(findings: Sequence[Finding], rows: Sequence[int]) -> NDArray[np.uint8]:
    """uint8 `[N, 32]`: the digests of images that can be read."""
    return np.frombuffer(b"".join(findings[i].digest for i in rows), np.uint8).reshape(-1, 32)
