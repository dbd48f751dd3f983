"""Tar shards: which samples there are, what is read of them, and what is refused."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sslkit.api import DataInfo
from sslkit.errors import RunFailed, UserError
from sslkit_datasets import WebDataset
from sslkit_datasets import webdataset as module
from sslkit_datasets.decode import decode
from sslkit_datasets.tars import members

Open = Callable[..., Any]


def image(seed: int, width: int = 9, height: int = 7) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def shard(path: Path, files: Mapping[str, bytes], kind: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


IMAGES = [image(i, 5 + i, 20 - i) for i in range(12)]


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three shards of four images; classes 0 and 1; masks and texts beside the images."""
    place = tmp_path / "shards"
    place.mkdir()
    for number in range(3):
        files = {}
        for i in range(4 * number, 4 * number + 4):
            files |= {
                f"./{i:03}.png": IMAGES[i],
                f"./{i:03}.seg.png": image(99),
                f"./{i:03}.cls": f"{i % 2}\n".encode(),
                f"./{i:03}.json": json.dumps({"kind": "ab"[i % 2], "n": i}).encode(),
            }
        shard(place / f"train-{number:06}.tar", files)
    return place


@pytest.fixture
def opened(root: Path, tmp_path: Path, said: list[str]) -> Open:
    def open_with(**options: Any) -> Any:
        given = {"path": str(root), "size": 8, "workers": 2} | options
        return WebDataset(**given).build(DataInfo(0, tmp_path / "cache", said.append))

    return open_with


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("window", [None, 5])
def test_samples(opened: Open, window: int | None) -> None:
    found = opened(window=window)
    train = found.train
    assert (len(train), found.test, found.class_names, list(found.bad)) == (12, None, None, [])
    assert train.labels.tolist() == [0, 1] * 6
    assert train.sizes.tolist() == [[20 - i, 5 + i] for i in range(12)]
    for i in (11, 0, 5, 5):
        assert np.array_equal(train.original(i), decode(IMAGES[i], 3, None))
    squares = np.stack([decode(data, 3, 8) for data in IMAGES])
    assert np.array_equal(train.read(torch.tensor([3, 11, 3])), squares[[3, 11, 3]])
    assert str(train.files[5]).endswith("train-000001.tar: ./005")
    again = pickle.loads(pickle.dumps(train))
    assert np.array_equal(again.original(7), decode(IMAGES[7], 3, None))
    assert hasattr(train, "order") is (window is not None)


@pytest.mark.parametrize("window", [None, 5])
def test_copies_in_both_sets_are_counted_where_only_headers_are_read(
    opened: Open, said: list[str], tmp_path: Path, window: int | None
) -> None:
    files = {}
    for i, data in enumerate([IMAGES[7], image(77), IMAGES[2]]):
        files |= {f"{i}.png": data, f"{i}.cls": b"0\n"}
    test = shard(tmp_path / "test.tar", files)
    opened(test_path=str(test), check="headers", window=window)
    assert said == ["2 of 3 test images are training images, too, byte for byte: take them out"]


def test_names_as_labels(opened: Open) -> None:
    found = opened(label="json:kind")
    assert (found.class_names, found.train.labels.tolist()) == (("a", "b"), [0, 1] * 6)
    assert opened(label="json:n").train.labels.tolist() == list(range(12))
    assert opened(label="none").train.labels is None
    assert opened(label="caption").train.labels is None


def test_grey(opened: Open) -> None:
    assert opened(channels=1).train.original(0).shape == (1, 20, 5)


def test_test_shards(opened: Open, root: Path) -> None:
    shard(root / "test-0.tar", {"x/1.png": IMAGES[0], "x/1.cls": b"1"})
    found = opened()
    assert (len(found.train), found.test.labels.tolist()) == (12, [1])
    alone = opened(path=str(root / "train-{000000..000001}.tar"), test_path=str(root / "train-000002.tar"))
    assert (len(alone.train), len(alone.test)) == (8, 4)


def test_a_shard_is_in_one_set(opened: Open, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"path": str(root / "train-{000000..000002}.tar"), "test_path": str(root / "train-000002.tar")}
    with pytest.raises(UserError, match=r"^data_source.test_path: .*train-000002.tar is a file of the training images"):
        opened(**both)
    monkeypatch.setattr(module, "_index", None)  # what is refused is refused before it is read
    with pytest.raises(UserError, match=r"^data_source.hold_out: there are test images already"):
        opened(**both | {"path": str(root / "train-000000.tar")}, hold_out=0.5)


def test_samples_in_other_shards_are_another_set_where_a_window_is_in_force(opened: Open, root: Path) -> None:
    before = [opened(window=window).fingerprint for window in (None, 5, 6)]
    for number, part in enumerate((range(2), range(2, 12))):
        files = {}
        for i in part:
            files |= {f"./{i:03}.png": IMAGES[i], f"./{i:03}.cls": f"{i % 2}\n".encode()}
        shard(root / f"train-{number:06}.tar", files)
    (root / "train-000002.tar").unlink()
    after = [opened(window=window).fingerprint for window in (None, 5, 6)]
    assert before[1] == before[2]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, False]


def test_hold_out(opened: Open) -> None:
    found = opened(hold_out=0.34, window=5)
    assert min(found.test.labels.bincount(minlength=2)) >= 1
    order = found.train.order(torch.Generator().manual_seed(0))
    assert order.sort().values.tolist() == list(range(12 - len(found.test)))
    names = sorted([*map(str, found.train.files), *map(str, found.test.files)])
    assert names == sorted(map(str, opened().train.files))


def test_an_order_reads_each_block_once(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 2500)
    train = opened(window=3).train
    assert len(train.encoded.blocks.unique()) > 3
    read: list[int] = []
    take = module._InBlocks.read
    monkeypatch.setattr(module._InBlocks, "read", lambda self, n: read.append(n) or take(self, n))
    train.encoded.in_blocks.cache = module.Blocks(train.encoded.in_blocks.read, 10_000)
    for i in train.order(torch.Generator().manual_seed(0)).tolist():
        assert np.array_equal(train.original(i), decode(IMAGES[i], 3, None))
    assert sorted(read) == sorted(set(train.encoded.blocks.tolist()))


@pytest.mark.parametrize("window", [None, 5])
def test_several_threads(opened: Open, window: int | None) -> None:
    train = opened(window=window).train
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(train.original, [i % 12 for i in range(96)]))
    assert all(np.array_equal(found[i], decode(IMAGES[i % 12], 3, None)) for i in range(96))


def test_nothing_is_unpacked_and_everything_is_remembered(
    opened: Open, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = opened()
    assert sorted(p.name for p in root.iterdir()) == [f"train-{i:06}.tar" for i in range(3)]
    monkeypatch.setattr(module, "survey", None)
    monkeypatch.setattr(module, "members", None)
    again = opened()
    assert (again.fingerprint, again.train.labels.tolist()) == (first.fingerprint, first.train.labels.tolist())
    for record in (tmp_path / "cache" / "checked").glob("*.json"):
        record.write_text("[[0], [1], [2], [3], 7]")
    monkeypatch.undo()
    assert opened().fingerprint == first.fingerprint


def test_fingerprint(opened: Open, root: Path) -> None:
    base = opened().fingerprint
    assert opened(max_bad=0.5, workers=1, cache_gb=1.0).fingerprint == base
    seen = {base} | {
        opened(**o).fingerprint for o in ({"size": 9}, {"channels": 1}, {"label": "none"}, {"hold_out": 0.3})
    }
    seen.add(opened(check="headers").fingerprint)
    shard(root / "train-000001.tar", {"004.png": IMAGES[5], "004.cls": b"0"})
    seen.add(opened().fingerprint)
    assert len(seen) == 7


# ---------------------------------------------------------------- what is broken or refused


def test_broken_images_and_samples_without_one(opened: Open, root: Path) -> None:
    shard(
        root / "train-000003.tar", {"a.png": IMAGES[0][:60], "a.cls": b"0", "b.cls": b"1", "c.png": b"", "c.cls": b"1"}
    )
    found = opened(max_bad=0.5)
    assert len(found.train) == 12
    assert [b["path"].rpartition(": ")[2] for b in found.bad] == ["a", "b", "c"]
    assert [b["problem"] for b in found.bad][1:] == ["has no bytes", "is empty (0 bytes)"]
    with pytest.raises(UserError, match=r"3 of 15 training images cannot be read .*raise data_source.max_bad"):
        opened()
    headers = opened(max_bad=0.5, check="headers")
    assert len(headers.train) == 13
    with pytest.raises(RunFailed, match=r"train-000003.tar: a cannot be decoded.*only its header was read"):
        headers.train.original(12)


@pytest.mark.parametrize("window", [None, 5])
def test_a_shard_that_changed_ends_the_run(opened: Open, root: Path, window: int | None) -> None:
    train = opened(window=window).train
    data = bytearray((root / "train-000000.tar").read_bytes())
    at = data.index(IMAGES[0])
    data[at : at + len(IMAGES[0])] = IMAGES[0][:-20] + bytes(20)
    (root / "train-000000.tar").write_bytes(data)
    with pytest.raises(RunFailed, match=r"train-000000.tar: ./000 "):
        train.original(0)
    assert train.original(1).shape == (3, 19, 6)
    (root / "train-000001.tar").unlink()
    with pytest.raises(RunFailed, match=r"train-000001.tar: ./004 .*cannot be read: No such file"):
        train.original(4)


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({"a": b"", "b/": b""}, {}, "holds no samples"),
        ({"a.gif": b"x"}, {}, r"no sample has a member that ends in .jpg or .jpeg or .png or .webp"),
        ({"a.jpg": b"x", "a.png": b"x"}, {}, r"the sample a has 2 images"),
        ({"a.jpg": b"x", "a.JPG": b"x"}, {}, r"the sample a has two members .jpg"),
        ({"a.png": IMAGES[0], "a.cls": b"1", "b.png": IMAGES[1]}, {}, r"1 of 2 training images have no label"),
        ({"a.png": IMAGES[0], "a.cls": b"-3"}, {}, r"class numbers from 0 to 99999: .*x.tar: a has -3"),
        ({"a.png": IMAGES[0], "a.cls": b"\xff\xfe"}, {}, r"the sample a: the member .cls cannot be read as a label"),
        ({"a.png": IMAGES[0], "a.cls": b""}, {}, r"should be a number or a name"),
        ({"a.png": IMAGES[0], "a.json": b"[" * 50000}, {"label": "json:x"}, r".json cannot be read as a label"),
        ({"a.png": IMAGES[0], "a.json": b'{"x": [1]}'}, {"label": "json:x"}, r"should be a number or a name"),
        ({"a.png": IMAGES[0], "a.cls": b"1", "b.png": IMAGES[1], "b.cls": b"dog"}, {}, r"numbers in some places"),
    ],
)
def test_mistakes(opened: Open, tmp_path: Path, files: dict[str, bytes], options: Any, message: str) -> None:
    path = shard(tmp_path / "x.tar", files)
    with pytest.raises(UserError, match=message):
        opened(path=str(path), **options)


@pytest.mark.parametrize("path", ["https://example.org/a.tar", "pipe:touch ran", "s3://b/a.tar", "gopen.tar"])
def test_nothing_is_fetched_and_no_command_is_run(opened: Open, path: str) -> None:
    with pytest.raises(UserError, match=r"data_source.path"):
        opened(path=path)
    assert not Path("ran").exists()


def test_unknown_members_and_links_are_passed_over(opened: Open, tmp_path: Path, said: list[str]) -> None:
    class Ran:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in {
            "../../etc/a.png": IMAGES[0],
            "../../etc/a.pyd": pickle.dumps(Ran()),
            "/b.png": IMAGES[1],
        }.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
        for kind, name in ((tarfile.SYMTYPE, "c.png"), (tarfile.LNKTYPE, "d.png"), (tarfile.FIFOTYPE, "e.png")):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd"
            tar.addfile(entry)
    found = opened(path=str(path))
    assert np.array_equal(found.train.original(1), decode(IMAGES[1], 3, None))
    assert len(found.train) == 2
    assert not (tmp_path / "ran").exists()
    assert said == [f"passed over 3 members that are no regular files (c.png, d.png, e.png), of {path}..."]


@pytest.mark.parametrize("kind", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_shards_are_refused(opened: Open, tmp_path: Path, kind: str) -> None:
    with tarfile.open(tmp_path / "x.tar", kind):
        pass
    with pytest.raises(UserError, match=r"x.tar is compressed with \w+, and so cannot be read from the middle"):
        opened(path=str(tmp_path / "x.tar"))


def test_damaged_shards_are_never_read_in_part(opened: Open, root: Path, tmp_path: Path) -> None:
    whole = (root / "train-000000.tar").read_bytes()
    second = whole.index(b"./001.png")
    for data, message in (
        (b"", "empty"),
        (whole[:700], "unexpected end of data"),
        (whole[:second] + b"?" * 512 + whole[second + 512 :], "damaged, or several archives joined"),
        (whole + whole, "damaged, or several archives joined"),
        (b"x" * 10_000, "cannot be read as a tar archive"),
    ):
        (tmp_path / "x.tar").write_bytes(data)
        with pytest.raises(UserError, match=message):
            opened(path=str(tmp_path / "x.tar"))


def test_a_shard_that_is_cut_in_a_header_of_a_sparse_member_is_named(tmp_path: Path, opened: Open) -> None:
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    header[156:157], header[482], header[148:156] = tarfile.GNUTYPE_SPARSE, 1, b" " * 8  # more of the header follows
    header[148:156] = b"%06o\0 " % sum(header)
    for rest in (b"", bytes(100)):
        (tmp_path / "x.tar").write_bytes(header + rest)
        with pytest.raises(UserError, match=r"x.tar cannot be read as a tar archive: "):
            opened(path=str(tmp_path / "x.tar"))


def test_headers_that_claim_a_terabyte(tmp_path: Path, opened: Open) -> None:
    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
        entry = tarfile.TarInfo("long")
        entry.type, entry.size = kind, 2**40
        (tmp_path / "x.tar").write_bytes(entry.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
        with pytest.raises(UserError, match=r"a header of 1,099,511,62\d,\d+ bytes"):
            opened(path=str(tmp_path / "x.tar"))
    entry = tarfile.TarInfo("a.png")
    entry.size = 2**40
    (tmp_path / "x.tar").write_bytes(entry.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    with pytest.raises(UserError, match="unexpected end of data"):
        opened(path=str(tmp_path / "x.tar"))
    (tmp_path / "x.tar").write_bytes(long_name() * 5000 + bytes(1024))
    with pytest.raises(UserError, match="cannot be read as a tar archive: headers within headers"):
        opened(path=str(tmp_path / "x.tar"))


def long_name() -> bytes:
    entry = tarfile.TarInfo("././@LongLink")
    entry.type, entry.size = tarfile.GNUTYPE_LONGNAME, 2
    return entry.tobuf(tarfile.GNU_FORMAT) + b"a".ljust(512, b"\0")


NAMES = st.text("aé/.-_ 1", min_size=1, max_size=140).filter(lambda n: n.strip("/. ") and not n.endswith("/"))


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(NAMES, st.binary(max_size=1500), max_size=6),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_members_are_where_they_are_said_to_be(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes], kind: int
) -> None:
    path = shard(tmp_path_factory.mktemp("tars") / "x.tar", files, kind)
    data, passed_over = path.read_bytes(), list[str]()
    with tarfile.open(path) as tar:
        theirs = [(entry.name, entry.size) for entry in tar]
    found = list(members(path, passed_over))
    assert [(m.name, m.length) for m in found] == theirs
    assert [data[m.start : m.start + m.length] for m in found] == list(files.values())
    assert passed_over == []


def test_a_window_that_does_not_fit_is_refused(opened: Open) -> None:
    with pytest.raises(UserError, match=r"data_source.cache_gb: two blocks"):
        opened(window=4, cache_gb=1e-6)


GROWTH = """
import re, sys
from pathlib import Path
import torch
from sslkit.api import DataInfo
from sslkit_datasets import WebDataset
spec = WebDataset(path=sys.argv[1], size=8, window=int(sys.argv[3]) or None, cache_gb=0.05, workers=2, label="none")
images = spec.build(DataInfo(0, Path(sys.argv[2]))).train
def peak():  # ru_maxrss begins with that of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1e3
images.original(0)
before, total = peak(), 0
order = images.order(torch.Generator().manual_seed(0)) if hasattr(images, "order") else torch.randperm(len(images))
for i in order.tolist():
    total += len(images.encoded.load(i))
print(total / 1e6, peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("window", [0, 40])
def test_memory_does_not_grow_with_the_set(tmp_path: Path, window: int) -> None:
    """200 MB of images, of which 50 MB may be held."""
    one = image(0, 8, 8)
    for number in range(8):
        # Padding behind the end of a PNG file: as large as a photograph, and decoded in no time.
        shard(tmp_path / f"{number}.tar", {f"{i}.png": one + bytes(250_000) for i in range(100)})
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, str(tmp_path), str(tmp_path / "cache"), str(window)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    total, growth = map(float, done.stdout.split())
    assert total > 200
    assert growth < 75
