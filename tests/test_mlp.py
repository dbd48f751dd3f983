"""Heads: the layers that the papers list."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from sslkit.api import RunInfo
from sslkit_mlp import MLP, Identity

RUN = RunInfo(0, "cpu", 32, 3, (0.5,) * 3, (0.25,) * 3, 1000, 1000, 10, 100)


def layers(head: nn.Module) -> list[tuple[Any, ...]]:
    """Each layer as (kind, sizes, has a bias or scale)."""
    listed: list[tuple[Any, ...]] = []
    for module in head.children():
        if isinstance(module, nn.Linear):
            listed.append(("linear", module.in_features, module.out_features, module.bias is not None))
        elif isinstance(module, nn.BatchNorm1d):
            listed.append(("batchnorm", module.num_features, module.affine))
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


@pytest.mark.parametrize("options", [{"layers": 0}, {"hidden_dim": 0}, {"out_dim": -1}, {"output_norm": "layer"}])
def test_wrong_options_are_refused(options: dict[str, Any]):
    with pytest.raises(ValidationError):
        MLP(**options)
