"""Weights that timm loads: safetensors and the configuration beside them, in the layout of timm's models on the hub."""

from __future__ import annotations

import contextlib
import io
import json
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from sslkit import randomness, registry
from sslkit.api import Portable
from sslkit.errors import RunFailed
from sslkit.exporting.prepared import Check, Job, Preparation, Reference
from sslkit.opened_run import OpenedRun, digest_of

WEIGHTS = "model.safetensors"
CONFIG = "config.json"

ALLOWED = 1e-5
"""How far features may be from the run's own, as a share of the largest."""


def write(folder: Path, job: Job) -> None:
    """`model.safetensors`, and `config.json` where timm can build the network from a name and arguments alone."""
    opened, known = job.opened, job.known
    told = {"format": "pt", "weights": opened.weights}
    if known is not None:
        told |= {"library": known.library, "architecture": known.architecture, "after": "\n".join(known.after)}
    tensors = {  # cloned: safetensors takes neither channels last nor two names of one tensor
        name: value.detach().clone(memory_format=torch.contiguous_format)
        for name, value in opened.backbone.state_dict().items()
    }
    (folder / WEIGHTS).write_bytes(save(tensors, told))  # save_file would make it private
    if is_by_name(known):
        text = json.dumps(_config(cast(Portable, known), job), indent=2)
        (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def is_by_name(known: Portable | None) -> bool:
    """Whether timm builds the network without further lines. Otherwise there must be no `config.json`: with a deep
    stem timm would load the weights without a word, and give other features."""
    return known is not None and not known.after


def _config(known: Portable, job: Job) -> dict[str, Any]:
    """What `timm.create_model("local-dir:FOLDER")` and `"hf-hub:OWNER/NAME"` read."""
    told_elsewhere = ("in_chans", "num_classes")  # by input_size, and below; a caller may then ask for others
    preparation = job.preparation
    config = {
        "input_size": [preparation.channels, preparation.size, preparation.size], "interpolation": "bicubic",
        "crop_pct": 1.0, "crop_mode": "center", "mean": list(preparation.mean), "std": list(preparation.std),
        "num_classes": 0, "pool_size": None, "custom_load": False, **known.config,
    }  # fmt: skip
    return {
        "architecture": known.architecture,
        "num_classes": 0,
        "num_features": job.opened.backbone.feature_dim,
        "model_args": {name: value for name, value in known.arguments.items() if name not in told_elsewhere},
        "pretrained_cfg": config | ({"license": job.licence} if job.licence else {}),
    }


# ---------------------------------------------------------------- reading it back


def imports_of(known: Portable) -> list[str]:
    """What `lines_of` needs before it."""
    if is_by_name(known):
        return ["import timm"]
    return [
        "import timm",
        "from safetensors.torch import load_file",
        *(["from torch import nn"] if known.after else []),
    ]


def lines_of(known: Portable) -> list[str]:
    """Python that makes `model` of what lies in `folder`: what the model card shows, and what is run to check it."""
    if is_by_name(known):
        return ['model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()']
    given = "".join(f", {name}={value!r}" for name, value in known.arguments.items())
    return [
        f"model = timm.create_model({known.architecture!r}{given})",
        *known.after,
        f'model.load_state_dict(load_file(f"{{folder}}/{WEIGHTS}"))',
        "model.eval()",
    ]


def check(folder: Path, job: Job, reference: Reference) -> Check:
    """Read the weights as somebody else would, and compare.

    Raises:
        RunFailed: they cannot be read, or give other features.
    """
    opened, known = job.opened, job.known
    if digest_of(read(folder / WEIGHTS)) != opened.weights:
        raise RunFailed(f"{WEIGHTS} does not hold what was written to it; nothing was kept")
    with randomness.seeded(0, "export"):  # the weights are replaced; nobody else's random numbers change
        if known is None:
            model, by = _own(folder, opened), f"the backbone {registry.short_name(type(opened.spec))!r} of sslkit"
        else:
            model, by = _timms(folder, known), f"timm {metadata.version('timm')}"
    prepare = _preparation_in(folder, job.preparation).normalise
    return reference.check(WEIGHTS, by, ALLOWED, lambda pixels: model(prepare(pixels)))


def _preparation_in(folder: Path, given: Preparation) -> Preparation:
    """What the configuration says of images, which has to be right as the weights have; without one, what is given."""
    if not (folder / CONFIG).exists():
        return given
    told = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["pretrained_cfg"]
    channels, size, _ = told["input_size"]
    return Preparation(channels, size, size, tuple(told["mean"]), tuple(told["std"]))


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _timms(folder: Path, known: Portable) -> nn.Module:
    names: dict[str, Any] = {"folder": str(folder)}
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # --json prints nothing else
            exec("\n".join([*imports_of(known), *lines_of(known)]), names)
    except Exception as error:  # whatever the library raises
        line = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
        by = f"timm {metadata.version('timm')}"
        raise RunFailed(f"{by} cannot load what was written: {line}; nothing was kept") from error
    return cast(nn.Module, names["model"])


def _own(folder: Path, opened: OpenedRun) -> nn.Module:
    model = opened.spec.build(opened.info)
    model.load_state_dict(read(folder / WEIGHTS))
    return model.eval()
