"""The documentation is held true: what it shows is run, what it lists is compared with what is there.

Conventions for README.md, CONTRIBUTING.md and docs/**/*.md. Every fenced block is one of these:

- `sh`: one command a line. `sslkit` commands are run, `make` targets must exist, `python FILE` must be there.
- `console`: commands after `$ `, each followed by its output, in which `...` stands for anything. Run and compared; the
  output of a training, which is cut short here, only by the slow tests.
- `python`: run, in one namespace for the page. `json`: parsed.
- `toml`: a whole recipe, or some tables of one, which are laid over byol_cifar10; validated either way.
- A block below `<!-- file: NAME -->` is written to that file instead. With a `pyproject.toml` the page is a plugin: its
  metadata is faked, so that `pip install -e .`, `pytest` and `sslkit check-plugin` have nothing to do. The slow tests
  install it into a fresh environment and run these too.
- A block below `<!-- exits: 2 -->` has to end with that code.
- A block below `<!-- not run: why -->` is left alone, and is listed in NOT_RUN.

The blocks of a page share a working directory with a copy of `recipes/`. Commands that train are cut to a few steps on
a few images; those that would build a large network are only read, except for one.
"""

from __future__ import annotations

import ast
import doctest
import importlib.util
import io
import json
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tomli_w
from click.testing import CliRunner
from conftest import OFFLINE, ROOT, TINY, call, fresh_environment, noisy_cifar10
from PIL import Image

from sslkit import doctor, local, registry
from sslkit.cli import main
from sslkit.recipe import parse_recipe, read_recipe
from sslkit.sources import shipped

DOCS = ROOT / "docs"
GENERATED = {"cli.md", "components.md", "recipe.md", "api.md", "rules.md", "methods.md", "python.md"}
WRITTEN = sorted(page for page in DOCS.rglob("*.md") if not {"_build", "examples"} & set(page.parts))
"""Without the examples: packages of their own, which tests/test_examples.py installs and runs."""
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *WRITTEN]
TRAINED_WITH_TIMM = "sslkit train byol_cifar10_cpu"
"""The one command with a large network that is run, in docs/how-to/train-on-cifar10.md and export.md."""

NOT_RUN = {
    ("docs/how-to/train-on-several-gpus.md", "sslkit train recipes/byol_cifar10.toml --nproc 2"),
    (
        "docs/how-to/train-on-several-gpus.md",
        "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\",
    ),
    ("docs/how-to/complete-recipes-in-an-editor.md", "pip install taplo"),
    ("README.md", "                    +--> backbone --> projector --> predictor --+        online branch"),
    ("README.md", "source .venv/bin/activate"),
    ("README.md", "README.md"),
    ("docs/explanation/design.md", "  indices = f(seed, step)                 data.py"),
    ("docs/how-to/log-elsewhere.md", "pip install 'sslkit[wandb]'"),
    ("docs/how-to/log-elsewhere.md", "wandb sync runs/byol_cifar10/wandb/offline-run-*"),
    ("docs/how-to/log-elsewhere.md", "pip install 'sslkit[mlflow]'"),
    ("docs/how-to/own-images.md", "photos/"),
    ("docs/how-to/run-on-slurm.md", "sbatch train.sbatch"),
    ("docs/how-to/swap-a-part.md", "$ sslkit train byol_cifar10 --set target_updater.use=stop_gradient"),
    ("docs/how-to/train-on-cifar10.md", "tensorboard --logdir runs"),
    ("docs/tutorial/first-run.md", "source .venv/bin/activate"),
    ("docs/tutorial/is-my-loss-normal.md", "Epoch: 0 Epoch_Loss: 0.1489"),
    ("docs/tutorial/is-my-loss-normal.md", "$ sslkit check forum_thread"),
    ("docs/tutorial/is-my-loss-normal.md", "$ sslkit doctor runs/forum_thread"),
    (
        "docs/tutorial/is-my-loss-normal.md",
        "transform = transforms.Compose([transforms.RandomResizedCrop(32, scale=(0.08, 1.0)),",
    ),
    (
        "docs/tutorial/is-my-loss-normal.md",
        "tau = 1 - (1 - HPS['base_target_ema']) * (math.cos(math.pi * step / total_steps) + 1) / 2",
    ),
}
"""Page and first line of every block that is not run."""


# ---------------------------------------------------------------- blocks


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, line, language, and the comment above it as name and value."""

    page: Path
    line: int
    language: str
    text: str
    marker: tuple[str, str]

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page; those that are instructions to Sphinx (```{toctree}) are left out."""
    found, marker, fence = [], ("", ""), None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if fence is None and (opened := re.match(r"(```+)(\S*)", line)):
            fence, language, start, text = opened[1], opened[2], number, []
        elif fence is not None and line.strip() == fence:
            if not language.startswith("{"):
                found.append(Block(page, start, language, "\n".join(text), marker))
            fence, marker = None, ("", "")
        elif fence is not None:
            text.append(line)
        elif comment := re.fullmatch(r"<!-- ([\w ]+): (.+) -->", line):
            marker = (comment[1], comment[2])
        elif line.strip():
            marker = ("", "")
    assert fence is None, f"{page}: a block is not closed"
    return found


ALL = [block for page in PAGES for block in blocks(page)]


def test_what_is_not_run_is_listed() -> None:
    found = {(str(b.page.relative_to(ROOT)), b.text.partition("\n")[0]) for b in ALL if b.marker[0] == "not run"}
    assert found == NOT_RUN
    for block in ALL:
        assert block.marker[0] in ("", "not run", "file", "exits"), f"{block.where}: {block.marker[0]!r} means nothing"
        if block.marker[0] == "not run":
            assert block.language in ("sh", "text"), f"{block.where}: {block.language} can be run"
            assert "sslkit " not in block.text or block.language == "text", f"{block.where}: sslkit can be run"


def test_every_language_is_known() -> None:
    for block in ALL:
        known = block.language in ("sh", "console", "python", "json", "toml", "text")
        assert known, f"{block.where}: {block.language!r} is not known here"
        assert block.language != "text" or block.marker[0] in ("not run", "file"), (
            f"{block.where}: what is this held against?"
        )


# ---------------------------------------------------------------- running them


class Session:
    """The commands of one page, in one working directory."""

    def __init__(self, folder: Path, *, whole: bool) -> None:
        self.folder, self.whole = folder, whole
        self.names: dict[str, Any] = {"__name__": "page"}
        shutil.copytree(ROOT / "recipes", folder / "recipes")

    def run(self, block: Block) -> None:
        getattr(self, f"_{block.language}")(block)

    def write(self, block: Block) -> None:
        """The file that a block is; a package's metadata as pip would write it."""
        path = self.folder / block.marker[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text + "\n", encoding="utf-8")
        if path.name == "pyproject.toml":
            project = tomllib.loads(block.text)["project"]
            name, version = project["name"], project["version"]
            info = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            entries = project["entry-points"]["sslkit"].items()
            (info / "entry_points.txt").write_text("[sslkit]\n" + "".join(f"{k} = {v}\n" for k, v in entries))
            registry.clear()
        importlib.invalidate_caches()

    def _sh(self, block: Block) -> None:
        for line in block.text.splitlines():
            self._command(line, block)

    def _console(self, block: Block) -> None:
        for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
            line, _, wanted = part.partition("\n")
            said = self._command(line, block)
            cut_short = line.startswith("sslkit train") and block.marker[0] != "exits" and not self.whole
            if not cut_short and not alike(wanted, said):
                pytest.fail(f"{block.where}: {line}\n--- the page says\n{wanted}\n--- the command says\n{said}")

    def _python(self, block: Block) -> None:
        exec(compile("\n" * block.line + block.text, str(block.page), "exec"), self.names)

    def _json(self, block: Block) -> None:
        for line in block.text.splitlines():
            json.loads(line)

    def _toml(self, block: Block) -> None:
        tables = tomllib.loads(block.text)
        if not {"data_source", "train"} <= tables.keys():
            tables = laid_over(read_recipe_tables("byol_cifar10"), tables)
        parse_recipe(tomli_w.dumps(tables), block.where)

    def _command(self, line: str, block: Block) -> str:
        words = shlex.split(line, comments=True)
        if not words or re.fullmatch(r"export SSLKIT_DATA=\S+", line):
            return ""
        if words[0] == "make":
            assert words[1] in targets(), f"{block.where}: make has no target {words[1]!r}"
            return ""
        if words[0] == "python":
            assert (ROOT / words[1]).is_file(), f"{block.where}: {words[1]} is not there"
            return ""
        if words[0] in ("pip", "pytest") or words[:2] == ["sslkit", "check-plugin"]:
            assert (self.folder / "pyproject.toml").is_file(), f"{block.where}: the page is no plugin"
            return ""
        assert words[0] == "sslkit", f"{block.where}: {words[0]} is not run here"
        expected = int(block.marker[1]) if block.marker[0] == "exits" else 0
        if words[1] == "train" and not expected:
            with local.allowed("--allow-local-code" in words):
                recipe = read_recipe(words[2], settings(words))
            if type(recipe.backbone).__name__ == "Timm" and line != TRAINED_WITH_TIMM:
                return ""
            words += [] if self.whole else small(type(recipe.data_source).__name__, words)
        elif words[1] == "train":
            words += small("Digits", words)
        done = CliRunner().invoke(main, words[1:])
        assert done.exit_code == expected, f"{block.where}: {line}\n{done.output}\n{done.exception!r}"
        return done.output


def alike(wanted: str, said: str) -> bool:
    """Whether an output is what a page says, `...` standing for anything and all white space being alike."""
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    return doctest.OutputChecker().check_output(wanted.strip() + "\n", said.strip() + "\n", options)


def settings(words: list[str]) -> list[str]:
    """The values of `--set`."""
    return [value for name, value in pairwise(words) if name == "--set"]


def small(source: str, words: list[str]) -> list[str]:
    """What makes a training command short: few images in small batches, and few steps."""
    fewer = ["train.batch_size=32", "train.compile=false"]
    fewer += ["data_source.prints=1", "data_source.test_prints=1"] if source == "Digits" else []
    fewer += ["optimizer.lr.warmup_steps=2"] if "byol_cifar10_cpu" in " ".join(words) else []  # a run of 12 steps
    steps = [] if {"--steps", "--dry-run"} & set(words) else ["--steps", "2"]
    return [*(word for value in fewer for word in ("--set", value)), *steps]


def read_recipe_tables(name: str) -> dict[str, Any]:
    return tomllib.loads((ROOT / "recipes" / f"{name}.toml").read_text(encoding="utf-8"))


def laid_over(base: dict[str, Any], tables: dict[str, Any]) -> dict[str, Any]:
    """Some tables of a recipe in the place of those of another; a table without `use` changes keys of the other's."""
    merged = dict(base)
    for name, table in tables.items():
        replaces = not isinstance(table, dict) or "use" in table
        merged[name] = table if replaces else {**base.get(name, {}), **table}
    return merged


def targets() -> set[str]:
    """The targets of the Makefile that have a line in its help."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    described = set(re.findall(r'@echo "make (\w+) ', text))
    defined = set(re.findall(r"^(\w+):", text, re.MULTILINE)) - {"help"}
    assert described == defined
    return defined


def picture(random: np.random.Generator, side: int) -> bytes:
    data = io.BytesIO()
    Image.fromarray(random.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(data, "PNG")
    return data.getvalue()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with photos, a CIFAR-10 of 48 images elsewhere; packages in the directory can be imported."""
    random = np.random.default_rng(0)
    cifar10 = tmp_path / "data" / "cifar10"
    cifar10.mkdir(parents=True)
    for name, count in (("train", 32), ("test", 16)):
        images = [{"bytes": picture(random, 32), "path": None} for _ in range(count)]
        pq.write_table(pa.table({"img": images, "label": [i % 10 for i in range(count)]}), cifar10 / f"{name}.parquet")
    monkeypatch.setenv("SSLKIT_DATA", str(tmp_path / "data"))
    for kind in ("train/cat", "train/dog", "test/cat", "test/dog"):
        photos = tmp_path / "page" / "photos" / kind
        photos.mkdir(parents=True)
        for number in range(96 if kind.startswith("train") else 8):
            (photos / f"{number}.png").write_bytes(picture(random, 8))
    monkeypatch.chdir(tmp_path / "page")
    monkeypatch.syspath_prepend(str(tmp_path / "page"))
    yield tmp_path / "page"
    registry.clear()
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def run_page(page: Path, session: Session) -> None:
    for block in blocks(page):
        if block.marker[0] == "file":
            session.write(block)
        elif block.marker[0] != "not run":
            session.run(block)


FEATURES = DOCS / "tutorial" / "from-images-to-features.md"
LONG = [
    DOCS / "how-to" / f"{name}.md"
    for name in ("evaluate", "export", "make-a-recipe-for-my-images", "sweep", "train-on-several-gpus")
]
"""Pages that take half a minute even with few images: the slow tests run them, and FEATURES."""


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=[pytest.mark.slow] * (p in LONG)) for p in PAGES if blocks(p) and p != FEATURES],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_what_a_page_shows_runs(page: Path, folder: Path) -> None:
    run_page(page, Session(folder, whole=False))


@pytest.mark.slow
def test_the_tutorial_says_what_its_trainings_say(folder: Path) -> None:
    """With seed 0; tests/test_wheel.py has another."""
    run_page(DOCS / "tutorial" / "first-run.md", Session(folder, whole=True))
    ends = {}
    for name in ("quickstart", "geometry_only"):
        lines = (folder / "runs" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        knn = [r["knn_top1"] for r in records if "knn_top1" in r]
        assert knn[0] < 0.35, "the random network"
        ends[name] = (knn[-1], [r["loss"] for r in records if "loss" in r][-1])
    assert ends["quickstart"][0] > 0.9
    assert ends["geometry_only"][0] < 0.3, "nothing learnt"
    assert ends["geometry_only"][1] < 0.2, "with a loss near zero"


@pytest.mark.slow
def test_the_way_from_images_to_features(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tutorial at a small size. Its own code compares timm's features with ours and looks for the query."""
    cifar10 = folder.parent / "data"
    shutil.rmtree(cifar10 / "cifar10")
    noisy_cifar10(cifar10, train=640, test=160)
    run_page(FEATURES, Session(folder, whole=False))
    assert "largest difference:" in capsys.readouterr().out
    record = json.loads((folder / "runs/byol_cifar10_cpu/export/sslkit.json").read_text(encoding="utf-8"))
    assert {check["file"] for check in record["checks"]} == {"model.safetensors", "model.onnx"}
    assert all(check["largest_difference"] <= check["allowed"] <= 1e-4 for check in record["checks"])
    protocols = {
        r["protocol"] for r in json.loads((folder / "runs/byol_cifar10_cpu/evaluation.json").read_text())["records"]
    }
    assert protocols >= {"knn", "linear", "finetune", "patches_knn", "patches_linear"}
    assert "data:image/" in (folder / "near.html").read_text(encoding="utf-8")


# ---------------------------------------------------------------- plugins

HOW_TO = {
    kind: DOCS / "how-to" / f"write-a{'n' * (kind[0] in 'aeiou')}-{kind.replace('_', '-')}.md"
    for kind in registry.KINDS
}
LINES = 30


@pytest.mark.parametrize("kind", registry.KINDS)
def test_every_kind_has_a_page_with_a_whole_plugin_of_few_lines(kind: str) -> None:
    files = {b.marker[1]: b.text for b in blocks(HOW_TO[kind]) if b.marker[0] == "file"}
    project = tomllib.loads(files["pyproject.toml"])
    (entry,) = project["project"]["entry-points"]["sslkit"]
    (package,) = project["tool"]["setuptools"]["packages"]
    assert entry.startswith(f"{kind}.")
    assert entry not in {p.key for p in registry.providers()}, "sslkit has it already"
    code = [text for name, text in files.items() if name.startswith(f"{package}/")]
    assert sum(bool(line.strip()) for text in code for line in text.splitlines()) <= LINES
    assert {name for name in files if name.endswith(".py") and not name.startswith(f"{package}/")} == {"test_plugin.py"}


@pytest.mark.parametrize("kind", registry.KINDS)
def test_the_pages_for_authors_are_alike(kind: str) -> None:
    headings = re.findall(r"^## (.+)$", prose(HOW_TO[kind]), re.MULTILINE)
    assert headings[:5] == ["The package", "What the contract asks", "Install it", "Use it", "Test it"]
    asked = prose(HOW_TO[kind]).partition("## What the contract asks")[2].partition("## Install it")[0]
    assert 3 <= len(re.findall(r"^- ", asked, re.MULTILINE)) <= 6
    assert f"(../reference/api.md#{kind})" in asked


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fresh_environment(tmp_path_factory.mktemp("environment"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", registry.KINDS)
def test_the_plugin_of_a_page_installs_trains_and_conforms(kind: str, environment: Path, tmp_path: Path) -> None:
    for block in blocks(HOW_TO[kind]):
        if block.marker[0] == "file":
            path = tmp_path / block.marker[1]
            path.parent.mkdir(exist_ok=True)
            path.write_text(block.text + "\n", encoding="utf-8")
        elif block.language == "python":
            (tmp_path / "block.py").write_text(block.text, encoding="utf-8")
            call(environment / "python", "block.py", cwd=tmp_path)
        elif block.language == "sh":
            for line in block.text.splitlines():
                words = shlex.split(line)
                words += OFFLINE if words[0] == "pip" else []
                words += ["-m", "not slow"] if words[0] == "pytest" else []  # those run for the scaffold of each kind
                words += small("Arrays" if kind == "data_source" else "Digits", words) if words[1] == "train" else []
                call(environment / "python", "-m", *words, cwd=tmp_path)


# ---------------------------------------------------------------- the README


def test_the_readmes_recipe_is_the_file() -> None:
    recipe = (ROOT / "recipes" / "byol_cifar10.toml").read_text(encoding="utf-8")
    assert f"```toml\n{recipe}```" in (ROOT / "README.md").read_text(encoding="utf-8")


IGNORED = {"__pycache__", "build", "dist", "runs", "py.typed"}


def entries(folder: Path) -> set[str]:
    """What a folder holds that belongs to the project: folders with a slash, and no empty ones."""
    kept = set()
    for path in folder.iterdir():
        ours = not path.name.startswith(".") and path.name not in IGNORED and path.suffix != ".egg-info"
        if ours and (path.is_file() or any(below.is_file() for below in path.rglob("*"))):
            kept.add(path.name + "/" * path.is_dir())
    return kept


def readmes_tree() -> dict[str, list[str]]:
    """Entries of each folder in the README's tree, in its order."""
    tree: dict[str, list[str]] = {"": []}
    block = next(b for b in ALL if b.page.name == "README.md" and b.text.startswith("README.md\n"))
    inside = ""
    for line in block.text.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            tree[""].append(name)
            inside = name
        else:
            tree.setdefault(inside, []).append(name)
    return tree


def test_the_readmes_tree_is_true() -> None:
    tree = readmes_tree()
    assert set(tree[""]) == entries(ROOT)
    assert set(tree["sslkit/"]) == entries(ROOT / "sslkit")
    assert set(tree["plugins/"]) == entries(ROOT / "plugins")
    block = next(b for b in ALL if b.page.name == "README.md" and b.text.startswith("README.md\n"))
    named, kind = set(), ""
    for line in block.text.splitlines():
        if line.startswith("    sslkit_"):
            for word in line.split()[1:]:  # loss.dino, .ressl, head.dino
                before, _, name = word.rstrip(",").rpartition(".")
                kind = before or kind
                named.add(f"{kind}.{name}")
    ours = [p for p in registry.providers() if p.distribution == "sslkit"]
    assert named == {"rule.NAME" if p.kind == registry.RULE else p.key for p in ours}


def test_the_readmes_tree_lists_a_module_above_those_it_imports() -> None:
    listed = [ROOT / "sslkit" / name for name in readmes_tree()["sslkit/"]]
    order = [path.stem for path in listed]
    for number, module in enumerate(order):
        files = listed[number].glob("*.py") if listed[number].is_dir() else [listed[number]]
        for node in (n for file in files for n in ast.walk(ast.parse(file.read_text(encoding="utf-8")))):
            if isinstance(node, ast.ImportFrom) and node.module:
                head, _, tail = node.module.partition(".")
                imported = {tail.partition(".")[0]} if tail else {alias.name for alias in node.names}
                if head == "sslkit":
                    assert not imported & set(order[:number]), f"{module} imports {imported}, which are above it"


# ---------------------------------------------------------------- links and lists


def prose(page: Path) -> str:
    """A page without its blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts and MyST make them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_every_page_is_in_the_table_of_contents_and_in_the_readme() -> None:
    pages = {str(page.relative_to(DOCS).with_suffix("")) for page in WRITTEN} - {"index"}
    contents = (DOCS / "index.md").read_text(encoding="utf-8")
    assert pages == set(re.findall(r"^([\w-]+/[\w-]+)$", contents, re.MULTILINE))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"](docs/{page}.md)" in readme for page in pages)


def test_every_command_is_shown_somewhere() -> None:
    shown = "\n".join(b.text for b in ALL if b.language in ("sh", "console"))
    for command in main.commands:
        assert re.search(rf"^(\$ )?sslkit {command}\b", shown, re.MULTILINE), command


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_say_what_the_code_says() -> None:
    made = generator().pages()
    assert {Path(page).name for page in made} == GENERATED
    for page, text in made.items():
        stale = (DOCS / page).read_text(encoding="utf-8") != text
        assert not stale, f"docs/{page} is stale: run python docs/generate.py"


def test_every_method_is_in_the_table_and_no_figure_is_of_another_recipe() -> None:
    generator()  # puts docs/ on the path
    import methods

    known = [method["recipe"] for method in methods.methods()]
    assert sorted(known) == sorted(name for name in shipped() if name.endswith("_cifar10"))
    assert methods.stale() == [], "measure again: python benchmarks/methods.py"
    assert {record["recipe"] for record in methods.measured()} <= set(known)


def listed(page: str, heading: str = "") -> set[str]:
    """Names in code spans that begin the rows of a page's tables, under one heading or all."""
    text = (DOCS / page).read_text(encoding="utf-8")
    if heading:
        text = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`.+?) \|", text, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def test_dependencies_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    needed = chain(project["dependencies"], *extras.values())
    assert listed("explanation/dependencies.md") == {re.split(r"[<>=]", requirement)[0] for requirement in needed}
    headings = (DOCS / "explanation" / "dependencies.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^## .*: `(\w+)`$", headings, re.MULTILINE)) == set(extras)


# ---------------------------------------------------------------- what a run writes


@pytest.fixture(scope="module")
def a_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tiny recipe, with a rate of its own for the predictor."""
    place = tmp_path_factory.mktemp("run")
    (place / "tiny.toml").write_text(TINY, encoding="utf-8")
    words = ["train", str(place / "tiny.toml"), "--set", "optimizer.groups.predictor.lr=0.05", "--run-dir"]
    done = CliRunner().invoke(main, [*words, str(place / "run")])
    assert done.exit_code == 0, done.output
    return place / "run"


def test_every_metric_is_documented_and_every_documented_one_is_written(a_run: Path) -> None:
    records = [json.loads(line) for line in (a_run / "metrics.jsonl").read_text().splitlines()]
    part = re.compile(r"^(lr|grad_norm)_(backbone|projector|predictor|loss)$")
    written = {part.sub(r"\1_PART", key) for record in records for key in record}
    assert "loss.OPTION" in listed("reference/metrics.md", "Of the loop"), "no loss of the tiny recipe has one"
    written.add("loss.OPTION")
    heads = {key for page in ["In every record", "Of the loop", "Of the rank", "Of kNN", "Of the probe"]
             for key in listed("reference/metrics.md", page)}  # fmt: skip
    assert heads == written


ONLY_OF_SOME_RUNS = {"local/", "bad_batch.json", "traceback.txt", "export/"}


def test_every_file_of_a_run_is_documented(a_run: Path) -> None:
    page = (DOCS / "reference" / "run-directory.md").read_text(encoding="utf-8")
    top = {f"{p.name}{'/' * p.is_dir()}" for p in a_run.iterdir()}
    assert set(re.findall(r"^\| `([^`]+)` \|", page.partition("\n## ")[0], re.MULTILINE)) == {
        *top, *ONLY_OF_SOME_RUNS,
    }  # fmt: skip
    checkpoint = {p.name for p in (a_run / "checkpoints" / "step-000000020").iterdir()}
    assert listed("reference/run-directory.md", "Checkpoints") == checkpoint
    environment = json.loads((a_run / "env.json").read_text())
    assert listed("reference/run-directory.md", "env.json") == set(environment)
    status = json.loads((a_run / "status.json").read_text())
    example = next(b for b in ALL if b.language == "json" and b.page.name == "run-directory.md")
    assert set(json.loads(example.text)) == {*status, "reason"}  # which a run that was done has not


def test_every_rule_is_documented() -> None:
    text = (DOCS / "reference" / "rules.md").read_text(encoding="utf-8")
    assert all(f"\n### {name}\n" in text for name in doctor.rules()[0])
