"""Small detectors and hand-made batches, for every test of the tasks."""

import torch

from piip_scale.config.detection import DetectorConfig
from piip_scale.config.loading import check_config
from piip_scale.data.batch import MASK_SIZE_PX, DetectionBatch, ImageInfo, Instances
from piip_scale.models.branch import FeatureSpec
from piip_scale.tasks.detection.heads_config import plan_detector

SMALL_RCNN = {
    "neck.out_channels": 32,
    "rpn_head.feat_channels": 32,
    "roi_head.bbox_head.fc_out_channels": 64,
    "train_cfg.rpn_proposal.max_per_img": 50,
    "test_cfg.rpn.max_per_img": 50,
}
SMALL_MASK = {"roi_head.mask_head.conv_out_channels": 32, "roi_head.mask_head.num_convs": 1}
SMALL_DINO = {"num_queries": 40, "encoder.num_layers": 1, "decoder.num_layers": 2, "test_cfg.max_per_img": 20}
SMALL = {
    "mask_rcnn": SMALL_RCNN | SMALL_MASK,
    "faster_rcnn": SMALL_RCNN,
    "cascade_mask_rcnn": SMALL_RCNN | SMALL_MASK,
    "dino": SMALL_DINO,
}
CLASSES = ("disc", "box", "star")


def run_config(kind="mask_rcnn", overrides=None, scales=(4.0, 2.0, 1.0, 0.5), **data):
    branches = [
        {"resolution_px": 64, "embed_dim": 64, "depth": 2, "num_heads": 2},
        {"resolution_px": 128, "embed_dim": 32, "depth": 2, "num_heads": 2},
    ]
    return check_config(
        {
            "model": {
                "branches": branches,
                "interaction": {"num_stages": 2, "num_heads": 2},
                "pyramid": {"scales": scales},
            },
            "detector": {"kind": kind, "overrides": SMALL[kind] if overrides is None else overrides},
            "data": {"train_shards": "train", "val_shards": "val", **data},
            "train": {"steps": 1},
        }
    )


def instances(boxes, labels=None, crowd=None, masks=True):
    boxes = torch.as_tensor(boxes, dtype=torch.float32).view(-1, 4)
    count = len(boxes)
    return Instances(
        boxes_xyxy_px=boxes,
        labels=torch.as_tensor(labels if labels is not None else [0] * count, dtype=torch.long),
        is_crowd=torch.as_tensor(crowd if crowd is not None else [False] * count, dtype=torch.bool),
        mini_masks=torch.full((count, MASK_SIZE_PX, MASK_SIZE_PX), 255, dtype=torch.uint8) if masks else None,
    )


def batch_of(*images_instances, size_px=(128, 160), sizes_px=None, scale=0.5):
    sizes = sizes_px or [size_px] * len(images_instances)
    infos = tuple(
        ImageInfo(f"image{i}", i + 1, (round(h / scale), round(w / scale)), (h, w), (scale, scale))
        for i, (h, w) in enumerate(sizes)
    )
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (len(infos), *size_px, 3), dtype=torch.uint8, generator=generator)
    for image, (height, width) in zip(images, sizes, strict=True):
        image[height:] = 0
        image[:, width:] = 0
    return DetectionBatch(images, infos, tuple(images_instances))


def two_image_batch():
    first = instances([[10, 12, 60, 70], [70, 30, 150, 120]], [0, 2])
    second = instances([[20, 20, 52, 48], [64, 64, 100, 110], [5, 90, 40, 125]], [1, 1, 0])
    return batch_of(first, second)


def plan(kind, overrides=None, strides=(4, 8, 16, 32), num_classes=80):
    features = [FeatureSpec(8, stride) for stride in strides]
    return plan_detector(DetectorConfig(kind=kind, overrides=overrides or {}), features, num_classes)
