"""What is found in a folder before anything is chosen: the range of values, the bands, the kind of files read."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import conftest
import numpy as np
import pytest
from conftest import run
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from sslkit import suggesting
from sslkit.api import DataInfo
from sslkit.looking import Look
from sslkit_datasets import Folder
from sslkit_datasets.kinds import some

TAKEN = 4096


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is timed: an image takes 20 ms."""
    monkeypatch.setattr(suggesting, "speed", lambda recipe, batch, machine: (0.02 * batch, True))
    monkeypatch.setenv("SSLKIT_DATA", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def look(root: Path, **options: Any) -> Look:
    return Folder(root=str(root), size=8, workers=1, **options).look(DataInfo(0, root / "none", lambda text: None))


def saved(root: Path, images: Mapping[str, Any]) -> Path:
    for name, values in images.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(root / name, values)
    return root


# ---------------------------------------------------------------- values


@settings(deadline=None)
@given(st.integers(1, 700), st.integers(1, 700), st.integers(1, 16))
@example(64, 64, 5)
@example(256, 256, 3)
@example(224, 224, 3)
@example(256, 256, 16)
@example(1024, 1024, 1)
def test_some_values_see_every_band_and_the_whole_picture(height: int, width: int, bands: int) -> None:
    places = np.arange(height * width * bands).reshape(height, width, bands)
    taken = some(places, TAKEN).astype(int)
    assert min(TAKEN, places.size) <= len(taken) < TAKEN + bands
    pixel, band = np.divmod(taken, bands)
    row, column = np.divmod(pixel, width)
    assert np.ptp(np.bincount(band, minlength=bands)) <= 1, "as many of each band"
    for side, at in ((height, row), (width, column)):
        assert len(set(at)) >= 0.9 * min(side, len(taken) // bands)
    for each in range(bands):
        cells = set(zip(row[band == each] * 4 // height, column[band == each] * 4 // width, strict=True))
        assert len(cells) == min(4, height) * min(4, width), f"band {each} is seen in all parts of the picture"


@settings(deadline=None)
@given(st.integers(64, 512), st.integers(64, 512), st.lists(st.floats(1, 1e4), min_size=1, max_size=8))
@example(64, 64, [100.0, 200.0, 300.0, 400.0, 500.0])
@example(256, 256, [10.0, 1000.0, 100.0])
@example(1024, 1024, [1.0])
def test_percentiles_of_some_values_are_those_of_all(height: int, width: int, scales: list[float]) -> None:
    y, x = np.ogrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    values = (((y + x) / 2)[:, :, None] * scales).astype(np.float32)
    for share in (10, 50, 99):
        bound = np.percentile(some(values, TAKEN), share)
        assert (values < bound).mean() - 0.02 <= share / 100 <= (values <= bound).mean() + 0.02


def test_some_values_leave_out_what_is_no_number() -> None:
    assert some(np.array([[1.0, np.nan], [np.inf, 2.0]]), TAKEN).tolist() == [1.0, 2.0]
    assert np.array_equal(some(np.ones((90, 90)), TAKEN), np.ones(TAKEN))


@pytest.mark.parametrize("shape", [(64, 64, 5), (224, 224, 3)])
def test_the_range_is_that_of_all_bands(tmp_path: Path, shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    tops = np.linspace(1000, 9000, shape[2])
    images = {f"{i}.npy": (random.random(shape) * tops).astype(np.uint16) for i in range(4)}
    low, high = look(saved(tmp_path / "p", images)).value_range or (0.0, 0.0)
    every = np.stack(list(images.values()))
    assert (low, high) == pytest.approx(np.percentile(every, (0.1, 99.9)), rel=0.02, abs=20)


TINY = """
name = "r"
[data_source]
use = "folder"
root = "p"
size = 16
channels = 2
value_range = [0.0, 10.0]
[view_generator]
use = "two_crops"
size = 16
saturation = 0.0
hue = 0.0
grayscale = 0.0
[backbone]
use = "convnet"
widths = [8, 8]
strides = [2, 2]
[projector]
use = "mlp"
hidden_dim = 8
out_dim = 8
[predictor]
use = "mlp"
hidden_dim = 8
out_dim = 8
[loss]
use = "cosine"
[target_updater]
use = "ema"
tau = 0.9
[optimizer]
use = "adamw"
lr = 0.001
[train]
epochs = 1
batch_size = 8
"""


@pytest.mark.parametrize(
    ("view", "key"), [("", "data_source.value_range"), ("mean = [0.5, 0.5]\n", "view_generator.mean")]
)
def test_a_band_out_of_range_is_blamed_on_the_range_and_not_on_a_mean_that_nobody_gave(
    tmp_path: Path, view: str, key: str
) -> None:
    random = np.random.default_rng(0)
    values = random.integers(0, 10, (16, 20, 20, 2)).astype(np.uint16)
    values[..., 1] += 100
    saved(tmp_path / "p", {f"{i}.npy": image for i, image in enumerate(values)})
    Path("r.toml").write_text(TINY.replace("[backbone]", f"{view}[backbone]"))
    told = json.loads(run("check", "r.toml", "--json").stdout)
    (found,) = [finding for finding in told["findings"] if finding["id"] == "views_not_normalised"]
    assert found["key"] == key
    assert ("data_source.value_range" in found["cause"]) == ("mean" not in view)


# ---------------------------------------------------------------- bands


def cells(number: int, *shape: int, kind: str = "uint16") -> dict[str, Any]:
    random = np.random.default_rng(number)
    tops = np.linspace(300, 3000, shape[-1])
    return {f"{i}.npy": (random.random(shape) * tops).astype(kind) for i in range(number)}


@pytest.mark.parametrize("bands", [1, 2, 4])
def test_a_recipe_for_any_number_of_bands_passes_its_check(tmp_path: Path, bands: int) -> None:
    for name in ("dividing", "resting"):
        saved(tmp_path / "cells" / name, cells(40, 40, 40, bands))
    told = run("init", "cells", "--device", "cpu")
    assert told.exit_code == 0, told.output
    assert tomllib.loads(Path("cells.toml").read_text())["data_source"]["channels"] == bands
    checked = run("check", "cells.toml")
    assert checked.exit_code == 0, checked.output
    assert "VERDICT  healthy" in checked.output


def test_images_of_different_bands_are_refused_with_the_numbers_of_each(tmp_path: Path) -> None:
    saved(tmp_path / "cells" / "a", cells(9, 40, 40, 2))
    saved(tmp_path / "cells" / "b", cells(3, 40, 40, 5))
    saved(tmp_path / "cells" / "c", cells(1, 40, 40, 1))
    told = run("init", "cells", "--device", "cpu")
    assert told.exit_code == 2, told.output
    assert "9 of 2 bands, as a/0.npy; 3 of 5 bands, as b/0.npy; 1 of 1 band, as c/0.npy" in told.output.replace(
        "\n", " "
    )


# ---------------------------------------------------------------- kinds of files


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("run")
    (place / "tiny.toml").write_text(conftest.TINY, encoding="utf-8")
    told = run("train", str(place / "tiny.toml"), "--run-dir", str(place / "run"))
    assert told.exit_code == 0, told.output
    return place / "run"


def png(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(len(str(path)))
    Image.fromarray(random.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(path)


def said(*arguments: str, code: int = 0) -> str:
    told = run(*arguments)
    assert told.exit_code == code, told.output
    return " ".join(told.output.split())


@pytest.mark.parametrize("where", ["overview.png", "a/overview.png"])
def test_one_picture_among_arrays_is_refused_by_name_and_displaces_nothing(
    tmp_path: Path, tiny_run: Path, where: str
) -> None:
    for name in ("a", "b"):
        saved(tmp_path / "cells" / name, cells(6, 40, 40, 1))
    said("init", "cells", "--device", "cpu")
    png(tmp_path / "cells" / where)
    words = f"cells: 1 .png file ({where}) lies among 12 .npy files (a/0.npy, a/1.npy, a/2.npy, ...)"
    Path("again.toml").unlink(missing_ok=True)
    for command in (
        ("init", "cells", "-o", "again.toml", "--device", "cpu"),
        ("train", "cells.toml"),
        ("embed", str(tiny_run), "cells", "-o", "out.parquet"),
    ):
        told = said(*command, code=2)
        assert words in told, told
        assert "move it out of the folder" in told


def test_arrays_that_lie_among_more_pictures_are_said_to_be_left_out(tmp_path: Path, tiny_run: Path) -> None:
    saved(tmp_path / "cells", cells(3, 40, 40, 1))
    for number in range(12):
        png(tmp_path / "cells" / f"{number}.png")
    words = "left out 3 .npy files (0.npy, 1.npy, 2.npy), which are read only where no pictures lie: put them into a"
    assert words in said("init", "cells", "--device", "cpu")
    embedded = said("embed", str(tiny_run), "cells", "-o", "out.parquet")
    assert words in embedded
    assert "passed over" not in embedded


def test_parquet_and_tar_files_are_named_with_what_reads_them(tmp_path: Path, tiny_run: Path) -> None:
    for name, end, use in (("hf", "parquet", "parquet"), ("shards", "tar", "webdataset")):
        for number in range(2):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{number}.{end}").touch()
        words = (
            f"; it holds 2 .{end} files, which a recipe's data_source.{use} trains on (docs/how-to/large-datasets.md)"
        )
        assert words in said("init", name, "--device", "cpu", code=2)
        assert words in said("embed", str(tiny_run), name, "-o", "out.parquet", code=2)
