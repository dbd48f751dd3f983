from __future__ import annotations

import pytest
import torch
from conftest import TINY

from sslkit import registry
from sslkit.api import Backbone
from sslkit.build import build, choose_device
from sslkit.errors import RunFailed, UserError
from sslkit.recipe import Recipe, parse_recipe

CPU = torch.device("cpu")


def recipe(*overrides: str) -> Recipe:
    return parse_recipe(TINY, "r.toml", overrides)


def test_the_facts_of_the_run() -> None:
    run = build(recipe(), CPU, print).run
    assert (run.train_images, run.steps_per_epoch, run.total_steps, run.batch_size) == (1347, 10, 20, 128)
    assert (run.image_size, run.channels, run.class_names) == (16, 3, tuple("0123456789"))
    assert [v.size for v in run.views] == [16, 16]


def test_every_parameter_is_in_one_group() -> None:
    parts = build(recipe(), CPU, print)
    grouped = [p for g in parts.groups for p in g.parameters]
    trained = [*parts.model.online.parameters(), *parts.model.predictor.parameters()]  # type: ignore[union-attr]
    assert len(grouped) == len({id(p) for p in grouped})
    assert {id(p) for p in grouped} == {id(p) for p in trained}, "and none of the target's"
    assert all((p.ndim <= 1) == g.excluded for g in parts.groups for p in g.parameters)
    together = build(recipe("optimizer.exclude_bias_and_norm=false"), CPU, print)
    assert {g.excluded for g in together.groups} == {False}


def test_the_target_starts_as_the_online_network() -> None:
    model = build(recipe(), CPU, print).model
    assert model.target is not None
    for ours, theirs in zip(model.online.parameters(), model.target.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert not theirs.requires_grad


class Failing(Backbone):
    """Raises."""

    def build(self, run: object) -> torch.nn.Module:
        raise KeyError("weights")


class Dimless(Backbone):
    """Lacks feature_dim."""

    def build(self, run: object) -> torch.nn.Module:
        return torch.nn.Flatten()


class Untrue(Backbone):
    """Has another width than it says."""

    def build(self, run: object) -> torch.nn.Module:
        network = torch.nn.Flatten()
        network.feature_dim = 8  # type: ignore[assignment]
        return network


@pytest.mark.parametrize(
    ("component", "says"),
    [
        (Failing(), "backbone 'mine' from mine 1.0 failed to build: KeyError"),
        (Dimless(), "no attribute 'feature_dim'"),
        (Untrue(), r"gives \[2, \d+\] for an input of \[2, .*\], and has feature_dim = 8; its kind promises \[B, feat"),
    ],
)
def test_a_component_that_breaks_its_contract_is_named(
    component: Backbone, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = recipe().model_copy(update={"backbone": component})
    real, mine = registry.provider_of, registry.Provider("backbone", "mine", "m:C", "mine", "1.0", None)
    monkeypatch.setattr(registry, "provider_of", lambda cls: mine if cls in (Failing, Dimless, Untrue) else real(cls))
    with pytest.raises(RunFailed, match=says):
        build(changed, CPU, print)


def test_a_loss_that_does_not_add_up_refuses_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    from sslkit_cosine.loss import CosineLoss

    monkeypatch.setattr(CosineLoss, "additive", False)
    with pytest.raises(UserError, match="losses of micro-batches do not add up"):
        build(recipe("train.accumulate=2"), CPU, print)


def test_parts_that_nothing_would_use_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from sslkit.batch import Needs
    from sslkit_cosine.loss import CosineLoss

    monkeypatch.setattr(CosineLoss, "needs", lambda self, specs: Needs(projections=(0, 1)))
    with pytest.raises(UserError, match=r"uses no predictions, so the \[predictor\] would never be trained"):
        build(recipe(), CPU, print)
    with pytest.raises(UserError, match=r"uses no target branch; set target_updater.use = 'none'"):
        build(recipe("predictor.use=identity"), CPU, print)
    assert build(recipe("predictor.use=identity", "target_updater.use=none"), CPU, print).model.target is None


def test_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto").type == "cpu"
    with pytest.raises(UserError, match="no CUDA device"):
        choose_device("cuda")


STRIDED = ["train.precision=bf16", "backbone.widths=[4, 4, 4, 4, 4, 4]", "backbone.strides=[2, 2, 2, 2, 2, 2]"]


def test_convolutions_that_bf16_breaks_on_a_cpu_are_refused() -> None:
    """Sides of 16, 8, 4, 2, 1, and the sixth convolution strides over a single pixel."""
    with pytest.raises(UserError, match=r"wrong gradients for the backbone's .*views of 16 px reach as a single pixel"):
        build(recipe(*STRIDED), CPU, print)
    build(recipe(*STRIDED, "train.precision=fp32"), CPU, print)
    build(recipe("train.precision=bf16"), CPU, print)
