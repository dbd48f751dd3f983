"""Bytes at random, given to what reads strangers' files: each ends in a result or in lines for the user.

`benchmarks/fuzz.py` does the same for as long as it is told to, led by which code was reached.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sslkit import checkpoint, sources
from sslkit.errors import RunFailed, UserError
from sslkit.foreign import csv_run
from sslkit.recipe import parse_recipe

FAST = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

# ---------------------------------------------------------------- the recipe reader

RECIPES = [path.read_bytes() for path in sources.shipped().values()] + [TINY.encode()]
WORDS = sorted({word.encode() for data in RECIPES for word in re.findall(r"[\w.]+|[^\w\s]+", data.decode())})
SIGNS = [
    b"\n[[", b"]]\n", b'"""', b"'''", b"\\u0000", b"\r\n", b"\xef\xbb\xbf", b"nan", b"1979-05-27", b"0x7f", b" = ",
    b"{",
]  # fmt: skip
pieces = st.sampled_from(WORDS) | st.binary(max_size=3) | st.sampled_from(SIGNS)
edits = st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 30), pieces), min_size=1, max_size=6)


def edited(data: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    """The bytes with a piece put in the place of some of them, several times."""
    for at, length, piece in changes:
        place = at % (len(data) + 1)
        data = data[:place] + piece + data[place + length :]
    return data


def only_lines(call: Callable[[], object]) -> None:
    """Nothing but an error for the user may come out, and its lines are lines."""
    try:
        call()
    except (UserError, RunFailed) as error:
        assert error.lines  # noqa: PT017 either outcome is right
        assert all(line.isprintable() for line in error.lines)  # noqa: PT017


def read_recipe(data: bytes) -> None:
    only_lines(lambda: parse_recipe(sources.decoded(data, "r.toml"), "r.toml").to_toml())


@FAST
@given(st.sampled_from(RECIPES), edits)
def test_recipes_with_something_changed(data: bytes, changes: list[tuple[int, int, bytes]]) -> None:
    read_recipe(edited(data, changes))


@FAST
@given(st.lists(pieces, max_size=40))
def test_recipes_of_words_in_any_order(words: list[bytes]) -> None:
    read_recipe(b" ".join(words))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = [
    "name", "seed", "data_source", "loss.use", "train.epochs", "train", "optimizer.lr", "observers", "observers.knn.k",
    "backbone.widths.0", "projector.hidden_dim", "target_updater.tau", "requires", "predictor",
]  # fmt: skip


@FAST
@given(st.lists(st.tuples(st.sampled_from(KEYS), values | st.text(max_size=12)), min_size=1, max_size=3))
def test_overrides_with_any_value(pairs: list[tuple[str, Any]]) -> None:
    overrides = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in pairs]
    only_lines(lambda: parse_recipe(TINY, "r.toml", overrides))


# ---------------------------------------------------------------- the checkpoint reader


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parts = {
        "model": {"weight": torch.ones(2, 3), "count": torch.tensor(3)},
        "optimizer": {"state": {0: {"momentum": torch.zeros(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
    }
    return checkpoint.save(tmp_path_factory.mktemp("run"), 7, parts, {"metrics_offset": 12, "knn_top1": 0.5})


FILES = ("manifest.json", "model.safetensors", "optimizer.safetensors", "state.json")


def read_checkpoint(sound: Path, folder: Path, name: str, content: bytes, vouched: bool) -> None:
    """`vouched`: the manifest is changed with the file, since a check that always fails would hide what is behind."""
    path = folder / "step-000000007"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(sound, path)
    (path / name).write_bytes(content)
    if vouched and name != "manifest.json":
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (path / "manifest.json").write_text(json.dumps(manifest))
    checkpoint.best(folder)
    only_lines(lambda: checkpoint.load(path))


@FAST
@given(st.sampled_from(FILES), st.booleans(), edits)
def test_checkpoints_with_something_changed(
    sound: Path, tmp_path: Path, name: str, vouched: bool, changes: list[tuple[int, int, bytes]]
) -> None:
    read_checkpoint(sound, tmp_path, name, edited((sound / name).read_bytes(), changes), vouched)


@FAST
@given(st.sampled_from(["manifest.json", "state.json"]), st.integers(0, 200), values)
def test_checkpoints_with_another_value(sound: Path, tmp_path: Path, name: str, which: int, value: object) -> None:
    top = [json.loads((sound / name).read_text())]
    todo: list[Any] = [top]
    places: list[tuple[Any, Any]] = []
    while todo:
        node = todo.pop()
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                todo.append(node[key])
    node, key = places[which % len(places)]
    node[key] = value
    read_checkpoint(sound, tmp_path, name, json.dumps(top[0]).encode(), vouched=True)


@pytest.mark.parametrize(
    "content", [b"2", b'{"facts": 3}', b"[]", b"null", b'{"facts": {"knn_top1": "x"}}', b"[" * 9999]
)
@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_json_that_is_no_table_is_no_checkpoint(sound: Path, tmp_path: Path, name: str, content: bytes) -> None:
    read_checkpoint(sound, tmp_path, name, content, vouched=True)


# ---------------------------------------------------------------- the reader of other programs' logs

LOGS = (
    b"epoch,loss,lr\n0,1.0,0.1\n1,0.5,0.1\n2,nan,0.1\n",
    b"Epoch: 4 Epoch_Loss: 0.0054 tau: 0.99\nEpoch: 5 Epoch_Loss: 0.0044 tau: 0.999\n",
    b'{"step": 1, "loss": 0.3}\n{"step": 2, "loss": 0.2, "cosine": 0.9}\n',
    b"1.0\n0.9\n0.8\n0.7\n",
)
figures = st.sampled_from(
    [b"nan", b"-inf", b"1e308", b"-1", b"loss", b"epoch", b"step", b",", b"\n", b"%", b"{", b": "]
)


@FAST
@given(
    st.sampled_from(LOGS),
    st.lists(
        st.tuples(st.integers(0, 200), st.integers(0, 8), figures | st.binary(max_size=3)), min_size=1, max_size=8
    ),
)
def test_logs_with_something_changed(tmp_path: Path, data: bytes, changes: list[tuple[int, int, bytes]]) -> None:
    (tmp_path / "log.csv").write_bytes(edited(data, changes))
    only_lines(lambda: csv_run.examine(str(tmp_path / "log.csv")).text())
