"""Encoded images that are read a block at a time and kept for a while, since more of the block are wanted soon."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from sslkit.errors import UserError

Block = Sequence[bytes | None]


class Blocks:
    """The blocks used last, up to `limit` bytes of them. Used by several threads: each block is read by one of them.

    Args:
        read: gives a block by its number, or raises.
        limit: bytes of image files. Of blocks that are larger, the one that is in use is kept.
    """

    def __init__(self, read: Callable[[int], Block], limit: int) -> None:
        self._read, self._limit = read, limit
        self._lock = threading.Lock()
        self._blocks: OrderedDict[int, Future[Block]] = OrderedDict()
        self._bytes: dict[int, int] = {}

    def __getitem__(self, number: int) -> Block:
        with self._lock:
            found = self._blocks.get(number)
            if found is not None:
                self._blocks.move_to_end(number)
                mine = None
            else:
                mine = self._blocks[number] = Future()
        if mine is None:
            assert found is not None
            return found.result()
        try:
            block = self._read(number)
        except BaseException as error:
            with self._lock:
                del self._blocks[number]
            mine.set_exception(error)
            raise
        self._keep(number, sum(len(data or b"") for data in block))
        mine.set_result(block)
        return block

    def _keep(self, number: int, length: int) -> None:
        with self._lock:
            self._bytes[number] = length
            for old in list(self._blocks):
                if sum(self._bytes.values()) <= self._limit:
                    return
                if old != number and old in self._bytes:  # one that is still being read has no length yet
                    del self._blocks[old], self._bytes[old]


def check_room(lengths: Sequence[int], images: int, window: int | None, cache_gb: float, remedy: str) -> None:
    """Refuse a window whose blocks do not fit into the cache: most of them would be read again for every image.

    Args:
        lengths: bytes of each block.
        images: how many there are in all of them.
        window: as for `order.windowed`; None where images are read in their order.
        cache_gb: the limit, in gigabytes.
        remedy: what to do about blocks that are too large, as the end of a sentence.

    Raises:
        UserError: they do not.
    """
    limit, largest, total = cache_gb * 1e9, max(lengths), sum(lengths)
    if 2 * largest > limit:
        raise UserError(
            f"data_source.cache_gb: two blocks of images are held at least, one takes {largest / 1e9:.2g} GB, and "
            f"cache_gb is {cache_gb:g}; raise it, or {remedy}"
        )
    if window is None:
        return
    taken = min(total, total / images * window + 2 * largest)
    if taken > limit:
        most = int((limit - 2 * largest) / (total / images))
        raise UserError(
            f"data_source.window: {window} images and the blocks at both ends take {taken / 1e9:.2g} GB, more than "
            f"cache_gb = {cache_gb:g}; raise cache_gb, or set window to {most} at most"
        )
