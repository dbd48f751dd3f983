from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sslkit import checkpoint
from sslkit.errors import RunFailed, UserError

PARTS = {
    "model": {"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(3)},
    "optimizer": {
        "state": {0: {"momentum": torch.ones(3), "step": 4}},
        "param_groups": [{"lr": 0.1, "betas": [0.9, 0.99]}],
    },
    "loss": {},
}


def saved(folder: Path, step: int = 5, knn: float | None = None) -> Path:
    return checkpoint.save(folder, step, PARTS, {"knn_top1": knn})


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    found = checkpoint.load(saved(tmp_path))
    assert found.step == 5
    assert torch.equal(found.parts["model"]["w"], PARTS["model"]["w"])  # type: ignore[index]
    assert found.parts["model"]["n"].shape == ()
    assert found.parts["optimizer"]["state"][0]["step"] == 4
    assert found.parts["optimizer"]["param_groups"] == [{"lr": 0.1, "betas": [0.9, 0.99]}]
    assert found.parts["loss"] == {}


def test_parts_that_are_not_wanted_are_neither_read_nor_checked(tmp_path: Path) -> None:
    path = saved(tmp_path)
    (path / "optimizer.safetensors").unlink()
    assert set(checkpoint.load(path, wanted=("model",)).parts) == {"model"}
    with pytest.raises(RunFailed, match=r"optimizer\.safetensors"):
        checkpoint.load(path)
    (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(RunFailed, match=r"model\.safetensors is not what the manifest says"):
        checkpoint.load(path, wanted=("model",))


def test_the_best_is_the_oldest_with_the_highest_knn(tmp_path: Path) -> None:
    assert checkpoint.best(tmp_path / "nothing") is None
    saved(tmp_path, 1)
    assert checkpoint.best(tmp_path) is None, "kNN was not measured"
    for step, knn in ((2, 0.3), (3, 0.7), (4, 0.7), (5, 0.1)):
        saved(tmp_path, step, knn)
    assert checkpoint.best(tmp_path) == tmp_path / "step-000000003"


def test_only_plain_data_is_written(tmp_path: Path) -> None:
    path = saved(tmp_path)
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}
    with pytest.raises(RunFailed, match="only tensors and plain values"):
        checkpoint.save(tmp_path, 6, {"x": {"function": print}}, {})
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "a failed save leaves nothing behind"


def test_tied_and_strided_tensors(tmp_path: Path) -> None:
    weight = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    found = checkpoint.load(checkpoint.save(tmp_path, 1, {"m": {"a": weight, "b": weight, "c": weight[:, :1]}}, {}))
    for key, expected in (("a", weight), ("b", weight), ("c", weight[:, :1])):
        assert torch.equal(found.parts["m"][key], expected)
    again = checkpoint.like(weight, found.parts["m"]["a"])
    assert again.stride() == weight.stride()
    assert torch.equal(again, weight)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_or_missing_byte_is_noticed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = saved(tmp_path_factory.mktemp("c"))
    victim = data.draw(st.sampled_from(sorted(p.name for p in path.iterdir())))
    content = bytearray((path / victim).read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    else:
        content = content[:at]
    (path / victim).write_bytes(bytes(content))
    try:
        found = checkpoint.load(path)
    except RunFailed:
        return
    # The manifest's own bytes may change without changing what it says (a space, its unused schema number).
    assert victim == "manifest.json"
    assert torch.equal(found.parts["model"]["w"], PARTS["model"]["w"])  # type: ignore[index]


def test_a_damaged_one_is_set_aside_and_the_one_before_is_used(tmp_path: Path) -> None:
    saved(tmp_path, 5)
    path = saved(tmp_path, 10)
    (path / "model.safetensors").write_bytes(b"")
    found, problems = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 5
    assert len(problems) == 1
    assert "model.safetensors is not what the manifest says" in problems[0]
    assert (tmp_path / "damaged-step-000000010").is_dir(), "never deleted"


def test_another_format_is_refused_and_not_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SCHEMA", 2)
    path = saved(tmp_path)
    monkeypatch.undo()
    with pytest.raises(UserError, match="has checkpoint format 2, and this version of sslkit reads 1"):
        checkpoint.newest(tmp_path)
    assert path.is_dir()


def test_an_existing_step_is_never_overwritten(tmp_path: Path) -> None:
    before = (saved(tmp_path) / "state.json").stat().st_mtime_ns
    saved(tmp_path, knn=0.5)
    assert (tmp_path / "step-000000005" / "state.json").stat().st_mtime_ns == before


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    for step, knn in ((1, 0.3), (2, 0.9), (3, 0.4), (4, None), (5, 0.5)):
        saved(tmp_path, step, knn)
    checkpoint.prune(tmp_path, keep=2)
    assert [p.name[-1] for p in checkpoint.listed(tmp_path)] == ["2", "4", "5"]


def test_leftovers_of_a_killed_process_are_cleaned(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / ".tmp-step-000000006-123").mkdir()
    (tmp_path / ".old-step-000000001").mkdir()
    checkpoint.clean(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000005"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_one_line(tmp_path: Path) -> None:
    saved(tmp_path)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(RunFailed, match="earlier ones are untouched"):
            saved(tmp_path, 6)
    finally:
        tmp_path.chmod(0o700)


def test_a_full_disk_is_one_line_and_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(RunFailed, match="No space left on device; earlier ones are untouched"):
        saved(tmp_path, 6)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000005"]
