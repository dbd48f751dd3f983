"""The place where a component is tried out: the facts of a small run, images, and what it builds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from sslkit import randomness, registry
from sslkit.api import Component, DataInfo, ParamGroup, RunInfo
from sslkit.batch import Branches, LossTerms, Needs, ViewSpec
from sslkit.data import cache_folder
from sslkit.errors import UserError
from sslkit.testing.outcome import Nonconforming, NotApplicable, described, require

BATCH = 16
"""Images of a step."""
DIM = 8
"""Width of the projections that a loss is given."""
IMAGES = 48
EPOCHS = 100
"""Long enough for a warm-up of some epochs; only a few steps are taken."""
CLASSES = 4


def run_info(image_size: int = 32, channels: int = 3, views: Sequence[ViewSpec] | None = None) -> RunInfo:
    """The facts of the small run that components are built for."""
    return RunInfo(
        seed=0,
        device="cpu",
        image_size=image_size,
        channels=channels,
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
        train_images=IMAGES,
        total_steps=EPOCHS * (IMAGES // BATCH),
        steps_per_epoch=IMAGES // BATCH,
        batch_size=BATCH,
        class_names=tuple(f"class {n}" for n in range(CLASSES)),
        labelled=True,
        views=tuple(views) if views is not None else (ViewSpec(image_size),) * 2,
    )


def view_sets(size: int) -> list[tuple[ViewSpec, ...]]:
    """Views that a loss is offered in turn; of those that it takes, the first are those of its other checks."""
    wide, small = ViewSpec(size), ViewSpec(max(8, size // 2), "local")
    crops = [(wide,) * 2 + (small,) * n for n in (2, 4, 6)]
    return [(wide,) * 2, crops[0], (wide,) * 3, (wide,) * 4, *crops[1:], (wide,)]


def pictures(n: int, run: RunInfo, seed: int = 0) -> Tensor:
    """uint8 `[n, C, H, W]`: soft random blobs, every one another, with the channels unlike each other."""
    drawn = torch.rand(n, run.channels, 5, 5, generator=randomness.generator(seed, "pictures"))
    side = run.image_size
    smooth = torch.nn.functional.interpolate(drawn, size=(side, side), mode="bilinear", align_corners=True)
    return (smooth * 255).to(torch.uint8)


class Bench:
    """A component, and the small run that it is tried in.

    Args:
        component: The spec, with the options that it requires.
        run: The facts of the run; images of 32 px with 3 channels without it.
    """

    def __init__(self, component: Component, run: RunInfo | None = None) -> None:
        self.component, self.run = component, run or run_info()
        self.kind, self.cls = component.kind, type(component)

    @property
    def key(self) -> str:
        """What messages call the component."""
        return f"{self.kind} {self.cls.__name__}"

    @cached_property
    def name(self) -> str:
        """The name that recipes use.

        Raises:
            NotApplicable: there is none, which is for the check `entry_point` to say.
        """
        try:
            return registry.name_of(self.cls)
        except UserError:
            raise NotApplicable("needs the name of an entry point; see the check entry_point") from None

    # ------------------------------------------------------------ what it builds

    def built(self, *arguments: Any, run: RunInfo | None = None, seed: int = 0) -> Any:
        """A fresh live object, made under a keyed seed as the engine does.

        Raises:
            NotApplicable: it cannot be built, which is for the check `builds` to say.
        """
        try:
            with randomness.seeded(seed, self.kind):
                return self.component.build(*arguments, run or self.run)  # type: ignore[attr-defined]
        except Exception as error:  # whatever a stranger's code raises
            raise NotApplicable(f"needs what build() makes, and it raised {described(error)}") from error

    @cached_property
    def opened(self) -> Any:
        """What a data source opened; large ones take seconds, so the checks share it."""
        return self.open()

    def open(self) -> Any:
        """Open a data source."""
        try:
            return self.component.build(data_info())  # type: ignore[attr-defined]
        except Exception as error:  # whatever a stranger's code raises
            raise NotApplicable(f"needs what build() opens, and it raised {described(error)}") from error

    def module(self, in_dim: int = 12, seed: int = 0, run: RunInfo | None = None) -> nn.Module:
        """A backbone, a head, a loss or a target updater; a loss for the views of `run`."""
        arguments = {"head": (in_dim,), "loss": (DIM,)}.get(self.kind, ())
        run = (run or self.loss_run) if self.kind == "loss" else self.run
        made = self.built(*arguments, run=run, seed=seed)
        if not isinstance(made, nn.Module):
            raise NotApplicable("needs a torch.nn.Module; see the check builds")
        return made

    def optimizer(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer over these parameters: those of one dimension or none apart, as the engine groups them."""
        groups = [
            ParamGroup("backbone", excluded, chosen)
            for excluded in (False, True)
            if (chosen := [p for p in parameters if (p.ndim <= 1) == excluded])
        ]
        made = self.built(groups)
        if not isinstance(made, torch.optim.Optimizer):
            raise NotApplicable("needs a torch.optim.Optimizer; see the check builds")
        return made

    # ------------------------------------------------------------ what a loss is given

    @cached_property
    def loss_runs(self) -> tuple[RunInfo, ...]:
        """The runs with each set of views that the loss takes; that with two views where it takes none."""
        sets = view_sets(self.run.image_size)
        found = []
        for specs in [*sets, self.run.views] if self.run.views not in sets else sets:
            run = run_with(self.run, specs)
            try:
                self.component.build(DIM, run).needs(specs)  # type: ignore[attr-defined]
            except UserError:
                continue
            except Exception:  # the checks that ask for these views will say what is wrong
                pass
            found.append(run)
        return tuple(found) or (run_with(self.run, sets[0]),)

    @property
    def loss_run(self) -> RunInfo:
        """The run with the first set of views that the loss takes."""
        return self.loss_runs[0]

    def needs(self, loss: Any, run: RunInfo | None = None) -> Needs:
        """What the loss wants of the views, which are those of `run`.

        Raises:
            NotApplicable: it says so in no valid way, which is for the check `needs` to say.
        """
        try:
            needs = loss.needs((run or self.loss_run).views)
        except Exception as error:  # whatever a stranger's code raises
            raise NotApplicable(f"needs an answer of needs(), and it raised {described(error)}") from error
        if not isinstance(needs, Needs):
            raise NotApplicable("needs an answer of needs(); see the check needs")
        return needs

    def branches(self, needs: Needs, seed: int = 0, n: int = BATCH, run: RunInfo | None = None) -> Branches:
        """What networks might make of the views of `run`: leaves that record gradients, targets that do not."""
        drawn = randomness.generator(seed, "branches")
        run = run or self.loss_run
        specs = run.views
        common = torch.randn(n, DIM, generator=drawn)

        def rows(wanted: Sequence[int], width: int = DIM) -> list[Tensor | None]:
            noise = [torch.randn(n, width, generator=drawn) for _ in specs]
            base = common if width == DIM else 0
            return [(base + e) if v in wanted else None for v, e in enumerate(noise)]

        made = Branches(
            specs,
            rows(needs.online, 12),
            # A prediction is made from a projection, so both are there, as in the engine.
            rows(needs.online),
            rows(needs.predictions),
            rows(needs.targets),
            torch.randperm(IMAGES, generator=drawn)[:n],
            torch.arange(n) % CLASSES if run.labelled else None,
        )
        for tensors in (made.embeddings, made.projections, made.predictions):
            for tensor in tensors:
                if tensor is not None:
                    tensor.requires_grad_()
        return made


def run_with(run: RunInfo, specs: Sequence[ViewSpec]) -> RunInfo:
    """The same run with other views."""
    return replace(run, views=tuple(specs))


def data_info() -> DataInfo:
    """What a data source is built with."""
    return DataInfo(seed=0, cache=cache_folder(), say=lambda text: None)


# ---------------------------------------------------------------- what checks share


def terms_of(out: object) -> LossTerms:
    """What a loss returned, if it is what it should be.

    Raises:
        Nonconforming: it is not.
    """
    if not isinstance(out, LossTerms):
        raise Nonconforming(
            f"forward returns {type(out).__name__}; return sslkit.api.LossTerms(total, {{name: value}})"
        )
    return out


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers, also of those that are not saved."""
    everything = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in everything}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> str | None:
    """The name of the first tensor that differs, NaN being like NaN."""
    for name in before.keys() | after.keys():
        a, b = before.get(name), after.get(name)
        if a is None or b is None or a.shape != b.shape or not bool(torch.equal(a.nan_to_num(), b.nan_to_num())):
            return name
    return None


def finite(tensor: Tensor, what: str) -> None:
    """Fail the check unless every number is finite.

    Raises:
        Nonconforming: one is not.
    """
    require(
        bool(torch.isfinite(tensor).all()),
        f"{what} holds NaN or infinity; guard divisions, logarithms and square roots (add an eps) and look for large "
        "exponents",
    )


@contextmanager
def default_random_state(seed: int) -> Iterator[None]:
    """Torch's default generator at this seed inside the block, and as it was after it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
