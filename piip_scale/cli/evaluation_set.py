"""The set that an evaluation is of, where it is not packed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from piip_scale.errors import DataError
from piip_scale.registry import row_of

if TYPE_CHECKING:
    from piip_scale.config import RunConfig
    from piip_scale.data.packing.packing import PackOptions, PackSource
    from piip_scale.data.reading.sample_set import SampleSet


@dataclass(frozen=True)
class SetOptions:
    """A set as its source has it; without any path, the config's own shards.

    Attributes:
        coco: A COCO file, of images in ``images``.
        voc: A folder of Pascal VOC annotations, likewise.
        label_maps: A folder of label maps, likewise.
        image_folders: A folder with a folder of images for each class.
        images: The folder of images.
        reduce_zero_label: 0 is no class of label maps.
        skip_broken: Annotations and images that cannot be used are left out where packing would leave them out.
    """

    coco: Path | None = None
    voc: Path | None = None
    label_maps: Path | None = None
    image_folders: Path | None = None
    images: Path | None = None
    reduce_zero_label: bool = False
    skip_broken: bool = False

    @property
    def given(self) -> dict[str, Path]:
        """The sources that are named, by their options."""
        named = {"--coco": self.coco, "--voc": self.voc, "--label-maps": self.label_maps}
        named["--image-folders"] = self.image_folders
        return {option: path for option, path in named.items() if path is not None}

    def check(self, shards: str | None, *, of_results: bool = False) -> None:
        """Refuses options that contradict each other.

        Args:
            shards: Of the set, where they are named.
            of_results: Results are scored, which needs no images.

        Raises:
            DataError: They do.
        """
        options = [*self.given, *(["--shards"] if shards is not None else [])]
        if len(options) > 1:
            raise DataError("the set to evaluate on", value=" ".join(options), rule="it is one", fix="name one of them")
        if of_results:
            self._check_for_results(options)
            return
        needs_images = self.given and self.image_folders is None
        if needs_images and self.images is None:
            raise DataError(f"{options[0]} comes without images", fix="name the folder of its images with --images")
        if not needs_images and self.images is not None:
            raise DataError("--images", value=str(self.images), rule="it goes with --coco, --voc or --label-maps")

    def _check_for_results(self, options: list[str]) -> None:
        if any(option not in ("--coco", "--shards") for option in options):
            raise DataError("--results", value=options[0], rule="results are scored against --coco FILE or --shards")

    def open(self, config: RunConfig) -> SampleSet:
        """The set, ready to be read. Not collective.

        Args:
            config: The run; where it names classes, they are the set's.

        Raises:
            DataError: Something in the source is wrong, or it is for another task or of other classes; likewise of
                shards.
        """
        from piip_scale.data.packing.packing import PackOptions
        from piip_scale.data.packing.unpacked import UnpackedSet
        from piip_scale.data.reading.shards import ShardSet

        data, kind = config.data, row_of(config.task).set_kind
        if not self.given:
            return ShardSet.open(data.val_shards, data.classes, kind, data.cache, data.max_pixels)
        how = PackOptions(max_pixels=data.max_pixels, skip_broken=self.skip_broken)
        location = str(next(iter(self.given.values())))
        return UnpackedSet(self._source(data.classes, how), how, kind, location)

    def _source(self, classes: tuple[str, ...], how: PackOptions) -> PackSource:
        from piip_scale.data.packing.pack import coco_source, voc_source
        from piip_scale.data.packing.pack_classes import folder_source
        from piip_scale.data.packing.pack_maps import label_map_source

        images = self.images or Path()
        if self.coco is not None:
            return coco_source(self.coco, images, classes=classes, how=how)
        if self.voc is not None:
            return voc_source(self.voc, images, classes=classes, how=how)
        if self.label_maps is not None:
            reduces = self.reduce_zero_label
            return label_map_source(images, self.label_maps, classes=classes, reduce_zero_label=reduces, how=how)
        return folder_source(self.image_folders or Path(), classes=classes, how=how)
