"""What a segmentation run is told is refused where it makes no sense."""

import pytest

from piip_scale.config.loading import check_config
from piip_scale.config.segmentation import SegmentationRun
from piip_scale.errors import ConfigError


def values(augment=(), **segmentor):
    branch = {"resolution_px": 64, "embed_dim": 32, "depth": 2, "num_heads": 2}
    data = {"train_shards": "a", "val_shards": "b", "augment": dict(augment)}
    return {
        "task": "segmentation",
        "model": {"branches": [branch]},
        "segmentor": segmentor,
        "data": data,
        "train": {"steps": 1},
    }


def test_defaults_are_ade20ks():
    config = check_config(values())
    assert isinstance(config, SegmentationRun)
    augment = config.data.augment
    assert (augment.short_edge_px, augment.max_edge_px, augment.crop_px) == (512, 2048, (512, 512))
    assert config.segmentor.inference.mode == "whole"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"inference": {"mode": "slide"}}, "slide needs both"),
        ({"inference": {"crop_px": (64, 64)}}, "whole takes neither"),
        ({"inference": {"mode": "slide", "crop_px": (64, 64), "stride_px": (64, 65)}}, "must not be above crop_px"),
        ({"inference": {"mode": "slide", "crop_px": (60, 64), "stride_px": (30, 30)}}, "multiples of"),
        ({"kind": "fpn"}, "upernet"),
        ({"augment": {"scale_range": (2.0, 0.5)}}, "low <= high"),
        ({"augment": {"short_edge_px": 800, "max_edge_px": 700}}, "must not be above max_edge_px"),
        ({"augment": {"crop_px": (100, 96)}}, "multiples of pad_multiple_px"),
        ({"augment": {"crop_px": (96, 96), "pad_multiple_px": 16}}, "a multiple of 32, the stride of the pyramid's"),
        ({"augment": {"distortion": {"contrast": (1.5, 0.5)}}}, "low <= high"),
        ({"augment": {"distortion": {"hue": 0}}}, "greater than or equal to 1"),
        ({"augment": {"max_class_share": 1.5}}, "less than or equal to 1"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, told):
    with pytest.raises(ConfigError, match=told):
        check_config(values(**changes))
