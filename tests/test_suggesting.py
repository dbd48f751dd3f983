"""`sslkit init`: what is chosen for which images, that each line says why, and that what is written trains."""

from __future__ import annotations

import json
import os
import re
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import run
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sslkit import suggesting
from sslkit.errors import UserError
from sslkit.looking import Look
from sslkit.recipe import parse_recipe
from sslkit.suggesting.choices import Found, Machine, Wanted, choose
from sslkit.suggesting.described import described
from sslkit.suggesting.lines import Choices, power_of_two
from sslkit.suggesting.methods import method_named, methods
from sslkit.suggesting.writing import written

CPU = Machine("cpu", 2, 16 * 10**9, fast_bf16=True)
GPU = Machine("cuda", 16, 128 * 10**9, fast_bf16=True)
WANTED = Wanted("/data/photos", "photos")
BYOL = method_named("byol")


def look(images: int = 5000, height: int = 300, width: int = 400, **changes: Any) -> Look:
    facts: dict[str, Any] = {
        "files": images, "test_files": 0, "looked_at": images, "bytes": 10**6, "unreadable": [],
        "heights": [height] * images, "widths": [width] * images, "modes": {"RGB": images}, "channels": 3,
        "classes": {"a": images // 2, "b": images - images // 2}, "test_classes": None, "duplicates": [],
        "in_both": [], "value_range": None, "seconds_per_image": 0.004,
    }  # fmt: skip
    return Look(**{**facts, **changes})


def chosen(seen: Look, machine: Machine = CPU, seconds: float = 0.02, method: str = "byol", **how: Any) -> Choices:
    return choose(seen, machine, how.pop("wanted", WANTED), method_named(method), Found(seconds), **how)


# ---------------------------------------------------------------- size and network


@pytest.mark.parametrize(
    ("side", "machine", "size", "stem"),
    [
        (16, CPU, 32, "small_image"), (28, CPU, 32, "small_image"), (64, CPU, 64, "small_image"),
        (96, CPU, 96, None), (400, CPU, 96, None), (400, GPU, 224, None), (32, GPU, 32, "small_image"),
    ],
)  # fmt: skip
def test_views_are_as_large_as_the_images_allow_and_the_machine_bears(
    side: int, machine: Machine, size: int, stem: str | None
) -> None:
    made = chosen(look(200, side, side), machine)
    assert made.value("view_generator.size") == size
    assert made.value("backbone.stem") == stem
    assert made.value("view_generator.blur") == ([1.0, 0.1] if size >= 96 else [0.0, 0.0])


def test_where_the_hours_do_not_suffice_the_network_is_cheaper_and_the_finding_is_accepted_with_a_reason() -> None:
    made = chosen(look(200, 32, 32), frugal=True)
    assert made.value("backbone.stem") == "default"
    assert made.value("train.accept") == ["stem_too_coarse"]
    assert chosen(look(200, 32, 32)).value("train.accept") is None
    many = look(1000, 300, 300, files=50_000)
    assert chosen(many, GPU).value("backbone.model") == "resnet50"
    assert chosen(many, GPU, frugal=True).value("backbone.model") == "resnet18"
    assert chosen(many, GPU, frugal=True).value("view_generator.size") == 128
    assert chosen(many, CPU).value("backbone.model") == "resnet18"


def test_a_size_that_is_asked_for_is_taken() -> None:
    made = chosen(look(200), wanted=replace(WANTED, size=48))
    assert (made.value("view_generator.size"), made.value("backbone.stem")) == (48, "small_image")


# ---------------------------------------------------------------- data


def test_squares_are_kept_where_they_are_the_picture_and_fit_and_files_are_read_otherwise() -> None:
    made = chosen(look(500, 300, 300))
    assert (made.value("data_source.size"), made.value("data_source.crops_from")) == (192, None)
    assert chosen(look(500, 40, 40)).value("data_source.size") == 40
    assert chosen(look(500, 20, 20)).value("data_source.size") == 32
    oblong = chosen(look(500, 300, 400))
    assert (oblong.value("data_source.size"), oblong.value("data_source.crops_from")) == (96, "original")
    little = replace(CPU, memory=10**7)
    assert chosen(look(500, 300, 300), little).value("data_source.crops_from") == "original"
    slow = chosen(look(500, 3000, 4000, seconds_per_image=0.2))
    assert slow.value("data_source.crops_from") is None
    assert any("ends are not seen" in note for note in slow.notes)


def test_headers_are_enough_where_decoding_everything_takes_long() -> None:
    many = look(1000, files=10**6)
    assert chosen(many).value("data_source.check") == "headers"
    assert chosen(many, GPU).value("data_source.check") is None, "four minutes on 16 cores"


def test_what_cannot_be_read_is_allowed_for_and_named() -> None:
    bad = [{"path": f"{i}.jpg", "problem": "is empty"} for i in range(5)]
    made = chosen(look(400, unreadable=bad, looked_at=400))
    assert made.value("data_source.max_bad") == pytest.approx(0.014)
    (line,) = [line for line in made.lines if line.key == "data_source.max_bad"]
    assert line.why == "5 of 400 cannot be read, and are left out: 0.jpg, 1.jpg, 2.jpg and 2 more"
    assert chosen(look(400)).value("data_source.max_bad") is None


def test_what_cannot_be_read_is_allowed_for_in_the_set_that_has_most_of_it() -> None:
    bad = [{"path": "test/a/0.jpg", "problem": "is empty"}]
    made = chosen(look(100, unreadable=bad, looked_at=108, test_files=8))
    assert made.value("data_source.max_bad") == pytest.approx(0.126)
    (line,) = [line for line in made.lines if line.key == "data_source.max_bad"]
    assert line.why == "1 of 108 cannot be read, and are left out: test/a/0.jpg; 12% of the test images"
    bad = [{"path": f"train/a/{i}.jpg", "problem": "is empty"} for i in range(10)]
    assert chosen(look(100, unreadable=bad, looked_at=200, test_files=100)).value("data_source.max_bad") >= 0.1


@pytest.mark.parametrize(
    ("changes", "held"),
    [
        ({"classes": dict.fromkeys("abcd", 1)}, False),
        ({"classes": {"a": 2, "b": 2}}, True),
        ({"classes": {"a": 2, "b": 1}, "duplicates": [["a/0.png", "a/1.png"]]}, False),
        ({"classes": {"a": 2, "b": 1}, "duplicates": [["train/a/0.png", "train/a/1.png"]]}, False),
        ({"classes": {"a": 1, "b": 2}, "duplicates": [["a/0.png", "b/1.png"]]}, False),
        ({"classes": {"a": 2, "b": 1}, "duplicates": [["a/0.png", "b/1.png"]]}, True),
        ({"classes": {"a": 2, "b": 1}, "unreadable": [{"path": "a/0.png", "problem": "is empty"}]}, False),
    ],
)
def test_images_are_held_out_where_a_class_has_two_that_differ(changes: dict[str, Any], held: bool) -> None:
    made = chosen(look(4, **changes))
    assert made.value("data_source.hold_out") == (0.1 if held else None)
    (knn,) = [line for line in made.lines if line.key == "observers.0.use"]
    assert made.value("observers.0.enabled") is (None if held else False), knn
    if not held:
        (off,) = [line for line in made.lines if line.key == "observers.0.enabled"]
        assert off.why.startswith("no class has two images that differ")


def test_channels_and_ranges() -> None:
    grey = chosen(look(channels=1, modes={"grey": 5000}))
    assert grey.value("data_source.channels") == 1
    assert [grey.value(f"view_generator.{key}") for key in ("saturation", "hue", "grayscale")] == [0.0] * 3
    bands = chosen(look(channels=8, modes={"8 bands uint16": 5000}, value_range=(3.0, 9000.126)))
    assert bands.value("data_source.value_range") == [3.0, 9000.13]
    assert bands.value("view_generator.hue") == 0.0
    few = look(channels=1, value_range=(3.0, 900.0), modes={"grey": 90, "16-bit grey": 10})
    dark = chosen(few)
    assert dark.value("data_source.value_range") is None
    assert "between 3 and 900" in dark.notes[0]
    assert chosen(look()).value("view_generator.hue") == 0.1


def test_labels_are_held_out_where_there_is_no_test_set_and_knn_is_off_without_labels() -> None:
    made = chosen(look(300))
    assert made.value("data_source.hold_out") == 0.1
    assert made.value("observers.0.k") == 67, "half of 135, which are left of each class"
    with_test = chosen(look(300, test_files=60, test_classes={"a": 30, "b": 30}))
    assert with_test.value("data_source.hold_out") is None
    for changes in ({"classes": None}, {"classes": {"a": 300}}, {"test_files": 9, "test_classes": None}):
        made = chosen(look(300, **changes))
        assert made.value("observers.0.enabled") is False
        assert made.value("observers.1.enabled") is False
    mixed = chosen(look(300, classes=None), wanted=replace(WANTED, mixed=True))
    assert mixed.value("data_source.classes") == "none"


def test_k_is_below_what_the_bank_has_of_a_class() -> None:
    classes = {str(number): 100 for number in range(100)}
    assert chosen(look(10_000, classes=classes)).value("observers.0.k") == 15, "3,000 in the bank: 30 of each class"
    assert chosen(look(60_000, 32, 32), GPU).value("observers.0.k") == 200


# ---------------------------------------------------------------- training


@pytest.mark.parametrize(
    ("images", "method", "batch"),
    [(40, "byol", 32), (300, "byol", 32), (5000, "byol", 256), (300, "simclr", 128), (2000, "vicreg", 256)],
)
def test_the_batch_follows_the_images_and_is_larger_where_images_are_compared(
    images: int, method: str, batch: int
) -> None:
    assert chosen(look(images), method=method).value("train.batch_size") == batch


def test_epochs_are_what_the_hours_have() -> None:
    seen = look(5000, 32, 32)
    made = chosen(seen, seconds=0.02)
    spent = made.epochs * (4500 // 256) * 256 * 0.02
    assert 0.85 * 3600 < spent <= 0.9 * 3600
    longer = chosen(seen, seconds=0.02, wanted=replace(WANTED, hours=3))
    assert longer.epochs == pytest.approx(3 * made.epochs, abs=3)
    assert chosen(look(100), seconds=0.001).epochs == 400
    short = chosen(look(100_000, 32, 32), seconds=0.1)
    assert short.epochs == 1
    assert any("little for any method" in note for note in short.notes)


def test_a_gpu_whose_memory_is_too_small_gets_a_smaller_batch() -> None:
    made = choose(look(5000), GPU, WANTED, BYOL, Found(0.001, 64))
    assert made.value("train.batch_size") == 64


def test_tau_and_optimizer_follow_the_length() -> None:
    short, long = chosen(look(300), seconds=0.1), chosen(look(50_000, 32, 32), GPU, seconds=0.0001)
    assert short.value("target_updater.tau")["start"] == 0.9
    assert long.value("target_updater.tau")["start"] == 0.99
    assert (short.value("optimizer.use"), long.value("optimizer.use")) == ("adamw", "lars")


def why(made: Choices, key: str) -> str:
    (line,) = [line for line in made.lines if line.key == key]
    return line.why


def test_the_reasons_have_the_runs_own_figures() -> None:
    short, long = chosen(look(300, 32, 32), seconds=0.1), chosen(look(90_000, 32, 32), GPU, seconds=0.0005)
    steps = short.epochs * (270 // 32)
    tau = (
        f"at first the mean of some 10 steps; byol_cifar10's 0.99, of some 100, is for longer runs than {steps:,} steps"
    )
    assert why(short, "target_updater.tau") == tau
    assert "0.99, of some 100, is for shorter runs than" in why(chosen(look(900_000, 32, 32), GPU, seconds=1e-5),
                                                                "target_updater.tau")  # fmt: skip
    assert why(short, "data_source.use") == "300 image files, of which a tenth is held out"
    assert why(chosen(look(300, classes=None)), "data_source.use") == "300 image files to train on"
    with_test = chosen(look(300, test_files=60, test_classes={"a": 30, "b": 30}))
    assert why(with_test, "data_source.use") == "300 image files to train on, 60 to test on"
    assert (
        why(short, "train.precision")
        == "faster on a CPU that multiplies in it, as this one; loss and weights in float32"
    )
    assert why(long, "train.precision") == "of networks; loss and weights in float32"
    assert why(chosen(look(300)), "view_generator.blur") == "BYOL, appendix B"
    assert why(chosen(look(300), method="simclr"), "view_generator.blur") == "SimCLR, appendix A"
    middle = "px; the shorter sides of the images are 300 px in the median"
    assert why(chosen(look(300)), "view_generator.size") == f"{middle}; 224 is for a GPU"
    assert why(chosen(look(300), GPU), "view_generator.size") == middle
    assert why(chosen(look(300), GPU, frugal=True), "view_generator.size") == f"{middle}; 224 with more hours"
    assert why(chosen(look(300, 90, 90)), "view_generator.size").endswith("are 90 px in the median")


@pytest.mark.parametrize("epochs", [1, 2, 13, 20, 21, 32, 39, 40, 41, 399])
def test_knn_is_measured_as_often_as_is_said(epochs: int) -> None:
    made = chosen(look(300, 32, 32), seconds=0.9 * 3600 / (256 * (epochs + 0.5)))
    assert made.epochs == epochs
    every = made.value("observers.0.every_epochs")
    times = sum(epoch % every == 0 or epoch == epochs for epoch in range(1, epochs + 1))
    assert times <= 20
    assert why(made, "observers.0.every_epochs") == f"{times} time{'s' * (times > 1)} in the run, and before it"


@pytest.mark.parametrize("seconds", [1e-4, 0.003, 0.02, 0.3])
def test_a_run_that_dies_loses_a_tenth_of_itself_or_five_minutes(seconds: float) -> None:
    made = chosen(look(300, 32, 32), seconds=seconds)
    steps, every = made.epochs * (270 // 32), made.value("train.checkpoint_every")
    if steps * 32 * seconds < 60:
        assert every == steps
    else:
        assert 10 * every <= steps
        assert every * 32 * seconds <= 330
        assert ("min" in why(made, "train.checkpoint_every")) == (every * 32 * seconds >= 90)


def test_few_images_are_told_of_weights_that_others_trained() -> None:
    assert any("init_from" in note for note in chosen(look(2999)).notes)
    assert not any("init_from" in note for note in chosen(look(3000)).notes)


def test_queues_fit_the_images() -> None:
    assert chosen(look(1000), method="mocov2").value("loss.queue") <= 450
    assert chosen(look(60_000, 32, 32), GPU, method="mocov2").value("loss.queue") <= 27_000
    assert chosen(look(80_000, 32, 32), GPU, method="mocov2").value("loss.queue") == 32_768


@given(st.floats(0.1, 1e9))
def test_powers_of_two(number: float) -> None:
    found = power_of_two(number)
    assert found == 1 or found <= number
    assert 2 * found > number


# ---------------------------------------------------------------- the file

SIDES = st.lists(st.integers(1, 4000), min_size=1, max_size=9)


@st.composite
def looks(draw: st.DrawFn) -> Look:
    heights, number = draw(SIDES), draw(st.integers(4, 2_000_000))
    widths = draw(st.lists(st.integers(1, 4000), min_size=len(heights), max_size=len(heights)))
    names = st.text(min_size=1, max_size=9)
    counts = st.dictionaries(names, st.integers(1, 10**6), max_size=9)
    classes, test = draw(st.none() | counts), draw(st.none() | counts)
    bad = draw(st.lists(st.fixed_dictionaries({"path": names, "problem": names}), max_size=4))
    channels = draw(st.sampled_from([1, 3]))
    return look(
        number, heights=heights, widths=widths, classes=classes, test_classes=test, unreadable=bad,
        looked_at=len(heights) + len(bad), test_files=sum((test or {}).values()), channels=channels,
        modes={draw(names): 3}, seconds_per_image=draw(st.floats(1e-5, 2)),
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(looks(), st.sampled_from([CPU, GPU]), st.sampled_from(methods()), st.floats(1e-5, 1), st.booleans())
def test_every_text_is_the_choices_and_a_recipe_in_which_each_line_says_why(
    seen: Look, machine: Machine, method: str, seconds: float, frugal: bool
) -> None:
    made = choose(seen, machine, WANTED, method_named(method), Found(seconds), frugal=frugal)
    text = written(made, "a head")
    assert tomllib.loads(text) == made.tables()
    assert all(line.why for line in made.lines)
    lines = text.splitlines()
    for before, line in zip(["", *lines], lines, strict=False):
        assert len(line) <= 120 or "#" not in line
        if " = " in line and not line.startswith(("#", " ")):
            assert " # " in line or before.startswith("#"), line
    assert len({line.key for line in made.lines}) == len(made.lines)
    recipe = parse_recipe(text, "r.toml")
    assert recipe.train.batch_size <= max(2, seen.files)
    assert described(seen)


# ---------------------------------------------------------------- the command


def pictures(folder: Path, number: int, size: tuple[int, int] = (40, 40), mode: str = "RGB") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(number)
    for i in range(number):
        coarse = random.integers(0, 255, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode).save(folder / f"{i}.png")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is timed: an image takes 20 ms."""
    monkeypatch.setattr(suggesting, "speed", lambda recipe, batch, machine: (0.02 * batch, True))
    monkeypatch.setenv("SSLKIT_DATA", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def test_a_folder_becomes_a_recipe_that_check_has_nothing_to_say_of(tmp_path: Path) -> None:
    pictures(tmp_path / "my photos" / "cat", 40)
    pictures(tmp_path / "my photos" / "dog", 30)
    told = run("init", "my photos", "--device", "cpu")
    assert told.exit_code == 0, told.output
    assert "70, of which a tenth is held out" in told.output
    assert "note: 70 images are few: weights that others trained are a better" in told.output.replace("\n", " ")
    assert "sslkit train ./my-photos.toml" in told.output
    assert "ERROR" not in told.output
    assert "warning" not in told.output
    checked = run("check", "my-photos.toml")
    assert checked.exit_code == 0
    assert "VERDICT  healthy" in checked.output
    again = run("init", "my photos", "--device", "cpu")
    assert again.exit_code == 2
    assert "my-photos.toml: is there already and was left alone" in again.output


def test_a_folder_that_nobody_prepared(tmp_path: Path) -> None:
    root = tmp_path / "things"
    pictures(root, 12)
    pictures(root / "deep" / "deeper", 12, (90, 40), "L")
    pictures(root / "alpha", 12, (40, 41), "RGBA")
    pixels = np.arange(1600, dtype=np.uint16).reshape(40, 40) * 40
    Image.fromarray(pixels).save(root / "sixteen.png")
    (root / "copy.png").write_bytes((root / "1.png").read_bytes())
    (root / "broken.png").write_bytes((root / "2.png").read_bytes()[:200])
    (root / "empty.jpg").touch()
    told = run("init", "things", "-o", "out/r.toml", "--device", "cpu")
    assert told.exit_code == 0, told.output
    assert "equal files" in told.output
    assert "unreadable" in told.output
    tables = tomllib.loads(Path("out/r.toml").read_text())
    assert tables["name"] == "r", "after its file: two recipes of one folder have a run directory each"
    assert re.search(r"\d+ images lie beside 2 folders, as \S+: folders can be no classes", told.output)
    assert tables["data_source"]["classes"] == "none"
    assert tables["data_source"]["max_bad"] > 2 / 40
    assert tables["observers"][0]["enabled"] is False
    checked = run("check", "out/r.toml")
    assert checked.exit_code == 0
    assert "no labels: the verdict rests on spread, rank and LiDAR" in checked.output


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (("train/a", "train/b", "test/a", "test/b", "val/a"), "holds both test/ and val/"),
        (("train/a", "train/b", "test/a", "test/c"), "class folder (c) for which"),
        (("train/a", "train/b", "other"), "holds train/ beside other"),
        (("train", "train/a", "test/a"), "train: 6 images lie beside 1 folder, as"),
        (("", "test"), "is test/ there to test on?"),
    ],
)
def test_test_images_are_never_trained_on(tmp_path: Path, sets: Sequence[str], says: str) -> None:
    for name in sets:
        pictures(tmp_path / "p" / name, 6)
    told = run("init", "p", "--device", "cpu")
    assert told.exit_code == 2, told.output
    assert says in told.output.replace("\n", " "), told.output
    assert not Path("p.toml").exists()
    if "train/a" in sets and "train" not in sets:
        assert "`sslkit init p/train` takes" in told.output.replace("\n", " ")
        alone = run("init", "p/train", "--device", "cpu")
        assert alone.exit_code == 0, alone.output
        assert tomllib.loads(Path("train.toml").read_text())["data_source"]["hold_out"] == 0.1


def test_an_image_of_each_class_is_enough(tmp_path: Path) -> None:
    pictures(tmp_path / "p", 16)
    for file in list((tmp_path / "p").iterdir()):
        (tmp_path / "p" / file.stem).mkdir()
        file.rename(tmp_path / "p" / file.stem / "x.png")
    told = run("init", "p", "--device", "cpu")
    assert told.exit_code == 0, told.output
    assert "no class has two images that differ" in told.output.replace("\n", " ")
    checked = run("check", "p.toml")
    assert checked.exit_code == 0, checked.output


def test_a_broken_image_among_few_to_test_on(tmp_path: Path) -> None:
    for name, number in (("train/a", 50), ("train/b", 50), ("test/a", 4), ("test/b", 4)):
        pictures(tmp_path / "p" / name, number)
    (tmp_path / "p" / "test" / "a" / "0.png").write_bytes(b"")
    told = run("init", "p", "--device", "cpu")
    assert told.exit_code == 0, told.output
    assert run("check", "p.toml").exit_code == 0


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text elsewhere")
def test_a_folder_whose_name_is_no_text(tmp_path: Path) -> None:
    folder = os.fsdecode(b"bad\xff")
    pictures(tmp_path / folder, 8)
    with pytest.raises(UserError, match=r"bad\\udcff: is no UTF-8 text.*; rename the folder"):
        suggesting.init(folder, device="cpu")


def test_json_has_look_choices_and_reasons(tmp_path: Path) -> None:
    pictures(tmp_path / "p", 40)
    told = run("init", "p", "--json", "--device", "cpu")
    found = json.loads(told.stdout)
    assert found["look"]["files"] == 40
    assert found["recipe"] == "p.toml"
    assert all(line["why"] for line in found["choices"])
    assert found["look"]["heights"] == [40] * 40
    assert '\n  "heights": [40, 40, ' in told.stdout
    assert len(told.stdout.splitlines()) < 120, "a line for each fact, not for each image"


def test_mistakes_are_said_in_a_line(tmp_path: Path) -> None:
    pictures(tmp_path / "p", 3)
    (tmp_path / "none").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "bad").mkdir()
    for number in range(5):
        (tmp_path / "bad" / f"{number}.png").write_bytes(b"no image")
    for arguments, says in (
        (["nowhere"], "nowhere: is not there"),
        (["file"], "file: is no folder"),
        (["p"], "3 images are nothing to train on"),
        (["bad"], "none of the 5 files looked at can be read"),
        (["p", "--method", "simsam"], "did you mean 'simsiam'?"),
    ):
        told = run("init", *arguments)
        assert told.exit_code == 2, told.output
        assert says in told.output.replace("\n", " "), told.output
    assert run("init", "none").exit_code == 2


def every(names: Sequence[str]) -> list[Any]:
    return [name if name in ("byol", "simclr") else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("method", every(methods()))
def test_every_methods_recipe_is_silent_on_a_few_hundred_labelled_images(tmp_path: Path, method: str) -> None:
    for name in ("a", "b"):
        pictures(tmp_path / "p" / name, 160, (32, 32))
    told = run("init", "p", "--method", method, "--device", "cpu")
    assert told.exit_code == 0, told.output
    assert "warning" not in told.output
    assert "ERROR" not in told.output


def test_refusals_come_before_the_long_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p").mkdir()
    Path("p.toml").touch()
    monkeypatch.setattr(suggesting, "_look", lambda *_: pytest.fail("looked before it refused"))
    with pytest.raises(UserError, match="is there already"):
        suggesting.init("p")
