"""Images in Parquet files: which files and columns there are, and what the rows hold."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sslkit.api import DataInfo
from sslkit.errors import UserError
from sslkit_datasets.images import (
    Finding,
    Fingerprint,
    InMemory,
    Opened,
    Store,
    cores,
    kind_of,
    shown,
    sift,
    survey,
    tell_left_out,
)
from sslkit_datasets.preparing import Preparation
from sslkit_datasets.shards import find_files

if TYPE_CHECKING:
    from sslkit_datasets import Parquet

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "labels")
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
    advice: str = ""


@dataclass(frozen=True)
class _Rows:
    files: list[Path]
    images: InMemory
    findings: list[Finding]
    bad: list[dict[str, str]]
    labels: list[int] | None
    """Labels of all rows, also of those left out."""
    class_names: tuple[str, ...] | None


def open_parquet(spec: Parquet, info: DataInfo) -> Opened:
    """Open Parquet files.

    Raises:
        UserError: no such files or columns, images of several sizes, labels that are no class numbers, or too many
            broken images.
    """
    train, test = find_files(spec.path, spec.test_path, ".parquet")
    options = Options(
        spec.image_column,
        spec.label_column,
        spec.size,
        spec.channels,
        spec.max_bad,
        spec.memory_limit_gb,
        spec.workers,
        advice=", or raise data_source.max_bad",
    )
    return read_sets(train, test, options, info)


def read_sets(train: Sequence[Path], test: Sequence[Path], options: Options, info: DataInfo) -> Opened:
    """Decode the images of these files.

    Raises:
        UserError: as `open_parquet`.
    """
    sets = {"training": _read(train, "training", options)}
    if test:
        sets["test"] = _read(test, "test", options)
        _compare(sets["training"], sets["test"])
    fingerprint = Fingerprint(source="parquet", size=options.size, channels=options.channels)
    for which, rows in sets.items():
        fingerprint.add(which)
        for i, finding in enumerate(rows.findings):
            fingerprint.add(finding.digest, finding.problem is None, None if rows.labels is None else rows.labels[i])
    bad = [b for rows in sets.values() for b in rows.bad]
    tell_left_out(info.say, bad, sum(len(rows.findings) for rows in sets.values()))
    train_rows, test_rows = sets["training"], sets.get("test")
    return Opened(
        train_rows.images,
        test_rows.images if test_rows else None,
        train_rows.class_names,
        fingerprint.hexdigest(),
        bad,
    )


# ---------------------------------------------------------------- what the rows hold


def _read(files: Sequence[Path], which: str, options: Options) -> _Rows:
    opened = [_open(file) for file in files]
    image_column, label_column = _columns(files[0], opened[0].schema_arrow, options)
    for file, parquet in zip(files, opened, strict=True):
        _check_columns(file, parquet.schema_arrow, image_column, label_column)
    counts = [parquet.metadata.num_rows for parquet in opened]
    total = sum(counts)
    if total == 0:
        raise UserError(f"{shown(files[0])} has no rows")

    labels: list[int | None] = []
    columns = [image_column] if label_column is None else [image_column, label_column]

    def batches() -> Iterator[list[bytes | None]]:
        for file, parquet in zip(files, opened, strict=True):
            try:
                for batch in parquet.iter_batches(batch_size=_ROWS, columns=columns):
                    if label_column is not None:
                        labels.extend(batch.column(label_column).to_pylist())
                    yield _bytes_of(batch.column(image_column))
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"{shown(file)} is damaged: {_first_line(error)}") from None

    store = Store(
        total,
        options.memory_limit_gb,
        "; set data_source.size, or unpack them into a folder and use data_source.folder",
    )
    findings = survey(
        batches(),
        total,
        prepared=Preparation(options.channels, options.size),
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

    def name(i: int) -> str:
        for file, count in zip(files, counts, strict=True):
            if i < count:
                return f"{shown(file)}, row {i}"
            i -= count
        raise IndexError(i)

    good, bad = sift(
        [f.problem for f in findings],
        name,
        which=which,
        max_bad=options.max_bad,
        advice=options.advice,
    )
    class_names = None if label_column is None else _class_names(opened[0].schema_arrow, label_column)
    checked = None if label_column is None else _checked(labels, label_column, files[0], class_names)
    tensor = None if checked is None else torch.tensor(checked, dtype=torch.int64)[good]
    return _Rows(list(files), InMemory(store.kept(good), tensor), findings, bad, checked, class_names)


def _open(file: Path) -> Any:
    if (kind := kind_of(file, "path")) not in ("file", "folder", "nothing"):  # a pipe would be waited for
        raise UserError(f"{shown(file)} cannot be read as a Parquet file: it is {kind}")
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{shown(file)} cannot be read as a Parquet file: {_first_line(error)}") from None


def _columns(file: Path, schema: Any, options: Options) -> tuple[str, str | None]:
    listed = f"its columns are {', '.join(shown(name) for name in schema.names)}"

    def pick(chosen: str | None, defaults: tuple[str, ...], option: str) -> str | None:
        if chosen is not None and chosen not in schema.names:
            raise UserError(f"data_source.{option}: {shown(file)} has no column {chosen!r}; {listed}")
        return chosen or next((name for name in defaults if name in schema.names), None)

    image = pick(options.image_column, IMAGE_COLUMNS, "image_column")
    if image is None:
        raise UserError(
            f"{shown(file)} has no column {' or '.join(map(repr, IMAGE_COLUMNS))}; {listed}; set "
            "data_source.image_column"
        )
    return image, pick(options.label_column, LABEL_COLUMNS, "label_column")


def _check_columns(file: Path, schema: Any, image_column: str, label_column: str | None) -> None:
    for column in (image_column, label_column):
        if column is not None and column not in schema.names:
            raise UserError(f"{shown(file)} has no column {column!r}, which the files before it have")
    kind = schema.field(image_column).type
    if pa.types.is_struct(kind):
        kind = next((f.type for f in kind if f.name == "bytes"), None)
    if kind is None or not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise UserError(
            f"{shown(file)}: the column {image_column!r} is {schema.field(image_column).type}; encoded images are "
            "wanted, as struct<bytes: binary, path: string> or binary"
        )
    if label_column is not None and not pa.types.is_integer(schema.field(label_column).type):
        raise UserError(
            f"{shown(file)}: the column {label_column!r} is {schema.field(label_column).type}; integers are wanted"
        )


def _bytes_of(column: Any) -> list[bytes | None]:
    if not pa.types.is_struct(column.type):
        return column.to_pylist()  # type: ignore[no-any-return]
    # A path without bytes is never followed: it would lead out of the file that was named.
    return [None if row is None else row["bytes"] for row in column.to_pylist()]


def _class_names(schema: Any, label_column: str) -> tuple[str, ...] | None:
    """The names that Hugging Face's `datasets` writes into the metadata; None where there are none to be had."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        names = features[label_column]["names"]
    except (TypeError, KeyError, ValueError):
        return None
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _checked(
    labels: Sequence[int | None], column: str, file: Path, class_names: tuple[str, ...] | None
) -> list[int] | None:
    """The labels as class numbers; None where all are -1, which in published sets means unknown."""
    known = [label for label in labels if label is not None]
    if len(known) < len(labels):
        raise UserError(f"{shown(file)}: {len(labels) - len(known)} rows have no value in the column {column!r}")
    if set(known) == {-1}:
        return None
    if min(known) < 0:
        raise UserError(f"{shown(file)}: labels in the column {column!r} should be 0 or more, one is {min(known)}")
    if class_names is not None and max(known) >= len(class_names):
        raise UserError(
            f"{shown(file)}: the column {column!r} holds the label {max(known)}, but only {len(class_names)} classes "
            "are named in the metadata"
        )
    return known


def _compare(train: _Rows, test: _Rows) -> None:
    assert train.images.tensor is not None
    assert test.images.tensor is not None
    (h, w), (test_h, test_w) = train.images.tensor.shape[2:], test.images.tensor.shape[2:]
    if (h, w) != (test_h, test_w):
        raise UserError(
            f"the training images have {w} x {h} pixels, the test images {test_w} x {test_h}; set data_source.size to "
            "resize them"
        )
    if train.class_names and test.class_names and train.class_names != test.class_names:
        raise UserError(
            f"{shown(test.files[0])} names other classes than {shown(train.files[0])}: labels cannot be compared"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0]
