"""Components in a file beside a recipe: only with leave, by their source, and kept with the run."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from conftest import TINY

import sslkit
from sslkit import checkpoint, local, registry
from sslkit.cli import main
from sslkit.errors import UserError
from sslkit.recipe import Recipe, parse_recipe, read_recipe

HEAD = '''
from pydantic import PositiveInt
from torch import nn
from sslkit.api import Head, Loss


class WideHead(Head):
    """A linear layer."""

    width: PositiveInt = 8
    """Its width."""

    def build(self, in_dim, run):
        layer = nn.Linear(in_dim, self.width)
        layer.out_dim = self.width
        return layer
'''
BASE = TINY + "".join(
    f'[[observers]]\nuse = "{name}"\nenabled = false\n' for name in ("health", "probe", "tensorboard", "report")
)
MLP = 'use = "mlp"\nhidden_dim = 16\nout_dim = 8\n'


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a recipe whose projector is in the file beside it."""
    monkeypatch.chdir(tmp_path)
    Path("my_head.py").write_text(HEAD)
    Path("tiny.toml").write_text(with_head("./my_head.py:WideHead"))
    return tmp_path


def with_head(use: str) -> str:
    return BASE.replace(f"[projector]\n{MLP}", f'[projector]\nuse = "{use}"\n')


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def refused(text: str) -> str:
    with pytest.raises(UserError) as caught, local.allowed():
        parse_recipe(text, "r.toml")
    (line,) = caught.value.lines
    return line


def lock(directory: str) -> Recipe:
    with local.allowed():
        return read_recipe(f"{directory}/recipe.lock.toml")


LINE = TINY.split("[projector]")[0].count("\n") + 1


# ---------------------------------------------------------------- leave


@pytest.mark.parametrize(
    "command", [["train"], ["train", "--dry-run"], ["check"], ["views"], ["diff", "quickstart"]], ids=" ".join
)
def test_without_leave_nothing_is_run(command: list[str]) -> None:
    Path("my_head.py").write_text("open('ran', 'w')\n" + HEAD)
    result = run(*command, "tiny.toml")
    assert result.exit_code == 2
    assert result.stderr == (
        f"tiny.toml:{LINE}: projector: my_head.py:WideHead is code in a file, which using it would run; add "
        "--allow-local-code to allow it\n"
    )
    assert not Path("ran").exists()
    assert not Path("runs").exists()


def test_leave_ends_with_the_command() -> None:
    assert run("diff", "tiny.toml", "tiny.toml", "--allow-local-code").exit_code == 0
    assert run("diff", "tiny.toml", "tiny.toml").exit_code == 2


def test_leave_in_one_thread_is_none_in_another() -> None:
    given, over = threading.Event(), threading.Event()

    def other() -> None:
        with local.allowed():
            given.set()
            over.wait(30)

    thread = threading.Thread(target=other)
    thread.start()
    assert given.wait(30)
    try:
        with pytest.raises(UserError, match="is code in a file"):
            sslkit.load_recipe("./tiny.toml")
    finally:
        over.set()
        thread.join()


def test_leave_below_a_folder_takes_back_the_rest_and_ends() -> None:
    Path("kept").mkdir()
    Path("kept/my_head.py").write_text(HEAD)
    Path("kept/link.py").symlink_to("../my_head.py")
    with local.allowed():
        with local.allowed(Path("kept").resolve()):
            registry.load("head", "kept/my_head.py:WideHead")
            for outside in ("my_head.py", "kept/../my_head.py", "kept/link.py"):
                with pytest.raises(
                    UserError, match=r"is code outside kept, where a run keeps its own, and was not run"
                ):
                    registry.load("head", f"{outside}:WideHead")
            with local.allowed(False), pytest.raises(UserError, match="is code outside kept"):
                registry.load("head", "my_head.py:WideHead")
        registry.load("head", "my_head.py:WideHead")


def test_with_leave_it_is_like_any_other() -> None:
    shown = run("describe", "head../my_head.py:WideHead", "--allow-local-code")
    assert "A linear layer." in shown.output
    assert "width  integer > 0, default 8" in shown.output
    assert run("check", "tiny.toml", "--allow-local-code").exit_code != 2
    assert run("views", "tiny.toml", "--allow-local-code", "--images", "2").exit_code == 0
    checked = run("check-plugin", "head../my_head.py:WideHead", "--fast", "--allow-local-code")
    assert "ok      builds " in checked.output
    assert "add --allow-local-code" in run("check-plugin", "head../my_head.py:WideHead", "--fast").stderr
    typo = run("train", "tiny.toml", "--allow-local-code", "--set", "projector.widht=3")
    assert typo.stderr == "--set projector.widht=3: projector.widht: unknown option; did you mean 'width'?\n"


# ---------------------------------------------------------------- where the file is


def test_a_path_starts_where_the_file_is_that_says_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("sub").mkdir()
    Path("sub/over.toml").write_text('extends = "../tiny.toml"\npredictor.use = "./own.py:WideHead"\n')
    Path("sub/own.py").write_text(HEAD.replace("= 8", "= 4"))
    with local.allowed():
        recipe = read_recipe("sub/over.toml")
        assert recipe.tables()["projector"] == {"use": f"{folder}/my_head.py:WideHead", "width": 8}
        assert recipe.tables()["predictor"] == {"use": f"{folder}/sub/own.py:WideHead", "width": 4}
        assert parse_recipe(recipe.to_toml(), "elsewhere/x.toml") == recipe
        set_here = read_recipe("sub/over.toml", ["predictor.use=my_head.py:WideHead"])
        assert set_here.tables()["predictor"]["use"] == f"{folder}/my_head.py:WideHead"
        monkeypatch.chdir("sub")
        assert read_recipe("over.toml") == recipe


def test_the_hash_follows_the_source_and_not_the_place() -> None:
    Path("other").mkdir()
    Path("other/renamed.py").write_text(HEAD)
    Path("changed.py").write_text(HEAD + "# a comment\n")

    def hashed(use: str) -> str:
        with local.allowed():
            return parse_recipe(with_head(use), "r.toml").hash()

    assert hashed("my_head.py:WideHead") == hashed("./other/renamed.py:WideHead") != hashed("changed.py:WideHead")
    assert hashed("my_head.py:WideHead") == hashed("my_head.py:WideHead")


def test_a_file_is_run_once_and_again_when_it_changed() -> None:
    Path("my_head.py").write_text(HEAD + "import os\nos.mkdir('ran')\n")
    with local.allowed():
        first = registry.load("head", "my_head.py:WideHead")
        assert registry.load("head", "./my_head.py:WideHead") is first
        Path("my_head.py").write_text(HEAD)
        assert registry.load("head", "my_head.py:WideHead") is not first
        assert "my_head" not in sys.modules


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("source", "use", "says"),
    [
        (HEAD, "my_haed.py:WideHead", "my_haed.py: no such file; did you mean 'my_head.py'?"),
        (HEAD, "sub.py:WideHead", "sub.py: cannot be read: Is a directory"),
        (HEAD, "my_head.py:WidHead", "my_head.py:WidHead: the file has no class WidHead; did you mean 'WideHead'? (it"
                                     " has WideHead)"),
        ("x = 1", "my_head.py:WideHead", "my_head.py:WideHead: the file has no class WideHead"),
        (HEAD.replace("(Head)", "(Loss)"), "my_head.py:WideHead", "my_head.py:WideHead is not a head but a loss; "
                                                                  "derive it from the head's class in sslkit.api"),
        ("from sslkit.api import Component\nclass WideHead(Component): kind = 'head'", "my_head.py:WideHead",
         "my_head.py:WideHead is not a head; derive it from the head's class in sslkit.api"),
        ("class WideHead: ...", "my_head.py:WideHead", "my_head.py:WideHead is not a head; derive it from the "
                                                       "head's class in sslkit.api"),
        ("x = 1\n1 / 0", "my_head.py:WideHead", "my_head.py:WideHead failed to import: ZeroDivisionError: division by "
                                                "zero (my_head.py, line 2)"),
        ("import sys\nsys.exit(3)", "my_head.py:WideHead", "my_head.py:WideHead failed to import: SystemExit: 3 "
                                                           "(my_head.py, line 2)"),
        ("def (", "my_head.py:WideHead", "my_head.py:WideHead failed to import: SyntaxError: invalid syntax "
                                         "(my_head.py, line 1)"),
        ("import beside", "my_head.py:WideHead", "my_head.py:WideHead failed to import: ModuleNotFoundError: No module"
                                                 " named 'beside' (my_head.py, line 1)"),
    ],
)  # fmt: skip
def test_a_mistake_is_a_line_at_the_recipes_line(source: str, use: str, says: str) -> None:
    Path("sub.py").mkdir()
    Path("my_head.py").write_text(source)
    line = refused(with_head(use))
    assert line.replace(f"{Path.cwd()}/", "") == f"r.toml:{LINE}: projector: {says}"


def test_what_it_prints_does_not_disturb_json() -> None:
    Path("my_head.py").write_text("print('hello')\n" + HEAD)
    shown = run("describe", "head../my_head.py:WideHead", "--allow-local-code", "--json")
    assert json.loads(shown.stdout)["component"] == "head.WideHead"
    assert shown.stderr == "hello\n"


# ---------------------------------------------------------------- runs


def train(*arguments: str) -> Result:
    return run("train", *arguments, "--allow-local-code")


def test_a_run_keeps_the_file_and_can_be_repeated_from_itself() -> None:
    assert train("tiny.toml", "--steps", "3").exit_code == 0
    kept = Path("runs/tiny/local/my_head.py")
    assert kept.read_text() == HEAD
    assert 'use = "./local/my_head.py:WideHead"' in Path("runs/tiny/recipe.lock.toml").read_text()
    plugins = {p["component"]: p for p in json.loads(Path("runs/tiny/env.json").read_text())["plugins"]}
    found = plugins["head.WideHead"]
    assert found["distribution"] == "local file"
    assert found["target"] == f"{Path.cwd()}/my_head.py:WideHead"
    with local.allowed():
        source = local.source_of(type(read_recipe("tiny.toml").projector))
    assert source is not None
    assert found["version"] == f"sha256:{source.digest}"
    Path("my_head.py").unlink()
    assert (
        lock("runs/tiny").hash()
        == json.loads(next(Path("runs/tiny/checkpoints").glob("*/state.json")).read_text())["facts"]["recipe_hash"]
    )
    again = train("runs/tiny/recipe.lock.toml", "--steps", "3", "--run-dir", "again")
    assert again.exit_code == 0, again.output
    assert losses("again") == losses("runs/tiny")
    on = train("runs/tiny/recipe.lock.toml", "--steps", "5")
    assert "going on from step 3" in " ".join(on.output.split())


def losses(directory: str) -> list[float]:
    lines = Path(directory, "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


def test_a_changed_file_is_a_changed_recipe() -> None:
    assert train("tiny.toml", "--steps", "2").exit_code == 0
    Path("my_head.py").write_text(HEAD.replace("nn.Linear(in_dim, self.width)", "nn.Linear(in_dim, self.width, False)"))
    changed = train("tiny.toml", "--steps", "4")
    assert changed.exit_code == 2
    _, change, fork, anew = changed.stderr.splitlines()
    assert ': projector.use: "WideHead, local code ' in change
    assert fork.endswith("sslkit train tiny.toml --allow-local-code --fork")
    assert anew.endswith("sslkit train tiny.toml --allow-local-code --resume never")
    assert train("tiny.toml", "--fork", "--steps", "1").exit_code == 0


def test_a_changed_copy_in_the_run_is_refused() -> None:
    assert train("tiny.toml", "--steps", "2").exit_code == 0
    copy = Path("runs/tiny/local/my_head.py")
    copy.write_text(copy.read_text() + "\n# changed\n")
    changed = train("runs/tiny/recipe.lock.toml", "--steps", "4")
    assert changed.exit_code == 2
    assert "the code in runs/tiny/local is not what the run was begun with" in changed.stderr


def test_two_files_of_one_name_are_both_kept() -> None:
    Path("sub").mkdir()
    Path("sub/my_head.py").write_text(HEAD.replace("= 8", "= 4"))
    text = (
        Path("tiny.toml").read_text().replace(f"[predictor]\n{MLP}", '[predictor]\nuse = "sub/my_head.py:WideHead"\n')
    )
    Path("tiny.toml").write_text(text + "width = 8\n" if text.endswith("[predictor]\n") else text)
    train("tiny.toml", "--steps", "2", "--set", "predictor.width=8")
    assert len(list(Path("runs/tiny/local").glob("my_head*.py"))) == 2
    with local.allowed():
        assert lock("runs/tiny").hash() == read_recipe("tiny.toml", ["predictor.width=8"]).hash()


OBSERVER = '''
from sslkit.api import Observer
from sslkit.events import observes


class Counter:
    steps = 0

    @observes
    def step_ended(self):
        self.steps += 1

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


class Counting(Observer):
    """Counts."""

    def build(self, run):
        return Counter()
'''


def test_an_observer_is_incidental_and_goes_by_its_class() -> None:
    Path("tiny.toml").write_text(BASE + '\n[[observers]]\nuse = "count.py:Counting"\n')
    Path("count.py").write_text(OBSERVER)
    assert train("tiny.toml", "--steps", "2").exit_code == 0
    Path("count.py").write_text(OBSERVER + "# changed\n")
    assert train("tiny.toml", "--steps", "3").exit_code == 0, "observers change nothing that is computed"
    found, _ = checkpoint.newest(Path("runs/tiny/checkpoints"))
    assert found is not None
    assert found.parts["observers"]["Counting"] == {"steps": 3}


def test_a_run_with_local_code_is_compared_with_leave_and_shown_without() -> None:
    assert train("tiny.toml", "--steps", "2").exit_code == 0
    assert run("diff", "tiny.toml", "runs/tiny", "--allow-local-code").exit_code == 0
    assert run("diff", "tiny.toml", "runs/tiny").exit_code == 2
    assert run("compare", "runs/tiny").exit_code == 0, "the curves are there all the same"
    assert run("report", "runs/tiny").exit_code == 0


def test_a_script_goes_on_with_a_recipe_that_was_read_with_leave() -> None:
    recipe = sslkit.load_recipe("./tiny.toml", allow_local_code=True)
    assert sslkit.train(recipe, steps=2, quiet=True).step == 2
    assert sslkit.train(recipe, steps=3, quiet=True).step == 3
    with pytest.raises(UserError, match="is code in a file"):
        sslkit.load_recipe("./tiny.toml")


def test_a_script_gives_leave_where_the_recipe_is_read() -> None:
    with pytest.raises(UserError, match="add allow_local_code=True to allow it"):
        sslkit.train("tiny.toml", steps=1)
    assert sslkit.train("./tiny.toml", steps=1, quiet=True, allow_local_code=True).step == 1
    assert not local.is_allowed()


def test_a_recipe_in_python_takes_a_class_of_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = parse_recipe(BASE, "r.toml")
    head = {"use": "./my_head.py:WideHead"}
    with pytest.raises(ValueError, match="add allow_local_code=True to allow it"):
        recipe.replace(projector=head)
    wide = recipe.replace(projector=head, allow_local_code=True)
    monkeypatch.chdir("/")
    assert wide.tables()["projector"]["use"] == f"{folder}/my_head.py:WideHead"


# ---------------------------------------------------------------- a run directory of somebody else


@pytest.fixture
def strange() -> Path:
    """A run whose recipe names a file beside the directory, which leaves a mark where it is run."""
    assert train("tiny.toml", "--steps", "2").exit_code == 0
    Path("outside.py").write_text("open('ran', 'w')\n" + HEAD)
    lock = Path("runs/tiny/recipe.lock.toml")
    lock.write_text(lock.read_text().replace("./local/my_head.py", "../../outside.py"))
    return lock


def test_leave_for_a_recipe_is_none_for_files_that_a_run_directory_names(strange: Path) -> None:
    refused = train("tiny.toml")
    assert refused.exit_code == 2
    assert f"{strange}:" in refused.stderr
    assert "outside.py:WideHead is code outside runs/tiny/local" in refused.stderr
    recipe = sslkit.load_recipe("./tiny.toml", allow_local_code=True)
    with pytest.raises(UserError, match="is code outside"):
        sslkit.train(recipe, quiet=True)
    assert not Path("ran").exists()
    plain = parse_recipe(BASE, "tiny.toml")
    with pytest.raises(UserError, match="is code in a file"):
        sslkit.train(plain, quiet=True)


def test_a_folder_that_is_a_link_is_neither_run_from_nor_written_through(tmp_path: Path) -> None:
    assert train("tiny.toml", "--steps", "2").exit_code == 0
    Path("runs/tiny/local").rename("elsewhere")
    Path("runs/tiny/local").symlink_to(tmp_path / "elsewhere")
    refused = train("tiny.toml")
    assert (refused.exit_code, refused.stderr.splitlines()[-1]) == (
        2,
        "runs/tiny/local: is a link that leads out of the run's directory; remove the link",
    )
    Path("runs/new").mkdir()
    Path("runs/new/local").symlink_to(tmp_path / "elsewhere")
    Path("elsewhere/my_head.py").write_text("untouched")
    refused = train("tiny.toml", "--run-dir", "runs/new", "--steps", "1")
    assert (refused.exit_code, refused.stderr.splitlines()[-1]) == (
        2,
        "runs/new/local: is a link that leads out of the run's directory; remove the link",
    )
    assert Path("elsewhere/my_head.py").read_text() == "untouched"
