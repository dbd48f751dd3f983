"""Options that several commands have. Only click at import."""

from __future__ import annotations

import click

from sslkit import local, registry

overriding = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change one option, as train.batch_size=64; repeatable.",
)

# Entered at the root, which is left however the command ends.
leaving_out = click.option(
    "--no-plugin",
    multiple=True,
    metavar="DIST",
    expose_value=False,
    callback=lambda ctx, _, names: ctx.find_root().with_resource(registry.without(names)),
    help="Leave out all that this installed distribution offers; repeatable.",
)
local_code = click.option(
    "--allow-local-code",
    is_flag=True,
    expose_value=False,
    callback=lambda ctx, _, yes: ctx.find_root().with_resource(local.allowed(yes)),
    help='Run the code of files that a recipe names, as with use = "./my_head.py:WideHead".',
)
device = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where to compute; auto is CUDA where there is a device.",
)
branch = click.option(
    "--branch",
    type=click.Choice(["evaluated", "online", "target"]),
    default="evaluated",
    show_default=True,
    help="Whose weights; `evaluated` is the branch that the run's own figures are of.",
)


def _checkpoint(ctx: click.Context, param: click.Parameter, value: str) -> str | int:
    if value in ("last", "best"):
        return value
    try:
        return int(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither 'last' nor 'best' nor the number of a step") from None


checkpoint = click.option(
    "--checkpoint",
    callback=_checkpoint,
    default="last",
    show_default=True,
    metavar="last|best|STEP",
    help="Which weights; `best` is the checkpoint with the highest kNN accuracy.",
)
