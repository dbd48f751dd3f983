"""What is installed, in words: for `list-plugins`, `describe` and the reference pages."""

from __future__ import annotations

import inspect
import json
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_origin

import click

from sslkit import registry
from sslkit.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

    from sslkit.rules import Rule


def list_components(kind: str | None, *, as_json: bool, check: bool) -> int:
    """Print every component: kind, name, distribution, version, description, and what is wrong with it.

    Returns:
        The exit code: 2 if something that was checked is broken.
    """
    rows = []
    offered: dict[str, list[registry.Provider]] = {}
    for provider in registry.providers():
        offered.setdefault(provider.key, []).append(provider)
    for provider in registry.everything():
        if provider.kind == registry.RULE if kind is None else provider.kind != kind:
            continue  # rules are at work unasked, and there are many: they are listed on request
        description, problem = registry.described(provider)
        twins = [p for p in offered.get(provider.key, ()) if p is not provider]
        if provider.disabled:
            problem = ""
        elif twins:
            others = " and by ".join(p.origin for p in twins)
            problem = f"offered twice, also by {others}; --no-plugin DIST leaves one of them out"
        elif check and not problem:
            try:
                registry.load(provider.kind, provider.name)
            except UserError as error:
                problem = str(error)
        rows.append({
            "kind": provider.kind, "name": provider.name, "distribution": provider.distribution,
            "version": provider.version, "description": description, "problem": problem,
            "disabled": provider.disabled,
        })  # fmt: skip
    for line in registry.damaged():
        print(f"warning: {line}", file=sys.stderr)
    failed = 2 if check and any(row["problem"] for row in rows) else 0
    if as_json:
        print(json.dumps(rows, indent=1))
        return failed
    _print_table(rows)
    return failed


def _print_table(rows: Sequence[Mapping[str, str]]) -> None:
    """Columns by hand: rich takes longer to lay out a few hundred lines than all the rest of `list-plugins`."""
    lines: list[tuple[str, str, str, str, str | None]] = [("kind", "name", "from", "description", "bold")]
    for row in rows:
        text, colour = row["description"], None
        if row["problem"]:
            text, colour = f"BROKEN: {row['problem']}", "red"
        elif row["disabled"]:
            text, colour = f"DISABLED by {row['disabled']}", "yellow"
        lines.append((row["kind"], row["name"], f"{row['distribution']} {row['version']}", text, colour))
    widths = [max(len(line[column]) for line in lines) for column in range(3)]  # type: ignore[arg-type]
    indent = sum(widths) + len(widths)
    terminal = sys.stdout.isatty()
    room = shutil.get_terminal_size().columns - indent if terminal else 0  # a pipe has no width to respect
    for kind, name, origin, text, colour in lines:
        folded = textwrap.wrap(text, room) if room >= 20 else [text]
        head = f"{kind:{widths[0]}} {name:{widths[1]}} {origin:{widths[2]}} "
        for part in folded or [""]:
            styled = click.style(part, bold=True) if colour == "bold" else click.style(part, fg=colour)
            click.echo((head + styled).rstrip() if terminal else (head + part).rstrip())
            head = " " * indent


def describe_component(component: str, *, as_json: bool) -> None:
    """Print one component's options.

    Raises:
        UserError: there is none of this name.
    """
    kind, _, name = component.partition(".")
    if kind not in (*registry.KINDS, registry.RULE):
        raise UserError(
            f"{component}: should read KIND.NAME, such as loss.cosine{did_you_mean(kind, registry.KINDS)}; kinds: "
            + ", ".join((*registry.KINDS, registry.RULE))
        )
    if not name:
        raise UserError(f"{component}: should read KIND.NAME; {kind}: {', '.join(registry.names(kind))}")
    provider = registry.find(kind, name)
    cls: Any = registry.load(kind, name)
    if kind == registry.RULE:
        _describe_rule(provider, cls, as_json=as_json)
        return
    shown = options(cls)
    if as_json:
        print(
            json.dumps(
                {**provider.provenance(), "doc": inspect.getdoc(cls), "source": _file(cls), "options": shown}, indent=1
            )
        )
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    console.print(Text.assemble((provider.key, "bold"), f"  from {provider.origin}  ({_file(cls)})"), soft_wrap=True)
    console.print(Text(inspect.getdoc(cls) or ""), soft_wrap=True)
    for option in shown:
        default = "required" if option["required"] else f"default {option['default']}"
        console.print(Text.assemble("\n", (option["name"], "bold"), f"  {option['type']}, {default}"))
        console.print(Text(option["help"]), soft_wrap=True)


def _describe_rule(provider: registry.Provider, rule: Rule, *, as_json: bool) -> None:
    looks = [name for name in ("before", "during") if getattr(rule, name)]
    facts = {
        "what": rule.what, "severity": rule.severity, "looks": " and ".join(looks) + " training", "set by": rule.key,
        "likely cause": rule.cause, "fix": rule.fix, "source": rule.source, "explains": ", ".join(rule.explains),
    }  # fmt: skip
    if as_json:
        print(json.dumps({**provider.provenance(), **facts}, indent=1))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    console.print(Text.assemble((provider.key, "bold"), f"  from {provider.origin}"), soft_wrap=True)
    for name, text in facts.items():
        if text:
            console.print(Text(f"{name}: {text}"), soft_wrap=True)


def options(cls: type[BaseModel]) -> list[dict[str, Any]]:
    """A component's options: name, type, whether required, default, help.

    Those of the tables in a list follow as `views.N.count`, as far as the component has none of the same name.
    """
    found = []
    for name, info in cls.model_fields.items():
        found.append({
            "name": name,
            "type": type_name(info),
            "required": info.is_required(),
            "default": None if info.is_required() else as_toml(info.get_default(call_default_factory=True)),
            "help": " ".join((info.description or "").split()),
        })  # fmt: skip
        if inner := _table_in_list(info.annotation):
            own = [option for option in options(inner) if option["name"] not in cls.model_fields]
            found += [{**option, "name": f"{name}.N.{option['name']}"} for option in own]
    return found


def _table_in_list(annotation: Any) -> type[BaseModel] | None:
    """The model of a list's elements, where they are tables without a component."""
    from pydantic import BaseModel

    from sslkit.api import Component

    if get_origin(annotation) not in (list, tuple):
        return None
    element = annotation.__args__[0]
    tables = isinstance(element, type) and issubclass(element, BaseModel) and not issubclass(element, Component)
    return element if tables else None


def type_name(info: FieldInfo) -> str:
    """An option's type as a reader of recipes would put it."""
    from pydantic import BaseModel

    from sslkit.api import Schedule

    def put(annotation: Any) -> str:
        arguments = getattr(annotation, "__args__", ())
        origin = getattr(annotation, "__origin__", None)
        if annotation is type(None):
            return "unset"
        if annotation is Ellipsis:
            return "..."
        if str(origin) == "typing.Literal":
            return " | ".join(repr(a) for a in arguments)
        if isinstance(annotation, type) and not arguments:
            if issubclass(annotation, Schedule):
                return "schedule"
            if issubclass(annotation, BaseModel):
                return "table"
            return {"str": "text", "int": "integer", "float": "number", "bool": "true | false"}.get(
                annotation.__name__, annotation.__name__
            )
        if origin in (list, tuple, dict):
            return f"{'table' if origin is dict else 'list'} of ({', '.join(put(a) for a in arguments)})"
        if getattr(annotation, "__metadata__", None):
            return put(annotation.__origin__)
        return " | ".join(dict.fromkeys(put(a) for a in arguments if a is not type(None))) or str(annotation)

    def bounds(annotation: Any) -> list[Any]:
        """What an annotation's members say beside their types: the limits of `PositiveInt | None`."""
        inner = [m for a in getattr(annotation, "__args__", ()) for m in bounds(a)]
        return [*getattr(annotation, "__metadata__", ()), *inner] if get_origin(annotation) is not tuple else []

    limits = [
        f"{sign} {getattr(m, key)}"
        for m in [*info.metadata, *bounds(info.annotation)]
        for key, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
        if hasattr(m, key)
    ]
    return " ".join([put(info.annotation), *limits])


def as_toml(value: Any) -> str:
    """A value as a recipe would have it, on one line; None, which TOML lacks, as `unset`."""
    if value is None:
        return "unset"
    if isinstance(value, tuple | list):
        return f"[{', '.join(as_toml(v) for v in value)}]"
    if hasattr(value, "model_dump"):
        value = value.model_dump(mode="json")
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{k} = {as_toml(v)}' for k, v in value.items() if v is not None)} }}"
    return json.dumps(value, ensure_ascii=False)


def _file(cls: type) -> str:
    try:
        return f"{inspect.getsourcefile(cls)}:{inspect.getsourcelines(cls)[1]}"
    except (OSError, TypeError):
        return cls.__module__
