from __future__ import annotations

import pytest
import torch
from torch import nn

from sslkit.batch import Branches, Needs, ViewSpec, joined
from sslkit.siamese import Encoder, Siamese


class Copied:
    source = "copy"

    def make(self, online: nn.Module) -> nn.Module | None:
        import copy

        return copy.deepcopy(online).requires_grad_(False)


class Reused:
    source = "online"

    def make(self, online: nn.Module) -> nn.Module | None:
        return None


class Absent(Reused):
    source = "none"


SPECS = (ViewSpec(4), ViewSpec(4), ViewSpec(2, "local"))
NEEDS = Needs(predictions=(0, 1, 2), targets=(0, 1))


def siamese(updater: object, needs: Needs = NEEDS, forward: str = "separate", predictor: bool = True) -> Siamese:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 6))
    return Siamese(
        Encoder(backbone, nn.Linear(6, 5)), nn.Linear(5, 5) if predictor else None, updater, SPECS, needs, forward  # type: ignore[arg-type]
    )  # fmt: skip


VIEWS = [torch.randn(7, 3, s.size, s.size, generator=torch.Generator().manual_seed(s.size)) for s in SPECS]


def test_branches_hold_what_the_loss_needs_and_nothing_else() -> None:
    found = siamese(Copied(), Needs(predictions=(0,), targets=(1,)))(VIEWS)
    assert [p is not None for p in found.predictions] == [True, False, False]
    assert [t is not None for t in found.targets] == [False, True, False]
    assert [e is not None for e in found.embeddings] == [True, False, False]


def test_each_branch_is_the_composition_of_its_parts() -> None:
    model = siamese(Copied())
    found = model(VIEWS)
    for view in range(3):
        embedding = model.online.backbone(VIEWS[view])
        projection = model.online.projector(embedding)
        assert torch.allclose(found.embeddings[view], embedding)
        assert torch.allclose(found.projections[view], projection)
        assert torch.allclose(found.predictions[view], model.predictor(projection))  # type: ignore[misc]


@pytest.mark.parametrize("updater", [Copied(), Reused()])
def test_no_gradient_reaches_the_target(updater: object) -> None:
    found = siamese(updater)(VIEWS)
    assert all(not t.requires_grad for t in found.targets if t is not None)
    assert all(p.requires_grad for p in found.predictions if p is not None)


def test_without_a_target_or_predictor_the_places_are_empty() -> None:
    found = siamese(Absent(), Needs(projections=(0, 1)), predictor=False)(VIEWS)
    assert found.targets == [None] * 3
    assert found.predictions == [None] * 3
    assert found.projections[2] is None


def test_together_is_the_same_for_views_of_several_sizes() -> None:
    one, all_ = siamese(Copied())(VIEWS), siamese(Copied(), forward="together")(VIEWS)
    for a, b in zip(one.predictions + one.targets, all_.predictions + all_.targets, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, atol=1e-6)


def test_micro_batches_join_to_the_batch() -> None:
    model = siamese(Copied())
    whole = model(VIEWS)
    parts = []
    for rows in (slice(0, 3), slice(3, 7)):
        branches = model([v[rows] for v in VIEWS])
        branches.indices = torch.arange(7)[rows]
        parts.append(branches.detached())
    found = joined(parts)
    assert torch.allclose(found.predictions[1], whole.predictions[1], atol=1e-6)  # type: ignore[arg-type]
    assert torch.equal(found.indices, torch.arange(7))  # type: ignore[arg-type]
    assert found.labels is None
    assert isinstance(found, Branches)
    assert not found.predictions[0].requires_grad  # type: ignore[union-attr]


class Recorder(nn.Module):
    """Remembers what it was given; BatchNorm after it, so that groups can be told."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.seen: list[torch.Tensor] = []

    def forward(self, view: torch.Tensor) -> torch.Tensor:
        self.seen.append(view.detach().clone())
        return self.norm(view.flatten(1)[:, :3])


def split(groups: int) -> Siamese:
    torch.manual_seed(0)
    needs = Needs(projections=(0,), targets=(0,))
    return Siamese(Encoder(Recorder(), nn.Identity()), None, Copied(), (ViewSpec(1),), needs, "separate", groups)  # type: ignore[arg-type]


def test_split_batch_norm_normalises_each_group_apart() -> None:
    images = torch.randn(8, 3, 1, 1) * torch.arange(1, 9).view(8, 1, 1, 1)
    (projection,) = split(4)([images]).projections
    assert projection is not None
    pairs = projection.detach().view(4, 2, 3)
    torch.testing.assert_close(pairs.mean(1), torch.zeros(4, 3), atol=1e-5, rtol=0)
    assert (split(1)([images]).projections[0].view(4, 2, 3).mean(1).abs() > 0.1).any()  # type: ignore[union-attr]


def test_the_target_sees_other_groups_and_answers_in_order() -> None:
    images = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 1, 1)
    model = split(4)
    model.eval()  # running statistics: what comes out then depends on the image alone
    torch.manual_seed(1)
    found = model([images])
    seen = model.target.backbone.seen[-1][:, 0, 0, 0]  # type: ignore[union-attr]
    assert not torch.equal(seen, images[:, 0, 0, 0]), "shuffled"
    assert torch.equal(seen.sort().values, images[:, 0, 0, 0])
    assert torch.equal(found.targets[0], found.projections[0].detach()), "and put back"  # type: ignore[union-attr, arg-type]
    assert torch.equal(model.online.backbone.seen[-1], images)  # type: ignore[union-attr]
    torch.manual_seed(1)
    model([images])
    assert torch.equal(model.target.backbone.seen[-1][:, 0, 0, 0], seen), "keyed by the seed of the step"  # type: ignore[union-attr]


def test_a_reused_online_branch_encodes_the_targets_views_too() -> None:
    found = siamese(Reused(), Needs(projections=(0,), targets=(1,)))(VIEWS)
    assert [t is not None for t in found.targets] == [False, True, False]
    assert torch.equal(found.targets[1], found.projections[1].detach())  # type: ignore[union-attr, arg-type]
    assert siamese(Absent(), Needs(projections=(0,)))(VIEWS).projections[1] is None
