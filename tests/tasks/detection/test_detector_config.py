"""What neck, heads and features must agree on follows from one number."""

import pytest
from small_detectors import plan

from piip_scale.errors import ConfigError


def test_the_necks_width_and_the_features_reach_every_head():
    model = plan("mask_rcnn", {"neck.out_channels": 32}, num_classes=3).model
    roi = model["roi_head"]
    assert model["neck"]["in_channels"] == [8, 8, 8, 8]
    assert model["rpn_head"]["in_channels"] == 32
    assert model["rpn_head"]["anchor_generator"]["strides"] == [4, 8, 16, 32, 64]
    assert roi["bbox_roi_extractor"]["out_channels"] == roi["mask_roi_extractor"]["out_channels"] == 32
    assert roi["bbox_head"]["in_channels"] == roi["mask_head"]["in_channels"] == 32
    assert roi["bbox_head"]["num_classes"] == roi["mask_head"]["num_classes"] == 3


def test_strides_follow_the_features_and_the_number_of_levels():
    model = plan("faster_rcnn", {"neck.num_outs": 3}, strides=(8, 16)).model
    assert model["rpn_head"]["anchor_generator"]["strides"] == [8, 16, 32]
    assert model["roi_head"]["bbox_roi_extractor"]["featmap_strides"] == [8, 16]


def test_roi_sizes_reach_heads_and_targets():
    overrides = {
        "roi_head.bbox_roi_extractor.roi_layer.output_size": 5,
        "roi_head.mask_roi_extractor.roi_layer.output_size": 7,
    }
    for kind in ("mask_rcnn", "cascade_mask_rcnn"):
        model = plan(kind, overrides).model
        heads, train = model["roi_head"]["bbox_head"], model["train_cfg"]["rcnn"]
        assert {head["roi_feat_size"] for head in (heads if isinstance(heads, list) else [heads])} == {5}
        assert {stage["mask_size"] for stage in (train if isinstance(train, list) else [train])} == {14}


def test_roi_sizes_may_be_oblong():
    model = plan("mask_rcnn", {"roi_head.mask_roi_extractor.roi_layer.output_size": [7, 14]}).model
    assert model["train_cfg"]["rcnn"]["mask_size"] == [14, 28]


def test_replacing_what_others_depend_on_is_one_line():
    head = {"_delete_": True, "type": "StandardRoIHead"}
    with pytest.raises(ConfigError, match="bbox_roi_extractor") as caught:
        plan("mask_rcnn", {"roi_head": head})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("mask_rcnn", "roi_head.mask_head.num_classes"),
        ("cascade_mask_rcnn", "roi_head.bbox_head.1.num_classes"),
        ("dino", "bbox_head.num_classes"),
    ],
)
def test_the_data_decide_how_many_classes_there_are(kind, key):
    with pytest.raises(ConfigError, match=r"num_classes: got 7; the data set has 3 classes"):
        plan(kind, {key: 7}, num_classes=3)
    assert plan(kind, {key: 3}, num_classes=3)


def test_overrides_win_over_what_follows():
    model = plan("mask_rcnn", {"rpn_head.anchor_generator.strides": [4, 8, 16, 32, 128]}).model
    assert model["rpn_head"]["anchor_generator"]["strides"] == [4, 8, 16, 32, 128]


def test_nothing_pretrained_and_no_preprocessor_is_left():
    for kind in ("mask_rcnn", "faster_rcnn", "cascade_mask_rcnn", "dino"):
        model = plan(kind).model
        assert "Pretrained" not in str(model)
        assert "data_preprocessor" not in model


def test_dino_takes_three_strides_wherever_they_are():
    assert plan("dino").feature_indices == (1, 2, 3)
    assert plan("dino", strides=(8, 16, 32)).feature_indices == (0, 1, 2)
    with pytest.raises(ConfigError, match=r"strides \[8, 16, 32\].*scales"):
        plan("dino", strides=(4, 8, 16))


def test_dinos_levels_reach_its_attention_and_its_width_is_fixed():
    model = plan("dino", {"neck.num_outs": 3}).model
    assert model["num_feature_levels"] == 3
    assert model["encoder"]["layer_cfg"]["self_attn_cfg"]["num_levels"] == 3
    with pytest.raises(ConfigError, match="256"):
        plan("dino", {"neck.out_channels": 128})


def test_a_neck_without_a_width_is_refused():
    with pytest.raises(ConfigError, match=r"neck\.num_outs"):
        plan("faster_rcnn", {"neck": {"_delete_": True, "type": "ChannelMapper", "out_channels": 32}})
