"""CIFAR-10: three layouts, MD5s, and a download that leaves nothing half done. Nothing is ever fetched here."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import socket
import tarfile
import threading
import urllib.error
import urllib.request
from contextlib import closing

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from sslkit.api import DataInfo
from sslkit.errors import UserError
from sslkit_datasets import CIFAR10
from sslkit_datasets import cifar10 as module

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
URLOPEN = urllib.request.urlopen
BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


class AsPython2(pickle.Pickler):
    """Writes the type of an array as Python 2 did in the official files: with 0 and 1 for False and True."""

    def reducer_override(self, value):
        if isinstance(value, np.dtype):
            return np.dtype, (value.str[1:], 0, 1), value.__reduce__()[2]
        return NotImplemented


def pickled(value):
    file = io.BytesIO()
    AsPython2(file, 2).dump(value)
    return file.getvalue()


def members():
    random = np.random.default_rng(0)
    made = {}
    for name in BATCHES:
        pixels, labels = random.integers(0, 256, (4, 3072), dtype=np.uint8), random.integers(0, 10, 4).tolist()
        made[name] = pickled({"data": pixels, "labels": labels, "batch_label": name})
    return made | {"batches.meta": pickled({"label_names": NAMES, "num_vis": 3072})}


def archive_of(contents):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, content in contents.items():
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def md5(content):
    return hashlib.md5(content).hexdigest()


class Sentinel:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture
def files():
    return members()


@pytest.fixture(autouse=True)
def official(monkeypatch, files):
    """Torchvision's class, as if the small files of this test were the official ones; and no network."""

    def refuse(*arguments, **options):
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    theirs = module._official()
    monkeypatch.setattr(theirs, "train_list", [[name, md5(files[name])] for name in BATCHES[:5]])
    monkeypatch.setattr(theirs, "test_list", [["test_batch", md5(files["test_batch"])]])
    monkeypatch.setattr(theirs, "meta", theirs.meta | {"md5": md5(files["batches.meta"])})
    return theirs


@pytest.fixture
def root(tmp_path):
    (tmp_path / "cifar10").mkdir()
    return tmp_path / "cifar10"


@pytest.fixture
def said():
    return []


@pytest.fixture
def opened(tmp_path, said):
    return lambda **options: CIFAR10(**options).build(DataInfo(0, tmp_path, said.append))


def unpack(root, files):
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


# ---------------------------------------------------------------- official batches


@pytest.mark.filterwarnings("ignore")
def test_batches_are_torchvisions(root, files, opened, official):
    unpack(root, files)
    found = opened()
    for images, train in [(found.train, True), (found.test, False)]:
        theirs = official(str(root), train=train)
        assert np.array_equal(images.tensor.permute(0, 2, 3, 1), theirs.data)
        assert images.labels.tolist() == theirs.targets
        assert images.labels.dtype == torch.int64
    assert found.class_names == tuple(theirs.classes) == module.CLASS_NAMES
    assert (len(found.train), len(found.test), list(found.bad)) == (20, 4, [])


def test_archive_is_read_and_not_unpacked(root, files, opened):
    folder = unpack(root, files)
    expected = opened()
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    (root / "cifar-10-python.tar.gz").write_bytes(archive_of(files))
    found = opened()
    assert torch.equal(found.train.tensor, expected.train.tensor)
    assert torch.equal(found.test.labels, expected.test.labels)
    assert found.fingerprint == expected.fingerprint
    assert [path.name for path in root.iterdir()] == ["cifar-10-python.tar.gz"]


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
@pytest.mark.parametrize("packed", [True, False])
def test_another_md5_is_refused_before_unpickling(tmp_path, root, files, opened, name, packed):
    files[name] = pickle.dumps(Sentinel(tmp_path / "pwned"))
    if packed:
        (root / "cifar-10-python.tar.gz").write_bytes(archive_of(files))
    else:
        unpack(root, files)
    with pytest.raises(
        UserError, match=f"{name} is not the official file .MD5 {md5(files[name])}, should be .* delete"
    ):
        opened()
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("packed", [True, False])
def test_a_missing_batch(root, files, opened, packed):
    del files["data_batch_5"]
    if packed:
        (root / "cifar-10-python.tar.gz").write_bytes(archive_of(files))
    else:
        unpack(root, files)
    with pytest.raises(UserError, match=r"data_batch_5 is missing; delete"):
        opened()


@pytest.mark.parametrize("packed", [False, True])
def test_a_pickle_that_runs_code_does_not_run_even_with_the_official_md5(
    tmp_path, root, files, opened, official, monkeypatch, packed
):
    files["data_batch_1"] = pickle.dumps({"data": Sentinel(tmp_path / "ran"), "labels": []})
    monkeypatch.setattr(official, "train_list", [[name, md5(files[name])] for name in BATCHES[:5]])
    if packed:
        (root / module.ARCHIVE).write_bytes(archive_of(files))
    else:
        unpack(root, files)
    with pytest.raises(UserError, match=r"data_batch_1 is not the official file: it names (_io|io)\.open"):
        opened()
    assert not (tmp_path / "ran").exists()


def test_an_archive_that_is_damaged(root, files, opened):
    whole = archive_of(files)
    for content in (b"", b"<html>", whole[: len(whole) // 2], whole[:500] + bytes(500) + whole[1000:]):
        (root / "cifar-10-python.tar.gz").write_bytes(content)
        with pytest.raises(UserError, match=r"cifar-10-python.tar.gz.* delete .* to download it again"):
            opened()


def test_an_archive_with_links_and_bombs(root, files, opened, monkeypatch):
    path = root / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        link = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(UserError, match=r"data_batch_1 is not the official file"):
        opened()
    path.write_bytes(archive_of(files))
    monkeypatch.setattr(module, "_MEMBER_LIMIT", 100)
    with pytest.raises(UserError, match=r"data_batch_1 is not the official file"):
        opened()


# ---------------------------------------------------------------- Parquet


def write_parquet(path, seeds, *, column="img", names=NAMES, side=32, spoil=False):
    def png(seed):
        pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return {"bytes": b"" if spoil else file.getvalue(), "path": None}

    made = pa.table({column: [png(seed) for seed in seeds], "label": pa.array([s % 10 for s in seeds], pa.int64())})
    if names:
        meta = {"info": {"features": {"label": {"names": names}}}}
        made = made.replace_schema_metadata({"huggingface": json.dumps(meta)})
    pq.write_table(made, path)


@pytest.mark.parametrize("column", ["img", "image"])
def test_parquet(root, opened, column):
    write_parquet(root / "train-00001-of-00002.parquet", [3, 14], column=column)
    write_parquet(root / "train-00000-of-00002.parquet", [1, 12], column=column)
    write_parquet(root / "test-00000-of-00001.parquet", [25], column=column)
    found = opened()
    assert found.train.labels.tolist() == [1, 2, 3, 4]
    assert found.test.labels.tolist() == [5]
    assert found.class_names == tuple(NAMES)
    pixels = np.random.default_rng(3).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert np.array_equal(found.train.tensor[2].permute(1, 2, 0), pixels)


def test_parquet_without_class_names_has_those_of_cifar10(root, opened):
    write_parquet(root / "train.parquet", range(12), names=None)
    assert opened().class_names == tuple(NAMES)


def test_parquet_of_something_else(root, opened):
    write_parquet(root / "train.parquet", range(12), side=16)
    with pytest.raises(UserError, match=r"32 x 32 pixels; use data_source.parquet"):
        opened()
    write_parquet(root / "train.parquet", range(3), spoil=True)
    with pytest.raises(UserError, match=r"3 of 3 training images .* the files are damaged"):
        opened()


def test_batches_come_before_parquet(root, files, opened):
    write_parquet(root / "train.parquet", range(3))
    assert len(opened().train) == 3
    unpack(root, files)
    assert len(opened().train) == 20


def test_root(tmp_path, opened, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    write_parquet(tmp_path / "elsewhere" / "train.parquet", range(2))
    monkeypatch.chdir(tmp_path)
    assert len(opened(root="elsewhere").train) == 2
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(opened(root="~/elsewhere").train) == 2


# ---------------------------------------------------------------- download


@pytest.mark.parametrize("options", [{}, {"download": False}])
def test_one_message_without_network(tmp_path, opened, options):
    with pytest.raises(UserError) as raised:
        opened(**options)
    text = str(raised.value)
    layouts = ["cifar-10-python.tar.gz", "cifar-10-batches-py/", "train*.parquet and test*.parquet"]
    reason = "data_source.download is false" if options else "no network in tests"
    remedies = ["data_source.root", "SSLKIT_DATA", "sslkit train quickstart"]
    for needed in [str(tmp_path / "cifar10"), reason, *layouts, *remedies]:
        assert needed in text
    assert not list(tmp_path.glob("cifar10/*.gz"))


def test_download_false_asks_nobody(root, opened, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: pytest.fail("asked the network"))
    with pytest.raises(UserError):
        opened(download=False)
    assert list(root.iterdir()) == []


def left(root):
    """What lies in the folder, without the lock."""
    return sorted(path.name for path in root.iterdir() if path.name != ".download.lock")


def test_download(root, files, opened, said, monkeypatch, official):
    content = archive_of(files)
    monkeypatch.setattr(official, "tgz_md5", md5(content))
    requests, named = [], []

    class Watched(Answer):
        def read(self, size):
            named.append((root / "cifar-10-python.tar.gz").exists())
            return super().read(size)

    def answer(url, timeout):
        requests.append(url)
        return Watched(content)

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    (root / ".download-killed.part").write_bytes(b"left by a process that was killed")
    assert len(opened().train) == 20
    assert left(root) == ["cifar-10-python.tar.gz"]
    assert (root / "cifar-10-python.tar.gz").read_bytes() == content
    assert len(said) == 1
    assert official.url in said[0]
    assert len(opened().train) == 20
    assert requests == [official.url]
    assert len(named) > 1
    assert not any(named)  # the archive has its name only when it is whole


class Answer:
    """What urlopen gives, cut short or broken off at will."""

    def __init__(self, content, error=None):
        self.file, self.error = io.BytesIO(content), error
        self.headers = {"Content-Length": str(len(content))}

    def read(self, size):
        block = self.file.read(min(size, 500))
        if not block and self.error is not None:
            raise self.error
        return block

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (ConnectionResetError("reset"), UserError),
        (TimeoutError("timed out"), UserError),
        (module.http.client.IncompleteRead(b"", 9), UserError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (None, UserError),
    ],
)
def test_a_broken_download_leaves_nothing(root, files, opened, monkeypatch, official, error, raised):
    content = archive_of(files)
    monkeypatch.setattr(official, "tgz_md5", md5(content))
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: Answer(content[:-700], error))
    with pytest.raises(raised) as caught:
        opened()
    assert left(root) == []
    if error is None:
        assert "is not the official archive" in str(caught.value)
    elif raised is UserError:
        assert "sslkit train quickstart" in str(caught.value)


def test_processes_that_start_together_download_once(root, files, opened, monkeypatch, official):
    content = archive_of(files)
    monkeypatch.setattr(official, "tgz_md5", md5(content))
    requests, sizes = [], []
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: requests.append(1) or Answer(content))
    threads = [threading.Thread(target=lambda: sizes.append(len(opened().train))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sizes == [20, 20, 20]
    assert requests == [1]


def test_a_place_that_cannot_be_written(tmp_path, opened):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"could not be downloaded: .*Not a directory"):
        opened(root=str(tmp_path / "file" / "cifar10"))


def test_a_real_server_that_hangs_up(root, opened, official, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", URLOPEN)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        monkeypatch.setattr(official, "url", f"http://127.0.0.1:{server.getsockname()[1]}/x")

        def hang_up():
            connection, _ = server.accept()
            with closing(connection):
                connection.recv(4096)
                connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 1000000\r\n\r\n" + bytes(1000))

        thread = threading.Thread(target=hang_up)
        thread.start()
        with pytest.raises(UserError, match="is not the official archive"):
            opened()
        thread.join()
    assert left(root) == []
