"""A part of a file that is a file itself: a member of an archive, read where it lies."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO


@dataclass(frozen=True, slots=True)
class Slice:
    """`length` bytes of a file from `start` on. Nothing is held open between reads, and any thread may read."""

    file: Path
    start: int
    length: int

    def read(self) -> bytes:
        """All bytes; fewer where the file ends before."""
        with self.file.open("rb") as file:
            file.seek(self.start)
            return file.read(self.length)

    def open(self) -> BinaryIO:
        """The part as a file of its own, to be read and sought in."""
        return io.BufferedReader(_Window(self))


class _Window(io.RawIOBase):
    def __init__(self, part: Slice) -> None:
        self._part, self._at = part, 0
        self._file = part.file.open("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._part.length}[whence]
        if base + offset < 0:
            raise OSError("a place before the beginning")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        wanted = max(0, min(len(buffer), self._part.length - self._at))
        self._file.seek(self._part.start + self._at)
        got = self._file.readinto(memoryview(buffer)[:wanted])
        self._at += got
        return got

    def close(self) -> None:
        self._file.close()
        super().close()
