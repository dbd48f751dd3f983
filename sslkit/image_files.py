"""Image files of a folder that nobody prepared: which there are, and their pixels as a run's networks want them."""

from __future__ import annotations

import json
import os
import warnings
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError
from torch import Tensor

from sslkit import registry
from sslkit.api import FileReader
from sslkit.environment import cores_here
from sslkit.errors import RunFailed, UserError, printable
from sslkit.looking import PACKED, Unreadable, other_kinds, packed
from sslkit.opened_run import OpenedRun

AHEAD = 4
"""Portions that threads read while one is computed."""

TASK = 16
"""Files that a thread reads at a time: small ones would spend more time on the queue than in the decoder."""

SAME = ("bands", "value_range", "axes", "decoder")
"""Options by which a run's data source turned files into pixels, beside the channels and the size."""


@dataclass(frozen=True)
class Found:
    """What lies below a folder."""

    root: Path
    names: tuple[str, ...]
    """Image files, as paths below the folder with `/` on every system, sorted."""
    states: tuple[tuple[int, int], ...]
    """Bytes and time of change in nanoseconds of each; -1 and -1 where they cannot be had."""
    problems: tuple[Mapping[str, str], ...]
    """`path` and `problem` of what could not even be looked at."""
    suffixes: tuple[str, ...]
    """What the names of image files end in."""
    others: int
    """Files of other kinds."""
    displaced: str | None
    """What is to be said of image files that are not read because pictures lie there, too."""
    hidden: int
    """Files and folders that are hidden, whatever they hold."""


def find(folder: str | os.PathLike[str], suffixes: Sequence[tuple[str, ...]]) -> Found:
    """All image files below a folder, at any depth, whatever order the file system lists them in.

    Hidden files and folders are passed over. Links are followed, but not to a folder that the link lies in. `suffixes`
    are those of a `FileReader`.

    Raises:
        UserError: there is no such folder, no image file below it, or a few pictures among arrays.
    """
    root = Path(folder).expanduser()
    kinds: list[dict[str, tuple[int, int]]] = [{} for _ in suffixes]
    problems: list[Mapping[str, str]] = []
    others = hidden = 0
    packs: list[str] = []
    waiting: list[tuple[str, tuple[str, ...]]] = [("", ())]  # no recursion: folders may be nested deeper than calls
    while waiting:
        name, above = waiting.pop()
        try:
            real = os.path.realpath(root / name)
            if real in above:
                continue
            with os.scandir(root / name) as entries:
                listed = list(entries)
        except (OSError, ValueError) as error:
            if not name:
                raise UserError(f"{root.absolute()}: {_why(error)}; give a folder of images") from None
            problems.append({"path": printable(name), "problem": f"cannot be listed: {_why(error)}"})
            continue
        for entry in listed:
            path = f"{name}/{entry.name}" if name else entry.name
            if entry.name.startswith((".", "__MACOSX")):
                hidden += 1
            elif _is_folder(entry):
                waiting.append((path, (*above, real)))
            elif (kind := next((k for k, ends in enumerate(suffixes) if entry.name.lower().endswith(ends)), -1)) < 0:
                others += 1
                packs += [path] if entry.name.lower().endswith(tuple(PACKED)) else []
            elif not _is_text(path):
                problems.append({"path": printable(path), "problem": "has a name that is no UTF-8; rename it"})
            else:
                kinds[kind][path] = _state(entry)
    ends, known = next(((ends, files) for ends, files in zip(suffixes, kinds, strict=True) if files), ((), {}))
    if not known:
        lost = f", and {_first(problems)}" if problems else ""
        wanted = ", ".join(end for group in suffixes for end in group)
        raise UserError(f"{root.absolute()}: holds no image files that end in {wanted}{lost}{packed(packs)}")
    displaced = other_kinds(str(root), kinds)
    names = tuple(sorted(known))
    problems.sort(key=lambda problem: problem["path"])
    states = tuple(known[name] for name in names)
    return Found(root, names, states, tuple(problems), ends, others, displaced, hidden)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or into what may not be looked at
        return False


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes that Python could not decode
        return False
    return True


def _state(entry: os.DirEntry[str] | Path) -> tuple[int, int]:
    try:
        found = entry.stat()
    except OSError:  # whoever reads it will say so
        return -1, -1
    return found.st_size, found.st_mtime_ns


def _why(error: OSError | ValueError) -> str:
    return getattr(error, "strerror", None) or str(error)


def _first(problems: Sequence[Mapping[str, str]]) -> str:
    more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
    return f"{problems[0]['path']} {problems[0]['problem']}{more}"


# ---------------------------------------------------------------- reading


def reading(opened: OpenedRun) -> dict[str, Any]:
    """How the run's data source turned files into pixels, in its own options; empty where it had none."""
    source: Any = opened.tables.get("data_source")
    while isinstance(source, dict) and isinstance(source.get("of"), dict):  # a part of another source
        source = source["of"]
    return {key: source[key] for key in SAME if key in source} if isinstance(source, dict) else {}


def reader_of(opened: OpenedRun, size: int | None = None) -> FileReader:
    """Reads files as the run's own images were read, if it read files: its channels, bands and range of values.

    Args:
        opened: The run.
        size: Side of the squares in pixels; without it, that of the images that the run was measured with.

    Raises:
        UserError: `data_source.folder` is not installed, or cannot give images with as many channels.
    """
    folder: Any = registry.load("data_source", "folder")
    same = {key: value for key, value in reading(opened).items() if key in folder.model_fields}
    channels = opened.info.channels
    options = {"root": ".", "size": size or opened.info.image_size, "channels": channels, **same}
    try:
        return cast(FileReader, folder.model_validate_json(json.dumps(options)).reader())
    except ValidationError as error:
        wrong = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(f"{opened.run}: was trained on images that data_source.folder cannot read: {wrong} = "
                        f"{options.get(wrong)!r}") from None  # fmt: skip


@dataclass(frozen=True)
class Portion:
    """Some files that were read."""

    positions: range
    """In `Found.names`."""
    pixels: Tensor | None
    """uint8 `[n, C, S, S]` of those that could be read; None if none could."""
    read: Sequence[int]
    """The positions of those n."""
    digests: Sequence[str]
    """SHA-256 of each of their files."""
    problems: Sequence[Mapping[str, str]]
    """`path` and `problem` of the others."""


def portions(
    reader: FileReader, found: Found, wanted: Sequence[range], workers: int | None = None
) -> Generator[Portion, None, None]:
    """Read files in threads, some portions ahead of whoever takes them.

    Raises:
        UserError: something is missing to read such files at all.
        RunFailed: a file is not what it was when it was found.
    """

    def read(positions: range) -> list[tuple[Tensor, str] | str]:
        return [_read(reader, found, i) for i in positions]

    def begin(pool: ThreadPoolExecutor, positions: range) -> list[Future[list[tuple[Tensor, str] | str]]]:
        return [pool.submit(read, positions[at : at + TASK]) for at in range(0, len(positions), TASK)]

    with warnings.catch_warnings():
        # What Pillow warns of is either a problem that is reported by name or of no consequence.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        pool = ThreadPoolExecutor(workers or cores_here(), "sslkit-files")
        try:
            begun: deque[list[Future[list[tuple[Tensor, str] | str]]]] = deque()
            for number, positions in enumerate(wanted):
                begun += [begin(pool, ahead) for ahead in wanted[number + len(begun) : number + AHEAD]]
                results = [result for task in begun.popleft() for result in task.result()]
                yield _portion(found, positions, results)
        finally:
            pool.shutdown(cancel_futures=True)


def _read(reader: FileReader, found: Found, position: int) -> tuple[Tensor, str] | str:
    file = found.root / found.names[position]
    try:
        result: tuple[Tensor, str] | str = reader.read(file)
    except Unreadable as error:
        result = str(error)
    if _state(file) != found.states[position]:
        raise RunFailed(f"{file}: was changed since the command began; let nothing change the folder and begin anew")
    return result


def _portion(found: Found, positions: range, results: Sequence[tuple[Tensor, str] | str]) -> Portion:
    good = [(i, *result) for i, result in zip(positions, results, strict=True) if not isinstance(result, str)]
    return Portion(
        positions=positions,
        pixels=torch.stack([pixels for _, pixels, _ in good]) if good else None,
        read=[i for i, _, _ in good],
        digests=[digest for _, _, digest in good],
        problems=[
            {"path": printable(found.names[i]), "problem": result}
            for i, result in zip(positions, results, strict=True)
            if isinstance(result, str)
        ],
    )
