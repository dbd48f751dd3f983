"""What sslkit asks of every loss, the recipe, and the formula."""

from pathlib import Path

import pytest
import sslkit_spectral.maths
import torch
from sslkit_spectral import Spectral
from torch import Tensor

import sslkit.testing
from sslkit.api import Branches, LossTerms, ViewSpec
from sslkit.recipe import read_recipe


@sslkit.testing.parametrize(Spectral(), Spectral(mu=4.0))
def test_conforms(check: sslkit.testing.Check) -> None:
    """One test for each check; a failure says what to change."""
    check()


def test_the_recipe_names_it() -> None:
    """Every key of the recipe is right, and the component is in it."""
    recipe = read_recipe(str(Path(__file__).parents[1] / "recipe.toml"))
    used = [part["component"] for part in recipe.provenance()]
    assert "loss.spectral" in used


def computed(mu: float, *views: Tensor) -> LossTerms:
    nothing: list[Tensor | None] = [None] * len(views)
    specs = (ViewSpec(32),) * len(views)
    branches = Branches(specs, nothing, list(views), nothing, nothing)
    terms: LossTerms = sslkit_spectral.maths.SpectralLoss(mu)(branches)
    return terms


@pytest.mark.parametrize("mu", [0.5, 1.0, 1000.0])
def test_equals_the_papers_formula_written_out(mu: float) -> None:
    """Equation 6, pair by pair, with projections shortened to sqrt(mu)."""
    generator = torch.Generator().manual_seed(0)
    one, two = (torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    a, b = ([row * min(1.0, mu**0.5 / float(row.norm())) for row in z] for z in (one, two))
    positive = sum(float(a[i] @ b[i]) for i in range(6)) / 6
    negative = sum(float(a[i] @ b[j]) ** 2 for i in range(6) for j in range(6) if i != j) / 30
    terms = computed(mu, one, two)
    assert float(terms.total) == pytest.approx(-2 * positive + negative, rel=1e-12)
    assert float(terms.terms["attraction"]) == pytest.approx(-2 * positive, rel=1e-12)


def test_more_views_are_the_mean_over_pairs() -> None:
    """Three views make three pairs."""
    one, two, three = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pairs = [computed(1.0, *pair).total for pair in ((one, two), (one, three), (two, three))]
    assert float(computed(1.0, one, two, three).total) == pytest.approx(float(torch.stack(pairs).mean()), rel=1e-12)


def test_orthogonal_images_are_better_than_equal_ones() -> None:
    """A constant output gains 2 and pays 1 for it, orthogonal outputs pay nothing."""
    constant = torch.eye(4)[[0, 0, 0, 0]]
    assert float(computed(1.0, constant, constant).total) == pytest.approx(-1)
    assert float(computed(1.0, torch.eye(4), torch.eye(4)).total) == pytest.approx(-2)
