"""Images in folders: which files there are, and in which classes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sslkit.api import DataInfo
from sslkit.environment import cores, cores_here
from sslkit.errors import UserError
from sslkit.looking import Unclassed, other_kinds, packed
from sslkit_datasets.holding_out import facts
from sslkit_datasets.images import (
    Finding,
    Fingerprint,
    Opened,
    Store,
    kind_of,
    shown,
    state_of,
    survey,
)
from sslkit_datasets.preparing import Preparation, arrays_of
from sslkit_datasets.reading import Files, Names
from sslkit_datasets.records import remembered_findings
from sslkit_datasets.sets import Examined, Reading, digests_of, opened

if TYPE_CHECKING:
    from sslkit_datasets import Folder

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
ARRAYS = (".npy", ".tif", ".tiff")
"""What is looked for where a folder holds none of the others."""
PORTION = 4096
"""Files whose paths are held at one time."""


@dataclass(frozen=True)
class Listing:
    """The image files of one set, in the order in which they are numbered."""

    root: Path
    names: tuple[str, ...]
    """Paths below `root`, with `/` on every system, sorted."""
    classes: tuple[str, ...] | None
    """Sorted names of the class folders; None for a folder of images alone."""

    @property
    def files(self) -> Names:
        return Names(self.root, self.names)

    def folders(self) -> list[Path]:
        """The folder itself and those of its classes."""
        return [self.root, *(self.root / name for name in self.classes or ())]

    def labels(self, classes: Sequence[str] | None) -> Tensor | None:
        """int64 `[N]`: each file's class folder as a position in `classes`."""
        if classes is None or self.classes is None:
            return None
        number = {name: i for i, name in enumerate(classes)}
        return torch.tensor([number[name.partition("/")[0]] for name in self.names], dtype=torch.int64)


def preparation(spec: Folder) -> Preparation:
    """What the options say of how files become images."""
    return Preparation(
        spec.channels, spec.size, spec.crops_from == "original", spec.check == "headers", arrays_of(spec)
    )


def open_folder(spec: Folder, info: DataInfo) -> Opened:
    """Open a folder of images.

    Raises:
        UserError: no folder or no images there, an arrangement that could be read in two ways, test classes that the
            training set does not have, or too many broken images.
    """
    listings = list_sets(spec, info)
    prepared = preparation(spec)
    total = sum(len(listing.names) for listing in listings.values())
    in_memory = total * spec.channels * spec.size**2 <= spec.memory_limit_gb * 1e9
    in_memory = in_memory and not prepared.original and not prepared.headers
    # In memory each process decodes for itself; what is remembered is found by one, for which the others wait.
    workers = spec.workers or (cores() if in_memory else cores_here())
    classes = listings["training"].classes
    classless = {} if spec.classes is None else {"classes": spec.classes}
    fingerprint = Fingerprint(source="folder", **prepared.facts(), **classless, **facts(spec.hold_out))
    sets: dict[str, Examined] = {}
    for which, listing in listings.items():
        store = Store(len(listing.names), float("inf")) if in_memory else None
        states = [state_of(file) for file in listing.files]
        findings = _examined(prepared, info, listing, states, store, workers, which)
        fingerprint.add(which)
        for name, finding in zip(listing.names, findings, strict=True):
            fingerprint.add(name, finding.digest, finding.problem is None)
        sets[which] = _set(listing, findings, states, listing.labels(classes), store, prepared)
    names = None if classes is None else tuple(shown(name) for name in classes)
    reading = Reading(prepared, spec.workers, spec.memory_limit_gb)
    return opened(sets, reading, spec, info.say, names, fingerprint.hexdigest())


def _set(
    listing: Listing,
    findings: Sequence[Finding],
    states: Sequence[tuple[int, int]],
    labels: Tensor | None,
    store: Store | None,
    prepared: Preparation,
) -> Examined:
    def files(rows: Sequence[int]) -> Names:
        return Names(listing.root, [listing.names[i] for i in rows])

    def part(rows: Sequence[int]) -> Files:
        known = np.array([states[i] for i in rows], np.int64)
        return Files(files(rows), prepared, digests_of(findings, rows), known)

    return Examined(findings, lambda i: shown(listing.root / listing.names[i]), labels, part, store, files)


# ---------------------------------------------------------------- which files


def list_sets(spec: Folder, info: DataInfo) -> dict[str, Listing]:
    """The files of the training set, and of the test set where there is one.

    Raises:
        UserError: as `open_folder`, of everything but the images themselves.
    """
    if spec.classes == "none":
        train_root = _folder(spec.root, "root")
        test_root = None if spec.test_root is None else _folder(spec.test_root, "test_root")
    else:
        train_root, test_root = find_roots(spec.root, spec.test_root)
    listings = {"training": list_images(train_root, info, classes=spec.classes != "none")}
    if test_root is not None:
        if spec.hold_out is not None:
            raise UserError(
                f"data_source.hold_out: there are test images already ({shown(test_root)}); leave hold_out out, or "
                "name the folder of the training images as root"
            )
        listings["test"] = list_images(test_root, info, classes=spec.classes != "none")
        _refuse_overlap(listings["training"], listings["test"])
        _compare(listings["training"], listings["test"])
    return listings


def _refuse_overlap(train: Listing, test: Listing) -> None:
    """Neither set may lie in the other, directly or by links among its class folders."""
    trained, tested = ({folder.resolve(): folder for folder in each.folders()} for each in (train, test))
    for inner, outer in ((tested, trained), (trained, tested)):
        for real, folder in inner.items():
            if any(above in outer for above in (real, *real.parents)):
                raise UserError(
                    f"data_source.test_root: the images in {shown(folder)} would be trained on and tested on: "
                    f"{shown(test.root)} and {shown(train.root)} overlap; put the two sets beside one another"
                )


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


def list_images(root: Path, info: DataInfo, *, classes: bool = True) -> Listing:
    """The images below `root`, whatever order the file system lists them in. Without `classes` they have none.

    Raises:
        UserError: there are none, images lie beside class folders, or a few pictures among arrays.
    """
    entries = _entries(root)
    folders = [entry.name for entry in entries if _is_folder(entry)]
    here = [entry.name for entry in entries if not _is_folder(entry)]
    walked = here
    if folders:
        walked = [*here, *(f"{name}/{below}" for name in folders for below in _walk(root / name, ()))]
    kinds = [[name for name in walked if _is_image(name, ends)] for ends in (SUFFIXES, ARRAYS)]
    displaced = other_kinds(shown(root), kinds)
    suffixes = SUFFIXES if kinds[0] else ARRAYS
    if classes and folders and (loose := sorted(name for name in here if _is_image(name, suffixes))):
        number = f"{len(loose):,} images lie" if len(loose) > 1 else "1 image lies"
        what = f"{number} beside {len(folders):,} folder{'s' * (len(folders) > 1)}, as {loose[0]}"
        raise Unclassed(
            f"{shown(root)}: {what}; put every image into a class folder, or all into one folder, or set "
            'data_source.classes = "none" to read them all without labels',
            root,
            what,
        )
    names = sorted(kinds[0] or kinds[1])
    if not names:
        ends = ", ".join(SUFFIXES + ARRAYS)
        raise UserError(f"{shown(root)} holds no images (files that end in {ends}){packed(walked)}")
    if displaced:
        info.say(displaced)
    others = sorted(name for name in walked if not _is_image(name, SUFFIXES + ARRAYS))
    if others:
        info.say(f"{shown(root)}: passed over {_some(others, 'file')} with other suffixes than {', '.join(suffixes)}")
    if not folders or not classes:
        return Listing(root, tuple(names), None)
    found = sorted({name.partition("/")[0] for name in names})
    empty = sorted(set(folders) - set(found))
    if empty:
        info.say(f"{shown(root)}: {_some(empty, 'class folder')} without images left out")
    return Listing(root, tuple(names), tuple(found))


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


def _is_image(name: str, suffixes: tuple[str, ...]) -> bool:
    return name.lower().endswith(suffixes)


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
    prepared: Preparation,
    info: DataInfo,
    listing: Listing,
    states: Sequence[tuple[int, int]],
    store: Store | None,
    workers: int,
    which: str,
) -> list[Finding]:
    """One finding per file. Without a store they are looked up first: a run that is resumed need not wait again."""
    files = listing.files

    def examine() -> list[Finding]:
        return survey(
            (files[i : i + PORTION] for i in range(0, len(files), PORTION)),
            len(files),
            prepared=prepared,
            store=store,
            workers=workers,
            title=f"{'checking' if store is None else 'reading'} {which} images",
        )

    if store is not None:
        return examine()
    return remembered_findings(
        info.cache / "checked" / f"{_state(prepared, listing, states)}.json", len(files), examine
    )


def _state(prepared: Preparation, listing: Listing, states: Sequence[tuple[int, int]]) -> str:
    """Names, sizes and times of all files, and whatever else decides which of them can be decoded."""
    state = Fingerprint(root=str(listing.root.resolve()), **prepared.facts(), **prepared.decoders())
    for name, (size, time) in zip(listing.names, states, strict=True):
        state.add(name, size, time)
    return state.hexdigest()
