"""What lies where in a tar archive, without unpacking it and without reading what its members hold."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from sslkit.errors import UserError
from sslkit_datasets.images import kind_of, shown

_LONGEST = 2**20
"""Bytes of a header with a long name or with PAX records; tarfile would read any number that a header claims."""
_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in an archive."""

    name: str
    """As it stands there. It is never used as a path."""
    start: int
    length: int


def members(archive: Path, passed_over: list[str]) -> Iterator[Member]:
    """The regular files of an archive, in their order.

    Args:
        archive: an uncompressed tar file.
        passed_over: names of links, devices and sparse files are added to it; folders are not.

    Raises:
        UserError: it is no such file, or a damaged one.
    """
    if (kind := kind_of(archive, "path")) != "file":
        raise UserError(f"{shown(archive)} cannot be read as a tar archive: it is {kind}")
    try:
        with archive.open("rb") as file:
            _refuse_compressed(archive, file)
            with tarfile.open(fileobj=cast("BinaryIO", _Careful(file)), mode="r:") as tar:
                while (found := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # tarfile keeps all that it has seen
                    if found.isreg() and not found.issparse():
                        yield Member(found.name, found.offset_data, found.size)
                    elif not found.isdir():
                        passed_over.append(found.name)
                _check_end(archive, file, tar.offset)
    except UserError:
        raise
    except Exception as error:  # tarfile raises anything at all on a stranger's bytes
        text = "headers within headers" if isinstance(error, RecursionError) else _first_line(error)
        raise UserError(f"{shown(archive)} cannot be read as a tar archive: {text}") from None


class _Careful:
    """A file of which no more than a header's worth is read at a time."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int = -1) -> bytes:
        if not 0 <= count <= _LONGEST:
            raise tarfile.ReadError(f"a header of {count:,} bytes")
        return self._file.read(count)


def _refuse_compressed(archive: Path, file: BinaryIO) -> None:
    head = file.read(6)
    file.seek(0)
    packed = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd"}
    for magic, name in packed.items():
        if head.startswith(magic):
            raise UserError(
                f"{shown(archive)} is compressed with {name}, and so cannot be read from the middle; decompress it to "
                "a plain .tar (the images in it are compressed already)"
            )


def _check_end(archive: Path, file: BinaryIO, end: int) -> None:
    """tarfile takes whatever it does not know for the end of the archive; what is left then has to be zeros."""
    file.seek(end)
    at = end
    while block := file.read(_LONGEST):
        if block.strip(b"\0"):
            at += len(block) - len(block.lstrip(b"\0"))
            raise UserError(
                f"{shown(archive)} is damaged, or several archives joined: behind byte {at:,} there is more that is no "
                "member"
            )
        at += len(block)
    if at == 0:
        raise UserError(f"{shown(archive)} cannot be read as a tar archive: it is empty")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0]
