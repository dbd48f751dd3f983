"""The command line. Only click at import: each command imports what it needs when it runs."""

from __future__ import annotations

from typing import Any

import click

import sslkit
from sslkit import cli_many, cli_plugins, cli_use, launcher, registry, telling, words
from sslkit.cli_options import leaving_out, local_code, overriding
from sslkit.errors import SslkitError, printable

ONLY_PRINT = frozenset(
    ["recipes", "runs", "list-plugins", "describe", "schema", "diff", "compare", "copy", "new-plugin"]
)
"""Commands that a reader who goes away, as `| head` does, may end: they print, or print when all else is done. Others
go on without a reader (`sslkit.telling`)."""


class Group(click.Group):
    """Turns what a user must know into lines and an exit code; never a traceback for their own mistake."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta["arguments"] = list(args)  # for processes that are started with the same
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SslkitError as error:
            telling.tell("\n".join(error.lines), error=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            telling.tell(
                "interrupted; what was saved before is untouched, and the same command goes on from it", error=True
            )
            ctx.exit(130)
        except (click.exceptions.Exit, click.ClickException):
            raise
        except Exception as error:
            if isinstance(error, BrokenPipeError) and ctx.invoked_subcommand in ONLY_PRINT:
                ctx.exit(0)
            telling.tell(_unexpected(error), error=True)
            ctx.exit(1)
        finally:
            telling.finish()


def _unexpected(error: Exception) -> str:
    import tempfile
    import traceback

    with tempfile.NamedTemporaryFile("w", prefix="sslkit-", suffix=".txt", delete=False, encoding="utf-8") as file:
        file.write(traceback.format_exc())
    first = printable(str(error).strip().partition("\n")[0])
    return f"{type(error).__name__}: {first} (unexpected; the traceback is in {file.name})"


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(sslkit.__version__, prog_name="sslkit")
@click.option("--no-plugin", multiple=True, metavar="DIST", help="As the commands have it.")
@click.pass_context
def main(ctx: click.Context, no_plugin: tuple[str, ...]) -> None:
    """Self-supervised learning of image representations: a method is a recipe of plugins."""
    ctx.with_resource(words.speaking(words.COMMAND))
    ctx.with_resource(registry.without(no_plugin))


for _command in (*cli_use.COMMANDS, *cli_many.COMMANDS, *cli_plugins.COMMANDS):
    main.add_command(_command)


@main.command()
@click.argument("recipe")
@overriding
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    help="Stop after this many optimizer steps, with a checkpoint; repeat with more to go on.",
)
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where to train."
)
@click.option("--run-dir", type=click.Path(), help="Directory of the run.  [default: runs/NAME]")
@click.option(
    "--resume",
    type=click.Choice(["auto", "never"]),
    default="auto",
    show_default=True,
    help="Go on with the run in the directory, or always begin a new one beside it.",
)
@click.option("--fork", is_flag=False, flag_value="", metavar="[RUN]", help="Begin a new run with the weights of one.")
@click.option("--strict", is_flag=True, help="Refuse what is otherwise only warned of before training.")
@click.option(
    "--stop-on",
    type=click.Choice(["error", "warning"]),
    help="End the run, with a checkpoint, when the doctor finds something as grave as this.",
)
@click.option("--nproc", type=click.IntRange(min=1), default=1, help="Processes to train in: one for each GPU.")
@click.option("--dry-run", is_flag=True, help="Show what would be trained, with a few measured steps; writes no run.")
@local_code
@leaving_out
@click.pass_context
def train(
    ctx: click.Context,
    recipe: str,
    overrides: tuple[str, ...],
    steps: int | None,
    device: str,
    run_dir: str | None,
    resume: Any,
    fork: str | None,
    strict: bool,
    stop_on: Any,
    nproc: int,
    dry_run: bool,
) -> None:
    """Train RECIPE, or go on where it was stopped.

    RECIPE is a path, or the name of a shipped recipe (see `sslkit recipes`). Exit codes: 0 done, 1 the run failed, 2
    something to mend, 130 interrupted.
    """
    from sslkit.recipe import read_recipe

    if (code := launcher.left()) is not None:
        ctx.exit(code)
    read_recipe(recipe, overrides)  # mistakes are told before torch is imported, which takes seconds
    if dry_run:
        from sslkit.plan import show_plan

        if nproc > 1:
            raise click.UsageError("--dry-run measures one process; leave --nproc out")
        show_plan(recipe, overrides, device=device, fork=fork)
        return
    if nproc > 1:
        ctx.exit(launcher.launch(nproc, launcher.without_option(ctx.meta["arguments"], "--nproc")))
    from sslkit import launch

    ctx.exit(
        launch.train(
            recipe, overrides, steps=steps, device=device, run_dir=run_dir, resume=resume, fork=fork,
            strict=strict, stop_on=stop_on,
        )
    )  # fmt: skip


@main.command()
@click.argument("recipe")
@overriding
@click.option("--strict", is_flag=True, help="Exit with 2 where there are warnings, too.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@local_code
@leaving_out
@click.pass_context
def check(ctx: click.Context, recipe: str, overrides: tuple[str, ...], strict: bool, as_json: bool) -> None:
    """Say what is wrong with RECIPE, before it trains.

    It builds every part of the recipe and tries it out: views, target, loss, optimizer, schedules. `train` does the
    same when it begins. Exit codes: 0 nothing, 1 warnings, 2 errors.
    """
    from sslkit.recipe import read_recipe

    read_recipe(recipe, overrides)  # mistakes are told before torch is imported
    from sslkit import checkup

    ctx.exit(checkup.check(recipe, overrides, strict=strict, as_json=as_json))


@main.command("doctor")
@click.argument("run", type=click.Path(), required=False)
@click.option("--csv", "log", type=click.Path(), metavar="LOG", help="A log of another program; - is standard input.")
@click.option("--epochs", type=click.IntRange(min=1), help="With --csv: epochs of the whole run.")
@click.option("--steps-per-epoch", type=click.IntRange(min=1), help="With --csv: optimizer steps of an epoch.")
@click.option(
    "--tau-base", type=click.FloatRange(0, 1), help="With --csv: the tau that the target starts with, as .996."
)
@click.option("--tau-formula", metavar="TEXT", help="With --csv: how tau is computed, as the script has it; never run.")
@click.option("--views", type=click.Choice(["identical", "augmented"]), help="With --csv: what both views are.")
@click.option("--loss", type=click.Choice(["byol", "simsiam", "other"]), help="With --csv: the loss.")
@click.option("--optimizer", help="With --csv: its name, as adam.")
@click.option("--lr", type=float, help="With --csv: its largest learning rate.")
@click.option("--batch-size", type=click.IntRange(min=1), help="With --csv: images of a step.")
@click.option("--image-size", type=click.IntRange(min=1), help="With --csv: side of the images, in pixels.")
@click.option("--stem", type=click.Choice(["large", "small"]), help="With --csv: 7x7/2 and max-pool, or 3x3/1.")
@click.option("--labels/--no-labels", default=None, help="With --csv: whether the images have labels.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@leaving_out
@click.pass_context
def examine(ctx: click.Context, /, run: str | None, log: str | None, as_json: bool, **known: Any) -> None:
    """Say in words how a run is doing, while it trains or after.

    RUN is a run directory, or one that `sslkit.watch` writes. With --csv, LOG is what another program printed: a CSV,
    a column of losses, or lines such as "Epoch: 4 loss: 0.0054". Exit codes: 0 healthy, 1 warnings, 2 errors.
    """
    from sslkit.errors import UserError

    given = [f"--{name.replace('_', '-')}" for name, value in known.items() if value is not None]
    if (run is None) == (log is None):
        raise UserError("give a run directory, or the log of another program with --csv")
    if run is not None:
        if given:
            raise UserError(f"{', '.join(given)}: only with --csv; a run directory knows this by itself")
        from sslkit import checkup

        ctx.exit(checkup.examine(run, as_json=as_json))
    from sslkit.foreign import csv_run

    found = csv_run.examine(str(log), csv_run.Known(**known))
    telling.tell(found.as_json() if as_json else found.text())
    ctx.exit(found.exit_code)


@main.command()
@click.argument("run", type=click.Path())
@click.option("--out", type=click.Path(), help="The page; overwritten.  [default: report.html in the run's directory]")
@click.option("--watch", is_flag=True, help="Write it again and again while the run trains; the page reloads itself.")
@local_code
@leaving_out
def report(run: str, out: str | None, watch: bool) -> None:
    """Write RUN's page: verdict, figures, curves, views, neighbours, the recipe and what the run depended on.

    RUN is a run directory, also of a run that is going on. `train` writes the page when it ends. It needs no network.
    """
    from sslkit.report import show

    show(run, out, watch=5.0 if watch else None)


@main.command("replay")
@click.argument("run", type=click.Path())
@click.option("--step", type=click.IntRange(min=1), required=True, help="The update, counted from 1.")
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where; auto is that of the run, where there is one.",
)
@click.option("--modules", is_flag=True, help="Show what every module was given and gave.")
@click.option("--save-views", type=click.Path(), metavar="FILE", help="Draw the batch's views into a picture.")
@click.option("--json", "as_json", is_flag=True, help="As JSON: with every module, and the whole batch.")
@local_code
@leaving_out
@click.pass_context
def replay_step(ctx: click.Context, /, run: str, **how: Any) -> None:
    """Make one update of RUN again and say where its numbers first are not finite.

    It trains on in memory from the newest checkpoint before that update, and compares the loss with what was recorded.
    RUN is a run directory; it is only read. Exit codes: 0 all finite, 1 not, 2 something to mend.
    """
    from sslkit.replaying import show

    ctx.exit(show(run, **how))


@main.command("views")
@click.argument("recipe")
@overriding
@click.option("-o", "--out", type=click.Path(), default="views.png", show_default=True, help="The picture.")
@click.option("--images", type=int, default=6, show_default=True, help="How many images.")
@local_code
@leaving_out
def show_views(recipe: str, overrides: tuple[str, ...], out: str, images: int) -> None:
    """Draw a few images and the views that RECIPE makes of them.

    Under each view stands what was drawn for it; identical views are marked. `train` writes views.png into every run's
    directory.
    """
    from sslkit.recipe import read_recipe

    read_recipe(recipe, overrides)  # mistakes are told before torch is imported
    from sslkit import view_grid
    from sslkit.preparation import placed

    with placed(recipe, overrides):
        view_grid.show(recipe, overrides, out, images)


@main.command()
def recipes() -> None:
    """List the recipes that come with sslkit."""
    from sslkit.sources import shipped

    for name, path in shipped().items():
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        click.echo(f"{name:24} {first.lstrip('# ')}")


@main.command()
@click.argument("a")
@click.argument("b")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@local_code
@leaving_out
def diff(a: str, b: str, as_json: bool) -> None:
    """Show where two recipes differ, component by component.

    A and B are recipes, by path or shipped name, or directories of runs. They are compared with all defaults spelt out.
    Exit codes: 0 whether they differ or not, 2 something to mend.
    """
    from sslkit.diff import show_diff

    show_diff(a, b, as_json=as_json)


@main.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path())
@click.option("--out", type=click.Path(), default="compare.html", show_default=True, help="The page; overwritten.")
@click.option("--group", is_flag=True, help="Draw runs that differ in their seed alone as one, with mean and spread.")
@local_code
@leaving_out
def compare(runs: tuple[str, ...], out: str, group: bool) -> None:
    """Draw loss, kNN, rank and tau of several runs over each other, as one HTML page.

    RUN is a run directory, also of a run that is going on, or a folder of runs. The page shows in which options the
    recipes differ, and says which figures do not compare. It needs no network.
    """
    from sslkit.compare import compare as write

    write(runs, out, group=group)


@main.command()
@click.argument("name")
@click.argument("to", required=False, type=click.Path())
def copy(name: str, to: str | None) -> None:
    """Write the shipped recipe NAME to a file, to be edited.  [default: NAME.toml]"""
    from pathlib import Path

    from sslkit.errors import UserError
    from sslkit.sources import is_path, locate, read, renamed, without_schema

    if is_path(name):
        raise UserError(f"{name}: is a path; this copies recipes that come with sslkit, by name (see `sslkit recipes`)")
    source, target = locate(name), Path(to or f"{name}.toml")
    try:
        with target.open("x", encoding="utf-8") as file:
            # The run directory is named after the recipe: a copy under another name trains in another one.
            file.write(renamed(without_schema(read(source)), target.stem))
    except FileExistsError:
        raise UserError(f"{target}: is there already and was left alone; give another path") from None
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror}") from None
    click.echo(f"{target}: edit it, then: sslkit train {target if '/' in str(target) else './' + str(target)}")
