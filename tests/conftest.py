from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: a second thread only waits for the first

import io
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from sslkit import registry
from sslkit.api import RunInfo
from sslkit.cli import main

ROOT = Path(__file__).parent.parent

TINY = """
name = "tiny"

[data_source]
use = "digits"
prints = 1
test_prints = 1

[view_generator]
use = "affine"

[backbone]
use = "convnet"
widths = [8, 8]
strides = [2, 2]
pool = 1

[projector]
use = "mlp"
hidden_dim = 16
out_dim = 8

[predictor]
use = "mlp"
hidden_dim = 16
out_dim = 8

[loss]
use = "cosine"

[target_updater]
use = "ema"
tau = { use = "cosine", start = 0.9, end = 1.0 }

[optimizer]
use = "sgd"
lr = { use = "warmup_cosine", peak = 0.1, warmup_steps = 5 }
weight_decay = 1e-4

[train]
epochs = 2
batch_size = 128
log_every = 5
checkpoint_every = 4
compile = false

[[observers]]
use = "knn"
bank = 200
queries = 100
k = 20
"""
"""BYOL on a network of a few thousand parameters: 10 steps an epoch, a second or two in all."""


def run(*arguments: str) -> Result:
    """What a command ends with and says, which is never a traceback."""
    result = CliRunner().invoke(main, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result


SMALL_BACKBONE = """
from sslkit.api import Backbone

class Small(Backbone):
    \"\"\"A small network.\"\"\"

    def build(self, run):
        from torch import nn

        network = nn.Sequential(nn.Conv2d(run.channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        network.feature_dim = 4
        return network
"""
"""`small.py`, a component in a file beside a recipe."""

OFFLINE = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
"""What makes `pip install` and `pip wheel` do without a network, in an environment that has setuptools."""


def call(*command: object, cwd: Path) -> str:
    """What a command prints, run without what the environment says of imports and data.

    Raises:
        AssertionError: it fails; with all that it said.
    """
    bare = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "SSLKIT_DATA", "SSLKIT_PLUGINS")}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=bare, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


def fresh_environment(folder: Path) -> Path:
    """A new virtual environment to install plugins into, and the folder of its programs.

    sslkit and everything else are shared with this environment: installing torch again would take minutes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    call(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)  # pip is shared, too
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    own = call(programs / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    shared = sysconfig.get_path("purelib")
    # addsitedir also obeys the .pth files of the shared folder, which an editable install of sslkit has.
    lines = [str(ROOT), str(ROOT / "plugins"), f"import site; site.addsitedir({shared!r})"]
    Path(own, "shared.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return programs


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY, encoding="utf-8")
    return path


@pytest.fixture
def recipe_file(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a text as a recipe and gives its path."""

    def write(text: str, name: str = "recipe.toml") -> Path:
        path = tmp_path / name
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return path

    return write


class Install(Protocol):
    """Puts a package with entry points on the path, as pip would, and gives its folder of metadata."""

    def __call__(
        self, distribution: str, entries: str, modules: dict[str, str] | None = None, *, requires: Sequence[str] = ()
    ) -> Path: ...


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    folder = tmp_path / "installed"
    folder.mkdir()

    def put(
        distribution: str, entries: str, modules: dict[str, str] | None = None, *, requires: Sequence[str] = ()
    ) -> Path:
        info = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        needed = "".join(f"Requires-Dist: {text}\n" for text in requires)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n{needed}")
        (info / "entry_points.txt").write_text(f"[sslkit]\n{entries}\n")
        for name, source in (modules or {}).items():
            (folder / f"{name}.py").write_text(source)
        registry.clear()
        return info

    monkeypatch.syspath_prepend(str(folder))
    yield put
    registry.clear()


def run_info(side: int = 32, channels: int = 3, **changes: object) -> RunInfo:
    """The facts of a small run on images whose normalisation changes nothing."""
    facts = {
        "seed": 0,
        "device": "cpu",
        "image_size": side,
        "channels": channels,
        "mean": (0.0,) * channels,
        "std": (1.0,) * channels,
        "train_images": 100,
        "total_steps": 10,
        "steps_per_epoch": 5,
        "batch_size": 8,
    }
    return RunInfo(**(facts | changes))  # type: ignore[arg-type]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The system's Chromium without a window. Tests that want it are skipped where there is none, but not in CI."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        found = None
    if found is None:
        missing = "needs Chromium and `pip install -e '.[browser]'`"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found)
        yield started
        started.close()


def noisy_cifar10(folder: Path, *, train: int, test: int) -> None:
    """Images of noise in CIFAR-10's layout, for `SSLKIT_DATA=folder`."""
    (folder / "cifar10").mkdir()
    pixels = np.random.default_rng(0)
    for split, images in (("train", train), ("test", test)):
        rows = []
        for number in range(images):
            file = io.BytesIO()
            Image.fromarray(pixels.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
            rows.append({"img": {"bytes": file.getvalue(), "path": None}, "label": number % 10})
        pq.write_table(pa.Table.from_pylist(rows), folder / "cifar10" / f"{split}.parquet")


def noisy_photos(folder: Path, *, train: int, test: int) -> None:
    """`folder/images`: noise as JPEG files of many sizes and shapes, in folders of two classes."""
    pixels = np.random.default_rng(0)
    for split, images in (("train", train), ("test", test)):
        for number in range(images):
            file = folder / "images" / split / "ab"[number % 2] / f"{number}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            height, width = pixels.integers(20, 60, 2)
            Image.fromarray(pixels.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file)


@pytest.fixture
def log(tmp_path: Path) -> Callable[[str], str]:
    """Writes the log of another program and gives its path."""

    def write(text: str) -> str:
        path = tmp_path / "log.csv"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def lines(values: Any, form: str = "{value}") -> str:
    """A line for each value, as a log has them."""
    return "\n".join(form.format(number=n, value=v) for n, v in enumerate(values)) + "\n"
