"""The networks of anybody's own loop: finding their parts, and listening to what they compute.

Forward hooks keep detached references to what the last views went through. Nothing is added to the graph, no random
number is drawn, and nothing waits for the device.
"""

from __future__ import annotations

import math
import re
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sslkit.batch import Branches, ViewSpec
from sslkit.errors import UserError, did_you_mean

ROLES = ("backbone", "projector", "predictor")
Part = str | nn.Module | None
"""A part of a network: its name inside, itself, or None, to be guessed."""

_USUAL = {
    "predictor": r"predict|^pred$|^q$",
    "projector": r"project|^proj|^g$|^mlp$|(^|_)head$",
    "backbone": r"backbone|encoder|trunk|resnet|convnet|^vit|^enc$|^body$|^base|^net$|^model$|^features$|^f$",
}
"""Names that parts usually have; in this order, for a backbone is what is left."""
_NOT_ONLINE = re.compile(r"target|teacher|momentum|ema|queue")


# ---------------------------------------------------------------- which parts


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside `torch.compile`'s and DistributedDataParallel's wrappers."""
    while True:
        if isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        elif isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
            module = module.module
        else:
            return module


@dataclass
class Networks:
    """The parts of both branches, without wrappers; None where there is none, or it was not found."""

    online: dict[str, nn.Module] = field(default_factory=dict)
    target: dict[str, nn.Module] = field(default_factory=dict)
    has_target: bool = False
    said: list[str] = field(default_factory=list)
    """What was guessed, one line each."""

    @property
    def trained(self) -> nn.ModuleDict:
        """The online parts as one module; `backbone.conv1.weight` is what its parameters are called."""
        return nn.ModuleDict(self.online)

    @property
    def copies(self) -> nn.ModuleDict | None:
        """The target's parts likewise."""
        return nn.ModuleDict(self.target) if self.has_target else None


def find(
    online: nn.Module | Mapping[str, nn.Module], target: nn.Module | Mapping[str, nn.Module] | None,
    named: Mapping[str, Part],
) -> Networks:  # fmt: skip
    """Find backbone, projector and predictor.

    Args:
        online: the online network, or its parts by role.
        target: the target network, or its parts by role; its parts have the places that the online network's have.
        named: what the user said of each role.

    Raises:
        UserError: a name leads nowhere.
    """
    found = Networks(has_target=target is not None)
    if isinstance(online, Mapping | nn.ModuleDict) and set(online) <= set(ROLES) and set(online):
        found.online = {role: unwrapped(online[role]) for role in ROLES if role in online}
        places: dict[str, str] = {}
    else:
        root = unwrapped(_module(online, "online"))
        places = _places(root, named, found.said)
        found.online = {role: unwrapped(root.get_submodule(places[role])) for role in ROLES if role in places}
    if target is None:
        return found
    if isinstance(target, Mapping | nn.ModuleDict) and set(target) <= set(ROLES):
        found.target = {role: unwrapped(module) for role, module in target.items() if role != "predictor"}
        return found
    root = unwrapped(_module(target, "target"))
    inside = dict(root.named_modules())
    if "" in places.values():
        found.target = {role: root for role, place in places.items() if place == ""}
    elif not {places.get("backbone"), places.get("projector")} <= {*inside, None} or not places:
        places = _places(root, {}, found.said, "target")
    found.target = found.target or {
        role: unwrapped(inside[places[role]]) for role in ("backbone", "projector") if role in places
    }
    return found


def _module(given: object, name: str) -> nn.Module:
    if isinstance(given, nn.Module):
        return given
    listed = ", ".join(ROLES)
    raise UserError(f"watch: {name} should be a module, or a dict of modules by role ({listed}), not {given!r}")


def _places(root: nn.Module, named: Mapping[str, Part], said: list[str], branch: str = "online") -> dict[str, str]:
    """Where in a network its parts are; the whole network is the backbone where nothing looks like one."""
    inside = dict(root.named_modules(remove_duplicate=False))
    places: dict[str, str] = {}
    for role, part in named.items():
        if isinstance(part, str):
            if part not in inside:
                names = [name for name in inside if name]
                has = ", ".join(name for name, _ in root.named_children()) or "none"
                near = did_you_mean(part, names)
                raise UserError(f"watch: {role}: the {branch} network has no module {part!r}{near}; it has {has}")
            places[role] = part
        elif part is not None:
            same = [name for name, module in inside.items() if unwrapped(module) is unwrapped(part)]
            if not same:
                raise UserError(f"watch: {role}: is no module inside the {branch} network; give one of its own")
            places[role] = same[0]
    for role, usual in _USUAL.items():
        if role in places:
            continue
        candidates = [
            name for name in sorted(inside, key=lambda n: n.count("."))
            if name and name.count(".") < 3 and re.search(usual, name.rpartition(".")[2].lower())
            and not _NOT_ONLINE.search(name.lower().replace("target" if branch == "target" else "\0", ""))
            and not any(_within(name, other) or _within(other, name) for other in places.values())
        ]  # fmt: skip
        if candidates:
            places[role] = candidates[0]
    guessed = {role: places[role] for role in ROLES if role in places and named.get(role) is None}
    if "backbone" not in places and not places:
        said.append(
            f"no part of the {branch} network has a usual name: its input is taken for the views, its output for "
            "projections; name the parts with backbone=, projector= and predictor="
        )
        return {"projector": ""}
    if guessed:
        listed = ", ".join(f"{role} is {place!r}" for role, place in guessed.items())
        said.append(f"guessed from the {branch} network's names: {listed}")
    return places


def _within(inner: str, outer: str) -> bool:
    return inner == outer or inner.startswith(f"{outer}.")


# ---------------------------------------------------------------- what they compute


class Taps:
    """Hooks on the parts, and what the newest forward passes of each left there.

    Args:
        networks: the parts.
        views: how many views an image has: passes through the backbone for every batch.
        together: whether all views go through in one pass, one below the other.
    """

    def __init__(self, networks: Networks, views: int, *, together: bool) -> None:
        self.views, self.together = views, together
        self._passes = 0
        """Passes through the online network since the last `take` that the next step of the optimizer is made of."""
        self._trained = [p for module in networks.online.values() for p in module.parameters()]
        self._begun = False
        self._of_one_loss = 0
        """Passes before the newest backward pass; of a batch, as they are followed only before the first `take`."""
        self._went_back = False
        self.precision = "fp32"
        """What the online network computed in."""
        self._seen: dict[str, deque[tuple[Tensor, Tensor]]] = {}
        """Input and output of the newest passes of each part."""
        self._targets_at: list[int] | None = None
        self._hooks: list[Any] = []
        for branch, parts in (("online", networks.online), ("target", networks.target)):
            for role, module in parts.items():
                self._listen(f"{branch}.{role}", module)

    def _listen(self, name: str, module: nn.Module) -> None:
        kept = self._seen[name] = deque(maxlen=1 if self.together else self.views)
        trained = name.startswith("online")
        counts = trained and not any(other.startswith("online") for other in self._seen if other != name)

        def hear(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            # What is asked of the online network without gradients is an evaluation, ours or the loop's own.
            if trained and not torch.is_grad_enabled():
                return
            seen, made = _first((*args, *kwargs.values())), _first(output)
            if seen is None or made is None:
                return
            if counts:
                if self._passes and self._passes % self._each == 0 and not self._begun and self._is_thrown_away():
                    self._passes = 0
                self._passes += 1
                self._follow(made)
                kind = seen.device.type
                computed = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else made.dtype
                self.precision = _SHORT.get(computed, "fp32")
            kept.append((seen.detach(), made.detach()))

        # What was compiled would otherwise take the hook into its graph. (Asking for the compiler takes seconds.)
        heard: Callable[..., None] = torch.compiler.disable(hear) if "torch._dynamo" in sys.modules else hear
        self._hooks.append(module.register_forward_hook(heard, with_kwargs=True))

    @property
    def _each(self) -> int:
        """Passes of a micro-batch."""
        return 1 if self.together else self.views

    @property
    def micro_batches(self) -> int:
        """How many the next step of the optimizer is made of. Known exactly before the first `take`."""
        return max(1, self._passes // self._each)

    @property
    def paired(self) -> bool:
        """Whether the first batch's views are all that went into one loss, and so are sure to belong together: not
        passes of two micro-batches, nor those of other images besides."""
        return self._of_one_loss == self._each

    def _follow(self, made: Tensor) -> None:
        """Count passes from one backward pass to the next."""
        if self._begun:
            return
        self._of_one_loss = 0 if self._went_back else self._of_one_loss
        self._went_back = False
        # Where no backward pass gets to, none will be seen: that is too many at once.
        self._of_one_loss += 1 if made.requires_grad else self._each + 1
        if made.requires_grad:
            made.register_hook(self._note_backward)

    def _note_backward(self, gradient: Tensor) -> None:
        self._went_back = True

    @torch.no_grad()
    def _is_thrown_away(self) -> bool:
        """Whether nothing of the passes so far will be in the next step: there are no gradients of them, or none that
        are finite, at which a GradScaler skips the step, as it commonly does at first. Waits for the device."""
        gradients = [p.grad for p in self._trained if p.grad is not None]
        if not gradients:
            return True
        largest = [float(norm) for norm in torch._foreach_norm(gradients, torch.inf)]
        return not any(largest) or not all(map(math.isfinite, largest))

    def remove(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def take(self) -> Branches | None:
        """What was heard of the newest views since the last call; None if nothing was. Then all is forgotten."""
        heard = {name: self._parts(name) for name in self._seen}
        self._passes, self._begun = 0, True
        for kept in self._seen.values():
            kept.clear()
        entry = heard.get("online.backbone") or heard.get("online.projector")
        if not entry:
            return None
        views = [seen for seen, _ in entry]
        count = len(views)
        projector = heard.get("online.projector", [])
        projections = [_rows(made) for _, made in projector]
        # What the projector is given is what the loop itself makes of the backbone's maps.
        embeddings = [_rows(seen) for seen, _ in projector] or [_rows(made) for _, made in entry]
        if not heard.get("online.backbone"):
            embeddings = []
        predicted = heard.get("online.predictor", [])
        predictions: list[Tensor | None] = [None] * count
        for number, (seen, made) in enumerate(predicted[-count:]):
            # A loop may predict from one view only: the input tells from which.
            same = [v for v, p in enumerate(projections[:count]) if p is not None and _is_same(seen, p)]
            predictions[same[0] if same and predictions[same[0]] is None else number] = _rows(made)
        targets = self._place_targets(views, heard)
        count = len(views)
        return Branches(
            tuple(ViewSpec(v.shape[-1]) for v in views), _padded(embeddings, count), _padded(projections, count),
            _padded(predictions, count), _padded(targets, count), views=views,
        )  # fmt: skip

    def _parts(self, name: str) -> list[tuple[Tensor, Tensor]]:
        """Input and output of each view."""
        pairs = list(self._seen[name])
        if self.together and pairs:
            pairs = list(zip(pairs[-1][0].chunk(self.views), pairs[-1][1].chunk(self.views), strict=True))
        return pairs

    def _place_targets(
        self, views: list[Tensor], heard: Mapping[str, list[tuple[Tensor, Tensor]]]
    ) -> list[Tensor | None]:
        """Target projections by view; a view that only the target saw is added to `views`."""
        inputs = heard.get("target.backbone") or heard.get("target.projector") or []
        outputs = heard.get("target.projector") or inputs
        if self._targets_at is None or len(self._targets_at) != len(inputs):
            self._targets_at = _matched(views, [seen for seen, _ in inputs])
        targets: list[Tensor | None] = [None] * max([len(views), *(at + 1 for at in self._targets_at)])
        for at, (seen, _), (_, made) in zip(self._targets_at, inputs, outputs, strict=False):
            if at >= len(views):
                views.append(seen)
            targets[at] = _rows(made)
        return targets


_SHORT = {torch.float16: "fp16", torch.bfloat16: "bf16"}


def _matched(views: Sequence[Tensor], seen: Sequence[Tensor]) -> list[int]:
    """Which view each of the target's inputs is: the same memory, else the same pixels, else one of its own.

    Waits for the device; asked once, for a loop does the same in every step.
    """
    places: list[int] = []
    for tensor in seen:
        free = [v for v in range(len(views)) if v not in places]
        alike = [v for v in free if _is_same(views[v], tensor)]
        alike = alike or [v for v in free if views[v].shape == tensor.shape and torch.equal(views[v], tensor)]
        places.append(alike[0] if alike else max([len(views) - 1, *places]) + 1)
    return places


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel()


def _first(value: Any) -> Tensor | None:
    """The first tensor of floats in what went into a module or came out of it."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return None
    return next((found for part in value if (found := _first(part)) is not None), None)


def _rows(tensor: Tensor) -> Tensor | None:
    """`[B, d]`: as it is, or maps of one pixel flattened, or larger ones averaged; None for other shapes."""
    if tensor.ndim == 4:
        return tensor.flatten(1) if tensor.shape[-2:] == (1, 1) else tensor.mean(dim=(2, 3))
    return tensor if tensor.ndim == 2 else None


def _padded(tensors: Sequence[Tensor | None], count: int) -> list[Tensor | None]:
    return [*tensors[-count:], *[None] * (count - len(tensors))]
