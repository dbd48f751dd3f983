"""What lies in a folder of images: sizes, kinds, classes, and files that are equal or broken."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sslkit.api import DataInfo, Look
from sslkit.environment import cores
from sslkit.errors import UserError
from sslkit.progress import counted
from sslkit_datasets.arrays import Arrays
from sslkit_datasets.bad import TOO_MUCH, BadImageError
from sslkit_datasets.folder import Listing, list_sets
from sslkit_datasets.images import load, shown, state_of
from sslkit_datasets.kinds import Kind, kind_of_image

if TYPE_CHECKING:
    from sslkit_datasets import Folder

_MANY = 2000
"""Images from which on looking takes long enough for a progress bar."""
_RANGED = 200
"""Images of more than 8 bits whose values are looked at."""
_VALUES = 4096
"""Values that are taken of one such image, evenly over it."""


@dataclass(frozen=True)
class _Seen:
    """One file that was decoded."""

    kind: Kind | None
    problem: str | None
    seconds: float


def look_at(spec: Folder, info: DataInfo, limit: int = 0) -> Look:
    """Look at a folder as it would be opened.

    Raises:
        UserError: it could not be, whatever the images are.
    """
    listings = list_sets(spec, info)
    root = Path(spec.root).expanduser()
    files = [(listing, name) for listing in listings.values() for name in listing.names]
    paths = [listing.root / name for listing, name in files]
    states = [state_of(path) for path in paths]
    chosen = _spread(len(files), limit)
    arrays = Arrays(axes=spec.axes)
    ranged = set(_spread(len(chosen), _RANGED))
    with (
        warnings.catch_warnings(),
        counted("looking at images", len(chosen) if len(chosen) > _MANY else None) as advance,
        ThreadPoolExecutor(spec.workers or cores()) as pool,
    ):
        warnings.filterwarnings("ignore", module=r"PIL\.")

        def see(at: int) -> _Seen:
            seen = _see(paths[chosen[at]], arrays, values=at in ranged)
            advance(1)
            return seen

        seen = list(pool.map(see, range(len(chosen))))
        equal = _equal(paths, [size for size, _ in states], pool)
    kinds = [s.kind for s in seen if s.kind is not None]
    _refuse_other_bands({paths[at]: s.kind for at, s in zip(chosen, seen, strict=True) if s.kind is not None}, root)
    train = len(listings["training"].names)
    names = [_below(root, path) for path in paths]
    return Look(
        files=train,
        test_files=len(files) - train,
        looked_at=len(chosen),
        bytes=sum(max(0, size) for size, _ in states),
        unreadable=[
            {"path": names[chosen[i]], "problem": s.problem} for i, s in enumerate(seen) if s.problem is not None
        ],
        heights=[kind.height for kind in kinds],
        widths=[kind.width for kind in kinds],
        modes=dict(Counter(kind.name for kind in kinds).most_common()),
        channels=_common([kind.channels for kind in kinds]),
        classes=_counts(listings["training"]),
        test_classes=_counts(listings["test"]) if "test" in listings else None,
        duplicates=[[names[i] for i in group if i < train] for group in equal if sum(i < train for i in group) > 1],
        in_both=[[names[i] for i in group] for group in equal if min(group) < train <= max(group)],
        value_range=_range([kind.values for kind in kinds if kind.values is not None]),
        seconds_per_image=float(np.mean([s.seconds for s in seen])),
    )


def _spread(count: int, limit: int) -> list[int]:
    """At most `limit` of `count` positions, evenly spread; all where it is 0."""
    if not 0 < limit < count:
        return list(range(count))
    return [int(i) for i in np.linspace(0, count - 1, limit)]


def _see(path: Path, arrays: Arrays, *, values: bool) -> _Seen:
    before = time.perf_counter()
    try:
        kind, problem = kind_of_image(load(path), _VALUES if values else 0, arrays), None
    except BadImageError as error:
        kind, problem = None, str(error)
    except MemoryError:
        kind, problem = None, TOO_MUCH
    return _Seen(kind, problem, time.perf_counter() - before)


def _equal(paths: Sequence[Path], sizes: Sequence[int], pool: ThreadPoolExecutor) -> list[list[int]]:
    """Groups of files with the same bytes. Only files of the same length are read."""
    lengths = Counter(sizes)
    suspects = [i for i, size in enumerate(sizes) if size > 0 and lengths[size] > 1]
    groups: dict[bytes, list[int]] = {}
    for i, digest in zip(suspects, pool.map(lambda i: _digest(paths[i]), suspects), strict=True):
        if digest is not None:
            groups.setdefault(digest, []).append(i)
    return [group for group in groups.values() if len(group) > 1]


def _digest(path: Path) -> bytes | None:
    try:
        return hashlib.sha256(load(path)).digest()
    except BadImageError:  # told with the unreadable ones
        return None


def _refuse_other_bands(kinds: Mapping[Path, Kind], root: Path) -> None:
    """Pictures become grey or colours as a recipe wants them; the bands of arrays are taken as they are."""
    having: dict[int, list[Path]] = {}
    for path, kind in kinds.items():
        if kind.array:
            having.setdefault(kind.channels, []).append(path)
    if len(having) < 2:
        return
    found = sorted(having.items(), key=lambda bands: -len(bands[1]))
    words = "; ".join(f"{len(paths):,} of {_bands(n)}, as {_below(root, paths[0])}" for n, paths in found[:4])
    raise UserError(
        f"{shown(root)}: the images differ in their bands ({words}), and a network takes one number of them: leave "
        f"those of {_bands(found[0][0])} here, and move the others away; or write a recipe by hand, with bands that "
        "all have (data_source.bands)"
    )


def _bands(number: int) -> str:
    return f"{number} band{'s' * (number > 1)}"


def _common(channels: Sequence[int]) -> int:
    """Of pictures 1 where all are grey, 3 for colours or grey among them; the bands that all arrays have."""
    return max(channels, default=3)


def _counts(listing: Listing) -> Mapping[str, int] | None:
    if listing.classes is None:
        return None
    counted = Counter(name.partition("/")[0] for name in listing.names)
    return {shown(name): counted[name] for name in listing.classes}


def _range(values: Sequence[NDArray[np.float64]]) -> tuple[float, float] | None:
    if not values:
        return None
    low, high = np.percentile(np.concatenate(values), (0.1, 99.9))
    return float(low), float(high)


def _below(root: Path, path: Path) -> str:
    return shown(path.relative_to(root).as_posix() if path.is_relative_to(root) else path)
