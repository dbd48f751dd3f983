from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL_BACKBONE
from test_python_api import mine

import sslkit
from sslkit import registry
from sslkit.build import open_data
from sslkit.checkpoint import listed, sealed
from sslkit.features import chosen, knn_accuracy
from sslkit_convnet import ConvNet
from sslkit_crops import TwoCrops
from sslkit_ema import EMA, StopGradient
from sslkit_watch import KNN

OBSERVERS = (KNN(bank=200, queries=100, k=20),)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with all its checkpoints, at steps 5, 10, 15 and 20."""
    path = tmp_path_factory.mktemp("run") / "run"
    train = sslkit.Train(epochs=2, batch_size=128, checkpoint_every=5, keep_checkpoints=9)
    sslkit.train(mine(observers=OBSERVERS, train=train), run_dir=path, quiet=True)
    return path


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copied"))


def images() -> Any:
    return open_data(mine(), print)


def test_features_are_those_that_the_run_was_measured_with(run: Path) -> None:
    data = images()
    encoder = sslkit.load_encoder(run)
    assert (encoder.training, encoder.feature_dim, encoder.step) == (False, 8, 20)
    bank, queries = chosen(data.train, 200), chosen(data.test, 100)
    accuracy = knn_accuracy(
        encoder.features(data.train.read(bank)), data.train.labels[bank], encoder.features(data.test.read(queries)),
        data.test.labels[queries], k=20,
    )  # fmt: skip
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert accuracy == [r["knn_top1"] for r in records if "knn_top1" in r][-1]


def test_images_are_taken_as_bytes_and_as_floats(run: Path) -> None:
    encoder = sslkit.load_encoder(run)
    pictures = images().test.read(torch.arange(40))
    features = encoder(pictures)
    assert features.shape == (40, encoder.feature_dim)
    assert torch.equal(encoder(pictures.float() / 255), features)
    assert torch.equal(encoder(pictures.double() / 255 + 1e-4), features), "within half a level"
    assert torch.equal(encoder(pictures.double() / 255 - 1e-4), features), "rounded, not cut off"
    black, white = torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16)
    assert torch.equal(encoder(black - 0.005), encoder(black)), "resizing makes a little less than 0"
    assert torch.equal(encoder(white * 1.005), encoder(white)), "and a little more than 1"
    parts = torch.cat([encoder(part) for part in pictures.split(16)])
    assert torch.equal(encoder.features(pictures, batch_size=16), parts)
    with pytest.raises(sslkit.UserError, match=r"on the scale 0\.\.1 .* go from 0 to 255"):
        encoder(torch.tensor([0.0, 255.0]).expand(2, 3, 16, 2).contiguous())
    with pytest.raises(sslkit.UserError, match=r"shape \[N, 3, H, W\], not \[3, 16, 16\]"):
        encoder(pictures[0])
    for take in (encoder, encoder.features):
        with pytest.raises(sslkit.UserError, match=r"takes a tensor, not a list; of PIL images .*pil_to_tensor"):
            take([[0.0]])
    with pytest.raises(sslkit.UserError, match="as uint8, or as float"):
        encoder(pictures.int())


def test_the_networks_compute_in_the_memory_format_of_the_run(copied: Path) -> None:
    lock = copied / "recipe.lock.toml"
    for last in (True, False):
        lock.write_text(
            lock.read_text().replace(f"channels_last = {not last}".lower(), f"channels_last = {last}".lower())
        )
        encoder = sslkit.load_encoder(copied)
        given: list[torch.Tensor] = []
        encoder.backbone.register_forward_pre_hook(lambda _, inputs, given=given: given.append(inputs[0]))
        encoder(images().test.read(torch.arange(4)))
        kernels = [p for p in encoder.parameters() if p.ndim == 4]
        assert kernels
        for tensor in (*kernels, *given):
            assert tensor.is_contiguous(memory_format=torch.channels_last) is last


def test_the_callers_random_numbers_stay_as_they_are(run: Path) -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    sslkit.load_encoder(run)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_it_can_be_trained_further_and_features_leave_its_mode_alone(run: Path) -> None:
    encoder = sslkit.load_encoder(run).train()
    assert not encoder.features(images().test.read(torch.arange(4))).requires_grad
    assert encoder.training
    encoder(images().test.read(torch.arange(4))).sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


def test_branches_and_checkpoints_have_their_own_weights(run: Path) -> None:
    stored = torch.nn.Module.state_dict(sslkit.load_encoder(run, "online").backbone)
    pictures = images().test.read(torch.arange(8))
    online, target = sslkit.load_encoder(run, "online"), sslkit.load_encoder(run, "target")
    assert not torch.equal(online(pictures), target(pictures))
    assert torch.equal(sslkit.load_encoder(run)(pictures), online(pictures)), "EMA's evaluated branch"
    earlier = sslkit.load_encoder(run, checkpoint=5)
    assert earlier.step == 5
    assert not torch.equal(earlier(pictures), online(pictures))
    assert stored.keys() == earlier.backbone.state_dict().keys()


def test_the_evaluated_branch_is_the_one_that_the_updater_names(tmp_path: Path) -> None:
    recipe = mine(target_updater=EMA(tau=0.9, evaluate="target"), observers=OBSERVERS)
    sslkit.train(recipe, run_dir=tmp_path / "run", steps=6, quiet=True)
    pictures = images().test.read(torch.arange(8))
    target = sslkit.load_encoder(tmp_path / "run", "target")
    assert torch.equal(sslkit.load_encoder(tmp_path / "run")(pictures), target(pictures))


def test_the_best_checkpoint_is_that_of_the_highest_knn(copied: Path) -> None:
    for path in listed(copied / "checkpoints"):
        state = json.loads((path / "state.json").read_text())
        state["facts"]["knn_top1"] = {5: 0.2, 10: 0.9}.get(state["step"])
        text = json.dumps(state)
        (path / "state.json").write_text(text)
        manifest = json.loads((path / "manifest.json").read_text())
        digest = hashlib.sha256(text.encode()).hexdigest()
        manifest["files"]["state.json"] = {"bytes": len(text.encode()), "sha256": digest}
        (path / "manifest.json").write_bytes(sealed(manifest))
    assert sslkit.load_encoder(copied, checkpoint="best").step == 10


def test_only_the_run_directory_is_needed(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the data, nor the packages of other parts, nor anything of the checkpoint but the networks."""
    for part in ("optimizer", "observers", "loss"):
        (listed(copied / "checkpoints")[-1] / f"{part}.safetensors").unlink()
    hide(monkeypatch, "loss.cosine", "data_source.digits", "observer.knn", "target_updater.ema")
    monkeypatch.setattr("torch.load", lambda *_, **__: pytest.fail("no pickle is read"))
    assert sslkit.load_encoder(copied).step == 20


def test_pretrained_weights_are_not_fetched_again(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    build = ConvNet.build
    monkeypatch.setattr(ConvNet, "build", lambda self, run: (asked.append(run.weights_follow), build(self, run))[1])
    sslkit.load_encoder(copied)
    assert asked == [True]


def test_views_of_another_generator_prepare_in_their_own_way(tmp_path: Path) -> None:
    recipe = mine(view_generator=TwoCrops(size=16), observers=OBSERVERS)
    sslkit.train(recipe, run_dir=tmp_path / "run", steps=1, quiet=True)
    encoder = sslkit.load_encoder(tmp_path / "run")
    assert encoder(torch.zeros(2, 3, 40, 40, dtype=torch.uint8)).shape == (2, 8), "resized"


# ---------------------------------------------------------------- what is missing


def hide(monkeypatch: pytest.MonkeyPatch, *keys: str) -> None:
    left = tuple(p for p in registry.providers() if p.key not in keys)
    monkeypatch.setattr(registry, "providers", lambda: left)


def refused(run: Path, text: str, error: type[sslkit.SslkitError] = sslkit.UserError, **options: Any) -> None:
    with pytest.raises(error, match=text):
        sslkit.load_encoder(run, **options)


def test_a_package_that_is_missing_is_named_with_its_version(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "backbone.convnet")
    version = sslkit.__version__
    refused(copied, rf"its backbone 'convnet' is from sslkit {version}, .*: pip install 'sslkit=={version}'")


def test_what_is_not_there_is_said(copied: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "is not there; give one such as runs/NAME")
    refused(tmp_path, "is no run directory")
    refused(copied, r"has no checkpoint 7; choose 'last', 'best' or a step of 5, 10, 15, 20", checkpoint=7)
    refused(copied, "has no checkpoint 'newest'", checkpoint="newest")
    refused(copied, "branch: should be", branch="teacher")
    lock = copied / "recipe.lock.toml"
    lock.write_text(lock.read_text().replace("widths", "width"))
    refused(copied, r"recipe\.lock\.toml:\d+: backbone\.width: unknown option; did you mean 'widths'")
    lock.write_text("[backbone")
    refused(copied, "cannot be read")


def test_a_run_without_a_checkpoint_or_a_measured_one(copied: Path) -> None:
    for path in listed(copied / "checkpoints"):
        if path.name not in ("step-000000005", "step-000000015"):
            shutil.rmtree(path)
    refused(copied, r"kNN was not measured at any of its checkpoints \(steps 5, 15\)", checkpoint="best")
    shutil.rmtree(copied / "checkpoints")
    refused(copied, "has no checkpoint yet")


def test_a_run_without_a_target_network(tmp_path: Path) -> None:
    sslkit.train(mine(target_updater=StopGradient()), run_dir=tmp_path / "run", steps=1, quiet=True)
    refused(tmp_path / "run", "has no target network of its own; use branch='online'", branch="target")


def damage(run: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    path = listed(run / "checkpoints")[-1] / name
    path.write_bytes(change(path.read_bytes()))


def test_a_damaged_checkpoint_is_refused_and_left_where_it_is(copied: Path) -> None:
    damage(copied, "model.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1]))
    before = sorted(p.name for p in (copied / "checkpoints").iterdir())
    refused(copied, "model.safetensors is not what the manifest says", sslkit.RunFailed)
    assert sorted(p.name for p in (copied / "checkpoints").iterdir()) == before
    assert sslkit.load_encoder(copied, checkpoint=15).step == 15


def test_weights_that_do_not_fit_name_the_versions(copied: Path) -> None:
    lock = copied / "recipe.lock.toml"
    lock.write_text(lock.read_text().replace("8,", "4,", 1))
    version = sslkit.__version__
    expected = rf"do not fit the backbone that sslkit {version} builds \(trained with sslkit {version}\)"
    refused(copied, expected, sslkit.RunFailed)


def test_code_of_a_local_file_runs_only_with_leave(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "small.py").write_text(SMALL_BACKBONE)
    table = tiny.read_text().partition("[backbone]")[2].partition("[projector]")[0]
    tiny.write_text(tiny.read_text().replace(table, '\nuse = "./small.py:Small"\n\n'))
    with pytest.raises(sslkit.UserError, match="add allow_local_code=True"):
        sslkit.load_recipe(tiny)
    recipe = sslkit.load_recipe(tiny, allow_local_code=True)
    sslkit.train(recipe, run_dir=tmp_path / "run", steps=1, quiet=True)
    (tmp_path / "small.py").unlink()
    refused(tmp_path / "run", "add allow_local_code=True")
    assert sslkit.load_encoder(tmp_path / "run", allow_local_code=True).feature_dim == 4
