"""Backbones from timm: its own features, the stem for small pictures, and errors in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from sslkit.api import RunInfo
from sslkit.batch import ViewSpec
from sslkit.errors import UserError
from sslkit_timm import Timm

RUN = RunInfo(0, "cpu", 32, 3, (0.5,) * 3, (0.25,) * 3, 1000, 1000, 10, 100, views=(ViewSpec(32), ViewSpec(32)))


def images(channels: int = 3, size: int = 32) -> torch.Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050", "test_vit"])
def test_features_are_timms(name: str):
    backbone = Timm(model=name).build(RUN)
    arguments = {"img_size": 32} if name == "test_vit" else {}
    reference = timm.create_model(name, num_classes=0, **arguments)
    reference.load_state_dict(backbone.state_dict())
    backbone.eval()
    reference.eval()
    with torch.no_grad():
        features = backbone(images())
        assert torch.equal(features, reference(images()))
    assert features.shape == (2, backbone.feature_dim)


def test_resnet18_as_the_recipes_use_it():
    torch.manual_seed(0)
    backbone = Timm(stem="small_image").build(RUN)
    assert backbone.feature_dim == 512
    assert backbone.training
    assert backbone.forward_features(images()).shape == (2, 512, 4, 4)
    assert backbone(images()).shape == (2, 512)
    assert (backbone.conv1.kernel_size, backbone.conv1.stride, backbone.conv1.padding) == ((3, 3), (1, 1), (1, 1))
    assert backbone.conv1.bias is None
    # kaiming, fan out, as timm's other convolutions: std = sqrt(2 / (64 * 9))
    assert backbone.conv1.weight.std().item() == pytest.approx((2 / 576) ** 0.5, rel=0.05)


def test_the_usual_stem_leaves_one_cell():
    assert Timm().build(RUN).forward_features(images()).shape == (2, 512, 1, 1)


def test_small_stem_changes_the_stem_alone():
    usual, small = Timm().build(RUN), Timm(stem="small_image").build(RUN)
    shapes = [{k: v.shape for k, v in m.state_dict().items() if k != "conv1.weight"} for m in (usual, small)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", ["resnet10t", "resnest14d", "skresnet18"])
def test_small_stem_of_other_resnets(name: str):
    torch.manual_seed(0)
    backbone = Timm(model=name, stem="small_image").build(RUN)
    assert backbone.forward_features(images()).shape[-2:] == (4, 4)
    deep = isinstance(backbone.conv1, torch.nn.Sequential)
    assert (backbone.conv1[0] if deep else backbone.conv1).stride == (1, 1)


def test_grey_images():
    backbone = Timm(stem="small_image").build(replace(RUN, channels=1))
    assert backbone(images(channels=1)).shape == (2, 512)


def test_a_transformer_is_built_for_the_views():
    run = replace(RUN, views=(ViewSpec(64), ViewSpec(64)))
    backbone = Timm(model="test_vit").build(run)
    assert backbone(images(size=64)).shape == (2, backbone.feature_dim)
    assert backbone.patch_embed.img_size == (64, 64)


def test_a_transformer_with_views_of_two_sizes():
    run = replace(RUN, views=(ViewSpec(64), ViewSpec(32, "local")))
    backbone = Timm(model="test_vit").build(run)
    assert {tuple(backbone(images(size=s)).shape) for s in (64, 32)} == {(2, backbone.feature_dim)}
    with pytest.raises(UserError, match=r"timm cannot build 'mixer_s32_224' with .*dynamic_img_size"):
        Timm(model="mixer_s32_224").build(run)


def test_drop_path_rises_to_the_last_block():
    blocks = [m for m in Timm(drop_path=0.2).build(RUN).modules() if type(m).__name__ == "DropPath"]
    assert blocks[-1].drop_prob == pytest.approx(0.2)
    assert [m.drop_prob for m in blocks] == sorted(m.drop_prob for m in blocks)
    with pytest.raises(UserError, match=r"timm cannot build 'vgg11' with .*drop_path_rate"):
        Timm(model="vgg11", drop_path=0.2).build(RUN)


def test_building_neither_moves_statistics_nor_draws_twice():
    torch.manual_seed(0)
    backbone = Timm(stem="small_image").build(RUN)
    after = torch.rand(3)
    torch.manual_seed(0)
    again = Timm(stem="small_image").build(RUN)
    assert torch.equal(after, torch.rand(3))
    assert all(
        torch.equal(a, b) for a, b in zip(backbone.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert backbone.bn1.num_batches_tracked == 0


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"model": "resnet-18"}, r"no model 'resnet-18'; did you mean 'resnet18'\?"),
        ({"model": "hf-hub:someone/something"}, r"no model 'hf-hub:someone/something'"),
        ({"model": "resnet18.nonsense"}, r"'resnet18.nonsense' .* Invalid pretrained tag"),
        (
            {"model": "test_vit", "stem": "small_image"},
            r"'small_image' is for timm's ResNets .* is a VisionTransformer",
        ),
        ({"model": "inception_v3"}, r"'inception_v3' cannot take views of 32 px"),
    ],
)
def test_errors_say_what_to_do(options: dict[str, Any], problem: str):
    with pytest.raises(UserError, match=problem) as caught:
        Timm(**options).build(RUN)
    assert "\n" not in str(caught.value)


def test_weights_that_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"weights of 'resnet18' could not be had .* set pretrained = false"):
        Timm(pretrained=True).build(RUN)


def test_pretrained_weights_are_not_fetched_where_a_checkpoints_follow(monkeypatch: pytest.MonkeyPatch):
    asked: list[bool] = []
    create = timm.create_model

    def created(*arguments: Any, pretrained: bool, **options: Any) -> Any:
        asked.append(pretrained)
        return create(*arguments, **options)

    monkeypatch.setattr("timm.create_model", created)
    for follow in (False, True):
        Timm(model="resnet10t", pretrained=True).build(replace(RUN, weights_follow=follow))
    assert asked == [True, False]


# ---------------------------------------------------------------- plain timm


@pytest.mark.parametrize(
    ("options", "run"),
    [
        ({"model": "resnet10t.c3_in1k", "drop_path": 0.1}, {}),
        ({"model": "resnet18", "stem": "small_image"}, {"channels": 5}),
        ({"model": "resnet14t", "stem": "small_image"}, {}),
        ({"model": "test_vit"}, {"channels": 1}),
        ({"model": "test_vit"}, {"views": (ViewSpec(64), ViewSpec(32, "local"))}),
    ],
    ids=["tag", "small stem", "small deep stem", "transformer", "views of two sizes"],
)
def test_timm_alone_builds_the_same_network(options: dict[str, Any], run: dict[str, Any]):
    spec, told = Timm(**options), replace(RUN, **run)
    backbone, found = spec.build(told).eval(), spec.portable(told)
    assert found.architecture == options["model"].partition(".")[0]
    assert json.loads(json.dumps(found.arguments)) == found.arguments
    model = timm.create_model(found.architecture, **found.arguments)
    exec("\n".join(found.after), {"model": model, "nn": torch.nn})
    model.load_state_dict(backbone.state_dict())
    model.eval()
    for view in told.views:
        given = images(told.channels, view.size)
        with torch.no_grad():
            assert torch.equal(model(given), backbone(given))


def test_describing_a_network_draws_no_random_numbers():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    Timm(stem="small_image").portable(RUN)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_size_that_may_change_is_no_fixed_one():
    assert Timm(model="test_vit").portable(RUN).config["fixed_input_size"]
    two = replace(RUN, views=(ViewSpec(64), ViewSpec(32, "local")))
    assert not Timm(model="test_vit").portable(two).config["fixed_input_size"]
    assert Timm().portable(RUN).config == {"first_conv": "conv1", "classifier": "fc", "fixed_input_size": False}


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """The weights of resnet10t.c3_in1k, as if they had been downloaded."""
    given = timm.create_model("resnet10t", num_classes=0).state_dict()
    create = timm.create_model

    def created(name: str, pretrained: bool = False, **options: Any) -> Any:
        if pretrained:
            options["pretrained_cfg_overlay"] = {"state_dict": dict(given), "num_classes": 0, "hf_hub_id": None}
        return create(name, pretrained=pretrained, **options)

    monkeypatch.setattr("timm.create_model", created)
    return given


def test_weights_that_timm_has_come_by_their_name(offered: dict[str, torch.Tensor]):
    for name in ("resnet10t", "resnet10t.c3_in1k"):
        found = Timm(model="resnet10t").pretrained_weights(name, RUN).weights
        assert found.keys() == offered.keys()
        assert all(torch.equal(found[key], offered[key]) for key in offered)
    small = Timm(model="resnet10t", stem="small_image").pretrained_weights("resnet10t.c3_in1k", RUN).weights
    assert all(torch.equal(small[key], offered[key]) for key in offered), "a deep stem keeps its weights"
    grey = Timm(model="resnet10t").pretrained_weights("resnet10t", replace(RUN, channels=1)).weights
    assert torch.allclose(grey["conv1.0.weight"], offered["conv1.0.weight"].sum(1, keepdim=True))


@pytest.mark.parametrize("name", ["resnet18", "test_vit"])
def test_what_timm_has_is_the_same_whatever_is_adapted_to_it_or_drawn(name: str, tmp_path: Path):
    model = timm.create_model(name, num_classes=0)
    given, facts = model.state_dict(), ("first_conv", "input_size", "fixed_input_size")
    about = {key: model.pretrained_cfg[key] for key in facts}
    save_file(given, tmp_path / "model.safetensors")
    config = {"architecture": name, "num_classes": 0, "pretrained_cfg": about}
    (tmp_path / "config.json").write_text(json.dumps(config))
    small = {"stem": "small_image"} if name == "resnet18" else {}
    adapted = []
    for seed, channels, size in ((0, 3, 32), (1, 1, 64)):
        torch.manual_seed(seed)
        told = replace(RUN, channels=channels, views=(ViewSpec(size),))
        found = Timm(model=name, **small).pretrained_weights(f"local-dir:{tmp_path}", told)
        assert found.original.keys() == given.keys()
        assert all(torch.equal(found.original[key], given[key]) for key in given)
        adapted.append(found.weights)
    assert any(tensor.shape != adapted[1][key].shape for key, tensor in adapted[0].items())


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("resnet-10t", r"no model 'resnet-10t'; did you mean 'resnet10t'\?"),
        ("resnet18.a1_in1k", r"are those of 'resnet18', and backbone.model is 'resnet10t'; set backbone.model = 'resn"),
        ("resnet10t.nonsense", r"no weights 'resnet10t.nonsense'; of 'resnet10t' there are: c3_in1k"),
        ("local-dir:/nowhere", r"the weights of 'local-dir:/nowhere' could not be had .*\); check the folder$"),
    ],
)
def test_weights_that_are_not_there(name: str, problem: str):
    with pytest.raises(UserError, match=problem) as caught:
        Timm(model="resnet10t").pretrained_weights(name, RUN)
    assert str(caught.value).startswith("init_from.timm: ")
    assert "\n" not in str(caught.value)


def test_an_architecture_without_weights():
    with pytest.raises(UserError, match=r"timm .* has no weights of 'botnet50ts_256'"):
        Timm(model="botnet50ts_256").pretrained_weights("botnet50ts_256", RUN)


def test_weights_that_cannot_be_downloaded_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"weights of 'resnet18' could not be had .* connect to the network once"):
        Timm().pretrained_weights("resnet18", RUN)
