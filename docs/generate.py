"""Writes the reference pages that follow from the code: `python docs/generate.py`.

The pages are committed, so that they can be read without building anything; tests/test_docs.py fails when one of them
no longer says what the code says.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import click
from pydantic import BaseModel

from sslkit import (
    api,
    batch,
    contracts,
    describe,
    diff,
    doctor,
    embedding,
    encoder,
    evaluation,
    events,
    exporting,
    feature_files,
    nn,
    registry,
    replaying,
    result,
    rules,
    schema,
    scripting,
    searching,
)
from sslkit import recipe as recipe_module
from sslkit.cli import main
from sslkit.evaluation import told
from sslkit.recipe import DEFAULT_OBSERVERS, Recipe, Train
from sslkit.starting_point import InitFrom

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # the tests load this file by its path

from methods import methods_page  # noqa: E402

NOTE = "<!-- Written by docs/generate.py: edit the code that is described here, then run python docs/generate.py. -->"


def pages() -> dict[str, str]:
    """The text of every generated page, by its path below `docs/`."""
    made: dict[str, Callable[[], list[str]]] = {
        "reference/cli.md": cli_page,
        "reference/components.md": components_page,
        "reference/recipe.md": recipe_page,
        "reference/api.md": api_page,
        "reference/python.md": python_page,
        "reference/rules.md": rules_page,
        "reference/methods.md": lambda: methods_page(table),
    }
    return {path: "\n\n".join([NOTE, *page()]) + "\n" for path, page in made.items()}


# ---------------------------------------------------------------- Markdown


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a `|` inside a cell is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def code(text: str) -> str:
    """Text in a code span."""
    return f"`{text}`"


def paragraphs(doc: str | None) -> str:
    """A docstring as Markdown: what it raises, takes and returns become lists."""
    text = inspect.cleandoc(doc or "")
    for section in ("Args", "Returns", "Raises"):
        match = re.search(rf"^{section}:\n((?:[ ]+.*\n?|\n)+)", text, re.MULTILINE)
        if match:
            body = inspect.cleandoc("\n" + match[1])
            items = re.split(r"\n(?=\S)", body)
            listed = "\n".join("- " + _item(" ".join(item.split())) for item in items)
            text = f"{text[: match.start()]}{section}:\n\n{listed}\n\n{text[match.end() :]}"
    return text.strip()


def _item(text: str) -> str:
    name, colon, rest = text.partition(": ")
    return f"`{name}`: {rest}" if colon and re.fullmatch(r"[\w.]+", name) else text


ASKED = {
    "shapes": "Shapes",
    "dtype": "Dtypes",
    "device": "Device",
    "autocast": "Autocast",
    "processes": "Several processes",
    "state": "State",
    "randomness": "Randomness",
    "called": "When it is called",
}
"""What the contract of every kind says, in this order."""


def contract(doc: str | None) -> tuple[str, str]:
    """A docstring without its section `Contract:`, and that section as a table; empty where there is none."""
    text, found, section = inspect.cleandoc(doc or "").partition("\nContract:\n")
    if not found:
        return text, ""
    items = dict(item.split(": ", 1) for item in re.split(r"\n(?=\S)", inspect.cleandoc("\n" + section)))
    if list(items) != list(ASKED):
        raise ValueError(f"a contract has {list(ASKED)}, not {list(items)}")
    return text.strip(), table(("", "Contract"), [(ASKED[name], one_line(words)) for name, words in items.items()])


def one_line(text: str) -> str:
    """A text for a table's cell."""
    return " ".join(text.split())


# ---------------------------------------------------------------- the command line


def cli_page() -> list[str]:
    """One section per command of `sslkit.cli`."""
    context = click.Context(main, info_name="sslkit")
    parts = [
        "# Command line",
        "`sslkit COMMAND --help` shows the same on a terminal. `sslkit` and `python -m sslkit` are one.",
        table(
            ("Command", "What it does"),
            [
                (f"[`sslkit {name}`](#sslkit-{name})", one_line((command.help or "").partition("\n\n")[0]))
                for name, command in sorted(main.commands.items())
            ],
        ),
        "## Exit codes",
        table(
            ("Code", "Meaning"),
            [
                ("0", "Done; also a run that SIGTERM ended after it had saved its state."),
                ("1", "A run that began and failed: a loss that is not finite, no memory, a full disk."),
                ("2", "Something for the user to mend: a recipe, an option, a path, a missing package."),
                ("130", "Interrupted from the keyboard; the state is saved."),
            ],
        ),
        "Errors go to stderr, one line each, and say what was wrong, where, and what to do.",
        "`--no-plugin DIST` may stand before any command, too.",
    ]
    for name, command in sorted(main.commands.items()):
        usage = " ".join(command.collect_usage_pieces(click.Context(command, info_name=name, parent=context)))
        parts += [f"## sslkit {name}", code(f"sslkit {name} {usage}"), inspect.cleandoc(command.help or "")]
        rows = [_option(parameter) for parameter in command.params if isinstance(parameter, click.Option)]
        if rows:
            parts.append(table(("Option", "Meaning"), rows))
    parts += ["## Environment", table(("Variable", "Meaning"), [
        ("`SSLKIT_DATA`", "Folder for data sets and for what is remembered about them; by default `~/.cache/sslkit`. "
                          "CIFAR-10 lies in its subfolder `cifar10`."),
        ("`SSLKIT_PLUGINS`", "The distributions whose components may be used besides sslkit's own, separated by "
                             "commas. Unset means all that are installed, empty none."),
        ("`SSLKIT_NO_PLUGIN`", "Distributions to leave out, separated by commas, as `--no-plugin` does."),
    ])]  # fmt: skip
    return parts


def _option(option: click.Option) -> tuple[str, str]:
    name = ", ".join(option.opts)
    if isinstance(option.type, click.Choice):
        name += " " + "|".join(map(str, option.type.choices))
    elif not option.is_flag:
        name += " " + (option.metavar or option.type.name.partition(" ")[0].upper())
    default = f" Default: `{option.default}`." if option.show_default else ""
    text = re.sub(r"\s*\[default: (.*?)\]", r" Default: `\1`.", option.help or "")
    return code(name), text + default + (" Repeatable." if option.multiple and "repeatable" not in text else "")


# ---------------------------------------------------------------- components


def components_page() -> list[str]:
    """One section per component that sslkit brings, under its kind."""
    ours = [p for p in registry.providers() if p.distribution == "sslkit"]
    parts = [
        "# Components",
        "Every component that comes with sslkit, with its options as a recipe sets them. What is installed on your "
        "machine, other packages included, is listed by `sslkit list-plugins`, and `sslkit describe KIND.NAME` shows "
        "one of them in this form.",
        "An option of the type *number or schedule* takes a number or a table that names a "
        "[schedule](#schedule), such as `{ use = \"cosine\", start = 0.99, end = 1.0 }`. *unset* as a default means "
        "that the option may be left out. A dagger (†) marks options that do not change what a run computes: a run may "
        "[go on](../how-to/resume-and-stop.md) with other values.",
    ]  # fmt: skip
    for kind in registry.KINDS:
        parts += [f"## {kind}", inspect.cleandoc(api.KIND_CLASSES[kind].__doc__ or "")]
        for provider in (p for p in ours if p.kind == kind):
            cls: Any = registry.load(kind, provider.name)
            where = code(f"plugins/{provider.target.partition(':')[0]}/")
            parts += [f"### {provider.key}", paragraphs(cls.__doc__), f"Source: {where}."]
            rows = option_rows(cls)
            parts.append(table(("Option", "Type", "Default", "Meaning"), rows) if rows else "It has no options.")
    return parts


def option_rows(model: type[BaseModel]) -> list[tuple[str, str, str, str]]:
    """Name, type, default and help of each option of a component or table."""
    rows = []
    for option in describe.options(model):  # type: ignore[arg-type]
        name = option["name"]
        dagger = " †" if name in model.model_fields and api.Incidental in model.model_fields[name].metadata else ""
        kind = option["type"].replace("number | schedule", "number or schedule")
        default = "required" if option["required"] else option["default"]
        plain = default in ("required", "unset")
        rows.append((code(name) + dagger, code(kind), default if plain else code(default), option["help"]))
    return rows


# ---------------------------------------------------------------- health rules


def rules_page() -> list[str]:
    """Every rule that sslkit brings, the gravest first."""
    known = {
        name: rule for name, rule in doctor.rules()[0].items() if registry.find("rule", name).distribution == "sslkit"
    }
    parts = [
        "# Health rules",
        "What `sslkit check RECIPE` and the beginning of `sslkit train` look for (*before*), and what a live run and "
        "`sslkit doctor RUN` look for in the records (*during*). The severity is the usual one; a rule may find a case "
        "milder or graver. `train.accept` in a recipe takes the ids. How the thresholds were found, and how often the "
        "doctor is right, is in [The doctor](../explanation/doctor.md).",
    ]
    for severity, title in (("error", "Errors"), ("warning", "Warnings"), ("info", "Notes")):
        parts.append(f"## {title}")
        for name, rule in known.items():
            if rule.severity != severity:
                continue
            when = " and ".join(w for w, look in (("before", rule.before), ("during", rule.during)) if look)
            facts = [rule.what, f"*{when}*" + (f", set by {code(rule.key)}" if rule.key else "") + "."]
            facts += [f"Likely cause: {rule.cause.rstrip('.')}."] if rule.cause else []
            facts += [f"Fix: {rule.fix.rstrip('.')}.", f"Source: {rule.source.rstrip('.')}."]
            if rule.explains:
                facts.append(f"Brings about: {', '.join(map(code, sorted(rule.explains)))}.")
            parts += [f"### {name}", " ".join(facts[:2]), *facts[2:]]
    return parts


# ---------------------------------------------------------------- recipes

FILLED_BY = {"projector": "head", "predictor": "head", "observers": "observer"}
"""The kind that fills a table, where the table is not named after it."""


def recipe_page() -> list[str]:
    """Tables of a recipe and of `[train]`, and what reading one means."""
    rows = []
    for name, field in Recipe.model_fields.items():
        kind = FILLED_BY.get(name, name)
        if kind in registry.KINDS:
            shown, what = f"[[{name}]]" if name == "observers" else f"[{name}]", f"[{kind}](components.md#{kind})"
        elif name == "train":
            shown, what = "[train]", "its [options](#train)"
        elif name == "init_from":
            shown, what = name, "a path, or its [options](#init_from)"
        else:
            shown, what = name, code(describe.type_name(field))
        needed = "required" if field.is_required() and name != "name" else "optional"
        rows.append((code(shown), what, needed, one_line(field.description or "")))
    return [
        "# Recipes",
        "A recipe is a TOML file. Each table is a slot, named after the kind of component that fills it; `use` names "
        "the component and the other keys are its options. Two slots, `projector` and `predictor`, take heads. "
        "Unknown keys and loose types (`\"64\"` for `64`) are refused, all mistakes at once, each with its line.",
        "A recipe is data: it can name installed components and set their options, and it can run nothing else.",
        "## Tables",
        table(("Key", "Filled by", "", "Meaning"), rows),
        "Without a `name`, a recipe has the name of its file.",
        f"The observers {', '.join(code(n) for n in DEFAULT_OBSERVERS)} look on in every run. A `[[observers]]` table "
        "with one of these names sets its options, and `enabled = false` in it switches it off.",
        "## train",
        table(("Option", "Type", "Default", "Meaning"), option_rows(Train)),
        "## init_from",
        "[Start from a run](../how-to/start-from-a-run.md) says what becomes of them.",
        table(("Option", "Type", "Default", "Meaning"), option_rows(InitFrom)),
        "A dagger (†) marks options that do not change what a run computes. They, `name`, `observers` and the options "
        "marked so among the [components](components.md) are left out of the recipe's hash, so that a run may "
        "[go on](../how-to/resume-and-stop.md) with other values.",
        "### Findings",
        "`train` looks at the parts before it begins, as `sslkit check` does. What is sure to fail it refuses, with "
        "the figure and the step; of what is known to fail in the papers' own experiments it warns, and goes on. A "
        "recipe that means it lists the finding's id in `train.accept`; [Health rules](rules.md) has all of them.",
        "## Names and paths",
        "A recipe given to a command is a path if it contains a slash or ends in `.toml`; otherwise it is the name of "
        "a recipe that comes with sslkit (`sslkit recipes` lists them).",
        "## Overlays",
        "`extends` lays a recipe over another, its base: `extends = \"byol_cifar10\"` over a recipe that comes with "
        "sslkit, `extends = \"base.toml\"` or `\"../base.toml\"` over a file, whose path starts at the folder of the "
        "file that says it. A base may extend another recipe.",
        table(
            ("In the overlay", "What it does"),
            [
                ("a table", "Changes the keys that it has, and leaves the base's others, at any depth."),
                ("a table with another `use`", "Replaces the base's table: the old options belong to the old part."),
                ("a number, text or list", "Replaces what the base has. A list of tables is replaced as a whole."),
                ("`[[observers]]`", "Changes the base's observer of the same `use`, or adds one; `enabled = false` in "
                                    "it switches one off."),
                ("`predictor = false`", "Takes the base's predictor away. Places that have to be filled, and single "
                                        "options, cannot be emptied."),
                ("`requires`", "Is added to what the base requires."),
                ("`name`", "The overlay's own. Without one it has the name of its file, not that of the base."),
            ],
        ),
        "`--set` is applied last. A mistake is told with the file and line that made it, base or overlay; what is "
        "missing, at the overlay. The run's `recipe.lock.toml` holds the result, without `extends`, and has the same "
        "hash. `simsiam_cifar10` is an overlay of `byol_cifar10`.",
        "## Overrides",
        "`--set KEY=VALUE` changes one key and may be repeated. The value is read as TOML; what is not TOML is a "
        "string, so `--set target_updater.use=ema` needs no quotes.",
        table(
            ("Override", "What it does"),
            [
                ("`train.batch_size=64`", "Sets one option."),
                ("`loss.form=simsiam`", "Sets one option to a string."),
                ("`optimizer.lr.peak=0.5`", "Sets one option of the schedule that the recipe names."),
                ("`optimizer.lr=0.05`", "Replaces the schedule by a number."),
                ("`view_generator.views.0.size=24`", "Sets an option of one element of a list, by its number from 0."),
                ("`predictor=false`", "Leaves out the predictor, the one slot that may be empty."),
                ("`data_source.use=folder`", "Names another component and drops the other keys of the table."),
                ("`observers.knn.every_epochs=5`", "Sets an option of one observer, by name."),
            ],
        ),
        "A changed `use` is applied before the other overrides, whatever their order.",
        "## Parts from other packages, and from files",
        "`requires` lists packages that have to be installed, and `use = \"./my_head.py:WideHead\"` names a class in a "
        "file; [Use plugins](../how-to/use-plugins.md) has both.",
        "## The same recipe, spelt out",
        "A run writes `recipe.lock.toml` into [its directory](run-directory.md): the recipe with every option spelt "
        "out and overrides applied, and `train.compile` as it was chosen where the recipe says `auto`. It is a recipe "
        "like any other and trains to the same losses.",
        "## Two recipes compared",
        "`sslkit diff A B` shows where two recipes or runs differ, with every option spelt out. `--json` gives the "
        "same as one object, a `Difference`; `null` stands for what is not set.",
        *(part for name in ("Difference", "Side", "Slot", "Change") for part in _described(diff, name, 3)),
    ]  # fmt: skip


# ---------------------------------------------------------------- contracts

LIVE = {
    "data_source": ("ImageSet", "Images"),
    "view_generator": ("ViewMaker",),
    "backbone": ("BackboneModule",),
    "head": ("HeadModule",),
    "loss": ("LossModule",),
    "target_updater": ("TargetModule",),
    "optimizer": ("ParamGroup",),
}
"""The contracts of what each kind builds, beside its class."""
SPECIAL = ("__call__", "__len__")


def api_page() -> list[str]:
    """Contracts of the kinds, for authors of components."""
    parts = [
        "# Contracts",
        "All that an author imports is in `sslkit.api`, and for observers in `sslkit.events`. A component is a class "
        "whose fields are the options a recipe may set, and whose `build` makes the live object; "
        "each kind has a page that walks through one. `torch` is imported inside `build`, not at the top of the "
        "module, so that looking around stays fast.",
        "The contract of each kind is a table of the same eight rows. Shapes: B images of a batch, V views, C "
        "channels, d dimensions. A run is one process as yet; what a contract says of several is what a component has "
        "to be ready for, and `sslkit check-plugin` tries it with two.",
        f"The contracts have the number {api.API_VERSION} (`sslkit.api.API_VERSION`), which is raised when a plugin "
        "written for the old one would no longer work; see [Versions of plugins](../explanation/plugin-versions.md).",
    ]
    for kind in registry.KINDS:
        parts += _kind(kind)
    parts += ["## What a component is told"]
    for name in ("RunInfo", "DataInfo"):
        parts += _described(contracts, name, 3)
    parts += ["## What travels"]
    for name in ("Batch", "ViewSpec", "Needs", "Branches", "LossTerms"):
        parts += _described(batch, name, 3)
    parts += [
        "## Health rules",
        "A rule is an instance of `Rule` behind the entry point `rule.NAME`; every rule that is installed is at work. "
        "NAME is the id of its findings. It is a small pure function of what is known, so it needs no torch. All "
        "of the following is imported from `sslkit.rules`; `Severity` is one of `error`, `warning` and `info`:",
        *[part for name in ("Rule", "Seen", "Facts", "Trajectory", "QueueFacts", "Course", "Points")
          for part in _described(rules, name, 3)],
        "## Types of options",
        f"`Scheduled`: {paragraphs(_assigned_docs(_tree(api))['Scheduled'])} In `build`, `value_of(option, run)` makes "
        "it a function of the step.",
        f"`Incidental`: {paragraphs(api.Incidental.__doc__)}",
        "## Pieces",
        "`sslkit.nn` has what losses and heads would otherwise each write anew. Unlike `sslkit.api` it imports torch, "
        "so it is imported beside the module, not beside the spec.",
        *_pieces(),
        "## Optional hooks",
        "Any module that a head, a backbone, a loss or a target updater builds may define these; the engine calls them "
        "wherever they are, inner modules included. `step` is the number of updates completed before this one, a plain "
        "integer.",
        table(
            ("Method", "When"),
            [
                ("`before_step(step)`", "Before the views are made: to take a schedule's value, say."),
                ("`after_backward(step)`", "After the backward pass, before clipping: to freeze a layer, say."),
                ("`after_step(step)`", "After the optimizer, the target and `commit`: to renormalise prototypes, say."),
            ],
        ),
        "## Events",
        "An observer builds an object whose methods are marked with `sslkit.events.observes` and named after an event. "
        "A method takes any subset of the event's arguments. A name that is no event is refused when the run begins.",
        *_members(events, "Hooks", 3),
        "### Run",
        "What an observer sees of the run.",
        *_members(events, "Run", 4),
    ]  # fmt: skip
    return parts


# ---------------------------------------------------------------- Python


def python_page() -> list[str]:
    """What `import sslkit` offers to scripts and notebooks."""
    return [
        "# Python",
        "What `import sslkit` offers to scripts and notebooks: the command line's work as functions, with the same "
        "engine behind them. [Use sslkit from Python](../how-to/use-from-python.md) walks through it. Everything is "
        "typed (`py.typed`), and `import sslkit` alone imports neither torch nor pydantic.",
        "Errors are `sslkit.UserError`, what the user can mend, and `sslkit.RunFailed`, a run that began and could not "
        "go on. Both are `sslkit.SslkitError`, whose `lines` are what the command line prints. A wrong option of a "
        "component or a recipe that is written in Python is a `pydantic.ValidationError`.",
        *_function(scripting, "load_recipe"),
        "## sslkit.Recipe",
        f"{_docstring(recipe_module, 'Recipe')} Its fields are the tables of [a recipe](recipe.md), its values the "
        "classes that [Components](components.md) lists with their options, and `train` is a `sslkit.Train`.",
        *_methods(recipe_module, "Recipe", ("replace", "to_toml", "hash")),
        *_function(scripting, "train"),
        "## Result",
        _docstring(result, "Result"),
        *_members(result, "Result", 3)[:1],
        *_described(result, "Metrics", 2),
        *_function(scripting, "examine"),
        *_function(scripting, "replay"),
        "## Replay",
        _docstring(replaying, "Replay"),
        *_members(replaying, "Replay", 3)[:1],
        *_function(encoder, "load_encoder"),
        "## ImageEncoder",
        _docstring(encoder, "ImageEncoder"),
        *_members(encoder, "ImageEncoder", 3)[:1],
        *_methods(encoder, "ImageEncoder", ("forward", "features")),
        *_function(evaluation, "evaluate"),
        "## Evaluation",
        _docstring(told, "Evaluation"),
        *_members(told, "Evaluation", 3)[:1],
        *_function(exporting, "export"),
        "## Export",
        _docstring(exporting, "Export"),
        *_members(exporting, "Export", 3)[:1],
        *_function(embedding, "embed"),
        "## Embedded",
        _docstring(feature_files, "Embedded"),
        *_members(feature_files, "Embedded", 3)[:1],
        *_function(searching, "search"),
        "## Nearest",
        _docstring(searching, "Nearest"),
        *_members(searching, "Nearest", 3)[:1],
        "## sslkit.watch",
        "The same measurements in a training loop of your own: [Watch your own "
        "loop](../how-to/watch-your-own-loop.md).",
    ]


def _docstring(module: ModuleType, name: str) -> str:
    return paragraphs(ast.get_docstring(_class(module, name)))


def _function(module: ModuleType, name: str) -> list[str]:
    found = next(n for n in _tree(module).body if isinstance(n, ast.FunctionDef) and n.name == name)
    return [f"## sslkit.{name}", code(_signature(found)), paragraphs(ast.get_docstring(found))]


def _methods(module: ModuleType, name: str, wanted: Sequence[str]) -> list[str]:
    """Some methods of a class, one after another."""
    found = {n.name: n for n in _class(module, name).body if isinstance(n, ast.FunctionDef)}
    listed = [
        f"- {code(_signature(found[method]))}" + _indented(paragraphs(ast.get_docstring(found[method])))
        for method in wanted
    ]
    return ["\n".join(listed)]


def _pieces() -> list[str]:
    """The public functions and modules of `sslkit.nn`."""
    parts = []
    for item in _tree(nn).body:
        if isinstance(item, ast.FunctionDef) and item.name[0] != "_":
            parts += [f"### {item.name}", code(_signature(item)), paragraphs(ast.get_docstring(item))]
        elif isinstance(item, ast.ClassDef) and item.name[0] != "_":
            made = next(n for n in item.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
            heading, *rest = _described(nn, item.name, 3)
            parts += [heading, code(_signature(made).replace("__init__", item.name, 1)), *rest]
    return parts


def _kind(kind: str) -> list[str]:
    spec = api.KIND_CLASSES[kind].__name__
    node = _class(api, spec)
    build = next(n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "build")
    text, asked = contract(ast.get_docstring(build))
    live = [contract(ast.get_docstring(_class(contracts, name)))[1] for name in LIVE.get(kind, ())]
    (asked,) = filter(None, [asked, *live])
    page = f"../how-to/write-a{'n' * (kind[0] in 'aeiou')}-{kind.replace('_', '-')}.md"
    parts = [f"## {kind}", f"Class `sslkit.api.{spec}`. {paragraphs(ast.get_docstring(node))} [Write one]({page})."]
    parts += [code(_signature(build)), paragraphs(text), asked]
    if rows := option_rows(api.KIND_CLASSES[kind]):
        parts += [f"Every {kind} has these options:", table(("Option", "Type", "Default", "Meaning"), rows)]
    for name in LIVE.get(kind, ()):
        parts += _described(contracts, name, 3)
    return [part for part in parts if part]


def _described(module: ModuleType, name: str, level: int) -> list[str]:
    return [
        f"{'#' * level} {name}",
        paragraphs(contract(ast.get_docstring(_class(module, name)))[0]),
        *_members(module, name, level + 1),
    ]


def _members(module: ModuleType, name: str, level: int) -> list[str]:
    """Attributes of a class as a table, and its methods one after another."""
    node = _class(module, name)
    rows, methods = [], []
    documented = _assigned_docs(node)
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            rows.append((item.target.id, ast.unparse(item.annotation), documented.get(item.target.id, "")))
        elif isinstance(item, ast.FunctionDef) and _is_property(item):
            rows.append((item.name, ast.unparse(item.returns) if item.returns else "", ast.get_docstring(item) or ""))
        elif isinstance(item, ast.FunctionDef) and (item.name[0] != "_" or item.name in SPECIAL):
            methods.append(f"- {code(_signature(item))}" + _indented(paragraphs(ast.get_docstring(item))))
    parts = []
    if rows:
        parts.append(table(("Attribute", "Type", "Meaning"), [(code(n), code(t), one_line(d)) for n, t, d in rows]))
    return [*parts, *(["\n".join(methods)] if methods else [])]


def _indented(text: str) -> str:
    return "".join(f"\n  {line}" if line else "\n" for line in ["", *text.splitlines()]) if text else ""


def _is_property(item: ast.FunctionDef) -> bool:
    return any(isinstance(d, ast.Name) and d.id in ("property", "cached_property") for d in item.decorator_list)


def _signature(function: ast.FunctionDef) -> str:
    arguments = ast.unparse(function.args).removeprefix("self, ").removeprefix("self")
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    return f"{function.name}({arguments}){returns}"


def _tree(module: ModuleType) -> ast.Module:
    return ast.parse(inspect.getsource(module))


def _class(module: ModuleType, name: str) -> ast.ClassDef:
    return next(n for n in _tree(module).body if isinstance(n, ast.ClassDef) and n.name == name)


def _assigned_docs(node: ast.Module | ast.ClassDef) -> dict[str, str]:
    """The string below each assignment, by the name that is assigned."""
    found: dict[str, str] = {}
    for item, following in zip(node.body, node.body[1:], strict=False):
        if isinstance(item, ast.Assign | ast.AnnAssign) and isinstance(following, ast.Expr):
            targets = item.targets if isinstance(item, ast.Assign) else [item.target]
            if isinstance(following.value, ast.Constant):
                found |= {t.id: str(following.value.value) for t in targets if isinstance(t, ast.Name)}
    return found


SCHEMA = HERE.parent / "recipes" / "sslkit.schema.json"
"""What the recipes that come with sslkit name at their heads."""


def shipped_schema() -> str:
    """The schema of recipes with sslkit's own components, whatever else is installed."""
    made, left_out = schema.recipe_schema("sslkit")
    assert not left_out, left_out
    return schema.as_text(made)


if __name__ == "__main__":
    for page, text in pages().items():
        (HERE / page).write_text(text, encoding="utf-8")
        print(f"docs/{page}")
    SCHEMA.write_text(shipped_schema(), encoding="utf-8")
    print(f"recipes/{SCHEMA.name}")
