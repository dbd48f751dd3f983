"""The command line as a user meets it: exit codes, one line per mistake, no traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Install, run

from sslkit import registry


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "sslkit", *arguments]


# ---------------------------------------------------------------- looking around


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["list-plugins"], ["recipes"], ["--version"]])
def test_looking_around_imports_no_torch(arguments: list[str]) -> None:
    code = f"""
import sys
sys.argv = ["sslkit", *{arguments!r}]
try:
    from sslkit.cli import main
    main()
except SystemExit as end:
    assert not end.code
heavy = {{"torch", "timm", "numpy", "sklearn", "pyarrow"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_list_plugins_shows_kind_name_origin_and_description() -> None:
    rows = {(r["kind"], r["name"]): r for r in json.loads(run("list-plugins", "--json").output)}
    assert rows["loss", "cosine"]["distribution"] == "sslkit"
    assert all(r["description"] and not r["problem"] for r in rows.values() if r["distribution"] == "sslkit")
    assert "target_updater" in run("list-plugins").output
    assert {r["kind"] for r in json.loads(run("list-plugins", "--kind", "head", "--json").output)} == {"head"}


def test_describe_shows_options_types_defaults_and_help() -> None:
    shown = run("describe", "target_updater.ema").output
    assert "tau" in shown
    assert "schedule" in shown
    as_json = json.loads(run("describe", "loss.cosine", "--json").output)
    assert as_json["target"] == "sslkit_cosine:Cosine"
    assert all(option["help"] for option in as_json["options"])
    wrong = run("describe", "loss.cosin")
    assert wrong.exit_code == 2
    assert "did you mean 'cosine'?" in wrong.output
    assert run("describe", "los.cosine").exit_code == 2


def test_recipes_are_listed_and_copied_but_never_over_a_file(tmp_path: Path) -> None:
    assert "quickstart" in run("recipes").output
    assert run("copy", "quickstart").exit_code == 0
    (tmp_path / "quickstart.toml").write_text("mine")
    again = run("copy", "quickstart")
    assert again.exit_code == 2
    assert "was left alone" in again.output
    assert (tmp_path / "quickstart.toml").read_text() == "mine"
    assert run("copy", "quickstart", "no/such/folder.toml").exit_code == 2


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("hidden_dim", "hiden_dim"), "projector.hiden_dim: unknown option; did you mean 'hidden_dim'?"),
        (("batch_size = 128", 'batch_size = "128"'), "train.batch_size: should be a valid integer, not '128'"),
        (('use = "convnet"', 'use = "convnett"'), "no backbone is named 'convnett'; did you mean 'convnet'?"),
        (("batch_size = 128", "batch_size = 100000"), "there are only 1347 training images"),
        (("start = 0.9, end = 1.0", "start = 0.9, end = 1.5"), "The target's tau is above 1"),
        (("start = 0.9, end = 1.0", "start = 0.9, end = 0.5"), "tau falls from 0.9 to"),
        (("batch_size = 128", 'batch_size = 128\naccept = ["tau_above_on"]'), "did you mean 'tau_above_one'?"),
        (('[predictor]\nuse = "mlp"\nhidden_dim = 16\nout_dim = 8\n', ""), "the recipe has no [predictor]"),
        (('use = "ema"\ntau = { use = "cosine", start = 0.9, end = 1.0 }', 'use = "none"'), "needs a target branch"),
        (("batch_size = 128", "batch_size = 128\naccumulate = 3"), "does not divide"),
        (("batch_size = 128", 'batch_size = 128\nbatch_norm = "split:3"'), "cannot be split into 3 equal groups"),
        (("batch_size = 128", 'batch_size = 128\nbatch_norm = "split"'), "'local', 'sync' or 'split:N' with N of 2"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(tiny: Path, change: tuple[str, str], says: str) -> None:
    tiny.write_text(tiny.read_text().replace(*change, 1))
    result = run("train", str(tiny))
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert says in result.stderr
    assert not Path("runs").exists() or not any(Path("runs").iterdir()), "nothing is left behind"


def test_a_tau_that_is_meant_is_accepted_by_its_id(tiny: Path) -> None:
    tiny.write_text(tiny.read_text().replace("end = 1.0 }", "end = 1.5 }"))
    refused = run("train", str(tiny))
    line = tiny.read_text()[: tiny.read_text().index("tau =")].count("\n") + 1
    assert f"tiny.toml:{line}: target_updater.tau: The target's tau is above 1" in refused.stderr
    assert "tau is 1.02366442 at step 7 of 20" in refused.stderr
    accepted = run("train", str(tiny), "--set", "train.accept=['tau_above_one']", "--steps", "2")
    assert accepted.exit_code == 0, accepted.output


def test_a_part_swapped_on_its_own_is_warned_of_and_trained(tiny: Path) -> None:
    """BYOL's heads without EMA; a line, not an end."""
    swapped = run("train", str(tiny), "--set", "target_updater.use=stop_gradient", "--steps", "2", "--run-dir", "a")
    assert swapped.exit_code == 0, swapped.output
    said = " ".join(swapped.output.split())
    assert "warning: --set target_updater.use=stop_gradient: target_updater.use: There is no moving average" in said
    assert "simsiam_cifar10" in said
    assert said.index("warning:") < said.index("epochs of 10 steps"), "before it starts"
    words = ["--set", "target_updater.use=stop_gradient", "--set", "train.accept=['ema_missing']", "--dry-run"]
    assert "warning" not in run("train", str(tiny), *words).output, "what is meant is not warned of"
    assert "warning" not in run("train", str(tiny), "--dry-run").output


def test_warnings_are_refused_where_they_are_asked_to_be(tiny: Path) -> None:
    result = run("train", str(tiny), "--set", "target_updater.use=stop_gradient", "--strict")
    assert result.exit_code == 2
    assert "ema_missing" in result.stderr
    assert not any(Path("runs").iterdir())


def test_a_run_that_is_lost_is_ended_with_a_checkpoint(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sslkit import doctor
    from sslkit.rules import Rule

    late = Rule(
        "It is step 10.", "error", fix="nothing", source="a test",
        during=lambda course: "step 10" if course.step >= 10 else None,
    )  # fmt: skip
    known, broken = doctor.rules()
    monkeypatch.setattr(doctor, "rules", lambda: ({**known, "late": late}, broken))
    result = run("train", str(tiny), "--stop-on", "error", "--run-dir", "lost")
    assert result.exit_code == 1, result.output
    assert "error at step 10: It is step 10: step 10; nothing [late]" in result.output
    assert "ended at step 10 of 20, as --stop-on asks" in " ".join(result.output.split())
    assert json.loads(Path("lost/status.json").read_text())["status"] == "lost"
    assert any(Path("lost/checkpoints").iterdir())
    assert run("train", str(tiny), "--run-dir", "whole").exit_code == 0, "without it, the run is only warned of"
    assert losses("whole")[: len(losses("lost"))] == losses("lost")


def test_a_run_says_where_it_was_resumed_and_why_it_failed(tiny: Path) -> None:
    run("train", str(tiny), "--steps", "5", "--run-dir", "a")
    run("train", str(tiny), "--run-dir", "a")
    assert json.loads(Path("a/status.json").read_text())["resumed_at"] == [5]
    failed = run("train", str(tiny), "--set", "optimizer.lr=1e30", "--run-dir", "b")
    assert failed.exit_code == 1
    status = json.loads(Path("b/status.json").read_text())
    assert (status["status"], status["reason"]) == ("failed", "not_finite")
    assert f"not finite at step {status['step']}" in failed.stderr
    assert run("doctor", "b").exit_code == 2


def test_mistakes_are_told_before_any_data_is_touched(tiny: Path) -> None:
    tiny.write_text(tiny.read_text().replace('use = "digits"', 'use = "folder"\nroot = "nowhere"\nsize = 8'))
    result = run("train", str(tiny), "--set", "train.epocs=3")
    assert "train.epocs" in result.stderr
    assert "nowhere" not in result.stderr


def test_a_missing_recipe_a_file_in_the_way_and_no_gpu(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no such recipe file" in run("train", "gone.toml").stderr
    Path("file").write_text("")
    in_the_way = run("train", str(tiny), "--run-dir", "file/run")
    assert in_the_way.exit_code == 2
    assert "cannot be written" in in_the_way.stderr
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    no_gpu = run("train", str(tiny), "--device", "cuda")
    assert (no_gpu.exit_code, "torch sees no CUDA device" in no_gpu.stderr) == (2, True)


# ---------------------------------------------------------------- runs


def test_a_run_from_beginning_to_end_and_again(tiny: Path) -> None:
    first = run("train", str(tiny))
    assert first.exit_code == 0, first.output
    assert "random network (step 0) ->" in first.output.replace("\n", " ")
    folder = Path("runs/tiny")
    assert {
        "recipe.lock.toml",
        "env.json",
        "metrics.jsonl",
        "status.json",
        "checkpoints",
        "tensorboard",
        "bad_samples.jsonl",
    } <= {p.name for p in folder.iterdir()}
    status = json.loads((folder / "status.json").read_text())
    assert (status["status"], status["step"]) == ("done", 20)
    env = json.loads((folder / "env.json").read_text())
    assert {"torch", "sslkit"} <= set(env["packages"])
    assert "loss.cosine" in {p["component"] for p in env["plugins"]}
    before = (folder / "metrics.jsonl").read_bytes()
    again = run("train", str(tiny))
    assert again.exit_code == 0
    assert "this run is finished" in again.output
    assert (folder / "metrics.jsonl").read_bytes() == before


def losses(folder: str) -> list[tuple[int, float]]:
    lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    return [(r["step"], r["loss"]) for r in map(json.loads, lines) if "loss" in r]


def test_the_lock_file_trains_to_the_same_losses(tiny: Path) -> None:
    assert run("train", str(tiny), "--set", "optimizer.lr=0.05", "--steps", "10").exit_code == 0
    again = run("train", "runs/tiny/recipe.lock.toml", "--run-dir", "again", "--steps", "10")
    assert again.exit_code == 0, again.output
    assert losses("again") == losses("runs/tiny")


def test_steps_stop_early_and_a_larger_number_goes_on(tiny: Path) -> None:
    assert run("train", str(tiny), "--run-dir", "whole").exit_code == 0
    stopped = run("train", str(tiny), "--steps", "7")
    assert stopped.exit_code == 0
    assert "stopped at step 7 of 20" in stopped.output
    assert "is at step 7 already" in run("train", str(tiny), "--steps", "5").output
    on = run("train", str(tiny))
    assert "going on from step 7" in on.output
    assert losses("runs/tiny") == losses("whole")


def test_a_changed_recipe_on_an_existing_run_is_refused_with_the_difference(tiny: Path) -> None:
    run("train", str(tiny), "--steps", "2")
    changed = run("train", str(tiny), "--set", "optimizer.weight_decay=0.1")
    assert changed.exit_code == 2
    assert "optimizer.weight_decay: 0.0001 -> 0.1" in changed.stderr
    assert "--fork" in changed.stderr
    assert run("train", str(tiny), "--set", "train.log_every=3", "--steps", "4").exit_code == 0, "cadences may change"


def test_resume_never_begins_a_new_run_beside_the_old_one(tiny: Path) -> None:
    run("train", str(tiny), "--steps", "2")
    assert run("train", str(tiny), "--steps", "3", "--resume", "never").exit_code == 0
    assert losses("runs/tiny-2")
    assert json.loads(Path("runs/tiny/status.json").read_text())["step"] == 2
    refused = run("train", str(tiny), "--run-dir", "runs/tiny", "--resume", "never")
    assert refused.exit_code == 2


HALF = '''
from sslkit.api import Schedule


class Half(Schedule):
    """Half of a number."""

    number: float = 0.2
    """The number."""

    def build(self, run):
        return lambda step: self.number / 2
'''


def test_another_code_or_version_of_a_plugin_is_told_on_going_on(tiny: Path, install: Install) -> None:
    info = install("sslkit-half", "schedule.half = half_plugin:Half", {"half_plugin": HALF})
    words = ["--set", "optimizer.lr={ use = 'half' }", "--steps"]
    assert run("train", str(tiny), *words, "4").exit_code == 0
    assert "sslkit-half" not in run("train", str(tiny), *words, "8").stdout
    module = info.parent / "half_plugin.py"
    module.write_text(HALF.replace("/ 2", "/ 2.0"))
    said = " ".join(run("train", str(tiny), *words, "12").stdout.split())
    assert "warning: the code of sslkit-half 1.0 is not what it was up to step 8 (schedule.half)" in said
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sslkit-half\nVersion: 1.1\n")
    registry.clear()
    said = " ".join(run("train", str(tiny), *words, "16").stdout.split())
    assert "warning: sslkit-half was 1.0 up to step 12 and is 1.1 now (schedule.half)" in said


def test_a_run_whose_recipe_cannot_be_read_any_more_is_named(tiny: Path) -> None:
    assert run("train", str(tiny), "--steps", "4").exit_code == 0
    lock = Path("runs/tiny/recipe.lock.toml")
    lock.write_text(lock.read_text().replace("hidden_dim", "hidden_dims", 1))
    refused = run("train", str(tiny), "--steps", "8")
    assert refused.exit_code == 2
    first, second, *_ = refused.stderr.splitlines()
    assert first.startswith("runs/tiny: holds a run whose recipe cannot be read here; choose another --run-dir")
    assert "unknown option; did you mean 'hidden_dim'" in second


def test_changed_data_is_refused_on_going_on(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("train", str(tiny), "--steps", "5")
    metrics = Path("runs/tiny/metrics.jsonl").read_bytes()
    refused = run("train", str(tiny), "--steps", "8", "--set", "data_source.seed=0")
    assert refused.exit_code == 0, "the same data"
    monkeypatch.setattr("sslkit_datasets.images.Fingerprint.hexdigest", lambda self: "0" * 16)
    refused = run("train", str(tiny))
    assert refused.exit_code == 2
    assert "the data changed since this run began" in refused.stderr
    assert Path("runs/tiny/metrics.jsonl").read_bytes().startswith(metrics)
    assert [p.name for p in Path("runs/tiny/checkpoints").iterdir() if "damaged" in p.name] == []


def test_damaged_checkpoints_never_begin_a_run_anew(tiny: Path) -> None:
    run("train", str(tiny), "--steps", "5")
    metrics = Path("runs/tiny/metrics.jsonl").read_bytes()
    for path in Path("runs/tiny/checkpoints").iterdir():
        (path / "model.safetensors").write_bytes(b"")
    for _ in range(2):
        refused = run("train", str(tiny))
        assert refused.exit_code == 2
        assert "no checkpoint can be read" in refused.stderr
        assert Path("runs/tiny/metrics.jsonl").read_bytes() == metrics


def test_a_run_that_died_before_it_was_called_done_is_called_done(tiny: Path) -> None:
    run("train", str(tiny))
    metrics = Path("runs/tiny/metrics.jsonl").read_bytes()
    Path("runs/tiny/status.json").write_text('{"status": "running"}')
    again = run("train", str(tiny))
    assert again.exit_code == 0
    assert "random network (step 0) ->" in again.output
    assert json.loads(Path("runs/tiny/status.json").read_text())["status"] == "done"
    assert Path("runs/tiny/metrics.jsonl").read_bytes() == metrics


def test_a_dry_run_tells_what_would_be_trained_and_writes_nothing(tiny: Path) -> None:
    shown = run("train", str(tiny), "--dry-run")
    assert shown.exit_code == 0, shown.output
    text = " ".join(shown.output.split())
    for expected in ("20 steps", "parameters: backbone", "tau 0.9", "lr 0", "s per step", "GiB", "hidden_dim = 16"):
        assert expected in text, expected
    assert not Path("runs").exists()


def test_two_processes_cannot_write_one_run(tiny: Path) -> None:
    from sslkit.run_directory import RunDirectory

    held = RunDirectory(Path("runs/tiny"))
    try:
        refused = run("train", str(tiny))
    finally:
        held.close()
    assert refused.exit_code == 2
    assert "another process is training" in refused.stderr


LONG = ("--set", "train.epochs=2000", "--set", "train.checkpoint_every=5", "--set", "observers.knn.every_epochs=5000")


def wait_for_step(folder: str, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            if any(s >= step for s, _ in losses(folder)):
                return
        except (OSError, ValueError):
            pass
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError("the run never came to the step")


@pytest.mark.parametrize(
    ("number", "code", "status"), [(signal.SIGTERM, 0, "preempted"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_signal_saves_and_the_same_command_goes_on(tiny: Path, number: int, code: int, status: str) -> None:
    process = subprocess.Popen(
        command("train", str(tiny), *LONG), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for_step("runs/tiny", 10, process)
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in err) == (code, False), err
    said = json.loads(Path("runs/tiny/status.json").read_text())
    assert said["status"] == status
    assert f"{status} at step {said['step']}" in out
    on = run("train", str(tiny), *LONG, "--steps", str(said["step"] + 5))
    assert f"going on from step {said['step']}" in on.output


def test_a_killed_run_goes_on_with_the_same_losses(tiny: Path) -> None:
    process = subprocess.Popen(
        command("train", str(tiny), *LONG), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True
    )
    wait_for_step("runs/tiny", 15, process)
    process.kill()
    process.wait()
    steps = losses("runs/tiny")[-1][0] + 20
    assert run("train", str(tiny), *LONG, "--steps", str(steps)).exit_code == 0
    assert run("train", str(tiny), *LONG, "--steps", str(steps), "--run-dir", "whole").exit_code == 0
    assert losses("runs/tiny") == losses("whole")


def test_a_copy_trains_in_a_directory_of_its_own(tmp_path: Path) -> None:
    assert run("copy", "quickstart", "mine.toml").exit_code == 0
    assert 'name = "mine"' in (tmp_path / "mine.toml").read_text()


def test_a_run_that_never_began_does_not_hold_its_directory(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sslkit.trainer import Trainer

    def fail(*_: object) -> None:
        raise ValueError("shapes do not fit")

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", fail)
        failed = run("train", str(tiny))
    assert failed.exit_code == 1
    assert failed.stderr.strip().startswith("the run failed: ValueError: shapes do not fit (the traceback is in")
    assert "shapes do not fit" in Path("runs/tiny/traceback.txt").read_text()
    assert json.loads(Path("runs/tiny/status.json").read_text())["status"] == "failed"
    assert run("train", str(tiny), "--set", "train.epochs=1").exit_code == 0


def test_an_error_in_a_components_step_names_its_package(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sslkit_cosine import loss

    def unit(vectors: object) -> None:
        raise ValueError("no such axis")

    # As if the plugin's own function raised it: what counts is the module that the frame belongs to.
    unit_there = type(unit)(unit.__code__, vars(loss) | {"ValueError": ValueError}, "unit")
    monkeypatch.setattr(loss, "unit", unit_there)
    failed = run("train", str(tiny))
    assert failed.exit_code == 1
    assert failed.stderr.startswith(
        "sslkit_cosine (sslkit 0.1.0) failed: ValueError: no such axis (the traceback is in"
    )
    assert "no such axis" in Path("runs/tiny/traceback.txt").read_text()


def test_an_observers_error_keeps_its_traceback(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sslkit_watch.health import HealthObserver

    monkeypatch.setattr(HealthObserver, "logging", lambda self: {}["nothing"])
    HealthObserver.logging.sslkit_impl = HealthObserver.epoch_ended.sslkit_impl  # type: ignore[attr-defined]
    failed = run("train", str(tiny))
    assert failed.exit_code == 1
    assert "observer 'health' from sslkit 0.1.0 failed in logging: KeyError" in failed.stderr
    assert "KeyError" in Path("runs/tiny/traceback.txt").read_text()


def test_the_way_out_of_a_refusal_keeps_what_was_set(tiny: Path) -> None:
    run("train", str(tiny), "--steps", "2")
    changed = run("train", str(tiny), "--set", "optimizer.lr={ use = 'constant', value = 0.1 }")
    suggestion = changed.stderr.splitlines()[-1].partition("from the beginning: sslkit ")[2]
    import shlex

    assert run(*shlex.split(suggestion), "--steps", "2").exit_code == 0


def test_rates_below_zero_are_refused(tiny: Path) -> None:
    for key in ("optimizer.lr.peak", "optimizer.weight_decay"):
        refused = run("train", str(tiny), "--set", f"{key}=-0.1")
        assert refused.exit_code == 2
        assert "it cannot be negative" in refused.stderr


def test_a_loss_that_returns_a_bare_tensor_is_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sslkit_cosine.loss import CosineLoss

    forward = CosineLoss.forward
    monkeypatch.setattr(CosineLoss, "forward", lambda self, branches: forward(self, branches).total)
    failed = run("train", str(tiny))
    assert failed.exit_code == 1
    assert "loss 'cosine' from sslkit 0.1.0 should return sslkit.api.LossTerms, not Tensor" in failed.stderr


def test_a_key_that_only_an_override_made_points_at_the_override(tiny: Path) -> None:
    assert run("train", str(tiny), "--set", "optimzer.lr=0.1").stderr.startswith("--set optimzer.lr=0.1: optimzer")


def test_describing_a_kind_lists_its_names() -> None:
    assert "target_updater: ema, none, stop_gradient" in run("describe", "target_updater").output


def test_a_reader_that_goes_away_does_not_end_the_run(tiny: Path) -> None:
    import shlex

    piped = f"{shlex.join(command('train', str(tiny), '--steps', '4'))} | head -1"
    done = subprocess.run(["bash", "-c", piped], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    status = json.loads(Path("runs/tiny/status.json").read_text())
    assert (status["status"], status["step"]) == ("stopped", 4)


def test_a_table_where_a_list_of_tables_belongs(tiny: Path) -> None:
    tiny.write_text(tiny.read_text().replace('[[observers]]\nuse = "knn"', "[observers.knn]"))
    for arguments in ((), ("--set", "observers.knn.k=3")):
        result = run("train", str(tiny), *arguments)
        assert result.exit_code == 2
        assert "observers: should be a list" in result.stderr
