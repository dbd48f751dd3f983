"""Images of any size from a folder: their sides, their pixels, what is held out, and what `look` finds."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sslkit.api import DataInfo, Look
from sslkit.errors import RunFailed, UserError
from sslkit_datasets import Folder
from sslkit_datasets import folder as folder_module
from sslkit_datasets.decode import BadImageError, decode
from sslkit_datasets.headers import sides
from sslkit_datasets.holding_out import held_out
from sslkit_datasets.preparing import HEAD

Open = Callable[..., Any]


def picture(seed: int, width: int, height: int, mode: str = "RGB") -> Image.Image:
    bands = {"RGB": 3, "RGBA": 4, "CMYK": 4}.get(mode, 1)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.fromarray(pixels if bands > 1 else pixels[:, :, 0], mode=None if bands != 4 else mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


FILES = {
    "a/1.jpg": encoded(picture(0, 30, 20), "JPEG", quality=90),
    "a/2.png": encoded(picture(1, 7, 40)),
    "a/3.jpg": encoded(picture(2, 25, 15), "JPEG", exif=turned(6).tobytes()),
    "b/1.webp": encoded(picture(3, 12, 9), "WEBP", lossless=True),
    "b/2.png": encoded(picture(4, 16, 16, "L")),
    "b/3.png": encoded(picture(5, 5, 6, "RGBA")),
}
SIDES = [(20, 30), (40, 7), (25, 15), (9, 12), (16, 16), (6, 5)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, data in FILES.items():
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(data)
    return tmp_path / "images"


@pytest.fixture
def info(tmp_path: Path) -> DataInfo:
    return DataInfo(0, tmp_path / "cache", lambda text: None)


@pytest.fixture
def opened(root: Path, info: DataInfo) -> Open:
    def open_with(**options: Any) -> Any:
        return Folder(**{"root": str(root), "size": 8, "workers": 2, "crops_from": "original"} | options).build(info)

    return open_with


# ---------------------------------------------------------------- originals


@pytest.mark.parametrize("check", ["full", "headers"])
@pytest.mark.parametrize("channels", [1, 3])
def test_originals_are_the_files_with_their_own_sides(opened: Open, check: str, channels: int) -> None:
    train = opened(check=check, channels=channels).train
    assert train.sizes.tolist() == [list(side) for side in SIDES]
    assert train.sizes.dtype == torch.int32
    assert train.tensor is None
    for i, data in enumerate(FILES.values()):
        image = train.original(i)
        assert image.is_contiguous()
        assert image.dtype == torch.uint8
        assert np.array_equal(image, decode(data, channels, None))
    assert [str(f).endswith(name) for f, name in zip(train.files, FILES, strict=True)] == [True] * 6


def test_read_gives_the_squares_of_before(opened: Open) -> None:
    squares, originals = opened(crops_from="square").train, opened().train
    rows = torch.tensor([5, 0, 3, 3])
    for _ in range(2):
        assert torch.equal(originals.read(rows), squares.tensor[rows])
    assert originals.labels.tolist() == squares.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_squares_that_were_measured_are_kept_up_to_the_limit(
    opened: Open, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = opened(memory_limit_gb=2 * 3 * 8 * 8 / 1e9).train
    expected = train.read(torch.arange(6))
    loaded = []
    load = type(train.encoded).load
    monkeypatch.setattr(type(train.encoded), "load", lambda self, i: loaded.append(i) or load(self, i))
    assert torch.equal(train.read(torch.arange(6)), expected)
    assert len(loaded) == 4
    assert torch.equal(pickle.loads(pickle.dumps(train)).read(torch.arange(6)), expected)


def test_originals_in_several_threads(opened: Open) -> None:
    train = opened().train
    with ThreadPoolExecutor(4) as pool:
        images = list(pool.map(train.original, [i % 6 for i in range(60)]))
    assert all(np.array_equal(images[i], decode(list(FILES.values())[i % 6], 3, None)) for i in range(60))


def test_the_fingerprint_says_from_what_views_are_cut(opened: Open) -> None:
    square = Folder(root="x", size=8, crops_from="square", check="full", classes="auto", hold_out=0.0)
    assert square == Folder(root="x", size=8)
    prints = [opened(**o).fingerprint for o in ({}, {"crops_from": "square"}, {"check": "headers"}, {"hold_out": 0.3})]
    assert len(set(prints)) == 4
    assert opened().fingerprint == prints[0]


def test_a_file_that_changed_since_ends_the_run(opened: Open, root: Path) -> None:
    train = opened().train
    (root / "a/2.png").write_bytes(FILES["b/2.png"])
    with pytest.raises(RunFailed, match=r"2\.png holds another image than when the run began"):
        train.original(1)
    with pytest.raises(RunFailed, match=r"2\.png holds another image than when the run began"):
        train.read(torch.tensor([1]))


@pytest.mark.parametrize("check", ["full", "headers"])
def test_broken_files_and_what_each_check_finds(opened: Open, root: Path, check: str) -> None:
    (root / "a/0.png").write_bytes(b"nothing")
    (root / "a/9.png").write_bytes(b"")
    (root / "b/9.jpg").write_bytes(encoded(picture(9, 64, 64), "JPEG")[:1500])
    found = opened(check=check, max_bad=0.5)
    names = [Path(b["path"]).name for b in found.bad]
    assert names == (["0.png", "9.png", "9.jpg"] if check == "full" else ["0.png", "9.png"])
    assert len(found.train) == (6 if check == "full" else 7)
    if check == "headers":
        assert found.train.sizes[6].tolist() == [64, 64]
        with pytest.raises(RunFailed, match=r"9\.jpg .*only its header was read"):
            found.train.original(6)


def test_headers_are_remembered_apart_from_the_full_check(
    opened: Open, info: DataInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = [opened(check=check) for check in ("full", "headers")]
    monkeypatch.setattr(folder_module, "survey", None)
    again = [opened(check=check) for check in ("full", "headers")]
    assert [a.fingerprint for a in again] == [f.fingerprint for f in first]
    assert all(torch.equal(a.train.sizes, f.train.sizes) for a, f in zip(again, first, strict=True))


def test_headers_of_what_fits_into_memory_are_not_decoded(opened: Open) -> None:
    train = opened(crops_from="square", check="headers").train
    assert train.tensor is None
    assert torch.equal(train.read(torch.arange(6)), opened(crops_from="square").train.tensor)


# ---------------------------------------------------------------- headers


def late_exif(orientation: int) -> bytes:
    """A PNG file whose EXIF data come after the pixels."""
    data = encoded(picture(0, 9, 4), exif=turned(orientation))
    at = data.index(b"eXIf") - 4
    length = 12 + int.from_bytes(data[at : at + 4], "big")
    chunk, rest = data[at : at + length], data[:at] + data[at + length :]
    end = rest.index(b"IEND") - 4
    return rest[:end] + chunk + rest[end:]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_sides_are_those_of_the_decoded_image(orientation: int) -> None:
    exif = turned(orientation)
    for data in (
        encoded(picture(0, 9, 4), "JPEG", exif=exif.tobytes()),
        encoded(picture(0, 9, 4), exif=exif),
        encoded(picture(0, 9, 4), "WEBP", exif=exif.tobytes()),
        late_exif(orientation),
    ):
        assert sides(io.BytesIO(data)) == decode(data, 3, None).shape[1:]


@pytest.mark.parametrize("data", [b"x" * 100, encoded(picture(0, 9, 4))[:20], encoded(picture(0, 2, 2), "GIF")])
def test_headers_that_are_none(data: bytes) -> None:
    with pytest.raises(BadImageError):
        sides(io.BytesIO(data))


# ---------------------------------------------------------------- classes, hold_out


def test_without_classes_images_lie_anywhere(root: Path, opened: Open) -> None:
    (root / "top.png").write_bytes(FILES["b/2.png"])
    (root / "train" / "deep").mkdir(parents=True)
    (root / "train" / "deep" / "1.png").write_bytes(FILES["a/2.png"])
    with pytest.raises(UserError):
        opened()
    found = opened(classes="none")
    assert (len(found.train), found.train.labels, found.class_names, found.test) == (8, None, None, None)
    (root / "train" / "top.png").write_bytes(FILES["b/2.png"])
    with pytest.raises(UserError, match=r'classes = "none"'):
        opened(root=str(root / "train"))


def test_without_classes_test_images_lie_elsewhere(root: Path, opened: Open, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data_source.test_root: .*b and .*images overlap"):
        opened(classes="none", test_root=str(root / "b"))
    found = opened(classes="none", root=str(root / "a"), test_root=str(root / "b"))
    assert (len(found.train), len(found.test), found.test.labels) == (3, 3, None)


@pytest.mark.parametrize("crops_from", ["square", "original"])
def test_hold_out(opened: Open, crops_from: str) -> None:
    whole, found = opened(crops_from=crops_from), opened(crops_from=crops_from, hold_out=0.34)
    assert found.test.labels.tolist() == [0, 1]
    assert found.train.labels.tolist() == [0, 0, 1, 1]
    name = {str(path): i for i, path in enumerate(whole.train.files)}
    rows = {which: [name[str(path)] for path in getattr(found, which).files] for which in ("train", "test")}
    assert sorted(rows["train"] + rows["test"]) == list(range(6))
    everything = whole.train.read(torch.arange(6))
    for which, positions in rows.items():
        part = getattr(found, which)
        assert torch.equal(part.read(torch.arange(len(part))), everything[positions])
    if crops_from == "original":
        assert torch.equal(found.train.sizes, whole.train.sizes[rows["train"]])


def test_nothing_is_held_out_beside_test_images(opened: Open, root: Path) -> None:
    with pytest.raises(UserError, match=r"^data_source.hold_out: there are test images already \(.*b\)"):
        opened(root=str(root / "a"), test_root=str(root / "b"), hold_out=0.5, classes="none")


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3)), min_size=1, max_size=60),
    st.floats(0.01, 0.99),
    st.randoms(),
)
def test_held_out_is_a_share_of_each_class(images: list[tuple[int, int]], share: float, random: Any) -> None:
    digests = [bytes([digest]) for digest, _ in images]
    labels = torch.tensor([label for _, label in images])
    if all(len({d for d, la in zip(digests, labels.tolist(), strict=True) if la == c}) < 2 for c in range(4)):
        return
    try:
        rows, held = held_out(digests, labels, share)
    except UserError:
        # Two images may differ and still be the copies of another class's.
        assert len(set(digests)) < 2 * len(set(labels.tolist()))
        return
    assert sorted(rows + held) == list(range(len(images)))
    assert held
    assert rows
    assert not {digests[i] for i in rows} & {digests[i] for i in held}, "the same file on both sides"
    order = list(range(len(images)))
    if len(set(images)) == len({d for d, _ in images}):  # no file lies in two classes
        random.shuffle(order)
        again = held_out([digests[i] for i in order], labels[order], share)[1]
        assert {digests[order[i]] for i in again} == {digests[i] for i in held}


def test_held_out_counts() -> None:
    digests = [i.to_bytes(2, "big") for i in range(1000)]
    labels = torch.arange(1000) % 10
    rows, held = held_out(digests, labels, 0.1)
    assert 80 <= len(held) <= 120  # 100 are expected, with a standard deviation of 9.5
    assert min(labels[held].bincount(minlength=10)) >= 1
    assert len(rows) + len(held) == 1000
    twice = held_out([*digests, *digests], None, 0.1)[1]
    assert len(twice) % 2 == 0
    assert [i for i in twice if i < 1000] == [i - 1000 for i in twice if i >= 1000]
    # All on one side but for the one of which the rule says that it has to be on the other.
    assert [len(side) for side in held_out(digests[:20], None, 1e-6)] == [19, 1]
    assert [len(side) for side in held_out(digests[:20], None, 1 - 1e-6)] == [1, 19]
    with pytest.raises(UserError, match=r"data_source.hold_out: no class has two images that differ"):
        held_out([b"a", b"a"], None, 0.5)


@given(st.lists(st.integers(0, 9999), min_size=60, max_size=200, unique=True), st.integers(0, 59))
def test_images_that_are_added_or_removed_move_no_other(numbers: list[int], kept: int) -> None:
    digests = [number.to_bytes(2, "big") for number in numbers]
    all_held = {digests[i] for i in held_out(digests, None, 0.3)[1]}
    fewer = digests[: 40 + kept % 20]
    held = {fewer[i] for i in held_out(fewer, None, 0.3)[1]}
    assert held == all_held & set(fewer)


# ---------------------------------------------------------------- both sets


def test_test_images_are_never_trained_on(opened: Open, root: Path, tmp_path: Path) -> None:
    refused = r"^data_source.test_root: the images in .* would be trained on and tested on: .*images.* overlap"
    for classes in (None, "none"):
        for train, test in ((root, root), (root, root / "b"), (root / "b", root)):
            with pytest.raises(UserError, match=refused):
                opened(root=str(train), test_root=str(test), classes=classes)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a").symlink_to(root / "a")
    for train, test in ((root, tmp_path / "other"), (tmp_path / "other", root)):
        with pytest.raises(UserError, match=refused):
            opened(root=str(train), test_root=str(test))


@pytest.mark.parametrize("check", ["full", "headers"])
def test_copies_in_both_sets_are_counted(root: Path, tmp_path: Path, check: Any) -> None:
    for name in list(FILES)[:2]:
        (tmp_path / "test" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "test" / name).write_bytes(FILES[name])
    (tmp_path / "test" / "a" / "new.png").write_bytes(encoded(picture(77, 9, 9)))
    said: list[str] = []
    spec = Folder(root=str(root), test_root=str(tmp_path / "test"), size=8, crops_from="original", check=check)
    spec.build(DataInfo(0, tmp_path / "cache", said.append))
    assert said == ["2 of 3 test images are training images, too, byte for byte: take them out"]


def test_images_that_begin_alike_are_no_copies(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only headers are read, those with equal first bytes are read in full before anything is said of them."""
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    other = noise.copy()
    other[150:] += 1
    first, second, third = (encoded(Image.fromarray(each), compress_level=0) for each in (noise, other, noise[::-1]))
    assert (len(first), first[:HEAD]) == (len(second), second[:HEAD])
    for name, data in (("test/a/x.png", second), ("test/a/y.png", third), ("train/a/0.png", first),
                       ("train/a/1.png", third)):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    said: list[str] = []
    spec = Folder(root=str(tmp_path / "train"), test_root=str(tmp_path / "test"), size=8, crops_from="original",
                  check="headers")  # fmt: skip

    def told() -> list[str]:
        said.clear()
        spec.build(DataInfo(0, tmp_path / "cache", said.append))
        return said

    assert told() == ["1 of 2 test images are training images, too, byte for byte: take them out"]
    (tmp_path / "test" / "a" / "y.png").unlink()
    assert told() == []
    monkeypatch.setattr("sslkit_datasets.sets.MOST_IN_FULL", 1)
    assert told() == [
        "1 of 1 test images have the length and the first 65,536 bytes of training images, which is all that was read "
        "of them: see whether they are the same"
    ]


# ---------------------------------------------------------------- look


def look(root: Path, info: DataInfo, limit: int = 0, **options: Any) -> Look:
    return Folder(root=str(root), size=8, workers=2, **options).look(info, limit)


def test_look(root: Path, info: DataInfo) -> None:
    deep = np.arange(64, dtype=np.uint16).reshape(8, 8) * 100
    (root / "a/4.png").write_bytes(encoded(Image.fromarray(deep)))
    (root / "a/5.jpg").write_bytes(FILES["a/1.jpg"])
    (root / "b/4.jpg").write_bytes(encoded(picture(9, 64, 64), "JPEG")[:1500])
    (root / "b/5.jpg").write_bytes(encoded(picture(8, 10, 10, "CMYK"), "JPEG"))
    seen = look(root, info)
    assert (seen.files, seen.test_files, seen.looked_at) == (10, 0, 10)
    assert seen.bytes == sum(f.stat().st_size for f in root.rglob("*.*"))
    assert [(bad["path"], "cannot be decoded" in bad["problem"]) for bad in seen.unreadable] == [("b/4.jpg", True)]
    found = [*SIDES[:3], (8, 8), (20, 30), *SIDES[3:], (10, 10)]
    assert list(zip(seen.heights, seen.widths, strict=True)) == found
    assert seen.modes == {"RGB": 5, "grey": 1, "RGBA": 1, "16-bit grey": 1, "CMYK": 1}
    assert seen.channels == 3
    assert seen.classes == {"a": 5, "b": 5}
    assert seen.test_classes is None
    assert seen.duplicates == [["a/1.jpg", "a/5.jpg"]]
    assert seen.in_both == []
    assert seen.value_range == pytest.approx(np.percentile(deep, (0.1, 99.9)))
    assert seen.seconds_per_image > 0


def test_look_at_two_sets(tmp_path: Path, info: DataInfo) -> None:
    for name, data in {
        "train/x/1.png": FILES["b/2.png"],
        "train/x/2.png": FILES["a/2.png"],
        "train/x/3.png": FILES["a/2.png"],
        "test/x/1.png": FILES["b/2.png"],
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    seen = look(tmp_path, info)
    assert (seen.files, seen.test_files, seen.classes, seen.test_classes) == (3, 1, {"x": 3}, {"x": 1})
    assert seen.duplicates == [["train/x/2.png", "train/x/3.png"]]
    assert seen.in_both == [["train/x/1.png", "test/x/1.png"]]


def test_look_at_some_and_at_grey_ones(tmp_path: Path, info: DataInfo) -> None:
    for i in range(20):
        (tmp_path / f"{i:02}.png").write_bytes(encoded(picture(i, 6 + i, 5, "L")))
    seen = look(tmp_path, info, 5, classes="none")
    assert (seen.files, seen.looked_at, seen.classes, seen.channels) == (20, 5, None, 1)
    assert list(seen.widths) == [6, 10, 15, 20, 25]
