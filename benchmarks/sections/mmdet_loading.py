"""mmdet 3.3's own way from a COCO file to network input, as its Mask R-CNN recipes write it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from piip_scale.tasks import mmlab

MULTI_SCALE = "multi-scale 480-800, masks"
JITTER = "LSJ 0.1-2.0 at 1024, masks"
SHORT_EDGES_PX = tuple(range(480, 801, 32))
MAX_EDGE_PX = 1333
CROP_PX = (1024, 1024)
JITTER_SCALE = (0.1, 2.0)

_STEPS: dict[str, list[dict[str, Any]]] = {
    MULTI_SCALE: [
        {
            "type": "RandomChoiceResize",
            "scales": [(MAX_EDGE_PX, edge) for edge in SHORT_EDGES_PX],
            "keep_ratio": True,
        },
        {"type": "RandomFlip", "prob": 0.5},
    ],
    JITTER: [
        {"type": "RandomResize", "scale": CROP_PX, "ratio_range": JITTER_SCALE, "keep_ratio": True},
        {
            "type": "RandomCrop",
            "crop_type": "absolute",
            "crop_size": CROP_PX,
            "recompute_bbox": True,
            "allow_negative_crop": True,
        },
        {"type": "FilterAnnotations", "min_gt_bbox_wh": (1e-2, 1e-2)},
        {"type": "RandomFlip", "prob": 0.5},
    ],
}


def mmdet_set(recipe: str, annotations: Path, images: Path, *, bitmaps: bool = True) -> Any:
    """Mmdet's ``CocoDataset``, whose items are packed samples.

    Args:
        recipe: ``MULTI_SCALE`` or ``JITTER``.
        annotations: The COCO file.
        images: The folder of its images.
        bitmaps: Masks as bitmaps, as in all recipes; else as polygons.
    """
    # The stand-in for mmcv's compiled ops comes before mmdet's data sets.
    assert mmlab.PACKAGE_FOLDER
    from mmdet.datasets import CocoDataset

    root = mmlab.Config.fromfile(str(annotations))
    pipeline = [
        {"type": "LoadImageFromFile", "backend_args": None},
        {"type": "LoadAnnotations", "with_bbox": True, "with_mask": True, "poly2mask": bitmaps},
        *_STEPS[recipe],
        {"type": "PackDetInputs"},
    ]
    with mmlab.DefaultScope.overwrite_default_scope("mmdet"):
        return CocoDataset(
            ann_file=str(annotations),
            data_prefix={"img": f"{images}/"},
            metainfo={"classes": tuple(category["name"] for category in root["categories"])},
            filter_cfg={"filter_empty_gt": False},
            pipeline=pipeline,
        )
