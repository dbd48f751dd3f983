from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

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
        "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "at": [1, 2]}],
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
    assert found.parts["optimizer"]["param_groups"] == [{"lr": 0.1, "betas": (0.9, 0.99), "at": [1, 2]}]
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
    assert checkpoint.best(tmp_path) is None
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


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    with pytest.raises(RunFailed):
        checkpoint.load(path)


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
    monkeypatch.setattr(checkpoint, "SCHEMA", 3)
    path = saved(tmp_path)
    monkeypatch.undo()
    with pytest.raises(UserError, match="has checkpoint format 3, and this version of sslkit reads 2"):
        checkpoint.newest(tmp_path)
    (path / "manifest.json").write_text('{"schema": 1, "files": {}}')  # the first format had no digest of itself
    with pytest.raises(UserError, match="has checkpoint format 1, and this version of sslkit reads 2"):
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
    outside = tmp_path.parent / "outside"
    outside.mkdir()
    (tmp_path / ".old-step-000000002").symlink_to(outside)
    checkpoint.clean(tmp_path)
    assert outside.is_dir()
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000005"]


# ---------------------------------------------------------------- whatever a state may hold


def back(folder: Path, state: object) -> Any:
    return checkpoint.load(checkpoint.save(folder, 1, {"x": state}, {})).parts["x"]


def test_names_that_meet_are_two_tensors(tmp_path: Path) -> None:
    one, two, three = torch.ones(1), torch.zeros(2), torch.full((3,), 3.0)
    state = {"a.b": one, "a": {"b": two}, 0: one, "0": three, "__metadata__": two, "": three, "__map__": [one]}
    found = back(tmp_path, state)
    assert list(found) == list(state)
    assert [found["a.b"].tolist(), found["a"]["b"].tolist()] == [[1], [0, 0]]
    assert [found[0].tolist(), found["0"].tolist()] == [[1], [3, 3, 3]]
    assert [found["__metadata__"].tolist(), found[""].tolist(), found["__map__"][0].tolist()] == [[0, 0], [3] * 3, [1]]


KINDS = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_type_and_shape_of_tensor(kind: torch.dtype, tmp_path: Path) -> None:
    state = [torch.ones(()), torch.empty(0, 3), torch.arange(6).reshape(2, 3).t()]
    for original, found in zip(state, back(tmp_path, [t.to(kind) for t in state]), strict=True):
        assert (found.dtype, found.shape) == (kind, original.shape)
        assert torch.equal(found, original.to(kind))


def test_numbers_that_are_not_finite_are_kept_and_the_file_is_json(tmp_path: Path) -> None:
    state = {"plain": [math.inf, -math.inf, math.nan, -0.0, 0.1, 2**70], "tensor": torch.tensor([math.nan, math.inf])}
    found = back(tmp_path, state)
    assert repr(found["plain"]) == repr(state["plain"])
    assert torch.equal(found["tensor"].view(torch.int32), state["tensor"].view(torch.int32))  # type: ignore[attr-defined]

    def none(name: str) -> None:
        pytest.fail(f"{name} is no JSON")

    json.loads((tmp_path / "step-000000001" / "state.json").read_text(), parse_constant=none)


@pytest.mark.parametrize("key", [None, True, 1.5, (1, 2)])
def test_keys_that_would_come_back_as_others_are_refused(key: object, tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="only texts and integers can be saved"):
        checkpoint.save(tmp_path, 1, {"x": {"inner": {key: 1}}}, {})
    assert list(tmp_path.iterdir()) == []


def test_a_state_that_could_not_be_read_again_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "JSON_LIMIT", 10_000)
    with pytest.raises(RunFailed, match="long states have to be tensors"):
        checkpoint.save(tmp_path, 1, {"x": list(range(10_000))}, {})
    nested: list[object] = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(RunFailed, match="could not be written"):
        checkpoint.save(tmp_path, 1, {"x": nested}, {})
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- what others put there


def forged(path: Path, name: str, content: bytes) -> None:
    """Put another content under a checkpoint's manifest, as whoever writes manifests may."""
    (path / name).write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "manifest.json").write_bytes(checkpoint.sealed(manifest))


def test_links_and_pipes_are_not_followed(tmp_path: Path) -> None:
    for name in ("manifest.json", "state.json", "model.safetensors"):
        path = saved(tmp_path / name.partition(".")[0])
        kept = (path / name).rename(tmp_path / f"kept-{name}")
        (path / name).symlink_to(kept)
        with pytest.raises(RunFailed, match=f"{name} is not a plain file"):
            checkpoint.load(path)
        (path / name).unlink()
        os.mkfifo(path / name)
        with pytest.raises(RunFailed, match=f"{name} is not a plain file"):
            checkpoint.load(path)
        (path / name).unlink()
        (path / name).mkdir()
        with pytest.raises(RunFailed, match=f"{name} is not a plain file"):
            checkpoint.load(path)


def test_what_a_manifest_does_not_list_is_neither_read_nor_needed(tmp_path: Path) -> None:
    path = saved(tmp_path)
    (path / "model.pt").write_bytes(b"a stranger's")
    (path / "more").mkdir()
    assert checkpoint.load(path).step == 5
    state = json.loads((path / "state.json").read_text())
    state["parts"]["../../elsewhere"] = {"__map__": []}
    forged(path, "state.json", json.dumps(state).encode())
    with pytest.raises(RunFailed, match=r"does not list the parts of state\.json"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"[]", b"[" * 200_000, b"9" * 10_000, b"\xff\xfe", b'{"schema": 2}', b'{"schema": []}'],
    ids=["empty", "null", "list", "nested", "long", "binary", "bare", "odd"],
)
def test_json_of_strangers_is_one_line(content: bytes, tmp_path: Path) -> None:
    forged(path := saved(tmp_path), "state.json", content)
    with pytest.raises(RunFailed, match="not a valid checkpoint") as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value)
    (path / "manifest.json").write_bytes(content)
    with pytest.raises(RunFailed):
        checkpoint.load(path)


def test_json_that_would_fill_the_memory_is_not_parsed(tmp_path: Path) -> None:
    path = saved(tmp_path)
    forged(path, "state.json", bytes(checkpoint.JSON_LIMIT + 1))
    with pytest.raises(RunFailed, match=r"state\.json is larger than 67,108,864 bytes"):
        checkpoint.load(path)
    with (path / "manifest.json").open("rb+") as file:
        file.truncate(2**33)
    with pytest.raises(RunFailed, match=r"manifest\.json is larger than 67,108,864 bytes"):
        checkpoint.load(path)


def test_a_checkpoint_under_another_steps_name_is_noticed(tmp_path: Path) -> None:
    saved(tmp_path, 5).rename(tmp_path / "step-000000007")
    found, problems = checkpoint.newest(tmp_path)
    assert found is None
    assert problems == [
        f"{tmp_path}/step-000000007: is the checkpoint of step 5, under another name; set aside as "
        "damaged-step-000000007"
    ]


def test_a_damaged_knn_does_not_decide_which_is_best(tmp_path: Path) -> None:
    saved(tmp_path, 1, 0.7)
    path = saved(tmp_path, 2, 0.2) / "state.json"
    path.write_text(path.read_text().replace('"knn_top1": 0.2', '"knn_top1": 0.9'))
    assert checkpoint.best(tmp_path) == tmp_path / "step-000000001"


def test_those_set_aside_before_stay(tmp_path: Path) -> None:
    for _ in range(3):
        (saved(tmp_path) / "state.json").write_bytes(b"")
        assert checkpoint.newest(tmp_path)[0] is None
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "damaged-step-000000005", "damaged-step-000000005-2", "damaged-step-000000005-3",
    ]  # fmt: skip


# ---------------------------------------------------------------- retention and room


def test_the_first_at_or_after_each_multiple_is_kept_for_good(tmp_path: Path) -> None:
    for step in range(40, 441, 40):  # not every multiple of 100 has a checkpoint
        saved(tmp_path, step)
        checkpoint.prune(tmp_path, 2, 100)
    assert [int(p.name[5:]) for p in checkpoint.listed(tmp_path)] == [120, 200, 320, 400, 440]


def test_what_cannot_be_removed_is_told_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        saved(tmp_path, step)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        checkpoint.prune(tmp_path, 2, say=said.append)
    assert said == [
        f"warning: {tmp_path}/step-000000001: is not needed any more, and cannot be removed: Permission denied"
    ]
    assert len(checkpoint.listed(tmp_path)) == 3


def test_no_byte_of_a_manifest_may_change(tmp_path: Path) -> None:
    manifest = saved(tmp_path) / "manifest.json"
    whole = manifest.read_bytes()
    for at in range(len(whole)):
        for damaged in (whole[:at], whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :]):
            manifest.write_bytes(damaged)
            with pytest.raises(RunFailed):
                checkpoint.load(manifest.parent, wanted=())
