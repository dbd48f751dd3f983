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
