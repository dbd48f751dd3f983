"""A few steps of a small recipe around a component, by the engine itself."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from sslkit import randomness, registry
from sslkit.api import Component, DataInfo, DataSource, ImageSet
from sslkit.batch import ViewSpec
from sslkit.build import Parts, build
from sslkit.distributed import World
from sslkit.errors import UserError
from sslkit.recipe import Recipe, Train
from sslkit.run_directory import RunDirectory
from sslkit.testing.bench import BATCH, CLASSES, DIM, EPOCHS, IMAGES, Bench, pictures, view_sets
from sslkit.testing.outcome import NotApplicable
from sslkit.trainer import Trainer

CPU = torch.device("cpu")
STEPS = 3
"""One epoch of the small run."""


class _Blobs(DataSource):
    """Random blobs with labels that mean nothing, for tiny trainings."""

    image_size: int
    channels: int

    def build(self, info: DataInfo) -> ImageSet:
        size: Any = SimpleNamespace(image_size=self.image_size, channels=self.channels)
        sets = [_Images(pictures(IMAGES, size, seed), torch.arange(IMAGES) % CLASSES) for seed in (0, 1)]
        made: Any = SimpleNamespace(train=sets[0], test=sets[1], class_names=tuple("abcd"), fingerprint="blobs", bad=())
        return made  # type: ignore[no-any-return]


class _Images:
    def __init__(self, tensor: Tensor, labels: Tensor) -> None:
        self.tensor, self.labels = tensor, labels

    def __len__(self) -> int:
        return len(self.tensor)

    def read(self, indices: Tensor) -> Tensor:
        return self.tensor[indices]


class _Small(Recipe):
    """A recipe whose data source no package offers."""

    def hash(self) -> str:
        return "small"

    def provenance(self) -> list[dict[str, str]]:
        return []

    def computing(self) -> dict[str, Any]:
        return dict(json.loads(self.model_dump_json(exclude={"data_source"}, exclude_none=True)))

    def to_toml(self) -> str:
        return 'name = "small"\n'


def offered(kind: str, name: str, **options: Any) -> Any:
    """A component that comes with sslkit, through the same door as anybody's."""
    return registry.load(kind, name)(**options)


def small_recipe(bench: Bench, *, alike: bool = False, **train: Any) -> Recipe:
    """BYOL on a tiny network, or what comes nearest with the component on the bench in its place.

    Args:
        bench: with the component.
        alike: with networks that treat each image alone.
        train: options of `[train]`.
    """
    own, run = bench.component, bench.run
    assert bench.name
    parts: dict[str, Any] = {
        "view_generator": _views(view_sets(run.image_size)[0]),
        "backbone": offered(
            "backbone", "convnet", widths=(8, 8), strides=(2, 2), pool=1, norm="group" if alike else "batch"
        ),
        "projector": _head(alike),
        "predictor": _head(alike),
        "loss": offered("loss", "cosine"),
        "target_updater": offered("target_updater", "ema", tau=0.9),
        "optimizer": offered("optimizer", "sgd", lr=0.05),
        "observers": (),
    }
    if own.kind == "observer":
        parts["observers"] = (own,)
    elif own.kind == "head":
        features = int(Bench(parts["backbone"], run).module().feature_dim)  # type: ignore[arg-type]
        width = int(bench.module(features).out_dim)  # type: ignore[arg-type]
        parts |= {"projector": own, "predictor": offered("head", "mlp", hidden_dim=16, out_dim=width)}
    else:
        parts[own.kind] = own
    if own.kind == "loss":
        parts |= _around_loss(bench, alike)
    elif own.kind == "target_updater" and getattr(bench.module(), "source", None) == "none":
        parts |= {"loss": offered("loss", "nt_xent"), "predictor": None}
    return _Small(
        name="small",
        data_source=_Blobs(image_size=run.image_size, channels=run.channels),
        train=Train(**{"epochs": EPOCHS, "batch_size": BATCH, "log_every": 1, "compile": False} | train),
        **parts,
    )


def _views(specs: tuple[ViewSpec, ...]) -> Component:
    table = [{"size": s.size, "kind": s.kind, "count": 1} for s in specs]
    generator: Any = registry.load("view_generator", "multi_crop")
    # Off for any number of channels: these three know only grey and RGB.
    plain = {"saturation": 0.0, "hue": 0.0, "grayscale": 0.0, "blur": 0.0}
    made: Component = generator.model_validate({"views": tuple(table), **plain})
    return made


def _head(alike: bool) -> Component:
    made: Component = offered("head", "mlp", hidden_dim=16, out_dim=DIM, hidden_norm="layer" if alike else "batch")
    return made


def _around_loss(bench: Bench, alike: bool) -> dict[str, Any]:
    needs = bench.needs(bench.module())
    return {
        "view_generator": _views(bench.loss_run.views),
        "predictor": _head(alike) if needs.predictions else None,
        "target_updater": offered("target_updater", "ema", tau=0.9)
        if needs.targets
        else offered("target_updater", "none"),
    }


def small_parts(bench: Bench, recipe: Recipe | None = None, processes: int = 1) -> Parts:
    """The live objects of the small recipe.

    Raises:
        NotApplicable: the component does not go with the recipe's other parts.
    """
    with randomness.seeded(0, "small"):
        try:
            return build(recipe or small_recipe(bench), CPU, lambda text: None, processes=processes)
        except UserError as error:
            raise NotApplicable(f"does not go with the small recipe that is trained: {error}") from None


@contextmanager
def trainer(
    bench: Bench, folder: Path, *, observed: bool = True, world: World | None = None, alike: bool = False, **train: Any
) -> Iterator[Trainer]:
    """The engine at step 0 of the small recipe, or of the same without its observers; in float64 if `alike`."""
    recipe = small_recipe(bench, alike=alike, **train)
    world = world or World()
    if not observed:
        recipe = recipe.model_copy(update={"observers": ()})
    # What a run's directory holds before the first step; observers read it.
    files = RunDirectory(folder)
    try:
        files.write("recipe.lock.toml", recipe.to_toml())
        files.open_metrics(0)
        with torch.random.fork_rng(devices=[]):
            parts = small_parts(bench, recipe, world.size)
            if alike:
                parts.model.double()
                parts.loss.double()
            made = Trainer(parts, files, say=lambda text: None, world=world)
            if alike:
                views = made.make_views
                made.make_views = lambda *given: [v.double() for v in views(*given)]  # type: ignore[method-assign]
            yield made
    finally:
        files.close()


@contextmanager
def folder() -> Iterator[Path]:
    """A directory for a run, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="sslkit-check-") as name:
        yield Path(name)


def steps(run: Trainer, n: int) -> None:
    """Take n steps."""
    for draw in run.feed.steps(run.step, run.step + n):
        run.train_step(draw)


def state(run: Trainer) -> dict[str, Tensor]:
    """Every tensor that the next step depends on, by the name of its part."""
    parts = {
        "model": run.model.state_dict(),
        "loss": run.loss.state_dict(),
        "target_updater": run.parts.updater.state_dict(),
        "optimizer": run.optimizer.state_dict()["state"],
    }
    return {name: tensor.detach().clone() for name, tensor in flat(parts)}


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors and numbers anywhere in a state dict, with their paths."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, bool | int | float):
        yield name, torch.tensor(float(value))
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from flat(inner, f"{name}.{number}")
