"""Files of features: what is in them, what they say of themselves, and how they are written part by part."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import Tensor

import sslkit
from sslkit.errors import RunFailed, UserError, printable
from sslkit.features import normalisation
from sslkit.files import in_one_piece
from sslkit.image_files import Found, reading
from sslkit.opened_run import OpenedRun
from sslkit.run_directory import cannot_lock
from sslkit.words import spoken

FORMAT = 1
"""Of the output. A later one is another number, and older programs say that they cannot read it."""

PART = 2048
"""Image files of a part, which is a row group of the output: what is lost at most when the command is killed."""

KEY = b"sslkit"
"""Of the schema's metadata, which says in JSON what the features are of."""

DIFFERS = {
    "format": "format", "sslkit": "version of sslkit", "torch": "version of torch", "weights": "weights",
    "view_generator": "preparation", "reading": "reading of files",
    "size": "size of the images", "folder": "folder", "images": "number of images",
    "files": "names, sizes or times of files", "batch": "batch", "device": "device",
}  # fmt: skip
"""What an output follows from, by its key in the metadata, in words."""

SAYS: Mapping[str, type] = {
    "run": str, "step": int, "branch": str, "folder": str, "images": int, "rows": int, "feature_dim": int,
    "weights": str,
}  # fmt: skip
"""What every output says of itself that somebody reads, and of which kind it is."""

Restart = Literal["never", "where other", "always"]
"""When an output or its parts give way to new ones: `where other` is where they are of other images or weights."""

UNSPEAKABLE = ("files", "view_generator", "reading")
"""Those whose values are too long for a line."""


@dataclass(frozen=True)
class Embedded:
    """What came of a folder."""

    path: Path
    """The Parquet file: `path`, below the folder and with `/`; `feature`, float32; `sha256`, of the image file."""
    facts: Mapping[str, Any]
    """What its metadata says: the run, the weights, the folder and how images were prepared."""
    rows: int
    """Images that have features."""
    left_out: Sequence[Mapping[str, str]]
    """`path` and `problem` of those that have none; they are in `bad_samples`, too."""
    anew: bool
    """False where the file was there already."""

    @property
    def bad_samples(self) -> Path:
        """The file of `left_out`, a line of JSON each; it is there if there are any."""
        return bad_samples_of(self.path)


class Rows:
    """Rows of the output, gathered."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.digests: list[str] = []
        self.features: list[NDArray[np.float32]] = []
        self.problems: list[Mapping[str, str]] = []

    def add(self, names: Sequence[str], features: Tensor, digests: Sequence[str]) -> None:
        """Features `[n, D]` of n images."""
        self.names += names
        self.digests += digests
        self.features.append(features.numpy())

    def table(self, feature_dim: int) -> pa.Table:
        """Them all as a table of Arrow's."""
        flat = np.concatenate(self.features).reshape(-1) if self.features else np.empty(0, np.float32)
        columns = [pa.array(self.names), pa.FixedSizeListArray.from_arrays(pa.array(flat), feature_dim)]
        return pa.Table.from_arrays([*columns, pa.array(self.digests)], schema=_schema(feature_dim))


def _schema(feature_dim: int) -> pa.Schema:
    feature = pa.list_(pa.float32(), feature_dim)
    return pa.schema([("path", pa.string()), ("feature", feature), ("sha256", pa.string())])


# ---------------------------------------------------------------- what an output is of


def facts_of(opened: OpenedRun, found: Found, batch: int, device: str) -> dict[str, Any]:
    """What the metadata of an output says, besides how many images were left out."""
    info, files, same = opened.info, hashlib.sha256(), preparation(opened)
    for name, state in zip(found.names, found.states, strict=True):
        files.update(f"{name!r} {state}\n".encode())
    straight = normalisation(opened.views, (info.channels, info.image_size, info.image_size))
    mean, std = (None, None) if straight is None else (-straight[0] / straight[1], 1 / straight[1])
    return {
        "format": FORMAT, "run": str(opened.run.absolute()), "recipe": opened.tables.get("name"),
        "recipe_hash": opened.facts.get("recipe_hash"), "step": opened.step, "branch": opened.branch,
        "layer": "backbone", "feature_dim": int(cast(int, opened.backbone.feature_dim)), "channels": info.channels,
        **same,
        "mean": None if mean is None else [round(float(value), 6) for value in mean.flatten()],
        "std": None if std is None else [round(float(value), 6) for value in std.flatten()],
        "folder": str(found.root.resolve()), "images": len(found.names), "files": files.hexdigest(), "batch": batch,
        "device": device, "sslkit": sslkit.__version__, "torch": torch.__version__,
    }  # fmt: skip


def preparation(opened: OpenedRun) -> dict[str, Any]:
    """What an image's features follow from: the weights, and how pixels come from its file and go to the network."""
    return {
        "weights": opened.weights, "size": opened.info.image_size, "reading": reading(opened),
        "view_generator": json.loads(json.dumps(opened.tables["view_generator"], default=str)),
    }  # fmt: skip


def recorded(path: Path) -> dict[str, Any] | None:
    """What an output says of itself; None if it is none, not whole, or not there.

    It may come from a stranger: what is said has the columns, the kinds and the number of rows that are relied on.

    Raises:
        UserError: it is of another version.
    """
    try:
        found = pq.read_metadata(path)
        schema = found.schema.to_arrow_schema()
        facts = dict(json.loads((schema.metadata or {})[KEY]))
        if facts["format"] != FORMAT:
            raise UserError(f"{path}: was written by another version of sslkit; write it anew to another place")
        kinds = all(type(facts[key]) is kind for key, kind in SAYS.items())
        sound = kinds and facts["rows"] == found.num_rows > 0 and facts["feature_dim"] > 0
        return facts if sound and schema.equals(_schema(facts["feature_dim"])) else None
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError, OverflowError, RecursionError):
        return None


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What of an output's origin is not the same, in words; empty if it all is."""
    found = []
    for key, words in DIFFERS.items():
        if old.get(key) != new[key]:
            was, now = old.get(key), new[key]
            if key == "weights":
                was, now = (f"{of.get('branch')}, step {of.get('step')}" for of in (old, new))
            found.append(words if key in UNSPEAKABLE else f"{words} ({was}; now {now})")
    return ", ".join(found)


def _key(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps({key: facts[key] for key in DIFFERS}, sort_keys=True).encode()).hexdigest()


def output(path: Path) -> Path:
    """The path of an output, which need not be there.

    Raises:
        UserError: nothing of that name is written.
    """
    if path.suffix != ".parquet":
        raise UserError(f"{path}: should end in .parquet, since that is what is written")
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"{path}: {'is a folder' if path.is_dir() else 'its folder does not exist'}")
    return path


def finished(path: Path, facts: Mapping[str, Any], overwrite: bool) -> Embedded | None:
    """The output, where it is complete and of the same. `overwrite` is for one of something else.

    Raises:
        UserError: it is of something else, which is not to be overwritten.
    """
    if not path.exists():
        return None
    old = recorded(path)
    if old is None:
        raise UserError(f"{path}: is there already, and sslkit did not write it; choose another place")
    if differing := _differing(old, facts):
        if overwrite:
            return None
        raise UserError(f"{path}: holds features of something else: other {differing}; choose another place, or begin "
                        f"anew with {spoken().restart}")  # fmt: skip
    return Embedded(path, old, old["rows"], _left_out(path) if old.get("left_out") else [], anew=False)


def _left_out(path: Path) -> list[Mapping[str, str]]:
    """What is said to be left out of an output."""
    try:
        lines = [json.loads(line) for line in bad_samples_of(path).read_text(encoding="utf-8").splitlines()]
        return [{"path": str(line["path"]), "problem": str(line["problem"])} for line in lines]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def damaged(path: Path, error: Exception) -> UserError:
    """What is said of an output whose rows cannot be had."""
    return UserError(f"{path}: is damaged ({str(error).partition(chr(10))[0]}); remove it, and write it anew")


def bad_samples_of(path: Path) -> Path:
    """The file beside an output that names what was left out."""
    return path.with_suffix(".bad_samples.jsonl")


# ---------------------------------------------------------------- parts


class Parts:
    """The parts of an output that is not complete."""

    def __init__(self, path: Path, facts: Mapping[str, Any], images: int) -> None:
        self.path, self.facts = path, facts
        self.folder = path.with_name(f"{path.name}.parts")
        self.claim = self.folder / "bad_samples"  # of the file beside the output, until the output itself says so
        self.key = _key(facts)
        self.batch: int = facts["batch"]
        size = self.batch * max(1, PART // self.batch)
        self.ranges = [range(first, min(first + size, images)) for first in range(0, images, size)]

    def batches(self, part: int) -> list[range]:
        """The positions of a part, a batch at a time."""
        wanted = self.ranges[part]
        return [wanted[at : at + self.batch] for at in range(0, len(wanted), self.batch)]

    def begun(self) -> bool:
        """Whether there are parts of the same: somebody wanted it, whatever else is complete."""
        try:
            return _key(json.loads((self.folder / "state.json").read_text(encoding="utf-8"))) == self.key
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def beside(self) -> Path:
        """Where `bad_samples` goes; raises UserError for a file there that no output says to be its own."""
        beside = bad_samples_of(self.path)
        if beside.exists() and not (self.claim.exists() or (recorded(self.path) or {}).get("left_out")):
            raise UserError(f"{beside}: is there already, and belongs to no output of sslkit's; move it, or choose "
                            "another place")  # fmt: skip
        return beside

    @contextlib.contextmanager
    def held(self, restart: Restart) -> Iterator[None]:
        """Keep other processes away, and refuse parts of something else.

        Raises:
            UserError: another process writes the same output, or the parts are of something else.
        """
        self.folder.mkdir(exist_ok=True)
        lock = FileLock(self.folder / "lock")
        try:
            if not cannot_lock(self.folder / "lock"):
                lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"{self.path}: another process is writing it; wait for it, or choose another "
                            "place") from None  # fmt: skip
        try:
            state = self.folder / "state.json"
            try:
                differing = _differing(json.loads(state.read_text(encoding="utf-8")), self.facts)
            except FileNotFoundError:
                differing = ""
            except (ValueError, AttributeError):
                differing = "state, which cannot be read"
            if differing and restart == "never":
                raise UserError(f"{self.folder}: holds unfinished features of something else: other {differing}; "
                                f"choose another place, or begin anew with {spoken().restart}")  # fmt: skip
            if differing or restart == "always":
                for file in self._own():
                    file.unlink(missing_ok=True)
            with in_one_piece(state) as staging:
                staging.write_text(json.dumps(self.facts, indent=1), encoding="utf-8")
            yield
        finally:
            lock.release()

    def missing(self) -> list[int]:
        """The parts that are not there, or are not what they are to be."""
        return [number for number in range(len(self.ranges)) if self._said(number) is None]

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.parquet"

    def _said(self, number: int) -> dict[str, Any] | None:
        try:
            said = json.loads((pq.read_schema(self._file(number)).metadata or {})[KEY])
            return dict(said) if (said["key"], said["part"]) == (self.key, number) else None
        except (OSError, pa.ArrowException, KeyError, ValueError, TypeError):
            return None

    def write(self, number: int, rows: Rows) -> None:
        """A part, in one piece."""
        self._write(number, rows.table(self.facts["feature_dim"]), rows.problems)

    def _write(self, number: int, table: pa.Table, problems: Sequence[Mapping[str, str]]) -> None:
        said = {"key": self.key, "part": number, "problems": list(problems)}
        table = table.replace_schema_metadata({KEY: json.dumps(said)})
        with in_one_piece(self._file(number)) as staging, _writer(staging, table.schema) as writer:
            writer.write_table(table)

    def take(self, again: Sequence[int], names: Sequence[str]) -> None:
        """Take parts from the complete output, all but those that hold one of the images `again`.

        What is not as it should be is not taken, and so is missing afterwards.
        """
        bad = {problem["path"]: problem for problem in _left_out(self.path)}
        with (
            contextlib.suppress(OSError, pa.ArrowException),
            pq.ParquetFile(self.path, page_checksum_verification=True) as output,
        ):
            group = 0
            for number, wanted in enumerate(self.ranges):
                kept = [names[i] for i in wanted if printable(names[i]) not in bad]
                if kept and group < output.num_row_groups:
                    table = output.read_row_group(group)
                    group += 1
                else:
                    table = _schema(self.facts["feature_dim"]).empty_table()
                if table["path"].to_pylist() == kept and not any(i in wanted for i in again):
                    lost = [bad[printable(names[i])] for i in wanted if printable(names[i]) in bad]
                    self._write(number, table, lost)

    def problems(self) -> list[Mapping[str, str]]:
        """Of all parts, in the order of the files."""
        return [problem for number in range(len(self.ranges)) for problem in (self._said(number) or {})["problems"]]

    def join(self, left_out: Sequence[Mapping[str, str]]) -> int:
        """Write the output out of all parts, and beside it what was left out; tells the rows.

        Raises:
            UserError: no image could be read, or as `beside`. RunFailed: a part was damaged.
        """
        rows = int(sum(pq.read_metadata(self._file(number)).num_rows for number in range(len(self.ranges))))
        if not rows:
            self.remove()
            bad = left_out[0]
            raise UserError(f"{self.facts['folder']}: none of {len(left_out)} image files can be read: {bad['path']} "
                            f"{bad['problem']}")  # fmt: skip
        beside = self.beside()
        if left_out:
            self.claim.touch()
            with in_one_piece(beside) as staging:
                staging.write_text("".join(f"{json.dumps(bad)}\n" for bad in left_out), encoding="utf-8")
        else:
            beside.unlink(missing_ok=True)
        said = json.dumps({**self.facts, "rows": rows, "left_out": len(left_out)})
        schema = _schema(self.facts["feature_dim"]).with_metadata({KEY: said})
        with in_one_piece(self.path) as staging, _writer(staging, schema) as writer:
            for number in range(len(self.ranges)):
                try:
                    table = pq.read_table(self._file(number), page_checksum_verification=True)
                except (OSError, pa.ArrowException) as error:
                    raise RunFailed(f"{self._file(number)}: is damaged ({str(error).partition(chr(10))[0]}); remove "
                                    f"it, and {spoken().again} makes it anew") from error  # fmt: skip
                if table.num_rows:
                    writer.write_table(table.replace_schema_metadata(schema.metadata))
        return rows

    def _own(self) -> list[Path]:
        """The parts and their state, which give way to new ones."""
        return [self.folder / "state.json", *self.folder.glob("[0-9]*.parquet"), *self.folder.glob(".*.tmp")]

    def tidy(self) -> None:
        """Remove the parts of an output that is complete, which a process that was killed had no time for."""
        if self.begun() or not (self.folder / "state.json").exists():  # the state is the first that goes
            self.remove()

    def remove(self) -> None:
        """Remove all parts. What else lies there stays."""
        for file in (*self._own(), self.claim, self.folder / "lock"):
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()


def _writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    return pq.ParquetWriter(
        path, schema, use_dictionary=False, write_statistics=["path"], write_page_checksum=True,
        compression={"path": "zstd", "sha256": "none", "feature.list.element": "none"},  # features compress by nothing
    )  # fmt: skip
