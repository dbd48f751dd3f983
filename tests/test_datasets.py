"""What all data sources share, and the digits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from sklearn.datasets import load_digits

from sslkit.api import DataInfo
from sslkit.errors import UserError
from sslkit_datasets import CIFAR10, Digits, Folder, Parquet
from sslkit_datasets.digits import print_scans
from sslkit_datasets.images import Fingerprint, Store, shown, sift, survey
from sslkit_datasets.preparing import Preparation

# ---------------------------------------------------------------- specs


def test_importing_the_package_imports_no_libraries():
    heavy = ["torch", "torchvision", "numpy", "pyarrow", "sklearn", "PIL"]
    code = f"import sys, sslkit_datasets; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("spec", [CIFAR10, Folder, Parquet, Digits])
def test_every_option_is_documented(spec):
    assert spec.__doc__.partition("\n")[0].strip()
    for name, field in spec.model_fields.items():
        assert field.description, name


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        (Folder, {}),
        (Folder, {"root": "x"}),
        (Folder, {"root": "x", "size": 0}),
        (Folder, {"root": "x", "size": 8, "channels": 17}),
        (Folder, {"root": "x", "size": 8, "max_bad": 1.1}),
        (Folder, {"root": "x", "size": 8, "max_bad": -0.1}),
        (Folder, {"root": "x", "size": 8, "workers": 0}),
        (Folder, {"root": "x", "size": 8, "memory_limit_gb": 0.0}),
        (Parquet, {}),
        (Parquet, {"path": "x", "size": "32"}),
        (Digits, {"prints": 0}),
        (Digits, {"seed": -1}),
        (CIFAR10, {"download": "yes"}),
        (CIFAR10, {"folder": "x"}),
    ],
)
def test_options_out_of_range(spec, options):
    with pytest.raises(ValidationError):
        spec(**options)


def test_specs_travel_as_json():
    spec = Folder(root="x", size=8)
    dumped = spec.model_dump(mode="json")
    assert dumped.pop("use") == "folder"
    assert Folder.model_validate(dumped) == spec


# ---------------------------------------------------------------- shared parts


FIELDS = st.one_of(st.text(), st.binary(), st.integers(), st.none())
RECORDS = st.lists(st.lists(FIELDS, max_size=3), max_size=3)


@settings(deadline=None)
@given(RECORDS, RECORDS)
def test_fingerprints_are_equal_where_the_records_are(first, second):
    def digest(records):
        made = Fingerprint(source="x")
        for record in records:
            made.add(*record)
        return made.hexdigest()

    assert (digest(first) == digest(second)) == (first == second)


def test_fingerprints_differ_with_the_preparation():
    assert Fingerprint(size=8).hexdigest() != Fingerprint(size=9).hexdigest()


@given(st.text())
def test_shown_paths_are_printable(text):
    assert shown(text).isprintable()
    assert shown(text) == text or not text.isprintable()


@given(st.lists(st.booleans(), min_size=1), st.floats(0, 1))
def test_sift(broken, max_bad):
    problems = ["is empty" if b else None for b in broken]
    try:
        good, bad = sift(problems, str, which="test", max_bad=max_bad, advice="")
    except UserError as error:
        assert sum(broken) / len(broken) > max_bad or all(broken)
        assert f"{sum(broken)} of {len(broken)} test images" in str(error)  # noqa: PT017 either outcome is right
    else:
        assert sum(broken) / len(broken) <= max_bad
        assert good == [i for i, b in enumerate(broken) if not b]
        assert [b["path"] for b in bad] == [str(i) for i, b in enumerate(broken) if b]


@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_store_moves_together_what_is_kept(keep):
    store = Store(len(keep), 1.0)
    for row in reversed(range(len(keep))):
        store.put(row, np.full((1, 2, 2), row, np.uint8))
    rows = [i for i, k in enumerate(keep) if k]
    assert store.kept(rows)[:, 0, 0, 0].tolist() == rows


def test_an_error_of_ours_in_the_pool_reaches_the_user():
    png = (
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\1\0\0\0\1\x08\0\0\0\0:~\x9bU\0\0\0\nIDATx\x9cc`\0\0\0\2\0\1H\xaf\xa4q"
        b"\0\0\0\0IEND\xaeB`\x82"
    )
    store = Store(10**9, 1.0)
    with pytest.raises(UserError, match="memory_limit_gb = 1"):
        survey([[png] * 200], 200, prepared=Preparation(3), store=store, workers=2, title="")


# ---------------------------------------------------------------- digits


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return Digits().build(DataInfo(0, tmp_path_factory.mktemp("cache")))


def test_digits(digits):
    assert digits.train.tensor.shape == (1347 * 8, 3, 16, 16)
    assert digits.test.tensor.shape == (450 * 2, 3, 16, 16)
    assert digits.train.tensor.dtype == torch.uint8
    assert digits.class_names == tuple("0123456789")
    assert list(digits.bad) == []
    # Every scan is used once: the labels of both sets together are scikit-learn's.
    labels = torch.cat([digits.train.labels[::8], digits.test.labels[::2]])
    assert labels.dtype == torch.int64
    assert np.array_equal(np.bincount(labels), np.bincount(load_digits().target))
    for images, prints in ((digits.train, 8), (digits.test, 2)):
        assert torch.equal(images.labels, images.labels[::prints].repeat_interleave(prints))


def test_digits_do_not_depend_on_the_seed_of_the_run(digits, tmp_path):
    again = Digits().build(DataInfo(17, tmp_path))
    assert torch.equal(again.train.tensor, digits.train.tensor)
    assert again.fingerprint == digits.fingerprint


def test_digits_depend_on_their_options(digits, tmp_path):
    small = {"prints": 1, "test_prints": 1}
    info = DataInfo(0, tmp_path)
    prints = [Digits(**o).build(info).fingerprint for o in (small, small | {"seed": 1}, small | {"test_prints": 2})]
    assert len({digits.fingerprint, *prints}) == 4
    assert len(Digits(**small).build(info).train) == 1347


def test_prints_are_as_described():
    paper = print_scans(np.zeros((3000, 8, 8)), np.random.default_rng(0)).double() / 255
    full = print_scans(np.ones((3000, 8, 8)), np.random.default_rng(0)).double() / 255
    middle = paper[..., 7:9, 7:9].mean((2, 3))  # the light does nothing here, and noise of 0.02 only 0.01
    assert abs(middle.min() - 0.2) < 0.04
    assert abs(middle.mean() - 0.6) < 0.01
    assert abs(middle.max() - 1.0) < 0.04
    assert abs(np.corrcoef(middle[:, 0], middle[:, 1])[0, 1]) < 0.06

    # The same random numbers: ink is between 0.5 and 0.75 of the paper.
    share = (full[..., 7:9, 7:9].mean((2, 3)) / middle)[middle > 0.5]
    assert abs(share.min() - 0.5) < 0.05
    assert abs(share.max() - 0.75) < 0.05
    assert abs(share.mean() - 0.625) < 0.01

    # 14 of 16 pixels are the digit's, up to one off the centre: the middle always, the border in two thirds.
    inked = (full < paper - 0.02).double().mean((0, 1))
    assert inked[2:14, 2:14].min() > 0.8
    third = inked[0, 4:12].mean()
    assert 0.2 < third < 0.4
    assert abs(third - inked[4:12, 15].mean()) < 0.1

    # The difference between the edges is at most 50% either way, in a random direction.
    dark = middle < 0.6  # nothing is clamped
    across = ((paper[..., 7:9, 15] - paper[..., 7:9, 0]).mean(2) / (2 * middle))[dark]
    down = ((paper[..., 15, 7:9] - paper[..., 0, 7:9]).mean(2) / (2 * middle))[dark]
    steep = torch.hypot(across, down)
    assert abs(across.mean()) < 0.02
    assert abs(down.mean()) < 0.02
    assert abs(np.corrcoef(across, down)[0, 1]) < 0.06
    assert 0.45 < torch.quantile(steep, 0.97) < 0.52
    assert abs(steep.mean() - 0.25) < 0.02

    noise = (paper[..., 7, 7] - paper[..., 8, 8])[middle < 0.5] / 2**0.5
    assert abs(noise.std() - 0.02) < 0.008  # and a little light


def pixel_knn(train, test, k=20, temperature=0.1):
    bank, queries = (F.normalize(images.flatten(1), dim=1) for images in (train[0], test[0]))
    similarity, nearest = (queries @ bank.T).topk(k, dim=1)
    votes = torch.zeros(len(queries), 10)
    votes.scatter_add_(1, train[1][nearest], (similarity / temperature).exp())
    return (votes.argmax(1) == test[1]).double().mean().item()


def test_the_figures_in_the_docstring(digits):
    sets = [(images.tensor.float() / 255, images.labels) for images in (digits.train, digits.test)]
    raw = pixel_knn(*sets)
    centred = pixel_knn(*((x - x.mean((2, 3), keepdim=True), y) for x, y in sets))
    assert f"about {raw:.2f}" in Digits.__doc__
    assert f"about {centred:.2f}" in Digits.__doc__


@pytest.mark.skipif("SSLKIT_DATA" not in os.environ, reason="needs CIFAR-10 in SSLKIT_DATA")
@pytest.mark.slow
def test_cifar10_itself():
    found = CIFAR10(download=False).build(DataInfo(0, Path(os.environ["SSLKIT_DATA"])))
    assert found.train.tensor.shape == (50_000, 3, 32, 32)
    assert found.test.tensor.shape == (10_000, 3, 32, 32)
    assert found.train.labels.bincount().tolist() == [5000] * 10
    assert found.test.labels.bincount().tolist() == [1000] * 10
    assert list(found.bad) == []
