"""W-MSE: whitening against its definition and lightly's, the cutting of the batch, and what cannot be whitened."""

from __future__ import annotations

import pytest
import torch
from conftest import run_info
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from test_covariance import branches, vectors
from torch import Tensor

from sslkit.errors import UserError
from sslkit_covariance import WMSE
from sslkit_covariance.w_mse import WMSELoss, whitened

seeds = st.integers(0, 2**31 - 1)
DIM, SUB, BATCH = 4, 10, 30


def loss(dim: int = DIM, batch: int = BATCH, sub_batch: int = SUB, iterations: int = 1, eps: float = 0.0) -> WMSELoss:
    module = WMSE(sub_batch=sub_batch, iterations=iterations, eps=eps).build(dim, run_info(batch_size=batch))
    assert isinstance(module, WMSELoss)
    return module


def by_formula(views: list[Tensor], orders: list[Tensor], sub_batch: int, eps: float) -> Tensor:
    """Image by image and pair by pair; the inverse of the Cholesky factor is written out."""
    total, count = torch.zeros((), dtype=views[0].dtype), 0
    for order in orders:
        white = [torch.empty_like(z) for z in views]
        for part in order.split(sub_batch):
            for z, w in zip(views, white, strict=True):
                mean = z[part].mean(0)
                covariance = sum(torch.outer(z[k] - mean, z[k] - mean) for k in part) / (sub_batch - 1)
                shrunk = (1 - eps) * covariance + eps * torch.eye(z.shape[1], dtype=z.dtype)
                matrix = torch.linalg.inv(torch.linalg.cholesky(shrunk))
                for k in part:
                    w[k] = matrix @ (z[k] - mean)
        for i in range(len(views)):
            for j in range(i):
                for a, b in zip(white[i], white[j], strict=True):
                    total = total + (a / a.norm() - b / b.norm()).square().sum()
                    count += 1
    return total / count


def assert_same(total: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(total, expected, rtol=1e-10, atol=1e-10)
    theirs = torch.autograd.grad(expected, inputs)
    for a, b in zip(torch.autograd.grad(total, inputs), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("views", "iterations", "eps"), [(2, 1, 0.0), (2, 2, 0.1), (4, 1, 0.0)])
def test_value_and_gradient_are_the_formula(views: int, iterations: int, eps: float):
    projections = vectors(views, n=BATCH, d=DIM)
    torch.manual_seed(3)
    orders = [torch.randperm(BATCH) for _ in range(iterations)]
    expected = by_formula(projections, orders, SUB, eps)
    torch.manual_seed(3)
    total = loss(iterations=iterations, eps=eps)(branches(projections)).total  # type: ignore[arg-type]
    assert_same(total, expected, projections)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("views", "iterations", "eps"), [(2, 1, 0.0), (2, 3, 1e-2), (4, 2, 0.0)])
def test_against_lightly(views: int, iterations: int, eps: float):
    pytest.importorskip("lightly")
    from lightly.loss.wmse_loss import WMSELoss as Theirs

    theirs = Theirs(embedding_dim=DIM, w_size=SUB, w_iter=iterations, eps=eps, num_samples=views).double()
    projections = vectors(views, n=BATCH, d=DIM)
    torch.manual_seed(3)
    expected = theirs(torch.cat(projections))
    torch.manual_seed(3)
    total = loss(iterations=iterations, eps=eps)(branches(projections)).total  # type: ignore[arg-type]
    assert_same(total, expected, projections)


@given(seed=seeds, n=st.integers(6, 20))
@settings(deadline=None, max_examples=30)
def test_whitened_parts_have_mean_zero_and_covariance_one(seed: int, n: int):
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn(2, 3, n, 4, dtype=torch.float64, generator=generator)
    parts = parts @ torch.randn(4, 4, dtype=torch.float64, generator=generator) + 2
    white, condition = whitened(parts, 0.0)
    centred = parts - parts.mean(-2, keepdim=True)
    covariance = centred.mT @ centred / (n - 1)
    exact = torch.linalg.cond(covariance).max()
    tolerance = 1e-12 * exact.item() + 1e-10
    torch.testing.assert_close(white.mean(-2), torch.zeros(2, 3, 4, dtype=torch.float64), atol=tolerance, rtol=0)
    torch.testing.assert_close(
        white.mT @ white / (n - 1), torch.eye(4, dtype=torch.float64).expand(2, 3, 4, 4), atol=tolerance, rtol=0
    )
    assert 1 <= condition <= exact * (1 + 1e-6)


@given(seed=seeds)
@settings(deadline=None, max_examples=20)
def test_shift_scale_and_whatever_cholesky_takes_out_do_not_matter(seed: int):
    a, b = (z.detach() for z in vectors(n=BATCH, d=DIM, seed=seed))
    triangular = torch.randn(DIM, DIM, dtype=a.dtype, generator=torch.Generator().manual_seed(seed)).tril(-1) / 2
    triangular += torch.diag(torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=a.dtype))
    totals = []
    for views in ([a, b], [a @ triangular.T + 7, b], [5 * a, b - 1]):
        torch.manual_seed(0)
        totals.append(loss()(branches(views)).total)
    torch.testing.assert_close(totals[1], totals[0])
    torch.testing.assert_close(totals[2], totals[0])


def test_range():
    (a, _) = vectors(n=BATCH, d=DIM)
    same = loss()(branches([a, a]))
    torch.testing.assert_close(same.total, torch.zeros((), dtype=a.dtype), atol=1e-10, rtol=0)
    assert same.terms["cosine"].item() == pytest.approx(1)
    assert loss()(branches([a, -a])).total.item() == pytest.approx(4)


def test_the_cut_comes_from_the_default_generator():
    projections = vectors(n=BATCH, d=DIM)
    totals = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        totals.append(loss()(branches(projections)).total.item())  # type: ignore[arg-type]
    assert totals[0] == totals[1] != totals[2]


def test_each_iteration_cuts_anew():
    projections = vectors(n=BATCH, d=DIM)
    torch.manual_seed(0)
    singles = [loss()(branches(projections)).total for _ in range(3)]  # type: ignore[arg-type]
    torch.manual_seed(0)
    torch.testing.assert_close(loss(iterations=3)(branches(projections)).total, torch.stack(singles).mean())  # type: ignore[arg-type]
    assert singles[0] != singles[1]


def test_condition_tells_of_covariances_that_float32_cannot_whiten():
    (a, b) = (z.detach().float() for z in vectors(n=BATCH, d=DIM))
    assert loss()(branches([a, b])).terms["condition"] < 1e5
    a[:, 1] = a[:, 0] + 1e-3 * a[:, 1]
    terms = loss()(branches([a, b])).terms
    assert terms["condition"] > 1e5
    assert not terms["condition"].requires_grad


def test_a_covariance_without_a_factor_gives_nan_rather_than_an_error():
    (a, b) = vectors(n=BATCH, d=DIM)
    terms = loss()(branches([torch.ones(BATCH, DIM), b.float()]))
    assert terms.total.isnan()
    assert loss(eps=1e-3)(branches([torch.ones(BATCH, DIM), b.float()])).total.isfinite()
    assert loss()(branches([a, b])).total.isfinite()


def test_no_part_is_whitened_with_what_is_left_of_a_failed_factorisation():
    parts = torch.randn(50, SUB, DIM, generator=torch.Generator().manual_seed(0))
    parts[..., 2] = parts[..., 0] + parts[..., 1]  # singular but for rounding, which may leave a negative pivot
    centred = parts - parts.mean(-2, keepdim=True)
    _, failed = torch.linalg.cholesky_ex(centred.mT @ centred / (SUB - 1))
    assert 0 < (failed > 0).sum() < 50
    white, _ = whitened(parts, 0.0)
    assert white[failed > 0].isnan().all()
    assert white[failed == 0].isfinite().all()


@pytest.mark.parametrize("sub_batch", [DIM - 1, DIM])
def test_too_few_images_for_the_width_are_refused(sub_batch: int):
    with pytest.raises(UserError, match=rf"^loss\.sub_batch: is {sub_batch}, .* {DIM} dimensions"):
        loss(sub_batch=sub_batch, batch=12 * sub_batch)
    loss(sub_batch=DIM + 1, batch=DIM + 1)


def test_a_batch_that_is_no_multiple_is_refused():
    with pytest.raises(UserError, match=r"^loss\.sub_batch: 10 does not divide the batch of 32 images"):
        loss(batch=32)
    with pytest.raises(UserError, match="does not divide the batch of 12 images"):
        loss()(branches(vectors(n=12, d=DIM)))  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"eps": 1.0}, {"eps": -0.1}, {"iterations": 0}, {"sub_batch": 0}])
def test_wrong_options_are_refused(options: dict[str, float]):
    with pytest.raises(ValidationError):
        WMSE(**options)  # type: ignore[arg-type]
