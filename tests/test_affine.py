"""Small affine changes and light: the geometry is torchvision's, and each option does what it says and no more."""

from __future__ import annotations

import contextlib
import math
import subprocess
import sys

import pytest
import torch
import torchvision.transforms.v2.functional as V
from conftest import generator, run_info
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from torchvision.transforms import InterpolationMode

from sslkit.api import RunInfo, ViewSpec
from sslkit.errors import UserError
from sslkit_affine import Affine

STILL = {"rotation": 0.0, "scale": 0.0, "shear": 0.0, "shift": 0.0}
DARK = {"light": 0.0, "grayscale": 0.0, "contrast": 0.0, "offset": 0.0}


def pictures(n: int, side: int = 16, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (n, channels, side, side), dtype=torch.uint8, generator=generator(seed))


def views_of(options: Affine, images: Tensor, info: RunInfo, seed: int = 0) -> tuple[list[Tensor], dict[str, Tensor]]:
    maker = options.build(info)
    p = maker.draw(len(images), generator(seed))
    return maker.appear(maker.crop(images, p), p), p


def test_geometry_equals_torchvision() -> None:
    side, n = 40, 30
    images = pictures(n, side)
    images[:, :, :12] = images[:, :, -12:] = 0  # torchvision goes on with zeros beyond the edge, ours with the edge
    images[:, :, :, :12] = images[:, :, :, -12:] = 0
    options = Affine(rotation=40.0, scale=0.3, shear=0.4, shift=0.1, appearance=False)
    views, p = views_of(options, images, run_info(side))
    for v in range(2):
        for i in range(n):
            expected = V.affine(
                images[i].float() / 255,
                angle=p["rotation"][i, v].item(),
                translate=(p["shift"][i, v] * side).tolist(),
                scale=p["scale"][i, v].item(),
                shear=[math.degrees(math.atan(p["shear"][i, v].item())), 0.0],
                interpolation=InterpolationMode.BILINEAR,
            )
            assert (views[v][i] - expected).abs().max() < 1e-4


def test_appearance_equals_its_formula() -> None:
    side, n = 9, 40
    images = pictures(n, side)
    views, p = views_of(Affine(**STILL), images, run_info(side))
    x = images.double() / 255
    centres = torch.tensor([(2 * i + 1) / side - 1 for i in range(side)], dtype=torch.float64)
    for v in range(2):
        for i in range(n):
            angle = math.radians(p["light_angle"][i, v].item())
            slope = math.cos(angle) * centres + math.sin(angle) * centres[:, None]
            y = x[i] * (1 + p["light"][i, v].double() * slope)
            if p["grayscale"][i, v]:
                y = (y * p["gray_weights"][i, v, :, None, None].double()).sum(0, keepdim=True).expand(3, -1, -1)
            y = y * p["contrast"][i, v, :, None, None].double() + p["offset"][i, v, :, None, None].double()
            assert (views[v][i].double() - y).abs().max() < 1e-5


@settings(max_examples=25, deadline=None)
@given(
    rotation=st.floats(0, 180),
    scale=st.floats(0, 0.9),
    shear=st.floats(0, 3),
    shift=st.floats(0, 1),
    side=st.integers(1, 20),
    channels=st.integers(1, 4),
    seed=st.integers(0, 10**6),
)
def test_geometry_alone_leaves_colors(
    rotation: float, scale: float, shear: float, shift: float, side: int, channels: int, seed: int
) -> None:
    options = Affine(rotation=rotation, scale=scale, shear=shear, shift=shift, appearance=False)
    images = pictures(4, side, channels, seed)
    constant = images[:, :, :1, :1].expand_as(images)
    for view in views_of(options, constant, run_info(side, channels), seed)[0]:
        assert (view - constant / 255).abs().max() < 1e-5
    for view in views_of(options, images, run_info(side, channels), seed)[0]:
        low, high = (images / 255).amin((2, 3), keepdim=True), (images / 255).amax((2, 3), keepdim=True)
        assert ((view >= low - 1e-5) & (view <= high + 1e-5)).all()


def test_appearance_off_applies_none_of_its_options() -> None:
    images = pictures(8)
    geometry = Affine(**DARK)
    loud = Affine(light=0.9, grayscale=1.0, contrast=0.9, offset=0.9, appearance=False)
    for a, b in zip(views_of(geometry, images, run_info(16))[0], views_of(loud, images, run_info(16))[0], strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("name", ["rotation", "scale", "shear", "shift", "light", "grayscale", "contrast", "offset"])
def test_every_option_acts_alone(name: str) -> None:
    images = pictures(12)
    still = Affine(**STILL, **DARK)
    for view in views_of(still, images, run_info(16))[0]:
        assert torch.allclose(view, images / 255, atol=1e-5)
    one = Affine(**{**STILL, **DARK, name: 0.5})
    for view in views_of(one, images, run_info(16))[0]:
        changed = (view - images / 255).abs().amax((1, 2, 3)) > 1e-4
        assert changed.float().mean() > 0.15


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 6), side=st.integers(1, 20), channels=st.integers(1, 4), seed=st.integers(0, 10**6))
def test_views_of_any_size_are_finite_and_geometry_stays_within_0_and_1(
    n: int, side: int, channels: int, seed: int
) -> None:
    options = Affine(light=0.99, contrast=0.99, offset=1.0)
    for view in views_of(options, pictures(n, side, channels, seed), run_info(side, channels), seed)[0]:
        assert view.shape == (n, channels, side, side)
        assert view.dtype == torch.float32
        assert view.isfinite().all()
    for view in views_of(options.model_copy(update={"appearance": False}), pictures(n, side, channels, seed),
                         run_info(side, channels), seed)[0]:  # fmt: skip
        assert 0 <= view.amin() <= view.amax() <= 1


def test_ranges_and_probabilities() -> None:
    n = 4000
    p = Affine().build(run_info(16)).draw(n, generator())
    for name, low, high in [
        ("rotation", -10, 10),
        ("scale", 0.9, 1.1),
        ("shear", -0.1, 0.1),
        ("shift", -0.05, 0.05),
        ("light", -0.5, 0.5),
        ("light_angle", 0, 360),
        ("contrast", 0.6, 1.4),
        ("offset", -0.15, 0.15),
    ]:
        drawn, width = p[name].double(), high - low
        assert low - 1e-6 <= drawn.min() < low + 0.01 * width
        assert high - 0.01 * width < drawn.max() <= high + 1e-6
        assert abs(drawn.mean() - (low + high) / 2) < 4 * width / math.sqrt(12 * 2 * n)
    assert abs(p["grayscale"].double().mean() - 0.3) < 4 * math.sqrt(0.21 / (2 * n))
    assert torch.allclose(p["gray_weights"].sum(-1), torch.ones(n, 2))
    for name, values in p.items():
        assert values.shape[:2] == (n, 2), name
        assert not torch.equal(values[:, 0], values[:, 1]), name
        assert len(values[:, 0].unique(dim=0)) > 1, name


def test_seeded_sliced_and_pure() -> None:
    maker = Affine().build(run_info(16))
    images = pictures(11)
    p, again, other = (maker.draw(11, generator(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(p[name], again[name]) for name in p)
    crops = maker.crop(images, p)
    kept = [c.clone() for c in crops]
    views = maker.appear(crops, p)
    assert all(map(torch.equal, crops, kept))
    assert not torch.equal(views[0], views[1])
    assert not torch.equal(views[0], maker.appear(maker.crop(images, other), other)[0])
    part = {name: values[4:9] for name, values in p.items()}
    for piece, whole in zip(maker.appear(maker.crop(images[4:9], part), part), views, strict=True):
        assert torch.allclose(piece, whole[4:9], atol=1e-6)


def test_nothing_depends_on_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device there is no data to look at."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it does not know that device
    maker = Affine().build(run_info(16))
    p = {name: values.to("meta") for name, values in maker.draw(6, generator()).items()}
    for view in maker.appear(maker.crop(pictures(6).to("meta"), p), p):
        assert view.shape == (6, 3, 16, 16)
        assert view.device.type == "meta"


def test_autocast_changes_nothing() -> None:
    images = pictures(8)
    views = views_of(Affine(), images, run_info(16))[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = views_of(Affine(), images, run_info(16))[0]
    assert all(map(torch.equal, views, half))


@pytest.mark.filterwarnings("ignore")  # of torch's own, while it compiles
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_equals_eager_and_compiles_once(backend: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    maker = Affine().build(run_info(16))
    counter = CompileCounterWithBackend(backend)

    @torch.compile(fullgraph=True, dynamic=False, backend=counter)
    def compiled(images: Tensor, p: dict[str, Tensor]) -> list[Tensor]:
        return maker.appear(maker.crop(images, p), p)

    for seed in range(2):
        images, p = pictures(6, seed=seed), maker.draw(6, generator(seed))
        eager = maker.appear(maker.crop(images, p), p)
        for view, expected in zip(compiled(images, p), eager, strict=True):
            assert (view - expected).abs().max() < 1e-5
    assert counter.frame_count == 1


def test_normalised_with_the_training_images_statistics_or_given_ones() -> None:
    info = run_info(16, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3))
    images = pictures(3)
    mean, std = torch.tensor(info.mean).view(3, 1, 1), torch.tensor(info.std).view(3, 1, 1)
    assert torch.allclose(Affine().build(info).clean(images), (images / 255 - mean) / std, atol=1e-5)
    own = Affine(mean=(0.1, 0.1, 0.1), std=(0.5, 0.5, 0.5), **STILL, **DARK)
    assert torch.allclose(own.build(info).clean(images), (images / 255 - 0.1) / 0.5, atol=1e-5)
    for view in views_of(own, images, info)[0]:
        assert torch.allclose(view, (images / 255 - 0.1) / 0.5, atol=1e-4)


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"rotation": 200.0}, "less than or equal to 180"),
        ({"scale": 1.0}, "less than 1"),
        ({"light": -0.1}, "greater than or equal to 0"),
        ({"grayscale": 1.5}, "less than or equal to 1"),
        ({"std": (0.0,)}, "greater than 0"),
        ({"size": 3}, "Extra inputs"),
    ],
)
def test_wrong_options_are_refused(wrong: dict, problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        Affine(**wrong)


@pytest.mark.parametrize(
    ("options", "info", "problem"),
    [
        ({"mean": (0.5,)}, run_info(16), "view_generator.affine.mean: 1 values for images of 3 channels"),
        ({"std": (0.5,) * 4}, run_info(16), "view_generator.affine.std: 4 values"),
        ({}, run_info(16, std=(0.1, 0.0, 0.1)), "set std"),
    ],
)
def test_options_that_do_not_fit_the_run_are_refused(options: dict, info: RunInfo, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        Affine(**options).build(info)


def test_specs_options_and_import() -> None:
    assert Affine().build(run_info(16)).specs == (ViewSpec(16), ViewSpec(16))
    table = Affine(rotation=3.0).model_dump(mode="json")
    assert table.pop("use") == "affine"
    assert Affine.model_validate(table, strict=False) == Affine(rotation=3.0)
    assert all(field.description for field in Affine.model_fields.values())
    code = "import sys, sslkit_affine; assert not {'torch', 'numpy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
