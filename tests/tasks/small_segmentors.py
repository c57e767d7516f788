"""Small segmentors and hand-made batches, for every test of the tasks."""

import torch

from piip_scale.config.loading import check_config
from piip_scale.data.batch import ImageInfo, SegmentationBatch

CLASSES = ("sky", "wall", "tree", "road")


def run_config(**segmentor):
    branches = [
        {"resolution_px": 32, "embed_dim": 64, "depth": 2, "num_heads": 2},
        {"resolution_px": 64, "embed_dim": 32, "depth": 2, "num_heads": 2},
    ]
    overrides = {"decode_head.channels": 16, "auxiliary_head.channels": 16}
    return check_config(
        {
            "task": "segmentation",
            "model": {"branches": branches, "interaction": {"num_stages": 2, "num_heads": 2}},
            "segmentor": {"overrides": overrides, **segmentor},
            "data": {"train_shards": "train", "val_shards": "val", "augment": {"crop_px": (64, 64)}},
            "train": {"steps": 1},
        }
    )


def batch_of(count, size_px=(64, 64), stored_px=(64, 64), first_id=0):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, *size_px, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, len(CLASSES), (count, *stored_px), dtype=torch.uint8, generator=generator)
    labels[:, :2] = 255
    scale_xy = size_px[1] / stored_px[1], size_px[0] / stored_px[0]
    numbers = range(first_id, first_id + count)
    infos = tuple(ImageInfo(f"image{number}", number, stored_px, size_px, scale_xy) for number in numbers)
    return SegmentationBatch(images, infos, labels)
