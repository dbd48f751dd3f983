from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sslkit.api import DataInfo, Images
from sslkit.errors import UserError
from sslkit.viewing import Viewing
from sslkit_datasets import Digits, Folder, Subset, reading


def digits() -> Digits:
    return Digits(prints=1, test_prints=1)


def info() -> DataInfo:
    return DataInfo(seed=0, cache=Path("nowhere"), say=lambda text: None)


def rows_of(part: Images, whole: Images) -> list[int]:
    """Where the images of a part are in the whole; each is there once."""
    places = {bytes(image.numpy()): row for row, image in enumerate(whole.read(torch.arange(len(whole))))}
    assert len(places) == len(whole)
    return [places[bytes(image.numpy())] for image in part.read(torch.arange(len(part)))]


def test_a_subset_is_some_of_the_images_with_their_labels() -> None:
    whole, opened = digits().build(info()), Subset(of=digits(), images=200).build(info())
    part = opened.train
    rows = rows_of(part, whole.train)
    assert len(part) == len(set(rows)) == 200
    assert rows == sorted(rows)
    assert part.tensor is not None
    assert torch.equal(part.tensor, part.read(torch.arange(200)))
    assert torch.equal(part.read(torch.tensor([5, 3])), part.tensor[[5, 3]])
    assert part.labels is not None
    assert whole.train.labels is not None
    assert torch.equal(part.labels, whole.train.labels[rows])
    # Drawn from all of them: half of a uniform draw lies in either half, give or take six standard deviations.
    assert 58 < sum(row < len(whole.train) / 2 for row in rows) < 142


def test_a_subset_leaves_the_rest_alone() -> None:
    whole, opened = digits().build(info()), Subset(of=digits(), images=200).build(info())
    assert opened.test is not None
    assert whole.test is not None
    assert opened.test.tensor is not None
    assert torch.equal(opened.test.tensor, whole.test.tensor)
    assert (opened.class_names, opened.bad) == (whole.class_names, whole.bad)


def test_a_subset_is_known_by_its_images() -> None:
    def opened(**options: int) -> Any:
        return Subset(of=digits(), **{"images": 200, **options}).build(info())

    first = opened()
    assert torch.equal(first.train.tensor, opened().train.tensor)
    assert first.fingerprint == opened().fingerprint
    assert not torch.equal(first.train.tensor, opened(seed=1).train.tensor)
    prints = [first.fingerprint, digits().build(info()).fingerprint, opened(seed=1).fingerprint]
    prints += [opened(images=199).fingerprint, opened(images=1347).fingerprint]
    assert len(set(prints)) == len(prints)


def test_a_subset_of_everything_is_everything() -> None:
    whole = digits().build(info())
    opened = Subset(of=digits(), images=len(whole.train)).build(info())
    assert opened.train.tensor is not None
    assert torch.equal(opened.train.tensor, whole.train.tensor)


def test_a_subset_reads_what_does_not_fit_in_memory_and_has_no_labels(tmp_path: Path) -> None:
    for number in range(20):
        Image.fromarray(np.full((4, 4, 3), number, np.uint8)).save(tmp_path / f"{number:02}.png")
    source = Folder(root=str(tmp_path), size=4, memory_limit_gb=1e-9, workers=1)
    opened = Subset(of=source, images=7).build(DataInfo(0, tmp_path / "cache", lambda text: None))
    assert opened.train.tensor is None
    assert opened.train.labels is None
    assert opened.test is None
    shades = opened.train.read(torch.arange(7))[:, 0, 0, 0].tolist()
    assert len(set(shades)) == 7
    assert shades == sorted(shades)


def test_a_subset_larger_than_the_whole_is_refused() -> None:
    with pytest.raises(UserError, match=r"^data_source\.images: is 1348, but there are only 1347 training images; "):
        Subset(of=digits(), images=1348).build(info())


@pytest.mark.parametrize(("workers", "expected"), [(None, 3), (7, 7)])
def test_threads_are_shared_with_the_other_processes_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int | None, expected: int
) -> None:
    monkeypatch.setattr("sslkit.environment.cores_here", lambda: 24)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    (tmp_path / "images").mkdir()
    for number in range(20):
        Image.fromarray(np.full((4, 4, 3), number, np.uint8)).save(tmp_path / "images" / f"{number:02}.png")
    pools: list[int] = []
    pool = ThreadPoolExecutor
    monkeypatch.setattr(reading, "ThreadPoolExecutor", lambda number: pools.append(number) or pool(number))
    source = Folder(root=str(tmp_path / "images"), size=8, crops_from="original", workers=workers)
    for spec in (source, Subset(of=source, images=9)):
        train = spec.build(DataInfo(0, tmp_path / "cache", lambda text: None)).train
        assert Viewing(train, None).workers == expected  # type: ignore[arg-type]
        train.read(torch.arange(9))
    assert pools == [expected] * 2
