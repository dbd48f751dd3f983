"""The built wheel, in a fresh environment away from the clone."""

from __future__ import annotations

import json
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
from conftest import ROOT, call


@pytest.mark.slow
def test_the_wheel_trains_the_quickstart(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    shutil.copytree(
        ROOT, clone, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "build", "*.egg-info", "_build", ".*cache")
    )
    call(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path / "dist", clone, cwd=tmp_path)
    shutil.rmtree(clone)
    wheel = next((tmp_path / "dist").glob("sslkit-*.whl"))

    call(sys.executable, "-m", "venv", tmp_path / "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    call(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    # The dependencies are shared with this environment: installing torch again would take minutes.
    own = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    (own / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    where = call(python, "-c", "import sslkit; print(sslkit.__file__)", cwd=elsewhere).strip()
    assert Path(where).is_relative_to(tmp_path / "env")
    sslkit = tmp_path / "env" / "bin" / "sslkit"
    assert "byol_cifar10" in call(sslkit, "recipes", cwd=elsewhere)
    assert {"BROKEN"}.isdisjoint(call(sslkit, "list-plugins", "--check", cwd=elsewhere).split())
    out = call(sslkit, "train", "quickstart", "--set", "seed=2", cwd=elsewhere)
    assert "random network (step 0) ->" in " ".join(out.split())
    lines = (elsewhere / "runs/quickstart/metrics.jsonl").read_text().splitlines()
    knn = [r["knn_top1"] for r in map(json.loads, lines) if "knn_top1" in r]
    assert knn[-1] > 0.9 > 0.35 > knn[0]
