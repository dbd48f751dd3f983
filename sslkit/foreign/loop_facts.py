"""What can be known of somebody's own training loop, read off its live objects (`sslkit.rules.Facts`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from sslkit.batch import Branches
from sslkit.facts import ends_normalised, map_facts, normalisation_facts, shared_images, unoptimised, view_difference
from sslkit.foreign.pairs import agreement
from sslkit.foreign.taps import Networks, Taps

LOOKED_AT = 64
"""Images of the first batch whose views are compared."""
SAMPLED = 1024
"""Elements of each parameter that are compared across updates."""
ROUNDING = 1e-6
"""Movement, as a share of a parameter's size, that float32 cannot round away."""
COMPARED = 2**26
"""Bytes of labelled training images up to which test images are looked for among them."""


# ---------------------------------------------------------------- before the first step


def of_networks(networks: Networks) -> dict[str, Any]:
    """Normalisation, and which parts learn."""
    online = networks.online
    predictor, projector = online.get("predictor"), online.get("projector")
    facts = normalisation_facts(online.values())
    facts["trained_parts"] = tuple(
        part for part, module in online.items() if any(p.requires_grad for p in module.parameters())
    )
    if predictor is not None:
        facts["predictor_learns"] = any(True for _ in predictor.parameters())
    if projector is not None and "backbone" in online:
        facts["projector_normalised"] = ends_normalised(projector)
    if networks.has_target:
        facts["target"] = "copy"
    elif predictor is None and "backbone" in online:
        facts["target"] = "none"
    return facts


def of_optimizers(networks: Networks, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """Which parameters the optimizers have, and what they decay."""
    if not optimizers:
        return {}
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return {
        "optimizer": type(optimizers[0]).__name__.lower(),
        "unoptimised": unoptimised(dict(networks.trained.named_parameters()), groups),
        "decayed_biases": any(
            (group.get("weight_decay") or 0) > 0 and p.ndim <= 1 for group in groups for p in group["params"]
        ),
    }


class Pictures:
    """A tensor of images, as `sslkit.facts` reads them."""

    labels: Tensor | None = None

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor.cpu()
        self._all = self.tensor

    def __len__(self) -> int:
        return len(self._all)

    def read(self, indices: Tensor) -> Tensor:
        """Some of them."""
        return self._all[indices]


def of_labelled(labelled: Sequence[Tensor] | None) -> dict[str, Any]:
    """Whether quality will be measured, and on images that training does not see."""
    if labelled is None:
        return {"quality": ()}
    train, train_labels, test, test_labels = labelled
    facts: dict[str, Any] = {
        "labelled": True, "quality": ("knn_top1",),
        "classes": len(train_labels.unique()), "test_classes": len(test_labels.unique()),
    }  # fmt: skip
    if train.numel() * train.element_size() <= COMPARED and train.shape[1:] == test.shape[1:]:
        facts["shared_images"] = shared_images(Pictures(train), Pictures(test))
    return facts


# ---------------------------------------------------------------- of the first steps


def of_batch(branches: Branches, micro_batches: int, taps: Taps) -> dict[str, Any]:
    """Size of batch and views, and how views differ. Waits for the device."""
    views, together = branches.views, taps.together
    images = len(views[0])
    processes = _processes()
    shown = [view[:LOOKED_AT].float() for view in views]
    return {
        "batch_size": images * micro_batches * processes,
        "batch_norm_images": images * (len(views) if together else 1),
        "processes": processes,
        "precision": taps.precision,
        "view_sizes": tuple(spec.size for spec in branches.specs),
        "view_difference": view_difference(shown) if len(shown) > 1 else None,
        "pairs_agree": agreement(branches, together=together) if taps.paired else None,
    }


def of_maps(networks: Networks, view: Tensor) -> dict[str, Any]:
    """How coarse the backbone's maps are; nothing if it does not take one image."""
    backbone = networks.online.get("backbone")
    if backbone is None or view.ndim != 4:
        return {}
    try:
        dtype = next((p.dtype for p in backbone.parameters()), torch.float32)
        with torch.autocast(view.device.type, enabled=False):
            return map_facts(_InItsType(backbone, dtype), view[:1], view.shape[-1])
    except Exception:  # somebody's network may want more than a picture; then this is not known
        return {}


class _InItsType(nn.Module):
    """A network that is given pictures in the type of its weights."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.dtype = network, dtype

    def forward(self, images: Tensor) -> Any:
        return self.network(images.to(self.dtype))


LOSS_PRECISION = {torch.float32: "fp32", torch.float64: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@torch.no_grad()
def of_loss(branches: Branches, loss: float, *, exact: bool) -> dict[str, Any]:
    """What the loss is, if it is one of BYOL's or SimSiam's, or BYOL's without its normalisation: found by computing
    these from what the loop computed.

    Args:
        branches: the outputs that the loss was of.
        loss: what the loop reports.
        exact: whether the outputs are float32, so that the figures have to agree closely.
    """
    targets = branches.targets if any(t is not None for t in branches.targets) else branches.projections
    pairs = [
        (p.float(), t.float())
        for v, p in enumerate(branches.predictions)
        for w, t in enumerate(targets)
        if v != w and p is not None and t is not None and p.shape == t.shape
    ]
    if not pairs or abs(loss) < 1e-3:
        return {}
    count, total = len(pairs), float(sum(F.cosine_similarity(p, t, dim=1).mean() for p, t in pairs))
    # Each form as slope and offset of the sum of 2 - 2 cos over ordered pairs: the sum, its mean, and cosines alone.
    forms = [(1.0, 0.0), (1 / count, 0.0), (0.5 / count, 0.0), (0.5 / count, -1.0), (0.5, -float(count))]
    allowed = (1e-3 if exact else 2e-2) * abs(loss) + 1e-6
    known = {
        "prevents_collapse": False, "wants_predictions": True,
        "target": "online" if targets is branches.projections else "copy",
    }  # fmt: skip
    for slope, offset in forms:
        if abs(slope * (2 * count - 2 * total) + offset - loss) <= allowed:
            return known | {"byol_scale": slope}
    squares = float(sum((p - t).square().sum(1).mean() for p, t in pairs))
    shares = (1, count, pairs[0][0].shape[1], count * pairs[0][0].shape[1])  # sums or means over pairs and dimensions
    unit = all(bool(((v.norm(dim=1) - 1).abs() < 1e-2).all()) for pair in pairs for v in pair)
    if exact and not unit and any(abs(squares / share - loss) <= allowed for share in shares):
        return known | {"scale_sensitive": True}
    return {}


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _processes() -> int:
    return torch.distributed.get_world_size() if _distributed() else 1


def rank() -> int:
    """The number of this process among those that train together; 0 where there is one."""
    return torch.distributed.get_rank() if _distributed() else 0


@contextlib.contextmanager
def without_trace() -> Iterator[None]:
    """Pass something through the networks that is no part of training, and leave no trace of it."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        yield


# ---------------------------------------------------------------- over steps


class Movement:
    """Which of the target's parameters an update leaves where they are, from two looks at them some steps apart."""

    def __init__(self, networks: Networks) -> None:
        online = dict(networks.trained.named_parameters())
        copies = networks.copies
        self.pairs = {
            name: (online[name], p)
            for name, p in (copies.named_parameters() if copies is not None else ())
            if name in online and online[name].shape == p.shape and p.numel()
        }
        self.before: dict[str, Tensor] = {}

    @torch.no_grad()
    def look(self) -> None:
        """The first look."""
        self.before = {name: _sample(target).clone() for name, (_, target) in self.pairs.items()}

    @torch.no_grad()
    def unmoved(self, tau: float, steps: int) -> tuple[str, ...] | None:
        """The second, `steps` updates with about this tau later. Waits for the device.

        Parameters that are too near the online network's to move in their precision are not counted. None if nothing
        was to be seen, or nothing moved at all: then no update was made, rather than one that leaves something out.
        """
        if not self.pairs or not self.before or not tau < 1:
            return None
        seen = []
        for name, (online, target) in self.pairs.items():
            now, old, goal = _sample(target).float(), self.before[name].float(), _sample(online).float()
            due = (goal - old).abs().max() * min(1.0, (1 - tau) * steps) > ROUNDING * old.abs().max()
            seen.append(torch.stack([due, (now == old).all()]))
        table = torch.stack(seen).tolist()
        left = tuple(name for name, (due, still) in zip(self.pairs, table, strict=True) if due and still)
        return None if all(still for _, still in table) else left


def _sample(parameter: Tensor) -> Tensor:
    return parameter.detach().reshape(-1)[:SAMPLED]


def rates(networks: Networks, optimizers: Iterable[Optimizer]) -> dict[str, float]:
    """The learning rate of each part, from the first of its parameters that an optimizer has."""
    by_parameter = {
        id(p): float(group["lr"])
        for o in optimizers
        for group in o.param_groups
        if "lr" in group
        for p in group["params"]
    }
    found: dict[str, float] = {}
    for part, module in networks.online.items():
        rate = next((by_parameter[id(p)] for p in module.parameters() if id(p) in by_parameter), None)
        if rate is not None:
            found[part] = rate
    return found


def recorded_rates(found: Mapping[str, float]) -> dict[str, float]:
    """As a record has them: `lr`, and `lr_PART` of parts whose rate is another."""
    if not found:
        return {}
    first = next(iter(found.values()))
    return {"lr": first, **{f"lr_{part}": rate for part, rate in found.items() if rate != first}}
