"""A shipped recipe as the donor of loss, heads, target and optimizer, fitted to another set of images."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sslkit import sources
from sslkit.errors import UserError, did_you_mean
from sslkit.suggesting.lines import Choice, Choices

ENDING = "_cifar10"
LOCAL = (18 / 32, 96 / 224)
"""Side of local views by that of global ones: on small images as swav_cifar10 has it, on large ones as in the paper."""
WIDE = 1024
"""Of BYOL's hidden layers on a CPU: byol_cifar10_cpu's."""
TAUS = ((3_000, 0.9), (20_000, 0.97), (200_000, 0.99))
"""Up to how many steps a target starts with which tau: byol_cifar10_cpu's, then BYOL's presets of 40 and of 100 to 300
epochs of 312 steps; above, the 1000 epochs' .996."""
LONG = 10_000
"""Steps from which BYOL's own optimizer has its time."""
GROUP = 32
"""Images that BatchNorm wants in a group."""
PARTS = ("projector", "predictor", "loss", "target_updater", "optimizer")


def methods() -> list[str]:
    """Names of the methods that can be asked for."""
    return sorted(name.removesuffix(ENDING) for name in sources.shipped() if name.endswith(ENDING))


def method_named(name: str) -> Method:
    """The method of a name.

    Raises:
        UserError: there is none.
    """
    if name not in methods():
        raise UserError(f"--method: {name!r} is none of {', '.join(methods())}{did_you_mean(name, methods())}")
    path = sources.shipped()[name + ENDING]
    return Method(name, sources.resolve(sources.read(path), str(path))[0])


@dataclass(frozen=True)
class Method:
    """A shipped recipe that others are made after."""

    name: str
    tables: Mapping[str, Any]

    @property
    def recipe(self) -> str:
        """The donor's name."""
        return self.name + ENDING

    @property
    def compares(self) -> bool:
        """Whether images of a batch are compared with one another, so that a small batch costs accuracy."""
        return bool(self.tables["loss"]["use"] != "cosine")

    def few_negatives(self, batch: int) -> bool:
        """Whether the loss's negatives are those of a batch that is small for it."""
        return self.tables["loss"]["use"] in ("nt_xent", "dcl", "supcon", "moco_v3") and batch < 128

    def views(self, size: int, why: str, *, blurred: bool) -> Iterator[Choice]:
        """The donor's views at another size, with the blur that CIFAR recipes leave out."""
        given = {k: v for k, v in self.tables["view_generator"].items() if k not in ("mean", "std")}
        symmetric = not any(given["solarize"]) if isinstance(given.get("solarize"), list) else True
        for key, value in given.items():
            if key == "size":
                yield Choice(key, size, f"px; {why}")
            elif key == "blur":
                if isinstance(value, list):
                    now: Any = ([0.5, 0.5] if symmetric else [1.0, 0.1]) if blurred else [0.0, 0.0]
                else:
                    now = 0.5 if blurred else 0.0
                source = "SimCLR, appendix A" if symmetric else "BYOL, appendix B"
                yield Choice(key, now, source if blurred else f"at {size} px it leaves little to see")
            elif key == "views":
                yield Choice(key, [self._group(group, size, large=blurred) for group in value], f"px; {why}")
            else:
                yield Choice(key, value, self.recipe)
        if "size" not in given and not all("size" in group for group in given.get("views", [{}])):
            yield Choice("size", size, f"px; {why}")

    @staticmethod
    def _group(group: Mapping[str, Any], size: int, *, large: bool) -> dict[str, Any]:
        if "size" not in group:
            return dict(group)
        local = max(8, round(size * LOCAL[large] / 2) * 2)
        return {**group, "size": local if group.get("kind") == "local" else size}

    def parts(self, made: Choices, steps: int, per_epoch: int, images: int, batch: int, device: str) -> None:
        """Add heads, loss, target and optimizer."""
        tables = copy.deepcopy({k: self.tables.get(k) for k in PARTS})
        epochs, own = max(1, steps // per_epoch), self.tables["train"]["epochs"]
        for part, table in tables.items():
            if not isinstance(table, dict):  # predictor = false
                continue
            changed: dict[str, str] = {}
            if part == "loss":
                self._fit_loss(table, changed, images, batch)
            elif part == "target_updater":
                self._fit_tau(table, changed, steps)
            elif part == "optimizer" and self.name == "byol" and (device == "cpu" or steps < LONG):
                table = {
                    "use": "adamw",
                    "lr": {"use": "warmup_cosine", "peak": _adam_rate(batch)},
                    "weight_decay": 1e-4,
                }
                changed = {
                    "use": "ahead of SGD and LARS in short runs (byol_cifar10_cpu)" if device == "cpu" else
                    f"{steps:,} steps are few for byol_cifar10's LARS",
                    "lr": f".001 for batches of 256, by the root of the batch; warm-up and cosine: {self.recipe}",
                    "weight_decay": "byol_cifar10_cpu",
                }  # fmt: skip
            elif part in ("projector", "predictor") and self.name == "byol" and device == "cpu":
                table["hidden_dim"] = WIDE
                changed["hidden_dim"] = "a CPU feels the paper's 4096 (byol_cifar10_cpu)"
            _fit_epochs(table, changed, epochs, own, per_epoch)
            for key, value in table.items():
                made.add(f"{part}.{key}", value, changed.get(key, self.recipe))

    def _fit_loss(self, table: dict[str, Any], changed: dict[str, str], images: int, batch: int) -> None:
        queue = table.get("queue")
        if queue and queue > images // 2:
            table["queue"] = max(batch, images // 2 // (2 * batch) * 2 * batch)
            changed["queue"] = f"{self.recipe} has {queue}; half of the images, so that few meet themselves"

    def _fit_tau(self, table: dict[str, Any], changed: dict[str, str], steps: int) -> None:
        tau = table.get("tau")
        fitting = tau_for(steps)
        if isinstance(tau, dict) and isinstance(tau.get("start"), float) and fitting != tau["start"]:
            changed["tau"] = (
                f"at first the mean of some {1 / (1 - fitting):.0f} steps; {self.recipe}'s {tau['start']:g}, of some "
                f"{1 / (1 - tau['start']):.0f}, is for {'longer' if fitting < tau['start'] else 'shorter'} runs than "
                f"{steps:,} steps"
            )
            table["tau"] = {**tau, "start": fitting}

    def train(self, made: Choices, batch: int) -> None:
        """Add how the donor trains, apart from lengths; where it splits the batch, into groups of 32 images or more."""
        for key in ("forward", "batch_norm", "clip_grad_norm"):
            value = self.tables["train"].get(key)
            if key == "batch_norm" and value is not None and value.startswith("split:"):
                groups = min(int(value.removeprefix("split:")), max(2, batch // GROUP))
                if batch >= 4:  # two groups of two
                    made.add(f"train.{key}", f"split:{groups}", f"{self.recipe}: groups of {batch // groups} images")
            elif value is not None:
                made.add(f"train.{key}", value, self.recipe)


def tau_for(steps: int) -> float:
    """Where the tau of a run of this many steps starts."""
    return next((tau for below, tau in TAUS if steps < below), 0.996)


def _adam_rate(batch: int) -> float:
    return float(f"{0.001 * (batch / 256) ** 0.5:.2g}")


def _fit_epochs(table: dict[str, Any], changed: dict[str, str], epochs: int, own: int, per_epoch: int) -> None:
    """Lengths in epochs, in proportion to the run's; a warm-up of a twentieth of the steps."""
    for key, value in table.items():
        if isinstance(value, dict) and value.get("use") == "warmup_cosine":
            value.pop("warmup_epochs", None)
            value["warmup_steps"] = max(1, round(epochs * per_epoch / 20)) if epochs * per_epoch > 1 else 0
            changed.setdefault(key, "warm-up over a twentieth of the run")
        elif key.endswith("_epochs") and isinstance(value, int | float) and epochs != own:
            fitted = round(value * epochs / own)
            table[key] = max(1, fitted) if epochs > 10 else fitted
            changed[key] = f"{value:g} of {own} epochs"
