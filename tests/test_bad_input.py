"""What strangers and accidents put before sslkit: recipes and images of every bad kind, and one line about each."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TINY
from PIL import Image

from sslkit import checkpoint, launch, sources
from sslkit.api import DataInfo
from sslkit.data import Feed
from sslkit.errors import RunFailed, SslkitError, UserError, did_you_mean, printable
from sslkit.recipe import parse_recipe, read_recipe
from sslkit.rules import Trajectory
from sslkit_datasets import CIFAR10, Folder, Parquet
from sslkit_datasets import images as images_module
from sslkit_datasets.decode import decode


def told(call: Callable[[], object]) -> tuple[str, ...]:
    """The lines of the error that a call ends in."""
    with pytest.raises(SslkitError) as caught:
        call()
    assert all(line.isprintable() for line in caught.value.lines)
    return caught.value.lines


# ---------------------------------------------------------------- recipes: every misspelt key


def misspelt(key: str) -> set[str]:
    """The key with one letter dropped, doubled or swapped with the next."""
    found = set()
    for i in range(len(key)):
        found |= {
            key[:i] + key[i + 1 :],
            key[:i] + key[i] + key[i:],
            key[:i] + key[i + 1 : i + 2] + key[i] + key[i + 2 :],
        }
    return found - {key, ""}


KEY = re.compile(r"(?<![\w\"'-])([A-Za-z_][\w-]*)(?=\s*=[^=]|\]|\.)")


@pytest.mark.parametrize("name", sources.shipped())
def test_every_misspelt_key_of_a_shipped_recipe_is_told_with_its_line_and_the_right_name(name: str) -> None:
    path = sources.shipped()[name]
    lines = path.read_text(encoding="utf-8").split("\n")
    tried, unsuggested = 0, 0
    for number, line in enumerate(lines):
        for match in KEY.finditer("" if line.startswith("#") else line.split("#")[0]):
            wrongs = sorted(misspelt(match[1]))
            for wrong in wrongs if name in ("byol_cifar10", "dino_images224") else wrongs[:3]:
                changed = [*lines[:number], line[: match.start(1)] + wrong + line[match.end(1) :], *lines[number + 1 :]]
                found = told(lambda changed=changed: parse_recipe("\n".join(changed), str(path)))  # type: ignore[misc]
                here = [text for text in found if text.startswith(f"{path}:{number + 1}: ")]
                assert here, (number + 1, wrong, found)
                unsuggested += not any(f"did you mean {match[1]!r}" in text for text in here)
                tried += 1
    assert tried > 10
    # `sue` is as near to `hue` as to `use`.
    assert unsuggested <= max(1, 0.01 * tried)


def test_a_misspelt_use_is_told_at_its_own_line() -> None:
    text = TINY.replace('use = "digits"', 'sue = "digits"')
    (line,) = told(lambda: parse_recipe(text, "r.toml"))
    assert line.startswith("r.toml:5: data_source.sue: unknown option; did you mean 'use'? The table needs a key 'use'")


def test_the_suggestion_is_no_name_that_is_there_already() -> None:
    assert did_you_mean("ue", ["use", "hue"]) == "; did you mean 'use'?"
    assert did_you_mean("ue", ["hue", "use"]) == "; did you mean 'hue'?"
    assert did_you_mean("rl", ["lr", "eps"]) == "; did you mean 'lr'?"
    assert did_you_mean("x" * 10**6, ["lr"]) == ""


NUMBERS = [
    "seed", "data_source.prints", "backbone.pool", "backbone.widths.0", "projector.layers", "projector.hidden_dim",
    "target_updater.tau.start", "optimizer.lr.peak", "optimizer.lr.warmup_steps", "optimizer.weight_decay",
    "train.epochs", "train.batch_size", "train.log_every", "observers.knn.k", "observers.knn.temperature",
]  # fmt: skip


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", str(10**30), str(-(2**63) - 1), "'x'", "true", "[]", "{}"])
def test_no_option_takes_what_is_no_number(key: str, value: str) -> None:
    (line,) = told(lambda: parse_recipe(TINY, "r.toml", [f"{key}={value}"]))
    assert line.startswith(f"--set {key}={value}: ")


# ---------------------------------------------------------------- recipes: files that are none


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("extends = 1".encode("utf-16"), "is UTF-16 text; a recipe is a TOML file in UTF-8"),
        (b"a = 1\nb = '\xe9'", r"r.toml:2: is not UTF-8 text \(byte 11\)"),
        (b"a = '\0'", "r.toml:1: not valid TOML: "),
        (b"\x80\x04\x95", "r.toml:1: is not UTF-8 text"),
        (b"a = 1\n" * 50_000, "is larger than 262,144 bytes, so it is no recipe"),
        (b"seed = " + b"9" * 5000, "not valid TOML: Exceeds the limit"),
        (b"seed = 9223372036854775808", "r.toml:1: seed: is an integer of more than 64 bits"),
        (b"\nname = 1979-05-27", "r.toml:2: name: is a date or time, and no option takes one; quote it"),
        (b"a = [{b = [07:32:00]}]", "r.toml:1: a.0.b.0: is a date or time"),
        (b"a = " + b"[" * 300 + b"]" * 300, "a is nested more than 32 levels deep"),
        (b"a = " + b"[" * 50_000, "nested too deeply"),
        (b"a" + b".a" * 90 + b" = 1", "a is nested more than 32 levels deep"),
        (b"\na" + b".a" * 100_000 + b" = 1", "r.toml:2: not valid: a key of more than 100 parts"),
        (b"[" + b"'a' . " * 40_000 + b"a]", "r.toml:1: not valid: a key of more than 100 parts"),
        (b'"\\u001b[31m\\n" = 1\n' + TINY.encode(), r"r.toml:1: \\x1b\[31m\\n: unknown option"),
        (b"k" * 9_000 + b" = 1\n" + TINY.encode(), r"r.toml:1: k{57}\.\.\.: unknown option"),
    ],
)  # fmt: skip
def test_what_is_no_recipe_is_told_in_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.toml").write_bytes(content)
    (line,) = told(lambda: read_recipe("./r.toml"))
    assert re.search(says, line), line


def test_a_byte_order_mark_and_other_line_ends_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "tiny.toml"
    path.write_bytes(b"\xef\xbb\xbf" + TINY.replace("\n", "\r\n").encode())
    assert read_recipe(str(path)) == parse_recipe(TINY, "tiny.toml")
    path.write_bytes(TINY.replace("\n", "\r\n").replace("epochs = 2", "epochs = 0").encode())
    (line,) = told(lambda: read_recipe(str(path)))
    assert line.startswith(f"{path}:{TINY[: TINY.index('epochs = 2')].count(chr(10)) + 1}: train.epochs: ")


@pytest.mark.parametrize(
    "text",
    [
        "".join(f"k{i}=1\n" for i in range(25_000)),
        "a = {" + ",".join(f"k{i}=1" for i in range(25_000)) + "}",
        "[[observers]]\n" * 15_000,
        "extends = './base.toml'\n" + "".join(f"k{i}=2\n" for i in range(20_000)),
        "extends = './observers.toml'\n" + "[[observers]]\nuse='knn'\n" * 8_000,
    ],
    ids=["keys", "inline", "tables", "overlay", "observers"],
)
def test_many_mistakes_are_a_page_and_take_no_time_that_grows_with_their_square(tmp_path: Path, text: str) -> None:
    (tmp_path / "base.toml").write_text("".join(f"k{i}=1\n" for i in range(20_000)))
    (tmp_path / "observers.toml").write_text("[[observers]]\nuse='knn'\n" * 8_000)
    (tmp_path / "many.toml").write_text(text)
    found = told(lambda: read_recipe(str(tmp_path / "many.toml")))
    assert 3 <= len(found) <= 51


def test_pipes_devices_links_and_long_names_are_no_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.toml")
    Path("loop.toml").symlink_to("loop.toml")
    Path("folder.toml").mkdir()
    Path("gone.toml").symlink_to("nowhere")
    for name, says in [
        ("pipe.toml", "is a pipe, a socket or a device; a recipe is a regular file"),
        ("/dev/zero", "is a pipe, a socket or a device"),
        ("loop.toml", "cannot be read: Too many levels of symbolic links"),
        ("folder.toml", "is a folder; give a recipe file in it"),
        ("gone.toml", "no such recipe file"),
        (f"{'x' * 5000}.toml", "cannot be read: File name too long"),
        ("a\0.toml", "a\\x00.toml: cannot be read: embedded null byte"),
    ]:
        (line,) = told(lambda name=name: read_recipe(name))  # type: ignore[misc]
        assert says in line
        Path("over.toml").write_text(f"seed = 1\nextends = {json.dumps('./' * (name[0] != '/') + name)}")
        (line,) = told(lambda: read_recipe("over.toml"))
        assert line.startswith("over.toml:2: extends: ")
        assert says in line


def test_bases_end_somewhere(tmp_path: Path) -> None:
    for number in range(2_000):
        (tmp_path / f"{number}.toml").write_text(f'extends = "./{number + 1}.toml"')
    (line,) = told(lambda: read_recipe(str(tmp_path / "0.toml")))
    assert line.endswith("more than 16 recipes extend one another in a row")


NAMES = [
    "../x", "/etc/x", "..", ".", "", "a/b", "a\\b", "-x", ".x", "a b", "a\nb", "x" * 101, "\u202egnp.exe", "é", "$(id)",
    "~", "a\x1b[31m", "CON:", "a;b", "*",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_no_name_leads_out_of_the_folder_of_runs(name: str) -> None:
    quoted = json.dumps(name)
    for text, overrides in [(TINY.replace('"tiny"', quoted), []), (TINY, [f"name={quoted}"]), (TINY, [f"name={name}"])]:
        (line,) = told(lambda t=text, o=overrides: parse_recipe(t, "r.toml", o))  # type: ignore[misc]
        assert "name: should be letters, digits, dots, dashes and underscores, not " in line


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("seed=1\ntrain.epochs=9", r"seed: should be a valid integer, not '1\ntrain.epochs=9'"),
        (f"seed={'9' * 5000}", "seed: should be a valid integer"),
        (f"seed={'[' * 5000}", "is nested too deeply"),
        ("name=\udcff", "is not UTF-8 text"),
        ("seed=1979-05-27", "is a date or time"),
        (f"backbone.widths.{'9' * 5000}=1", "is a list of 2; name an element by its number"),
        ("=1", "should read key=value"),
        ("a..b=1", "should read key=value"),
        ("\x1b[31m=1", "\\x1b[31m: unknown option"),
    ],
)  # fmt: skip
def test_overrides_of_every_bad_kind(override: str, says: str) -> None:
    (line,) = told(lambda: parse_recipe(TINY, "r.toml", [override]))
    assert says in line


def test_an_empty_run_directory_is_no_directory(tiny: Path) -> None:
    with pytest.raises(UserError, match=r"--run-dir is empty|run_dir is empty"):
        launch.train(str(tiny), run_dir="")


def test_what_an_error_quotes_cannot_command_the_terminal() -> None:
    assert UserError("a\x1b[31m\nb\u202e", "é ü").lines == ("a\\x1b[31m\\nb\\u202e", "é ü")
    assert str(RunFailed("a\rb")) == "a\\rb"
    assert printable("\udcff") == "\\udcff"


def test_a_schedule_of_a_run_without_end_is_looked_at_here_and_there() -> None:
    steps = 10**13
    seen = Trajectory.of(lambda step: 2 * step / steps, steps)
    assert (seen.start, seen.most_at, seen.middle) == (0.0, steps - 1, 1.0)
    assert seen.above_one is not None
    assert abs(seen.above_one[0] / steps - 0.5) < 1e-5


# ---------------------------------------------------------------- images


def encoded(kind: str = "PNG", mode: str = "RGB", seed: int = 0, side: int = 12, **options: object) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, depth: int, colour: int, raw: bytes, extra: bytes = b"") -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


GOOD = {
    "cmyk.jpg": encoded("JPEG", "CMYK"),
    "palette.png": encoded("PNG", "P"),
    "see-through.png": encoded("PNG", "P", transparency=0),
    "grey.png": encoded("PNG", "L"),
    "rgba.png": encoded("PNG", "RGBA"),
    "bit.png": encoded("PNG", "1"),
    "one.png": encoded(side=1),
    "moving.webp": encoded("WEBP", save_all=True, append_images=[Image.new("RGB", (12, 12))]),
    "grey16.png": png(2, 2, 16, 0, (b"\0" + b"\xff\xff" * 2) * 2),
    "rgb16.png": png(2, 2, 16, 2, (b"\0" + b"\x80\x7f" * 6) * 2),
    "wrong-suffix.jpg": encoded("PNG"),
    "wide.png": png(3000, 1, 8, 0, b"\0" * 3001),
    "junk-after.jpg": encoded("JPEG") + b"junk" * 99,
}
TEXT_BOMB = chunk(b"zTXt", b"k\0\0" + zlib.compress(b"a" * 50_000_000))
BAD = {
    "bomb.png": (png(60_000, 60_000, 8, 2, b"\0" * 100), "more than 89,478,485"),
    "cut.jpg": (encoded("JPEG", side=64)[:900], "cannot be decoded"),
    "empty.png": (b"", r"is empty \(0 bytes\)"),
    "eps.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not a JPEG, PNG or WebP image"),
    "gif.png": (encoded("GIF"), "is not a JPEG, PNG or WebP image"),
    "letter.jpg": (b"Dear all,\n", "is not a JPEG, PNG or WebP image"),
    "profile-bomb.png": (png(1, 1, 8, 2, b"\0abc", TEXT_BOMB.replace(b"zTXt", b"iCCP", 1)), "cannot be decoded"),
    "svg.jpg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not a JPEG, PNG or WebP image"),
    "text-bomb.png": (png(1, 1, 8, 2, b"\0abc", TEXT_BOMB), "cannot be decoded"),
    "too-few-pixels.png": (png(100, 100, 8, 2, b"\0" * 99), "cannot be decoded"),
}


def test_16_bit_colours_lose_their_lower_byte() -> None:
    raw = b"\0" + struct.pack(">6H", 65535, 0, 32768, 257, 255, 256)
    assert decode(png(2, 1, 16, 2, raw), 3, None).transpose(1, 2, 0).tolist() == [[[255, 0, 128], [1, 0, 1]]]


def spoil(root: Path) -> None:
    for name, content in {**GOOD, **{name: content for name, (content, _) in BAD.items()}}.items():
        (root / name).write_bytes(content)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def info(tmp_path: Path, said: list[str]) -> DataInfo:
    return DataInfo(0, tmp_path / "cache", said.append)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    return tmp_path / "images"


def special(root: Path) -> dict[str, str]:
    """Things in a folder that are no files, by what is said of them."""
    os.mkfifo(root / "s-pipe.png")
    (root / "s-device.png").symlink_to("/dev/zero")
    (root / "s-gone.png").symlink_to(root / "nowhere")
    (root / "s-loop.png").symlink_to(root / "s-loop.png")
    with socket.socket(socket.AF_UNIX) as listening:
        before = Path.cwd()
        os.chdir(root)  # the path of a socket may be no longer than 107 bytes
        try:
            listening.bind("s-socket.png")
        finally:
            os.chdir(before)
    return {
        "s-device.png": "is a device, not a regular file",
        "s-gone.png": "cannot be read: No such file or directory",
        "s-loop.png": "cannot be read: Too many levels of symbolic links",
        "s-pipe.png": "is a pipe, not a regular file",
        "s-socket.png": "is a socket, not a regular file",
    }


@pytest.mark.parametrize("memory", [4.0, 1e-9])
def test_a_folder_with_everything_lists_exactly_what_is_bad(root: Path, info: DataInfo, memory: float) -> None:
    spoil(root)
    expected = {**{name: problem for name, (_, problem) in BAD.items()}, **special(root)}
    opened = Folder(root=str(root), size=8, max_bad=0.9, memory_limit_gb=memory, workers=2).build(info)
    assert [bad["path"] for bad in opened.bad] == [str(root / name) for name in sorted(expected)]
    for bad, name in zip(opened.bad, sorted(expected), strict=True):
        assert re.search(expected[name], bad["problem"])
    assert len(opened.train) == len(GOOD)
    sound = [decode(GOOD[name], 3, 8) for name in sorted(GOOD)]
    assert np.array_equal(opened.train.read(torch.arange(len(GOOD))), np.stack(sound))


def test_above_the_cap_all_of_them_are_listed_in_a_file(
    root: Path, info: DataInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    spoil(root)
    (line,) = told(lambda: Folder(root=str(root), size=8, workers=2).build(info))
    (listed,) = tmp_path.glob("sslkit-bad-samples-*.jsonl")
    assert f"10 of 23 training images cannot be read (43%, more than max_bad = 0.1%): {root}/bomb.png" in line
    assert f" and 7 more (all of them: {listed}); mend or remove them, or raise data_source.max_bad" in line
    assert [json.loads(text)["path"] for text in listed.read_text().splitlines()] == [str(root / n) for n in BAD]


def test_parquet_lists_exactly_what_is_bad(tmp_path: Path, info: DataInfo) -> None:
    contents = [*GOOD.values(), *(content for content, _ in BAD.values()), None]
    pq.write_table(pa.table({"image": pa.array(contents, pa.binary())}), tmp_path / "a.parquet")
    opened = Parquet(path=str(tmp_path / "a.parquet"), size=8, max_bad=0.9, workers=2).build(info)
    rows = range(len(GOOD), len(contents))
    assert [bad["path"] for bad in opened.bad] == [f"{tmp_path / 'a.parquet'}, row {row}" for row in rows]
    for bad, problem in zip(opened.bad, [*(problem for _, problem in BAD.values()), "has no bytes"], strict=True):
        assert re.search(problem, bad["problem"])
    assert len(opened.train) == len(GOOD)


def test_a_file_too_large_to_be_an_image_is_not_read(
    root: Path, info: DataInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "a.png").write_bytes(encoded())
    with (root / "b.png").open("wb") as file:
        file.truncate(2**40)  # no byte of it is on the disk
    opened = Folder(root=str(root), size=8, max_bad=0.5, workers=1).build(info)
    assert [bad["problem"] for bad in opened.bad] == ["has 1,099,511,627,776 bytes, more than 1,073,741,824"]


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems refuse such names")
def test_names_that_are_no_text_are_shown_escaped(root: Path, info: DataInfo, said: list[str]) -> None:
    for folder in (b"\xff\xfe", b"a\nb"):
        os.mkdir(os.fsencode(root) + b"/" + folder)  # noqa: PTH102 a path in bytes
        for name, content in ((b"\xe9\n.png", encoded()), (b"\xe9.jpg", b"")):
            (root / os.fsdecode(folder) / os.fsdecode(name)).write_bytes(content)
    opened = Folder(root=str(root), size=8, max_bad=0.5, workers=1).build(info)
    assert opened.class_names == ("a\\nb", "\\udcff\\udcfe")
    assert [bad["path"] for bad in opened.bad] == [f"{root}/{f}/\\udce9.jpg" for f in ("a\\nb", "\\udcff\\udcfe")]
    assert all(text.isprintable() for text in said)


def test_files_beside_class_folders_are_mentioned(root: Path, info: DataInfo, said: list[str]) -> None:
    for name in ("a", "b", "none"):
        (root / name).mkdir()
    (root / "a" / "1.png").write_bytes(encoded())
    (root / "b" / "1.png").write_bytes(encoded())
    (root / "labels.csv").write_text("1,2")
    Folder(root=str(root), size=8).build(info)
    assert "passed over 1 file (labels.csv) with other suffixes" in said[0]
    assert "1 class folder (none) without images left out" in said[1]


def test_roots_that_are_none(root: Path, info: DataInfo, tmp_path: Path) -> None:
    (root / "a").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file.png").write_bytes(encoded())
    for where, says in [
        (root, "holds no images"),
        (tmp_path / "pipe", "is not a folder"),
        (tmp_path / "file.png", "is not a folder"),
        (tmp_path / "file.png" / "below", "does not exist"),
        (tmp_path / "loop", "cannot be read: Too many levels"),
        (tmp_path / ("x" * 300), "cannot be read: File name too long"),
    ]:
        (line,) = told(lambda where=where: Folder(root=str(where), size=8).build(info))  # type: ignore[misc]
        assert says in line


UNREADABLE = """
import os, sys
from pathlib import Path
from typing import Any
import torch, torchvision  # before the privileges to read them are dropped
import sslkit_datasets.cifar10, sslkit_datasets.folder, sslkit_datasets.parquet
from sslkit.api import DataInfo
from sslkit.errors import UserError
from sslkit_datasets import CIFAR10, Folder, Parquet
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
root = Path(sys.argv[1])
info = DataInfo(0, Path("/nowhere"), print)
found = Folder(root=str(root / "some"), size=8, max_bad=0.5, workers=1).build(info)
print([Path(b["path"]).name + " " + b["problem"] for b in found.bad])
for source in (Folder(root=str(root / "closed"), size=8), Folder(root=str(root / "closed" / "inner"), size=8),
               Folder(root=str(root / "classes"), size=8), Parquet(path=str(root / "closed" / "a.parquet")),
               CIFAR10(root=str(root / "cifar"), download=False)):
    try:
        source.build(info)
    except UserError as error:
        print(error)
"""


@pytest.mark.skipif(os.name == "nt", reason="needs the modes of POSIX")
def test_what_may_not_be_read_is_told() -> None:
    with tempfile.TemporaryDirectory() as folder:  # below tmp_path, which is closed to all but its owner
        Path(folder).chmod(0o755)
        lines = told_without_leave(Path(folder))
    assert lines[1] == "['2.png cannot be read: Permission denied']"
    assert len(lines) == 7
    assert all("cannot be read: Permission denied" in line for line in lines[2:]), lines


def told_without_leave(base: Path) -> list[str]:
    """What a process says that has no leave to read some of the data; as root it gives its privileges up first."""
    for folder in ("some", "closed", "classes/a", "classes/b", "cifar/cifar-10-batches-py"):
        (base / folder).mkdir(parents=True)
    for name in ("some/1.png", "some/2.png", "classes/a/1.png", "classes/b/1.png"):
        (base / name).write_bytes(encoded())
    (base / "cifar/cifar-10-batches-py/data_batch_1").write_bytes(b"x")
    closed = [base / n for n in ("some/2.png", "closed", "classes/b", "cifar/cifar-10-batches-py/data_batch_1")]
    try:
        for path in closed:
            path.chmod(0)
        done = subprocess.run(
            [sys.executable, "-c", UNREADABLE, str(base)], capture_output=True, text=True, check=False, timeout=60
        )
    finally:
        for path in closed:
            path.chmod(0o755)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


# ---------------------------------------------------------------- other sources


@pytest.mark.parametrize(
    "content", [b"", b"PAR1", b"PAR1" + b"\xff" * 64 + b"PAR1", b"a,b\n1,2\n"], ids=["empty", "cut", "nonsense", "csv"]
)
def test_files_that_are_no_parquet(tmp_path: Path, info: DataInfo, content: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    (line,) = told(lambda: Parquet(path=str(tmp_path)).build(info))
    assert line.startswith(f"{tmp_path / 'a.parquet'} cannot be read as a Parquet file: ")


def test_pipes_and_folders_are_no_parquet_and_no_cifar10(tmp_path: Path, info: DataInfo) -> None:
    (tmp_path / "parquet").mkdir()
    os.mkfifo(tmp_path / "parquet" / "a.parquet")
    (line,) = told(lambda: Parquet(path=str(tmp_path / "parquet")).build(info))
    assert "cannot be read as a Parquet file: it is a pipe" in line
    (line,) = told(lambda: Parquet(path=str(tmp_path / "parquet" / "a.parquet")).build(info))
    assert "is a pipe; name a file, a glob or a folder" in line
    (tmp_path / "cifar" / "cifar-10-python.tar.gz").mkdir(parents=True)
    (line,) = told(lambda: CIFAR10(root=str(tmp_path / "cifar")).build(info))
    assert "cifar-10-python.tar.gz is not a regular file; remove it" in line
    (tmp_path / "cifar" / "cifar-10-batches-py").mkdir()
    os.mkfifo(tmp_path / "cifar" / "cifar-10-batches-py" / "data_batch_1")
    (line,) = told(lambda: CIFAR10(root=str(tmp_path / "cifar")).build(info))
    assert "data_batch_1 is not the official file" in line


# ---------------------------------------------------------------- data that changes


def run_on(root: Path, tiny: Path, directory: Path, *more: str, steps: int) -> int:
    overrides = [
        "data_source.use=folder", f"data_source.root={root}", "data_source.size=16", "data_source.workers=1",
        "train.batch_size=4", "train.epochs=3", "train.checkpoint_every=2", "optimizer.lr.warmup_steps=1",
        *(f"observers.{name}.enabled=false" for name in ("knn", "health", "probe", "tensorboard", "report")), *more,
    ]  # fmt: skip
    return launch.train(str(tiny), overrides, steps=steps, run_dir=str(directory), device="cpu")


def pictures(root: Path, number: int = 16) -> None:
    for i in range(number):
        (root / f"{i:02}.png").write_bytes(encoded(seed=i, side=16))


def added(root: Path) -> None:
    (root / "99.png").write_bytes(encoded(seed=99))


def removed(root: Path) -> None:
    (root / "03.png").unlink()


def renamed(root: Path) -> None:
    (root / "03.png").rename(root / "99.png")


def changed(root: Path) -> None:
    (root / "03.png").write_bytes(encoded(seed=99))


def broken(root: Path) -> None:
    (root / "03.png").write_bytes(b"")


def test_data_that_changed_between_attempts_is_refused(root: Path, tiny: Path, tmp_path: Path) -> None:
    pictures(root)
    run_on(root, tiny, tmp_path / "run", steps=2)
    for change in (added, removed, renamed, changed, broken):
        change(root)
        (line,) = told(lambda: run_on(root, tiny, tmp_path / "run", "data_source.max_bad=0.5", steps=4))
        fewer, same = "16 training images, now 15", "16 training images, as many as now"
        images = {added: "16 training images, now 17", removed: fewer, broken: fewer}
        found = re.search(
            r"changed since this run began \((.*); fingerprint (\w+), now (\w+)\); put the old data", line
        )
        assert found, change
        assert (found[1], len(found[2]), len(found[3])) == (images.get(change, same), 12, 12), change
        (root / "99.png").unlink(missing_ok=True)
        pictures(root)
    assert run_on(root, tiny, tmp_path / "run", steps=4) == 0


@pytest.mark.parametrize("harm", [removed, changed, broken], ids=lambda f: f.__name__)
def test_an_image_that_is_harmed_while_it_is_read_ends_the_run_and_mended_it_goes_on(
    root: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: Callable[[Path], None]
) -> None:
    pictures(root)
    begin, reached = Feed._begin, []

    def harming(self: Feed, step: int, hands: Any) -> object:
        if step == 3 and not reached:
            reached.append(step)
            harm(root)
        return begin(self, step, hands)

    monkeypatch.setattr(Feed, "_begin", harming)
    (line,) = told(lambda: run_on(root, tiny, tmp_path / "run", "data_source.memory_limit_gb=1e-9", steps=12))
    assert "03.png" in line
    assert re.search("changed since|holds another image than when the run began", line)
    assert checkpoint.listed(tmp_path / "run" / "checkpoints")
    pictures(root)
    assert run_on(root, tiny, tmp_path / "run", "data_source.memory_limit_gb=1e-9", steps=12) == 0
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "done"


def test_a_file_that_was_copied_back_is_the_same(root: Path, info: DataInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures(root, 2)
    read = Folder(root=str(root), size=8, memory_limit_gb=1e-9).build(info).train
    hashed: list[bytes] = []
    original = images_module.hashlib.sha256
    monkeypatch.setattr(images_module.hashlib, "sha256", lambda data: hashed.append(data) or original(data))
    before = read.read(torch.arange(2))
    assert not hashed, "a file with its old size and time is not hashed again"
    pictures(root, 2)
    os.utime(root / "00.png", ns=(1, 1))
    assert torch.equal(read.read(torch.arange(2)), before)
    assert hashed
