"""What a run may go on with: incidental options change no bit of it, and every other option is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import TINY
from PIL import Image
from pydantic import BaseModel, ValidationError

import sslkit
from sslkit import checkpoint, registry
from sslkit.api import Component, Incidental
from sslkit.diff import differences
from sslkit.errors import UserError
from sslkit.recipe import Recipe, Train, parse_recipe, read_recipe
from sslkit.run_directory import read_metrics
from sslkit.sources import shipped

OFF = "".join(
    f'\n[[observers]]\nuse = "{name}"\nenabled = false\n' for name in ("health", "probe", "tensorboard", "report")
)

# ---------------------------------------------------------------- which options there are


def incidental(model: type[BaseModel], name: str) -> bool:
    return Incidental in model.model_fields[name].metadata


def test_every_incidental_option_is_tried_below() -> None:
    found = {f"train.{n}" for n in Train.model_fields if incidental(Train, n)}
    found |= {n for n in Recipe.model_fields if incidental(Recipe, n)}
    for provider in registry.providers():
        if provider.distribution == "sslkit" and provider.kind != registry.RULE:
            cls = registry.load(provider.kind, provider.name)
            found |= {f"{provider.key}.{n}" for n in cls.model_fields if incidental(cls, n)}
    sources = {f"data_source.{use}.{option}" for use, options in SOURCES.items() for option in options}
    tried = {"train." + o.partition("=")[0].partition("train.")[2] for o in HARMLESS if o.startswith("train.")}
    tried |= {o.partition("=")[0] for o in HARMLESS if not o.startswith(("train.", "observers"))}
    not_here = {
        "train.compile_chosen",  # says what `compile` means; tests/test_forking.py
        "data_source.cifar10.root", "data_source.cifar10.download",  # where one and the same archive lies
    }  # fmt: skip
    assert found == tried | {"observers"} | sources | not_here


# ---------------------------------------------------------------- every other option is refused


def leaves(value: Any, model: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any, bool]]:
    """`(keys, value, incidental)` of every option below a table of a recipe, as validated beside it."""
    for name, inner in value.items():
        if name == "use":
            continue
        harmless = isinstance(model, BaseModel) and name in type(model).model_fields and incidental(type(model), name)
        there = getattr(model, name, None) if isinstance(model, BaseModel) else model[name]
        if isinstance(inner, dict) and not harmless:
            yield from leaves(inner, there, (*at, name))
        elif isinstance(inner, list) and inner and isinstance(inner[0], dict) and not harmless:
            for number, table in enumerate(inner):
                yield from leaves(table, there[number], (*at, name, number))
        else:
            yield (*at, name), inner, harmless


def others(value: Any, keys: tuple[Any, ...], recipe: Recipe) -> Iterator[Any]:
    """Values near one, some of which its option may allow."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, value * 2, value - 1, max(value // 2, 1), value + 8, 0)
    elif isinstance(value, float):
        yield from (value * 0.9, value * 1.1, value / 2, value + 0.01, 1 - value)
    elif isinstance(value, str):
        owner: Any = recipe
        for key in keys[:-1]:
            owner = owner[key] if isinstance(owner, dict | tuple) else getattr(owner, key)
        annotation = type(owner).model_fields[keys[-1]].annotation if isinstance(owner, BaseModel) else None
        yield from (v for v in _values(annotation) if v != value)
        yield from (True, "split:4", "resnet34", "vit_tiny_patch16_224", "sum", "mean", value + "x")
    elif isinstance(value, list) and value:
        for number, inner in enumerate(value):
            for other in others(inner, keys, recipe) if not isinstance(inner, str | dict) else ():
                yield [*value[:number], other, *value[number + 1 :]]
        yield from (value[:-1], [*value, value[-1]])
    elif isinstance(value, list):
        yield from ([1], ["x"], [0.5])


def _values(annotation: Any) -> list[Any]:
    found = [v for v in get_args(annotation) if isinstance(v, str)]
    return found + [v for inner in get_args(annotation) if not isinstance(inner, str) for v in _values(inner)]


def changed(recipe: Recipe, keys: tuple[Any, ...], value: Any) -> Recipe | None:
    """The recipe with another value for one option; None if that one is not allowed."""
    tables = json.loads(json.dumps(recipe.tables()))
    table = tables
    for key in keys[:-1]:
        table = table[key]
    if json.dumps(table[keys[-1]]) == json.dumps(value):
        return None
    table[keys[-1]] = value
    try:
        return Recipe.model_validate_json(json.dumps(tables))
    except ValidationError:
        return None


def test_every_option_of_the_shipped_recipes_that_computes_is_told_apart_and_no_other() -> None:
    tried: dict[str, int] = {"computing": 0, "incidental": 0}
    seen: set[tuple[Any, ...]] = set()
    stuck: set[tuple[Any, ...]] = set()
    for name in shipped():
        recipe = read_recipe(name)
        uses = {slot: table.get("use") for slot, table in recipe.tables().items() if isinstance(table, dict)}
        for keys, value, harmless in leaves(recipe.tables(), recipe):
            key = (keys, uses.get(keys[0]))
            if key in seen:
                continue
            other = next(filter(None, (changed(recipe, keys, v) for v in others(value, keys, recipe))), None)
            if other is None:
                stuck.add(key)
                continue
            seen.add(key)
            told = [change.key for change in differences(recipe, other)]
            assert bool(told) != harmless, f"{name}: {keys}: {value!r}"
            assert (other.hash() == recipe.hash()) == harmless, keys
            assert not told or any(t.split(".")[0] == str(keys[0]) for t in told)
            tried["incidental" if harmless else "computing"] += 1
    assert not stuck - seen, "no other value was found for them in any recipe"
    assert tried["computing"] > 150
    assert tried["incidental"] >= 8


# ---------------------------------------------------------------- incidental options change no bit


HARMLESS = [
    "name=other",
    'requires=["sslkit"]',
    "train.log_every=1",
    "train.checkpoint_every=1",
    "train.keep_checkpoints=1",
    "train.keep_every=2",
    'train.accept=["decay_high"]',
    "observers.knn.every_epochs=2",
    "observers.knn.k=5",
    "observers.knn.enabled=false",
    *(f"observers.{name}.enabled=true" for name in ("health", "probe", "tensorboard", "report")),
]


def bits(folder: Path) -> dict[str, str]:
    """Digests of all that affects the next loss: weights, target, loss and optimizer."""
    newest = checkpoint.listed(folder / "checkpoints")[-1]
    assert newest.name == "step-000000012"
    names = [p for p in newest.glob("*.safetensors") if p.stem != "observers"]
    assert len(names) == 4
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in names}


def loss_at(folder: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_metrics(folder) if "loss" in r}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run up to step 6, and a copy of it that went on to step 12."""
    place = tmp_path_factory.mktemp("whole")
    for steps in (6, 12):
        sslkit.train(parse_recipe(TINY + OFF, "r.toml"), run_dir=place / "run", steps=steps, quiet=True)
        if steps == 6:
            shutil.copytree(place / "run", place / "half")
    return place / "half", place / "run"


@pytest.mark.parametrize("override", HARMLESS)
def test_a_run_goes_on_with_another_incidental_option_bit_for_bit(
    override: str, whole: tuple[Path, Path], tmp_path: Path
) -> None:
    half, run = whole
    shutil.copytree(half, tmp_path / "run")
    recipe = parse_recipe(TINY + OFF, "r.toml", [override])
    assert recipe.tables() != parse_recipe(TINY + OFF, "r.toml").tables()
    sslkit.train(recipe, run_dir=tmp_path / "run", steps=12, quiet=True)
    assert bits(tmp_path / "run") == bits(run)
    told, wanted = loss_at(tmp_path / "run"), loss_at(run)
    assert all(told[step] == wanted[step] for step in told.keys() & wanted.keys())


SOURCES: dict[str, dict[str, str]] = {
    "folder": {
        "root": "moved/train", "test_root": "moved/test", "max_bad": "0.5", "memory_limit_gb": "0.00001",
        "workers": "3",
    },
    "parquet": {
        "path": "moved/train.parquet", "test_path": "moved/test.parquet", "max_bad": "0.5",
        "memory_limit_gb": "15.0", "workers": "3", "cache_gb": "0.5",
    },
    "webdataset": {
        "path": "moved/train.tar", "test_path": "moved/test.tar", "max_bad": "0.5", "cache_gb": "0.5", "workers": "3",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same small images three times: as folders, as Parquet files and as tar shards, here and below `moved/`."""
    place = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 10)):
        rows = []
        for number in range(count):
            file = place / "here" / split / f"class{number % 2}" / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file)
            rows.append({"image": {"bytes": file.read_bytes(), "path": None}, "label": number % 2})
        with tarfile.open(place / "here" / f"{split}.tar", "w") as shard:
            for file in sorted((place / "here" / split).rglob("*.png")):
                shard.add(file, file.name)
        pq.write_table(pa.Table.from_pylist(rows), place / "here" / f"{split}.parquet")
    shutil.copytree(place / "here", place / "moved")
    return place


@pytest.mark.parametrize("use", SOURCES)
def test_where_images_lie_and_how_they_are_read_changes_no_bit(
    use: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(images)
    tables = {
        "folder": 'use = "folder"\nroot = "here/train"\ntest_root = "here/test"\nsize = 16',
        "parquet": 'use = "parquet"\npath = "here/train.parquet"\ntest_path = "here/test.parquet"\nsize = 16',
        "webdataset": 'use = "webdataset"\npath = "here/train.tar"\ntest_path = "here/test.tar"\nsize = 16\nwindow = 8',
    }
    text = TINY.replace('use = "digits"\nprints = 1\ntest_prints = 1', tables[use]) + OFF
    small = ["train.batch_size=16", "train.epochs=8", "observers.knn.enabled=false"]
    if use == "webdataset":  # its views are cut from images of any size
        small += ["view_generator.use=two_crops", "view_generator.size=16"]
    base = tmp_path / "base"
    sslkit.train(parse_recipe(text, "r.toml", small), run_dir=base, steps=6, quiet=True)
    shutil.copytree(base, tmp_path / "half")
    sslkit.train(parse_recipe(text, "r.toml", small), run_dir=base, steps=12, quiet=True)
    for option, value in SOURCES[use].items():
        shutil.copytree(tmp_path / "half", tmp_path / option)
        recipe = parse_recipe(text, "r.toml", [*small, f"data_source.{option}={value}"])
        sslkit.train(recipe, run_dir=tmp_path / option, steps=12, quiet=True)
        assert bits(tmp_path / option) == bits(base), option
    with pytest.raises(UserError, match=r"data_source\.size: 16 -> 8"):
        sslkit.train(parse_recipe(text, "r.toml", [*small, "data_source.size=8"]), run_dir=base, quiet=True)


def test_components_are_found_by_the_walk() -> None:
    """The walk above has to enter schedules and parameter groups."""
    recipe = parse_recipe(TINY, "r.toml", ["optimizer.groups.predictor.lr=0.05"])
    assert isinstance(recipe.optimizer, Component)
    found = {".".join(map(str, keys)) for keys, _, _ in leaves(recipe.tables(), recipe)}
    assert {"optimizer.lr.peak", "optimizer.groups.predictor.lr", "target_updater.tau.start", "train.compile"} <= found
