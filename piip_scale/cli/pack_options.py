"""What all commands of ``shards pack`` have in common: options, and what is printed of a finished set."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from piip_scale.cli.progress import progress_bar
from piip_scale.data.set_kinds import SET_KINDS
from piip_scale.errors import DataError
from piip_scale.text import printable

if TYPE_CHECKING:
    from piip_scale.data.packing.packing import PackOptions
    from piip_scale.data.reading.manifest import Manifest
    from piip_scale.data.reading.targets import Targets
    from piip_scale.registry import SetKind

_PANEL = "What all kinds share"
_EXIF = ("auto", "apply", "stored")


def _option(*names: str, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel=_PANEL, **settings)


@dataclass(frozen=True)
class Shared:
    """The options of every command of ``shards pack``; defaults that are ``None`` are those of ``PackOptions``."""

    class_names: Annotated[Path | None, _option(help="Text file of class names in label order, one in a line.")] = None
    classes: Annotated[
        list[str] | None,
        _option("--class", metavar="A,B", help="Class names in label order; of what the input has, take these alone."),
    ] = None
    skip_broken: Annotated[
        bool, _option("--skip-broken", help="Leave out what cannot be used; the manifest counts it.")
    ] = False
    report: Annotated[Path | None, _option(help="Write all problems of the input there, one in a line.")] = None
    exif: Annotated[
        str,
        _option(
            metavar="|".join(_EXIF),
            help="Turn images as their EXIF data say: where the size in the annotations is that of the turned image or "
            "decides nothing, always, or never.",
        ),
    ] = "auto"
    max_pixels: Annotated[int | None, _option(min=1, help="Refuse images of more pixels; default: 500 million.")] = None
    jpeg_quality: Annotated[
        int | None,
        _option(min=1, max=100, help="Compress images again where that makes them smaller; default: never."),
    ] = None
    target_mb: Annotated[float, _option(help="Size to aim at for one shard, in megabytes.")] = 256.0
    target_samples: Annotated[int | None, _option(min=1, help="Most images in one shard.")] = None
    workers: Annotated[int | None, _option(min=1, help="Processes that read and check images; default: all cores.")] = (
        None
    )
    overwrite: Annotated[bool, _option("--overwrite", help="Replace a set of another input in --out.")] = False

    def names(self) -> tuple[str, ...]:
        """The classes asked for, in label order; empty for the input's.

        Raises:
            DataError: They are named in both ways, or their file cannot be used.
        """
        from piip_scale.data.packing.pack_classes import read_class_names

        if self.classes and self.class_names is not None:
            raise DataError(
                "--class and --class-names", rule="they are two ways to name classes", fix="use one of them"
            )
        return read_class_names(self.class_names) if self.class_names is not None else tuple(self.classes or ())

    def listed_names(self) -> tuple[str, ...]:
        """As ``names``, for inputs that do not name classes themselves.

        Raises:
            DataError: As in ``names``.
        """
        from piip_scale.data.packing.door import parted_names

        return self.names() if self.class_names is not None else parted_names(self.names())

    def pack(self, source: Path, out: Path, packer: Callable[[PackOptions], Manifest]) -> None:
        """Packs under a progress bar and prints what came of it.

        Raises:
            DataError: The input is wrong; of several problems the first ones are printed before.
        """
        from piip_scale.data.packing.packing import PackOptions
        from piip_scale.data.packing.problems import MOST_SHOWN, ProblemsError

        if self.exif not in _EXIF:
            raise DataError("--exif", value=self.exif, rule=f"it is {', '.join(_EXIF)}")
        given = {name: getattr(self, name) for name in PackOptions.__dataclass_fields__ if hasattr(self, name)}
        with progress_bar(f"packing {source.name}") as on_progress:
            how = PackOptions(on_progress=on_progress, **{k: v for k, v in given.items() if v is not None})
            try:
                manifest = packer(how)
            except ProblemsError as error:
                shown, summary = error.lines[:MOST_SHOWN], error.summary
            else:
                shown, summary = (), ""
        for line in shown:
            typer.echo(f"  {line}", err=True)
        if shown:
            raise DataError(summary)
        typer.echo(f"{printable(str(out))}: {describe(manifest)}")
        echo_targets(manifest.kind, [category.name for category in manifest.categories], manifest.targets)


def with_shared(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command that takes ``shared`` one option for each field of ``Shared`` instead."""
    own, common = inspect.signature(command).parameters, fields(Shared)
    own_hints, hints = (get_type_hints(of, include_extras=True) for of in (command, Shared))
    parameters = [p.replace(annotation=own_hints[name]) for name, p in own.items() if name != "shared"]
    parameters += [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
        for f in common
    ]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        shared = Shared(**{f.name: values.pop(f.name) for f in common})
        command(**values, shared=shared)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def describe(manifest: Manifest, most_classes: int = 8) -> str:
    """One line: images, objects or labels, shards, classes."""
    names = [category.name for category in manifest.categories]
    shown = ", ".join(names[:most_classes]) + (", ..." if len(names) > most_classes else "")
    targets = SET_KINDS[manifest.kind].packed_targets + (" with masks" if manifest.has_masks else "")
    return printable(
        f"{manifest.num_samples} images, {manifest.num_annotations} {targets}, {len(manifest.shards)} shard(s), "
        f"{len(names)} class(es): {shown}"
    )


def echo_targets(kind: SetKind, classes: Sequence[str], targets: Targets | None) -> None:
    """Prints how much of a set can be trained on, what not and why."""
    from piip_scale.data.reading.targets import targets_lines

    for line in targets_lines(kind, classes, targets) if targets is not None else ():
        typer.echo(f"  {printable(line)}")
