"""Which columns of Parquet files hold images and labels, and what the labels mean."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from sslkit.errors import UserError
from sslkit_datasets.images import kind_of, shown
from sslkit_datasets.labels import Labels, Written, as_numbers, to_labels

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "labels")
_LABELS = (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string)


class Chosen(Protocol):
    """The columns that were asked for."""

    @property
    def image_column(self) -> str | None: ...
    @property
    def label_column(self) -> str | None: ...


@dataclass(frozen=True)
class Source:
    """The files of one set, opened."""

    files: Sequence[Path]
    opened: Sequence[Any]
    image: str
    label: str | None

    @classmethod
    def open(cls, files: Sequence[Path], chosen: Chosen) -> Source:
        """Open the files of one set.

        Raises:
            UserError: they are no Parquet files, lack a column, or have no rows.
        """
        opened = [_open(file) for file in files]
        image, label = _columns(files[0], opened[0].schema_arrow, chosen)
        for file, parquet in zip(files, opened, strict=True):
            _check_columns(file, parquet.schema_arrow, image, label)
        if not any(parquet.metadata.num_rows for parquet in opened):
            raise UserError(f"{shown(files[0])} has no rows")
        return cls(files, opened, image, label)

    @property
    def rows(self) -> int:
        return sum(parquet.metadata.num_rows for parquet in self.opened)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return None if self.label is None else _class_names(self.opened[0].schema_arrow, self.label)

    def name(self, i: int) -> str:
        """Row i, for people."""
        for file, parquet in zip(self.files, self.opened, strict=True):
            if i < parquet.metadata.num_rows:
                return f"{shown(file)}, row {i}"
            i -= parquet.metadata.num_rows
        raise IndexError(i)

    def labels(self) -> list[Written]:
        """The labels of all rows as they are written; empty where there is no such column.

        Raises:
            UserError: a file is damaged.
        """
        found: list[Written] = []
        for file, parquet in zip(self.files, self.opened, strict=True):
            if self.label is not None:
                try:
                    found += parquet.read(columns=[self.label]).column(0).to_pylist()
                except (pa.ArrowException, OSError) as error:
                    raise UserError(f"{shown(file)} is damaged: {first_line(error)}") from None
        return found


def numbered(sources: Mapping[str, Source], written: Mapping[str, Sequence[Written]]) -> Labels:
    """The labels as class numbers.

    Raises:
        UserError: they are none, or the sets' classes cannot be compared.
    """
    train = sources["training"]
    if any(isinstance(label, str) for labels in written.values() for label in labels):
        return to_labels(
            {which: labels or [None] * sources[which].rows for which, labels in written.items()},
            f"the column {train.label!r}",
            lambda which, i: sources[which].name(i),
        )
    of = {}
    for which, source in sources.items():
        of[which] = None if source.label is None else _checked(written[which], source.label, source)
    names = {which: source.class_names for which, source in sources.items() if source.class_names}
    if len(set(names.values())) > 1:
        raise UserError(
            f"{shown(sources['test'].files[0])} names other classes than {shown(train.files[0])}: labels cannot be "
            "compared"
        )
    return Labels(of, train.class_names)


def _open(file: Path) -> Any:
    if (kind := kind_of(file, "path")) not in ("file", "folder", "nothing"):  # a pipe would be waited for
        raise UserError(f"{shown(file)} cannot be read as a Parquet file: it is {kind}")
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{shown(file)} cannot be read as a Parquet file: {first_line(error)}") from None


def _columns(file: Path, schema: Any, chosen: Chosen) -> tuple[str, str | None]:
    listed = f"its columns are {', '.join(shown(name) for name in schema.names)}"

    def pick(chosen: str | None, defaults: tuple[str, ...], option: str) -> str | None:
        if chosen is not None and chosen not in schema.names:
            raise UserError(f"data_source.{option}: {shown(file)} has no column {chosen!r}; {listed}")
        return chosen or next((name for name in defaults if name in schema.names), None)

    image = pick(chosen.image_column, IMAGE_COLUMNS, "image_column")
    if image is None:
        raise UserError(
            f"{shown(file)} has no column {' or '.join(map(repr, IMAGE_COLUMNS))}; {listed}; set "
            "data_source.image_column"
        )
    return image, pick(chosen.label_column, LABEL_COLUMNS, "label_column")


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
    if label_column is not None:
        written = schema.field(label_column).type
        if not any(is_one(written) for is_one in _LABELS):
            raise UserError(f"{shown(file)}: the column {label_column!r} is {written}; integers or names are wanted")


def bytes_of(column: Any) -> list[bytes | None]:
    """The image files of a column."""
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


def _checked(labels: Sequence[Written], column: str, source: Source) -> Tensor | None:
    """The labels as class numbers; None where all are -1, which in published sets means unknown."""
    file, names = source.files[0], source.class_names
    known = [label for label in labels if label is not None]
    if len(known) < len(labels):
        raise UserError(f"{shown(file)}: {len(labels) - len(known)} rows have no value in the column {column!r}")
    if set(known) == {-1}:
        return None
    numbers = as_numbers(known, f"the column {column!r}", source.name)
    if names is not None and int(numbers.max()) >= len(names):
        raise UserError(
            f"{shown(file)}: the column {column!r} holds the label {int(numbers.max())}, but only {len(names)} classes "
            "are named in the metadata"
        )
    return numbers


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0]
