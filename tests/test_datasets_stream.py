"""Parquet files that are read a row group at a time, and parts of what lies in blocks."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from sslkit.api import DataInfo
from sslkit.errors import RunFailed, UserError
from sslkit_datasets import Parquet, Subset
from sslkit_datasets import rows as module
from sslkit_datasets.decode import decode

Open = Callable[..., Any]


def image(seed: int, width: int, height: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


IMAGES = [image(i, 5 + i, 30 - i) for i in range(20)]


def write(path: Path, images: list[bytes | None], labels: Any, rows: int = 3) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    structs = [None if data is None else {"bytes": data, "path": "x"} for data in images]
    pq.write_table(pa.table({"image": pa.array(structs, kind), "label": labels}), path, row_group_size=rows)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two files of ten images, in row groups of 3, 3, 3 and 1."""
    place = tmp_path / "files"
    place.mkdir()
    for number in range(2):
        part = slice(10 * number, 10 * number + 10)
        write(place / f"train-{number}.parquet", [*IMAGES[part]], [i % 2 for i in range(10)])
    return place


@pytest.fixture
def spec(root: Path) -> Callable[..., Parquet]:
    def make(**options: Any) -> Parquet:
        return Parquet(**{"path": str(root), "size": 8, "workers": 2, "stream": True, "window": 4} | options)

    return make


@pytest.fixture
def info(tmp_path: Path) -> DataInfo:
    return DataInfo(0, tmp_path / "cache", lambda text: None)


@pytest.fixture
def opened(spec: Callable[..., Parquet], info: DataInfo) -> Open:
    return lambda **options: spec(**options).build(info)


def test_a_stream_gives_the_images_as_they_lie_there(opened: Open) -> None:
    train = opened().train
    assert train.sizes.tolist() == [[30 - i, 5 + i] for i in range(20)]
    assert train.labels.tolist() == [0, 1] * 10
    assert train.tensor is None
    for images in (train, pickle.loads(pickle.dumps(train))):
        for i in (19, 0, 9, 10, 4):
            assert np.array_equal(images.original(i), decode(IMAGES[i], 3, None))
    squares = opened(stream=False, window=None).train.tensor
    assert torch.equal(train.read(torch.arange(20)), squares)
    assert train.files[13].endswith("train-1.parquet, row 3")


def test_an_order_reads_each_row_group_once(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    train = opened(window=3).train
    read: list[int] = []
    take = module.RowGroups.read
    monkeypatch.setattr(module.RowGroups, "read", lambda self, n: read.append(n) or take(self, n))
    # Room for what a window of 3 and the blocks at both ends hold, and not for half of the set.
    train.encoded.whole.cache = module.Blocks(train.encoded.whole.read, 9 * max(map(len, IMAGES)))
    order = train.order(torch.Generator().manual_seed(0))
    assert order.sort().values.tolist() == list(range(20))
    assert order.tolist() != sorted(order.tolist())
    for i in order.tolist():
        assert np.array_equal(train.original(i), decode(IMAGES[i], 3, None))
    assert sorted(read) == list(range(8))


def test_copies_in_both_sets_are_counted_where_only_headers_are_read(
    spec: Callable[..., Parquet], tmp_path: Path
) -> None:
    write(tmp_path / "test.parquet", [IMAGES[12], image(77, 9, 9), IMAGES[3]], [0, 1, 0])
    said: list[str] = []
    made = spec(test_path=str(tmp_path / "test.parquet"), check="headers")
    made.build(DataInfo(0, tmp_path / "cache", said.append))
    assert said == ["2 of 3 test images are training images, too, byte for byte: take them out"]


def test_several_threads(opened: Open) -> None:
    train = opened().train
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(train.original, [i % 20 for i in range(100)]))
    assert all(np.array_equal(found[i], decode(IMAGES[i % 20], 3, None)) for i in range(100))


def test_a_stream_is_remembered_and_known_by_its_images(
    opened: Open, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = opened().fingerprint
    monkeypatch.setattr(module, "survey", None)
    assert opened(window=7, cache_gb=1.0, workers=1).fingerprint == base
    monkeypatch.undo()
    seen = {base, opened(check="headers").fingerprint, opened(hold_out=0.2).fingerprint}
    seen.add(opened(stream=False, window=None).fingerprint)
    write(root / "train-1.parquet", [*IMAGES[10:19], IMAGES[0]], [0] * 10)
    assert opened().fingerprint not in seen
    assert len(seen) == 4


def test_row_groups_are_part_of_the_fingerprint(opened: Open, root: Path) -> None:
    before = opened()
    for rows in (3, 5):
        for number in range(2):
            part = slice(10 * number, 10 * number + 10)
            write(root / f"train-{number}.parquet", [*IMAGES[part]], [i % 2 for i in range(10)], rows)
        after = opened()
        same = torch.equal(*(x.train.order(torch.Generator().manual_seed(0)) for x in (before, after)))
        assert same is (rows == 3)
        assert (after.fingerprint == before.fingerprint) is same


def test_the_window_is_that_of_training(opened: Open, root: Path, tmp_path: Path) -> None:
    many = tmp_path / "many.parquet"
    write(many, [*IMAGES, *IMAGES], [0, 1] * 20)
    room = {"window": 20, "cache_gb": 3.6e-5}
    with pytest.raises(UserError, match=r"^data_source.window"):
        opened(path=str(many), **room)
    assert len(opened(test_path=str(many), **room).test) == 40  # which is read in its order


@pytest.mark.parametrize("stream", [True, False])
def test_a_file_is_in_one_set(opened: Open, root: Path, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"stream": stream, "window": 4 if stream else None}
    (root / "link.parquet").symlink_to(root / "train-1.parquet")
    for test in ("train-1.parquet", "link.parquet"):
        with pytest.raises(UserError, match=rf"^data_source.test_path: .*{test} is a file of the training images, too"):
            opened(test_path=str(root / test), **options)
    one = opened(path=str(root / "train-0.parquet"), test_path=str(root / "train-1.parquet"), **options)
    assert (len(one.train), len(one.test)) == (10, 10)
    monkeypatch.setattr("sslkit_datasets.columns.Source.open", None)  # what is refused is refused before it is read
    with pytest.raises(UserError, match=r"^data_source.hold_out: there are test images already \(.*train-1"):
        opened(path=str(root / "train-0.parquet"), test_path=str(root / "train-1.parquet"), hold_out=0.5, **options)


def test_broken_rows(opened: Open, root: Path) -> None:
    write(root / "train-2.parquet", [None, IMAGES[0][:70], IMAGES[1]], [0, 1, 1])
    found = opened(max_bad=0.5)
    assert [b["path"].rpartition("/")[2] for b in found.bad] == ["train-2.parquet, row 0", "train-2.parquet, row 1"]
    assert np.array_equal(found.train.original(20), decode(IMAGES[1], 3, None))
    assert found.train.labels[20] == 1
    with pytest.raises(UserError, match="2 of 23 training images cannot be read"):
        opened()


def test_files_that_change_end_the_run(opened: Open, root: Path) -> None:
    train = opened().train
    write(root / "train-0.parquet", [*IMAGES[10:20]], [0] * 10)
    with pytest.raises(RunFailed, match=r"train-0.parquet, row 2 |train-0.parquet cannot be read"):
        train.original(2)
    (root / "train-1.parquet").unlink()
    with pytest.raises(RunFailed, match=r"train-1.parquet cannot be read"):
        train.original(12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": None}, "data_source.size: is needed with stream = true"),
        ({"stream": False}, "data_source.window: needs stream = true"),
        ({"stream": False, "window": None, "check": "headers"}, 'data_source.check: "headers" needs stream = true'),
        ({"cache_gb": 1e-6}, r"data_source.cache_gb: two blocks .*row_group_size"),
        ({"cache_gb": 1.1e-5}, r"data_source.window: 4 images and .* set window to \d at most"),
        ({"label_column": "none"}, "data_source.label_column: .* has no column 'none'"),
    ],
)
def test_mistakes(opened: Open, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        opened(**options)


@pytest.mark.parametrize("stream", [True, False])
def test_names_as_labels_and_hold_out(opened: Open, root: Path, stream: bool) -> None:
    for number in range(2):
        part = slice(10 * number, 10 * number + 10)
        write(root / f"train-{number}.parquet", [*IMAGES[part]], ["dog", "ant"] * 5)
    options = {"stream": stream, "window": 4 if stream else None}
    whole, found = opened(**options), opened(hold_out=0.2, **options)
    assert (whole.class_names, whole.train.labels.tolist()) == (("ant", "dog"), [1, 0] * 10)
    assert len(found.train) + len(found.test) == 20
    assert min(found.test.labels.bincount(minlength=2)) >= 1
    both = torch.cat([part.read(torch.arange(len(part))) for part in (found.train, found.test)])
    assert {bytes(x.numpy()) for x in both} == {bytes(x.numpy()) for x in whole.train.read(torch.arange(20))}
    write(root / "test.parquet", [IMAGES[0]], ["cat"])
    with pytest.raises(UserError, match=r"1 class in the column 'label' that no training image has: cat"):
        opened(**options)


# ---------------------------------------------------------------- parts


def test_a_part_of_a_stream(spec: Callable[..., Parquet], info: DataInfo) -> None:
    whole = spec().build(info).train
    part = Subset(of=spec(), images=9).build(info).train
    names = [str(name) for name in whole.files]
    rows = [names.index(str(name)) for name in part.files]
    assert (len(rows), rows) == (9, sorted(set(rows)))
    assert torch.equal(part.sizes, whole.sizes[rows])
    assert torch.equal(part.labels, whole.labels[rows])
    for i, row in enumerate(rows):
        assert torch.equal(part.original(i), whole.original(row))
    order = part.order(torch.Generator().manual_seed(3))
    kept = [i for i in whole.order(torch.Generator().manual_seed(3)).tolist() if i in rows]
    assert [rows[i] for i in order.tolist()] == kept
    for n in (1, 4, 9, 50):
        chosen = part.sample(n).tolist()
        assert 1 <= len(chosen) <= min(n, 9)
        assert chosen == sorted(set(chosen))


def test_a_part_of_files(tmp_path: Path, info: DataInfo) -> None:
    from sslkit_datasets import Folder

    for i, data in enumerate(IMAGES):
        (tmp_path / f"{i:02}.png").write_bytes(data)
    part = Subset(of=Folder(root=str(tmp_path), size=8, crops_from="original", classes="none"), images=5).build(info)
    assert not hasattr(part.train, "order")
    rows = [int(Path(str(file)).stem) for file in part.train.files]
    for i, row in enumerate(rows):
        assert np.array_equal(part.train.original(i), decode(IMAGES[row], 3, None))
    assert part.train.sizes.tolist() == [[30 - row, 5 + row] for row in rows]


# ---------------------------------------------------------------- memory

GROWTH = """
import re, sys
from pathlib import Path
import torch
from sslkit.api import DataInfo
from sslkit_datasets import Parquet
spec = Parquet(path=sys.argv[1], size=8, stream=True, window=40, cache_gb=0.04, workers=2)
def peak():  # ru_maxrss begins with that of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1e3
import pyarrow.parquet, sslkit_datasets.rows
before, total = peak(), 0
images = spec.build(DataInfo(0, Path(sys.argv[2]))).train
for i in images.order(torch.Generator().manual_seed(0)).tolist():
    total += len(images.encoded.load(i))
print(total / 1e6, peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_set(tmp_path: Path) -> None:
    """200 MB of images in row groups of 5 MB, of which 40 MB may be held."""
    noise = np.random.default_rng(0)
    one = image(0, 8, 8)
    for number in range(4):
        # Behind the end of a PNG file: as large as a photograph, not to be compressed, and decoded in no time.
        rows = [one + noise.bytes(250_000) for _ in range(200)]
        pq.write_table(
            pa.table({"image": pa.array(rows, pa.binary())}), tmp_path / f"{number}.parquet", row_group_size=20
        )
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, str(tmp_path), str(tmp_path / "cache")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    total, growth = map(float, done.stdout.split())
    assert total > 200
    assert growth < 140
