"""What plain timm has to do with these backbones: how it builds them, and the weights that it has for them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import timm
import torch
from timm.models.resnet import ResNet
from torch import nn

from sslkit.api import Portable, Pretrained, RunInfo
from sslkit.errors import UserError, did_you_mean
from sslkit.starting_point import LOCAL
from sslkit_timm.models import arguments_of, build, line, use_small_image_stem

if TYPE_CHECKING:
    from sslkit_timm import Timm

SOURCES = (LOCAL, "hf-hub:")
"""How timm's names of models begin that are no names of its own."""


def portable(options: Timm, run: RunInfo) -> Portable:
    """How timm alone makes a network that takes the weights of what `build` makes."""
    arguments = arguments_of(options, run)
    known = timm.get_pretrained_cfg(options.model, allow_unregistered=True)
    config = {} if known is None else {"first_conv": known.first_conv, "classifier": known.classifier}
    # A size that may change is no fixed one any more, whatever timm's own weights were made for.
    fixed = known is not None and known.fixed_input_size and not arguments.get("dynamic_img_size", False)
    return Portable(
        "timm", architecture_of(options.model), arguments, _small_stem(options, run),
        {**config, "fixed_input_size": fixed},
    )  # fmt: skip


def architecture_of(model: str) -> str:
    """`resnet50` of `resnet50.a1_in1k`: the tag names weights."""
    return model.partition(".")[0]


def _small_stem(options: Timm, run: RunInfo) -> tuple[str, ...]:
    """`use_small_image_stem` in lines that anybody can run."""
    if options.stem != "small_image":
        return ()
    with torch.random.fork_rng(devices=[]):  # only to be looked at
        model = timm.create_model(architecture_of(options.model), **arguments_of(options, run))
        use_small_image_stem(model, options.model)
    assert isinstance(model, ResNet)
    if isinstance(model.conv1, nn.Sequential):
        first = "model.conv1[0].stride = (1, 1)"
    else:
        width = model.conv1.out_channels
        first = f"model.conv1 = nn.Conv2d({run.channels}, {width}, 3, stride=1, padding=1, bias=False)"
    return first, "model.maxpool = nn.Identity()"


# ---------------------------------------------------------------- weights that timm has


def pretrained_weights(options: Timm, name: str, run: RunInfo) -> Pretrained:
    """timm's weights of this name, for what `build` makes.

    Raises:
        UserError: timm has no such weights, they cannot be had, or they are of another architecture.
    """
    if not name.startswith(SOURCES):
        _check_name(options, name)
    with torch.random.fork_rng(devices=[]):  # what is drawn below follows from the seed alone
        plain = _created(name, num_classes=0)
    _check_architecture(options, name, _architecture_in(plain))
    original = plain.state_dict()
    model = _created(name, **arguments_of(options, run))
    if options.stem == "small_image":
        use_small_image_stem(model, options.model)
    found = model.state_dict()
    with torch.random.fork_rng(devices=[]):  # only to be compared with
        wanted = build(options, replace(run, weights_follow=True)).state_dict()
    for key in sorted(wanted.keys() | found.keys()):
        here, there = (list(tensors[key].shape) if key in tensors else "nothing" for tensors in (wanted, found))
        if here != there:
            raise UserError(
                f"init_from.timm: the weights of {name!r} do not fit the backbone: {key} is {there} there and {here} "
                "here"
            )
    return Pretrained(found, original)


def _created(name: str, **arguments: Any) -> nn.Module:
    try:
        model: nn.Module = timm.create_model(name, pretrained=True, **arguments)
    except OSError as error:
        raise UserError(
            f"init_from.timm: the weights of {name!r} could not be had ({line(error)}); "
            + ("check the folder" if name.startswith(LOCAL) else "connect to the network once")
        ) from error
    except Exception as error:  # a stranger's folder may bring about anything
        raise UserError(f"init_from.timm: timm cannot build {name!r} with its weights: {line(error)}") from error
    return model


def _architecture_in(model: nn.Module) -> str:
    config = model.pretrained_cfg
    assert isinstance(config, dict)
    return str(config.get("architecture"))


def _check_name(options: Timm, name: str) -> None:
    if not timm.is_model(name):
        near = did_you_mean(name, timm.list_models())
        raise UserError(
            f"init_from.timm: timm {timm.__version__} has no model {name!r}{near} (timm.list_pretrained() lists those "
            "with weights)"
        )
    architecture = architecture_of(name)
    _check_architecture(options, name, architecture)
    there = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    tag = name.partition(".")[2]
    if not there:
        raise UserError(f"init_from.timm: timm {timm.__version__} has no weights of {architecture!r}")
    if tag and tag not in there:
        raise UserError(f"init_from.timm: timm {timm.__version__} has no weights {name!r}; of {architecture!r} there "
                        f"are: {', '.join(there)}")  # fmt: skip


def _check_architecture(options: Timm, name: str, architecture: str) -> None:
    wanted = architecture_of(options.model)
    if architecture != wanted:
        raise UserError(f"init_from.timm: the weights of {name!r} are those of {architecture!r}, and backbone.model is "
                        f"{options.model!r}; set backbone.model = {architecture!r}")  # fmt: skip
