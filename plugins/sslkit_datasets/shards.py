"""Which files a data set consists of: one, a pattern of them, or a folder, and which of them are the test set."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from sslkit.errors import UserError
from sslkit_datasets.images import kind_of, shown

_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5,})-of-(?P<total>\d{5,})\.\w+")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST = 1_000_000


def find_files(
    path: str, test_path: str | None, suffix: str, hold_out: float | None = None
) -> tuple[list[Path], list[Path]]:
    """The files of the training set and of the test set, each in the order of their names.

    Raises:
        UserError: there are none, a shard is missing, it is not clear which the test set is, a file is in both, or
            there is a test set although one is to be held out.
    """
    if test_path is None:
        train, test = _find(path, "path", suffix)
    else:
        train, _ = _find(path, "path", suffix, alone=True)
        alone, beside = _find(test_path, "test_path", suffix)
        test = beside or alone
    if test and hold_out is not None:
        raise UserError(
            f"data_source.hold_out: there are test images already ({shown(test[0])}); leave hold_out out, or name the "
            "files of the training images alone as path"
        )
    _refuse_shared(train, test)
    return train, test


def _refuse_shared(train: list[Path], test: list[Path]) -> None:
    real = {file.resolve() for file in train} if test else set()
    both = [file for file in test if file.resolve() in real]
    if both:
        raise UserError(
            f"data_source.test_path: {shown(both[0])} is a file of the training images, too; name other files as "
            "test_path, or those to train on with a glob as path"
        )


def _find(path: str, option: str, suffix: str, *, alone: bool = False) -> tuple[list[Path], list[Path]]:
    place = Path(path).expanduser()
    kind = kind_of(place, option)
    if kind == "folder":
        return in_folder(place, option, suffix, alone=alone)
    if kind == "file":
        return [place], []
    if kind != "nothing":
        raise UserError(f"data_source.{option}: {shown(place.absolute())} is {kind}; name a file, a glob or a folder")
    if _RANGE.search(str(place)):
        return _expanded(str(place), option), []
    found = sorted(Path(name) for name in glob.glob(str(place)) if Path(name).is_file())  # noqa: PTH207 absolute globs
    if not found:
        raise UserError(f"data_source.{option}: no file or folder matches {shown(place.absolute())}")
    return whole(found), []


def _expanded(pattern: str, option: str) -> list[Path]:
    """The files of `shard-{000000..000146}.tar`, all of which have to be there."""
    names = [pattern]
    while match := _RANGE.search(names[0]):
        first, last = int(match[1]), int(match[2])
        if last < first or len(names) * (last - first + 1) > _MOST:
            raise UserError(f"data_source.{option}: {shown(match[0])} should be a range of at most {_MOST:,} numbers")
        # All names have the range in the same place, since numbers that take its place have its width or more.
        names = [_RANGE.sub(f"{n:0{len(match[1])}}", name, count=1) for name in names for n in range(first, last + 1)]
    files = [Path(name) for name in names]
    missing = [file for file in files if kind_of(file, option) != "file"]
    if missing:
        raise UserError(
            f"data_source.{option}: {len(missing)} of {len(files)} files are missing: {shown(missing[0].absolute())}"
            f"{' and others' if len(missing) > 1 else ''}"
        )
    return files


def in_folder(folder: Path, option: str, suffix: str, *, alone: bool = False) -> tuple[list[Path], list[Path]]:
    """Training files of a folder, and the test files beside them.

    Without files named `train*`, all files are training files, unless the folder is that of the test images.
    `alone` does not look for test files.

    Raises:
        UserError: as `find_files`.
    """
    files = sorted(file for file in folder.glob(f"*{suffix}") if not file.name.startswith("."))
    if not files:
        raise UserError(f"data_source.{option}: {shown(folder.absolute())} holds no {suffix} files")
    train = [file for file in files if file.name.startswith("train")]
    if alone or (not train and option == "path"):
        return whole(train or files), []
    test = [file for file in files if file.name.startswith("test")]
    validation = [file for file in files if file.name.startswith("val")]
    if test and validation:
        raise UserError(
            f"data_source.{option}: {shown(folder.absolute())} holds both test and validation files; name the ones to "
            "measure on as test_path, for example with a glob"
        )
    return whole(train or files), whole(test or validation)


def whole(files: list[Path]) -> list[Path]:
    """The same files, if no shard of a numbered series is missing.

    Raises:
        UserError: one is.
    """
    series: dict[tuple[Path, str, str, int], set[int]] = {}
    for file in files:
        if match := _SHARD.fullmatch(file.name):
            key = (file.parent, match["stem"], file.suffix, int(match["total"]))
            series.setdefault(key, set()).add(int(match["number"]))
    for (parent, stem, suffix, total), numbers in series.items():
        missing = sorted(set(range(total)) - numbers)
        if missing:
            raise UserError(
                f"{len(missing)} of {total} shards are missing in {shown(parent)}: {shown(stem)}-{missing[0]:05d}-of-"
                f"{total:05d}{suffix}{' and others' if len(missing) > 1 else ''}; download the rest, or give a glob or "
                "a file that is not numbered"
            )
    return files
