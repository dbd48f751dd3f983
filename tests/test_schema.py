"""The JSON Schema of recipes says what reading a recipe says."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from click.testing import CliRunner
from conftest import ROOT, TINY, Install
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from sslkit import registry
from sslkit.cli import main
from sslkit.errors import UserError
from sslkit.recipe import Recipe, Train, parse_recipe, read_recipe
from sslkit.schema import recipe_schema
from sslkit.sources import shipped

NAMES = sorted(shipped())


@cache
def of_sslkit() -> dict[str, Any]:
    schema, left_out = recipe_schema("sslkit")
    assert not left_out
    return schema


def accepts(tables: dict[str, Any] | str, schema: dict[str, Any] | None = None) -> bool:
    tables = tomllib.loads(tables) if isinstance(tables, str) else tables
    return bool(Draft202012Validator(schema or of_sslkit()).is_valid(tables))


def reads(tables: dict[str, Any]) -> bool:
    try:
        parse_recipe(tomli_w.dumps(tables), "r.toml")
    except UserError:
        return False
    return True


# ---------------------------------------------------------------- what is right


def test_it_is_a_schema() -> None:
    Draft202012Validator.check_schema(of_sslkit())


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_recipe_is_accepted_as_it_is_and_spelt_out(name: str) -> None:
    assert accepts(shipped()[name].read_text(encoding="utf-8"))
    assert accepts(read_recipe(name).to_toml())


@pytest.mark.parametrize(
    "text",
    [
        TINY,
        TINY.replace('name = "tiny"\n', ""),
        TINY.replace('use = "cosine"\n', 'use = "./my_loss.py:Mine"\nwhatever = 3\n', 1),
        TINY.replace('name = "tiny"\n', 'requires = ["sslkit"]\n'),
        'extends = "quickstart"',
        'extends = "quickstart"\nloss.form = "simsiam"',
        'extends = "quickstart"\noptimizer.lr.peak = 0.3',
        'extends = "quickstart"\noptimizer.groups.predictor.lr = 0.3',
        'extends = "quickstart"\npredictor = false',
        'extends = "quickstart"\ntrain.epochs = 3',
        'extends = "quickstart"\ntrain.batch_norm = "local"',
        'extends = "quickstart"\ntrain.batch_norm = "split:16"',
        'extends = "quickstart"\nrequires = ["torch>=2; python_version > \'3\'"]',
        'extends = "quickstart"\n[[observers]]\nuse = "knn"\nenabled = false',
    ],
)
def test_what_may_be_written_is_accepted(text: str) -> None:
    assert accepts(text)


# ---------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('use = "cosine"', 'use = "cosin"'),
        ("hidden_dim = 16", "hiden_dim = 16"),
        ("hidden_dim = 16", 'hidden_dim = "16"'),
        ("hidden_dim = 16", "hidden_dim = 0"),
        ("hidden_dim = 16", "hidden_dim = true"),
        ("peak = 0.1", "peek = 0.1"),
        ("peak = 0.1, ", ""),
        ("start = 0.9", 'start = "high"'),
        ('tau = { use = "cosine", start = 0.9, end = 1.0 }', 'tau = { use = "ema" }'),
        ('tau = { use = "cosine", start = 0.9, end = 1.0 }', "tau = true"),
        ("epochs = 2", "epoch = 2"),
        ("epochs = 2", 'epochs = "2"'),
        ("batch_size = 128", ""),
        ("compile = false", 'precision = "fp16"'),
        ("[loss]", "[lost]"),
        ('[loss]\nuse = "cosine"', ""),
        ('[loss]\nuse = "cosine"', "[loss]"),
        ('use = "knn"', ""),
        ("bank = 200", "bnk = 200"),
        ("[projector]", "[unknown]\n[projector]"),
        ('name = "tiny"', "name = 3"),
        ('name = "tiny"', "extends = 3"),
        ('name = "tiny"', "seed = -1"),
        ('name = "tiny"', 'requires = "sslkit"'),
    ],
)
def test_a_mistake_is_refused_by_both(old: str, new: str) -> None:
    assert old in TINY
    text = TINY.replace(old, new, 1)
    assert not accepts(text)
    assert not reads(tomllib.loads(text))


@pytest.mark.parametrize(
    "text",
    ["loss.frm = 'simsiam'", "loss.use = 'cosin'", "optimizer.lr.peek = 0.3", "loss = false", "train.epoch = 3",
     "optimizer.groups.predicter.lr = 0.3", "observers = [{ k = 3 }]", "predictor = true", "name = 3",
     "train.batch_norm = 'splitt:4'", "train.batch_norm = 'split:1'", "requires = ['==']"],
)  # fmt: skip
def test_a_mistake_in_an_overlay_is_refused_by_both(text: str) -> None:
    tables = tomllib.loads(f"extends = 'quickstart'\n{text}")
    assert not accepts(tables)
    assert not reads(tables)


# ---------------------------------------------------------------- single keys


def keys_of(tables: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every key, at any depth."""
    for key, value in tables.items() if isinstance(tables, dict) else enumerate(tables):
        if isinstance(key, str):
            yield (*path, key)
        if isinstance(value, dict | list):
            yield from keys_of(value, (*path, key))


def misspelt(key: str, how: str, at: int) -> str:
    at %= len(key)
    return {
        "drop": key[:at] + key[at + 1 :],
        "double": key[: at + 1] + key[at:],
        "swap": key[:at] + key[at : at + 2][::-1] + key[at + 2 :],
        "capital": key[:at] + key[at].upper() + key[at + 1 :],
        "add": f"{key}_",
    }[how] or "_"


@given(name=st.sampled_from(NAMES), spelt_out=st.booleans(), data=st.data())
@settings(max_examples=100, deadline=None)
def test_of_a_misspelt_key_it_says_what_reading_says(name: str, spelt_out: bool, data: st.DataObject) -> None:
    text = read_recipe(name).to_toml() if spelt_out else shipped()[name].read_text(encoding="utf-8")
    tables = copy.deepcopy(tomllib.loads(text))
    *path, key = data.draw(st.sampled_from(list(keys_of(tables))))
    table = tables
    for step in path:
        table = table[step]
    how = data.draw(st.sampled_from(["drop", "double", "swap", "capital", "add"]))
    wrong = misspelt(key, how, data.draw(st.integers(0, 20)))
    if wrong in table:
        return
    table[wrong] = table.pop(key)
    assert accepts(tables) == reads(tables), f"{'.'.join(map(str, path))}: {key} -> {wrong}"


@given(name=st.sampled_from(NAMES), data=st.data())
@settings(max_examples=60, deadline=None)
def test_of_a_key_left_out_it_says_what_reading_says(name: str, data: st.DataObject) -> None:
    tables = tomllib.loads(read_recipe(name).to_toml())
    *path, key = data.draw(st.sampled_from(list(keys_of(tables))))
    table = tables
    for step in path:
        table = table[step]
    del table[key]
    if key in ("warmup_epochs", "warmup_steps"):
        return  # exactly one of the two: code checks it
    assert accepts(tables) == reads(tables), f"{'.'.join(map(str, path))}: {key}"


# ---------------------------------------------------------------- what it tells


def test_every_option_has_its_help_and_its_default() -> None:
    definitions = of_sslkit()["$defs"]
    for provider in registry.providers():
        if provider.kind not in registry.KINDS or provider.distribution != "sslkit":
            continue
        cls = registry.load(provider.kind, provider.name)
        written = definitions[provider.key]["properties"]
        assert set(written) == {"use", *cls.model_fields}
        assert written["use"]["const"] == provider.name
        assert definitions[provider.key]["description"].split() == (cls.__doc__ or "").split()
        for name, info in cls.model_fields.items():
            assert written[name]["description"].split() == info.description.split()
            if not info.is_required() and isinstance(info.default, bool | int | float | str):
                assert written[name]["default"] == info.default
    for model, written in (
        (Recipe, of_sslkit()["properties"]),
        (Train, of_sslkit()["properties"]["train"]["properties"]),
    ):
        for name, info in model.model_fields.items():
            assert written[name]["description"].split() == info.description.split()


def test_every_slot_is_one_of_its_components_by_use() -> None:
    definitions = of_sslkit()["$defs"]
    for kind in registry.KINDS:
        *named, local = definitions[f"{kind}.whole"]["oneOf"]
        assert [ref["$ref"] for ref in named] == [f"#/$defs/{kind}.{name}.whole" for name in registry.names(kind)]
        assert local["properties"]["use"] == {"type": "string", "pattern": r"\.py:\w+$"}
    text = json.dumps(of_sslkit())
    assert "discriminator" not in text
    assert "x-sslkit" not in text
    for target in re.findall(r'"\$ref": "([^"]+)"', text):
        assert target.removeprefix("#/$defs/") in definitions


# ---------------------------------------------------------------- other packages

ODD = '''
from typing import Annotated, Any
from pydantic import BaseModel, BeforeValidator, InstanceOf
from sslkit.api import Loss, Observer

class Tree(BaseModel):
    """A table that holds itself."""
    children: "tuple[Tree, ...]" = ()

class Piece(BaseModel):
    """A table in a list."""
    size: int
    """Required."""

class Look(Observer):
    """An observer with an option that it requires."""
    at: int
    """Where."""
    def build(self, run): ...

class Odd(Loss):
    """A loss with options that JSON Schema cannot tell."""
    found: Annotated[InstanceOf[complex], BeforeValidator(complex)] = 1j
    """Anything that makes a complex number."""
    tree: Tree = Tree()
    """A tree."""
    pieces: tuple[Piece, ...] = ()
    """Some pieces."""
    title: str = "x"
    """An option that is called as a keyword of JSON Schema is."""
    def build(self, dim, run): ...
'''


def test_what_another_package_brings_is_in_it(install: Install) -> None:
    install("sslkit-odd", "loss.odd = sslkit_odd_x:Odd\nobserver.look = sslkit_odd_x:Look", {"sslkit_odd_x": ODD})
    schema, left_out = recipe_schema()
    assert not left_out
    odd = TINY.replace(
        '[loss]\nuse = "cosine"', '[loss]\nuse = "odd"\nfound = "1+2j"\ntitle = "y"\ntree.children = [{}]'
    )
    assert accepts(odd, schema)
    assert not accepts(odd.replace("title", "tilte"), schema)
    for start, complete in (("", False), ('extends = "base.toml"\n', True)):
        look = f'{start}{odd}\n[[observers]]\nuse = "look"\n'
        assert accepts(f"{look}at = 1", schema)
        assert accepts(look, schema) == complete, "an overlay's observer is laid over the base's"
        assert not accepts(look.replace("tree.children = [{}]", "pieces = [{}]"), schema), "a list is not laid over"
    assert not accepts(odd), "the schema of sslkit's own does not depend on what else is installed"


def test_what_is_broken_is_left_out_and_told_of(install: Install) -> None:
    install("broken-dist", "loss.broken = broken_mod_x:X", {"broken_mod_x": "1 / 0"})
    install("wrong-dist", "loss.wrong = wrong_mod_x:Wrong", {"wrong_mod_x": "class Wrong: pass"})
    install("twin-dist", "loss.cosine = twin_mod_x:X")
    done = CliRunner().invoke(main, ["schema"])
    assert done.exit_code == 0
    assert {"broken", "wrong", "cosine"}.isdisjoint(
        d.partition(".")[2] for d in json.loads(done.stdout)["$defs"] if d[:5] == "loss."
    )
    told = done.stderr.splitlines()
    assert len(told) == 3
    for name, line in zip(("broken", "cosine", "wrong"), told, strict=True):
        assert line.startswith("left out: ")
        assert f"loss {name!r}" in line


# ---------------------------------------------------------------- the command, and the file


def test_the_command_writes_a_file_and_says_how_to_name_it(tmp_path: Path) -> None:
    out = tmp_path / "own.json"
    done = CliRunner().invoke(main, ["schema", "-o", str(out)])
    assert done.exit_code == 0
    assert done.output.rstrip().endswith("#:schema ./own.json")
    assert json.loads(out.read_text(encoding="utf-8")) == json.loads(CliRunner().invoke(main, ["schema"]).stdout)
    refused = CliRunner().invoke(main, ["schema", "-o", str(tmp_path / "no" / "own.json")])
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert "cannot be written" in refused.stderr


def test_the_shipped_schema_is_not_stale() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec
    assert spec.loader
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    stale = generate.SCHEMA.read_text(encoding="utf-8") != generate.shipped_schema()
    assert not stale, "recipes/sslkit.schema.json is stale: run python docs/generate.py"


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_names_its_schema_above_its_first_key_and_a_copy_does_not(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shipped()[name]
    head = re.match(r"(#.*\n)+", path.read_text(encoding="utf-8"))
    assert head
    assert head[0].splitlines()[-1] == "#:schema ./sslkit.schema.json"
    assert (path.parent / "sslkit.schema.json").is_file()
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(main, ["copy", name]).exit_code == 0
    copied = Path(f"{name}.toml").read_text(encoding="utf-8")
    assert "#:schema" not in copied
    assert copied == path.read_text(encoding="utf-8").replace("#:schema ./sslkit.schema.json\n", "")
