"""Two random crops and the unchanged image: the pictures are torchvision's, and what is random is right."""

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
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as V1

from sslkit.api import RunInfo, ViewSpec
from sslkit.errors import UserError
from sslkit_crops import Identity, TwoCrops, color, geometry

VIEWS = (0, 1)


def pictures(n: int, side: int = 32, channels: int = 3, seed: int = 0) -> Tensor:
    """Noise on slopes with flat, grey, black and white pictures among it: uint8 `[n, C, side, side]`."""
    g = generator(seed)
    slope = torch.linspace(0, 1, side) * torch.rand(n, channels, 1, 1, generator=g) * 180
    images = slope + slope.transpose(2, 3) * 0.3 + torch.rand(n, channels, side, side, generator=g) * 60
    images[::7] = images[::7, :1]
    images[1::11], images[2::11], images[3::11] = 0.0, 255.0, 90.0
    return images.clamp(0, 255).to(torch.uint8)


def torchvision_crop(image: Tensor, p: dict[str, Tensor], i: int, v: int, size: int) -> Tensor:
    x = V.to_dtype(image, torch.float32, scale=True)
    x = V.resized_crop(x, *p["box"][i, v].tolist(), [size, size], InterpolationMode.BICUBIC, antialias=True)
    x = x.clamp(0, 1)
    return V.horizontal_flip(x) if p["flip"][i, v] else x


def torchvision_colors(x: Tensor, p: dict[str, Tensor], i: int, v: int, kernel: int) -> Tensor:
    """All but solarize, which jumps at its threshold."""
    adjust = [V.adjust_brightness, V.adjust_contrast, V.adjust_saturation, V.adjust_hue]
    amount = [p[name][i, v].item() for name in ("brightness", "contrast", "saturation", "hue")]
    if p["jitter"][i, v]:
        for k in p["order"][i, v].tolist():
            x = adjust[k](x, amount[k])
    if p["grayscale"][i, v]:
        x = V.rgb_to_grayscale(x, x.shape[0])
    if p["blur"][i, v]:
        x = V.gaussian_blur(x, [kernel, kernel], [p["blur_sigma"][i, v].item()] * 2)
    return x


def static_views(maker, crops: list[Tensor], p: dict[str, Tensor]) -> list[Tensor]:
    """The path of compiled code and of GPUs, run eagerly on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        return maker.appear(crops, p)


# ---------------------------------------------------------------- the same pictures as torchvision


@pytest.mark.parametrize(
    ("side", "options"),
    [
        (32, {}),
        (32, {"hue": 0.5, "saturation": 1.5, "brightness": 2.0, "contrast": 1.0}),
        (40, {"size": 24, "blur_kernel": 5}),
        (17, {"size": 33, "ratio": (0.2, 0.6)}),
        (96, {"size": 64, "blur": (0.5, 0.5)}),
    ],
)
def test_equals_torchvision(side: int, options: dict) -> None:
    n = 40
    maker = TwoCrops(**options, solarize=(0.0, 0.0)).build(run_info(side))
    images, p = pictures(n, side), maker.draw(n, generator())
    crops = maker.crop(images, p)
    views, static = maker.appear(crops, p), static_views(maker, crops, p)
    size = options.get("size", side)
    for v in VIEWS:
        assert crops[v].shape == views[v].shape == (n, 3, size, size)
        for i in range(n):
            crop = torchvision_crop(images[i], p, i, v, size)
            assert (crops[v][i] - crop).abs().max() < 1e-5  # measured: 3e-6
            view = torchvision_colors(crop, p, i, v, maker.appearances[v][1].blur_kernel)
            assert (views[v][i] - view).abs().max() < 0.01 / 255  # measured: .0012 / 255
        assert (views[v] - static[v]).abs().max() < 4e-6  # measured: 5e-7


def test_compiled_weights_equal_the_table() -> None:
    cropper = geometry.Cropper(12, 9)
    start = torch.tensor([s for length in range(1, 13) for s in range(13 - length)]).repeat(2)
    length = torch.tensor([length for length in range(1, 13) for s in range(13 - length)]).repeat(2)
    flip = torch.arange(len(start)) >= len(start) // 2
    expected = geometry.resize_weights(start, length, flip, 12, 9)
    assert torch.equal(cropper._weights(start, length, flip), expected)
    assert torch.allclose(expected.sum(-1), torch.ones(len(start), 9), atol=1e-6)


def test_large_images_need_no_table() -> None:
    maker = TwoCrops(size=48).build(run_info(150))
    images, p = pictures(3, 150), maker.draw(3, generator())
    crops = maker.crop(images, p)
    assert "table" not in vars(maker.croppers[48])
    for v in VIEWS:
        for i in range(3):
            assert (crops[v][i] - torchvision_crop(images[i], p, i, v, 48)).abs().max() < 1e-4


@pytest.mark.parametrize("threshold", [0.5, 0.25])
def test_solarize_equals_torchvision(threshold: float) -> None:
    x = pictures(20).float() / 255
    ours = torch.stack(color.solarize(x.unbind(1), threshold), 1)
    assert (ours - V.solarize(x, threshold)).abs().max() < 1e-6
    at = [torch.full((1, 1, 1), threshold)]
    assert color.solarize(at, threshold)[0].item() == pytest.approx(1 - threshold)


def test_solarize_comes_last_and_only_where_drawn() -> None:
    plain = TwoCrops(solarize=(0.0, 0.0)).build(run_info())
    maker = TwoCrops(solarize=(0.4, 0.6), solarize_threshold=0.3).build(run_info())
    images, p = pictures(60), maker.draw(60, generator())
    crops = maker.crop(images, p)
    before = plain.appear(crops, p)
    for views in (maker.appear(crops, p), static_views(maker, crops, p)):
        for v in VIEWS:
            on = p["solarize"][:, v, None, None, None]
            expected = torch.where(on, V.solarize(before[v], 0.3), before[v])
            assert (views[v] - expected).abs()[(before[v] - 0.3).abs() > 1e-5].max() < 4e-6


@settings(max_examples=40, deadline=None)
@given(turns=st.floats(-0.5, 0.5, width=32), seed=st.integers(0, 10**6), gray=st.booleans())
def test_hue_of_any_shift(turns: float, seed: int, gray: bool) -> None:
    x = torch.rand(3, 1, 6, 6, generator=generator(seed)).mul(8).round().div(8)  # many equal channels
    x = x[:1].expand(3, 1, 6, 6) if gray else x
    ours = torch.cat(color.shift_hue(x, torch.full((1, 1, 1), turns), 0.5))
    assert (ours - V.adjust_hue(x[:, 0], turns)).abs().max() < 2e-6
    assert ours.amin() >= -1e-6
    assert ours.amax() <= 1 + 1e-6


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 9),
    side=st.integers(3, 24),
    size=st.integers(3, 24),
    channels=st.sampled_from([1, 3]),
    seed=st.integers(0, 10**6),
)
def test_views_of_any_size_stay_within_0_and_1(n: int, side: int, size: int, channels: int, seed: int) -> None:
    maker = TwoCrops(size=size, blur=(0.5, 0.5), solarize=(0.5, 0.5)).build(run_info(side, channels))
    p = maker.draw(n, generator(seed))
    crops = maker.crop(pictures(n, side, channels, seed), p)
    for views in (maker.appear(crops, p), static_views(maker, crops, p)):
        for view in views:
            assert view.shape == (n, channels, size, size)
            assert view.dtype == torch.float32
            assert -1e-6 <= view.amin() <= view.amax() <= 1 + 1e-6


def test_normalised_with_the_training_images_statistics_or_given_ones() -> None:
    info = run_info(mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3))
    images = pictures(5)
    raw = images.double() / 255
    mean, std = torch.tensor(info.mean).view(3, 1, 1), torch.tensor(info.std).view(3, 1, 1)
    assert torch.allclose(TwoCrops().build(info).clean(images).double(), (raw - mean) / std, atol=1e-5)
    own = TwoCrops(mean=(0.1, 0.1, 0.1), std=(0.5, 0.5, 0.5)).build(info)
    assert torch.allclose(own.clean(images).double(), (raw - 0.1) / 0.5, atol=1e-5)
    p = own.draw(5, generator())
    crops = own.crop(images, p)
    plain = TwoCrops().build(run_info()).appear(crops, p)
    for view, unit in zip(own.appear(crops, p), plain, strict=True):
        assert torch.allclose(view, (unit - 0.1) / 0.5, atol=1e-5)


def test_clean_resizes_as_torchvision() -> None:
    maker = TwoCrops(size=24).build(run_info(40))
    images = pictures(4, 40)
    expected = V.resize(images.float() / 255, [24, 24], InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    assert (maker.clean(images) - expected).abs().max() < 1e-5
    wide = pictures(2, 40)[:, :, :30]
    expected = V.resize(wide.float() / 255, [24, 24], InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    assert (maker.clean(wide) - expected).abs().max() < 1e-5


def test_one_channel_has_no_color_as_in_torchvision() -> None:
    maker = TwoCrops(hue=0.3, saturation=1.0, solarize=(0.0, 0.0), blur=(0.0, 0.0)).build(run_info(20, 1))
    images, p = pictures(30, 20, 1), maker.draw(30, generator())
    crops = maker.crop(images, p)
    for views in (maker.appear(crops, p), static_views(maker, crops, p)):
        for v in VIEWS:
            for i in range(30):
                expected = torchvision_colors(torchvision_crop(images[i], p, i, v, 20), p, i, v, 3)
                assert (views[v][i] - expected).abs().max() < 4e-6


def test_close_to_pillow() -> None:
    """Pillow rounds to 8 bits after each pass of a resize and after every operation."""
    maker = TwoCrops(blur=(0.0, 0.0), solarize=(0.0, 0.0), hue=0.0).build(run_info())
    images, p = pictures(40, seed=3), maker.draw(40, generator(3))
    views = maker.appear(maker.crop(images, p), p)
    adjust = [V1.adjust_brightness, V1.adjust_contrast, V1.adjust_saturation]
    amount = [p[name] for name in ("brightness", "contrast", "saturation")]
    errors = []
    for i in range(40):
        for v in VIEWS:
            x = V1.resized_crop(
                V1.to_pil_image(images[i]), *p["box"][i, v].tolist(), [32, 32], InterpolationMode.BICUBIC
            )
            x = V1.hflip(x) if p["flip"][i, v] else x
            for k in p["order"][i, v].tolist():
                x = adjust[k](x, amount[k][i, v].item()) if k < 3 else x
            x = V1.to_grayscale(x, 3) if p["grayscale"][i, v] else x
            errors.append((V1.to_tensor(x) - views[v][i]).abs() * 255)
    assert torch.stack(errors).mean() < 1.1


# ---------------------------------------------------------------- what is random


def squares(n: int, side: int) -> Tensor:
    return torch.full((n, 2), side)


@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (0.2, 3.0)])
def test_boxes_are_distributed_as_torchvisions(ratio: tuple[float, float]) -> None:
    n, image = 2000, torch.empty(3, 32, 32)
    ours = geometry.Boxes([(0.08, 1.0)] * 2, [ratio] * 2).draw(squares(n, 32), generator()).view(-1, 4).double()
    torch.manual_seed(0)
    drawn = [RandomResizedCrop.get_params(image, [0.08, 1.0], list(ratio)) for _ in range(2 * n)]
    theirs = torch.tensor(drawn, dtype=torch.float64)
    for of in (*(lambda b, k=k: b[:, k] for k in range(4)), lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2]):
        a, b = of(ours), of(theirs)
        grid = torch.cat([a, b]).unique()
        below = [(x[None] <= grid[:, None]).double().mean(1) for x in (a, b)]
        # Two-sample Kolmogorov-Smirnov, both samples 2n: 1.95 * sqrt(2 / 2n) would be passed once in 1000.
        assert (below[0] - below[1]).abs().max() < 1.95 * math.sqrt(1 / n)


@settings(max_examples=50, deadline=None)
@given(
    side=st.integers(1, 70),
    scale=st.tuples(st.floats(0.001, 1.0), st.floats(0.001, 1.0)).map(sorted),
    ratio=st.tuples(st.floats(0.05, 20.0), st.floats(0.05, 20.0)).map(sorted),
    seed=st.integers(0, 10**6),
)
def test_boxes_lie_within_the_image(side: int, scale: list, ratio: list, seed: int) -> None:
    boxes = geometry.Boxes([tuple(scale)] * 2, [tuple(ratio)] * 2).draw(squares(50, side), generator(seed))
    top, left, height, width = boxes.unbind(-1)
    assert min(top.min(), left.min()) >= 0
    assert min(height.min(), width.min()) >= 1
    assert max((top + height).max(), (left + width).max()) <= side


@pytest.mark.parametrize("ratio", [(3.0, 4.0), (0.2, 0.3)])
def test_a_box_that_never_fits_is_central_as_in_torchvision(ratio: tuple[float, float]) -> None:
    ours = geometry.Boxes([(1.0, 1.0)] * 2, [ratio] * 2).draw(squares(5, 33), generator())
    theirs = RandomResizedCrop.get_params(torch.empty(3, 33, 33), [1.0, 1.0], list(ratio))
    assert (ours == torch.tensor(theirs)).all()


def test_probabilities_and_ranges() -> None:
    n = 4000
    options = TwoCrops(blur=(0.7, 0.1), jitter=0.6, flip=0.3)
    p = options.build(run_info()).draw(n, generator())
    expected = {
        "flip": (0.3, 0.3),
        "jitter": (0.6, 0.6),
        "grayscale": (0.2, 0.2),
        "blur": (0.7, 0.1),
        "solarize": (0.0, 0.2),
    }
    for name, pair in expected.items():
        for v in VIEWS:
            error = abs(p[name][:, v].double().mean().item() - pair[v])
            assert error <= 4 * math.sqrt(pair[v] * (1 - pair[v]) / n), name
    on = p["jitter"]
    for name, low, high, neutral in [
        ("brightness", 0.6, 1.4, 1.0),
        ("contrast", 0.6, 1.4, 1.0),
        ("saturation", 0.8, 1.2, 1.0),
        ("hue", -0.1, 0.1, 0.0),
    ]:
        drawn, width = p[name][on].double(), high - low
        assert low <= drawn.min() < low + 0.01 * width
        assert high - 0.01 * width < drawn.max() <= high
        assert abs(drawn.mean() - neutral) < 4 * width / math.sqrt(12 * len(drawn))
        assert (p[name][~on] == neutral).all()
    assert 0.1 <= p["blur_sigma"].min() < 0.12
    assert 1.98 < p["blur_sigma"].max() <= 2.0
    codes = (p["order"] * torch.tensor([64, 16, 4, 1])).sum(-1).flatten().unique(return_counts=True)[1]
    assert len(codes) == 24
    assert abs(codes.double() - 2 * n / 24).max() < 5 * math.sqrt(2 * n / 24)


def test_parameters_differ_between_samples_and_views() -> None:
    p = TwoCrops(solarize=(0.5, 0.5), blur=(0.5, 0.5)).build(run_info()).draw(64, generator())
    for name, values in p.items():
        assert values.shape[:2] == (64, 2), name
        assert values.device.type == "cpu"
        assert len(values[:, 0].unique(dim=0)) > 1, name
        assert not torch.equal(values[:, 0], values[:, 1]), name


def test_seeded_and_pure() -> None:
    maker = TwoCrops().build(run_info())
    images = pictures(16)
    p, again, other = (maker.draw(16, generator(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(p[name], again[name]) for name in p)
    torch.manual_seed(0)
    crops = maker.crop(images, p)
    kept = [c.clone() for c in crops]
    views = maker.appear(crops, p)
    torch.manual_seed(1)
    assert all(map(torch.equal, views, maker.appear(crops, p)))  # no other randomness, and crops are left alone
    assert all(map(torch.equal, crops, kept))
    assert not torch.equal(views[0], views[1])
    assert not torch.equal(views[0], maker.appear(maker.crop(images, other), other)[0])


@pytest.mark.parametrize("parts", [2, 5])
def test_slices_of_a_batch_give_the_same_views(parts: int) -> None:
    maker = TwoCrops().build(run_info())
    images, p = pictures(37), maker.draw(37, generator())
    whole = maker.appear(maker.crop(images, p), p)
    pieces = []
    for index in torch.arange(37).tensor_split(parts):
        q = {name: values[index] for name, values in p.items()}
        pieces.append(maker.appear(maker.crop(images[index], q), q))
    for v in VIEWS:
        assert (torch.cat([piece[v] for piece in pieces]) - whole[v]).abs().max() < 1e-5


# ---------------------------------------------------------------- compiled, on other devices, in half precision


def test_nothing_depends_on_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device there is no data: a look at a value, a CPU tensor in between, a data-dependent shape fails."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it does not know that device
    for side, options in ((32, {"hue": 0.3, "solarize": (0.2, 0.2)}), (150, {"size": 32})):
        maker = TwoCrops(**options).build(run_info(side))
        p = {name: values.to("meta") for name, values in maker.draw(6, generator()).items()}
        images = pictures(6, side).to("meta")
        for view in maker.appear(maker.crop(images, p), p):
            assert view.shape == (6, 3, 32, 32)
            assert view.device.type == "meta"


def test_autocast_changes_nothing() -> None:
    maker = TwoCrops(size=20).build(run_info())
    images, p = pictures(8), maker.draw(8, generator())
    views, clean = maker.appear(maker.crop(images, p), p), maker.clean(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half, half_clean = maker.appear(maker.crop(images, p), p), maker.clean(images)
    assert all(map(torch.equal, views, half))
    assert torch.equal(clean, half_clean)


@pytest.mark.filterwarnings("ignore")  # of torch's own, while it compiles
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", [{}, {"size": 24, "hue": 0.5, "solarize": (0.3, 0.3)}])
def test_compiled_equals_eager_and_compiles_once(options: dict, backend: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    maker = TwoCrops(**options).build(run_info())
    counter = CompileCounterWithBackend(backend)

    @torch.compile(fullgraph=True, dynamic=False, backend=counter)
    def compiled(images: Tensor, p: dict[str, Tensor]) -> list[Tensor]:
        return maker.appear(maker.crop(images, p), p)

    for seed in range(3):
        images, p = pictures(24, seed=seed), maker.draw(24, generator(seed))
        eager = maker.appear(maker.crop(images, p), p)
        for view, expected in zip(compiled(images, p), eager, strict=True):
            near = (view - expected).abs() < 4e-6
            # A value within rounding of the threshold may be solarized in one and not in the other.
            assert near.double().mean() > 0.9999
            assert near.all() or (1 - view - expected).abs()[~near].max() < 4e-6
    assert counter.frame_count == 1


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"scale": (0.5, 0.2)}, "lowest, highest"),
        ({"scale": (0.0, 1.0)}, "greater than 0"),
        ({"ratio": (2.0, 1.0)}, "lowest, highest"),
        ({"blur_sigma": (0.0, 1.0)}, "greater than 0"),
        ({"blur_kernel": 4}, "try 5"),
        ({"blur_kernel": 1}, "greater than or equal to 3"),
        ({"flip": 1.5}, "less than or equal to 1"),
        ({"hue": 0.6}, "less than or equal to 0.5"),
        ({"blur": (0.5, -0.1)}, "greater than or equal to 0"),
        ({"std": (0.0, 1.0, 1.0)}, "greater than 0"),
        ({"size": 0}, "greater than 0"),
        ({"crop": 1}, "Extra inputs"),
    ],
)
def test_wrong_options_are_refused(wrong: dict, problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        TwoCrops(**wrong)


@pytest.mark.parametrize(
    ("options", "info", "problem"),
    [
        ({}, run_info(channels=4), "saturation = 0, hue = 0, grayscale = 0"),
        ({"mean": (0.5,)}, run_info(), "view_generator.two_crops.mean: 1 values for images of 3 channels"),
        ({"std": (0.5,) * 4}, run_info(), "view_generator.two_crops.std: 4 values"),
        ({}, run_info(std=(0.1, 0.0, 0.1)), "set std"),
        ({"blur_kernel": 41, "size": 20}, run_info(), "set blur_kernel below 40"),
    ],
)
def test_options_that_do_not_fit_the_run_are_refused(options: dict, info: RunInfo, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        TwoCrops(**options).build(info)


def test_other_channels_work_without_color() -> None:
    maker = TwoCrops(saturation=0.0, hue=0.0, grayscale=0.0).build(run_info(channels=5))
    p = maker.draw(9, generator())
    crops = maker.crop(pictures(9, channels=5), p)
    for views in (maker.appear(crops, p), static_views(maker, crops, p)):
        assert views[0].shape == (9, 5, 32, 32)
    assert all((a - b).abs().max() < 4e-6 for a, b in zip(maker.appear(crops, p), views, strict=True))


def test_images_of_another_shape_are_refused() -> None:
    maker = TwoCrops().build(run_info())
    p = maker.draw(2, generator())
    with pytest.raises(UserError, match=r"\[3, 40, 40\]"):
        maker.crop(pictures(2, 40), p)


def test_default_kernel_is_a_tenth_of_the_view() -> None:
    makers = {size: TwoCrops(size=size).build(run_info(224)) for size in (16, 32, 64, 96, 224)}
    kernels = {size: maker.appearances[0][1].blur_kernel for size, maker in makers.items()}
    assert kernels == {16: 3, 32: 3, 64: 7, 96: 9, 224: 23}


def test_specs() -> None:
    assert TwoCrops(size=24).build(run_info(40)).specs == (ViewSpec(24), ViewSpec(24))
    assert TwoCrops().build(run_info(40)).specs == (ViewSpec(40), ViewSpec(40))


def test_options_survive_json() -> None:
    options = TwoCrops(blur=(0.0, 0.0), size=24)
    table = options.model_dump(mode="json")
    assert table.pop("use") == "two_crops"
    assert TwoCrops.model_validate(table, strict=False) == options
    assert set(TwoCrops.model_fields) == {n for n, f in TwoCrops.model_fields.items() if f.description}


def test_the_spec_does_not_import_torch() -> None:
    code = "import sys, sslkit_crops; assert not {'torch', 'numpy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---------------------------------------------------------------- identity


@pytest.mark.parametrize("views", [1, 2, 3])
def test_identity_is_the_clean_image(views: int) -> None:
    maker = Identity(views=views).build(run_info(mean=(0.5,) * 3, std=(0.2,) * 3))
    images = pictures(4)
    p = maker.draw(4, generator())
    made = maker.appear(maker.crop(images, p), p)
    assert len(made) == len(maker.specs) == views
    expected = (images.double() / 255 - 0.5) / 0.2
    for view in made:
        assert torch.allclose(view.double(), expected, atol=1e-5)
        assert torch.equal(view, maker.clean(images))
