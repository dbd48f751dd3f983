"""What sslkit asks of every view generator, the recipe, and what is hidden."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from sslkit_grid_mask import GridMask
from sslkit_grid_mask.views import GridMaskMaker

import sslkit.testing
from sslkit.recipe import read_recipe
from sslkit_affine import Affine


@sslkit.testing.parametrize(GridMask(over=Affine()))
def test_conforms(check: sslkit.testing.Check) -> None:
    """One test for each check; a failure says what to change."""
    check()


def test_the_recipe_names_it() -> None:
    """Every key of the recipe is right, and the component is in it, with the generator that it masks."""
    recipe = read_recipe(str(Path(__file__).parents[1] / "recipe.toml"))
    used = [part["component"] for part in recipe.provenance()]
    assert {"view_generator.grid_mask", "view_generator.affine"} <= set(used)


def views(options: GridMask, n: int = 64) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The views of random images, and which of their pixels are hidden."""
    maker = options.build(sslkit.testing.run_info())
    assert isinstance(maker, GridMaskMaker)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (n, 3, 32, 32), generator=generator, dtype=torch.uint8)
    parameters = maker.draw(n, generator)
    made = maker.appear(maker.crop(images, parameters), parameters)
    return made, [maker.hidden(view, number, parameters) for number, view in enumerate(made)]


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8])
def test_a_grid_hides_the_papers_share_of_the_picture(keep: float) -> None:
    """(1 - r)^2 of each unit, and so of the picture."""
    _, hidden = views(GridMask(over=Affine(), keep=keep, probability=1.0), n=512)
    for mask in hidden:
        assert float(mask.float().mean()) == pytest.approx((1 - keep) ** 2, abs=0.02)


def test_hidden_pixels_are_the_mean_and_the_others_as_they_were() -> None:
    """The same draws with and without a mask differ where it is, and nowhere else."""
    masked, hidden = views(GridMask(over=Affine(), probability=1.0))
    plain, none = views(GridMask(over=Affine(), probability=0.0))
    assert not any(mask.any() for mask in none)
    for with_mask, without, mask in zip(masked, plain, hidden, strict=True):
        assert torch.equal(with_mask, without.masked_fill(mask, 0))


def test_how_often_a_view_is_masked() -> None:
    """In about `probability` of the views, drawn for each alone."""
    _, hidden = views(GridMask(over=Affine(), probability=0.25), n=1024)
    one, two = (mask.flatten(1).any(1).float() for mask in hidden)
    assert float(one.mean()) == pytest.approx(0.25, abs=0.05)
    assert float((one * two).mean()) == pytest.approx(0.25**2, abs=0.03)


def test_sizes_out_of_order_are_refused() -> None:
    """As a mistake of the recipe, before anything is built."""
    with pytest.raises(ValidationError, match="at most 'largest'"):
        GridMask(over=Affine(), smallest=0.5, largest=0.25)
