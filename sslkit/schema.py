"""JSON Schema (draft 2020-12) of recipes, for everything that is installed: editors complete and check with it.

Two forms of each table, since a recipe that extends another may leave out whatever its base says. The lenient one has
every option with its type, default and help, and requires none; it holds for all recipes. The whole one adds what a
recipe that extends nothing has to say. Checks that take code (whether a batch divides) are left to `train`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema

from sslkit import registry
from sslkit.api import KIND_CLASSES
from sslkit.errors import UserError
from sslkit.recipe import Recipe

Schema = dict[str, Any]

DIALECT = "https://json-schema.org/draft/2020-12/schema"
WHOLE = ".whole"
"""What the name of a whole table's definition ends in: `#/$defs/loss.cosine` is lenient, `loss.cosine.whole` not."""
LOCAL = r"\.py:\w+$"
"""What `use` ends in where it names a class in a file: `./my_head.py:WideHead`, which needs `--allow-local-code`."""
_SLOT = "x-sslkit-slot"
_KINDS: Mapping[type, str] = {cls: kind for kind, cls in KIND_CLASSES.items()}
_NULL = {"type": "null"}


def recipe_schema(distribution: str | None = None) -> tuple[Schema, list[str]]:
    """The schema, and one line for each installed component that it had to leave out.

    Args:
        distribution: Only the components of this package; without it, everything that is installed.
    """
    definitions: Schema = {}
    left_out: list[str] = []
    for kind in registry.KINDS:
        added = []
        for name in registry.names(kind):
            try:
                provider = registry.find(kind, name)
                if distribution in (None, provider.distribution):
                    definitions |= _component(kind, name, registry.load(kind, name))
                    added.append(f"{kind}.{name}")
            except Exception as error:  # a stranger's class; the others are to be had all the same
                left_out.append(f"left out: {_first_line(error)}")
        local = {"type": "object", "properties": {"use": {"type": "string", "pattern": LOCAL}}, "required": ["use"]}
        definitions[kind] = {"anyOf": [*map(_ref, added), local]}
        definitions[kind + WHOLE] = {"oneOf": [*(_ref(name + WHOLE) for name in added), local]}
    return {"$schema": DIALECT, **_recipe(), "$defs": definitions}, left_out


def write_schema(out: str | None) -> None:
    """Print the schema, or write it to a file; what was left out is told on stderr.

    Raises:
        UserError: the file cannot be written.
    """
    schema, left_out = recipe_schema()
    for line in left_out:
        print(line, file=sys.stderr)
    if out is None:
        print(as_text(schema), end="")
        return
    try:
        Path(out).write_text(as_text(schema), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from None
    print(f"{out}: a recipe beside it is completed and checked by it with this line at its head: {directive(out)}")


def directive(schema: str) -> str:
    """The comment by which a recipe in the same folder names its schema."""
    return f"#:schema ./{Path(schema).name}"


def as_text(schema: Schema) -> str:
    """A schema as the text of its file."""
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


# ---------------------------------------------------------------- tables


def _recipe() -> Schema:
    whole, lenient = (_plain(_generated(Recipe), whole=whole) for whole in (True, False))
    required = [name for name in whole.pop("required") if name != "name"]  # without one it is that of the file
    lenient["properties"]["observers"]["items"] = {"allOf": [_ref("observer")], "required": ["use"]}
    for name, info in Recipe.model_fields.items():
        if info.default is None:  # TOML has no null: `predictor = false` takes the base's predictor away
            for properties in (whole["properties"], lenient["properties"]):
                text = {"description": properties[name].pop("description")}
                properties[name] = {"anyOf": [properties[name], {"const": False}], **text}
    extends = {"type": "string", "description": "Name of a shipped recipe, or path of one, that this one is laid over."}
    return {
        "title": "Recipe of sslkit",
        **lenient,
        "properties": {"extends": extends, **lenient["properties"]},
        "if": {"required": ["extends"]},
        "else": {**_stricter(whole, lenient), "required": required},
    }


def _component(kind: str, name: str, cls: type) -> Schema:
    """The definitions of one component, by their names."""
    try:
        generated = _generated(cls)
    except Exception as error:
        raise UserError(f"{kind} {name!r} has no JSON Schema: {_first_line(error)}") from error
    whole, lenient = (_plain(generated, whole=whole) for whole in (True, False))
    use = {"const": name, "description": (cls.__doc__ or "").partition("\n")[0]}
    lenient["properties"] = {"use": use, **lenient.get("properties", {})}
    key = f"{kind}.{name}"
    stricter = {**_stricter(whole, lenient), "required": ["use", *whole.get("required", [])]}
    return {key: lenient, key + WHOLE: {"allOf": [_ref(key)], **stricter}}


def _stricter(whole: Schema, lenient: Schema) -> Schema:
    """What the whole form of a table asks for beyond the lenient one."""
    if "properties" not in whole:
        return {} if whole == lenient else whole
    pairs = {name: (inner, lenient["properties"][name]) for name, inner in whole["properties"].items()}
    inner = {name: _stricter(*pair) for name, pair in pairs.items() if pair[0] != pair[1]}
    required = {"required": whole["required"]} if "required" in whole else {}
    return required | ({"properties": inner} if inner else {})


# ---------------------------------------------------------------- what pydantic writes, made plain


class _Generator(GenerateJsonSchema):
    """pydantic's schema of a model, with a mark where a component may stand."""

    ignored_warning_kinds = {"skipped-choice", "non-serializable-default"}  # noqa: RUF012

    def model_schema(self, schema: Any) -> Schema:
        kind = _KINDS.get(schema["cls"])
        return {_SLOT: kind} if kind else super().model_schema(schema)

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> Schema:
        return {}  # a type that JSON Schema cannot tell: anything goes here, and `train` checks it


def _generated(model: type[BaseModel]) -> Schema:
    return model.model_json_schema(schema_generator=_Generator)


def _plain(generated: Schema, *, whole: bool) -> Schema:
    """A model's schema without titles, nulls and definitions of its own, and with references at the marks."""
    definitions = generated.get("$defs", {})

    def plain(node: Schema, whole: bool, inside: tuple[str, ...] = ()) -> Schema:
        if "$ref" in node:
            name = node["$ref"].removeprefix("#/$defs/")
            if name in inside:
                return {}  # a table that holds itself: anything goes from here on
            node, inside = {**definitions[name], **{k: v for k, v in node.items() if k != "$ref"}}, (*inside, name)
        made: Schema = {}
        for key, value in node.items():
            if key == _SLOT:
                made["$ref"] = _ref(value + WHOLE if whole else value)["$ref"]
            elif key == "properties":
                made[key] = {name: plain(inner, whole, inside) for name, inner in value.items()}
            elif key in ("anyOf", "oneOf", "allOf"):
                inner = [plain(n, whole, inside) for n in value if n != _NULL]
                made |= inner[0] if len(inner) == 1 else {key: inner}
            elif key == "items" and isinstance(value, dict):
                made[key] = plain(value, True, inside)  # an overlay replaces lists, so their elements are whole
            elif key == "prefixItems":
                made[key] = [plain(n, True, inside) for n in value]
            elif key in ("additionalProperties", "propertyNames") and isinstance(value, dict):
                made[key] = plain(value, whole, inside)
            elif key == "description":
                made[key] = " ".join(value.split()) if "\n\n" not in value else value
            elif key in ("title", "$defs", "discriminator") or (key == "default" and value is None):
                continue
            elif key != "required" or whole:
                made[key] = value
        return made

    return plain(generated, whole)


def _ref(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


def _first_line(error: BaseException) -> str:
    return next(iter(_lines(error)), type(error).__name__)


def _lines(error: BaseException) -> Iterable[str]:
    return (line for line in str(error).splitlines() if line.strip())
