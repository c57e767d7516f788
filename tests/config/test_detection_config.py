"""What a detection run is told is refused where it makes no sense."""

import pytest

from piip_scale.config.loading import check_config
from piip_scale.errors import ConfigError


def values(augment=(), **data):
    branches = [{"resolution_px": 64, "embed_dim": 32, "depth": 2, "num_heads": 2}]
    return {
        "model": {"branches": branches},
        "detector": {"kind": "faster_rcnn"},
        "data": {"train_shards": "a", "val_shards": "b", "augment": dict(augment), **data},
        "train": {"steps": 1},
    }


def test_defaults_are_accepted():
    data = check_config(values()).data
    assert (data.group_by_aspect, data.polygons, data.augment.photometric) == (False, False, None)
    assert check_config(values(group_by_aspect=True, augment={"photometric": {}})).data.augment.photometric.contrast


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"augment": {"pad_multiple_px": 48}}, "pad_multiple_px=48 must be a multiple of 32"),
        ({"group_by_aspect": True, "micro_batch_size": 1}, "saves no padding"),
        ({"group_by_aspect": True, "augment": {"jitter_scale": (0.1, 2.0), "crop_px": (64, 64)}}, "saves no padding"),
        ({"augment": {"photometric": {"contrast": (1.5, 0.5)}}}, "low <= high"),
        ({"augment": {"photometric": {"hue_degrees": 200}}}, "less than or equal to 180"),
        ({"augment": {"jitter_scale": (0.1, 2.0)}}, "set crop_px as well"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, told):
    with pytest.raises(ConfigError, match=told):
        check_config(values(**changes))


def test_padding_follows_the_smallest_level():
    config = values(augment={"pad_multiple_px": 16})
    config["model"]["pyramid"] = {"scales": (2.0, 1.0)}
    assert check_config(config).model.geometry.coarsest_stride_px() == 16
