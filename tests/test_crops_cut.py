"""Views cut from images of any size: boxes as torchvision draws them, pixels as torchvision and Pillow make them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import generator, run_info
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from sslkit_crops import Identity, MultiCrop, TwoCrops, ViewGroup, geometry
from sslkit_crops.cutting import cut

SIZES = st.tuples(st.integers(1, 300), st.integers(1, 300))


def picture(height: int, width: int, channels: int = 3, seed: int = 0) -> Tensor:
    """Soft structure with some noise on it, as photographs have."""
    drawn = torch.rand(1, channels, max(2, height // 9), max(2, width // 9), generator=generator(seed))
    smooth = torch.nn.functional.interpolate(drawn, size=(height, width), mode="bilinear")[0]
    return (255 * (0.9 * smooth + 0.1 * torch.rand(smooth.shape, generator=generator(seed + 1)))).to(torch.uint8)


def boxes_in(height: int, width: int, n: int = 40, seed: int = 0) -> list[list[int]]:
    sizes = torch.tensor([height, width]).expand(n, 2)
    return geometry.Boxes([(0.08, 1.0)], [(3 / 4, 4 / 3)]).draw(sizes, generator(seed)).view(-1, 4).tolist()


# ---------------------------------------------------------------- what is drawn


@pytest.mark.parametrize("size", [(60, 200), (200, 60), (97, 111)])
@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (0.2, 3.0)])
def test_boxes_are_distributed_as_torchvisions(size: tuple[int, int], ratio: tuple[float, float]) -> None:
    n = 2000
    sizes = torch.tensor(size).expand(n, 2)
    ours = geometry.Boxes([(0.08, 1.0)] * 2, [ratio] * 2).draw(sizes, generator()).view(-1, 4).double()
    torch.manual_seed(0)
    drawn = [RandomResizedCrop.get_params(torch.empty(3, *size), [0.08, 1.0], list(ratio)) for _ in range(2 * n)]
    theirs = torch.tensor(drawn, dtype=torch.float64)
    for of in (*(lambda b, k=k: b[:, k] for k in range(4)), lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2]):
        a, b = of(ours), of(theirs)
        grid = torch.cat([a, b]).unique()
        below = [(x[None] <= grid[:, None]).double().mean(1) for x in (a, b)]
        # Two-sample Kolmogorov-Smirnov, both samples 2n: 1.95 * sqrt(2 / 2n) would be passed once in 1000.
        assert (below[0] - below[1]).abs().max() < 1.95 * math.sqrt(1 / n)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(SIZES, min_size=1, max_size=20),
    scale=st.tuples(st.floats(0.001, 1.0), st.floats(0.001, 1.0)).map(sorted),
    ratio=st.tuples(st.floats(0.05, 20.0), st.floats(0.05, 20.0)).map(sorted),
    seed=st.integers(0, 10**6),
)
def test_boxes_lie_within_their_own_images(sizes: list, scale: list, ratio: list, seed: int) -> None:
    given_sizes = torch.tensor(sizes, dtype=torch.int32)
    boxes = geometry.Boxes([tuple(scale)] * 2, [tuple(ratio)] * 2).draw(given_sizes, generator(seed))
    top, left, height, width = boxes.unbind(-1)
    assert min(top.min(), left.min()) >= 0
    assert min(height.min(), width.min()) >= 1
    assert ((top + height) <= given_sizes[:, :1]).all()
    assert ((left + width) <= given_sizes[:, 1:]).all()


@settings(max_examples=60, deadline=None)
@given(size=SIZES, ratio=st.tuples(st.floats(0.2, 4.0), st.floats(0.2, 4.0)).map(sorted))
def test_a_box_that_never_fits_is_central_as_in_torchvision(size: tuple[int, int], ratio: list) -> None:
    ours = geometry.Boxes([(1.0, 1.0)], [tuple(ratio)])._central(torch.tensor([size]))[0, 0].tolist()
    # An area beyond the image never fits; torchvision then takes its fallback, which may be empty where ours is 1 px.
    theirs = RandomResizedCrop.get_params(torch.empty(3, *size), [9.0, 9.0], list(ratio))
    if min(theirs[2:]) > 0:
        assert ours == list(theirs)
    assert min(ours[2:]) >= 1


@pytest.mark.parametrize("spec", [
    TwoCrops(size=24, scale=(0.2, 0.9)),
    MultiCrop(views=(ViewGroup(count=2), ViewGroup(count=3, size=12, kind="local", scale=(0.05, 0.4)))),
    Identity(views=3),
])  # fmt: skip
@pytest.mark.parametrize("side", [32, 97])
def test_squares_draw_what_they_draw_as_squares(spec, side: int) -> None:  # type: ignore[no-untyped-def]
    maker = spec.build(run_info(side))
    plain = maker.draw(50, generator(3))
    sized = maker.draw_sized(torch.full((50, 2), side, dtype=torch.int32), generator(3))
    assert plain.keys() == sized.keys()
    assert all(torch.equal(plain[name], sized[name]) for name in plain)


def test_a_row_depends_on_its_own_image_alone() -> None:
    maker = TwoCrops().build(run_info())
    sizes = torch.tensor([[40, 90], [300, 20], [64, 64], [5, 7]])
    others = sizes.clone()
    others[1] = torch.tensor([11, 500])
    one, two = maker.draw_sized(sizes, generator()), maker.draw_sized(others, generator())
    kept = torch.tensor([0, 2, 3])
    assert all(torch.equal(one[name][kept], two[name][kept]) for name in one)
    assert not torch.equal(one["box"][1], two["box"][1])


# ---------------------------------------------------------------- what is cut


@pytest.mark.parametrize("channels", [1, 3, 4, 7])
@pytest.mark.parametrize("shape", [(60, 200), (213, 97)])
def test_a_crop_is_torchvisions_to_the_last_bit(channels: int, shape: tuple[int, int]) -> None:
    original = picture(*shape, channels)
    for number, box in enumerate(boxes_in(*shape)):
        theirs = F.resized_crop(original, *box, [48, 48], InterpolationMode.BICUBIC, antialias=True)
        theirs = F.horizontal_flip(theirs) if number % 2 else theirs
        assert torch.equal(cut(original, box, 48, bool(number % 2)), theirs)


@pytest.mark.parametrize("shape", [(60, 200), (213, 97)])
def test_a_crop_is_pillows_within_two_levels(shape: tuple[int, int]) -> None:
    original = picture(*shape)
    whole = Image.fromarray(original.permute(1, 2, 0).numpy())
    for top, left, height, width in boxes_in(*shape):
        part = whole.crop((left, top, left + width, top + height)).resize((48, 48), Image.Resampling.BICUBIC)
        gap = cut(original, (top, left, height, width), 48).int() - torch.from_numpy(np.array(part)).permute(2, 0, 1)
        assert gap.abs().max() <= 2
        assert gap.double().abs().mean() < 0.3


@pytest.mark.parametrize("size", [16, 48, 150])
def test_a_crop_of_a_square_is_that_of_the_square_path_but_for_rounding(size: int) -> None:
    maker = TwoCrops(size=size).build(run_info(97))
    originals = torch.stack([picture(97, 97, seed=seed) for seed in range(12)])
    p = maker.draw(12, generator(1))
    squares = maker.crop(originals, p)
    for i, original in enumerate(originals):
        own = maker.cut(original, {name: values[i] for name, values in p.items()})
        for v, crop in enumerate(own):
            assert crop.dtype == torch.uint8
            # Half a level by rounding, and some more by weights of 8 bits in two passes.
            assert (crop.float() - 255 * squares[v][i]).abs().max() < 2
            assert (crop.float() - 255 * squares[v][i]).mean().abs() < 0.2


def test_a_crop_of_the_views_own_size_is_untouched_and_gives_the_same_view() -> None:
    maker = TwoCrops(size=20, scale=(1.0, 1.0), ratio=(1.0, 1.0)).build(run_info(20))
    originals = torch.stack([picture(20, 20, seed=seed) for seed in range(9)])
    p = maker.draw(9, generator(1))
    rows = [maker.cut(o, {name: values[i] for name, values in p.items()}) for i, o in enumerate(originals)]
    stacked = [torch.stack(crops).float() / 255 for crops in zip(*rows, strict=True)]
    for view, whole in zip(maker.appear(stacked, p), maker.appear(maker.crop(originals, p), p), strict=True):
        assert torch.allclose(view, whole, rtol=1e-5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(size=SIZES, out=st.integers(1, 70), channels=st.integers(1, 16), seed=st.integers(0, 1000))
def test_any_image_gives_crops_of_the_views_size(size: tuple[int, int], out: int, channels: int, seed: int) -> None:
    colour = {} if channels in (1, 3) else {"saturation": 0.0, "hue": 0.0, "grayscale": 0.0}
    maker = TwoCrops(size=out, blur=(0.0, 0.0), **colour).build(run_info(32, channels))
    original = picture(*size, channels, seed)
    before = original.clone()
    p = maker.draw_sized(torch.tensor([size]), generator(seed))
    crops = maker.cut(original, {name: values[0] for name, values in p.items()})
    assert [tuple(crop.shape) for crop in crops] == [(channels, out, out)] * 2
    assert torch.equal(original, before)
    views = maker.appear([crop[None].float() / 255 for crop in crops], p)
    assert all(view.isfinite().all() for view in views)
    flat = torch.full_like(original, 77)
    assert all((crop == 77).all() for crop in maker.cut(flat, {name: values[0] for name, values in p.items()}))


@pytest.mark.parametrize("channels", [2, 5, 16])
def test_bands_are_cut_each_as_if_it_were_alone(channels: int) -> None:
    original = picture(80, 130, channels)
    for box in boxes_in(80, 130, 10):
        alone = [cut(original[c : c + 1].contiguous(), box, 32) for c in range(channels)]
        # One band and four go through other code of torch's, with weights of as many bits.
        assert (cut(original, box, 32).int() - torch.cat(alone).int()).abs().max() <= 1


def test_views_of_several_sizes_have_theirs() -> None:
    maker = MultiCrop(views=(ViewGroup(count=2, size=40), ViewGroup(count=3, size=12, kind="local"))).build(run_info())
    p = maker.draw_sized(torch.tensor([[70, 110]]), generator())
    crops = maker.cut(picture(70, 110), {name: values[0] for name, values in p.items()})
    assert [crop.shape[-1] for crop in crops] == [40, 40, 12, 12, 12]


def test_the_identity_shows_the_square_in_the_middle() -> None:
    maker = Identity().build(run_info(30))
    original = picture(30, 80)
    one, two = maker.cut(original, maker.draw_sized(torch.tensor([[30, 80]]), generator()))
    assert torch.equal(one, original[:, :, 25:55])
    assert torch.equal(one, two)
    small = cut(picture(90, 120), (0, 15, 90, 90), 30)
    assert torch.equal(maker.cut(picture(90, 120), {})[0], small)
