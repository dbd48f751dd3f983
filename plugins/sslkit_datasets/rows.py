"""Images in Parquet files that do not fit into memory: row groups, read as they are wanted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from sslkit.api import DataInfo
from sslkit.environment import cores_here
from sslkit.errors import RunFailed, UserError
from sslkit_datasets.blocks import Block, Blocks, check_room
from sslkit_datasets.columns import Source, bytes_of, first_line, numbered
from sslkit_datasets.holding_out import facts
from sslkit_datasets.images import Finding, Fingerprint, Opened, load, shown, state_of, survey
from sslkit_datasets.preparing import Preparation, arrays_of
from sslkit_datasets.records import remembered_findings
from sslkit_datasets.sets import Examined, Reading, digests_of, opened
from sslkit_datasets.shards import find_files

if TYPE_CHECKING:
    from sslkit_datasets import Parquet

WINDOW = 16_384
_MEASURED_GB = 0.5
"""Room for the squares that were measured."""
_REWRITE = "write the files again with smaller row groups (row_group_size = 100 in pyarrow.parquet.write_table)"


class RowGroups:
    """The rows of some files, a row group at a time."""

    def __init__(self, files: Sequence[Path], metadata: Sequence[Any], column: str, limit: int) -> None:
        self.files, self.metadata, self.column, self.limit = files, metadata, column, limit
        self.states = [state_of(file) for file in files]
        self.groups = [(f, g) for f, known in enumerate(metadata) for g in range(known.num_row_groups)]
        counts = [metadata[f].row_group(g).num_rows for f, g in self.groups]
        self.first = np.cumsum([0, *counts])
        self.number = np.repeat(np.arange(len(counts)), counts)
        self.cache = Blocks(self.read, limit)

    def __reduce__(self) -> tuple[Any, ...]:
        return RowGroups, (self.files, self.metadata, self.column, self.limit)

    def __len__(self) -> int:
        return int(self.first[-1])

    def lengths(self) -> list[int]:
        """Bytes of the images of each row group."""
        found = []
        for f, g in self.groups:
            group = self.metadata[f].row_group(g)
            columns = [group.column(c) for c in range(group.num_columns)]
            found.append(
                sum(c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] == self.column)
            )
        return found

    def read(self, block: int) -> Block:
        """The bytes of the images of one row group.

        Raises:
            RunFailed: it cannot be read any more.
        """
        f, g = self.groups[block]
        try:
            # A file of its own for each read: they are not made for several threads. Without pre_buffer, or all columns
            # of the group would be in memory at one time.
            with pq.ParquetFile(self.files[f], metadata=self.metadata[f], pre_buffer=False) as file:
                table = file.read_row_group(g, columns=[self.column], use_threads=False)
            return [data for chunk in table.column(0).chunks for data in bytes_of(chunk)]
        except (pa.ArrowException, OSError) as error:
            raise RunFailed(f"{shown(self.files[f])} cannot be read: {first_line(error)}") from None

    def name(self, i: int) -> str:
        """For people."""
        f = self.groups[int(self.number[i])][0]
        first = next(b for b, (file, _) in enumerate(self.groups) if file == f)
        return f"{shown(self.files[f])}, row {i - int(self.first[first])}"

    def unchanged(self, i: int) -> bool:
        """Whether the file of row i has the size and time that it had when the source was opened."""
        f = self.groups[int(self.number[i])][0]
        return state_of(self.files[f]) == self.states[f]


@dataclass
class Rows:
    """Some rows of Parquet files (`reading.Grouped`)."""

    whole: RowGroups
    rows: NDArray[np.int64]
    prepared: Preparation
    digests: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def blocks(self) -> Tensor:
        return torch.from_numpy(self.whole.number[self.rows])

    def name(self, index: int) -> str:
        return self.whole.name(int(self.rows[index]))

    def load(self, index: int) -> bytes:
        i = int(self.rows[index])
        block = int(self.whole.number[i])
        return load(self.whole.cache[block][i - int(self.whole.first[block])])

    def compare(self, index: int, data: bytes) -> None:
        if self.whole.unchanged(int(self.rows[index])):
            return
        if self.prepared.digest(data) != self.digests[index].tobytes():
            raise RunFailed(
                f"{self.name(index)} holds another image than when the run began; put the old file back, and the same "
                "command goes on"
            )


def open_stream(spec: Parquet, info: DataInfo) -> Opened:
    """Open Parquet files whose images stay where they are.

    Raises:
        UserError: as `open_parquet`, or row groups that do not fit into the cache.
    """
    if spec.size is None:
        raise UserError(
            "data_source.size: is needed with stream = true: the side of the squares that are measured; set it"
        )
    window = spec.window or WINDOW
    train, test = find_files(spec.path, spec.test_path, ".parquet", spec.hold_out)
    prepared = Preparation(
        spec.channels, spec.size, original=True, headers=spec.check == "headers", arrays=arrays_of(spec)
    )
    sources = {which: Source.open(files, spec) for which, files in (("training", train), ("test", test)) if files}
    groups = {
        which: RowGroups(source.files, [f.metadata for f in source.opened], source.image, int(spec.cache_gb * 1e9))
        for which, source in sources.items()
    }
    for which, rows in groups.items():
        check_room(rows.lengths(), len(rows), window if which == "training" else None, spec.cache_gb, _REWRITE)
    written = {which: source.labels() for which, source in sources.items()}
    labels = numbered(sources, written)
    fingerprint = Fingerprint(source="parquet", stream=True, **prepared.facts(), **facts(spec.hold_out))
    sets = {}
    for which, rows in groups.items():
        findings = _examined(rows, prepared, info, spec.workers or cores_here(), which)
        given = labels.of[which]
        fingerprint.add(which)
        fingerprint.add(*rows.first.tolist())  # the order of an epoch follows from where row groups begin
        for i, finding in enumerate(findings):
            fingerprint.add(finding.digest, finding.problem is None, None if given is None else written[which][i])
        sets[which] = _set(rows, findings, given, prepared)
    reading = Reading(prepared, spec.workers, min(_MEASURED_GB, spec.cache_gb), window)
    return opened(sets, reading, spec, info.say, labels.names, fingerprint.hexdigest())


def _set(whole: RowGroups, findings: Sequence[Finding], labels: Tensor | None, prepared: Preparation) -> Examined:
    def part(rows: Sequence[int]) -> Rows:
        return Rows(whole, np.array(rows, np.int64), prepared, digests_of(findings, rows))

    return Examined(findings, whole.name, labels, part)


def _examined(whole: RowGroups, prepared: Preparation, info: DataInfo, workers: int, which: str) -> list[Finding]:
    state = Fingerprint(**prepared.facts(), column=whole.column, **prepared.decoders())
    for file, known in zip(whole.files, whole.states, strict=True):
        state.add(str(file.resolve()), *known)

    def blocks() -> Iterator[Block]:
        for block in range(len(whole.groups)):
            try:
                yield whole.read(block)
            except RunFailed as error:  # no run has begun yet
                raise UserError(*error.lines) from None

    def examine() -> list[Finding]:
        return survey(
            blocks(), len(whole), prepared=prepared, store=None, workers=workers, title=f"checking {which} images"
        )

    return remembered_findings(info.cache / "checked" / f"{state.hexdigest()}.json", len(whole), examine)
