"""Features of a folder that nobody prepared, in a file that a kill at any point does not change."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT
from conftest import run as sslkit_command
from PIL import Image
from test_python_api import mine

import sslkit
from sslkit import feature_files, registry
from sslkit.embedding import embed
from sslkit.features import features
from sslkit.opened_run import open_run
from sslkit_datasets import Folder
from sslkit_datasets.preparing import Preparation

SIDE = 16


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints at steps 5 and 10."""
    path = tmp_path_factory.mktemp("run") / "run"
    train = sslkit.Train(epochs=1, batch_size=128, checkpoint_every=5, keep_checkpoints=9)
    sslkit.train(mine(train=train), run_dir=path, quiet=True)
    return path


def picture(seed: int, *shape: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, seed: int = 0, *shape: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(seed, *(shape or (SIDE, SIDE, 3)))).save(path, "PNG")


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A folder of 21 images."""
    for number in range(21):
        save(tmp_path / "plain" / f"{number:02d}.png", number)
    return tmp_path / "plain"


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_files, "PART", 8)


def rows(path: Path) -> dict[str, list[float]]:
    return {row["path"]: row["feature"] for row in pq.read_table(path).to_pylist()}


def test_features_are_those_that_a_run_on_the_folder_would_measure(run: Path, plain: Path, tmp_path: Path) -> None:
    done = embed(run, plain, tmp_path / "out.parquet")
    opened = open_run(run)
    source = Folder(root=str(plain), size=SIDE).build(
        sslkit.api.DataInfo(seed=0, cache=tmp_path, say=lambda text: None)
    )
    indices = torch.arange(21)
    wanted = features(opened.backbone, source.train, indices, opened.views.clean, torch.device("cpu"))
    table = pq.read_table(done.path)
    assert table.column("path").to_pylist() == sorted(file.name for file in plain.iterdir())
    assert torch.equal(torch.tensor(table.column("feature").to_pylist()), wanted)
    assert (done.rows, done.left_out, done.anew) == (21, [], True)


def test_the_file_says_what_it_is_of(run: Path, plain: Path, tmp_path: Path) -> None:
    embed(run, plain, tmp_path / "out.parquet", checkpoint=5, batch=4)
    schema = pq.read_schema(tmp_path / "out.parquet")
    said = json.loads(schema.metadata[b"sslkit"])
    opened = open_run(run, checkpoint=5)
    assert said["weights"] == opened.weights
    assert (said["step"], said["branch"], said["feature_dim"], said["size"]) == (5, "online", 8, SIDE)
    assert (said["folder"], said["images"], said["rows"], said["left_out"]) == (str(plain), 21, 21, 0)
    assert said["mean"] == pytest.approx(opened.info.mean, abs=1e-5)
    assert said["std"] == pytest.approx(opened.info.std, abs=1e-5)
    assert schema.field("feature").type == pa.list_(pa.float32(), 8)


def unprepared(root: Path) -> Path:
    """What folders of photographs are like."""
    save(root / "beside folders.png")
    save(root / "a" / "b" / "c" / "deep.PNG", 1)
    save(root / "naïve ✓ [bold]\n<b>.png", 2)
    save(root / "grey.png", 3, 40, 30)
    save(root / "rgba.png", 4, 9, 50, 4)
    save(root / "one.png", 5, 1, 1, 3)
    Image.fromarray(picture(6, 20, 20).astype(np.uint16) * 257).save(root / "deep grey.png")
    Image.fromarray(picture(7, 20, 20, 3)).save(root / "photo.jpeg")
    Image.fromarray(picture(7, 20, 20, 3)).convert("CMYK").save(root / "print.jpg")
    (root / "empty.jpg").touch()
    (root / "page.jpg").write_text("<html>", encoding="utf-8")
    (root / "half.png").write_bytes((root / "grey.png").read_bytes()[:200])
    (root / "notes.txt").touch()
    (root / "no images").mkdir()
    save(root / ".hidden" / "secret.png")
    (root / "loop").symlink_to(root)
    (root / "nothing.png").symlink_to(root / "gone.png")
    os.mkfifo(root / "pipe.png")
    if sys.platform == "linux":
        shutil.copy(root / "one.png", os.fsencode(root) + b"/latin\xe9.png")
    return root


def test_a_folder_that_nobody_prepared(run: Path, tmp_path: Path) -> None:
    folder, out = unprepared(tmp_path / "photos"), tmp_path / "out.parquet"
    said = sslkit_command("embed", str(run), str(folder), "-o", str(out), "--batch", "4")
    assert said.exit_code == 0, said.output
    table = pq.read_table(out)
    assert table.column("path").to_pylist() == sorted([
        "beside folders.png", "a/b/c/deep.PNG", "naïve ✓ [bold]\n<b>.png", "grey.png", "rgba.png", "one.png",
        "deep grey.png", "photo.jpeg", "print.jpg",
    ])  # fmt: skip
    bad = [json.loads(line) for line in (tmp_path / "out.bad_samples.jsonl").read_text().splitlines()]
    problems = {row["path"]: row["problem"] for row in bad}
    assert problems.pop("latin\\udce9.png", "has a name that is no UTF-8; rename it").startswith("has a name")
    assert problems.pop("half.png").startswith("cannot be decoded")
    assert problems == {
        "empty.jpg": "is empty (0 bytes)",
        "page.jpg": "is not a JPEG, PNG or WebP image",
        "nothing.png": "cannot be read: No such file or directory",
        "pipe.png": "is a pipe, not a regular file",
    }
    assert "passed over files that do not end in .jpg, .jpeg, .png, .webp: 1\n" in said.output
    assert "passed over hidden files and folders: 1\n" in said.output
    assert f"left out {len(bad)} that cannot be read: " in said.output
    assert not (tmp_path / "out.parquet.parts").exists()
    assert all(np.isfinite(feature).all() for feature in rows(out).values())


def test_an_images_features_do_not_depend_on_those_beside_it(run: Path, tmp_path: Path) -> None:
    folder = unprepared(tmp_path / "photos")
    embed(run, folder, tmp_path / "many.parquet")
    embed(run, folder, tmp_path / "one.parquet", batch=1, workers=1)
    one = rows(tmp_path / "one.parquet")
    for name, feature in rows(tmp_path / "many.parquet").items():
        assert one[name] == pytest.approx(feature, rel=1e-4, abs=1e-5)


@pytest.mark.usefixtures("small_parts")
def test_killed_before_any_operation_on_files_it_goes_on_to_the_same_bytes(
    run: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill leaves what was there before the operation; nothing is cleaned up, no lock is taken back."""
    home, left = tmp_path / "home", tmp_path / "left"
    home.mkdir()
    (plain / "05.png").write_bytes(b"broken")

    def watched(owner: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            with monkeypatch.context() as own:
                for each, what, way in kept:
                    own.setattr(each, what, way)
                shutil.copytree(home, left / f"{len(list(left.iterdir())):03d}")
            return original(*args, **options)

        kept.append((owner, name, original))
        monkeypatch.setattr(owner, name, call)

    kept: list[tuple[Any, str, Any]] = []
    left.mkdir()
    for owner, name in (
        (Path, "mkdir"), (Path, "replace"), (Path, "unlink"), (Path, "rmdir"), (Path, "write_text"), (os, "fsync"),
        (pq.ParquetWriter, "write_table"), (pq.ParquetWriter, "close"),
    ):  # fmt: skip
        watched(owner, name)
    embed(run, plain, home / "out.parquet", batch=4)
    for owner, name, original in kept:
        monkeypatch.setattr(owner, name, original)
    wanted = {file.name: file.read_bytes() for file in home.iterdir()}
    assert set(wanted) == {"out.parquet", "out.bad_samples.jsonl"}
    kills = sorted(left.iterdir())
    assert len(kills) > 25
    going_on = 0
    for kill in kills:
        told: list[str] = []
        embed(run, plain, kill / "out.parquet", batch=4, say=told.append)
        going_on += any("parts are there already" in line for line in told)
        assert {file.name: file.read_bytes() for file in kill.iterdir()} == wanted, kill.name
    assert going_on > 10, "parts are used again"


@pytest.mark.slow
def test_a_process_that_is_killed_goes_on_to_the_same_bytes(run: Path, tmp_path: Path) -> None:
    for number in range(4200):
        save(tmp_path / "many" / f"{number}.png", number)
    command = [sys.executable, "-m", "sslkit", "embed", str(run), str(tmp_path / "many"), "--batch", "64", "-o"]
    subprocess.run([*command, str(tmp_path / "whole.parquet")], check=True, capture_output=True, cwd=ROOT)
    kills = 0
    while not (tmp_path / "killed.parquet").exists():
        before = len(list(tmp_path.glob("killed.parquet.parts/0*")))
        with subprocess.Popen([*command, str(tmp_path / "killed.parquet")], cwd=ROOT, stdout=subprocess.DEVNULL) as one:
            while one.poll() is None and len(list(tmp_path.glob("killed.parquet.parts/0*"))) == before:
                time.sleep(0.001)
            kills += one.poll() is None
            one.send_signal(signal.SIGKILL)
    assert kills >= 2
    assert (tmp_path / "killed.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def test_what_is_there_is_not_made_again(run: Path, plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    (plain / "05.png").write_bytes(b"broken")
    first = embed(run, plain, out)
    before = out.stat().st_mtime_ns
    again = embed(run, plain, out)
    assert (again.anew, again.rows, again.left_out) == (False, first.rows, first.left_out)
    assert out.stat().st_mtime_ns == before
    said = sslkit_command("embed", str(run), str(plain), "-o", str(out))
    assert (said.exit_code, said.output) == (
        0, f"{out}: holds the features of these images already: nothing to do\n"
    )  # fmt: skip


@pytest.mark.usefixtures("small_parts")
def test_what_was_left_out_is_tried_again(
    run: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A permission that was missing is seen in no file's size or time."""
    (plain / "20.png").write_bytes(b"broken")
    embed(run, plain, tmp_path / "whole.parquet", batch=4)
    out, read = tmp_path / "out.parquet", Path.read_bytes
    kept = [name.name for name in (tmp_path / "whole.parquet", tmp_path / "whole.bad_samples.jsonl")]

    def denied(path: Path) -> bytes:
        if path.name in ("00.png", "01.png", "05.png"):
            raise PermissionError(13, "Permission denied")
        return read(path)

    with monkeypatch.context() as locked:
        locked.setattr(Path, "read_bytes", denied)
        first = embed(run, plain, out, batch=4)
        assert [bad["path"] for bad in first.left_out] == ["00.png", "01.png", "05.png", "20.png"]
        assert not embed(run, plain, out, batch=4).anew
    told: list[str] = []
    again = embed(run, plain, out, batch=4, say=told.append)
    assert (again.anew, again.rows, [bad["path"] for bad in again.left_out]) == (True, 20, ["20.png"])
    assert f"{out}: of 4 images left out, can be read now: 3" in told
    assert "2 of 3 parts are there already" in told, "only the parts that had some are computed"
    assert out.read_bytes() == (tmp_path / kept[0]).read_bytes()
    assert (tmp_path / "out.bad_samples.jsonl").read_bytes() == (tmp_path / kept[1]).read_bytes()
    assert not embed(run, plain, out, batch=4).anew

    monkeypatch.setattr(Path, "read_bytes", denied)
    embed(run, plain, out, batch=4, restart=True)
    (tmp_path / "out.bad_samples.jsonl").unlink()
    monkeypatch.setattr(Path, "read_bytes", read)
    assert embed(run, plain, out, batch=4).rows == 20
    assert out.read_bytes() == (tmp_path / kept[0]).read_bytes(), "without the names of what was left out, too"


@pytest.mark.usefixtures("small_parts")
def test_restart_begins_anew_always_and_what_it_leaves_is_gone_on_with(
    run: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.parquet"
    embed(run, plain, out, batch=4)
    before = out.read_bytes()
    for checkpoint in (10, 5):  # of the same, and of something else
        with monkeypatch.context() as cut:
            cut.setattr(feature_files.Parts, "join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            told: list[str] = []
            for _ in range(2):
                with pytest.raises(KeyboardInterrupt):
                    embed(run, plain, out, "online", checkpoint, batch=4, restart=True, say=told.append)
            assert not any("there already" in line for line in told)
        assert out.read_bytes() == before, "it stays until the new is whole"
        done = embed(run, plain, out, "online", checkpoint, batch=4, say=told.append)
        assert "3 of 3 parts are there already" in told
        assert (done.anew, done.facts["step"]) == (True, checkpoint)
        assert not out.with_name("out.parquet.parts").exists()
    assert embed(run, plain, out, "online", 5, batch=4, restart=True).anew
    (tmp_path / "mine.parquet").write_text("mine")
    with pytest.raises(sslkit.UserError, match="sslkit did not write it"):
        embed(run, plain, tmp_path / "mine.parquet", restart=True)


def test_another_output_is_overwritten_only_where_that_is_asked_for(run: Path, plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    embed(run, plain, out)
    before = out.read_bytes()
    with pytest.raises(
        sslkit.UserError, match=r"other weights \(online, step 10; now online, step 5\); .*restart=True"
    ):
        embed(run, plain, out, checkpoint=5)
    with pytest.raises(sslkit.UserError, match=r"other batch \(256; now 8\)"):
        embed(run, plain, out, batch=8)
    save(plain / "new.png")
    said = sslkit_command("embed", str(run), str(plain), "-o", str(out))
    assert said.exit_code == 2
    assert "other number of images (21; now 22), names, sizes or times of files; " in said.output
    assert "--restart" in said.output
    assert out.read_bytes() == before
    assert embed(run, plain, out, restart=True).rows == 22

    pq.write_table(pa.table({"mine": [1]}), tmp_path / "mine.parquet")
    (tmp_path / "notes.parquet").write_text("notes")
    for name in ("mine.parquet", "notes.parquet"):
        for restart in (False, True):
            with pytest.raises(sslkit.UserError, match="is there already, and sslkit did not write it"):
                embed(run, plain, tmp_path / name, restart=restart)


def test_a_file_beside_the_output_that_somebody_else_wrote_is_left_alone(
    run: Path, plain: Path, tmp_path: Path
) -> None:
    out, beside = tmp_path / "out.parquet", tmp_path / "out.bad_samples.jsonl"
    beside.write_text('{"precious": 1}')
    for broken in (False, True):  # to be removed, and to be written over
        if broken:
            (plain / "05.png").write_bytes(b"broken")
        with pytest.raises(sslkit.UserError, match=r"out\.bad_samples\.jsonl: is there already, and belongs to no"):
            embed(run, plain, out)
        assert (beside.read_text(), out.exists()) == ('{"precious": 1}', False)
    beside.unlink()
    assert len(embed(run, plain, out).left_out) == 1
    assert json.loads(beside.read_text())["path"] == "05.png"
    save(plain / "05.png")
    assert not embed(run, plain, out, restart=True).left_out
    assert not beside.exists(), "the output said that it is its own"

    beside.write_text('{"path": "mine", "problem": "none"}')
    done = embed(run, plain, out)
    assert (done.anew, done.left_out) == (False, []), "it is not read, either"
    with pytest.raises(sslkit.UserError, match="belongs to no output"):
        embed(run, plain, out, restart=True)


@pytest.mark.usefixtures("small_parts")
def test_unfinished_parts_of_something_else_are_refused(
    run: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.parquet"
    with monkeypatch.context() as cut:
        cut.setattr(feature_files.Parts, "join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            embed(run, plain, out)
    parts = out.with_name("out.parquet.parts")
    assert len(list(parts.glob("0*.parquet"))) == 1, "a batch is larger than a part was to be"
    other = tmp_path / "other"
    shutil.copytree(plain, other)
    with pytest.raises(sslkit.UserError, match=r"out\.parquet\.parts: holds unfinished .*other folder \(.*plain; now "):
        embed(run, other, out)
    with pytest.raises(sslkit.UserError, match=r"other weights \(online, step 10; now online, step 5\)"):
        embed(run, plain, out, checkpoint=5)
    (parts / "state.json").write_text("[]")
    with pytest.raises(sslkit.UserError, match="other state, which cannot be read"):
        embed(run, plain, out)
    (parts / "state.json").unlink()
    shutil.copytree(parts, tmp_path / "stateless.parquet.parts")
    told: list[str] = []
    embed(run, plain, tmp_path / "stateless.parquet", checkpoint=5, say=told.append)
    assert not any("there already" in line for line in told), "a part says itself what it is of"
    (parts / "state.json").write_text("[]")
    (parts / "mine.txt").touch()
    assert embed(run, other, out, restart=True).facts["folder"] == str(other)
    assert [file.name for file in parts.iterdir()] == ["mine.txt"], "what sslkit did not write stays"


@pytest.mark.usefixtures("small_parts")
def test_a_damaged_part_is_named_or_made_anew(
    run: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.parquet"
    embed(run, plain, tmp_path / "sound.parquet", batch=4)
    with monkeypatch.context() as cut:
        cut.setattr(feature_files.Parts, "join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            embed(run, plain, out, batch=4)
    first, second = sorted(out.with_name("out.parquet.parts").glob("0*.parquet"))[:2]
    first.write_bytes(first.read_bytes()[:-9])
    data = bytearray(second.read_bytes())
    data[len(data) // 3] ^= 1
    second.write_bytes(data)
    with pytest.raises(sslkit.RunFailed, match=r"000001\.parquet: is damaged .*; remove it, and the same call makes"):
        embed(run, plain, out, batch=4)
    second.unlink()
    embed(run, plain, out, batch=4)
    assert out.read_bytes() == (tmp_path / "sound.parquet").read_bytes()


@pytest.mark.usefixtures("small_parts")
def test_two_processes_do_not_write_one_output(run: Path, plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"

    def second(text: str) -> None:
        if "a second" in text:
            with pytest.raises(sslkit.UserError, match="another process is writing it"):
                embed(run, plain, out)
            met.append(text)

    met: list[str] = []
    embed(run, plain, out, say=second)
    assert met


def test_a_file_that_changes_meanwhile_ends_it(
    run: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Path.read_bytes

    def read(path: Path) -> bytes:
        found = original(path)
        if path.name == "20.png":
            save(path, 99)
            os.utime(path, (1, 1))
        return found

    monkeypatch.setattr(Path, "read_bytes", read)
    with pytest.raises(sslkit.RunFailed, match=r"20\.png: was changed since the command began"):
        embed(run, plain, tmp_path / "out.parquet")


def test_weights_that_give_no_numbers_are_told(
    run: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(encoder: sslkit.ImageEncoder, images: torch.Tensor, batch_size: int = 500) -> torch.Tensor:
        found = torch.zeros(len(images), 8)
        found[3, 2] = torch.nan
        return found

    monkeypatch.setattr(sslkit.ImageEncoder, "features", broken)
    with pytest.raises(sslkit.RunFailed, match=r"the features of 03\.png are not finite: the weights of step 10"):
        embed(run, plain, tmp_path / "out.parquet")


def test_a_full_disk_is_told_and_the_parts_stay(
    run: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(sslkit.RunFailed, match=r"cannot be written: No space left on device; .* goes on from it"):
            embed(run, plain, tmp_path / "out.parquet")
    assert embed(run, plain, tmp_path / "out.parquet").rows == 21


def test_a_file_that_takes_too_much_memory_is_left_out(
    run: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    huge, square = (plain / "03.png").read_bytes(), Preparation.square

    def read(prepared: Preparation, data: bytes) -> Any:
        if data == huge:
            raise MemoryError
        return square(prepared, data)

    monkeypatch.setattr(Preparation, "square", read)
    done = embed(run, plain, tmp_path / "out.parquet")
    assert done.left_out == [{"path": "03.png", "problem": "takes more memory than there is"}]
    with pytest.raises(sslkit.UserError, match=r"03\.png: takes more memory"):
        sslkit.search(run, plain / "03.png", plain)


def test_a_missing_package_ends_it_with_one_line(
    run: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tifffile = pytest.importorskip("tifffile")
    for number in range(3):
        (tmp_path / "tiffs").mkdir(exist_ok=True)
        tifffile.imwrite(tmp_path / "tiffs" / f"{number}.tif", picture(number, SIDE, SIDE, 3))
    line = "data_source: there are TIFF files, for which tifffile is missing: pip install 'sslkit[tiff]'\n"
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "tifffile", None)
        for command in (
            ["embed", str(run), str(tmp_path / "tiffs"), "-o", str(tmp_path / "out.parquet")],
            ["search", str(run), str(tmp_path / "tiffs" / "0.tif"), str(plain), "-o", str(tmp_path / "out.html")],
        ):
            said = sslkit_command(*command)
            assert (said.exit_code, said.stderr) == (2, line)
    features = tmp_path / "out.parquet"
    assert embed(run, tmp_path / "tiffs", features).rows == 3
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "tifffile", None)
        sslkit.search(run, plain / "00.png", features, out=tmp_path / "out.html")
    assert "no picture: data_source: there are TIFF files" in (tmp_path / "out.html").read_text()


@pytest.mark.parametrize(
    ("folder", "out", "problem"),
    [
        ("gone", "out.parquet", "gone: No such file or directory; give a folder of images"),
        ("empty", "out.parquet", "holds no image files that end in .jpg, .jpeg, .png, .webp"),
        ("file.png", "out.parquet", "Not a directory; give a folder"),
        ("broken", "out.parquet", "none of 2 image files can be read: a.png is empty (0 bytes)"),
        ("plain", "out.csv", "out.csv: should end in .parquet"),
        ("plain", "gone/out.parquet", "its folder does not exist"),
        ("plain", "folder.parquet", "is a folder"),
    ],
)
def test_mistakes_are_told_in_a_line(
    run: Path, plain: Path, tmp_path: Path, folder: str, out: str, problem: str
) -> None:
    for name in ("empty", "broken", "folder.parquet"):
        (tmp_path / name).mkdir()
    for name in ("file.png", "broken/a.png", "broken/b.jpg"):
        (tmp_path / name).touch()
    for _ in range(2):
        said = sslkit_command("embed", str(run), str(tmp_path / folder), "-o", str(tmp_path / out))
        assert said.exit_code == 2
        assert problem in said.stderr
        assert len(said.stderr.splitlines()) == 1
    assert not list(tmp_path.glob("*.parts"))


def test_the_run_reads_files_as_its_own_images_were_read(
    run: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = registry.load
    monkeypatch.setattr(registry, "load", lambda kind, name: Strange if name == "folder" else load(kind, name))
    copied = Path(shutil.copytree(run, tmp_path / "copied"))
    lock = copied / "recipe.lock.toml"
    source = (
        '[data_source]\nuse = "subset"\nimages = 3\n[data_source.of]\nuse = "parquet"\nbands = [0, 1, 2]\npath = "x"\n'
    )
    text = lock.read_text()
    begin, end = text.index("[data_source]"), text.index("[", text.index("[data_source]") + 1)
    lock.write_text(text[:begin] + source + text[end:])
    with pytest.raises(sslkit.UserError, match=r"stop here \[0, 1, 2\] 16 3"):
        embed(copied, plain, tmp_path / "out.parquet")


class Strange(Folder):
    """A folder of images with bands."""

    bands: tuple[int, ...] = ()

    def reader(self) -> Any:
        raise sslkit.UserError(f"stop here {list(self.bands)} {self.size} {self.channels}")
