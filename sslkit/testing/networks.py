"""Checks of what `build` makes, and of backbones and heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sslkit import randomness
from sslkit.features import in_eval_mode
from sslkit.testing.bench import BATCH, DIM, Bench, changed, data_info, default_random_state, finite, state_of
from sslkit.testing.core import check
from sslkit.testing.outcome import Nonconforming, described, require

WIDTHS = (12, 5)
"""Input dimensions that heads are built for."""

PROMISES: dict[str, tuple[str, ...]] = {
    "backbone": ("feature_dim",),
    "head": ("out_dim",),
    "loss": ("needs", "additive"),
    "target_updater": ("make", "update", "tau", "source", "evaluated"),
    "view_generator": ("specs", "draw", "crop", "appear", "clean"),
    "data_source": ("train", "test", "class_names", "fingerprint", "bad"),
    "optimizer": ("param_groups", "step", "state_dict"),
    "schedule": ("__call__",),
    "observer": (),
}
"""What the live object of each kind has, besides what it does: see `sslkit.contracts`."""
CLASSES: dict[str, tuple[type, str]] = {
    "backbone": (nn.Module, "torch.nn.Module"),
    "head": (nn.Module, "torch.nn.Module"),
    "loss": (nn.Module, "torch.nn.Module"),
    "target_updater": (nn.Module, "torch.nn.Module"),
    "optimizer": (torch.optim.Optimizer, "torch.optim.Optimizer"),
}


@check("build() makes an object that has everything its kind promises")
def builds(bench: Bench) -> None:
    """With the arguments that the engine gives."""
    try:
        with randomness.seeded(0, bench.kind):
            made = _build(bench)
    except Exception as error:  # whatever a stranger's code raises
        raise Nonconforming(
            f"build() raised {described(error)}; the run it was given: images of {bench.run.image_size} px with "
            f"{bench.run.channels} channels, batches of {BATCH}, {bench.run.total_steps} steps. If it needs other "
            "options, give them (check-plugin: --set KEY=VALUE), or another size (--image-size)"
        ) from error
    cls, name = CLASSES.get(bench.kind, (object, ""))
    require(
        isinstance(made, cls),
        f"build() returns {type(made).__name__}, not a {name}; return the live object from build(), and let its class "
        f"derive from {name}",
    )
    for attribute in PROMISES[bench.kind]:
        require(
            hasattr(made, attribute),
            f"{type(made).__name__} has no {attribute!r}, which a {bench.kind} needs; see the kind's contract in "
            "sslkit.contracts (docs/reference/api.md)",
        )
    for attribute in PROMISES[bench.kind] if bench.kind in ("backbone", "head") else ():
        dim = getattr(made, attribute)
        require(type(dim) is int and dim > 0, f"{type(made).__name__}.{attribute} is {dim!r}; make it a positive int")


def _build(bench: Bench) -> Any:
    component: Any = bench.component
    if bench.kind == "data_source":
        bench.opened = component.build(data_info())
        return bench.opened
    if bench.kind == "optimizer":
        from sslkit.api import ParamGroup

        return component.build([ParamGroup("backbone", False, [nn.Parameter(torch.ones(2, 2))])], bench.run)
    arguments = {"head": (WIDTHS[0],), "loss": (DIM,)}.get(bench.kind, ())
    return component.build(*arguments, bench.loss_run if bench.kind == "loss" else bench.run)


@check("the same seed gives the same initial weights", "backbone", "head", "loss")
def build_seeded(bench: Bench) -> None:
    """The engine seeds torch's default generator before it builds a part."""
    differs = changed(state_of(bench.module(seed=1)), state_of(bench.module(seed=1)))
    require(
        differs is None,
        f"two builds under one seed differ in {differs!r}; draw initial values from torch's default generator alone, "
        "without numpy, random, time or a generator of your own",
    )


# ---------------------------------------------------------------- backbones and heads


def batch(bench: Bench, width: int = WIDTHS[0], n: int = BATCH, seed: int = 0) -> Tensor:
    """Normalised images for a backbone, features for a head."""
    run = bench.run
    shape = (run.channels, run.image_size, run.image_size) if bench.kind == "backbone" else (width,)
    return torch.randn(n, *shape, generator=randomness.generator(seed, "batch"))


def out_dim(module: Any) -> int:
    """The width that a backbone or a head promises."""
    return int(getattr(module, "feature_dim", 0) or module.out_dim)


def _examine(bench: Bench, module: nn.Module, given: Tensor, mode: str) -> None:
    attribute = "feature_dim" if bench.kind == "backbone" else "out_dim"
    before = given.clone()
    what = f"in {mode} mode, {list(given.shape)} -> "
    try:
        out = module(given)
    except Exception as error:  # whatever a stranger's code raises
        facts = "in_dim" if bench.kind == "head" else "run.channels and run.image_size"
        raise Nonconforming(f"{what}{described(error)}; take {facts} as build() is given it") from error
    expected = (len(given), out_dim(module))
    require(isinstance(out, Tensor), what + f"{type(out).__name__}; return one tensor [B, {attribute}]")
    require(
        tuple(out.shape) == expected,
        what + f"{list(out.shape)}; it should be {list(expected)}: [B, {attribute}]. Flatten or pool what is left of "
        f"the image, and set {attribute} to the width of the output",
    )
    require(out.dtype == torch.float32, what + f"{out.dtype}; return float32 for float32 input")
    finite(out, f"the output in {mode} mode")
    require(
        torch.equal(given, before),
        "forward changes the tensor it is given; do not begin with an in-place "
        "operation (ReLU(inplace=True), +=), for others read that tensor too",
    )


@check("float [B, ...] becomes finite float [B, d] with the d that is promised", "backbone", "head")
def output_shape(bench: Bench) -> None:
    """In both modes; heads for several input widths, backbones for the sizes of the run's views."""
    for width in WIDTHS if bench.kind == "head" else WIDTHS[:1]:
        module = bench.module(width)
        for mode in ("train", "eval"):
            module.train(mode == "train")
            with torch.no_grad():
                _examine(bench, module, batch(bench, width), mode)


@check("gradients reach every trainable parameter and are finite", "backbone", "head")
def gradients(bench: Bench) -> None:
    """A parameter without one is never trained, and stops DistributedDataParallel."""
    module = bench.module().train()
    given = batch(bench).requires_grad_(bench.kind == "head")
    out = module(given)
    weights = torch.randn(out.shape, generator=randomness.generator(1, "weights"))
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if not trained and not out.requires_grad:
        raise Nonconforming("the output has no gradient; remove detach() and no_grad() from forward")
    (out * weights).sum().backward()
    for name, parameter in trained:
        require(
            parameter.grad is not None,
            f"no gradient reaches the parameter {name!r}; use it in forward, or set requires_grad = False where it "
            "is meant to stay as it is",
        )
        finite(parameter.grad, f"the gradient of {name!r}")  # type: ignore[arg-type]
    if bench.kind == "head":
        require(
            given.grad is not None,
            "no gradient reaches the head's input, so nothing below would learn; remove "
            "detach() and no_grad() from forward",
        )


@check("in eval mode, what comes of an image depends on that image alone and changes nothing", "backbone", "head")
def evaluation(bench: Bench) -> None:
    """Features and projections are then the same in whatever batches they are computed."""
    module = bench.module().train()
    with torch.no_grad():
        module(batch(bench, seed=1))
    images, before = batch(bench), state_of(module)
    with in_eval_mode(module):
        whole, again = module(images), module(images)
        parts = torch.cat([module(images[:1]), module(images[1:])])
    require(
        torch.equal(whole, again),
        "in eval mode the same images give another output the second time; let dropout "
        "and all that is random ask self.training",
    )
    differs = changed(before, state_of(module))
    require(differs is None, f"a forward pass in eval mode changes {differs!r}; move buffers only if self.training")
    require(
        torch.allclose(whole, parts, rtol=1e-3, atol=1e-4),
        "in eval mode the output for an image depends on the other images of the batch; use running statistics (as "
        "BatchNorm does) where self.training is False",
    )


@check("the output and its gradient are finite under autocast to bfloat16", "backbone", "head", "loss")
def autocast(bench: Bench) -> None:
    """`train.precision = "bf16"` runs networks so; losses may be called so in loops of others."""
    module = bench.module().train()
    with default_random_state(0), torch.autocast("cpu", torch.bfloat16):
        if bench.kind == "loss":
            from sslkit.testing.bench import terms_of

            branches = bench.branches(bench.needs(module))
            for name in ("embeddings", "projections", "predictions", "targets"):
                setattr(branches, name, [None if t is None else t.bfloat16() for t in getattr(branches, name)])
            out = terms_of(module(branches)).total
        else:
            out = module(batch(bench))
    finite(out, "under autocast to bfloat16 the output")
    if out.requires_grad:
        out.float().square().sum().backward()
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            finite(parameter.grad, f"under autocast to bfloat16 the gradient of {name!r}")
