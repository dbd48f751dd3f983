"""Images in tar shards of the WebDataset format: which members make a sample, and what its label is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sslkit.api import DataInfo
from sslkit.environment import cores_here
from sslkit.errors import RunFailed, UserError
from sslkit_datasets.blocks import Block, Blocks, check_room
from sslkit_datasets.holding_out import facts
from sslkit_datasets.images import (
    Finding,
    Fingerprint,
    Opened,
    load,
    shown,
    state_of,
    survey,
)
from sslkit_datasets.labels import Written, to_labels
from sslkit_datasets.preparing import Preparation, arrays_of
from sslkit_datasets.records import remembered, remembered_findings
from sslkit_datasets.sets import Examined, Reading, digests_of, opened
from sslkit_datasets.shards import find_files
from sslkit_datasets.slices import Slice
from sslkit_datasets.tars import members

if TYPE_CHECKING:
    from sslkit_datasets import WebDataset

_LONGEST_LABEL = 2**20
"""Bytes of a member that holds a label."""
_BLOCK = 16 * 2**20
"""Bytes of images that are read in one piece where images are read in windows."""
_MEASURED_GB = 0.5
"""Room for the squares that were measured."""
_PORTION = 1024
"""Images that are handed out at one time while all are examined."""


@dataclass
class Index:
    """Where the images of a set lie, in the order of the shards and of their members."""

    shards: Sequence[Path]
    shard: list[int] = field(default_factory=list)
    start: list[int] = field(default_factory=list)
    length: list[int] = field(default_factory=list)
    """-1 where a sample has no image."""
    keys: list[str] = field(default_factory=list)
    labels: list[Written] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)

    def name(self, i: int) -> str:
        """For people."""
        return shown(f"{self.shards[self.shard[i]]}: {self.keys[i]}")

    def item(self, i: int) -> Slice | None:
        """Where image i lies."""
        return None if self.length[i] < 0 else Slice(self.shards[self.shard[i]], self.start[i], self.length[i])


def open_webdataset(spec: WebDataset, info: DataInfo) -> Opened:
    """Open tar shards.

    Raises:
        UserError: no such files, no samples in them, labels that are none, or too many broken images.
    """
    _refuse_commands(spec)
    train, test = find_files(spec.path, spec.test_path, ".tar", spec.hold_out)
    prepared = Preparation(
        spec.channels, spec.size, original=True, headers=spec.check == "headers", arrays=arrays_of(spec)
    )
    fingerprint = Fingerprint(source="webdataset", **prepared.facts(), **facts(spec.hold_out))
    sets: dict[str, Examined] = {}
    indices = {"training": _indexed(spec, train, info)} | ({"test": _indexed(spec, test, info)} if test else {})
    labels = to_labels(
        {which: index.labels for which, index in indices.items()},
        f"member {spec.label!r}",
        lambda which, i: indices[which].name(i),
    )
    for which, index in indices.items():
        states = [state_of(shard) for shard in index.shards]
        findings = _examined(index, prepared, states, info, spec.workers or cores_here(), which)
        given = labels.of[which]
        fingerprint.add(which)
        for i, finding in enumerate(findings):
            # The label is what the member says, since a number for it depends on the other labels.
            said = None if given is None else str(index.labels[i])
            fingerprint.add(index.keys[i], finding.digest, finding.problem is None, said)
        blocks = None
        if spec.window is not None:
            first = _blocks(index)
            fingerprint.add(*first)  # the order of an epoch follows from where blocks begin
            lengths = np.add.reduceat(np.maximum(index.length, 0), first).tolist()
            window = spec.window if which == "training" else None
            check_room(lengths, len(index), window, spec.cache_gb, "leave data_source.window out")
            blocks = _InBlocks(index, first, int(spec.cache_gb * 1e9))
        sets[which] = _set(index, findings, states, given, prepared, blocks)
    reading = Reading(prepared, spec.workers, min(_MEASURED_GB, spec.cache_gb), spec.window)
    return opened(sets, reading, spec, info.say, labels.names, fingerprint.hexdigest())


def _refuse_commands(spec: WebDataset) -> None:
    for option, value in (("path", spec.path), ("test_path", spec.test_path)):
        if value is not None and ("://" in value or value.startswith("pipe:")):
            raise UserError(
                f"data_source.{option}: {shown(value)} is no file; shards are read from files alone, nothing is "
                "fetched and no command is run: download them first"
            )


# ---------------------------------------------------------------- which samples there are


def _indexed(spec: WebDataset, shards: Sequence[Path], info: DataInfo) -> Index:
    """The samples of all shards; looked up, if no shard has changed since."""
    state = Fingerprint(source="webdataset", image=spec.image, label=spec.label)
    for shard in shards:
        state.add(str(shard.resolve()), *state_of(shard))

    def pack(index: Index) -> Any:
        return [index.shard, index.start, index.length, index.keys, index.labels]

    def unpack(found: Any) -> Index:
        index = Index(shards, *found)
        if len({len(part) for part in found}) != 1 or not all(0 <= shard < len(shards) for shard in index.shard):
            raise ValueError
        return index

    record = info.cache / "checked" / f"{state.hexdigest()}.json"
    return remembered(record, lambda: _index(spec, shards, info), pack, unpack)


def _index(spec: WebDataset, shards: Sequence[Path], info: DataInfo) -> Index:
    index, passed_over = Index(shards), list[str]()
    for number, shard in enumerate(shards):
        for key, parts in _samples(shard, passed_over):
            found = [parts[extension] for extension in spec.image if extension in parts]
            if len(found) > 1:
                raise UserError(
                    f"{shown(shard)}: the sample {shown(key)} has {len(found)} images; name the extension of the one "
                    'that is meant, such as data_source.image = ["jpg"]'
                )
            place = found[0] if found else Slice(shard, 0, -1)
            index.shard.append(number)
            index.start.append(place.start)
            index.length.append(place.length)
            index.keys.append(key)
            index.labels.append(_label(spec.label, parts, f"{shown(shard)}: the sample {shown(key)}"))
    if not len(index):
        raise UserError(f"{shown(shards[0])} holds no samples: members named KEY.EXTENSION, such as 000001.jpg")
    if max(index.length) < 0:
        raise UserError(
            f"{shown(shards[0])}: no sample has a member that ends in .{' or .'.join(spec.image)}; name the extension "
            "of the images as data_source.image"
        )
    if passed_over:
        some = shown(", ".join(passed_over[:3]))
        info.say(f"passed over {len(passed_over)} members that are no regular files ({some}), of {shown(shards[0])}...")
    return index


def _samples(shard: Path, passed_over: list[str]) -> Iterator[tuple[str, dict[str, Slice]]]:
    """Members beside one another whose names agree up to the first dot of the last part: the format's rule."""
    key, parts = None, dict[str, Slice]()
    for member in members(shard, passed_over):
        folder, slash, name = member.name.rpartition("/")
        stem, dot, extension = name.partition(".")
        if not (stem and dot) or "__MACOSX" in folder:  # the format passes over what has no extension or no name
            continue
        if folder + slash + stem != key:
            if key is not None:
                yield key, parts
            key, parts = folder + slash + stem, {}
        extension = extension.lower()
        if extension in parts:
            raise UserError(f"{shown(shard)}: the sample {shown(key)} has two members .{shown(extension)}")
        parts[extension] = Slice(shard, member.start, member.length)
    if key is not None:
        yield key, parts


def _label(wanted: str, parts: dict[str, Slice], which: str) -> Written:
    if wanted == "none":
        return None
    extension, _, field_name = wanted.partition(":")
    place = parts.get(extension)
    if place is None:
        return None
    if place.length > _LONGEST_LABEL:
        raise UserError(f"{which}: the member .{extension} has {place.length:,} bytes, too many for a label")
    try:
        text = place.read().decode("utf-8").strip()
        value = json.loads(text)[field_name] if field_name else text
    except KeyError:
        return None
    except (ValueError, TypeError, RecursionError, OSError):
        raise UserError(f"{which}: the member .{extension} cannot be read as a label") from None
    if isinstance(value, str) and value.removeprefix("-").isdecimal() and len(value) < 20:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise UserError(f"{which}: the label in .{extension} should be a number or a name")
    return value


# ---------------------------------------------------------------- their images


def _examined(
    index: Index,
    prepared: Preparation,
    states: Sequence[tuple[int, int]],
    info: DataInfo,
    workers: int,
    which: str,
) -> list[Finding]:
    state = Fingerprint(**prepared.facts(), **prepared.decoders())
    for shard, known in zip(index.shards, states, strict=True):
        state.add(str(shard.resolve()), *known)
    state.add(*index.start, *index.length)

    def examine() -> list[Finding]:
        return survey(
            ([index.item(i) for i in part] for part in _portions(len(index))),
            len(index),
            prepared=prepared,
            store=None,
            workers=workers,
            title=f"checking {which} images",
        )

    return remembered_findings(info.cache / "checked" / f"{state.hexdigest()}.json", len(index), examine)


def _portions(count: int) -> Iterator[range]:
    return (range(first, min(first + _PORTION, count)) for first in range(0, count, _PORTION))


def _set(
    index: Index,
    findings: Sequence[Finding],
    states: Sequence[tuple[int, int]],
    labels: Tensor | None,
    prepared: Preparation,
    blocks: _InBlocks | None,
) -> Examined:
    def part(rows: Sequence[int]) -> Members:
        return Members(index, np.array(rows, np.int64), prepared, digests_of(findings, rows), states, blocks)

    return Examined(findings, index.name, labels, part)


def _blocks(index: Index) -> list[int]:
    """The first image of each block: images of one shard that lie within a stretch of it."""
    first: list[int] = []
    for i in range(len(index)):
        begun = first[-1] if first else i
        reach = index.start[i] + index.length[i] - index.start[begun]
        if not first or index.shard[i] != index.shard[begun] or reach > _BLOCK:
            first.append(i)
    return first


class _InBlocks:
    """All images of an index, read a block at a time."""

    def __init__(self, index: Index, first: Sequence[int], limit: int) -> None:
        self.index, self.first, self.limit = index, [*first, len(index)], limit
        self.number = np.repeat(np.arange(len(first)), np.diff(self.first))
        self.cache = Blocks(self.read, limit)

    def __reduce__(self) -> tuple[Any, ...]:
        return _InBlocks, (self.index, self.first[:-1], self.limit)

    def read(self, block: int) -> Block:
        """One block, in one piece."""
        rows = range(self.first[block], self.first[block + 1])
        places = [self.index.item(i) for i in rows]
        there = [place for place in places if place is not None]
        if not there:
            return [None] * len(places)
        begin, end = there[0].start, max(place.start + place.length for place in there)
        data = memoryview(Slice(there[0].file, begin, end - begin).read())
        return [
            None if place is None else bytes(data[place.start - begin : place.start - begin + place.length])
            for place in places
        ]

    def load(self, i: int) -> bytes:
        """Image i, with its block."""
        block = int(self.number[i])
        try:
            return load(self.cache[block][i - self.first[block]])
        except OSError as error:
            raise RunFailed(f"{self.index.name(i)} cannot be read: {error.strerror}") from None


@dataclass
class Members:
    """Some images of an index (`reading.Grouped`)."""

    index: Index
    rows: NDArray[np.int64]
    prepared: Preparation
    digests: NDArray[np.uint8]
    states: Sequence[tuple[int, int]]
    """Size and time of each shard when the source was opened."""
    in_blocks: _InBlocks | None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def blocks(self) -> Tensor:
        assert self.in_blocks is not None
        return torch.from_numpy(self.in_blocks.number[self.rows])

    def name(self, index: int) -> str:
        return self.index.name(int(self.rows[index]))

    def load(self, index: int) -> bytes:
        i = int(self.rows[index])
        return load(self.index.item(i)) if self.in_blocks is None else self.in_blocks.load(i)

    def compare(self, index: int, data: bytes) -> None:
        shard = self.index.shard[int(self.rows[index])]
        if state_of(self.index.shards[shard]) == tuple(self.states[shard]):
            return
        if self.prepared.digest(data) != self.digests[index].tobytes():
            raise RunFailed(
                f"{self.name(index)} holds another image than when the run began; put the old file back, and the same "
                "command goes on"
            )
