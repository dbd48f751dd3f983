"""DINO and ReSSL by the papers' formulas and against lightly; DINO's head layer by layer."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import run_info
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from sslkit.batch import Branches, ViewSpec, joined
from sslkit.errors import UserError
from sslkit.nn import unit
from sslkit_distillation import DINO, DINOHead, ReSSL
from sslkit_distillation.dino import DINOLoss
from sslkit_distillation.head import PrototypeHead
from sslkit_distillation.ressl import ReSSLLoss
from sslkit_ema import EMA
from sslkit_schedules import Linear

GLOBAL, LOCAL = ViewSpec(32), ViewSpec(16, "local")
TWO = (GLOBAL, GLOBAL)
MULTI = (GLOBAL, GLOBAL, LOCAL, LOCAL)
DIM, IMAGES = 5, 6
RUN = run_info(total_steps=100, steps_per_epoch=5)
seeds = st.integers(0, 2**31 - 1)
views = pytest.mark.parametrize("specs", [TWO, MULTI, (GLOBAL, LOCAL), (GLOBAL, GLOBAL, GLOBAL)], ids=len)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dino(**options: Any) -> Any:
    module = DINO(**options).build(DIM, RUN)
    assert isinstance(module, DINOLoss)
    return module.double()


def ressl(seed: int = 1, **options: Any) -> Any:
    torch.manual_seed(seed)
    module = ReSSL(**({"queue": 11} | options)).build(DIM, RUN)
    assert isinstance(module, ReSSLLoss)
    module.double().queue.rows.copy_(unit(module.queue.rows))  # of length 1 in float64 too
    return module


Make = Callable[..., Any]
both = pytest.mark.parametrize("make", [dino, ressl])


def branches(module: Any, specs: tuple[ViewSpec, ...], seed: int = 0, images: int = IMAGES) -> Branches:
    """Leaves that take gradients, wherever the loss asks for something."""
    online, target = random(2, len(specs), images, DIM, seed=seed)
    needs = module.needs(specs)
    nothing: list[Tensor | None] = [None] * len(specs)
    projections = [z.clone().requires_grad_() if v in needs.projections else None for v, z in enumerate(online)]
    targets = [t.clone().requires_grad_() if v in needs.targets else None for v, t in enumerate(target)]
    return Branches(specs, list(nothing), projections, list(nothing), targets)


def changed(
    given: Branches, projection: Callable[[Tensor], Tensor], target: Callable[[Tensor], Tensor] | None = None
) -> Branches:
    """The same branches with every projection, and every target, put through a function."""
    return Branches(
        given.specs,
        given.embeddings,
        [None if z is None else projection(z) for z in given.projections],
        given.predictions,
        [None if t is None else (target or projection)(t) for t in given.targets],
    )


def leaves(tensors: list[Tensor | None]) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def cross_entropy(target: Tensor, logits: Tensor) -> Tensor:
    """- sum_k P_k log Q_k of one image, from both logits, term by term."""
    p, q = target.detach().exp(), logits.exp()
    return -sum(p_k / p.sum() * (q_k / q.sum()).log() for p_k, q_k in zip(p, q, strict=True))  # type: ignore[return-value]


def dino_by_formula(module: Any, given: Branches, soft: float = 0.1, sharp: float = 0.04) -> Tensor:
    """Algorithm 1: H(t1, s2) / 2 + H(t2, s1) / 2, and the mean over all pairs of views where there are more."""
    found = []
    for number, t in enumerate(given.targets):
        for view, s in enumerate(given.projections):
            if t is not None and s is not None and view != number:
                for b in range(len(s)):
                    found.append(cross_entropy((t[b] - module.centre[0]) / sharp, s[b] / soft))
    return torch.stack(found).mean()


def ressl_by_formula(module: Any, given: Branches, soft: float = 0.1, sharp: float = 0.04) -> Tensor:
    queue = module.queue.rows
    t = given.targets[0]
    assert t is not None
    found = []
    for s in leaves(given.projections):
        for b in range(len(s)):
            weak = torch.stack([t[b] @ u / t[b].norm() / u.norm() / sharp for u in queue])
            strong = torch.stack([s[b] @ u / s[b].norm() / u.norm() / soft for u in queue])
            found.append(cross_entropy(weak, strong))
    return torch.stack(found).mean()


# ---------------------------------------------------------------- both losses


@views
@pytest.mark.parametrize(("make", "formula"), [(dino, dino_by_formula), (ressl, ressl_by_formula)])
def test_value_and_gradients_are_the_formulas(make: Make, formula: Any, specs: tuple[ViewSpec, ...]):
    module = make()
    if make is dino:
        module.centre.copy_(random(1, DIM, seed=9))
    given = branches(module, specs)
    expected, total = formula(module, given), module(given).total
    wanted = leaves(given.projections)
    torch.testing.assert_close(total, expected, rtol=1e-11, atol=0)
    expected_gradients = torch.autograd.grad(expected, wanted)
    for ours, theirs in zip(torch.autograd.grad(total, wanted), expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


@both
def test_no_gradient_reaches_a_target(make: Make):
    module = make()
    given = branches(module, MULTI)
    module(given).total.backward()
    assert all(t.grad is None for t in leaves(given.targets))
    assert all(z.grad is not None and z.grad.any() for z in leaves(given.projections))


@given(seed=seeds)
@settings(deadline=None)
@both
def test_order_of_images_and_of_strong_views_does_not_matter(make: Make, seed: int):
    module = make()
    specs = (GLOBAL, GLOBAL, GLOBAL)
    given = branches(module, specs, seed)
    plain = module(given).total
    order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(module(changed(given, lambda z: z[order])).total, plain)
    given.projections[1:], given.targets[1:] = given.projections[:0:-1], given.targets[:0:-1]
    torch.testing.assert_close(module(given).total, plain)


@both
def test_micro_batches_add_up(make: Make):
    module = make()
    assert module.additive
    given = branches(module, MULTI, images=12)
    rows = torch.arange(12).chunk(3)
    parts = [changed(given, lambda z, chunk=chunk: z[chunk]) for chunk in rows]  # type: ignore[misc]
    whole = module(given)
    torch.testing.assert_close(torch.stack([module(part).total for part in parts]).mean(), whole.total)
    for name, value in whole.terms.items():
        torch.testing.assert_close(torch.stack([module(part).terms[name] for part in parts]).mean(), value)
    again = joined([part.detached() for part in parts])
    other = copy.deepcopy(module)
    module.commit(given.detached())
    other.commit(again)
    for name, value in module.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value)


@both
def test_terms_are_the_teachers_entropy_and_the_divergence(make: Make):
    module = make()
    given = branches(module, MULTI)
    terms = module(given)
    logits = [t if make is dino else unit(t) @ module.queue.rows.T for t in leaves(given.targets)]
    entropy = torch.stack([cross_entropy(row / 0.04, row / 0.04) for each in logits for row in each]).mean()
    torch.testing.assert_close(terms.terms["teacher_entropy"], entropy.detach())
    torch.testing.assert_close(terms.terms["teacher_entropy"] + terms.terms["kl"], terms.total.detach())
    assert terms.terms["kl"] > 0
    assert not any(term.requires_grad or term.ndim for term in terms.terms.values())


@both
def test_forward_moves_nothing(make: Make):
    module = make()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module(branches(module, TWO)).total.backward()
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


@both
def test_state_comes_back(make: Make):
    module, other = make(), make()
    module.commit(branches(module, TWO, seed=3).detached())
    other.load_state_dict(module.state_dict())
    for each in (module, other):
        each.commit(branches(module, TWO, seed=4).detached())
    given = branches(module, TWO, seed=5)
    assert torch.equal(module(given).total, other(given).total)


@both
@pytest.mark.parametrize("name", ["student_temperature", "teacher_temperature"])
def test_schedules_are_followed(make: Make, name: str):
    scheduled = make(**{name: Linear(start=0.04, end=0.24)})
    for step, value in ((0, 0.04), (50, 0.14), (100, 0.24)):
        for module in scheduled.modules():
            if hasattr(module, "before_step"):
                module.before_step(step)
        given = branches(scheduled, TWO)
        expected = make(**{name: value})(given).total
        torch.testing.assert_close(scheduled(given).total, expected, rtol=1e-5, atol=0)


@both
@pytest.mark.parametrize("name", ["student_temperature", "teacher_temperature"])
@pytest.mark.parametrize("value", [0.0, -1.0, Linear(start=0.1, end=-0.1)])
def test_a_temperature_that_is_not_positive_is_refused(make: Make, name: str, value: Any):
    with pytest.raises(UserError, match=rf"loss\.{name}: is .* above 0"):
        make(**{name: value})


@both
def test_half_precision_is_computed_in_float32(make: Make):
    module = make().float()
    given = branches(module, TWO)
    half = changed(given, lambda z: z.detach().bfloat16().requires_grad_())
    total = module(half).total
    assert total.dtype == torch.float32
    exact = module.double()(changed(half, lambda z: z.detach().double())).total
    torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=0)
    total.backward()
    assert all(z.grad is not None and z.grad.isfinite().all() for z in leaves(half.projections))


@both
def test_large_outputs_stay_finite(make: Make):
    module = make().float()
    given = changed(branches(module, TWO), lambda z: (z.detach() * 1e6).float().requires_grad_())
    terms = module(given)
    terms.total.backward()
    assert terms.total.isfinite()
    assert all(term.isfinite() for term in terms.terms.values())
    assert all(z.grad is not None and z.grad.isfinite().all() for z in leaves(given.projections))


@both
def test_a_missing_branch_is_named(make: Make):
    module = make()
    given = branches(module, TWO)
    with pytest.raises(UserError, match="no projection of view 1"):
        module(Branches(TWO, [], [given.projections[0], None], [], given.targets))
    with pytest.raises(UserError, match="no target projection of view 0"):
        module(Branches(TWO, [], given.projections, [], [None, given.targets[1]]))


# ---------------------------------------------------------------- DINO


@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("specs", [TWO, MULTI], ids=len)
@pytest.mark.filterwarnings("ignore")
def test_dino_against_lightly_for_several_steps(specs: tuple[ViewSpec, ...], momentum: float):
    pytest.importorskip("lightly")
    from lightly.loss import DINOLoss as Theirs

    sharp = 0.0625  # lightly keeps it in float32, where this number is exact
    module = dino(centre_momentum=momentum, teacher_temperature=sharp)
    theirs = Theirs(output_dim=DIM, center_momentum=momentum, teacher_temp=sharp).double()
    for step in range(4):
        given = branches(module, specs, seed=step)
        online = leaves(given.projections)
        expected = theirs([t.detach() for t in leaves(given.targets)], online)
        total = module(given).total
        torch.testing.assert_close(total, expected, rtol=1e-11, atol=0)
        for ours, other in zip(torch.autograd.grad(total, online), torch.autograd.grad(expected, online), strict=True):
            torch.testing.assert_close(ours, other, rtol=1e-10, atol=1e-13)
        module.commit(given.detached())
        torch.testing.assert_close(module.centre, theirs.center[0], rtol=1e-11, atol=0)
        assert module.centre.any()


@given(seed=seeds, constant=st.floats(-10, 10))
@settings(deadline=None)
def test_dinos_constants_do_not_matter(seed: int, constant: float):
    """A constant on all outputs of an image; and, once the centre has followed, the teacher's offset."""
    module = dino(centre_momentum=0.0)
    given = branches(module, TWO, seed)
    plain = module(given).total
    torch.testing.assert_close(module(changed(given, lambda z: z + constant)).total, plain)
    offset = random(1, DIM, seed=seed + 1)
    module.commit(given.detached())
    centred = module(given).total
    shifted = changed(given, lambda z: z, lambda t: t + offset)
    module.commit(shifted.detached())
    torch.testing.assert_close(module(shifted).total, centred)


def test_dinos_centre_is_the_moving_average_over_images_and_global_views():
    module = dino(centre_momentum=0.75)
    expected = torch.zeros(DIM, dtype=torch.float64)
    for step in range(3):
        given = branches(module, MULTI, seed=step)
        module.commit(given.detached())
        rows = torch.cat(leaves(given.targets))
        assert len(rows) == 2 * IMAGES
        for k in range(DIM):
            expected[k] = 0.75 * expected[k] + 0.25 * sum(row[k].item() for row in rows) / len(rows)
    torch.testing.assert_close(module.centre, expected[None])


def test_dinos_terms_tell_both_collapses():
    module = dino()
    uniform = torch.zeros(IMAGES, DIM, dtype=torch.float64)
    one_hot = uniform.clone()
    one_hot[:, 2] = 100.0
    for output, entropy in ((uniform, math.log(DIM)), (one_hot, 0.0)):
        terms = module(Branches(TWO, [], [output, output], [], [output, output])).terms
        torch.testing.assert_close(terms["teacher_entropy"], torch.tensor(entropy, dtype=torch.float64))
        torch.testing.assert_close(terms["kl"], torch.zeros((), dtype=torch.float64))
    assert not module.prevents_collapse


def test_dino_needs_every_projection_and_targets_of_global_views():
    needs = dino().needs(MULTI)
    assert needs.projections == (0, 1, 2, 3)
    assert needs.targets == (0, 1)
    assert needs.predictions == ()
    one = dino().needs((GLOBAL, LOCAL))  # the only global view has no teacher but itself
    assert (one.projections, one.targets) == ((1,), (0,))


@pytest.mark.parametrize("specs", [(), (GLOBAL,), (LOCAL, LOCAL)])
def test_dino_refuses_views_without_a_pair(specs: tuple[ViewSpec, ...]):
    with pytest.raises(UserError, match="two or more views"):
        dino().needs(specs)


def test_dinos_defaults_are_the_papers():
    options = DINO()
    assert (options.student_temperature, options.teacher_temperature, options.centre_momentum) == (0.1, 0.04, 0.9)


@pytest.mark.parametrize("momentum", [-0.1, 1.0, 2.0, Linear(start=0.9, end=1.1)])
def test_dino_refuses_a_centre_that_does_not_follow(momentum: Any):
    with pytest.raises(UserError, match=r"loss\.centre_momentum: is .*; it has to be"):
        dino(centre_momentum=momentum)


def test_dinos_centre_follows_a_schedule():
    module = dino(centre_momentum=Linear(start=0.0, end=0.5))
    given = branches(module, TWO)
    module.centre.fill_(1.0)
    module.centre_momentum.before_step(50)
    module.commit(given.detached())
    expected = 0.25 + 0.75 * torch.cat(leaves(given.targets)).mean(0, keepdim=True)
    torch.testing.assert_close(module.centre, expected.detach())


# ---------------------------------------------------------------- ReSSL


def test_ressls_queue_holds_the_newest_targets_of_the_weak_view():
    module = ressl(queue=8)
    first, second = (branches(module, MULTI, seed=seed) for seed in (0, 1))
    module.commit(first.detached())
    module.commit(second.detached())
    newest = torch.cat([unit(leaves(given.targets)[0].detach()) for given in (first, second)])[-8:]
    assert {tuple(row) for row in module.queue.rows.tolist()} == {tuple(row) for row in newest.tolist()}


@given(seed=seeds, scale=st.floats(1e-3, 1e3))
@settings(deadline=None)
def test_ressls_lengths_and_rotations_do_not_matter(seed: int, scale: float):
    module = ressl()
    given = branches(module, TWO, seed)
    plain = module(given).total
    torch.testing.assert_close(module(changed(given, lambda z: z * scale, lambda t: t / scale)).total, plain)
    rotation = torch.linalg.qr(random(DIM, DIM, seed=seed)).Q
    module.queue.rows.copy_(module.queue.rows[torch.randperm(11)] @ rotation)
    torch.testing.assert_close(module(changed(given, lambda z: z @ rotation)).total, plain)


def test_ressls_constant_output_is_seen():
    module = ressl()
    module.queue.rows.copy_(module.queue.rows[:1].expand(11, DIM))
    given = branches(module, TWO)
    terms = module(given)
    torch.testing.assert_close(terms.total, torch.tensor(math.log(11), dtype=torch.float64))
    torch.testing.assert_close(terms.terms["teacher_entropy"], torch.tensor(math.log(11), dtype=torch.float64))
    assert module.prevents_collapse


def test_ressls_weak_view_is_the_teachers_and_the_others_the_students():
    needs = ressl().needs(MULTI)
    assert (needs.projections, needs.targets, needs.predictions) == ((1, 2, 3), (0,), ())


@pytest.mark.parametrize("specs", [(), (GLOBAL,), (LOCAL, GLOBAL)])
def test_ressl_refuses_views_without_a_weak_and_a_strong_one(specs: tuple[ViewSpec, ...]):
    with pytest.raises(UserError, match="one or more strong views"):
        ressl().needs(specs)


def test_ressls_defaults():
    options = ReSSL()
    assert (options.student_temperature, options.teacher_temperature, options.queue) == (0.1, 0.04, 65536)
    with pytest.raises(ValidationError):
        ReSSL(queue=0)


# ---------------------------------------------------------------- DINO's head


def head(**options: Any) -> Any:
    torch.manual_seed(1)
    small = {"hidden_dim": 16, "bottleneck_dim": 6, "out_dim": 12}
    module = DINOHead(**(small | options)).build(DIM, RUN)
    assert isinstance(module, PrototypeHead)
    return module


def kinds(module: nn.Module) -> list[str]:
    return [type(layer).__name__ for layer in module.children()]


def test_the_heads_layers_are_the_papers():
    options = DINOHead()
    assert (options.layers, options.hidden_dim, options.bottleneck_dim, options.out_dim) == (3, 2048, 256, 65536)
    assert (options.batch_norm, options.norm_last_layer, options.freeze_last_layer_epochs) == (False, True, 1)
    assert kinds(head().mlp) == ["Linear", "GELU", "Linear", "GELU", "Linear"]
    assert kinds(head(layers=1).mlp) == ["Linear"]
    assert kinds(head(layers=2, batch_norm=True).mlp) == ["Linear", "BatchNorm1d", "GELU", "Linear"]
    module = DINOHead(out_dim=32).build(384, RUN)
    assert isinstance(module, PrototypeHead)
    shapes = [tuple(p.shape) for p in module.parameters()]
    assert shapes == [(2048, 384), (2048,), (2048, 2048), (2048,), (256, 2048), (256,), (32, 256)]
    assert module.out_dim == 32


def test_the_heads_weights_begin_small_and_without_bias():
    module = head(hidden_dim=512)
    for layer in module.mlp:
        if isinstance(layer, nn.Linear):
            assert not layer.bias.any()
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("norm_last_layer", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_the_head_against_lightlys(batch_norm: bool, norm_last_layer: bool):
    pytest.importorskip("lightly")
    from lightly.models.modules.heads import DINOProjectionHead

    theirs = DINOProjectionHead(DIM, 16, 6, 12, batch_norm=batch_norm, norm_last_layer=norm_last_layer).double()
    ours = head(batch_norm=batch_norm, norm_last_layer=norm_last_layer).double()
    missing = ours.mlp.load_state_dict(theirs.layers.state_dict(), strict=False).missing_keys
    assert all(name.endswith("bias") for name in missing)  # before BatchNorm lightly has no bias, and ours is 0
    with torch.no_grad():
        ours.last_layer.weight.copy_(theirs.last_layer.weight_v)
        if not norm_last_layer:
            theirs.last_layer.weight_g.copy_(random(12, 1, seed=5))
            ours.last_layer.length.copy_(theirs.last_layer.weight_g)
    x, weights = random(8, DIM), random(8, 12, seed=7)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-11, atol=1e-13)
    (ours(x) * weights).sum().backward()
    (theirs(x) * weights).sum().backward()
    pairs = [(ours.last_layer.weight, theirs.last_layer.weight_v), (ours.mlp[0].weight, theirs.layers[0].weight)]
    if not norm_last_layer:
        pairs.append((ours.last_layer.length, theirs.last_layer.weight_g))
    for mine, other in pairs:
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-9, atol=1e-12)


def test_the_heads_outputs_are_cosines():
    module = head().double()
    x = random(8, DIM)
    bottleneck = module.mlp(x)
    expected = torch.cosine_similarity(bottleneck[:, None], module.last_layer.weight[None], dim=-1)
    torch.testing.assert_close(module(x), expected)
    with torch.no_grad():
        module.last_layer.weight.mul_(torch.linspace(0.1, 9, 12, dtype=torch.float64)[:, None])
    torch.testing.assert_close(module(x), expected)  # lengths of rows say nothing


@pytest.mark.parametrize("norm_last_layer", [False, True])
def test_the_last_layer_is_frozen_for_its_time(norm_last_layer: bool):
    module = head(norm_last_layer=norm_last_layer, freeze_last_layer_epochs=0.6)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, weight_decay=0.1)
    for step in range(5):
        before = {name: p.detach().clone() for name, p in module.named_parameters()}
        optimizer.zero_grad()
        module(random(8, DIM, seed=step).float()).square().mean().backward()
        module.after_backward(step)
        optimizer.step()
        for name, parameter in module.named_parameters():
            frozen = step < 3 and name.startswith("last_layer")  # .6 of an epoch of 5 steps
            assert torch.equal(parameter, before[name]) == frozen, (step, name)


@pytest.mark.parametrize("norm_last_layer", [False, True])
def test_a_copy_of_the_head_follows_as_a_target(norm_last_layer: bool):
    module = head(norm_last_layer=norm_last_layer)
    updater: Any = EMA(tau=0.5).build(RUN)
    target = updater.make(module)
    x = random(8, DIM).float()
    assert torch.equal(target(x), module(x))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    assert not torch.equal(target(x), module(x))
    for _ in range(60):
        updater.update(module, target, 0.5)
    torch.testing.assert_close(target(x), module(x))
    assert not any(p.requires_grad for p in target.parameters())


def test_the_last_layer_computes_in_float32_under_autocast():
    module = head(hidden_dim=64, bottleneck_dim=32)
    x = random(8, DIM).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
        bottleneck = module.mlp(x)
    assert bottleneck.dtype == torch.bfloat16
    assert out.dtype == torch.float32
    exact = unit(bottleneck.double()) @ unit(module.last_layer.weight.double()).T
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_head_compiles_as_one_graph(autocast: bool):
    module = head(norm_last_layer=False)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=False)
    x = random(8, DIM).float()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize(
    "options", [{"layers": 0}, {"out_dim": 0}, {"bottleneck_dim": 0}, {"freeze_last_layer_epochs": -1.0}]
)
def test_the_head_refuses_wrong_options(options: dict[str, Any]):
    with pytest.raises(ValidationError):
        DINOHead(**options)
