"""Images in folders: which files there are, and in which classes."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import PIL
import torch
from torch import Tensor

from sslkit.api import DataInfo, Images
from sslkit.errors import UserError
from sslkit_datasets.images import (
    Finding,
    Fingerprint,
    InMemory,
    OnDemand,
    Opened,
    Store,
    cores,
    kind_of,
    shown,
    sift,
    state_of,
    survey,
    tell_left_out,
)

if TYPE_CHECKING:
    from sslkit_datasets import Folder

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class Listing:
    """The image files of one set, in the order in which they are numbered."""

    root: Path
    names: tuple[str, ...]
    """Paths below `root`, with `/` on every system, sorted."""
    classes: tuple[str, ...] | None
    """Sorted names of the class folders; None for a folder of images alone."""

    @property
    def files(self) -> list[Path]:
        return [self.root / name for name in self.names]

    def labels(self, classes: Sequence[str] | None) -> Tensor | None:
        """int64 `[N]`: each file's class folder as a position in `classes`."""
        if classes is None or self.classes is None:
            return None
        number = {name: i for i, name in enumerate(classes)}
        return torch.tensor([number[name.partition("/")[0]] for name in self.names], dtype=torch.int64)


def open_folder(spec: Folder, info: DataInfo) -> Opened:
    """Open a folder of images.

    Raises:
        UserError: no folder or no images there, an arrangement that could be read in two ways, test classes that the
            training set does not have, or too many broken images.
    """
    train_root, test_root = find_roots(spec.root, spec.test_root)
    listings = {"training": list_images(train_root, info)}
    if test_root is not None:
        listings["test"] = list_images(test_root, info)
        _compare(listings["training"], listings["test"])

    total = sum(len(listing.names) for listing in listings.values())
    in_memory = total * spec.channels * spec.size**2 <= spec.memory_limit_gb * 1e9
    workers = spec.workers or cores()
    classes = listings["training"].classes
    fingerprint = Fingerprint(source="folder", size=spec.size, channels=spec.channels)
    sets: dict[str, Images] = {}
    bad: list[dict[str, str]] = []
    for which, listing in listings.items():
        store = Store(len(listing.names), float("inf")) if in_memory else None
        states = [state_of(file) for file in listing.files]
        findings = _examined(spec, info, listing, states, store, workers, which)
        good, left_out = sift(
            [f.problem for f in findings],
            lambda i, listing=listing: shown(listing.root / listing.names[i]),  # type: ignore[misc]
            which=which,
            max_bad=spec.max_bad,
            advice=", or raise data_source.max_bad",
        )
        bad += left_out
        fingerprint.add(which)
        for name, finding in zip(listing.names, findings, strict=True):
            fingerprint.add(name, finding.digest, finding.problem is None)
        labels = listing.labels(classes)
        labels = None if labels is None else labels[good]
        if store is not None:
            sets[which] = InMemory(store.kept(good), labels)
        else:
            files = listing.files
            digests = np.frombuffer(b"".join(findings[i].digest for i in good), np.uint8).reshape(-1, 32)
            known = np.array([states[i] for i in good], np.int64)
            sets[which] = OnDemand([files[i] for i in good], spec.channels, spec.size, workers, digests, known, labels)
    tell_left_out(info.say, bad, total)
    names = None if classes is None else tuple(shown(name) for name in classes)
    return Opened(sets["training"], sets.get("test"), names, fingerprint.hexdigest(), bad)


# ---------------------------------------------------------------- which files


def find_roots(root: str, test_root: str | None) -> tuple[Path, Path | None]:
    """The folders of the training images and of the test images.

    Raises:
        UserError: a folder that is not there, or `root` can be read in two ways.
    """
    top = _folder(root, "root")
    test = None if test_root is None else _folder(test_root, "test_root")
    train = top / "train"
    inside = {entry.name for entry in _entries(top) if _is_folder(entry)}
    if "train" not in inside:
        return top, test
    others = sorted(inside - {"train", "test", "val"})
    if others:
        raise UserError(
            f"data_source.root: {shown(top)} holds train/ beside {shown(', '.join(others[:3]))}: is train/ a set or a "
            "class? Name the folder of the training images as root and that of the test images as test_root"
        )
    if test is None:
        found = sorted(inside & {"test", "val"})
        if len(found) == 2:
            raise UserError(f"data_source.root: {shown(top)} holds both test/ and val/; name one of them as test_root")
        test = top / found[0] if found else None
    return train, test


def _folder(path: str, option: str) -> Path:
    folder = Path(path).expanduser()
    if (kind := kind_of(folder, option)) != "folder":
        what = "does not exist" if kind == "nothing" else "is not a folder"
        raise UserError(f"data_source.{option}: {shown(folder.absolute())} {what}")
    return folder


def list_images(root: Path, info: DataInfo) -> Listing:
    """The images below `root`, whatever order the file system lists them in.

    Raises:
        UserError: there are none, or images lie beside class folders.
    """
    entries = _entries(root)
    folders = [entry.name for entry in entries if _is_folder(entry)]
    here = [entry.name for entry in entries if not _is_folder(entry)]
    if folders and any(_is_image(name) for name in here):
        raise UserError(
            f"{shown(root)} holds images beside folders; put every image into a class folder, or all into one folder"
        )
    walked = here
    if folders:
        walked = [*here, *(f"{name}/{below}" for name in folders for below in _walk(root / name, ()))]
    names = sorted(name for name in walked if _is_image(name))
    if not names:
        raise UserError(f"{shown(root)} holds no images (files that end in {', '.join(SUFFIXES)})")
    others = sorted(name for name in walked if not _is_image(name))
    if others:
        info.say(f"{shown(root)}: passed over {_some(others, 'file')} with other suffixes than {', '.join(SUFFIXES)}")
    if not folders:
        return Listing(root, tuple(names), None)
    classes = sorted({name.partition("/")[0] for name in names})
    empty = sorted(set(folders) - set(classes))
    if empty:
        info.say(f"{shown(root)}: {_some(empty, 'class folder')} without images left out")
    return Listing(root, tuple(names), tuple(classes))


def _entries(folder: Path | str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return [entry for entry in found if not entry.name.startswith((".", "__MACOSX"))]
    except OSError as error:
        raise UserError(f"the folder {shown(str(folder))} cannot be read: {error.strerror}") from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or into what may not be looked at: no folder, and told if it is called an image
        return False


def _walk(folder: Path, above: tuple[str, ...]) -> Iterator[str]:
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder that contains it
        return
    for entry in _entries(folder):
        if _is_folder(entry):
            for name in _walk(folder / entry.name, (*above, real)):
                yield f"{entry.name}/{name}"
        else:
            yield entry.name


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _some(names: Sequence[str], noun: str) -> str:
    more = ", ..." if len(names) > 3 else ""
    return f"{len(names)} {noun}{'s' if len(names) > 1 else ''} ({shown(', '.join(names[:3]))}{more})"


def _compare(train: Listing, test: Listing) -> None:
    if test.classes is None:
        return
    if train.classes is None:
        raise UserError(
            f"the test images in {shown(test.root)} lie in class folders, the training images in {shown(train.root)} "
            "do not: their classes cannot be compared"
        )
    unknown = sorted(set(test.classes) - set(train.classes))
    if unknown:
        raise UserError(
            f"{shown(test.root)} has {_some(unknown, 'class folder')} for which {shown(train.root)} has no images"
        )


# ---------------------------------------------------------------- which of them can be read


def _examined(
    spec: Folder,
    info: DataInfo,
    listing: Listing,
    states: Sequence[tuple[int, int]],
    store: Store | None,
    workers: int,
    which: str,
) -> list[Finding]:
    """One finding per file. Without a store they are looked up first: a run that is resumed need not wait again."""
    record = None if store is not None else info.cache / "checked" / f"{_state(spec, listing, states)}.json"
    findings = None if record is None else _recall(record, len(listing.names))
    if findings is None:
        files = listing.files
        findings = survey(
            [files],
            len(files),
            channels=spec.channels,
            size=spec.size,
            store=store,
            workers=workers,
            title=f"{'checking' if store is None else 'reading'} {which} images",
        )
        # A file that could not even be read may be readable next time without any sign of a change.
        if record is not None and all(finding.digest for finding in findings):
            _remember(record, findings)
    return findings


def _state(spec: Folder, listing: Listing, states: Sequence[tuple[int, int]]) -> str:
    """Names, sizes and times of all files, and whatever else decides which of them can be decoded."""
    state = Fingerprint(root=str(listing.root.resolve()), channels=spec.channels, size=spec.size, pil=PIL.__version__)
    for name, (size, time) in zip(listing.names, states, strict=True):
        state.add(name, size, time)
    return state.hexdigest()


def _recall(record: Path, count: int) -> list[Finding] | None:
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
        findings = [Finding(bytes.fromhex(digest), problem) for digest, problem in found]
    except (OSError, ValueError, TypeError):
        return None
    return findings if len(findings) == count else None


def _remember(record: Path, findings: Sequence[Finding]) -> None:
    temporary = record.with_suffix(f".{os.getpid()}.part")
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps([(f.digest.hex(), f.problem) for f in findings]), encoding="utf-8")
        temporary.replace(record)
    except OSError:  # a cache that cannot be written only costs time
        with contextlib.suppress(OSError):
            temporary.unlink()
