"""CIFAR-10 from the official batches or from Parquet files, and its download."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import io
import pickle
import stat
import tarfile
import tempfile
import urllib.request
import warnings
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock

from sslkit.api import DataInfo
from sslkit.errors import UserError
from sslkit.progress import counted
from sslkit_datasets import parquet
from sslkit_datasets.images import Fingerprint, InMemory, Opened, shown
from sslkit_datasets.shards import in_folder

if TYPE_CHECKING:
    from sslkit_datasets import CIFAR10

FOLDER, ARCHIVE = "cifar-10-batches-py", "cifar-10-python.tar.gz"
CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_MEMBER_LIMIT = 64 * 2**20  # an official batch has 31 MB
_UNPACKED_LIMIT = 256 * 2**20  # the official archive unpacks to 186 MB
_DOWNLOAD_LIMIT = 256 * 2**20  # and has 170 MB itself
_TIMEOUT = 30  # seconds without a byte


def open_cifar10(spec: CIFAR10, info: DataInfo) -> Opened:
    """Find CIFAR-10, or download it, and read it.

    Raises:
        UserError: it is nowhere to be had, or what is there is damaged.
    """
    root = Path(spec.root).expanduser() if spec.root is not None else info.cache / "cifar10"
    found = _read(root, info)
    if found is not None:
        return found
    if not spec.download:
        raise _missing(root, "data_source.download is false")
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Several processes of one run come here together: one downloads, the others find what it left.
        with FileLock(root / ".download.lock"):
            if not (root / ARCHIVE).exists():
                _download(root, info.say)
    except (OSError, http.client.HTTPException) as error:
        raise _missing(root, f"it could not be downloaded: {_first_line(error)}") from None
    found = _read(root, info)
    if found is None:
        raise UserError(f"{shown((root / ARCHIVE).absolute())} is not a regular file; remove it and repeat the command")
    return found


def _read(root: Path, info: DataInfo) -> Opened | None:
    if (root / FOLDER).is_dir():
        return _read_batches(root / FOLDER, partial(_member_file, root / FOLDER))
    if (root / ARCHIVE).is_file():
        return _read_archive(root / ARCHIVE)
    if any(root.glob("train*.parquet")):
        return _read_parquet(root, info)
    return None


def _missing(root: Path, reason: str) -> UserError:
    url = _official().url
    return UserError(
        f"CIFAR-10 is not in {shown(root.absolute())} ({reason})",
        f"  put one of these there: {ARCHIVE} or the folder {FOLDER}/ (from {url}),",
        "  or train*.parquet and test*.parquet with the columns img (struct<bytes, path>) and label (int64);",
        "  or name the folder that has them: data_source.root, or SSLKIT_DATA for the folder above cifar10/",
        "  to try sslkit without any download: sslkit train quickstart",
    )


def _official() -> Any:
    # Its names, MD5s and address are used, its download is not: that writes under the final name from the first byte,
    # falls back to http, and unpacks the archive.
    from torchvision.datasets import CIFAR10

    return CIFAR10


# ---------------------------------------------------------------- official batches


def _read_archive(archive: Path) -> Opened:
    try:
        with _Bounded(archive) as unpacked, tarfile.open(fileobj=unpacked, mode="r:") as tar:

            def member(name: str) -> bytes:
                try:
                    found = tar.getmember(f"{FOLDER}/{name}")
                except KeyError:
                    raise FileNotFoundError(name) from None
                content = tar.extractfile(found) if found.isfile() and found.size <= _MEMBER_LIMIT else None
                if content is None:
                    raise UserError(f"{shown(archive)}: {name} is not the official file; {_again(archive)}")
                return content.read()

            return _read_batches(archive, member)
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise UserError(f"{shown(archive)} is damaged ({_first_line(error)}); {_again(archive)}") from None


def _member_file(folder: Path, name: str) -> bytes:
    path = folder / name
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > _MEMBER_LIMIT:  # a pipe would be waited for
            raise UserError(f"{shown(folder)}: {name} is not the official file; {_again(folder)}")
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{shown(path.absolute())} cannot be read: {error.strerror}") from None


class _Bounded(gzip.GzipFile):
    """An archive that says where it ends before a bomb in it fills the memory, or the day."""

    def read(self, size: int | None = -1) -> bytes:
        most = min(_MEMBER_LIMIT + tarfile.RECORDSIZE, _UNPACKED_LIMIT - self.tell())
        if size is None or not 0 <= size <= most:
            raise tarfile.ReadError("it unpacks to more than the official one")
        return super().read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence == 0 and offset > _UNPACKED_LIMIT:
            raise tarfile.ReadError("it unpacks to more than the official one")
        return super().seek(offset, whence)


class _Arrays(pickle.Unpickler):
    """Reads dicts of lists, texts and NumPy's arrays, as the batches are; whatever else is named is not imported."""

    def find_class(self, module: str, name: str) -> Any:
        arrays = module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct"
        if arrays or (module, name) in {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no batch of images needs")


def _read_batches(place: Path, member: Callable[[str], bytes]) -> Opened:
    """Read the batches, whose content `member` gives by name."""
    official = _official()
    fingerprint = Fingerprint(source="cifar10", layout="batches")

    def load(name: str, md5: str) -> dict[str, Any]:
        try:
            content = member(name)
        except FileNotFoundError:
            raise UserError(f"{shown(place)}: {name} is missing; {_again(place)}") from None
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if found != md5:
            raise UserError(
                f"{shown(place)}: {name} is not the official file (MD5 {found}, should be {md5}); {_again(place)}"
            )
        fingerprint.add(name, found)
        with warnings.catch_warnings():
            # Some releases of NumPy warn of how Python 2 wrote the arrays' type.
            warnings.filterwarnings("ignore", message=r"dtype\(\): align")
            try:
                return _Arrays(io.BytesIO(content), encoding="latin1").load()  # type: ignore[no-any-return]
            except pickle.UnpicklingError as error:
                raise UserError(f"{shown(place)}: {name} is not the official file: {error}; {_again(place)}") from None

    def images(batches: list[dict[str, Any]]) -> InMemory:
        pixels = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
        labels = [label for batch in batches for label in batch["labels"]]
        return InMemory(torch.from_numpy(pixels), torch.tensor(labels, dtype=torch.int64))

    train = images([load(name, md5) for name, md5 in official.train_list])
    test = images([load(name, md5) for name, md5 in official.test_list])
    meta = load(official.meta["filename"], official.meta["md5"])
    return Opened(train, test, tuple(meta[official.meta["key"]]), fingerprint.hexdigest())


def _again(place: Path) -> str:
    return f"delete {shown(place.absolute())} and repeat the command to download it again"


# ---------------------------------------------------------------- Parquet


def _read_parquet(root: Path, info: DataInfo) -> Opened:
    train, test = in_folder(root, "root", ".parquet")
    opened = parquet.read_sets(train, test, parquet.Options(advice="; the files are damaged"), info)
    tensor, labels = opened.train.tensor, opened.train.labels
    if tensor is None or tensor.shape[1:] != (3, 32, 32):
        raise UserError(f"{shown(root)}: images of CIFAR-10 have 32 x 32 pixels; use data_source.parquet for others")
    if opened.class_names is None and labels is not None:
        if int(labels.max()) >= len(CLASS_NAMES):
            raise UserError(f"{shown(root)}: CIFAR-10 has 10 classes; use data_source.parquet for other images")
        opened.class_names = CLASS_NAMES
    return opened


# ---------------------------------------------------------------- download


def _download(root: Path, say: Callable[[str], None]) -> None:
    """Fetch the archive; it gets its name when it is complete and its MD5 is right.

    Raises:
        OSError, http.client.HTTPException: no network, no space, no permission.
        UserError: what came is not the official archive.
    """
    official = _official()
    say(f"downloading CIFAR-10 (170 MB) from {official.url} to {shown(root.absolute())}")
    for stale in root.glob(".download-*.part"):  # of a process that was killed: the lock is ours
        stale.unlink()
    md5 = hashlib.md5(usedforsecurity=False)
    with tempfile.NamedTemporaryFile(dir=root, prefix=".download-", suffix=".part", delete=False) as part:
        try:
            with urllib.request.urlopen(official.url, timeout=_TIMEOUT) as answer:
                length = answer.headers.get("Content-Length")
                with counted("CIFAR-10", int(length) if length else None, size_in_bytes=True) as advance:
                    while block := answer.read(2**18):
                        part.write(block)
                        md5.update(block)
                        if part.tell() > _DOWNLOAD_LIMIT:
                            raise OSError(f"{official.url} sends more than the official archive has")
                        advance(len(block))
            part.close()
            if md5.hexdigest() != official.tgz_md5:
                raise UserError(
                    f"what {official.url} sent is not the official archive (MD5 {md5.hexdigest()}, should be "
                    f"{official.tgz_md5}); repeat the command, or check for a proxy that answers in its place"
                )
            Path(part.name).replace(root / ARCHIVE)
        except BaseException:
            Path(part.name).unlink(missing_ok=True)
            raise


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0]
