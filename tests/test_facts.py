from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslkit import facts
from sslkit.batch import Branches, LossTerms, Needs, ViewSpec
from sslkit.build import Parts, build
from sslkit.facts import gather
from sslkit.loss_facts import _constant
from sslkit.loss_facts import loss_facts as tried
from sslkit.recipe import read_recipe
from sslkit.rules import Facts


def built(tiny: Path, *overrides: str) -> Parts:
    return build(read_recipe(str(tiny), overrides), torch.device("cpu"), print)


def test_facts_of_a_healthy_recipe(tiny: Path) -> None:
    found = gather(built(tiny))
    assert found.total_steps == 2 * found.steps_per_epoch == 20  # type: ignore[operator]
    assert (found.target, found.optimizer, found.wants_predictions, found.prevents_collapse) == (
        "copy", "sgd", True, False,
    )  # fmt: skip
    assert found.tau is not None
    assert (found.tau.start, found.tau.above_one, found.tau.falls) == (0.9, None, None)
    assert found.unmoved == found.unoptimised == found.dead_inputs == ()
    assert found.labelled
    assert "knn_top1" in (found.quality or ())
    assert (found.images_share_draws, found.steps_share_draws, found.draws_are_keyed) == (False, False, True)
    assert found.view_difference is not None
    assert found.view_difference[1] > found.view_difference[0] > 0
    assert found.byol_scale == pytest.approx(1, abs=1e-4)
    assert (found.blank_loss, found.reads_labels, found.decayed_biases) == (4.0, False, False)
    assert (found.stem_stride, found.last_map) == (2.0, 4)
    assert found.batch_norm_layers == found.normalisation_layers == 4
    assert found.shared_images == 0
    assert found.commonest_image is not None
    assert found.commonest_image < 0.01
    assert (found.classes, found.test_classes, found.shared_draws) == (10, 10, ())
    assert (found.scale_sensitive, found.positives_counted) == (False, None)
    assert Facts.model_validate_json(found.model_dump_json(exclude_none=True)) == found


def test_looking_changes_nothing(tiny: Path) -> None:
    parts = built(tiny)
    before = [copy.deepcopy(m.state_dict()) for m in (parts.model, parts.loss, parts.updater)]
    state = torch.get_rng_state()
    modes = [m.training for m in parts.model.modules()]
    gather(parts)
    for module, old in zip((parts.model, parts.loss, parts.updater), before, strict=True):
        for name, value in module.state_dict().items():
            assert torch.equal(value, old[name]), name
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in parts.model.modules()] == modes


def test_options_of_a_recipe_show(tiny: Path) -> None:
    found = gather(built(
        tiny, "optimizer.exclude_bias_and_norm=false", "train.accumulate=4", "observers.knn.enabled=false",
        "train.accept=['stem_too_coarse']", "predictor.hidden_norm=none",
    ))  # fmt: skip
    assert found.decayed_biases
    assert found.batch_norm_images == 32
    assert "knn_top1" not in (found.quality or ())
    assert found.accepted == ("stem_too_coarse",)
    assert found.batch_norm_layers == 3


# ---------------------------------------------------------------- views


class Views:
    """Two views that are shifts of the image by drawn amounts, and ways for that to go wrong."""

    specs = (ViewSpec(8), ViewSpec(8))

    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        if self.fault == "global random":
            return {"shift": torch.randint(0, 8, (n, 2))}
        if self.fault == "constant":
            return {"shift": torch.tensor([[0, 3]]).expand(n, 2)}
        drawn = torch.randint(0, 8, (1 if self.fault == "one draw" else n, 2), generator=generator)
        return {"shift": drawn.expand(n, 2)}

    def crop(self, images: Tensor, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        def shifted(view: int) -> Tensor:
            amounts = parameters["shift"][:, 0 if self.fault == "identical" else view].tolist()
            pairs = zip(images, amounts, strict=True)
            return torch.stack([image.roll(amount, -1) for image, amount in pairs]) / 255

        return [shifted(0), shifted(1)]

    def appear(self, crops: Sequence[Tensor], parameters: Mapping[str, Tensor]) -> list[Tensor]:
        return list(crops)


@pytest.mark.parametrize(
    ("fault", "images_share", "steps_share", "keyed", "differ"),
    [
        ("", False, False, True, True), ("one draw", True, False, True, True), ("constant", False, True, True, True),
        ("global random", False, False, False, True), ("identical", False, False, True, False),
    ],
)  # fmt: skip
def test_what_is_wrong_with_views_is_seen(
    fault: str, images_share: bool, steps_share: bool, keyed: bool, differ: bool
) -> None:
    images = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8)
    found = facts.view_facts(cast(Any, Views(fault)), images, seed=1)
    assert found["images_share_draws"] is images_share
    assert found["steps_share_draws"] is steps_share
    assert found["draws_are_keyed"] is keyed
    assert (found["view_difference"][1] > 0) is differ
    assert found["view_scale"] == pytest.approx((0.5, 0.29), abs=0.02)


class Draws:
    """Parameters of views of n images."""

    def __init__(self, make: Callable[[int, torch.Generator], Tensor]) -> None:
        self.make = make

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"crop": torch.rand(n, 2, 4, generator=generator), "hue": self.make(n, generator)}


def coin(probability: float, *shape: int) -> Callable[[int, torch.Generator], Tensor]:
    return lambda n, g: torch.rand(*(n if size == 0 else size for size in shape), generator=g) < probability


SHARED: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "one for all": lambda n, g: torch.rand(1, 2, generator=g).expand(n, 2),
    "one coin for all": lambda n, g: coin(0.5, 1, 2)(n, g).expand(n, 2),
    "of the second view alone": lambda n, g: torch.stack([torch.rand(n, generator=g), torch.rand(1, generator=g)
                                                          .expand(n)], 1),
    "a rare coin for all": lambda n, g: coin(0.2, 1)(n, g).expand(n),
    "no dimension of images": lambda n, g: torch.rand((), generator=g),
}  # fmt: skip
OWN: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "a coin each": coin(0.5, 0, 2),
    "a coin that hardly ever falls": coin(0.02, 0, 2),
    "a coin that hardly ever does not": coin(0.98, 0, 2),
    "a switch": coin(1.0, 0, 2),
    "fixed": lambda n, g: torch.full((n, 2), 0.4),
    "images last": lambda n, g: torch.rand(10, n, generator=g),
    "nothing": lambda n, g: torch.rand(n, 0, generator=g),
    "of varying shape": lambda n, g: torch.rand(int(torch.randint(1, 9, (), generator=g)), generator=g),
}


@pytest.mark.parametrize("name", SHARED)
def test_a_parameter_that_one_draw_of_a_batch_gives_is_named(name: str) -> None:
    assert facts.shared_draws(cast(Any, Draws(SHARED[name])), seed=1) == ("hue",)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("seed", range(5))
def test_a_parameter_that_is_drawn_for_each_image_or_for_none_is_not(name: str, seed: int) -> None:
    assert facts.shared_draws(cast(Any, Draws(OWN[name])), seed) == ()


@pytest.mark.parametrize("generator", ["two_crops", "affine"])
def test_half_of_what_a_generator_draws_may_be_shared(tiny: Path, generator: str, monkeypatch: Any) -> None:
    views = built(tiny, f"view_generator.use={generator}").views
    assert facts.shared_draws(views, seed=1) == ()
    own, shared = views.draw, ("brightness", "flip", "light")

    def draw(n: int, generator: torch.Generator) -> dict[str, Tensor]:
        drawn = own(n, generator)
        return {name: v[:1].expand_as(v) if name in shared else v for name, v in drawn.items()}

    monkeypatch.setattr(views, "draw", draw)
    assert facts.shared_draws(views, seed=1) == (("light",) if generator == "affine" else ("flip", "brightness"))


def test_views_of_different_sizes_are_not_compared() -> None:
    small, large = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 8, 8)
    assert facts.view_difference([small, large]) is None
    assert facts.view_difference([small, large, large + 2]) == (2.0, 2.0)


class Pictures:
    """Images that a data source would hold."""

    labels = None

    def __init__(self, pictures: Tensor) -> None:
        self.tensor = pictures

    def __len__(self) -> int:
        return len(self.tensor)

    def read(self, indices: Tensor) -> Tensor:
        return self.tensor[indices]


def test_test_images_among_the_training_images_are_counted() -> None:
    train = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8)
    test = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8)
    test[:10] = train[20:30]
    assert facts.shared_images(cast(Any, Pictures(train)), cast(Any, Pictures(test))) == 0.25
    assert facts.shared_images(cast(Any, Pictures(train)), None) is None


class Stored(Pictures):
    """Images that do not fit in memory."""

    def __init__(self, pictures: Tensor) -> None:
        super().__init__(torch.empty(0))
        self.pictures = pictures
        self.tensor = cast(Tensor, None)

    def __len__(self) -> int:
        return len(self.pictures)

    def read(self, indices: Tensor) -> Tensor:
        assert len(indices) <= facts.IMAGES, "they would have to be decoded"
        return self.pictures[indices]


@pytest.mark.parametrize("kind", [Pictures, Stored])
def test_the_commonest_picture_is_counted(kind: type[Pictures]) -> None:
    pictures = torch.randint(0, 256, (60, 3, 8, 8), dtype=torch.uint8)

    def share() -> float | None:
        return facts.commonest_image(cast(Any, kind(pictures)))

    assert share() == 1 / 60
    pictures[::2] = pictures[0]
    assert share() == 0.5
    pictures[:] = pictures[0]
    assert share() == 1
    assert facts.commonest_image(cast(Any, kind(pictures[:1]))) is None, "one image is no copy"


def test_classes_are_counted(tiny: Path) -> None:
    parts = built(tiny)
    parts.data.train.labels = cast(Tensor, parts.data.train.labels) * 0
    assert (gather(parts).classes, gather(parts).test_classes) == (1, 10)
    parts.data.train.labels = None
    assert gather(parts).classes is None


# ---------------------------------------------------------------- networks


def test_a_large_image_stem_is_told_from_a_small_one() -> None:
    large = nn.Sequential(nn.Conv2d(3, 4, 7, 2, 3), nn.MaxPool2d(3, 2, 1), nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 4, 8))
    assert facts.map_facts(large, torch.zeros(1, 3, 32, 32), 32) == {"stem_stride": 4.0, "last_map": 1}
    small = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 2, 1))
    assert facts.map_facts(small, torch.zeros(1, 3, 32, 32), 32) == {"stem_stride": 1.0, "last_map": 16}
    patches = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Flatten())
    assert facts.map_facts(patches, torch.zeros(1, 3, 32, 32), 32) == {}


def test_normalisation_layers_are_counted() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.LayerNorm(2))
    found = facts.normalisation_facts([network, None, nn.SyncBatchNorm(2)])
    assert found == {"normalisation_layers": 3, "batch_norm_layers": 2, "batch_norm_synchronised": False}
    assert facts.normalisation_facts([nn.SyncBatchNorm(2)])["batch_norm_synchronised"] is True
    assert facts.normalisation_facts([nn.Linear(2, 2)])["normalisation_layers"] == 0


class Skips(nn.Module):
    """An updater that moves weights and forgets biases."""

    def update(self, online: nn.Module, target: nn.Module, tau: float) -> None:
        for o, (name, t) in zip(online.parameters(), target.named_parameters(), strict=True):
            if "bias" not in name:
                t.lerp_(o, 1 - tau)


def test_parameters_that_an_updater_forgets_are_named(tiny: Path) -> None:
    online = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    target = copy.deepcopy(online).requires_grad_(False)
    before = copy.deepcopy(target.state_dict())
    assert facts.unmoved(Skips(), online, target) == ("0.bias", "1.bias")
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items()), "tried on a copy"
    assert facts.unmoved(Skips(), online, None) is None


class NowAndThen(nn.Module):
    """Moves the target at every fourth call; or never."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every, self.calls = every, 0

    def update(self, online: nn.Module, target: nn.Module, tau: float) -> None:
        self.calls += 1
        if self.calls % self.every == 0:
            for o, t in zip(online.parameters(), target.parameters(), strict=True):
                t.lerp_(o, 1 - tau)


def test_targets_that_rarely_move_and_parameters_that_never_do_are_not_forgotten() -> None:
    online = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    target = copy.deepcopy(online).requires_grad_(False)
    assert facts.unmoved(NowAndThen(4), online, target) == ()
    assert facts.unmoved(NowAndThen(1000), online, target) is None, "training will tell"
    online[1].requires_grad_(False)
    assert facts.unmoved(Skips(), online, target) == ("0.bias",)


def test_convolutions_that_are_called_by_keyword_are_seen() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, self.b(input=self.a(input=x)))

    assert facts.map_facts(Named(), torch.zeros(1, 3, 32, 32), 32) == {"stem_stride": 2.0, "last_map": 16}


def test_parameters_that_no_optimizer_has_are_named() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2).requires_grad_(False), nn.Linear(2, 2))
    groups = torch.optim.SGD(network[0].parameters(), lr=0.1).param_groups
    assert facts.unoptimised(dict(network.named_parameters()), groups) == ("2.weight", "2.bias")


# ---------------------------------------------------------------- losses


class Made(nn.Module):
    """A cosine loss with a planted fault."""

    additive, prevents_collapse = True, False

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def needs(self, specs: Sequence[ViewSpec]) -> Needs:
        return Needs(predictions=(0, 1), targets=(0, 1))

    def forward(self, branches: Branches) -> LossTerms:
        (p0, p1), (t0, t1) = branches.predictions, branches.targets
        assert p0 is not None
        assert p1 is not None
        if self.fault == "dead":
            p1 = p1.detach()
        cosine = F.cosine_similarity(p0, cast(Tensor, t1)).mean() + F.cosine_similarity(p1, cast(Tensor, t0)).mean()
        total = 4 - 2 * cosine
        if "squared" in self.fault:
            total = F.mse_loss(p0, cast(Tensor, t1)) + F.mse_loss(p1, cast(Tensor, t0))
        if self.fault == "squared of targets":
            unit = [F.normalize(cast(Tensor, t), dim=1) for t in (t0, t1)]
            total = F.smooth_l1_loss(p0, unit[1]) + F.smooth_l1_loss(p1, unit[0])
        if self.fault == "halved":
            total = total / 2
        if self.fault == "sign":
            total = -total
        if self.fault == "labels":
            total = total + (p0.sum(1) * cast(Tensor, branches.labels)).mean()
        if self.fault == "nan":
            total = total * math.nan
        if self.fault == "refuses":
            raise ValueError("not this")
        return LossTerms(total)


def loss_facts(tiny: Path, fault: str) -> dict[str, Any]:
    parts = built(tiny)
    parts.loss = Made(fault)
    return tried(parts)


def test_a_sound_loss(tiny: Path) -> None:
    found = loss_facts(tiny, "")
    assert found["byol_scale"] == pytest.approx(1, abs=1e-4)
    assert found["dead_inputs"] == ()
    assert found["reads_labels"] is False
    assert found["agreement"][0] < found["agreement"][1]


def test_what_is_wrong_with_a_loss_is_seen(tiny: Path) -> None:
    assert loss_facts(tiny, "halved")["byol_scale"] == pytest.approx(0.5, abs=1e-4)
    assert loss_facts(tiny, "dead")["dead_inputs"] == ("predictions of view 1",)
    assert loss_facts(tiny, "labels")["reads_labels"] is True
    agreeing, unrelated = loss_facts(tiny, "sign")["agreement"]
    assert agreeing > unrelated
    assert "blank_loss" not in loss_facts(tiny, "refuses"), "training will tell"
    assert Facts.model_validate_json(Facts(**loss_facts(tiny, "nan")).model_dump_json()).agreement is None


def test_a_loss_of_lengths_is_told_from_one_of_unit_vectors(tiny: Path) -> None:
    for fault in ("squared", "squared of targets"):
        found = loss_facts(tiny, fault)
        assert (found["scale_sensitive"], found["byol_scale"]) == (True, None)
    for fault in ("", "halved", "sign"):
        assert loss_facts(tiny, fault)["scale_sensitive"] is False
    parts = built(tiny)
    parts.loss = Counts()
    assert tried(parts)["scale_sensitive"] is None, "it moves by itself"


class Contrastive(nn.Module):
    """NT-Xent as it is often written, with a planted fault."""

    additive, prevents_collapse = False, True

    def __init__(self, fault: str, temperature: float) -> None:
        super().__init__()
        self.fault, self.temperature = fault, temperature

    def needs(self, specs: Sequence[ViewSpec]) -> Needs:
        return Needs(projections=(0, 1))

    def forward(self, branches: Branches) -> LossTerms:
        n = len(cast(Tensor, branches.projections[0]))
        z = F.normalize(torch.cat(cast(list[Tensor], branches.projections)), dim=1)
        similar, itself = z @ z.T / self.temperature, torch.eye(2 * n, dtype=torch.bool)
        positive = torch.arange(2 * n).roll(n)
        if "unmasked" not in self.fault:
            similar = similar.masked_fill(itself, -math.inf)
        if "twice" in self.fault:
            similar = torch.cat([similar, similar.gather(1, positive[:, None])], 1)
        if "other view" in self.fault:
            similar, positive = z[:n] @ z[n:].T / self.temperature, torch.arange(n)
        total = F.cross_entropy(similar, positive, reduction="sum" if "sum" in self.fault else "mean")
        return LossTerms(total * (2 if "both" in self.fault else 1))


@pytest.mark.parametrize("temperature", [0.01, 0.07, 0.5, 1.0, 5.0])
@pytest.mark.parametrize(
    ("fault", "counted"),
    [("", 1), ("sum", 1), ("both", 1), ("other view", 1), ("unmasked", 2), ("unmasked sum", 2), ("unmasked both", 2),
     ("twice", 2), ("unmasked twice", 3)],
)  # fmt: skip
def test_a_view_among_its_own_negatives_is_seen(tiny: Path, fault: str, counted: int, temperature: float) -> None:
    parts = built(tiny, "loss.use=nt_xent", "predictor=false", "target_updater.use=none")
    parts.loss = Contrastive(fault, temperature)
    assert tried(parts)["positives_counted"] == pytest.approx(counted, abs=0.03)


@pytest.mark.parametrize(
    ("loss", "counted"),
    [("nt_xent", 1), ("supcon", 1), ("dcl", 0), ("barlow_twins", None), ("vicreg", None), ("lejepa", None)],
)
def test_losses_of_other_forms_are_left_alone(tiny: Path, loss: str, counted: float | None) -> None:
    found = tried(built(tiny, f"loss.use={loss}", "predictor=false", "target_updater.use=none"))
    assert found.get("positives_counted") == (counted if counted is None else pytest.approx(counted, abs=0.01))


def test_three_points_tell_a_constant_and_two_more_whether_there_is_one() -> None:
    curve = [2 + 30 * 0.3**k for k in range(5)]
    assert _constant(curve, 34) == pytest.approx(2)
    assert _constant([*curve[:4], curve[4] * 1.01], 34) is None
    assert _constant([c + 0.5 for c in curve], 34) is None, "32.5 terms"
    assert _constant([c + 3 for c in curve], 34) is None, "more terms than there are"


def test_the_loss_of_knowing_nothing_is_ln_m_of_a_contrastive_loss(tiny: Path) -> None:
    parts = built(
        tiny, "loss.use=nt_xent", "predictor=false", "target_updater.use=none", "train.batch_size=32",
    )  # fmt: skip
    found = tried(parts)
    assert found["blank_loss"] == pytest.approx(math.log(63), abs=1e-5)
    assert found["byol_scale"] is None
    assert found["prevents_collapse"] is True


class Counts(Made):
    """A loss that moves in its forward pass, which it should not."""

    def __init__(self) -> None:
        super().__init__("")
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, branches: Branches) -> LossTerms:
        cast(Tensor, self.calls).add_(1)
        return LossTerms(super().forward(branches).total + cast(Tensor, self.calls))


def test_a_loss_that_moves_is_tried_on_a_copy_and_not_taken_to_read_labels(tiny: Path) -> None:
    parts = built(tiny)
    parts.loss = Counts()
    assert tried(parts)["reads_labels"] is False
    assert int(cast(Tensor, parts.loss.calls)) == 0


def test_a_loss_that_does_not_say_whether_it_prevents_collapse_is_tried(tiny: Path) -> None:
    class Silent(Made):
        prevents_collapse = None  # type: ignore[assignment]

    parts = built(tiny)
    parts.loss = Silent("")
    assert tried(parts)["prevents_collapse"] is False, "a sum of cosines does not"
    parts.loss = Silent("squared")
    found = tried(parts)
    assert (found["prevents_collapse"], found["scale_sensitive"]) == (False, True), "neither does a squared error"
    parts.loss = Silent("labels")
    assert tried(parts)["prevents_collapse"] is None


def test_a_target_that_starts_elsewhere_is_measured(tiny: Path) -> None:
    parts = built(tiny)
    assert gather(parts).target_gap == 0
    assert parts.model.target is not None
    with torch.no_grad():
        for parameter in parts.model.target.parameters():
            parameter.mul_(3)
    assert gather(parts).target_gap == pytest.approx(2, abs=1e-4)
