"""What tasks over packed shards have in common: opening the sets and loading from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import PIL.Image
import torch
from torch import nn

from piip_scale.config.run import RunConfig
from piip_scale.data.batch import Batch
from piip_scale.data.images import Image
from piip_scale.data.loader import SampleMaker, SetLoader
from piip_scale.data.reading.opened import OpenedSets
from piip_scale.data.reading.sample_set import SampleSet
from piip_scale.data.reading.shards import ShardSet
from piip_scale.data.reading.targets import check_trainable, targets_lines
from piip_scale.data.stream import ShardLoader
from piip_scale.errors import DataError
from piip_scale.logging import get_logger
from piip_scale.registry import row_of
from piip_scale.tasks.base import Metric, Outline
from piip_scale.tasks.counting import network_flops
from piip_scale.tasks.drawing import DrawingStyle
from piip_scale.tasks.outline import outline_run
from piip_scale.tasks.watched import WatchedSamples, watched_numbers
from piip_scale.world import World

BatchT = TypeVar("BatchT", bound=Batch)
ConfigT = TypeVar("ConfigT", bound=RunConfig)


class ShardTask(ABC, Generic[ConfigT, BatchT]):
    """A ``Task`` over packed shards.

    Validation shards are taken at once, training shards when first asked for, so that evaluating needs none.

    Args:
        config: The run.
        world: This rank among all.
        broken_samples: A folder of the run where its ranks put down which samples are broken, if it has one.
        val_set: A set to evaluate on in place of the validation shards, of the config's classes.
        sets: Those that this process has open; ``None`` for none.

    Raises:
        DataError: Validation shards that are absent, damaged, of another kind, or of other classes than the config's.
    """

    def __init__(
        self,
        config: ConfigT,
        world: World,
        broken_samples: Path | None = None,
        val_set: SampleSet | None = None,
        sets: OpenedSets | None = None,
    ) -> None:
        self.config, self.world, self._broken_samples = config, world, broken_samples
        self._sets, data = sets or OpenedSets(), config.data
        self.val_set = self._opened(data.val_shards, data.classes) if val_set is None else val_set
        self._val_loader = self._set_loader(self.val_set)
        if data.num_classes not in (None, len(self.classes)):
            raise DataError(
                f"{self.val_set.location} has {len(self.classes)} classes",
                rule=f"data.num_classes is {data.num_classes}",
                fix="pack the set that the config means, or set data.num_classes to what is there",
            )

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in label order."""
        return self.val_set.classes

    def build_model(self) -> nn.Module:
        """The model in float32: heads initialised on the CPU, the network on the meta device.

        Raises:
            ConfigError: Heads that cannot be built as the config says.
        """
        return self._new_model(network_device="meta")

    def check(self) -> None:
        """Checks what could go wrong at the start of a training, without the model's memory.

        Raises:
            PiipError: Training shards, loader or model do not go together with the config.
        """
        self.num_train_batches()
        watched_numbers(self.val_set, self.config.telemetry.pictures)
        with torch.device("meta"):
            self._new_model()

    def train_batches(self, epoch: int, first_step: int) -> Iterator[BatchT]:
        """This rank's micro-batches of an epoch from a micro-step on; equally many on every rank.

        Raises:
            DataError: Shards that are absent or damaged, lack what the task needs, or hold too few images.
        """
        return self._train_loader.batches(epoch, first_step)

    def train_keys(self, epoch: int, micro_steps: Iterable[int]) -> list[list[str]]:
        """The keys of the samples that these micro-steps of this rank ask for, broken ones among them; loads none."""
        return self._train_loader.keys(epoch, micro_steps)

    def num_train_batches(self) -> int:
        """Micro-batches of one epoch, the same on every rank."""
        return len(self._train_loader)

    def data_id(self) -> str:
        """The checksums of what both sets hold."""
        return f"train {self._train_loader.shards.short_id}, val {self.val_set.short_id}"

    def num_broken_samples(self) -> int:
        """Training samples that this rank had to replace since it started."""
        return self._train_loader.num_broken

    def val_batches(self) -> Iterator[BatchT]:
        """This rank's share of the validation set; equally many batches on every rank, the last repeat samples."""
        return self._val_loader.val_batches()

    def num_val_batches(self) -> int:
        """Batches of ``val_batches``, the same on every rank."""
        images_per_step = self.world.num_ranks * self.config.data.micro_batch_size
        return -(-len(self.val_set) // images_per_step)

    def own_val_batches(self) -> Iterator[BatchT]:
        """This rank's batches of the validation set, each image in one batch of one rank; broken ones are left out."""
        return self._val_loader.own_batches()

    def num_own_val_batches(self) -> int:
        """Batches of ``own_val_batches``."""
        return len(self._val_loader.own_requests())

    def num_val_samples(self) -> int:
        """Images of the validation set."""
        return len(self.val_set)

    def num_broken_val_samples(self) -> int:
        """Validation samples that this rank had to replace or leave out."""
        return self._val_loader.num_broken

    def outline(self, config: RunConfig, device_type: str = "cuda") -> Outline:
        """What planning needs to know of a run that differs from this one's in its network or batch only."""
        return outline_run(config, len(self.classes), device_type=device_type)

    def network_flops(self, height_px: int, width_px: int) -> int:
        """Model FLOPs of one image of this size in a training step, heads left out: what MFU is measured by."""
        return network_flops(self.config, len(self.classes), height_px, width_px)

    def watched(self) -> WatchedSamples:
        """A fresh collection of what is found in the images that ``telemetry.pictures`` names."""
        return WatchedSamples(self.val_set, self._watched_numbers, self.draw)

    @cached_property
    def _watched_numbers(self) -> list[int]:
        return watched_numbers(self.val_set, self.config.telemetry.pictures)

    @abstractmethod
    def build_metric(self) -> Metric:
        """A fresh metric over the validation set."""

    @abstractmethod
    def draw(self, pixels: Image, found: Any, style: DrawingStyle) -> PIL.Image.Image:
        """An image, RGB uint8 (H, W, 3), with what the model found in it."""

    @abstractmethod
    def _new_model(self, network_device: str | None = None) -> nn.Module:
        """The model with random weights; its network on another device than torch's default one, if given."""

    @abstractmethod
    def _maker(self, shards: SampleSet) -> SampleMaker[BatchT]:
        """Makes batches of a set's samples."""

    @property
    def _groups_by_aspect(self) -> bool:
        """Whether tall and wide images train in batches of their own."""
        return False

    def _check_train_shards(self, shards: ShardSet) -> None:
        """Raises a ``DataError`` where the set lacks what training needs."""

    def _opened(self, location: str, classes: Sequence[str]) -> ShardSet:
        return self._sets.open(location, self.config.data, classes, row_of(self.config.task).set_kind)

    @cached_property
    def _train_loader(self) -> ShardLoader[BatchT]:
        shards = self._opened(self.config.data.train_shards, self.classes)
        self._check_train_shards(shards)
        self._check_targets(shards)
        return self._loader(shards)

    def _check_targets(self, shards: ShardSet) -> None:
        """Logs what of the training set can be trained on; a set packed before that was counted goes without."""
        manifest = shards.manifest
        if manifest.targets is None:
            return
        check_trainable(manifest.kind, manifest.targets, shards.location, manifest.num_samples)
        lines = targets_lines(manifest.kind, shards.classes, manifest.targets)
        get_logger(__name__).info("%s: %s", shards.location, "; ".join(lines))

    def _set_loader(self, samples: SampleSet) -> SetLoader[BatchT]:
        if isinstance(samples, ShardSet):
            return self._loader(samples)
        config = self.config
        return SetLoader(samples, config.data, self._maker(samples), seed=config.train.seed, world=self.world)

    def _loader(self, shards: ShardSet) -> ShardLoader[BatchT]:
        data, train = self.config.data, self.config.train
        return ShardLoader(
            shards,
            data,
            self._maker(shards),
            seed=train.seed,
            world=self.world,
            accumulation=train.gradient_accumulation,
            group_by_aspect=self._groups_by_aspect,
            broken_samples=self._broken_samples,
        )
