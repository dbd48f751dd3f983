"""Exported encoders, read where sslkit is not: by timm with the lines of the model card, by torch, by onnxruntime."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import run_info
from PIL import Image
from safetensors.torch import load_file, save_file
from test_python_api import mine
from timm.data import resolve_model_data_config
from torch import Tensor

import sslkit
from sslkit import randomness
from sslkit.batch import ViewSpec
from sslkit.encoder import encoder_of
from sslkit.errors import RunFailed, UserError
from sslkit.exporting import Export, export, graphs, hub
from sslkit.exporting.prepared import Prepared
from sslkit.image_files import reader_of
from sslkit.opened_run import OpenedRun, digest_of, open_run
from sslkit_crops import TwoCrops
from sslkit_timm import Timm

SIDES = (ViewSpec(32), ViewSpec(32))
NETWORKS: dict[str, tuple[Timm, dict[str, Any]]] = {
    "usual": (Timm(), {}),
    "small_image": (Timm(stem="small_image"), {}),
    "deep": (Timm(model="resnet14t", drop_path=0.1), {}),
    "deep_small_image": (Timm(model="resnet50d", stem="small_image"), {}),
    "grey": (Timm(model="resnet10t", stem="small_image"), {"channels": 1, "mean": (0.25,), "std": (0.5,)}),
    "bands": (Timm(model="resnet10t"), {"channels": 5, "mean": (0.3,) * 5, "std": (0.1, 0.2, 0.3, 0.4, 0.5)}),
    "transformer": (Timm(model="vit_tiny_patch16_224", drop_path=0.2), {}),
    "two_sizes": (Timm(model="test_vit"), {"views": (*SIDES, ViewSpec(16, "local"))}),
}
"""Backbones, and what else they were told of the run."""

FEW = ("usual", "small_image", "two_sizes")
"""One of each way to write a network; the slow tests look at the others."""

OTHERS = tuple(name for name in NETWORKS if name not in FEW)

in_turn = pytest.mark.parametrize(
    "networks", [pytest.param(FEW, id="few"), pytest.param(OTHERS, id="others", marks=pytest.mark.slow)]
)


@pytest.fixture(scope="module")
def a_run(tmp_path_factory: pytest.TempPathFactory) -> OpenedRun:
    """A run of one step, as far as an export reads it."""
    run = tmp_path_factory.mktemp("run") / "run"
    sslkit.train(mine(observers=()), run_dir=run, steps=1, quiet=True)
    return open_run(run)


def opened(a_run: OpenedRun, name: str) -> OpenedRun:
    """The run, had it trained another network: training each would take minutes."""
    spec, told = NETWORKS[name]
    info = run_info(**({"mean": (0.4914, 0.4822, 0.4465), "std": (0.247, 0.2435, 0.2616), "views": SIDES} | told))
    with randomness.seeded(0, name):
        backbone = spec.build(info)
        for module in backbone.modules():
            if isinstance(module, torch.nn.BatchNorm2d):  # in eval mode a fresh one does nothing
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 2)
    tables = {**a_run.tables, "backbone": {"use": "timm", "model": spec.model}}
    return replace(
        a_run, tables=tables, info=info, spec=spec, backbone=backbone, weights=digest_of(backbone.state_dict()),
        views=TwoCrops(size=32, saturation=0.0, hue=0.0, grayscale=0.0).build(info),
    )  # fmt: skip


@pytest.fixture
def exporting(a_run: OpenedRun, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Export]:
    """Exports one of the networks."""

    def call(name: str, to: Path, **how: Any) -> Export:
        monkeypatch.setattr("sslkit.exporting.open_run", lambda *_, **__: opened(a_run, name))
        return export(a_run.run, to, **how)

    return call


@pytest.fixture(scope="module")
def exported(a_run: OpenedRun, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tells the export of a network, which is made once."""
    folder = tmp_path_factory.mktemp("exported")

    @functools.cache
    def made(name: str) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sslkit.exporting.open_run", lambda *_, **__: opened(a_run, name))
            return export(a_run.run, folder / name).folder

    return made


def wanted(a_run: OpenedRun, name: str, given: Tensor) -> Tensor:
    """The features that the run's own encoder gives."""
    return encoder_of(opened(a_run, name)).features(given)


def normalised(a_run: OpenedRun, name: str, given: Tensor) -> Tensor:
    """As the run's own view generator does it."""
    return opened(a_run, name).views.clean(given)


def pictures(channels: int = 3) -> Tensor:
    return torch.randint(0, 256, (3, channels, 32, 32), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def close(got: Tensor, wanted: Tensor, allowed: float = 1e-5) -> bool:
    return got.shape == wanted.shape and float((got - wanted).abs().max() / wanted.abs().max()) <= allowed


ELSEWHERE = """
import os, re, sys
from pathlib import Path


class Blocked:
    def find_spec(self, name, *_):
        if name.partition(".")[0].startswith("sslkit"):
            raise ModuleNotFoundError(f"{name} is not to be had here")


sys.meta_path.insert(0, Blocked())
try:
    import sslkit
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("sslkit can be imported")

import torch
from safetensors.torch import load_file, save_file

for folder in sys.argv[1:]:
    os.chdir(folder)
    given = load_file("given.safetensors")
    names = {}
    for block in re.findall(r"```python\\n(.*?)```", Path("README.md").read_text(), re.DOTALL):
        exec(block, names)
    with torch.no_grad():
        features = names["model"](given["normalised"])
    got = {"features": features, "picture": names["features"]}
    save_file({name: value.contiguous() for name, value in got.items()}, "got.safetensors")
assert not [name for name in sys.modules if name.startswith("sslkit")]
"""


@in_turn
def test_plain_timm_gives_the_same_features_by_the_lines_of_the_card(
    a_run: OpenedRun, exported: Callable[[str], Path], tmp_path: Path, networks: tuple[str, ...]
) -> None:
    """In a process that cannot import sslkit."""
    folders = {name: exported(name) for name in networks}
    for name, folder in folders.items():
        given = pictures(channels(name))
        save_file({"normalised": normalised(a_run, name, given)}, folder / "given.safetensors")
        if channels(name) in (1, 3):
            Image.fromarray(given[0].permute(1, 2, 0).squeeze(2).numpy()).save(folder / "picture.jpg", "PNG")
    script = tmp_path / "elsewhere.py"
    script.write_text(ELSEWHERE)
    done = subprocess.run(
        [sys.executable, "-I", script, *map(str, folders.values())],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name, folder in folders.items():
        got, own = load_file(folder / "got.safetensors"), wanted(a_run, name, pictures(channels(name)))
        assert close(got["features"], own), name
        if channels(name) in (1, 3):
            assert close(got["picture"], own[:1]), f"{name}: by timm's transform, as the card has it"


def channels(name: str) -> int:
    return int(NETWORKS[name][1].get("channels", 3))


@in_turn
def test_only_what_timm_builds_by_name_has_a_configuration(
    exported: Callable[[str], Path], networks: tuple[str, ...]
) -> None:
    lines = {
        "small_image": "model.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)\n",
        "deep_small_image": "model.conv1[0].stride = (1, 1)\nmodel.maxpool = nn.Identity()\n",
        "grey": "model.conv1[0].stride = (1, 1)\n",
    }
    for name in networks:
        card = (exported(name) / "README.md").read_text()
        assert (exported(name) / "config.json").exists() is (name not in lines), name
        assert ("local-dir" in card) is (name not in lines), name
        assert ("library_name: timm" in card) is (name not in lines), "the hub would show code that does not load it"
        assert lines.get(name, "") in card


@pytest.mark.slow
def test_a_deep_stem_without_its_lines_loads_and_gives_other_features(
    a_run: OpenedRun, exported: Callable[[str], Path], exporting: Callable[..., Export],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    """Why there must be no configuration, and what the check after writing is for."""
    plain = timm.create_model("resnet50d", num_classes=0).eval()
    plain.load_state_dict(load_file(exported("deep_small_image") / "model.safetensors"))
    with torch.no_grad():
        got = plain(normalised(a_run, "deep_small_image", pictures()))
    assert not close(got, wanted(a_run, "deep_small_image", pictures()), 1e-2)
    monkeypatch.setattr("sslkit_timm.elsewhere._small_stem", lambda *_: ())
    with pytest.raises(RunFailed, match=r"to model.safetensors: read by timm .* \(allowed 1e-05\); nothing was kept"):
        exporting("deep_small_image", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@in_turn
def test_timm_trains_a_classifier_on_it(exported: Callable[[str], Path], networks: tuple[str, ...]) -> None:
    for name in {"usual", "two_sizes", "transformer"}.intersection(networks):
        model = timm.create_model(f"local-dir:{exported(name)}", pretrained=True, num_classes=7)
        own, there = load_file(exported(name) / "model.safetensors"), model.state_dict()
        assert all(torch.equal(there[key], own[key]) for key in own)
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
        found = resolve_model_data_config(model)
        assert (tuple(found["input_size"]), found["crop_pct"]) == ((3, 32, 32), 1.0)
        assert (tuple(found["mean"]), tuple(found["std"])) == ((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))


def test_the_line_that_loads_it_can_be_pasted(exporting: Callable[..., Export], tmp_path: Path) -> None:
    said = exporting("usual", tmp_path / 'Bäume "1"').text()
    (line,) = re.findall(r"(timm\.create_model\(.*\)) loads it", said)
    assert "Bäume" in line
    assert sum(p.numel() for p in eval(line, {"timm": timm}).parameters()) > 0
    assert "\x1b" not in exporting("usual", tmp_path / "with\x1b[2J").text()


@in_turn
def test_an_export_is_somewhere_to_start_from(
    a_run: OpenedRun, exported: Callable[[str], Path], networks: tuple[str, ...]
) -> None:
    for name in {"usual", "two_sizes", "transformer", "bands"}.intersection(networks):
        run = opened(a_run, name)
        found = run.spec.pretrained_weights(f"local-dir:{exported(name)}", run.info).weights
        own = run.backbone.state_dict()
        assert found.keys() == own.keys()
        assert all(torch.equal(found[key], own[key]) for key in own)


# ---------------------------------------------------------------- graphs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two_sizes", "transformer"])
def test_graphs_take_plain_pictures_in_batches_of_any_size(
    a_run: OpenedRun, exporting: Callable[..., Export], tmp_path: Path, name: str
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    done = exporting(name, tmp_path / "out", formats=("onnx", "torch"))
    assert [check.file for check in done.checks] == ["model.pt2", "model.onnx"]
    assert sorted(path.name for path in done.folder.iterdir()) == [
        "README.md",
        "model.onnx",
        "model.pt2",
        "sslkit.json",
    ]
    program = torch.export.load(done.folder / "model.pt2").module()
    session = onnxruntime.InferenceSession(str(done.folder / "model.onnx"))
    for number in (1, 2, 3):
        given = pictures()[:number]
        pixels, own = given.float() / 255, wanted(a_run, name, given)
        assert close(program(pixels), own)
        (found,) = session.run(["features"], {"images": pixels.numpy()})
        assert close(torch.from_numpy(found), own, 1e-4)
    for block in (done.folder / "README.md").read_text().split("```python\n")[1:]:
        names: dict[str, Any] = {}
        exec(block.partition("```")[0].replace('"model.', f'"{done.folder}/model.'), names)
        assert names["features"].shape == (2, done.facts["feature_dim"])


def test_graphs_of_another_size(a_run: OpenedRun, exporting: Callable[..., Export], tmp_path: Path) -> None:
    done = exporting("usual", tmp_path / "out", formats=("torch",), size=64)
    given = torch.randint(0, 256, (2, 3, 64, 64)).to(torch.uint8)
    program = torch.export.load(done.folder / "model.pt2").module()
    views = TwoCrops(size=64).build(opened(a_run, "usual").info)
    with torch.no_grad():
        assert close(program(given.float() / 255), opened(a_run, "usual").backbone.eval()(views.clean(given)))
    assert "take 64 px instead, at which nothing was measured" in (done.folder / "README.md").read_text()
    with pytest.raises(UserError, match=r"size: the run's network takes no images of 48 px: .*; leave it out for 32"):
        exporting("transformer", tmp_path / "no", formats=("torch",), size=48)


@pytest.mark.slow
def test_onnx_with_another_operator_set(exporting: Callable[..., Export], tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    done = exporting("grey", tmp_path / "out", formats=("onnx",), opset=18)
    found = onnx.load(str(done.folder / "model.onnx"))
    assert [entry.version for entry in found.opset_import if entry.domain == ""] == [18]
    assert "operator set 18" in done.checks[0].read_by


@pytest.mark.parametrize(
    ("name", "file"), [("torch", graphs.TORCH), pytest.param("onnx", graphs.ONNX, marks=pytest.mark.slow)]
)
def test_a_graph_with_other_features_is_not_kept(
    exporting: Callable[..., Export], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, file: str
) -> None:
    forward = Prepared.forward
    monkeypatch.setattr(Prepared, "forward", lambda self, images: forward(self, images) * 1.001)
    with pytest.raises(RunFailed, match=rf"to {file}: read by .*differ by at most 1.0e-03 of the largest"):
        exporting("grey", tmp_path / "out", formats=(name,))
    assert list(tmp_path.iterdir()) == []


def test_weights_that_were_written_wrong_are_not_kept(
    exporting: Callable[..., Export], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save = hub.save
    monkeypatch.setattr(hub, "save", lambda tensors, told: save({k: v + 1 for k, v in tensors.items()}, told))
    with pytest.raises(RunFailed, match="does not hold what was written"):
        exporting("grey", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_configuration_that_prepares_otherwise_is_not_kept(
    exporting: Callable[..., Export], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = hub._config

    def wrong(*given: Any) -> dict[str, Any]:
        told = config(*given)
        return told | {"pretrained_cfg": told["pretrained_cfg"] | {"std": [0.25, 0.25, 0.25]}}

    monkeypatch.setattr(hub, "_config", wrong)
    with pytest.raises(RunFailed, match=r"to model.safetensors: read by timm .*; nothing was kept"):
        exporting("usual", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_onnx_needs_its_packages(
    exporting: Callable[..., Export], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    there = graphs.util.find_spec("json")  # as if the other ones were installed, which they need not be
    monkeypatch.setattr(graphs.util, "find_spec", lambda name: None if name == "onnxruntime" else there)
    with pytest.raises(UserError, match=r"onnx needs onnxruntime, not installed here: pip install 'sslkit\[onnx\]'"):
        exporting("grey", tmp_path / "out", formats=("onnx",))


@pytest.mark.parametrize(
    ("mode", "raw"), [("RGB", 32), ("RGBA", 32), ("LA", 32), ("P", 32), ("L", 32), ("CMYK", 32), ("RGB", 48)]
)
def test_the_card_prepares_files_as_the_training_read_them(
    mode: str, raw: int, a_run: OpenedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oblong pictures that lie on their side."""
    run = opened(a_run, "usual")
    run = replace(run, info=replace(run.info, image_size=raw))
    monkeypatch.setattr("sslkit.exporting.open_run", lambda *_, **__: run)
    readme = (export(a_run.run, tmp_path / "out").folder / "README.md").read_text(encoding="utf-8")
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "picture.jpg" in b]
    noise = np.random.default_rng(0).integers(0, 256, (70, 101, 4), dtype=np.uint8)
    picture = Image.fromarray(noise, "RGBA")
    file = tmp_path / ("picture.jpg" if mode == "CMYK" else "picture.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    (picture if mode == "RGBA" else picture.convert("RGB").convert(mode)).save(file, exif=exif)
    names: dict[str, object] = {"model": lambda pixels: pixels}
    exec(block.replace("picture.jpg", str(file)), names)
    pixels, _ = reader_of(run).read(file)
    assert pixels.shape == (3, raw, raw)
    torch.testing.assert_close(
        names["features"], run.views.clean(pixels[None]), rtol=0, atol=1e-4 if raw > 32 else 1e-5
    )


@pytest.mark.parametrize("value_range", [None, (175.0, 3368.5)])
def test_the_card_scales_deep_grey_as_the_training_did(
    value_range: tuple[float, float] | None, a_run: OpenedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = opened(a_run, "grey")
    source = {"use": "folder", **({"value_range": list(value_range)} if value_range else {})}
    run = replace(run, tables={**run.tables, "data_source": source})
    monkeypatch.setattr("sslkit.exporting.open_run", lambda *_, **__: run)
    readme = (export(a_run.run, tmp_path / "out").folder / "README.md").read_text(encoding="utf-8")
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "picture.jpg" in b]
    file = tmp_path / "picture.png"
    deep = np.random.default_rng(0).integers(0, 5000 if value_range else 65536, (70, 101)).astype(np.uint16)
    Image.fromarray(deep).save(file)
    names: dict[str, object] = {"model": lambda pixels: pixels}
    exec(block.replace("picture.jpg", str(file)), names)
    pixels, _ = reader_of(run).read(file)
    assert pixels.float().std() > 20, "neither black nor white"
    torch.testing.assert_close(names["features"], run.views.clean(pixels[None]), rtol=0, atol=1e-5)


def test_the_card_clips_bands_at_the_range_of_the_training(
    a_run: OpenedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = opened(a_run, "bands")
    run = replace(run, tables={**run.tables, "data_source": {"use": "folder", "value_range": [-5.0, 300.0]}})
    monkeypatch.setattr("sslkit.exporting.open_run", lambda *_, **__: run)
    readme = (export(a_run.run, tmp_path / "out").folder / "README.md").read_text(encoding="utf-8")
    assert "on which -5 is 0 and 300 is 1, clipped there and rounded to 1/255" in readme
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "values = " in b]
    file = tmp_path / "bands.npy"
    deep = np.random.default_rng(0).integers(-100, 400, (32, 32, 5)).astype(np.int16)
    np.save(file, deep)
    given = torch.from_numpy(deep).permute(2, 0, 1)[None].double()
    names: dict[str, object] = {"model": lambda pixels: pixels, "given": given}
    exec(re.sub(r"values = .*", "values = given", block), names)
    pixels, _ = reader_of(run).read(file)
    torch.testing.assert_close(names["features"], run.views.clean(pixels[None]), rtol=0, atol=1e-5, check_dtype=False)


def test_the_card_says_where_a_view_generator_resizes_otherwise(
    a_run: OpenedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = opened(a_run, "usual")
    clean = run.views.clean
    monkeypatch.setattr(run.views, "clean", lambda images: clean(images[..., :32, :32]))
    for raw, told in ((32, False), (48, True)):
        found = replace(run, info=replace(run.info, image_size=raw))
        monkeypatch.setattr("sslkit.exporting.open_run", lambda *_, found=found, **__: found)
        text = (export(a_run.run, tmp_path / "out").folder / "README.md").read_text(encoding="utf-8")
        assert ("resizes squares of 48 px in a way of its own" in text) is told
