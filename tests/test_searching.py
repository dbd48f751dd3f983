"""Which images are near, held against float64, and the page that shows them."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import test_embedding
import torch
from conftest import run as sslkit_command
from test_embedding import save

import sslkit
from sslkit import embedding, feature_files
from sslkit.embedding import embed
from sslkit.image_files import reader_of
from sslkit.opened_run import open_run
from sslkit.searching import search

run, plain = test_embedding.run, test_embedding.plain


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SSLKIT_DATA", str(tmp_path / "data"))
    return tmp_path / "data" / "features"


@pytest.fixture
def query(tmp_path: Path) -> Path:
    """An image outside the folder, of another size."""
    save(tmp_path / "query.png", 77, 31, 40, 3)
    return tmp_path / "query.png"


def test_the_nearest_are_those_of_the_greatest_cosine(
    run: Path,
    plain: Path,
    query: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(feature_files, "PART", 8)
    found = search(run, [query, plain / "07.png"], plain, neighbours=9)
    encoder = sslkit.load_encoder(run)
    read = reader_of(open_run(run)).read
    files = sorted(plain.iterdir())
    bank = encoder.features(torch.stack([read(file)[0] for file in files])).double().numpy()
    for nearest, file in zip(found, (query, plain / "07.png"), strict=True):
        asked = encoder.features(read(file)[0][None]).double().numpy()[0]
        cosines = bank @ asked / np.linalg.norm(bank, axis=1) / np.linalg.norm(asked)
        order = np.argsort(-cosines)[:9]
        assert [near.path for near in nearest.neighbours] == [files[i].name for i in order]
        assert [near.cosine for near in nearest.neighbours] == pytest.approx(list(cosines[order]), abs=1e-5)
        assert nearest.median_cosine == pytest.approx(np.median(cosines), abs=1e-5)
    assert [near.path for near in found[1].neighbours if near.same_bytes] == ["07.png"]
    assert found[1].neighbours[0].path == "07.png"
    assert not any(near.same_bytes for near in found[0].neighbours)


def test_copies_are_equally_near_and_in_the_order_of_their_names(run: Path, plain: Path) -> None:
    for name in ("a.png", "z.png"):
        shutil.copy(plain / "07.png", plain / name)
    near = search(run, plain / "07.png", plain, neighbours=100)[0].neighbours
    assert len(near) == 23, "as many as there are"
    assert [n.path for n in near[:3]] == ["07.png", "a.png", "z.png"]
    assert [n.same_bytes for n in near[:4]] == [True, True, True, False]


def test_a_folders_features_are_computed_once_and_again_when_it_changes(
    run: Path,
    plain: Path,
    query: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def spied(*given: Any) -> Any:
        computed.append(given)
        return compute(*given)

    compute, computed = embedding._compute, []
    monkeypatch.setattr(embedding, "_compute", spied)
    first = search(run, query, plain)
    assert search(run, query, plain) == first
    assert len(computed) == 1
    save(plain / "new.png", 77, 31, 40, 3)
    assert search(run, query, plain)[0].neighbours[0].path == "new.png"
    assert len(computed) == 2
    assert len(list(cache.glob("*.parquet"))) == 1, "the new takes the place of the old"
    search(run, query, plain, checkpoint=5)
    assert len(list(cache.glob("*.parquet"))) == 2
    for file in cache.glob("*.parquet"):
        file.write_bytes(b"damaged")
    assert search(run, query, plain)[0].neighbours[0].path == "new.png"


def test_features_that_were_written_are_searched(run: Path, plain: Path, query: Path, tmp_path: Path) -> None:
    out = embed(run, plain, tmp_path / "out.parquet").path
    assert search(run, query, out) == search(run, query, plain)
    with pytest.raises(sslkit.UserError, match=r"other weights or another preparation \(.*run, online, step 10\)"):
        search(run, query, out, checkpoint=5)
    pq.write_table(pq.read_table(out).replace_schema_metadata({}), tmp_path / "mine.parquet")
    with pytest.raises(sslkit.UserError, match="holds no features that sslkit wrote"):
        search(run, query, tmp_path / "mine.parquet")


def test_a_second_search_waits_for_the_first_to_compute(run: Path, plain: Path, query: Path) -> None:
    def first(text: str) -> None:
        if "a second" in text and not met:
            met.append(text)
            other.start()
            assert waiting.wait(60), "the second is not refused"

    def second() -> None:
        results.append(search(run, query, plain, say=lambda text: waiting.set() if "waiting for it" in text else None))

    met: list[str] = []
    results: list[Any] = []
    waiting, other = threading.Event(), threading.Thread(target=second)
    results.append(search(run, query, plain, say=first))
    other.join(60)
    assert len(results) == 2
    assert results[0] == results[1]


def test_a_folder_is_the_same_by_whatever_name(
    run: Path, plain: Path, query: Path, tmp_path: Path, cache: Path
) -> None:
    (tmp_path / "link").symlink_to(plain)
    out = tmp_path / "out.parquet"
    assert embed(run, plain, out).anew
    for other in (tmp_path / "link", plain / ".." / plain.name):
        assert not embed(run, other, out).anew
        search(run, query, other)
    assert len(list(cache.glob("*.parquet"))) == 1


def test_the_page_has_no_picture_that_a_strangers_file_names(
    run: Path, plain: Path, query: Path, tmp_path: Path
) -> None:
    """Whoever sends features may name any file; the page that is sent back must not carry it."""
    save(tmp_path / "secret.png", 8)
    (plain / "03.png").write_bytes((tmp_path / "secret.png").read_bytes())
    out = embed(run, plain, tmp_path / "out.parquet").path
    table = pq.read_table(out)
    digests = dict(zip(table["path"].to_pylist(), table["sha256"].to_pylist(), strict=True))
    paths = table["path"].to_pylist()
    paths[:3] = ["../secret.png", str(tmp_path / "secret.png"), "sub/../03.png"]
    save(plain / "04.png", 999)
    (plain / "05.png").unlink()
    (plain / "05.png").symlink_to(tmp_path / "secret.png")
    crafted = table.set_column(0, table.schema.field("path"), pa.array(paths))
    for digest in (digests["03.png"], "0" * 64):
        wanted = pa.array([digest] * 3 + table["sha256"].to_pylist()[3:])
        pq.write_table(crafted.set_column(2, table.schema.field("sha256"), wanted), out)
        search(run, query, out, out=tmp_path / "page.html")
        text = (tmp_path / "page.html").read_text(encoding="utf-8")
        assert text.count("the file would be outside the folder") == 3
        assert text.count("the file is not the one that the features are of") == 2, "04 and 05"
        assert text.count('src="data:image/jpeg;base64,') == 1 + 21 - 5
    said = json.loads(table.schema.metadata[b"sslkit"]) | {"folder": str(tmp_path)}
    pq.write_table(
        table.set_column(0, table.schema.field("path"), pa.array(["secret.png"] * 21))
        .set_column(2, table.schema.field("sha256"), pa.array(["0" * 64] * 21))
        .replace_schema_metadata({b"sslkit": json.dumps(said)}), out,
    )  # fmt: skip
    search(run, query, out, out=tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8").count('src="data:image/jpeg;base64,') == 1, "the query"


def test_pictures_of_ones_own_folder_may_be_links(run: Path, plain: Path, query: Path, tmp_path: Path) -> None:
    save(tmp_path / "elsewhere" / "far.png", 8)
    (plain / "far.png").symlink_to(tmp_path / "elsewhere" / "far.png")
    search(run, query, plain, out=tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8").count('src="data:image/jpeg;base64,') == 1 + 22


def facts_changed(**changes: Any) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        said = {**json.loads(table.schema.metadata[b"sslkit"]), **changes}
        said = {key: value for key, value in said.items() if value is not None}
        return table.replace_schema_metadata({b"sslkit": json.dumps(said)})

    return change


def narrow(table: pa.Table) -> pa.Table:
    feature = pa.array([[0.0] * 3] * len(table), pa.list_(pa.float32(), 3))
    return table.set_column(1, "feature", feature)


def without_values(table: pa.Table) -> pa.Table:
    feature = pa.array([None] * len(table), table.schema.field("feature").type)
    return table.set_column(1, table.schema.field("feature"), feature)


@pytest.mark.parametrize(
    "change",
    [
        *(facts_changed(**{key: None}) for key in ("rows", "run", "branch", "step", "folder", "feature_dim")),
        facts_changed(weights="0", run=None), facts_changed(folder=3), facts_changed(rows=20), facts_changed(step=True),
        lambda table: table.replace_schema_metadata({b"sslkit": b"[]"}),
        lambda table: table.drop_columns(["feature"]),
        lambda table: table.drop_columns(["sha256"]),
        lambda table: facts_changed(rows=0)(table.slice(0, 0)),
        lambda table: table.set_column(0, "path", pa.array(range(len(table)))),
        narrow, lambda table: facts_changed(feature_dim=3)(narrow(table)), without_values,
    ],
)  # fmt: skip
def test_a_file_that_is_not_as_it_says_is_refused_in_a_line(
    features_file: bytes, run: Path, query: Path, tmp_path: Path, change: Callable[[pa.Table], pa.Table]
) -> None:
    out = tmp_path / "out.parquet"
    out.write_bytes(features_file)
    pq.write_table(change(pq.read_table(out)), out)
    with pytest.raises(sslkit.UserError, match=r"holds no features that sslkit wrote|is damaged") as caught:
        search(run, query, out, out=tmp_path / "page.html")
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def features_file(run: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("written")
    for number in range(21):
        save(folder / "photos" / f"{number}.png", number)
    return embed(run, folder / "photos", folder / "out.parquet").path.read_bytes()


def test_a_damaged_file_is_refused_in_a_line(features_file: bytes, run: Path, query: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    whole = pq.ParquetFile(pa.BufferReader(features_file)).metadata.row_group(0)
    for column in range(3):
        data = bytearray(features_file)
        chunk = whole.column(column)
        at = chunk.data_page_offset
        data[at + chunk.total_compressed_size - 3] ^= 1
        out.write_bytes(data)
        with pytest.raises(sslkit.UserError, match=r"out\.parquet: is damaged \(.*\); remove it, and write it anew"):
            search(run, query, out)
    for end in (0, 4, 100, len(features_file) // 2, len(features_file) - 1):
        out.write_bytes(features_file[:end])
        with pytest.raises(sslkit.UserError, match="holds no features that sslkit wrote"):
            search(run, query, out)


def test_the_command_says_paths_and_cosines_as_json(run: Path, plain: Path, query: Path) -> None:
    said = sslkit_command("search", str(run), str(query), str(plain / "03.png"), str(plain), "--json")
    assert said.exit_code == 0
    found = json.loads(said.stdout)
    assert [one["query"] for one in found] == [str(query), str(plain / "03.png")]
    assert [len(one["neighbours"]) for one in found] == [21, 21]
    digest = hashlib.sha256((plain / "03.png").read_bytes()).hexdigest()
    assert found[1]["neighbours"][0] == {
        "path": "03.png", "cosine": pytest.approx(1, abs=1e-6), "same_bytes": True, "sha256": digest,
    }  # fmt: skip
    assert not Path("search.html").exists()


def test_the_page_shows_strangers_names_as_text(run: Path, tmp_path: Path, query: Path) -> None:
    name = '<script>alert(1)<\u2044script> " onerror=x &amp;\n.png'
    for number in range(3):
        save(tmp_path / "photos" / f"{number}.png", number)
    save(tmp_path / "photos" / name, 9)
    out = embed(run, tmp_path / "photos", tmp_path / "out.parquet").path
    (tmp_path / "photos" / "1.png").unlink()
    page = tmp_path / "page.html"
    said = sslkit_command("search", str(run), str(query), str(out), "-o", str(page))
    assert (said.exit_code, said.output) == (0, f"{page}: the 4 nearest of 4 images for 1 query\n")
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert unescape(re.findall(r'alt="([^"]*)"', text.replace("alert", "ALERT"))[0]) == str(query)
    assert "&lt;script&gt;alert(1)" in text
    assert text.count('src="data:image/jpeg;base64,') == 4, "the query and three that are there"
    assert "no picture: the file cannot be read: No such file or directory" in text
    assert "default-src &#x27;none&#x27;" in text or "default-src 'none'" in text


def test_the_page_in_a_browser(run: Path, plain: Path, query: Path, tmp_path: Path, browser: Any) -> None:
    search(run, [query, plain / "07.png"], plain, out=tmp_path / "page.html")
    for width in (1280, 390):
        page = browser.new_page(viewport={"width": width, "height": 900})
        said: list[str] = []
        page.on("console", lambda message, said=said: said.append(message.text))
        page.goto((tmp_path / "page.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") == width, "nothing sticks out"
        sizes = page.evaluate("[...document.images].map(i => [i.naturalWidth, i.width, i.height])")
        assert len(sizes) == 2 * (21 + 1)
        assert all(natural == 160 and 90 < wide == high for natural, wide, high in sizes)
        assert page.locator("figure.query").count() == 2
        assert said == []
        page.close()


def test_mistakes_are_told_in_a_line(run: Path, plain: Path, query: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("notes")
    for arguments, problem in (
        ([str(tmp_path / "gone.jpg"), str(plain)], "gone.jpg: cannot be read: No such file or directory"),
        ([str(tmp_path / "notes.txt"), str(plain)], "notes.txt: is not a JPEG, PNG or WebP image"),
        ([str(plain), str(plain)], "plain: is a folder, not a regular file"),
        ([str(query), str(tmp_path / "empty")], "empty: holds no image files that end in"),
        ([str(query), str(plain), "-o", "page.pdf"], "--out page.pdf: should end in .html"),
        ([str(query), str(plain), "-o", str(tmp_path / "gone" / "x.html")], "cannot be written: No such file"),
    ):
        said = sslkit_command("search", str(run), *arguments)
        assert said.exit_code == 2, said.output
        assert problem in said.stderr
        assert len(said.stderr.splitlines()) == 1
    for given, missing in ((query, "FOLDER"), (plain, "QUERY...")):
        said = sslkit_command("search", str(run), str(given))
        assert said.exit_code == 2
        assert f"Missing argument '{missing}'" in said.stderr
