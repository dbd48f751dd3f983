"""Recipes that extend recipes, and where each key was written."""

from __future__ import annotations

import tempfile
import tomllib
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from click.testing import CliRunner
from conftest import TINY, run_info
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sslkit.api import Head
from sslkit.cli import main
from sslkit.errors import UserError
from sslkit.recipe import Recipe, parse_recipe, read_recipe
from sslkit.sources import renamed, resolve, shipped


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the small recipe as `base.toml` in it."""
    monkeypatch.chdir(tmp_path)
    write("base.toml", TINY)
    return tmp_path


def write(name: str, text: str) -> str:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return name


def over(text: str, *overrides: str, base: str = "base.toml") -> Recipe:
    return read_recipe(write("over.toml", f'extends = "{base}"\n{text}'), overrides)


def dumped(recipe: Recipe, slot: str) -> Any:
    return recipe.tables().get(slot)


def errors(source: str, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        read_recipe(source, overrides)
    assert caught.value.exit_code == 2
    return list(caught.value.lines)


def line(file: str, text: str) -> str:
    """`file:line` of the first line that begins with a text."""
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    return f"{file}:{next(n for n, written in enumerate(lines, 1) if written.startswith(text))}"


# ---------------------------------------------------------------- what an overlay means


def test_an_empty_overlay_is_the_base_under_its_own_name() -> None:
    base, same = read_recipe("base.toml"), over("")
    assert same.tables() == base.tables() | {"name": "over"}
    assert same.hash() == base.hash()
    assert over('name = "mine"').name == "mine"


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("optimizer.lr.peak = 0.2", "optimizer.lr",
         {"use": "warmup_cosine", "peak": 0.2, "warmup_steps": 5, "start": 0.0, "end": 0.0}),
        ('optimizer.lr = { use = "warmup_cosine", peak = 0.2 }', "optimizer.lr",
         {"use": "warmup_cosine", "peak": 0.2, "warmup_steps": 5, "start": 0.0, "end": 0.0}),
        ('optimizer.lr = { use = "cosine", start = 1.0, end = 0.0 }', "optimizer.lr",
         {"use": "cosine", "start": 1.0, "end": 0.0}),
        ("optimizer.lr = 0.5", "optimizer.lr", 0.5),
        ("optimizer.lr = 0.5", "optimizer.weight_decay", 1e-4),
        ('optimizer.weight_decay = { use = "linear", start = 0.1, end = 0.2 }', "optimizer.weight_decay",
         {"use": "linear", "start": 0.1, "end": 0.2}),
        ("optimizer.groups.predictor.lr = 0.3", "optimizer.groups", {"predictor": {"lr": 0.3}}),
        ('optimizer = { use = "adam", lr = 0.1 }', "optimizer.weight_decay", 0.0),
        ('optimizer = { use = "sgd", momentum = 0.5 }', "optimizer.weight_decay", 1e-4),
        ("backbone.widths = [4]\nbackbone.strides = [2]", "backbone.widths", [4]),
        ("train.epochs = 7", "train.epochs", 7),
        ("train.epochs = 7", "train.batch_size", 128),
        ("seed = 5", "seed", 5),
        ("predictor = false", "predictor", None),
        ('projector.use = "identity"', "projector", {"use": "identity"}),
    ],
)  # fmt: skip
def test_tables_merge_and_another_use_or_value_replaces(text: str, key: str, value: object) -> None:
    found: Any = over(text).tables()
    for piece in key.split("."):
        found = found.get(piece)
    assert found == value


def test_a_predictor_that_was_taken_away_can_come_back() -> None:
    write("none.toml", 'extends = "base.toml"\npredictor = false')
    assert dumped(over('predictor.use = "identity"', base="none.toml"), "predictor") == {"use": "identity"}
    assert dumped(over("", 'predictor.use="identity"', base="none.toml"), "predictor") == {"use": "identity"}
    assert over("", "predictor=false").predictor is None
    over("projector.hidden_dim = 3")
    assert errors("over.toml", "projector=false") == [
        "--set projector=false: projector: should be a table with a key 'use' that names a head, not False"
    ]
    assert "not True" in errors("over.toml", "predictor=true")[0]


def test_observers_merge_by_name_and_new_ones_are_added() -> None:
    found = over('[[observers]]\nuse = "health"\nring = 64\n[[observers]]\nuse = "knn"\nk = 7\n').tables()["observers"]
    assert [o["use"] for o in found] == ["knn", "health", "probe", "tensorboard", "report"]
    assert (found[0]["k"], found[0]["bank"], found[1]["ring"]) == (7, 200, 64)
    off = over('[[observers]]\nuse = "knn"\nenabled = false\n').observers
    assert [o.enabled for o in off] == [False, True, True, True, True]


def test_the_second_observer_of_a_name_is_laid_over_the_second() -> None:
    write("two.toml", TINY + '\n[[observers]]\nuse = "knn"\nk = 9\nbank = 99\n')
    text = "".join(f'[[observers]]\nuse = "knn"\nk = {k}\n' for k in (1, 2, 3))
    found = [o for o in over(text, base="two.toml").tables()["observers"] if o["use"] == "knn"]
    assert [(o["k"], o["bank"]) for o in found] == [(1, 200), (2, 99), (3, 3_000)]


def test_paths_start_where_the_file_is_that_says_them_and_chains_are_followed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("a/b/middle.toml", 'extends = "../../base.toml"\ntrain.epochs = 3\nseed = 3\nname = "middle"')
    write("a/top.toml", 'extends = "b/middle.toml"\nseed = 4')
    monkeypatch.chdir(folder / "a" / "b")
    top = read_recipe("../top.toml")
    assert (top.name, top.seed, top.train.epochs, top.train.batch_size) == ("top", 4, 3, 128)
    write("over.toml", f'extends = "{folder}/base.toml"')
    assert read_recipe("over.toml").train.epochs == 2


def test_a_shipped_recipe_is_extended_by_its_name_whatever_lies_beside() -> None:
    write("quickstart.toml", 'extends = "quickstart"\nseed = 9')
    assert read_recipe("quickstart.toml").tables() == read_recipe("quickstart").tables() | {"seed": 9}


def test_a_recipe_and_its_flattened_form_are_the_same() -> None:
    recipe = over('optimizer = { use = "adam", lr = 0.1 }\npredictor = false\nobservers = [{ use = "knn", k = 3 }]')
    lock = recipe.to_toml()
    assert "extends" not in tomllib.loads(lock)
    again = parse_recipe(lock, "elsewhere/recipe.lock.toml")
    assert again == recipe
    assert again.hash() == recipe.hash()
    by_hand = tomllib.loads(TINY) | {"optimizer": {"use": "adam", "lr": 0.1}}
    del by_hand["predictor"]
    assert parse_recipe(tomli_w.dumps(by_hand), "by_hand.toml").hash() == recipe.hash()
    assert read_recipe("base.toml").hash() != recipe.hash()


# ---------------------------------------------------------------- bases that cannot be had


@pytest.mark.parametrize(
    ("extends", "says"),
    [
        ('"bsae.toml"', "bsae.toml: no such recipe file"),
        ('"quikstart"', "quikstart: no shipped recipe has this name; did you mean 'quickstart'? ("),
        ('"sub/"', "sub: is a folder; give a recipe file in it"),
        ("3", "should be the name of a shipped recipe or a path, not 3"),
        ('["base.toml"]', "should be the name of a shipped recipe or a path, not ['base.toml']"),
        ('"broken.toml"', "broken.toml:3: not valid TOML: Invalid value (column 5)"),
        ('"latin.toml"', "latin.toml:1: is not UTF-8 text (byte 8)"),
        ('"over.toml"', "goes round in a circle: over.toml -> over.toml"),
        ('"sub/one.toml"', ""),
    ],
)
def test_what_cannot_be_extended_points_at_the_line_that_says_it(extends: str, says: str) -> None:
    write("sub/one.toml", '# a comment\nextends = "../sub/two.toml"')
    write("sub/two.toml", '\n\nextends = "one.toml"')
    write("broken.toml", "\n\na = \n")
    Path("latin.toml").write_bytes(b'name = "\xe9"')
    write("over.toml", f"seed = 1\n\nextends = {extends}\n")
    found = errors("over.toml")
    assert len(found) == 1
    if says:
        assert found[0].startswith(f"over.toml:3: extends: {says}")
    else:
        circle = "over.toml -> sub/one.toml -> sub/../sub/two.toml -> sub/../sub/one.toml"
        assert found == [f"sub/../sub/two.toml:3: extends: goes round in a circle: {circle}"]


def test_a_base_is_not_an_override_and_a_misspelt_extends_is_known() -> None:
    assert errors("base.toml", "extends=quickstart") == [
        "--set extends=quickstart: a recipe says in its file what it extends"
    ]
    write("extend.toml", 'extend = "quickstart"' + TINY)
    assert errors("extend.toml") == ["extend.toml:1: extend: unknown option; did you mean 'extends'?"]


# ---------------------------------------------------------------- --set in a list

GROUPS = 'extends = "base.toml"\n[view_generator]\nuse = "multi_crop"\nviews = [{ count = 2 }, { size = 8 }]\n'


def test_set_reaches_an_element_of_a_list() -> None:
    write("groups.toml", GROUPS)
    views = read_recipe("groups.toml", ["view_generator.views.1.size=12"]).tables()["view_generator"]["views"]
    assert views[1]["size"] == 12
    assert views[0]["count"] == 2
    typo = "view_generator.views.1.sice=12"
    assert errors("groups.toml", typo) == [
        f"--set {typo}: view_generator.views.1.sice: unknown option; did you mean 'size'?"
    ]


@pytest.mark.parametrize("element", ["2", "-1", "x", ""])
def test_an_element_that_is_not_there_is_told(element: str) -> None:
    write("groups.toml", GROUPS)
    (line,) = errors("groups.toml", f"view_generator.views.{element}.size=12")
    assert "is a list of 2; name an element by its number, from 0" in line or "should read key=value" in line


# ---------------------------------------------------------------- where a mistake is


def test_a_mistake_is_told_at_the_file_and_line_that_made_it() -> None:
    write("base.toml", TINY.replace("weight_decay = 1e-4", "weight_decay = 1e-4\nmomentm = 3"))
    write("middle.toml", 'extends = "base.toml"\n\nloss.from = "byol"')
    write("over.toml", 'extends = "middle.toml"\n[optimizer]\nlr.peek = 2\n')
    assert errors("over.toml", "train.epocs=3") == [
        "--set train.epocs=3: train.epocs: unknown option; did you mean 'epochs'?",
        f"{line('base.toml', 'momentm')}: optimizer.momentm: unknown option; did you mean 'momentum'?",
        "middle.toml:3: loss.from: unknown option; did you mean 'form'?",
        "over.toml:3: optimizer.lr.peek: unknown option; did you mean 'peak'?",
    ]


def test_what_the_overlay_corrects_is_no_mistake() -> None:
    write("base.toml", TINY.replace("epochs = 2", 'epochs = "2"'))
    assert errors("base.toml") == [f"{line('base.toml', 'epochs')}: train.epochs: should be a valid integer, not '2'"]
    assert over("train.epochs = 3").train.epochs == 3
    assert errors(write("over.toml", 'extends = "base.toml"\ntrain.epochs = "3"')) == [
        "over.toml:2: train.epochs: should be a valid integer, not '3'"
    ]


def test_a_table_that_two_files_made_wrong_together_is_told_at_the_overlay() -> None:
    assert errors(write("over.toml", 'extends = "base.toml"\nseed = 1\noptimizer.lr.warmup_epochs = 1')) == [
        "over.toml:3: optimizer.lr: needs exactly one of 'warmup_epochs' and 'warmup_steps'"
    ]


def test_what_is_missing_is_missing_from_the_overlay() -> None:
    write("base.toml", TINY.replace('[loss]\nuse = "cosine"', "").replace("batch_size = 128\n", ""))
    write("over.toml", 'extends = "base.toml"\n\n[train]\nepochs = 3\n[optimizer]\nuse = "adam"\n')
    assert errors("over.toml") == [
        "over.toml:1: loss: this table is required and missing",
        "over.toml:3: train.batch_size: this option is required and missing",
        "over.toml:5: optimizer.lr: this option is required and missing",
    ]
    assert "--set optimizer.use=lars: optimizer.lr: this option is" in errors("over.toml", "optimizer.use=lars")[0]


def test_a_name_that_follows_from_the_file_is_not_the_bases_mistake() -> None:
    assert errors(write("ö.toml", 'extends = "base.toml"'))[0].startswith("ö.toml:1: name: should be letters, digits")


def test_observers_mistakes_are_told_where_each_key_was_written() -> None:
    write("base.toml", TINY + "qeries = 3\n")
    text = '\n[[observers]]\nuse = "health"\nrng = 64\n[[observers]]\nuse = "knn"\nkk = 7\n'
    write("over.toml", f'extends = "base.toml"\n{text}')
    assert errors("over.toml", "observers.tensorboard.x=1") == [
        "--set observers.tensorboard.x=1: observers.2.x: unknown option; known here: enabled, use",
        f"{line('base.toml', 'qeries')}: observers.0.qeries: unknown option; did you mean 'queries'?",
        "over.toml:5: observers.1.rng: unknown option; did you mean 'ring'?",
        "over.toml:8: observers.0.kk: unknown option; did you mean 'k'?",
    ]


@st.composite
def documents(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Two or three tables of tables, whose numbers are all different."""
    keys = st.sampled_from(["a", "b", "c"])
    numbers = count(1000)

    def table(depth: int) -> dict[str, Any]:
        made: dict[str, Any] = {"use": draw(st.sampled_from(["x", "y"]))} if draw(st.booleans()) else {}
        for key in draw(st.lists(keys, unique=True)):
            kind = draw(st.sampled_from(["number", "list", "table"][: 3 if depth < 3 else 2]))
            if kind == "table":
                made[key] = table(depth + 1)
            else:
                made[key] = next(numbers) if kind == "number" else [next(numbers), {"a": next(numbers)}]
        return made

    found = []
    for _ in range(draw(st.integers(2, 3))):
        document = table(0)
        document.pop("use", None)
        uses = draw(st.lists(st.sampled_from(["x", "y"]), max_size=3))
        found.append(document | {"observers": [table(2) | {"use": use, "id": next(numbers)} for use in uses]})
    return found


def naive(base: Any, top: Any) -> Any:
    """The rule for tables, said once more."""
    if not (isinstance(base, dict) and isinstance(top, dict)) or ("use" in top and top["use"] != base.get("use")):
        return top
    return {key: naive(base[key], top[key]) if key in base and key in top else {**base, **top}[key]
            for key in base | top}  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(documents())
def test_every_key_of_a_chain_knows_its_line_and_tables_merge_by_the_rule(chain: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as place:
        for number, document in enumerate(chain):
            below = {"extends": f"{number - 1}.toml"} if number else {}
            Path(place, f"{number}.toml").write_text(tomli_w.dumps(below | document), encoding="utf-8")
        last = Path(place, f"{len(chain) - 1}.toml")
        tables, origin = resolve(last.read_text(encoding="utf-8"), str(last))
        texts = {str(path): path.read_text(encoding="utf-8").split("\n") for path in Path(place).iterdir()}

    def visit(value: Any, path: tuple[str | int, ...]) -> None:
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(inner, dict | list):
                visit(inner, (*path, key))
            elif key != "use":
                file, _, number = origin.of((*path, key)).rpartition(":")
                assert str(inner) in texts[file][int(number) - 1], (path, key)

    visit(tables, ())
    expected = chain[0]
    for document in chain[1:]:
        expected = naive(expected, document)
    assert {k: v for k, v in tables.items() if k != "observers"} == {
        k: v for k, v in expected.items() if k != "observers"
    }


# ---------------------------------------------------------------- --set


def test_overrides_come_after_the_bases() -> None:
    recipe = over("seed = 5\ntrain.epochs = 7", "train.epochs=9", "optimizer.lr.peak=3", "observers.knn.k=4")
    assert (recipe.seed, recipe.train.epochs) == (5, 9)
    assert dumped(recipe, "optimizer")["lr"]["peak"] == 3
    assert dumped(recipe, "observers")[0]["k"] == 4


def test_the_outermost_use_is_set_first() -> None:
    schedule = ["optimizer.lr.use=cosine", "optimizer.lr.start=1", "optimizer.lr.end=0.5"]
    recipe = over("", *schedule, "optimizer.use=adam")
    assert dumped(recipe, "optimizer")["lr"] == {"use": "cosine", "start": 1.0, "end": 0.5}


def test_what_an_override_replaces_is_not_remembered() -> None:
    """The base has `optimizer.lr.peak`; the override's schedule has none."""
    over("")
    override = 'optimizer.lr={ use = "warmup_cosine", warmup_steps = 3 }'
    for file in ("over.toml", "base.toml"):
        found = errors(file, override)
        assert found == [f"--set {override}: optimizer.lr.peak: this option is required and missing"]


# ---------------------------------------------------------------- SimSiam


def test_from_byol_to_simsiam_takes_ten_lines_or_fewer() -> None:
    lines = [text.strip() for text in shipped()["simsiam_cifar10"].read_text(encoding="utf-8").splitlines()]
    assert len([text for text in lines if text and not text.startswith("#")]) <= 10


def layers(head: Head | None, width: int) -> list[str]:
    """The layers of a head in words."""
    assert head
    found = []
    for layer in head.build(width, run_info()).children():
        if isinstance(layer, nn.Linear):
            found.append(f"{layer.in_features} -> {layer.out_features}{' with bias' * (layer.bias is not None)}")
        elif isinstance(layer, nn.BatchNorm1d):
            found.append("batch norm" + " without scale and shift" * (not layer.affine))
        else:
            found.append(type(layer).__name__)
    return found


def test_simsiam_is_what_the_paper_and_its_code_say() -> None:
    """Chen & He 2021, section 3, appendices A and D; the layers of the authors' `simsiam/builder.py`."""
    recipe = read_recipe("simsiam_cifar10")
    table = recipe.tables()
    assert layers(recipe.projector, 512) == [
        "512 -> 2048", "batch norm", "ReLU", "2048 -> 2048", "batch norm without scale and shift"
    ]  # fmt: skip
    assert layers(recipe.predictor, 2048) == ["2048 -> 512", "batch norm", "ReLU", "512 -> 2048 with bias"]
    assert table["loss"]["form"] == "simsiam"
    assert table["target_updater"] == {"use": "stop_gradient"}
    assert table["optimizer"] == {
        "use": "sgd", "momentum": 0.9, "nesterov": False, "weight_decay": 5e-4, "exclude_bias_and_norm": False,
        "lr": {"use": "cosine", "start": 0.03, "end": 0.0}, "lr_reference_batch": 256,
        "groups": {"predictor": {"lr": 0.03}},
    }  # fmt: skip
    views = table["view_generator"]
    assert [views[key] for key in ("scale", "flip", "jitter", "grayscale")] == [[0.2, 1.0], 0.5, 0.8, 0.2]
    assert [views[key] for key in ("brightness", "contrast", "saturation", "hue")] == [0.4, 0.4, 0.4, 0.1]
    assert (views["blur"], views["solarize"]) == ([0.0, 0.0], [0.0, 0.0])
    byol = read_recipe("byol_cifar10").tables()
    assert all(table[slot] == byol[slot] for slot in ("data_source", "backbone", "train", "observers"))


# ---------------------------------------------------------------- recipes and copy


def sslkit(*arguments: str) -> str:
    done = CliRunner().invoke(main, list(arguments))
    assert done.exit_code == 0, done.output
    return done.output


def test_overlays_are_listed_and_a_copy_of_one_works_elsewhere() -> None:
    assert "simsiam_cifar10  " in sslkit("recipes")
    Path("far").mkdir()
    sslkit("copy", "simsiam_cifar10", "far/mine.toml")
    sslkit("copy", "simsiam_cifar10")
    original = shipped()["simsiam_cifar10"].read_text().replace("#:schema ./sslkit.schema.json\n", "")
    assert Path("far/mine.toml").read_text() == original, "it has no name to change"
    copied = read_recipe("far/mine.toml")
    assert copied.name == "mine"
    assert copied.hash() == read_recipe("simsiam_cifar10").hash() == read_recipe("simsiam_cifar10.toml").hash()


def test_a_path_is_not_copied_since_its_base_would_be_lost() -> None:
    done = CliRunner().invoke(main, ["copy", "base.toml", "mine.toml"])
    assert done.exit_code == 2
    assert done.stderr.startswith("base.toml: is a path")
    assert not Path("mine.toml").exists()


def test_a_copy_gets_its_files_name_and_only_a_recipes_own_name_is_changed() -> None:
    assert renamed('# x\nname = "a"  # why\n[t]\nname = "b"\n', "c") == '# x\nname = "c"  # why\n[t]\nname = "b"\n'
    assert renamed("name='a'\n", "c") == 'name= "c"\n'
    without = 'seed = 1\n[data_source]\nname = "b"\n'
    assert renamed(without, "c") == without
