from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Annotated

import pytest
from conftest import TINY
from pydantic import BaseModel, ConfigDict, SerializeAsAny

from sslkit import registry
from sslkit.api import Incidental, Loss, Scheduled, ViewGenerator, slot
from sslkit.errors import UserError
from sslkit.recipe import Recipe, parse_recipe, read_recipe
from sslkit.sources import locate, shipped


def errors(text: str, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        parse_recipe(text, "r.toml", overrides)
    assert caught.value.exit_code == 2
    return list(caught.value.lines)


def line_of(text: str) -> int:
    return TINY[: TINY.index(text)].count("\n") + 1


def test_written_and_read_again_is_the_same_recipe() -> None:
    recipe = parse_recipe(TINY, "r.toml")
    again = parse_recipe(recipe.to_toml(), "lock.toml")
    assert again == recipe
    assert again.hash() == recipe.hash()
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_default_observers_are_on_and_can_be_switched_off() -> None:
    kinds = [type(o).__name__ for o in parse_recipe(TINY, "r.toml").observers]
    assert sorted(kinds) == ["Health", "KNN", "Probe", "Report", "TensorBoard"]
    off = parse_recipe(TINY, "r.toml", ["observers.health.enabled=false"])
    assert [o.enabled for o in off.observers if type(o).__name__ == "Health"] == [False]


def test_an_unknown_option_names_the_line_and_the_nearest_name() -> None:
    text = TINY.replace("hidden_dim = 16", "hiden_dim = 16", 1)
    assert errors(text) == [
        f"r.toml:{line_of('hidden_dim')}: projector.hiden_dim: unknown option; did you mean 'hidden_dim'?"
    ]


def test_all_errors_come_at_once_in_the_order_of_the_file() -> None:
    text = TINY.replace('use = "cosine"\n\n[target', 'use = "cosin"\n\n[target').replace("epochs = 2", 'epochs = "2"')
    text = text.replace("peak = 0.1", "peek = 0.1")
    found = errors(text)
    assert len(found) == 4, found
    assert "no loss is named 'cosin'; did you mean 'cosine'?" in found[0]
    assert "optimizer.lr.peak: this option is required and missing" in "\n".join(found)
    assert "optimizer.lr.peek: unknown option; did you mean 'peak'?" in "\n".join(found)
    assert "train.epochs: should be a valid integer, not '2'" in found[3]
    numbers = [int(line.split(":")[1]) for line in found]
    assert numbers == sorted(numbers)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("[loss]\nuse = \"cosine\"\n", "", "r.toml:1: loss: this table is required and missing"),
        ("[loss]\nuse = \"cosine\"\n", "[loss]\n", "loss: needs a key 'use' that names a loss: "),
        ("batch_size = 128", "batch_size = 128.5", "train.batch_size: should be a valid integer, not 128.5"),
        ("batch_size = 128", "batch_size = 1", "train.batch_size: should be greater than or equal to 2, not 1"),
        ("epochs = 2", "epochs = true", "train.epochs: should be a valid integer, not True"),
        ("epochs = 2", "epochs = 2\nprecision = \"bf61\"",
         "precision: should be 'bf16' or 'fp32', not 'bf61'; did you mean 'bf16'?"),
        ("epochs = 2", "epochs = 2\nepoch = 3", "train.epoch: unknown option; did you mean 'epochs'?"),
        ("epochs = 2", "epochs = 2\nuse = 3", "train.use: unknown option; known here: epochs, batch_size"),
        ("weight_decay = 1e-4", "weight_decay = nan", "optimizer.weight_decay: should be a finite number, not nan"),
        ("weight_decay = 1e-4", "weight_decay = \"x\"", "optimizer.weight_decay: should be a number or a schedule"),
        ("name = \"tiny\"", "name = \"../x\"", "name: should be letters, digits, dots, dashes"),
        ("epochs = 2", "epochs = 2\nepochs = 3", "not valid TOML: Cannot overwrite a value"),
        ("[train]", "[train", "not valid TOML"),
        ("use = \"knn\"", "use = \"knn\"\nkk = 3", "observers.0.kk: unknown option"),
        ("weight_decay = 1e-4", "[optimizer.groups.predictor]\nlrr = 1",
         "optimizer.groups.predictor.lrr: unknown option; did you mean 'lr'?"),
        ("weight_decay = 1e-4", "[optimizer.groups.head]\nlr = 1", "optimizer.groups.head"),
        ("widths = [8, 8]", "widths = 8", "backbone.widths: should be a list, not 8"),
        ('use = "affine"', 'use = "two_crops"\nratio = [1.0]', "ratio: should have more elements, not [1.0]"),
        ('use = "affine"', 'use = "multi_crop"\nviews = [3]', "view_generator.views.0: should be a table, not 3"),
    ],
)  # fmt: skip
def test_each_mistake_is_one_line(old: str, new: str, says: str) -> None:
    found = errors(TINY.replace(old, new, 1))
    assert len(found) == 1, found
    assert says in found[0]
    assert found[0].startswith("r.toml:")


class Box(BaseModel):
    """A table in a list of them."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    scale: Scheduled = 1.0
    size: int = 8
    limit: int | bool = 1
    workers: Annotated[int, Incidental] = 1


class Boxes(ViewGenerator):
    """A component with a list of tables and a list of components."""

    views: tuple[Box, ...] = ()
    losses: tuple[Annotated[SerializeAsAny[Loss], slot("loss")], ...] = ()


def offer_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `Boxes` known as `view_generator.boxes`."""
    target = f"{__name__}:Boxes"
    entry = EntryPoint("view_generator.boxes", target, registry.GROUP)
    everything = (*registry.providers(), registry.Provider("view_generator", "boxes", target, "tests", "1", entry))
    monkeypatch.setattr(registry, "providers", lambda: everything)


BOXES = TINY.replace(
    'use = "affine"',
    """use = "boxes"
[[view_generator.views]]
scale = 0.5
[[view_generator.views]]
scale = { use = "cosine", start = 1.0, end = 0.0 }
size = 4
[[view_generator.losses]]
use = "cosine"
""",
)


@pytest.mark.parametrize(
    ("old", "new", "at", "says"),
    [
        ("scale = 0.5", "scael = 0.5", "scael", "views.0.scael: unknown option; did you mean 'scale'?"),
        ("size = 4", "szie = 4", "szie", "views.1.szie: unknown option; did you mean 'size'?"),
        ("size = 4", 'size = "4"', "size", "views.1.size: should be a valid integer, not '4'"),
        ("size = 4", "use = 4", "use = 4", "views.1.use: unknown option; known here: scale, size, limit, workers"),
        ("start = 1.0", "strat = 1.0, start = 1.0", "scale = {",
         "views.1.scale.strat: unknown option; did you mean 'start'?"),
        ("start = 1.0, end = 0.0", "start = 1.0", "scale = {",
         "views.1.scale.end: this option is required and missing"),
        ('[[view_generator.losses]]', '[[view_generator.losses]]\nfrom = "byol"', "from",
         "losses.0.from: unknown option; did you mean 'form'?"),
        ('[[view_generator.losses]]\nuse = "cosine"', '[[view_generator.losses]]\nuse = "cosin"',
         "[[view_generator.losses]]", "losses.0: no loss is named 'cosin'; did you mean 'cosine'?"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_list_of_tables_inside_a_component_has_its_line(
    old: str, new: str, at: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer_boxes(monkeypatch)
    assert BOXES.count(old) == 1
    (found,) = errors(BOXES.replace(old, new))
    place, _, text = found.partition(": ")
    assert text.startswith(f"view_generator.{says}")
    assert BOXES.replace(old, new).splitlines()[int(place.removeprefix("r.toml:")) - 1].startswith(at)


def test_options_that_compute_nothing_are_left_out_of_the_hash_inside_lists_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    offer_boxes(monkeypatch)
    hashes = [
        parse_recipe(BOXES.replace("size = 4", f"size = 4\n{more}"), "r.toml").hash() for more in ("", "workers = 2")
    ]
    assert hashes[0] == hashes[1]
    assert parse_recipe(BOXES.replace("size = 4", "size = 5"), "r.toml").hash() != hashes[0]


def test_set_is_typed_and_validated_like_the_file() -> None:
    recipe = parse_recipe(TINY, "r.toml", ["train.batch_size=64", "optimizer.lr=0.5", "name=other"])
    assert (recipe.train.batch_size, recipe.optimizer.lr, recipe.name) == (64, 0.5, "other")
    assert errors(TINY, "train.batch_sze=64") == [
        "--set train.batch_sze=64: train.batch_sze: unknown option; did you mean 'batch_size'?"
    ]
    for spelt, value in ((".03", 0.03), ("3.", 3.0), (".5e-1", 0.05), ("3e-2", 0.03)):
        assert parse_recipe(TINY, "r.toml", [f"optimizer.lr={spelt}"]).optimizer.lr == value
    assert parse_recipe(TINY, "r.toml", ["name=v.03"]).name == "v.03"
    assert "should be a valid integer" in errors(TINY, "train.batch_size=many")[0]
    assert "should read key=value" in errors(TINY, "train.batch_size")[0]


def test_a_changed_use_resets_its_table_whatever_the_order() -> None:
    recipe = parse_recipe(TINY, "r.toml", ["backbone.pool=2", "projector.use=identity", "backbone.use=convnet"])
    assert recipe.projector.model_dump() == {"use": "identity"}
    assert recipe.backbone.model_dump()["pool"] == 2
    assert recipe.backbone.model_dump()["widths"] == (8, 8), "the same `use` resets nothing"
    changed = parse_recipe(TINY, "r.toml", ["optimizer.lr.peak=2", "optimizer.use=adam", "optimizer.lr=0.1"])
    assert changed.optimizer.model_dump()["lr"] == 0.1


def test_observers_are_set_by_name() -> None:
    recipe = parse_recipe(TINY, "r.toml", ["observers.knn.k=7"])
    assert [o.model_dump()["k"] for o in recipe.observers if type(o).__name__ == "KNN"] == [7]


def test_the_hash_follows_what_is_computed_and_nothing_else() -> None:
    base = parse_recipe(TINY, "r.toml")
    for same in ("name=x", "train.log_every=7", "train.checkpoint_every=9", "observers.knn.k=3"):
        assert parse_recipe(TINY, "r.toml", [same]).hash() == base.hash(), same
    for other in ("seed=1", "train.batch_size=64", "train.precision=bf16", "train.compile=true", "optimizer.lr=1"):
        assert parse_recipe(TINY, "r.toml", [other]).hash() != base.hash(), other


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"')
    with pytest.raises(UserError, match="is not UTF-8"):
        read_recipe(str(tmp_path / "latin.toml"))
    with pytest.raises(UserError, match="no such recipe file"):
        read_recipe(str(tmp_path / "nothing.toml"))
    with pytest.raises(UserError, match="did you mean 'quickstart'"):
        read_recipe("quikstart")
    (tmp_path / "deep.toml").write_text("a = " + "[" * 5000 + "]" * 5000)
    with pytest.raises(UserError):
        read_recipe(str(tmp_path / "deep.toml"))


def test_shipped_recipes_are_found_by_name() -> None:
    assert locate("quickstart") == shipped()["quickstart"]


def test_provenance_names_the_package_of_every_part() -> None:
    found = parse_recipe(TINY, "r.toml").provenance()
    assert {"component": "loss.cosine", "target": "sslkit_cosine:Cosine"}.items() <= found[
        [f["component"] for f in found].index("loss.cosine")
    ].items()
    assert {"schedule.cosine", "schedule.warmup_cosine", "head.mlp"} <= {f["component"] for f in found}
