"""What strangers may hand over: recipes, run directories, checkpoints, images, archives. None of it runs or leads out.

The rows of the table in docs/explanation/security.md, one section each. What a test forbids leaves a sentinel behind, a
file that is looked for, or calls something that is replaced here by a failure.
"""

from __future__ import annotations

import ast
import gzip
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from click.testing import CliRunner, Result
from conftest import ROOT, TINY, Install
from PIL import Image
from test_charts import Reader

from sslkit import checkpoint, local, registry
from sslkit.api import DataInfo
from sslkit.cli import main
from sslkit.compare import compare
from sslkit.encoder import load_encoder
from sslkit.environment import environment
from sslkit.errors import SslkitError, UserError, printable
from sslkit.files import in_one_piece
from sslkit.recipe import parse_recipe
from sslkit.run_directory import RunDirectory
from sslkit_datasets import CIFAR10, cifar10
from sslkit_datasets.decode import BadImageError, decode
from sslkit_watch import MLflow, WandB

SECRET = "hunter2"
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>"
ORDER = "\x1b]0;owned\x07\x1b[31m\u202e\x9b2J"
"""Sets a terminal's title, turns it red, reverses what follows, clears the screen."""
SOURCES = sorted([*(ROOT / "sslkit").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")])


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def told(result: Result, code: int = 2) -> str:
    """What was said in an exit with this code, which is neither unexpected nor an order to a terminal."""
    assert (result.exit_code, result.exception is None or isinstance(result.exception, SystemExit)) == (code, True)
    assert "unexpected" not in result.output
    assert "Traceback" not in result.output
    assert "\x1b" not in result.output
    return result.output


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs and downloads are failures of the test."""

    def refuse(*arguments: object, **_: object) -> None:
        raise AssertionError(f"this was to be run: {arguments}")

    for name in ("system", "popen", "execv", "posix_spawn"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, with one checkpoint."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.toml").write_text(TINY, encoding="utf-8")
    told(run("train", folder / "tiny.toml", "--run-dir", folder / "run", "--steps", 3), 0)
    return folder / "run"


@pytest.fixture
def strange(finished: Path) -> Path:
    """A run directory as a stranger hands it over, to be tampered with, and its recipe beside it."""
    shutil.copy(finished.parent / "tiny.toml", "tiny.toml")
    return Path(shutil.copytree(finished, "run"))


def nested(depth: int = 100_000) -> str:
    return "[" * depth


# ---------------------------------------------------------------- a recipe that runs code

USES = [
    "os.system", "os:system", "os", "builtins.eval", "subprocess:Popen", "sslkit_cosine:Cosine", "sslkit_cosine.Cosine",
    "../cosine", "/bin/sh", "file:///bin/sh", "$(touch ran)", "`touch ran`", "${HOME}", "$HOME", "~", "%(home)s",
    "{{ 7 * 7 }}", "cosine; touch ran", "cosine\x00", "__import__('os').system('touch ran')", "",
    "!!python/object/apply:os.system",
]  # fmt: skip


@pytest.mark.parametrize("use", USES)
def test_a_component_is_a_registered_name_and_nothing_else(use: str, nothing_runs: None) -> None:
    for old in ('[loss]\nuse = "cosine"', '{ use = "cosine", start = 0.9'):
        assert old in TINY
        new = old.replace('"cosine"', json.dumps(use))
        with pytest.raises(UserError) as caught:
            parse_recipe(TINY.replace(old, new), "r.toml")
        assert caught.value.lines[0].startswith("r.toml:")
    with pytest.raises(UserError):
        parse_recipe(TINY, "r.toml", [f"loss.use={use}"])
    assert not Path("ran").exists()


@pytest.mark.parametrize("use", ["./x.py:C", "/tmp/../x.py:C", "x.py:C", "~/x.py:C", "$HOME/x.py:C", "../srv/x.py:C"])
def test_a_file_is_not_run_without_leave(use: str, nothing_runs: None) -> None:
    Path("x.py").write_text("open('ran', 'w')\nclass C: pass\n")
    Path("tiny.toml").write_text(TINY.replace('[loss]\nuse = "cosine"', f'[loss]\nuse = "{use}"'), encoding="utf-8")
    for given in (("tiny.toml",), ("quickstart", "--set", f"loss.use={use}")):
        said = told(run("check", *given))
        assert "is code in a file, which using it would run; add --allow-local-code" in said
    assert not Path("ran").exists()


@pytest.mark.parametrize("path", ["${HOME}/x", "$(pwd)", "%USERPROFILE%", "{env:HOME}", "`pwd`"])
def test_texts_stay_as_they_are_written(path: str, nothing_runs: None) -> None:
    text = TINY.replace('use = "digits"\nprints = 1\ntest_prints = 1', f'use = "cifar10"\nroot = "{path}"')
    for recipe in (
        parse_recipe(text, "r.toml"),
        parse_recipe(TINY, "r.toml", ["data_source.use=cifar10", f"data_source.root={path}"]),
    ):
        assert recipe.data_source.root == path  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "text", [f"root:{SECRET}:0:0\n", f"[default]\nkey = {SECRET}\n", f'[registry]\ntoken = "{SECRET}"\n', f"{SECRET}\n"]
)
def test_what_is_extended_is_not_told_of(text: str) -> None:
    Path("passwd").write_text(text)
    Path("shadow.toml").write_text(text)
    for extends in (f"{Path.cwd()}/passwd", "./shadow.toml"):
        Path("r.toml").write_text(f'extends = "{extends}"\n' + TINY, encoding="utf-8")
        assert SECRET not in told(run("diff", "r.toml", "quickstart"))


def test_what_is_extended_is_a_file() -> None:
    os.mkfifo("pipe.toml")
    for extends in ("/dev/zero", "./pipe.toml", "/", "http://localhost/x.toml", "shipped:quickstart", "\x1b[31m/x"):
        Path("r.toml").write_text(f"extends = {json.dumps(extends)}\n" + TINY, encoding="utf-8")
        assert "r.toml:1: extends: " in told(run("diff", "r.toml", "quickstart"))


@pytest.mark.parametrize("model", ["hf_hub:stranger/model", "hf-hub:stranger/resnet18", "local-dir:/tmp/model",
                                   "resnet18/../..", "resnet18:hf-hub"])  # fmt: skip
def test_a_backbone_of_timm_is_one_that_timm_has(model: str, nothing_runs: None) -> None:
    from conftest import run_info

    from sslkit_timm import Timm

    with pytest.raises(UserError, match="has no model"):
        Timm(model=model, pretrained=True).build(run_info())


# What may stand there, and why.
TRUSTED = {
    ("sslkit/local.py", "exec"): "a file beside a recipe, with leave",
    (
        "sslkit/exporting/hub.py",
        "exec",
    ): "the lines of a model card, which an installed backbone gave, to see that they work",
    ("sslkit/testing/spec.py", "pickle"): "a component of the user's own, to see whether it can be pickled",
    ("sslkit/testing/processes.py", "pickle"): "the same, to hand it to a process that was just started",
    ("plugins/sslkit_datasets/cifar10.py", "pickle"): "CIFAR-10's batches, which name nothing but arrays",
}
MODULES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml", "runpy", "code", "torch.hub"}
CALLS = {"eval", "exec", "__import__", "os.system", "os.popen", "torch.load", "torch.hub.load", "yaml.load", "input"}


def dangers(path: Path) -> Iterator[str]:
    """What a module does that could run a stranger's data as code."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            names = {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
            yield from names & (MODULES | CALLS)
        elif isinstance(node, ast.Call):
            called, options = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if called in CALLS:
                yield called
            if called.endswith("Image.open") and "formats" not in options:
                yield "Image.open of any format"
            yield from (f"{k}={v}" for k, v in options.items()
                        if (k in ("shell", "allow_pickle") and v != "False")
                        or (k == "weights_only" and v != "True"))  # fmt: skip


def test_nothing_takes_data_for_code() -> None:
    found = {(str(path.relative_to(ROOT)), danger) for path in SOURCES for danger in dangers(path)}
    assert found == set(TRUSTED)


def test_the_search_for_it_finds_it(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    for line in (
        "import pickle", "from pickle import load", "from torch import load", "torch.load(x)", "eval('1')", "exec(x)",
        "subprocess.run(x, shell=True)", "numpy.load(x, allow_pickle=True)", "import yaml", "os.system('x')",
        "Image.open(x)",
    ):  # fmt: skip
        path.write_text(line)
        assert list(dangers(path)), line


# ---------------------------------------------------------------- a recipe that names a plugin

SENTINEL = """
import pathlib
from sslkit.api import Loss
pathlib.Path({mark!r}).touch()
class Named(Loss):
    "A loss."
"""


@pytest.fixture
def mark(install: Install, tmp_path: Path) -> Iterator[Path]:
    """What exists once the plugin `loss.sentinel` was imported."""
    path = tmp_path / "imported"
    install("sslkit-sentinel", "loss.sentinel = sentinel_plugin:Named",
            {"sentinel_plugin": SENTINEL.format(mark=str(path))})  # fmt: skip
    yield path
    sys.modules.pop("sentinel_plugin", None)


@pytest.mark.parametrize(
    "command", ["--help", "list-plugins", "list-plugins --json", "recipes", "check {r}", "diff {r} {r}",
                "describe loss.cosine", "train --help", "views {r}", "doctor {run}", "report {run}"],
)  # fmt: skip
def test_a_plugin_that_no_recipe_names_is_not_imported(command: str, mark: Path, strange: Path) -> None:
    result = run(*command.format(r="tiny.toml", run=strange).split())
    assert "unexpected" not in result.output
    assert result.exit_code in (0, 1, 2)
    assert not mark.exists()
    registry.load("loss", "sentinel")
    assert mark.exists(), "the sentinel is no sentinel"


def test_what_is_required_is_never_installed(nothing_runs: None) -> None:
    Path("r.toml").write_text('extends = "quickstart"\nrequires = ["sslkit-x>=1; python_version > \'3\'"]\n')
    assert "pip install" in told(run("check", "r.toml"))
    Path("r.toml").write_text('extends = "quickstart"\nrequires = ["x @ https://stranger.example/x.tar.gz"]\n')
    assert "is not installed" in told(run("train", "r.toml"))


def test_a_name_that_two_packages_offer_is_refused_and_neither_is_imported(mark: Path, install: Install) -> None:
    install("sslkit-shadow", "loss.sentinel = shadow_plugin:Named\nloss.cosine = shadow_plugin:Named",
            {"shadow_plugin": SENTINEL.format(mark=str(mark))})  # fmt: skip
    Path("r.toml").write_text(TINY, encoding="utf-8")
    said = told(run("train", "r.toml"))
    assert "loss 'cosine' is offered by sslkit 0.1.0 and by sslkit-shadow 1.0" in said
    said = told(run("train", "r.toml", "--set", "loss.use=sentinel"))
    assert "loss 'sentinel' is offered by sslkit-sentinel 1.0 and by sslkit-shadow 1.0" in said
    assert not mark.exists()


# ---------------------------------------------------------------- checkpoints


class Sentinel:
    """Makes the file `ran` when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("ran", "w")


def header(table: object, size: int | None = None, data: bytes = b"") -> bytes:
    """A safetensors file with this header, which says of itself that it has so many bytes."""
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def tensor(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


WEIGHTS = {
    "a pickle": pickle.dumps(Sentinel()),
    "torch.save": b"PK\x03\x04" + pickle.dumps(Sentinel()),
    "nothing": b"",
    "a header of 4 EiB": header({}, 2**62),
    "a header of 2^64 - 1 bytes": header({}, 2**64 - 1),
    "a header of 1 GiB": header({}, 2**30),
    "overlapping tensors": header({"a": tensor(0, 8, [2]), "b": tensor(4, 12, [2])}, data=bytes(12)),
    "a tensor beyond the end": header({"a": tensor(0, 4096, [1024])}, data=bytes(4)),
    "a tensor of negative size": header({"a": tensor(8, 0, [2])}, data=bytes(8)),
    "a shape that is not its size": header({"a": tensor(0, 8, [2**62])}, data=bytes(8)),
    "a shape that overflows": header({"a": tensor(0, 8, [2**33, 2**33])}, data=bytes(8)),
    "an unknown type": header({"a": tensor(0, 8, [1], "OBJ")}, data=bytes(8)),
    "a deep header": struct.pack("<Q", 200_000) + nested(200_000).encode(),
}


def forged(folder: Path, **changes: object) -> Path:
    """The checkpoint with other files, and a manifest that vouches for them."""
    (path,) = checkpoint.listed(folder)
    for name, content in changes.items():
        file = path / (f"{name}.safetensors" if isinstance(content, bytes) else f"{name}.json")
        file.write_bytes(content if isinstance(content, bytes) else str(content).encode())
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"] = {p.name: checkpoint._digest(p) for p in path.iterdir() if p.name != "manifest.json"}
    vouch(path, manifest)
    return path


def vouch(path: Path, manifest: dict[str, Any]) -> None:
    seal: Callable[[Any], bytes] = getattr(checkpoint, "sealed", lambda m: json.dumps(m).encode())
    (path / "manifest.json").write_bytes(seal(manifest))


def refused(folder: Path) -> None:
    """Every reader of weights says in one line that the checkpoint is none."""
    for which in ("last", 3):
        with pytest.raises(SslkitError) as caught:
            load_encoder(folder, checkpoint=which)  # type: ignore[arg-type]
        assert len(caught.value.lines) == 1
        assert "\n" not in str(caught.value)
    with pytest.raises(SslkitError):
        checkpoint.load(folder / "checkpoints" / "step-000000003")
    checkpoint.best(folder / "checkpoints")
    found, problems = checkpoint.newest(folder / "checkpoints")
    assert (found, len(problems)) == (None, 1)
    assert not Path("ran").exists()


@pytest.mark.parametrize("content", WEIGHTS.values(), ids=list(WEIGHTS))
def test_weights_are_nothing_but_numbers(strange: Path, content: bytes) -> None:
    forged(strange / "checkpoints", model=content)
    refused(strange)


def edited(path: Path, change: Callable[[dict[str, Any]], object]) -> str:
    state = json.loads((path / "state.json").read_text())
    change(state)
    return json.dumps(state)


STATES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a part elsewhere": lambda s: s["parts"].update({"../../../../elsewhere": {"__map__": []}}),
    "a part with a path": lambda s: s["parts"].update({"/etc/passwd": {"__map__": []}}),
    "a tensor that is not there": lambda s: s["parts"].update(model={"__tensor__": "no"}),
    "a tree of something else": lambda s: s["parts"].update(model={"__reduce__": ["os", "system"]}),
    "no parts": lambda s: s.pop("parts"),
    "no step": lambda s: s.pop("step"),
}


@pytest.mark.parametrize("change", STATES.values(), ids=list(STATES))
def test_a_state_leads_nowhere(strange: Path, change: Callable[[dict[str, Any]], object]) -> None:
    Path("elsewhere.safetensors").write_bytes(WEIGHTS["a pickle"])
    (path,) = checkpoint.listed(strange / "checkpoints")
    forged(strange / "checkpoints", state=edited(path, change))
    refused(strange)


@pytest.mark.parametrize("text", [nested(), "[]", "3", "null", '"x"', '{"files": 3}', '{"files": {"a": 3}}',
                                  '{"a":' * 5000, "9" * 5000, "{", ""])  # fmt: skip
def test_json_of_a_stranger_is_one_line(strange: Path, text: str) -> None:
    copy = Path(shutil.copytree(strange, "copy"))
    forged(strange / "checkpoints", state=text)
    refused(strange)
    (copy / "checkpoints" / "step-000000003" / "manifest.json").write_text(text)
    refused(copy)


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "..", ".", "", "a/b", "./state.json"])
def test_a_manifest_names_files_of_its_folder_only(strange: Path, name: str) -> None:
    (path,) = checkpoint.listed(strange / "checkpoints")
    manifest = json.loads((path / "manifest.json").read_text())
    vouch(path, {**manifest, "files": {**manifest["files"], name: {"bytes": 1, "sha256": "0"}}})
    refused(strange)


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("to", ["/dev/zero", "pipe", "copy"])
def test_a_checkpoint_has_no_links_and_no_pipes(strange: Path, name: str, to: str) -> None:
    (path,) = checkpoint.listed(strange / "checkpoints")
    file = path / name
    if to == "pipe":
        file.unlink()
        os.mkfifo(file)
    else:
        target = Path(to) if to != "copy" else Path(shutil.copy(file, "outside")).absolute()
        file.unlink()
        file.symlink_to(target)
    refused(strange)


@pytest.mark.parametrize("content", ["a pickle", "a header of 4 EiB"])
def test_a_run_does_not_go_on_from_it(strange: Path, content: str) -> None:
    forged(strange / "checkpoints", model=WEIGHTS[content])
    said = told(run("train", "tiny.toml", "--run-dir", strange, "--steps", 4))
    assert "no checkpoint can be read" in said
    assert (strange / "checkpoints" / "damaged-step-000000003").is_dir()
    assert not Path("ran").exists()


@pytest.mark.parametrize("name", ["facts.json", "status.json", "env.json", "snapshot.json", "metrics.jsonl"])
@pytest.mark.parametrize("text", [nested(), "9" * 5000, "\xff\xfe", '{"step": 1e999}', "[1]"])
def test_records_of_a_stranger_are_no_traceback(strange: Path, name: str, text: str) -> None:
    (strange / name).write_bytes(text.encode("latin1"))
    for command in (["doctor", strange], ["report", strange], ["compare", strange], ["diff", strange, "quickstart"]):
        result = run(*command)
        assert result.exit_code in (0, 1, 2)
        assert "unexpected" not in result.output, result.output
        assert "Traceback" not in result.output


# ---------------------------------------------------------------- images

DISGUISED = {
    "SVG": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(%pipe%touch ran) (w) file\nshowpage\n",
    "PDF": b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\n",
    "PSD": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 8, 8, 8, 3) + bytes(64),
    "WMF": b"\xd7\xcd\xc6\x9a\0\0" + bytes(16) + b"\1\0\t\0" + bytes(64),
    "EMF": b"\1\0\0\0" + bytes(36) + b" EMF" + bytes(64),
    "FITS": b"SIMPLE  =                    T" + bytes(2850),
    "MPEG": b"\0\0\1\xb3" + bytes(64),
    "HTML": b"<html><script>alert(1)</script></html>",
    "a script": b"#!/bin/sh\ntouch ran\n",
    "a pickle": pickle.dumps(Sentinel()),
}
OTHERS = ("BMP", "DIB", "GIF", "ICO", "ICNS", "JPEG2000", "MSP", "PCX", "PDF", "PPM", "SGI", "SPIDER", "TGA",
          "XBM", "EPS", "DDS", "AVIF", "BLP", "QOI")  # fmt: skip


def test_only_what_is_named_is_decoded_whatever_a_file_is_called(nothing_runs: None) -> None:
    tried = dict(DISGUISED)
    for kind in OTHERS:
        file, mode = io.BytesIO(), {"MSP": "1", "XBM": "1", "BLP": "P", "SPIDER": "F"}.get(kind, "RGB")
        try:
            Image.new(mode, (16, 16)).save(file, kind)
        except (KeyError, OSError, ValueError):  # this Pillow was built without it
            continue
        tried[kind] = file.getvalue()
    assert len(tried) > len(DISGUISED) + 10
    for kind, content in tried.items():
        with pytest.raises(BadImageError, match="is not a JPEG, PNG or WebP image"):
            print(kind, decode(content, 3, 8).shape)
    assert not Path("ran").exists()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


@pytest.mark.parametrize("sides", [(60_000, 60_000), (2**31 - 1, 1), (9460, 9460), (1, 2**31 - 1)])
def test_a_bomb_is_a_bad_image_before_it_is_unpacked(sides: tuple[int, int]) -> None:
    head = struct.pack(">IIBBBBB", *sides, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")
    )
    with pytest.raises(BadImageError, match="pixels"):
        decode(bomb, 3, 8)


def test_a_text_in_a_png_may_not_unpack_to_more_than_an_image() -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    text = chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(4 * 2**20)))
    whole = file.getvalue()
    with pytest.raises(BadImageError):
        decode(whole[:33] + text + whole[33:], 3, 8)


# ---------------------------------------------------------------- paths

NAMES = ["../x", "/tmp/x", "a/b", "..", ".", ".hidden", "", "a\\b", "a\x00b", "tiny\n", "~", "$HOME", "a b", "-rf",
         "\x1b[31m", "x" * 101, "名", "a:b", "C:x"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_named_by_plain_letters(name: str) -> None:
    with pytest.raises(UserError, match=r"name: should be letters, digits"):
        parse_recipe(TINY.replace('"tiny"', json.dumps(name), 1), "r.toml")
    Path("tiny.toml").write_text(TINY.replace('"tiny"', json.dumps(name), 1), encoding="utf-8")
    told(run("train", "tiny.toml", "--steps", 1))
    assert [path.name for path in Path().iterdir()] == ["tiny.toml"]


LED_OUT = ["recipe.lock.toml", "env.json", "status.json", "facts.json", "metrics.jsonl", "bad_samples.jsonl",
           "views.png", "report.html", "snapshot.json", ".writable", ".lock", ".status.json.tmp", "traceback.txt",
           "checkpoints", "tensorboard", "local", "checkpoints/.tmp-step-000000004-1",
           "tensorboard/events"]  # fmt: skip


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("name", LED_OUT)
def test_a_run_writes_only_inside_its_directory(strange: Path, name: str, there: bool) -> None:
    outside = Path("outside").absolute()
    link = strange / name
    folder = name in ("checkpoints", "tensorboard", "local")
    if folder and there:
        shutil.rmtree(link, ignore_errors=True)
        outside.mkdir()
        (outside / ".tmp-step-000000001-1").mkdir()
    elif there:
        outside.write_text(SECRET)
    if link.is_dir():
        shutil.rmtree(link)
    link.unlink(missing_ok=True)
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(outside)
    said = told(run("train", "tiny.toml", "--run-dir", strange, "--steps", 4))
    assert said == f"run/{name}: is a link that leads out of the run's directory; remove the link\n"
    if folder and there:
        assert [p.name for p in outside.iterdir()] == [".tmp-step-000000001-1"]
    else:
        assert (outside.read_text() if outside.exists() else None) == (SECRET if there else None)


def test_a_link_that_stays_inside_is_nobodys_harm(strange: Path) -> None:
    (strange / "newest").symlink_to("checkpoints/step-000000003")
    (strange / "tensorboard" / "same").symlink_to("../metrics.jsonl")
    assert "stopped at step 4" in told(run("train", "tiny.toml", "--run-dir", strange, "--steps", 4), 0)


@pytest.mark.parametrize("name", ["recipe.lock.toml", "facts.json", "status.json", "metrics.jsonl", "env.json",
                                  "snapshot.json", "views.png", "report.html", ".report.html.tmp"])  # fmt: skip
@pytest.mark.parametrize("to", ["secret", "/dev/zero", "pipe"])
def test_who_looks_at_a_run_reads_and_writes_nothing_outside_of_it(strange: Path, name: str, to: str) -> None:
    Path("secret").write_text(SECRET)
    (strange / name).unlink(missing_ok=True)
    if to == "pipe":
        os.mkfifo(strange / name)
    else:
        (strange / name).symlink_to(Path(to).absolute())
    for command in (["doctor", strange], ["report", strange, "--out", "page.html"], ["report", strange],
                    ["compare", strange, "--out", "page.html"], ["diff", strange, "quickstart"]):  # fmt: skip
        said = told(run(*command))
        assert said.startswith(f"run/{name}: is ")
        assert SECRET not in said
    with pytest.raises(UserError, match=r"leads out|neither a file"):
        load_encoder(strange)
    assert Path("secret").read_text() == SECRET
    assert not Path("page.html").exists()


def test_checkpoints_may_lie_on_another_disk_for_whoever_only_reads(strange: Path) -> None:
    (strange / "checkpoints").rename("scratch")
    (strange / "checkpoints").symlink_to(Path("scratch").absolute())
    assert load_encoder(strange).step == 3
    assert told(run("report", strange), 0)


def test_what_is_written_in_one_piece_goes_through_no_link(tmp_path: Path) -> None:
    Path("victim").write_text(SECRET)
    for link in (".page.html.tmp", "page.html"):
        Path(link).symlink_to(Path("victim").absolute())
    with in_one_piece(Path("page.html")) as staging:
        staging.write_text("page")
    assert (Path("victim").read_text(), Path("page.html").read_text()) == (SECRET, "page")
    assert not Path("page.html").is_symlink()


def test_a_link_in_a_ring_is_a_line(strange: Path) -> None:
    (strange / "env.json").unlink()
    (strange / "env.json").symlink_to("env.json")
    for command in (["doctor", strange], ["report", strange], ["train", "tiny.toml", "--run-dir", strange]):
        assert "unexpected" not in run(*command).output


# ---------------------------------------------------------------- words of strangers


def spoilt(run_dir: Path, text: str) -> None:
    """Put a text wherever a run's files have one."""
    for name in ("facts.json", "status.json", "env.json"):
        found = json.loads((run_dir / name).read_text())
        found |= {"name": text, "status": text, "command": [text], text: text}
        (run_dir / name).write_text(json.dumps(found))
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, "epoch": 0.3, text: 1.0, f"loss.{text}": 1.0, "loss": 1.0}) + "\n")
    (run_dir / "snapshot.json").write_text(json.dumps({"step": 3, "missing": [text], "neighbours": {"queries": [
        {"image": text, "label": text}, {"image": "data:image/png;base64,AA==", "label": text, "neighbours": [
            {"image": "data:image/png;base64,AA==", "label": text, "agrees": True}]}]}}))  # fmt: skip


@pytest.mark.parametrize(
    "text", [EVIL, '"><svg/onload=alert(1)>', "javascript:alert(1)", "</script><script>alert(1)//"]
)
def test_no_text_of_a_run_is_markup_in_a_page(strange: Path, text: str) -> None:
    spoilt(strange, text)
    lock = (strange / "recipe.lock.toml").read_text(encoding="utf-8")
    (strange / "recipe.lock.toml").write_text(f"{lock}\n# {text}\n", encoding="utf-8")
    named = strange.rename(text.replace("/", "|"))
    assert run("report", named, "--out", "report.html").exit_code == 0
    compare([named], "compare.html")
    for page in ("report.html", "compare.html"):
        read = Reader(Path(page).read_text(encoding="utf-8"))
        assert len(read.all("script")) == 3
        assert not any(name.startswith("on") for _, attributes in read.elements for name in attributes)
        assert all(str(image["src"]).startswith("data:image/png;base64,") for image in read.all("img"))
        assert not any("javascript:" in str(a.get("href", "")) for _, a in read.elements)
        assert not any(tag in ("svg", "iframe", "object") and a.get("onload") for tag, a in read.elements)
        (policy,) = [m["content"] for m in read.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
        assert str(policy).startswith("default-src 'none'; script-src 'sha256-")


def test_no_text_of_a_run_is_an_order_to_a_terminal(strange: Path) -> None:
    spoilt(strange, ORDER)
    named = strange.rename(f"run{ORDER}")
    for command in (["doctor", named], ["report", named], ["compare", named], ["diff", named, "quickstart"],
                    ["doctor", f"{named}-not-there"], ["train", f"./{ORDER}.toml"]):  # fmt: skip
        result = run(*command)
        assert result.exit_code in (0, 1, 2)
        assert not {"\x1b", "\x07", "\u202e", "\x9b"} & set(result.output), command
    said = run("train", "tiny.toml", "--run-dir", named, "--steps", 4)
    assert not {"\x1b", "\x07", "\u202e", "\x9b"} & set(said.output)


def test_brackets_are_no_markup() -> None:
    Path("tiny.toml").write_text(TINY, encoding="utf-8")
    for name in ("[/x]", "[red]y[/red]"):
        assert f"runs/{name}" in told(run("train", "tiny.toml", "--run-dir", f"runs/{name}", "--steps", 1), 0)


def test_printable() -> None:
    assert printable("plain, 名 é ✓") == "plain, 名 é ✓"
    assert printable("a\x1b[31m\u202eb\ud800\n") == r"a\x1b[31m\u202eb\ud800\n"
    assert UserError("a\x1b").lines == (r"a\x1b",)


# ---------------------------------------------------------------- archives and downloads


def archive(members: dict[str, Any], path: Path) -> None:
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for name, what in members.items():
            entry = tarfile.TarInfo(name)
            if isinstance(what, bytes):
                entry.size = len(what)
                tar.addfile(entry, io.BytesIO(what))
            else:
                entry.type, entry.linkname = what
                tar.addfile(entry)


BATCH = "cifar-10-batches-py/data_batch_1"
ARCHIVES: dict[str, dict[str, Any]] = {
    "above": {"../../ran": b"x", "/tmp/sslkit-ran": b"x", "cifar-10-batches-py/../../ran": b"x"},
    "symlink": {BATCH: (tarfile.SYMTYPE, "/etc/passwd")},
    "symlink to a member": {"ran": pickle.dumps(Sentinel()), BATCH: (tarfile.SYMTYPE, "../ran")},
    "hard link": {BATCH: (tarfile.LNKTYPE, "/etc/passwd")},
    "device": {BATCH: (tarfile.CHRTYPE, "")},
    "pipe": {BATCH: (tarfile.FIFOTYPE, "")},
    "folder": {BATCH: (tarfile.DIRTYPE, "")},
    "pickle": {BATCH: pickle.dumps(Sentinel())},
    "code": {"cifar-10-batches-py/numpy.so": b"\x7fELF", "sslkit.pyd": b"MZ", "torch.py": b"open('ran', 'w')"},
}


@pytest.mark.parametrize("members", ARCHIVES.values(), ids=list(ARCHIVES))
def test_an_archive_is_read_by_name_and_leaves_nothing(
    members: dict[str, Any], tmp_path: Path, nothing_runs: None
) -> None:
    root = tmp_path / "cifar10"
    root.mkdir()
    archive(members, root / cifar10.ARCHIVE)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"is missing|not the official file"):
        CIFAR10(root=str(root)).build(DataInfo(0, tmp_path, print))
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/tmp/sslkit-ran").exists()


@pytest.mark.parametrize("kind", ["member", "header"])
def test_a_bomb_in_an_archive_ends_where_the_official_one_does(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar10, "_UNPACKED_LIMIT", 2**20)
    monkeypatch.setattr(cifar10, "_MEMBER_LIMIT", 2**18)
    entry = tarfile.TarInfo("bomb" if kind == "member" else "././@LongLink")
    entry.type, entry.size = (tarfile.REGTYPE if kind == "member" else tarfile.GNUTYPE_LONGNAME), 2**33 - 1
    path = tmp_path / "cifar10" / cifar10.ARCHIVE
    path.parent.mkdir()
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(entry.tobuf(tarfile.GNU_FORMAT))
        for _ in range(4):
            file.write(bytes(2**20))
    with pytest.raises(UserError, match="it unpacks to more than the official one"):
        CIFAR10(root=str(path.parent)).build(DataInfo(0, tmp_path, print))


def test_a_batch_names_nothing_but_arrays() -> None:
    import numpy as np

    for value in ({"data": np.arange(4, dtype=np.uint8), "labels": [1, 2]}, {"label_names": ["a"]}):
        for protocol in (0, 1, 2, 3, 4):
            found = cifar10._Arrays(io.BytesIO(pickle.dumps(value, protocol)), encoding="latin1").load()
            assert str(found) == str(value)
    for payload in (
        Sentinel(), print, os.path.join, np.load, np.ndarray.tofile, subprocess.Popen, SimpleNamespace(), Path("x"),
    ):  # fmt: skip
        with pytest.raises(pickle.UnpicklingError, match="which no batch of images needs"):
            cifar10._Arrays(io.BytesIO(pickle.dumps(payload)), encoding="latin1").load()
    for names in (b"cnumpy\nload\n.", b"c_codecs\nlookup\n.", b"cnumpy.core.multiarray\nfromfile\n.",
                  b"\x80\x04\x8c\x05numpy\x8c\x0bndarray.dump\x93."):  # fmt: skip
        with pytest.raises(pickle.UnpicklingError):
            cifar10._Arrays(io.BytesIO(names), encoding="latin1").load()
    assert not Path("ran").exists()


def test_a_download_is_encrypted_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cifar10._official().url.startswith("https://")
    monkeypatch.setattr(cifar10, "_DOWNLOAD_LIMIT", 2**20)

    class Endless(io.RawIOBase):
        headers: ClassVar[dict[str, str]] = {}

        def read(self, size: int = -1) -> bytes:
            return bytes(size)

    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Endless())
    with pytest.raises(UserError, match="sends more than the official archive has"):
        CIFAR10(root=str(tmp_path / "cifar10")).build(DataInfo(0, tmp_path, print))
    assert [p.name for p in (tmp_path / "cifar10").iterdir() if p.name != ".download.lock"] == []


# ---------------------------------------------------------------- what is recorded, and what leaves the machine


def git(*arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True, capture_output=True)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_environment_holds_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    git("init")
    git("remote", "add", "origin", f"https://me:{SECRET}@example.org/x.git")
    git("commit", "--allow-empty", "-m", SECRET)
    found = environment(["sslkit", "train"], [], "cpu", 1, "abc")
    assert SECRET not in json.dumps(found)
    assert set(found["git"]) == {"commit", "changed"}
    assert found["git"]["changed"] is False


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_git_runs_no_program_of_a_strangers_folder() -> None:
    Path("evil.sh").write_text("#!/bin/sh\ntouch ran\ncat\n")
    Path("evil.sh").chmod(0o755)
    git("init")
    Path("a.txt").write_text("a")
    git("add", ".")
    git("commit", "-m", "a")
    hook = Path(".git/hooks/post-index-change")
    hook.parent.mkdir(exist_ok=True)
    shutil.copy("evil.sh", hook)
    git("config", "core.fsmonitor", str(Path("evil.sh").absolute()))
    os.utime("a.txt", (1, 1))
    Path("a.txt").write_text("b")
    assert environment([], [], "cpu", 1, "")["git"]["changed"] is True
    assert not Path("ran").exists()
    Path(".gitattributes").write_text("* filter=evil\n")
    git("config", "filter.evil.clean", str(Path("evil.sh").absolute()))
    assert environment([], [], "cpu", 1, "")["git"]["changed"] is None
    assert not Path("ran").exists()


def test_mlflow_says_where_everything_goes_before_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    from sslkit_watch.mlflow_tracking import MLflowObserver

    def client(**_: object) -> None:
        said.append("asked")
        raise OSError("away")

    said: list[str] = []
    uri = f"http://me:{SECRET}@example.org:5000"
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(
        MlflowClient=lambda **_: SimpleNamespace(get_experiment_by_name=lambda _: client()),
        get_tracking_uri=lambda: uri,
    ))  # fmt: skip
    with pytest.raises(UserError, match=r"cannot write to http://example.org:5000: away"):
        MLflowObserver(MLflow()).run_started(SimpleNamespace(step=0, directory=Path(), say=said.append))  # type: ignore[arg-type]
    assert said == ["mlflow: figures, recipe and views.png go to http://example.org:5000", "asked"]
    with pytest.raises(ValueError, match="should hold no password"):
        MLflow(tracking_uri=uri)


def test_wandb_says_where_everything_goes_before_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    from sslkit_watch.weights_and_biases import WandBObserver

    def init(**_: object) -> None:
        said.append("asked")
        raise OSError

    said: list[str] = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(
        init=init, login=lambda **_: True, Settings=dict, errors=SimpleNamespace(Error=OSError),
    ))  # fmt: skip
    observer = WandBObserver(WandB(entity="strangers", project="p", mode="online"))
    with pytest.raises(UserError, match="cannot begin"):
        observer.run_started(SimpleNamespace(step=0, directory=Path(), say=said.append))  # type: ignore[arg-type]
    assert said == [
        "wandb: figures, recipe, views.png and what wandb tells of the machine go to strangers, project p", "asked"
    ]  # fmt: skip


CHILD = """
import json, socket, sys
asked = []
def refuse(name):
    def call(*arguments, **_):
        asked.append([name, repr(arguments[1:] or arguments)])
        raise OSError("no network here")
    return call
def connect(self, address, real=socket.socket.connect):
    if self.family == socket.AF_UNIX or (isinstance(address, tuple) and address[0] in ("127.0.0.1", "::1")):
        return real(self, address)
    asked.append(["connect", repr(address)])
    raise OSError("no network here")
socket.socket.connect = socket.socket.connect_ex = connect
socket.getaddrinfo = refuse("getaddrinfo")
socket.gethostbyname = refuse("gethostbyname")
socket.create_connection = refuse("create_connection")
import urllib.request
urllib.request.urlopen = refuse("urlopen")
import sslkit
from click.testing import CliRunner
from sslkit.cli import main
codes = [CliRunner().invoke(main, arguments).exit_code for arguments in json.loads(sys.argv[1])]
print(json.dumps([codes, asked]))
"""


@pytest.mark.slow
def test_nobody_is_told_anything(tmp_path: Path) -> None:
    commands = [["--help"], ["list-plugins"], ["check", "quickstart"], ["train", "quickstart", "--steps", "2"],
                ["doctor", "runs/quickstart"], ["report", "runs/quickstart"]]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(commands)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    codes, asked = json.loads(done.stdout.splitlines()[-1])
    assert asked == []
    assert codes[:2] == [0, 0]
    assert codes[3] == 0
    assert {codes[2], codes[4], codes[5]} <= {0, 1}


# ---------------------------------------------------------------- who holds what


def test_one_process_writes_and_a_run_of_a_stranger_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    Path("new").mkdir()
    Path("new/checkpoints").symlink_to(tmp_path)
    with pytest.raises(UserError, match="leads out"):
        RunDirectory(Path("new"))
    assert [p.name for p in Path("new").iterdir()] == ["checkpoints"]
    assert local.is_allowed() is False
