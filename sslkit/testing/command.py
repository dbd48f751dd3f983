"""`sslkit check-plugin`: the checks of one installed component, a line each."""

from __future__ import annotations

import json
import textwrap
import tomllib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pydantic import ValidationError

from sslkit import registry, testing
from sslkit.api import Component
from sslkit.describe import as_toml
from sslkit.errors import UserError, did_you_mean
from sslkit.telling import tell
from sslkit.testing.core import CheckResult, attempt


def check_plugin(
    key: str, overrides: Sequence[str], *, image_size: int, channels: int, fast: bool, as_json: bool
) -> int:
    """Check a component, and print how each check ended.

    Args:
        key: `KIND.NAME`.
        overrides: `option=value` each, the values as TOML has them.
        image_size: Side of the images of the run that it is tried in.
        channels: Their channels.
        fast: Leave out the checks that take seconds.
        as_json: Print a list of results instead of lines.

    Returns:
        The exit code: 1 if a check failed.

    Raises:
        UserError: there is no such component, or the options do not fit it.
    """
    component = _component(key, overrides)
    bench = testing.bench_of(component, testing.run_info(image_size, channels))
    results: list[CheckResult] = []
    if not as_json:
        provider = registry.find(component.kind, registry.name_of(type(component)))
        options = component.model_dump(mode="json", exclude_unset=True)
        given = ", ".join(f"{name} = {as_toml(value)}" for name, value in options.items() if name != "use")
        tell(f"{key} from {provider.origin}" + (f", with {given}" if given else ""))
    width = max(len(one.name) for one in testing.checks(component.kind))
    for one in testing.checks(component.kind):
        if one.slow and fast:
            continue
        result = attempt(one, bench)
        results.append(result)
        if as_json:
            continue
        if result.status == "ok":
            tell(f"ok      {one.name:{width}}  {one.what}")
        elif result.status == "failed":
            tell(f"FAILED  {one.name:{width}}  {one.what}")
            tell(
                textwrap.fill(
                    result.message,
                    110,
                    initial_indent=" " * 8,
                    subsequent_indent=" " * 8,
                    break_long_words=False,
                    break_on_hyphens=False,
                )
            )
    failed = [r.check for r in results if r.status == "failed"]
    if as_json:
        tell(json.dumps([asdict(r) for r in results], indent=1))
    else:
        tell(summary(key, results))
    return 1 if failed else 0


def summary(key: str, results: Sequence[CheckResult]) -> str:
    """The last line: how many passed, and what failed."""
    applied = [r for r in results if r.status != "not applicable"]
    failed = [r.check for r in results if r.status == "failed"]
    if failed:
        return f"{key}: {len(failed)} of {len(applied)} checks failed: {', '.join(failed)}"
    return f"{key}: all {len(applied)} checks passed, in {sum(r.seconds for r in results):.1f} s"


def _component(key: str, overrides: Sequence[str]) -> Component:
    kind, _, name = key.partition(".")
    if kind not in registry.KINDS or not name:
        raise UserError(
            f"{key}: should read KIND.NAME, such as loss.cosine{did_you_mean(kind, registry.KINDS)}; kinds: "
            + ", ".join(registry.KINDS)
        )
    cls: Any = registry.load(kind, name)
    try:
        component: Component = cls.model_validate_json(json.dumps(_table(overrides)))
    except ValidationError as error:
        raise UserError(*(_line(key, cls, problem) for problem in error.errors())) from None
    return component


def _table(overrides: Sequence[str]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for override in overrides:
        option, equals, text = override.partition("=")
        if not equals or not option:
            raise UserError(f"--set {override}: should read OPTION=VALUE, such as --set out_dim=8")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text  # as elsewhere, what is no TOML is text: --set model=resnet18
        *path, last = option.split(".")
        inner = table
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return table


def _line(key: str, cls: type[Component], problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    name = str(problem["loc"][0]) if problem["loc"] else ""
    if problem["type"] == "missing":
        return f"{key}: {where}: is required; give it: --set {where}=VALUE (see `sslkit describe {key}`)"
    if problem["type"] == "extra_forbidden":
        return f"{key}: {where}: unknown option{did_you_mean(name, cls.model_fields)}; see `sslkit describe {key}`"
    return f"{key}: {where + ': ' if where else ''}{problem['msg']}"
