"""The commands for what comes before and after training. Only click at import: each imports what it needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sslkit.cli_options import branch, checkpoint, device, leaving_out, local_code


@click.command()
@click.argument("folder", type=click.Path())
@click.option("-o", "--out", type=click.Path(), help="The recipe; never overwritten.  [default: NAME.toml]")
@click.option("--name", help="Name of the recipe and of its runs.  [default: the folder's]")
@click.option("--method", default="byol", show_default=True, help="A shipped method: simsiam, simclr, vicreg, ...")
@click.option("--size", type=click.IntRange(min=8), help="Side of the views in pixels.  [default: by the images]")
@click.option(
    "--hours",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="How long the training may take on this machine.",
)
@device
@click.option("--look", type=click.IntRange(min=0), default=0, help="Files to decode; 0 is all, up to 20,000.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@leaving_out
def init(folder: str, **how: Any) -> None:
    """Look at the images in FOLDER and write a recipe that fits them and this machine.

    Each choice is explained in a comment beside it. Labels are not needed.
    """
    from sslkit.suggesting import init as run

    run(folder, **how)


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path())
@click.option(
    "--protocol",
    "protocols",
    multiple=True,
    type=click.Choice(["knn", "linear", "linear_sgd", "finetune", "patches"]),
    help="What to measure; repeatable.  [default: knn and linear]",
)
@branch
@checkpoint
@click.option("--k", type=click.IntRange(min=1), help="knn: neighbours that vote.  [default: as the run's own kNN]")
@click.option(
    "--temperature",
    type=click.FloatRange(min=0, min_open=True),
    help="knn: of the weights exp(cosine / temperature).  [default: as the run's own kNN]",
)
@click.option("--bank", type=click.IntRange(min=0), help="knn, patches: training images in kNN's bank.  [default: all]")
@click.option("--queries", type=click.IntRange(min=0), default=0, help="Test images, of every protocol; 0 is all.")
@click.option(
    "--layer",
    type=click.Choice(["backbone", "projection"]),
    default="backbone",
    show_default=True,
    help="Whose output the features are.",
)
@click.option("--labels", help="finetune: percentages of the labels.  [default: 1,10,100]")
@click.option("--epochs", type=click.IntRange(min=1), help="linear_sgd, finetune: epochs.  [default: the protocol's]")
@click.option("--patches", type=click.IntRange(min=1), help="patches: views per image.  [default: 16]")
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    help="All but knn: repeat what is drawn at random (splits, batches) so often: mean and spread.  [default: 1]",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Evaluate on other data, as data_source.root=photos; keys of data_source alone; repeatable.",
)
@device
@click.option("--no-floor", is_flag=True, help="Leave out the random network and raw pixels.")
@click.option("--no-cache", is_flag=True, help="Compute features anew, and keep none.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.option("--markdown", is_flag=True, help="Print the line of Markdown alone.")
@local_code
@leaving_out
def evaluate(runs: tuple[str, ...], **how: Any) -> None:
    """Measure what RUN's features are worth, by protocols that say all they depend on.

    The figures of the random network and of raw pixels stand beside each. They are written to evaluation.json in the
    run's directory and into its report. Several runs of one recipe give mean and spread.
    """
    from sslkit.evaluation import command

    command(runs, **how)


@click.command()
@click.argument("run", type=click.Path())
@click.option("--to", type=click.Path(), help="Folder to write.  [default: export in the run's directory]")
@click.option(
    "--format",
    "formats",
    multiple=True,
    type=click.Choice(["timm", "torch", "onnx"]),
    help="timm: safetensors with a configuration and a model card; torch: torch.export; onnx; repeatable.  "
    "[default: timm]",
)
@branch
@checkpoint
@click.option("--size", type=click.IntRange(min=1), help="torch, onnx: side of the images.  [default: the run's]")
@click.option("--name", help="Name in the model card.  [default: the run's]")
@click.option("--licence", metavar="SPDX", help="Licence in the model card, as apache-2.0.")
@click.option("--opset", type=click.IntRange(min=1), help="onnx: version of the operator set.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@local_code
@leaving_out
def export(run: str, **how: Any) -> None:
    """Write RUN's encoder for use without sslkit, and check that what was written gives the same features."""
    from sslkit.exporting import command

    command(run, **how)


@click.command()
@click.argument("run", type=click.Path())
@click.argument("folder", type=click.Path())
@click.option("-o", "--out", type=click.Path(), required=True, help="The Parquet file.")
@branch
@checkpoint
@click.option("--batch", type=click.IntRange(min=1), default=256, show_default=True, help="Images at a time.")
@click.option("--workers", type=click.IntRange(min=1), help="Threads that decode.  [default: one per core]")
@click.option("--restart", is_flag=True, help="Begin anew, whatever features the output or its parts hold.")
@device
@local_code
@leaving_out
def embed(run: str, folder: str, **how: Any) -> None:
    """Write the features of all images below FOLDER, with their paths. Stopped, the same command goes on."""
    from sslkit.embedding import command

    command(run, folder, **how)


@click.command()
@click.argument("run", type=click.Path())
@click.argument("queries", nargs=-1, metavar="QUERY...", type=click.Path())
@click.argument("folder", type=click.Path())
@click.option("-o", "--out", type=click.Path(), default="search.html", show_default=True, help="The page; overwritten.")
@click.option("--neighbours", type=click.IntRange(min=1), default=24, show_default=True, help="Images shown per query.")
@branch
@checkpoint
@device
@click.option("--json", "as_json", is_flag=True, help="Paths and cosines as JSON, and no page.")
@local_code
@leaving_out
@click.pass_context
def search(ctx: click.Context, /, run: str, queries: tuple[str, ...], folder: str, **how: Any) -> None:
    """Show the images below FOLDER that are nearest to each QUERY, an image file, as one HTML page."""
    from sslkit.searching import command

    if not queries:
        raise click.UsageError(f"Missing argument '{'FOLDER' if Path(folder).is_file() else 'QUERY...'}'.", ctx)
    command(run, queries, folder, **how)


COMMANDS = (init, evaluate, export, embed, search)
