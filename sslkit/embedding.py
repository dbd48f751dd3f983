"""Features of a folder's images, with their paths, in a Parquet file. Resumable.

The file is made of parts, each in one piece, which are joined when all are there. A part follows from the weights, the
files and the size of a batch, so whatever was stopped and how often, the bytes that come out are the same.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sslkit.api import FileReader
from sslkit.build import choose_device
from sslkit.encoder import ImageEncoder, encoder_of
from sslkit.errors import RunFailed
from sslkit.feature_files import Embedded, Parts, Restart, Rows, damaged, facts_of, finished, output
from sslkit.image_files import Found, find, portions, reader_of
from sslkit.opened_run import Branch, OpenedRun, open_run
from sslkit.progress import counted
from sslkit.telling import tell
from sslkit.words import spoken

FEW = 3
"""Of those that are left out, how many are named in a line."""


def command(
    run: str, folder: str, *, out: str, branch: Branch, checkpoint: Literal["last", "best"] | int, batch: int,
    workers: int | None, restart: bool, device: Literal["auto", "cpu", "cuda"],
) -> None:  # fmt: skip
    """What the command does; its options are in `sslkit.cli_use`."""
    done = embed(
        run, folder, out, branch, checkpoint, batch=batch, workers=workers, restart=restart, device=device, say=tell,
    )  # fmt: skip
    if not done.anew:
        tell(f"{done.path}: holds the features of these images already: nothing to do")


def embed(
    run_dir: str | PathLike[str],
    folder: str | PathLike[str],
    out: str | PathLike[str],
    branch: Branch = "evaluated",
    checkpoint: Literal["last", "best"] | int = "last",
    *,
    batch: int = 256,
    workers: int | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    restart: bool = False,
    say: Callable[[str], None] = lambda text: None,
    allow_local_code: bool = False,
) -> Embedded:
    """Write the features of all images below a folder to a Parquet file, or go on with it.

    Args:
        run_dir: The run whose encoder is used.
        folder: Images at any depth. Those that cannot be read are named, and left out.
        out: The file to write, which ends in `.parquet`. Until it is complete its parts lie in `OUT.parts`.
        branch, checkpoint, allow_local_code: As `open_run` takes them.
        batch: Images at a time.
        workers: Threads that read files; without it one for each core.
        device: Where to compute; `auto` is CUDA where there is a device.
        restart: Begin anew, whatever features the file or its parts hold.
        say: Told what is worth a line.

    Raises:
        UserError: there is no such run or folder, no image can be read, or the file is of something else.
        RunFailed: a file was changed meanwhile, a part was damaged, or the disk is full.
    """  # fmt: skip
    path = output(Path(out).expanduser())
    opened = open_run(run_dir, branch, checkpoint, allow_local_code=allow_local_code)
    return embed_with(
        opened, folder, path, batch=batch, workers=workers, device=device, restart="always" if restart else "never",
        say=say,
    )  # fmt: skip


def embed_with(
    opened: OpenedRun,
    folder: str | PathLike[str],
    path: Path,
    *,
    batch: int = 256,
    workers: int | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    restart: Restart = "never",
    say: Callable[[str], None] = lambda text: None,
) -> Embedded:
    """As `embed`, with a run that was opened."""
    where = choose_device(device)
    reader = reader_of(opened)
    found = find(folder, reader.suffixes)
    facts = facts_of(opened, found, batch, where.type)
    parts = Parts(path, facts, len(found.names))
    begun, again = parts.begun(), list[int]()
    done = finished(path, facts, overwrite=begun or restart != "never")
    if done is not None and not begun and restart != "always":
        if not (again := _readable_now(reader, found, done, workers)):
            parts.tidy()
            return done
        say(f"{path}: of {len(found.names) - done.rows:,} images left out, can be read now: {len(again):,}")
    parts.beside()
    if found.displaced:
        say(found.displaced)
    if found.others:
        say(f"{found.root}: passed over files that do not end in {', '.join(found.suffixes)}: {found.others:,}")
    if found.hidden:
        say(f"{found.root}: passed over hidden files and folders: {found.hidden:,}")
    try:
        with parts.held(restart):
            if again:
                parts.take(again, found.names)
            missing = parts.missing()
            if len(missing) < len(parts.ranges):
                say(f"{len(parts.ranges) - len(missing)} of {len(parts.ranges)} parts are there already")
            if missing:
                say(_compute(opened, encoder_of(opened).to(where), reader, found, parts, missing, workers))
            left_out = [*found.problems, *parts.problems()]
            rows = parts.join(left_out)
            parts.remove()
    except OSError as error:
        words = spoken()
        same = f"{words.again} without {words.restart}" if restart == "always" else words.again
        raise RunFailed(f"{path}: cannot be written: {error.strerror or error}; what is written so far is kept, and "
                        f"{same} goes on from it") from error  # fmt: skip
    done = Embedded(path, facts, rows, left_out, anew=True)
    say(f"{path}: {rows:,} images, {facts['feature_dim']} numbers each")
    if left_out:
        named = ", ".join(f"{bad['path']} ({bad['problem']})" for bad in left_out[:FEW])
        more = f" and {len(left_out) - FEW} more" if len(left_out) > FEW else ""
        say(f"{done.bad_samples}: left out {len(left_out)} that cannot be read: {named}{more}")
    return done


def _readable_now(reader: FileReader, found: Found, done: Embedded, workers: int | None) -> list[int]:
    """Of the images that an output leaves out, those that can be read after all.

    A permission that was missing is seen in no file's size or time.
    """
    if done.rows == len(found.names):
        return []
    try:
        there = set(pq.read_table(done.path, columns=["path"], page_checksum_verification=True)["path"].to_pylist())
    except (OSError, pa.ArrowException) as error:
        raise damaged(done.path, error) from None
    tried = [range(i, i + 1) for i, name in enumerate(found.names) if name not in there]
    with contextlib.closing(portions(reader, found, tried, workers)) as read:
        return [i for portion in read for i in portion.read]


def _compute(
    opened: OpenedRun, encoder: ImageEncoder, reader: FileReader, found: Found, parts: Parts, missing: Sequence[int],
    workers: int | None,
) -> str:  # fmt: skip
    """Write the missing parts, and say how fast that went.

    Raises:
        RunFailed: features are not finite, or a file was changed meanwhile.
    """
    number = sum(len(parts.ranges[part]) for part in missing)
    batches = [batch for part in missing for batch in parts.batches(part)]
    began, waited, gathered = time.monotonic(), 0.0, Rows()
    with (
        repeatable(),
        counted("images", number) as advance,
        contextlib.closing(portions(reader, found, batches, workers)) as read,
    ):
        for part in missing:
            for _ in parts.batches(part):
                asked = time.monotonic()
                portion = next(read)
                waited += time.monotonic() - asked
                gathered.problems += portion.problems
                if portion.pixels is not None:
                    features = encoder.features(portion.pixels, len(portion.pixels))
                    if not bool(features.isfinite().all()):
                        broken = found.names[portion.read[int((~features.isfinite()).any(dim=1).nonzero()[0])]]
                        raise RunFailed(f"{opened.run}: the features of {broken} are not finite: the weights of step "
                                        f"{opened.step} are of no use; choose an earlier checkpoint")  # fmt: skip
                    gathered.add([found.names[i] for i in portion.read], features, portion.digests)
                advance(len(portion.positions))
            parts.write(part, gathered)
            gathered = Rows()
    seconds = max(time.monotonic() - began, 1e-3)
    return (
        f"{number:,} files in {seconds:.1f} s: {number / seconds:,.0f} a second, {waited / seconds:.0%} of the time "
        "waiting for them to be read"
    )


@contextlib.contextmanager
def repeatable() -> Iterator[None]:
    """A GPU computes the same every time, and in float32: TF32 keeps 10 bits of the fraction."""
    kept = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        torch.backends.cudnn.allow_tf32 = False
        yield
    finally:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = kept[:2]
        torch.backends.cudnn.allow_tf32 = kept[2]
