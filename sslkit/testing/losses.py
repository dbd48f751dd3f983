"""Checks of losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sslkit import randomness
from sslkit.api import RunInfo
from sslkit.batch import Branches, LossTerms, Needs, ViewSpec
from sslkit.errors import UserError
from sslkit.testing.bench import (
    BATCH,
    DIM,
    Bench,
    changed,
    default_random_state,
    finite,
    state_of,
    terms_of,
    view_sets,
)
from sslkit.testing.core import check
from sslkit.testing.outcome import Nonconforming, NotApplicable, described, require

MICRO_BATCHES = 2
TAKE_OR_REFUSE = "take them as they come, or let needs() refuse them with sslkit.errors.UserError"


def evaluated(loss: nn.Module, branches: Branches) -> LossTerms:
    """The loss under a seed of its own, as the engine reseeds before each step."""
    with default_random_state(0):
        return terms_of(loss(branches))


@check("needs() names views that are there, and refuses too few with a UserError", "loss")
def needs(bench: Bench) -> None:
    """For every set of views that it does not refuse."""
    for run in bench.loss_runs:
        _needs(bench, run)
    loss: Any = bench.module()
    try:
        loss.needs(())
    except UserError:
        pass
    except Exception as error:  # whatever a stranger's code raises
        raise Nonconforming(
            f"needs() raises {type(error).__name__} where there are no views; raise sslkit.errors.UserError with one "
            "line that says how many the loss compares"
        ) from None
    else:
        raise Nonconforming("needs() takes no views at all; raise sslkit.errors.UserError where they do not suffice")


def _needs(bench: Bench, run: RunInfo) -> None:
    specs = run.views
    try:
        wanted = bench.module(run=run).needs(specs)  # type: ignore[operator]
    except UserError as error:
        tried = ", ".join(_said(s) for s in view_sets(bench.run.image_size))
        raise Nonconforming(
            f"needs() refuses every set of views it was offered ({tried}): {error}. If it wants others, check it in a "
            "run that has them: parametrize(..., run=...)"
        ) from None
    except NotApplicable:
        raise
    except Exception as error:  # whatever a stranger's code raises
        raise Nonconforming(f"needs() raised {described(error)} for {_said(specs)} views; {TAKE_OR_REFUSE}") from error
    require(
        isinstance(wanted, Needs),
        f"needs() returns {type(wanted).__name__}; return sslkit.api.Needs(projections=(0, 1), ...)",
    )
    require(wanted.online, "needs() asks for no projection and no prediction, so there is nothing to train; name views")
    for name in ("projections", "predictions", "targets"):
        views = getattr(wanted, name)
        require(
            isinstance(views, tuple) and all(type(v) is int and 0 <= v < len(specs) for v in views),
            f"needs(): {name} = {views!r} for {len(specs)} views; give a tuple of view numbers from 0 to "
            f"{len(specs) - 1}",
        )


def _said(specs: Sequence[ViewSpec]) -> str:
    """`2`, or with local views `2 + 4 local`."""
    local = sum(spec.kind == "local" for spec in specs)
    return f"{len(specs) - local}" + (f" + {local} local" if local else "")


def _for_all_views(bench: Bench, examine: Callable[[nn.Module, Needs, Branches], None]) -> None:
    """Examine a loss built for each set of views that it takes.

    Raises:
        Nonconforming: with the views for which it fails.
    """
    for run in bench.loss_runs:
        loss = bench.module(run=run)
        wanted = bench.needs(loss, run)
        try:
            examine(loss, wanted, bench.branches(wanted, run=run))
        except Nonconforming as error:
            raise Nonconforming(f"{error} (with {_said(run.views)} views)") from None
        except Exception as error:  # whatever a stranger's code raises
            raise Nonconforming(
                f"with {_said(run.views)} views forward raised {described(error)}; {TAKE_OR_REFUSE}"
            ) from error


@check("forward gives a finite scalar total with a gradient, and finite detached scalar terms", "loss")
def loss_terms(bench: Bench) -> None:
    """What the step minimises, and what is logged; for every set of views that needs() takes."""
    _for_all_views(bench, lambda loss, wanted, branches: _terms(evaluated(loss, branches)))


def _terms(terms: LossTerms) -> None:
    total = terms.total
    require(isinstance(total, Tensor) and total.ndim == 0, f"total is {_shape(total)}; reduce it to a scalar: .mean()")
    require(
        total.dtype in (torch.float32, torch.float64),
        f"total is {total.dtype} for branches in float32; compute it in float32 at least: no .half(), no .bfloat16()",
    )
    finite(total, "the total")
    require(total.requires_grad, "total has no gradient; compute it from the branches without detach() or no_grad()")
    for name, value in terms.terms.items():
        require(
            isinstance(value, Tensor) and value.ndim == 0,
            f"the term {name!r} is {_shape(value)}; make it a "
            "0-dim tensor: it is logged, and .item() would make the host wait",
        )
        require(not value.requires_grad, f"the term {name!r} holds the graph; give value.detach()")
        finite(value, f"the term {name!r}")
        require(
            name not in ("loss", "step", "epoch", "lr", "tau"),
            f"a term may not be named {name!r}, which is logged already; rename it",
        )


def _shape(value: object) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


@check("a finite gradient reaches every view that needs() asks for, and every parameter of the loss", "loss")
def loss_gradients(bench: Bench) -> None:
    """What no gradient reaches is computed in vain; for every set of views that needs() takes."""
    _for_all_views(bench, _gradients)


def _gradients(loss: nn.Module, wanted: Needs, branches: Branches) -> None:
    evaluated(loss, branches).total.backward()
    for view in wanted.online:
        outputs = (branches.embeddings[view], branches.projections[view], branches.predictions[view])
        found = [t.grad for t in outputs if t is not None]
        reached = [g for g in found if g is not None]
        for gradient in reached:
            finite(gradient, f"the gradient of view {view}")
        require(
            any(bool(g.any()) for g in reached),
            f"needs() asks for view {view} of the online branch, but the loss gives it no gradient; use it without "
            "detach(), or leave it out of needs()",
        )
    for name, parameter in loss.named_parameters():
        if parameter.requires_grad:
            require(
                parameter.grad is not None,
                f"no gradient reaches the loss's own parameter {name!r}; use it in forward, or make it a buffer",
            )
            finite(parameter.grad, f"the gradient of {name!r}")  # type: ignore[arg-type]


@check("the total and its gradient are finite where all views of an image agree", "loss")
def finite_when_equal(bench: Bench) -> None:
    """Where a norm or a deviation is 0: its root has an infinite slope there, its logarithm an infinite value."""
    loss = bench.module()
    branches = bench.branches(bench.needs(loss))
    lists = (branches.embeddings, branches.projections, branches.predictions, branches.targets)
    for tensors in lists:
        present = [t for t in tensors if t is not None]
        for tensor in present[1:]:
            tensor.data.copy_(present[0])
    if branches.projections[0] is not None:
        for tensor in (t for tensors in lists[2:] for t in tensors if t is not None):
            tensor.data.copy_(branches.projections[0])
    total = evaluated(loss, branches).total
    finite(total, "with equal views the total")
    total.backward()
    for name, tensors in zip(("embeddings", "projections", "predictions"), lists, strict=False):
        for view, given in enumerate(tensors):
            if given is not None and given.grad is not None:
                finite(given.grad, f"with equal views the gradient of {name}[{view}]")


@check("without labels it computes the same way, or refuses with a UserError before the first step", "loss")
def unlabelled(bench: Bench) -> None:
    """Most data has none; build() and needs() see `run.labelled`."""
    run = replace(bench.loss_run, labelled=False, class_names=None)
    component: Any = bench.component
    try:
        with randomness.seeded(0, bench.kind):
            loss = component.build(DIM, run)
        wanted = loss.needs(run.views)
    except UserError:
        return
    try:
        total = evaluated(loss, bench.branches(wanted, run=run)).total
    except Exception as error:  # whatever a stranger's code raises
        raise Nonconforming(
            f"where labels are None forward raised {described(error)}; raise sslkit.errors.UserError in build() unless "
            "run.labelled"
        ) from error
    finite(total, "without labels the total")


@check("forward is pure: the same branches give the same loss, and nothing moves", "loss")
def pure(bench: Bench) -> None:
    """Queues and centres move in commit, once after each optimizer step."""
    loss = bench.module()
    branches = bench.branches(bench.needs(loss))
    lists = (branches.embeddings, branches.projections, branches.predictions, branches.targets)
    given = [t.detach().clone() for tensors in lists for t in tensors if t is not None]
    before = state_of(loss)
    first = evaluated(loss, branches).total.detach().clone()
    differs = changed(before, state_of(loss))
    require(differs is None, f"forward changes {differs!r}; move queues, centres and counters in commit(branches)")
    after = [t for tensors in lists for t in tensors if t is not None]
    require(
        all(torch.equal(a, b) for a, b in zip(given, after, strict=True)),
        "forward changes the branches that it is given; do not work on them in place",
    )
    second = evaluated(loss, branches).total
    require(
        torch.equal(first, second),
        "the same branches give another loss the second time; draw from torch's default generator alone, which is "
        "seeded before each step, and keep no state outside commit(branches)",
    )


@check("`additive` is True or False, and if True the mean over micro-batches is the loss of the batch", "loss")
def additive(bench: Bench) -> None:
    """Gradient accumulation rests on it."""
    loss: Any = bench.module()
    claim = getattr(loss, "additive", None)
    require(
        type(claim) is bool,
        f"{type(loss).__name__}.additive is {claim!r}; write `additive = True` in the class where the mean of the "
        "losses of micro-batches is the loss of the batch, else `additive = False`",
    )
    if not claim:
        return
    wanted = bench.needs(loss)
    branches = bench.branches(wanted)
    whole = evaluated(loss, branches).total.detach()
    size = BATCH // MICRO_BATCHES
    parts = [evaluated(loss, _rows(branches, slice(k * size, (k + 1) * size))).total for k in range(MICRO_BATCHES)]
    mean = torch.stack(parts).mean().detach()
    require(
        torch.allclose(whole, mean, rtol=1e-3, atol=1e-5),
        f"additive = True, but the loss of a batch is {float(whole):.6g} and the mean over its micro-batches "
        f"{float(mean):.6g}; set additive = False if images are compared with one another, or take means instead of "
        "sums over the batch",
    )


def _rows(branches: Branches, rows: slice) -> Branches:
    def cut(tensors: list[Tensor | None]) -> list[Tensor | None]:
        return [None if t is None else t.detach()[rows] for t in tensors]

    return Branches(
        branches.specs,
        cut(branches.embeddings),
        cut(branches.projections),
        cut(branches.predictions),
        cut(branches.targets),
        branches.indices[rows] if branches.indices is not None else None,
        branches.labels[rows] if branches.labels is not None else None,
    )


@check("`prevents_collapse` is True or False", "loss")
def prevents_collapse(bench: Bench) -> None:
    """`train` warns of recipes in which nothing keeps a constant output away."""
    loss: Any = bench.module()
    if not hasattr(loss, "prevents_collapse"):
        raise NotApplicable("the loss does not say, and is not warned of")
    claim = loss.prevents_collapse
    require(
        type(claim) is bool,
        f"{type(loss).__name__}.prevents_collapse is {claim!r}; write `prevents_collapse = True` in the class if a "
        "constant output is a bad solution of the loss itself (negatives, a variance term, centring), else False, and "
        "`train` will warn of recipes that collapse",
    )


@check("commit() moves the loss's own buffers and nothing else", "loss")
def commit(bench: Bench) -> None:
    """It is given detached branches, without gradients, after the optimizer's step."""
    loss: Any = bench.module()
    if not hasattr(loss, "commit"):
        raise NotApplicable("the loss has no commit(), so it has no state to move")
    branches = bench.branches(bench.needs(loss))
    detached = branches.detached()
    lists = ("embeddings", "projections", "predictions", "targets")
    given = {f"{n} {v}": t.clone() for n in lists for v, t in enumerate(getattr(detached, n)) if t is not None}
    parameters = {name: p.detach().clone() for name, p in loss.named_parameters()}
    with torch.no_grad(), default_random_state(0):
        loss.commit(detached)
    now = {f"{n} {v}": t for n in lists for v, t in enumerate(getattr(detached, n)) if t is not None}
    differs = changed(given, now)
    require(differs is None, f"commit() changes the branches it is given ({differs}); observers read them after it")
    differs = changed(parameters, {name: p.detach() for name, p in loss.named_parameters()})
    require(
        differs is None,
        f"commit() changes the parameter {differs!r}, which the optimizer moves; make what commit moves a buffer "
        "(register_buffer)",
    )
    for name, buffer in loss.named_buffers():
        require(
            not buffer.requires_grad,
            f"after commit() the buffer {name!r} holds a graph; assign in place under no_grad: self.x.copy_(...)",
        )
        finite(buffer, f"after commit() the buffer {name!r}") if buffer.is_floating_point() else None


@check("state saved and loaded into a fresh loss gives the same next loss", "loss")
def loss_state(bench: Bench) -> None:
    """After two commits; a resumed run rests on it."""
    loss: Any = bench.module()
    wanted = bench.needs(loss)
    for seed in (1, 2):
        if hasattr(loss, "commit"):
            with torch.no_grad(), default_random_state(seed):
                loss.commit(bench.branches(wanted, seed).detached())
    fresh = bench.module(seed=5)
    fresh.load_state_dict({name: tensor.clone() for name, tensor in loss.state_dict().items()})
    branches = bench.branches(wanted, seed=3)
    expected, found = (evaluated(module, branches).total.detach() for module in (loss, fresh))
    require(
        torch.equal(expected, found),
        f"after its state was saved and loaded the loss is {float(found):.6g} instead of {float(expected):.6g}; keep "
        "everything that commit() moves in buffers (register_buffer, persistent), not in plain attributes",
    )
