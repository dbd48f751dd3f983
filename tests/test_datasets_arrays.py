"""NumPy and TIFF files: bands, depths and ranges, each with a stated conversion or an error."""

from __future__ import annotations

import io
import pickle
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
from sslkit_datasets import Folder, Parquet, WebDataset
from sslkit_datasets.arrays import Arrays, shape_of, to_pixels
from sslkit_datasets.bad import BadImageError
from sslkit_datasets.decode import decode

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
    assert shape_of(data, bands, Arrays()) == pixels.shape[1:]


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
    with pytest.raises(BadImageError, match=r"is \[999999, 999999\]; .* values at most"):
        to_pixels(data, 1, Arrays())


def test_tiff_files_with_other_colours_and_without_tifffile(monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiff(noise(20, 30), photometric="miniswhite")
    with pytest.raises(BadImageError, match="stand for MINISWHITE"):
        decode(data, 1, None)
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    with pytest.raises(BadImageError, match=r"tifffile is missing: pip install 'sslkit\[tiff\]'"):
        decode(data, 1, None)


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


def test_arrays_beside_pictures_are_passed_over_and_told(root: Path, tmp_path: Path) -> None:
    said: list[str] = []
    Image.fromarray(noise(9, 9, 3)).save(root / "x.png")
    opened = Folder(root=str(root), size=8).build(DataInfo(0, tmp_path / "cache", said.append))
    assert len(opened.train) == 1
    assert "passed over 8 files (0.npy, 0.tif, 1.npy, ...) with other suffixes than .jpg" in said[0]


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
