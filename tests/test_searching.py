"""Which images are near, held against float64, and the page that shows them."""

from __future__ import annotations

import json
import re
import shutil
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
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
    assert len(list(cache.iterdir())) == 1, "the new takes the place of the old"
    search(run, query, plain, checkpoint=5)
    assert len(list(cache.iterdir())) == 2
    for file in cache.iterdir():
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


def test_the_command_says_paths_and_cosines_as_json(run: Path, plain: Path, query: Path) -> None:
    said = sslkit_command("search", str(run), str(query), str(plain / "03.png"), str(plain), "--json")
    assert said.exit_code == 0
    found = json.loads(said.stdout)
    assert [one["query"] for one in found] == [str(query), str(plain / "03.png")]
    assert [len(one["neighbours"]) for one in found] == [21, 21]
    assert found[1]["neighbours"][0] == {"path": "03.png", "cosine": pytest.approx(1, abs=1e-6), "same_bytes": True}
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
