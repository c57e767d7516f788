"""Detection and instance segmentation: a ``Task`` over packed shards."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from piip_scale.config.run import RunConfig
from piip_scale.data.batch import Batch
from piip_scale.data.shards import MANIFEST, ShardSet
from piip_scale.data.stream import DetectionLoader
from piip_scale.errors import ConfigError, DataError
from piip_scale.models.pretrained import load_pretrained
from piip_scale.tasks.coco_metric import CocoMetric
from piip_scale.world import World

if TYPE_CHECKING:
    from piip_scale.tasks.detectors import DetectionModel

MASK_KINDS = frozenset({"mask_rcnn", "cascade_mask_rcnn"})
"""Detectors that find masks."""


class DetectionTask:
    """Training and evaluating a detector: a ``Task``.

    Validation shards are opened at once, training shards when first asked for, so that evaluating needs none.

    Args:
        config: The run.
        world: This rank among all.

    Raises:
        DataError: Validation shards that are absent, damaged, or of other classes than the config's.
    """

    def __init__(self, config: RunConfig, world: World) -> None:
        self.config, self.world = config, world
        self._val_loader = self._loader(ShardSet.open(config.data.val_shards, config.data.classes))

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in label order."""
        return self._val_loader.shards.classes

    def build_model(self) -> DetectionModel:
        """The initialised detector, on the CPU in float32; branches whose config names a file start from it.

        Raises:
            ConfigError: Detector overrides that mmdet does not know.
            ModelError: Pretrained weights that are absent or do not fit their branch.
        """
        from piip_scale.tasks.detectors import build_detection_model  # mmdet takes seconds to import

        model = build_detection_model(self.config, len(self.classes))
        load_pretrained(model.backbone)
        return model

    def train_batches(self, epoch: int, first_step: int) -> Iterator[Batch]:
        """This rank's micro-batches of an epoch from a micro-step on; equally many on every rank.

        Raises:
            DataError: Shards that are absent or damaged, lack what the detector needs, or hold too few images.
        """
        return self._train_loader.batches(epoch, first_step)

    def num_train_batches(self) -> int:
        """Micro-batches of one epoch, the same on every rank."""
        return len(self._train_loader)

    def val_batches(self) -> Iterator[Batch]:
        """This rank's share of the validation set; equally many batches on every rank, the last repeat samples."""
        return self._val_loader.val_batches()

    def num_val_batches(self) -> int:
        """Batches of ``val_batches``, the same on every rank."""
        images_per_step = self.world.num_ranks * self.config.data.micro_batch_size
        return -(-len(self._val_loader.shards) // images_per_step)

    def build_metric(self) -> CocoMetric:
        """A fresh metric over the validation set; masks count where detector and set have them."""
        with_masks = self.config.detector.kind in MASK_KINDS and self._val_loader.shards.manifest.has_masks
        return CocoMetric(self._ground_truth, with_masks)

    @cached_property
    def _ground_truth(self) -> dict[str, object]:
        return self._val_loader.shards.coco_ground_truth()

    @cached_property
    def _train_loader(self) -> DetectionLoader:
        shards = ShardSet.open(self.config.data.train_shards, self.classes)
        if self.config.detector.kind in MASK_KINDS and not shards.manifest.has_masks:
            raise DataError(
                f"the shards in {shards.folder} hold boxes without masks",
                rule=f"detector.kind={self.config.detector.kind!r} trains on masks",
                fix="set detector.kind='faster_rcnn'",
            )
        return self._loader(shards)

    def _loader(self, shards: ShardSet) -> DetectionLoader:
        train = self.config.train
        return DetectionLoader(
            shards, self.config.data, seed=train.seed, world=self.world, accumulation=train.gradient_accumulation
        )


def class_names(config: RunConfig) -> tuple[str, ...]:
    """The classes of a run: as the config names them, else those of its validation or training shards.

    Raises:
        ConfigError: The config names none, and no shards are there to tell.
        DataError: The shards are damaged.
    """
    if classes := told_classes(config):
        return classes
    raise ConfigError(
        "config key data.classes is empty, and the run's shards are not there to tell",
        value=config.data.val_shards,
        fix="set data.classes to the names in label order, or use the config of the run directory",
    )


def told_classes(config: RunConfig) -> tuple[str, ...]:
    """The classes of a run: as the config names them, else those of its shards; empty where neither tells.

    Raises:
        DataError: The shards are damaged.
    """
    if config.data.classes:
        return config.data.classes
    for folder in (config.data.val_shards, config.data.train_shards):
        if (Path(folder) / MANIFEST).is_file():
            return ShardSet.open(folder).classes
    return ()


def load_detector(config: RunConfig, weights: Path) -> DetectionModel:
    """A trained detector in eval mode, on the CPU in float32.

    Args:
        config: Of the run that the weights come from.
        weights: A safetensors file, or a folder of them.

    Raises:
        ModelError: The file is absent or damaged, or its weights are not this model's.
        ConfigError: The classes cannot be told.
    """
    from piip_scale.tasks.detectors import build_detection_model
    from piip_scale.tasks.weights import load_weights

    model = build_detection_model(config, len(class_names(config)))
    load_weights(model, weights)
    return model.eval()
