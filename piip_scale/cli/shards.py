"""``piip-scale shards``: packed data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from piip_scale.cli.pack import app as pack_app
from piip_scale.cli.pack_options import echo_targets
from piip_scale.cli.progress import progress_bar
from piip_scale.data.set_kinds import SET_KINDS
from piip_scale.text import printable

app = typer.Typer(no_args_is_help=True, help="Pack data sets into shards that stream, check them, look at them.")
Location = Annotated[
    str, typer.Argument(help="Packed shards: a folder, http(s)://, s3://, gs://, or pipe:COMMAND with {name} in it.")
]
MaxPixels = Annotated[int | None, typer.Option(min=1, help="Refuse sets with larger images; default: 500 million.")]
app.add_typer(pack_app, name="pack")


@app.command()
def verify(
    location: Location,
    other: Annotated[str | None, typer.Option(help="A set that must not share images, such as validation's.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that read; default: all cores.")] = None,
    max_pixels: MaxPixels = None,
) -> None:
    """Read a packed set to the last byte: checksums, images, labels, label maps, boxes and masks.

    One that is not in a folder is fetched anew for that, shard by shard.

    Prints one line a problem and ends with exit code 1 if there are any.

    Example: `piip-scale shards verify shards/train --other shards/val`
    """
    from piip_scale.data.packing.verify import verify_shards

    with progress_bar(f"reading {location}") as on_progress:
        report = verify_shards(location, other=other, workers=workers, on_progress=on_progress, max_pixels=max_pixels)
    for line in report.problems:
        typer.echo(printable(line))
    for here, there in report.shared_images:
        typer.echo(printable(f"{here} is the same image as {there} in {other}"))
    faults = len(report.problems) + len(report.shared_images)
    echo_targets(report.kind, report.classes, report.targets)
    targets = f"{report.num_targets} {SET_KINDS[report.kind].targets}"
    typer.echo(f"{printable(location)}: {report.num_samples} images, {targets}, {faults} problems")
    raise typer.Exit(int(faults > 0))


@app.command()
def show(
    location: Location,
    out: Annotated[Path | None, typer.Option(help="Draw a contact sheet there (.png).")] = None,
    num_images: Annotated[int, typer.Option(min=1, help="Images on the sheet, spread evenly over the set.")] = 12,
    max_pixels: MaxPixels = None,
) -> None:
    """Summarise a packed set, and draw some of it with its boxes and masks, label maps or class names.

    Example: `piip-scale shards show shards/train --out train.png`
    """
    from rich.console import Console

    from piip_scale.cli.contact import draw_contact_sheet, summary_table
    from piip_scale.data.reading.shards import ShardSet

    shards = ShardSet.open(location, max_pixels=max_pixels)
    Console().print(summary_table(shards))
    echo_targets(shards.manifest.kind, shards.classes, shards.manifest.targets)
    if out is not None:
        draw_contact_sheet(shards, out, num_images)
        typer.echo(f"picture: {out}")
