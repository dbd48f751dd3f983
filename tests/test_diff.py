"""`sslkit diff`: what differs between two recipes, in words and as JSON."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from conftest import TINY
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_recipe import BOXES, offer_boxes

from sslkit.cli import main
from sslkit.diff import Change, Difference, Side, Slot, compare, differences
from sslkit.errors import UserError
from sslkit.recipe import Recipe, parse_recipe


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.toml").write_text(TINY, encoding="utf-8")


def recipe(*overrides: str) -> Recipe:
    return parse_recipe(TINY, "r.toml", overrides)


def told(*overrides: str) -> list[str]:
    return [str(change) for change in differences(recipe(), recipe(*overrides))]


def run(*arguments: str, color: bool = False) -> Result:
    return CliRunner(env={"FORCE_COLOR": "1"} if color else {}).invoke(main, ["diff", *arguments])


def shown(*overrides: str) -> list[str]:
    """What the command prints below the two names."""
    Path("b.toml").write_text(recipe(*overrides).to_toml(), encoding="utf-8")
    done = run("a.toml", "b.toml")
    assert done.exit_code == 0, done.output
    return done.output.splitlines()[3:]


def as_json(*overrides: str) -> dict[str, Any]:
    Path("b.toml").write_text(recipe(*overrides).to_toml(), encoding="utf-8")
    found: dict[str, Any] = json.loads(run("a.toml", "b.toml", "--json").output)
    return found


# ---------------------------------------------------------------- option by option


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ([], []),
        (["seed=3", "optimizer.weight_decay=0.5"], ["seed: 0 -> 3", "optimizer.weight_decay: 0.0001 -> 0.5"]),
        (["optimizer.lr.peak=0.2"], ["optimizer.lr.peak: 0.1 -> 0.2"]),
        (["optimizer.lr=0.2"], [
            'optimizer.lr: { use = "warmup_cosine", peak = 0.1, warmup_steps = 5, start = 0.0, end = 0.0 } -> 0.2']),
        (["target_updater.tau={use='linear', start=0.9, end=1.0}"], [
            'target_updater.tau: { use = "cosine", start = 0.9, end = 1.0 } -> '
            '{ use = "linear", start = 0.9, end = 1.0 }']),
        (["backbone.widths=[4, 8]"], ["backbone.widths: [8, 8] -> [4, 8]"]),
        (["loss.form=simsiam"], ['loss.form: "byol" -> "simsiam"']),
        (["optimizer.groups.loss.lr=0.1"], ["optimizer.groups: unset -> { loss = { lr = 0.1 } }"]),
        (["projector.use=identity"], ['projector.use: "mlp" -> "identity"', "projector.layers: 2 -> unset"]),
        (["predictor=false"], ['predictor.use: "mlp" -> unset', "predictor.layers: 2 -> unset"]),
        (["target_updater.use=none"], [
            'target_updater.use: "ema" -> "none"',
            'target_updater.tau: { use = "cosine", start = 0.9, end = 1.0 } -> unset']),
        (["train.log_every=7", "name=x", "observers.knn.k=3"], []),
    ],
)  # fmt: skip
def test_what_is_computed_differently_is_told_option_by_option(overrides: list[str], says: list[str]) -> None:
    found = told(*overrides)
    swapped = bool(found) and ".use: " in found[0]  # what other options the old part had is its own business
    assert (found[: len(says)] if swapped else found) == says


def test_lists_of_tables_are_compared_table_by_table(monkeypatch: pytest.MonkeyPatch) -> None:
    offer_boxes(monkeypatch)

    def told_of(old: str, new: str) -> list[str]:
        return [str(c) for c in differences(parse_recipe(BOXES, "a.toml"), parse_recipe(BOXES.replace(old, new), "b"))]

    assert told_of("start = 1.0", "start = 2.0") == ["view_generator.views.1.scale.start: 1.0 -> 2.0"]
    assert told_of("size = 4", "size = 4\nworkers = 3") == []
    assert told_of("size = 4", "size = 4\nlimit = true") == ["view_generator.views.1.limit: 1 -> true"]
    assert told_of("[[view_generator.losses]]", "[[view_generator.views]]\n[[view_generator.losses]]") == [
        "view_generator.views.2: unset -> { scale = 1.0, size = 8, limit = 1 }"
    ]
    (gone,) = told_of('[[view_generator.losses]]\nuse = "cosine"\n', "")
    assert gone.startswith('view_generator.losses.0: { use = "cosine", ')
    found = compare(
        parse_recipe(BOXES, "a"), parse_recipe(BOXES.replace("size = 4", "size = 4\nworkers = 2"), "b"), ("", "")
    )
    assert [str(change) for change in found.incidental] == ["view_generator.views.1.workers: 1 -> 2"]


OVERRIDES = st.lists(
    st.sampled_from(
        ["seed=1", "optimizer.lr=1", "optimizer.lr.end=0.01", "optimizer.use=lars", "optimizer.use=adam",
         "predictor=false", "optimizer.groups.loss.lr=0.1", "target_updater.use=none", "target_updater.tau=0.5",
         "loss.form=simsiam", "train.compile=true", "train.epochs=3", "train.log_every=9", "data_source.prints=2",
         "observers.knn.k=5", "observers.health.enabled=false", "name=other"]
    ),
    max_size=4,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(OVERRIDES, OVERRIDES)
def test_nothing_differs_exactly_where_the_hashes_are_equal(left: list[str], right: list[str]) -> None:
    try:
        a, b = recipe(*left), recipe(*right)
    except UserError:  # such as an option of a schedule that was replaced by a number
        assume(False)
    found = compare(a, b, ("a", "b"))
    assert (a.hash() == b.hash()) == (not found.slots) == (not differences(a, b))
    assert (a == b) == (not found.slots and not found.incidental)
    assert sorted([*found.equal, *(slot.slot for slot in found.slots)]) == sorted(a.computing().keys() | b.computing())
    back = compare(b, a, ("b", "a"))
    assert {(c.key, c.b, c.a) for c in found.incidental} == {(c.key, c.a, c.b) for c in back.incidental}
    assert sorted(str(Change(c.key, c.b, c.a)) for c in differences(a, b)) == sorted(map(str, differences(b, a)))


# ---------------------------------------------------------------- on a terminal


def test_a_swapped_part_shows_the_options_of_each_and_the_rest_what_differs() -> None:
    assert shown("optimizer.use=adam", "optimizer.lr=0.5", "projector.out_dim=4", "seed=2", "train.epochs=3") == [
        "seed: 0 -> 2",
        "projector: mlp",
        "    out_dim: 8 -> 4",
        "optimizer: sgd -> adam",
        '  - lr = { use = "warmup_cosine", peak = 0.1, warmup_steps = 5, start = 0.0, end = 0.0 }',
        "  - weight_decay = 0.0001",
        "  - momentum = 0.9",
        "  - nesterov = false",
        "  + lr = 0.5",
        "  + weight_decay = 0.0",
        "  + betas = [0.9, 0.999]",
        "  + eps = 1e-08",
        "    exclude_bias_and_norm = true",
        "train",
        "    epochs: 2 -> 3",
        "the same: data_source, view_generator, backbone, predictor, loss, target_updater",
    ]


def test_an_emptied_place_is_shown() -> None:
    assert shown("predictor=false")[:3] == ["predictor: mlp -> none", "  - layers = 2", "  - hidden_dim = 16"]


def test_what_changes_nothing_that_is_computed_is_listed_apart() -> None:
    assert shown("name=other", "train.log_every=9", "observers.knn.k=3", "observers.health.enabled=false") == [
        "the same in all that is computed",
        "different, but not in what is computed:",
        '    name: "tiny" -> "other"',
        "    train.log_every: 5 -> 9",
        "    observers.knn.k: 20 -> 3",
        "    observers.health.enabled: true -> false",
    ]
    assert shown() == ["the same in all that is computed"]
    Path("b.toml").write_text('name = "tiny"\nextends = "a.toml"' + 2 * '\n[[observers]]\nuse = "knn"')
    assert run("a.toml", "b.toml").output.splitlines()[5].startswith('    observers.knn_2: unset -> { use = "knn", ')


def test_both_names_and_hashes_are_at_the_head_and_colour_is_for_terminals() -> None:
    Path("b.toml").write_text(recipe("optimizer.lr=1", "name=b").to_toml())
    plain = run("a.toml", "b.toml").output
    assert plain.splitlines()[:3] == [
        f"- tiny ({recipe().hash()})  a.toml", f"+ b ({recipe('optimizer.lr=1').hash()})  b.toml", ""
    ]  # fmt: skip
    assert "\x1b" not in plain
    coloured = run("a.toml", "b.toml", color=True).output
    assert "\x1b[31m- tiny" in coloured
    assert "\x1b[32m1.0" in coloured
    assert max(map(len, plain.splitlines())) > 100, "nothing is folded, whatever the width"


# ---------------------------------------------------------------- JSON


def test_the_json_is_the_documented_classes() -> None:
    found = as_json("optimizer.use=adam", "optimizer.lr=0.5", "loss.form=simsiam", "train.log_every=9")
    assert list(found) == [f.name for f in dataclasses.fields(Difference)]
    assert found["a"] == {"source": "a.toml", "name": "tiny", "hash": recipe().hash()}
    assert list(found["b"]) == [f.name for f in dataclasses.fields(Side)]
    loss, optimizer = found["slots"]
    assert loss == {
        "slot": "loss", "a": "cosine", "b": "cosine",
        "changes": [{"key": "loss.form", "a": "byol", "b": "simsiam"}], "common": {},
    }  # fmt: skip
    assert list(loss) == [f.name for f in dataclasses.fields(Slot)]
    assert (optimizer["a"], optimizer["b"], optimizer["common"]) == ("sgd", "adam", {"exclude_bias_and_norm": True})
    assert optimizer["changes"][0] == {"key": "optimizer.use", "a": "sgd", "b": "adam"}
    assert {"key": "optimizer.momentum", "a": 0.9, "b": None} in optimizer["changes"]
    assert "target_updater" in found["equal"]
    assert found["incidental"] == [{"key": "train.log_every", "a": 5, "b": 9}]


# ---------------------------------------------------------------- what is compared


def lock(folder: str, *overrides: str) -> None:
    Path(folder).mkdir(parents=True)
    Path(folder, "recipe.lock.toml").write_text(recipe(*overrides).to_toml(), encoding="utf-8")


def test_recipes_and_runs_by_path_or_name() -> None:
    lock("runs/one", "seed=4")
    lock("two", "seed=4")
    assert "seed: 0 -> 4" in run("a.toml", "runs/one").output
    assert "the same in all that is computed" in run("runs/one", "two").output
    assert "the same in all that is computed" in run("runs/one", "runs/one/recipe.lock.toml").output
    lock("quickstart", "seed=4")
    assert "the same in all that is computed" in run("quickstart", "quickstart").output
    assert "the same in all" not in run("quickstart", "./quickstart").output, "a bare name is that of a shipped recipe"
    assert run("byol_cifar10", "simsiam_cifar10").exit_code == 0


@pytest.mark.parametrize(
    ("b", "says"),
    [
        ("gone.toml", "gone.toml: no such recipe file"),
        ("gone", "gone: no shipped recipe has this name"),
        ("empty/", "empty/: is a folder without a recipe.lock.toml; give the directory of a run, or a recipe"),
        ("empty", "empty: is a folder without a recipe.lock.toml; give the directory of a run, or a recipe"),
        ("wrong.toml", "wrong.toml:1: "),
        ("broken/", "broken/recipe.lock.toml:1: not valid TOML"),
    ],
)
def test_mistakes_end_with_code_2_and_a_line(b: str, says: str) -> None:
    Path("empty").mkdir()
    Path("wrong.toml").write_text("seeed = 1" + TINY)
    Path("broken").mkdir()
    Path("broken/recipe.lock.toml").write_text("a =\n")
    for arguments in (("a.toml", b), (b, "a.toml")):
        done = run(*arguments)
        assert done.exit_code == 2
        assert done.stdout == ""
        assert done.stderr.startswith(says)


def test_comparing_imports_no_torch() -> None:
    code = """
import sys
sys.argv = ["sslkit", "diff", "a.toml", "a.toml"]
try:
    from sslkit.cli import main
    main()
except SystemExit as end:
    assert not end.code
heavy = {"torch", "timm", "numpy", "sklearn", "pyarrow"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
