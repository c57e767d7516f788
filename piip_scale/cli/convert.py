"""``piip-scale convert``: from a sharded checkpoint, whoever's trainer wrote it, to safetensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from piip_scale.cli.options import Averages
from piip_scale.cli.progress import progress_bar
from piip_scale.errors import ConfigError

if TYPE_CHECKING:
    from piip_scale.checkpoint.convert import ConvertReport
    from piip_scale.checkpoint.left_out import Given

_MB = 10**6


def register(app: typer.Typer) -> None:
    """Adds this module's command."""
    app.command()(convert)


def convert(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="A run directory, its checkpoints/, or one of them; a folder that DeepSpeed, Lightning, Accelerate, "
            "Hugging Face's Trainer or mmengine wrote, its tag, or one above; or an mp_rank_00_model_states.pt alone."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The .safetensors file to write; with --max-shard-gb a folder.")],
    dtype: Annotated[Literal["fp32", "bf16", "fp16"], typer.Option(help="Of the weights written.")] = "fp32",
    max_shard_gb: Annotated[float | None, typer.Option(help="Split into files of at most this size.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT where it exists.")] = False,
    ema: Averages = False,
    strip: Annotated[
        list[str] | None,
        typer.Option(metavar="PREFIX", help="Take a prefix off the names that have it, as `_forward_module.`"),
    ] = None,
    rename: Annotated[
        list[str] | None, typer.Option(metavar="OLD=NEW", help="Put another prefix in its place; after --strip.")
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CLASS",
            help="Pass over records of a class that the files hold beside the weights, as `argparse.Namespace`.",
        ),
    ] = None,
    keep_lora: Annotated[
        bool, typer.Option("--keep-lora", help="Write low-rank additions beside the weights, not merged into them.")
    ] = False,
    pretrained: Annotated[
        list[Path] | None,
        typer.Option(
            help="Where a file is now that holds frozen weights which the checkpoint leaves out; known by its checksum."
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Check every file of the checkpoint first, and compare what was written with it last."
        ),
    ] = False,
) -> None:
    """Gather a sharded training checkpoint into safetensors, with a manifest of checksums beside it.

    Any checkpoint of DeepSpeed 0.8 or newer: ZeRO 0 to 3, fp32, bf16 or fp16, any number of ranks. Only what is written
    is read, each byte held against the checksum in its file; a checkpoint larger than the memory converts too. Needs no
    GPU, and neither torch nor DeepSpeed are loaded. Nothing has OUT's name before it is whole: killed, run it again.

    Example: `piip-scale convert runs/mine mine.safetensors`
    """
    from piip_scale.checkpoint.convert import ConvertOptions
    from piip_scale.checkpoint.convert import convert as convert_checkpoint
    from piip_scale.checkpoint.renaming import Renaming

    options = ConvertOptions(
        dtype=dtype,
        max_shard_gb=max_shard_gb,
        overwrite=overwrite,
        averaged=ema,
        renaming=Renaming(tuple(strip or ()), tuple(map(_pair, rename or ()))),
        allowed=tuple(allow or ()),
        merge_lora=not keep_lora,
        given=_reader(checkpoint, pretrained or []),
        verify=verify,
    )
    with progress_bar("converting") as on_progress:
        report = convert_checkpoint(checkpoint, out, options, on_progress)
    typer.echo(_closing_line(out, report, verify))
    for note in report.notes:
        typer.echo(note, err=True)


def _reader(checkpoint: Path, places: Sequence[Path]) -> Given | None:
    """Of frozen weights that a checkpoint leaves out; torch is loaded only where there are some."""
    from piip_scale.checkpoint.left_out import left_out_of
    from piip_scale.checkpoint.origin import trained_config
    from piip_scale.checkpoint.store import find_checkpoint

    found = find_checkpoint(checkpoint)
    record = left_out_of(found) if found else {}
    if found is None or not record:
        if places:
            raise ConfigError("--pretrained", value=str(places[0]), rule="the checkpoint holds all of its weights")
        return None
    from piip_scale.models.frozen_files import moved, reader_of

    return reader_of(moved(trained_config(found).model, record, places))


def _pair(text: str) -> tuple[str, str]:
    old, equals, new = text.partition("=")
    if not old or not equals:
        raise ConfigError("--rename", value=text, rule="a prefix and what takes its place, as in backbone.=network.")
    return old, new


def _closing_line(out: Path, report: ConvertReport, verified: bool) -> str:
    megabytes = report.num_bytes / _MB
    return (
        f"{out}: step {report.step}, {report.num_parameters:,} parameters of ZeRO stage {report.stage} on "
        f"{report.num_ranks} rank{'s' if report.num_ranks != 1 else ''}, {megabytes:.1f} MB in {report.seconds:.1f} s "
        f"({megabytes / report.seconds:.0f} MB/s, {report.disk_seconds:.1f} s of it waiting for the disk)"
        f"{', compared with what was written' if verified else ''}"
    )
