"""NumPy and TIFF files: bands, depths and ranges, each with a stated conversion or an error."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps
from PIL import Image, ImageOps
from pydantic import ValidationError

from sslkit.api import DataInfo
from sslkit.errors import UserError
from sslkit_datasets import Folder, Parquet, WebDataset, arrays, preparing
from sslkit_datasets.arrays import Arrays, shape_of, to_pixels
from sslkit_datasets.bad import BadImageError
from sslkit_datasets.decode import decode
from sslkit_datasets.preparing import Preparation

Options = dict[str, Any]


def npy(values: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def tiff(values: Any, **options: Any) -> bytes:
    tifffile = pytest.importorskip("tifffile")
    file = io.BytesIO()
    tifffile.imwrite(file, values, **options)
    return file.getvalue()


def noise(*shape: int, kind: str = "uint8", high: int = 256) -> Any:
    return np.random.default_rng(0).integers(0, high, shape).astype(kind)


# ---------------------------------------------------------------- conversions


@pytest.mark.parametrize("write", [npy, tiff])
@pytest.mark.parametrize(("shape", "bands"), [((20, 30), 1), ((20, 30, 8), 8), ((8, 20, 30), 8), ((20, 30, 1), 1)])
def test_bands_are_taken_as_they_are(write: Callable[..., bytes], shape: tuple[int, ...], bands: int) -> None:
    values = noise(*shape)
    expected = values[None] if len(shape) == 2 else values if shape[0] == 8 else values.transpose(2, 0, 1)
    options = {"photometric": "minisblack"} if write is tiff else {}
    data = write(values, **options)
    if write is tiff and shape == (20, 30, 1):
        data = write(values[:, :, 0], **options)
    pixels = decode(data, bands, None)
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, expected)
    assert shape_of(io.BytesIO(data), bands, Arrays()) == pixels.shape[1:]


def test_bands_that_are_picked_are_in_the_order_that_was_asked_for() -> None:
    values = noise(20, 30, 8)
    pixels = decode(npy(values), 3, None, Arrays(bands=(5, 0, 5)))
    assert np.array_equal(pixels, values[:, :, [5, 0, 5]].transpose(2, 0, 1))


def test_axes_settle_what_the_sides_leave_open() -> None:
    values = noise(3, 5, 4)
    assert np.array_equal(decode(npy(values), 3, None, Arrays(axes="chw")), values)
    assert np.array_equal(decode(npy(values), 4, None, Arrays(axes="hwc")), values.transpose(2, 0, 1))
    with pytest.raises(BadImageError, match=r"is \[3, 5, 4\], and either could be the bands; set data_source.axes"):
        decode(npy(values), 3, None)
    with pytest.raises(BadImageError, match=r"neither side is 16 bands or fewer"):
        decode(npy(noise(20, 20, 20)), 3, None)


VALUES = nps.arrays(
    st.sampled_from(["uint16", "int16", "float32"]), (17, 18), elements={"min_value": 0, "max_value": 2000}
) | nps.arrays("float32", (17, 18), elements=st.floats(-1e6, 1e6, width=32) | st.sampled_from([np.inf, -np.inf]))


@given(VALUES, st.tuples(st.integers(-100, 500), st.integers(501, 3000)))
def test_deep_values_are_scaled_and_clipped(values: Any, between: tuple[int, int]) -> None:
    low, high = between
    pixels = decode(npy(values), 1, None, Arrays(value_range=(low, high)))[0]
    for (y, x), value in np.ndenumerate(values):
        exact = 255 * min(max((float(value) - low) / (high - low), 0.0), 1.0)
        assert pixels[y, x] == round(exact)


@pytest.mark.parametrize("write", [npy, tiff])
def test_deep_values_need_a_range(write: Callable[..., bytes]) -> None:
    values = noise(20, 20, kind="uint16", high=4096)
    with pytest.raises(BadImageError, match=rf"holds uint16 from {values.min()} to {values.max()}; set .*value_range"):
        decode(write(values), 1, None)
    pixels = decode(write(values), 1, None, Arrays(value_range=(0, 4095)))
    assert np.array_equal(pixels[0], np.rint(values / 4095 * 255))


def test_deep_png_files_take_a_range_too() -> None:
    file = io.BytesIO()
    Image.fromarray(noise(6, 6, kind="uint16", high=4096)).save(file, "PNG")
    plain, ranged = decode(file.getvalue(), 1, None), decode(file.getvalue(), 1, None, Arrays(value_range=(0, 4095)))
    values = noise(6, 6, kind="uint16", high=4096).astype(float)
    assert np.array_equal(plain[0], np.rint(values / 257))
    assert np.array_equal(ranged[0], np.rint(values / 4095 * 255))


def test_squares_are_resized_as_pictures_are() -> None:
    values = noise(30, 41, 3)
    expected = np.asarray(ImageOps.fit(Image.fromarray(values), (8, 8), Image.Resampling.BICUBIC))
    assert np.array_equal(decode(npy(values), 3, 8), expected.transpose(2, 0, 1))
    assert decode(npy(noise(30, 41, 7)), 7, 8).shape == (7, 8, 8)


def test_compressed_tiff_files() -> None:
    pytest.importorskip("imagecodecs")
    values = noise(30, 41, 3)
    assert np.array_equal(decode(tiff(noise(9, 7, 3), photometric="rgb"), 3, None), noise(9, 7, 3).transpose(2, 0, 1))
    for compression in ("lzw", "zlib", "zstd"):
        data = tiff(values, compression=compression, photometric="rgb")
        assert np.array_equal(decode(data, 3, None), values.transpose(2, 0, 1))


# ---------------------------------------------------------------- refusals


class Ran:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


@pytest.mark.parametrize(
    ("data", "channels", "options", "message"),
    [
        (npy(noise(20, 30, 8)), 3, {}, r"has 8 bands .* data_source.channels is 3; set channels = 8, or pick"),
        (npy(noise(20, 30, 8)), 1, {"bands": (8,)}, r"has 8 bands, and data_source.bands asks for band 8"),
        (npy(noise(20, 30, kind="int64")), 1, {}, "holds int64; uint8, uint16, int16, float32 can be read"),
        (npy(np.full((20, 20), np.nan, "float32")), 1, {"value_range": (0, 1)}, "holds values that are no numbers"),
        (npy(np.full((20, 20), np.nan, "float32")), 1, {}, "set data_source.value_range"),
        (npy(noise(20)), 1, {}, r"is \[20\]; an image is"),
        (npy(noise(2, 2, 2, 2)), 1, {}, r"an image is"),
        (npy(noise(0, 5)), 1, {}, r"an image is"),
        (npy(noise(20, 30))[:-1], 1, {}, "cannot be read"),
        (npy(noise(20, 30))[:40], 1, {}, "cannot be read"),
        (b"\x93NUMPY\x01\x00\xff\xff{'shape'", 1, {}, "cannot be read"),
        (b"II*\0" + bytes(40), 1, {}, "cannot be"),
        (b"II*\0\xff\xff\xff\xff", 1, {}, "cannot be"),
    ],
)
def test_what_is_refused(data: bytes, channels: int, options: Options, message: str) -> None:
    if data.startswith(b"II*"):
        pytest.importorskip("tifffile")
    with pytest.raises(BadImageError, match=message):
        to_pixels(data, channels, Arrays(**options))


def test_objects_are_never_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    values = np.array([[Ran(), Ran()]], dtype=object)
    file = io.BytesIO()
    np.save(file, values, allow_pickle=True)
    for data in (file.getvalue(), npy(noise(4, 4))[:10] + pickle.dumps(Ran())):
        with pytest.raises(BadImageError):
            decode(data, 1, None)
    assert not Path("ran").exists()


def test_a_header_that_claims_a_terabyte() -> None:
    data = npy(noise(4, 4)).replace(b"(4, 4), }", b"(999999, 999999), }")
    with pytest.raises(BadImageError, match=r"is \[999999, 999999\] of uint8, more than the 536,870,912 bytes"):
        to_pixels(data, 1, Arrays())


def test_tiff_files_with_other_colours_and_without_tifffile(monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiff(noise(20, 30), photometric="miniswhite")
    with pytest.raises(BadImageError, match="stand for MINISWHITE"):
        decode(data, 1, None)
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(UserError, match=r"tifffile is missing: pip install 'sslkit\[tiff\]'"):
        decode(data, 1, None)


@pytest.mark.parametrize(
    ("package", "check", "compression"),
    [
        ("tifffile", "headers", None),
        ("imagecodecs", "full", "lzw"),
        pytest.param("tifffile", "full", None, marks=pytest.mark.slow),
        pytest.param("imagecodecs", "full", "zstd", marks=pytest.mark.slow),
    ],
)
def test_a_missing_package_is_no_fault_of_the_files_and_never_remembered(
    package: str, check: Any, compression: str | None, tmp_path: Path
) -> None:
    pytest.importorskip("imagecodecs")
    (tmp_path / "images").mkdir()
    for i in range(3):
        (tmp_path / "images" / f"{i}.tif").write_bytes(tiff(noise(20, 30), compression=compression))
    code = f"""
import sys
from pathlib import Path
from sslkit.api import DataInfo
from sslkit.errors import UserError
from sslkit_datasets import Folder
sys.modules[{package!r}] = None
spec = Folder(root="images", size=8, channels=1, crops_from="original", check={check!r})
try:
    spec.build(DataInfo(0, Path("cache"), print))
except UserError as error:
    print(error)
"""
    told = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert told == f"data_source: there are TIFF files, for which {package} is missing: pip install 'sslkit[tiff]'\n"
    spec = Folder(root=str(tmp_path / "images"), size=8, channels=1, crops_from="original", check=check)
    assert len(spec.build(DataInfo(0, tmp_path / "cache", print)).train) == 3


def test_findings_are_remembered_for_the_decoders_that_made_them(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in (None, "tifffile", "imagecodecs", "pillow", "numpy"):
        found = preparing.version
        if package:
            monkeypatch.setattr(preparing, "version", lambda name, p=package, f=found: "9" if name == p else f(name))
        spec = Folder(root=str(root), size=8, channels=5, value_range=(0, 4095), crops_from="original")
        spec.build(DataInfo(0, tmp_path / "cache", lambda text: None))
    assert len(list((tmp_path / "cache" / "checked").glob("*.json"))) == 5


class Counting(io.BytesIO):
    count = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.count += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        count = super().readinto(buffer)
        self.count += count
        return count


@pytest.mark.parametrize("write", [npy, tiff])
def test_only_the_header_is_read_for_the_sides(write: Callable[..., bytes]) -> None:
    file = Counting(write(np.zeros((700, 900, 3), np.uint8)))
    assert Preparation(headers=True).sides(file) == (700, 900)
    assert file.count < 20_000


MEMORY = """
import re, sys
from pathlib import Path
import numpy as np
from sslkit_datasets.arrays import Arrays
from sslkit_datasets.decode import decode
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
for name, channels in (("small", 2), ("big", 2), ("small.png", 1), ("big.png", 1)):
    data = Path(name).read_bytes()
    decode(data, channels, 8, Arrays(value_range=(0.0, 4095.0)))
    print(peak())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_scaling_takes_little_more_memory_than_the_values(tmp_path: Path) -> None:
    for name, side in (("small", 64), ("big", 3000)):
        (tmp_path / name).write_bytes(npy(np.zeros((side, side, 2), np.float32 if name == "big" else np.uint16)))
        Image.fromarray(np.zeros((2 * side, 2 * side), np.uint16)).save(tmp_path / f"{name}.png")
    done = subprocess.run([sys.executable, "-c", MEMORY], cwd=tmp_path, capture_output=True, text=True, check=True)
    small, big, _, png = map(int, done.stdout.split())
    values = 3000 * 3000 * 2
    assert big - small < 3.5 * 4 * values  # the file, the values, and as bytes
    assert png - small < 3.5 * 4 * values


def test_16_bit_values_by_the_table_are_those_of_the_formula() -> None:
    between = (-7.5, 3000.25)
    for kind, order in (("uint16", "<"), ("uint16", ">"), ("int16", "<")):
        info = np.iinfo(kind)
        values = np.arange(info.min, info.max + 1).reshape(2, 128, 256).astype(np.dtype(kind).newbyteorder(order))
        wide = values.astype(np.float64)
        expected = np.rint(255 * np.clip((wide - between[0]) / (between[1] - between[0]), 0, 1))
        assert np.array_equal(arrays.scaled(values, between), expected)
        assert np.array_equal(arrays.scaled(values.transpose(2, 0, 1), between), expected.transpose(2, 0, 1))
    every = np.arange(2**16).reshape(256, 256).astype(np.uint16)
    file = io.BytesIO()
    Image.fromarray(every).save(file, "PNG")
    assert np.array_equal(decode(file.getvalue(), 1, None)[0], (every.astype(np.int64) + 128) // 257)


def test_a_file_that_takes_too_much_memory_is_a_finding(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Preparation.whole
    calls: list[int] = []

    def short(self: Preparation, data: bytes) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise MemoryError
        return whole(self, data)

    monkeypatch.setattr(Preparation, "whole", short)
    spec = Folder(
        root=str(root), size=8, channels=5, value_range=(0, 4095), crops_from="original", max_bad=0.9, workers=1
    )
    info = DataInfo(0, tmp_path / "cache", lambda text: None)
    found = spec.build(info)
    assert [bad["problem"] for bad in found.bad] == ["takes more memory than there is"]
    assert (len(found.train), len(spec.build(info).train)) == (7, 8)


@pytest.mark.parametrize("spec", [Folder, Parquet, WebDataset])
def test_options(spec: Any) -> None:
    place: Options = {"root": "x"} if spec is Folder else {"path": "x"}
    for options, message in (
        ({"bands": (1, 2)}, "names 2 bands, and channels is 3"),
        ({"value_range": (1.0, 1.0)}, "the smaller first"),
        ({"channels": 17}, "less than or equal to 16"),
        ({"bands": (-1,), "channels": 1}, "greater than or equal to 0"),
    ):
        with pytest.raises(ValidationError, match=message):
            spec(**place, size=8, **options)


# ---------------------------------------------------------------- in a folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    place = tmp_path / "fields"
    place.mkdir()
    for i in range(4):
        values = np.random.default_rng(i).integers(0, 4096, (20 + i, 30, 5)).astype("uint16")
        (place / f"{i}.npy").write_bytes(npy(values))
        (place / f"{i}.tif").write_bytes(tiff(values, photometric="minisblack", planarconfig="contig"))
    return place


@pytest.mark.parametrize("check", ["full", "headers"])
def test_a_folder_of_arrays(root: Path, tmp_path: Path, check: Any) -> None:
    info = DataInfo(0, tmp_path / "cache", lambda text: None)
    given: Options = {"root": str(root), "size": 8, "crops_from": "original", "check": check, "channels": 5}
    with pytest.raises(UserError, match=r"8 of 8 training images cannot be read \(all\): .*value_range"):
        Folder(**given).build(info)
    opened = Folder(**given, value_range=(0.0, 4095.0)).build(info)
    assert opened.train.sizes.tolist() == [[20 + i // 2, 30] for i in range(8)]  # type: ignore[attr-defined]
    assert opened.train.read(torch.arange(8)).shape == (8, 5, 8, 8)
    images = [opened.train.original(i) for i in range(8)]  # type: ignore[attr-defined]
    assert all(torch.equal(images[2 * i], images[2 * i + 1]) for i in range(4)), "NumPy and TIFF"
    prints = {opened.fingerprint, Folder(**given, value_range=(0.0, 4000.0)).build(info).fingerprint}
    prints.add(Folder(**given | {"channels": 1}, bands=(2,), value_range=(0.0, 4095.0)).build(info).fingerprint)
    assert len(prints) == 3


def test_arrays_beside_pictures_are_left_out_and_told(root: Path, tmp_path: Path) -> None:
    said: list[str] = []
    info = DataInfo(0, tmp_path / "cache", said.append)
    for number in range(8):
        with pytest.raises(UserError, match=r"lies? among 8 \.npy, \.tif files" if number else "value_range"):
            Folder(root=str(root), size=8, channels=5).build(info)
        Image.fromarray(noise(9, 9, 3)).save(root / f"{number}.png")
    opened = Folder(root=str(root), size=8).build(info)
    assert len(opened.train) == 8
    assert "left out 8 .npy, .tif files (0.npy, 0.tif, 1.npy, ...), which are read only where no pictures" in said[0]


def test_look_at_arrays(root: Path, tmp_path: Path) -> None:
    seen = Folder(root=str(root), size=8).look(DataInfo(0, tmp_path, lambda text: None))
    assert (seen.modes, seen.channels, seen.unreadable) == ({"5 bands uint16": 8}, 5, [])
    assert seen.value_range is not None
    assert 0 <= seen.value_range[0] < 40
    assert 4055 < seen.value_range[1] <= 4095


def test_pictures_have_one_or_three_channels() -> None:
    file = io.BytesIO()
    Image.fromarray(noise(9, 9, 3)).save(file, "PNG")
    with pytest.raises(BadImageError, match="has colours or grey values, and not 5 channels"):
        decode(file.getvalue(), 5, None)
