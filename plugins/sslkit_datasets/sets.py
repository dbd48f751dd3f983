"""From images that were examined to the sets that a run is given: the broken ones left out, a share held out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sslkit.api import Images
from sslkit_datasets.holding_out import held_out
from sslkit_datasets.images import Finding, InMemory, Opened, Store, sift, tell_left_out
from sslkit_datasets.preparing import Preparation
from sslkit_datasets.reading import Encoded, OnDemand, Streamed


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
    digests: dict[str, list[bytes]] = {}
    for which, found in sets.items():
        good, left_out = sift(
            [f.problem for f in found.findings],
            found.name,
            which=which,
            max_bad=options.max_bad,
            advice=advice,
        )
        bad += left_out
        digests[which] = [found.findings[i].digest for i in good]
        if options.hold_out is None:
            made[which] = _images(found, good, reading)
            continue
        labels = None if found.labels is None else found.labels[good]
        rows, held = held_out(digests[which], labels, options.hold_out)
        made["test"] = _images(found, [good[i] for i in held], reading, copy=True)
        made["training"] = _images(found, [good[i] for i in rows], reading)
    tell_left_out(say, bad, sum(len(found.findings) for found in sets.values()))
    if "test" in sets and sets["training"].store is None:
        trained = set(digests["training"])
        if shared := sum(digest in trained for digest in digests["test"]):
            say(
                f"{shared} of {len(digests['test'])} test images are training images, too, byte for byte: take them out"
            )
    return Opened(made["training"], made.get("test"), class_names, fingerprint, bad)


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
