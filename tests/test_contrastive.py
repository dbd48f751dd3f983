"""NT-Xent, DCL and SupCon: values and gradients of the papers' formulas, and what must not change them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import generator, run_info
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from sslkit.api import Loss
from sslkit.batch import Branches, ViewSpec
from sslkit.errors import UserError
from sslkit_contrastive import DCL, NTXent, SupCon
from sslkit_schedules import Linear

GLOBAL, LOCAL = ViewSpec(32), ViewSpec(16, "local")
LABELS = torch.tensor([0, 1, 0, 2, 1, 0])
seeds = st.integers(0, 2**31 - 1)
Formula = Callable[[list[Tensor]], Tensor]


def build(spec: Loss) -> nn.Module:
    return spec.build(8, run_info(labelled=True))


def branches(
    projections: list[Any], labels: Tensor | None = LABELS, specs: tuple[ViewSpec, ...] | None = None
) -> Branches:
    nothing: list[Tensor | None] = [None] * len(projections)
    specs = specs or (GLOBAL,) * len(projections)
    return Branches(specs, nothing, projections, nothing, nothing, labels=labels)


def views(count: int, n: int = 6, d: int = 8, seed: int = 0) -> list[Tensor]:
    drawn = torch.randn(count, n, d, generator=generator(seed), dtype=torch.float64)
    return [view.requires_grad_() for view in drawn]


def cos(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b) / (a.norm() * b.norm())


def total(values: list[Tensor]) -> Tensor:
    return torch.stack(values).sum()


def simclr_equation_1(z: list[Tensor], t: float = 0.5) -> Tensor:
    """The paper's sum over all 2N samples k but i."""
    samples, n = torch.cat(z), len(z[0])
    losses = []
    for i in range(2 * n):
        j = (i + n) % (2 * n)
        below = total([(cos(samples[i], samples[k]) / t).exp() for k in range(2 * n) if k != i])
        losses.append(-((cos(samples[i], samples[j]) / t).exp() / below).log())
    return total(losses) / (2 * n)


def by_pairs(z: list[Tensor], term: Callable[[int, int, int, Tensor], Tensor], t: float) -> Tensor:
    """The mean over ordered pairs (v, u) of views of image b of `term(v, u, b, sum of exponentials of negatives)`."""
    count, n = len(z), len(z[0])
    losses = []
    for v in range(count):
        for b in range(n):
            negatives = total([(cos(z[v][b], z[w][c]) / t).exp() for w in range(count) for c in range(n) if c != b])
            losses += [term(v, u, b, negatives) for u in range(count) if u != v]
    return total(losses) / len(losses)


def nt_xent_formula(z: list[Tensor], t: float = 0.5) -> Tensor:
    def term(v: int, u: int, b: int, negatives: Tensor) -> Tensor:
        positive = (cos(z[v][b], z[u][b]) / t).exp()
        return -(positive / (positive + negatives)).log()

    return by_pairs(z, term, t)


def dcl_formula(z: list[Tensor], t: float = 0.1, sigma: float | None = None) -> Tensor:
    def weight(v: int, u: int, b: int) -> Tensor:
        if sigma is None:
            return torch.ones((), dtype=torch.float64)
        exponentials = torch.stack([(cos(z[v][c], z[u][c]) / sigma).exp() for c in range(len(z[0]))])
        return (2 - exponentials[b] / exponentials.mean()).detach()

    return by_pairs(z, lambda v, u, b, negatives: -weight(v, u, b) * cos(z[v][b], z[u][b]) / t + negatives.log(), t)


def supcon_formula(z: list[Tensor], labels: Tensor = LABELS, t: float = 0.1) -> Tensor:
    samples, of = torch.cat(z), labels.repeat(len(z))
    losses = []
    for i in range(len(samples)):
        others = [a for a in range(len(samples)) if a != i]
        below = total([(cos(samples[i], samples[a]) / t).exp() for a in others])
        positives = [p for p in others if of[p] == of[i]]
        ratios = [((cos(samples[i], samples[p]) / t).exp() / below).log() for p in positives]
        losses.append(-total(ratios) / len(positives))
    return total(losses) / len(samples)


CASES: dict[str, tuple[Loss, Formula]] = {
    "nt_xent": (NTXent(), nt_xent_formula),
    "nt_xent_cold": (NTXent(temperature=0.07), lambda z: nt_xent_formula(z, 0.07)),
    "dcl": (DCL(), dcl_formula),
    "dcl_warm": (DCL(temperature=0.7), lambda z: dcl_formula(z, 0.7)),
    "dclw": (DCL(weighted=True), lambda z: dcl_formula(z, sigma=0.5)),
    "dclw_sharp": (DCL(weighted=True, sigma=0.2), lambda z: dcl_formula(z, sigma=0.2)),
    "supcon": (SupCon(), supcon_formula),
    "supcon_warm": (SupCon(temperature=0.3), lambda z: supcon_formula(z, t=0.3)),
    "supcon_without_labels": (SupCon(use_labels=False), lambda z: supcon_formula(z, labels=torch.arange(6))),
}
cases = pytest.mark.parametrize(("spec", "formula"), CASES.values(), ids=CASES)
specs = pytest.mark.parametrize("spec", [spec for spec, _ in CASES.values()], ids=CASES)


def assert_same(ours: Tensor, theirs: Tensor, inputs: list[Tensor], rtol: float = 1e-10) -> None:
    """Values and gradients."""
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol)
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        assert b.abs().max() > 1e-4
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


@cases
@pytest.mark.parametrize("count", [2, 3])
def test_value_and_gradient_are_the_formulas(spec: Loss, formula: Formula, count: int):
    z = views(count)
    assert_same(build(spec)(branches(z)).total, formula(z), z)


def test_two_views_are_the_sum_over_all_samples_of_simclr():
    z = views(2)
    assert_same(build(NTXent())(branches(z)).total, simclr_equation_1(z), z)


def test_labels_that_all_differ_leave_the_views_of_an_image():
    z = views(2)
    ours = build(SupCon(temperature=0.5))(branches(z, torch.arange(6))).total
    assert_same(ours, build(NTXent())(branches(z)).total, z)


def test_supcon_without_labels_is_nt_xent_for_two_views():
    z = views(2)
    supcon = build(SupCon(temperature=0.5, use_labels=False))
    for labels in (None, LABELS):
        assert_same(supcon(branches(z, labels)).total, build(NTXent())(branches(z)).total, z)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_supcon_without_labels_has_a_label_for_every_image(count: int):
    z = views(count)
    every = build(SupCon(use_labels=False))(branches(z, LABELS)).total
    assert_same(every, build(SupCon())(branches(z, torch.arange(6))).total, z)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["nt_xent", "nt_xent_cold", "dcl", "dcl_warm", "dclw", "dclw_sharp"])
@pytest.mark.parametrize("n", [2, 32])
def test_against_lightly(name: str, n: int):
    pytest.importorskip("lightly")
    from lightly.loss import DCLLoss, DCLWLoss, NTXentLoss

    theirs = {
        "nt_xent": NTXentLoss(0.5),
        "nt_xent_cold": NTXentLoss(0.07),
        "dcl": DCLLoss(0.1),
        "dcl_warm": DCLLoss(0.7),
        "dclw": DCLWLoss(0.1),
        "dclw_sharp": DCLWLoss(0.1, sigma=0.2),
    }[name]
    z = views(2, n=n, d=16)
    assert_same(build(CASES[name][0])(branches(z)).total, theirs(*z), z)


@specs
@given(seed=seeds, scale=st.floats(1e-2, 1e2))
@settings(deadline=None, max_examples=20)
def test_lengths_do_not_matter(spec: Loss, seed: int, scale: float):
    z = views(3, seed=seed)
    lengths = torch.rand(3, 6, 1, generator=generator(seed), dtype=torch.float64) + scale
    scaled = [view * length for view, length in zip(z, lengths, strict=True)]
    torch.testing.assert_close(build(spec)(branches(scaled)).total, build(spec)(branches(z)).total)


@specs
@given(seed=seeds, count=st.integers(2, 4))
@settings(deadline=None, max_examples=20)
def test_order_of_images_and_of_views_does_not_matter(spec: Loss, seed: int, count: int):
    z = views(count, seed=seed)
    plain = build(spec)(branches(z))
    order = torch.randperm(6, generator=generator(seed))
    shuffled = build(spec)(branches([view[order] for view in z], LABELS[order]))
    turned = build(spec)(branches(z[1:] + z[:1]))
    for other in (shuffled, turned):
        torch.testing.assert_close(other.total, plain.total)
        torch.testing.assert_close(other.terms, plain.terms)


@given(seed=seeds)
@settings(deadline=None, max_examples=20)
def test_only_the_equality_of_labels_matters(seed: int):
    z = views(2, seed=seed)
    renamed = torch.tensor([40, -1, 7])[LABELS]
    torch.testing.assert_close(build(SupCon())(branches(z, renamed)), build(SupCon())(branches(z)))


@specs
def test_local_views_take_part_like_global_ones(spec: Loss):
    module, z = build(spec), views(3)
    mixed = (GLOBAL, LOCAL, LOCAL)
    assert module.needs(mixed).projections == (0, 1, 2)
    assert module.needs(mixed).predictions == module.needs(mixed).targets == ()
    torch.testing.assert_close(module(branches(z, specs=mixed)).total, module(branches(z)).total)


def test_terms_of_perfect_and_of_collapsed_views():
    apart = torch.eye(4, 8)
    labels = torch.tensor([0, 0, 1, 1])
    for spec in (NTXent(), DCL(), DCL(weighted=True), SupCon(use_labels=False)):
        perfect = build(spec)(branches([apart, apart, apart], labels)).terms
        assert perfect == {"contrastive_accuracy": 1, "cosine": 1}
    # of five positives two are the other views of the image, three are orthogonal
    supervised = build(SupCon())(branches([apart, apart, apart], labels)).terms
    torch.testing.assert_close(supervised, {"contrastive_accuracy": torch.tensor(1.0), "cosine": torch.tensor(0.4)})

    alike = torch.randn(8, generator=generator()).expand(4, 8)
    for spec in (NTXent(), DCL(), SupCon()):
        collapsed = build(spec)(branches([alike, alike], labels)).terms
        assert collapsed["contrastive_accuracy"] == 0
        torch.testing.assert_close(collapsed["cosine"], torch.tensor(1.0))


def test_accuracy_counts_the_nearest_other_sample():
    angles = torch.tensor([[0.0, 1.0, 3.0], [0.1, 2.1, 2.9]])  # both views of the second image are nearest to others
    z = [torch.stack([a.cos(), a.sin()], dim=1) for a in angles]
    assert build(NTXent())(branches(z)).terms["contrastive_accuracy"] == pytest.approx(4 / 6)
    # if the first and second image have one label, only the second's second view goes astray
    supervised = build(SupCon())(branches(z, torch.tensor([0, 0, 1]))).terms
    assert supervised["contrastive_accuracy"] == pytest.approx(5 / 6)


@specs
def test_terms_do_not_hold_the_graph_and_there_is_no_state(spec: Loss):
    module = build(spec)
    assert not module.additive
    assert module.prevents_collapse
    terms = module(branches(views(2))).terms
    assert set(terms) == {"contrastive_accuracy", "cosine"}
    assert all(term.shape == () and not term.requires_grad for term in terms.values())
    assert not hasattr(module, "commit")
    assert module.state_dict() == {}


@specs
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(spec: Loss, dtype: torch.dtype):
    half = [(z.detach() * 1000).to(dtype).requires_grad_() for z in views(2, d=64)]  # beyond float16's 65504 squared
    exact = build(spec)(branches([z.detach().double() for z in half])).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = build(spec)(branches(half)).total
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact.float(), rtol=1e-5, atol=1e-5)
    found.backward()
    assert all(z.grad is not None and z.grad.isfinite().all() and z.grad.any() for z in half)


@specs
def test_a_low_temperature_and_zero_vectors_stay_finite(spec: Loss):
    cold = spec.model_copy(update={"temperature": 0.002})
    z = [view.detach().float().requires_grad_() for view in views(2)]
    for inputs in (z, [torch.zeros(6, 8, requires_grad=True) for _ in range(2)]):
        found = build(cold)(branches(inputs)).total
        found.backward()
        assert found.isfinite()
        assert all(view.grad is not None and view.grad.isfinite().all() for view in inputs)


def test_nt_xent_keeps_the_digits_of_a_small_loss():
    """Far below float32's resolution at 1: cross-entropy that subtracts from the positive's logit would give 0."""
    z = [torch.eye(4, 8), torch.eye(4, 8)]
    found = build(NTXent(temperature=0.05))(branches(z)).total
    assert found.item() == pytest.approx(6 * math.exp(-20), rel=1e-4)


@pytest.mark.parametrize(
    ("moving", "fixed"),
    [
        (NTXent(temperature=Linear(start=1.0, end=0.5)), NTXent(temperature=0.8)),
        (SupCon(temperature=Linear(start=1.0, end=0.5)), SupCon(temperature=0.8)),
        (DCL(temperature=Linear(start=1.0, end=0.5)), DCL(temperature=0.8)),
        (DCL(weighted=True, sigma=Linear(start=1.0, end=0.5)), DCL(weighted=True, sigma=0.8)),
    ],
    ids=lambda spec: type(spec).__name__,
)
def test_a_schedule_moves_the_number(moving: Loss, fixed: Loss):
    module, z = build(moving), views(2)
    for inner in module.modules():
        if hasattr(inner, "before_step"):
            inner.before_step(4)  # of 10
    found, expected = module(branches(z)), build(fixed)(branches(z))
    torch.testing.assert_close(found.total, expected.total, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.terms, expected.terms, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("spec", [NTXent(), DCL(), SupCon()], ids=lambda spec: type(spec).__name__)
def test_what_does_not_suffice_is_refused(spec: Loss):
    module, z = build(spec), views(2)
    with pytest.raises(UserError, match="two or more views"):
        module.needs((GLOBAL,))
    with pytest.raises(UserError, match="no projection of view 1"):
        module(branches([z[0], None]))
    with pytest.raises(UserError, match=r"train\.batch_size above 1"):
        module(branches(views(2, n=1), LABELS[:1]))


def test_data_without_labels_is_refused():
    with pytest.raises(UserError, match=r"gives no labels; .* loss\.use_labels = false"):
        SupCon().build(8, run_info())
    SupCon(use_labels=False).build(8, run_info())
    with pytest.raises(UserError, match=r"has no labels: .* loss\.use_labels = false"):
        build(SupCon())(branches(views(2), None))


@pytest.mark.parametrize(
    ("spec", "option"),
    [
        (NTXent(temperature=0), "temperature"),
        (DCL(temperature=-1), "temperature"),
        (DCL(weighted=True, sigma=Linear(start=1.0, end=-1.0)), "sigma"),
        (SupCon(temperature=0), "temperature"),
    ],
)
def test_a_number_that_is_not_positive_is_refused(spec: Loss, option: str):
    with pytest.raises(UserError, match=rf"loss\.{option}: is .* above 0"):
        build(spec)


def test_sigma_without_weights_is_refused():
    with pytest.raises(ValidationError, match="set weighted = true"):
        DCL(sigma=0.3)
