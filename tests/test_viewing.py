"""From the images of a set to views: originals cut in threads are what the drawn rows say, whoever cuts them."""

from __future__ import annotations

import io
import json
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, generator, run, run_info
from original_pictures import Pictures
from rich.console import Console
from torch import Tensor

from sslkit import features, local, randomness, view_grid
from sslkit.api import ViewGenerator
from sslkit.build import build, build_views
from sslkit.data import Draw, Feed, channel_statistics, spread
from sslkit.distributed import World
from sslkit.errors import RunFailed, UserError
from sslkit.features import chosen
from sslkit.recipe import Recipe, parse_recipe
from sslkit.run_directory import RunDirectory, read_metrics
from sslkit.summary import summarise
from sslkit.trainer import Trainer
from sslkit.viewing import Hands, Viewing, part_of
from sslkit_crops import Identity, MultiCrop, TwoCrops, ViewGroup

CPU = torch.device("cpu")
RUN = run_info(16, train_images=50, steps_per_epoch=6, batch_size=8, originals=True, seed=3)
MULTI = MultiCrop(views=(ViewGroup(count=2, size=20), ViewGroup(count=3, size=9, kind="local", scale=(0.05, 0.3))))


def feed(images: Any, spec: ViewGenerator = MULTI, **changes: Any) -> Feed:
    info = replace(RUN, **changes)
    return Feed(images, spec.build(info), info, CPU)  # type: ignore[arg-type]


def cutters() -> set[str]:
    return {t.name for t in threading.enumerate() if t.name.startswith(("sslkit-cut", "sslkit-read"))}


def same(a: Draw, b: Draw) -> bool:
    crops = all(map(torch.equal, a.batch.images, b.batch.images))
    return crops and torch.equal(a.batch.indices, b.batch.indices) and a.parameters.keys() == b.parameters.keys()


# ---------------------------------------------------------------- a batch


def test_every_crop_is_its_own_images_by_its_own_row() -> None:
    images = Pictures(50)
    f = feed(images)
    for step, draw in enumerate(f.steps(2, 5), 2):
        drawn = f.views.draw_sized(images.sizes[f.indices(step)], randomness.generator(3, "views", step))  # type: ignore[attr-defined]
        assert all(torch.equal(drawn[name], draw.parameters[name]) for name in drawn)
        assert isinstance(draw.batch.images, tuple)
        assert [tuple(c.shape) for c in draw.batch.images] == [(8, 3, s, s) for s in (20, 20, 9, 9, 9)]
        for row, index in enumerate(f.indices(step).tolist()):
            own = f.views.cut(images.pictures[index], {n: v[row] for n, v in drawn.items()})  # type: ignore[attr-defined]
            assert all(torch.equal(c[row], o) for c, o in zip(draw.batch.images, own, strict=True))
        assert draw.batch.labels is not None
        assert torch.equal(draw.batch.labels, draw.batch.indices % 4)


@pytest.mark.parametrize("spec", [TwoCrops(size=12), MULTI, Identity()], ids=lambda s: type(s).__name__)
def test_the_number_of_threads_changes_nothing(spec: ViewGenerator) -> None:
    one, five = Pictures(50, workers=1), Pictures(50, workers=5)
    for a, b in zip(feed(one, spec).steps(0, 8), feed(five, spec).steps(0, 8), strict=True):
        assert same(a, b)
    assert len(one.threads) == 1 < len(five.threads) <= 5


def test_a_draw_by_itself_is_that_of_the_loop() -> None:
    f = feed(Pictures(50))
    for step, draw in enumerate(f.steps(4, 9), 4):
        assert same(draw, f.draw(step))


def test_processes_share_a_batch() -> None:
    images = Pictures(50)
    whole = feed(images)
    halves = [Feed(images, whole.views, RUN, CPU, World(rank, 2).share) for rank in range(2)]
    for step in range(3):
        parts = [half.draw(step) for half in halves]
        for v, crops in enumerate(whole.draw(step).batch.images):
            assert torch.equal(crops, torch.cat([p.batch.images[v] for p in parts]))


def test_micro_batches_are_the_batch_in_order() -> None:
    draw = feed(Pictures(50)).draw(0)
    parts = list(draw.micro(2))
    for v, crops in enumerate(draw.batch.images):
        assert torch.equal(crops, torch.cat([p.batch.images[v] for p in parts]))
    assert len(parts[0].batch.indices) == 4
    assert all(
        torch.equal(a, b[4:]) for a, b in zip(part_of(draw.batch.images, slice(4, 8)), draw.batch.images, strict=True)
    )


def test_views_are_what_appearance_makes_of_the_crops() -> None:
    f = feed(Pictures(50))
    draw = f.draw(1)
    crops = [c.float() / 255 for c in draw.batch.images]
    expected = f.views.appear(crops, draw.parameters)
    for view, own in zip(f.viewing.make(draw.batch.images, draw.parameters), expected, strict=True):
        assert torch.allclose(view, own, rtol=1e-6, atol=1e-6)


def test_squares_take_the_way_that_they_took() -> None:
    images = Pictures(50)
    images.sizes = None  # type: ignore[assignment]
    f = feed(images, TwoCrops(size=12))
    draw = next(iter(f.steps(0, 3)))
    assert isinstance(draw.batch.images, Tensor)
    assert torch.equal(draw.batch.images, images.read(f.indices(0)))
    assert not images.asked
    made = f.viewing.make(draw.batch.images, draw.parameters)
    expected = f.views.appear(f.views.crop(draw.batch.images, draw.parameters), draw.parameters)
    assert all(map(torch.equal, made, expected))


def test_an_image_that_comes_several_times_in_succession_is_decoded_once() -> None:
    images, maker = Pictures(20), TwoCrops(size=8).build(RUN)
    viewing = Viewing(images, maker)  # type: ignore[arg-type]
    rows = torch.tensor([4, 4, 4, 9, 9, 4])
    drawn = viewing.draw(rows, generator())
    crops = viewing.read(rows, drawn)
    assert sorted(images.asked) == [4, 4, 9]
    for row, index in enumerate(rows.tolist()):
        own = maker.cut(images.pictures[index], {n: v[row] for n, v in drawn.items()})  # type: ignore[attr-defined]
        assert all(torch.equal(c[row], o) for c, o in zip(crops, own, strict=True))


# ---------------------------------------------------------------- shards


class Shards(Pictures):
    """Two shards, of which every epoch shows one after the other."""

    def order(self, drawn: torch.Generator) -> Tensor:
        half = len(self) // 2
        return torch.cat([torch.randperm(half, generator=drawn), half + torch.randperm(half, generator=drawn)])

    def sample(self, n: int) -> Tensor:
        return torch.arange(min(n, 5))


def test_a_set_in_shards_gives_its_own_order_keyed_by_the_epoch() -> None:
    f = feed(Shards(50))
    seen = torch.cat([f.indices(s) for s in range(6)])
    expected = Shards(50).order(randomness.generator(3, "order", 0))
    assert torch.equal(seen, expected[:48])
    assert not torch.equal(f.indices(6), expected[:8])
    assert torch.equal(spread(f.images, 100), torch.arange(5))
    assert torch.equal(spread(Pictures(5), 3), torch.tensor([0, 2, 4]))  # type: ignore[arg-type]
    first = Shards(50)
    first.pictures = first.pictures[:5]
    assert channel_statistics(f.images) == channel_statistics(first)  # type: ignore[arg-type]


def test_the_last_of_very_many_images_is_one_of_them() -> None:
    class Many:
        def __len__(self) -> int:
            return 2**24 + 4

    assert int(spread(Many(), 10)[-1]) == 2**24 + 3  # type: ignore[arg-type]


def test_a_set_in_shards_chooses_what_is_measured() -> None:
    assert torch.equal(chosen(Shards(50), 20), torch.arange(5))  # type: ignore[arg-type]
    assert torch.equal(chosen(Shards(50), 0), torch.arange(50))  # type: ignore[arg-type]


# ---------------------------------------------------------------- what goes wrong


def test_an_image_that_changed_ends_the_loop_and_its_threads() -> None:
    images = Pictures(50)
    f = feed(images)
    images.broken = int(f.indices(3)[2])
    draws = f.steps(0, 20)
    assert len([next(draws) for _ in range(3)]) == 3
    with pytest.raises(RunFailed, match=f"picture {images.broken} holds another image"):
        next(draws)
    assert not cutters()


def test_leaving_early_ends_the_threads() -> None:
    draws = feed(Pictures(50)).steps(0, 20)
    next(draws)
    assert cutters()
    draws.close()
    assert not cutters()


def test_a_run_that_has_to_end_does_not_wait_for_a_file_that_hangs() -> None:
    images, hung = Pictures(50), threading.Event()
    images.original = lambda index: hung.wait(60) and images.pictures[index]  # type: ignore[method-assign]
    f = feed(images)
    f.hurried = lambda: True
    began = time.monotonic()
    assert list(f.steps(0, 20)) == []
    assert time.monotonic() - began < 30, "sixty seconds would be the file's"
    hung.set()


def test_hands_that_hang_are_waited_for_once() -> None:
    stuck, hands = threading.Event(), Hands(8)
    for _ in range(8):
        hands.give(stuck.wait)  # type: ignore[arg-type]
    before = time.monotonic()
    hands.let_go()
    hands.join(0.2)
    waited = time.monotonic() - before
    stuck.set()
    assert waited < 8 * 0.2


def test_hands_that_were_let_go_do_nothing_more() -> None:
    done: list[int] = []
    started, go = threading.Event(), threading.Event()

    def slow() -> None:
        started.set()
        go.wait(30)

    hands = Hands(1)
    first = hands.give(slow)
    started.wait(30)
    rest = [hands.give(lambda n=n: done.append(n)) for n in range(5)]  # type: ignore[misc]
    hands.let_go()
    go.set()
    hands.join()
    assert first.done()
    assert not done
    assert all(r.cancelled() for r in rest)


# ---------------------------------------------------------------- whole runs

ORIGINALS = TINY.replace('use = "digits"\nprints = 1\ntest_prints = 1', 'use = "./original_pictures.py:Made"').replace(
    '[view_generator]\nuse = "affine"', '[view_generator]\nuse = "two_crops"\nsize = 12\nblur = [0.0, 0.0]'
).replace("batch_size = 128", "batch_size = 16").replace("log_every = 5", "log_every = 1").replace(
    "bank = 200\nqueries = 100\nk = 20", "bank = 40\nqueries = 20\nk = 5"
)  # fmt: skip


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory: a recipe, and beside it the file of its data source."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(Path(__file__).with_name("original_pictures.py"), tmp_path)
    Path("r.toml").write_text(ORIGINALS, encoding="utf-8")
    with local.allowed():
        yield tmp_path


def recipe(*overrides: str) -> Recipe:
    return parse_recipe(ORIGINALS, "r.toml", overrides)


def trained(folder: Path, steps: int, *overrides: str) -> Trainer:
    parts = build(recipe(*overrides), CPU, lambda text: None)
    trainer = Trainer(parts, RunDirectory(folder))
    for draw in trainer.feed.steps(0, steps):
        trainer.train_step(draw)
    return trainer


def test_a_run_on_originals_is_the_same_with_any_number_of_threads(beside: Path) -> None:
    a, b = (trained(beside / f"run{n}", 4, f"data_source.workers={n}") for n in (1, 4))
    assert a.info.originals
    for one, two in zip(a.model.parameters(), b.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_run_on_originals_is_resumed_to_the_last_bit_and_replayed(beside: Path) -> None:
    common = ("train", "r.toml", "--allow-local-code", "--device", "cpu")
    assert run(*common, "--run-dir", "whole", "--steps", "9").exit_code == 0
    assert run(*common, "--run-dir", "parts", "--steps", "4").exit_code == 0
    again = run(*common, "--run-dir", "parts", "--steps", "9")
    assert again.exit_code == 0, again.output
    losses = [[r["loss"] for r in read_metrics(beside / d) if "loss" in r] for d in ("whole", "parts")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 9
    replayed = run("replay", "whole", "--step", "7", "--save-views", "batch.png", "--allow-local-code")
    assert replayed.exit_code == 0, replayed.output
    assert "differs" not in replayed.output
    assert Path("batch.png").stat().st_size > 1000


def test_a_run_that_waited_for_images_says_so_when_it_ends(beside: Path) -> None:
    assert run("train", "r.toml", "--allow-local-code", "--run-dir", "r", "--steps", "2").exit_code == 0
    metrics = beside / "r" / "metrics.jsonl"
    for share, said in ((0.06, False), (0.38, True)):
        line = json.dumps({"step": 2, "epoch": 0.3, "loss": 1.0, "data_wait": share})
        metrics.write_text(line + "\n", encoding="utf-8")
        told = Console(record=True, width=200, file=io.StringIO())
        summarise(beside / "r", told)
        assert ("38% of the time was spent waiting for images" in told.export_text()) is said


def test_views_that_cannot_be_cut_from_originals_are_refused_by_name(beside: Path) -> None:
    with pytest.raises(UserError) as caught:
        build_views(recipe('view_generator.use="affine"'), CPU, lambda text: None)
    (line,) = caught.value.lines
    assert "view_generator 'affine' crops squares only" in line
    assert "original_pictures.py:Made' gives images as they lie in their files" in line
    assert "crops_from" not in line, "this source has no such option"


def test_the_view_grid_shows_originals_whole_with_their_boxes(beside: Path) -> None:
    data, info, views = build_views(recipe(), CPU, lambda text: None)
    shown, undone = view_grid.samples(data, info, views, 4)
    assert undone
    for sample in shown:
        index = int(sample.title[1].split()[1])
        height, width = data.train.sizes[index].tolist()  # type: ignore[attr-defined]
        assert f"{width} x {height} px" in sample.title
        assert torch.equal(sample.original, data.train.pictures[index] / 255)  # type: ignore[attr-defined]
        for box, words in zip(sample.boxes, sample.words, strict=True):
            assert box is not None
            assert box[0] + box[2] <= height
            assert box[1] + box[3] <= width
            assert words[0] == f"crop {100 * box[2] * box[3] / (height * width):.0f}% of area"
    image = view_grid.draw(data, info, views, "x", 4)
    assert image.width > 300


def test_the_view_grid_shows_a_thin_image(beside: Path) -> None:
    data, info, views = build_views(recipe(), CPU, lambda text: None)
    chosen = view_grid.chosen(data.train, info.seed, 1)
    data.train.pictures[int(chosen)] = torch.zeros(3, 1, 3000, dtype=torch.uint8)  # type: ignore[attr-defined]
    data.train.sizes[chosen] = torch.tensor([1, 3000], dtype=torch.int32)  # type: ignore[attr-defined]
    assert view_grid.draw(data, info, views, "x", 1).height > 100


@pytest.mark.parametrize("channels", [2, 5])
def test_many_bands_are_trained_on_and_shown(beside: Path, channels: int) -> None:
    off = [f"view_generator.{name}=0" for name in ("saturation", "hue", "grayscale")]
    made = trained(beside / "run", 2, f"data_source.channels={channels}", *off)
    assert torch.isfinite(made.terms.total)
    image = view_grid.draw(made.data, made.info, made.views, "x", 2)
    assert image.mode == "RGB"
    headings = view_grid._headings(
        view_grid.samples(made.data, made.info, made.views, 2)[0], True, made.info, made.views, "x"
    )
    assert any(f"The images have {channels} channels; the first" in line for line in headings)
    with pytest.raises(UserError, match=f"the images have {channels} channels, and saturation and hue and grayscale"):
        build_views(recipe(f"data_source.channels={channels}"), CPU, lambda text: None)


def test_projections_for_the_health_panel_are_of_cut_views(beside: Path) -> None:
    images, maker = Pictures(30), TwoCrops(size=12).build(RUN)

    def network(pixels: Tensor) -> tuple[Tensor, Tensor]:
        return pixels, pixels.flatten(1)

    rows = torch.tensor([3, 8, 21])
    found = features.view_projections(network, images, rows, maker, 6, generator(), CPU, channels_last=False)  # type: ignore[arg-type]
    assert sorted(images.asked) == [3, 8, 21]
    times = rows.repeat_interleave(3)
    drawn = maker.draw_sized(images.sizes[times], generator())  # type: ignore[attr-defined]
    for place, index in enumerate(times.tolist()):
        own = maker.cut(images.pictures[index], {n: v[place] for n, v in drawn.items()})  # type: ignore[attr-defined]
        row = {n: v[place : place + 1] for n, v in drawn.items()}
        views = maker.appear([c[None].float() / 255 for c in own], row)
        for v in range(2):
            mine = found[place // 3, 2 * (place % 3) + v]
            assert torch.allclose(mine, views[v].flatten(), rtol=1e-5, atol=1e-5)
