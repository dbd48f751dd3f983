"""The small network: shapes, pooling, normalisation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from sslkit.api import RunInfo
from sslkit.batch import ViewSpec
from sslkit.errors import UserError
from sslkit_convnet import ConvNet

RUN = RunInfo(0, "cpu", 16, 3, (0.5,) * 3, (0.25,) * 3, 1000, 1000, 10, 100)


def images(n: int = 4, channels: int = 3, size: int = 16) -> torch.Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(0))


def test_default_network():
    network = ConvNet().build(RUN)
    assert network.feature_dim == 384
    assert network(images()).shape == (4, 384)
    assert [tuple(p.shape) for p in network.parameters() if p.ndim == 4] == [
        (24, 3, 3, 3),
        (48, 24, 3, 3),
        (96, 48, 3, 3),
    ]


@pytest.mark.parametrize("size", [16, 18, 23])
def test_it_is_convolution_norm_relu_and_mean_pooling(size: int):
    network = ConvNet(norm="group").build(RUN)
    x = images(size=size)
    expected = x
    convolutions = [p for p in network.parameters() if p.ndim == 4]
    for weight, stride in zip(convolutions, (2, 2, 1), strict=True):
        expected = F.relu(F.group_norm(F.conv2d(expected, weight, stride=stride, padding=1), 8))
    expected = F.adaptive_avg_pool2d(expected, 2).flatten(1)
    torch.testing.assert_close(network(x), expected)


def test_channels_and_widths():
    options = ConvNet(widths=(8, 20), strides=(1, 2), pool=1, norm="group")
    network = options.build(replace(RUN, channels=1))
    assert network.feature_dim == 20
    assert network(images(channels=1)).shape == (4, 20)


def test_groupnorm_treats_each_image_alone_and_batchnorm_does_not():
    x = images(8)
    group, batch = ConvNet(norm="group").build(RUN), ConvNet().build(RUN)
    torch.testing.assert_close(torch.cat([group(x[:4]), group(x[4:])]), group(x))
    assert not torch.allclose(torch.cat([batch(x[:4]), batch(x[4:])]), batch(x), atol=1e-3)


def test_every_parameter_takes_a_gradient():
    network = ConvNet().build(RUN)
    network(images()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


@pytest.mark.parametrize("options", [{"widths": ()}, {"widths": (8, 8)}, {"strides": (0, 1, 1)}, {"pool": 0}])
def test_wrong_options_are_refused(options: dict[str, Any]):
    with pytest.raises(ValidationError):
        ConvNet(**options)


def test_a_view_too_small_for_the_pooling_is_refused():
    run = replace(RUN, views=(ViewSpec(16), ViewSpec(4, "local")))
    with pytest.raises(UserError, match="map of 1x1 of an image of 4 px, less than pool = 2"):
        ConvNet().build(run)
