"""Builds timm's models as backbones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import timm
import torch
from timm.models.resnet import ResNet
from torch import nn

from sslkit.api import RunInfo
from sslkit.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from sslkit_timm import Timm


def build(options: Timm, run: RunInfo) -> nn.Module:
    """timm's model without a classifier, with `feature_dim`: float `[B, C, h, w]` -> `[B, feature_dim]`.

    Raises:
        UserError: no such model, weights that cannot be had, options or view sizes that it does not take.
    """
    if not timm.is_model(options.model):
        near = did_you_mean(options.model, timm.list_models())
        raise UserError(
            f"backbone.model: timm {timm.__version__} has no model {options.model!r}{near} "
            "(timm.list_models() lists them all)"
        )
    pretrained = options.pretrained and not run.weights_follow
    model = _create(options, run, pretrained)
    if options.stem == "small_image":
        use_small_image_stem(model, options.model)
    model.feature_dim = _feature_dim(model, options.model, run.channels, _sizes(run))  # type: ignore[assignment]
    return model


def arguments_of(options: Timm, run: RunInfo) -> dict[str, Any]:
    """What `timm.create_model` is given beside the name of the model."""
    arguments: dict[str, Any] = {"in_chans": run.channels, "num_classes": 0}
    if options.drop_path is not None:
        arguments["drop_path_rate"] = options.drop_path
    config = timm.get_pretrained_cfg(options.model, allow_unregistered=True)
    if config is not None and config.fixed_input_size:
        sizes = _sizes(run)
        arguments["img_size"] = sizes[-1]
        if len(sizes) > 1:
            arguments["dynamic_img_size"] = True
    return arguments


def _sizes(run: RunInfo) -> list[int]:
    return sorted({view.size for view in run.views} or {run.image_size})


def _create(options: Timm, run: RunInfo, pretrained: bool) -> nn.Module:
    arguments: dict[str, Any] = {}
    try:
        arguments = arguments_of(options, run)
        model: nn.Module = timm.create_model(options.model, pretrained=pretrained, **arguments)
    except OSError as error:
        raise UserError(
            f"backbone.pretrained: the weights of {options.model!r} could not be had ({line(error)}); connect to the "
            "network once, or set pretrained = false"
        ) from error
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        given = ", ".join(f"{name} = {value}" for name, value in arguments.items() if name != "num_classes")
        raise UserError(f"backbone.model: timm cannot build {options.model!r} with {given}: {line(error)}") from error
    return model


def use_small_image_stem(model: nn.Module, name: str) -> None:
    """Give a ResNet the stem for small pictures, in place.

    A single convolution becomes a new 3x3 one of stride 1; a deep stem of three 3x3 convolutions keeps its weights and
    loses its stride.

    Raises:
        UserError: the model is no ResNet.
    """
    if not isinstance(model, ResNet):
        raise UserError(
            f"backbone.stem: 'small_image' is for timm's ResNets (resnet18, resnet50d, resnext50_32x4d, seresnet50, "
            f'resnest14d, ...), and {name!r} is a {type(model).__name__}; use stem = "default"'
        )
    if isinstance(model.conv1, nn.Sequential):
        model.conv1[0].stride = (1, 1)  # type: ignore[assignment]
    else:
        old = model.conv1
        model.conv1 = nn.Conv2d(old.in_channels, old.out_channels, 3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()


def _feature_dim(model: nn.Module, name: str, channels: int, sizes: list[int]) -> int:
    # timm's num_features is the width before a convolutional head, where a model has one (MobileNetV3, VGG); one image
    # tells the width after it, and whether the model takes images of this size at all.
    training = model.training
    model.eval()
    try:
        shapes = set()
        for size in sizes:
            with torch.no_grad():
                shapes.add(tuple(model(torch.zeros(1, channels, size, size)).shape))
    except (ValueError, RuntimeError, AssertionError) as error:
        raise UserError(f"backbone.model: {name!r} cannot take views of {size} px: {line(error)}") from error
    finally:
        model.train(training)
    shape = shapes.pop()
    if shapes or len(shape) != 2:
        raise UserError(f"backbone.model: {name!r} does not pool its features to one vector for each image: {shape}")
    return int(shape[1])


def line(error: Exception) -> str:
    """An error in one line."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0]
