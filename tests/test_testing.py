"""The conformance suite over every component that comes with sslkit, and the doors to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import sslkit.testing
from sslkit import registry
from sslkit.testing.bench import Bench
from sslkit.testing.core import attempt
from sslkit_cosine import Cosine
from sslkit_crops import Identity

pytest_plugins = ["pytester"]

OURS = [p for p in registry.providers() if p.distribution == "sslkit" and p.kind in registry.KINDS]
REQUIRED: dict[str, dict[str, Any]] = {
    "backbone.timm": {"model": "test_resnet"},
    "data_source.folder": {"root": "FOLDER", "size": 12},
    "data_source.parquet": {"path": "FOLDER/train.parquet"},
    "data_source.webdataset": {"path": "FOLDER/train.tar", "size": 12},
    "data_source.digits": {"prints": 1, "test_prints": 1},
    "head.dino": {"hidden_dim": 16, "bottleneck_dim": 8, "out_dim": 8},
    "data_source.subset": {"of": {"use": "digits", "prints": 1, "test_prints": 1}, "images": 100},
    "head.mlp": {"hidden_dim": 16, "out_dim": 8},
    "loss.moco": {"queue": 64},
    "loss.nnbyol": {"queue": 64},
    "loss.nnclr": {"queue": 64},
    "loss.ressl": {"queue": 64},
    "loss.swav": {"prototypes": 16},
    "loss.w_mse": {"sub_batch": 16},
    "observer.wandb": {"mode": "offline"},
    "optimizer.adam": {"lr": 0.1},
    "optimizer.adamw": {"lr": 0.1},
    "optimizer.lars": {"lr": 0.1},
    "optimizer.sgd": {"lr": 0.1},
    "schedule.constant": {"value": 1.0},
    "schedule.cosine": {"start": 1.0, "end": 0.0},
    "schedule.forum_thread": {},
    "schedule.linear": {"start": 1.0, "end": 0.0},
    "schedule.piecewise": {"points": [[0, 0.0], [0.5, 1.0], [1, 0.0]]},
    "schedule.step": {"start": 1.0, "milestones": [0.5]},
    "schedule.warmup_cosine": {"peak": 1.0, "warmup_epochs": 10.0},
    "view_generator.multi_crop": {"views": [{"count": 2}, {"count": 2, "size": 16, "kind": "local"}]},
}
"""Options that a component cannot do without, or that keep it small."""

EXPECTED = {
    "view_generator.identity": {
        "views_differ": "its views are the image itself, which is what it is for",
        "health": "its views are the image itself, which is what it is for",
    },
}
SLOW = {"data_source.cifar10", "observer.mlflow", "observer.wandb"}
"""They open 60,000 images, or bring a package that takes seconds to import."""
IN_TWO_PROCESSES = {
    "backbone.convnet", "head.mlp", "loss.cosine", "loss.moco", "loss.swav", "target_updater.ema", "optimizer.sgd",
    "view_generator.affine", "data_source.digits", "schedule.cosine", "observer.health",
}  # fmt: skip
"""Those that two processes train together here: each kind, and losses with state. It takes ten seconds each."""


def component(provider: registry.Provider, folder: Path) -> Any:
    options = REQUIRED.get(provider.key, {})
    filled = {name: v.replace("FOLDER", str(folder)) if isinstance(v, str) else v for name, v in options.items()}
    return registry.load(provider.kind, provider.name).model_validate_json(json.dumps(filled))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures of two classes, as files, as Parquet, and in a tar archive."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for number in range(12):
        noise = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        path = folder / "train" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).save(path)
        rows.append({"image": {"bytes": path.read_bytes(), "path": path.name}, "label": number % 2})
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    with tarfile.open(folder / "train.tar", "w") as tar:
        for path in sorted((folder / "train").rglob("*.png")):
            tar.add(path, path.name)
    return folder


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Trackers write to a folder of the test's own."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def every_check(slow: bool) -> list[Any]:
    """The checks of all components, as a table: a component is made when its test runs, for some want files."""
    return [
        pytest.param(provider, one, id=f"{provider.key}-{one.name}")
        for provider in OURS
        for one in sslkit.testing.checks(provider.kind)
        if (one.slow or provider.key in SLOW) is slow
        and (one.name != "two_processes" or provider.key in IN_TWO_PROCESSES)
    ]


BENCHES: dict[str, Bench] = {}


def examine(provider: registry.Provider, one: sslkit.testing.Check, pictures: Path) -> None:
    if provider.key in ("observer.mlflow", "observer.wandb"):
        pytest.importorskip(provider.name)
    if provider.key == "data_source.cifar10" and not (Path(os.environ.get("SSLKIT_DATA", "-")) / "cifar10").is_dir():
        pytest.skip("needs CIFAR-10 in $SSLKIT_DATA")
    if provider.key not in BENCHES:
        BENCHES[provider.key] = Bench(component(provider, pictures))
    result = attempt(one, BENCHES[provider.key])
    reason = EXPECTED.get(provider.key, {}).get(one.name)
    if reason:
        assert result.status == "failed", f"it passes: {reason} no longer holds"
    else:
        assert result.status != "failed", result.message
    if result.status == "not applicable":
        assert not result.message.startswith("needs"), result.message


@pytest.mark.parametrize(("provider", "one"), every_check(slow=False))
def test_our_components_conform(provider: registry.Provider, one: sslkit.testing.Check, pictures: Path) -> None:
    examine(provider, one, pictures)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("provider", "one"), every_check(slow=True))
def test_our_components_conform_slowly(provider: registry.Provider, one: sslkit.testing.Check, pictures: Path) -> None:
    examine(provider, one, pictures)


def test_every_component_is_examined() -> None:
    assert {p.key for p in OURS} >= set(REQUIRED) | set(EXPECTED) | SLOW | IN_TWO_PROCESSES
    for key, checks in EXPECTED.items():
        names = {one.name for one in sslkit.testing.checks(key.partition(".")[0])}
        assert set(checks) <= names


# ---------------------------------------------------------------- what a check and a table of them are


@pytest.mark.parametrize("one", sslkit.testing.checks(), ids=lambda c: c.name)
def test_every_check_says_what_it_asks(one: sslkit.testing.Check) -> None:
    assert one.what
    assert len(one.what) <= 115
    assert one.kinds
    assert set(one.kinds) <= set(registry.KINDS)


@pytest.mark.parametrize("kind", registry.KINDS)
def test_every_kind_is_asked_more_than_its_spec(kind: str) -> None:
    names = [one.name for one in sslkit.testing.checks(kind)]
    assert names[0] == "import_without_torch"
    assert len(names) >= 12
    assert "builds" in names


def tried(body: str, pytester: pytest.Pytester, *options: str) -> pytest.RunResult:
    pytester.makepyfile("import sslkit.testing\nfrom sslkit_cosine import Cosine\n" + textwrap.dedent(body))
    return pytester.runpytest_inprocess("-p", "no:cacheprovider", "-m", "not slow", *options)


def test_parametrize_makes_a_test_of_each_check(pytester: pytest.Pytester) -> None:
    result = tried(
        """
        @sslkit.testing.parametrize(Cosine(), Cosine(form="simsiam"))
        def test_conforms(check):
            check()
        """,
        pytester, "-v", "-rs",
    )  # fmt: skip
    result.stdout.fnmatch_lines(["*::test_conforms[[]loss.cosine-pure[]] PASSED*"])
    result.stdout.fnmatch_lines(["*::test_conforms[[]loss.cosine-2-pure[]] PASSED*"])
    result.stdout.fnmatch_lines(["SKIPPED*: the loss has no commit(), so*"])
    outcomes = result.parseoutcomes()
    assert outcomes["deselected"] == 4, "the slow ones of two components"
    assert outcomes["skipped"] == 2
    assert "failed" not in outcomes


def test_an_expected_failure_has_a_reason_and_must_fail(pytester: pytest.Pytester) -> None:
    result = tried(
        """
        from sslkit_crops import Identity
        reason = "the views are the image itself"
        expected = {"views_differ": reason, "health": reason, "draws": "no"}
        @sslkit.testing.parametrize(Identity(), expected_failures=expected)
        def test_conforms(check):
            check()
        """,
        pytester, "-rxX",
    )  # fmt: skip
    outcomes = result.parseoutcomes()
    assert (outcomes["xfailed"], outcomes["failed"]) == (2, 1)
    result.stdout.fnmatch_lines(["*XFAIL*identity-views_differ*the views are the image itself*"])
    result.stdout.fnmatch_lines(["*XPASS(strict)*no*"])


def test_what_is_no_component_is_refused() -> None:
    with pytest.raises(TypeError, match=r"give an instance: Cosine\(\)"):
        sslkit.testing.parametrize(Cosine)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="is no component; give an instance of a class that derives from"):
        sslkit.testing.run_checks("loss.cosine")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="takes specs to check"):
        sslkit.testing.parametrize()
    with pytest.raises(ValueError, match="no check is named 'pur'; did you mean 'pure'"):
        sslkit.testing.parametrize(Cosine(), expected_failures={"pur": "why"})


def test_run_checks_tells_how_each_ended() -> None:
    results = {r.check: r for r in sslkit.testing.run_checks(Identity(), slow=False)}
    assert results["draws"].status == "ok"
    assert results["views_differ"].status == "failed"
    assert "draw parameters of shape" in results["views_differ"].message
    assert "two_processes" not in results
    assert "compiles" not in results


def test_another_size_of_images() -> None:
    run = sslkit.testing.run_info(image_size=12, channels=1)
    bench = Bench(registry.load("backbone", "convnet")(pool=1), run)
    shape = next(one for one in sslkit.testing.checks("backbone") if one.name == "output_shape")
    assert attempt(shape, bench).status == "ok"
    assert (bench.run.image_size, bench.run.channels, bench.run.views[0].size) == (12, 1, 12)


def test_it_needs_no_torch_to_be_imported() -> None:
    code = "import sys, sslkit.testing; assert 'torch' not in sys.modules and 'pytest' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
