"""Parquet files in the layout of Hugging Face image data sets."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from sslkit.api import DataInfo
from sslkit.errors import UserError
from sslkit_datasets import Parquet


def image_bytes(seed=0, width=6, height=6):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pixels_of(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).transpose(2, 0, 1)


def table(images, labels=None, *, image="img", label="label", names=None, struct=True):
    if struct:
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        images = [data if data is None or isinstance(data, dict) else {"bytes": data, "path": "x"} for data in images]
        columns = {image: pa.array(images, kind)}
    else:
        columns = {image: pa.array(images, pa.binary())}
    if labels is not None:
        columns[label] = labels if isinstance(labels, pa.Array) else pa.array(labels, pa.int64())
    made = pa.table(columns)
    if names is not None:
        features = {label: {"names": names, "_type": "ClassLabel"}}
        made = made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    return made


def write(path, *arguments, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table(*arguments, **options), path, row_group_size=3)
    return path


@pytest.fixture
def said():
    return []


@pytest.fixture
def opened(tmp_path, said):
    def open_path(path=None, **options):
        path = str(tmp_path if path is None else path)
        return Parquet(**{"path": path, "workers": 2} | options).build(DataInfo(0, tmp_path / "cache", said.append))

    return open_path


IMAGES = [image_bytes(i) for i in range(8)]


# ---------------------------------------------------------------- files


def test_one_file(tmp_path, opened, said):
    found = opened(write(tmp_path / "a.parquet", IMAGES, [0, 1, 2, 0, 1, 2, 0, 1], names=["x", "y", "z"]))
    assert torch.equal(found.train.tensor, torch.from_numpy(np.stack([pixels_of(i) for i in IMAGES])))
    assert found.train.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert found.class_names == ("x", "y", "z")
    assert (found.test, list(found.bad), said) == (None, [], [])
    assert torch.equal(found.train.read(torch.tensor([3, 0])), found.train.tensor[[3, 0]])


@pytest.mark.parametrize("held_out", ["test-00000-of-00001", "validation-00000-of-00001", "val", "test"])
def test_folder_of_both_sets(tmp_path, opened, held_out):
    write(tmp_path / "train-00001-of-00002.parquet", IMAGES[3:6], [3, 4, 5])
    write(tmp_path / "train-00000-of-00002.parquet", IMAGES[:3], [0, 1, 2])
    write(tmp_path / f"{held_out}.parquet", IMAGES[6:], [6, 7])
    found = opened()
    assert found.train.labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert found.test.labels.tolist() == [6, 7]
    assert np.array_equal(found.train.tensor[3], pixels_of(IMAGES[3]))


def test_folder_without_names_of_sets(tmp_path, opened):
    write(tmp_path / "b.parquet", IMAGES[2:4], [2, 3])
    write(tmp_path / "a.parquet", IMAGES[:2], [0, 1])
    found = opened()
    assert (found.train.labels.tolist(), found.test) == ([0, 1, 2, 3], None)


def test_globs(tmp_path, opened):
    for i in range(3):
        write(tmp_path / f"d{i}" / "p.parquet", IMAGES[i : i + 1], [i])
    found = opened(tmp_path / "d[01]" / "*.parquet", test_path=str(tmp_path / "d2"))
    assert (found.train.labels.tolist(), found.test.labels.tolist()) == ([0, 1], [2])


def test_test_and_validation_files_leave_open_which(tmp_path, opened):
    for i, name in enumerate(["train", "test", "validation"]):
        write(tmp_path / f"{name}.parquet", IMAGES[i : i + 1], [i])
    with pytest.raises(UserError, match=r"both test and validation files"):
        opened()
    assert opened(test_path=str(tmp_path / "validation.parquet")).test.labels.tolist() == [2]


def test_a_missing_shard(tmp_path, opened):
    write(tmp_path / "train-00000-of-00003.parquet", IMAGES, [0] * 8)
    write(tmp_path / "train-00002-of-00003.parquet", IMAGES, [0] * 8)
    with pytest.raises(UserError, match=r"1 of 3 shards are missing .* train-00001-of-00003.parquet"):
        opened()
    assert len(opened(tmp_path / "train-00000-of-00003.parquet").train) == 8


# ---------------------------------------------------------------- columns


@pytest.mark.parametrize("struct", [True, False])
@pytest.mark.parametrize(("image", "label"), [("img", "label"), ("image", "labels")])
def test_columns_are_found(tmp_path, opened, struct, image, label):
    found = opened(write(tmp_path / "a.parquet", IMAGES, range(8), image=image, label=label, struct=struct))
    assert found.train.labels.tolist() == list(range(8))


def test_columns_by_name(tmp_path, opened):
    path = write(tmp_path / "a.parquet", IMAGES, range(8), image="photo", label="coarse", names=list("abcdefgh"))
    with pytest.raises(UserError, match=r"no column 'img' or 'image'; its columns are photo, coarse"):
        opened(path)
    assert opened(path, image_column="photo").train.labels is None
    found = opened(path, image_column="photo", label_column="coarse")
    assert found.class_names == tuple("abcdefgh")
    with pytest.raises(UserError, match=r"label_column: .* no column 'fine'; its columns are photo, coarse"):
        opened(path, image_column="photo", label_column="fine")


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint16(), pa.int32()])
def test_integer_labels_of_any_width(tmp_path, opened, kind):
    found = opened(write(tmp_path / "a.parquet", IMAGES[:2], pa.array([1, 0], kind)))
    assert found.train.labels.dtype == torch.int64
    assert found.train.labels.tolist() == [1, 0]


def test_labels_that_are_all_unknown(tmp_path, opened):
    write(tmp_path / "train.parquet", IMAGES[:2], [0, 1])
    write(tmp_path / "test.parquet", IMAGES[:2], [-1, -1])
    assert opened().test.labels is None


@pytest.mark.parametrize(
    "metadata",
    [b"{", b"[]", b'"x"', b'{"info": null}', b'{"info": {"features": {"label": {"names": [1]}}}}', b"\xff"],
)
def test_useless_metadata_gives_no_class_names(tmp_path, opened, metadata):
    made = table(IMAGES, [0] * 8).replace_schema_metadata({b"huggingface": metadata})
    pq.write_table(made, tmp_path / "a.parquet")
    assert opened().class_names is None


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        (pa.array([True, False]), None, "is bool; integers or names are wanted"),
        (pa.array([0.0, 1.0]), None, "is double; integers or names are wanted"),
        (pa.array(["a", None]), None, "1 of 2 training images have no label in the column 'label'"),
        (pa.array([0, None]), None, "1 rows have no value"),
        ([3, -1], None, r"the column 'label' should be class numbers from 0 to 99999: .*a.parquet, row 1 has -1"),
        (pa.array([0, 2**63 + 5], pa.uint64()), None, r"'label' should be .*a.parquet, row 1 has 9223372036854775813"),
        ([100_000, 0], None, r"'label' should be .*a.parquet, row 0 has 100000; number the classes from 0, or"),
        ([0, 2], ["a", "b"], "holds the label 2, but only 2 classes"),
    ],
)
def test_bad_labels(tmp_path, opened, labels, names, message):
    write(tmp_path / "a.parquet", IMAGES[:2], labels, names=names)
    with pytest.raises(UserError, match=message):
        opened()


def test_columns_that_hold_no_encoded_images(tmp_path, opened):
    pq.write_table(pa.table({"img": [[1, 2], [3]]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"encoded images are wanted"):
        opened()
    pq.write_table(pa.table({"img": [{"path": "a"}]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"encoded images are wanted"):
        opened()


def test_shards_that_differ(tmp_path, opened):
    write(tmp_path / "a.parquet", IMAGES, [0] * 8)
    write(tmp_path / "b.parquet", IMAGES)
    with pytest.raises(UserError, match=r"b.parquet has no column 'label', which the files before it have"):
        opened()


def test_sets_that_name_other_classes(tmp_path, opened):
    write(tmp_path / "train.parquet", IMAGES, [0] * 8, names=["a", "b"])
    write(tmp_path / "test.parquet", IMAGES, [0] * 8, names=["b", "a"])
    with pytest.raises(UserError, match=r"names other classes"):
        opened()


def test_nothing_there(tmp_path, opened):
    with pytest.raises(UserError, match=r"holds no .parquet files"):
        opened()
    with pytest.raises(UserError, match=r"no file or folder matches"):
        opened(tmp_path / "no-*.parquet")
    with pytest.raises(UserError, match=r"data_source.test_path: no file"):
        opened(write(tmp_path / "a.parquet", IMAGES), test_path=str(tmp_path / "b.parquet"))
    with pytest.raises(UserError, match=r"has no rows"):
        opened(write(tmp_path / "a.parquet", []))


def test_files_that_are_damaged(tmp_path, opened):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"cannot be read as a Parquet file"):
        opened()
    data = write(path, [image_bytes(i, 64, 64) for i in range(8)]).read_bytes()
    path.write_bytes(data[:200] + bytes(20_000) + data[20_200:])
    with pytest.raises(UserError, match=r"a.parquet(, row| is damaged)"):
        opened()


# ---------------------------------------------------------------- sizes


def test_sizes(tmp_path, opened):
    images = [image_bytes(0, 6, 6), image_bytes(1, 6, 9), image_bytes(2, 6, 6)]
    write(tmp_path / "a.parquet", images, [0, 1, 2])
    with pytest.raises(UserError, match=r"2 sizes: 6 x 6 \(2\), 6 x 9 \(1\); set data_source.size"):
        opened()
    found = opened(size=6)
    assert found.train.tensor.shape == (3, 3, 6, 6)
    assert np.array_equal(found.train.tensor[0], pixels_of(images[0]))
    assert opened(size=5, channels=1).train.tensor.shape == (3, 1, 5, 5)


def test_images_need_not_be_square(tmp_path, opened):
    write(tmp_path / "a.parquet", [image_bytes(0, 7, 4)])
    assert opened().train.tensor.shape == (1, 3, 4, 7)


def test_both_sets_have_one_size(tmp_path, opened):
    write(tmp_path / "train.parquet", IMAGES)
    write(tmp_path / "test.parquet", [image_bytes(0, 7, 6)])
    with pytest.raises(UserError, match=r"training images have 6 x 6 pixels, the test images 7 x 6"):
        opened()


def test_memory_limit(tmp_path, opened):
    write(tmp_path / "a.parquet", IMAGES)
    needed = 8 * 3 * 6 * 6 / 1e9
    assert len(opened(memory_limit_gb=needed).train) == 8
    with pytest.raises(UserError, match=r"more than memory_limit_gb .* set data_source.size"):
        opened(memory_limit_gb=0.99 * needed)


# ---------------------------------------------------------------- broken images


def test_broken_rows_are_named_and_left_out(tmp_path, opened, said):
    rows = list(IMAGES)
    rows[1], rows[4], rows[6] = b"", None, {"bytes": None, "path": "/etc/passwd"}
    write(tmp_path / "train-00000-of-00002.parquet", rows[:5], range(5))
    write(tmp_path / "train-00001-of-00002.parquet", rows[5:], range(5, 8))
    found = opened(max_bad=0.5)
    assert [b["path"].rpartition("/")[2] for b in found.bad] == [
        "train-00000-of-00002.parquet, row 1",
        "train-00000-of-00002.parquet, row 4",
        "train-00001-of-00002.parquet, row 1",
    ]
    assert [b["problem"] for b in found.bad] == ["is empty (0 bytes)", "has no bytes", "has no bytes"]
    assert found.train.labels.tolist() == [0, 2, 3, 5, 7]
    for i, label in enumerate(found.train.labels.tolist()):
        assert np.array_equal(found.train.tensor[i], pixels_of(IMAGES[label]))
    assert len(said) == 1
    with pytest.raises(UserError, match=r"3 of 8 training images .* more than max_bad = 37.4%"):
        opened(max_bad=0.374)


# ---------------------------------------------------------------- fingerprint


def test_fingerprint_follows_the_content_and_not_the_files(tmp_path, opened):
    labels = list(range(8))
    base = opened(write(tmp_path / "a" / "x.parquet", IMAGES, labels)).fingerprint
    assert opened(tmp_path / "a", workers=1, max_bad=0.5).fingerprint == base
    write(tmp_path / "b" / "train-00000-of-00002.parquet", IMAGES[:5], labels[:5])
    write(tmp_path / "b" / "train-00001-of-00002.parquet", IMAGES[5:], labels[5:])
    assert opened(tmp_path / "b").fingerprint == base

    swapped = [IMAGES[1], IMAGES[0], *IMAGES[2:]]
    others = [
        opened(write(tmp_path / "c.parquet", swapped, labels)),
        opened(write(tmp_path / "d.parquet", IMAGES, [1, 0, *labels[2:]])),
        opened(write(tmp_path / "e.parquet", IMAGES)),
        opened(write(tmp_path / "f.parquet", IMAGES[:7], labels[:7])),
        opened(write(tmp_path / "g.parquet", [*IMAGES[:7], b""], labels), max_bad=0.5),
        opened(tmp_path / "a", size=5),
        opened(tmp_path / "a", channels=1),
        opened(tmp_path / "a", test_path=str(tmp_path / "c.parquet")),
    ]
    prints = [base, *(o.fingerprint for o in others)]
    assert len(set(prints)) == len(prints)
