"""Folders of images: what is found, in which order, and what is left out."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import threading

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sslkit.api import DataInfo
from sslkit.errors import RunFailed, UserError
from sslkit_datasets import Folder
from sslkit_datasets import folder as module
from sslkit_datasets.decode import decode


def image_bytes(seed=0, side=12, kind="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write(root, *names):
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(i))


@pytest.fixture
def said():
    return []


@pytest.fixture
def info(tmp_path, said):
    return DataInfo(0, tmp_path / "cache", said.append)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "images").mkdir()
    return tmp_path / "images"


@pytest.fixture
def opened(root, info):
    def open_with(**options):
        return Folder(**{"root": str(root), "size": 8, "workers": 2} | options).build(info)

    return open_with


# ---------------------------------------------------------------- what is found


def test_class_folders(root, opened, said):
    write(root, "cat/b.png", "cat/a.JPG", "ant/deep/er/x.webp", "ant/y.jpeg")
    found = opened()
    assert found.class_names == ("ant", "cat")
    assert found.train.labels.tolist() == [0, 0, 1, 1]
    assert found.train.labels.dtype == torch.int64
    assert found.train.tensor.shape == (4, 3, 8, 8)
    assert found.train.tensor.dtype == torch.uint8
    assert (found.test, list(found.bad), said) == (None, [], [])
    assert len(found.fingerprint) == 64


@pytest.mark.filterwarnings("ignore")
def test_order_and_labels_are_torchvisions(root, opened):
    from torchvision.datasets import ImageFolder
    from torchvision.transforms.functional import pil_to_tensor

    write(root, *(f"{c}/{n}.png" for c in ("b", "a", "C", "é", "10", "9") for n in ("z", "10", "9", "Y")))
    found = opened(size=12)
    theirs = ImageFolder(str(root), transform=pil_to_tensor)
    assert found.class_names == tuple(theirs.classes)
    assert found.train.labels.tolist() == theirs.targets
    assert torch.equal(found.train.tensor, torch.stack([image for image, _ in theirs]))


def test_flat_folder_has_no_labels(root, opened):
    write(root, "b.png", "a.png")
    found = opened(size=12)
    assert found.train.labels is None
    assert found.class_names is None
    assert found.train.tensor[1].tolist() == np.asarray(Image.open(root / "b.png")).transpose(2, 0, 1).tolist()


def test_grey(root, opened):
    write(root, "a.png")
    assert opened(channels=1).train.tensor.shape == (1, 1, 8, 8)


@pytest.mark.parametrize("name", ["test", "val"])
def test_two_sets_in_one_folder(root, opened, name):
    write(root, "train/a/1.png", "train/b/2.png", "train/b/3.png", f"{name}/b/4.png")
    found = opened()
    assert found.train.labels.tolist() == [0, 1, 1]
    assert found.test.labels.tolist() == [1]


def test_two_roots(tmp_path, root, opened):
    write(root, "a/1.png", "b/2.png")
    write(tmp_path / "other", "b/1.png")
    assert opened(test_root=str(tmp_path / "other")).test.labels.tolist() == [1]


def test_unlabelled_test_images(root, opened):
    write(root, "train/a/1.png", "test/2.png")
    found = opened()
    assert found.train.labels.tolist() == [0]
    assert found.test.labels is None


def test_explicit_test_root_settles_what_test_and_val_leave_open(root, opened):
    write(root, "train/a/1.png", "test/a/2.png", "val/a/3.png", "val/a/4.png")
    with pytest.raises(UserError, match=r"both test/ and val/; name one of them as test_root"):
        opened()
    assert len(opened(test_root=str(root / "val")).test) == 2


def test_a_class_named_train_is_not_mistaken(root, opened):
    write(root, "train/1.png", "bus/2.png")
    with pytest.raises(UserError, match=r"is train/ a set or a class"):
        opened()


def test_hidden_files_are_passed_over_in_silence_and_others_are_mentioned(root, opened, said):
    write(root, "a/1.png", "a/.2.png", ".git/3.png", "__MACOSX/4.png", "a/.DS_Store")
    assert len(opened().train) == 1
    assert said == []
    (root / "a" / "notes.txt").write_text("x")
    (root / "a" / "x.gif").write_text("x")
    assert len(opened().train) == 1
    assert len(said) == 1
    assert "passed over 2 files (a/notes.txt, a/x.gif)" in said[0]


def test_empty_class_folders_are_no_classes(root, opened, said):
    write(root, "a/1.png", "c/2.png")
    (root / "b" / "inner").mkdir(parents=True)
    found = opened()
    assert found.class_names == ("a", "c")
    assert found.train.labels.tolist() == [0, 1]
    assert "1 class folder (b) without images" in said[0]


def test_links(root, opened, tmp_path):
    write(tmp_path / "far", "x/1.png")
    (root / "x").symlink_to(tmp_path / "far" / "x")
    (root / "x" / "loop").symlink_to(tmp_path / "far")
    assert len(opened().train) >= 1
    assert opened().class_names == ("x",)


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ([], {}, "holds no images"),
        (["a/1.png", "2.png"], {}, "1 image lies beside 1 folder, as 2.png; put every"),
        (["train/a/1.png", "test/b/1.png"], {}, r"1 class folder \(b\) for which"),
        (["train/1.png", "test/b/1.png"], {}, "classes cannot be compared"),
        (["1.png"], {"root": "/does/not/exist"}, "data_source.root: /does/not/exist does not exist"),
        (["1.png"], {"test_root": "/does/not/exist"}, "data_source.test_root: /does/not/exist does not exist"),
        (["1.png"], {"test_root": __file__}, "data_source.test_root: .* is not a folder"),
    ],
)
def test_mistakes(root, opened, names, options, message):
    write(root, *names)
    with pytest.raises(UserError, match=message):
        opened(**options)


def test_names_cannot_command_the_terminal(root, opened):
    (root / "a\x1b[31m\n.png").write_bytes(b"")
    write(root, "b.png")
    bad = opened(max_bad=0.5).bad
    assert bad[0]["path"].endswith("a\\x1b[31m\\n.png")


# ---------------------------------------------------------------- broken images


SOUND = [f"{'ab'[i // 10]}/{i:02}.png" for i in range(20)]


def broken(root):
    """One of each sort among sound ones."""
    write(root, *SOUND)
    (root / "a" / "03-empty.png").write_bytes(b"")
    (root / "a" / "05-cut.jpg").write_bytes(image_bytes(1, 64, "JPEG")[:900])
    (root / "b" / "12-vector.jpg").write_bytes(b"<svg xmlns='http://www.w3.org/2000/svg'/>")
    (root / "b" / "15-gone.png").symlink_to(root / "nowhere.png")
    return ["is empty", "truncated", "is not a", "cannot be read: No such file"]


@pytest.mark.parametrize("memory", [4.0, 1e-9])
def test_broken_images_are_named_and_left_out(root, opened, said, memory):
    expected = broken(root)
    found = opened(max_bad=0.2, memory_limit_gb=memory)
    names = ["a/03-empty.png", "a/05-cut.jpg", "b/12-vector.jpg", "b/15-gone.png"]
    assert [b["path"] for b in found.bad] == [str(root / name) for name in names]
    for bad, problem in zip(found.bad, expected, strict=True):
        assert problem in bad["problem"]
    assert len(said) == 1
    assert said[0].startswith("left out 4 of 24 images that cannot be read: ")
    assert "and 1 more" in said[0]
    assert found.train.labels.tolist() == [0] * 10 + [1] * 10
    sound = [decode((root / name).read_bytes(), 3, 8) for name in SOUND]
    assert np.array_equal(found.train.read(torch.arange(20)), np.stack(sound))


def test_too_many_broken_images_stop_the_run(root, opened):
    broken(root)
    with pytest.raises(UserError, match=r"4 of 24 training images .* \(17%, more than max_bad = 0.1%\): .*05-cut.jpg"):
        opened()
    with pytest.raises(UserError, match=r"data_source.max_bad"):
        opened(max_bad=3 / 24)
    assert len(opened(max_bad=4 / 24).bad) == 4


def test_each_set_has_its_own_share(root, opened):
    write(root, *(f"train/a/{i}.png" for i in range(30)), "test/a/1.png")
    (root / "test" / "a" / "2.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"1 of 2 test images"):
        opened(max_bad=0.1)


def test_nothing_left(root, opened):
    (root / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"1 of 1 training images cannot be read"):
        opened(max_bad=1.0)


# ---------------------------------------------------------------- in memory or not


def test_memory_or_not_and_threads_do_not_matter(root, opened):
    write(root, *(f"train/{c}/{i}.png" for c in "abc" for i in range(50)), "test/a/1.png")
    held, one = opened(), opened(workers=1)
    read = opened(memory_limit_gb=1e-9, workers=3)
    assert read.train.tensor is None
    assert read.test.tensor is None
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    for images in (held.train, one.train, pickle.loads(pickle.dumps(read.train))):
        assert len(images) == 150
        assert torch.equal(images.read(order), held.train.tensor[order])
        assert images.read(torch.tensor([], dtype=torch.int64)).shape == (0, 3, 8, 8)
        assert torch.equal(images.labels, held.train.labels)
        with pytest.raises(IndexError):
            images.read(torch.tensor([150]))
    assert held.fingerprint == one.fingerprint == read.fingerprint


def test_reading_from_several_threads(root, opened):
    write(root, *(f"{i:02}.png" for i in range(40)))
    images, expected = opened(memory_limit_gb=1e-9).train, opened().train.tensor
    results = {}

    def reader(seed):
        order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
        results[seed] = torch.equal(images.read(order), expected[order])

    threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(4), True)


def test_the_limit_counts_both_sets(root, opened):
    write(root, "train/a/1.png", "test/a/1.png")
    one = 3 * 8 * 8 / 1e9
    assert opened(memory_limit_gb=2 * one).train.tensor is not None
    assert opened(memory_limit_gb=1.9 * one).train.tensor is None


def test_a_file_that_breaks_during_the_run_is_an_error(root, opened):
    write(root, "a.png", "b.png")
    images = opened(memory_limit_gb=1e-9).train
    (root / "b.png").write_bytes(b"")
    with pytest.raises(RunFailed, match=r"b.png is empty .* it could be read when the run began"):
        images.read(torch.tensor([0, 1]))


def test_the_check_is_remembered_until_a_file_changes(root, opened, info, monkeypatch):
    write(root, *(f"{i}.png" for i in range(9)))
    (root / "x.png").write_bytes(b"")
    first = opened(memory_limit_gb=1e-9, max_bad=0.5)
    surveys = []
    monkeypatch.setattr(module, "survey", lambda *a, f=module.survey, **k: surveys.append(1) or f(*a, **k))
    again = opened(memory_limit_gb=1e-9, max_bad=0.5)
    assert surveys == []
    assert (again.fingerprint, again.bad) == (first.fingerprint, first.bad)
    assert len(again.train) == 9
    with pytest.raises(UserError, match=r"x.png"):
        opened(memory_limit_gb=1e-9)

    (root / "x.png").write_bytes(image_bytes(77))
    mended = opened(memory_limit_gb=1e-9)
    assert surveys == [1]
    assert len(mended.train) == 10

    for record in (info.cache / "checked").iterdir():
        record.write_text("[[]]")
    assert opened(memory_limit_gb=1e-9).fingerprint == mended.fingerprint


def test_a_file_that_could_not_be_read_is_tried_again(root, opened, monkeypatch):
    write(root, "a.png", "b.png")
    with monkeypatch.context() as patch:
        patch.setattr(module.Path, "read_bytes", refuse)
        with pytest.raises(UserError, match=r"2 of 2 .* Permission denied"):
            opened(memory_limit_gb=1e-9)
    assert len(opened(memory_limit_gb=1e-9).train) == 2


def refuse(path):
    raise PermissionError(13, "Permission denied", str(path))


def test_a_cache_that_cannot_be_written_only_costs_time(root, opened, info):
    write(root, "a.png")
    info.cache.write_text("a file where the folder should be")
    assert len(opened(memory_limit_gb=1e-9).train) == 1


# ---------------------------------------------------------------- fingerprint


def test_fingerprint(tmp_path, root, opened, info):
    write(root, "a/1.png", "b/2.png")
    base = opened().fingerprint
    (root / "a" / "notes.txt").write_text("x")
    (root / "a" / "1.png").touch()
    assert opened(max_bad=0.3, memory_limit_gb=1.0).fingerprint == base
    seen = {base, opened(size=9).fingerprint, opened(channels=1).fingerprint}
    shutil.copytree(root, tmp_path / "test")
    seen.add(opened(test_root=str(tmp_path / "test")).fingerprint)
    content = (root / "a" / "1.png").read_bytes()
    (root / "a" / "1.png").write_bytes(image_bytes(99))
    seen.add(opened().fingerprint)
    (root / "a" / "1.png").write_bytes(content)
    assert opened().fingerprint == base
    (root / "a" / "1.png").rename(root / "b" / "1.png")
    write(root, "a/0.png")
    seen.add(opened().fingerprint)
    (root / "b" / "1.png").write_bytes(b"")
    seen.add(opened(max_bad=0.5).fingerprint)
    assert len(seen) == 7

    moved = tmp_path / "moved"
    before = opened(max_bad=0.5).fingerprint
    root.rename(moved)
    assert Folder(root=str(moved), size=8, max_bad=0.5).build(info).fingerprint == before


NAME = st.text("abcAB01é", min_size=1, max_size=3)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(NAME, st.sets(NAME, min_size=1, max_size=3), min_size=1, max_size=4), st.randoms())
def test_the_order_of_the_directory_listing_does_not_matter(tmp_path_factory, tree, random):
    base = tmp_path_factory.mktemp("tree")
    write(base, *(f"{folder}/{name}.png" for folder, names in tree.items() for name in names))
    real = os.scandir

    class Shuffled:
        def __init__(self, path):
            with real(path) as found:
                self.entries = list(found)
            random.shuffle(self.entries)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *error):
            return None

    plain = module.list_images(base, DataInfo(0, base))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.os, "scandir", Shuffled)
        shuffled = module.list_images(base, DataInfo(0, base))
    assert plain == shuffled
    assert set(plain.names) == {f"{folder}/{name}.png" for folder, names in tree.items() for name in names}
    assert [plain.classes[i] for i in plain.labels(plain.classes)] == [n.partition("/")[0] for n in plain.names]
