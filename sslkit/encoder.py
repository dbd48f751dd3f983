"""A run's encoder, from its directory alone: images in, features out."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, SerializeAsAny, TypeAdapter, ValidationError
from torch import Tensor, nn

from sslkit import checkpoint as checkpoints
from sslkit import complaints, local, randomness, registry
from sslkit.api import Backbone, RunInfo, ViewGenerator, slot
from sslkit.errors import RunFailed, UserError
from sslkit.evaluate import in_eval_mode
from sslkit.positions import lines_of
from sslkit.run_directory import refuse_strays

ROUNDING = 0.01
"""How far outside 0..1 float images may be, as resizing makes them."""


class ImageEncoder(nn.Module):
    """The backbone of a run behind the preparation that its images were measured with.

    It is an `nn.Module` in eval mode whose parameters can be trained further. `backbone` alone takes images that are
    normalised already, and gives gradients with respect to them.
    """

    feature_dim: int
    """Width of the features."""
    step: int
    """Updates that the weights have seen."""

    def __init__(
        self,
        backbone: nn.Module,
        prepare: Callable[[Tensor], Tensor],
        *,
        channels: int,
        feature_dim: int,
        step: int,
        channels_last: bool,
    ) -> None:
        super().__init__()
        self.backbone, self._prepare = backbone, prepare
        self.feature_dim, self.step = feature_dim, step
        self._channels, self._channels_last = channels, channels_last

    def forward(self, images: Tensor) -> Tensor:
        """Features `[N, feature_dim]` of raw images `[N, C, H, W]`: uint8, or float on the scale 0..1.

        The images are resized and normalised as the run's view generator does it for evaluation; floats are rounded
        to the 256 levels of a picture first.

        Raises:
            UserError: images of another shape, type or scale.
        """
        pixels = self._pixels(images)
        prepared = self._prepare(pixels)
        if self._channels_last:
            prepared = prepared.contiguous(memory_format=torch.channels_last)
        features: Tensor = self.backbone(prepared)
        return features

    def features(self, images: Tensor, batch_size: int = 500) -> Tensor:
        """The same for many images, float32 on their device: in batches, in eval mode, without gradients."""
        _check_type(images)
        where = next((parameter.device for parameter in self.parameters()), images.device)
        with in_eval_mode(self):
            found = [self(part.to(where)).float().to(images.device) for part in images.split(batch_size)]
        return torch.cat(found)

    def _pixels(self, images: Tensor) -> Tensor:
        _check_type(images)
        if images.ndim != 4 or images.shape[1] != self._channels:
            shape = f"[N, {self._channels}, H, W]"
            raise UserError(f"the encoder takes images of the shape {shape}, not {list(images.shape)}")
        if images.dtype == torch.uint8:
            return images
        if not images.is_floating_point():
            raise UserError(f"the encoder takes images as uint8, or as float on the scale 0..1, not {images.dtype}")
        low, high = (float(value) for value in images.detach().aminmax()) if images.numel() else (0.0, 1.0)
        if not -ROUNDING <= low <= high <= 1 + ROUNDING:
            raise UserError(
                f"the encoder takes float images on the scale 0..1 and normalises them itself; these go from {low:.3g} "
                f"to {high:.3g}"
            )
        return images.clamp(0, 1).mul(255).round().to(torch.uint8)


def _check_type(images: object) -> None:
    if not isinstance(images, Tensor):
        raise UserError(
            f"the encoder takes a tensor, not a {type(images).__name__}; of PIL images of one size: "
            "torch.stack([torchvision.transforms.functional.pil_to_tensor(image) for image in images])"
        )


def load_encoder(
    run_dir: str | PathLike[str],
    branch: Literal["evaluated", "online", "target"] = "evaluated",
    checkpoint: Literal["last", "best"] | int = "last",
    *,
    allow_local_code: bool = False,
) -> ImageEncoder:
    """The encoder of a run, on the CPU and in eval mode, from its directory alone: the data need not be there.

    Only the packages of the backbone and the view generator are needed, and reading a checkpoint runs no code of it.

    Args:
        run_dir: The run's directory.
        branch: `evaluated` is the branch that the run's own figures are of, which its target updater names.
        checkpoint: `last`; `best`, that with the highest kNN accuracy; or the number of a step.
        allow_local_code: Let a backbone or view generator run that came from a file beside the recipe.

    Raises:
        UserError: there is no run, no such checkpoint or branch, or a package is missing.
        RunFailed: the checkpoint is damaged.
    """
    if branch not in ("evaluated", "online", "target"):
        raise UserError(f"branch: should be 'evaluated', 'online' or 'target', not {branch!r}")
    run = Path(run_dir)
    tables, lock = _lock(run)
    found = checkpoints.load(_chosen(run, checkpoint), wanted=("model",))
    with local.allowed(allow_local_code):
        needed = _components(tables, lock, found.facts.get("plugins", []))
    try:
        told = TypeAdapter(RunInfo).validate_python(found.facts["run"])
        evaluated = found.facts["evaluated"]
    except (KeyError, ValidationError):
        raise UserError(f"{found.path}: was written by a version of sslkit that did not record what it was told of "
                        "the run; train the run anew, or a step further, with this version") from None  # fmt: skip
    info = replace(told, device="cpu", weights_follow=True)
    with randomness.seeded(0, "encoder"):  # the weights are replaced; the caller's random numbers stay as they are
        backbone = needed.backbone.build(info)
    views = needed.view_generator.build(info)
    chosen = evaluated if branch == "evaluated" else branch
    prefix = f"{chosen}.backbone."
    weights = {k.removeprefix(prefix): v for k, v in found.parts["model"].items() if k.startswith(prefix)}
    if not weights and chosen == "target":
        raise UserError(f"{run}: has no target network of its own; use branch='online'")
    try:
        backbone.load_state_dict(weights)
    except Exception as error:  # whatever a stranger's load_state_dict raises
        provider = registry.provider_of(type(needed.backbone))
        was = _origin(found.facts.get("plugins", []), provider.key)
        raise RunFailed(
            f"{found.path}: its weights do not fit the backbone that {provider.origin} builds (trained with "
            f"{was or 'an unknown version'}): {str(error).strip().partition(chr(10))[0]}"
        ) from error
    channels_last = bool(tables.get("train", {}).get("channels_last", True))
    if channels_last:
        backbone.to(memory_format=torch.channels_last)
    made = ImageEncoder(
        backbone, views.clean, channels=info.channels, feature_dim=cast(int, backbone.feature_dim), step=found.step,
        channels_last=channels_last,
    )  # fmt: skip
    return made.eval()


# ---------------------------------------------------------------- reading


class _Needed(BaseModel):
    """The tables of a recipe that an encoder is made of."""

    model_config = ConfigDict(extra="ignore", strict=True)

    backbone: Annotated[SerializeAsAny[Backbone], slot("backbone")]
    view_generator: Annotated[SerializeAsAny[ViewGenerator], slot("view_generator")]


def _lock(run: Path) -> tuple[dict[str, Any], Path]:
    path = run / "recipe.lock.toml"
    refuse_strays(run)
    try:
        tables: dict[str, Any] = local.anchored(tomllib.loads(path.read_text(encoding="utf-8")), run)
        return tables, path
    except FileNotFoundError:
        problem = "is not there" if not run.exists() else "is no run directory (it has no recipe.lock.toml)"
        raise UserError(f"{run}: {problem}; give one such as runs/NAME") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def _chosen(run: Path, checkpoint: str | int) -> Path:
    """The folder of the checkpoint that is asked for."""
    folder = run / "checkpoints"
    listed = checkpoints.listed(folder)
    if not listed:
        raise UserError(f"{run}: has no checkpoint yet; one is written every train.checkpoint_every steps and at the "
                        "end of a run")  # fmt: skip
    steps = {int(path.name.removeprefix("step-")): path for path in listed}
    there = ", ".join(map(str, steps))
    if checkpoint == "last":
        return listed[-1]
    if checkpoint == "best":
        best = checkpoints.best(folder)
        if best is None:
            raise UserError(f"{run}: kNN was not measured at any of its checkpoints (steps {there}), so none is the "
                            "best; use checkpoint='last' or a step")  # fmt: skip
        return best
    if checkpoint not in steps:
        raise UserError(f"{run}: has no checkpoint {checkpoint!r}; choose 'last', 'best' or a step of {there}")
    return steps[int(checkpoint)]


def _components(tables: dict[str, Any], lock: Path, plugins: Sequence[Mapping[str, str]]) -> _Needed:
    """The specs that are needed, from the run's own recipe."""
    for kind in _Needed.model_fields:
        use = tables.get(kind, {}).get("use")
        was = _origin(plugins, f"{kind}.{use}")
        if was and use not in registry.names(kind):
            distribution, _, version = was.rpartition(" ")
            raise UserError(f"{lock.parent}: its {kind} {use!r} is from {was}, which is not installed here: "
                            f"pip install '{distribution}=={version}'")  # fmt: skip
    known = lines_of(lock.read_text(encoding="utf-8"))

    def place(keys: tuple[str | int, ...]) -> str:
        return f"{lock}:{next((known[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in known), 1)}"

    try:
        return _Needed.model_validate_json(json.dumps(tables, default=str))
    except ValidationError as error:
        raise UserError(*complaints.lines(error, tables, place, _Needed)) from None


def _origin(plugins: Sequence[Mapping[str, str]], component: str) -> str:
    """`distribution version` that a component of the run came from; empty if it was not recorded."""
    return next((f"{p['distribution']} {p['version']}" for p in plugins if p.get("component") == component), "")
