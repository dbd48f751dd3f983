"""A folder that is written whole or not at all, and never over somebody else's."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from sslkit.errors import RunFailed, UserError
from sslkit.run_directory import died, read_json

TOLD = "sslkit.json"
"""The file that says what an exported folder is."""

WRITTEN_BY = "sslkit export"


_used: set[str] = set()
"""Names of folders beside exports that this process has in use. Others with its number are of one that was killed: in
a container that is started again, numbers recur."""


def refuse_foreign(folder: Path) -> None:
    """Refuse a folder that holds anything that an export did not write, or that was changed since.

    Raises:
        UserError: it does.
    """
    elsewhere = "give another folder to write to, or move it"
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{folder}: is {'a link' if folder.is_symlink() else 'a file'}; {elsewhere}")
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    told = read_json(folder / TOLD)
    files = told["files"] if isinstance(told.get("files"), dict) else {}
    if entries and told.get("written_by") != WRITTEN_BY:
        raise UserError(f"{folder}: is there, and sslkit export did not write it; {elsewhere}")
    for entry in entries:
        if entry.name == TOLD:
            continue
        if entry.name not in files or entry.is_symlink() or not entry.is_file():
            raise UserError(f"{entry}: sslkit export did not write this; {elsewhere}")
        if files[entry.name] != digest(entry):
            raise UserError(f"{entry}: was changed since it was written; {elsewhere}")


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tidy(folder: Path) -> None:
    """Bring back the earlier export, where a process was killed as it took its place, and remove what such left."""
    folder = Path(os.path.abspath(folder))  # noqa: PTH100 - "." has no name
    for kind in ("old", "tmp"):
        for left in sorted(folder.parent.glob(f".{glob.escape(folder.name)}.*.{kind}")):
            owner, at, host = left.name[len(folder.name) + 2 : -len(kind) - 1].partition("@")
            pid = owner.partition("-")[0]
            ours = at and pid.isdecimal() and left.is_dir() and not left.is_symlink()
            if not ours or left.name in _used or not _is_left(int(pid), host):
                continue
            with contextlib.suppress(OSError):  # another process may do the same
                if kind == "old" and not os.path.lexists(folder):
                    left.rename(folder)
                else:
                    shutil.rmtree(left, ignore_errors=True)


def _is_left(pid: int, host: str) -> bool:
    """Whether the process of this number whose names this one does not use is gone."""
    if (pid, host) == (os.getpid(), socket.gethostname()):
        return True
    return died({"status": "running", "pid": pid, "host": host})


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder`, which takes its place when the block ends, or is removed if it fails.

    Raises:
        UserError: there can be no such folder.
        RunFailed: the disk does not allow it.
    """
    shown, folder = folder, Path(os.path.abspath(folder))  # noqa: PTH100 - "." has no name
    mine = f".{folder.name}.{os.getpid()}-{secrets.token_hex(4)}@{socket.gethostname()}"
    staging, old = (folder.with_name(f"{mine}.{kind}") for kind in ("tmp", "old"))
    names = {staging.name, old.name}
    _used.update(names)
    try:
        with _written(shown, folder, staging, old):
            yield staging
    finally:
        _used.difference_update(names)


@contextlib.contextmanager
def _written(shown: Path, folder: Path, staging: Path, old: Path) -> Iterator[None]:
    """What `replacing` does, with the names of the folders; `shown` is what the user calls it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
    except OSError as error:
        raise UserError(f"{shown}: cannot be made: {error.strerror}; give another folder to write to") from error
    try:
        yield
        for path in staging.iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())  # or a power cut may leave names with nothing in them
        if folder.exists():
            refuse_foreign(folder)  # it may have come, or changed, in the meantime
            folder.rename(old)
        try:
            staging.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise RunFailed(f"{shown}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
