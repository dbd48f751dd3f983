"""The commands about what is installed. Only click at import: each imports what it needs when it runs."""

from __future__ import annotations

from typing import Any

import click

from sslkit.cli_options import leaving_out, local_code
from sslkit.registry import KINDS, RULE


@click.command("list-plugins")
@click.option("--kind", type=click.Choice([*KINDS, RULE]), help="Only this kind; health rules are listed only so.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.option(
    "--check",
    is_flag=True,
    help="Import each one too; exit code 2 if one is broken.",
)
@leaving_out
@click.pass_context
def list_plugins(ctx: click.Context, kind: str | None, as_json: bool, check: bool) -> None:
    """List every installed component; imports none of them."""
    from sslkit.describe import list_components

    ctx.exit(list_components(kind, as_json=as_json, check=check))


@click.command()
@click.argument("component", metavar="KIND.NAME")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@local_code
@leaving_out
def describe(component: str, as_json: bool) -> None:
    """Show a component's options: types, defaults, help, and where it comes from."""
    from sslkit.describe import describe_component

    describe_component(component, as_json=as_json)


@click.command("check-plugin")
@click.argument("component", metavar="KIND.NAME")
@click.option(
    "--set", "overrides", multiple=True, metavar="OPTION=VALUE", help="Give an option, as out_dim=8; repeatable."
)
@click.option("--image-size", type=click.IntRange(min=1), default=32, show_default=True, help="Side of the images.")
@click.option("--channels", type=click.IntRange(min=1), default=3, show_default=True, help="Their channels.")
@click.option("--fast", is_flag=True, help="Leave out what takes seconds: compiling, and two processes.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@local_code
@leaving_out
@click.pass_context
def check_plugin(ctx: click.Context, /, component: str, overrides: tuple[str, ...], **how: Any) -> None:
    """Try out whether an installed component does what its kind has to, and say what to change.

    What does not apply to it is not shown. Exit codes: 0 all passed, 1 a check failed, 2 something to mend.
    """
    from sslkit.testing.command import check_plugin as run

    ctx.exit(run(component, overrides, **how))


@click.command("new-plugin")
@click.argument("name")
@click.option("--kind", type=click.Choice(KINDS), required=True, help="What it is.")
@click.option("--into", type=click.Path(), default=".", show_default=True, help="Folder that NAME/ is made in.")
def write_plugin(name: str, kind: str, into: str) -> None:
    """Write NAME/, a package with a component of your own that installs, trains and is tested as it stands."""
    from sslkit.scaffold import new_plugin

    new_plugin(name, kind, into)


@click.command()
@click.option("-o", "--out", type=click.Path(), help="The file; overwritten.  [default: standard output]")
@leaving_out
def schema(out: str | None) -> None:
    """Write the JSON Schema of recipes, for editors: every installed component with its options, defaults and help."""
    from sslkit.schema import write_schema

    write_schema(out)


COMMANDS = (list_plugins, describe, check_plugin, write_plugin, schema)
