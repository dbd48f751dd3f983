from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TINY, run_info
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from sslkit import view_grid
from sslkit.batch import ViewSpec
from sslkit.build import build, build_views
from sslkit.errors import RunFailed, UserError
from sslkit.features import normalisation
from sslkit.recipe import parse_recipe
from sslkit.view_grid import ALARM, draw, samples, show, write
from sslkit.view_words import box, drawn, words

RED = tuple(int(ALARM[i : i + 2], 16) for i in (1, 3, 5))


class Few:
    """Images in memory."""

    def __init__(self, pixels: Tensor, labels: list[int] | None = None) -> None:
        self.tensor, self.labels = pixels, None if labels is None else torch.tensor(labels)

    def __len__(self) -> int:
        return len(self.tensor)

    def read(self, indices: Tensor) -> Tensor:
        return self.tensor[indices]


def data_of(pixels: Tensor, labels: list[int] | None = None, names: tuple[str, ...] | None = None) -> Any:
    return SimpleNamespace(train=Few(pixels, labels), test=None, class_names=names, fingerprint="", bad=())


class Stranger:
    """Somebody's view maker: any parameters, any views, any normalisation."""

    def __init__(
        self,
        parameters: Mapping[str, Any],
        views: Sequence[Tensor],
        scale: Tensor | None = None,
        shift: float = 0.0,
        power: float = 1.0,
    ) -> None:
        self.parameters, self.views = parameters, views
        self.specs = tuple(ViewSpec(v.shape[-1]) for v in views)
        self.scale, self.shift, self.power = torch.ones(3, 1, 1) if scale is None else scale, shift, power

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return dict(self.parameters)

    def crop(self, images: Tensor, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        return list(self.views)

    def appear(self, crops: Sequence[Tensor], parameters: Mapping[str, Tensor]) -> list[Tensor]:
        return list(crops)

    def clean(self, images: Tensor) -> Tensor:
        return (images.double() / 255) ** self.power * self.scale + self.shift


def stranger(n: int = 2, side: int = 8, **parameters: Any) -> Stranger:
    return Stranger(parameters, [torch.rand(n, 3, side, side, generator=torch.manual_seed(v)) for v in range(2)])


PIXELS = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def colours(image: Image.Image) -> set[tuple[int, ...]]:
    return {colour for _, colour in image.getcolors(1 << 24)}  # type: ignore[misc, union-attr]


def of_recipe(*overrides: str) -> Any:
    return build_views(parse_recipe(TINY, "r.toml", overrides), torch.device("cpu"), lambda text: None)


# ---------------------------------------------------------------- what is shown


def test_the_views_shown_are_those_that_the_drawn_parameters_make() -> None:
    data, run, views = of_recipe()
    shown, undone = samples(data, run, views, 4)
    assert undone
    for sample in shown:
        index = int(sample.title[1].split()[1])
        assert torch.equal(sample.original, data.train.read(torch.tensor([index]))[0] / 255)
    indices = torch.tensor([int(s.title[1].split()[1]) for s in shown])
    parameters = views.draw(4, view_grid.randomness.generator(run.seed, "view_grid", 1))
    made = views.appear(views.crop(data.train.read(indices), parameters), parameters)
    mean, std = torch.tensor(run.mean), torch.tensor(run.std)
    for i, sample in enumerate(shown):
        for v in range(2):
            exact = made[v][i].double() * std[:, None, None] + mean[:, None, None]
            torch.testing.assert_close(sample.views[v], exact, rtol=1e-6, atol=1e-6)
        gap = (made[0][i] - made[1][i]).abs()
        assert sample.difference == (float(gap.max()), float(gap.mean()))


def test_one_seed_shows_the_same_images_and_another_others() -> None:
    data, run, views = of_recipe()
    first, again = (draw(data, run, views, "x").tobytes() for _ in range(2))
    assert first == again
    other, _ = samples(data, replace(run, seed=1), views, 6)
    assert [s.title for s in samples(data, run, views, 6)[0]] != [s.title for s in other]
    # The views of another generator are of the same images.
    titles = [s.title for s in samples(*of_recipe("view_generator.use=identity"), 6)[0]]
    assert titles == [s.title for s in samples(data, run, views, 6)[0]]


def test_torchs_randomness_is_left_as_it_was() -> None:
    data, run, views = of_recipe()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    draw(data, run, views, "x")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("count", [1, 3, 5, 7, 50])
def test_images_are_spread_over_the_classes(count: int) -> None:
    labels = [0] * 20 + [1] * 2 + [2] * 10
    found = view_grid.chosen(Few(torch.zeros(32, 1, 1, 1), labels), 3, count)
    per_class = torch.bincount(torch.tensor(labels)[found], minlength=3).tolist()
    assert len(set(found.tolist())) == len(found) == min(count, 32)
    for mine, there in zip(per_class, (20, 2, 10), strict=True):
        assert mine == there or mine >= max(per_class) - 1


def test_without_labels_images_are_just_images() -> None:
    shown, _ = samples(data_of(PIXELS), run_info(8), stranger(), 6)
    assert sorted(s.title for s in shown) == [["image 0"], ["image 1"]]


def test_classes_go_by_their_names() -> None:
    shown, _ = samples(data_of(PIXELS, [1, 0], ("7", "owl")), run_info(8), stranger(), 2)
    assert [s.title for s in shown] == [["class 7", "image 1"], ["owl", "image 0"]]
    shown, _ = samples(data_of(PIXELS, [5, 6], ("7",)), run_info(8), stranger(), 2)
    assert [s.title[0] for s in shown] == ["class 5", "class 6"]


# ---------------------------------------------------------------- the normalisation


def test_any_straight_normalisation_is_undone_exactly() -> None:
    scale = torch.tensor([2.0, -0.5, 11.0], dtype=torch.float64).view(3, 1, 1)
    pixels = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    maker = Stranger({}, [pixels * scale - 1.5] * 2, scale=scale, shift=-1.5)
    found = normalisation(maker, (3, 8, 8))
    assert found is not None
    torch.testing.assert_close(found[0], torch.full((3, 1, 1), -1.5, dtype=torch.float64))
    torch.testing.assert_close(found[1], scale)
    shown, undone = samples(data_of(PIXELS), run_info(8), maker, 2)
    assert undone
    torch.testing.assert_close(shown[0].views[0], pixels[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "maker",
    [
        Stranger({}, [torch.randn(2, 3, 8, 8)] * 2, power=2.0),
        Stranger({}, [torch.randn(2, 3, 8, 8)] * 2, scale=torch.zeros(3, 1, 1)),
        Stranger({}, [torch.randn(2, 3, 8, 8)] * 2, scale=torch.rand(3, 8, 8)),
        Stranger({}, [torch.randn(2, 1, 8, 8)] * 2),
    ],
    ids=["curved", "constant", "uneven", "other channels"],
)
def test_other_normalisations_are_not_guessed(maker: Stranger) -> None:
    shown, undone = samples(data_of(PIXELS), run_info(8), maker, 2)
    assert not undone
    for view in (v for s in shown for v in s.views):
        assert (float(view.min()), float(view.max())) == (0.0, pytest.approx(1.0))
    draw(data_of(PIXELS), run_info(8), maker, "x")


# ---------------------------------------------------------------- the picture


def test_identical_views_are_marked_in_red() -> None:
    assert RED in colours(draw(*of_recipe("view_generator.use=identity"), "x"))
    assert RED not in colours(draw(*of_recipe(), "x"))
    alike = torch.rand(2, 3, 8, 8)
    almost = alike.clone()
    almost[:, 0, 3, 3] += 1e-3
    assert RED in colours(draw(data_of(PIXELS), run_info(8), Stranger({}, [alike, alike]), "x"))
    assert RED not in colours(draw(data_of(PIXELS), run_info(8), Stranger({}, [alike, almost]), "x"))


def test_a_difference_is_of_two_views_of_one_size() -> None:
    a, b, c = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 6, 6), torch.rand(2, 3, 6, 6)
    shown, _ = samples(data_of(PIXELS), run_info(8), Stranger({}, [a, b, c]), 2)
    assert shown[1].difference == (
        pytest.approx(float((b - c)[1].abs().max())),
        pytest.approx(float((b - c)[1].abs().mean())),
    )
    for lonely in ([a], [a, b]):
        assert samples(data_of(PIXELS), run_info(8), Stranger({}, lonely), 2)[0][0].difference is None
        draw(data_of(PIXELS), run_info(8), Stranger({}, lonely), "x")


def test_every_pixel_of_a_small_view_is_a_square_and_local_views_are_smaller() -> None:
    large = torch.zeros(1, 3, 8, 8)
    large[0, 0, 2, 5] = 1.0  # one red pixel
    small = torch.zeros(1, 3, 4, 4)
    small[0, 2, 1, 1] = 1.0  # one blue pixel
    image = draw(data_of(PIXELS[:1]), run_info(8), Stranger({}, [large, small]), "x", 1)
    counted = {colour: count for count, colour in image.getcolors(1 << 24)}  # type: ignore[union-attr]
    assert counted[255, 0, 0] == counted[0, 0, 255] == 18**2
    assert counted[0, 0, 0] == (8**2 - 1 + 4**2 - 1) * 18**2


def test_crops_are_outlined_on_the_original() -> None:
    boxes = torch.tensor([[[0, 0, 4, 4], [2, 1, 6, 5]]])
    black = torch.zeros(1, 3, 8, 8)
    data, run, views = data_of(black.byte()), run_info(8), [black, black + 0.1]
    with_boxes, without = (
        {colour: count for count, colour in draw(data, run, Stranger(p, views), "x", 1).getcolors(1 << 24)}  # type: ignore[union-attr]
        for p in ({"box": boxes}, {})
    )
    orange, zoom, wide = (0xBC, 0x4C, 0x00), 18, 2  # of the second view, which is drawn over the first one's
    height, width = 6 * zoom, 5 * zoom
    assert with_boxes[orange] - without[orange] == height * width - (height - 2 * wide) * (width - 2 * wide)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
def test_any_number_of_channels(channels: int) -> None:
    pixels = torch.randint(0, 256, (2, channels, 8, 8), dtype=torch.uint8)
    maker = Stranger({}, [torch.rand(2, channels, 8, 8)] * 2, scale=torch.ones(channels, 1, 1))
    draw(data_of(pixels), run_info(8, channels), maker, "x")


@pytest.mark.parametrize("side", [1, 7, 32, 96, 224, 640])
def test_a_picture_stays_of_a_size_to_look_at(side: int) -> None:
    pixels = torch.zeros(2, 3, side, side, dtype=torch.uint8)
    image = draw(data_of(pixels), run_info(side), Stranger({}, [torch.rand(2, 3, side, side)] * 2), "x" * 100)
    assert image.width <= 1400
    assert image.height <= 900


NAMES = st.sampled_from(
    ["box", "flip", "jitter", "order", "brightness", "hue", "blur", "blur_sigma", "a_b", "gain", "é"]
)
SHAPES = st.sampled_from([(), (0,), (2,), (2, 2), (2, 2, 4), (2, 4), (2, 2, 0), (2, 2, 3, 3), (5,), (2, 7)])
TYPES = st.sampled_from([torch.bool, torch.int64, torch.float32, torch.uint8, torch.complex64, torch.bfloat16])


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(NAMES, st.tuples(SHAPES, TYPES), max_size=6), st.sampled_from([0.0, 1.0, float("nan"), -3.0]))
def test_no_parameters_make_it_fail(kinds: dict[str, tuple[tuple[int, ...], torch.dtype]], value: float) -> None:
    number = 0.0 if value != value else value
    parameters = {
        name: torch.full(shape, value if dtype.is_floating_point else abs(number)).to(dtype)
        for name, (shape, dtype) in kinds.items()
    }
    data, run = data_of(PIXELS), run_info(8)
    draw(data, run, stranger(**parameters), "x", 2)


def test_numbers_instead_of_tensors_are_written_too() -> None:
    shown, _ = samples(data_of(PIXELS), run_info(8), stranger(strength=0.5, angles=[[1, 2], [3, 4]]), 2)
    assert shown[1].common == ["strength 0.5"]
    assert [s.words for s in shown] == [[["angles 1"], ["angles 2"]], [["angles 3"], ["angles 4"]]]


def test_views_that_are_not_finite_are_drawn_and_marked() -> None:
    views = [torch.full((2, 3, 8, 8), float("nan")), torch.rand(2, 3, 8, 8)]
    assert RED in colours(draw(data_of(PIXELS), run_info(8), Stranger({}, views), "x"))


# ---------------------------------------------------------------- words


def said(side: int = 32, **values: Any) -> list[str]:
    return words({name: torch.as_tensor(value) for name, value in values.items()}, (side, side))


def test_what_the_crops_draw_reads_well() -> None:
    colour = {"brightness": 1.21, "contrast": 0.8, "saturation": 1.0, "hue": -0.05}
    assert said(
        box=[0, 8, 16, 24], flip=True, jitter=True, order=[3, 1, 0, 2], **colour, grayscale=False, blur=True,
        blur_sigma=0.834, solarize=True,
    ) == [
        "crop 38% of area", "flip", "hue -18°", "contrast x 0.80", "brightness x 1.21", "saturation x 1.00",
        "blur sigma 0.834", "solarize",
    ]  # fmt: skip
    assert said(flip=False, jitter=False, order=[0, 1, 2, 3], **colour, blur=False, blur_sigma=0.8) == []


def test_grey_views_have_no_colours_to_change() -> None:
    drawn_for = {"jitter": True, "order": [3, 1, 0, 2], "brightness": 1.21, "contrast": 0.8, "saturation": 1.0,
                 "hue": 0.0, "grayscale": True, "solarize": True}  # fmt: skip
    values = {name: torch.as_tensor(value) for name, value in drawn_for.items()}
    assert words(values, (8, 8), grey=True) == ["contrast x 0.80", "brightness x 1.21", "solarize"]
    parameters = {name: value.expand(1, 2, *value.shape) for name, value in values.items()}
    for channels in (1, 3):
        maker = Stranger(parameters, [torch.rand(1, channels, 8, 8)] * 2, scale=torch.ones(channels, 1, 1))
        pixels = torch.zeros(1, channels, 8, 8, dtype=torch.uint8)
        ((shown,), _) = samples(data_of(pixels), run_info(8, channels), maker, 1)
        assert [any("hue" in line for line in view) for view in shown.words] == [channels == 3] * 2


def test_what_is_only_called_alike_is_written_as_numbers() -> None:
    assert said(box=[0.0, 0.0, 1.0, 1.0]) == ["box 0 0 1 1"]
    assert said(box=[4, 4, 40, 8]) == ["box 4 4 40 8"]
    assert said(hue=0.5, brightness=2.0) == ["hue 0.5", "brightness 2"]
    assert said(order=[2, 0, 1], jitter=True) == ["order 2 0 1", "jitter"]


def test_other_parameters_are_written_by_their_names() -> None:
    assert said(rotation=-4.256, shift=[0.04196, -0.0487], gray_weights=[0.2, 0.8], grayscale=True) == [
        "rotation -4.26", "shift 0.042 -0.049", "gray weights 0.2 0.8", "grayscale",
    ]  # fmt: skip
    assert said(gray_weights=[0.2, 0.8], grayscale=False) == []
    assert said(kernel=torch.arange(9.0).view(3, 3)) == ["kernel (3 x 3 numbers, 0 to 8)"]
    assert said(mask=[True, False]) == ["mask yes no"]


def test_parameters_of_views_and_of_images_are_told_apart() -> None:
    parameters = {"a": torch.arange(6).view(3, 2), "b": torch.arange(3), "c": torch.arange(12).view(3, 4)}
    own, common = drawn(parameters, 1, 3, 2)
    assert [{n: v.tolist() for n, v in values.items()} for values in own] == [{"a": 2}, {"a": 3}]
    assert {n: v.tolist() for n, v in common.items()} == {"b": 1, "c": [4, 5, 6, 7]}


def test_a_box_is_inside_the_image() -> None:
    assert box({"box": torch.tensor([1, 2, 3, 4])}, (4, 6)) == (1, 2, 3, 4)
    assert box({"box": torch.tensor([1, 2, 3, 4])}, (4, 5)) is None
    assert box({"box": torch.tensor([1, 2, 0, 4])}, (9, 9)) is None
    assert box({}, (9, 9)) is None


# ---------------------------------------------------------------- files


def test_the_file_is_written_in_one_piece(tmp_path: Path) -> None:
    data, run, views = of_recipe()
    write(data, run, views, "tiny", tmp_path / "views.png")
    with Image.open(tmp_path / "views.png") as image:
        assert image.format == "PNG"
        assert image.tobytes() == draw(data, run, views, "tiny").tobytes()
    assert [p.name for p in tmp_path.iterdir()] == ["views.png"]
    with pytest.raises(RunFailed, match=r"views\.png: cannot be written"):
        write(data, run, views, "tiny", tmp_path / "gone" / "views.png")


@pytest.mark.parametrize("name", ["views.png", "views.JPG", "views.jpeg"])
def test_show_draws_a_recipe(tiny: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    show(str(tiny), ["view_generator.use=identity"], tmp_path / name, 3)
    assert capsys.readouterr().out == f"{tmp_path / name}: 3 images, 2 views of each\n"
    with Image.open(tmp_path / name) as image:
        assert image.format == ("PNG" if name.endswith("png") else "JPEG")


def test_show_builds_no_network(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sslkit_convnet.ConvNet.build", None)
    show(str(tiny), [], tmp_path / "views.png", 1)
    with pytest.raises(RunFailed, match="failed to build"):
        build(parse_recipe(TINY, "r.toml"), torch.device("cpu"), print)


@pytest.mark.parametrize(
    ("out", "images", "told"),
    [
        ("views.txt", 6, r"views\.txt: should end in \.png or \.jpg"),
        ("views", 6, "should end in"),
        ("gone/views.png", 6, r"views\.png: cannot be written: No such file"),
        ("views.png", 0, "--images 0: should be 1 or more"),
    ],
)
def test_show_says_what_is_wrong_in_one_line(tiny: Path, tmp_path: Path, out: str, images: int, told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        show(str(tiny), [], tmp_path / out, images)
    assert len(error.value.lines) == 1
