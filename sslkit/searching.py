"""The images of a folder that are nearest to some images."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from html import escape
from os import PathLike, fspath
from pathlib import Path, PurePath
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from PIL import Image
from torch import Tensor

from sslkit import page
from sslkit.api import FileReader
from sslkit.build import choose_device
from sslkit.data import cache_folder
from sslkit.embedding import embed_with, repeatable
from sslkit.encoder import encoder_of
from sslkit.errors import RunFailed, UserError, printable
from sslkit.feature_files import FORMAT, bad_samples_of, damaged, preparation, recorded
from sslkit.image_files import reader_of
from sslkit.looking import Unreadable
from sslkit.opened_run import Branch, OpenedRun, open_run
from sslkit.run_directory import cannot_lock
from sslkit.telling import tell

SIDE = 160
"""Of a picture on the page, in pixels."""


@dataclass(frozen=True)
class Neighbour:
    """An image that is near to a query."""

    path: str
    """Below the folder."""
    cosine: float
    """Of the two features, -1..1."""
    same_bytes: bool
    """Whether its file is the query's, or a copy of it."""
    sha256: str = field(repr=False)
    """Of its file."""


@dataclass(frozen=True)
class Nearest:
    """What was found for one query."""

    query: str
    neighbours: Sequence[Neighbour]
    """The nearest first."""
    median_cosine: float
    """Over all images of the folder: what a cosine of these features is worth."""


def command(
    run: str, queries: Sequence[str], folder: str, *, out: str, neighbours: int, branch: Branch,
    checkpoint: Literal["last", "best"] | int, device: Literal["auto", "cpu", "cuda"], as_json: bool,
) -> None:  # fmt: skip
    """What the command does; its options are in `sslkit.cli_use`."""
    found = search(
        run, queries, folder, branch, checkpoint, neighbours=neighbours, device=device, out=None if as_json else out,
        say=partial(tell, error=as_json),
    )  # fmt: skip
    if as_json:
        tell(json.dumps([asdict(nearest) for nearest in found], indent=2))


def search(
    run_dir: str | PathLike[str],
    queries: Sequence[str | PathLike[str]],
    folder: str | PathLike[str],
    branch: Branch = "evaluated",
    checkpoint: Literal["last", "best"] | int = "last",
    *,
    neighbours: int = 24,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    workers: int | None = None,
    out: str | PathLike[str] | None = None,
    say: Callable[[str], None] = lambda text: None,
    allow_local_code: bool = False,
) -> list[Nearest]:
    """The images below a folder whose features have the greatest cosine with those of each query.

    The folder's features are kept in `$SSLKIT_DATA/features`, and computed anew when a file or the weights changed.

    Args:
        run_dir: The run whose encoder is used.
        queries: Image files, in the folder or not.
        folder: Images at any depth, or a file that `embed` wrote with the same weights.
        branch, checkpoint, allow_local_code: As `open_run` takes them.
        neighbours: How many for each query.
        device: Where to compute; `auto` is CUDA where there is a device.
        workers: Threads that read files; without it one for each core.
        out: A page to write, which ends in `.html`; it is overwritten.
        say: Told what is worth a line.

    Returns:
        What was found for each query, in their order.

    Raises:
        UserError: a query or all of the folder cannot be read, or the file is of other weights.
        RunFailed: as `embed`.
    """  # fmt: skip
    given = Path(folder).expanduser()
    shown = None if out is None else page.page_path(fspath(out))
    named = [fspath(query) for query in ([queries] if isinstance(queries, str | PathLike) else queries)]
    opened = open_run(run_dir, branch, checkpoint, allow_local_code=allow_local_code)
    features, digests = _asked(opened, named, device)
    file, facts = _bank(opened, given, workers, device, say)
    found = _nearest(file, features, named, digests, neighbours)
    if shown is not None:
        pictures = _Pictures(Path(facts["folder"]), reader_of(opened, SIDE), own=file != given)
        page.save(shown, _document(opened, facts, found, pictures))
        each = f"{len(found[0].neighbours)} nearest of {facts['rows']:,} images"
        say(f"{shown}: the {each} for {len(named)} {'query' if len(named) == 1 else 'queries'}")
    return found


def _asked(
    opened: OpenedRun, queries: Sequence[str], device: Literal["auto", "cpu", "cuda"]
) -> tuple[Tensor, list[str]]:
    """Features float32 `[Q, D]` of the queries, and the SHA-256 of their files.

    Raises:
        UserError: one line for each that cannot be read, or for what is missing to read it.
    """
    reader, wrong, pixels, digests = reader_of(opened), [], [], []
    for query in queries:
        try:
            image, digest = reader.read(Path(query).expanduser())
        except Unreadable as error:
            wrong.append(f"{query}: {error}")
        else:
            pixels.append(image)
            digests.append(digest)
    if wrong:
        raise UserError(*wrong)
    encoder = encoder_of(opened).to(choose_device(device))
    with repeatable():
        return encoder.features(torch.stack(pixels), 256), digests


def _bank(
    opened: OpenedRun, folder: Path, workers: int | None, device: Literal["auto", "cpu", "cuda"],
    say: Callable[[str], None],
) -> tuple[Path, Mapping[str, Any]]:  # fmt: skip
    """The file of the folder's features, and what it says of itself."""
    own = preparation(opened)
    if folder.suffix == ".parquet" and folder.is_file():
        facts = recorded(folder)
        if facts is None:
            raise UserError(f"{folder}: holds no features that sslkit wrote; give a folder of images")
        if any(facts.get(key) != value for key, value in own.items()):
            raise UserError(f"{folder}: holds features of other weights or another preparation ({facts['run']}, "
                            f"{facts['branch']}, step {facts['step']}); give the folder of images")  # fmt: skip
        return folder, facts
    # Where it is told by what it is of, and replaced when files have changed.
    key = hashlib.sha256(json.dumps([FORMAT, str(folder.resolve()), own], sort_keys=True).encode()).hexdigest()[:16]
    file = cache_folder() / "features" / f"{key}.parquet"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _alone(file, say):
            if recorded(file) is None:
                for spoilt in (file, bad_samples_of(file)):
                    spoilt.unlink(missing_ok=True)
            done = embed_with(opened, folder, file, workers=workers, device=device, restart="where other", say=say)
    except OSError as error:
        raise RunFailed(f"{file}: cannot be written: {error.strerror}; set SSLKIT_DATA to a folder that can") from None
    return file, {**done.facts, "rows": done.rows}


@contextlib.contextmanager
def _alone(file: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Wait until no other process computes the features of the same folder: then they are there."""
    path = file.with_suffix(".lock")
    if cannot_lock(path):
        yield
        return
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say("another process computes the features of this folder; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _nearest(
    file: Path, features: Tensor, queries: Sequence[str], digests: Sequence[str], neighbours: int
) -> list[Nearest]:
    wanted = F.normalize(features, dim=1)
    parts = []
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as bank:
            for group in range(bank.num_row_groups):  # not at once: features may be larger than memory
                column = bank.read_row_group(group, columns=["feature"]).column(0).combine_chunks()
                rows = torch.from_numpy(column.flatten().to_numpy().copy()).view(len(column), features.shape[1])
                parts.append(F.normalize(rows, dim=1) @ wanted.T)
            known = bank.read(columns=["path", "sha256"])
        cosines = torch.cat(parts).clamp_(-1, 1)  # of equal features it may be a rounding above
        if known["path"].null_count or known["sha256"].null_count or not bool(cosines.isfinite().all()):
            raise ValueError("values are missing")
    except (OSError, pa.ArrowException, ValueError, RuntimeError) as error:
        raise damaged(file, error) from None
    order = cosines.sort(dim=0, descending=True, stable=True).indices[:neighbours]  # equals in the order of their names
    found = []
    for number, (query, digest) in enumerate(zip(queries, digests, strict=True)):
        near = known.take(pa.array(order[:, number].numpy())).to_pylist()
        values = cosines[order[:, number], number].tolist()
        listed = [(n["path"], cosine, n["sha256"]) for n, cosine in zip(near, values, strict=True)]
        neighbours_of = [Neighbour(path, cosine, sha == digest, sha) for path, cosine, sha in listed]
        found.append(Nearest(query, neighbours_of, float(cosines[:, number].median())))
    return found


# ---------------------------------------------------------------- the page

STYLE = """
.near { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); }
.near figure { margin: 0; min-width: 0; font-size: .85rem; }
.near figcaption strong { display: block; }
.near img, .near .none { display: block; width: 100%; height: auto; aspect-ratio: 1; border-radius: .3rem;
  border: 1px solid var(--line); padding: 0; }
.near .none { padding: .5rem; color: var(--soft); overflow: hidden; }
.near figcaption { color: var(--soft); } .near figcaption strong { color: var(--ink); font-weight: 500; }
.near .query img { border: 3px solid var(--ink); }
"""


@dataclass(frozen=True)
class _Pictures:
    """Reads what the page shows.

    A file of features may come from a stranger, who could name any picture of this machine in it. So of such a file
    only those are shown that hold the very bytes that its rows are of.
    """

    root: Path
    reader: FileReader
    own: bool
    """Whether the folder was given and not told by a file, so that its names were found there."""

    def query(self, name: str) -> str:
        return self._shown(Path(name).expanduser(), None)

    def found(self, near: Neighbour) -> str:
        below = PurePath(near.path)
        if below.is_absolute() or below.anchor or ".." in below.parts:
            raise Unreadable("would be outside the folder")
        return self._shown(self.root / below, None if self.own else near.sha256)

    def _shown(self, file: Path, sha256: str | None) -> str:
        pixels, digest = self.reader.read(file)
        if sha256 not in (None, digest):
            raise Unreadable("is not the one that the features are of")
        return _picture(pixels)


def _document(opened: OpenedRun, facts: Mapping[str, Any], found: Sequence[Nearest], pictures: _Pictures) -> str:
    text = (
        f"By the cosine of features, among {facts['rows']:,} images below {pictures.root}. The features are of the "
        f"{opened.branch} network of {opened.run} at step {opened.step}. A picture is the central square of its file, "
        "as the network is given it, but not as small."
    )
    body = ["<h1>Nearest images</h1>", f"<p>{_text(text)}</p>"]
    for nearest in found:
        body += [
            f"<h2>{_text(nearest.query)}</h2>",
            f"<p>The median cosine of this query with all images is {nearest.median_cosine:.3f}.</p>",
            '<div class="near">',
            _figure(partial(pictures.query, nearest.query), nearest.query, "query", "query"),
        ]
        for near in nearest.neighbours:
            said = f"{near.cosine:.3f}{', the same bytes' if near.same_bytes else ''}"
            body.append(_figure(partial(pictures.found, near), near.path, said))
        body.append("</div>")
    return page.document("Nearest images", body, styles=[STYLE])


def _figure(shown: Callable[[], str], name: str, said: str, kind: str = "found") -> str:
    try:
        picture = f'<img src="{shown()}" alt="{_text(name)}">'
    except Unreadable as error:
        picture = f'<span class="none">{_text(f"no picture: the file {error}")}</span>'
    except UserError as error:  # of pictures of this kind
        picture = f'<span class="none">{_text(f"no picture: {error}")}</span>'
    return f'<figure class="{kind}">{picture}<figcaption><strong>{said}</strong> {_text(name)}</figcaption></figure>'


def _picture(pixels: Tensor) -> str:
    """uint8 `[C, h, w]` as an address that carries the picture: three bands as colours, one as grey."""
    bands = pixels[:3] if len(pixels) >= 3 else pixels[:1]
    values = bands.permute(1, 2, 0).contiguous().numpy()
    file = io.BytesIO()
    Image.fromarray(values if len(bands) == 3 else values[..., 0]).save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _text(text: str) -> str:
    return escape(printable(text))
