"""What is measured: small PIIP detectors on images made up on the spot."""

from __future__ import annotations

from typing import Any, cast

import torch

from piip_scale.config.detection import DetectionRun
from piip_scale.config.loading import check_config
from piip_scale.data.batch import MASK_SIZE_PX, DetectionBatch, ImageInfo, Instances
from piip_scale.tasks.detection.model import DetectionModel, build_detection_model

SIZE_PX = 128
NUM_CLASSES = 3
OBJECTS_PER_IMAGE = 3

HEADS = {
    "neck.out_channels": 32,
    "rpn_head.feat_channels": 32,
    "roi_head.bbox_head.fc_out_channels": 32,
    "roi_head.mask_head.conv_out_channels": 32,
    "roi_head.mask_head.num_convs": 1,
    "train_cfg.rpn_proposal.max_per_img": 50,
}
"""Mask R-CNN's, made small."""
TINY_H6B = (
    "model.branches.0.embed_dim=128",
    "model.branches.0.num_heads=4",
    "model.branches.0.pretrain_resolution_px=64",
    "model.branches.0.pretrained=None",
    "model.branches.1.num_heads=4",
    "model.branches.1.pretrain_resolution_px=64",
    "model.branches.1.pretrained=None",
    "model.interaction.num_heads=2",
    "data.train_shards='-'",
    "data.val_shards='-'",
    "data.micro_batch_size=1",
    "train.images_per_step=None",
)
"""PIIP-H6B's depths, kinds of blocks and groups of parameters, but for the small branch's width, which is chosen."""

_DINO = {"num_queries": 40, "encoder.num_layers": 1, "decoder.num_layers": 2, "test_cfg.max_per_img": 20}
_OVERRIDES = {"mask_rcnn": HEADS, "dino": _DINO}


def detector_config(
    kind: str = "mask_rcnn", large_dim: int = 128, depth: int = 2, checkpoint_blocks: bool = False, **sections: Any
) -> DetectionRun:
    """A detector of two branches with ``depth`` blocks each, the small one of a quarter of the large one's width.

    Args:
        kind: The detector.
        large_dim: Width of the large branch, a multiple of 128.
        depth: A multiple of 2.
        checkpoint_blocks: Of both branches.
        sections: Sections of the config, merged onto it; ``overrides`` onto the detector's.
    """
    shared = {"depth": depth, "num_heads": large_dim // 32, "checkpoint_blocks": checkpoint_blocks}
    branches = [
        shared | {"resolution_px": SIZE_PX // 2, "embed_dim": large_dim},
        shared | {"resolution_px": SIZE_PX, "embed_dim": large_dim // 4},
    ]
    values: dict[str, Any] = {
        "model": {"branches": branches, "interaction": {"num_stages": 2, "num_heads": 2}},
        "detector": {"kind": kind, "overrides": _OVERRIDES[kind] | sections.pop("overrides", {})},
        "data": {"train_shards": "-", "val_shards": "-", "micro_batch_size": 1},
        "schedule": {"warmup_steps": 0, "kind": "constant"},
        "train": {"steps": 1000},
    }
    return cast(
        DetectionRun, check_config(values | {name: values.get(name, {}) | keys for name, keys in sections.items()})
    )


def build(config: DetectionRun) -> DetectionModel:
    """The config's detector, the same at every call."""
    torch.manual_seed(0)
    return build_detection_model(config, NUM_CLASSES)


def made_up_batch(
    key: int, num_images: int = 1, size_px: int = SIZE_PX, num_objects: int = OBJECTS_PER_IMAGE
) -> DetectionBatch:
    """Noise with boxes, the same for the same key; as many objects in each image."""
    generator = torch.Generator().manual_seed(key)
    images = torch.randint(0, 256, (num_images, size_px, size_px, 3), dtype=torch.uint8, generator=generator)
    side = (size_px, size_px)
    infos = tuple(ImageInfo(f"{key}_{i}", key * num_images + i, side, side, (1.0, 1.0)) for i in range(num_images))
    return DetectionBatch(images, infos, tuple(_objects(size_px, num_objects, generator) for _ in range(num_images)))


def _objects(size_px: int, count: int, generator: torch.Generator) -> Instances:
    corner = torch.rand(count, 2, generator=generator) * size_px / 2
    extent = (0.2 + 0.3 * torch.rand(count, 2, generator=generator)) * size_px
    return Instances(
        boxes_xyxy_px=torch.cat([corner, corner + extent], dim=1),
        labels=torch.randint(0, NUM_CLASSES, (count,), generator=generator),
        is_crowd=torch.zeros(count, dtype=torch.bool),
        mini_masks=torch.full((count, MASK_SIZE_PX, MASK_SIZE_PX), 255, dtype=torch.uint8),
    )
