"""What `import sslkit` offers to scripts and notebooks: names, types, and what it costs."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import ROOT
from pydantic import ValidationError

import sslkit
from sslkit.recipe import DEFAULT_OBSERVERS, parse_recipe
from sslkit_affine import Affine
from sslkit_contrastive import NTXent
from sslkit_convnet import ConvNet
from sslkit_cosine import Cosine
from sslkit_datasets import Digits
from sslkit_ema import EMA, NoTarget
from sslkit_mlp import MLP
from sslkit_optimizers import SGD
from sslkit_watch import KNN, Health


def mine(**changes: object) -> sslkit.Recipe:
    slots: dict[str, object] = {
        "name": "mine",
        "data_source": Digits(prints=1, test_prints=1),
        "view_generator": Affine(),
        "backbone": ConvNet(widths=(8, 8), strides=(2, 2), pool=1),
        "projector": MLP(hidden_dim=16, out_dim=8),
        "predictor": MLP(hidden_dim=16, out_dim=8),
        "loss": Cosine(),
        "target_updater": EMA(tau=0.9),
        "optimizer": SGD(lr=0.1),
        "train": sslkit.Train(epochs=2, batch_size=128),
    }
    return sslkit.Recipe(**(slots | changes))  # type: ignore[arg-type]


def test_everything_that_is_offered_is_there() -> None:
    for name in sslkit.__all__:
        assert getattr(sslkit, name) is not None
        assert name in dir(sslkit)
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        sslkit.trian  # type: ignore[attr-defined]  # noqa: B018


def test_what_is_offered_lazily_is_what_type_checkers_see() -> None:
    assert {n for names in sslkit._HOMES.values() for n in names} == set(sslkit.__all__) - {"__version__"}
    source = (ROOT / "sslkit" / "__init__.py").read_text(encoding="utf-8")
    for module, names in sslkit._HOMES.items():
        assert f"    from sslkit.{module} import {', '.join(names)}\n" in source


def test_importing_costs_nothing_until_something_is_used() -> None:
    code = """
    import sys
    import sslkit
    assert not {"torch", "pydantic"} & set(sys.modules)
    import sslkit.trainer
    assert callable(sslkit.train), "a module of this name would stand in the place of the function"
    """
    light = """
    import sys
    import sslkit
    recipe = sslkit.load_recipe("quickstart")
    sslkit.Recipe, sslkit.Train, sslkit.examine, sslkit.Result, sslkit.UserError
    assert recipe.hash() and "torch" not in sys.modules
    """
    for text in (code, light):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(text)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- recipes in Python


def test_a_recipe_in_python_is_the_one_in_toml() -> None:
    recipe = mine()
    assert parse_recipe(recipe.to_toml(), "mine.toml") == recipe
    assert [type(o).__name__ for o in recipe.observers] == ["Health", "KNN", "Probe", "TensorBoard", "Report"]


def test_observers_that_are_given_take_the_place_of_the_default_ones() -> None:
    own = KNN(k=20, every_epochs=2), Health(enabled=False)
    recipe = mine(observers=own)
    assert recipe.observers[:2] == own
    assert len(recipe.observers) == len(DEFAULT_OBSERVERS)
    with pytest.raises(ValidationError, match="observers"):
        mine(observers=[KNN()])


def test_replacing_parts_is_validated_and_leaves_the_original_alone() -> None:
    recipe = mine()
    other = recipe.replace(name="other", loss=NTXent(), predictor=None, target_updater=NoTarget())
    assert (type(other.loss), other.predictor, other.backbone) == (NTXent, None, recipe.backbone)
    assert type(recipe.loss) is Cosine
    with pytest.raises(ValidationError, match="los"):
        recipe.replace(los=NTXent())
    with pytest.raises(ValidationError, match="loss"):
        recipe.replace(loss=SGD(lr=0.1))


# ---------------------------------------------------------------- types

RIGHT = """
import sslkit
from sslkit_affine import Affine
from sslkit_convnet import ConvNet
from sslkit_cosine import Cosine
from sslkit_datasets import Digits
from sslkit_ema import EMA
from sslkit_mlp import MLP
from sslkit_optimizers import SGD
from sslkit_schedules import Cosine as CosineSchedule
from sslkit_watch import KNN

recipe = sslkit.Recipe(
    name="typed",
    data_source=Digits(prints=1),
    view_generator=Affine(contrast=0.6),
    backbone=ConvNet(widths=(8, 8), strides=(2, 2)),
    projector=MLP(hidden_dim=16, out_dim=8),
    predictor=MLP(hidden_dim=16, out_dim=8),
    loss=Cosine(),
    target_updater=EMA(tau=CosineSchedule(start=0.9, end=1.0)),
    optimizer=SGD(lr=0.1),
    train=sslkit.Train(epochs=2, batch_size=128, precision="fp32"),
    observers=(KNN(k=20),),
)
result: sslkit.Result = sslkit.train(recipe, steps=5, device="cpu")
steps, values = result.metrics.curve("knn_top1")
total: float = sum(values)
encoder: sslkit.ImageEncoder = sslkit.load_encoder(result.directory, branch="target", checkpoint="best")
width: int = encoder.feature_dim
verdict: str = sslkit.examine(result.directory).verdict
again: sslkit.Recipe = sslkit.load_recipe("quickstart", ["seed=1"]).replace(name="again")
"""
WRONG = {
    "loss=Cosine()": "loss=SGD(lr=0.1)",
    "epochs=2, ": 'epochs="2", ',
    'precision="fp32"': 'precision="fp23"',
    'name="typed",': 'nam="typed",',
    "Affine(contrast=0.6)": 'Affine(contrast="high")',
    'device="cpu"': 'device="gpu"',
    'branch="target"': 'branch="teacher"',
    "sslkit.train(recipe, steps=5": "sslkit.train(5",
    "encoder.feature_dim": "result.verdict",
    "observers=(KNN(k=20),)": "observers=(EMA(),)",
}


@pytest.mark.slow
def test_a_type_checker_takes_what_is_right_and_refuses_what_is_wrong(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "right.py").write_text(RIGHT)
    for number, (right, wrong) in enumerate(WRONG.items()):
        assert RIGHT.count(right) == 1
        (tmp_path / f"wrong_{number}.py").write_text(RIGHT.replace(right, wrong))
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    refused = {Path(line.partition(":")[0]).name for line in done.stdout.splitlines() if ": error: " in line}
    assert refused == {f"wrong_{number}.py" for number in range(len(WRONG))}, done.stdout + done.stderr
