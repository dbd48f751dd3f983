"""Records in TensorBoard, Weights & Biases and MLflow, read back from what these wrote. Nothing here uses a network."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TINY
from PIL import Image

from sslkit import checkpoint, view_grid
from sslkit.build import build
from sslkit.errors import UserError
from sslkit.recipe import parse_recipe
from sslkit.run_directory import RunDirectory, read_metrics
from sslkit.trainer import Trainer
from sslkit_watch import MLflow, WandB
from sslkit_watch.elsewhere import flat, numbers, recipe_of
from sslkit_watch.mlflow_tracking import LONGEST_VALUE, MLflowObserver
from sslkit_watch.tensorboard import TensorBoardObserver
from sslkit_watch.weights_and_biases import WandBObserver

SAID: list[str] = []


def trained(folder: Path, observer: object, stop: int, *, resume: bool = False, status: str = "stopped") -> Trainer:
    """As `sslkit train` does it: a run to step `stop`, from the newest checkpoint if it goes on."""
    SAID.clear()
    recipe = parse_recipe(TINY, "r.toml", ["observers.tensorboard.enabled=false"])
    parts = build(recipe, torch.device("cpu"), SAID.append)
    parts.observers = {"logger": observer, **parts.observers}
    files = RunDirectory(folder / "run")
    files.write("recipe.lock.toml", recipe.to_toml())
    view_grid.write(parts.data, parts.run, parts.views, recipe.name, files.path / "views.png", 2)
    found = checkpoint.newest(files.checkpoints)[0] if resume else None
    files.open_metrics(found.facts["metrics_offset"] if found else 0)
    trainer = Trainer(parts, files, SAID.append)
    if found:
        trainer.restore(found)
    trainer.fit(stop)
    trainer.bus.emit("run_ended", run=trainer, status=status)
    files.close()
    return trainer


def records(folder: Path) -> list[dict[str, Any]]:
    return read_metrics(folder / "run")


def expected(folder: Path, name: str) -> list[tuple[int, Any]]:
    return [(r["step"], pytest.approx(r[name])) for r in records(folder) if r.get(name) is not None]


MEASURED = ("loss", "knn_top1", "effective_rank", "lr", "epoch")

# ---------------------------------------------------------------- what they have in common


@pytest.mark.parametrize(("package", "make"), [
    ("wandb", lambda: WandBObserver(WandB(mode="offline"))), ("mlflow", lambda: MLflowObserver(MLflow())),
])  # fmt: skip
def test_a_missing_package_is_told_with_what_to_install(
    package: str, make: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError) as error:
        make()
    assert error.value.lines == (
        f"observer {package} needs the package {package}: pip install 'sslkit[{package}]', or take the observer out of "
        "the recipe",
    )


def test_a_package_without_one_of_its_own_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mlflow.py").write_text("import not_there_at_all\n")
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="the package mlflow misses the module not_there_at_all; pip install"):
        MLflowObserver(MLflow())


def test_the_modules_can_be_imported_without_the_packages() -> None:
    code = (
        "import sys; sys.modules |= {'wandb': None, 'mlflow': None}; "
        "import sslkit_watch.weights_and_biases, sslkit_watch.mlflow_tracking"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_options_are_flattened_by_their_full_names() -> None:
    tables = {
        "name": "x", "seed": 0, "train": {"epochs": 2}, "none": [],
        "view": {"blur": [0.0, 0.1], "views": [{"size": 8}, {"size": 4}]},
    }  # fmt: skip
    assert dict(flat(tables)) == {
        "name": "x", "seed": "0", "train.epochs": "2", "none": "[]", "view.blur": "[0.0, 0.1]",
        "view.views.0.size": "8", "view.views.1.size": "4",
    }  # fmt: skip


def test_what_is_not_finite_is_left_out_and_the_epoch_is_not() -> None:
    assert numbers({"step": 3, "epoch": 0.5, "loss": None, "tau": 0.9}) == {"epoch": 0.5, "tau": 0.9}


def test_without_a_recipe_there_are_no_options(tmp_path: Path) -> None:
    assert recipe_of(tmp_path) == {}


# ---------------------------------------------------------------- TensorBoard


def test_tensorboard_shows_the_recipe_and_the_views_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained(tmp_path, TensorBoardObserver(), 10)
    trained(tmp_path, TensorBoardObserver(), 20, resume=True, status="done")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0}).Reload()
    (shown,) = events.Images("views")
    with Image.open(tmp_path / "run" / "views.png") as picture:
        assert (shown.step, shown.width, shown.height) == (0, *picture.size)
    (text,) = events.Tensors("recipe/text_summary")
    lines = text.tensor_proto.string_val[0].decode().splitlines()
    assert [line[4:] for line in lines] == (tmp_path / "run" / "recipe.lock.toml").read_text().splitlines()
    assert all(line.startswith("    ") for line in lines)


def test_tensorboard_needs_neither_recipe_nor_views(tmp_path: Path) -> None:
    observer = TensorBoardObserver()
    observer.run_started(SimpleNamespace(step=0, directory=tmp_path))  # type: ignore[arg-type]
    observer.run_ended(None, "done")  # type: ignore[arg-type]


# ---------------------------------------------------------------- Weights & Biases


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The library without anybody's key and settings, and without its service once the test is over."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    library = pytest.importorskip("wandb")
    library.teardown()
    yield library
    library.teardown()


def transactions(folder: Path) -> list[list[Any]]:
    """What each process wrote to its offline log: after a header of 7 bytes, LevelDB's log format."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # its service writes the last of the log as it ends
    block, head = 32_768, 7
    logs = []
    for path in sorted((folder / "run" / "wandb").glob("offline-run-*/*.wandb")):
        data, at, whole, found = path.read_bytes(), head, b"", []
        while at < len(data):
            if block - at % block < head:  # too little is left of this block for another piece
                at += block - at % block
                continue
            length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
            whole += data[at + head : at + head + length]
            at += head + length
            if kind in (1, 4):  # a whole record, or its last piece
                found.append(wandb_internal_pb2.Record.FromString(whole))
                whole = b""
        logs.append(found)
    return logs


def items(of: Any) -> dict[str, Any]:
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in of}


def test_wandb_holds_every_record_the_recipe_and_the_views_across_a_resume(tmp_path: Path, wandb: Any) -> None:
    first = WandBObserver(WandB(mode="offline", project="views", name="mine", entity="us"))
    trained(tmp_path, first, 10)
    assert SAID[0] == f"wandb: to upload, wandb sync {tmp_path / 'run' / 'wandb'}/offline-run-*"
    again = WandBObserver(WandB(mode="offline", project="views", name="mine", entity="us"))
    trained(tmp_path, again, 20, resume=True, status="done")
    assert again.id == first.id

    logs = transactions(tmp_path)
    assert len(logs) == 2
    starts = [next(r.run for r in log if r.HasField("run")) for log in logs]
    assert {(r.run_id, r.project, r.display_name, r.entity) for r in starts} == {(first.id, "views", "mine", "us")}
    configured = items(starts[0].config.update)
    assert configured["train"]["epochs"] == 2
    assert configured["target_updater"]["tau"]["start"] == 0.9
    rows = [items(r.history.item) for log in logs for r in log if r.HasField("history")]
    for name in MEASURED:
        # An epoch's end is recorded twice at one step: the loss, and what the observers measured.
        wanted = list(dict(expected(tmp_path, name)).items())
        assert [(row["_step"], row[name]) for row in rows if name in row] == wanted, name
    (picture,) = [row for row in rows if "views.path" in row]
    with Image.open(tmp_path / "run" / "views.png") as image:
        assert (picture["_step"], picture["views.width"], picture["views.height"]) == (0, *image.size)
    summary: dict[str, Any] = {}
    for record in logs[1]:
        summary |= items(record.summary.update)
    assert summary["status"] == "done"
    ends = [r.exit.exit_code for log in logs for r in log if r.HasField("exit")]
    assert ends == [0, 0]


def test_wandb_is_told_that_a_run_failed(tmp_path: Path, wandb: Any) -> None:
    trained(tmp_path, WandBObserver(WandB(mode="offline")), 1, status="failed")
    assert [r.exit.exit_code for r in transactions(tmp_path)[0] if r.HasField("exit")] == [1]


def test_wandb_without_a_key_is_told_before_training_and_never_asks(
    wandb: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(UserError) as error:
        WandB().build(None)  # type: ignore[arg-type]
    assert error.value.lines == (
        "observer wandb has no API key: run `wandb login`, or set WANDB_API_KEY, or mode = 'offline' in the recipe",
    )


def test_wandb_with_a_key_that_cannot_be_one_is_told(wandb: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(UserError, match=r"observer wandb: .*API key") as error:
        WandBObserver(WandB())
    assert len(error.value.lines) == 1


def test_wandb_takes_the_mode_of_the_environment_unless_the_recipe_says(
    wandb: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert WandBObserver(WandB()).mode == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert WandBObserver(WandB(mode="offline")).mode == "offline"


def test_wandb_never_goes_back_in_a_run_that_it_resumes(wandb: Any) -> None:
    observer, logged = WandBObserver(WandB(mode="offline")), []
    observer.writer = SimpleNamespace(starting_step=11, log=lambda values, step: logged.append((step, values)))
    for step in (10, 11):
        observer.recorded(None, {"step": step, "epoch": 1.0, "loss": 0.5})  # type: ignore[arg-type]
    assert logged == [(11, {"epoch": 1.0, "loss": 0.5})]


def test_wandb_that_cannot_begin_is_told(wandb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise wandb.errors.CommError("no answer\nmore")

    observer = WandBObserver(WandB(mode="offline"))
    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match=r"^observer wandb cannot begin: no answer \(mode"):
        observer.run_started(SimpleNamespace(step=0, directory=tmp_path))  # type: ignore[arg-type]


# ---------------------------------------------------------------- MLflow


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of an empty store: a folder, which needs nothing beyond mlflow-skinny."""
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("mlflow")
    return f"file:{tmp_path / 'store'}"


def client(store: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=store)


def history(store: str, run: str, name: str) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in client(store).get_metric_history(run, name))


def test_mlflow_holds_every_record_the_recipe_and_the_views_across_a_resume(tmp_path: Path, store: str) -> None:
    first = MLflowObserver(MLflow(tracking_uri=store, experiment="views", name="mine"))
    trained(tmp_path, first, 10)
    assert client(store).get_run(first.id).info.status == "KILLED"
    again = MLflowObserver(MLflow(tracking_uri=store, experiment="views", name="mine"))
    trained(tmp_path, again, 20, resume=True, status="done")
    assert again.id == first.id

    (experiment,) = [e for e in client(store).search_experiments() if e.name == "views"]
    (run,) = client(store).search_runs([experiment.experiment_id])
    assert (run.info.run_id, run.info.run_name, run.info.status) == (first.id, "mine", "FINISHED")
    assert run.data.tags["status"] == "done"
    assert run.data.params["train.epochs"] == "2"
    assert run.data.params["target_updater.tau.start"] == "0.9"
    assert run.data.params["observers.0.use"] == "knn"
    assert run.data.metrics["knn_top1"] == expected(tmp_path, "knn_top1")[-1][1]
    for name in MEASURED:
        wanted = expected(tmp_path, name)
        assert len(wanted) > 1
        assert history(store, first.id or "", name) == wanted, name
    artifacts = {a.path: a.file_size for a in client(store).list_artifacts(first.id)}
    assert artifacts == {n: (tmp_path / "run" / n).stat().st_size for n in ("recipe.lock.toml", "views.png")}


def test_mlflow_does_not_write_a_step_twice_after_a_crash(tmp_path: Path, store: str) -> None:
    first = MLflowObserver(MLflow(tracking_uri=store))
    trainer = trained(tmp_path, first, 10)  # then, as if killed at step 15 without another checkpoint
    first.run_started(trainer)
    first.recorded(trainer, {"step": 15, "epoch": 1.5, "loss": 7.0})
    trained(tmp_path, MLflowObserver(MLflow(tracking_uri=store)), 20, resume=True, status="done")
    found = history(store, first.id or "", "loss")
    assert [step for step, _ in found] == [1, 5, 10, 15, 20]
    assert dict(found)[15] == 7.0


def test_mlflow_begins_anew_where_its_run_is_gone(tmp_path: Path, store: str) -> None:
    first = MLflowObserver(MLflow(tracking_uri=store))
    trained(tmp_path, first, 10)
    again = MLflowObserver(MLflow(tracking_uri=f"{store}-2"))
    trained(tmp_path, again, 20, resume=True, status="done")
    assert f"mlflow: run {first.id} is not there any more; a new one begins at step 10" in SAID
    assert [step for step, _ in history(f"{store}-2", again.id or "", "loss")] == [15, 20]


def test_a_server_that_is_away_costs_no_training_and_no_numbers(tmp_path: Path, store: str) -> None:
    said: list[str] = []
    tried: list[int] = []
    run: Any = SimpleNamespace(step=0, directory=tmp_path, say=said.append)
    observer = MLflowObserver(MLflow(tracking_uri=store))
    observer.run_started(run)
    reached = observer.client.log_batch

    def refuse(*_: object, **__: object) -> None:
        tried.append(1)
        raise OSError("no route to host\nat all")

    observer.client.log_batch = refuse
    for step in (1, 2, 3):
        observer.recorded(run, {"step": step, "epoch": step / 2, "loss": 1.0 / step})
        observer.checkpoint_saved(run)
    assert len(tried) == 1, "every attempt may take minutes"
    assert said == [
        f"mlflow: figures, recipe and views.png go to {store}",
        "mlflow: 2 numbers could not be written and are kept to try again: no route to host",
    ]
    observer.client.log_batch = reached
    observer.run_ended(run, "done")
    assert history(store, observer.id or "", "loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert history(store, observer.id or "", "epoch") == [(1, 0.5), (2, 1.0), (3, 1.5)]


def test_a_server_that_stays_away_does_not_fail_the_run(tmp_path: Path, store: str) -> None:
    said: list[str] = []
    run: Any = SimpleNamespace(step=0, directory=tmp_path, say=said.append)
    observer = MLflowObserver(MLflow(tracking_uri=store))
    observer.run_started(run)

    def refuse(*_: object, **__: object) -> None:
        raise OSError("away")

    observer.client.log_batch = observer.client.set_tag = refuse
    observer.recorded(run, {"step": 1, "loss": 1.0})
    observer.run_ended(run, "done")
    assert said[-2:] == [
        "mlflow: 1 numbers could not be written and are lost: away",
        "mlflow: the end could not be written: away",
    ]


def test_more_numbers_than_a_request_may_hold_are_written(tmp_path: Path, store: str) -> None:
    run: Any = SimpleNamespace(step=0, directory=tmp_path, say=print)
    observer = MLflowObserver(MLflow(tracking_uri=store))
    observer.run_started(run)
    observer.recorded(run, {"step": 1, **{f"loss.part_{n}": float(n) for n in range(1001)}})
    assert client(store).get_run(observer.id).data.metrics["loss.part_1000"] == 1000


def test_what_mlflow_refuses_of_a_recipe_is_cut_and_the_file_is_whole(tmp_path: Path, store: str) -> None:
    text = f'name = "x"\nlong = "{"a" * 7000}"\n' + "".join(f"option_{n} = {n}\n" for n in range(250))
    (tmp_path / "recipe.lock.toml").write_text(text)
    observer = MLflowObserver(MLflow(tracking_uri=store))
    observer.run_started(SimpleNamespace(step=0, directory=tmp_path, say=print))  # type: ignore[arg-type]
    found = client(store).get_run(observer.id)
    assert len(found.data.params) == 252
    assert found.data.params["long"] == "a" * (LONGEST_VALUE - 3) + "..."
    assert found.info.run_name == tmp_path.name
    (artifact,) = client(store).list_artifacts(observer.id)
    assert artifact.file_size == len(text)


def test_a_place_that_mlflow_cannot_write_to_is_told(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: Any = SimpleNamespace(step=0, directory=tmp_path, say=print)
    for uri, told in (("nonsense://x", "nonsense://x: "), (f"file:{tmp_path / 'file'}", "file: ")):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match=f"^observer mlflow cannot write to .*{told}") as error:
            MLflowObserver(MLflow(tracking_uri=uri)).run_started(run)
        assert len(error.value.lines) == 1
        assert "\n" not in error.value.lines[0]
