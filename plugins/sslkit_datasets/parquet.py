"""Images in Parquet files that are decoded once and stay in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from sslkit.api import DataInfo
from sslkit.environment import cores
from sslkit.errors import UserError
from sslkit_datasets.arrays import PLAIN, Arrays
from sslkit_datasets.columns import Source, bytes_of, first_line, numbered
from sslkit_datasets.holding_out import facts
from sslkit_datasets.images import Finding, Fingerprint, Opened, Store, shown, survey
from sslkit_datasets.labels import Written
from sslkit_datasets.preparing import Preparation, arrays_of
from sslkit_datasets.reading import Encoded
from sslkit_datasets.sets import Examined, Reading, opened
from sslkit_datasets.shards import find_files

if TYPE_CHECKING:
    from sslkit_datasets import Parquet

_ROWS = 2048
"""Rows that are held encoded at one time."""


@dataclass(frozen=True)
class Options:
    """How rows become images; the options of `data_source.parquet` of the same names."""

    image_column: str | None = None
    label_column: str | None = None
    size: int | None = None
    channels: int = 3
    max_bad: float = 0.0
    memory_limit_gb: float = 16.0
    workers: int | None = None
    hold_out: float | None = None
    arrays: Arrays = PLAIN
    advice: str = ", or raise data_source.max_bad"


def open_parquet(spec: Parquet, info: DataInfo) -> Opened:
    """Open Parquet files.

    Raises:
        UserError: no such files or columns, images of several sizes, labels that are no classes, or too many broken
            images.
    """
    if spec.check is not None:
        raise UserError('data_source.check: "headers" needs stream = true; without it every image is decoded anyway')
    if spec.window is not None:
        raise UserError("data_source.window: needs stream = true; without it all images are shuffled")
    train, test = find_files(spec.path, spec.test_path, ".parquet", spec.hold_out)
    options = Options(
        spec.image_column,
        spec.label_column,
        spec.size,
        spec.channels,
        spec.max_bad,
        spec.memory_limit_gb,
        spec.workers,
        spec.hold_out,
        arrays_of(spec),
    )
    return read_sets(train, test, options, info)


def read_sets(train: Sequence[Path], test: Sequence[Path], options: Options, info: DataInfo) -> Opened:
    """Decode the images of these files.

    Raises:
        UserError: as `open_parquet`.
    """
    sources = {"training": Source.open(train, options)}
    found = {"training": _read(sources["training"], "training", options)}
    if test:
        sources["test"] = Source.open(test, options)
        found["test"] = _read(sources["test"], "test", options)
        _compare(found["training"].store, found["test"].store)
    labels = numbered(sources, {which: rows.written for which, rows in found.items()})
    fingerprint = Fingerprint(
        source="parquet",
        **Preparation(options.channels, options.size, arrays=options.arrays).facts(),
        **facts(options.hold_out),
    )
    sets = {}
    for which, rows in found.items():
        fingerprint.add(which)
        labelled = labels.of[which] is not None
        for i, finding in enumerate(rows.findings):
            fingerprint.add(finding.digest, finding.problem is None, rows.written[i] if labelled else None)
        sets[which] = Examined(rows.findings, sources[which].name, labels.of[which], _nothing_is_read, rows.store)
    reading = Reading(Preparation(options.channels, options.size, arrays=options.arrays), options.workers, 0.0)
    return opened(sets, reading, options, info.say, labels.names, fingerprint.hexdigest(), options.advice)


@dataclass(frozen=True)
class _Rows:
    findings: list[Finding]
    store: Store
    written: list[Written]
    """Labels of all rows, also of those that cannot be read."""


def _nothing_is_read(rows: Sequence[int]) -> Encoded:
    raise AssertionError("all images are in memory")


def _read(source: Source, which: str, options: Options) -> _Rows:
    written: list[Written] = []
    columns = [source.image] if source.label is None else [source.image, source.label]

    def batches() -> Iterator[list[bytes | None]]:
        for file, parquet in zip(source.files, source.opened, strict=True):
            try:
                for batch in parquet.iter_batches(batch_size=_ROWS, columns=columns):
                    if source.label is not None:
                        written.extend(batch.column(source.label).to_pylist())
                    yield bytes_of(batch.column(source.image))
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"{shown(file)} is damaged: {first_line(error)}") from None

    store = Store(source.rows, options.memory_limit_gb, "; set data_source.size, or data_source.stream = true")
    findings = survey(
        batches(),
        source.rows,
        prepared=Preparation(options.channels, options.size, arrays=options.arrays),
        store=store,
        workers=options.workers or cores(),
        title=f"reading {which} images",
    )
    if len(store.sizes) > 1:
        listed = ", ".join(f"{w} x {h} ({n})" for (w, h), n in store.sizes.most_common(3))
        raise UserError(
            f"the {which} images have {len(store.sizes)} sizes: {listed}{', ...' if len(store.sizes) > 3 else ''}; "
            "set data_source.size to resize them"
        )
    return _Rows(findings, store, written)


def _compare(train: Store, test: Store) -> None:
    if train.images is None or test.images is None:  # none of them can be read, which is told next
        return
    (h, w), (test_h, test_w) = train.images.shape[2:], test.images.shape[2:]
    if (h, w) != (test_h, test_w):
        raise UserError(
            f"the training images have {w} x {h} pixels, the test images {test_w} x {test_h}; set data_source.size to "
            "resize them"
        )
