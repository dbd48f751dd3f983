"""Heads: the layers that the papers list, and IterNorm against its formula and against an eigendecomposition."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from sslkit.api import RunInfo
from sslkit_mlp import MLP, Identity
from sslkit_mlp.iter_norm import IterNorm

RUN = RunInfo(0, "cpu", 32, 3, (0.5,) * 3, (0.25,) * 3, 1000, 1000, 10, 100)


def layers(head: nn.Module) -> list[tuple[Any, ...]]:
    """Each layer as (kind, sizes, has a bias or scale)."""
    listed: list[tuple[Any, ...]] = []
    for module in head.children():
        if isinstance(module, nn.Linear):
            listed.append(("linear", module.in_features, module.out_features, module.bias is not None))
        elif isinstance(module, nn.BatchNorm1d):
            listed.append(("batchnorm", module.num_features, module.affine))
        elif isinstance(module, IterNorm):
            listed.append(("iternorm", len(module.weight)))
        else:
            listed.append((type(module).__name__.lower(),))
    return listed


def test_defaults_are_byols():
    head = MLP().build(2048, RUN)
    assert layers(head) == [
        ("linear", 2048, 4096, True),
        ("batchnorm", 4096, True),
        ("relu",),
        ("linear", 4096, 256, False),
    ]
    assert head.out_dim == 256


def test_simsiam():
    projector = MLP(layers=3, hidden_dim=2048, out_dim=2048, bias=False, output_norm="batch_no_affine")
    assert layers(projector.build(512, RUN)) == [
        ("linear", 512, 2048, False),
        ("batchnorm", 2048, True),
        ("relu",),
        ("linear", 2048, 2048, False),
        ("batchnorm", 2048, True),
        ("relu",),
        ("linear", 2048, 2048, False),
        ("batchnorm", 2048, False),
    ]
    predictor = MLP(hidden_dim=512, out_dim=2048, bias=False, output_bias=True)
    assert layers(predictor.build(2048, RUN)) == [
        ("linear", 2048, 512, False),
        ("batchnorm", 512, True),
        ("relu",),
        ("linear", 512, 2048, True),
    ]


@pytest.mark.filterwarnings("ignore")
def test_against_lightlys_heads():
    pytest.importorskip("lightly")
    from lightly.models.modules.heads import BYOLProjectionHead, SimSiamPredictionHead

    theirs = BYOLProjectionHead(64, 128, 32).layers
    ours = MLP(hidden_dim=128, out_dim=32, bias=False, output_bias=True).build(64, RUN)
    assert layers(ours) == layers(theirs)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(16, 64)
    torch.testing.assert_close(ours(x), theirs(x))
    predictor = MLP(hidden_dim=16, out_dim=64, bias=False, output_bias=True).build(64, RUN)
    assert layers(predictor) == layers(SimSiamPredictionHead(64, 16, 64).layers)


def test_simclr_and_moco_v2():
    head = MLP(hidden_norm="none", hidden_dim=2048, out_dim=128, output_bias=True)
    assert layers(head.build(2048, RUN)) == [("linear", 2048, 2048, True), ("relu",), ("linear", 2048, 128, True)]


def test_barlow_twins_vicreg_and_vibcreg():
    barlow = MLP(layers=3, hidden_dim=512, out_dim=256, bias=False)
    assert layers(barlow.build(64, RUN)) == [
        ("linear", 64, 512, False),
        ("batchnorm", 512, True),
        ("relu",),
        ("linear", 512, 512, False),
        ("batchnorm", 512, True),
        ("relu",),
        ("linear", 512, 256, False),
    ]
    vicreg = layers(MLP(layers=3, hidden_dim=512, out_dim=256).build(64, RUN))
    assert [layer for layer in vicreg if layer[0] == "linear"] == [
        ("linear", 64, 512, True),
        ("linear", 512, 512, True),
        ("linear", 512, 256, False),
    ]
    vibcreg = MLP(layers=3, hidden_dim=512, out_dim=256, output_bias=True, output_norm="iter")
    assert layers(vibcreg.build(64, RUN))[-2:] == [("linear", 512, 256, True), ("iternorm", 256)]


@pytest.mark.filterwarnings("ignore")
def test_moco_v2_against_lightly():
    pytest.importorskip("lightly")
    from lightly.models.modules.heads import MoCoProjectionHead

    theirs = MoCoProjectionHead(64, 128, 32).layers
    ours = MLP(hidden_norm="none", hidden_dim=128, out_dim=32, output_bias=True).build(64, RUN)
    assert layers(ours) == layers(theirs)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(16, 64)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("norm", ["layer", "none"])
def test_without_batch_statistics_images_do_not_see_each_other(norm: str):
    head = MLP(hidden_dim=32, out_dim=8, hidden_norm=norm).build(16, RUN)  # type: ignore[arg-type]
    assert not any(isinstance(m, nn.BatchNorm1d) for m in head.modules())
    assert any(isinstance(m, nn.LayerNorm) for m in head.modules()) == (norm == "layer")
    x = torch.randn(6, 16)
    torch.testing.assert_close(head(x)[:1], head(x[:1]))


def test_one_layer_is_linear():
    head = MLP(layers=1, out_dim=10, output_bias=True).build(7, RUN)
    assert layers(head) == [("linear", 7, 10, True)]


@pytest.mark.parametrize("norm", ["batch", "batch_no_affine"])
def test_output_norm_standardises_each_dimension(norm: str):
    head = MLP(hidden_dim=32, out_dim=8, output_norm=norm).build(16, RUN)  # type: ignore[arg-type]
    out = head(3 * torch.randn(256, 16, generator=torch.Generator().manual_seed(0)) + 1)
    torch.testing.assert_close(out.mean(0), torch.zeros(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.var(0, unbiased=False), torch.ones(8), atol=1e-2, rtol=0)


def test_a_bias_before_batchnorm_changes_nothing():
    with_bias = MLP(hidden_dim=32, out_dim=8).build(16, RUN)
    without = MLP(hidden_dim=32, out_dim=8, bias=False).build(16, RUN)
    without.load_state_dict({k: v for k, v in with_bias.state_dict().items() if k != "0.bias"})
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(with_bias(x), without(x))


def test_identity_passes_on():
    head = Identity().build(384, RUN)
    x = torch.randn(3, 384)
    assert head(x) is x
    assert head.out_dim == 384
    assert list(head.parameters()) == []


@pytest.mark.parametrize(
    "options",
    [{"layers": 0}, {"hidden_dim": 0}, {"out_dim": -1}, {"output_norm": "layer"}, {"hidden_norm": "iter"}],
)
def test_wrong_options_are_refused(options: dict[str, Any]):
    with pytest.raises(ValidationError):
        MLP(**options)


# ---------------------------------------------------------------- IterNorm


def correlated(n: int = 40, width: int = 6, seed: int = 0) -> Tensor:
    """Float64 vectors whose dimensions depend on each other."""
    drawn = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=drawn, dtype=torch.float64)
    return x @ torch.randn(width, width, generator=drawn, dtype=torch.float64) + 3


def groups_of(norm: IterNorm, x: Tensor) -> list[Tensor]:
    return list(x.split(norm.size, 1))


def by_formula(x: Tensor, iterations: int, eps: float) -> tuple[Tensor, Tensor]:
    """One group as algorithm 1 of the paper writes it: the whitened vectors and the matrix."""
    n, width = x.shape
    mean = sum(x[b] for b in range(n)) / n
    sigma = eps * torch.eye(width, dtype=x.dtype)
    for b in range(n):
        sigma = sigma + torch.outer(x[b] - mean, x[b] - mean) / n
    trace = sum(sigma[i, i] for i in range(width))
    p = torch.eye(width, dtype=x.dtype)
    for _ in range(iterations):
        p = 0.5 * (3 * p - torch.linalg.matrix_power(p, 3) @ (sigma / trace))
    matrix = p / trace**0.5
    return torch.stack([matrix @ (x[b] - mean) for b in range(n)]), matrix


@pytest.mark.parametrize(("width", "groups"), [(6, 1), (6, 2), (6, 6)])
def test_iter_norm_is_the_papers_algorithm(width: int, groups: int):
    x = correlated(width=width).requires_grad_()
    norm = IterNorm(width, groups).double()
    out = norm(x)
    assert norm.size == width // groups
    expected = torch.cat([by_formula(part, 5, 1e-5)[0] for part in groups_of(norm, x)], 1)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    weights = torch.randn(out.shape, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((o * weights).sum(), x)[0] for o in (out, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("groups", [1, 3])
def test_many_iterations_are_zca(groups: int):
    x = correlated()
    norm = IterNorm(6, groups, iterations=40, eps=1e-12).double()
    out = norm(x)
    for part, white in zip(groups_of(norm, x), groups_of(norm, out), strict=True):
        centred = part - part.mean(0)
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(part))
        torch.testing.assert_close(white, centred @ (vectors / values.sqrt()) @ vectors.T, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(white.T @ white / len(white), torch.eye(norm.size, dtype=x.dtype))


def test_five_iterations_bring_the_variances_nearer_to_each_other():
    x = correlated()
    spectrum = [torch.linalg.eigvalsh(torch.cov(v.T)) for v in (x, IterNorm(6, 1).double()(x))]
    before, after = (values.max() / values.min() for values in spectrum)
    assert after < before / 10
    assert spectrum[1].max() < 1.1


def test_gradients_of_iter_norm():
    norm = IterNorm(4, 2).double()
    nn.init.normal_(norm.weight)
    x = correlated(n=7, width=4).requires_grad_()
    assert torch.autograd.gradcheck(norm, (x,))


@given(seed=st.integers(0, 2**31 - 1), factor=st.floats(0.1, 10), offset=st.floats(-10, 10))
@settings(deadline=None, max_examples=30)
def test_offset_and_scale_do_not_matter_to_iter_norm(seed: int, factor: float, offset: float):
    x, norm = correlated(seed=seed), IterNorm(6, 2, eps=1e-12).double()
    torch.testing.assert_close(norm(x * factor + offset), norm(x), rtol=1e-6, atol=1e-6)


def test_running_statistics_are_moving_averages_and_serve_evaluation():
    batches = [correlated(seed=seed) for seed in range(3)]
    norm = IterNorm(6, 2).double()
    mean, matrices = torch.zeros(6, dtype=torch.float64), [torch.eye(3, dtype=torch.float64)] * 2
    for x in batches:
        norm(x)
        mean = 0.9 * mean + 0.1 * x.mean(0)
        found = [by_formula(part, 5, 1e-5)[1] for part in groups_of(norm, x)]
        matrices = [0.9 * old + 0.1 * new for old, new in zip(matrices, found, strict=True)]
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_whitening, torch.stack(matrices))
    before = copy.deepcopy(norm.state_dict())
    norm.eval()
    x = batches[0]
    expected = torch.cat([
        (part - m) @ matrix.T for part, m, matrix in zip(groups_of(norm, x), mean.split(3), matrices, strict=True)
    ], 1)  # fmt: skip
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm(x[:1]), expected[:1])
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    fresh = IterNorm(6, 2).double()
    fresh.load_state_dict(before)
    torch.testing.assert_close(fresh.eval()(x), expected)


def test_scale_and_shift_come_after_the_whitening():
    x, norm = correlated(), IterNorm(6, 2).double()
    plain = norm(x)
    nn.init.constant_(norm.weight, 2)
    nn.init.constant_(norm.bias, 1)
    torch.testing.assert_close(norm(x), 2 * plain + 1)
    assert [p.ndim for p in norm.parameters()] == [1, 1], "one dimension: left out of weight decay and LARS"


@pytest.mark.parametrize(("width", "size"), [(2048, 32), (256, 4), (64, 1), (8, 1), (100, 2), (130, 2), (67, 1)])
def test_a_head_ends_in_64_groups_where_they_divide_its_width(width: int, size: int):
    head = MLP(hidden_dim=16, out_dim=width, output_norm="iter").build(8, RUN)
    norm = list(head.children())[-1]
    assert isinstance(norm, IterNorm)
    assert norm.running_whitening.shape == (width // size, size, size)
    assert norm.iterations == 5
    assert head(torch.randn(12, 8)).shape == (12, width)


def test_autocast_does_not_make_iter_norm_coarse():
    x, norm = correlated().bfloat16(), IterNorm(6, 1)
    with torch.autocast("cpu", torch.bfloat16):
        out = norm(x)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), by_formula(x.double(), 5, 1e-5)[0], rtol=1e-4, atol=1e-4)


def test_a_constant_batch_stays_finite():
    x = torch.ones(5, 6, requires_grad=True)
    out = IterNorm(6, 2)(x)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(5, 6))
    assert x.grad is not None
    assert x.grad.isfinite().all()
