"""Any number of views in groups: each group's pictures are `two_crops`' own, whatever the other groups are."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import generator, run_info
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from sslkit.api import RunInfo, ViewSpec
from sslkit.errors import UserError
from sslkit.recipe import Recipe, parse_recipe
from sslkit_crops import MultiCrop, TwoCrops, ViewGroup, ViewOptions, color
from sslkit_crops.appearance import Appearance
from sslkit_crops.crops import CropsMaker

SIDE = 24
GLOBALS = ViewGroup(count=2, scale=(0.4, 1.0), solarize=0.4)
LOCALS = ViewGroup(count=3, kind="local", size=12, scale=(0.05, 0.4), hue=0.4, flip=0.0)
WEAK = ViewGroup(jitter=0.0, grayscale=0.0, blur=0.0)
LARGE = ViewGroup(size=40, jitter=0.0, blur=1.0, blur_kernel=7, blur_sigma=(0.5, 0.6), solarize_threshold=0.2)
MIXED = (GLOBALS, LOCALS, WEAK, LARGE)


def maker_of(*groups: ViewGroup, run: RunInfo | None = None, **options: Any) -> CropsMaker:
    maker = MultiCrop(views=groups, **options).build(run or run_info(SIDE))
    assert isinstance(maker, CropsMaker)
    return maker


def pictures(n: int, side: int = SIDE, channels: int = 3, seed: int = 0) -> Tensor:
    """Noise on slopes: uint8 `[n, C, side, side]`."""
    g = generator(seed)
    slope = torch.linspace(0, 1, side) * torch.rand(n, channels, 1, 1, generator=g) * 150
    return (slope + torch.rand(n, channels, side, side, generator=g) * 100).to(torch.uint8)


def compiled_path(maker: CropsMaker, images: Tensor, p: dict[str, Tensor]) -> list[Tensor]:
    """The views as compiled code makes them, run eagerly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        return maker.appear(maker.crop(images, p), p)


def gpu_path(maker: CropsMaker, images: Tensor, p: dict[str, Tensor]) -> list[Tensor]:
    """The views as a GPU makes them, run on the CPU."""
    crops = maker._crop_by_size(images, p["box"], p["flip"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        return maker.appear(crops, p)


def agree(view: Tensor, expected: Tensor) -> bool:
    """Within rounding; a value within rounding of the threshold may be solarized in one and not in the other."""
    near = (view - expected).abs() < 4e-6
    return near.double().mean() > 0.999 and bool(near.all() or (1 - view - expected).abs()[~near].max() < 4e-6)


# ---------------------------------------------------------------- the same pictures as two_crops

fractions = st.floats(0.01, 1.0)
probabilities = st.sampled_from([0.0, 0.5, 1.0])
OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "size": st.integers(4, 30),
    "scale": st.tuples(fractions, fractions).map(lambda pair: tuple(sorted(pair))),
    "ratio": st.tuples(st.floats(0.3, 3.0), st.floats(0.3, 3.0)).map(lambda pair: tuple(sorted(pair))),
    **dict.fromkeys(("flip", "jitter", "grayscale", "blur", "solarize"), probabilities),
    **dict.fromkeys(("brightness", "contrast", "saturation"), st.floats(0.0, 1.5)),
    "hue": st.sampled_from([0.0, 0.1, 0.5]),
    "blur_sigma": st.tuples(st.floats(0.1, 1.0), st.floats(1.0, 3.0)),
    "blur_kernel": st.sampled_from([3, 5, 7]),
    "solarize_threshold": st.floats(0.1, 0.9),
}
assert set(OPTIONS) == set(ViewOptions.model_fields)
some_options = st.fixed_dictionaries({}, optional=OPTIONS)
some_groups = st.lists(
    st.builds(
        lambda options, count, kind: ViewGroup(**options, count=count, kind=kind),
        some_options,
        st.integers(1, 3),
        st.sampled_from(["global", "local"]),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=40, deadline=None)
@given(
    common=some_options, groups=some_groups, n=st.integers(1, 7), channels=st.sampled_from([1, 3]), seed=st.integers(0)
)
def test_any_groups(common: dict, groups: list[ViewGroup], n: int, channels: int, seed: int) -> None:
    """Each view is what `two_crops` makes of that view's parameters, on every path."""
    run = run_info(SIDE, channels)
    spec = MultiCrop(**common, views=tuple(groups))
    maker, seed = spec.build(run), seed % 2**63
    assert isinstance(maker, CropsMaker)
    views = [group for group in spec.views for _ in range(group.count)]
    assert maker.specs == tuple(ViewSpec(o.size or SIDE, o.kind) for o in views)

    images, p = pictures(n, channels=channels), maker.draw(n, generator(seed))
    again = maker.draw(n, generator(seed))
    assert all(torch.equal(values, again[name]) for name, values in p.items())
    assert all(values.shape[:2] == (n, len(views)) and values.device.type == "cpu" for values in p.values())
    crops = maker.crop(images, p)
    made, compiled, on_gpu = maker.appear(crops, p), compiled_path(maker, images, p), gpu_path(maker, images, p)
    assert len(crops) == len(made) == len(compiled) == len(on_gpu) == len(views)
    for v, o in enumerate(views):
        assert made[v].shape == crops[v].shape == (n, channels, *(maker.specs[v].size,) * 2)
        assert made[v].isfinite().all()
        alone = TwoCrops(
            **{
                name: getattr(o, name)
                for name in TwoCrops.model_fields
                if name not in ("blur", "solarize", "mean", "std")
            },
            blur=(o.blur, o.blur),
            solarize=(o.solarize, o.solarize),
        ).build(run)
        q = {name: values[:, [v, v]] for name, values in p.items()}
        expected = alone.appear(alone.crop(images, q), q)[1]
        assert (made[v] - expected).abs().max() < 1e-6
        for other in (compiled[v], on_gpu[v]):
            assert other.is_contiguous()
            assert agree(other, made[v])


def test_two_groups_of_one_are_two_crops() -> None:
    """Numbers drawn included."""
    blur, solarize = (0.9, 0.1), (0.0, 0.2)
    two = TwoCrops(blur=blur, solarize=solarize).build(run_info(SIDE))
    maker = maker_of(*(ViewGroup(blur=b, solarize=s) for b, s in zip(blur, solarize, strict=True)))
    images, p, q = pictures(20), two.draw(20, generator()), maker.draw(20, generator())
    assert list(p) == list(q)
    assert all(torch.equal(p[name], q[name]) for name in p)
    assert all(map(torch.equal, two.appear(two.crop(images, p), p), maker.appear(maker.crop(images, q), q)))


def test_many_images_are_cropped_in_parts() -> None:
    """As one by one: the parts of a batch, the largest view among them, meet again in the right places."""
    maker = maker_of(GLOBALS, LOCALS, LARGE)
    images, p = pictures(150), maker.draw(150, generator())
    crops = maker.crop(images, p)
    for i in (0, 54, 55, 56, 110, 149):
        alone = maker.crop(images[i : i + 1], {name: values[i : i + 1] for name, values in p.items()})
        for crop, expected in zip(crops, alone, strict=True):
            assert (crop[i] - expected[0]).abs().max() < 1e-6


def test_normalised_alike() -> None:
    plain, maker = maker_of(*MIXED), maker_of(*MIXED, mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.3))
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)
    images, p = pictures(9), maker.draw(9, generator())
    crops = maker.crop(images, p)
    for view, unit in zip(maker.appear(crops, p), plain.appear(crops, p), strict=True):
        assert torch.allclose(view, (unit - mean) / std, atol=1e-5)


def test_what_a_group_never_does_is_never_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    maker = maker_of(WEAK, ViewGroup(jitter=0.0, grayscale=1.0, blur=0.0, solarize=1.0))
    images, p = pictures(5), maker.draw(5, generator())
    for name in ("blend", "shift_hue", "gaussian_blur", "gaussian_taps"):
        monkeypatch.setattr(color, name, lambda *_: pytest.fail("computed in vain"))
    crops = maker.crop(images, p)
    for views in (maker.appear(crops, p), compiled_path(maker, images, p)):
        assert torch.equal(views[0], crops[0])
        assert not torch.equal(views[1], crops[1])
    monkeypatch.setattr(Appearance, "_settings", lambda *_: pytest.fail("computed in vain"))
    assert torch.equal(maker_of(WEAK).appear(crops[:1], p)[0], crops[0])


@pytest.mark.parametrize("operation", ["jitter", "grayscale", "blur", "solarize"])
def test_each_operation_alone(operation: str) -> None:
    chances = {"jitter": 0.0, "grayscale": 0.0, "blur": 0.0, "solarize": 0.0, operation: 1.0}
    alone = ViewGroup(blur_sigma=(1.0, 2.0), **chances)
    maker = maker_of(WEAK, alone)
    images, p = pictures(6), maker.draw(6, generator())
    p = {name: values[:, [0, 0]] if name in ("box", "flip") else values for name, values in p.items()}
    views = maker.appear(maker.crop(images, p), p)
    assert all((views[1][i] - views[0][i]).abs().max() > 0.01 for i in range(6))


# ---------------------------------------------------------------- what is random


def test_each_view_has_its_groups_probabilities_and_ranges() -> None:
    n = 3000
    chances = {"flip": 0.3, "jitter": 0.6, "grayscale": 0.9, "blur": 0.1, "solarize": 0.7}
    odd = ViewGroup(count=2, brightness=0.1, contrast=1.5, saturation=0.9, hue=0.3, blur_sigma=(1.0, 1.5), **chances)
    p = maker_of(ViewGroup(), odd, ViewGroup()).draw(n, generator())
    default = ViewGroup()
    for v in range(4):
        own = odd if v in (1, 2) else default
        for name in chances:
            q = getattr(own, name)
            assert abs(p[name][:, v].double().mean().item() - q) <= 4 * math.sqrt(q * (1 - q) / n), (v, name)
        on = p["jitter"][:, v]
        limits = {
            name: (max(0.0, 1 - getattr(own, name)), 1 + getattr(own, name)) for name in ("brightness", "contrast")
        }
        limits |= {"saturation": (1 - own.saturation, 1 + own.saturation), "hue": (-own.hue, own.hue)}
        for name, (low, high) in limits.items():
            drawn = p[name][on, v]
            assert low <= drawn.min() < low + 0.01 * (high - low), (v, name)
            assert high - 0.01 * (high - low) < drawn.max() <= high, (v, name)
        low, high = own.blur_sigma
        assert low <= p["blur_sigma"][:, v].min() < low + 0.02
        assert high - 0.02 < p["blur_sigma"][:, v].max() <= high


def test_each_views_boxes_are_torchvisions() -> None:
    n, groups = 2000, (ViewGroup(scale=(0.4, 1.0)), ViewGroup(scale=(0.05, 0.4), ratio=(0.5, 1.0)), ViewGroup())
    boxes = maker_of(*groups, run=run_info(32)).draw(n, generator())["box"].double()
    torch.manual_seed(0)
    for v, o in enumerate(groups):
        drawn = [RandomResizedCrop.get_params(torch.empty(3, 32, 32), list(o.scale), list(o.ratio)) for _ in range(n)]
        theirs = torch.tensor(drawn, dtype=torch.float64)
        for of in (lambda b: b[:, 0], lambda b: b[:, 1], lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2]):
            a, b = of(boxes[:, v]), of(theirs)
            grid = torch.cat([a, b]).unique()
            below = [(x[None] <= grid[:, None]).double().mean(1) for x in (a, b)]
            # Two-sample Kolmogorov-Smirnov, both samples n: 1.95 * sqrt(2 / n) would be passed once in 1000.
            assert (below[0] - below[1]).abs().max() < 1.95 * math.sqrt(2 / n)


def test_each_views_box_that_never_fits_is_central_as_in_torchvision() -> None:
    ratios = ((3.0, 4.0), (0.2, 0.3))
    boxes = maker_of(*(ViewGroup(scale=(1.0, 1.0), ratio=r) for r in ratios), run=run_info(33)).draw(5, generator())[
        "box"
    ]
    for v, ratio in enumerate(ratios):
        theirs = RandomResizedCrop.get_params(torch.empty(3, 33, 33), [1.0, 1.0], list(ratio))
        assert (boxes[:, v] == torch.tensor(theirs)).all()


def test_parameters_differ_between_samples_and_views() -> None:
    group = ViewGroup(count=4, flip=0.5, jitter=0.5, grayscale=0.5, blur=0.5, solarize=0.5)
    for name, values in maker_of(group, group).draw(64, generator()).items():
        assert all(len(values[:, v].unique(dim=0)) > 1 for v in range(8)), name
        assert not any(torch.equal(values[:, v], values[:, w]) for v in range(8) for w in range(v)), name


def test_a_views_draws_do_not_depend_on_other_views_options() -> None:
    one, other = (maker_of(GLOBALS, changed).draw(30, generator()) for changed in (LARGE, ViewGroup(scale=(0.1, 0.2))))
    for name in one:
        assert torch.equal(one[name][:, :2], other[name][:, :2]), name
    assert not torch.equal(one["box"][:, 2], other["box"][:, 2])


def test_views_have_no_other_randomness() -> None:
    maker = maker_of(*MIXED)
    images, p = pictures(12), maker.draw(12, generator())
    torch.manual_seed(0)
    crops = maker.crop(images, p)
    kept = [c.clone() for c in crops]
    views = maker.appear(crops, p)
    torch.manual_seed(1)
    assert all(map(torch.equal, views, maker.appear(maker.crop(images, p), p)))
    assert all(map(torch.equal, crops, kept))


# ---------------------------------------------------------------- compiled, and on other devices


@pytest.mark.filterwarnings("ignore")  # of torch's own, while it compiles
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_equals_eager_and_compiles_once(backend: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    maker = maker_of(GLOBALS, LOCALS, WEAK)
    counter = CompileCounterWithBackend(backend)

    @torch.compile(fullgraph=True, dynamic=False, backend=counter)
    def compiled(images: Tensor, p: dict[str, Tensor]) -> list[Tensor]:
        return maker.appear(maker.crop(images, p), p)

    for seed in range(2):
        images, p = pictures(10, seed=seed), maker.draw(10, generator(seed))
        eager = maker.appear(maker.crop(images, p), p)
        assert all(map(agree, compiled(images, p), eager))
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore")
def test_what_a_gpu_runs_depends_on_no_data_and_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device there is no data: a look at a value, a CPU tensor in between, a data-dependent shape fails."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it does not know that device
    torch.compiler.reset()
    maker = maker_of(GLOBALS, LOCALS, WEAK)
    images = pictures(6).to("meta")
    p = {name: values.to("meta") for name, values in maker.draw(6, generator()).items()}

    def make() -> list[Tensor]:
        return maker.appear(maker.crop(images, p), p)

    for views in (make(), torch.compile(make, fullgraph=True, dynamic=False, backend="eager")()):
        assert [view.shape[-1] for view in views] == [24, 24, 12, 12, 12, 24]
        assert all(view.device.type == "meta" for view in views)


# ---------------------------------------------------------------- options


def test_a_group_has_the_generators_options_where_it_sets_none() -> None:
    spec = MultiCrop(flip=0.1, size=20, blur=0.3, views=(ViewGroup(flip=0.9), ViewGroup(size=9, kind="local")))
    first, second = spec.views
    assert (first.flip, first.size, first.blur, first.scale) == (0.9, 20, 0.3, (0.08, 1.0))
    assert (second.flip, second.size, second.blur, second.kind) == (0.1, 9, 0.3, "local")
    moved = MultiCrop(flip=0.2, views=spec.views)
    assert [group.flip for group in moved.views] == [0.9, 0.2]


def test_specs_and_the_size_for_evaluation() -> None:
    small, plain, large = ViewGroup(size=8, kind="local"), ViewGroup(), ViewGroup(size=30)
    maker = maker_of(small, plain, large)
    assert maker.specs == (ViewSpec(8, "local"), ViewSpec(SIDE), ViewSpec(30))
    for groups, size in [((small, plain, large), SIDE), ((small, large), 30), ((small,), 8)]:
        clean = maker_of(*groups).clean(pictures(2))
        assert clean.shape == (2, 3, size, size)
        assert torch.equal(clean, TwoCrops(size=size).build(run_info(SIDE)).clean(pictures(2)))


def test_default_kernel_is_a_tenth_of_each_view() -> None:
    maker = maker_of(ViewGroup(), ViewGroup(size=96), ViewGroup(size=64, blur_kernel=11), run=run_info(224))
    assert [appearance.blur_kernel for _, appearance in maker.appearances] == [23, 9, 11]


def test_every_option_of_a_group_is_documented_and_the_generators() -> None:
    assert all(info.description for info in ViewGroup.model_fields.values())
    assert set(MultiCrop.model_fields) - set(ViewGroup.model_fields) == {"views", "mean", "std"}
    assert set(ViewGroup.model_fields) - set(MultiCrop.model_fields) == {"count", "kind"}


@pytest.mark.parametrize(
    ("options", "run", "problems"),
    [
        (
            {"blur_kernel": 41, "views": (ViewGroup(size=20), ViewGroup(size=24), ViewGroup(size=8, blur=0.0))},
            run_info(),
            ["view_generator.multi_crop.views.0: a blur_kernel of 41 px does not fit views of 20 px; set blur_kernel "
             "below 40, or blur to 0"],
        ),
        (
            {"hue": 0.0, "views": (ViewGroup(), ViewGroup(saturation=0.0))},
            run_info(channels=4),
            ["view_generator.multi_crop.views.0: the images have 4 channels, and saturation and grayscale needs RGB or "
             "one channel; set saturation = 0, grayscale = 0",
             "view_generator.multi_crop.views.1: the images have 4 channels, and grayscale needs RGB or one channel; "
             "set grayscale = 0"],
        ),
        (
            {"mean": (0.5,), "views": (ViewGroup(),)},
            run_info(),
            ["view_generator.multi_crop.mean: 1 values for images of 3 channels; give one per channel"],
        ),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_the_run_are_refused(options: dict, run: RunInfo, problems: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        MultiCrop(**options).build(run)
    assert list(refused.value.lines) == problems


def test_images_of_another_shape_are_refused() -> None:
    maker = maker_of(GLOBALS)
    with pytest.raises(UserError, match=r"view_generator\.multi_crop: got images of shape \[3, 40, 40\]"):
        maker.crop(pictures(2, 40), maker.draw(2, generator()))


# ---------------------------------------------------------------- in a recipe


@pytest.fixture
def recipe(tiny: Path) -> Callable[..., Recipe]:
    """Reads the tiny recipe with other views."""

    def read(views: str, *overrides: str) -> Recipe:
        text = tiny.read_text(encoding="utf-8").replace('use = "affine"', f'use = "multi_crop"\n{views}')
        return parse_recipe(text, "recipe.toml", overrides)

    return read


def groups_of(recipe: Recipe) -> tuple[ViewGroup, ...]:
    assert isinstance(recipe.view_generator, MultiCrop)
    return recipe.view_generator.views


VIEWS = """flip = 0.1
[[view_generator.views]]
count = 2
scale = [0.4, 1.0]
[[view_generator.views]]
kind = "local"
size = 16
"""


def test_a_recipe_spelt_out_is_the_same_recipe(recipe: Callable[..., Recipe]) -> None:
    first = recipe(VIEWS)
    again = parse_recipe(first.to_toml(), "recipe.lock.toml")
    assert again == first
    assert again.hash() == first.hash() != recipe(VIEWS, "view_generator.flip=0.2").hash()
    assert [(g.count, g.kind, g.scale, g.size) for g in groups_of(again)] == [
        (2, "global", (0.4, 1.0), None),
        (1, "local", (0.08, 1.0), 16),
    ]


def test_an_override_reaches_the_groups_of_a_recipe_that_is_spelt_out(recipe: Callable[..., Recipe]) -> None:
    changed = parse_recipe(recipe(VIEWS).to_toml(), "x.toml", ["view_generator.flip=0.7", "view_generator.size=8"])
    assert [(g.flip, g.size) for g in groups_of(changed)] == [(0.7, 8), (0.7, 16)]


def test_mistakes_in_a_group_are_named_with_their_line(recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(UserError) as refused:
        recipe(VIEWS.replace("scale", "scael").replace("local", "locl").replace("16", "0"))
    place, problem = refused.value.lines[0].split(": ", 1)
    assert problem == "view_generator.views.0.scael: unknown option; did you mean 'scale'?"
    line = int(place.removeprefix("recipe.toml:"))
    assert refused.value.lines[1:] == (
        f"recipe.toml:{line + 2}: view_generator.views.1.kind: should be 'global' or 'local', not 'locl'; did you mean "
        "'local'?",
        f"recipe.toml:{line + 3}: view_generator.views.1.size: should be greater than 0, not 0",
    )


@pytest.mark.parametrize(
    ("views", "problem"),
    [
        ("", "view_generator.views: this option is required and missing"),
        ("views = []", "view_generator.views: should hold one group of views or more, not []"),
        ("flip = 2.0\n[[view_generator.views]]\ncount = 1", "view_generator.flip: should be less than or equal to 1"),
        ("[[view_generator.views]]\nmean = [0.5]", "view_generator.views.0.mean: unknown option"),
    ],
)
def test_wrong_views_are_refused_with_one_line(recipe: Callable[..., Recipe], views: str, problem: str) -> None:
    with pytest.raises(UserError) as refused:
        recipe(views)
    assert len(refused.value.lines) == 1
    assert problem in refused.value.lines[0]


@pytest.mark.parametrize(
    "wrong", [{"scale": (0.5, 0.2)}, {"blur_kernel": 4}, {"count": 0}, {"kind": "tiny"}, {"std": ()}]
)
def test_wrong_options_of_a_group_are_refused(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        ViewGroup(**wrong)
