"""The commands about several runs. Only click at import: each imports what it needs when it runs."""

from __future__ import annotations

from typing import Any

import click

from sslkit.cli_options import device, leaving_out, local_code, overriding


@click.command()
@click.argument("recipe")
@click.option("--grid", multiple=True, metavar="KEY=V1,V2", help="Values of an option; repeated, all combinations.")
@click.option("--seeds", type=click.IntRange(min=1), default=1, show_default=True, help="Runs of each combination.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Runs at a time.")
@overriding
@click.option("--dir", "folder", type=click.Path(), help="Folder of the runs.  [default: runs/NAME-sweep]")
@click.option("--steps", type=click.IntRange(min=1), help="Stop each run after so many optimizer steps.")
@device
@click.option(
    "--search",
    "spaces",
    multiple=True,
    metavar="KEY=LOW..HIGH[:log]",
    help="Let Optuna look for the best value of an option; repeatable. Needs `sslkit[optuna]`.",
)
@click.option("--trials", type=click.IntRange(min=1), help="With --search: how many runs.")
@click.option(
    "--by",
    type=click.Choice(["knn_held_out", "lidar"]),
    help="With --search: what to maximise.  [default: knn_held_out with labels, else lidar]",
)
@click.option("--dry-run", is_flag=True, help="Show the runs; trains nothing.")
@local_code
@leaving_out
@click.pass_context
def sweep(ctx: click.Context, /, recipe: str, **how: Any) -> None:
    """Train RECIPE with several values of its options, each in a directory of its own.

    Repeated, the same command skips runs that are done and goes on with the others. Exit codes: 0 all done, 1 a run
    failed, 2 something to mend, 130 interrupted.
    """
    from sslkit.sweeping import command

    ctx.exit(command(recipe, **how))


@click.command("runs")
@click.argument("folder", type=click.Path(), default="runs")
@click.option(
    "--sort",
    type=click.Choice(["name", "knn", "age", "status"]),
    default="name",
    show_default=True,
    help="Order of the rows.",
)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def list_runs(folder: str, sort: str, as_json: bool) -> None:
    """List the runs below FOLDER: status, step, verdict, kNN and age."""
    from sslkit.run_list import show

    show(folder, sort=sort, as_json=as_json)


COMMANDS = (sweep, list_runs)
