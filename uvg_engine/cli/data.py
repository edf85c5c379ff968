"""`uvg data`: the embedded data set as files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from uvg_engine.cli import _options as opt
from uvg_engine.cli._files import print_json
from uvg_engine.cli._progress import Progress

data = typer.Typer(help="The embedded data set of moving handwritten digits.")


@data.callback(invoke_without_command=True)
def _group(context: typer.Context) -> None:
    """The embedded data set of moving handwritten digits."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@data.command("export")
def export(
    output: Annotated[Path, typer.Option("--output", "-o", help="A new or empty folder.")],
    split: Annotated[
        str, typer.Option(help="train or heldout: other handwriting, and combinations never trained on.")
    ] = "train",
    count: Annotated[int, typer.Option(min=1, help="Number of clips.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Other seeds, other clips.")] = 0,
    augment: Annotated[bool, typer.Option("--augment", help="Bend and turn the digits, as training does.")] = False,
    combinations: Annotated[
        str | None, typer.Option(help="seen, unseen, half or all of digit, color, direction.")
    ] = None,
    scale: Annotated[
        int | None, typer.Option(help="Pixels of the file per pixel; default: large enough to look at.")
    ] = None,
    json: opt.Json = False,
) -> None:
    """Write clips as mp4 files with a metadata.jsonl: the form that `uvg train` reads from a folder of yours."""
    from uvg_engine.training.data.export import export as write

    settings: dict[str, Any] = {"augment": augment, "combinations": combinations, "scale": scale}
    with Progress("clips", count) as bar:
        folder = write(split, count, output, seed, **settings, progress=lambda done, total: bar.advance())
    if json:
        print_json({"folder": str(folder), "split": split, "count": count, "seed": seed, **settings})
    else:
        print(f"{folder}: {count} clips and metadata.jsonl")
